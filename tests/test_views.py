"Views: one by one, exact where they move pixels, valid where they change light"
import numpy as np, pytest, torch

from semisup_seg.annotation.views import View, get_views, register_view, views

NAMES = ['H Flip', 'V Flip', 'H+V Flip', 'Rotate 90', 'Rotate 270', 'Scale 0.75', 'Scale 1.25', 'Blurring', 'Gamma', 'Gaussian Blur', 'Median Blur', 'Bilateral Filter', 'Equalize histogram', '2D-Filter']
MOVES = {'H Flip': (-1,), 'V Flip': (-2,), 'H+V Flip': (-2, -1)}
GEOMETRIC_VIEWS,SCALES = {'Rotate 90': -1, 'Rotate 270': 1}, {'Scale 0.75': 0.75, 'Scale 1.25': 1.25}
rng = np.random.default_rng(0)
KINDS = dict(grey=np.repeat(rng.integers(0, 256, (33, 50, 1)), 3, -1).astype(np.uint8), colour=rng.integers(0, 256, (33, 50, 3)).astype(np.uint8),
    black=np.zeros((20, 31, 3), np.uint8), white=np.full((20, 31, 3), 255, np.uint8))

def test_what_moves_has_a_way_back(): assert {n for n,v in views.items() if v.is_geometric}=={*MOVES, *GEOMETRIC_VIEWS, *SCALES}

def test_the_names(): assert sorted(views)==sorted(NAMES) and all(v.name==n for n,v in views.items())

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name', NAMES)
def test_view_gives_an_image(name, kind):
    im = KINDS[kind].copy()
    out = views[name].apply(im)
    h,w = im.shape[:2]
    want = (w, h) if name in GEOMETRIC_VIEWS else tuple(round(o*SCALES.get(name, 1)) for o in (h, w))
    assert (out.shape, out.dtype)==((*want, 3), np.uint8) and (im==KINDS[kind]).all()
    if kind!='colour': assert (out==out[..., :1]).all()
    assert (views[name].apply(im)==out).all()

def labels_by_value(im):
    "A network that moves with the image: one-hot labels `(1, 4, h, w)` by the brightness of each pixel"
    return torch.nn.functional.one_hot(torch.from_numpy(np.ascontiguousarray(im[..., 0])).long()//64, 4).movedim(-1, 0)[None].float()

@pytest.mark.parametrize('kind', ['grey', 'colour'])
@pytest.mark.parametrize('name', [*MOVES, *GEOMETRIC_VIEWS])
def test_labels_come_back_exactly(name, kind):
    im,v = KINDS[kind], views[name]
    assert torch.equal(v.invert(labels_by_value(v.apply(im)), im.shape[:2]), labels_by_value(im))
    if name!='H+V Flip': assert not torch.equal(labels_by_value(v.apply(im)).flatten(), labels_by_value(im).flatten())

@pytest.mark.parametrize('size', [(64, 96), (65, 97), (101, 58)])
@pytest.mark.parametrize('name', SCALES)
def test_labels_come_back_nearly_from_scales(name, size):
    yy,xx = np.mgrid[:size[0], :size[1]]
    im = np.repeat(np.uint8(np.hypot(yy-30, xx-25)<20)[..., None]*200, 3, -1)
    back = views[name].invert(labels_by_value(views[name].apply(im)), size).argmax(1)
    same = (back==labels_by_value(im).argmax(1))[0]
    assert back.shape[1:]==size and same.float().mean()>0.97
    edge = np.abs(np.hypot(yy-30, xx-25)-20)<3
    assert same[torch.from_numpy(~edge)].all()

@pytest.mark.parametrize('name', [n for n in NAMES if n not in (*MOVES, *GEOMETRIC_VIEWS, *SCALES)])
def test_where_nothing_moves_nothing_is_undone(name):
    p = torch.rand(2, 3, 9, 14)
    assert torch.equal(views[name].invert(p, (9, 14)), p)

@pytest.mark.parametrize('name', MOVES)
def test_flips_are_exact(name):
    im = KINDS['colour']
    assert (views[name].apply(im)==np.flip(im, [d%2 for d in MOVES[name]])).all()
    assert (views[name].apply(views[name].apply(im))==im).all()

@pytest.mark.parametrize('name', [n for n in NAMES if n not in (*MOVES, *GEOMETRIC_VIEWS, *SCALES)])
def test_photometric_views_move_nothing(name):
    im = np.full((60, 60, 3), 60, np.uint8)
    im[20:32, 36:48] = 190, 150, 170
    yy,xx = np.where((lambda o: o>(int(o.min())+int(o.max()))/2)(views[name].apply(im)[..., 0]))
    assert abs(yy.mean()-25.5)<0.6 and abs(xx.mean()-41.5)<0.6

def test_h_flip_mirrors_left_and_right():
    im = np.zeros((4, 6, 3), np.uint8)
    im[:, 0] = 255
    assert (views['H Flip'].apply(im)[:, -1]==255).all() and (views['H Flip'].apply(im)[:, :-1]==0).all()

def test_gamma_is_not_the_identity():
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, -1)
    out = views['Gamma'].apply(ramp)[0, :, 0].astype(int)
    assert (out[0], out[255])==(0, 255) and (np.diff(out)>=0).all() and (out[1:255]>np.arange(1, 255)).mean()>0.99

@pytest.mark.parametrize('typed,name', [('h flip', 'H Flip'), ('HFLIP', 'H Flip'), ('h+v flip', 'H+V Flip'), ('2d filter', '2D-Filter'), ('equalize_histogram', 'Equalize histogram'), ('rotate90', 'Rotate 90'), ('scale 1.25', 'Scale 1.25')])
def test_names_are_forgiving(typed, name): assert get_views(typed)==get_views([typed])==[views[name]]

def test_get_views():
    assert get_views([])==get_views(())==[]
    v = View('mine', lambda o: o, lambda p, size: p)
    assert get_views([v, 'Gamma'])==[v, views['Gamma']]

@pytest.mark.parametrize('names,message', [(['Rotate'], "Unknown view 'Rotate'"), (['Scale 2'], "Unknown view 'Scale 2'"), (['gama'], "Did you mean 'Gamma'"), (['Gamma', 'gamma'], 'Gamma named more than once'), ([3], "Unknown view 3"), ([''], 'Unknown view')])
def test_wrong_names(names, message):
    with pytest.raises(ValueError, match=message): get_views(names)

def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match='registered already'): register_view('Gamma')(lambda o: o)
    assert len(views)==14
