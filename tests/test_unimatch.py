"UniMatch: complementary channels, encoders of all networks, and the mean over two views"
from types import SimpleNamespace

import pytest, torch
from conftest import NET, OPTIONS, SIZE
from fastai.callback.core import Callback
from fastai.torch_core import set_seed
from torch import nn

import semisup_seg.all  # registers networks and methods  # chkstyle: ignore
from semisup_seg.data.folder import unlabeled_files
from semisup_seg.data.loaders import seg_dls
from semisup_seg.distillation.batches import unlabeled_loader
from semisup_seg.distillation.fixmatch import confident_loss
from semisup_seg.distillation.methods import online_training
from semisup_seg.distillation.run import read_events
from semisup_seg.distillation.unimatch import ComplementaryDropout, UniMatch, change_maps, check_encoder, drop_once, encoder_maps
from semisup_seg.models.core import build_model, networks, register
from semisup_seg.models.smp import ClassicUNet
from semisup_seg.training.learner import seg_learner

SMALL = dict(HRNet='hrnet_w18_small', DPT='vit_small_patch14_dinov2', Segformer='mit_b0')
def small(n): return SMALL.get(n.name, 'test_resnet') if n.encoders else None

# --- complementary dropout

def test_what_one_view_loses_the_other_keeps_twice_for_half_of_the_images():
    for n in (1, 2, 5, 8):
        drop = ComplementaryDropout(n)
        a,b = drop.scale(64).chunk(2)
        assert torch.equal(a+b, torch.full((n, 64), 2.)) and set(a.unique().tolist())<={0, 1, 2}
        dropped = [set(o.tolist())=={0, 2} for o in a]
        assert dropped.count(True)==n-n//2 and all(d or (o==1).all() for d,o in zip(dropped, a))
        c = drop.scale(48)[:n]
        assert [set(o.tolist())=={0, 2} for o in c]==dropped  # the same images in maps of other channels
        assert drop.scale(64)[:n] is not a and torch.equal(drop.scale(64)[:n], a)  # drawn once

def test_channels_of_labelled_images_stay_and_the_mean_over_the_views_is_the_map():
    f = torch.rand(7, 16, 2, 2)
    f[5:] = f[3:5]  # the same two images in both views
    g = ComplementaryDropout(2)(f)
    assert torch.equal(g[:3], f[:3]) and not torch.equal(g[3:5], g[5:])
    assert torch.allclose((g[3:5]+g[5:])/2, f[3:5])

def test_images_tokens_and_empty_maps_are_left_alone():
    image,fine,token,empty = torch.ones(2, 3, 8, 8), torch.ones(2, 3, 4, 4), torch.ones(2, 1, 5), torch.ones(2, 0, 4, 4)
    got = change_maps((image, [fine, empty], [token, None]), image, lambda o: o*0)
    assert isinstance(got, tuple) and got[0] is image and got[1][1] is empty and got[2][0] is token and got[2][1] is None
    assert not got[1][0].any()

@pytest.fixture
def narrow_unet(monkeypatch): monkeypatch.setattr(ClassicUNet.__init__, '__defaults__', (3, (8, 16, 32, 64, 128)))

@pytest.mark.parametrize('name,backbone', [(n.name, small(n)) for n in networks.values()] + [('U-Net', None)])
def test_the_encoder_of_every_network_gives_maps_whose_channels_can_be_dropped_once(name, backbone, narrow_unet):
    set_seed(0)
    net = build_model(name, backbone, n_out=3).eval()
    check_encoder(net)
    x = torch.rand(2, 3, net.min_size, net.min_size)
    drop = ComplementaryDropout(2)
    whole = drop.whole.item()
    with torch.no_grad():
        before = net(torch.cat([x, x]))
        drop_once(net.encoder, drop)
        during = net(torch.cat([x, x]))
        after = net(torch.cat([x, x]))
    torch.testing.assert_close(during[whole], before[whole], atol=1e-4, rtol=1e-3)
    first,second = during[1-whole], during[3-whole]
    assert (first-second).abs().max()>1e-6 and (first-before[1-whole]).abs().max()>1e-6
    torch.testing.assert_close(after, before)

class Flat(nn.Module):
    "A network whose encoder gives vectors"
    def __init__(self, n_in, n_out):
        super().__init__()
        self.encoder = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n_in, 4))
        self.head = nn.Linear(4, n_out)
    def forward(self, x): return self.head(self.encoder(x))[..., None, None].expand(-1, -1, *x.shape[-2:])

@pytest.fixture
def flat():
    @register('Flat', 'vectors, no maps', 'https://example.org')
    def _flat(backbone, n_out, n_in): return Flat(n_in, n_out)
    yield 'Flat', None
    del networks['Flat']

def test_a_network_whose_encoder_gives_no_maps_is_refused_before_training(flat, trained_discs, tmp_path, untrained):
    assert encoder_maps(nn.Conv2d(3, 2, 1))==[]
    with pytest.raises(ValueError, match='Flat has none; use FixMatch'): online_training('UniMatch', flat, trained_discs, tmp_path/'out', **OPTIONS)
    assert not untrained and not [e for e in read_events(tmp_path/'out') if e['stage']]
    learn = seg_learner(seg_dls(trained_discs, SIZE, 2), *flat)
    with pytest.raises(ValueError, match='Flat has none'), learn.no_bar(): learn.fit(1, cbs=UniMatch(None))

def test_finding_the_maps_changes_nothing(tiny):
    net = build_model(*NET).train()
    before = {k: v.clone() for k,v in net.state_dict().items()}
    assert len(encoder_maps(net))==5 and net.training
    assert all(torch.equal(v, before[k]) for k,v in net.state_dict().items()) and not net.encoder._forward_hooks

# --- the callback

class Record(Callback):
    order = 70
    run_valid = False
    def before_fit(self): self.steps = []
    def after_loss(self):
        cb = self.uni_match
        self.steps.append(SimpleNamespace(images=self.x.detach().clone(), pred=len(self.pred), answer=cb.answer.detach(), labels=cb.labels, pseudo=cb.pseudo,
            loss=self.loss_grad.item(), labels_alone=self.learn.loss_func(self.pred, self.y).item(), hooks=len(self.model.encoder._forward_hooks)))

@pytest.fixture(scope='module')
def steps(trained_discs):
    "What `Record` saw of two steps of two labelled and three other images"
    set_seed(0)
    learn = seg_learner(seg_dls(trained_discs, SIZE, 2), *NET)
    record = Record()
    cb = UniMatch(unlabeled_loader(unlabeled_files(trained_discs), SIZE, 3), threshold=0.5, weight=2.)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3, cbs=[cb, record])
    assert cb.name=='uni_match' and not any(p.requires_grad for p in cb.teacher.parameters())
    return record.steps

def test_the_student_sees_two_different_strong_views_of_each_image(steps):
    for step in steps:
        assert (len(step.images), step.pred, len(step.answer), len(step.labels), step.hooks)==(8, 2, 6, 6, 0)
        assert not torch.equal(step.images[2:5], step.images[5:])

def test_the_loss_is_the_mean_over_the_two_views(steps):
    for step in steps:
        first,second = (confident_loss(o, labels).item() for o,labels in zip(step.answer.chunk(2), step.labels.chunk(2)))
        assert first!=second
        assert step.loss==pytest.approx(step.labels_alone + 2*(first+second)/2, abs=1e-4)
