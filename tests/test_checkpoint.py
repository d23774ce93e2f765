"A training that was interrupted continues after its last whole epoch, and ends the same"
import os
from pathlib import Path

import numpy as np, pytest, torch
from conftest import SIZE, SMALL_NET, Touch, same, state, tree
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.tracker import EarlyStoppingCallback
from fastai.torch_core import set_seed

import semisup_seg.training.learner as L
from semisup_seg.data.loaders import seg_dls
from semisup_seg.training.inference import save_model
from semisup_seg.training.learner import KeepBest, fit, seg_learner
from semisup_seg.training.metrics import ForegroundMetric

PLAN = dict(epochs=2, freeze_epochs=2, find_steps=6, seed=5)  # its batches: two frozen epochs of 2 and 1 for validation, 6 for the rate, then as before
SHORT = dict(freeze_epochs=0, lr=1e-3, seed=1)

@pytest.fixture(autouse=True, scope='module')
def short_trial_run():
    "A trial run of a few steps is enough for a learning rate that is the same each time"
    with pytest.MonkeyPatch.context() as m:
        m.setattr(L, 'MIN_STEPS', 6)
        yield

def fresh(path, net=SMALL_NET, size=SIZE, bs=2):
    "A learner that is the same each time, with an encoder to freeze"
    set_seed(3)
    learn = seg_learner(seg_dls(path, size, bs=bs), *net)
    learn.pretrained = True
    return learn

class Cut(Callback):
    "Cut the power at the `n`th batch of all, those of validation and of the search for a rate among them"
    order = -200
    def __init__(self, n): self.left = n
    def before_batch(self):
        if not self.left: raise KeyboardInterrupt
        self.left -= 1

class Average(Callback):
    "The mean of all weights on the way"
    def __init__(self): self.n,self.total = 0,{}
    def after_step(self):
        self.n += 1
        for k,p in self.model.named_parameters(): self.total[k] = self.total.get(k, 0) + p.detach()
    def state_dict(self): return dict(n=self.n, total=self.total)
    def load_state_dict(self, d): self.n,self.total = d['n'],d['total']

def cut_fit(learn, n, *cbs, **kw):
    "Train until batch `n`"
    learn.add_cb(Cut(n))
    with pytest.raises(KeyboardInterrupt): fit(learn, cbs=cbs, **kw)
    learn.remove_cb(Cut)

@pytest.fixture(scope='module')
def whole(trained_discs):
    "Nobody disturbed this training: its learner and its callback"
    learn,avg = fresh(trained_discs), Average()
    return fit(learn, cbs=[avg], **PLAN), avg

def check_same(learn, avg, whole):
    assert same(state(learn.model), state(whole[0].model)) and learn.history==whole[0].history
    assert avg.n==whole[1].n and same(avg.total, whole[1].total)

def check_continues(path, whole, file):
    "A fresh learner goes on from `file` and ends as if undisturbed"
    learn,avg = fresh(path), Average()
    fit(learn, cbs=[avg], checkpoint=file, **PLAN)
    check_same(learn, avg, whole)

# --- random numbers

def test_a_seed_fixes_all_chance(trained_discs, whole):
    learn,avg = fresh(trained_discs), Average()
    set_seed(99)
    learn.dls.train.one_batch(), np.random.rand(7), torch.rand(7)
    fit(learn, cbs=[avg], **PLAN)
    check_same(learn, avg, whole)

def test_another_seed_and_none_differ(trained_discs):
    plan = dict(SHORT, epochs=1)
    a,b,c,d = [state(fit(fresh(trained_discs), **dict(plan, seed=s)).model) for s in (1, 2, None, None)]
    assert not same(a, b) and not same(a, c) and same(c, d)

# --- continued

def test_without_a_checkpoint_any_network_trains(trained_discs):
    learn = fresh(trained_discs)
    learn.model.config = dict(learn.model.config, odd=object())
    fit(learn, epochs=1, **SHORT)

@pytest.mark.parametrize('cuts', [[0], [4], [8], [13], [16], [4, 5, 7]])
def test_cut_anywhere_ends_the_same(trained_discs, whole, tmp_path, cuts):
    f = tmp_path/'fit.pth'
    for n in cuts: cut_fit(fresh(trained_discs), n, Average(), checkpoint=f, **PLAN)
    set_seed(len(cuts))
    check_continues(trained_discs, whole, f)
    assert tree(tmp_path).keys()=={'fit.pth'}

@pytest.mark.parametrize('n', [8, 16])
def test_the_same_learner_goes_on(trained_discs, whole, tmp_path, n):
    learn,avg = fresh(trained_discs), Average()
    cut_fit(learn, n, avg, checkpoint=tmp_path/'fit.pth', **PLAN)
    fit(learn, cbs=[avg], checkpoint=tmp_path/'fit.pth', **PLAN)
    check_same(learn, avg, whole)

@pytest.mark.parametrize('n', [1, 5])
def test_cut_while_it_writes(monkeypatch, trained_discs, whole, tmp_path, n):
    replace,left = os.replace,[n]
    def cut_replace(*args):
        left[0] -= 1
        if not left[0]: raise KeyboardInterrupt
        replace(*args)
    monkeypatch.setattr(os, 'replace', cut_replace)
    with pytest.raises(KeyboardInterrupt): fit(fresh(trained_discs), cbs=[Average()], checkpoint=tmp_path/'fit.pth', **PLAN)
    check_continues(trained_discs, whole, tmp_path/'fit.pth')

def test_a_finished_training_is_not_repeated(monkeypatch, trained_discs, whole, tmp_path):
    fit(fresh(trained_discs), cbs=[Average()], checkpoint=tmp_path/'fit.pth', **PLAN)
    learn,avg = fresh(trained_discs), Average()
    learn.add_cb(Cut(0))
    monkeypatch.setattr(L, 'find_lr', None)
    fit(learn, cbs=[avg], checkpoint=tmp_path/'fit.pth', **PLAN)
    check_same(learn, avg, whole)

# --- what callbacks remember

class Watch(KeepBest):
    "Remember the weights after every epoch"
    seen = []
    def after_epoch(self):
        super().after_epoch()
        Watch.seen.append(state(self.model))

def test_best_epoch_and_patience_are_kept(monkeypatch, trained_discs, tmp_path):
    plan = dict(SHORT, epochs=9, patience=3, checkpoint=tmp_path/'fit.pth')
    Watch.seen,scores = [],[0.2, 0.8, 0.4, 0.3, 0.2, 0.9]
    left = iter(scores)
    monkeypatch.setattr(L, 'KeepBest', Watch)
    monkeypatch.setattr(ForegroundMetric, 'value', property(lambda m: next(left) if m.name=='dice' else 0.))
    cut_fit(fresh(trained_discs, bs=4), 6, **plan)
    assert len(Watch.seen)==3
    learn = fit(fresh(trained_discs, bs=4), **plan)
    assert [h['dice'] for h in learn.history]==scores[:5] and same(state(learn.model), Watch.seen[1])

def test_trackers_of_one_name_keep_apart(trained_discs, tmp_path):
    plan = dict(SHORT, epochs=3, patience=5, checkpoint=tmp_path/'fit.pth')
    def stop(): return EarlyStoppingCallback('valid_loss', patience=7)
    cut_fit(fresh(trained_discs, bs=4), 4, stop(), **plan)
    kept = torch.load(tmp_path/'fit.pth', weights_only=True)
    assert [d.keys() for d in kept['callbacks']]==[{'best', 'best_epoch', 'state'}, {'best', 'wait'}, {'best', 'wait'}]
    loss = stop()
    learn = fit(fresh(trained_discs, bs=4), cbs=[loss], **plan)
    assert loss.best==min(v[1] for v in learn.recorder.values) and len(learn.history)==3

class Odd(Callback):
    def state_dict(self): return dict(where=Path('a'))

def test_a_callback_may_not_keep_just_anything(trained_discs, tmp_path):
    with pytest.raises(ValueError, match='a checkpoint keeps tensors'): fit(fresh(trained_discs), cbs=[Odd()], checkpoint=tmp_path/'fit.pth', epochs=1, **SHORT)
    assert tree(tmp_path)=={}

class Half(MixedPrecision):
    "Mixed precision on the processor, with a scale that leaves its mark on the weights"
    def before_fit(self):
        self.autocast,self.scales = torch.autocast('cpu', torch.bfloat16), []
        self.last = self.learn.scaler = torch.amp.GradScaler('cpu', init_scale=3., growth_factor=1.7, growth_interval=3)

class Stop(Callback):
    "Press a notebook's stop button in the midst of a batch"
    order = 20
    def after_pred(self):
        if self.epoch==2: raise KeyboardInterrupt

def test_mixed_precision_goes_on(trained_discs, tmp_path):
    def train(*cbs, **kw):
        learn = fresh(trained_discs).add_cb(Half())
        fit(learn, epochs=3, cbs=cbs, **dict(SHORT, lr=1e-2), **kw)
        return state(learn.model), learn.half.last.state_dict()
    a,scale = train()
    with pytest.raises(KeyboardInterrupt): train(Stop(), checkpoint=tmp_path/'fit.pth')
    assert not torch.is_autocast_enabled('cpu')
    b,again = train(checkpoint=tmp_path/'fit.pth')
    assert same(a, b) and scale==again and scale['scale']>8

@pytest.mark.parametrize('screen', [False, True])
def test_no_trace_of_skipped_epochs(monkeypatch, capfd, trained_discs, tmp_path, screen):
    monkeypatch.setattr(L, 'on_screen', lambda: screen)
    plan = dict(SHORT, epochs=3, freeze_epochs=1, checkpoint=tmp_path/'fit.pth')
    cut_fit(fresh(trained_discs), 10, **plan)
    capfd.readouterr()
    for told,rows in (('fit.pth: going on after 2 of 3 epochs', [2]), ('fit.pth: going on after 3 of 3 epochs', [])):
        learn = fit(fresh(trained_discs), **plan)
        out = capfd.readouterr().out
        assert out.count('going on')==1 and told in out
        if not screen: assert [o.split()[0] for o in out.splitlines()]==['fit.pth:', 'epoch', *map(str, rows)]
        rec = learn.recorder
        assert [len(v) for v in rec.values]==[4]*3 and rec.iters==[2, 4, 6] and len(rec.losses)==len(rec.lrs)==6
        rec.plot_loss()

# --- what is refused

@pytest.fixture(scope='module')
def one_epoch(trained_discs, tmp_path_factory):
    "The checkpoint of a training, and how to call it"
    plan = dict(SHORT, epochs=2, freeze_epochs=1)
    f = tmp_path_factory.mktemp('one')/'fit.pth'
    cut_fit(fresh(trained_discs), 5, checkpoint=f, **plan)
    return f, plan

def check_refused(learn, file, plan, message):
    "Neither the weights nor the file change"
    before,written = state(learn.model), file.read_bytes()
    with pytest.raises(ValueError, match=message): fit(learn, checkpoint=file, **plan)
    assert same(before, state(learn.model)) and file.read_bytes()==written, plan

def test_checkpoint_of_another_call(trained_discs, one_epoch):
    f,plan = one_epoch
    learn = fresh(trained_discs)
    for args,named in ((dict(seed=2), 'seed'), (dict(seed=None), 'seed'), (dict(epochs=3), 'epochs'), (dict(freeze_epochs=2), 'freeze_epochs'),
        (dict(lr=2e-3), 'lr'), (dict(lr=None), 'lr'), (dict(frozen_lr=1.), 'frozen_lr'), (dict(find_steps=37), 'find_steps'),
        (dict(patience=3), 'patience'), (dict(cbs=[Average()]), 'callbacks'), (dict(seed=2, lr=None), 'lr, seed')):
        check_refused(learn, f, {**plan, **args}, f'fit.pth: is of a training with other {named}; .* delete it')
    for new,named in ((dict(net=('CGNet', None)), 'network'), (dict(bs=3), 'bs'), (dict(size=(48, 32)), 'size')):
        check_refused(fresh(trained_discs, **new), f, plan, f'other {named}')
    learn.dls = seg_dls(trained_discs, SIZE, bs=2, epoch_len=8)
    check_refused(learn, f, plan, 'other images')

def spoil(how, raw):
    "The bytes of a checkpoint, spoilt"
    if how=='flipped': return raw[:len(raw)//2] + bytes([raw[len(raw)//2]^255]) + raw[len(raw)//2+1:]
    return raw[:how] if isinstance(how, int) else how

def test_damaged_checkpoint(trained_discs, one_epoch, tmp_path):
    f,plan = one_epoch
    learn,spoilt = fresh(trained_discs), tmp_path/'bad.pth'
    for how in (0, 1, 5000, -1, -5000, 'flipped', b'no', b'PK' + b'0'*999):
        spoilt.write_bytes(spoil(how, f.read_bytes()))
        check_refused(learn, spoilt, plan, 'bad.pth: is not a checkpoint of fit .*; delete it to start afresh')

def test_what_is_no_checkpoint(trained_discs, one_epoch, tiny, tmp_path):
    torch.save(dict(key=Touch(tmp_path/'ran')), tmp_path/'evil.pth')
    torch.save([1], tmp_path/'list.pth')
    learn = fresh(trained_discs)
    for f in (tmp_path, save_model(tiny, tmp_path/'m.pth'), tmp_path/'evil.pth', tmp_path/'list.pth'):
        with pytest.raises(ValueError, match='is not a checkpoint'): fit(learn, checkpoint=f, **one_epoch[1])
    assert not (tmp_path/'ran').exists()
