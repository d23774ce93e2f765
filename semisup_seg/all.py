"What users call, by one import: `from semisup_seg.all import *`; the parts it is made of stay in their modules"
from semisup_seg.core import (IGNORE, PALETTE, Codes, DatasetError, DatasetSummary, Table, check_dataset, image_files, load_image, load_mask,
    overlay, parse_codes, read_codes, show_rows, split_files, unlabeled_files)
from semisup_seg.data import Augment, ClassMask, resize_image, seg_dls, standard_augment
from semisup_seg.datasets import SOURCES, brain_slices, busi, covid_ct, kvasir_seg
from semisup_seg.models.core import SegNet, build_model, cost, more_networks, n_params, network_table, networks, register, speeds, stages
from semisup_seg.learner import (CEDiceLoss, KeepBest, dice, find_lr, fit, jaccard, load_model, overlap_counts, overlap_metrics, predict,
    save_model, seg_learner)
from semisup_seg.record import Annotations, correlation, predict_dice, read_annotations, show_annotations, show_calibration, trust
from semisup_seg.vote import agreement, entropy, vote, votes
from semisup_seg.views import View, get_views, register_view, views
from semisup_seg.annotate import annotate, validation_dice, write_masks
from semisup_seg.recipe import Again, Confident, CutMix, EMA, Hard, Mix, OnPseudo, Seen, Strong, Trusted, get_recipe, recipes
from semisup_seg.report import Report, curves, interval, judged_files, make_report, read_report, save_report, score_images, score_masks
from semisup_seg.distill import Result, data_distillation, distill, model_data_distillation, model_distillation, simple_training
from semisup_seg.compare import Comparison, compare_runs
from semisup_seg.suggest import suggest
from semisup_seg.review import Review, add_label
from semisup_seg.plan import Job, Plan
from semisup_seg.widgets import browse
from semisup_seg.form import run_form
from semisup_seg.compat import dataDistillation, modelDataDistillation, modelDistillation, simpleTraining

__all__ = sorted(n for n in globals() if not n.startswith('_'))
