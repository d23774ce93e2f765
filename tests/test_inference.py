"A saved model is the same model, safely; a Predictor is the one way through a network; predict takes what people have"
import json, time
from contextlib import nullcontext
from unittest.mock import MagicMock

import numpy as np, pytest, torch
from conftest import NET, SIZE, Bright, Greedy, Touch, counted, make_model, same, save, tree
from fastcore.foundation import L
from PIL import Image

import semisup_seg.training.inference as I
from semisup_seg.annotation.annotate import annotate, validation_dice, write_masks
from semisup_seg.annotation.batch import annotate_batch
from semisup_seg.annotation.vote_setup import prepare_vote
from semisup_seg.annotation.views import get_views
from semisup_seg.core import DatasetError
from semisup_seg.data.folder import split_files, unlabeled_files
from semisup_seg.data.images import load_image
from semisup_seg.data.loaders import ImageCache, seg_dls
from semisup_seg.training.inference import Predictor, load_model, predict, prefetch, probs_to_mask, save_model
from semisup_seg.training.learner import seg_learner

@pytest.fixture
def files(trained_discs): return unlabeled_files(trained_discs)

def alike(a, b): return len(a)==len(b) and all(x.shape==y.shape and (x==y).mean()>0.999 for x,y in zip(a, b))

# --- files

def test_saved_model_is_state_dict_and_json(tiny, tmp_path):
    f = save_model(tiny, tmp_path/'models/m.pth')
    assert tree(tmp_path).keys()=={'models/m.pth', 'models/m.json'}
    cfg = json.loads(f.with_suffix('.json').read_text())
    assert cfg==dict(name='U-Net', backbone='test_resnet', n_out=2, n_in=3, codes='rest,0\ndisc,255\n', size=[32, 32])
    assert same(torch.load(f, weights_only=True), tiny.state_dict())

@pytest.mark.parametrize('name', ['U-Net', 'DeepLabV3+', 'MANet', 'PAN'])
def test_loaded_model_predicts_the_same(tmp_path, name):
    m = make_model('rest,0\na,1,7\nb,300', 3, name, size=(128, 128))
    again = load_model(str(save_model(m, tmp_path/'m.pth')))
    im = np.uint8(np.random.default_rng(0).integers(0, 255, (50, 70)))
    assert (predict(m, im)==predict(again, im)).all()
    assert (again.codes, again.size, again.training)==(m.codes, m.size, False)

def test_save_needs_classes(tmp_path):
    m = make_model()
    m.codes = None
    with pytest.raises(ValueError, match='no classes yet'): save_model(m, tmp_path/'m.pth')
    assert tree(tmp_path)=={}

def test_load_with_a_file_missing(tiny, tmp_path):
    for gone in ('m.pth', 'm.json'):
        f = save_model(tiny, tmp_path/'m.pth')
        (tmp_path/gone).unlink()
        with pytest.raises(ValueError, match=f'{gone}: no such file'): load_model(f)

def test_load_truncated(tiny, tmp_path):
    f = save_model(tiny, tmp_path/'m.pth')
    whole = f.read_bytes()
    for keep in (0, 1, 100, 5000, -1, -100):
        f.write_bytes(whole[:keep])
        with pytest.raises(ValueError, match='m.pth: is not a model'): load_model(f)

SPOILT = ['', '[]', '{}', 'nonsense', dict(name='Nix'), dict(n_out=5), dict(codes='rest,0'), dict(codes=3), dict(size=9),
    dict(backbone='resnet18'), dict(n_in=1), dict(codes='rest,0\na,1\nb,2')]

def test_load_with_a_spoilt_json(tiny, tmp_path):
    f = save_model(tiny, tmp_path/'m.pth')
    j = f.with_suffix('.json')
    cfg = json.loads(j.read_text())
    for change in SPOILT:
        j.write_text(change if isinstance(change, str) else json.dumps({**cfg, **change}))
        with pytest.raises(ValueError, match='m.pth: is not a model'):
            load_model(f)
            pytest.fail(f'loaded with {change!r}')

def test_load_malicious(tiny, tmp_path):
    f = save_model(tiny, tmp_path/'m.pth')
    torch.save(dict(w=Touch(tmp_path/'ran')), f)
    with pytest.raises(ValueError, match='m.pth: is not a model'): load_model(f)
    assert not (tmp_path/'ran').exists()

# --- predict

def test_predict_at_each_images_own_size(tiny, trained_discs, files):
    files = files + [f for f,_ in split_files(trained_discs, 'test')]
    masks = predict(tiny, files, bs=3)
    assert [m.shape for m in masks]==[load_image(f).shape[:2] for f in files]
    assert all(m.dtype==np.uint8 and m.max()<2 for m in masks)

def test_predict_takes_one_image_in_any_form(tiny, files):
    for f in files[:2]:
        a,want = load_image(f), predict(tiny, [f])[0]
        for o in (f, str(f), Image.open(f), a, a[..., 0]): assert (predict(tiny, o)==want).all(), type(o)

def test_predict_takes_many_images_in_any_form(tiny, files):
    arrays = [load_image(f) for f in files]
    want = predict(tiny, files)
    folder = files[0].parent
    for o in (tuple(files), L(files), list(map(str, files)), folder, str(folder), arrays, [Image.open(f) for f in files],
        [files[0], str(files[1]), arrays[2], Image.open(files[3]), arrays[4][..., 0]]): assert alike(predict(tiny, o), want), type(o)
    batch = np.stack([a[:40, :40] for a in arrays])
    assert alike(predict(tiny, batch), predict(tiny, list(batch)))
    assert predict(tiny, [])==[] and len(predict(tiny, files[:1]))==1

def test_predict_takes_a_network_a_learner_or_the_file_of_a_model(trained_discs, files, tmp_path):
    learn = seg_learner(seg_dls(trained_discs, SIZE, 2), *NET)
    f = save_model(learn, tmp_path/'m.pth')
    want = predict(learn.model, files)
    for m in (learn, f, str(f)): assert alike(predict(m, files), want), type(m)

def test_fastais_predict_takes_a_file_or_pixels(trained_discs, files):
    learn = seg_learner(seg_dls(trained_discs, SIZE, 2), *NET)
    want = learn.predict(files[0])[2]
    a = load_image(files[0])
    for o in (str(files[0]), a, a[..., 0], Image.open(files[0])): assert torch.equal(learn.predict(o)[2], want), type(o)

def test_predict_does_not_depend_on_its_batch(tiny, files):
    want = predict(tiny, files)
    for bs in (1, 2, 64): assert alike(predict(tiny, files, bs=bs), want), bs

def test_predict_16_bit_and_rotated(tiny, tmp_path):
    a = np.uint8(np.random.default_rng(0).integers(0, 256, (40, 60)))
    a[0, :2] = 0, 255
    exif = Image.Exif()
    exif[0x0112] = 6
    want = predict(tiny, a)
    deep = save(tmp_path/'deep.png', a.astype(np.uint16)*257)
    turned = save(tmp_path/'turned.png', np.rot90(a, 1).copy(), exif=exif)
    assert want.any() and not want.all() and want.shape==(40, 60)
    assert (predict(tiny, deep)==want).all() and (predict(tiny, turned)==want).all()

def test_predict_puts_a_model_in_training_mode_to_rest(files):
    m = make_model().train()
    assert all((a==b).all() for a,b in zip(predict(m, files), predict(m, files)))

def test_predict_at_another_size(tiny, files):
    a,b = predict(tiny, files[0]), predict(tiny, files[0], size=(64, 96))
    assert a.shape==b.shape and (a!=b).any()

def test_predict_in_windows_sees_what_is_small():
    big = np.uint8(np.random.default_rng(0).integers(0, 2, (100, 130))*200+20).repeat(2, 0).repeat(2, 1)
    m = Bright()
    m.size = 64, 64
    small = big[:48, :64]
    for got,a in zip(predict(m, [big, small], window=64), (big, small)): assert ((got==1)==(a>100)).all()
    assert (predict(m, big)!=(big>100)).mean()>0.1

def test_predict_refuses(tiny, files):
    for args,message in ((dict(size=(8, 8)), 'size is'), (dict(size=64), 'size is'), (dict(bs=0), 'bs is'), (dict(bs=-1), 'bs is'),
        (dict(bs=1.5), 'bs is'), (dict(window=16), 'window is')):
        with pytest.raises(ValueError, match=message): predict(tiny, files, **args)

def test_predict_names_the_unreadable_file(tiny, tmp_path):
    (tmp_path/'in').mkdir()
    f,gone = tmp_path/'in/x.png', tmp_path/'in/gone.png'
    f.write_bytes(b'no')
    for o in (f, str(f), [f], f.parent):
        with pytest.raises(DatasetError, match='x.png: cannot be read'): predict(tiny, o)
    with pytest.raises(DatasetError, match='gone.png: no such file'): predict(tiny, gone)

def test_probabilities_are_interpolated_before_the_decision():
    p = torch.tensor([[[0.9, 0.2]], [[0.1, 0.8]]])
    mask,conf = probs_to_mask(p, (1, 8))
    assert mask.tolist()==[[0, 0, 0, 0, 1, 1, 1, 1]] and conf.min()>=0.5 and conf.max()<=0.9+1e-6

# --- Predictor

ERRORS = (torch.OutOfMemoryError('CUDA out of memory'), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), MemoryError())

def test_out_of_memory_halves_the_batch_for_good(capsys):
    arrays = list(np.random.default_rng(0).integers(0, 256, (9, 32, 48, 3)).astype(np.uint8))
    want = Predictor((32, 48)).probs(Bright(), arrays)
    for error in ERRORS:
        m,predictor = Greedy(2, error), Predictor((32, 48), bs=8)
        assert torch.equal(predictor.probs(m, arrays), want)
        told = capsys.readouterr().out.splitlines()
        assert told==[f'out of memory: continuing with batches of {n}' for n in (4, 2)], error
        assert (predictor.bs, m.seen)==(2, [2]*4+[1])
        predictor.probs(m, arrays[:5])
        assert m.seen[5:]==[2, 2, 1] and not capsys.readouterr().out

def test_fewer_images_than_a_batch_are_halved_too(capsys):
    m,predictor = Greedy(2, MemoryError()), Predictor((32, 48), bs=64)
    predictor.probs(m, [np.zeros((32, 48, 3), np.uint8)]*5)
    assert predictor.bs==2 and m.seen==[2, 2, 1]
    assert capsys.readouterr().out.splitlines()==['out of memory: continuing with batches of 2']

def test_out_of_memory_with_a_single_image():
    with pytest.raises(MemoryError, match='single image of 48×64 pixels; choose a smaller size'): predict(Greedy(0, MemoryError()), np.zeros((9, 9), np.uint8))

def test_another_error_of_a_network_is_not_hidden():
    with pytest.raises(RuntimeError, match='device-side assert'): predict(Greedy(0, RuntimeError('device-side assert')), np.zeros((9, 9), np.uint8))

@pytest.mark.parametrize('device', ['cuda', 'cpu', 'mps'])
def test_half_precision_on_a_gpu_only(monkeypatch, device):
    asked = []
    monkeypatch.setattr(I, 'network_device', lambda _: torch.device(device))
    monkeypatch.setattr(torch, 'autocast', lambda *args, **kw: asked.append((args, kw)) or nullcontext())
    I.forward_probs(MagicMock(), MagicMock())  # no such device is needed
    assert asked==[((device,), dict(enabled=device=='cuda'))]

class Guarded(Bright):
    "A network that runs inside `forward_probs` only"
    inside = False
    def forward(self, x):
        assert Guarded.inside, 'another way through the network'
        return super().forward(x)

def test_there_is_one_way_through_a_network(monkeypatch, trained_discs, files, tmp_path):
    real = I.forward_probs
    def spy(*args):
        Guarded.inside = True
        try: return real(*args)
        finally: Guarded.inside = False
    monkeypatch.setattr(I, 'forward_probs', spy)
    pairs = [(i, save(tmp_path/f'labels/{i.name}', np.uint8(load_image(i)[..., 0]>127)*193+7)) for i in files[:2]]
    m = Guarded()
    predict(m, files)
    predict(m, files, window=32)
    for t in (True, False): annotate([m, Guarded()], files, tmp_path/str(t), ['H Flip'], valid=pairs, together=t)
    annotate_batch(prepare_vote(m, ['V Flip']), files)
    write_masks(m, files, tmp_path/'masks')
    assert 0<=validation_dice([m], pairs)[0]<=1 and counted(m)>8*len(files)
    with pytest.raises(AssertionError): m(torch.zeros(1, 3, 48, 64))

def test_a_function_is_predicted_like_a_network():
    m = Bright()
    arrays = list(np.random.default_rng(0).integers(0, 256, (3, 32, 48, 3)).astype(np.uint8))
    def exported(x): return m(x)
    assert torch.equal(Predictor((32, 48)).probs(exported, arrays), Predictor((32, 48)).probs(m, arrays))

def test_views_come_back_and_the_image_is_first():
    arrays = list(np.random.default_rng(0).integers(0, 256, (2, 32, 48, 3)).astype(np.uint8))
    views,nets = get_views(['H Flip', 'Rotate 90', 'V Flip']), [Bright(5.), Bright(-3.)]
    predictor = Predictor((32, 48))
    got = list(predictor.predict_views(nets, arrays, views))
    assert [(v and v.name, k) for v,k,_ in got]==[(n, k) for n in (None, 'H Flip', 'Rotate 90', 'V Flip') for k in (0, 1)]
    for _,k,p in got: assert torch.allclose(p, predictor.probs(nets[k], arrays), atol=1e-6)

def test_a_cache_spares_decoding(decoded, files):
    cache = ImageCache((32, 48))
    predictor = Predictor((32, 48), cache=cache)
    read = [predictor.load(f) for _ in range(3) for f in files]
    assert decoded=={f: 1 for f in files}
    for o,f in zip(read, files):
        plain = Predictor((32, 48)).load(f)
        assert o.size==plain.size and (o.arrays[0]==plain.arrays[0]).all()
    assert (predictor.load(load_image(files[0])).arrays[0]==read[0].arrays[0]).all()  # pixels need no cache
    windows = Predictor((32, 48), window=32, cache=cache).load(files[0])
    assert len(windows.arrays)==len(windows.corners)>1

def test_predictor_refuses():
    for args,message in ((dict(size=32), 'size is 32'), (dict(bs=0), 'bs is 0'), (dict(bs='4'), "bs is '4'"), (dict(window=31), 'window is 31'),
        (dict(cache=ImageCache((32, 32))), r'cache is of size \(32, 32\); expected \(32, 48\)')):
        with pytest.raises(ValueError, match=message): Predictor(**dict(dict(size=(32, 48)), **args))

# --- prefetch

def test_prefetch_makes_a_few_items_ahead():
    made = []
    items = prefetch((made.append(i) or i for i in range(20)), 2)
    assert next(items)==0
    end = time.time()+10
    while len(made)<3 and time.time()<end: time.sleep(0.001)
    assert made==[0, 1, 2]
    for i,o in enumerate(items, 1): assert o==i and len(made)<=i+3
    assert len(made)==20 and list(prefetch([]))==[]

def test_prefetch_raises_what_its_items_raise():
    def _items():
        yield 1
        raise DatasetError('x.png: cannot be read')
    items = prefetch(_items())
    assert next(items)==1
    with pytest.raises(DatasetError, match='x.png'): next(items)
