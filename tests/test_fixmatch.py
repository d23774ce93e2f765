"FixMatch: its strong view, its loss, and what its student sees"
from math import log
from types import SimpleNamespace

import pytest, torch
from conftest import SIZE
from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.torch_core import set_seed
from torch import nn

from semisup_seg.core import IGNORE
from semisup_seg.data.folder import unlabeled_files
from semisup_seg.data.loaders import seg_dls
from semisup_seg.distillation.batches import unlabeled_loader
from semisup_seg.distillation.fixmatch import FixMatch, StrongView, confident_loss
from semisup_seg.distillation.online import pseudo_labels
from semisup_seg.training.losses import CEDiceLoss

# --- the strong view and the loss

def test_a_cutmix_box_carries_image_and_pseudo_label_alike():
    set_seed(0)
    labels = torch.randint(3, (8, 32, 32))
    labels[:, :4] = IGNORE
    view = StrongView()
    view.colors = nn.Identity()
    images,mixed = view(labels[:, None].expand(-1, 3, -1, -1).float(), labels)
    assert torch.equal(images[:, 0].long(), mixed) and not torch.equal(mixed, labels)

def test_the_strong_view_changes_colours_and_leaves_the_weak_one_alone():
    set_seed(0)
    images,labels = torch.rand(4, 3, 32, 32), torch.zeros(4, 32, 32, dtype=torch.long)
    before = images.clone()
    strong,mixed = StrongView()(images, labels)
    assert torch.equal(images, before) and torch.equal(mixed, labels)
    assert not torch.equal(strong, images) and strong.shape==images.shape and 0<=strong.min() and strong.max()<=1

def test_unconfident_pixels_give_no_gradient_and_count_among_all_pixels():
    logits = torch.zeros(2, 2, 2, 2, requires_grad=True)
    labels = torch.full((2, 2, 2), IGNORE)
    labels[0, 0] = torch.tensor([0, 1])
    loss = confident_loss(logits, labels)
    loss.backward()
    assert loss.item()==pytest.approx(log(2)*2/8)
    assert torch.equal(logits.grad.abs().sum(1)>0, labels!=IGNORE)
    none = confident_loss(logits, torch.full((2, 2, 2), IGNORE))
    assert none.item()==0 and none.requires_grad

# --- the callback

class Record(Callback):
    "What the loss was given, and what was added to it"
    order = 70
    run_valid = False
    def before_fit(self): self.steps = []
    def after_backward(self):
        cb = self.fix_match
        grads = [p.grad for p in cb.teacher.parameters()]
        self.steps.append(SimpleNamespace(images=self.x.detach().clone(), pred=len(self.pred), y=self.y.clone(), loss=self.loss_grad.item(),
            labels_alone=self.learn.loss_func(self.pred, self.y).item(), pseudo=cb.pseudo, labels=cb.labels, target=cb.target, answer=cb.answer, grads=grads))

def train(path, identity=False, **options):
    "A training of a single convolution, which behaves alike in training and in evaluation: what `Record` saw"
    torch.manual_seed(0)
    learn = Learner(seg_dls(path, SIZE, 2), nn.Conv2d(3, 2, 3, padding=1), CEDiceLoss())
    cb = FixMatch(unlabeled_loader(unlabeled_files(path), SIZE, 3), **options)
    if identity: cb.strong = lambda images, labels: (images, labels)
    record = Record()
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2, cbs=[cb, record])
    return record.steps

def test_the_student_sees_strong_views_and_the_loss_of_the_labels_sees_labelled_images_alone(trained_discs):
    for step in train(trained_discs, threshold=0.5):
        assert (len(step.images), step.pred, step.labels.shape)==(5, 2, (3, *SIZE))
        assert not any(g is not None for g in step.grads)

def test_confident_pixels_of_the_teacher_are_the_labels_and_their_cross_entropy_is_added(trained_discs):
    for step in train(trained_discs, identity=True, threshold=0.6, weight=3.):
        confident = step.target.amax(1)>=0.6
        assert 0<confident.float().mean()<1
        assert torch.equal(step.pseudo[step.pseudo!=IGNORE], step.target.argmax(1)[step.pseudo!=IGNORE])
        assert not (~confident & (step.pseudo!=IGNORE)).any()
        want = step.labels_alone + 3*confident_loss(step.answer, step.labels).item()
        assert step.loss==pytest.approx(want, abs=1e-5) and step.loss>step.labels_alone

def test_without_a_confident_pixel_nothing_is_added(trained_discs):
    for step in train(trained_discs, threshold=1.): assert step.loss==pytest.approx(step.labels_alone, abs=1e-6)

def test_numbers_out_of_range_are_refused():
    cases = (dict(threshold=0), 'threshold is 0'), (dict(threshold=1.5), 'threshold is 1.5'), (dict(weight=0), 'weight is 0'), (dict(decay=2), 'decay is 2')
    for bad,message in cases:
        with pytest.raises(ValueError, match=message): FixMatch(None, **bad)

def test_pixels_beyond_the_border_and_unsure_ones_have_no_pseudo_label():
    probs = torch.tensor([[[[0.96, 0.94, 0.96, float('nan')]], [[0.04, 0.06, 0.04, float('nan')]]]])
    inside = torch.tensor([[[True, True, False, True]]])
    assert pseudo_labels(probs, inside, 0.95).tolist()==[[[0, IGNORE, IGNORE, IGNORE]]]
