"A saved model is the same model, safely, and predicts masks at each image's own size"
import json

import numpy as np, pytest, torch
from conftest import Touch, make_model, same, save, state, tree
from PIL import Image

from semisup_seg.core import DatasetError
from semisup_seg.data.images import load_image
from semisup_seg.data.folder import split_files, unlabeled_files
from semisup_seg.training.inference import load_model, predict, probs_to_mask, save_model

# --- files

def test_saved_model_is_state_dict_and_json(tiny, tmp_path):
    f = save_model(tiny, tmp_path/'models/m.pth')
    assert tree(tmp_path).keys()=={'models/m.pth', 'models/m.json'}
    cfg = json.loads(f.with_suffix('.json').read_text())
    assert cfg==dict(name='U-Net', backbone='test_resnet', n_out=2, n_in=3, codes='rest,0\ndisc,255\n', size=[32, 32])
    assert same(torch.load(f, weights_only=True), state(tiny))

@pytest.mark.parametrize('name', ['U-Net', 'DeepLabV3+', 'MANet', 'PAN'])
def test_loaded_model_predicts_the_same(tmp_path, name):
    m = make_model('rest,0\na,1,7\nb,300', 3, name, size=(128, 128))
    again = load_model(str(save_model(m, tmp_path/'m.pth')))
    im = np.uint8(np.random.default_rng(0).integers(0, 255, (50, 70)))
    assert (predict(m, im)==predict(again, im)).all() and (again.codes, again.size, again.training)==(m.codes, m.size, False)

def test_save_needs_classes(tmp_path):
    m = make_model()
    m.codes = None
    with pytest.raises(ValueError, match='no classes'): save_model(m, tmp_path/'m.pth')
    assert tree(tmp_path)=={}

@pytest.mark.parametrize('gone', ['m.pth', 'm.json'])
def test_load_with_a_file_missing(tiny, tmp_path, gone):
    f = save_model(tiny, tmp_path/'m.pth')
    (tmp_path/gone).unlink()
    with pytest.raises(ValueError, match=f'{gone}: no such file'): load_model(f)

@pytest.mark.parametrize('keep', [0, 1, 100, 5000, -1, -100])
def test_load_truncated(tiny, tmp_path, keep):
    f = save_model(tiny, tmp_path/'m.pth')
    f.write_bytes(f.read_bytes()[:keep])
    with pytest.raises(ValueError, match='m.pth: is not a model'): load_model(f)

@pytest.mark.parametrize('change', [
    '', '[]', '{}', 'nonsense', dict(name='Nix'), dict(n_out=5), dict(codes='rest,0'), dict(codes=3), dict(size=9), dict(backbone='resnet18'), dict(n_in=1),
    dict(codes='rest,0\na,1\nb,2')])
def test_load_with_a_spoilt_json(tiny, tmp_path, change):
    f = save_model(tiny, tmp_path/'m.pth')
    cfg = json.loads(f.with_suffix('.json').read_text())
    f.with_suffix('.json').write_text(change if isinstance(change, str) else json.dumps({**cfg, **change}))
    with pytest.raises(ValueError, match='m.pth: is not a model'): load_model(f)

def test_load_malicious(tiny, tmp_path):
    f = save_model(tiny, tmp_path/'m.pth')
    torch.save(dict(w=Touch(tmp_path/'ran')), f)
    with pytest.raises(ValueError, match='m.pth: is not a model'): load_model(f)
    assert not (tmp_path/'ran').exists()

# --- predict

def test_predict_at_each_images_own_size(tiny, trained_discs):
    files = unlabeled_files(trained_discs) + [f for f,_ in split_files(trained_discs, 'test')]
    masks = predict(tiny, files, bs=3)
    assert [m.shape for m in masks]==[load_image(f).shape[:2] for f in files] and all(m.dtype==np.uint8 and m.max()<2 for m in masks)
    for f,m in zip(files, masks):
        for o in (f, str(f), Image.open(f), load_image(f), load_image(f)[..., 0]): assert (predict(tiny, o)==m).all()
    assert predict(tiny, [])==[] and len(predict(tiny, files[:1]))==1 and len(predict(tiny, tuple(files)))==len(files)

@pytest.mark.parametrize('bs', [1, 2, 64])
def test_predict_does_not_depend_on_its_batch(tiny, trained_discs, bs):
    files = unlabeled_files(trained_discs)
    assert all((a==b).mean()>0.999 for a,b in zip(predict(tiny, files, bs=bs), predict(tiny, files)))

def test_predict_16_bit_and_rotated(tiny, tmp_path):
    rng = np.random.default_rng(0)
    a = np.uint8(rng.integers(0, 256, (40, 60)))
    a[0, :2] = 0, 255
    exif = Image.Exif()
    exif[0x0112] = 6
    want = predict(tiny, a)
    deep = save(tmp_path/'deep.png', a.astype(np.uint16)*257)
    assert want.any() and not want.all() and (predict(tiny, deep)==want).all()
    turned = save(tmp_path/'turned.png', np.rot90(a, 1).copy(), exif=exif)
    assert (predict(tiny, turned)==want).all() and want.shape==(40, 60)

def test_predict_puts_a_model_in_training_mode_to_rest(trained_discs):
    m = make_model().train()
    f = unlabeled_files(trained_discs)[:3]
    assert all((a==b).all() for a,b in zip(predict(m, f), predict(m, f)))

def test_predict_at_another_size(tiny, trained_discs):
    f = unlabeled_files(trained_discs)[0]
    a,b = predict(tiny, f), predict(tiny, f, size=(64, 96))
    assert a.shape==b.shape and (a!=b).any()

@pytest.mark.parametrize('args,message', [(dict(size=(8, 8)), 'size is'), (dict(size=64), 'size is'), (dict(bs=0), 'bs is'), (dict(bs=-1), 'bs is')])
def test_predict_refuses(tiny, trained_discs, args, message):
    with pytest.raises(ValueError, match=message): predict(tiny, unlabeled_files(trained_discs), **args)

def test_predict_names_the_unreadable_file(tiny, tmp_path):
    (tmp_path/'x.png').write_bytes(b'no')
    for f in (tmp_path/'x.png', tmp_path/'gone.png'):
        with pytest.raises(DatasetError, match=f'{f.name}: (cannot be read|no such file)'): predict(tiny, f)

def test_to_mask_interpolates_before_it_decides():
    p = torch.tensor([[[0.9, 0.2]], [[0.1, 0.8]]])
    mask,conf = probs_to_mask(p, (1, 8))
    assert mask.tolist()==[[0, 0, 0, 0, 1, 1, 1, 1]] and conf.min()>=0.5 and conf.max()<=0.9+1e-6
