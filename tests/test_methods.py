"The registry of methods: an online method of one's own trains, reports and resumes as the others do"
import json
from inspect import signature

import pytest
from conftest import NET, OPTIONS, Watch, first_weights, make_discs, same, tree, weights
from fastai.callback.core import Callback

import semisup_seg.all  # registers the methods of the package  # chkstyle: ignore
from semisup_seg.core import check_fractions
from semisup_seg.data.folder import unlabeled_files
from semisup_seg.distillation.batches import unlabeled_loader
from semisup_seg.distillation.experiment import model_file
from semisup_seg.distillation.methods import Trained, methods, online_training, register_method, run_method
from semisup_seg.distillation.recipe import EMA
from semisup_seg.distillation.run import read_events
from semisup_seg.training.inference import load_model

TARGET = 'target_U-Net_test_resnet'
stop_after = []  # epochs after which a user interrupts

class Interrupt(Callback):
    order = 65
    def after_epoch(self):
        if self.epoch in stop_after: raise KeyboardInterrupt

@pytest.fixture(scope='module', autouse=True)
def averaged():
    "An online method that looks at unlabelled images, and averages the weights"
    @register_method('Averaged', 'the average of the weights')
    def averaged(x, decay=0.9):
        check_fractions(decay=decay)
        files = unlabeled_files(x.path)
        def _callbacks():
            unlabeled_loader(files, x.size, len(files), cache=x.cache).one_batch()
            return [EMA(decay), Interrupt()]
        file = model_file(x.out, 'target', x.target)
        return Trained(x.train(file, x.target, x.seed, make_callbacks=_callbacks))

    yield averaged
    del methods['Averaged']

def go(data, out, method='averaged', **options): return online_training(method, NET, data, out, **{**OPTIONS, **options})

@pytest.fixture(scope='module')
def done(trained_discs, tmp_path_factory):
    "A finished run, and what it did"
    out = tmp_path_factory.mktemp('averaged')/'out'
    with Watch().watching() as seen: res = go(trained_discs, out, options=dict(decay=0.5))
    return out, res, seen

# --- the registry

def test_a_second_method_of_the_same_name_is_refused_and_the_same_one_again_is_not(averaged):
    for function in (lambda x: None, EMA):
        with pytest.raises(ValueError, match="'Averaged' is registered already"): register_method('Averaged', 'another')(function)
    assert methods['Averaged'].train is averaged
    assert register_method('Averaged', 'the average of the weights')(averaged) is averaged

def test_methods_of_the_package():
    online = {name: m.online for name,m in methods.items() if name!='Averaged'}
    assert {'distillation': False, 'simple training': False, 'Mean Teacher': True}.items()<=online.items()
    assert all(m.about and m.name==name for name,m in methods.items())

def test_only_online_methods_are_offered_as_such(trained_discs, tmp_path):
    for name,message in (('Mean Techer', "Did you mean 'Mean Teacher'"), ('distillation', "Unknown online method 'distillation'"), (3, 'Unknown online method 3')):
        with pytest.raises(ValueError, match=message): go(trained_discs, tmp_path/'out', name)
    with pytest.raises(ValueError, match="Did you mean 'distillation'"): run_method('distilation', NET, trained_discs, tmp_path/'out')
    assert not (tmp_path/'out').exists()

def test_online_training_lists_every_option():
    options = {k: p.default for k,p in signature(run_method).parameters.items() if p.default is not p.empty and k not in ('bases', 'views', 'trainings')}
    ours = signature(online_training).parameters
    assert {k: ours[k].default for k in options}==options and not [p for p in ours.values() if p.kind is p.VAR_KEYWORD]

# --- a run

def test_a_registered_method_gives_a_student_a_report_and_a_record(done, trained_discs):
    out,res,seen = done
    assert set(tree(out))=={f'{TARGET}.pth', f'{TARGET}.json', 'report.json', 'report.html', 'run.json', 'events.jsonl'}
    assert same(weights(out), {k: v.cpu() for k,v in res.learner.model.state_dict().items()}) and res.learner.history and res.out==out
    report = json.loads((out/'report.json').read_text())
    assert report['split']=='test' and list(report['per_image'])==['target'] and report['against'] is None and res.annotations is None
    assert str(res.report) in repr(res) and 'report.html' in repr(res)
    args = json.loads((out/'run.json').read_text())['args']
    assert dict(method='Averaged', decay=0.5, target=list(NET), bases=[], views=[]).items()<=args.items()
    assert [e['event'] for e in read_events(out)]==['warning', 'plan', 'stage', 'epoch', 'epoch', 'report']
    assert [e['share'] for e in read_events(out)]==[0, 0, 0, 0.5, 1, 1]

def test_each_image_is_decoded_once_and_test_images_pass_once_through_the_student(done, trained_discs):
    out,res,seen = done
    files = sorted(f for d in ('Images', 'unlabeled_images') for f in (trained_discs/d).rglob('*.png'))
    assert sorted(f for m,f in seen.reads if m=='semisup_seg.data.folder')==files
    assert sorted(f for m,f in seen.reads if m=='semisup_seg.data.loaders')==files
    assert [network for network,_ in seen.passes]==[first_weights(load_model(out/f'{TARGET}.pth'))]*2 and seen.scored==2

def test_a_finished_run_is_not_trained_again(done, trained_discs):
    out,res,_ = done
    with Watch().watching() as seen: again = go(trained_discs, out, options=dict(decay=0.5))
    assert not seen.fits and not seen.scored and len(seen.passes)==2  # for the pictures of the report
    assert again.report.target==res.report.target and [e['event'] for e in read_events(out)][-2:]==['skipped', 'report']

def test_an_interrupted_run_goes_on_and_ends_as_if_it_had_not_been(done, trained_discs, tmp_path):
    stop_after.append(1)
    try:
        with pytest.raises(KeyboardInterrupt): go(trained_discs, tmp_path/'out', options=dict(decay=0.5))
    finally: stop_after.clear()
    assert not (tmp_path/'out/report.json').exists()
    with Watch().watching() as seen: res = go(trained_discs, tmp_path/'out', options=dict(decay=0.5))
    assert len(seen.fits)==1 and same(weights(tmp_path/'out'), weights(done[0])) and res.report.target==done[1].report.target
    assert [(e['event'], e['epoch']) for e in read_events(tmp_path/'out') if 'epoch' in e]==[('epoch', 1), ('resumed', 1), ('epoch', 2)]

# --- refused before anything is trained

def test_options_a_method_does_not_have_are_refused_by_name(trained_discs, tmp_path, untrained):
    with pytest.raises(ValueError, match="Unknown option of Averaged 'decey'. Did you mean 'decay'"): go(trained_discs, tmp_path/'out', options=dict(decey=1))
    assert not untrained and not (tmp_path/'out').exists()

def test_after_an_option_out_of_range_the_right_one_is_accepted(trained_discs, tmp_path, untrained):
    with pytest.raises(ValueError, match='decay is 2; expected'): go(trained_discs, tmp_path/'out', options=dict(decay=2))
    assert not untrained
    go(trained_discs, tmp_path/'out', options=dict(decay=0.8))
    assert len(untrained)==1

def test_other_options_and_other_methods_are_refused(done, trained_discs, untrained):
    out,_,_ = done
    before = tree(out)
    for method,options,name in (('averaged', dict(decay=0.6), 'decay'), ('averaged', {}, 'decay'), ('Mean Teacher', {}, 'method')):
        with pytest.raises(ValueError, match=f'a run with other {name}'): go(trained_discs, out, method, options=options)
    assert tree(out)==before and not untrained

def test_an_online_method_needs_unlabelled_images_and_batches_of_at_least_two(trained_discs, tmp_path, untrained):
    data = make_discs(tmp_path/'data', unlabeled=0)
    with pytest.raises(ValueError, match='no folder unlabeled_images'): go(data, tmp_path/'out')
    with pytest.raises(ValueError, match='bs is 1'): go(trained_discs, tmp_path/'out', bs=1)
    assert not untrained and not (tmp_path/'out').exists()
