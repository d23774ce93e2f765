"The command line: which call each command makes, a run from end to end, and one clear line for each mistake"
import json, shutil
from inspect import signature
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace

import numpy as np, pytest
from conftest import NET, make_discs, make_model, python, save, tree
from PIL import Image

import semisup_seg.annotation.annotate as A, semisup_seg.distillation.distill as D, semisup_seg.distillation.methods as M
from semisup_seg.app.cli import commands, main
from semisup_seg.data.images import load_image
from semisup_seg.training.inference import save_model

TINY = ['--size', '32', '32', '--bs', '4', '--epochs', '1', '--freeze-epochs', '0', '--lr', '1e-3', '--scratch']
RUN = 'from semisup_seg.app.cli import main; raise SystemExit(main())'
DEFAULT = dict(bs=8, steps=None, epochs=None, freeze_epochs=0, lr=2e-3, flips=True, seed=42, size=None, pretrained=True, resume=True)
LITE = 'U-Net', 'tf_efficientnet_lite0'
COMMANDS = 'demo', 'check', 'train', 'distill', 'online', 'predict', 'annotate', 'compare', 'networks'

@pytest.fixture
def run(capsys):
    "Call the command in this process: exit status, what it printed, its complaint"
    def _run(*argv):
        try: code = main([str(a) for a in argv])
        except SystemExit as e: code = e.code
        return code, *capsys.readouterr()
    return _run

@pytest.fixture
def spy(monkeypatch):
    "Replace a function of a module: the arguments of its calls, by name, are listed, and it returns `result`"
    def _replace(module, name, result=None):
        calls,takes = [], signature(getattr(module, name))
        def _note(*args, **kw):
            calls.append(takes.bind(*args, **kw).arguments)
            return SimpleNamespace(report='the report', out=Path('out')) if result is None else result
        monkeypatch.setattr(module, name, _note)
        return calls
    return _replace

@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "A folder with a data set `d`, a model `m.pth`, and things to trip over"
    root = tmp_path_factory.mktemp('cli')
    make_discs(root/'d')
    save_model(make_model(), root/'m.pth')
    save_model(make_model('rest,0\nblob,255'), root/'other.pth')
    save_model(make_model(), root/'alone.pth').with_suffix('.json').unlink()
    (root/'bad.pth').write_bytes(b'no')
    (root/'bad.json').write_text('{}')
    (root/'file').write_text('mine')
    (root/'full').mkdir()
    (root/'full/x').write_text('mine')
    (root/'empty').mkdir()
    save(root/'taken/data/a.png', np.zeros((20, 20), np.uint8))
    (make_discs(root/'broken')/'Images/train/train0.png').write_bytes(b'no')
    save(root/'twice/a.png', np.zeros((20, 20), np.uint8))
    save(root/'twice/a.bmp', np.zeros((20, 20), np.uint8))
    return root

# --- the calls

def named(call):
    "The arguments of a call, those of `**kwargs` among them"
    call = dict(call)
    return call | call.pop('kwargs', {})

def test_check_prints_the_summary(run, place):
    code,out,err = run('check', place/'d')
    assert (code, err)==(0, '') and 'train      4' in out and 'unlabeled  5' in out

def test_networks_prints_the_table(run, monkeypatch):
    monkeypatch.setattr('semisup_seg.models.cost.network_table', lambda: 'the table')
    monkeypatch.setattr('semisup_seg.models.cost.more_networks', lambda: ['A', 'B'])
    assert run('networks')==(0, 'the table\n\nAlso by name: A, B\n', '')

def test_train_calls_simple_training(run, spy):
    calls = spy(D, 'simple_training')
    code,out,_ = run('train', 'data', 'out', '--network', *NET, '--steps', '70', '--no-flips', '--lr', '0')
    assert named(calls[0])==dict(DEFAULT, target=NET, path='data', out='out', steps=70, flips=False, lr=None)
    assert code==0 and 'the report' in out and str(Path('out/report.html')) in out

def test_distill_calls_the_routine_with_all_options(run, spy):
    calls = spy(D, 'data_distillation')
    run('distill', 'data', 'out')
    assert named(calls[0])==dict(DEFAULT, base=LITE, target=LITE, views=['H Flip', 'Gamma'], path='data', out='out', recipe='default')
    options = '--size 64 96 --bs 3 --epochs 4 --freeze-epochs 1 --lr 0.1 --seed 5 --weights w.pth --fresh --recipe naive'
    run('distill', 'a', 'b', '--base', 'PAN', 'x', '--target', 'unet', '--views', 'H Flip, gamma', 'V Flip', *options.split())
    assert named(calls[1])==dict(base=('PAN', 'x'), target=('unet', None), views=['H Flip', 'gamma', 'V Flip'], path='a', out='b',
        bs=3, steps=None, epochs=4, freeze_epochs=1, lr=0.1, flips=True, seed=5, size=(64, 96), pretrained='w.pth', resume=False, recipe='naive')
    run('distill', 'a', 'b', '--scratch')
    assert named(calls[2])['pretrained'] is False

def test_distill_with_several_teachers_and_no_views(run, spy):
    calls = spy(D, 'distill')
    run(*'distill a b --base PAN x --base CGNet --views'.split())
    assert named(calls[0])==dict(DEFAULT, bases=[('PAN', 'x'), ('CGNet', None)], target=LITE, views=[], path='a', out='b', recipe='default')

def test_online_calls_online_training(run, spy):
    calls = spy(M, 'online_training')
    code,out,_ = run('online', 'data', 'out')
    assert code==0 and 'the report' in out
    run('online', 'data', 'out', '--method', 'FixMatch', '--network', 'CGNet', '--seed', 3)
    where = dict(path='data', out='out')
    assert named(calls[0])==dict(DEFAULT, method='Mean Teacher', target=LITE, **where)
    assert named(calls[1])==dict(DEFAULT, method='FixMatch', target=('CGNet', None), **where, seed=3)
    run('online', 'data', 'out', '--start', 'm.pth')
    assert named(calls[2])['options']==dict(start='m.pth')

def test_predict_calls_write_masks(run, spy):
    calls = spy(A, 'write_masks', ['a mask', 'another'])
    assert run('predict', 'm.pth', 'folder', '--out', 'masks')==(0, '2 masks in masks\n', '')
    run('predict', 'm.pth', 'a.png', 'b.png', '--out', 'masks', '--bs', 2, '--window', 64)
    one = dict(model='m.pth', out='masks')
    assert calls==[dict(one, files='folder', bs=8, window=None), dict(one, files=['a.png', 'b.png'], bs=2, window=64)]

def test_annotate_passes_all_options_on(run, spy, place):
    calls = spy(A, 'annotate', 'the annotations')
    weighed = spy(A, 'validation_dice', [0.7, 0.8])
    plain = dict(teachers=['m.pth'], files='folder', out='out', size=None, bs=8, vote='mean', weights=None, valid=[],
        together=True, window=None, confidence=False, soft=False)
    assert run('annotate', 'm.pth', '--images', 'folder', '--out', 'out')==(0, 'the annotations\n', '')
    run('annotate', 'm.pth', '--images', 'folder', '--out', 'out', '--views')
    assert calls==[dict(plain, views=['H Flip', 'Gamma']), dict(plain, views=[])]
    run('annotate', 'm.pth', 'n.pth', '--images', 'a.png', 'b.png', '--out', 'out', '--views', 'H Flip', 'Rotate 90, Scale 1.25', '--size', 48, 64,
        '--bs', 2, '--vote', 'geometric', '--valid', place/'d', '--weigh', '--in-turn', '--window', 50, '--confidence', '--soft')
    valid = calls[2]['valid']
    assert [i.name for i,_ in valid]==['valid0.png', 'valid1.png'] and weighed==[dict(teachers=['m.pth', 'n.pth'], pairs=valid, bs=2)]
    assert calls[2]==dict(teachers=['m.pth', 'n.pth'], files=['a.png', 'b.png'], out='out', views=['H Flip', 'Rotate 90', 'Scale 1.25'], size=(48, 64),
        bs=2, vote='geometric', weights=[0.7, 0.8], valid=valid, together=False, window=50, confidence=True, soft=True)

def test_compare_calls_compare_runs(run, monkeypatch):
    monkeypatch.setattr('semisup_seg.evaluation.compare.compare_runs', lambda *outs: f'compared {outs}')
    assert run('compare', 'one', 'two')==(0, "compared ('one', 'two')\n", '')

def test_demo_distils_from_two_labelled_slices(run, spy, tmp_path, monkeypatch):
    calls = spy(D, 'data_distillation')
    few = dict(train=[40, 90], valid=[104, 105], test=[60, 64, 70], unlabeled=[10, 20, 30, 120])
    monkeypatch.setattr('semisup_seg.data.sources._brain_split', lambda n: few if n==2 else {})
    code,out,_ = run('demo', '--out', tmp_path/'demo')
    call = named(calls[0])
    assert code==0 and 'the report' in out and (call['base'], call['target'], call['out'])==(LITE, LITE, tmp_path/'demo/results')
    assert len(list((call['path']/'Images/train').iterdir()))==2 and len(list((call['path']/'unlabeled_images').iterdir()))==4

# --- from end to end

def test_distill_predict_annotate(run, place, tmp_path):
    before = tree(place/'d')
    code,out,_ = run('distill', place/'d', tmp_path/'out', '--base', *NET, '--target', *NET, '--views', 'H Flip, gamma', *TINY)
    assert code==0 and 'Gain over teacher in mean Dice' in out and str(tmp_path/'out/report.html') in out
    assert json.loads((tmp_path/'out/run.json').read_text())['args']['views']==['H Flip', 'Gamma']
    target,base = (tmp_path/f'out/{o}_U-Net_test_resnet.pth' for o in ('target', 'base'))
    images = sorted((place/'d/Images/test').iterdir())
    for i,args in enumerate(([place/'d/Images/test'], images[:1])):
        code,out,_ = run('predict', target, *args, '--out', tmp_path/f'masks{i}')
        assert code==0 and f'{1 if i else len(images)} masks in' in out
        for f in (tmp_path/f'masks{i}').iterdir(): assert np.array(Image.open(f)).shape==load_image(place/'d/Images/test'/f.name).shape[:2]
    code,out,_ = run('annotate', base, target, '--images', place/'d/unlabeled_images', '--out', tmp_path/'ann', '--views', 'V Flip')
    assert code==0 and '5 annotations' in out and (tmp_path/'ann/annotations.csv').is_file()
    assert tree(place/'d')==before

# --- mistakes

MISTAKES = {
    'no command': ([], 'COMMAND'), 'unknown command': (['distil'], 'distil'), 'check without data': (['check'], 'data'),
    'check nowhere': (['check', 'nowhere'], 'nowhere: no such folder'), 'check a file': (['check', 'file'], 'file'), 'train without out': (['train', 'd'], 'out'),
    'train nowhere': (['train', 'nowhere', 'out'], 'nowhere'), 'network': (['train', 'd', 'out', '--network', 'U-Nett'], "Did you mean 'U-Net'"),
    'backbone': (['train', 'd', 'out', '--network', 'U-Net', 'resnet5O'], "Did you mean 'resnet50'"), 'three words': (['train', 'd', 'out', '--network', 'a', 'b', 'c'], 'network and its backbone'),
    'unsuited backbone': (['train', 'd', 'out', '--network', 'DeepLabV3+', 'edgenext_xx_small', '--scratch'], 'edgenext_xx_small'),
    'view': (['distill', 'd', 'out', '--views', 'H Flop'], "Did you mean 'H Flip'"), 'size': (['train', 'd', 'out', '--size', '8', '8'], 'size is (8, 8)'),
    'one size': (['train', 'd', 'out', '--size', '64'], '--size'), 'size in words': (['train', 'd', 'out', '--size', 'big', 'small'], "invalid int value: 'big'"),
    'small for PAN': (['train', 'd', 'out', '--network', 'PAN', '--size', '64', '64', '--scratch'], 'PAN needs at least 128'),
    'bs': (['train', 'd', 'out', '--bs', '0'], 'bs is 0'), 'epochs': (['train', 'd', 'out', '--epochs', '0'], 'epochs is 0'), 'lr': (['train', 'd', 'out', '--lr', '-1', '--scratch'], 'lr is -1'),
    'seed': (['train', 'd', 'out', '--seed', '-1'], 'seed is -1'), 'weights': (['train', 'd', 'out', '--weights', 'nowhere.pth'], 'nowhere.pth'),
    'weights that are none': (['train', 'd', 'out', '--weights', 'bad.pth'], 'bad.pth'), 'weights of another': (['train', 'd', 'out', '--weights', 'm.pth'], 'do not fit'),
    'out is a file': (['train', 'd', 'file', '--scratch'], 'file is a file, not a folder'), 'out below a file': (['train', 'd', 'file/x', '--network', *NET, '--scratch'], 'file'),
    'out in the data': (['train', 'd', 'd/out', '--scratch'], 'must not contain each other'), 'out holds something': (['train', 'd', 'full', '--network', *NET, '--scratch'], 'no run has written'),
    'model missing': (['predict', 'nowhere.pth', 'd/Images/test', '--out', 'out'], 'nowhere.pth: no such file'), 'json missing': (['predict', 'alone.pth', 'd/Images/test', '--out', 'out'], 'alone.json: no such file'),
    'no model': (['predict', 'bad.pth', 'd/Images/test', '--out', 'out'], 'bad.pth: is not a model'), 'no out': (['predict', 'm.pth', 'd/Images/test'], '--out'),
    'image missing': (['predict', 'm.pth', 'nowhere.png', '--out', 'out'], 'nowhere.png'), 'images missing': (['predict', 'm.pth', 'nowhere', '--out', 'out'], 'nowhere: no such file'),
    'no images': (['predict', 'm.pth', 'empty', '--out', 'out'], 'no images'), 'not an image': (['predict', 'm.pth', 'bad.json', '--out', 'out'], 'bad.json: cannot be read'),
    'masks onto images': (['predict', 'm.pth', 'd/Images/test', '--out', 'd/Images/test'], 'images themselves'), 'masks onto a file': (['predict', 'm.pth', 'd/Images/test', '--out', 'file'], 'is a file'),
    'annotate vote': (['annotate', 'm.pth', '--images', 'd/unlabeled_images', '--out', 'out', '--vote', 'median'], "Unknown vote 'median'"),
    'weigh without valid': (['annotate', 'm.pth', '--images', 'd/unlabeled_images', '--out', 'out', '--weigh'], '--weigh needs --valid'), 'no validation images': (['annotate', 'm.pth', '--images', 'd/unlabeled_images', '--out', 'out', '--valid', 'empty'], 'empty: has no Images/valid'),
    'small window': (['predict', 'm.pth', 'd/Images/test', '--out', 'out', '--window', '8'], 'window is 8'), 'annotate size': (['annotate', 'm.pth', '--images', 'd/unlabeled_images', '--out', 'out', '--size', '2', '2'], 'size is (2, 2)'),
    'annotate into nowhere': (['annotate', 'm.pth', '--images', 'd/unlabeled_images', '--out', '/proc/x'], '/proc/x: cannot be written'), 'teachers differ': (['annotate', 'm.pth', 'other.pth', '--images', 'd/unlabeled_images', '--out', 'out'], 'must be the same'),
    'annotate nothing': (['annotate', 'm.pth', '--images', 'empty', '--out', 'out'], 'no images'), 'annotate view': (['annotate', 'm.pth', '--images', 'd/unlabeled_images', '--out', 'out', '--views', 'Rot'], "Unknown view 'Rot'"),
    'annotate onto a file': (['annotate', 'm.pth', '--images', 'd/unlabeled_images', '--out', 'file'], 'is a file'), 'compare nothing': (['compare'], 'OUT'), 'compare one': (['compare', 'full'], 'at least two runs'), 'compare no runs': (['compare', 'full', 'empty'], 'full/report.json: no such file'),
    'compare with itself': (['compare', 'full', 'full'], 'two runs, each once'), 'demo onto a file': (['demo', '--out', 'file'], 'file'), 'demo onto something': (['demo', '--out', 'taken'], 'holds something else')}

@pytest.mark.parametrize('argv,message', MISTAKES.values(), ids=MISTAKES)
def test_mistake_gets_one_clear_line(monkeypatch, run, place, argv, message):
    monkeypatch.chdir(place)
    for o in ('out', 'file/x', 'd/out'): shutil.rmtree(place/o, ignore_errors=True)  # what another case should not have left
    before = tree(place)
    code,out,err = run(*argv)
    assert code==2 and message in err and err.startswith('semisup-seg') and 'Traceback' not in err+out
    assert len(err.strip().splitlines())==1 and len(err)<2000 and tree(place)==before and not (place/'out').exists()

def test_faults_of_a_data_set_are_listed(run, place):
    for argv in (['check', place/'broken'], ['train', place/'broken', place/'out', '--network', *NET, '--scratch']):
        code,_,err = run(*argv)
        assert code==2 and 'Images/train/train0.png: cannot be read' in err and 'Traceback' not in err

def test_data_distillation_needs_a_view(run, place, tmp_path):
    code,_,err = run('distill', place/'d', tmp_path/'out', '--base', *NET, '--views', *TINY)
    assert code==2 and 'views: none given' in err

def test_an_interruption_is_status_130(monkeypatch, run):
    def stop(*a, **kw): raise KeyboardInterrupt
    monkeypatch.setattr(D, 'simple_training', stop)
    code,_,err = run('train', 'data', 'out')
    assert code==130 and 'stopped' in err

# --- as a process

def test_help_needs_no_torch():
    probe = """
        import sys
        from semisup_seg.app.cli import main
        for argv in (['--help'], ['distill', '--help'], ['online', '--help']):
            try: main(argv)
            except SystemExit as e: assert e.code==0
        print([m for m in ('torch', 'fastai', 'numpy', 'timm') if m in sys.modules])"""
    res = python(dedent(probe))
    assert res.stdout.splitlines()[-1]=='[]' and res.stderr=='' and all(c in res.stdout for c in COMMANDS)

def test_each_command_explains_itself(run):
    assert tuple(commands)==COMMANDS
    for name in COMMANDS:
        code,out,_ = run(name, '--help')
        assert code==0 and f'semisup-seg {name}' in out and commands[name][0].__doc__.split()[0] in out, name

def test_process_exit_status(place):
    res = python(RUN, 'check', place/'nowhere')
    assert (res.returncode, res.stdout, res.stderr)==(2, '', f'semisup-seg: {place/"nowhere"}: no such folder\n')

def test_network_that_cannot_reach_the_hub(monkeypatch, run, place, tmp_path):
    monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')
    monkeypatch.setattr('huggingface_hub.try_to_load_from_cache', lambda *a, **kw: None)
    code,_,err = run('train', place/'d', tmp_path/'out', '--network', *NET)
    assert code==2 and 'Three ways out' in err and '--weights' in err and '--scratch' in err and not (tmp_path/'out').exists()
