"Batches: the right files, image and mask moved together, the same ones for the same seed"
import random

import albumentations as A, numpy as np, pytest, torch
from conftest import make_discs, save
from fastai.torch_core import set_seed
from PIL import Image

from semisup_seg.core import IGNORE, DatasetError
from semisup_seg.data.images import load_image, read_codes
from semisup_seg.data.folder import split_files, unlabeled_files
from semisup_seg.data.loaders import Augment, ReadResized, check_size, resize_image, seg_dls, standard_augment
from semisup_seg.training.inference import read_batches, to_tensor

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
    def moves(): return A.Compose([t for t in standard_augment() if not isinstance(t, A.RandomBrightnessContrast)])
    dls = seg_dls(painted(make_discs(tmp_path/'d')), (64, 64), bs=4, augment=moves)
    set_seed(0)
    right,moved = [],0
    for _ in range(6):
        x,y = dls.one_batch()
        seen = y!=IGNORE
        right.append(((x[:, 0]>120/255)==(y==1))[seen].float().mean())
        moved += (~seen).any().item()
    assert min(right)>0.97 and moved

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

@pytest.mark.parametrize('size', [128, (32,), (32, 32, 3), (15, 32), (32, 0), (-32, 32), (32.0, 32), ('32', '32'), None, '32'])
def test_bad_size(trained_discs, size):
    with pytest.raises(ValueError, match='size is .*expected'): seg_dls(trained_discs, size)

@pytest.mark.parametrize('size', [[32, 48], (np.int64(32), 48), (16, 16)])
def test_good_size(size): assert check_size(size)==tuple(map(int, size))

@pytest.mark.parametrize('bs', [0, -1, 2.0, '4', None])
def test_bad_batch_size(trained_discs, bs):
    with pytest.raises(ValueError, match='bs is'): seg_dls(trained_discs, (32, 32), bs=bs)

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

@pytest.mark.parametrize('size', [(32, 32), (48, 80), (128, 96)])
@pytest.mark.parametrize('kind', ['grey', 'colour', 'turned', 'deep'])
def test_prediction_resizes_as_training_does(discs, size, kind):
    rng = np.random.default_rng(0)
    for f,l in split_files(discs, 'valid'):
        h,w = load_image(f).shape[:2]
        exif = Image.Exif()
        if kind=='turned': exif[0x0112] = 6
        shape = dict(colour=(h, w, 3), turned=(w, h)).get(kind, (h, w))
        save(f, rng.integers(0, 65536 if kind=='deep' else 256, shape).astype(np.uint16 if kind=='deep' else np.uint8), exif=exif)
    x = seg_dls(discs, size, bs=2, augment=None).valid.one_batch()[0]
    arrays,_ = next(read_batches([f for f,_ in split_files(discs, 'valid')], size))
    assert torch.equal(torch.as_tensor(x), to_tensor(arrays))

def test_masks_shrink_without_new_classes(tmp_path):
    root = make_discs(tmp_path/'d')
    (root/'codes.txt').write_text('rest,0\na,100\nb,255\n')
    for _,l in split_files(root, 'valid'):
        m = np.array(Image.open(l))
        m[:, ::2] = 100
        save(l, m)
    for y in seg_dls(root, (17, 23), bs=2).valid.one_batch()[1]: assert set(y.unique().tolist())<={0, 1, 2}

def test_resize_takes_height_first(): assert resize_image(np.zeros((9, 9, 3), np.uint8), (20, 30)).shape==(20, 30, 3)

def opened(monkeypatch, dls):
    "The files that one look at all training images opens"
    import semisup_seg.data.loaders as data
    seen = []
    for f in ('load_image', 'load_mask'):
        real = getattr(data, f)
        monkeypatch.setattr(data, f, lambda o, *a, real=real: seen.append(o) or real(o, *a))
    for _ in dls.train: pass
    monkeypatch.undo()
    return seen

def test_the_second_epoch_opens_no_file(monkeypatch, trained_discs):
    dls = seg_dls(trained_discs, (32, 32), bs=2)
    first = opened(monkeypatch, dls)
    assert len(first)==len({*first})>=6 and {*first}<={f for pair in split_files(trained_discs, 'train') for f in pair}
    assert opened(monkeypatch, dls)==[] and len(opened(monkeypatch, seg_dls(trained_discs, (32, 32), bs=2)))==len(first)

def test_what_is_kept_is_bounded(trained_discs):
    read = ReadResized((32, 48))
    assert read.room==2**29//(32*48*4)
    read.room = 1
    a,b = [i for i,_ in split_files(trained_discs, 'train')[:2]]
    assert read(a) is read(a) and read(b) is not read(b) and list(read.cache)==[a]
