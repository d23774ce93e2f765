"The record of a run, what it refuses to continue, and its events"
import json, shutil
from types import SimpleNamespace

import numpy as np, pytest, torch
from conftest import make_discs, save, tree
from PIL import Image

import semisup_seg.distillation.run as R
from semisup_seg.distillation.run import EpochEvents, EventLog, describe_event, digest_files, fingerprint, format_seconds, open_run, read_events

# --- fingerprint

def test_fingerprint_belongs_to_the_data_not_to_the_place(tmp_path):
    a,b = make_discs(tmp_path/'a'), make_discs(tmp_path/'b')
    (b/'Images/train/.DS_Store').write_bytes(b'junk')
    assert fingerprint(a)==fingerprint(b)!=fingerprint(make_discs(tmp_path/'c', seed=1))

def test_digest_depends_on_names_contents_and_the_border_between_files(tmp_path):
    files = [tmp_path/'a', tmp_path/'b']
    def _digest(first, second):
        for f,text in zip(files, (first, second)): f.write_text(text)
        return digest_files(tmp_path, files)
    assert _digest('xy', 'z')==_digest('xy', 'z')
    assert len({_digest('xy', 'z'), _digest('x', 'yz'), _digest('xy', 'Z'), digest_files(tmp_path, files[::-1])})==4

def inverted(f): save(f, 255-np.array(Image.open(f)))

def test_a_run_on_changed_data_is_refused(tmp_path):
    changes = dict(
        image=lambda d: inverted(d/'Images/test/test0.png'),
        label=lambda d: inverted(d/'Labels/train/train0.png'),
        unlabeled=lambda d: inverted(d/'unlabeled_images/u0.png'),
        more=lambda d: save(d/'unlabeled_images/u1.png', np.zeros((9, 9), np.uint8)),
        codes=lambda d: (d/'codes.txt').write_text('rest,0\nother,255\n'),
        name=lambda d: (d/'unlabeled_images/u0.png').rename(d/'unlabeled_images/v0.png'))
    data = make_discs(tmp_path/'data', train=1, valid=1, test=1, unlabeled=1)
    open_run(tmp_path/'out', {}, fingerprint(data), True).finish('base')
    for name,change in changes.items():
        other = shutil.copytree(data, tmp_path/name)
        open_run(tmp_path/'out', {}, fingerprint(other), True)
        change(other)
        with pytest.raises(ValueError, match='other the data'): open_run(tmp_path/'out', {}, fingerprint(other), True)

# --- Run and open_run

def test_a_run_resumes_with_its_finished_stages_and_says_how_it_was_made(tmp_path):
    out = tmp_path/'out'
    run = open_run(out, dict(seed=1, size=(32, 48)), 'abc', True)
    run.finish('teacher', steps=7)
    again = open_run(out, dict(seed=1, size=(32, 48)), 'abc', True)
    assert again.done('teacher')==dict(steps=7) and again.done('target') is None
    record = json.loads((out/'run.json').read_text())
    assert record['args']==dict(seed=1, size=[32, 48]) and record['data']=='abc' and set(record['stages'])=={'start', 'teacher'}
    assert record['versions']['torch'].split('+')[0]==torch.__version__.split('+')[0]
    assert run.stage(out/'round1/target_U-Net.pth')=='round1/target_U-Net'

def test_other_arguments_are_refused_by_name(tmp_path):
    asked = dict(seed=1, bs=4, size=(32, 32), views=['H Flip'], lr=None)
    open_run(tmp_path/'out', asked, 'abc', True).finish('base')
    before = tree(tmp_path)
    for changed in (dict(seed=2), dict(bs=8), dict(size=(32, 48)), dict(views=[]), dict(lr=1e-3), dict(seed=2, bs=2)):
        names = ', '.join(changed)
        with pytest.raises(ValueError, match=f'a run with other {names};.*resume=False'): open_run(tmp_path/'out', {**asked, **changed}, 'abc', True)
    assert tree(tmp_path)==before

def test_a_run_that_has_left_nothing_but_its_record_gives_way_to_another(tmp_path):
    open_run(tmp_path, dict(seed=1), 'abc', True)
    assert open_run(tmp_path, dict(seed=2), 'def', True).record['args']==dict(seed=2)
    (tmp_path/'base_CGNet.checkpoint').write_text('')  # of its first training
    with pytest.raises(ValueError, match='other seed, the data'): open_run(tmp_path, dict(seed=1), 'abc', True)

def test_a_file_that_is_not_the_record_of_a_run_is_kept_and_refused(tmp_path):
    file = tmp_path/'run.json'
    for text in ('', '{}', '[]', '3', 'not json', '{"args": 3}'):
        file.write_text(text)
        for resume in (True, False):
            with pytest.raises(ValueError, match='run.json: is not the record of a run'): open_run(tmp_path, {}, 'abc', resume)
        assert file.read_text()==text

def test_a_folder_with_files_of_others_is_refused(tmp_path):
    (tmp_path/'thesis.txt').write_text('mine')
    for resume in (True, False):
        with pytest.raises(ValueError, match='files that no run has written'): open_run(tmp_path, {}, 'abc', resume)
    assert set(tree(tmp_path))=={'thesis.txt'}

def test_half_written_files_are_deleted_and_do_not_stand_in_the_way(tmp_path):
    (tmp_path/'.123-run.json').write_text('{"ar')
    open_run(tmp_path, {}, 'abc', True)
    (tmp_path/'annotations').mkdir()
    for name in ('.77-target.pth', 'annotations/.77-u0.png', 'annotations/.journal'): (tmp_path/name).write_text('x')
    open_run(tmp_path, {}, 'abc', True)
    assert set(tree(tmp_path))=={'run.json', 'annotations/.journal'}

def test_afresh_deletes_the_outputs_of_every_round_and_nothing_else(tmp_path):
    open_run(tmp_path, dict(seed=1), 'abc', True).finish('target')
    outputs = ['base_CGNet.pth', 'base_CGNet.json', 'target_CGNet.checkpoint', 'annotations/u0.png', 'annotations.csv', 'confidence/u0.png', 'soft/u0.npy',
        'vote/annotations.csv', 'round1/target_CGNet.pth', 'round2/annotations.csv', 'events.jsonl', 'report.json', 'report.html', 'calibration.csv']
    for name in [*outputs, 'notes.txt', 'round-trip.txt', 'figures/1.png']:
        (tmp_path/name).parent.mkdir(exist_ok=True)
        (tmp_path/name).write_text('x')
    run = open_run(tmp_path, dict(seed=2), 'abc', False)
    assert set(tree(tmp_path))=={'run.json', 'notes.txt', 'round-trip.txt', 'figures/1.png'}
    assert set(run.record['stages'])=={'start'}

# --- events

@pytest.fixture
def clock(monkeypatch):
    "A clock that stands still until a test moves it"
    clock = SimpleNamespace(now=1000.)
    monkeypatch.setattr(R, 'time', SimpleNamespace(time=lambda: clock.now))
    return clock

def epoch(k, epochs, **scores): return dict(epoch=k, epochs=epochs, steps=5, scores=scores)

def tell(clock, log, *events):
    "Emit `(seconds since the last one, event, stage, facts)`; the pairs of share and time left that were written"
    for seconds,event,stage,facts in events:
        clock.now += seconds
        log.emit(event, stage, **facts)
        if event=='epoch' and facts['epoch']==facts['epochs']: log.finish_training()
    return [(e['share'], e['time_left']) for e in read_events(log.file.parent)[-len(events):]]

def test_share_rises_to_1_and_the_time_left_follows_from_the_speed_so_far(tmp_path, clock):
    begin = dict(steps=5, epochs=2)
    res = tell(clock, EventLog(tmp_path, 2), (0, 'stage', 'base', begin), (10, 'epoch', 'base', epoch(1, 2)), (10, 'epoch', 'base', epoch(2, 2)),
        (0, 'annotation', 'annotations', dict(images=3, votes=2)), (20, 'stage', 'target', begin), (20, 'epoch', 'target', epoch(1, 2)),
        (20, 'epoch', 'target', epoch(2, 2)), (5, 'report', '', dict(file='out/report.html')))
    assert res==[(0, None), (0.25, 30), (0.5, 20), (0.5, 20), (0.5, 40), (0.75, 20), (1, 0), (1, 0)]
    events = read_events(tmp_path)
    assert [e['time'] for e in events]==[1000, 1010, 1020, 1020, 1040, 1060, 1080, 1085]
    assert events[1]==dict(time=1010, event='epoch', stage='base', epoch=1, epochs=2, steps=5, scores={}, share=0.25, time_left=30)

def test_the_report_is_the_end_of_a_run_that_trained_fewer_networks_than_it_said(tmp_path, clock):
    assert tell(clock, EventLog(tmp_path, 3), (0, 'stage', 'target', dict(steps=5, epochs=2)), (9, 'report', '', dict(file='out/report.html')))==[(0, None), (1, 0)]

def test_the_time_of_a_resumed_run_is_that_of_what_is_left(tmp_path, clock):
    log = EventLog(tmp_path, 2)
    log.finish_training()
    res = tell(clock, log, (0, 'skipped', 'base', {}), (0, 'skipped', 'annotations', {}), (1, 'stage', 'target', dict(steps=5, epochs=4)),
        (0, 'resumed', 'target', dict(epoch=2, epochs=4)), (10, 'epoch', 'target', epoch(3, 4)), (10, 'epoch', 'target', epoch(4, 4)))
    assert res==[(0.5, None), (0.5, None), (0.5, None), (0.75, None), (0.875, 10), (1, 0)]

def test_read_events_leaves_out_an_incomplete_last_line(tmp_path):
    assert read_events(tmp_path)==[]
    log = EventLog(tmp_path, 1)
    log.emit('warning', text='färbt ab')
    with open(log.file, 'a', encoding='utf-8') as f: f.write('{"time": 17')
    assert [e['text'] for e in read_events(tmp_path)]==['färbt ab']
    EventLog(tmp_path, 1).emit('warning', text='again')  # a run that goes on does not append to it
    assert [e['text'] for e in read_events(tmp_path)]==['färbt ab', 'again']

LINES = {}
LINES['base: training, 10 steps'] = dict(event='stage', stage='base', steps=5, epochs=2)
LINES['2 trainings of 10 steps at 32×48 pixels: about 2 min on this computer'] = dict(event='plan', stage='', trainings=2, steps=10, size=[32, 48], seconds=100.)
LINES['base: learning rate 0.0031, found by a trial run'] = dict(event='rate', stage='base', lr=0.0031)
LINES['base: step 5 of 10, train loss 0.250, dice 0.712; 2 min left'] = dict(event='epoch', stage='base', **epoch(1, 2, train_loss=0.25, dice=0.7123), time_left=130.)
LINES['base: step 10 of 10, dice 1.000'] = dict(event='epoch', stage='base', **epoch(2, 2, dice=1.), time_left=None)
LINES['base: finished already'] = dict(event='skipped', stage='base')
LINES['target: going on after epoch 1 of 2'] = dict(event='resumed', stage='target', epoch=1, epochs=2)
LINES['annotations: 3 images, 2 votes each'] = dict(event='annotation', stage='annotations', images=3, votes=2)
LINES['V Flip: does it suit?'] = dict(event='warning', stage='', text='V Flip: does it suit?')
LINES['report: out/report.html'] = dict(event='report', stage='', file='out/report.html')
LINES[''] = dict(event='of another kind', stage='base')

def test_each_kind_of_event_is_described_in_one_line():
    for line,event in LINES.items(): assert describe_event(event)==line
    assert [format_seconds(s) for s in (0, 89.4, 90, 5399, 5400)]==['0 s', '89 s', '2 min', '90 min', '1.5 h']

def test_the_terminal_prints_what_the_training_does_not_show(tmp_path, monkeypatch, capsys):
    for on_screen in (False, True):
        monkeypatch.setattr(R, 'on_screen', lambda: on_screen)
        log = EventLog(tmp_path, 1)
        for event in LINES.values(): log.emit(**{k: v for k,v in event.items() if k!='time_left'})
        hidden = {'resumed', 'epoch'} if on_screen else {'resumed'}  # `fit` tells of the first, its bar shows the second
        written = [e for e in read_events(tmp_path)[-len(LINES):] if e['event'] not in hidden]
        assert capsys.readouterr().out.splitlines()==[describe_event(e) for e in written if describe_event(e)]

def test_the_epochs_of_a_trial_run_are_no_events(tmp_path):
    events = EpochEvents(EventLog(tmp_path, 1), 'base', 3)
    events.learn = SimpleNamespace(lr_finder=True, history=[], epoch=0)
    events.before_epoch()
    events.after_epoch()
    assert not read_events(tmp_path)
