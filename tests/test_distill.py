"Runs: their outputs, their seed, going on after an interruption, and what they refuse before they begin"
import csv, json, os, random
from inspect import signature

import numpy as np, pytest, timm, torch
from conftest import NET, SIZE, make_discs, save, tree
from PIL import Image

import semisup_seg.annotate as N, semisup_seg.distill as D
from semisup_seg.core import DatasetError, check_dataset, load_image, load_mask
from semisup_seg.distill import data_distillation, distill, simple_training
from semisup_seg.learner import load_model, predict

OPTIONS = dict(size=SIZE, bs=4, epochs=1, freeze_epochs=0, lr=1e-3, pretrained=False)
MODELS = [f'{role}_U-Net_test_resnet.{ext}' for role in ('base', 'target') for ext in ('json', 'pth')]
OUTPUTS = {*MODELS, 'annotations.csv', 'calibration.csv', 'annotations/.journal', 'report.json', 'report.html', 'run.json'}

def go(path, out, views=('H Flip',), **options): return data_distillation(NET, NET, list(views), path, out, **{**OPTIONS, **options})
def weights(out, role='target'): return torch.load(out/f'{role}_U-Net_test_resnet.pth', weights_only=True)
def same(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)
def scores(out): return {k: v for k,v in json.loads((out/'report.json').read_text()).items() if k!='settings'}

@pytest.fixture(scope='module')
def done(tmp_path_factory):
    "One whole run: the data, the files it had before, the results, and what came back"
    root = tmp_path_factory.mktemp('run')
    path,work = make_discs(root/'discs'), root/'work'
    work.mkdir()
    before,here = tree(path), os.getcwd()
    os.chdir(work)
    try: res = go(path, root/'out')
    finally: os.chdir(here)
    return path, before, root/'out', res

@pytest.fixture
def counted(monkeypatch):
    "The sizes of the training sets that `fit` was called with"
    calls,real = [], D.fit
    def fit(learn, **kw):
        calls.append(len(learn.dls.train_ds))
        return real(learn, **kw)
    monkeypatch.setattr(D, 'fit', fit)
    return calls

# --- outputs

def test_outputs_are_those_of_the_design(done):
    path,_,out,res = done
    assert tree(out).keys()==OUTPUTS | {f'annotations/u{i}.png' for i in range(5)}
    for role in ('base', 'target'): assert all(isinstance(v, torch.Tensor) for v in weights(out, role).values())
    assert res.out==out and len(res.annotations)==5 and res.report.split=='test' and str(res.report) in repr(res)

def test_saved_models_are_the_trained_ones(done):
    path,_,out,res = done
    target = load_model(out/'target_U-Net_test_resnet.pth')
    assert same(target.state_dict(), {k: v.cpu() for k,v in res.learner.model.state_dict().items()}) and target.codes==check_dataset(path).codes
    f = path/'Images/test/test0.png'
    assert (predict(target, f)==predict(res.learner, f)).all()
    assert not same(weights(out), weights(out, 'base'))

def test_masks_and_table(done):
    path,_,out,_ = done
    rows = list(csv.DictReader(open(out/'annotations.csv', newline='', encoding='utf-8')))
    assert [r['image'] for r in rows]==[str(path/f'unlabeled_images/u{i}.png') for i in range(5)] and {r['used'] for r in rows}=={'True'}
    for r in rows: assert load_mask(out/r['mask'], check_dataset(path).codes).shape==load_image(r['image']).shape[:2]
    assert all(set(np.unique(np.array(Image.open(out/r['mask']))))<={0, 255} for r in rows)

def test_report_is_on_the_test_set(done):
    path,_,out,res = done
    rep = scores(out)
    assert rep['split']=='test' and rep['images']==2 and [o['image'] for o in rep['per_image']['target']]==['test0.png', 'test1.png']
    assert {'target', 'baseline', 'difference', 'verdict', 'per_image'}<=rep.keys() and len(rep['difference']['dice'])==3
    assert 'test set' in (out/'report.html').read_text() and 'There is no test set' not in (out/'report.html').read_text()

def test_run_says_how_it_was_made(done):
    run = json.loads((done[2]/'run.json').read_text())
    assert run['args']['bases']==[list(NET)] and run['args']['views']==['H Flip'] and run['args']['seed']==42 and run['args']['size']==[32, 32]
    assert run['versions']['torch']==torch.__version__.split('+')[0] or run['versions']['torch']==torch.__version__
    assert set(run['stages'])=={'start', 'base', 'annotations', 'target'} and len(run['data'])>=16

def test_data_is_untouched_and_not_copied(done):
    path,before,out,_ = done
    assert tree(path)==before and not list((out.parent/'work').rglob('*')) and {o.name for o in out.parent.iterdir()}=={'discs', 'out', 'work'}
    assert not set(tree(out).values()) & set(before.values())

# --- the seed

def test_same_seed_same_result(done, tmp_path):
    path,_,out,_ = done
    random.seed(987)
    torch.manual_seed(987)
    np.random.seed(987)
    go(path, tmp_path/'again')
    for role in ('base', 'target'): assert same(weights(out, role), weights(tmp_path/'again', role))
    assert scores(out)==scores(tmp_path/'again')
    for f in (out/'annotations').iterdir(): assert f.read_bytes()==(tmp_path/'again/annotations'/f.name).read_bytes()

def test_another_seed_another_result(done, tmp_path):
    go(done[0], tmp_path/'other', seed=7)
    assert not same(weights(done[2]), weights(tmp_path/'other')) and not same(weights(done[2], 'base'), weights(tmp_path/'other', 'base'))

# --- going on

def test_interrupted_target_goes_on_with_the_teacher(monkeypatch, done, tmp_path, capsys):
    path,_,whole,_ = done
    out,calls,real = tmp_path/'out', [], D.fit
    def fit(learn, **kw):
        calls.append(len(learn.dls.train_ds))
        if len(calls)==2: raise KeyboardInterrupt
        return real(learn, **kw)
    monkeypatch.setattr(D, 'fit', fit)
    with pytest.raises(KeyboardInterrupt): go(path, out)
    assert not (out/'target_U-Net_test_resnet.pth').exists() and not (out/'report.html').exists() and not (out/'report.json').exists()
    base = (out/'base_U-Net_test_resnet.pth').read_bytes()
    random.seed(55)
    go(path, out)
    assert len(calls)==3 and (out/'base_U-Net_test_resnet.pth').read_bytes()==base and 'already trained' in capsys.readouterr().out
    assert same(weights(out), weights(whole)) and scores(out)==scores(whole)

def test_interrupted_annotation_goes_on(monkeypatch, done, tmp_path, counted):
    calls,real = [], N.to_mask
    def third_stops(*a):
        calls.append(a)
        if len(calls)==3: raise KeyboardInterrupt
        return real(*a)
    monkeypatch.setattr(N, 'to_mask', third_stops)
    with pytest.raises(KeyboardInterrupt): go(done[0], tmp_path/'out')
    assert counted==[9] and not (tmp_path/'out/annotations.csv').exists()
    res = go(done[0], tmp_path/'out')
    assert len(counted)==2 and len(res.annotations)==5 and tree(tmp_path/'out').keys()==tree(done[2]).keys()

def test_finished_run_is_not_trained_again(done, counted):
    path,_,out,res = done
    before = {k: v for k,v in tree(out).items() if k in MODELS}
    again = go(path, out)
    assert not counted and again.report.target==res.report.target and {k: v for k,v in tree(out).items() if k in MODELS}==before

@pytest.mark.parametrize('changed', [
    dict(epochs=2), dict(seed=1), dict(bs=2), dict(size=(48, 32)), dict(views=['V Flip']), dict(lr=2e-3), dict(freeze_epochs=1)])
def test_changed_arguments_are_refused(done, counted, changed):
    path,_,out,_ = done
    before = tree(out)
    with pytest.raises(ValueError, match=f'other {next(iter(changed))}.*resume=False'): go(path, out, **changed)
    assert tree(out)==before and not counted

@pytest.mark.parametrize('change', ['image', 'label', 'unlabeled', 'more', 'codes', 'name'])
def test_changed_data_are_refused(tmp_path, counted, change):
    path,out = make_discs(tmp_path/'d', train=1, valid=1, test=1, unlabeled=1), tmp_path/'out'
    D.open_run(out, {}, D.fingerprint(path), True)
    if change=='image': save(path/'Images/test/test0.png', 255-np.array(Image.open(path/'Images/test/test0.png')))
    elif change=='label': save(path/'Labels/train/train0.png', 255-np.array(Image.open(path/'Labels/train/train0.png')))
    elif change=='unlabeled': save(path/'unlabeled_images/u0.png', np.zeros((9, 9), np.uint8))
    elif change=='more': save(path/'unlabeled_images/u1.png', np.zeros((9, 9), np.uint8))
    elif change=='codes': (path/'codes.txt').write_text('rest,0\nother,255\n')
    else: (path/'unlabeled_images/u0.png').rename(path/'unlabeled_images/v0.png')
    with pytest.raises(ValueError, match='other the data'): D.open_run(out, {}, D.fingerprint(path), True)

def test_fingerprint_belongs_to_the_data_not_to_the_place(tmp_path):
    a,b = make_discs(tmp_path/'a'), make_discs(tmp_path/'b')
    (b/'Images/train/.DS_Store').write_bytes(b'junk')
    assert D.fingerprint(a)==D.fingerprint(b)!=D.fingerprint(make_discs(tmp_path/'c', seed=1))

def test_afresh(done, tmp_path, counted):
    path,out = done[0], tmp_path/'out'
    simple_training(NET, path, out, **OPTIONS)
    (out/'notes.txt').write_text('mine')
    go(path, out, resume=False)
    assert len(counted)==3 and tree(out).keys()==OUTPUTS | {f'annotations/u{i}.png' for i in range(5)} | {'notes.txt'}

# --- refused before anything is trained or written

def resnet_file(folder):
    torch.save(timm.create_model('test_resnet').state_dict(), folder/'w.pth')
    return str(folder/'w.pth')

@pytest.mark.parametrize('bad,message', [
    (dict(base=('Nix', None)), "Unknown network 'Nix'"), (dict(target=('U-Net', 'resnet5O')), "Did you mean 'resnet50'"), (dict(base=('U-Net',)), 'expected .architecture, backbone'),
    (dict(base=3), 'expected .architecture, backbone'), (dict(target=('U-Net', 'vit_tiny_patch16_224')), 'vit_tiny_patch16_224'), (dict(views=[]), 'views: none'),
    (dict(views=['Rotate']), "Unknown view 'Rotate'"), (dict(views=['Gamma', 'gamma']), 'more than once'), (dict(size=32), 'size is 32'), (dict(size=(8, 8)), 'size is'),
    (dict(target=('PAN', 'test_resnet')), 'PAN needs at least 128'), (dict(bs=0), 'bs is 0'), (dict(bs=2.0), 'bs is 2.0'), (dict(bs=True), 'bs is True'),
    (dict(target=('DeepLabV3+', 'test_resnet'), bs=1), 'bs is 1'), (dict(epochs=0), 'epochs is 0'), (dict(epochs='9'), 'epochs is'), (dict(freeze_epochs=-1), 'freeze_epochs is -1'),
    (dict(seed=-1), 'seed is -1'), (dict(seed=None), 'seed is None'), (dict(lr=0), 'lr is 0'), (dict(lr=-1e-3), 'lr is'), (dict(lr=float('nan')), 'lr is nan'),
    (dict(lr='fast'), 'lr is'), (dict(pretrained='nowhere.pth'), 'nowhere.pth.*no such file')])
def test_bad_arguments(trained_discs, tmp_path, counted, bad, message):
    args = dict(base=NET, target=NET, views=['H Flip'], path=trained_discs, out=tmp_path/'out', **OPTIONS)
    with pytest.raises(ValueError, match=message): data_distillation(**{**args, **bad})
    assert not counted and not (tmp_path/'out').exists()

@pytest.mark.parametrize('kind', ['missing', 'codes', 'image', 'unlabeled', 'no unlabeled'])
def test_bad_data(discs, tmp_path, counted, kind):
    path = tmp_path/'nowhere' if kind=='missing' else discs
    if kind=='codes': (discs/'codes.txt').unlink()
    if kind=='image': (discs/'Images/valid/valid0.png').write_bytes(b'x')
    if kind=='unlabeled': (discs/'unlabeled_images/u3.png').write_bytes(b'x')
    if kind=='no unlabeled': (discs/'unlabeled_images').rename(tmp_path/'elsewhere')
    want = dict(missing='nowhere', codes='codes.txt', image='valid0.png', unlabeled='u3.png').get(kind, 'unlabeled_images')
    with pytest.raises(DatasetError, match=want): go(path, tmp_path/'out')
    assert not counted and not (tmp_path/'out').exists()

@pytest.mark.parametrize('kind', ['inside', 'same', 'around', 'file', 'full', 'below a file', 'link'])
def test_bad_out(discs, tmp_path, counted, kind):
    (tmp_path/'file').write_text('mine')
    (tmp_path/'full').mkdir()
    (tmp_path/'full/thesis.txt').write_text('mine')
    (tmp_path/'link').symlink_to(discs)
    out = {'inside': discs/'out', 'same': discs, 'around': tmp_path, 'file': tmp_path/'file', 'full': tmp_path/'full', 'below a file': tmp_path/'file/out', 'link': tmp_path/'link/out'}[kind]
    before = tree(tmp_path)
    with pytest.raises((ValueError, OSError), match='out|file'): go(discs, out)
    assert tree(tmp_path)==before and not counted

@pytest.mark.parametrize('text', ['', '{}', '[]', 'not json', '{"args": 3}'])
def test_foreign_run_file(discs, tmp_path, counted, text):
    (tmp_path/'out').mkdir()
    (tmp_path/'out/run.json').write_text(text)
    with pytest.raises(ValueError, match='run.json|out:'): go(discs, tmp_path/'out')
    assert (tmp_path/'out/run.json').read_text()==text and not counted

@pytest.mark.parametrize('swap', [False, True])
def test_weights_that_fit_one_network_only(trained_discs, tmp_path, counted, swap):
    pair = [('U-Net', 'test_resnet'), ('U-Net', 'tf_efficientnet_lite0')]
    with pytest.raises(ValueError, match='do not fit'):
        data_distillation(*pair[::-1] if swap else pair, ['H Flip'], trained_discs, tmp_path/'out', **{**OPTIONS, 'pretrained': resnet_file(tmp_path)})
    assert not counted and not (tmp_path/'out').exists()

# --- variants

def test_weights_from_a_file_are_recorded_and_used(monkeypatch, trained_discs, tmp_path):
    file,seen = resnet_file(tmp_path), []
    def fit(learn, **kw):
        seen.append({k: v.clone() for k,v in learn.model.encoder.state_dict().items()})
        learn.history = [dict(stage='all', train_loss=1., valid_loss=1., dice=0.5, jaccard=0.4)]
    monkeypatch.setattr(D, 'fit', fit)
    go(trained_discs, tmp_path/'out', pretrained=file)
    want = torch.load(file, weights_only=True)
    for s in seen: assert all(torch.equal(v, want[k.removeprefix('model.')]) for k,v in s.items())
    assert len(seen)==2 and json.loads((tmp_path/'out/run.json').read_text())['args']['pretrained']==file

def test_both_trainings_take_the_same_steps_on_different_images(monkeypatch, trained_discs, tmp_path):
    seen = []
    def fit(learn, **kw):
        seen.append((len(learn.dls.train), {f.name for f in learn.dls.train_ds.items}))
        learn.history = [dict(stage='all', train_loss=1., valid_loss=1., dice=0.5, jaccard=0.4)]
    monkeypatch.setattr(D, 'fit', fit)
    go(trained_discs, tmp_path/'out')
    train = {f'train{i}.png' for i in range(4)}
    assert seen==[(2, train), (2, train | {f'u{i}.png' for i in range(5)})]

def test_another_target(trained_discs, tmp_path):
    res = data_distillation(NET, ('MANet', 'test_resnet'), ['Gamma', 'V Flip'], trained_discs, tmp_path/'out', **OPTIONS)
    assert {'base_U-Net_test_resnet.pth', 'target_MANet_test_resnet.pth'}<=tree(tmp_path/'out').keys() and res.learner.model.config['name']=='MANet'

def test_simple_training_without_test_set(tmp_path, counted):
    path = make_discs(tmp_path/'d', test=0, unlabeled=0)
    before = tree(path)
    res = simple_training(NET, path, tmp_path/'out', **OPTIONS)
    assert tree(tmp_path/'out').keys()=={'target_U-Net_test_resnet.pth', 'target_U-Net_test_resnet.json', 'report.json', 'report.html', 'run.json'}
    assert counted==[4] and tree(path)==before and res.annotations is None and res.report.baseline is None
    page,rep = (tmp_path/'out/report.html').read_text(), scores(tmp_path/'out')
    for text in (page, rep['verdict'], str(res)): assert 'There is no test set: the validation set chose the model' in text
    assert rep['split']=='valid' and rep['images']==2 and 'baseline' not in rep

def test_simple_training_on_the_test_set(trained_discs, tmp_path):
    res = simple_training(NET, trained_discs, tmp_path/'out', **OPTIONS)
    assert res.report.split=='test' and 'There is no test set' not in (tmp_path/'out/report.html').read_text() and not (tmp_path/'out/annotations.csv').exists()

@pytest.mark.parametrize('routine', [data_distillation, simple_training])
def test_routines_list_every_option(routine):
    ours = signature(routine).parameters
    options = {k: p for k,p in signature(distill).parameters.items() if p.default is not p.empty}
    assert len(options)>=8 and {k: ours[k].default for k in options}=={k: p.default for k,p in options.items()}
    assert not [p for p in ours.values() if p.kind is p.VAR_KEYWORD]
