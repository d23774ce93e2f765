"Training keeps its best epoch, and a saved model is the same model, safely"
import json, os, signal, subprocess, sys, tempfile, time
from contextlib import suppress
from pathlib import Path

import matplotlib.pyplot as plt, numpy as np, pytest, torch
from conftest import NET, ROOT, SIZE, Touch, make_discs, make_model, save, tree
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.tracker import EarlyStoppingCallback
from fastai.torch_core import set_seed
from PIL import Image
from torch import nn

import semisup_seg.training.learner as L
from semisup_seg.core import IGNORE, DatasetError
from semisup_seg.data.images import load_image
from semisup_seg.data.folder import split_files, unlabeled_files
from semisup_seg.data.loaders import seg_dls
from semisup_seg.training.losses import CEDiceLoss
from semisup_seg.training.learner import KeepBest, encoder_splitter, find_lr, fit
from semisup_seg.training.metrics import ForegroundMetric
from semisup_seg.training.inference import load_model
from semisup_seg.training.inference import predict, save_model, probs_to_mask
from semisup_seg.training.learner import seg_learner

@pytest.fixture
def learn(trained_discs):
    set_seed(0)
    return seg_learner(seg_dls(trained_discs, SIZE, bs=2), *NET)

@pytest.fixture
def scripted(monkeypatch):
    "Let the validation Dice of each epoch be what the test says, the learning-rate finder aside"
    def _script(values):
        left = iter(values)
        monkeypatch.setattr(ForegroundMetric, 'value', property(lambda m: next(left) if m.name=='dice' else 0.))
    return _script

def state(model): return {k: v.clone() for k,v in model.state_dict().items()}
def same(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)

# --- groups and schedule

def test_groups_hold_every_parameter_once(learn):
    enc,rest = encoder_splitter(learn.model)
    assert len({id(p) for p in enc+rest})==len(enc)+len(rest)==len(list(learn.model.parameters()))
    assert {id(p) for p in enc}=={id(p) for p in learn.model.encoder.parameters()}

def test_freezing_trains_the_decoder_alone(learn, tmp_path):
    torch.save(learn.model.encoder.state_dict(), tmp_path/'w.pth')
    learn = seg_learner(learn.dls, *NET, pretrained=str(tmp_path/'w.pth'))
    learn.freeze()
    norm = {id(p) for m in learn.model.encoder.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    assert not [n for n,p in learn.model.named_parameters() if p.requires_grad!=('encoder' not in n or id(p) in norm)]
    before = state(learn.model)
    learn.fit_one_cycle(1, 1e-2)
    after = state(learn.model)
    conv = [k for k in before if 'encoder' in k and before[k].dim()==4]
    assert conv and all(torch.equal(before[k], after[k]) for k in conv)
    assert any(not torch.equal(before[k], after[k]) for k in before if 'decoder' in k)

@pytest.mark.parametrize('pretrained,stages', [(True, ['frozen', 'frozen', 'all']), (False, ['all'])])
def test_stages_of_a_fit(learn, pretrained, stages):
    learn.pretrained = pretrained
    fit(learn, epochs=1, freeze_epochs=2, lr=1e-3)
    assert [h['stage'] for h in learn.history]==stages
    assert all({'stage', 'train_loss', 'valid_loss', 'dice', 'jaccard'}<=h.keys() for h in learn.history)
    assert all(p.requires_grad for p in learn.model.parameters())

@pytest.mark.parametrize('args,want', [
    (dict(), [(2, 1e-3, []), 100, (20, 0.02, ['KeepBest'])]),
    (dict(epochs=3, freeze_epochs=1, lr=0.5, frozen_lr=0.1), [(1, 0.1, []), (3, 0.5, ['KeepBest'])]),
    (dict(freeze_epochs=0, find_steps=7, patience=4), [7, (20, 0.02, ['EarlyStoppingCallback', 'KeepBest'])])])
def test_schedule_and_its_defaults(monkeypatch, learn, args, want):
    calls = []
    def one_cycle(self, n, lr, cbs=()): calls.append((n, lr, sorted(type(c).__name__ for c in cbs)))
    monkeypatch.setattr(type(learn), 'fit_one_cycle', one_cycle)
    monkeypatch.setattr(L, 'find_lr', lambda learn, steps: calls.append(steps) or 0.02)
    monkeypatch.setattr(L, '_history', lambda *_: [])
    learn.pretrained = True
    fit(learn, **args)
    assert calls==want

def test_find_lr_puts_the_weights_back(learn):
    before = state(learn.model)
    lr = find_lr(learn, 10)
    assert 0<lr<10 and same(before, state(learn.model))

@pytest.mark.parametrize('args', [
    dict(epochs=0), dict(epochs=-1), dict(freeze_epochs=-1), dict(epochs=1.5), dict(epochs='3'), dict(lr=-1e-3), dict(lr=0), dict(lr=float('nan')),
    dict(frozen_lr=-1), dict(patience=-1), dict(lr='fast')])
def test_fit_refuses(learn, args):
    before = state(learn.model)
    with pytest.raises(ValueError, match=next(iter(args))): fit(learn, **{**dict(epochs=1, freeze_epochs=0, lr=1e-3, find_steps=2), **args})
    assert same(before, state(learn.model))

# --- best epoch, early stop

class Watch(KeepBest):
    "Remember the weights after every epoch"
    seen = []
    def after_epoch(self):
        super().after_epoch()
        Watch.seen.append(state(self.model))

@pytest.mark.parametrize('scores,best', [([0.2, 0.7, 0.5], 1), ([0.1, 0.2, 0.3], 2), ([0.4, 0.4, 0.4], 0), ([float('nan'), 0.2, 0.1], 1)])
def test_best_epoch_is_kept(monkeypatch, scripted, learn, scores, best):
    scripted(scores)
    Watch.seen = []
    monkeypatch.setattr(L, 'KeepBest', Watch)
    fit(learn, epochs=3, freeze_epochs=0, lr=1e-3)
    assert same(state(learn.model), Watch.seen[best]) and sum(same(state(learn.model), o) for o in Watch.seen)==1
    assert [h['dice'] for h in learn.history][-1]==scores[-1]

@pytest.mark.parametrize('patience,ran', [(2, 3), (None, 4)])
def test_patience(monkeypatch, scripted, learn, patience, ran):
    scripted([0.5, 0.4, 0.3, 0.2])
    Watch.seen = []
    monkeypatch.setattr(L, 'KeepBest', Watch)
    fit(learn, epochs=4, freeze_epochs=0, lr=1e-3, patience=patience)
    assert len(learn.history)==len(Watch.seen)==ran and same(state(learn.model), Watch.seen[0])

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
    learn = seg_learner(seg_dls(discs, SIZE, bs=2), *NET)
    fit(learn, epochs=1, freeze_epochs=0, find_steps=4)
    predict(learn, unlabeled_files(discs))
    assert tree(discs)==before and tree(tmp_path/'work')=={} and Path(learn.path)==Path(tempfile.gettempdir())

def test_model_knows_its_classes_and_size(learn, trained_discs):
    assert (learn.model.codes, learn.model.size)==(learn.dls.codes, SIZE)
    assert next(p for p in learn.model.parameters() if p.dim()==4 and p.shape[1]>1 and p.shape[2]>1).is_contiguous(memory_format=torch.channels_last)

# --- killed and taken up again

PLAN = dict(epochs=2, freeze_epochs=2, find_steps=6, seed=5)  # its batches: two frozen epochs of 2 and 1 for validation, 6 for the rate, then as before

def fresh(path, net=NET, size=SIZE, bs=2):
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

def test_a_seed_fixes_all_chance(trained_discs, whole):
    learn,avg = fresh(trained_discs), Average()
    set_seed(99)
    learn.dls.train.one_batch(), np.random.rand(7), torch.rand(7)
    fit(learn, cbs=[avg], **PLAN)
    check_same(learn, avg, whole)

def test_without_a_checkpoint_any_network_trains(learn):
    learn.model.config = object()
    fit(learn, epochs=1, freeze_epochs=0, lr=1e-3, seed=1)

def test_another_seed_and_none_differ(trained_discs, whole):
    plan = dict(epochs=1, freeze_epochs=0, lr=1e-3)
    a,b,c,d = [state(fit(fresh(trained_discs), seed=s, **plan).model) for s in (1, 2, None, None)]
    assert not same(a, b) and not same(a, c) and same(c, d)

@pytest.mark.parametrize('cuts', [[0], [4], [8], [13], [16], [4, 5, 7]])
def test_cut_anywhere_ends_the_same(trained_discs, whole, tmp_path, cuts):
    f = tmp_path/'fit.pth'
    for n in cuts: cut_fit(fresh(trained_discs), n, Average(), checkpoint=f, **PLAN)
    set_seed(len(cuts))
    learn,avg = fresh(trained_discs), Average()
    fit(learn, cbs=[avg], checkpoint=f, **PLAN)
    check_same(learn, avg, whole)
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
    def cut_windows(*args):
        left[0] -= 1
        if not left[0]: raise KeyboardInterrupt
        replace(*args)
    monkeypatch.setattr(os, 'replace', cut_windows)
    with pytest.raises(KeyboardInterrupt): fit(fresh(trained_discs), cbs=[Average()], checkpoint=tmp_path/'fit.pth', **PLAN)
    learn,avg = fresh(trained_discs), Average()
    fit(learn, cbs=[avg], checkpoint=tmp_path/'fit.pth', **PLAN)
    check_same(learn, avg, whole)

def test_a_finished_training_is_not_repeated(monkeypatch, trained_discs, whole, tmp_path):
    fit(fresh(trained_discs), cbs=[Average()], checkpoint=tmp_path/'fit.pth', **PLAN)
    learn,avg = fresh(trained_discs), Average()
    learn.add_cb(Cut(0))
    monkeypatch.setattr(L, 'find_lr', None)
    fit(learn, cbs=[avg], checkpoint=tmp_path/'fit.pth', **PLAN)
    check_same(learn, avg, whole)

KILLED = """
import sys
sys.path[:0] = sys.argv[3:]
from test_learner import *
class Wait(Callback):
    def before_batch(self):
        if self.epoch and hasattr(self.learn, 'keep_best'): time.sleep(60)
fit(fresh(sys.argv[1]), cbs=[Average(), Wait()], checkpoint=sys.argv[2], **PLAN)
"""

def test_killed_process(trained_discs, whole, tmp_path):
    f,seen = tmp_path/'fit.pth', set()
    env = {**os.environ, 'OMP_NUM_THREADS': str(torch.get_num_threads()), 'PYTHONPATH': str(ROOT)}
    with subprocess.Popen([sys.executable, '-c', KILLED, trained_discs, f, ROOT, ROOT/'tests'], env=env, stdout=subprocess.DEVNULL) as p:
        while len(seen)<3 and p.poll() is None:
            with suppress(FileNotFoundError): seen.add(f.stat().st_mtime_ns)
            time.sleep(0.01)
        p.send_signal(signal.SIGKILL)
    assert p.returncode==-signal.SIGKILL
    learn,avg = fresh(trained_discs), Average()
    fit(learn, cbs=[avg], checkpoint=f, **PLAN)
    check_same(learn, avg, whole)

def test_best_epoch_and_patience_are_kept(monkeypatch, scripted, trained_discs, tmp_path):
    plan = dict(epochs=9, freeze_epochs=0, lr=1e-3, patience=3, seed=1, checkpoint=tmp_path/'fit.pth')
    Watch.seen,scores = [],[0.2, 0.8, 0.4, 0.3, 0.2, 0.9]
    monkeypatch.setattr(L, 'KeepBest', Watch)
    scripted(scores[:3])
    cut_fit(fresh(trained_discs), 10, **plan)
    scripted(scores[3:])
    learn = fit(fresh(trained_discs), **plan)
    assert [h['dice'] for h in learn.history]==scores[:5] and same(state(learn.model), Watch.seen[1])

def test_trackers_of_one_name_keep_apart(trained_discs, tmp_path):
    plan = dict(epochs=3, freeze_epochs=0, lr=1e-3, seed=1, patience=5, checkpoint=tmp_path/'fit.pth')
    def stop(): return EarlyStoppingCallback('valid_loss', patience=7)
    cut_fit(fresh(trained_discs), 7, stop(), **plan)
    kept = torch.load(tmp_path/'fit.pth', weights_only=True)
    assert [d.keys() for d in kept['callbacks']]==[{'best', 'best_epoch', 'state'}, {'best', 'wait'}, {'best', 'wait'}]
    loss = stop()
    learn = fit(fresh(trained_discs), cbs=[loss], **plan)
    assert loss.best==min(v[1] for v in learn.recorder.values) and len(learn.history)==3

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
        fit(learn, epochs=4, freeze_epochs=0, lr=1e-2, seed=1, cbs=cbs, **kw)
        return state(learn.model), learn.half.last.state_dict()
    a,scale = train()
    with pytest.raises(KeyboardInterrupt): train(Stop(), checkpoint=tmp_path/'fit.pth')
    assert not torch.is_autocast_enabled('cpu')
    b,again = train(checkpoint=tmp_path/'fit.pth')
    assert same(a, b) and scale==again and scale['scale']>8

@pytest.mark.parametrize('screen', [False, True])
def test_no_trace_of_skipped_epochs(monkeypatch, capfd, trained_discs, tmp_path, screen):
    monkeypatch.setattr(L, 'on_screen', lambda: screen)
    plan = dict(epochs=4, freeze_epochs=1, lr=1e-3, seed=1, checkpoint=tmp_path/'fit.pth')
    cut_fit(fresh(trained_discs), 10, **plan)
    capfd.readouterr()
    for told,rows in (('fit.pth: going on after 2 of 4 epochs', [2, 3]), ('fit.pth: going on after 4 of 4 epochs', [])):
        learn = fit(fresh(trained_discs), **plan)
        out = capfd.readouterr().out
        assert out.count('going on')==1 and told in out
        if not screen: assert [o.split()[0] for o in out.splitlines()]==['fit.pth:', 'epoch', *map(str, rows)]
        rec = learn.recorder
        assert [len(v) for v in rec.values]==[4]*4 and rec.iters==[2, 4, 6, 8] and len(rec.losses)==len(rec.lrs)==8
        rec.plot_loss()

@pytest.fixture(scope='module')
def one_epoch(trained_discs, tmp_path_factory):
    "The checkpoint of a training, and how to call it"
    plan = dict(epochs=2, freeze_epochs=1, lr=1e-3, seed=1)
    f = tmp_path_factory.mktemp('one')/'fit.pth'
    cut_fit(fresh(trained_discs), 5, checkpoint=f, **plan)
    return f, plan

@pytest.mark.parametrize('args,new,named', [
    (dict(seed=2), {}, 'seed'), (dict(seed=None), {}, 'seed'), (dict(epochs=3), {}, 'epochs'), (dict(freeze_epochs=2), {}, 'freeze_epochs'),
    (dict(lr=2e-3), {}, 'lr'), (dict(lr=None), {}, 'lr'), (dict(frozen_lr=1.), {}, 'frozen_lr'), (dict(find_steps=7), {}, 'find_steps'),
    (dict(patience=3), {}, 'patience'), (dict(cbs=[Average()]), {}, 'callbacks'), ({}, dict(net=('CGNet', None)), 'network'),
    ({}, dict(bs=3), 'bs'), ({}, dict(size=(48, 32)), 'size'), (dict(seed=2, lr=None), {}, 'lr, seed')])
def test_checkpoint_of_another_call(trained_discs, one_epoch, args, new, named):
    f,plan = one_epoch
    learn = fresh(trained_discs, **new)
    before,written = state(learn.model), f.read_bytes()
    with pytest.raises(ValueError, match=f'fit.pth: is of a training with other {named}; .* delete it'): fit(learn, checkpoint=f, **{**plan, **args})
    assert same(before, state(learn.model)) and f.read_bytes()==written

def test_checkpoint_of_other_data(trained_discs, one_epoch):
    f,plan = one_epoch
    learn = fresh(trained_discs)
    learn.dls = seg_dls(trained_discs, SIZE, bs=2, epoch_len=8)
    with pytest.raises(ValueError, match='other images'): fit(learn, checkpoint=f, **plan)

def spoil(how, raw):
    "The bytes of a checkpoint, spoilt"
    if how=='flipped': return raw[:len(raw)//2] + bytes([raw[len(raw)//2]^255]) + raw[len(raw)//2+1:]
    return raw[:how] if isinstance(how, int) else how

@pytest.mark.parametrize('how', [0, 1, 5000, -1, -5000, 'flipped', b'no', b'PK' + b'0'*999])
def test_damaged_checkpoint(trained_discs, one_epoch, tmp_path, how):
    f,plan = one_epoch
    spoilt = tmp_path/'bad.pth'
    spoilt.write_bytes(spoil(how, f.read_bytes()))
    with pytest.raises(ValueError, match='bad.pth: is not a checkpoint of fit .*; delete it to start afresh'): fit(fresh(trained_discs), checkpoint=spoilt, **plan)

def test_what_is_no_checkpoint(trained_discs, one_epoch, tiny, tmp_path):
    torch.save(dict(call=Touch(tmp_path/'ran')), tmp_path/'evil.pth')
    torch.save([1], tmp_path/'list.pth')
    for f in (tmp_path, save_model(tiny, tmp_path/'m.pth'), tmp_path/'evil.pth', tmp_path/'list.pth'):
        with pytest.raises(ValueError, match='is not a checkpoint'): fit(fresh(trained_discs), checkpoint=f, **one_epoch[1])
    assert not (tmp_path/'ran').exists()

class Odd(Callback):
    def state_dict(self): return dict(where=Path('a'))

def test_a_callback_may_not_keep_just_anything(trained_discs, tmp_path):
    with pytest.raises(ValueError, match='a checkpoint keeps tensors'): fit(fresh(trained_discs), cbs=[Odd()], seed=1, checkpoint=tmp_path/'fit.pth', epochs=1, lr=1e-3)
    assert tree(tmp_path)=={}

@pytest.mark.parametrize('seed', [-1, 1.5, '1', True])
def test_fit_refuses_a_seed(learn, seed):
    with pytest.raises(ValueError, match='seed is'): fit(learn, epochs=1, lr=1e-3, seed=seed)

# --- scores and loss

def test_loss_ignores_what_it_must():
    logits,y = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randint(0, 3, (2, 8, 8))
    y[:, :4] = IGNORE
    CEDiceLoss()(logits, y).backward()
    assert (logits.grad[:, :, :4]==0).all() and (logits.grad[:, :, 4:]!=0).any()
    assert torch.isclose(CEDiceLoss()(logits[:, :, 4:], y[:, 4:]), CEDiceLoss()(logits, y))

# --- files

def test_saved_model_is_state_dict_and_json(tiny, tmp_path):
    f = save_model(tiny, tmp_path/'models/m.pth')
    assert tree(tmp_path).keys()=={'models/m.pth', 'models/m.json'}
    cfg = json.loads(f.with_suffix('.json').read_text())
    assert cfg==dict(name='U-Net', backbone='test_resnet', n_out=2, n_in=3, codes='rest,0\ndisc,255\n', size=[32, 32])
    assert same(torch.load(f, weights_only=True), state(tiny))

@pytest.mark.parametrize('name', ['U-Net', 'DeepLabV3+', 'MANet', 'PAN'])
def test_loaded_model_predicts_the_same(tmp_path, name):
    m = make_model('rest,0\na,1,7\nb,300', 3, name, size=(128, 128))
    again = load_model(str(save_model(m, tmp_path/'m.pth')))
    im = np.uint8(np.random.default_rng(0).integers(0, 255, (50, 70)))
    assert (predict(m, im)==predict(again, im)).all() and (again.codes, again.size, again.training)==(m.codes, m.size, False)

def test_save_needs_classes(tmp_path):
    m = make_model()
    m.codes = None
    with pytest.raises(ValueError, match='no classes'): save_model(m, tmp_path/'m.pth')
    assert tree(tmp_path)=={}

@pytest.mark.parametrize('gone', ['m.pth', 'm.json'])
def test_load_with_a_file_missing(tiny, tmp_path, gone):
    f = save_model(tiny, tmp_path/'m.pth')
    (tmp_path/gone).unlink()
    with pytest.raises(ValueError, match=f'{gone}: no such file'): load_model(f)

@pytest.mark.parametrize('keep', [0, 1, 100, 5000, -1, -100])
def test_load_truncated(tiny, tmp_path, keep):
    f = save_model(tiny, tmp_path/'m.pth')
    f.write_bytes(f.read_bytes()[:keep])
    with pytest.raises(ValueError, match='m.pth: is not a model'): load_model(f)

@pytest.mark.parametrize('change', [
    '', '[]', '{}', 'nonsense', dict(name='Nix'), dict(n_out=5), dict(codes='rest,0'), dict(codes=3), dict(size=9), dict(backbone='resnet18'), dict(n_in=1),
    dict(codes='rest,0\na,1\nb,2')])
def test_load_with_a_spoilt_json(tiny, tmp_path, change):
    f = save_model(tiny, tmp_path/'m.pth')
    cfg = json.loads(f.with_suffix('.json').read_text())
    f.with_suffix('.json').write_text(change if isinstance(change, str) else json.dumps({**cfg, **change}))
    with pytest.raises(ValueError, match='m.pth: is not a model'): load_model(f)

def test_load_malicious(tiny, tmp_path):
    f = save_model(tiny, tmp_path/'m.pth')
    torch.save(dict(w=Touch(tmp_path/'ran')), f)
    with pytest.raises(ValueError, match='m.pth: is not a model'): load_model(f)
    assert not (tmp_path/'ran').exists()

# --- predict

def test_predict_at_each_images_own_size(tiny, trained_discs):
    files = unlabeled_files(trained_discs) + [f for f,_ in split_files(trained_discs, 'test')]
    masks = predict(tiny, files, bs=3)
    assert [m.shape for m in masks]==[load_image(f).shape[:2] for f in files] and all(m.dtype==np.uint8 and m.max()<2 for m in masks)
    for f,m in zip(files, masks):
        for o in (f, str(f), Image.open(f), load_image(f), load_image(f)[..., 0]): assert (predict(tiny, o)==m).all()
    assert predict(tiny, [])==[] and len(predict(tiny, files[:1]))==1 and len(predict(tiny, tuple(files)))==len(files)

@pytest.mark.parametrize('bs', [1, 2, 64])
def test_predict_does_not_depend_on_its_batch(tiny, trained_discs, bs):
    files = unlabeled_files(trained_discs)
    assert all((a==b).mean()>0.999 for a,b in zip(predict(tiny, files, bs=bs), predict(tiny, files)))

def test_predict_16_bit_and_rotated(tiny, tmp_path):
    rng = np.random.default_rng(0)
    a = np.uint8(rng.integers(0, 256, (40, 60)))
    a[0, :2] = 0, 255
    exif = Image.Exif()
    exif[0x0112] = 6
    want = predict(tiny, a)
    deep = save(tmp_path/'deep.png', a.astype(np.uint16)*257)
    assert want.any() and not want.all() and (predict(tiny, deep)==want).all()
    turned = save(tmp_path/'turned.png', np.rot90(a, 1).copy(), exif=exif)
    assert (predict(tiny, turned)==want).all() and want.shape==(40, 60)

def test_predict_puts_a_model_in_training_mode_to_rest(trained_discs):
    m = make_model().train()
    f = unlabeled_files(trained_discs)[:3]
    assert all((a==b).all() for a,b in zip(predict(m, f), predict(m, f)))

def test_predict_at_another_size(tiny, trained_discs):
    f = unlabeled_files(trained_discs)[0]
    a,b = predict(tiny, f), predict(tiny, f, size=(64, 96))
    assert a.shape==b.shape and (a!=b).any()

@pytest.mark.parametrize('args,message', [(dict(size=(8, 8)), 'size is'), (dict(size=64), 'size is'), (dict(bs=0), 'bs is'), (dict(bs=-1), 'bs is')])
def test_predict_refuses(tiny, trained_discs, args, message):
    with pytest.raises(ValueError, match=message): predict(tiny, unlabeled_files(trained_discs), **args)

def test_predict_names_the_unreadable_file(tiny, tmp_path):
    (tmp_path/'x.png').write_bytes(b'no')
    for f in (tmp_path/'x.png', tmp_path/'gone.png', tmp_path):
        with pytest.raises(DatasetError, match=f'{f.name}: (cannot be read|no such file)'): predict(tiny, f)

def test_to_mask_interpolates_before_it_decides():
    p = torch.tensor([[[0.9, 0.2]], [[0.1, 0.8]]])
    mask,conf = probs_to_mask(p, (1, 8))
    assert mask.tolist()==[[0, 0, 0, 0, 1, 1, 1, 1]] and conf.min()>=0.5 and conf.max()<=0.9+1e-6

# --- what fastai offers

def drawn(learn, **kw):
    "Titles, and colours of the masks, of what `show_results` draws"
    plt.close('all')
    learn.show_results(**kw)
    axs = [a for a in plt.gcf().axes if a.images]
    res = [a.get_title() for a in axs], [len(a.images) for a in axs], [im.get_cmap().name for a in axs for im in a.images[1:]]
    plt.close('all')
    return res

@pytest.mark.parametrize('codes', ['rest,0\ndisc,255', 'rest,0\ndisc,255\nother,9'])
def test_results_are_image_truth_prediction(tmp_path, codes):
    root = make_discs(tmp_path/'d', valid=5)
    (root/'codes.txt').write_text(codes)
    learn = seg_learner(seg_dls(root, SIZE, bs=5), *NET)
    names = ['image', 'truth', 'prediction']
    assert drawn(learn, max_n=2)==(names + ['']*3, [1, 2, 2]*2, ['semisup_seg']*4)
    assert drawn(learn)==(names*2 + ['']*9, [1, 2, 2]*5, ['semisup_seg']*10)
    assert drawn(learn, ncols=1, figsize=(2, 2))[0]==names + ['']*12
    assert drawn(learn, ds_idx=2, max_n=1)[0]==names

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
    learn = seg_learner(seg_dls(trained_discs, SIZE, bs=7, pseudo=pseudo), *NET)
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
