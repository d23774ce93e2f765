"Loaders of unlabelled and pseudo-labelled images, mixed batches, and callbacks that change their pseudo-labelled part"
import dataclasses, random

import albumentations as A, numpy as np, pytest, torch
from conftest import SIZE, make_model
from fastai.callback.core import Callback, CancelFitException
from fastai.torch_core import set_seed

import semisup_seg.data.loaders as loaders
from semisup_seg.annotation.annotate import annotate
from semisup_seg.annotation.records import Annotations
from semisup_seg.core import IGNORE
from semisup_seg.data.folder import unlabeled_files
from semisup_seg.data.loaders import ImageCache, seg_dls
from semisup_seg.distillation.batches import (BatchMixer, ConfidenceThreshold, CutMix, HardLabels, MixedBatches, StrongAugment,
    endless, pseudo_loader, random_box, unlabeled_loader)
from semisup_seg.training.learner import seg_learner
from semisup_seg.training.losses import CEDiceLoss, one_hot

SHARES = [0, -0.1, 1.1, float('nan'), '0.5', True, None]

@pytest.fixture(scope='module')
def ann(trained_discs, tmp_path_factory):
    "Soft pseudo-labels of two untrained networks"
    models = [make_model(), make_model(seed=1)]
    return annotate(models, unlabeled_files(trained_discs), tmp_path_factory.mktemp('ann'), soft=True)

class Spy(Callback):
    "Keep every batch, and stop after `n`"
    order = 50
    run_valid = False
    def __init__(self, n):
        self.n = n
        self.seen = []
    def before_batch(self): self.seen.append((self.x.clone(), self.y.clone(), self.learn.labelled))
    def after_batch(self):
        if len(self.seen)==self.n: raise CancelFitException

def spy(path, ann, callbacks=(), share=0.5, n=1, bs=4, seed=0):
    "The first `n` batches that a network would see: images, targets, and how many are labelled"
    set_seed(seed)
    labelled,pseudo = MixedBatches(share).split(bs)
    mixer = BatchMixer(pseudo_loader(ann, SIZE, pseudo))
    learn = seg_learner(seg_dls(path, SIZE, labelled, epoch_len=8*labelled), 'U-Net', 'test_resnet')
    s = Spy(n)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-9, cbs=[mixer, *callbacks, s])
    return s.seen

def no_augment(): return A.Compose([])
def shift_right(): return A.Compose([A.Affine(translate_px=dict(x=(8, 8), y=(0, 0)), fill_mask=IGNORE, p=1)])

# --- pseudo_loader

def test_pseudo_loader_reads_what_annotate_wrote(ann):
    x,p = next(iter(pseudo_loader(ann, SIZE, 5, augment=no_augment)))
    assert x.shape==(5, 3, *SIZE) and p.shape==(5, 2, *SIZE)
    assert 0<=x.min() and x.max()<=1
    want = sorted(float(np.load(f)[1].mean()/255) for f in (ann.out/'soft').iterdir())
    np.testing.assert_allclose(sorted(p[:, 1].mean((1, 2)).tolist()), want, atol=0.005)
    assert torch.allclose(p.sum(1), torch.ones(()), atol=1e-5)

def test_pseudo_loader_resizes_and_repeats_few_images_until_they_fill_a_batch(ann):
    rows = [dataclasses.replace(r, used=i<2) for i,r in enumerate(ann.rows)]
    x,p = pseudo_loader(Annotations(ann.out, rows, []), (64, 48), 5).one_batch()
    assert x.shape==(5, 3, 64, 48) and p.shape==(5, 2, 64, 48)
    assert set((p.sum(1)*1000).round().unique().tolist())<={0, 1000}

def test_beyond_the_border_no_class_has_a_probability(ann):
    set_seed(1)
    loader = pseudo_loader(ann, SIZE, 5)
    for _ in range(3):
        _,p = loader.one_batch()
        assert 0<(p.sum(1)==0).float().mean()<0.5

def test_pseudo_loader_refuses_annotations_without_probabilities_or_without_images(trained_discs, ann, tmp_path):
    hard = annotate(make_model(), unlabeled_files(trained_discs)[:2], tmp_path)
    unused = Annotations(ann.out, [dataclasses.replace(r, used=False) for r in ann.rows], [])
    with pytest.raises(ValueError, match='soft=True'): pseudo_loader(hard, SIZE, 2)
    with pytest.raises(ValueError, match='no pseudo-label is left'): pseudo_loader(unused, SIZE, 2)

# --- unlabeled_loader

def test_unlabeled_loader_gives_augmented_images_and_where_they_end(trained_discs):
    files = unlabeled_files(trained_discs)
    plain,inside = unlabeled_loader(map(str, files), SIZE, 5, augment=no_augment).one_batch()
    assert plain.shape==(5, 3, *SIZE) and 0<=plain.min() and plain.max()<=1
    assert inside.shape==(5, *SIZE) and inside.all()
    want = sorted(ImageCache(SIZE).image(f)[0].mean()/255 for f in files)
    np.testing.assert_allclose(sorted(plain.mean((1, 2, 3)).tolist()), want, atol=1e-5)
    assert not torch.equal(unlabeled_loader(files, SIZE, 5).one_batch()[0].sort(0)[0], plain.sort(0)[0])
    shifted,inside = unlabeled_loader(files, SIZE, 5, augment=shift_right).one_batch()
    assert inside[..., 8:].all() and not inside[..., :8].any() and not shifted[..., :8].any()
    with pytest.raises(ValueError, match='no unlabelled images'): unlabeled_loader([], SIZE, 2)

def test_endless_repeats_the_images_in_orders_that_follow_from_the_seed(trained_discs):
    def _first(seed, n=4):
        loader = unlabeled_loader(unlabeled_files(trained_discs), SIZE, 5, augment=no_augment)
        set_seed(seed)
        return [x for _,(x,_) in zip(range(n), endless(loader))]
    a,b,c = (_first(seed) for seed in (0, 0, 1))
    assert all(torch.equal(i, j) for i,j in zip(a, b))
    assert not all(torch.equal(i, j) for i,j in zip(a, c))
    assert len({tuple(o.mean((1, 2, 3)).tolist()) for o in a})>1  # another order in each pass
    assert len({tuple(sorted(o.mean((1, 2, 3)).tolist())) for o in a})==1

def test_a_shared_cache_decodes_each_image_once_for_both_loaders(monkeypatch, ann):
    reads = []
    real = loaders.load_image
    def load_image(f):
        reads.append(f)
        return real(f)
    monkeypatch.setattr(loaders, 'load_image', load_image)
    cache = ImageCache(SIZE)
    for loader in (pseudo_loader(ann, SIZE, 2, cache=cache), unlabeled_loader(ann.pairs, SIZE, 2, cache=cache)): list(loader)
    list(unlabeled_loader(ann.pairs, SIZE, 5, cache=cache))
    assert sorted(reads)==sorted(ann.pairs)

# --- MixedBatches

def test_mixed_batches_split_a_batch_by_their_share_with_at_least_one_of_each_kind():
    cases = {(0.5, 8): (4, 4), (0.75, 8): (2, 6), (0.01, 8): (7, 1), (1, 8): (1, 7), (0.5, 2): (1, 1), (0.5, 3): (1, 2)}
    for (share,bs),want in cases.items(): assert MixedBatches(share).split(bs)==want, (share, bs)

def test_mixed_batches_fill_every_training_batch_and_leave_validation_alone(trained_discs, ann):
    class Shapes(Callback):
        order = 50
        def before_fit(self): self.batches = dict(train=[], valid=[])
        def before_batch(self): self.batches['train' if self.training else 'valid'].append(tuple(self.y.shape))
    learn = seg_learner(seg_dls(trained_discs, SIZE, 2, epoch_len=14), 'U-Net', 'test_resnet')
    s = Shapes()
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-9, cbs=[BatchMixer(pseudo_loader(ann, SIZE, 2)), s])
    assert s.batches==dict(train=[(4, 2, *SIZE)]*14, valid=[(2, *SIZE)]*2)  # seven batches of 2 an epoch, from only 5 images

def test_labelled_images_come_first_and_with_certain_targets(trained_discs, ann):
    x,p,n = spy(trained_discs, ann, share=0.75, bs=8)[0]
    assert n==2 and len(x)==8
    assert set(p[:2].unique().tolist())=={0, 1}
    assert ((p[2:]>0.01) & (p[2:]<0.99)).any()

def test_same_seed_same_batches_whatever_came_before(trained_discs, ann):
    def _pseudo(seed): return [x[n:] for x,_,n in spy(trained_discs, ann, [StrongAugment(), CutMix()], n=3, seed=seed)]
    a,b,c = (_pseudo(seed) for seed in (0, 0, 1))
    assert all(torch.equal(i, j) for i,j in zip(a, b))
    assert not torch.equal(a[0], c[0])

# --- HardLabels and ConfidenceThreshold

def test_confidence_threshold_leaves_out_uncertain_pixels_alone():
    p = torch.tensor([0.5, 0.79, 0.81, 1.]).view(1, 1, 1, 4)
    p = torch.cat([p, 1-p], 1)
    _,q = ConfidenceThreshold(0.8).transform(None, p)
    assert torch.equal(q.sum(1).flatten(), torch.tensor([0., 0, 1, 1]))
    assert torch.equal(q[..., 2:], p[..., 2:])

def test_hard_labels_take_the_most_probable_class_and_keep_holes():
    p = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6], [0, 0, 0]]).T.view(1, 3, 1, 3)
    _,q = HardLabels().transform(None, p)
    assert torch.equal(q[0, :, 0].T, torch.tensor([[1., 0, 0], [0, 0, 1], [0, 0, 0]]))

def test_the_threshold_acts_before_hard_labels_in_any_order_of_the_list(trained_discs, ann):
    _,soft,n = spy(trained_discs, ann)[0]
    for callbacks in ([HardLabels(), ConfidenceThreshold(0.6)], [ConfidenceThreshold(0.6), HardLabels()]):
        _,p,_ = spy(trained_discs, ann, callbacks)[0]
        assert torch.equal(p[n:].sum(1)>0, soft[n:].amax(1)>=0.6)
        assert set(p[n:].unique().tolist())<={0, 1}

# --- StrongAugment and CutMix

def test_strong_augment_changes_pseudo_labelled_images_alone(trained_discs, ann):
    x,p,n = spy(trained_discs, ann, bs=8)[0]
    y,q,_ = spy(trained_discs, ann, [StrongAugment()], bs=8)[0]
    assert torch.equal(x[:n], y[:n]) and torch.equal(p, q)
    assert not torch.equal(x[n:], y[n:])
    assert y.shape==x.shape and 0<=y.min() and y.max()<=1

def test_strong_augment_changes_each_image_in_its_own_way():
    set_seed(0)
    x = torch.rand(1, 3, 16, 16).expand(6, -1, -1, -1)
    y,_ = StrongAugment().transform(x, None)
    assert len({tuple(o.flatten().tolist()) for o in y})>=4

def test_cutmix_moves_image_and_target_together():
    set_seed(0)
    x = torch.arange(6.).view(6, 1, 1, 1).expand(6, 1, 20, 20)
    a,b = CutMix().transform(x, x*10)
    assert torch.equal(a*10, b) and torch.equal(x[:, 0, 0, 0], torch.arange(6.))
    pasted = [(o!=i).float().mean().item() for i,o in enumerate(a)]
    assert any(pasted) and all(s<=0.45 for s in pasted)
    assert all(len(o.unique())<=2 for o in a)  # one other image at most

def test_a_random_box_lies_within_the_image():
    random.seed(0)
    for h,w,area in [(h, w, area) for h in (8, 33) for w in (8, 50) for area in (0.02, 0.4, 1.)]:
        for _ in range(100):
            top,left,box_h,box_w = random_box(h, w, area)
            assert 0<=top<=h-box_h and 0<=left<=w-box_w and box_h>=1 and box_w>=1, (h, w, area)

def test_shares_thresholds_and_areas_outside_0_to_1_are_refused():
    for piece in (MixedBatches, ConfidenceThreshold, CutMix):
        for value in SHARES:
            with pytest.raises(ValueError, match='expected a number above 0 and at most 1'): piece(value)

# --- the loss takes both kinds of target

def test_soft_targets_that_are_certain_are_hard_targets():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 8, 8, requires_grad=True)
    y = torch.randint(0, 3, (2, 8, 8))
    y[0, :4] = IGNORE
    grads = []
    for targets in (y, one_hot(y, 3)):
        loss = CEDiceLoss()(logits, targets)
        grads.append(torch.autograd.grad(loss, logits)[0])
    assert torch.allclose(*grads) and not grads[0][0, :, :4].any()
