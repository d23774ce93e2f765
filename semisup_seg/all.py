"What users call, by one import: `from semisup_seg.all import *`; the parts it is made of stay in their modules"
from semisup_seg.core import IGNORE, DatasetError
from semisup_seg.display import PALETTE, Table, overlay, show_rows
from semisup_seg.data.images import Codes, load_image, load_mask, parse_codes, read_codes, readers, register_reader
from semisup_seg.data.folder import DatasetSummary, check_dataset, image_files, split_files, split_groups, unlabeled_files
from semisup_seg.data.loaders import Augment, ClassMask, ImageCache, resize_image, seg_dls, standard_augment
from semisup_seg.data.sources import SOURCES, brain_slices, busi, covid_ct, kvasir_seg
from semisup_seg.models.core import SegNet, build_model, networks, register
from semisup_seg.models.cost import cost, more_networks, n_params, network_table, speeds, stages, strong_teachers
from semisup_seg.training.losses import CEDiceLoss, MaskedLoss
from semisup_seg.training.learner import KeepBest, find_lr, fit, seg_learner
from semisup_seg.training.metrics import SegMetric, dice, foreground_mean, jaccard, confusion_counts, metrics, overlap_metrics, register_metric, score_mask
from semisup_seg.training.inference import Predictor, load_model, predict, save_model
from semisup_seg.annotation.records import AnnotationRecord, Annotations, merge_annotations, predict_dice, read_annotations, reliability, show_annotations, show_calibration, spearman
from semisup_seg.annotation.voting import agreement, entropy, vote, vote_rules
from semisup_seg.annotation.views import View, get_views, register_view, views
from semisup_seg.annotation.batch import annotate_batch
from semisup_seg.annotation.vote_setup import MaskFolder, prepare_vote
from semisup_seg.annotation.annotate import annotate, calibrate_voters, validation_dice, write_masks
from semisup_seg.distillation.batches import ConfidenceThreshold, CutMix, HardLabels, MixedBatches, PseudoCallback, StrongAugment
from semisup_seg.distillation.recipe import EMA, Recipe, TopReliable, get_recipe, recipes
from semisup_seg.distillation.run import describe_event, read_events
from semisup_seg.distillation.methods import Result, methods, online_training, register_method
from semisup_seg.evaluation.report import Report, curves, evaluation_files, make_report, read_report, save_report
from semisup_seg.evaluation.scores import bootstrap_interval, score_images, score_masks
from semisup_seg.distillation.distill import data_distillation, distill, model_data_distillation, model_distillation, simple_training
from semisup_seg.distillation.online import CollapseWatch, OnlineTeacher, train_online
from semisup_seg.distillation.mean_teacher import MeanTeacher
from semisup_seg.distillation.fixmatch import FixMatch
from semisup_seg.distillation.unimatch import UniMatch
from semisup_seg.evaluation.compare import Comparison, compare_runs
from semisup_seg.annotation.suggest import suggest
from semisup_seg.annotation.review import Review, add_label
from semisup_seg.app.job import Job, Plan
from semisup_seg.app.browser import browse
from semisup_seg.app.form import run_form
from semisup_seg.compat import dataDistillation, modelDataDistillation, modelDistillation, simpleTraining

__all__ = sorted(n for n in globals() if not n.startswith('_'))
