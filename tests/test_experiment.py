"What is checked before a run, and how networks are trained and vote as stages of it"
import gc, json, random, weakref

import numpy as np, pytest, torch
from conftest import NET, SIZE, make_discs, make_experiment, make_model, same, weights
from fastai.callback.core import Callback

import semisup_seg.distillation.experiment as E
from semisup_seg.annotation.annotate import validation_dice
from semisup_seg.annotation.records import AnnotationRecord, Annotations
from semisup_seg.data.folder import split_files, unlabeled_files
from semisup_seg.distillation.experiment import check_run, model_file, plan_epochs, view_means
from semisup_seg.distillation.recipe import EMA
from semisup_seg.distillation.run import read_events
from semisup_seg.training.inference import load_model, save_model

TARGET = 'target_U-Net_test_resnet'

# --- check_run

def test_check_run_gives_names_and_sizes_in_their_proper_form(trained_discs, tmp_path):
    args = [('unet', 'TEST_RESNET'), 'cgnet'], 'FPENet', ['h flip', 'gamma'], trained_discs, tmp_path/'out', [32, 48], False
    bases,target,views,size,summary = check_run(*args)
    assert bases==[NET, ('CGNet', None)] and target==('FPENet', None) and views==['H Flip', 'Gamma'] and size==(32, 48)
    assert summary.counts==dict(train=4, valid=2, test=2, unlabeled=5)

def test_each_network_is_built_once_and_the_weights_are_for_encoders_only(monkeypatch, trained_discs, tmp_path):
    built = []
    monkeypatch.setattr(E, 'build_model', lambda name, backbone, pretrained: built.append((name, backbone, pretrained)))
    check_run([NET, NET, ('CGNet', None)], NET, [], trained_discs, tmp_path/'out', SIZE, 'weights.pth')
    assert sorted(built)==[('CGNet', None, False), (*NET, 'weights.pth')]

def test_unlabelled_images_are_needed_with_teachers_or_where_a_method_asks_for_them(tmp_path):
    data = make_discs(tmp_path/'data', unlabeled=0)
    def _check(bases, unlabeled=None): return check_run(bases, NET, [], data, tmp_path/'out', SIZE, False, unlabeled)
    _check([])
    for bases,unlabeled in (([NET], None), ([], True)):
        with pytest.raises(ValueError, match='no folder unlabeled_images'): _check(bases, unlabeled)

# --- train

@pytest.fixture(scope='module')
def trained(trained_discs, tmp_path_factory):
    "An experiment that trained its student, with the generators in some state"
    x = make_experiment(trained_discs, tmp_path_factory.mktemp('trained')/'out')
    random.seed(987)
    np.random.seed(987)
    torch.manual_seed(987)
    x.train(model_file(x.out, 'target', NET), NET, seed=3)
    return x

def test_a_trained_network_is_saved_and_its_stage_recorded(trained):
    stage = json.loads((trained.out/'run.json').read_text())['stages'][TARGET]
    assert stage['steps']==4 and stage['seconds']>0 and [o['stage'] for o in stage['history']]==['all', 'all']
    assert {f.name for f in trained.out.iterdir()}=={'run.json', 'events.jsonl', f'{TARGET}.pth', f'{TARGET}.json'}  # no checkpoint
    assert load_model(trained.out/f'{TARGET}.pth').codes==trained.summary.codes

def test_the_seed_alone_decides_the_weights(trained, trained_discs, tmp_path):
    for seed in (3, 4):
        x = make_experiment(trained_discs, tmp_path/str(seed))
        x.train(model_file(x.out, 'target', NET), NET, seed)
        assert same(weights(x.out), weights(trained.out))==(seed==3), seed

def test_a_finished_training_is_skipped(monkeypatch, trained, trained_discs):
    monkeypatch.setattr(E, 'fit', None)
    x = make_experiment(trained_discs, trained.out)
    assert x.train(model_file(x.out, 'target', NET), NET, seed=3)==trained.out/f'{TARGET}.pth'
    last = read_events(x.out)[-1]
    assert (last['event'], last['stage'], last['share'])==('skipped', TARGET, 1)

class StopAfter(Callback):
    "A user who interrupts before the epoch `n` is finished"
    order = 65
    def __init__(self, n): self.n = n
    def after_epoch(self):
        if self.epoch==self.n: raise KeyboardInterrupt

def test_an_interrupted_training_goes_on_and_ends_as_if_it_had_not_been(trained, trained_discs, tmp_path, capsys):
    x = make_experiment(trained_discs, tmp_path/'out')
    file = model_file(x.out, 'target', NET)
    with pytest.raises(KeyboardInterrupt): x.train(file, NET, 3, make_callbacks=lambda: [StopAfter(1)])
    assert not file.exists() and x.run.done(TARGET) is None
    x = make_experiment(trained_discs, tmp_path/'out')
    random.seed(55)
    x.train(file, NET, 3)
    assert 'going on after 1 of 2 epochs' in capsys.readouterr().out
    assert same(weights(x.out), weights(trained.out)) and x.run.done(TARGET)['history']==trained.run.done(TARGET)['history']
    events = [(e['event'], e.get('epoch')) for e in read_events(x.out)]
    assert events==[('stage', None), ('epoch', 1), ('stage', None), ('resumed', 1), ('epoch', 2)]

def test_callbacks_are_made_after_the_seed_is_set(trained_discs, tmp_path):
    drawn = []
    def _make():
        drawn.append(random.random())
        return [StopAfter(0)]
    for k in range(2):
        x = make_experiment(trained_discs, tmp_path/str(k))
        with pytest.raises(KeyboardInterrupt): x.train(model_file(x.out, 'target', NET), NET, 3, make_callbacks=_make)
    assert drawn[0]==drawn[1]

def test_no_network_stays_in_memory_after_its_training(monkeypatch, trained_discs, tmp_path):
    alive = weakref.WeakSet()
    most,build = [], E.seg_learner
    def seg_learner(*args, **kwargs):
        learn = build(*args, **kwargs)
        most.append(len(alive))
        alive.add(learn.model)
        return learn
    monkeypatch.setattr(E, 'seg_learner', seg_learner)
    x = make_experiment(trained_discs, tmp_path/'out', [NET]*2)
    x.schedule['epochs'] = 1
    gc.disable()  # what the collector frees by chance does not count
    try:
        files = [x.train(model_file(x.out, 'base', NET, k), NET, k) for k in range(2)]
        x.annotate(x.out, files, unlabeled_files(trained_discs))
        x.new_learner(NET)
    finally: gc.enable()
    assert most==[0]*3

def test_teachers_and_student_take_the_same_steps_whatever_they_train_on(trained_discs, tmp_path):
    x = make_experiment(trained_discs, tmp_path/'out')  # four labelled images in batches of four, two steps an epoch
    assert [len(x.new_learner(NET, n).dls.train) for n in (None, 2, 1)]==[2, 2, 2]

def test_a_training_is_divided_into_epochs():
    assert plan_epochs(None, None, 9, 4)==(20, 50)
    assert plan_epochs(7, None, 9, 4)==(7, 1)
    assert plan_epochs(50, None, 9, 4)==(20, 2)
    assert plan_epochs(None, 3, 9, 4)==(3, 2)
    assert plan_epochs(None, 3, 2, 4)==(3, 1)

def test_a_new_run_repeats_warnings_and_says_how_long_it_will_take(trained_discs, tmp_path):
    x = make_experiment(trained_discs, tmp_path/'out', [NET])
    x.summary.counts.pop('test')
    x.announce()
    warned = [e for e in read_events(x.out) if e['event']=='warning']
    plan = read_events(x.out)[-1]
    assert 'no test set' in warned[0]['text'] and '4 steps are too few' in warned[-1]['text']
    assert (plan['event'], plan['trainings'], plan['steps'])==('plan', 2, 4) and plan['seconds']>0
    x.run.finish('base', steps=1)
    n = len(read_events(x.out))
    x.announce()
    assert len(read_events(x.out))==n  # a run that goes on

def test_every_training_ends_with_averaged_weights(monkeypatch, trained_discs, tmp_path):
    given = []
    monkeypatch.setattr(E, 'fit', lambda learn, *args, cbs, **kw: given.append([type(cb).__name__ for cb in cbs]) or 1/0)
    x = make_experiment(trained_discs, tmp_path/'out')
    for make in (list, lambda: [EMA(0.5)]):
        with pytest.raises(ZeroDivisionError): x.train(x.out/'target.pth', NET, 0, make_callbacks=make)
    assert [names.count('EMA') for names in given]==[1, 1]

def test_pretrained_weights_are_for_networks_with_a_backbone_and_freeze_it_at_first(monkeypatch, trained_discs, tmp_path):
    made = []
    monkeypatch.setattr(E, 'seg_learner', lambda dls, *pair, pretrained: made.append((*pair, pretrained)))
    x = make_experiment(trained_discs, tmp_path/'out')
    x.schedule.update(freeze_epochs=3)
    for pair in (NET, ('CGNet', None)): x.new_learner(pair, pretrained='weights.pth')
    assert made==[(*NET, 'weights.pth'), ('CGNet', None, False)]
    assert x.total_epochs(NET)==2
    x.pretrained = 'weights.pth'
    assert (x.total_epochs(NET), x.total_epochs(('CGNet', None)))==(5, 2)

# --- annotate

@pytest.fixture(scope='module')
def voted(trained_discs, tmp_path_factory):
    "Two untrained teachers that voted on the test images, and on the validation images in three views"
    x = make_experiment(trained_discs, tmp_path_factory.mktemp('voted')/'out', [NET]*2, views=['H Flip', 'Gamma'])
    files = []
    for k in range(2):
        model = make_model()
        torch.manual_seed(k)
        for p in model.parameters(): torch.nn.init.normal_(p, std=0.2)
        files.append(save_model(model, model_file(x.out, 'base', NET, k)))
    test = split_files(trained_discs, 'test')
    valid = split_files(trained_discs, 'valid')
    ann,facts = x.annotate(x.out, files, [i for i,_ in test], valid=valid, labels=dict(test))
    return x, files, ann, facts

def test_the_stage_of_a_vote_holds_what_each_voter_is_worth(voted, trained_discs):
    x,files,ann,facts = voted
    assert set(facts['scores'])=={'teacher 1', 'teacher 2', 'vote'} and facts['images']==2 and facts['seconds']>=0
    assert [o['image'] for o in facts['scores']['vote']]==['test0.png', 'test1.png']
    assert [o['dice'] for o in facts['scores']['vote']]==[r.scores['dice'] for r in ann.rows]
    pairs = split_files(trained_discs, 'valid')
    for view,names in dict(image=[], Gamma=['Gamma']).items():
        assert facts['views'][view]==pytest.approx(np.mean(validation_dice(files, pairs, views=names)), abs=1e-4)
    assert list(facts['views'])==['image', 'H Flip', 'Gamma']

def test_a_finished_vote_is_skipped(monkeypatch, voted, trained_discs):
    x,files,ann,facts = voted
    monkeypatch.setattr(E, 'annotate_files', None)
    ann2,facts2 = make_experiment(trained_discs, x.out, [NET]*2).annotate(x.out, files, [])
    assert facts2==facts and [r.image for r in ann2.rows]==[r.image for r in ann.rows]
    assert read_events(x.out)[-1]['event']=='skipped'

def test_one_teacher_votes_on_all_views_at_once_and_several_one_after_another(monkeypatch, trained_discs, tmp_path):
    calls = []
    def annotate(voters, files, out, *args, **kwargs):
        calls.append((args, kwargs))
        return Annotations(out, [], [])
    monkeypatch.setattr(E, 'annotate_files', annotate)
    x = make_experiment(trained_discs, tmp_path/'out', views=['Gamma'])
    for k,n in enumerate((1, 2)): x.annotate(x.out/str(k), ['file']*n, ['image']*3, soft=True)
    assert calls==[((['Gamma'], SIZE, 4), dict(together=n==1, cache=x.cache, soft=True)) for n in (1, 2)]
    assert [(e['images'], e['votes']) for e in read_events(x.out)]==[(3, 2), (3, 4)]

def test_view_means_average_over_images_with_a_structure_then_over_voters():
    def _record(*dices): return AnnotationRecord('i', voter_scores=[{'image': dict(dice=d), 'Gamma': dict(dice=d/2)} for d in dices])
    assert view_means([_record(0.2, 0.8), _record(0.4, float('nan'))])=={'image': 0.55, 'Gamma': 0.275}

def test_model_files_are_named_by_role_network_and_number(tmp_path):
    names = [model_file(tmp_path, *args).name for args in (('base', NET), ('base', NET, 1), ('target', ('CGNet', None)))]
    assert names==['base_U-Net_test_resnet.pth', 'base_U-Net_test_resnet_2.pth', 'target_CGNet.pth']
