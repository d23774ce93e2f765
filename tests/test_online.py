"What online methods share: whole runs, a start from trained weights, a warning of collapse, the command line"
import json, shutil
from functools import partial

import pytest, torch
from conftest import OPTIONS, SIZE, SMALL_NET, Watch, ends_epoch, kill_when, make_discs, make_model, python, same, tree, weights
from fastai.learner import Learner
from fastai.torch_core import set_seed
from torch import nn

import semisup_seg.all  # registers the methods  # chkstyle: ignore
import semisup_seg.distillation.experiment as experiment
from semisup_seg.data.folder import unlabeled_files
from semisup_seg.data.loaders import seg_dls
from semisup_seg.distillation.batches import unlabeled_loader
from semisup_seg.distillation.fixmatch import FixMatch
from semisup_seg.distillation.mean_teacher import MeanTeacher
from semisup_seg.distillation.methods import methods, online_training
from semisup_seg.distillation.online import CollapseWatch, StartWeights, describe_collapse
from semisup_seg.distillation.run import EventLog, read_events
from semisup_seg.evaluation.compare import compare_runs
from semisup_seg.training.inference import save_model
from semisup_seg.training.losses import CEDiceLoss

NAME = 'target_Linknet_test_resnet'
METHODS = 'FixMatch', 'UniMatch'

def go(method, data, out, **options): return online_training(method, SMALL_NET, data, out, **{**OPTIONS, **options})
def start_model(seed=5, **kw): return make_model(name=SMALL_NET[0], backbone=SMALL_NET[1], seed=seed, **kw)

# --- whole runs

@pytest.fixture(scope='module', params=METHODS)
def done(request, trained_discs, tmp_path_factory):
    "A finished run of each method, with a start, and what it did"
    root = tmp_path_factory.mktemp(request.param)
    options = dict(start=str(save_model(start_model(), root/'first.pth')), threshold=0.6)
    with Watch().watching() as seen: res = go(request.param, trained_discs, root/'out', options=options)
    return request.param, root/'out', options, res, seen

def test_a_run_reports_and_decodes_each_image_once(done, trained_discs):
    method,out,options,res,seen = done
    report = json.loads((out/'report.json').read_text())
    assert report['settings']['method']==method and report['settings']['training']['target']['steps']==4
    assert list(res.report.scores)==['target'] and res.annotations is None
    assert set(tree(out))=={f'{NAME}.pth', f'{NAME}.json', 'report.json', 'report.html', 'run.json', 'events.jsonl'}
    files = sorted(f for d in ('Images', 'unlabeled_images') for f in (trained_discs/d).rglob('*.png') if f.parent.name!='test')
    assert sorted(f for m,f in seen.reads if m=='semisup_seg.data.loaders' and f.parent.name!='test')==files

def test_a_run_that_is_killed_in_its_training_ends_as_if_it_had_not_been(done, trained_discs, tmp_path):
    method,whole,options,res,_ = done
    run = partial(go, method, options=options)
    kill_when(EventLog, 'emit', partial(ends_epoch, NAME, 2), run, trained_discs, tmp_path/'out')
    assert not (tmp_path/f'out/{NAME}.pth').exists()
    again = run(trained_discs, tmp_path/'out')
    assert same(weights(tmp_path/'out', NAME), weights(whole, NAME)) and again.report.target==res.report.target
    with Watch().watching() as seen: run(trained_discs, tmp_path/'out')
    assert not seen.fits and not seen.scored

def test_another_seed_gives_another_student(done, trained_discs, tmp_path):
    method,whole,options,_,_ = done
    go(method, trained_discs, tmp_path/'out', options=options, seed=1)
    assert not same(weights(tmp_path/'out', NAME), weights(whole, NAME))

def test_wrong_options_are_refused_before_training(trained_discs, tmp_path, untrained):
    cases = (dict(treshold=1), "Did you mean 'threshold'"), (dict(threshold=2), 'threshold is 2'), (dict(weight=-1), 'weight is -1'), (dict(share=0), 'share is 0')
    for options,message in cases:
        for method in METHODS:
            with pytest.raises(ValueError, match=message): go(method, trained_discs, tmp_path/'out', options=options)
    assert not untrained and not [e for e in read_events(tmp_path/'out') if e['stage']]

def test_all_online_methods_are_registered_with_one_set_of_common_options():
    for name in ('Mean Teacher', *METHODS): assert methods[name].online and methods[name].about

# --- a start from trained weights

def test_a_student_begins_with_the_weights_it_is_given(trained_discs, tmp_path):
    model = start_model(seed=7)
    file = save_model(model, tmp_path/'first.pth')
    for method in ('Mean Teacher', *METHODS):
        go(method, trained_discs, tmp_path/method, epochs=1, lr=1e-9, options=dict(start=str(file)))
        for name,p in weights(tmp_path/method, NAME).items():
            if 'running' in name or 'num_batches' in name: continue
            torch.testing.assert_close(p, model.state_dict()[name].contiguous(), atol=1e-6, rtol=1e-5)

def test_the_weights_are_loaded_once_and_before_the_teacher_is_copied(trained_discs, tmp_path):
    file = save_model(start_model(), tmp_path/'first.pth')
    learn = Learner(seg_dls(trained_discs, SIZE, 2), start_model(seed=1), CEDiceLoss())
    cb = FixMatch(unlabeled_loader(unlabeled_files(trained_discs), SIZE, 2))
    start = StartWeights(file)
    first = next(start_model().parameters())
    with learn.no_bar(), learn.no_logging(), learn.added_cbs([cb, start]):
        learn('before_fit')
        assert torch.equal(next(cb.teacher.parameters()), first) and torch.equal(next(learn.model.parameters()), first)
        with torch.no_grad(): next(learn.model.parameters()).zero_()
        learn('before_fit')  # of the next part of the training
        assert not next(learn.model.parameters()).any()

def test_the_report_names_the_start_and_its_cost_and_a_comparison_counts_it(done, trained_discs, tmp_path):
    method,first,options,_,_ = done
    start = dict(start=str(first/f'{NAME}.pth'))
    res = go('Mean Teacher', trained_discs, tmp_path/'second', options=start)
    assert res.report.settings['start']==start['start']
    assert f'began with the weights in {start["start"]}' in (tmp_path/'second/report.html').read_text()
    training = res.report.settings['training']
    assert training['start weights']['steps']==4 and training['target']['steps']==4
    c = compare_runs(first, tmp_path/'second')
    assert f'out began with the weights in {options["start"]}, whose training is not counted' in str(c)
    assert f'second began with the weights in {start["start"]}, whose training is among its steps' in str(c)
    assert c.steps('second')==8 and c.steps('out')=='–'
    third = go(method, trained_discs, tmp_path/'third', options=dict(start=str(tmp_path/f'second/{NAME}.pth')))
    assert third.report.settings['training']['start weights']['steps']==8

def test_an_unsuited_start_is_refused_before_training(trained_discs, tmp_path, untrained):
    other = save_model(make_model(), tmp_path/'other.pth')
    classes = save_model(start_model(codes='rest,0\nblob,255'), tmp_path/'classes.pth')
    (tmp_path/'bad.pth').write_bytes(b'no')
    shutil.copy(other.with_suffix('.json'), tmp_path/'bad.json')
    cases = ('nowhere.pth', 'start: .*nowhere.pth: no such file'), (other, 'start: .*other.pth is of the network'), (classes, 'has the classes rest, blob; the data set has rest, disc')
    for file,message in (*cases, ('bad.pth', 'start: .*bad.pth: is not a model')):
        with pytest.raises(ValueError, match=message): go('FixMatch', trained_discs, tmp_path/'out', options=dict(start=str(tmp_path/file)))
    assert not untrained
    go('FixMatch', trained_discs, tmp_path/'out')  # the mistake left nothing that hinders
    assert len(untrained)==1

def test_a_start_that_has_changed_is_refused_and_one_that_is_gone_does_not_hinder_a_finished_run(trained_discs, tmp_path):
    file = save_model(start_model(), tmp_path/'first.pth')
    run = partial(go, 'FixMatch', options=dict(start=str(file)))
    kill_when(EventLog, 'emit', partial(ends_epoch, NAME, 1), run, trained_discs, tmp_path/'out')
    save_model(start_model(seed=9), file)
    with pytest.raises(ValueError, match='has changed since the run began'): run(trained_discs, tmp_path/'out')
    res = run(trained_discs, tmp_path/'out', resume=False)
    file.unlink()
    assert run(trained_discs, tmp_path/'out').report.target==res.report.target

def test_a_student_that_begins_with_trained_weights_has_no_frozen_epochs(monkeypatch, trained_discs, tmp_path, untrained):
    schedules = []
    fit = experiment.fit
    monkeypatch.setattr(experiment, 'fit', lambda learn, **kw: [schedules.append(kw), fit(learn, **kw)])
    file = save_model(start_model(), tmp_path/'first.pth')
    go('FixMatch', trained_discs, tmp_path/'out', freeze_epochs=3, options=dict(start=str(file)))
    assert schedules[0]['freeze_epochs']==0

# --- collapse

def warnings(path, teacher, bias=0., scale=20., epochs=1):
    "Those of a training that changes nothing, of a network that finds discs by their brightness, with a `bias` for the background"
    set_seed(0)
    net = nn.Conv2d(3, 2, 1)
    nn.init.zeros_(net.weight)
    nn.init.constant_(net.weight[1], scale)
    net.bias = nn.Parameter(torch.tensor([1.2*scale+bias, 0.]))
    heard = []
    learn = Learner(seg_dls(path, SIZE, 2), net, CEDiceLoss())
    cb = teacher(unlabeled_loader(unlabeled_files(path), SIZE, 5))
    watch = CollapseWatch(cb, ['rest', 'disc'], heard.append)
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, 0., cbs=[cb, watch])
    return heard

def test_a_collapsed_teacher_causes_one_warning_and_a_healthy_one_none(trained_discs):
    for teacher in (MeanTeacher, FixMatch):
        assert warnings(trained_discs, teacher)==[]
        [text] = warnings(trained_discs, teacher, bias=100., epochs=4)
        assert 'disc has 0.00% of the pseudo-labelled pixels' in text and 'of the labelled ones' in text and 'rest' not in text
    [text] = warnings(trained_discs, FixMatch, scale=0.1)
    assert '0.00% of the pixels of unlabelled images have a confident pseudo-label' in text
    assert warnings(trained_discs, MeanTeacher, scale=0.1)==[]

def test_a_share_of_a_tenth_is_no_collapse_and_absent_classes_are_none():
    for pseudo,is_fault in ((21, False), (19, True)): assert bool(describe_collapse('ab', [800, 200], [1000-pseudo, pseudo], 1000))==is_fault
    assert describe_collapse('abc', [800, 200, 0], [900, 100, 0], 2000)=='' and describe_collapse('ab', [0, 0], [900, 0], 1000)==''
    assert describe_collapse('ab', [1, 1], [1, 1], 1999)=='' and '0.05%' in describe_collapse('ab', [1, 1], [1, 0], 2000)

def test_the_first_half_of_a_training_is_not_judged(trained_discs):
    [text] = warnings(trained_discs, FixMatch, bias=100., epochs=4)
    assert text.startswith('epoch 3: ')

def test_a_run_tells_of_a_collapse_by_one_event_and_does_not_repeat_it_when_it_resumes(trained_discs, tmp_path):
    model = start_model()
    with torch.no_grad(): next(m for m in reversed([*model.modules()]) if isinstance(m, nn.Conv2d)).bias[0] += 1000
    run = partial(go, 'UniMatch', epochs=3, lr=1e-9, options=dict(start=str(save_model(model, tmp_path/'first.pth'))))
    kill_when(EventLog, 'emit', partial(ends_epoch, NAME, 3), run, trained_discs, tmp_path/'out')
    run(trained_discs, tmp_path/'out')
    [warning] = [e for e in read_events(tmp_path/'out') if e['event']=='warning' and e['stage']]
    assert warning['stage']==NAME and warning['text'].startswith(f'{NAME}, epoch 2: ') and 'disc has 0.00%' in warning['text']

# --- the command line

def test_the_command_knows_all_methods_in_a_fresh_process(tmp_path):
    run = 'from semisup_seg.app.cli import main; raise SystemExit(main())'
    data = make_discs(tmp_path/'d', unlabeled=0)
    res = python(run, 'online', data, tmp_path/'out', '--method', 'unimatch', '--size', 32, 32, '--scratch', '--network', *SMALL_NET)
    assert res.returncode==2 and 'no folder unlabeled_images' in res.stderr and 'Unknown' not in res.stderr
