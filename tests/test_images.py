"Classes, and images and masks in every form in which they come"
import numpy as np, pytest
from conftest import make_discs, npy_discs, save
from PIL import Image

from semisup_seg.core import IGNORE, DatasetError
from semisup_seg.data.folder import check_dataset
from semisup_seg.data.images import Codes, load_image, load_mask, parse_codes, read_codes, readers, register_reader

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

TURNS = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: np.rot90(a, -1)[:, ::-1],
    6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 1)[:, ::-1], 8: lambda a: np.rot90(a, 1)}

@pytest.mark.parametrize('ext', ['png', 'tif', 'jpg'])
def test_images_are_turned_as_their_tag_says(tmp_path, ext):
    colour = np.zeros((32, 48, 3), np.uint8)
    colour[:16, :16] = 200, 60, 60
    colour[:8, 32:] = 240
    for turn,view in TURNS.items():
        exif = Image.Exif()
        exif[0x0112] = turn
        for a in (colour, colour[..., 0]):
            got = load_image(save(tmp_path/f'a.{ext}', a, exif=exif)).astype(int)
            want = view(a if a.ndim==3 else three(a))
            assert got.shape==want.shape and np.abs(got-want).mean()<6, f'orientation {turn}, {a.ndim-1} channels'

def test_image_from_memory():
    for o in (RGB, Image.fromarray(RGB)): assert (load_image(o)==RGB).all()
    assert (load_image(GREY)==three(GREY)).all()
    assert load_image(GREY>9).max()==255 and (load_image(three(GREY)>9)==three(load_image(GREY>9)[..., 0])).all()
    assert load_image(RGB) is not RGB

@pytest.mark.parametrize('dtype', ['<u2', '>u2'])
def test_16_bit_arrays_in_grey_and_colour_are_scaled_by_one_rule(dtype):
    deep = np.linspace(0, 4095, 12*17*3).round().astype(dtype).reshape(12, 17, 3)
    assert np.abs(load_image(deep)-deep/4095*255).max()<=0.5
    assert (load_image(deep[..., 2])==three(load_image(deep)[..., 2])).all()
    assert load_image(np.zeros((8, 8, 3), dtype)).shape==(8, 8, 3)

def test_image_of_a_wrong_kind():
    shapes = dict(half=np.zeros((4, 5), np.float32), double=np.zeros((4, 5, 3)), whole=np.zeros((4, 5, 3), int), many=np.zeros((4, 5, 7), np.uint8),
        one=np.zeros((4, 5, 1), np.uint8), line=np.zeros(5, np.uint8), empty=np.zeros((0, 5), np.uint8), list=[[1]], none=None)
    for name,a in shapes.items():
        with pytest.raises(DatasetError, match='^image: .*; expected'): print(name, load_image(a))

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

def test_codes_table_is_not_shared_state():
    a,b = Codes(('x', 'y'), ((0,), (1,))), Codes(('x', 'y'), ((1,), (0,)))
    assert a!=b and a.encode(np.array(0))==0 and b.encode(np.array(0))==1

# --- readers of further formats

def test_a_registered_format_serves_as_image_and_mask(npy, tmp_path):
    np.save(tmp_path/'a.npy', RGB)
    np.save(tmp_path/'m.npy', MASK.astype(int))
    (tmp_path/'A.NPY').write_bytes((tmp_path/'a.npy').read_bytes())
    for f in (tmp_path/'a.npy', str(tmp_path/'a.npy'), tmp_path/'A.NPY'): assert (load_image(f)==RGB).all()
    assert (load_mask(tmp_path/'m.npy', CODES)==MASK).all() and (load_mask(tmp_path/'m.npy')==MASK).all()
    np.save(tmp_path/'b.npy', MASK>0)
    for codes in (TWO, ONE): assert (load_mask(tmp_path/'b.npy', codes)==(MASK>0)).all()

def test_a_registered_format_makes_a_data_set(npy, tmp_path):
    a,b = check_dataset(make_discs(tmp_path/'plain')), check_dataset(npy_discs(tmp_path/'npy'))
    assert (a.counts, a.sizes)==(b.counts, b.sizes) and all((a.shares[k]==b.shares[k]).all() for k in a.shares)

def test_the_longest_suffix_that_fits_has_the_file(registry, tmp_path):
    register_reader('.tif')(lambda path: GREY)
    register_reader('.OME.tif')(lambda path: RGB)
    for name,a in {'a.tif': three(GREY), 'a.ome.tif': RGB, 'A.Ome.TIF': RGB, 'aome.tif': three(GREY)}.items():
        (tmp_path/name).touch()
        assert (load_image(tmp_path/name)==a).all(), name

def test_one_function_for_several_suffixes_gets_a_path(registry, tmp_path):
    seen = []
    register_reader('.one', '.two')(lambda path: seen.append(path) or GREY)
    for name in ('a.one', 'a.two'):
        (tmp_path/name).touch()
        load_image(str(tmp_path/name))
    assert seen==[tmp_path/'a.one', tmp_path/'a.two']

def test_a_suffix_has_one_reader(npy):
    def other(path): return GREY
    with pytest.raises(ValueError, match="'.NPY' has a reader already: .*read_npy"): register_reader('.new', '.NPY')(other)
    assert '.new' not in readers and readers['.npy'] is npy
    def again():
        def read(path): return GREY
        return register_reader('.again')(read)
    old,new = again(), again()
    assert readers['.again'] is new is not old

def test_a_suffix_begins_with_a_dot(registry):
    for s in ('npy', '', None, np.load):
        with pytest.raises(ValueError, match='suffix is .*begins with a dot'): register_reader(s)

def test_an_error_of_a_reader_names_its_file(npy, discs):
    f = discs/'Images/train/train0.png'
    f.unlink()
    f = f.with_suffix('.npy')
    f.write_bytes(b'no array')
    for read in (load_image, load_mask):
        with pytest.raises(DatasetError, match=r'train0.npy: cannot be read as an image \(ValueError'): read(f)
    with pytest.raises(DatasetError) as e: check_dataset(discs)
    assert len(e.value.faults)==1 and e.value.faults[0].startswith('Images/train/train0.npy: cannot be read')
    for a,image,mask in [(np.zeros((4, 5)), 'expected uint8', 'must be whole'), (np.zeros((3, 4, 5, 1), int), 'expected uint8', 'expected a mask'),
        (np.array(None), 'expected uint8', 'expected a mask'), (np.full((4, 5), -1), 'expected uint8', 'must be whole')]:
        np.save(f, a)
        readers['.npy'] = lambda path: np.load(path, allow_pickle=True)
        for read,why in ((load_image, image), (load_mask, mask)):
            with pytest.raises(DatasetError, match=f'train0.npy: .*{why}'): read(f)
    with pytest.raises(DatasetError, match='gone.npy: no such file'): load_image(discs/'gone.npy')

def test_a_reader_may_return_a_pillow_image(registry, tmp_path):
    register_reader('.photo')(Image.open)
    exif = Image.Exif()
    exif[0x0112] = 6
    f = save(tmp_path/'a.png', RGB, exif=exif).rename(tmp_path/'a.photo')
    assert (load_image(f)==np.rot90(RGB, -1)).all()
    f = save(tmp_path/'m.png', MASK).rename(tmp_path/'m.photo')
    assert (load_mask(f, CODES)==MASK).all()
