"The form: its fields, what it refuses, and a real run that is stopped, resumed and looked at"
import signal, time

import pytest

import semisup_seg.app.job as J
from semisup_seg.annotation.records import read_annotations
from semisup_seg.app.form import run_form
from semisup_seg.app.job import Plan
from semisup_seg.evaluation.report import read_report

TINY = dict(encoder='test_resnet', scratch=True, size=32, bs=4, steps=16, lr=1e-3)

def form(path, out, **kw): return run_form(path, **{**dict(TINY, out=str(out)), **kw})

# --- the fields

def test_fields_hold_what_the_plan_says():
    plan = Plan('d', 'o', 'model distillation', ('CGNet', 'PAN'), 2, 'MANet', 'resnet34', ('Gamma', 'V Flip'), 'naive', 64, 4, 300, 0.1, 7, True, True)
    assert run_form(**vars(plan)).plan==plan

def test_names_are_understood_as_everywhere():
    f = run_form('data', teachers=('cgnet',), target='unet', views=('h flip',))
    assert f.plan.teachers==('CGNet',) and f.plan.target=='U-Net' and f.plan.views==('H Flip',)

def test_menus_describe_what_they_offer():
    f = run_form('data')
    for k,n in dict(routine=4, teachers=10, target=10, views=14, recipe=2).items():
        labels = [label for label,_ in f.fields[k].options]
        assert len(labels)==n and all(len(label.partition(': ')[2])>5 for label in labels), labels

def test_what_menus_and_ranges_do_not_have_is_refused():
    wrong = [(dict(teachers=('Unet5',)), "Did you mean 'U-Net'"), (dict(target='nonet'), 'Unknown network'), (dict(views=('H Flop',)), "Did you mean 'H Flip'"),
        (dict(routine='distil'), 'Unknown routine'), (dict(recipe='best'), 'Unknown recipe'), (dict(size=8), 'from 32 to 2048'), (dict(bs=1), 'from 2 to 512')]
    for kw,said in wrong:
        with pytest.raises(ValueError, match=said): run_form('data', **kw)

def test_a_hidden_field_counts_for_nothing(discs, tmp_path):
    f = form(discs, tmp_path/'out', routine='model distillation', each=2)
    assert len(f.plan.bases)==2
    f.fields['routine'].value = 'data distillation'
    assert f.fields['each'].layout.display=='none' and f.fields['views'].layout.display is None
    f.check.click()
    assert 'The run can start' in f.answer.value

# --- what is wrong

def test_mistakes_are_told_and_nothing_is_started(discs, tmp_path):
    for kw,said in ((dict(path=''), 'not named yet'), (dict(path='nowhere'), 'no such folder'), (dict(teachers=()), 'one teacher; 0 are chosen')):
        f = form(**{'path': discs, 'out': tmp_path/'out', **kw})
        for b in (f.check, f.start):
            f.answer.value = ''
            b.click()
            assert said in f.answer.value and 'role="alert"' in f.answer.value and f.job is None
    assert not (tmp_path/'out').exists()

def test_every_fault_of_a_folder_is_named(discs, tmp_path):
    for i in (0, 1): (discs/f'Labels/train/train{i}.png').unlink()
    f = form(discs, tmp_path/'out')
    f.check.click()
    assert 'train0.png: no label' in f.answer.value and 'train1.png: no label' in f.answer.value and '<br>' in f.answer.value

def test_the_end_of_a_run_that_failed_is_told(discs, tmp_path, monkeypatch):
    monkeypatch.setattr(J, '_PROGRAM', 'print("semisup-seg: out: <holds> files that no run has written"); raise SystemExit(2)')
    f = form(discs, tmp_path/'out')
    f.start.click()
    f.thread.join(60)
    assert '&lt;holds&gt; files that no run has written' in f.answer.value and 'role="alert"' in f.answer.value and f.report.value==''

# --- a run

@pytest.fixture
def background():
    "A shell that starts a program in the background lets it ignore interruptions, and so all that this program starts"
    old = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, old)

def test_a_run_is_stopped_and_resumed_to_its_report(discs, tmp_path, background):
    f = form(discs, tmp_path/'out')
    f.start.click()
    while len(f.job.progress.epochs)<2 and f.job.running: time.sleep(0.05)
    f.start.click()
    assert 'going on already' in f.answer.value
    f.stop.click()
    f.thread.join(60)
    stopped = f.job.progress
    assert 'resumes after the last finished epoch' in f.answer.value and stopped.stage=='base_U-Net_test_resnet' and not (tmp_path/'out/report.json').exists()
    f.start.click()
    f.thread.join(120)
    resumed = [e for e in f.job.events if e['event']=='epoch' and e['stage']==stopped.stage]
    assert 1<resumed[0]['epoch']<=stopped.epochs[-1]['epoch']+1
    assert f.job.progress.share==1 and 'value="1.0000"' in f.progress.value
    assert 'Gain over teacher' in f.report.value and str(tmp_path/'out/report.html') in f.answer.value
    assert read_report(tmp_path/'out').settings['epochs']==16
    f.look.click()
    f.annotations.children[0].accept.click()
    assert 'accepted' in [r.judgement for r in read_annotations(tmp_path/'out').rows]
    f.stop.click()
    assert 'No run is going on' in f.answer.value
