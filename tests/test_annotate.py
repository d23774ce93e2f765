"The vote by hand, masks that match their images, and nothing half-done that looks whole"
import csv

import numpy as np, pytest, torch
from conftest import disc, make_model, photo, save, tree
from PIL import Image

import semisup_seg.annotate as N
from semisup_seg.annotate import COLUMNS, Annotations, annotate, opinions, read_annotations, vote, write_masks
from semisup_seg.core import DatasetError, load_image, load_mask, parse_codes, unlabeled_files
from semisup_seg.data import resize_image
from semisup_seg.learner import predict, to_mask
from semisup_seg.views import get_views, views

@pytest.fixture
def files(trained_discs): return unlabeled_files(trained_discs)

class Bright(torch.nn.Module):
    "Calls what is brighter than half the second class, surely; a teacher whose masks anyone can check"
    config,size,codes,min_size = dict(name='Bright'), (48, 64), parse_codes('rest,7\ndisc,200'), 16
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(60.))
    def forward(self, x): return torch.cat([0*x[:, :1], (x[:, :1]-0.5)*self.w], 1)

def pictures(folder, n=5):
    "`n` images of different sizes with a bright disc at different places; and where it is"
    rng,res = np.random.default_rng(1), {}
    for i in range(n):
        d = disc(50+20*i, 90-9*i, rng)
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
        mask,conf = to_mask(p[0], load_image(f).shape[:2])
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
    assert tuple(rows[0])==COLUMNS and [r['image'] for r in rows]==[str(f) for f in files]
    for r in rows: assert 0.5<=float(r['confidence'])<=1 and 0<=float(r['agreement'])<=1 and (tmp_path/r['mask']).is_file()
    assert tree(tmp_path).keys()=={'annotations.csv', *(f'annotations/{f.stem}.png' for f in files)}
    again = read_annotations(tmp_path)
    assert again==ann and len(again.pairs)==5 and f'{len(files)} annotations' in repr(again)
    assert [r['confidence'] for r in again.ranked()]==sorted(float(r['confidence']) for r in rows)

def test_awkward_file_names_survive(tiny, tmp_path):
    for n in ('a, b.png', 'quote".png', 'ä ö.png', 'x.y.png'): save(tmp_path/'in'/n, np.uint8(np.random.default_rng(0).integers(0, 255, (20, 30))))
    annotate(tiny, tmp_path/'in', tmp_path/'out')
    assert read_annotations(tmp_path/'out').pairs=={f: tmp_path/'out/annotations'/f'{f.stem}.png' for f in (tmp_path/'in').iterdir()}

@pytest.mark.parametrize('word,used', [('True', True), ('False', False), ('TRUE', True), ('FALSE', False), ('true', True)])
def test_used_as_a_spreadsheet_writes_it(tmp_path, word, used):
    (tmp_path/'annotations.csv').write_text(f'image,mask,confidence,agreement,used\na.png,annotations/a.png,0.9,0.8,{word}\n')
    assert len(read_annotations(tmp_path).pairs)==used

@pytest.mark.parametrize('text', ['', 'x', 'image,mask\na,b\n', f'{",".join(COLUMNS)}\na,b,much,0.5,True\n', f'{",".join(COLUMNS)}\na,b\n'])
def test_spoilt_table(tmp_path, text):
    (tmp_path/'annotations.csv').write_text(text)
    with pytest.raises(ValueError, match='annotations.csv'): read_annotations(tmp_path)

def test_no_table(tmp_path):
    with pytest.raises(ValueError, match='no such file'): read_annotations(tmp_path)

def test_unused_rows_are_no_pairs(tmp_path):
    rows = [dict(image=f'{i}.png', mask=f'annotations/{i}.png', confidence=0.9, agreement=1.0, used=i>0) for i in range(3)]
    Annotations(tmp_path, rows).save()
    assert [f.name for f in read_annotations(tmp_path).pairs]==['1.png', '2.png']

# --- what is refused

@pytest.mark.parametrize('codes,n', [('rest,0\nblob,255', 2), ('rest,0\ndisc,254', 2), ('rest,0\na,1\nb,2', 3), (None, 2)])
def test_teachers_with_different_classes(tiny, files, tmp_path, codes, n):
    other = make_model(codes or 'rest,0\ndisc,255', n)
    if codes is None: other.codes = None
    with pytest.raises(ValueError, match='teachers: .*must be the same'): annotate([tiny, other], files, tmp_path/'out')
    assert not (tmp_path/'out').exists()

@pytest.mark.parametrize('bad,message', [
    (dict(teachers=[]), 'teachers: none'), (dict(files=[]), 'files: no images'), (dict(views=['Rotate']), 'Unknown view'), (dict(size=(4, 4)), 'size is'),
    (dict(views=['Gamma', 'gamma']), 'more than once'), (dict(bs=0), 'bs is 0'), (dict(bs=-1), 'bs is -1'), (dict(bs=2.5), 'bs is 2.5')])
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

def test_same_stem_twice(tiny, tmp_path):
    for n in ('a/x.png', 'b/x.png', 'b/x.bmp'): save(tmp_path/n, np.zeros((20, 20), np.uint8))
    for f in ([tmp_path/'a/x.png', tmp_path/'b/x.png'], tmp_path/'b'):
        for call in (annotate, write_masks):
            with pytest.raises(DatasetError, match="the stem 'x' stands twice"): call(tiny, f, tmp_path/'out')
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

@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt, OSError])
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

def test_unreadable_image_is_named(tiny, tmp_path):
    save(tmp_path/'in/a.png', np.zeros((20, 20), np.uint8))
    (tmp_path/'in/b.png').write_bytes(b'broken')
    with pytest.raises(DatasetError, match='b.png: cannot be read'): annotate(tiny, tmp_path/'in', tmp_path/'out')
    assert not (tmp_path/'out/annotations.csv').exists()

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

def test_all_views_together(tiny, files, tmp_path): assert len(annotate(tiny, files[:2], tmp_path, list(views)))==2
