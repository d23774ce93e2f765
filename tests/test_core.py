"Images and masks in every form they come in, and every fault of a data set folder"
import re

import numpy as np, pytest
from conftest import make_discs, save, tree
from PIL import Image

import semisup_seg.core as C
from semisup_seg.core import IGNORE, DatasetError, atomic, progress
from semisup_seg.display import PALETTE, Displayable, Table
from semisup_seg.data.images import Codes, load_image, load_mask
from semisup_seg.data.folder import check_dataset, image_files
from semisup_seg.display import overlay
from semisup_seg.data.images import parse_codes, read_codes
from semisup_seg.core import lookup
from semisup_seg.data.folder import split_files, unlabeled_files

rng = np.random.default_rng(0)
GREY = np.uint8(rng.integers(0, 256, (12, 17)))
RGB = np.uint8(rng.integers(0, 256, (12, 17, 3)))
MASK = np.uint8([[0, 1, 2, 1], [2, 2, 0, 0], [1, 0, 1, 2]])
CODES = parse_codes('rest,0\na,1\nb,2')
TWO = parse_codes('rest,0\ndisc,255')
ONE = parse_codes('rest,0\ndisc,1')

def three(a): return np.stack([a]*3, -1)

# --- images

@pytest.mark.parametrize('mode,ext,expected', [
    ('L', 'png', three(GREY)), ('L', 'bmp', three(GREY)), ('L', 'tif', three(GREY)), ('L', 'gif', three(GREY)),
    ('RGB', 'png', RGB), ('RGB', 'bmp', RGB), ('RGB', 'tif', RGB), ('RGBA', 'png', RGB), ('RGBA', 'tif', RGB), ('LA', 'png', three(GREY))])
def test_image_modes(tmp_path, mode, ext, expected):
    a = Image.fromarray(GREY if mode[0]=='L' else RGB).convert(mode)
    if mode[-1]=='A': a.putalpha(Image.fromarray(GREY.T.copy().reshape(GREY.shape)))
    a.save(tmp_path/f'a.{ext}')
    got = load_image(tmp_path/f'a.{ext}')
    assert got.dtype==np.uint8 and (got==expected).all()

def test_image_palette_shows_its_colours(tmp_path):
    p = Image.frombytes('P', MASK.shape[::-1], MASK.tobytes())
    p.putpalette([10, 20, 30, 200, 0, 0, 0, 0, 250])
    p.save(tmp_path/'a.png')
    assert (load_image(tmp_path/'a.png')==np.uint8([[10, 20, 30], [200, 0, 0], [0, 0, 250]])[MASK]).all()

@pytest.mark.parametrize('ext', ['png', 'bmp', 'tif'])
def test_image_one_bit(tmp_path, ext):
    Image.fromarray(GREY>100).save(tmp_path/f'a.{ext}')
    assert (load_image(tmp_path/f'a.{ext}')==three(np.uint8(GREY>100)*255)).all()

@pytest.mark.parametrize('ext', ['png', 'tif'])
@pytest.mark.parametrize('top', [255, 4095, 65535])
def test_image_16_bit_keeps_its_range(tmp_path, top, ext):
    a = np.linspace(0, top, 200).round().astype(np.uint16).reshape(10, 20)
    got = load_image(save(tmp_path/f'a.{ext}', a))
    assert got.dtype==np.uint8 and (got.min(), got.max())==(0, 255)
    assert np.abs(got[..., 0]-a/top*255).max()<=0.5 and (got==got[..., :1]).all()

def test_image_big_endian_and_32_bit(tmp_path):
    a = np.linspace(0, 65535, 200).round().reshape(10, 20)
    Image.fromarray(a.astype(np.int32)).save(tmp_path/'i.tif')
    Image.frombytes('I;16B', (20, 10), a.astype('>u2').tobytes()).save(tmp_path/'b.tif')
    for f in ('i.tif', 'b.tif'): assert np.abs(load_image(tmp_path/f)[..., 0]-a/257).max()<=0.5

def test_jpeg_in_colour_and_grey(tmp_path):
    smooth = np.uint8(np.stack(np.meshgrid(np.arange(64)*3, np.arange(48)*4), -1))
    smooth = np.dstack([smooth, smooth[..., 0]//2])
    for a in (smooth, smooth[..., 0]):
        got = load_image(save(tmp_path/'a.jpg', a, quality=95)).astype(int)
        assert np.abs(got-(a if a.ndim==3 else three(a))).mean()<4

GEOMETRIC_VIEWS = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: np.rot90(a, -1)[:, ::-1],
    6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 1)[:, ::-1], 8: lambda a: np.rot90(a, 1)}

@pytest.mark.parametrize('turn', GEOMETRIC_VIEWS)
@pytest.mark.parametrize('ext', ['png', 'tif', 'jpg'])
@pytest.mark.parametrize('colour', [True, False], ids=['colour', 'grey'])
def test_exif_orientation(tmp_path, turn, ext, colour):
    a = np.zeros((32, 48, 3), np.uint8)
    a[:16, :16] = 200, 60, 60
    a[:8, 32:] = 240
    if not colour: a = a[..., 0]
    exif = Image.Exif()
    exif[0x0112] = turn
    got = load_image(save(tmp_path/f'a.{ext}', a, exif=exif)).astype(int)
    want = GEOMETRIC_VIEWS[turn](a if colour else three(a))
    assert got.shape==want.shape and np.abs(got-want).mean()<6

def test_image_from_memory():
    for o in (RGB, Image.fromarray(RGB)): assert (load_image(o)==RGB).all()
    assert (load_image(GREY)==three(GREY)).all()
    assert load_image(np.uint16([[0, 65535]])).max()==255
    assert load_image(GREY>9).max()==255

@pytest.mark.parametrize('a', [np.zeros((4, 5), np.float32), np.zeros((4, 5, 3)), np.zeros((4, 5, 3), int), np.zeros((4, 5, 7), np.uint8), np.zeros(5, np.uint8)])
def test_image_array_of_a_wrong_kind(a):
    with pytest.raises(ValueError, match='image'): load_image(a)

@pytest.mark.parametrize('contents', [b'', b'not a picture', b'\x89PNG\r\n\x1a\n'])
def test_unreadable_image_names_its_file(tmp_path, contents):
    (tmp_path/'broken.png').write_bytes(contents)
    for f in (load_image, load_mask):
        with pytest.raises(DatasetError, match='broken.png: cannot be read'): f(tmp_path/'broken.png')

def test_cut_off_image_is_an_error(tmp_path):
    f = save(tmp_path/'cut.png', RGB)
    f.write_bytes(f.read_bytes()[:200])
    with pytest.raises(DatasetError, match='cut.png: cannot be read'): load_image(f)
    with pytest.raises(DatasetError, match='gone.png: no such file'): load_image(tmp_path/'gone.png')

def test_float_and_too_large_pixels_are_refused(tmp_path):
    with pytest.raises(DatasetError, match='f.tif: has floating-point pixels'): load_image(save(tmp_path/'f.tif', np.float32([[0, 0.5]])))
    with pytest.raises(DatasetError, match='i.tif: values from 0 to 70000'): load_image(save(tmp_path/'i.tif', np.int32([[0, 70000]])))

# --- masks

@pytest.mark.parametrize('ext', ['png', 'bmp', 'tif', 'gif'])
def test_mask_formats(tmp_path, ext): assert (load_mask(save(tmp_path/f'm.{ext}', MASK), CODES)==MASK).all()

@pytest.mark.parametrize('mode', ['RGB', 'RGBA', 'LA'])
@pytest.mark.parametrize('ext', ['png', 'tif'])
def test_mask_with_equal_channels(tmp_path, mode, ext):
    Image.fromarray(MASK).convert(mode).save(tmp_path/f'm.{ext}')
    assert (load_mask(tmp_path/f'm.{ext}', CODES)==MASK).all()

def test_mask_in_colour_is_refused(tmp_path):
    with pytest.raises(DatasetError, match='m.png: is a colour picture'): load_mask(save(tmp_path/'m.png', RGB), CODES)

def test_mask_palette_is_read_by_index(tmp_path):
    p = Image.frombytes('P', MASK.shape[::-1], MASK.tobytes())
    p.putpalette([0, 0, 0, 200, 0, 0, 0, 0, 250])
    for f in ('m.png', 'm.bmp'):
        p.save(tmp_path/f)
        assert (load_mask(tmp_path/f, CODES)==MASK).all()

@pytest.mark.parametrize('codes', [TWO, ONE], ids=['255', '1'])
@pytest.mark.parametrize('ext', ['png', 'bmp', 'tif'])
def test_mask_one_bit(tmp_path, codes, ext):
    Image.fromarray(MASK>0).save(tmp_path/f'm.{ext}')
    assert (load_mask(tmp_path/f'm.{ext}', codes)==(MASK>0)).all()

@pytest.mark.parametrize('ext', ['png', 'tif'])
def test_mask_16_bit_values(tmp_path, ext):
    codes = parse_codes('rest,0\na,300\nb,65535,40000')
    values = np.uint16([0, 300, 65535])[MASK]
    values[0, 2] = 40000
    f = save(tmp_path/f'm.{ext}', values)
    assert (load_mask(f, codes)==MASK).all()
    assert (load_mask(f)==values).all()
    assert codes.decode(MASK).dtype==np.uint16 and (codes.decode(MASK)==np.uint16([0, 300, 65535])[MASK]).all()

def test_mask_unknown_values_are_listed(tmp_path):
    with pytest.raises(DatasetError, match='m.png: pixel values not in codes.txt: 1, 2'): load_mask(save(tmp_path/'m.png', MASK), TWO)
    with pytest.raises(DatasetError, match='…'): load_mask(save(tmp_path/'m.png', GREY), TWO)

def test_mask_exif_is_turned_like_its_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    assert (load_mask(save(tmp_path/'m.tif', MASK, exif=exif), CODES)==np.rot90(MASK, -1)).all()

# --- codes.txt

@pytest.mark.parametrize('text', ['rest,0\ndisc,255', '\n\nrest , 0\r\n \n disc,255\r\n\n', '\ufeffrest,0\ndisc,255', 'rest,0\ndisc, 255 \n'])
def test_codes_tolerates(text): assert parse_codes(text)==TWO

def test_codes_many_values():
    c = parse_codes('rest,0,7\na,254,65535\n')
    assert c.values==((0, 7), (254, 65535)) and len(c)==2
    assert c.encode(np.array([0, 7, 254, 65535, 1])).tolist()==[0, 0, 1, 1, IGNORE]
    assert parse_codes(str(c))==c

@pytest.mark.parametrize('text,faults', [
    ('rest,0\nrest,1', ["the name 'rest' stands 2 times"]), ('rest,0\na,1,1', ['the value 1 stands 2 times']), ('rest,0', ['1 classes found, 2 to 255']),
    ('', ['0 classes found']), ('rest,0\na', ["line 2 ('a'): expected name,value"]), ('rest,0\n,3', ["line 2 (',3'): expected"]),
    ('rest,0\na,x', ["line 2 ('a,x'): 'x' is no pixel value"]), ('rest,0\na,-1', ["'-1' is no"]), ('rest,0\na,1.5', ["'1.5' is no"]),
    ('rest,0\na,65536', ["'65536' is no"]), ('rest,0\na,1,', ["'' is no"]), ('rest,0\na,²', ['is no pixel value']),
    ('rest,0\na,0\na,5\nb', ["line 4 ('b')", "name 'a' stands 2", 'value 0 stands 2'])])
def test_codes_faults(text, faults):
    with pytest.raises(DatasetError) as e: parse_codes(text)
    assert len(e.value.faults)==len(faults)
    for f in faults: assert any(f in o for o in e.value.faults)

def test_codes_file(tmp_path):
    with pytest.raises(DatasetError, match='codes.txt: missing'): read_codes(tmp_path)
    (tmp_path/'codes.txt').write_bytes(b'rest,0\ncaf\xe9,1')
    with pytest.raises(DatasetError, match='codes.txt: is not a UTF-8'): read_codes(tmp_path)
    (tmp_path/'codes.txt').write_text('rest,0\ncafé,1', encoding='utf-8')
    assert read_codes(tmp_path).names==('rest', 'café')

# --- the folder

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
    assert s.unusual()[:2]==['No pixel of <scar> in train.', 'No pixel of <scar> in valid.'] and [o[:9] for o in s.unusual()[2:]]==['No test s', 'No unlabe']
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
    save(root/'Labels/test/test0.png', rng.integers(0, 255, (20, 20, 3)).astype(np.uint8))
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

# --- small tools

def test_pick_lists_what_is_allowed():
    with pytest.raises(ValueError) as e: lookup('xyz', dict(one=1, two=2), 'thing')
    assert str(e.value)=="Unknown thing 'xyz'. Allowed: one, two"

def test_atomic_keeps_the_old_file_when_the_new_one_fails(tmp_path):
    f = tmp_path/'a.txt'
    f.write_text('old')
    with pytest.raises(KeyboardInterrupt), atomic(f) as tmp:
        tmp.write_text('half')
        raise KeyboardInterrupt
    assert tree(tmp_path).keys()=={'a.txt'} and f.read_text()=='old'

def test_overlay_leaves_ignored_pixels_clear():
    im = three(GREY)
    m = np.where(GREY>128, IGNORE, 0).astype(np.uint8)
    assert (overlay(im, m)==im).all()
    assert (overlay(im, np.ones_like(GREY))!=im).any(-1).mean()>0.9

def test_codes_table_is_not_shared_state():
    a,b = Codes(('x', 'y'), ((0,), (1,))), Codes(('x', 'y'), ((1,), (0,)))
    assert a!=b and a.encode(np.array(0))==0 and b.encode(np.array(0))==1

def test_bar_shows_the_rate(monkeypatch, capsys):
    monkeypatch.setattr(C, 'on_screen', lambda: True)
    assert list(progress(iter('abc'), 3, 'images'))==['a', 'b', 'c']
    assert 'images a second' in capsys.readouterr().out
    monkeypatch.setattr(C, 'on_screen', lambda: False)
    assert list(progress(iter('abc'), 3, 'images'))==['a', 'b', 'c'] and capsys.readouterr().out==''

# --- tables in a notebook

def sides(table):
    "Where each column of `table` stands, by its first line of values"
    return re.findall('<td style="text-align:(left|right)', table._repr_html_().split('<tr>')[2])

@pytest.mark.parametrize('values,side', [
    ((1, 20), 'right'), ((0.5, '–'), 'right'), (('', '+0.020 [-0.010, +0.050]'), 'right'), (('9.4%', '12 %'), 'right'), (('1.31 G', '491,954'), 'right'),
    (('a', 1), 'left'), (('64×96', '9'), 'left'), (('better', 'worse'), 'left'), (('1.png', '2.png'), 'left'), (('1–3', '4'), 'left')])
def test_numbers_stand_right(values, side): assert sides(Table([['x'], *([v] for v in values)]))==[side]

def test_table_escapes_all_but_links():
    text = Table([['<b>', 'a|b'], ['<img src=x onerror=alert(1)>', '[paper](https://doi.org/10.1) & [x](javascript:alert)']])._repr_html_()
    assert not re.search('<(b|img|script)', text) and '&lt;img' in text and '<a href="https://doi.org/10.1">paper</a> &amp; [x](javascript:alert)' in text
    assert '"x' not in Table([['u'], ['[a](https://b"x)']])._repr_html_()

def test_table_without_rows():
    t = Table([['name', 'value']])
    assert t._repr_html_().count('<th')==2 and '<td' not in t._repr_html_() and str(t)=='name  value'

def test_bars_do_not_break_a_markdown_table(): assert Table([['a|b'], ['c']])._repr_markdown_()=='| a\\|b |\n| --- |\n| c |'

def test_shown_is_its_parts_in_all_three_ways():
    class Two(Displayable):
        def parts(self): return [Table([['a'], [1]]), '1 < 2']
    assert repr(Two())=='a\n1\n\n1 < 2' and Two()._repr_markdown_()=='| a |\n| --- |\n| 1 |\n\n1 < 2'
    assert '>1</td>' in Two()._repr_html_() and '1 &lt; 2' in Two()._repr_html_()

def test_codes_show_each_class_in_its_colour():
    many = Codes(tuple(f'c<{i}' for i in range(12)), tuple((i, i+100) for i in range(12)))._repr_html_()
    for i in range(12): assert f'c&lt;{i}</td>' in many and f'>{i}, {i+100}</td>' in many
    for i,c in enumerate(PALETTE[1:]): assert many.count('#%02x%02x%02x' % tuple(c))==1 + (i+8<12)
