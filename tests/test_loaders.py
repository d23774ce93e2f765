"Batches: the right files, each decoded once, image and mask moved together, the same ones for the same seed"
import os, random, warnings
from collections import Counter

import albumentations as A, numpy as np, pytest, torch
from conftest import make_discs, npy_discs, save
from fastai.torch_core import set_seed
from PIL import Image

from semisup_seg.core import IGNORE, DatasetError
from semisup_seg.data.folder import split_files, unlabeled_files
from semisup_seg.data.images import load_image, load_mask, read_codes
from semisup_seg.data.loaders import Augment, ImageCache, ReadResized, check_size, resize_image, seg_dls, standard_augment
from semisup_seg.training.inference import Predictor, forward_probs

def names(dl): return [f.name for f in dl.items]

def painted(root):
    "A data set whose images are painted from their masks: 200 inside, 40 outside"
    for s in ('train', 'valid', 'test'):
        for i,l in split_files(root, s): save(i, np.uint8(np.where(np.array(Image.open(l))>0, 200, 40)))
    return root

def test_loaders_follow_the_folders(trained_discs):
    dls = seg_dls(trained_discs, (32, 32), bs=2)
    assert [names(o) for o in dls.loaders]==[[f.name for f,_ in split_files(trained_discs, s)] for s in ('train', 'valid', 'test')]
    assert (dls.codes, dls.size, dls.train.drop_last, dls.train.shuffle, dls.valid.shuffle)==(read_codes(trained_discs), (32, 32), True, True, False)

def test_no_test_folder_no_test_loader(tmp_path): assert len(seg_dls(make_discs(tmp_path/'d', test=0), (32, 32), bs=2).loaders)==2

def test_grey_becomes_three_channels(trained_discs):
    x,y = seg_dls(trained_discs, (32, 48), bs=2).one_batch()
    assert x.shape==(2, 3, 32, 48) and y.shape==(2, 32, 48)
    assert (x[:, 0]==x[:, 1]).all() and (x[:, 0]==x[:, 2]).all()
    assert x.dtype==torch.float32 and y.dtype in (torch.uint8, torch.int64) and 0<=x.min() and x.max()<=1

def test_image_and_mask_stay_aligned(tmp_path):
    def moves(): return A.Compose([t for t in standard_augment() if not isinstance(t, A.ColorJitter)])
    dls = seg_dls(painted(make_discs(tmp_path/'d')), (64, 64), bs=4, augment=moves)
    set_seed(0)
    right,moved = [],0
    for _ in range(6):
        x,y = dls.one_batch()
        seen = y!=IGNORE
        right.append(((x[:, 0]>120/255)==(y==1))[seen].float().mean())
        moved += (~seen).any().item()
    assert min(right)>0.97 and moved

def corner(h, w):
    "An image whose top left is bright, and its mask"
    mask = np.zeros((h, w), np.uint8)
    mask[:h//4, :w//2] = 1
    return np.repeat(mask[..., None], 3, -1)*200, mask

def flipped(h, w, **kw):
    "Sixty draws of the flips and turns alone"
    steps = standard_augment(**kw).transforms
    moves = A.Compose([t for t in steps if not isinstance(t, (A.Affine, A.ColorJitter))])
    moves.set_random_seed(0)
    image,mask = corner(h, w)
    return [moves(image=image, mask=mask) for _ in range(60)]

def test_flips_and_turns_move_image_and_mask_alike():
    for h,w,n in ((32, 32, 8), (32, 48, 4)):
        draws = flipped(h, w)
        assert all(np.array_equal(o['image'][..., 0], o['mask']*200) and o['mask'].shape==(h, w) for o in draws)
        assert len({o['mask'].tobytes() for o in draws})==n

def test_images_whose_sides_have_a_meaning_are_not_flipped(): assert len({o['mask'].tobytes() for o in flipped(32, 32, flips=False)})==1

def test_nothing_is_claimed_beyond_the_border():
    im,m = np.full((40, 60, 3), 99, np.uint8), np.ones((40, 60), np.uint8)
    for _ in range(20):
        a,b = Augment(standard_augment()).encodes((Image.fromarray(im), Image.fromarray(m)))
        a,b = np.array(a), np.array(b)
        assert set(np.unique(b))<={1, IGNORE}
        assert (a[b==1]>20).mean()>0.97

def test_augments_train_only(trained_discs):
    set_seed(1)
    dls = seg_dls(trained_discs, (32, 32), bs=2)
    for dl in dls.loaders[1:]: assert all((a==b).all() for a,b in zip(next(iter(dl)), next(iter(dl))))
    plain = seg_dls(trained_discs, (32, 32), bs=4, augment=None)
    order = lambda dl: sorted(x.sum().item() for x in dl.one_batch()[0])
    assert order(plain.train)==order(plain.train) and order(dls.train)!=order(dls.train)

def test_same_seed_same_batches(trained_discs):
    def draw(seed):
        set_seed(seed)
        return [b for _ in range(2) for b in seg_dls(trained_discs, (32, 32), bs=2).train]
    a,b,c = draw(3), draw(3), draw(4)
    assert all((x==y).all() for p,q in zip(a, b) for x,y in zip(p, q))
    assert any((x!=y).any() for p,q in zip(a, c) for x,y in zip(p, q))

def test_augmentation_leaves_no_trace_of_numpys_or_torchs_state(trained_discs):
    random.seed(5)
    a = [np.array(Augment(standard_augment()).encodes((Image.new('RGB', (9, 9), (9, 9, 9)), Image.new('L', (9, 9))))[1]) for _ in range(3)]
    random.seed(5)
    np.random.seed(77)
    torch.manual_seed(77)
    b = [np.array(Augment(standard_augment()).encodes((Image.new('RGB', (9, 9), (9, 9, 9)), Image.new('L', (9, 9))))[1]) for _ in range(3)]
    assert all((x==y).all() for x,y in zip(a, b))

@pytest.mark.parametrize('bs,steps', [(1, 4), (3, 1), (4, 1), (9, 1)])
def test_batches_larger_than_the_set(trained_discs, bs, steps):
    dls = seg_dls(trained_discs, (32, 32), bs=bs)
    assert len(dls.train)==steps and all(len(x)==bs for x,_ in dls.train)
    assert sum(len(x) for x,_ in dls.valid)==2

@pytest.mark.parametrize('epoch_len,n', [(None, 4), (2, 4), (10, 10), (11, 11)])
def test_epoch_len_repeats_evenly(trained_discs, epoch_len, n):
    got = names(seg_dls(trained_discs, (32, 32), bs=2, epoch_len=epoch_len).train)
    counts = [got.count(f) for f in set(got)]
    assert len(got)==n and len(set(got))==4 and max(counts)-min(counts)<=1

def test_pseudo_labels_join_the_training_set(trained_discs, tmp_path):
    pseudo = {f: save(tmp_path/f'{f.stem}.png', np.full(load_image(f).shape[:2], 255, np.uint8)) for f in unlabeled_files(trained_discs)[:3]}
    dls = seg_dls(trained_discs, (32, 32), bs=7, pseudo=pseudo, augment=None)
    assert sorted(names(dls.train))==sorted([f'train{i}.png' for i in range(4)]+['u0.png', 'u1.png', 'u2.png'])
    assert len(dls.valid_ds)==2 and sum((y==1).all().item() for y in dls.one_batch()[1])==3
    assert len(seg_dls(trained_discs, (32, 32), bs=2, pseudo={str(k): str(v) for k,v in pseudo.items()}, epoch_len=20).train_ds)==20

def test_a_worker_process_reads_the_same(trained_discs):
    a,b = (seg_dls(trained_discs, (32, 32), bs=2, num_workers=n).valid.one_batch() for n in (0, 1))
    assert all((x==y).all() for x,y in zip(a, b))

def test_bad_size_is_an_error(trained_discs):
    for size in (128, (32,), (32, 32, 3), (15, 32), (32, 0), (-32, 32), (32.0, 32), ('32', '32'), None, '32'):
        with pytest.raises(ValueError, match='size is .*expected'): print(seg_dls(trained_discs, size))

def test_good_size(): assert [check_size(o) for o in ([32, 48], (np.int64(32), 48), (16, 16))]==[(32, 48), (32, 48), (16, 16)]

def test_bad_batch_size_is_an_error(trained_discs):
    for bs in (0, -1, 2.0, '4', None):
        with pytest.raises(ValueError, match='bs is'): print(seg_dls(trained_discs, (32, 32), bs=bs))

@pytest.mark.parametrize('gone', ['Images/train', 'Images/valid'])
def test_empty_split(discs, gone):
    for f in (discs/gone).iterdir(): f.unlink()
    with pytest.raises(DatasetError, match=f'{gone}: no images'): seg_dls(discs, (32, 32), bs=2)

@pytest.mark.parametrize('split', ['train', 'valid', 'test'])
def test_image_without_label_is_named(discs, split):
    (discs/f'Labels/{split}/{split}1.png').unlink()
    with pytest.raises(DatasetError, match=f'{split}1.png'): seg_dls(discs, (32, 32), bs=2)

def test_missing_labels_folder_is_named(discs):
    (discs/'Labels/valid').rename(discs/'elsewhere')
    with pytest.raises(DatasetError, match='Labels/valid'): seg_dls(discs, (32, 32), bs=2)

@pytest.mark.parametrize('kind', ['grey', 'colour', 'turned', 'deep'])
def test_prediction_resizes_as_training_does(discs, kind):
    rng = np.random.default_rng(0)
    files = [f for f,_ in split_files(discs, 'valid')]
    for f in files:
        h,w = load_image(f).shape[:2]
        exif = Image.Exif()
        if kind=='turned': exif[0x0112] = 6
        shape = dict(colour=(h, w, 3), turned=(w, h)).get(kind, (h, w))
        save(f, rng.integers(0, 65536 if kind=='deep' else 256, shape).astype(np.uint16 if kind=='deep' else np.uint8), exif=exif)
    for size in ((32, 32), (48, 80), (128, 96)):
        seen = []
        arrays = [Predictor(size).load(f).arrays[0] for f in files]
        forward_probs(lambda x: seen.append(x) or x, torch.from_numpy(np.stack(arrays)))
        x = seg_dls(discs, size, bs=2, augment=None).valid.one_batch()[0]
        assert torch.equal(torch.as_tensor(x), seen[0]), size

def test_masks_shrink_without_new_classes(tmp_path):
    root = make_discs(tmp_path/'d')
    (root/'codes.txt').write_text('rest,0\na,100\nb,255\n')
    for _,l in split_files(root, 'valid'):
        m = np.array(Image.open(l))
        m[:, ::2] = 100
        save(l, m)
    for y in seg_dls(root, (17, 23), bs=2).valid.one_batch()[1]: assert set(y.unique().tolist())<={0, 1, 2}

def test_a_registered_format_makes_batches(npy, trained_discs, tmp_path):
    for a,b in zip(*(seg_dls(o, (32, 32), bs=2).valid.one_batch() for o in (trained_discs, npy_discs(tmp_path/'npy')))): assert (a==b).all()

def test_resize_takes_height_first(): assert resize_image(np.zeros((9, 9, 3), np.uint8), (20, 30)).shape==(20, 30, 3)

# --- each file is decoded once

@pytest.fixture
def decoded(monkeypatch):
    "How often each file was decoded"
    count,real = Counter(), Image.open
    def _open(f):
        count[f.name] += 1
        return real(f)
    monkeypatch.setattr(Image, 'open', _open)
    return count

def files(root, *splits): return [str(f) for s in splits for pair in split_files(root, s) for f in pair]

def test_epochs_decode_each_file_once(decoded, trained_discs):
    dls = seg_dls(trained_discs, (32, 32), bs=2, epoch_len=12)
    for _ in range(2):
        for dl in dls.loaders: list(dl)
    assert decoded==Counter(files(trained_discs, 'train', 'valid', 'test'))

def test_a_shared_cache_decodes_each_file_once_for_all(decoded, trained_discs):
    cache = ImageCache((32, 32))
    a,b = [[dl.one_batch() for dl in seg_dls(trained_discs, (32, 32), bs=4, augment=None, cache=cache).loaders[1:]] for _ in range(2)]
    for f in files(trained_discs, 'valid', 'test')[::2]: Predictor((32, 32), cache=cache).load(f)
    assert all((x==y).all() for p,q in zip(a, b) for x,y in zip(p, q))
    assert {*decoded}>={*files(trained_discs, 'valid', 'test')} and {*decoded.values()}=={1}

def test_cached_pixels_are_those_of_the_file_at_the_size(trained_discs):
    (image,label),codes,cache = split_files(trained_discs, 'train')[0], read_codes(trained_discs), ImageCache((32, 48))
    for _ in range(2):
        a,size = cache.image(str(image))
        m = cache.mask(label, codes)
        assert (a==resize_image(load_image(image), (32, 48))).all() and size==load_image(image).shape[:2]
        assert (m==np.array(Image.fromarray(load_mask(label, codes)).resize((48, 32), 0))).all() and m.dtype==a.dtype==np.uint8
    other = parse_other(codes)
    assert (cache.mask(label, other)==1-m).all() and (cache.mask(label, codes)==m).all()

def parse_other(codes):
    "The classes of `codes` in another order"
    return type(codes)(codes.names[::-1], codes.values[::-1])

def test_cached_pixels_cannot_be_spoilt(trained_discs):
    image,label = split_files(trained_discs, 'train')[0]
    cache = ImageCache((32, 32))
    for a in (cache.image(image)[0], cache.mask(label, read_codes(trained_discs))):
        with pytest.raises(ValueError, match='read-only'): a[0, 0] = 1
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        seg_dls(trained_discs, (32, 32), bs=2, augment=None, cache=cache).one_batch()

def test_the_cache_keeps_no_more_bytes_than_it_may(decoded, trained_discs):
    pairs,codes = split_files(trained_discs, 'train'), read_codes(trained_discs)
    image,mask = 32*48*3, 32*48
    assert ImageCache((32, 48)).room==2**29
    cache = ImageCache((32, 48), room=image+2*mask)
    for _ in range(2):
        for i,l in pairs[:3]: cache.image(i), cache.mask(l, codes)
    kept = [str(f) for f in (pairs[0][0], pairs[0][1], pairs[1][1])]
    assert {f for f,n in decoded.items() if n==1}=={*kept} and cache.room==0

def test_a_file_that_was_written_anew_is_read_anew(tmp_path):
    cache = ImageCache((16, 16))
    for value in (40, 90):
        f = save(tmp_path/'a.png', np.full((20, 20), value, np.uint8))
        os.utime(f, ns=(value, value))
        assert (cache.image(f)[0]==value).all()
    f.unlink()
    with pytest.raises(DatasetError, match='a.png: no such file'): cache.image(f)

def test_a_cache_of_another_size_is_an_error(trained_discs):
    with pytest.raises(ValueError, match=r'cache is of size \(32, 32\); expected \(32, 48\)'): seg_dls(trained_discs, (32, 48), cache=ImageCache((32, 32)))
    with pytest.raises(ValueError, match='size is'): ImageCache(32)
    assert ReadResized([32, 48], cache=ImageCache((32, 48))).codes is None
