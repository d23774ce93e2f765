"The loss ignores what it must and gives one value per image; other losses ignore the same pixels, or are refused"
from types import SimpleNamespace

import matplotlib.pyplot as plt, pytest, segmentation_models_pytorch as smp, torch, torch.nn.functional as F
from conftest import SIZE, SMALL_NET
from fastai.layers import NoneReduce
from fastai.losses import CrossEntropyLossFlat, FocalLossFlat
from fastai.torch_core import set_seed
from fastai.vision.all import Interpretation, SegmentationInterpretation

from semisup_seg.core import IGNORE
from semisup_seg.data.loaders import seg_dls
from semisup_seg.training.learner import seg_learner
from semisup_seg.training.losses import CEDiceLoss, CheckLoss, MaskedLoss, one_hot

@pytest.fixture(scope='module')
def dls(trained_discs): return seg_dls(trained_discs, SIZE, bs=4)

@pytest.fixture
def learn(dls):
    set_seed(0)
    return seg_learner(dls, *SMALL_NET)

def batch(c=3):
    "Logits, and class indices of which the upper half is ignored"
    torch.manual_seed(0)
    y = torch.randint(0, c, (2, 8, 8))
    y[:, :4] = IGNORE
    return torch.randn(2, c, 8, 8, requires_grad=True), y

def check_ignores(loss):
    "The upper half gives no gradient, and the loss is that of the lower half"
    logits,y = batch()
    got = loss(logits, y)
    got.backward()
    assert (logits.grad[:, :, :4]==0).all() and (logits.grad[:, :, 4:]!=0).any()
    assert torch.isclose(loss(logits[:, :, 4:], y[:, 4:]), got)

# --- CEDiceLoss

def test_loss_ignores_what_it_must():
    check_ignores(CEDiceLoss())
    logits,y = batch()
    nothing = CEDiceLoss()(logits, torch.full_like(y, IGNORE))
    nothing.backward()
    assert nothing==0 and (logits.grad==0).all()

def test_one_loss_per_image():
    logits,y = batch()
    y[1] = IGNORE
    for targ in (y, one_hot(y, 3)):
        each = CEDiceLoss('none')(logits, targ)
        assert each.shape==(2,) and each[1]==0 and torch.equal(each[0], CEDiceLoss()(logits[:1], targ[:1]))
    with pytest.raises(ValueError, match="reduction is 'sum'; expected 'mean' or 'none'"): CEDiceLoss('sum')

def test_fastai_turns_the_reduction_off_for_a_while():
    loss,(logits,y) = CEDiceLoss(), batch()
    with NoneReduce(loss) as each: assert torch.equal(each(logits, y), CEDiceLoss('none')(logits, y))
    assert loss.reduction=='mean' and loss(logits, y).shape==()

def test_get_preds_with_loss(learn):
    probs,y,each = learn.get_preds(with_loss=True)
    assert each.shape==(2,) and torch.allclose(each, CEDiceLoss('none')(probs.log(), y), atol=1e-4) and learn.loss_func.reduction=='mean'

@pytest.mark.parametrize('interpret', [Interpretation, SegmentationInterpretation])
def test_interpretation_draws_the_highest_losses(learn, interpret):
    plt.close('all')
    shown = interpret.from_learner(learn)
    losses,_ = shown.top_losses(2)
    shown.plot_top_losses(2)
    axs = plt.gcf().axes
    plt.close('all')
    assert losses[0]>=losses[1] and len(axs)==6 and all(len(a.images)==1 for a in axs) and f'{losses[0]:.4f}' in axs[2].get_title()

# --- losses of one's own

def own_losses():
    "Each loss, and what it must give"
    logits,y = batch()
    free = logits[:, :, 4:], y[:, 4:]
    for loss in (CrossEntropyLossFlat(axis=1), FocalLossFlat(axis=1), MaskedLoss(lambda *o: F.cross_entropy(*o))): yield loss, loss(*free)
    for kind in ('DiceLoss', 'FocalLoss', 'JaccardLoss', 'TverskyLoss', 'LovaszLoss'):
        loss = getattr(smp.losses, kind)('multiclass')
        yield loss, loss(*free)

def prepared(loss, logits, y):
    "The loss of a Learner that has seen a batch"
    check = CheckLoss()
    check.learn = SimpleNamespace(loss_func=loss, pred=logits, y=y, yb=(y,))
    check.after_pred()
    return check.learn.loss_func

def test_own_losses_ignore_pixels():
    logits,y = batch()
    for loss,want in own_losses():
        loss = prepared(loss, logits, y)
        assert torch.isclose(loss(logits, y), want), loss
        assert prepared(loss, logits, y) is loss
        check_ignores(loss)

@pytest.mark.parametrize('loss', [CrossEntropyLossFlat(axis=1), FocalLossFlat(axis=1), smp.losses.DiceLoss('multiclass'), smp.losses.FocalLoss('multiclass')],
    ids=lambda o: type(o).__name__)
def test_a_learner_trains_with_an_own_loss(dls, loss):
    given = seg_learner(dls, *SMALL_NET, loss_func=loss)
    given.fit(1, 1e-3)
    later = seg_learner(dls, *SMALL_NET)
    later.loss_func = loss
    later.fit(1, 1e-3)
    for learn in (given, later):
        assert all(0<v<2 for v in learn.recorder.values[0][:2])
        losses,masks = learn.get_preds(with_loss=True, with_decoded=True)[3:1:-1]
        assert losses.shape==(2,) and masks.shape==(2, *SIZE)

def test_a_masked_loss_serves_fastai(learn):
    learn.loss_func = MaskedLoss(FocalLossFlat(axis=1))
    probs,y,mask,each = learn.get_preds(with_loss=True, with_decoded=True)
    assert torch.equal(mask, probs.argmax(1)) and torch.allclose(probs.sum(1), torch.ones(2, *SIZE), atol=1e-4)
    want = [FocalLossFlat(axis=1)(p.log()[None], t[None]) for p,t in zip(probs, y)]
    assert torch.allclose(each, torch.stack(want), atol=1e-4) and learn.loss_func.reduction=='mean'
    learn.loss_func = FocalLossFlat(axis=1)  # wrapped while fastai has its reduction turned off
    assert torch.allclose(learn.get_preds(with_loss=True)[2], each, atol=1e-4) and learn.validate()[0]==pytest.approx(each.mean().item(), abs=1e-4)

def test_nothing_is_lost_where_all_is_ignored():
    logits,y = batch()
    assert MaskedLoss(F.cross_entropy)(logits, torch.full_like(y, IGNORE))==0

def test_a_loss_that_cannot_ignore_is_refused(dls):
    learn = seg_learner(dls, *SMALL_NET, loss_func=F.cross_entropy)
    with pytest.raises(ValueError, match=r'cross_entropy: .* IGNORE \(255\).*use MaskedLoss\(loss\), or set loss.ignore_index = IGNORE'): learn.fit(1, 1e-3)
    logits,y = batch()
    assert prepared(F.cross_entropy, logits, y.where(y!=IGNORE, 0)) is F.cross_entropy
    class Own:
        ignore_index = IGNORE
        def __call__(self, logits, y): return logits.mean()
    assert prepared(Own(), logits, y)(logits, y)==logits.mean()  # not cut to pixels
    with pytest.raises(ValueError, match='Loss: .*IGNORE'): prepared(torch.nn.CrossEntropyLoss(ignore_index=0), logits, y)

def test_probabilities_are_for_the_own_loss_alone():
    logits,y = batch()
    soft = logits.softmax(1)
    assert isinstance(prepared(CEDiceLoss(), logits, soft), CEDiceLoss)
    for loss,_ in own_losses():
        with pytest.raises(ValueError, match='the target has probabilities.* only CEDiceLoss takes them'): prepared(loss, logits, soft)
