"Plans and jobs: what is checked, the command, the events that are followed, and how a run ends"
import json, time
from dataclasses import replace

import pytest

import semisup_seg.app.job as J
from semisup_seg.app.cli import parser
from semisup_seg.app.job import Job, Plan, Progress

WHOLE = Plan('d', 'o', 'data & model distillation', ('CGNet', 'PAN'), 2, 'MANet', 'resnet34', ('Gamma', 'V Flip'), 'naive', 64, 4, 300, 0.1, 7, True, True)

# --- the plan

def test_the_command_line_understands_a_plan():
    o = parser().parse_args(WHOLE.argv())
    assert (o.command, o.data, o.out, o.target)==('distill', 'd', 'o', ['MANet', 'resnet34'])
    assert o.base==[['CGNet']]*2+[['PAN', 'resnet34']]*2 and (o.views, o.recipe)==(['Gamma', 'V Flip'], 'naive')
    assert (o.size, o.bs, o.steps, o.lr, o.seed, o.scratch, o.fresh)==([64, 64], 4, 300, 0.1, 7, True, True)
    o = parser().parse_args(replace(WHOLE, routine='simple training', lr=0, scratch=False, fresh=False).argv())
    assert (o.command, o.network, o.lr, o.scratch, o.fresh)==('train', ['MANet', 'resnet34'], 0, False, False)

def test_a_routine_uses_its_own_fields_only():
    assert replace(WHOLE, routine='model distillation').active_views==[]
    assert len(replace(WHOLE, routine='data distillation', teachers=('PAN',)).bases)==1
    assert replace(WHOLE, routine='simple training').bases==[]

def test_a_plan_that_cannot_run_says_why(discs):
    good = Plan(str(discs), str(discs.parent/'out'), teachers=('CGNet',), target='CGNet', size=32)
    assert good.check().counts['unlabeled']==5
    wrong = [(dict(data=' '), 'data set folder is not named yet'), (dict(out=''), 'folder for the results is not named yet'),
        (dict(data='nowhere'), 'no such folder'), (dict(teachers=()), 'one teacher; 0 are chosen'), (dict(teachers=('CGNet', 'PAN')), 'one teacher; 2 are chosen'),
        (dict(routine='model distillation'), '1 is chosen'), (dict(views=()), 'at least one view'), (dict(routine='distil'), 'Unknown routine'),
        (dict(recipe='best'), 'Unknown recipe'), (dict(target='CGnett'), "Did you mean 'CGNet'"), (dict(size=16), 'at least')]
    for kw,said in wrong:
        with pytest.raises(ValueError, match=said): replace(good, **kw).check()
    assert not (discs.parent/'out').exists()

# --- the events

def event(kind, share, stage='target_PAN', **facts): return dict(time=time.time(), event=kind, stage=stage, share=share, time_left=None, **facts)

def test_progress_shows_the_last_stage_with_its_epochs():
    scores = [dict(train_loss=1/k, dice=0.1*k) for k in range(1, 11)]
    events = [event('epoch', 0.5, 'base_PAN', epoch=1, epochs=1, steps=50, scores=scores[0]), event('warning', 0.5, '', text='H Flip: <harms>')]
    events += [event('epoch', 0.5+k/20, epoch=k, epochs=10, steps=50, scores=s) for k,s in enumerate(scores, 1)]
    events[-1].update(time_left=250)
    p = Progress(events)
    assert (p.share, p.stage, len(p.epochs))==(1, 'target_PAN', 10) and str(p)=='100%, target_PAN, 4 min left'
    shown = p._repr_html_()
    assert 'train loss' in shown and '500 of 500' in shown and '100 of 500' not in shown and '&lt;harms&gt;' in shown
    assert Progress([*events, event('report', 1, '', file='report.html')]).stage=='report'
    assert str(Progress([]))=='0%, starting' and 'value="0.0000"' in Progress([])._repr_html_()

# A run without a network: it waits for the file `go` before each of its events, so that a test has time to look
PROGRAM = '''import json, os, sys, time
from pathlib import Path
out = Path(sys.argv[3])
out.mkdir(exist_ok=True)
if '--fresh' in sys.argv: (out/'events.jsonl').unlink(missing_ok=True)
for k in (1, 2):
    while not (out/f'go{k}').exists(): time.sleep(0.01)
    event = dict(time=time.time(), event='epoch', stage='target_PAN', epoch=k, epochs=2, steps=50, scores=dict(dice=k/2), share=k/2, time_left=None)
    with open(out/'events.jsonl', 'a') as f: print(json.dumps(event), file=f)
'''

@pytest.fixture
def start(monkeypatch, tmp_path):
    "Start a job that runs the given program instead of the command line; the checks of the plan are left out"
    monkeypatch.setattr(Plan, 'check', lambda self: None)
    jobs = []
    def _start(program, **kw):
        monkeypatch.setattr(J, '_PROGRAM', program)
        jobs.append(Job(Plan('data', str(tmp_path/'out'), **kw)))
        return jobs[-1]
    yield _start
    for job in jobs: job.process.kill()

@pytest.mark.parametrize('fresh', [False, True])
def test_a_job_follows_its_own_events(start, tmp_path, fresh):
    out = tmp_path/'out'
    out.mkdir()
    old = event('report', 1, '', file='old.html')
    (out/'events.jsonl').write_text(json.dumps(dict(old, time=old['time']-1))+'\n')
    job = start(PROGRAM, fresh=fresh)
    assert job.events==[] and job.running and not job.done and job.progress.share==0
    (out/'go1').touch()
    events = job.follow(0.01)
    first = next(events)
    assert (first['event'], first['epoch'], job.progress.share)==('epoch', 1, 0.5) and job.running
    (out/'go2').touch()
    assert [e['epoch'] for e in events]==[2]
    assert job.done and job.error=='' and not job.running and job.progress.share==1

def test_an_event_of_the_last_moment_is_not_missed(start, tmp_path):
    (tmp_path/'out').mkdir()
    for k in (1, 2): (tmp_path/f'out/go{k}').touch()
    job = start(PROGRAM)
    job.process.wait()
    assert [e['epoch'] for e in job.follow()]==[1, 2]

def test_a_failure_gives_the_last_line_that_was_printed(start):
    job = start('import sys; print("much"*100_000); print("semisup-seg: ärger\\n\\n", file=sys.stderr); sys.exit(2)')
    assert list(job.follow(0.01))==[] and not job.done and job.error=='semisup-seg: ärger'
    job = start('import os; os._exit(3)')
    job.process.wait()
    assert job.error=='the run ended with status 3 and no message'

def test_a_plan_with_a_fault_starts_no_process(monkeypatch, tmp_path):
    monkeypatch.setattr(J.subprocess, 'Popen', lambda *a, **kw: pytest.fail('a process was started'))
    with pytest.raises(ValueError, match='no such folder'): Job(Plan(str(tmp_path/'nowhere'), str(tmp_path/'out')))
