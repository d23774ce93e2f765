"Training follows its schedule, keeps its best epoch, and shows what fastai's learners show"
import tempfile
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt, numpy as np, pytest, torch
from conftest import NET, SIZE, SMALL_NET, make_discs, same, save, state, tree
from fastai.callback.core import Callback
from fastai.torch_core import set_seed
from torch import nn

from semisup_seg.core import IGNORE
from semisup_seg.data.images import load_image
from semisup_seg.data.folder import split_files, unlabeled_files
from semisup_seg.data.loaders import seg_dls
from semisup_seg.training import learner as L, metrics as M
from semisup_seg.training.inference import predict
from semisup_seg.training.learner import EpochLogger, KeepBest, encoder_splitter, find_lr, fit, seg_learner
from semisup_seg.training.losses import CEDiceLoss

@pytest.fixture
def learn(trained_discs):
    set_seed(0)
    return seg_learner(seg_dls(trained_discs, SIZE, bs=2), *SMALL_NET)

def script(monkeypatch, values):
    "Let the validation Dice of each epoch be the next of `values`"
    left = iter(values)
    monkeypatch.setattr(M.ForegroundMetric, 'value', property(lambda m: next(left) if m.name=='dice' else 0.))

# --- the learner

def test_groups_hold_every_parameter_once(learn):
    enc,rest = encoder_splitter(learn.model)
    assert len({id(p) for p in enc+rest})==len(enc)+len(rest)==len(list(learn.model.parameters()))
    assert {id(p) for p in enc}=={id(p) for p in learn.model.encoder.parameters()}

def test_freezing_trains_the_decoder_alone(learn, tmp_path):
    torch.save(learn.model.encoder.state_dict(), tmp_path/'w.pth')
    learn = seg_learner(learn.dls, *SMALL_NET, pretrained=str(tmp_path/'w.pth'))
    learn.freeze()
    norm = {id(p) for m in learn.model.encoder.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    assert not [n for n,p in learn.model.named_parameters() if p.requires_grad!=('encoder' not in n or id(p) in norm)]
    before = state(learn.model)
    learn.fit_one_cycle(1, 1e-2)
    after = state(learn.model)
    conv = [k for k in before if 'encoder' in k and before[k].dim()==4]
    assert conv and all(torch.equal(before[k], after[k]) for k in conv)
    assert any(not torch.equal(before[k], after[k]) for k in before if 'decoder' in k)

def test_model_knows_its_classes_and_size(learn):
    assert (learn.model.codes, learn.model.size)==(learn.dls.codes, SIZE)
    assert next(p for p in learn.model.parameters() if p.dim()==4 and p.shape[1]>1 and p.shape[2]>1).is_contiguous(memory_format=torch.channels_last)

def test_a_registered_metric_is_a_column(monkeypatch, capsys, trained_discs):
    monkeypatch.setattr(M, 'metrics', dict(M.metrics))
    @M.register_metric(higher_is_better=False)
    def wrong_pixels(pred, truth, n): return [float((pred!=truth).sum())]*n
    learn = seg_learner(seg_dls(trained_discs, SIZE, bs=4), *SMALL_NET)
    fit(learn, epochs=1, lr=1e-3)
    *_,mask = learn.get_preds(with_decoded=True)
    truth = learn.get_preds()[1]
    want = (mask!=truth).flatten(1).sum(1).float().mean().item()
    assert learn.history[0]['wrong_pixels']==pytest.approx(want)
    assert capsys.readouterr().out.splitlines()[0].split()==['epoch', 'train_loss', 'valid_loss', 'dice', 'jaccard', 'wrong_pixels', 'time']

def test_epochs_are_lines_of_a_table(capsys):
    EpochLogger.print_row(['epoch', 'dice', 'time'])
    EpochLogger.print_row([3, 0.12345678, '00:01'])
    assert capsys.readouterr().out=='  epoch          dice          time\n      3        0.1235         00:01\n'

# --- schedule

def test_stages_of_a_fit(learn):
    for pretrained,stages in ((True, ['frozen', 'all']), (False, ['all'])):
        learn.pretrained = pretrained
        fit(learn, epochs=1, freeze_epochs=1, lr=1e-3)
        assert [h['stage'] for h in learn.history]==stages
        assert all({'stage', 'train_loss', 'valid_loss', 'dice', 'jaccard'}<=h.keys() for h in learn.history)
        assert all(p.requires_grad for p in learn.model.parameters())

@pytest.mark.parametrize('args,want', [
    (dict(), [(2, 1e-3, ['StopIfNotFinite']), 100, (20, 0.02, ['KeepBest', 'StopIfNotFinite'])]),
    (dict(epochs=3, freeze_epochs=1, lr=0.5, frozen_lr=0.1), [(1, 0.1, ['StopIfNotFinite']), (3, 0.5, ['KeepBest', 'StopIfNotFinite'])]),
    (dict(freeze_epochs=0, find_steps=37, patience=4), [37, (20, 0.02, ['EarlyStoppingCallback', 'KeepBest', 'StopIfNotFinite'])])])
def test_schedule_and_its_defaults(monkeypatch, learn, args, want):
    calls = []
    def one_cycle(self, n, lr, cbs=()): calls.append((n, lr, sorted(type(c).__name__ for c in cbs)))
    monkeypatch.setattr(type(learn), 'fit_one_cycle', one_cycle)
    monkeypatch.setattr(L, 'find_lr', lambda learn, steps: calls.append(steps) or 0.02)
    monkeypatch.setattr(L, '_history', lambda *_: [])
    learn.pretrained = True
    fit(learn, **args)
    assert calls==want

def test_fit_refuses(learn):
    before = state(learn.model)
    for args in (dict(epochs=0), dict(epochs=-1), dict(freeze_epochs=-1), dict(epochs=1.5), dict(epochs='3'), dict(lr=-1e-3), dict(lr=0),
        dict(lr=float('nan')), dict(frozen_lr=-1), dict(patience=-1), dict(lr='fast'), dict(seed=-1), dict(seed=1.5), dict(seed='1'), dict(seed=True)):
        with pytest.raises(ValueError, match=f'{next(iter(args))} is'): fit(learn, **{**dict(epochs=1, freeze_epochs=0, lr=1e-3), **args})
    assert same(before, state(learn.model))

def test_what_the_network_refuses_is_passed_on(learn):
    error = ValueError('a batch of one')
    def refuse(self, args):
        if self.training: raise error
    learn.model.register_forward_pre_hook(refuse)
    with pytest.raises(ValueError) as e: fit(learn, epochs=1, lr=1e-3)
    assert e.value is error

# --- learning rate

def test_find_lr_puts_the_weights_back(learn):
    before = state(learn.model)
    lr = find_lr(learn, L.MIN_STEPS)
    assert 1e-6<lr<10 and same(before, state(learn.model))

def test_too_few_steps_for_a_learning_rate(learn):
    before = state(learn.model)
    for steps in (0, 1, 6, L.MIN_STEPS-1):
        with pytest.raises(ValueError, match=f'^steps is {steps}; expected a whole number of at least 30'): find_lr(learn, steps)
    learn.pretrained = True
    with pytest.raises(ValueError, match='find_steps is 10; expected a whole number of at least 30'): fit(learn, find_steps=10)
    assert same(before, state(learn.model))
    fit(learn, epochs=1, freeze_epochs=0, lr=1e-3, find_steps=10)  # no trial run

def test_a_loss_that_diverges_has_no_valley(monkeypatch, learn):
    monkeypatch.setattr(L, 'MIN_STEPS', 6)
    class Diverge(Callback):
        def after_loss(self): self.learn.loss = self.loss*float('nan')
    with learn.added_cbs(Diverge()), pytest.raises(ValueError, match=r'the loss diverged after \d+ of 6 steps; give lr to fit'): find_lr(learn, 6)

# --- best epoch, early stop

def test_a_loss_that_is_not_finite_ends_the_training_with_epoch_and_rate(learn):
    with pytest.raises(ValueError, match=r'epoch [12]: the loss is (nan|inf) at a learning rate of .*; train with a lower lr'):
        fit(learn, epochs=3, freeze_epochs=0, lr=1e9)

def test_the_best_of_scripted_epochs_is_kept_and_of_equal_ones_the_last():
    nan = float('nan')  # no image shows a class, and none was predicted
    cases = ([0.2, 0.7, 0.5], 1), ([0.1, 0.2, 0.3], 2), ([0.4, 0.4, 0.4], 2), ([0., 0., 0.], 2), ([0., nan, 0.], 1), ([nan, nan, 0.], 1)
    for scores,best in cases:
        model,keep = nn.Linear(1, 1), KeepBest()
        keep.learn = SimpleNamespace(model=model, recorder=SimpleNamespace(metric_names=['epoch', 'dice'], values=[]))
        keep.before_fit()
        for epoch,score in enumerate(scores):
            nn.init.constant_(model.weight, epoch)
            keep.learn.epoch = epoch
            keep.learn.recorder.values.append([score])
            keep.after_epoch()
        keep.after_fit()
        assert (model.weight.item(), keep.best_epoch)==(best, best), scores

class Watch(KeepBest):
    "Remember the weights after every epoch"
    def before_fit(self):
        super().before_fit()
        Watch.seen = []

    def after_epoch(self):
        super().after_epoch()
        Watch.seen.append(state(self.model))

@pytest.mark.parametrize('patience,ran', [(2, 4), (None, 5)])
def test_best_epoch_is_kept_and_patience_stops(monkeypatch, trained_discs, patience, ran):
    scores = [0.2, 0.5, 0.4, 0.3, 0.2]
    script(monkeypatch, scores)
    monkeypatch.setattr(L, 'KeepBest', Watch)
    learn = fit(seg_learner(seg_dls(trained_discs, SIZE, bs=4), *SMALL_NET), epochs=5, lr=1e-3, patience=patience)
    assert [h['dice'] for h in learn.history]==scores[:ran] and len(Watch.seen)==ran
    assert same(state(learn.model), Watch.seen[1]) and sum(same(state(learn.model), o) for o in Watch.seen)==1

def test_training_learns(trained_discs):
    set_seed(0)
    learn = seg_learner(seg_dls(trained_discs, SIZE, bs=4, augment=None), *NET)
    x,y = learn.dls.valid.one_batch()
    with torch.no_grad(): before = CEDiceLoss()(learn.model.eval()(x), y).item()
    fit(learn, epochs=6, freeze_epochs=0, lr=1e-2)
    with torch.no_grad(): assert CEDiceLoss()(learn.model.eval()(x), y).item()<before

def test_nothing_is_written_beside_the_data(discs, monkeypatch, tmp_path):
    before = tree(discs)
    (tmp_path/'work').mkdir()
    monkeypatch.chdir(tmp_path/'work')
    learn = seg_learner(seg_dls(discs, SIZE, bs=2), *SMALL_NET)
    fit(learn, epochs=1, freeze_epochs=0, find_steps=30)
    predict(learn, unlabeled_files(discs))
    assert tree(discs)==before and tree(tmp_path/'work')=={} and Path(learn.path)==Path(tempfile.gettempdir())

# --- what fastai offers

def drawn(learn, **kw):
    "Titles, and colours of the masks, of what `show_results` draws"
    plt.close('all')
    learn.show_results(**kw)
    axs = [a for a in plt.gcf().axes if a.images]
    res = [a.get_title() for a in axs], [len(a.images) for a in axs], [im.get_cmap().name for a in axs for im in a.images[1:]]
    plt.close('all')
    return res

def test_results_are_image_truth_prediction(tmp_path):
    import_module('fastai.vision.all')  # also where all of fastai is imported after this package
    root = make_discs(tmp_path/'d', valid=5)
    names = ['image', 'truth', 'prediction']
    learn = seg_learner(seg_dls(root, SIZE, bs=5), *SMALL_NET)
    assert drawn(learn)==(names*2 + ['']*9, [1, 2, 2]*5, ['semisup_seg']*10)
    assert drawn(learn, ncols=1, figsize=(2, 2), max_n=3)[0]==names + ['']*6
    assert drawn(learn, ds_idx=2, max_n=1)[0]==names
    (root/'codes.txt').write_text('rest,0\ndisc,255\nother,9')
    learn = seg_learner(seg_dls(root, SIZE, bs=5), *SMALL_NET)
    assert drawn(learn, max_n=2)==(names + ['']*3, [1, 2, 2]*2, ['semisup_seg']*4)

def test_results_show_the_prediction(learn, trained_discs):
    learn.model.eval()
    b = learn.dls.valid.one_batch()
    pred = learn.get_preds(dl=[b], with_decoded=True)[2]
    axs = list(plt.subplots(2, 3)[1].flat)
    learn.dls.valid.show_results(b, pred, ctxs=axs)
    for i in range(2):
        for ax,mask in zip(axs[3*i+1:], (b[1][i], pred[i])): assert np.array_equal(np.ma.filled(ax.images[1].get_array(), 0), np.where(mask==IGNORE, 0, mask))
        assert np.allclose(axs[3*i].images[0].get_array()/255, b[0][i].permute(1, 2, 0), atol=0.01)
    plt.close('all')

def test_results_of_a_training_with_pseudo_labels(trained_discs, tmp_path):
    pseudo = {f: save(tmp_path/f'{f.stem}.png', np.full(load_image(f).shape[:2], 255, np.uint8)) for f in unlabeled_files(trained_discs)[:3]}
    learn = seg_learner(seg_dls(trained_discs, SIZE, bs=7, pseudo=pseudo), *SMALL_NET)
    assert drawn(learn, ds_idx=0)[1]==[1, 2, 2]*7
    learn.dls.show_batch()
    learn.show_training_loop()
    plt.close('all')

def test_fastais_own_predictions_are_ours(learn, trained_discs):
    (f,_),*_ = split_files(trained_discs, 'valid')
    mask,_,probs = learn.predict(f)
    preds,truth = learn.get_preds()
    assert tuple(mask.shape)==SIZE and tuple(probs.shape)==(2, *SIZE) and torch.allclose(probs.sum(0), torch.ones(SIZE), atol=1e-4)
    assert torch.equal(probs.argmax(0), torch.as_tensor(mask).long()) and tuple(preds.shape)==(2, 2, *SIZE) and tuple(truth.shape)==(2, *SIZE)
    assert torch.allclose(preds[0], probs, atol=1e-4)
