"Judging annotations: what each step writes, what it never touches, and the way back"
import csv
from pathlib import Path

import numpy as np, pytest
from conftest import make_discs, make_model, photo, disc, python, save, tree

from semisup_seg.annotation.annotate import annotate
from semisup_seg.core import DatasetError
from semisup_seg.data.folder import check_dataset, unlabeled_files
from semisup_seg.data.images import load_image, load_mask
from semisup_seg.annotation.records import AnnotationRecord, Annotations, read_annotations
from semisup_seg.annotation.review import Review, add_label
from semisup_seg.annotation.suggest import select_coverage, suggest

@pytest.fixture
def judged(tmp_path):
    "A data set, and annotations of its five unlabelled images by a threshold"
    path,rows = make_discs(tmp_path/'data'), []
    for i,f in enumerate(unlabeled_files(path)):
        mask = save(tmp_path/f'out/annotations/{f.stem}.png', np.uint8(load_image(f)[..., 0]>100)*255)
        rows.append(AnnotationRecord(str(f), f'annotations/{mask.name}', 0.9, 0.2, agreement=0.5+i/10, used=True))
    Annotations(tmp_path/'out', rows, []).save()
    return Review(tmp_path/'out', path)

def whole(r): return tree(r.path), tree(r.ann.out)

def test_judgements_reach_the_table_and_what_it_means(judged):
    judged.judge(0, 'accepted')
    judged.judge(1, 'rejected')
    again = read_annotations(judged.ann.out)
    assert [r.judgement for r in again.rows]==['accepted', 'rejected', '', '', ''] and [r.used for r in again.rows]==[True, False, True, True, True]
    judged.judge(1, '')
    assert len(read_annotations(judged.ann.out).pairs)==5 and judged.counts()=={'accepted': 1, '': 4}

def test_a_second_call_of_annotate_keeps_judgements(trained_discs, tmp_path):
    def call(): return annotate(make_model(), unlabeled_files(trained_discs), tmp_path)
    call()
    judged = Review(tmp_path, trained_discs)
    judged.judge(0, 'accepted')
    judged.judge(1, 'rejected')
    ann = call()
    assert [r.judgement for r in ann.rows]==['accepted', 'rejected', '', '', ''] and len(ann.pairs)==4

def test_moved_masks_are_labels(judged):
    masks = [load_mask(judged.ann.out/judged.rows[i].mask, judged.codes) for i in (0, 2)]
    for i in (0, 2): judged.judge(i, 'accepted')
    assert judged.move()==[]
    counts = check_dataset(judged.path).counts
    assert counts['train']==6 and counts['unlabeled']==3
    for i,m in zip((0, 2), masks): assert (load_mask(judged.path/f'Labels/train/u{i}.png', judged.codes)==m).all()
    rows = read_annotations(judged.ann.out).rows
    assert [r.judgement for r in rows]==['in training', '', 'in training', '', ''] and not rows[0].used and rows[0].image.endswith('Images/train/u0.png')
    with pytest.raises(ValueError, match='is in training'): judged.judge(0, 'rejected')

@pytest.mark.parametrize('style', ['as written', 'by hand'])
def test_undo_restores_every_byte(judged, style):
    if style=='by hand':  # another order, other ends of lines, a column of one's own, no judgements yet
        with judged.file.open(newline='') as f: rows = list(csv.DictReader(f))
        names = ['note', *(k for k in reversed(list(rows[0])) if k!='judgement')]
        judged.file.write_text('\n'.join([','.join(names), *(','.join({'note': 'mine', **r}[k] for k in names) for r in rows)]) + '\n')
        judged = Review(judged.ann.out, judged.path)
    states = [whole(judged)]
    for step in (lambda: judged.judge(0, 'accepted'), lambda: judged.judge(1, 'rejected'), lambda: judged.judge(3, 'accepted'), judged.move, lambda: judged.judge(2, 'accepted'), judged.move):
        step()
        states.append(whole(judged))
    if style=='by hand': assert all(r['note']=='mine' for r in csv.DictReader(judged.file.open(newline='')))
    assert len(set(map(repr, states)))==7
    while judged.steps:
        assert whole(judged)==states.pop()
        judged.undo()
    assert whole(judged)==states.pop() and not states
    with pytest.raises(ValueError, match='nothing to undo'): judged.undo()

def test_a_label_that_exists_stays(judged):
    label = save(judged.path/'Labels/train/u0.png', np.zeros((9, 9), np.uint8)).read_bytes()
    for i in (0, 1): judged.judge(i, 'accepted')
    faults = judged.move()
    assert len(faults)==1 and 'u0.png: is there already' in faults[0] and (judged.path/'Labels/train/u0.png').read_bytes()==label
    assert (judged.path/'unlabeled_images/u0.png').exists() and (judged.path/'Labels/train/u1.png').exists()
    assert [r.judgement for r in judged.rows[:2]]==['accepted', 'in training']

def test_an_image_of_that_name_stays(judged):
    save(judged.path/'Images/train/u0.jpg', np.zeros((9, 9), np.uint8))
    with pytest.raises(DatasetError, match='u0.jpg: is there already'): add_label(judged.path, judged.rows[0].image, judged.ann.out/judged.rows[0].mask)
    assert not (judged.path/'Labels/train/u0.png').exists()

@pytest.mark.parametrize('mask,said', [(np.zeros((9, 9), np.uint8), 'has 9×9 pixels, its image'), (None, 'pixel values not in codes.txt: 7')])
def test_a_mask_that_does_not_fit_is_no_label(judged, tmp_path, mask, said):
    before = tree(judged.path)
    if mask is None: mask = np.full_like(load_mask(judged.ann.out/judged.rows[0].mask), 7)
    with pytest.raises(DatasetError, match=said): add_label(judged.path, judged.rows[0].image, save(tmp_path/'m.png', mask))
    assert tree(judged.path)==before

def test_killed_between_label_and_image(judged, tmp_path):
    code = "import os, sys; from semisup_seg.annotation import review; review.os.replace = lambda *a: os._exit(9) if 'unlabeled' in str(a[0]) else os.rename(*a); review.add_label(*sys.argv[1:])"
    args = judged.path, judged.rows[0].image, judged.ann.out/judged.rows[0].mask
    assert python(code, *args).returncode==9 and (judged.path/'Labels/train/u0.png').exists()
    add_label(*args)
    assert check_dataset(judged.path).counts['train']==5

@pytest.mark.parametrize('file,said', [('Labels/train/u0.png', 'was changed since it was moved'), ('unlabeled_images/u0.png', 'is there again')])
def test_nothing_is_undone_over_the_work_of_others(judged, file, said):
    judged.judge(0, 'accepted')
    judged.move()
    save(judged.path/file, np.zeros((40, 64), np.uint8))
    before = whole(judged)
    with pytest.raises(ValueError, match=said): judged.undo()
    assert whole(judged)==before

@pytest.mark.parametrize('step', ['judge', 'move', 'undo'])
def test_a_table_changed_by_someone_else(judged, step):
    judged.judge(0, 'accepted')
    Review(judged.ann.out, judged.path).judge(1, 'rejected')
    before = whole(judged)
    with pytest.raises(ValueError, match='was changed by someone else'): judged.judge(2, 'accepted') if step=='judge' else getattr(judged, step)()
    assert whole(judged)==before

def test_images_go_back_when_the_table_cannot_be_written(judged, monkeypatch):
    judged.judge(0, 'accepted')
    before = whole(judged)
    def full(*args): raise OSError('No space left on device')
    monkeypatch.setattr('semisup_seg.annotation.review.write_records', full)
    with pytest.raises(OSError, match='No space'): judged.move()
    assert whole(judged)==before and judged.rows[0].judgement=='accepted'

def test_what_is_gone_is_told_once(judged, tmp_path):
    (judged.path/'unlabeled_images/u3.png').unlink()
    (judged.ann.out/'annotations/u4.png').unlink()
    assert judged.missing_files()=={3, 4} and judged.warnings()==['2 of 5 images or masks are no longer there (u3.png, u4.png).']
    with pytest.raises(ValueError, match='is gone'): judged.judge(3, 'accepted')
    other = Review(judged.ann.out, make_discs(tmp_path/'other'))
    assert '5 of 5 images do not lie in' in other.warnings()[1]
    other.judge(0, 'accepted')
    assert 'does not lie in' in other.move()[0]

def test_unread_images_cannot_be_judged(judged):
    bad = judged.path/'unlabeled_images/bad.png'
    bad.write_bytes(b'no picture')
    judged.ann.rows.append(AnnotationRecord(str(bad), error='bad.png: cannot be read'))
    judged.ann.save()
    again = Review(judged.ann.out, judged.path)
    assert again.warnings()==['1 images have no mask (bad.png).'] and not again.missing_files()
    with pytest.raises(ValueError, match=r'has no mask \(bad.png: cannot be read'): again.judge(5, 'accepted')

def test_unknown_judgements_are_refused(judged):
    with pytest.raises(ValueError, match="judgement is 'in training'; expected 'accepted', 'rejected' or ''"): judged.judge(0, 'in training')
    assert not judged.steps and judged.counts()=={'': 5}

@pytest.mark.parametrize('change,said', [
    (lambda t: t.replace(',,', ',perhaps,', 1), 'is not a table'), (lambda t: t+'x\n', 'is not a table'), (lambda t: t.splitlines()[0]+'\n', 'holds no annotations'),
    (lambda t: t.replace('\r\n', ',more,cells\r\n').replace(',more,cells', '', 1), 'more cells'), (lambda t: 'a,b\n1,2\n', 'it needs the columns')])
def test_tables_edited_by_hand(judged, change, said):
    judged.file.write_bytes(change(judged.file.read_bytes().decode()).encode())
    before = whole(judged)
    with pytest.raises(ValueError, match=said): Review(judged.ann.out, judged.path)
    assert whole(judged)==before

# --- what to label next

def test_near_duplicates_are_not_all_suggested(tmp_path):
    rng,rows = np.random.default_rng(0), []
    for scan in range(5):
        d = disc(48, 48, rng)
        for k in range(8):
            f = save(tmp_path/f'{scan}-{k}.png', photo(d, rng))
            rows.append(AnnotationRecord(str(f), 'm.png', agreement=0.5+scan/100+k/1000, confidence=0.5))
    ann = Annotations(tmp_path, rows, [])
    scans = lambda fs: {f.name[0] for f in fs}
    assert scans([Path(r.image) for r in ann.ranked()[:3]])=={'0'}
    assert scans(suggest(ann, 3))=={'0', '1', '2'}
    assert scans(suggest(ann, 2, labelled=[rows[0].image]))=={'1', '2'}
    assert len(suggest(ann, 100))==40

def test_suggestions_leave_out_what_is_settled_or_gone(judged):
    judged.judge(0, 'accepted')
    judged.judge(1, 'rejected')
    (judged.path/'unlabeled_images/u4.png').unlink()
    assert {f.stem for f in suggest(judged.ann, 5)}=={'u1', 'u2', 'u3'}
    with pytest.raises(ValueError, match='n is 0'): suggest(judged.ann, 0)

def test_cover_takes_what_reaches_most_doubt():
    rng = np.random.default_rng(0)
    v = rng.normal(size=(12, 5))
    v,doubt = v/np.linalg.norm(v, axis=1, keepdims=True), rng.uniform(size=12)
    def reached(s): return (np.maximum(v@v[list(s)].T, 0).max(1)*doubt).sum()
    chosen = select_coverage(v, doubt, 3)
    for k in range(3): assert reached(chosen[:k+1])==pytest.approx(max(reached([*chosen[:k], i]) for i in range(12) if i not in chosen[:k]))
