"Whole runs: their outputs, how often they read and predict, going on after an interruption, and what they refuse before they begin"
import csv, json, shutil
from collections import Counter
from functools import partial
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import golden, numpy as np, pytest, timm, torch
from conftest import NET, OPTIONS, SIZE, Watch, digest, ends_epoch, first_weights, kill_when, make_discs, make_experiment, make_model, same, save, tree, weights
from fastai.callback.core import Callback
from PIL import Image

import semisup_seg.distillation.distill as D, semisup_seg.distillation.experiment as E, semisup_seg.distillation.recipe as R
from semisup_seg.annotation.annotate import annotate, validation_dice
from semisup_seg.annotation.journal import AnnotationJournal
from semisup_seg.annotation.records import read_annotations
from semisup_seg.annotation.review import add_label
from semisup_seg.annotation.views import views
from semisup_seg.core import DatasetError
from semisup_seg.data.folder import check_dataset, split_files, unlabeled_files
from semisup_seg.data.images import load_image, load_mask
from semisup_seg.data.loaders import ImageCache
from semisup_seg.distillation.batches import BatchMixer, HardLabels, MixedBatches
from semisup_seg.distillation.distill import data_distillation, distill, model_data_distillation, model_distillation, simple_training
from semisup_seg.distillation.recipe import EMA, Recipe, TopReliable, get_recipe
from semisup_seg.distillation.run import EventLog, describe_event, read_events
from semisup_seg.evaluation.compare import compare_runs
from semisup_seg.evaluation.scores import score_images
from semisup_seg.training.inference import load_model, predict, save_model

CGNET = 'CGNet', None
BASE,TARGET = 'base_U-Net_test_resnet', 'target_U-Net_test_resnet'
MODELS = {f'{name}.{ext}' for name in (BASE, TARGET) for ext in ('json', 'pth')}
MASKS = {f'{folder}/u{i}.png' for folder in ('annotations', 'confidence') for i in range(5)}
VOTE = {'vote/annotations.csv', 'vote/annotations/.journal', 'vote/annotations/test0.png', 'vote/annotations/test1.png'}
RECORDS = {'annotations.csv', 'calibration.csv', 'annotations/.journal', 'report.json', 'report.html', 'run.json', 'events.jsonl'}
OUTPUTS = MODELS | MASKS | VOTE | RECORDS

def go(path, out, views=('H Flip',), **options): return data_distillation(NET, NET, list(views), path, out, **{**OPTIONS, **options})
def read_json(file): return json.loads(file.read_text(encoding='utf-8'))
def scores(out): return {k: v for k,v in read_json(out/'report.json').items() if k!='settings'}
def stages(out): return read_json(out/'run.json')['stages']

# --- outputs

def test_outputs_are_those_of_the_design(runs):
    run = runs('one')
    assert tree(run.out).keys()==OUTPUTS
    for name in (BASE, TARGET): assert all(isinstance(v, torch.Tensor) for v in weights(run.out, name).values())
    assert run.result.out==run.out and len(run.result.annotations)==5 and str(run.result.report) in repr(run.result)

def test_saved_models_are_the_trained_ones(runs):
    run = runs('one')
    student = load_model(run.out/f'{TARGET}.pth')
    trained = {k: v.cpu() for k,v in run.result.learner.model.state_dict().items()}
    file = run.data/'Images/test/test0.png'
    assert same(student.state_dict(), trained) and student.codes==check_dataset(run.data).codes
    assert (predict(student, file)==predict(run.result.learner, file)).all()
    assert not same(weights(run.out), weights(run.out, BASE))

def test_masks_have_the_codes_of_the_data_and_the_size_of_their_images(runs):
    run = runs('one')
    with open(run.out/'annotations.csv', newline='', encoding='utf-8') as f: rows = list(csv.DictReader(f))
    assert [r['image'] for r in rows]==[str(run.data/f'unlabeled_images/u{i}.png') for i in range(5)] and {r['used'] for r in rows}=={'True'}
    for r in rows:
        assert load_mask(run.out/r['mask'], check_dataset(run.data).codes).shape==load_image(r['image']).shape[:2]
        assert set(np.unique(np.array(Image.open(run.out/r['mask']))))<={0, 255}

def test_the_report_compares_teacher_vote_and_student_on_the_test_set(runs):
    run = runs('one')
    report = scores(run.out)
    assert report['split']=='test' and report['images']==2 and report['against']=='teacher'
    assert list(report['per_image'])==['teacher', 'vote', 'target']
    assert [o['image'] for o in report['per_image']['target']]==['test0.png', 'test1.png']
    assert {'scores', 'difference', 'verdict'}<=report.keys() and len(report['difference']['dice'])==3
    page = (run.out/'report.html').read_text(encoding='utf-8')
    assert 'test set' in page and 'There is no test set' not in page

def test_the_report_says_how_the_run_was_made_and_what_it_cost(runs):
    run = runs('one')
    record = read_json(run.out/'run.json')
    settings = read_json(run.out/'report.json')['settings']
    args = dict(method='distillation', bases=[list(NET)], target=list(NET), views=['H Flip', 'Gamma'], seed=3, size=[32, 32], recipe=repr(R.recipes['default']))
    assert args.items()<=record['args'].items() and args.items()<=settings.items()
    assert settings['images']==dict(train=4, valid=2, test=2, unlabeled=5) and settings['data']==record['data']
    assert set(record['stages'])=={'start', BASE, 'annotations', TARGET, 'vote/annotations', f'{TARGET} on test'}
    costs = settings['training']
    assert list(costs)==['teacher', 'annotations', 'target', 'vote/annotations']
    assert [costs[name]['steps'] for name in ('teacher', 'target')]==[4, 4] and [costs[name]['epochs'] for name in ('teacher', 'target')]==[2, 2]
    assert all(o['seconds']>=0 for o in costs.values()) and costs['annotations']['images']==5

def test_views_are_scored_on_the_validation_images(runs):
    run = runs('one')
    pairs = split_files(run.data, 'valid')
    dice = run.result.report.settings['views_on_validation']
    for view,names in dict(image=[], Gamma=['Gamma']).items():
        assert dice[view]==pytest.approx(validation_dice([run.out/f'{BASE}.pth'], pairs, views=names)[0], abs=1e-4)
    assert list(dice)==['image', 'H Flip', 'Gamma'] and 'views_on_validation' in (run.out/'report.html').read_text(encoding='utf-8')

def test_data_is_untouched_and_not_copied(runs, tmp_path):
    run = runs('one')
    before = tree(make_discs(tmp_path/'discs'))
    assert tree(run.data)==before and not list(run.work.iterdir()) and {o.name for o in run.out.parent.iterdir()}=={'out', 'work'}
    assert not set(tree(run.out).values()) & set(before.values())

def test_events_tell_the_run_and_the_terminal_prints_them(runs):
    run = runs('one')
    events = read_events(run.out)
    training = ['stage', 'epoch', 'epoch']
    kinds = [e['event'] for e in events if e['event']!='warning']
    assert kinds==['plan', *training, 'annotation', *training, 'annotation', 'report']
    shares = [e['share'] for e in events]
    assert shares==sorted(shares) and shares[0]==0 and shares[-1]==1
    assert [e['share'] for e in events if e['event']=='epoch']==[0.25, 0.5, 0.75, 1]
    assert all(e['time_left'] is not None for e in events if e['share']>0) and events[-1]['time_left']==0
    assert [(e['stage'], e['images'], e['votes']) for e in events if e['event']=='annotation']==[('annotations', 5, 3), ('vote/annotations', 2, 3)]
    assert Path(events[-1]['file'])==run.out/'report.html'
    assert run.seen.printed==[describe_event(e) for e in events]

# --- several teachers

def test_all_teachers_vote_on_all_views(runs, tmp_path):
    run = runs('two')
    ann = annotate([run.out/f'{name}.pth' for name in (BASE, 'base_CGNet')], unlabeled_files(run.data), tmp_path, golden.VIEWS, SIZE, 4)
    for f in (tmp_path/'annotations').glob('*.png'): assert f.read_bytes()==(run.out/'annotations'/f.name).read_bytes()
    assert [r.agreement for r in ann.rows]==pytest.approx([r.agreement for r in run.result.annotations.rows], abs=1e-4)

def test_the_report_has_the_scores_of_each_teacher_and_equal_steps(runs):
    run = runs('two')
    report = scores(run.out)
    assert list(report['per_image'])==['teacher 1', 'teacher 2', 'vote', 'target'] and report['against']=='teacher 1'  # the student's own network
    for name,file in {'teacher 1': BASE, 'teacher 2': 'base_CGNet'}.items():
        want = score_images(load_model(run.out/f'{file}.pth'), split_files(run.data, 'test'))
        assert [o['dice'] for o in report['per_image'][name]]==pytest.approx([o['dice'] for o in want], abs=1e-4)
    training = read_json(run.out/'report.json')['settings']['training']
    assert [o['steps'] for o in training.values() if 'steps' in o]==[4, 4, 4]

def test_the_same_network_twice_has_two_files_and_two_seeds(tmp_path):
    calls = []
    x = SimpleNamespace(out=tmp_path, bases=[NET, CGNET, NET], seed=7, train=lambda *args: calls.append(args))
    assert list(D.train_teachers(x))==['teacher 1', 'teacher 2', 'teacher 3']
    assert calls==[(tmp_path/f'{BASE}.pth', NET, 7), (tmp_path/'base_CGNet.pth', CGNET, 8), (tmp_path/f'{BASE}_2.pth', NET, 9)]
    x.bases = [NET]
    assert list(D.train_teachers(x))==['teacher']

# --- once for each purpose

def passes(run, teachers):
    "How often each network shall see each image in each view, and how often it did"
    cache = ImageCache(SIZE)
    shown = [None, *(views[v] for v in golden.VIEWS)]
    files = [*unlabeled_files(run.data), *(i for split in ('train', 'valid', 'test') for i,_ in split_files(run.data, split))]
    named = {digest(v.apply(cache.image(f)[0]) if v else cache.image(f)[0]): (f.name, v and v.name) for f in files for v in shown}
    networks = {first_weights(load_model(f)): f.stem for f in [*(run.out/f'{t}.pth' for t in teachers), run.out/f'{TARGET}.pth']}
    done = Counter((networks[network], *named[image]) for network,image in run.seen.passes)
    wanted = [f.name for f in files if not f.name.startswith('train')]
    want = Counter((t, name, v and v.name) for t in teachers for name in wanted for v in shown)
    return want+Counter((TARGET, f'test{i}.png', None) for i in range(2)), done

def test_each_image_passes_once_through_each_network_in_each_view(runs):
    for name,teachers in dict(one=[BASE], two=[BASE, 'base_CGNet']).items():
        want,done = passes(runs(name), teachers)
        assert done==want, name

def test_test_scores_of_the_student_are_computed_once_and_those_of_the_others_while_they_vote(runs):
    for name in ('one', 'two'): assert runs(name).seen.scored==2, name  # as many as there are test images

def test_each_image_is_decoded_once_for_the_check_once_for_networks_and_at_most_once_for_the_report(runs):
    for name in ('one', 'two', 'naive', 'simple'):
        run = runs(name)
        files = [f for d in ('Images', 'unlabeled_images') for f in (run.data/d).rglob('*.png')]
        check,networks,pictures = Counter(), Counter(), Counter()
        for module,file in run.seen.reads:
            purpose = {'semisup_seg.data.folder': check, 'semisup_seg.data.loaders': networks}.get(module, pictures)
            purpose[file] += 1
        seen = [f for f in files if name!='simple' or 'unlabeled_images' not in f.parts]
        assert check==Counter(files) and networks==Counter(seen), name
        assert set(pictures.values())=={1} and set(pictures)<=set(files), name

# --- going on

def test_a_finished_run_is_not_trained_again_and_predicts_only_for_its_pictures(runs, tmp_path):
    out = shutil.copytree(runs('one').out, tmp_path/'out')
    before = tree(out)
    with Watch().watching() as seen: again = golden.train('one', runs('one').data, out)
    assert not seen.fits and not seen.scored and again.report.scores==runs('one').result.report.scores
    assert len(seen.passes)==2 and {network for network,_ in seen.passes}=={first_weights(load_model(out/f'{TARGET}.pth'))}  # both test images are drawn
    after = tree(out)
    assert after.keys()==before.keys() and {k for k in after if after[k]!=before[k]}<={'report.json', 'report.html', 'run.json', 'events.jsonl'}
    assert scores(out)==scores(runs('one').out) and stages(out)==stages(runs('one').out)
    first,second = read_events(runs('one').out), read_events(out)
    assert second[:len(first)]==first
    assert [(e['event'], e['stage']) for e in second[len(first):]]==[('skipped', BASE), ('skipped', 'annotations'), ('skipped', TARGET), ('skipped', 'vote/annotations'), ('report', '')]

def third(calls): return len(calls)==3

KILLS = dict(teacher=(EventLog, 'emit', partial(ends_epoch, 'base_CGNet', 2)), annotation=(AnnotationJournal, 'add', third),
    student=(EventLog, 'emit', partial(ends_epoch, TARGET, 2)))

def test_a_run_that_is_killed_at_every_stage_ends_as_if_it_had_not_been(runs, tmp_path):
    whole,out = runs('two'), tmp_path/'out'
    for name,kill in KILLS.items():
        kill_when(*kill, golden.train, 'two', whole.data, out)
        assert not (out/'report.json').exists(), name
        if name=='annotation': assert len((out/'annotations/.journal').read_text().splitlines())==3 and not (out/'annotations.csv').exists()
    base = (out/f'{BASE}.pth').read_bytes()
    with Watch().watching() as seen: golden.train('two', whole.data, out)
    assert len(seen.fits)==1 and (out/f'{BASE}.pth').read_bytes()==base  # only the student
    assert f'{BASE}: finished already' in seen.printed and f'{TARGET}.checkpoint: going on after 1 of 2 epochs' in seen.printed
    for f in (BASE, 'base_CGNet', TARGET): assert same(weights(whole.out, f), weights(out, f))
    a,b = tree(whole.out), tree(out)
    timed = {'run.json', 'events.jsonl', 'report.json', 'report.html', 'annotations/.journal', 'vote/annotations/.journal'}
    assert a.keys()==b.keys() and {k for k in a if a[k]!=b[k]}<=timed | {f'{f}.pth' for f in (BASE, 'base_CGNet', TARGET)}
    assert scores(whole.out)==scores(out)
    def _history(o): return {k: v['history'] for k,v in stages(o).items() if 'history' in v}
    assert _history(whole.out)==_history(out) and all(len(h)==2 for h in _history(out).values())
    events = read_events(out)
    assert [e['stage'] for e in events if e['event']=='resumed']==['base_CGNet', TARGET]
    assert Counter((e['stage'], e['epoch']) for e in events if e['event']=='epoch')==Counter({(s, k): 1 for s in (BASE, 'base_CGNet', TARGET) for k in (1, 2)})

def test_other_arguments_are_refused(runs, untrained):
    run = runs('one')
    before = tree(run.out)
    changes = [dict(epochs=1), dict(seed=1), dict(bs=2), dict(size=(48, 32)), dict(views=['V Flip']), dict(lr=2e-3), dict(freeze_epochs=0),
        dict(recipe='naive'), dict(recipe=[MixedBatches(0.4)]), dict(target=('MANet', 'test_resnet')), dict(base=('MANet', 'test_resnet'))]
    for changed in changes:
        args = dict(base=NET, target=NET, views=golden.VIEWS, path=run.data, out=run.out, **golden.RUN)
        name = next(iter(changed)).replace('base', 'bases')
        with pytest.raises(ValueError, match=f'other {name}.*resume=False'): data_distillation(**{**args, **changed})
    with pytest.raises(ValueError, match='other method, bases'): simple_training(NET, run.data, run.out, **golden.RUN)
    assert tree(run.out)==before and not untrained

def test_afresh_replaces_the_outputs_of_an_earlier_run_and_keeps_other_files(untrained, trained_discs, tmp_path):
    out = tmp_path/'out'
    simple_training(NET, trained_discs, out, **OPTIONS)
    (out/'notes.txt').write_text('mine')
    go(trained_discs, out, resume=False)
    assert len(untrained)==3 and tree(out).keys()==OUTPUTS | {'notes.txt'}
    assert [e['event'] for e in read_events(out)][:3]==['warning', 'plan', 'stage'] and 'skipped' not in {e['event'] for e in read_events(out)}

def test_a_second_round_on_more_labels_is_compared_with_the_first(untrained, trained_discs, tmp_path):
    def _run(data, name): simple_training(NET, data, tmp_path/name, **OPTIONS)
    _run(trained_discs, 'first')
    more = shutil.copytree(trained_discs, tmp_path/'more')
    height,width = load_image(more/'unlabeled_images/u0.png').shape[:2]
    add_label(more, more/'unlabeled_images/u0.png', save(tmp_path/'mask.png', np.zeros((height, width), np.uint8)))
    _run(more, 'second')
    text = str(compare_runs(tmp_path/'first', tmp_path/'second'))
    assert 'first on 4 labelled and 5 unlabelled, second on 5 labelled and 4 unlabelled images' in text
    other = shutil.copytree(trained_discs, tmp_path/'other')
    for d in ('Images', 'Labels'): shutil.copy(other/d/'test/test0.png', other/d/'test/test1.png')
    _run(other, 'third')
    with pytest.raises(ValueError, match='differ in the data'): compare_runs(tmp_path/'first', tmp_path/'third')

# --- refused before anything is trained or written

def resnet_file(folder):
    torch.save(timm.create_model('test_resnet').state_dict(), folder/'w.pth')
    return str(folder/'w.pth')

BAD_ARGUMENTS = [
    (dict(base=('Nix', None)), "Unknown network 'Nix'"), (dict(target=('U-Net', 'resnet5O')), "Did you mean 'resnet50'"),
    (dict(base=('U-Net',)), 'expected .architecture, backbone'), (dict(base=3), 'expected .architecture, backbone'),
    (dict(target=('U-Net', 'vit_tiny_patch16_224')), 'vit_tiny_patch16_224'), (dict(views=[]), 'views: none'), (dict(views=['Rotate']), "Unknown view 'Rotate'"),
    (dict(views=['Gamma', 'gamma']), 'more than once'), (dict(size=32), 'size is 32'), (dict(size=(8, 8)), 'size is'),
    (dict(target=('PAN', 'test_resnet')), 'PAN needs at least 128'), (dict(views=['Scale 0.75']), '24 pixels in the view Scale 0.75; U-Net needs at least 32'),
    (dict(bs=0), 'bs is 0'), (dict(bs=2.0), 'bs is 2.0'), (dict(bs=True), 'bs is True'), (dict(target=('DeepLabV3+', 'test_resnet'), bs=1), 'bs is 1'),
    (dict(epochs=0), 'epochs is 0'), (dict(epochs='9'), 'epochs is'), (dict(freeze_epochs=-1), 'freeze_epochs is -1'),
    (dict(seed=-1), 'seed is -1'), (dict(seed=None), 'seed is None'), (dict(lr=0), 'lr is 0'), (dict(lr=-1e-3), 'lr is'), (dict(lr=float('nan')), 'lr is nan'),
    (dict(lr='fast'), 'lr is'), (dict(pretrained='nowhere.pth'), 'nowhere.pth.*no such file'), (dict(recipe='nave'), "Did you mean 'naive'"),
    (dict(recipe=[HardLabels()]), 'needs MixedBatches'), (dict(recipe=[MixedBatches(), MixedBatches()]), 'twice'), (dict(recipe=7), 'recipe is 7')]

def test_bad_arguments(trained_discs, tmp_path, untrained):
    for bad,message in BAD_ARGUMENTS:
        args = dict(base=NET, target=NET, views=['H Flip'], path=trained_discs, out=tmp_path/'out', **OPTIONS)
        with pytest.raises(ValueError, match=message): data_distillation(**{**args, **bad})
        assert not untrained and not (tmp_path/'out').exists(), bad

def test_bad_teachers(trained_discs, tmp_path, untrained):
    rest = dict(path=trained_discs, out=tmp_path/'out', **OPTIONS)
    for bases in ([], [NET], NET, None, [('U-Net',), NET], [NET, ('Nix', None)]):
        with pytest.raises(ValueError, match='expected|at least two|Unknown network'): model_distillation(bases, NET, **rest)
        with pytest.raises(ValueError, match='expected|at least two|Unknown network'): model_data_distillation(bases, NET, ['H Flip'], **rest)
    with pytest.raises(ValueError, match='views: none given'): model_data_distillation([NET, NET], NET, [], **rest)
    assert not untrained and not (tmp_path/'out').exists()

def test_weights_that_fit_one_network_only(trained_discs, tmp_path, untrained):
    pair = [('U-Net', 'test_resnet'), ('U-Net', 'tf_efficientnet_lite0')]
    file = resnet_file(tmp_path)
    for base,target in (pair, pair[::-1]):
        with pytest.raises(ValueError, match='do not fit'): data_distillation(base, target, ['H Flip'], trained_discs, tmp_path/'out', **{**OPTIONS, 'pretrained': file})
    assert not untrained and not (tmp_path/'out').exists()

def test_bad_data(trained_discs, tmp_path, untrained):
    spoilt = {'nowhere': lambda d: d.rename(d.with_name('elsewhere'))}
    spoilt['codes.txt'] = lambda d: (d/'codes.txt').unlink()
    spoilt['valid0.png'] = lambda d: (d/'Images/valid/valid0.png').write_bytes(b'x')
    spoilt['u3.png'] = lambda d: (d/'unlabeled_images/u3.png').write_bytes(b'x')
    spoilt['unlabeled_images'] = lambda d: shutil.rmtree(d/'unlabeled_images')
    for want,spoil in spoilt.items():
        data = shutil.copytree(trained_discs, tmp_path/want/'nowhere')
        spoil(data)
        with pytest.raises(DatasetError, match=want): go(data, tmp_path/'out')
    assert not untrained and not (tmp_path/'out').exists()

def test_bad_out(discs, tmp_path, untrained):
    for folder in ('full', 'foreign'): (tmp_path/folder).mkdir()
    for file in ('file', 'full/thesis.txt', 'foreign/run.json'): (tmp_path/file).write_text('{}')
    (tmp_path/'link').symlink_to(discs)
    before = tree(tmp_path)
    for out in (discs/'out', discs, tmp_path, tmp_path/'file', tmp_path/'full', tmp_path/'file/out', tmp_path/'link/out', tmp_path/'foreign'):
        with pytest.raises((ValueError, OSError), match='out|file|run.json'): go(discs, out)
        assert tree(tmp_path)==before and not untrained, out

# --- variants

def test_weights_from_a_file_are_recorded_and_used(untrained, trained_discs, tmp_path):
    file = resnet_file(tmp_path)
    go(trained_discs, tmp_path/'out', pretrained=file)
    want = torch.load(file, weights_only=True)
    for f in untrained: assert all(torch.equal(v, want[k.removeprefix('model.')]) for k,v in f.encoder.items())
    assert len(untrained)==2 and read_json(tmp_path/'out/run.json')['args']['pretrained']==file

def distilled(path, out, recipe='default', bases=(NET,), views=('H Flip',), size=SIZE):
    "What `distillation` gives without a report"
    return D.distillation(make_experiment(path, out, bases, NET, views, size), get_recipe(recipe))

def test_teacher_and_student_take_the_same_steps_on_different_images(untrained, trained_discs, tmp_path):
    train,unlabeled = {f'train{i}.png' for i in range(4)}, {f'u{i}.png' for i in range(5)}
    recipes = dict(naive='naive', mixed=[MixedBatches(0.75), TopReliable()])
    for name,recipe in recipes.items():
        untrained.clear()
        ann = distilled(trained_discs, tmp_path/name, recipe).annotations
        teacher,student = untrained
        mixed = {f.name for cb in student.cbs if isinstance(cb, BatchMixer) for f,_ in cb.loader.items}
        pseudo = unlabeled if name=='naive' else {Path(r.image).name for r in ann.ranked()[-4:]}
        assert teacher.images==train and student.images | mixed==train | pseudo and bool(mixed)==(name=='mixed')
        assert teacher.steps==student.steps==2

def test_another_student(untrained, trained_discs, tmp_path):
    res = data_distillation(NET, ('MANet', 'test_resnet'), ['Gamma', 'V Flip'], trained_discs, tmp_path/'out', **OPTIONS)
    assert {'base_U-Net_test_resnet.pth', 'target_MANet_test_resnet.pth'}<=tree(tmp_path/'out').keys()
    assert res.learner.model.config['name']=='MANet' and res.report.against=='teacher'

def test_simple_training_without_a_test_set_says_so(untrained, tmp_path):
    data = make_discs(tmp_path/'data', test=0, unlabeled=0)
    before = tree(data)
    res = simple_training(NET, data, tmp_path/'out', **OPTIONS)
    assert tree(tmp_path/'out').keys()=={f'{TARGET}.pth', f'{TARGET}.json', 'report.json', 'report.html', 'run.json', 'events.jsonl'}
    assert [len(f.images) for f in untrained]==[4] and tree(data)==before and res.annotations is None and list(res.report.scores)==['target']
    report = scores(tmp_path/'out')
    for text in ((tmp_path/'out/report.html').read_text(encoding='utf-8'), report['verdict'], str(res)):
        assert 'There is no test set: the validation set chose the model' in text
    assert report['split']=='valid' and report['images']==2 and report['difference'] is None

def test_simple_training_reports_on_the_test_set_and_leaves_unlabelled_images_alone(runs):
    run = runs('simple')
    assert run.result.report.split=='test' and 'There is no test set' not in (run.out/'report.html').read_text(encoding='utf-8')
    assert not (run.out/'annotations.csv').exists() and run.seen.fits==[8]
    record = read_json(run.out/'run.json')
    assert record['args']['method']=='simple training' and 'recipe' not in record['args']

def test_the_student_is_compared_with_the_best_teacher_of_its_network_or_the_best_of_all(untrained, trained_discs, tmp_path):
    fpenet = 'FPENet', None
    cases = dict(same=([NET, CGNET, CGNET], CGNET, [0.9, 0.3, 0.5], 'teacher 3'), other=([NET, CGNET], fpenet, [0.3, 0.6], 'teacher 2'))
    for name,(bases,target,dices,against) in cases.items():
        untrained.dices = iter([*dices, 0.5])
        assert model_distillation(bases, target, trained_discs, tmp_path/name, **OPTIONS).report.against==against, name

# --- views

def test_views_that_harm_give_a_warning(monkeypatch, tmp_path, capsys):
    x = SimpleNamespace(events=EventLog(tmp_path, 1))
    D.evaluate_views(x, dict([('image', 0.7), ('H Flip', 0.695), ('V Flip', 0.6), ('Gamma', 0.8)]))
    D.evaluate_views(x, dict.fromkeys(['image', 'H Flip'], float('nan')))
    text = 'V Flip: with this view the teachers score 0.600 on the validation images, 0.700 without; does it suit these images?'
    assert [(e['event'], e['text']) for e in read_events(tmp_path)]==[('warning', text)] and capsys.readouterr().out.splitlines()==[text]

def test_views_are_evaluated_when_the_teachers_vote_and_not_again(monkeypatch, untrained, trained_discs, tmp_path):
    seen = []
    monkeypatch.setattr(D, 'evaluate_views', lambda x, dice: seen.append(list(dice)))
    for _ in range(2): distilled(trained_discs, tmp_path/'out', views=['V Flip'])
    assert seen==[['image', 'V Flip']]

@pytest.fixture
def augmented(monkeypatch):
    "Whether images are flipped in training: labelled ones, network by network, and pseudo-labelled ones"
    labelled,pseudo = [], []
    def _watch(owner, name, calls):
        real = getattr(owner, name)
        def call(*args, **kwargs):
            calls.append(args[3].args[0])
            return real(*args, **kwargs)
        monkeypatch.setattr(owner, name, call)
    _watch(E, 'seg_dls', labelled)
    _watch(R, 'pseudo_loader', pseudo)
    return labelled, pseudo

def test_teachers_students_and_labels_alone_share_one_augmentation(untrained, augmented, trained_discs, tmp_path):
    labelled,pseudo = augmented
    for flips in (True, False):
        go(trained_discs, tmp_path/f'distilled {flips}', flips=flips)
        simple_training(NET, trained_discs, tmp_path/f'alone {flips}', flips=flips, **OPTIONS)
        assert set(labelled)=={flips} and len(labelled)>=3 and pseudo==[flips]
        labelled.clear()
        pseudo.clear()

def test_labels_alone_take_the_steps_of_a_distillation(untrained, trained_discs, tmp_path):
    costs = []
    for name,train in dict(distilled=go, alone=partial(simple_training, NET)).items():
        options = {} if name=='distilled' else OPTIONS
        res = train(trained_discs, tmp_path/name, **options)
        costs.append(res.report.settings['training']['target']['steps'])
    assert costs[0]==costs[1]>0

def test_model_distillation_votes_on_the_image_alone(monkeypatch):
    calls = []
    monkeypatch.setattr(D, 'distill', lambda *args, **kwargs: calls.append((args, kwargs)))
    model_distillation((NET, CGNET), NET, 'data', 'out', seed=1)
    assert calls==[(([NET, CGNET], NET, [], 'data', 'out'), dict(seed=1))]

# --- recipes in a run

class Counting(Callback):
    "A user's own callback"
    order = 52
    seen = []  # of the class, so that copies share it
    def __init__(self): self.batches = 0
    def after_batch(self): self.batches += 1
    def after_fit(self): self.seen.append(self.batches)

def test_two_trainings_with_one_recipe_are_as_with_two_and_leave_its_pieces_as_they_were(trained_discs, tmp_path):
    teacher = save_model(make_model(), tmp_path/'teacher.pth')
    def _pieces(): return [TopReliable(0.6), MixedBatches(), HardLabels(), EMA(0.9), Counting()]
    def _train(name, recipe):
        x = make_experiment(trained_discs, tmp_path/name, [NET])
        x.schedule['epochs'] = 1
        D.train_target(x, recipe, [teacher], seed=1)
        return weights(x.out)
    pieces = _pieces()
    before = [dict(vars(p)) for p in pieces]
    shared = Recipe(*pieces[:2], tuple(pieces[2:]))
    Counting.seen.clear()
    first,second,other = _train('a', shared), _train('b', shared), _train('c', get_recipe(_pieces()))
    assert same(first, second) and same(first, other)
    assert [vars(p) for p in pieces]==before and Counting.seen==[3, 3, 3]  # two steps, and a batch of validation

def test_no_probabilities_are_left_at_the_end(runs): assert not list(runs('one').out.rglob('*.npy')) and not list(runs('two').out.rglob('*.npy'))

def test_in_a_second_round_the_first_student_labels_the_images(untrained, trained_discs, tmp_path):
    out = tmp_path/'out'
    res = go(trained_discs, out, recipe=Recipe(mix=MixedBatches(), callbacks=(HardLabels(),), rounds=2))
    first = out/'round1'
    assert len(untrained)==3 and (first/f'{TARGET}.pth').is_file() and len(list((first/'annotations').glob('*.png')))==5
    ann = annotate(first/f'{TARGET}.pth', unlabeled_files(trained_discs), tmp_path/'mine', ['H Flip'], SIZE, 4)
    for f in (tmp_path/'mine/annotations').glob('*.png'): assert f.read_bytes()==(out/'annotations'/f.name).read_bytes()
    confidences = [ann.rows[0].confidence, res.annotations.rows[0].confidence, read_annotations(first).rows[0].confidence]
    assert confidences[0]==confidences[1]!=confidences[2] and not list(out.rglob('*.npy'))
    assert list(res.report.scores)==['teacher', 'vote', 'target'] and {f'round1/{TARGET}', 'round1/annotations'}<=stages(out).keys()

# --- the names

def test_routines_list_every_option():
    options = {k: p for k,p in signature(distill).parameters.items() if p.default is not p.empty}
    assert len(options)>=8
    for routine in (data_distillation, model_distillation, model_data_distillation, simple_training):
        ours = signature(routine).parameters
        want = {k: p.default for k,p in options.items() if k!='recipe' or routine is not simple_training}
        assert {k: ours[k].default for k in want}==want, routine
        assert not [p for p in ours.values() if p.kind is p.VAR_KEYWORD]
