"What is finished stays finished, what has changed is made again, and nothing that is not ours is touched"
import hashlib, os
from pathlib import Path

import numpy as np, pytest, torch
from conftest import Bright, Greedy, counted, disc, is_disc, pictures, python, save, tree
from PIL import Image

from semisup_seg.annotation.annotate import annotate, write_masks
from semisup_seg.annotation.journal import AnnotationJournal, ImageJob, PartialVotes, file_stamp, mask_names
from semisup_seg.annotation.records import AnnotationRecord, read_annotations
from semisup_seg.annotation.voting import VoteAccumulator
from semisup_seg.data.folder import unlabeled_files

@pytest.fixture
def files(trained_discs): return unlabeled_files(trained_discs)

ALL = 'annotations.csv', 'annotations/.journal'

# --- names of masks

def test_masks_are_named_after_their_images():
    def names(*files): return list(mask_names(files).values())
    assert names(Path('a/x.png'), Path('b/y.tif'), Path('b/x.y.bmp'))==['x.png', 'y.png', 'x.y.png']
    stems = [Path('a/x.png'), Path('b/x.png'), Path('b/X.bmp')]
    got = names(*stems)
    assert len({n.lower() for n in got})==3 and got==names(*stems) and [n[0] for n in got]==['x', 'x', 'X']
    assert got[0]==f'x-{hashlib.sha256(stems[0].resolve().as_posix().encode()).hexdigest()[:8]}.png'
    assert dict(zip(stems, got))[stems[1]]==mask_names(stems[:2])[stems[1]]  # whatever else has the stem

@pytest.mark.parametrize('call', [annotate, write_masks])
def test_same_stems_get_a_mask_each(tmp_path, call):
    truth = {}
    for i,n in enumerate(('a/x.png', 'b/x.png', 'b/x.bmp', 'b/X.tif', 'b/y.png')):
        truth[tmp_path/n] = disc(60, 70, np.random.default_rng(i))
        save(tmp_path/n, np.uint8(truth[tmp_path/n]*200+20))
    for _ in range(2):
        got = call(Bright(), list(truth), tmp_path/'out')
        pairs = got.pairs if call is annotate else dict(zip(truth, got))
        assert len({str(m).lower() for m in pairs.values()})==5 and pairs[tmp_path/'b/y.png'].name=='y.png' and list(pairs)==list(truth)
        for f,m in pairs.items(): assert is_disc(m, truth[f]) and m.stem.startswith(f.stem)

# --- whose files they are

def test_foreign_file_is_refused_and_left_alone(tiny, files, tmp_path):
    for i,name in enumerate(('annotations/notes.txt', 'annotations/mine.png', 'annotations/sub/a.png', 'confidence/c.png', 'soft/s.npy')):
        out = tmp_path/str(i)
        save(out/name, np.ones((9, 9), np.uint8), format='png')
        before = tree(out)
        with pytest.raises(ValueError, match='which no run has written'): annotate(tiny, files, out)
        assert tree(out)==before, name

def test_foreign_mask_beside_an_earlier_run(tiny, files, tmp_path):
    annotate(tiny, files[:2], tmp_path)
    save(tmp_path/'annotations/mine.png', np.ones((9, 9), np.uint8))
    before = tree(tmp_path)
    with pytest.raises(ValueError, match='mine.png'): annotate(tiny, files, tmp_path)
    assert tree(tmp_path)==before

def test_masks_named_in_the_table_alone_are_ours(tiny, files, tmp_path):
    annotate(tiny, files, tmp_path)
    (tmp_path/'annotations/.journal').unlink()
    assert len(annotate(tiny, files[:2], tmp_path).pairs)==2
    assert {f.name for f in (tmp_path/'annotations').glob('*.png')}=={f'{f.stem}.png' for f in files[:2]}

def test_killed_before_old_masks_are_deleted_they_are_still_ours(monkeypatch, tiny, files, tmp_path):
    annotate(tiny, files, tmp_path)
    (tmp_path/'annotations.csv').unlink()
    def killed(journal): raise KeyboardInterrupt
    monkeypatch.setattr(AnnotationJournal, '_delete_stale', killed)
    with pytest.raises(KeyboardInterrupt): annotate(tiny, files[:2], tmp_path)
    monkeypatch.undo()
    assert len(annotate(tiny, files[:2], tmp_path).pairs)==2
    assert {f.name for f in (tmp_path/'annotations').glob('*.png')}=={f'{f.stem}.png' for f in files[:2]}

# --- going on

def test_a_finished_call_is_not_repeated(tmp_path):
    truth,m = pictures(tmp_path/'in'), Bright()
    (tmp_path/'in/broken.png').write_bytes(b'no')
    pairs = [(f, save(tmp_path/f'labels/{f.name}', np.uint8(d)*193+7)) for f,d in truth.items()]
    args = dict(files=tmp_path/'in', out=tmp_path/'out', views=['H Flip'], valid=pairs[:2], labels=dict(pairs[1:3]))
    for turn in (True, False):
        ann = annotate(m, together=turn, **args)
        n,before = counted(m), tree(tmp_path/'out')
        again = annotate(m, bs=3, **args)
        assert again==ann and counted(m)==n and tree(tmp_path/'out')==before
        assert [r.scores for r in again.rows]==[r.scores for r in ann.rows] and again.rows[1].voter_scores==ann.rows[1].voter_scores

def test_only_new_and_changed_images_are_seen(tmp_path):
    truth,m = pictures(tmp_path/'in'), Bright()
    annotate(m, tmp_path/'in', tmp_path/'out', bs=1)
    n = counted(m)
    save(tmp_path/'in/new.png', np.full((30, 30), 220, np.uint8))
    save(tmp_path/'in/p2.png', np.full((30, 31), 220, np.uint8))
    ann = annotate(m, tmp_path/'in', tmp_path/'out', bs=1)
    assert counted(m)==n+2 and len(ann)==6 and (np.array(Image.open(ann.pairs[tmp_path/'in/p2.png']))==200).all()
    ann.pairs[tmp_path/'in/p0.png'].unlink()
    assert len(annotate(m, tmp_path/'in', tmp_path/'out', bs=1).pairs)==6 and counted(m)==n+3
    assert len(annotate(m, list(truth)[:2], tmp_path/'out', bs=1))==2 and counted(m)==n+3
    assert {f.name for f in (tmp_path/'out/annotations').glob('*.png')}=={'p0.png', 'p1.png'}

def test_another_label_is_another_score(tmp_path):
    truth,m = pictures(tmp_path/'in', 3), Bright()
    f = next(iter(truth))
    good,bad = (save(tmp_path/f'{k}.bmp', np.uint8(truth[f]^k)*193+7) for k in (False, True))
    for o in (good, bad): os.utime(o, ns=(1, 1))  # as large and as old as each other
    def dice(**kw): return [r.dice for r in annotate(m, tmp_path/'in', tmp_path/'out', bs=1, **kw).rows]
    scores = [dice(labels={f: o})[0] for o in (good, bad)]
    assert scores[0]>0.9>0.1>scores[1] and dice()==[None]*3 and dice(labels={f: good})[0]==scores[0]
    n = counted(m)
    save(good, np.uint8(~truth[f])*193+7)
    assert dice(labels={f: good})[0]==scores[1] and counted(m)==n+1

def test_an_image_may_be_annotated_and_be_a_validation_image(tmp_path):
    truth,m = pictures(tmp_path/'in', 3), Bright()
    pairs = {f: save(tmp_path/f'labels/{f.name}', np.uint8(d)*193+7) for f,d in truth.items()}
    for labels in ({}, pairs):
        for _ in range(2):
            ann = annotate(m, list(truth), tmp_path/f'out{len(labels)}', valid=pairs.items(), labels=labels)
            assert [r.image for r in ann.rows]==[r.image for r in ann.checked]==[*map(str, truth)]
            assert len(ann.pairs)==3 and all(r.dice>0.9 for r in ann.checked)
    assert counted(m)==12

def test_what_a_reviewer_wrote_stays(tiny, files, tmp_path):
    ann = annotate(tiny, files, tmp_path)
    ann.rows[2].used = False
    ann.rows[2].judgement = 'rejected'
    ann.rows[3].extra = dict(remark='sharp')
    ann.save()
    for _ in range(2):
        rows = annotate(tiny, files, tmp_path).rows
        assert [r.used for r in rows]==[True, True, False, True, True]
        assert [r.judgement for r in rows]==['', '', 'rejected', '', ''] and rows[3].extra['remark']=='sharp'

OTHER = dict(views=['V Flip'], size=(32, 64), vote='majority', weights=[2.], window=64, confidence=True, soft=True)

def test_another_question_uses_no_old_mask(files, tmp_path):
    for what in (*OTHER, 'teachers'):
        m,other = Bright(), Bright(61.)
        args = dict(teachers=m, files=files, out=tmp_path/what, views=['H Flip'])
        annotate(**args)
        n = counted(m)
        annotate(**args | (dict(teachers=other) if what=='teachers' else {what: OTHER[what]}))
        assert counted(m)+counted(other)>=n+5 and len(read_annotations(tmp_path/what))==5, what
        annotate(**args)
        assert tree(tmp_path/what).keys()=={*ALL, *(f'annotations/{f.stem}.png' for f in files)}, what

KILLER = """
import os, signal, sys, time
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[4])
torch.set_num_threads(1)
from conftest import Bright
from semisup_seg.annotation.annotate import annotate
class Slow(Bright):
    def forward(self, x):
        time.sleep(0.05)
        return super().forward(x)
src, out, plain = map(Path, sys.argv[1:4])
def run(kind, to): annotate([kind(), kind()], src, to, ['H Flip'], bs=2, soft=True, confidence=True, together=False, valid=[])
def child(kind, to):
    if pid := os.fork(): return pid
    try: run(kind, to)
    finally: os._exit(0)
done, kills = lambda: len(list((out/'annotations').glob('*.png')) + list(out.glob('.sums-*/*total.npy'))), 0
while True:
    start, pid = done(), child(Slow, out)
    while os.waitpid(pid, os.WNOHANG)==(0, 0):
        if kills<4 and done()>=start+2:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            kills += 1
            break
        time.sleep(0.005)
    else: break
os.waitpid(child(Bright, plain), 0)
print(kills)"""

def test_killed_again_and_again_it_ends_like_an_unbroken_one(tmp_path):
    pictures(tmp_path/'in', 12)
    res = python(KILLER, tmp_path/'in', tmp_path/'out', tmp_path/'plain', os.path.dirname(__file__), timeout=120)
    assert res.stdout.split()[-1]=='4', res.stderr
    a,b = tree(tmp_path/'out'), tree(tmp_path/'plain')
    for t in (a, b): t.pop('annotations/.journal')
    assert a==b and len(a)==3*12+1

def test_a_torn_journal(files, tmp_path):
    m = Bright()
    before = (annotate(m, files, tmp_path, bs=1), tree(tmp_path))
    j,n = tmp_path/'annotations/.journal', counted(m)
    j.write_text(j.read_text()[:-20])
    (tmp_path/'annotations.csv').unlink()
    (tmp_path/'annotations/.77-u4.png').write_bytes(b'half')
    assert annotate(m, files, tmp_path, bs=1)==before[0] and counted(m)==n+1
    assert tree(tmp_path).keys()==before[1].keys()

# --- teachers one after another

def test_interrupted_between_teachers_the_first_is_not_asked_again(tmp_path):
    pictures(tmp_path/'in')
    first,bad,good = Bright(5.), Greedy(0, KeyboardInterrupt()), Bright()
    with pytest.raises(KeyboardInterrupt): annotate([first, bad], tmp_path/'in', tmp_path/'out', together=False, bs=2)
    n = counted(first)
    assert n==5
    ann = annotate([first, good], tmp_path/'in', tmp_path/'out', together=False, bs=2)  # the weights are the same, so it is the same call
    assert counted(first)==n and counted(good)==5 and len(ann.pairs)==5
    plain = annotate([Bright(5.), Bright()], tmp_path/'in', tmp_path/'plain', bs=2)
    assert [r.confidence for r in ann.rows]==[r.confidence for r in plain.rows]

def test_votes_on_an_image_that_has_changed_do_not_wait(tmp_path):
    files = list(pictures(tmp_path/'in'))
    with pytest.raises(KeyboardInterrupt): annotate([Bright(5.), Greedy(0, KeyboardInterrupt())], files, tmp_path/'out', together=False)
    save(files[1], 255-np.array(Image.open(files[1])))
    for turn,out in ((False, 'out'), (True, 'plain')): annotate([Bright(5.), Bright()], files, tmp_path/out, together=turn)
    assert tree(tmp_path/'out/annotations')[files[1].name]==tree(tmp_path/'plain/annotations')[files[1].name]
    assert [r.confidence for r in read_annotations(tmp_path/'out').rows]==[r.confidence for r in read_annotations(tmp_path/'plain').rows]

def votes_of(*probs):
    votes = VoteAccumulator()
    for p in probs: votes.add(p, 2)
    return votes

def test_waiting_votes_are_added_once(tmp_path, monkeypatch):
    a,b = (torch.rand(2, 3, 8, 8).softmax(1) for _ in range(2))
    partial,scores = PartialVotes(tmp_path, 'call', 3), [[{'image': dict(dice=0.5)}], []]
    partial.save('0', 0, votes_of(a), scores)
    assert (partial.has('0', 0), partial.has('0', 1), partial.has('1', 0))==(True, False, False)
    real = np.save
    def fails(f, o):
        if o.dtype==np.float32: raise OSError('disk full')
        real(f, o)
    monkeypatch.setattr(np, 'save', fails)
    with pytest.raises(OSError): partial.save('0', 1, votes_of(a, b), scores)
    monkeypatch.undo()
    for k,ps in enumerate(([a], [a, b])):
        if k: partial.save('0', 1, votes_of(*ps), scores)
        got = VoteAccumulator()
        assert partial.load('0', k, got)==scores and partial.has('0', 0) and partial.has('0', k)
        want = votes_of(*ps)
        assert torch.equal(got.total, want.total) and got.weight==want.weight and all(map(torch.equal, got.labels, want.labels))
        assert len(got.labels)==k+1
    assert len(list(partial.folder.iterdir()))==3
    got.add(b, 2)
    assert torch.equal(partial.load('0', 1, again := VoteAccumulator()) and again.total, want.total)  # the file is as it was

def test_waiting_votes_go_where_the_next_teacher_votes(monkeypatch, files, tmp_path):
    partial,votes,asked = PartialVotes(tmp_path, 'call', 2), VoteAccumulator(), []
    partial.save('0', 0, votes_of(torch.rand(1, 2, 8, 8)), [None])
    partial.load('0', 0, votes, torch.device('meta'))
    assert {o.device.type for o in (votes.total, *votes.labels)}=={'meta'}
    real = PartialVotes.load
    def load(self, batch, k, votes, *device):
        asked.extend(device)
        return real(self, batch, k, votes, *device)
    monkeypatch.setattr(PartialVotes, 'load', load)
    annotate([Bright(5.), Bright()], files, tmp_path/'out', together=False)
    assert asked==[Bright().w.device]

def test_waiting_votes_of_another_call_are_deleted(tmp_path):
    old = PartialVotes(tmp_path, 'old', 2)
    old.save('0', 0, votes_of(torch.rand(1, 2, 8, 8)), [None])
    new = PartialVotes(tmp_path, 'new', 2)
    assert not old.folder.exists() and not new.has('0', 0)
    new.drop()

# --- the journal alone

def test_a_journal_takes_over_what_is_current(tmp_path):
    image,label = save(tmp_path/'in/a.png', np.zeros((9, 9), np.uint8)), save(tmp_path/'l.png', np.zeros((9, 9), np.uint8))
    jobs = [ImageJob(image), ImageJob(image, label, write=False)]
    def journal(jobs=jobs, size=64): return AnnotationJournal(tmp_path/'out', dict(size=size), jobs)
    j = journal()
    mask = save(tmp_path/'out/annotations/a.png', np.zeros((9, 9), np.uint8))
    j.add(jobs[0], AnnotationRecord(str(image), 'annotations/a.png', 0.5, 0.5, 0.5, stamp=file_stamp(image)))
    j.add(jobs[1], AnnotationRecord(str(image), label=str(label), dice=0.5, stamp=file_stamp(image, label)))
    assert journal().ordered()==j.ordered()
    assert journal(jobs[1:]).ordered()==j.ordered()[1:] and not mask.exists()  # no job of the call has this mask
    assert list(journal().records)==[jobs[1].key]
    save(label, np.zeros((9, 10), np.uint8))
    assert not journal().records and not journal(size=32).records
