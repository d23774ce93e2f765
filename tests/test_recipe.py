"The pieces of a recipe, each by itself and together"
import random
from itertools import product

import numpy as np, pytest, torch
from conftest import SIZE, make_discs, make_model
from fastai.callback.core import Callback, CancelFitException
from fastai.torch_core import set_seed

from semisup_seg.annotation.annotate import annotate
from semisup_seg.core import IGNORE
from semisup_seg.data.folder import unlabeled_files
from semisup_seg.data.loaders import seg_dls, standard_augment
from semisup_seg.training.losses import CEDiceLoss, one_hot
from semisup_seg.training.learner import seg_learner
from semisup_seg.distillation.recipe import EMA, ConfidenceThreshold, CutMix, HardLabels, MixedBatches, ViewAugment, StrongAugment, TopReliable, get_recipe, pseudo_loader, random_box, recipes
from semisup_seg.annotation.records import Annotations
from semisup_seg.annotation.views import views

@pytest.fixture(scope='module')
def path(tmp_path_factory): return make_discs(tmp_path_factory.mktemp('data')/'discs', unlabeled=6)

@pytest.fixture(scope='module')
def ann(path, tmp_path_factory): return annotate([make_model(), make_model(seed=1)], unlabeled_files(path), tmp_path_factory.mktemp('ann'), soft=True)

def row(i, agreement, used=True, mask='m.png'): return dict(image=f'{i}.png', mask=mask, confidence=0.5, agreement=agreement, used=used)

class Spy(Callback):
    "Keep every batch, and stop after `n`"
    order,run_valid = 50,False
    def __init__(self, n): self.n,self.seen = n,[]
    def before_batch(self): self.seen.append((self.x.clone(), self.y.clone(), getattr(self.learn, 'labelled', None)))
    def after_batch(self):
        if len(self.seen)==self.n: raise CancelFitException

def spy(path, ann, pieces, n=1, bs=4, seed=0, epochs=1):
    "The first `n` batches that a network would see"
    set_seed(seed)
    mix = next(p for p in pieces if isinstance(p, MixedBatches))
    labelled,k = mix.split(bs)
    mix.loader = pseudo_loader(ann, SIZE, k)
    learn,s = seg_learner(seg_dls(path, SIZE, labelled, epoch_len=8*labelled), 'U-Net', 'test_resnet'), Spy(n)
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, 1e-9, cbs=[*pieces, s])
    return s.seen

# --- which images

@pytest.mark.parametrize('share,kept', [(0.01, 1), (0.25, 1), (0.5, 2), (0.75, 3), (1, 4), (1.0, 4)])
def test_trusted_keeps_the_top(tmp_path, share, kept):
    rows = [row(i, a) for i,a in enumerate((0.5, 0.9, 0.1, 0.7))]
    res = TopReliable(share).select(Annotations(tmp_path, rows, []))
    assert {r['image'] for r in res.rows if r['used']}=={f'{i}.png' for i in [1, 3, 0, 2][:kept]} and all(r['used'] for r in rows) and len(res)==4

def test_trusted_does_not_bring_back_what_was_rejected_or_unread(tmp_path):
    rows = [row(0, 0.9, used=False), row(1, 0.8), row(2, None, used=False, mask='')]
    assert [r['used'] for r in TopReliable(1.).select(Annotations(tmp_path, rows, [])).rows]==[False, True, False]

# --- which views

def corner(h, w, c=3):
    "An image whose top left is bright, and its mask"
    mask = np.zeros((h, w), np.uint8)
    mask[:h//4, :w//4] = 1
    return np.repeat(mask[..., None], c, -1)*200, mask

def first_change(views, size, **pair):
    "Sixty draws of what the views make of image and mask, before the standard changes"
    tfm = ViewAugment().augment(views, size)().transforms[0]
    tfm.set_random_seed(0)
    return [tfm(**pair) for _ in range(60)]

def test_image_and_mask_move_together_into_each_view():
    moved = ['H Flip', 'V Flip', 'H+V Flip', 'Rotate 90', 'Rotate 270']
    image,mask = corner(32, 32)
    draws = first_change(moved, (32, 32), image=image, mask=mask)
    assert all((o['image'][..., 0]==o['mask']*200).all() for o in draws)
    want = {np.ascontiguousarray(f(mask)).tobytes() for f in [lambda m: m, *(views[n].apply for n in moved)]}
    assert {o['mask'].tobytes() for o in draws}==want and len(want)==4  # a corner: the quarter turns fall on the flips

def test_probabilities_move_as_masks_do():
    image,mask = corner(32, 32)
    soft = np.stack([255-mask*255, mask*255], -1).astype(np.float32)
    for o in first_change(['V Flip'], (32, 32), image=image, mask=soft): assert (o['mask'][..., 1]*200==o['image'][..., 0]*255.).all()

@pytest.mark.parametrize('names,size,kept', [(['Scale 0.75', 'Scale 1.25', 'Gamma', 'Blurring', 'Equalize histogram'], (32, 32), []), (['Rotate 90', 'V Flip'], (32, 48), ['V Flip']), (['Rotate 90', 'V Flip'], (32, 32), ['Rotate 90', 'V Flip'])])
def test_views_of_another_size_or_light_are_left_to_the_vote(names, size, kept):
    make = ViewAugment().augment(names, size)
    assert [v.name for v in make.args[0]]==kept and make()(image=corner(*size)[0], mask=corner(*size)[1])['image'].shape==(*size, 3)
    assert len(make().transforms)==len(standard_augment().transforms)+bool(kept)

def shown(make): return [v.name for v in make.args[0]]

def test_where_no_view_votes_all_turns_are_shown():
    flips,turns = ['H Flip', 'V Flip', 'H+V Flip'], ['Rotate 90', 'Rotate 270']
    assert shown(ViewAugment().augment([], (32, 32)))==flips+turns and shown(ViewAugment().augment([], (32, 48)))==flips
    for asked in ([], ['V Flip']): assert shown(ViewAugment(['H Flip']).augment(asked, (32, 32)))==['H Flip']
    assert repr([ViewAugment(), ViewAugment(['H Flip'])])=="[Seen(), Seen(['H Flip'])]"
    with pytest.raises(ValueError, match="Did you mean 'V Flip'"): ViewAugment(['V Flp'])

def test_the_image_counts_as_much_as_each_view():
    image,mask = corner(32, 32)
    same = np.mean([(o['mask']==mask).all() for o in first_change(['V Flip'], (32, 32), image=image, mask=mask)])
    assert 0.3<same<0.7

def test_the_seed_decides_the_view():
    make,(image,mask) = ViewAugment().augment(['V Flip'], (32, 32)), corner(32, 32)
    a,b = make(), make()
    for t in (a, b): t.set_random_seed(5)
    for _ in range(5): assert (a(image=image, mask=mask)['mask']==b(image=image, mask=mask)['mask']).all()

# --- the loader

def test_loader_reads_what_annotate_wrote(path, ann):
    x,p = next(iter(pseudo_loader(ann, SIZE, 6, augment=lambda: __import__('albumentations').Compose([]))))
    assert x.shape==(6, 3, *SIZE) and p.shape==(6, 2, *SIZE) and 0<=x.min() and x.max()<=1
    want = sorted(float(np.load(f)[1].mean()/255) for f in (ann.out/'soft').iterdir())
    np.testing.assert_allclose(sorted(p[:, 1].mean((1, 2)).tolist()), want, atol=0.005)
    assert torch.allclose(p.sum(1), torch.ones(()), atol=1e-5)

def test_loader_at_another_size_and_with_few_images(ann):
    two = Annotations(ann.out, [dict(r, used=i<2) for i,r in enumerate(ann.rows)], [])
    x,p = pseudo_loader(two, (64, 48), 5).one_batch()
    assert x.shape==(5, 3, 64, 48) and p.shape==(5, 2, 64, 48) and set((p.sum(1)*1000).round().unique().tolist())<={0, 1000}

def test_beyond_the_border_nothing_is_claimed(ann):
    set_seed(1)
    loader = pseudo_loader(ann, SIZE, 6)
    shares = [(p.sum(1)==0).float().mean().item() for _,p in (loader.one_batch() for _ in range(3))]
    assert all(0<s<0.5 for s in shares)

def test_loader_refuses(path, ann, tmp_path):
    hard = annotate(make_model(), unlabeled_files(path)[:2], tmp_path)
    with pytest.raises(ValueError, match='soft=True'): pseudo_loader(hard, SIZE, 2)
    with pytest.raises(ValueError, match='no pseudo-label is left'): pseudo_loader(Annotations(ann.out, [dict(r, used=False) for r in ann.rows], []), SIZE, 2)

# --- batches

@pytest.mark.parametrize('share,bs,want', [(0.5, 8, (4, 4)), (0.75, 8, (2, 6)), (0.01, 8, (7, 1)), (1, 8, (1, 7)), (0.5, 2, (1, 1)), (0.5, 3, (1, 2))])
def test_mix_splits_a_batch(share, bs, want): assert MixedBatches(share).split(bs)==want and sum(want)==bs

def test_mix_fills_every_batch_and_leaves_validation_alone(path, ann):
    mix = MixedBatches()
    mix.loader = pseudo_loader(ann, SIZE, 2)
    class Shapes(Callback):
        order = 50
        def before_fit(self): self.batches = dict(train=[], valid=[])
        def before_batch(self): self.batches['train' if self.training else 'valid'].append(tuple(self.y.shape))
    learn,s = seg_learner(seg_dls(path, SIZE, 2, epoch_len=24), 'U-Net', 'test_resnet'), Shapes()
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-9, cbs=[mix, s])
    assert s.batches==dict(train=[(4, 2, *SIZE)]*24, valid=[(2, *SIZE)]*2)  # 24 batches of 2 from only 6 images

def test_mix_keeps_labels_first_and_certain(path, ann):
    x,p,n = spy(path, ann, [MixedBatches(0.75)], bs=8)[0]
    assert n==2 and len(x)==8 and set(p[:2].unique().tolist())=={0, 1} and ((p[2:]>0.01) & (p[2:]<0.99)).any()

def test_same_seed_same_batches_whatever_came_before(path, ann):
    a,b,c = (spy(path, ann, [MixedBatches(), StrongAugment(), CutMix()], n=3, seed=s) for s in (0, 0, 1))
    pseudo = [[o[0][o[2]:] for o in some] for some in (a, b, c)]
    assert all(torch.equal(i, j) for i,j in zip(pseudo[0], pseudo[1])) and not torch.equal(pseudo[0][0], pseudo[2][0])

# --- pixels

def test_confident_leaves_out_the_doubtful_alone():
    p = torch.tensor([0.5, 0.79, 0.81, 1.]).view(1, 1, 1, 4)
    p = torch.cat([p, 1-p], 1)
    _,q = ConfidenceThreshold(0.8).transform(None, p)
    assert torch.equal(q.sum(1).flatten(), torch.tensor([0., 0, 1, 1])) and torch.equal(q[..., 2:], p[..., 2:])

def test_hard_takes_the_likeliest_and_keeps_holes():
    p = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6], [0, 0, 0]]).T.view(1, 3, 1, 3)
    _,q = HardLabels().transform(None, p)
    assert torch.equal(q[0, :, 0].T, torch.tensor([[1., 0, 0], [0, 0, 1], [0, 0, 0]]))

def test_confident_then_hard_in_any_order_of_the_list(path, ann):
    for pieces in ([MixedBatches(), HardLabels(), ConfidenceThreshold(0.6)], [ConfidenceThreshold(0.6), MixedBatches(), HardLabels()]):
        _,p,n = spy(path, ann, pieces)[0]
        _,soft,_ = spy(path, ann, [MixedBatches()])[0]
        assert torch.equal(p[n:].sum(1)>0, soft[n:].amax(1)>=0.6) and set(p[n:].unique().tolist())<={0, 1}

# --- harder looks

def test_strong_changes_pseudo_labelled_images_alone(path, ann):
    (x,p,n),(y,q,_) = spy(path, ann, [MixedBatches()], bs=8)[0], spy(path, ann, [MixedBatches(), StrongAugment()], bs=8)[0]
    assert torch.equal(x[:n], y[:n]) and torch.equal(p, q) and not torch.equal(x[n:], y[n:]) and y.shape==x.shape and 0<=y.min() and y.max()<=1

def test_strong_treats_each_image_by_itself():
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

@pytest.mark.parametrize('h,w,area', list(product((8, 33), (8, 50), (0.02, 0.4, 1.))))
def test_box_lies_within_the_image(h, w, area):
    random.seed(0)
    for _ in range(200):
        top,left,bh,bw = random_box(h, w, area)
        assert 0<=top<=h-bh and 0<=left<=w-bw and bh>=1 and bw>=1

# --- the weights in the end

def small(path): return seg_learner(seg_dls(path, SIZE, 2, epoch_len=8), 'U-Net', 'test_resnet')

def test_ema_is_the_running_mean(path):
    learn,ema,mine = small(path), EMA(0.5), {}
    class Follow(Callback):
        order,run_valid = 54,False
        def before_fit(self): self.avg,self.k = next(self.model.parameters()).detach().clone(), 0
        def after_batch(self):
            self.k += 1
            d = min(0.5, self.k/(self.k+9))
            self.avg = self.avg*d + next(self.model.parameters()).detach()*(1-d)
    follow = Follow()
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2, cbs=[follow, ema])
    assert follow.k==8 and torch.allclose(next(learn.model.parameters()), follow.avg, atol=1e-6)

def test_ema_goes_on_with_the_raw_weights(path):
    seen = {}
    class Peek(Callback):
        order = 90
        def __init__(self, k): self.k = k
        def before_train(self): seen.setdefault(self.k, []).append(next(self.model.parameters()).detach().clone())
        def before_validate(self): seen.setdefault(self.k+' valid', []).append(next(self.model.parameters()).detach().clone())
    for k,cbs in dict(plain=[], ema=[EMA(0.9)]).items():
        set_seed(3)
        learn = small(path)
        with learn.no_bar(), learn.no_logging(): learn.fit(3, 1e-2, cbs=[Peek(k), *cbs])
    assert all(torch.equal(a, b) for a,b in zip(seen['plain'], seen['ema'])) and len(seen['ema'])==3
    assert not torch.equal(seen['plain valid'][1], seen['ema valid'][1])

def test_ema_starts_anew_with_each_training(path):
    learn,ema = small(path), EMA(0.9)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-2, cbs=ema)
        torch.nn.init.zeros_(next(learn.model.parameters()))
        learn.fit(1, 1e-9, cbs=ema)
    assert next(learn.model.parameters()).abs().max()<1e-3

def test_ema_takes_up_what_it_kept(path):
    learn,ema,new = small(path), EMA(0.9), EMA(0.9)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2, cbs=ema)
    new.learn = learn
    new.before_fit()
    new.load_state_dict(ema.state_dict())
    assert new.steps==4 and all(torch.equal(a, b) for a,b in zip(new.average.values(), ema.average.values()))

# --- together

@pytest.mark.parametrize('name', recipes)
def test_named_recipes_are_fresh_each_time(name):
    a,b = get_recipe(name), get_recipe(name)
    assert repr(a)==repr(b) and all(x is not y for x,y in zip(a, b))

def test_a_list_is_copied():
    mine = [MixedBatches(0.3)]
    assert get_recipe(mine)[0] is not mine[0] and repr(get_recipe(mine))=='[Mix(share=0.3)]'

@pytest.mark.parametrize('bad,message', [
    ('nave', "Did you mean 'naive'"), ([StrongAugment()], 'needs Mix'), ([MixedBatches(), MixedBatches()], 'twice'), ([MixedBatches], 'not a piece'), (['Mix'], 'not a piece'), (3, 'recipe is 3'), (None, 'recipe is None')])
def test_bad_recipes(bad, message):
    with pytest.raises(ValueError, match=message): get_recipe(bad)

@pytest.mark.parametrize('piece', [TopReliable, MixedBatches, ConfidenceThreshold, CutMix, EMA])
@pytest.mark.parametrize('value', [0, -0.1, 1.1, float('nan'), '0.5', True, None])
def test_bad_shares(piece, value):
    with pytest.raises(ValueError, match='expected a number above 0 and at most 1'): piece(value)

# --- the loss on both kinds of target

def test_soft_targets_that_are_certain_are_hard_targets():
    torch.manual_seed(0)
    logits,y = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randint(0, 3, (2, 8, 8))
    y[0, :4] = IGNORE
    grads = []
    for t in (y, one_hot(y, 3)):
        loss = CEDiceLoss()(logits, t)
        grads.append(torch.autograd.grad(loss, logits)[0])
    assert torch.allclose(*grads) and not grads[0][0, :, :4].any()
