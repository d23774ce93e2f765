"The layout of a data set, its splits, and every fault of a folder"
import re
from collections import Counter

import numpy as np, pytest
from conftest import make_discs, save, tree
from PIL import Image

from semisup_seg.core import DatasetError
from semisup_seg.data.folder import check_dataset, evenly_spaced, image_files, split_files, split_groups, unlabeled_files
from semisup_seg.data.images import load_image, load_mask, parse_codes
from semisup_seg.display import PALETTE

TWO = parse_codes('rest,0\ndisc,255')

def test_check_reports_what_it_found(discs):
    before = tree(discs)
    s = check_dataset(discs)
    assert tree(discs)==before
    assert (s.path, s.codes, s.counts)==(discs, TWO, dict(train=4, valid=2, test=2, unlabeled=5))
    files = [f for k in ('train', 'valid', 'test') for f,_ in split_files(discs, k)] + unlabeled_files(discs)
    assert set(s.sizes)=={load_image(f).shape[:2] for f in files} and s.sizes.total()==13
    for k in ('train', 'valid', 'test'):
        pixels = np.concatenate([load_mask(l, TWO).ravel() for _,l in split_files(discs, k)])
        assert np.allclose(s.shares[k], [1-pixels.mean(), pixels.mean()])
    text = str(s)
    for o in ('train      4', 'unlabeled  5', f'{s.shares["test"][1]:.1%}', '64×40 (1)'): assert o in text
    assert '| train | 4 |' in s._repr_markdown_()

def test_check_ignores_hidden_files_and_the_systems_own(discs):
    for d in ('Images/train', 'Labels/train', 'unlabeled_images'):
        for n in ('.DS_Store', 'Thumbs.db', 'desktop.ini', '._a.png'): (discs/d/n).write_bytes(b'junk')
    (discs/'Images/train/.cache').mkdir()
    assert check_dataset(discs).counts==dict(train=4, valid=2, test=2, unlabeled=5)
    assert [f.name for f in image_files(discs/'Images/train')]==[f'train{i}.png' for i in range(4)]

def test_check_names_what_a_run_will_miss(tmp_path, discs):
    assert check_dataset(discs).unusual()==[]
    root = make_discs(tmp_path/'e', test=0, unlabeled=0)
    (root/'codes.txt').write_text('rest,0\ndisc,255\n<scar>,7\n')
    s = check_dataset(root)
    assert s.unusual()[:2]==['No pixel of <scar> in train.', 'No pixel of <scar> in valid.'] and [o[:13] for o in s.unusual()[2:]]==['There is no t', 'No unlabelled']
    for o in s.unusual(): assert o in str(s) and o in s._repr_markdown_() and o.replace('<', '&lt;').replace('>', '&gt;') in s._repr_html_()

def test_check_in_a_notebook_has_counts_and_colours(discs):
    text = check_dataset(discs)._repr_html_()
    assert '#%02x%02x%02x' % tuple(PALETTE[1]) in text and text.count('<tr>')==5 and '64×40 (1)' in text
    assert re.search('<td style="text-align:left[^>]*>train</td><td style="text-align:right[^>]*>4</td>', text)

def test_check_without_test_and_unlabeled(tmp_path):
    root = make_discs(tmp_path/'d', test=0, unlabeled=0)
    assert check_dataset(root).counts==dict(train=4, valid=2)
    assert split_files(root, 'test')==unlabeled_files(root)==[]

def test_image_and_label_may_have_other_endings(discs):
    f = discs/'Images/train/train0.png'
    Image.open(f).save(f.with_suffix('.bmp'))
    f.unlink()
    assert split_files(discs, 'train')[0]==(f.with_suffix('.bmp'), discs/'Labels/train/train0.png')
    assert check_dataset(discs).counts['train']==4

def break_everything(root, codes):
    "Give the data set `root` every fault; the start of the line that each must cause"
    if codes: (root/'codes.txt').write_text('rest,0\nrest,255\n')
    else: save(root/'Labels/test/test1.png', np.full(load_image(root/'Images/test/test1.png').shape[:2], 9, np.uint8))
    (root/'Images/train/train0.png').unlink()
    (root/'Labels/train/train1.png').unlink()
    (root/'Images/train/train2.png').write_bytes(b'broken')
    (root/'Labels/train/train3.png').write_bytes(b'broken')
    save(root/'Labels/valid/valid0.png', np.zeros((9, 9), np.uint8))
    save(root/'Labels/valid/valid1.bmp', np.zeros((49, 58), np.uint8))
    save(root/'Labels/test/test0.png', np.random.default_rng(0).integers(0, 255, (20, 20, 3)).astype(np.uint8))
    (root/'Images/test/more').mkdir()
    for f in (root/'unlabeled_images').iterdir(): f.unlink()
    return ["codes.txt: the name 'rest' stands 2 times" if codes else 'Labels/test/test1.png: pixel values not in codes.txt: 9', 'Labels/train/train0.png: no image', 'Images/train/train1.png: no label',
        'Images/train/train2.png: cannot be read', 'Labels/train/train3.png: cannot be read', 'Labels/valid/valid0.png: is 9×9 pixels, its image 56×52',
        "Labels/valid: the stem 'valid1' stands twice (valid1.bmp, valid1.png)", 'Labels/test/test0.png: is a colour picture',
        'Images/test/more: is a folder', 'unlabeled_images: holds no images']

@pytest.mark.parametrize('codes', [True, False], ids=['codes too', 'codes good'])
def test_check_names_every_fault_at_once(discs, codes):
    want = break_everything(discs, codes)
    before = tree(discs)
    with pytest.raises(DatasetError) as e: check_dataset(discs)
    for w in want: assert sum(f.startswith(w) for f in e.value.faults)==1, w
    assert len(e.value.faults)==len(want) and all(f'- {f}' in str(e.value) for f in e.value.faults)
    assert tree(discs)==before and isinstance(e.value, ValueError)

@pytest.mark.parametrize('gone', ['Images/train', 'Labels/train', 'Images/valid', 'Labels/valid', 'Labels/test', 'Images/test'])
def test_check_missing_folder(discs, gone):
    for f in (discs/gone).iterdir(): f.unlink()
    with pytest.raises(DatasetError, match=f'{gone}: holds no images'): check_dataset(discs)
    (discs/gone).rmdir()
    with pytest.raises(DatasetError, match=f'{gone}: folder missing'): check_dataset(discs)

def test_check_unknown_value_and_wrong_size_in_one_label(discs):
    save(discs/'Labels/test/test1.png', np.full((7, 8), 9, np.uint8))
    with pytest.raises(DatasetError) as e: check_dataset(discs)
    text = str(e.value)
    assert 'Labels/test/test1.png: pixel values not in codes.txt: 9' in text and 'Labels/test/test1.png: is 8×7 pixels' in text

def test_check_empty_folder_and_none(tmp_path):
    with pytest.raises(DatasetError, match='nowhere: no such folder'): check_dataset(tmp_path/'nowhere')
    with pytest.raises(DatasetError) as e: check_dataset(tmp_path)
    for o in ('codes.txt: missing', 'Images/train: folder', 'Labels/train: folder', 'Images/valid: folder', 'Labels/valid: folder'): assert o in str(e.value)

def test_check_decodes_each_file_once(discs, monkeypatch):
    opened,real = [], Image.open
    monkeypatch.setattr(Image, 'open', lambda f: opened.append(f.name) or real(f))
    check_dataset(discs)
    monkeypatch.undo()
    files = [f for k in ('train', 'valid', 'test') for pair in split_files(discs, k) for f in pair] + unlabeled_files(discs)
    assert Counter(opened)==Counter(map(str, files))

def test_check_of_the_working_folder(discs, monkeypatch):
    monkeypatch.chdir(discs)
    (discs/'Images/train/train0.png').write_bytes(b'broken')
    with pytest.raises(DatasetError) as e: check_dataset('.')
    assert [f.split(':')[0] for f in e.value.faults]==['Images/train/train0.png']

# --- splits by group

def test_evenly_spaced():
    assert [evenly_spaced('abcdefgh', n) for n in (1, 2, 4, 8)]==[['e'], ['c', 'g'], ['b', 'd', 'f', 'h'], [*'abcdefgh']]

def test_groups_stay_on_one_side():
    found = [(f'patient {p}', f'{p}_{i}') for p in range(15) for i in range(p%4+1)]
    parts = split_groups(found, n_labelled=5, n_valid=3)
    people = {k: {o.split('_')[0] for o in v} for k,v in parts.items()}
    assert not people['test'] & (people['valid'] | people['train']) and not people['valid'] & people['train']
    assert len(people['test'])==3 and [len(parts[k]) for k in ('train', 'valid')]==[5, 3]
    assert {o for o in (n for _,n in found) if o.split('_')[0] in people['valid']}=={*parts['valid'], *parts['unused']}
    assert split_groups(found[::-1], 9, 3)['test'] and {*split_groups(found, 9, 3)['test']}=={*parts['test']}
    with pytest.raises(ValueError, match='n_labelled 99; of 36 images'): split_groups(found, 99, 3)
