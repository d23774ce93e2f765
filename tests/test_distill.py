"Runs: their outputs, their seed, going on after an interruption, and what they refuse before they begin"
import csv, gc, json, os, random, shutil, signal, subprocess, sys, time, weakref
from inspect import signature
from pathlib import Path

import numpy as np, pytest, timm, torch
from conftest import NET, SIZE, make_discs, save, tree
from PIL import Image

import semisup_seg.annotation.annotate as N, semisup_seg.distillation.distill as D, semisup_seg.distillation.run as R
from semisup_seg.annotation.annotate import validation_dice
from semisup_seg.evaluation.compare import compare_runs
from semisup_seg.core import DatasetError
from semisup_seg.data.folder import check_dataset, split_files
from semisup_seg.data.images import load_image, load_mask
from semisup_seg.distillation.distill import data_distillation, distill, model_data_distillation, model_distillation, simple_training
from semisup_seg.training.inference import load_model, predict
from semisup_seg.distillation.recipe import Again, HardLabels, MixedBatches, TopReliable
from semisup_seg.annotation.review import add_label

OPTIONS = dict(size=SIZE, bs=4, epochs=1, freeze_epochs=0, lr=1e-3, pretrained=False)
MODELS = [f'{role}_U-Net_test_resnet.{ext}' for role in ('base', 'target') for ext in ('json', 'pth')]
VOTE = {'vote/annotations.csv', 'vote/annotations/.journal', 'vote/annotations/test0.png', 'vote/annotations/test1.png'}
OUTPUTS = {*MODELS, *VOTE, 'annotations.csv', 'calibration.csv', 'annotations/.journal', 'report.json', 'report.html', 'run.json'}
BASE,TARGET = 'base_U-Net_test_resnet', 'target_U-Net_test_resnet'

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
    assert tree(out).keys()==OUTPUTS | {f'{d}/u{i}.png' for d in ('annotations', 'confidence') for i in range(5)}
    for role in ('base', 'target'): assert all(isinstance(v, torch.Tensor) for v in weights(out, role).values())
    assert res.out==out and len(res.annotations)==5 and res.report.split=='test' and str(res.report) in repr(res)

def test_a_second_round_compares_with_the_first(done, tmp_path):
    path,_,out,res = done
    more = shutil.copytree(path, tmp_path/'more')
    add_label(more, more/'unlabeled_images/u0.png', out/'annotations/u0.png')
    go(more, tmp_path/'second')
    assert 'out from 4 labelled and 5 unlabelled, second from 5 labelled and 4 unlabelled images' in str(compare_runs(out, tmp_path/'second'))
    other = shutil.copytree(path, tmp_path/'other')
    shutil.copy(other/'Images/test/test0.png', other/'Images/test/test1.png')
    shutil.copy(other/'Labels/test/test0.png', other/'Labels/test/test1.png')
    go(other, tmp_path/'third')
    with pytest.raises(ValueError, match='differ in the data'): compare_runs(out, tmp_path/'third')

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
    assert {'scores', 'against', 'difference', 'verdict', 'per_image'}<=rep.keys() and len(rep['difference']['dice'])==3 and rep['against']=='teacher'
    assert list(rep['per_image'])==['teacher', 'vote', 'target']
    assert 'test set' in (out/'report.html').read_text() and 'There is no test set' not in (out/'report.html').read_text()

def test_run_says_how_it_was_made(done):
    run = json.loads((done[2]/'run.json').read_text())
    assert run['args']['bases']==[list(NET)] and run['args']['views']==['H Flip'] and run['args']['seed']==42 and run['args']['size']==[32, 32]
    assert run['versions']['torch']==torch.__version__.split('+')[0] or run['versions']['torch']==torch.__version__
    assert set(run['stages'])=={'start', BASE, 'views', 'annotations', TARGET, 'vote/annotations'} and len(run['data'])>=16
    assert run['args']['recipe'].startswith('Seen(), Mix(share=0.5), ') and run['stages'][BASE]['steps']==run['stages'][TARGET]['steps']==2

def test_views_are_tried_on_the_validation_images(done):
    path,_,out,res = done
    dice,pairs = json.loads((out/'run.json').read_text())['stages']['views']['dice'], split_files(path, 'valid')
    teacher = [load_model(out/f'{BASE}.pth')]
    assert dice=={k: pytest.approx(validation_dice(teacher, pairs, views=v)[0]) for k,v in {'image': [], 'H Flip': ['H Flip']}.items()}
    assert res.report.settings['views_on_validation']==dice and 'views_on_validation' in (out/'report.html').read_text()

def test_a_view_that_harms_is_named(monkeypatch, tmp_path, discs, capsys):
    monkeypatch.setattr(D, 'validation_dice', lambda teachers, pairs, bs, views: [{(): 0.7, ('H Flip',): 0.695, ('V Flip',): 0.6}[views]]*len(teachers))
    run = R.Run(tmp_path/'out', {}, '')
    for _ in range(2): D._try_views(run, ['a', 'b'], ['H Flip', 'V Flip'], discs, 2)
    said = capsys.readouterr().out
    assert said.count('V Flip: with this view the teachers score 0.600 on the validation images, 0.700 without')==1 and 'H Flip' not in said

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
    assert counted==[8] and not (tmp_path/'out/annotations.csv').exists()
    res = go(done[0], tmp_path/'out')
    assert len(counted)==2 and len(res.annotations)==5 and tree(tmp_path/'out').keys()==tree(done[2]).keys()

def test_finished_run_is_not_trained_again(done, counted):
    path,_,out,res = done
    before = {k: v for k,v in tree(out).items() if k in MODELS}
    again = go(path, out)
    assert not counted and again.report.target==res.report.target and {k: v for k,v in tree(out).items() if k in MODELS}==before

@pytest.mark.parametrize('changed', [
    dict(epochs=2), dict(seed=1), dict(bs=2), dict(size=(48, 32)), dict(views=['V Flip']), dict(lr=2e-3), dict(freeze_epochs=1),
    dict(recipe='naive'), dict(recipe=[MixedBatches(0.4)])])
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
    assert len(counted)==3 and tree(out).keys()==OUTPUTS | {f'{d}/u{i}.png' for d in ('annotations', 'confidence') for i in range(5)} | {'notes.txt'}

# --- refused before anything is trained or written

def resnet_file(folder):
    torch.save(timm.create_model('test_resnet').state_dict(), folder/'w.pth')
    return str(folder/'w.pth')

@pytest.mark.parametrize('bad,message', [
    (dict(base=('Nix', None)), "Unknown network 'Nix'"), (dict(target=('U-Net', 'resnet5O')), "Did you mean 'resnet50'"), (dict(base=('U-Net',)), 'expected .architecture, backbone'),
    (dict(base=3), 'expected .architecture, backbone'), (dict(target=('U-Net', 'vit_tiny_patch16_224')), 'vit_tiny_patch16_224'), (dict(views=[]), 'views: none'),
    (dict(views=['Rotate']), "Unknown view 'Rotate'"), (dict(views=['Gamma', 'gamma']), 'more than once'), (dict(size=32), 'size is 32'), (dict(size=(8, 8)), 'size is'),
    (dict(target=('PAN', 'test_resnet')), 'PAN needs at least 128'), (dict(views=['Scale 0.75']), '24 pixels in the view Scale 0.75; U-Net needs at least 32'), (dict(bs=0), 'bs is 0'), (dict(bs=2.0), 'bs is 2.0'), (dict(bs=True), 'bs is True'),
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

@pytest.mark.parametrize('recipe', ['naive', 'default', [MixedBatches(0.75), TopReliable()]])
def test_both_trainings_take_the_same_steps_on_different_images(monkeypatch, trained_discs, tmp_path, recipe):
    seen = []
    def fit(learn, cbs=(), **kw):
        more = {f.name for p in cbs if isinstance(p, MixedBatches) for f,_ in p.loader.items}
        seen.append((len(learn.dls.train), {f.name for f in learn.dls.train_ds.items} | more))
        learn.history = [dict(stage='all', train_loss=1., valid_loss=1., dice=0.5, jaccard=0.4)]
    monkeypatch.setattr(D, 'fit', fit)
    res = go(trained_discs, tmp_path/'out', recipe=recipe)
    train,labelled = {f'train{i}.png' for i in range(4)}, {f'u{i}.png' for i in range(5)}
    if isinstance(recipe, list): labelled = {Path(r['image']).name for r in res.annotations.ranked()[-4:]}
    assert [o[1] for o in seen]==[train, train | labelled] and seen[0][0]==seen[1][0]==(4 if isinstance(recipe, list) else 2)

def test_another_target(trained_discs, tmp_path):
    res = data_distillation(NET, ('MANet', 'test_resnet'), ['Gamma', 'V Flip'], trained_discs, tmp_path/'out', **OPTIONS)
    assert {'base_U-Net_test_resnet.pth', 'target_MANet_test_resnet.pth'}<=tree(tmp_path/'out').keys() and res.learner.model.config['name']=='MANet'

def test_simple_training_without_test_set(tmp_path, counted):
    path = make_discs(tmp_path/'d', test=0, unlabeled=0)
    before = tree(path)
    res = simple_training(NET, path, tmp_path/'out', **OPTIONS)
    assert tree(tmp_path/'out').keys()=={'target_U-Net_test_resnet.pth', 'target_U-Net_test_resnet.json', 'report.json', 'report.html', 'run.json'}
    assert counted==[4] and tree(path)==before and res.annotations is None and list(res.report.scores)==['target']
    page,rep = (tmp_path/'out/report.html').read_text(), scores(tmp_path/'out')
    for text in (page, rep['verdict'], str(res)): assert 'There is no test set: the validation set chose the model' in text
    assert rep['split']=='valid' and rep['images']==2 and rep['difference'] is None

def test_simple_training_on_the_test_set(trained_discs, tmp_path):
    res = simple_training(NET, trained_discs, tmp_path/'out', **OPTIONS)
    assert res.report.split=='test' and 'There is no test set' not in (tmp_path/'out/report.html').read_text() and not (tmp_path/'out/annotations.csv').exists()

# --- several teachers

@pytest.fixture(scope='module')
def several(tmp_path_factory):
    "Three teachers, two of them the same network, two views"
    root = tmp_path_factory.mktemp('several')
    res = model_data_distillation([NET, ('CGNet', None), NET], ('CGNet', None), ['H Flip', 'Gamma'], make_discs(root/'discs'), root/'out', **OPTIONS)
    return root/'discs', root/'out', res

def test_each_teacher_has_its_file(several):
    path,out,res = several
    assert {f.name for f in out.glob('*.pth')}=={'base_U-Net_test_resnet.pth', 'base_U-Net_test_resnet_2.pth', 'base_CGNet.pth', 'target_CGNet.pth'}
    first,second = (torch.load(out/f'{BASE}{k}.pth', weights_only=True) for k in ('', '_2'))
    assert first.keys()==second.keys() and not same(first, second)

def test_all_teachers_vote_on_all_views(several, tmp_path):
    path,out,res = several
    ann = N.annotate([out/f'{f}.pth' for f in (BASE, 'base_CGNet', BASE+'_2')], D.unlabeled_files(path), tmp_path/'mine', ['H Flip', 'Gamma'], SIZE, 4)
    for f in (tmp_path/'mine/annotations').glob('*.png'): assert f.read_bytes()==(out/'annotations'/f.name).read_bytes()
    assert [r['agreement'] for r in ann.rows]==pytest.approx([r['agreement'] for r in res.annotations.rows], abs=1e-4)

def test_report_of_several(several):
    path,out,res = several
    rep = scores(out)
    assert list(rep['per_image'])==['teacher 1', 'teacher 2', 'teacher 3', 'vote', 'target'] and rep['against']=='teacher 2'  # the target's own network
    models = [load_model(out/f'{f}.pth') for f in (BASE, 'base_CGNet', BASE+'_2')]
    for name,m in zip(rep['per_image'], models):
        assert [o['dice'] for o in rep['per_image'][name]]==pytest.approx([o['dice'] for o in D.score_images(m, D.split_files(path, 'test'))], abs=1e-4)
    steps = {k: o['steps'] for k,o in json.loads((out/'report.json').read_text())['settings']['training'].items() if 'steps' in o}
    assert len(steps)==4 and len(set(steps.values()))==1

def test_model_distillation_looks_at_the_image_alone(monkeypatch, trained_discs, tmp_path):
    calls,real = [], D.annotate
    def annotate(voters, files, out, views=(), *a, **kw):
        calls.append((len(voters), list(views), kw['together']))
        return real(voters, files, out, views, *a, **kw)
    monkeypatch.setattr(D, 'annotate', annotate)
    model_distillation([NET, NET], NET, trained_discs, tmp_path/'out', **OPTIONS)
    assert calls==[(2, [], False)]*2

def test_without_a_twin_the_best_teacher_is_to_beat(monkeypatch, trained_discs, tmp_path):
    dices = iter([0.3, 0.6, 0.5])
    def fit(learn, **kw): learn.history = [dict(stage='all', train_loss=1., valid_loss=1., dice=next(dices), jaccard=0.4)]
    monkeypatch.setattr(D, 'fit', fit)
    assert model_distillation([NET, ('CGNet', None)], ('FPENet', None), trained_discs, tmp_path/'out', **OPTIONS).report.against=='teacher 2'

def test_one_network_in_memory_at_a_time(monkeypatch, trained_discs, tmp_path):
    alive,most,real = weakref.WeakSet(), [], D.fit
    build = D.seg_learner
    def seg_learner(*a, **kw):
        learn = build(*a, **kw)
        most.append(len(alive))
        alive.add(learn.model)
        return learn
    monkeypatch.setattr(D, 'seg_learner', seg_learner)
    gc.disable()  # what is let go by luck does not count
    try: model_distillation([NET, NET, NET], NET, trained_discs, tmp_path/'out', **OPTIONS)
    finally: gc.enable()
    assert most==[0]*5  # three teachers, the target, the target read back

# --- recipes in a run

@pytest.fixture
def augmented(monkeypatch):
    "The views that the training images of each network are shown in: of labelled images, and of pseudo-labelled ones"
    labelled,pseudo = [], []
    def watch(name, calls, at):
        real = getattr(D, name)
        def call(*a): return [v.name for v in a[at].args[0]] if hasattr(a[at], 'args') else 'standard'
        def wrapped(*a, **kw):
            calls.append(call(*a))
            return real(*a, **kw)
        monkeypatch.setattr(D, name, wrapped)
    watch('seg_dls', labelled, 3)
    watch('pseudo_loader', pseudo, 3)
    return labelled, pseudo

def test_teacher_and_target_are_shown_the_views_that_vote(augmented, trained_discs, tmp_path):
    go(trained_discs, tmp_path/'out', views=['V Flip', 'Gamma', 'Scale 0.75'], size=(48, 48))
    assert augmented[0][:2]==[['V Flip']]*2 and augmented[1]==[['V Flip']]

@pytest.mark.parametrize('recipe', ['naive', [MixedBatches(), HardLabels()]])
def test_without_seen_nothing_is_shown_in_views(augmented, trained_discs, tmp_path, recipe):
    go(trained_discs, tmp_path/'out', views=['V Flip'], recipe=recipe)
    assert augmented[0][:2]==['standard']*2 and augmented[1]==['standard'][:recipe!='naive']

def test_labels_alone_can_be_shown_in_views(augmented, trained_discs, tmp_path):
    res = simple_training(NET, trained_discs, tmp_path/'out', views=['V Flip', 'Gamma'], **OPTIONS)
    run = json.loads((tmp_path/'out/run.json').read_text())
    assert augmented[0][0]==['V Flip'] and not augmented[1] and run['args']['views']==['V Flip', 'Gamma'] and 'views' not in run['stages'] and list(res.report.scores)==['target']
    with pytest.raises(ValueError, match='other views'): simple_training(NET, trained_discs, tmp_path/'out', **OPTIONS)

def test_labels_alone_are_shown_no_view_unasked(augmented, trained_discs, tmp_path):
    simple_training(NET, trained_discs, tmp_path/'out', **OPTIONS)
    assert augmented[0][0]=='standard' and not augmented[1]

def test_teachers_that_vote_on_the_image_alone_are_shown_all_turns(augmented, trained_discs, tmp_path):
    model_distillation([NET, NET], NET, trained_discs, tmp_path/'out', **OPTIONS)
    turns = ['H Flip', 'V Flip', 'H+V Flip', 'Rotate 90', 'Rotate 270']
    assert augmented[0][:3]==[turns]*3 and augmented[1]==[turns]

def test_naive_takes_masks_as_labels(trained_discs, tmp_path, counted):
    go(trained_discs, tmp_path/'out', recipe='naive')
    assert counted==[8, 9] and json.loads((tmp_path/'out/run.json').read_text())['args']['recipe']=='naive'

def test_probabilities_are_gone_at_the_end(done): assert not list(done[2].rglob('*.npy'))

def test_second_round(trained_discs, tmp_path, counted):
    out = tmp_path/'out'
    res = go(trained_discs, out, recipe=[MixedBatches(), HardLabels(), Again()])
    first = out/'round1'
    assert len(counted)==3 and (first/f'{TARGET}.pth').is_file() and len(list((first/'annotations').glob('*.png')))==5
    ann = N.annotate(first/f'{TARGET}.pth', D.unlabeled_files(trained_discs), tmp_path/'mine', ['H Flip'], SIZE, 4)
    for f in (tmp_path/'mine/annotations').glob('*.png'): assert f.read_bytes()==(out/'annotations'/f.name).read_bytes()
    assert ann.rows[0]['confidence']==res.annotations.rows[0]['confidence'] and not list(out.rglob('*.npy'))
    assert list(res.report.scores)==['teacher', 'vote', 'target'] and len(set(json.loads((out/'run.json').read_text())['stages']) & {f'round1/{TARGET}', 'round1/annotations'})==2

@pytest.mark.parametrize('recipe,message', [('nave', "Did you mean 'naive'"), ([HardLabels()], 'needs Mix'), ([MixedBatches(), MixedBatches()], 'twice'), (7, 'recipe is 7')])
def test_bad_recipe_in_a_run(trained_discs, tmp_path, counted, recipe, message):
    with pytest.raises(ValueError, match=message): go(trained_discs, tmp_path/'out', recipe=recipe)
    assert not counted and not (tmp_path/'out').exists()

@pytest.mark.parametrize('bases', [[], [NET], NET, None, [('U-Net',), NET], [NET, ('Nix', None)]])
@pytest.mark.parametrize('views', [None, ['H Flip']])
def test_bad_teachers(trained_discs, tmp_path, counted, bases, views):
    with pytest.raises(ValueError, match='expected|at least two|Unknown network'):
        if views: model_data_distillation(bases, NET, views, trained_discs, tmp_path/'out', **OPTIONS)
        else: model_distillation(bases, NET, trained_discs, tmp_path/'out', **OPTIONS)
    assert not counted and not (tmp_path/'out').exists()

def test_several_teachers_need_views_for_both(trained_discs, tmp_path, counted):
    with pytest.raises(ValueError, match='views: none given'): model_data_distillation([NET, NET], NET, [], trained_discs, tmp_path/'out', **OPTIONS)
    assert not counted and not (tmp_path/'out').exists()

# --- killed

PROGRAM = """import sys, time
import semisup_seg.annotation.annotate as N
from semisup_seg.distillation.distill import model_data_distillation
real = N.load_image
def slow(f):
    time.sleep(0.05)
    return real(f)
N.load_image = slow
net = 'U-Net', 'test_resnet'
model_data_distillation([net, net], net, ['H Flip'], sys.argv[1], sys.argv[2], size=(32, 32), bs=4, epochs=4, freeze_epochs=0, lr=1e-3, pretrained=False)
print('finished')"""

def start(path, out):
    env = {**os.environ, 'PYTHONPATH': str(Path(D.__file__).parent.parent), 'OMP_NUM_THREADS': '1'}
    return subprocess.Popen([sys.executable, '-W', 'ignore', '-c', PROGRAM, path, out], stdout=subprocess.PIPE, text=True, env=env)

def stages(out): return json.loads((out/'run.json').read_text())['stages'] if (out/'run.json').exists() else {}
def epochs_in(file): return torch.load(file, weights_only=True)['done'] if file.exists() else 0

def test_killed_at_every_stage(tmp_path):
    path = make_discs(tmp_path/'discs', unlabeled=12)
    whole,out = tmp_path/'whole', tmp_path/'out'
    assert 'finished' in start(path, whole).communicate(timeout=120)[0]
    moments = dict(teacher=lambda: epochs_in(out/f'{BASE}_2.checkpoint')>=2, annotation=lambda: (out/'annotations/.journal').exists() and len((out/'annotations/.journal').read_text().splitlines())>3,
        student=lambda: epochs_in(out/f'{TARGET}.checkpoint')>=2)
    for name,reached in moments.items():
        p,before = start(path, out), time.time()
        while not reached():
            assert p.poll() is None and time.time()-before<120, f'{name}: the run ended before it could be killed'
            time.sleep(0.005)
        p.send_signal(signal.SIGKILL)
        p.wait()
        assert not (out/'report.json').exists()
    said = start(path, out).communicate(timeout=120)[0]
    assert 'finished' in said and 'already trained' in said and 'going on after' in said
    for f in (BASE, BASE+'_2', TARGET): assert same(*(torch.load(o/f'{f}.pth', weights_only=True) for o in (whole, out)))
    a,b = tree(whole), tree(out)
    assert a.keys()==b.keys() and {k for k in a if a[k]!=b[k]}<={'run.json', 'report.json', 'report.html', 'annotations/.journal', 'vote/annotations/.journal', *(f'{f}.pth' for f in (BASE, BASE+'_2', TARGET))}
    assert scores(whole)==scores(out)
    def history(o): return {k: v['history'] for k,v in stages(o).items() if 'history' in v}
    assert history(whole)==history(out) and all(len(h)==4 for h in history(out).values())

# --- the names

@pytest.mark.parametrize('routine', [data_distillation, model_distillation, model_data_distillation, simple_training])
def test_routines_list_every_option(routine):
    ours = signature(routine).parameters
    options = {k: p for k,p in signature(distill).parameters.items() if p.default is not p.empty and (k!='recipe' or routine is not simple_training)}
    assert len(options)>=8 and {k: ours[k].default for k in options}=={k: p.default for k,p in options.items()}
    assert not [p for p in ours.values() if p.kind is p.VAR_KEYWORD]
