"Masks match their images, the table tells of each, and nothing half-done looks whole"
import csv, hashlib, os, resource, time, weakref
from collections import Counter
from pathlib import Path

import numpy as np, pytest, torch
from conftest import Bright, Greedy, counted, disc, is_disc, make_model, photo, pictures, save, tree
from PIL import Image

import semisup_seg.annotation.annotate as N, semisup_seg.annotation.batch as B, semisup_seg.training.inference as I
from semisup_seg.annotation.annotate import annotate, map_in_thread, validation_dice, write_masks
from semisup_seg.annotation.journal import list_images
from semisup_seg.annotation.records import COLUMNS, read_annotations
from semisup_seg.annotation.views import get_views, views
from semisup_seg.core import DatasetError
from semisup_seg.data.folder import split_files, unlabeled_files
from semisup_seg.data.images import load_image, load_mask
from semisup_seg.data.loaders import ImageCache, resize_image
from semisup_seg.training.inference import predict, probs_to_mask, save_model
from semisup_seg.training.metrics import score_mask

@pytest.fixture
def files(trained_discs): return unlabeled_files(trained_discs)

@pytest.fixture
def pairs(trained_discs): return split_files(trained_discs, 'valid')

ALL = {'annotations.csv', 'annotations/.journal'}

def masks_of(files): return {f'annotations/{f.stem}.png' for f in files}

both = pytest.mark.parametrize('call', [annotate, write_masks])

def written(call, *args, **kw):
    "The masks that `annotate` or `write_masks` writes, in the order of the images"
    got = call(*args, **kw)
    return list(got.pairs.values()) if call is annotate else got

# --- image and mask

SIX = ['H Flip', 'V Flip', 'H+V Flip', 'Gamma', 'Median Blur', 'Bilateral Filter']

def test_each_mask_matches_its_image(tmp_path):
    truth = pictures(tmp_path/'in')
    for i,(names,bs) in enumerate((([], 1), ([], 2), (['H Flip'], 8), (['H+V Flip', 'V Flip'], 2), (SIX, 1), (SIX, 3))):
        ann = annotate(Bright(), tmp_path/'in', tmp_path/str(i), names, bs=bs)
        assert list(ann.pairs)==list(truth)
        for f,mask in ann.pairs.items(): assert is_disc(mask, truth[f]), (f, names, bs)

def test_rotated_image_gives_an_upright_mask(tmp_path):
    d = disc(60, 100, np.random.default_rng(0))
    exif = Image.Exif()
    exif[0x0112] = 6
    f = save(tmp_path/'in/a.jpg', np.rot90(np.uint8(d*200+20), 1).copy(), exif=exif, quality=95)
    for call in (annotate, write_masks): assert is_disc(*written(call, Bright(), [f], tmp_path/call.__name__), d)

def test_masks_hold_only_values_of_the_codes(tmp_path, files):
    for i,codes in enumerate(('rest,3\na,300,5', 'rest,0\na,255', 'rest,1\na,2\nb,65535')):
        m = make_model(codes, codes.count('\n')+1)
        firsts = {v[0] for v in m.codes.values}
        for f,mask in annotate(m, files, tmp_path/str(i), ['Gamma']).pairs.items():
            assert set(np.unique(load_mask(mask)))<=firsts and load_mask(mask, m.codes).shape==load_image(f).shape[:2], codes

def test_what_is_written_is_the_vote(tiny, files, tmp_path):
    ann = annotate(tiny, files[:2], tmp_path, ['V Flip'], size=(32, 32))
    for f,row in zip(files, ann.rows):
        x = torch.from_numpy(resize_image(load_image(f), (32, 32))).movedim(-1, 0)[None]/255
        with torch.no_grad(): p = (tiny(x).softmax(1) + tiny(x.flip(-2)).softmax(1).flip(-2))/2
        mask,conf = probs_to_mask(p[0], load_image(f).shape[:2])
        assert (load_mask(tmp_path/row.mask, tiny.codes)==mask).mean()>0.999 and row.confidence==pytest.approx(conf.mean(), abs=1e-4)

def test_no_views_is_what_the_teacher_predicts(tiny, files, tmp_path):
    for f,mask in annotate(tiny, files, tmp_path).pairs.items(): assert (load_mask(mask, tiny.codes)==predict(tiny, f)).mean()>0.999

def test_training_mode_is_left(files, tmp_path):
    m = make_model().train()
    a,b = (annotate(m, files, tmp_path/o).rows for o in 'ab')
    assert a==b and not m.training

def test_all_views_together(tiny, files, tmp_path):
    cache = ImageCache((64, 96))
    a,b = (annotate(tiny, files[:2], tmp_path/str(i), list(views), size=(64, 96), cache=o) for i,o in enumerate((None, cache)))
    assert len(a.pairs)==2 and a.rows==b.rows  # the pixels of a cache are read-only

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
    assert is_disc(annotate(Bright(), [f], tmp_path/'out', ['Rotate 270', 'V Flip']).pairs[f], d)

@both
def test_large_images_are_seen_in_windows(tmp_path, call):
    big = np.uint8(np.random.default_rng(0).integers(0, 2, (150, 215))*200+20).repeat(2, 0).repeat(2, 1)
    m,files = Bright(), [save(tmp_path/'big.png', big), save(tmp_path/'small.png', big[:48, :64]), save(tmp_path/'long.png', big[:20, :200])]
    m.size = 64, 64
    for f,k in zip(files, written(call, m, files, tmp_path/'out', window=64)):
        assert ((np.array(Image.open(k))==200)==(np.array(Image.open(f))>100)).mean()==1
    lost, = written(call, m, files[:1], tmp_path/'whole')
    assert ((np.array(Image.open(lost))==200)==(big>100)).mean()<0.8
    if call is annotate: assert all(r.agreement==1 and r.confidence>0.9 for r in read_annotations(tmp_path/'out').rows)

# --- the table

def test_table_is_complete_and_read_again(tiny, files, tmp_path):
    ann = annotate(tiny, files, tmp_path, ['Gamma'])
    with open(tmp_path/'annotations.csv', newline='', encoding='utf-8') as f: rows = list(csv.DictReader(f))
    assert tuple(rows[0])==COLUMNS and {r['predicted_dice'] for r in rows}=={''} and [r['image'] for r in rows]==[str(f) for f in files]
    for r in rows:
        assert 0.5<=float(r['confidence'])<=1 and 0<=float(r['agreement'])<=1 and 0<=float(r['entropy'])<=1
        assert (tmp_path/r['mask']).is_file()
    assert tree(tmp_path).keys()==ALL|masks_of(files)
    again = read_annotations(tmp_path)
    assert again==ann and len(again.pairs)==5 and f'{len(files)} annotations' in repr(again)
    assert [r.agreement for r in again.ranked()]==sorted(float(r['agreement']) for r in rows)

def test_awkward_file_names_survive(tiny, tmp_path):
    for n in ('a, b.png', 'quote".png', 'ä ö.png', 'x.y.png'): save(tmp_path/'in'/n, np.uint8(np.random.default_rng(0).integers(0, 255, (20, 30))))
    annotate(tiny, tmp_path/'in', tmp_path/'out')
    assert read_annotations(tmp_path/'out').pairs=={f: tmp_path/'out/annotations'/f'{f.stem}.png' for f in (tmp_path/'in').iterdir()}

@pytest.mark.parametrize('window', [None, 40])
def test_confidence_and_soft_probabilities(tmp_path, window):
    pictures(tmp_path/'in')
    out = tmp_path/'out'
    ann = annotate(Bright(5.), tmp_path/'in', out, ['H Flip'], confidence=True, soft=True, window=window)
    for r,(f,m) in zip(ann.rows, ann.pairs.items(), strict=True):
        conf,soft,shape = np.array(Image.open(out/'confidence'/m.name)), np.load(out/f'soft/{m.stem}.npy', mmap_mode='r'), load_image(f).shape[:2]
        assert (conf.dtype, conf.shape)==(np.uint8, shape) and conf.mean()/255==pytest.approx(r.confidence, abs=2e-3)
        assert (soft.dtype, soft.shape)==(np.uint8, (2, *(shape if window else (48, 64)))) and abs(soft.sum(0, dtype=int)-255).max()<=1
        mask,_ = probs_to_mask(torch.from_numpy(np.float32(soft/255)), shape)
        assert (Bright().codes.decode(mask)==np.array(Image.open(m))).mean()>0.98

# --- what is refused

def test_bad_arguments_leave_an_earlier_result_alone(tiny, files, pairs, tmp_path):
    annotate(tiny, files, tmp_path)
    before = tree(tmp_path)
    (image,label),(_,wrong) = pairs
    for bad,message in ((dict(teachers=[]), 'teachers: none'), (dict(files=[]), 'files: no images'), (dict(views=['Rotate']), 'Unknown view'),
        (dict(size=(4, 4)), 'size is'), (dict(views=['Gamma', 'gamma']), 'more than once'), (dict(bs=0), 'bs is 0'), (dict(bs=-1), 'bs is -1'),
        (dict(bs=2.5), 'bs is 2.5'), (dict(vote='mode'), 'Unknown vote'), (dict(weights=[1, 1]), 'weights'), (dict(weights=[-1]), 'weights'),
        (dict(weights=[0]), 'weights'), (dict(window=3), 'window is 3'), (dict(teachers=['nowhere.pth']), 'nowhere.pth: no such file'),
        (dict(teachers=[tiny, make_model('rest,0\nblob,255')]), 'must be the same'), (dict(cache=ImageCache((64, 64))), 'cache is of size'),
        (dict(teachers=make_model(name='PAN', size=(128, 128)), size=(64, 64)), 'PAN needs'),
        (dict(labels={'gone.png': label}), 'gone.png: has a label, but is not among the files'),
        (dict(labels={files[0]: 'gone.png'}), 'gone.png: no such file'), (dict(valid=[(image, 'gone.png')]), 'gone.png: no such file'),
        (dict(valid=[('gone.png', label)]), 'gone.png: no such file'), (dict(valid=[(image, label), (image, wrong)]), 'is given 2 times')):
        with pytest.raises(ValueError, match=message): annotate(**dict(dict(teachers=tiny, files=files, out=tmp_path), **bad))
        assert tree(tmp_path)==before, bad

@both
def test_an_untrained_network_has_no_classes(files, tmp_path, call):
    m = make_model()
    m.codes = None
    for teachers in (m, [m, m], [make_model(), m]) if call is annotate else [m]:
        with pytest.raises(ValueError, match='U-Net has no classes yet: train it with seg_learner first'): call(teachers, files, tmp_path/'out')
    assert not (tmp_path/'out').exists()

@both
def test_the_same_file_twice(tiny, files, tmp_path, call):
    with pytest.raises(DatasetError, match='is given 2 times'): call(tiny, [files[0]]*2, tmp_path/'out')
    assert not (tmp_path/'out').exists()

def test_images_are_never_overwritten(tiny, tmp_path):
    save(tmp_path/'annotations/a.png', photo(np.ones((20, 30)), np.random.default_rng(0)))
    before = tree(tmp_path)
    for call,out in ((annotate, tmp_path), (write_masks, tmp_path/'annotations')):
        with pytest.raises(ValueError, match='holds the images themselves'): call(tiny, tmp_path/'annotations', out)
        assert tree(tmp_path)==before

@both
def test_out_is_a_file(tiny, files, tmp_path, call):
    (tmp_path/'out').write_text('mine')
    with pytest.raises(ValueError, match='out.*is a file'): call(tiny, files, tmp_path/'out')
    assert (tmp_path/'out').read_text()=='mine'

def test_a_single_image_or_a_folder(files):
    for o in (files[0], str(files[0]), [str(files[0])]): assert list_images(o)==files[:1]
    for o in (files[0].parent, str(files[0].parent), iter(files)): assert list_images(o)==files

@both
def test_a_single_image_gives_a_single_mask(tiny, files, tmp_path, call):
    for i,o in enumerate((files[0], str(files[0]), [str(files[0])])):
        call(tiny, o, tmp_path/str(i))
        assert [f.name for f in (tmp_path/str(i)).rglob('*.png')]==[f'{files[0].stem}.png']

@both
def test_missing_files_are_named(tiny, files, tmp_path, call):
    for o in ('nowhere', [files[0], 'nowhere'], tmp_path/'nowhere'):
        with pytest.raises(ValueError, match='nowhere: no such file') as e: call(tiny, o, tmp_path/'out')
        assert 'faults' not in str(e.value)
    assert not (tmp_path/'out').exists()

# --- what goes wrong on the way

def test_interruption_leaves_nothing_that_looks_whole(monkeypatch, tiny, files, tmp_path):
    real = N.annotate_prediction
    for error in (ValueError, KeyboardInterrupt, OSError):
        annotate(tiny, files, tmp_path)
        calls = []
        def third_fails(*a):
            calls.append(a)
            if len(calls)==3: raise error('stop')
            return real(*a)
        monkeypatch.setattr(N, 'annotate_prediction', third_fails)
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
    assert list(ann.pairs)==list(truth) and [r.image for r in ann.unread]==[str(tmp_path/f'in/{n}.png') for n in ('p1b', 'p9')]
    assert read_annotations(tmp_path/'out')==ann
    for r in ann.unread: assert 'cannot be read' in r.error and not r.used and r.mask=='' and r.confidence is None
    for f,m in ann.pairs.items(): assert is_disc(m, truth[f])
    save(tmp_path/'in/p9.png', np.full((30, 30), 220, np.uint8))
    assert len(annotate(Bright(), tmp_path/'in', tmp_path/'out', ['H Flip'], bs=2).unread)==1

def test_nothing_but_unreadable_images(tiny, tmp_path):
    (tmp_path/'a.png').write_bytes(b'broken')
    ann = annotate(tiny, [tmp_path/'a.png'], tmp_path/'out', valid=[])
    assert len(ann)==1 and not ann.pairs and 'could not be read' in repr(ann)

def test_an_unreadable_validation_image_is_left_out(tiny, files, pairs, tmp_path):
    (tmp_path/'a.png').write_bytes(b'broken')
    ann = annotate(tiny, files, tmp_path/'out', valid=[(tmp_path/'a.png', pairs[0][1]), *pairs])
    assert [r.image for r in ann.checked]==[str(i) for i,_ in pairs] and len(ann)==len(ann.pairs)==5

def test_out_of_memory_halves_the_batch(tmp_path, capsys):
    truth,m = pictures(tmp_path/'in', 9), Greedy(2, MemoryError())
    for call in (annotate, write_masks):
        m.seen.clear()
        masks = written(call, m, tmp_path/'in', tmp_path/call.__name__, bs=8)
        assert capsys.readouterr().out.splitlines()==[f'out of memory: continuing with batches of {n}' for n in (4, 2)]
        assert set(m.seen)=={2, 1} and all(map(is_disc, masks, truth.values())) and len(masks)==9

def test_full_disk(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(6): save(tmp_path/f'in/{i}.png', np.full((40, 40), 220, np.uint8) if i!=3 else rng.integers(0, 256, (48*8, 64*8)).astype(np.uint8))
    m,soft = Bright(), resource.getrlimit(resource.RLIMIT_FSIZE)
    m.size = 48*8, 64*8
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, soft[1]))  # the operating system refuses larger files
    try:
        with pytest.raises(OSError, match='cannot be written .*the same call continues from there'): annotate(m, tmp_path/'in', tmp_path/'out', bs=1)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, soft)
    names = {f.name for f in (tmp_path/'out/annotations').iterdir()}
    assert not (tmp_path/'out/annotations.csv').exists() and names>={'.journal', '0.png', '1.png', '2.png'} and '3.png' not in names
    n = counted(m)
    assert len(annotate(m, tmp_path/'in', tmp_path/'out', bs=1).pairs)==6 and counted(m)-n<=3

def test_read_only_folder(tiny, files, tmp_path):
    out = tmp_path/'out'
    out.mkdir(mode=0o555)
    if os.geteuid()==0: out = '/proc/annotations'  # the superuser writes everywhere else
    with pytest.raises(OSError, match=f'{out}: cannot be written'): annotate(tiny, files, out)

# --- memory, and how often

def test_few_images_are_in_memory(monkeypatch, tmp_path):
    for i in range(60): save(tmp_path/f'in/{i}.png', np.full((20, 30), 3*i, np.uint8))
    alive,most = weakref.WeakSet(), []
    class Counted(B.Prediction):
        __hash__ = object.__hash__
        def __init__(self, *args, **kw):
            super().__init__(*args, **kw)
            alive.add(self)
            most.append(len(alive))
    real = N.annotate_prediction
    def slow(*args):
        time.sleep(0.005)
        return real(*args)
    monkeypatch.setattr(B, 'Prediction', Counted)
    monkeypatch.setattr(N, 'annotate_prediction', slow)  # the networks are faster than the disk
    annotate(Bright(), tmp_path/'in', tmp_path/'out', ['H Flip'], bs=2)
    assert len(most)==60 and max(most)<=20

def test_work_in_a_thread_is_in_order_and_waits():
    made = []
    got = map_in_thread(lambda o: o*2, (made.append(i) or i for i in (1, None, 3, 4, 5)), 2)
    assert next(got) is None and made==[1, None]
    assert next(got)==2 and len(made)<=4 and list(got)==[6, 8, 10]
    with pytest.raises(ZeroDivisionError): list(map_in_thread(lambda o: 1/o, [1, 0], 1))

def test_only_one_teacher_is_in_memory(monkeypatch, files, tmp_path):
    names,alive,most = [save_model(make_model(seed=i), tmp_path/f'{i}.pth') for i in range(3)], weakref.WeakSet(), []
    real = I.load_model
    def load(f):
        alive.add(m := real(f))
        most.append(len(alive))
        return m
    monkeypatch.setattr(I, 'load_model', load)
    annotate(names, files[:2], tmp_path/'out', ['H Flip'], together=False)
    assert max(most)==1 and len(most)==6  # each for the check, and for its vote

class Watched(Bright):
    "A network that counts how often it sees each picture"
    def __init__(self, w):
        super().__init__(w)
        self.pictures = Counter()
    def forward(self, x):
        self.pictures.update(digest(o.movedim(0, -1).mul(255).round().byte().numpy()) for o in x)
        return super().forward(x)

def digest(a): return hashlib.sha256(np.ascontiguousarray(a).tobytes()).hexdigest()

@pytest.mark.parametrize('turn', [True, False])
def test_each_image_passes_once_per_teacher_and_view_and_is_decoded_once(tmp_path, decoded, turn):
    truth,names = pictures(tmp_path/'in', 6), ['H Flip', 'Rotate 90', 'Gamma']
    labels = {f: save(tmp_path/f'labels/{f.name}', np.uint8(d)*193+7) for f,d in truth.items()}
    files,valid = list(truth)[:4], list(labels.items())[4:]
    teachers,cache = [Watched(5.), Watched(-3.)], None if turn else ImageCache((48, 64))
    annotate(teachers, files, tmp_path/'out', names, bs=4, valid=valid, labels=dict([*labels.items()][:1]), together=turn, cache=cache)
    assert {f: decoded[f] for f in truth}==dict.fromkeys(truth, 1)
    assert set(decoded)=={*truth, *(labels[f] for f in (files[0], *dict(valid)))}
    if turn: assert set(decoded.values())=={1}
    for m in teachers:
        assert counted(m)==6*4
        for f in truth:
            array = resize_image(load_image(f), (48, 64))
            for v in (None, *get_views(names)): assert m.pictures[digest(v.apply(array) if v else array)]==1, (f.name, v)

def test_a_cache_is_shared_between_calls(decoded, files, tmp_path):
    cache = ImageCache((48, 64))
    anns = [annotate(Bright(), files, tmp_path/str(i), ['H Flip'], cache=o) for i,o in enumerate((cache, cache, None))]
    assert [decoded[f] for f in files]==[2]*5 and anns[0].rows==anns[1].rows==anns[2].rows

# --- teachers one after another

@pytest.mark.parametrize('how', ['mean', 'majority', 'geometric'])
def test_one_after_another_is_the_same_vote(tmp_path, how):
    pictures(tmp_path/'in')
    kw = dict(files=tmp_path/'in', views=['H Flip', 'Gamma', 'Rotate 90'], vote=how, weights=[1, 0.5, 2], bs=2, soft=True)
    a,b = (annotate([Bright(w) for w in (5., -9., 3.)], out=tmp_path/str(t), together=t, **kw) for t in (True, False))
    for r,q in zip(a.rows, b.rows):
        for k in ('confidence', 'entropy', 'agreement'): assert getattr(r, k)==pytest.approx(getattr(q, k), abs=1e-3)
        assert (load_mask(a.out/r.mask)==load_mask(b.out/q.mask)).mean()>0.999
        soft = [np.load(out/f'soft/{Path(r.mask).stem}.npy').astype(int) for out in (a.out, b.out)]
        assert abs(soft[0]-soft[1]).max()<=1
    assert not list((tmp_path/'False').glob('.sums*'))

def test_weights_count(tmp_path):
    f = next(iter(pictures(tmp_path/'in')))
    sure,doubtful = (annotate([Bright(), Bright(-60.)], [f], tmp_path/str(w), weights=w).rows[0] for w in ([1, 0], [1, 1]))
    assert sure.confidence>0.95 and doubtful.confidence==pytest.approx(0.5, abs=0.01)

# --- validation images

def test_predicted_dice_is_the_line_through_the_validation_images(tiny, trained_discs, files, pairs, tmp_path):
    pairs = pairs + split_files(trained_discs, 'train')
    ann = annotate(tiny, files, tmp_path, ['H Flip', 'Gamma'], valid=pairs)
    assert [r.image for r in ann.checked]==[str(i) for i,_ in pairs] and read_annotations(tmp_path)==ann
    plain = annotate(tiny, [i for i,_ in pairs], tmp_path/'pairs', ['H Flip', 'Gamma'])
    for r,p,(_,l) in zip(ann.checked, plain.rows, pairs):
        mask,true = load_mask(plain.out/p.mask, tiny.codes), load_mask(l, tiny.codes)
        assert r.dice==pytest.approx(2*((mask==1)&(true==1)).sum()/((mask==1).sum()+(true==1).sum()), abs=1e-4)
        assert r.agreement==pytest.approx(p.agreement, abs=0.02)
    a,b = np.polyfit([r.agreement for r in ann.checked], [r.dice for r in ann.checked], 1)
    assert [r.predicted_dice for r in ann.rows]==pytest.approx([np.clip(a*r.agreement+b, 0, 1) for r in ann.rows], abs=1e-4)
    assert {f'annotations/{f.name}' for f in (tmp_path/'annotations').glob('*.png')}==masks_of(files)

def test_validation_images_are_looked_at_too(tiny, files, pairs, tmp_path):
    (image,label),*_ = pairs
    mine = save(tmp_path/'small.png', np.zeros((9, 8), np.uint8))
    with pytest.raises(DatasetError, match='small.png: has 8×9 pixels, its image'): annotate(tiny, files, tmp_path/'out', valid=[(image, mine)])
    save(mine, np.array(Image.open(label)))
    before = annotate(tiny, files, tmp_path/'out', valid=[(image, mine)]).checked[0].dice
    save(mine, 255-np.array(Image.open(label)))
    assert annotate(tiny, files, tmp_path/'out', valid=[(image, mine)]).checked[0].dice!=before

def test_weights_from_the_validation_images(tiny, pairs, tmp_path):
    f = save_model(tiny, tmp_path/'m.pth')
    got = validation_dice([tiny, f, make_model(seed=3)], pairs)
    assert got[0]==pytest.approx(got[1]) and got[0]!=got[2]
    want = [score_mask(predict(tiny, i), load_mask(l, tiny.codes), tiny.codes.names)['dice'] for i,l in pairs]
    assert got[0]==pytest.approx(np.mean(want), abs=1e-4)

def test_validation_dice_of_views(tiny, files, pairs, tmp_path):
    views = ['V Flip', 'Rotate 90']
    checked = annotate(tiny, files, tmp_path, views, valid=pairs).checked
    got = validation_dice([tiny], pairs, views=views)[0]
    assert got==pytest.approx(np.mean([r.dice for r in checked]), abs=1e-4) and got!=validation_dice([tiny], pairs)[0]

def test_validation_dice_refuses(tiny, pairs, tmp_path):
    broken = tmp_path/'broken.png'
    broken.write_bytes(b'no picture')
    with pytest.raises(DatasetError, match='broken.png'): validation_dice([tiny], [(broken, pairs[0][1])])
    with pytest.raises(ValueError, match='bs is 0'): validation_dice([tiny], pairs, bs=0)

# --- write_masks

def test_write_masks(tiny, files, trained_discs, tmp_path):
    before = tree(trained_discs)
    for src in (files, trained_discs/'unlabeled_images'):
        got = write_masks(tiny, src, tmp_path, bs=2)
        assert [f.name for f in got]==[f'{f.stem}.png' for f in files]
        for f,m in zip(files, got): assert (load_mask(m, tiny.codes)==predict(tiny, f)).mean()>0.999 and set(np.unique(load_mask(m)))<={0, 255}
    assert tree(trained_discs)==before and len(tree(tmp_path))==5

def test_write_masks_names_the_unreadable_at_the_end(tmp_path):
    truth = pictures(tmp_path/'in', 4)
    for n in 'ab': (tmp_path/f'in/{n}.png').write_bytes(b'broken')
    with pytest.raises(DatasetError, match='cannot be read') as e: write_masks(Bright(), tmp_path/'in', tmp_path/'out', bs=2)
    assert [Path(f.split(':')[0]).name for f in e.value.faults]==['a.png', 'b.png']
    for f,d in truth.items(): assert is_disc(tmp_path/'out'/f.name, d)

def test_write_masks_refuses(tiny, files, tmp_path):
    for bad,message in ((dict(bs=0), 'bs is'), (dict(bs=-1), 'bs is'), (dict(window=3), 'window is'), (dict(files=[]), 'no images')):
        with pytest.raises(ValueError, match=message): write_masks(**dict(dict(model=tiny, files=files, out=tmp_path/'out'), **bad))
    assert not (tmp_path/'out').exists()
