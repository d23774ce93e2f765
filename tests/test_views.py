"Views: one by one, exact where they move pixels, valid where they change light"
import numpy as np, pytest, torch

from semisup_seg.views import View, get_views, register_view, views

NAMES = ['H Flip', 'V Flip', 'H+V Flip', 'Blurring', 'Gamma', 'Gaussian Blur', 'Median Blur', 'Bilateral Filter', 'Equalize histogram', '2D-Filter']
MOVES = {'H Flip': (-1,), 'V Flip': (-2,), 'H+V Flip': (-2, -1)}
rng = np.random.default_rng(0)
KINDS = dict(grey=np.repeat(rng.integers(0, 256, (33, 50, 1)), 3, -1).astype(np.uint8), colour=rng.integers(0, 256, (33, 50, 3)).astype(np.uint8),
    black=np.zeros((20, 31, 3), np.uint8), white=np.full((20, 31, 3), 255, np.uint8))

def test_the_ten_names(): assert sorted(views)==sorted(NAMES) and all(v.name==n for n,v in views.items())

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name', NAMES)
def test_view_gives_an_image(name, kind):
    im = KINDS[kind].copy()
    out = views[name].change(im)
    assert (out.shape, out.dtype)==(im.shape, np.uint8) and (im==KINDS[kind]).all()
    if kind!='colour': assert (out==out[..., :1]).all()
    assert (views[name].change(im)==out).all()

@pytest.mark.parametrize('name', NAMES)
def test_undo_brings_every_pixel_back(name):
    p = torch.rand(2, 3, 9, 14)
    want = p.flip(MOVES[name]) if name in MOVES else p
    assert torch.equal(views[name].undo(p), want)

@pytest.mark.parametrize('name', MOVES)
def test_flips_are_exact(name):
    im = KINDS['colour']
    assert (views[name].change(im)==np.flip(im, [d%2 for d in MOVES[name]])).all()
    assert (views[name].change(views[name].change(im))==im).all()

@pytest.mark.parametrize('name', [n for n in NAMES if n not in MOVES])
def test_photometric_views_move_nothing(name):
    im = np.full((60, 60, 3), 60, np.uint8)
    im[20:32, 36:48] = 190, 150, 170
    yy,xx = np.where((lambda o: o>(int(o.min())+int(o.max()))/2)(views[name].change(im)[..., 0]))
    assert abs(yy.mean()-25.5)<0.6 and abs(xx.mean()-41.5)<0.6

def test_h_flip_mirrors_left_and_right():
    im = np.zeros((4, 6, 3), np.uint8)
    im[:, 0] = 255
    assert (views['H Flip'].change(im)[:, -1]==255).all() and (views['H Flip'].change(im)[:, :-1]==0).all()

def test_gamma_is_not_the_identity():
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, -1)
    out = views['Gamma'].change(ramp)[0, :, 0].astype(int)
    assert (out[0], out[255])==(0, 255) and (np.diff(out)>=0).all() and (out[1:255]>np.arange(1, 255)).mean()>0.99

@pytest.mark.parametrize('typed,name', [('h flip', 'H Flip'), ('HFLIP', 'H Flip'), ('h+v flip', 'H+V Flip'), ('2d filter', '2D-Filter'), ('equalize_histogram', 'Equalize histogram')])
def test_names_are_forgiving(typed, name): assert get_views(typed)==get_views([typed])==[views[name]]

def test_get_views():
    assert get_views([])==get_views(())==[]
    v = View('mine', lambda o: o, lambda p: p)
    assert get_views([v, 'Gamma'])==[v, views['Gamma']]

@pytest.mark.parametrize('names,message', [(['Rotate'], "Unknown view 'Rotate'"), (['gama'], "Did you mean 'Gamma'"), (['Gamma', 'gamma'], 'Gamma named more than once'), ([3], "Unknown view 3"), ([''], 'Unknown view')])
def test_wrong_names(names, message):
    with pytest.raises(ValueError, match=message): get_views(names)

def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match='registered already'): register_view('Gamma')(lambda o: o)
    assert len(views)==10
