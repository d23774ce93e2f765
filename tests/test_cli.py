"The command: what it does on tiny data, and one clear line for each mistake"
import json, shutil

import numpy as np, pytest, torch
from conftest import NET, make_discs, make_model, python, save, tree
from PIL import Image

import semisup_seg.distillation.distill as D
from semisup_seg.app.cli import commands, main
from semisup_seg.evaluation.compare import compare_runs
from semisup_seg.data.images import load_image
from semisup_seg.training.inference import save_model

TINY = ['--size', '32', '32', '--bs', '4', '--epochs', '1', '--freeze-epochs', '0', '--lr', '1e-3', '--scratch']
RUN = 'from semisup_seg.app.cli import main; raise SystemExit(main())'

@pytest.fixture
def run(capsys):
    "Call the command in this process: exit status, what it printed, what it complained"
    def _run(*argv):
        try: code = main([str(a) for a in argv])
        except SystemExit as e: code = e.code
        return code, *capsys.readouterr()
    return _run

@pytest.fixture
def cheap(monkeypatch):
    "Trainings of no epochs"
    def fit(learn, **kw): learn.history = [dict(stage='all', train_loss=1., valid_loss=1., dice=0.5, jaccard=0.4)]
    monkeypatch.setattr(D, 'fit', fit)

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

# --- success

def test_check(run, place):
    code,out,err = run('check', place/'d')
    assert (code, err)==(0, '') and 'train      4' in out and 'unlabeled  5' in out

def test_networks(run):
    from semisup_seg.models.cost import more_networks, network_table
    code,out,err = run('networks')
    assert (code, err)==(0, '') and out.startswith(str(network_table())) and out.rstrip().endswith(', '.join(more_networks()))

def test_train(run, place, tmp_path):
    code,out,err = run('train', place/'d', tmp_path/'out', '--network', *NET, *TINY, '--views', 'V Flip')
    assert json.loads((tmp_path/'out/run.json').read_text())['args']['views']==['V Flip']
    assert code==0 and 'Mean Dice' in out and str(tmp_path/'out/report.html') in out and (tmp_path/'out/target_U-Net_test_resnet.pth').is_file()

def test_distill_predict_annotate(run, place, tmp_path):
    before = tree(place/'d')
    code,out,_ = run('distill', place/'d', tmp_path/'out', '--base', *NET, '--target', *NET, '--views', 'H Flip, gamma', 'V Flip', *TINY)
    assert code==0 and 'Gain over teacher in mean Dice' in out and json.loads((tmp_path/'out/run.json').read_text())['args']['views']==['H Flip', 'Gamma', 'V Flip']
    target,base = (tmp_path/f'out/{o}_U-Net_test_resnet.pth' for o in ('target', 'base'))
    images = sorted((place/'d/Images/test').iterdir())
    for i,args in enumerate(([place/'d/Images/test'], images, images[:1])):
        code,out,_ = run('predict', target, *args, '--out', tmp_path/f'masks{i}')
        assert code==0 and f'{len(images) if i<2 else 1} masks in' in out
        for f in (tmp_path/f'masks{i}').iterdir(): assert np.array(Image.open(f)).shape==load_image(place/'d/Images/test'/f.name).shape[:2]
    for i,args in enumerate(([place/'d/unlabeled_images'], [images[0]])):
        code,out,_ = run('annotate', base, target, '--images', *args, '--out', tmp_path/f'ann{i}', '--views', 'V Flip')
        assert code==0 and f'{5 if not i else 1} annotations' in out and (tmp_path/f'ann{i}/annotations.csv').is_file()
    assert tree(place/'d')==before

def test_compare(run, place, cheap, tmp_path):
    for o,seed in (('one', 1), ('two', 2)): run('train', place/'d', tmp_path/o, '--network', *NET, *TINY, '--seed', seed)
    code,out,err = run('compare', tmp_path/'one', tmp_path/'two')
    assert (code, err)==(0, '') and out==f'{compare_runs(tmp_path/"one", tmp_path/"two")}\n' and 'gain over one' in out and 'two' in out

def test_annotate_has_it_all(run, place, tmp_path):
    (tmp_path/'in').mkdir()
    for f in (place/'d/unlabeled_images').iterdir(): shutil.copy(f, tmp_path/'in')
    (tmp_path/'in/broken.png').write_bytes(b'no')
    code,out,err = run('annotate', place/'m.pth', place/'m.pth', '--images', tmp_path/'in', '--out', tmp_path/'out', '--views', 'H Flip', 'Rotate 90, Scale 1.25', '--size', 48, 64, '--bs', 2,
        '--vote', 'geometric', '--valid', place/'d', '--weigh', '--in-turn', '--window', 50, '--confidence', '--soft')
    assert (code, err)==(0, '') and '6 annotations' in out and 'predicted dice' in out and '1 could not be read: broken.png' in out
    asked = json.loads((tmp_path/'out/annotations/.journal').read_text().splitlines()[0])['asked']
    assert asked['views']==['H Flip', 'Rotate 90', 'Scale 1.25'] and (asked['size'], asked['vote'], asked['window'])==([48, 64], 'geometric', 50) and len(set(asked['weights']))==1 and 0<asked['weights'][0]<1
    assert {k: len(list((tmp_path/'out'/k).glob('u*'))) for k in ('annotations', 'confidence', 'soft')}==dict(annotations=5, confidence=5, soft=5)
    code,out,err = run('annotate', place/'m.pth', '--images', tmp_path/'in', '--out', tmp_path/'plain', '--views')
    assert code==0 and json.loads((tmp_path/'plain/annotations/.journal').read_text().splitlines()[0])['asked']['views']==[]

def test_options_reach_the_routine(monkeypatch, run, place, tmp_path):
    got = {}
    monkeypatch.setattr(D, 'data_distillation', lambda *a, **kw: got.update(args=a, kw=kw) or 1/0)
    with pytest.raises(ZeroDivisionError): main(['distill', 'data', 'out'])
    assert got['args']==(('U-Net', 'tf_efficientnet_lite0'),)*2 + (['H Flip', 'Gamma'], 'data', 'out')
    assert got['kw']==dict(bs=8, epochs=20, freeze_epochs=2, lr=None, seed=42, size=(256, 256), pretrained=True, resume=True, recipe='default')
    with pytest.raises(ZeroDivisionError):
        main('distill a b --base PAN x --target unet --size 64 96 --bs 3 --epochs 4 --freeze-epochs 1 --lr 0.1 --seed 5 --weights w.pth --fresh --recipe naive'.split())
    assert got['args'][:2]==(('PAN', 'x'), ('unet', None))
    assert got['kw']==dict(bs=3, epochs=4, freeze_epochs=1, lr=0.1, seed=5, size=(64, 96), pretrained='w.pth', resume=False, recipe='naive')
    monkeypatch.setattr(D, 'distill', lambda *a, **kw: got.update(args=a, kw=kw) or 1/0)
    with pytest.raises(ZeroDivisionError): main('distill a b --base PAN x --base CGNet --views'.split())
    assert got['args']==([('PAN', 'x'), ('CGNet', None)], ('U-Net', 'tf_efficientnet_lite0'), [], 'a', 'b')

def test_distill_with_several_teachers(run, place, tmp_path):
    code,out,_ = run('distill', place/'d', tmp_path/'out', '--base', *NET, '--base', 'CGNet', '--target', *NET, '--views', '--recipe', 'naive', *TINY)
    assert code==0 and 'teacher 2' in out and 'vote' in out and {'base_U-Net_test_resnet.pth', 'base_CGNet.pth'}<=tree(tmp_path/'out').keys()
    code,_,err = run('distill', place/'d', tmp_path/'other', '--base', *NET, '--views', *TINY)
    assert code==2 and 'views: none given' in err

def test_demo(monkeypatch, run, cheap, tmp_path):
    few = dict(train=[40, 90], valid=[104, 105], test=[60, 64, 70], unlabeled=[10, 20, 30, 120])
    monkeypatch.setattr('semisup_seg.data.sources._brain_split', lambda n: few if n==2 else {})
    code,out,err = run('demo', '--out', tmp_path/'demo')
    assert code==0 and err=='' and 'over 3 images' in out and 'teacher' in out and 'target' in out
    assert str(tmp_path/'demo/results/report.html') in out and (tmp_path/'demo/results/report.html').is_file()
    assert len(list((tmp_path/'demo/data/Images/train').iterdir()))==2 and len(list((tmp_path/'demo/results/annotations').glob('*.png')))==4
    state = torch.load(tmp_path/'demo/results/target_U-Net_tf_efficientnet_lite0.pth', weights_only=True)
    assert next(iter(state.values())).shape[1]==3

def test_going_on_and_afresh(run, cheap, place, tmp_path):
    args = ['train', place/'d', tmp_path/'out', '--network', *NET, *TINY]
    assert run(*args)[0]==0 and 'already trained' in run(*args)[1]
    code,_,err = run(*args, '--seed', 1)
    assert code==2 and 'other seed' in err
    assert run(*args, '--seed', 1, '--fresh')[0]==0

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
def test_mistake_gets_one_clear_line(monkeypatch, run, cheap, place, argv, message):
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

def test_interrupted(monkeypatch, run, place, tmp_path):
    def stop(*a, **kw): raise KeyboardInterrupt
    monkeypatch.setattr(D, 'fit', stop)
    code,_,err = run('train', place/'d', tmp_path/'out', '--network', *NET, *TINY)
    assert code==130 and 'stopped' in err

# --- as a process

def test_help_needs_no_torch():
    probe = 'import sys\nfrom semisup_seg.app.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit as e: print(e.code, [m for m in ("torch", "fastai", "numpy", "timm") if m in sys.modules])'
    for argv in (['--help'], ['distill', '--help']):
        res = python(probe, *argv)
        assert res.stdout.splitlines()[-1]=='0 []' and res.stderr==''
    assert all(c in python(probe, '--help').stdout for c in ('demo', 'check', 'train', 'distill', 'predict', 'annotate', 'compare', 'networks'))

@pytest.mark.parametrize('name', ['demo', 'check', 'train', 'distill', 'predict', 'annotate', 'compare', 'networks'])
def test_each_command_explains_itself(run, name):
    code,out,_ = run(name, '--help')
    assert code==0 and f'semisup-seg {name}' in out and commands[name][0].__doc__.split()[0] in out

def test_process_exit_status(place):
    res = python(RUN, 'check', place/'nowhere')
    assert (res.returncode, res.stdout, res.stderr)==(2, '', f'semisup-seg: {place/"nowhere"}: no such folder\n')

def test_network_that_cannot_reach_the_hub(monkeypatch, run, place, tmp_path):
    monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')
    monkeypatch.setattr('huggingface_hub.try_to_load_from_cache', lambda *a, **kw: None)
    code,_,err = run('train', place/'d', tmp_path/'out', '--network', *NET)
    assert code==2 and 'Three ways out' in err and '--weights' in err and '--scratch' in err and not (tmp_path/'out').exists()
