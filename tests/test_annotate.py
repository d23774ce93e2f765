"The vote by hand, masks that match their images, and nothing half-done that looks whole"
import csv, gc, os, resource, weakref

import numpy as np, pytest, torch
from conftest import disc, make_model, photo, python, save, tree
from PIL import Image

import semisup_seg.annotation.annotate as N
from semisup_seg.annotation.annotate import annotate, validation_dice, write_masks
from semisup_seg.training.inference import opinions
from semisup_seg.core import DatasetError
from semisup_seg.data.images import load_image, load_mask, parse_codes
from semisup_seg.data.folder import split_files, unlabeled_files
from semisup_seg.data.loaders import resize_image
from semisup_seg.training.inference import predict, save_model, probs_to_mask
from semisup_seg.annotation.records import COLUMNS, read_annotations
from semisup_seg.annotation.views import get_views, views
from semisup_seg.annotation.voting import vote

@pytest.fixture
def files(trained_discs): return unlabeled_files(trained_discs)

class Bright(torch.nn.Module):
    "Calls what is brighter than half the second class, surely; a teacher whose masks anyone can check"
    config,size,codes,min_size = dict(name='Bright'), (48, 64), parse_codes('rest,7\ndisc,200'), 16
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(60.))
        self.seen = []
    def forward(self, x):
        self.seen.append(len(x))
        return torch.cat([0*x[:, :1], (x[:, :1]-0.5)*self.w], 1)

def pictures(folder, n=5):
    "`n` images of different sizes with a bright disc at different places; and where it is"
    rng,res = np.random.default_rng(1), {}
    for i in range(n):
        d = disc(50+20*i, 90-9*(i%6), rng)
        res[save(folder/f'p{i}.png', np.uint8(d*200+20))] = d
    return res

# --- image and mask

@pytest.mark.parametrize('names', [[], ['H Flip'], ['H+V Flip', 'V Flip'], ['H Flip', 'V Flip', 'H+V Flip', 'Gamma', 'Median Blur', 'Bilateral Filter']])
@pytest.mark.parametrize('bs', [1, 2, 8])
def test_each_mask_matches_its_image(tmp_path, names, bs):
    truth = pictures(tmp_path/'in')
    ann = annotate(Bright(), tmp_path/'in', tmp_path/'out', names, bs=bs)
    assert list(ann.pairs)==list(truth)
    for f,mask in ann.pairs.items():
        m = np.array(Image.open(mask))
        assert m.shape==truth[f].shape and set(np.unique(m))=={7, 200}
        assert ((m==200)==truth[f]).mean()>0.96

def test_rotated_image_gives_an_upright_mask(tmp_path):
    rng = np.random.default_rng(0)
    d = disc(60, 100, rng)
    exif = Image.Exif()
    exif[0x0112] = 6
    f = save(tmp_path/'in/a.jpg', np.rot90(np.uint8(d*200+20), 1).copy(), exif=exif, quality=95)
    m = np.array(Image.open(next(iter(annotate(Bright(), [f], tmp_path/'out', ['H Flip']).pairs.values()))))
    assert m.shape==(60, 100) and ((m==200)==d).mean()>0.96
    assert (np.array(Image.open(write_masks(Bright(), [f], tmp_path/'more')[0]))==m).all()

@pytest.mark.parametrize('codes', ['rest,3\na,300,5', 'rest,0\na,255', 'rest,1\na,2\nb,65535'])
def test_masks_hold_only_values_of_the_codes(tmp_path, files, codes):
    m = make_model(codes, codes.count('\n')+1)
    firsts = {v[0] for v in m.codes.values}
    for f,mask in annotate(m, files, tmp_path, ['Gamma']).pairs.items():
        assert set(np.unique(load_mask(mask)))<=firsts and load_mask(mask, m.codes).shape==load_image(f).shape[:2]

# --- the vote

def test_vote_is_the_mean_of_softmax_undone(tiny, files):
    other,arrays = make_model(seed=1), [resize_image(load_image(f), (32, 48)) for f in files]
    x = torch.from_numpy(np.stack(arrays)).movedim(-1, 1)/255
    with torch.no_grad():
        p = [m(x).softmax(1) for m in (tiny, other)] + [m(x.flip(-1)).softmax(1).flip(-1) for m in (tiny, other)]
        mean,agree = vote(opinions([tiny, other], arrays, get_views('H Flip')))
    want = sum(p)/4
    assert torch.allclose(mean, want, atol=1e-5)
    for i,a in enumerate(agree):
        won = want[i].argmax(0)==1
        scores = [2*((q[i].argmax(0)==1)&won).sum()/((q[i].argmax(0)==1).sum()+won.sum()) for q in p]
        assert a.item()==pytest.approx(np.mean([s.nan_to_num(1).item() for s in scores]), abs=1e-5)

def test_what_is_written_is_the_vote(tiny, files, tmp_path):
    ann = annotate(tiny, files[:2], tmp_path, ['V Flip'], size=(32, 32))
    for f,row in zip(files, ann.rows):
        x = torch.from_numpy(resize_image(load_image(f), (32, 32))).movedim(-1, 0)[None]/255
        with torch.no_grad(): p = (tiny(x).softmax(1) + tiny(x.flip(-2)).softmax(1).flip(-2))/2
        mask,conf = probs_to_mask(p[0], load_image(f).shape[:2])
        assert (load_mask(tmp_path/row['mask'], tiny.codes)==mask).mean()>0.999 and row['confidence']==pytest.approx(conf.mean(), abs=1e-4)

def test_no_views_is_what_the_teacher_predicts(tiny, files, tmp_path):
    for f,mask in annotate(tiny, files, tmp_path).pairs.items(): assert (load_mask(mask, tiny.codes)==predict(tiny, f)).mean()>0.999

def test_training_mode_is_left(files, tmp_path):
    m = make_model().train()
    a,b = (annotate(m, files, tmp_path/o).rows for o in 'ab')
    assert a==b and not m.training

# --- the table

def test_table_is_complete_and_read_again(tiny, files, tmp_path):
    ann = annotate(tiny, files, tmp_path, ['Gamma'])
    with open(tmp_path/'annotations.csv', newline='', encoding='utf-8') as f: rows = list(csv.DictReader(f))
    assert tuple(rows[0])==COLUMNS and {r['predicted_dice'] for r in rows}=={''} and [r['image'] for r in rows]==[str(f) for f in files]
    for r in rows: assert 0.5<=float(r['confidence'])<=1 and 0<=float(r['agreement'])<=1 and 0<=float(r['entropy'])<=1 and (tmp_path/r['mask']).is_file()
    assert tree(tmp_path).keys()=={'annotations.csv', 'annotations/.journal', *(f'annotations/{f.stem}.png' for f in files)}
    again = read_annotations(tmp_path)
    assert again==ann and len(again.pairs)==5 and f'{len(files)} annotations' in repr(again)
    assert [r['agreement'] for r in again.ranked()]==sorted(float(r['agreement']) for r in rows)

def test_awkward_file_names_survive(tiny, tmp_path):
    for n in ('a, b.png', 'quote".png', 'ä ö.png', 'x.y.png'): save(tmp_path/'in'/n, np.uint8(np.random.default_rng(0).integers(0, 255, (20, 30))))
    annotate(tiny, tmp_path/'in', tmp_path/'out')
    assert read_annotations(tmp_path/'out').pairs=={f: tmp_path/'out/annotations'/f'{f.stem}.png' for f in (tmp_path/'in').iterdir()}

# --- what is refused

@pytest.mark.parametrize('codes,n', [('rest,0\nblob,255', 2), ('rest,0\ndisc,254', 2), ('rest,0\na,1\nb,2', 3), (None, 2)])
def test_teachers_with_different_classes(tiny, files, tmp_path, codes, n):
    other = make_model(codes or 'rest,0\ndisc,255', n)
    if codes is None: other.codes = None
    with pytest.raises(ValueError, match='teachers: .*must be the same'): annotate([tiny, other], files, tmp_path/'out')
    assert not (tmp_path/'out').exists()

@pytest.mark.parametrize('bad,message', [
    (dict(teachers=[]), 'teachers: none'), (dict(files=[]), 'files: no images'), (dict(views=['Rotate']), 'Unknown view'), (dict(size=(4, 4)), 'size is'),
    (dict(views=['Gamma', 'gamma']), 'more than once'), (dict(bs=0), 'bs is 0'), (dict(bs=-1), 'bs is -1'), (dict(bs=2.5), 'bs is 2.5'), (dict(vote='mode'), 'Unknown vote'),
    (dict(weights=[1, 1]), 'weights'), (dict(weights=[-1]), 'weights'), (dict(weights=[0]), 'weights'),
    (dict(window=3), 'window is 3'), (dict(teachers=['nowhere.pth']), 'nowhere.pth: no such file')])
def test_bad_arguments_leave_an_earlier_result_alone(tiny, files, tmp_path, bad, message):
    annotate(tiny, files, tmp_path)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=message): annotate(**{**dict(teachers=tiny, files=files, out=tmp_path), **bad})
    assert tree(tmp_path)==before

def test_size_below_a_networks_minimum(files, tmp_path, tiny):
    annotate(tiny, files, tmp_path)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match='PAN needs'): annotate(make_model(name='PAN', size=(128, 128)), files, tmp_path, size=(64, 64))
    assert tree(tmp_path)==before

def test_a_view_below_a_networks_minimum(files, tmp_path):
    m = make_model(name='PAN', size=(128, 128))
    with pytest.raises(ValueError, match='96 pixels at the smallest view; PAN needs'): annotate(m, files, tmp_path, ['Scale 0.75'])

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
        for f,m in pairs.items(): assert ((np.array(Image.open(m))==200)==truth[f]).mean()>0.96 and m.stem.startswith(f.stem)

@pytest.mark.parametrize('call', [annotate, write_masks])
def test_the_same_file_twice(tiny, files, tmp_path, call):
    with pytest.raises(DatasetError, match='is given 2 times'): call(tiny, [files[0]]*2, tmp_path/'out')
    assert not (tmp_path/'out').exists()

@pytest.mark.parametrize('name', ['notes.txt', 'mine.png', 'sub/a.png'])
def test_foreign_file_is_refused_and_left_alone(tiny, files, tmp_path, name):
    save(tmp_path/'annotations'/name, np.ones((9, 9), np.uint8), format='png')
    before = tree(tmp_path)
    with pytest.raises(ValueError, match='which no run has written'): annotate(tiny, files, tmp_path)
    assert tree(tmp_path)==before

def test_foreign_mask_beside_an_earlier_run(tiny, files, tmp_path):
    annotate(tiny, files[:2], tmp_path)
    save(tmp_path/'annotations/mine.png', np.ones((9, 9), np.uint8))
    before = tree(tmp_path)
    with pytest.raises(ValueError, match='mine.png'): annotate(tiny, files, tmp_path)
    assert tree(tmp_path)==before

def test_images_are_never_overwritten(tiny, tmp_path):
    save(tmp_path/'annotations/a.png', photo(np.ones((20, 30)), np.random.default_rng(0)))
    before = tree(tmp_path)
    for call in (lambda: annotate(tiny, tmp_path/'annotations', tmp_path), lambda: write_masks(tiny, tmp_path/'annotations', tmp_path/'annotations')):
        with pytest.raises(ValueError): call()
        assert tree(tmp_path)==before

@pytest.mark.parametrize('call', [annotate, write_masks])
def test_out_is_a_file(tiny, files, tmp_path, call):
    (tmp_path/'out').write_text('mine')
    with pytest.raises(ValueError, match='out.*is a file'): call(tiny, files, tmp_path/'out')
    assert (tmp_path/'out').read_text()=='mine'

@pytest.mark.parametrize('kind', ['str', 'Path', 'list'])
@pytest.mark.parametrize('call', [annotate, write_masks])
def test_a_single_image(tiny, files, tmp_path, call, kind):
    call(tiny, dict(str=str(files[0]), Path=files[0], list=[str(files[0])])[kind], tmp_path/'out')
    assert [f.name for f in (tmp_path/'out').rglob('*.png')]==[f'{files[0].stem}.png']

@pytest.mark.parametrize('call', [annotate, write_masks])
def test_missing_files_are_named(tiny, files, tmp_path, call):
    for o in ('nowhere', [files[0], 'nowhere'], tmp_path/'nowhere'):
        with pytest.raises(ValueError, match='nowhere: no such file') as e: call(tiny, o, tmp_path/'out')
        assert 'faults' not in str(e.value)
    assert not (tmp_path/'out').exists()

# --- interruption

@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt, OSError])
def test_interruption_leaves_nothing_that_looks_whole(monkeypatch, tiny, files, tmp_path, error):
    annotate(tiny, files, tmp_path)
    calls,real = [], N.to_mask
    def third_fails(*a):
        calls.append(a)
        if len(calls)==3: raise error('stop')
        return real(*a)
    monkeypatch.setattr(N, 'to_mask', third_fails)
    with pytest.raises(error): annotate(tiny, files, tmp_path, ['Gamma'], bs=2)
    assert not (tmp_path/'annotations.csv').exists()
    for f in (tmp_path/'annotations').glob('*.png'): load_mask(f, tiny.codes)
    with pytest.raises(ValueError): read_annotations(tmp_path)
    monkeypatch.undo()
    assert len(annotate(tiny, files, tmp_path).pairs)==5==len(list((tmp_path/'annotations').glob('*.png')))

def test_a_mask_that_cannot_be_written_leaves_no_half_file(monkeypatch, tiny, files, tmp_path):
    def half(self, f, *a, **kw):
        f.write_bytes(b'\x89PNG half')
        raise OSError('disk full')
    monkeypatch.setattr(Image.Image, 'save', half)
    with pytest.raises(OSError): annotate(tiny, files, tmp_path)
    with pytest.raises(OSError): write_masks(tiny, files, tmp_path/'m')
    assert not list(tmp_path.rglob('*.png')) and not (tmp_path/'annotations.csv').exists()

def test_unreadable_images_are_reported_and_do_not_stop_the_rest(tmp_path, capsys):
    truth = pictures(tmp_path/'in')
    for n in ('p1b', 'p9'): (tmp_path/f'in/{n}.png').write_bytes(b'broken')
    ann = annotate(Bright(), tmp_path/'in', tmp_path/'out', ['H Flip'], bs=2)
    assert '2 of 7 images could not be read' in capsys.readouterr().out and 'p1b.png, p9.png' in repr(ann)
    assert list(ann.pairs)==list(truth) and [r['image'] for r in ann.unread]==[str(tmp_path/f'in/{n}.png') for n in ('p1b', 'p9')]
    assert read_annotations(tmp_path/'out')==ann
    for r in ann.unread: assert 'cannot be read' in r['error'] and not r['used'] and r['mask']=='' and r['confidence'] is None
    for f,m in ann.pairs.items(): assert ((np.array(Image.open(m))==200)==truth[f]).mean()>0.96
    save(tmp_path/'in/p9.png', np.full((30, 30), 220, np.uint8))
    assert len(annotate(Bright(), tmp_path/'in', tmp_path/'out', ['H Flip'], bs=2).unread)==1

def test_nothing_but_unreadable_images(tiny, tmp_path):
    (tmp_path/'a.png').write_bytes(b'broken')
    ann = annotate(tiny, [tmp_path/'a.png'], tmp_path/'out', valid=[])
    assert len(ann)==1 and not ann.pairs and 'could not be read' in repr(ann)

# --- going on

def counted(m): return sum(m.seen)

def test_a_finished_call_is_not_repeated(tmp_path):
    truth,m = pictures(tmp_path/'in'), Bright()
    ann = annotate(m, list(truth), tmp_path/'out', ['H Flip'])
    n,before = counted(m), tree(tmp_path/'out')
    assert annotate(m, list(truth), tmp_path/'out', ['H Flip'], bs=3)==ann and counted(m)==n and tree(tmp_path/'out')==before

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

def test_what_was_rejected_stays_rejected(tiny, files, tmp_path):
    ann = annotate(tiny, files, tmp_path)
    ann.rows[2]['used'] = False
    ann.save()
    assert [r['used'] for r in annotate(tiny, files, tmp_path).rows]==[True, True, False, True, True]

OTHER = dict(views=['V Flip'], size=(32, 64), vote='majority', weights=[2.], window=64, confidence=True, soft=True)

@pytest.mark.parametrize('what', [*OTHER, 'teachers'])
def test_another_question_uses_no_old_mask(files, tmp_path, what):
    m,other = Bright(), Bright()
    with torch.no_grad(): other.w += 1
    annotate(m, files, tmp_path, ['H Flip'])
    n = counted(m)
    annotate(**{**dict(teachers=other if what=='teachers' else m, files=files, out=tmp_path, views=['H Flip']), **{k: v for k,v in OTHER.items() if k==what}})
    assert counted(m)+counted(other)>=n+5 and len(read_annotations(tmp_path))==5
    annotate(m, files, tmp_path, ['H Flip'])
    assert tree(tmp_path).keys()=={'annotations.csv', 'annotations/.journal', *(f'annotations/{f.stem}.png' for f in files)}

KILLER = """
import os, signal, sys, time
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[4])
torch.set_num_threads(1)
import test_annotate as T
class Slow(T.Bright):
    def forward(self, x):
        time.sleep(0.15)
        return super().forward(x)
src, out, plain = map(Path, sys.argv[1:4])
def run(kind, to): T.annotate([kind(), kind()], src, to, ['H Flip'], bs=2, soft=True, confidence=True, together=False, valid=[])
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
        time.sleep(0.02)
    else: break
os.waitpid(child(T.Bright, plain), 0)
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

# --- memory, disk

class Greedy(Bright):
    "A network for which memory runs out with more than `most` images"
    def __init__(self, most, error):
        super().__init__()
        self.most,self.error = most, error
    def forward(self, x):
        if len(x)>self.most: raise self.error
        return super().forward(x)

@pytest.mark.parametrize('error', [torch.OutOfMemoryError('CUDA out of memory'), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), MemoryError()])
def test_out_of_memory_halves_the_batch(tmp_path, capsys, error):
    truth,m = pictures(tmp_path/'in', 9), Greedy(2, error)
    ann = annotate(m, tmp_path/'in', tmp_path/'out', ['H Flip'], bs=8)
    assert capsys.readouterr().out.splitlines()==['out of memory: going on with 4 images at once', 'out of memory: going on with 2 images at once']
    assert set(m.seen)=={2, 1} and len(ann.pairs)==9
    for f,k in ann.pairs.items(): assert ((np.array(Image.open(k))==200)==truth[f]).mean()>0.96

def test_out_of_memory_with_one_image(files, tmp_path):
    with pytest.raises(MemoryError, match='single image of 48×64 pixels; choose a smaller size'): annotate(Greedy(0, MemoryError()), files, tmp_path)

def test_another_error_of_a_network_is_not_hidden(files, tmp_path):
    with pytest.raises(RuntimeError, match='device-side assert'): annotate(Greedy(0, RuntimeError('device-side assert')), files, tmp_path)

def test_full_disk(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(6): save(tmp_path/f'in/{i}.png', np.full((40, 40), 220, np.uint8) if i!=3 else rng.integers(0, 256, (48*8, 64*8)).astype(np.uint8))
    m,soft = Bright(), resource.getrlimit(resource.RLIMIT_FSIZE)
    m.size = 48*8, 64*8
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, soft[1]))  # the operating system refuses larger files
    try:
        with pytest.raises(OSError, match='cannot be written .*the same call goes on from there'): annotate(m, tmp_path/'in', tmp_path/'out', bs=1)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, soft)
    assert not (tmp_path/'out/annotations.csv').exists() and {f.name for f in (tmp_path/'out/annotations').iterdir()}>={'.journal', '0.png', '1.png', '2.png'} and not (tmp_path/'out/annotations/3.png').exists()
    n = counted(m)
    assert len(annotate(m, tmp_path/'in', tmp_path/'out', bs=1).pairs)==6 and counted(m)-n<=3

def test_read_only_folder(tiny, files, tmp_path):
    out = tmp_path/'out'
    out.mkdir(mode=0o555)
    if os.geteuid()==0: out = '/proc/annotations'  # the superuser writes everywhere else
    with pytest.raises(OSError, match=f'{out}: cannot be written'): annotate(tiny, files, out)

def test_few_images_are_in_memory(monkeypatch, tmp_path):
    for i in range(60): save(tmp_path/f'in/{i}.png', np.full((20, 30), 3*i, np.uint8))
    alive,most = weakref.WeakSet(), []
    class Counted(N._Heard):
        __hash__ = object.__hash__
        def __init__(self, *args):
            super().__init__(*args)
            alive.add(self)
            most.append(len(alive))
    monkeypatch.setattr(N, '_Heard', Counted)
    annotate(Bright(), tmp_path/'in', tmp_path/'out', ['H Flip'], bs=2)
    assert len(most)==60 and max(most)<=20

# --- teachers one after another

class Trained(Bright):
    def __init__(self, w):
        super().__init__()
        with torch.no_grad(): self.w.fill_(w)

@pytest.mark.parametrize('how', ['mean', 'majority', 'geometric'])
def test_one_after_another_is_the_same_vote(tmp_path, how):
    pictures(tmp_path/'in')
    kw = dict(files=tmp_path/'in', views=['H Flip', 'Gamma', 'Rotate 90'], vote=how, weights=[1, 0.5, 2], bs=2, soft=True)
    a,b = (annotate([Trained(w) for w in (5, -9, 3)], out=tmp_path/str(t), together=t, **kw) for t in (True, False))
    for r,q in zip(a.rows, b.rows):
        for k in ('confidence', 'entropy', 'agreement'): assert r[k]==pytest.approx(q[k], abs=1e-3)
        assert (load_mask(a.out/r['mask'])==load_mask(b.out/q['mask'])).mean()>0.999
        soft = [np.load(o.out/f'soft/{f.stem}.npy').astype(int) for o,f in ((a, a.out/r['mask']), (b, b.out/r['mask']))]
        assert abs(soft[0]-soft[1]).max()<=1
    assert not list((tmp_path/'False').glob('.sums*'))

def test_only_one_teacher_is_in_memory(monkeypatch, files, tmp_path):
    names,alive,most = [save_model(make_model(seed=i), tmp_path/f'{i}.pth') for i in range(3)], weakref.WeakSet(), []
    real = N.load_model
    def load(f):
        gc.collect()
        alive.add(m := real(f))
        most.append(len(alive))
        return m
    monkeypatch.setattr(N, 'load_model', load)
    annotate(names, files, tmp_path/'out', ['H Flip'], together=False)
    assert max(most)==1 and len(most)==6

def test_interrupted_between_teachers_the_first_is_not_asked_again(tmp_path):
    pictures(tmp_path/'in')
    first,bad,good = Trained(5), Greedy(0, KeyboardInterrupt()), Bright()
    with pytest.raises(KeyboardInterrupt): annotate([first, bad], tmp_path/'in', tmp_path/'out', together=False, bs=2)
    n = counted(first)
    assert n==5
    ann = annotate([first, good], tmp_path/'in', tmp_path/'out', together=False, bs=2)  # the weights are the same, so it is the same call
    assert counted(first)==n and counted(good)==5 and len(ann.pairs)==5
    assert [r['confidence'] for r in ann.rows]==[r['confidence'] for r in annotate([Trained(5), Bright()], tmp_path/'in', tmp_path/'plain', bs=2).rows]

# --- doubt

def test_predicted_dice_is_the_line_through_the_validation_images(tiny, trained_discs, files, tmp_path):
    pairs = split_files(trained_discs, 'valid') + split_files(trained_discs, 'train')
    ann = annotate(tiny, files, tmp_path, ['H Flip', 'Gamma'], valid=pairs)
    assert [r['image'] for r in ann.checked]==[str(i) for i,_ in pairs] and read_annotations(tmp_path)==ann
    plain = annotate(tiny, [i for i,_ in pairs], tmp_path/'pairs', ['H Flip', 'Gamma'])
    for r,p,(_,l) in zip(ann.checked, plain.rows, pairs):
        mask,true = load_mask(plain.out/p['mask'], tiny.codes), load_mask(l, tiny.codes)
        assert r['dice']==pytest.approx(2*((mask==1)&(true==1)).sum()/((mask==1).sum()+(true==1).sum()), abs=1e-4)
        assert r['agreement']==pytest.approx(p['agreement'], abs=0.02)
    a,b = np.polyfit([r['agreement'] for r in ann.checked], [r['dice'] for r in ann.checked], 1)
    assert [r['predicted_dice'] for r in ann.rows]==pytest.approx([np.clip(a*r['agreement']+b, 0, 1) for r in ann.rows], abs=1e-4)
    assert {f.name for f in (tmp_path/'annotations').glob('*.png')}=={f'{f.stem}.png' for f in files}

def test_validation_images_are_looked_at_too(tiny, trained_discs, files, tmp_path):
    (image,label),*rest = split_files(trained_discs, 'valid')
    with pytest.raises(DatasetError, match='gone.png: no such file'): annotate(tiny, files, tmp_path/'out', valid=[(image, tmp_path/'gone.png')])
    assert not (tmp_path/'out').exists()
    mine = save(tmp_path/'small.png', np.zeros((9, 8), np.uint8))
    with pytest.raises(DatasetError, match='small.png: has 8×9 pixels, its image'): annotate(tiny, files, tmp_path/'out', valid=[(image, mine)])
    save(mine, np.array(Image.open(label)))
    before = annotate(tiny, files, tmp_path/'out', valid=[(image, mine)]).checked[0]['dice']
    save(mine, 255-np.array(Image.open(label)))
    assert annotate(tiny, files, tmp_path/'out', valid=[(image, mine)]).checked[0]['dice']!=before

def test_weights_from_the_validation_images(tiny, trained_discs, tmp_path):
    pairs = split_files(trained_discs, 'valid')
    f = save_model(tiny, tmp_path/'m.pth')
    got = validation_dice([tiny, f, make_model(seed=3)], pairs)
    assert got[0]==pytest.approx(got[1]) and got[0]!=got[2]
    assert got[0]==pytest.approx(np.mean([N._score(predict(tiny, i), l, tiny.codes) for i,l in pairs]))

def test_validation_dice_of_views(tiny, trained_discs, files, tmp_path):
    pairs,views = split_files(trained_discs, 'valid'), ['V Flip', 'Rotate 90']
    checked = annotate(tiny, files, tmp_path, views, valid=pairs).checked
    got = validation_dice([tiny], pairs, views=views)[0]
    assert got==pytest.approx(np.mean([r['dice'] for r in checked]), abs=1e-5) and got!=validation_dice([tiny], pairs)[0]
    broken = tmp_path/'broken.png'
    broken.write_bytes(b'no picture')
    with pytest.raises(DatasetError, match='broken.png'): validation_dice([tiny], [(broken, pairs[0][1])])

@pytest.mark.parametrize('window', [None, 40])
def test_confidence_and_soft_probabilities(tmp_path, window):
    pictures(tmp_path/'in')
    ann = annotate(Trained(5), tmp_path/'in', tmp_path/'out', ['H Flip'], confidence=True, soft=True, window=window)
    for f,m in ann.pairs.items():
        conf,soft,shape = np.array(Image.open(tmp_path/f'out/confidence/{m.name}')), np.load(tmp_path/f'out/soft/{m.stem}.npy', mmap_mode='r'), load_image(f).shape[:2]
        assert (conf.dtype, conf.shape)==(np.uint8, shape) and conf.mean()/255==pytest.approx(next(r for r in ann.rows if r['image']==str(f))['confidence'], abs=2e-3)
        assert (soft.dtype, soft.shape)==(np.uint8, (2, *(shape if window else (48, 64)))) and abs(soft.sum(0, dtype=int)-255).max()<=1
        mask,_ = probs_to_mask(torch.from_numpy(np.float32(soft/255)), shape)
        assert (Bright.codes.decode(mask)==np.array(Image.open(m))).mean()>0.98

# --- all kinds of images

@pytest.mark.parametrize('kind', ['8 bit', '16 bit', 'colour', 'palette', 'alpha', 'turned', 'tiff'])
def test_all_kinds_of_images(tmp_path, kind):
    d = disc(60, 100, np.random.default_rng(0))
    a,f = np.uint8(d*200+20), tmp_path/'in/a.png'
    if kind=='16 bit': save(f, a.astype(np.uint16)*257)
    elif kind=='colour': save(f, np.repeat(a[..., None], 3, -1))
    elif kind=='alpha': save(f, np.dstack([a]*3+[a*0+255]))
    elif kind=='tiff': f = save(f.with_suffix('.tif'), a.astype(np.uint16)*257)
    else: save(f, a)
    if kind=='palette': Image.open(f).convert('P').save(f)
    if kind=='turned':
        exif = Image.Exif()
        exif[0x0112] = 8
        f = save(tmp_path/'in/b.jpg', np.rot90(a, -1).copy(), exif=exif, quality=95)
    m = np.array(Image.open(annotate(Bright(), [f], tmp_path/'out', ['Rotate 270', 'V Flip']).pairs[f]))
    assert m.shape==(60, 100) and ((m==200)==d).mean()>0.96

@pytest.mark.parametrize('call', [annotate, write_masks])
def test_large_images_are_seen_in_windows(tmp_path, call):
    big = np.uint8(np.random.default_rng(0).integers(0, 2, (300, 430))*200+20).repeat(2, 0).repeat(2, 1)
    m,files = Bright(), [save(tmp_path/'big.png', big), save(tmp_path/'small.png', big[:48, :64]), save(tmp_path/'long.png', big[:20, :200])]
    m.size = 64, 64
    got = call(m, files, tmp_path/'out', window=64)
    got = list(got.pairs.values()) if call is annotate else got
    for f,k in zip(files, got): assert ((np.array(Image.open(k))==200)==(np.array(Image.open(f))>100)).mean()==1
    lost = call(m, files[:1], tmp_path/'whole')
    lost = next(iter(lost.pairs.values())) if call is annotate else lost[0]
    assert ((np.array(Image.open(lost))==200)==(big>100)).mean()<0.8
    if call is annotate: assert all(r['agreement']==1 and r['confidence']>0.9 for r in read_annotations(tmp_path/'out').rows)

def test_same_as_ttach(tiny):
    import ttach
    arrays = [np.random.default_rng(i).integers(0, 256, (32, 64, 3)).astype(np.uint8) for i in range(4)]
    theirs = ttach.SegmentationTTAWrapper(torch.nn.Sequential(tiny, torch.nn.Softmax(1)), ttach.Compose([ttach.HorizontalFlip(), ttach.VerticalFlip()]))
    with torch.no_grad(): want = theirs(torch.from_numpy(np.stack(arrays)).movedim(-1, 1)/255)
    got,_ = vote(opinions([tiny], arrays, get_views(['H Flip', 'V Flip', 'H+V Flip'])))
    assert (got-want).abs().max()<1e-5

# --- write_masks

def test_write_masks(tiny, files, trained_discs, tmp_path):
    before = tree(trained_discs)
    for src in (files, trained_discs/'unlabeled_images'):
        got = write_masks(tiny, src, tmp_path, bs=2)
        assert [f.name for f in got]==[f'{f.stem}.png' for f in files]
        for f,m in zip(files, got): assert (load_mask(m, tiny.codes)==predict(tiny, f)).mean()>0.999 and set(np.unique(load_mask(m)))<={0, 255}
    assert tree(trained_discs)==before and len(tree(tmp_path))==5

def test_write_masks_needs_classes(files, tmp_path):
    m = make_model()
    m.codes = None
    with pytest.raises(ValueError, match='classes'): write_masks(m, files, tmp_path/'out')
    assert not (tmp_path/'out').exists()

@pytest.mark.parametrize('bs', [0, -1])
def test_write_masks_bad_batch(tiny, files, tmp_path, bs):
    with pytest.raises(ValueError, match='bs is'): write_masks(tiny, files, tmp_path/'out', bs=bs)

def test_all_views_together(tiny, files, tmp_path): assert len(annotate(tiny, files[:2], tmp_path, list(views), size=(64, 96)))==2
