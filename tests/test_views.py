"Views: one by one, with an exact inverse where they move pixels, and valid where they change light"
import numpy as np, pytest, torch

from semisup_seg.annotation.views import View, get_views, register_view, view_size, views

FLIPS = {'H Flip': (-1,), 'V Flip': (-2,), 'H+V Flip': (-2, -1)}
ROTATIONS = 'Rotate 90', 'Rotate 270'
SCALES = {'Scale 0.75': 0.75, 'Scale 1.25': 1.25}
PHOTOMETRIC = 'Blurring', 'Gamma', 'Gaussian Blur', 'Median Blur', 'Bilateral Filter', 'Equalize histogram', '2D-Filter'
rng = np.random.default_rng(0)
IMAGES = dict(grey=np.repeat(rng.integers(0, 256, (33, 50, 1)), 3, -1).astype(np.uint8), colour=rng.integers(0, 256, (33, 50, 3)).astype(np.uint8),
    black=np.zeros((20, 31, 3), np.uint8), white=np.full((20, 31, 3), 255, np.uint8))

def labels_by_value(im):
    "A network that moves with the image: one-hot labels `(1, 4, h, w)` by the brightness of each pixel"
    return torch.nn.functional.one_hot(torch.from_numpy(np.ascontiguousarray(im[..., 0])).long()//64, 4).movedim(-1, 0)[None].float()

def test_the_names_and_which_views_are_geometric():
    assert sorted(views)==sorted([*FLIPS, *ROTATIONS, *SCALES, *PHOTOMETRIC]) and all(v.name==n for n,v in views.items())
    assert {n for n,v in views.items() if v.is_geometric}=={*FLIPS, *ROTATIONS, *SCALES}

@pytest.mark.parametrize('kind', IMAGES)
def test_every_view_gives_an_image_and_leaves_its_own_alone(kind):
    im = IMAGES[kind]
    before,size = im.copy(), im.shape[:2]
    for name,v in views.items():
        out = v.apply(im)
        want = size[::-1] if name in ROTATIONS else tuple(round(o*SCALES.get(name, 1)) for o in size)
        assert (out.shape, out.dtype)==((*want, 3), np.uint8) and (im==before).all(), name
        assert view_size(v, size)==want and (v.apply(im)==out).all(), name
        assert kind=='colour' or (out==out[..., :1]).all(), f'{name} colours a grey image'

@pytest.mark.parametrize('kind', ['grey', 'colour'])
def test_labels_come_back_exactly_from_flips_and_rotations(kind):
    im = IMAGES[kind]
    for name in (*FLIPS, *ROTATIONS):
        v = views[name]
        assert torch.equal(v.invert(labels_by_value(v.apply(im)), im.shape[:2]), labels_by_value(im)), name
        assert not torch.equal(labels_by_value(v.apply(im)).flatten(), labels_by_value(im).flatten()), f'{name} changes nothing'

@pytest.mark.parametrize('size', [(64, 96), (65, 97), (101, 58)])
def test_labels_come_back_nearly_from_scales(size):
    yy,xx = np.mgrid[:size[0], :size[1]]
    r = np.hypot(yy-30, xx-25)
    im = np.repeat(np.uint8(r<20)[..., None]*200, 3, -1)
    for name in SCALES:
        back = views[name].invert(labels_by_value(views[name].apply(im)), size).argmax(1)
        same = (back==labels_by_value(im).argmax(1))[0]
        assert back.shape[1:]==size and same.float().mean()>0.97 and same[torch.from_numpy(np.abs(r-20)>=3)].all(), name

def test_where_nothing_moves_the_inverse_changes_nothing():
    p = torch.rand(2, 3, 9, 14)
    for name in PHOTOMETRIC: assert torch.equal(views[name].invert(p, (9, 14)), p), name

def test_flips_exchange_the_sides_they_name():
    im = IMAGES['colour']
    for name,dims in FLIPS.items():
        assert (views[name].apply(im)==np.flip(im, [d%2 for d in dims])).all() and (views[name].apply(views[name].apply(im))==im).all(), name
    left = np.zeros((4, 6, 3), np.uint8)
    left[:, 0] = 255
    assert (views['H Flip'].apply(left)[:, -1]==255).all() and (views['H Flip'].apply(left)[:, :-1]==0).all()

def test_photometric_views_move_nothing():
    im = np.full((60, 60, 3), 60, np.uint8)
    im[20:32, 36:48] = 190, 150, 170
    for name in PHOTOMETRIC:
        out = views[name].apply(im)[..., 0].astype(int)
        yy,xx = np.where(out>(out.min()+out.max())/2)
        assert abs(yy.mean()-25.5)<0.6 and abs(xx.mean()-41.5)<0.6, name

def test_gamma_is_not_the_identity():
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, -1)
    out = views['Gamma'].apply(ramp)[0, :, 0].astype(int)
    assert (out[0], out[255])==(0, 255) and (np.diff(out)>=0).all() and (out[1:255]>np.arange(1, 255)).mean()>0.99

TYPED = {'h flip': 'H Flip', 'HFLIP': 'H Flip', 'h+v flip': 'H+V Flip', '2d filter': '2D-Filter', 'equalize_histogram': 'Equalize histogram', 'rotate90': 'Rotate 90', 'scale 1.25': 'Scale 1.25'}

def test_names_are_forgiving():
    for typed,name in TYPED.items(): assert get_views(typed)==get_views([typed])==[views[name]], typed

def test_get_views_takes_views_and_nothing():
    mine = View('mine', lambda o: o, lambda probs, size: probs)
    assert get_views([])==get_views(())==[] and get_views([mine, 'Gamma'])==[mine, views['Gamma']] and get_views(mine)==[mine]

WRONG = [(['Rotate'], "Unknown view 'Rotate'"), (['Scale 2'], "Unknown view 'Scale 2'"), (['gama'], "Did you mean 'Gamma'"),
    (['Gamma', 'gamma'], 'Gamma named more than once'), ([3], "Unknown view 3"), ([''], 'Unknown view')]

def test_wrong_names_are_told():
    for names,message in WRONG:
        with pytest.raises(ValueError, match=message): get_views(names)

def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match='registered already'): register_view('Gamma')(lambda o: o)
    assert len(views)==14

def test_a_view_of_ones_own(monkeypatch):
    monkeypatch.setattr('semisup_seg.annotation.views.views', dict(views))
    def left_right(im): return im[:, ::-1]
    assert register_view('Mirror', lambda probs, size: probs.flip(-1))(left_right) is left_right
    mirror, = get_views('mirror')
    assert mirror.is_geometric and torch.equal(mirror.invert(torch.arange(3.).view(1, 1, 1, 3), (1, 3)).flatten(), torch.tensor([2., 1, 0]))
