"One tester for every registered network: what all of them promise, over small encoders"
import contextlib, io, re
from pathlib import Path

import numpy as np, onnxruntime, pytest, torch
import torch.nn.functional as F
from fastai.torch_core import norm_types

import semisup_seg
from semisup_seg.data.sources import brain_volumes
from semisup_seg.training.losses import CEDiceLoss
from semisup_seg.training.metrics import dice, confusion_counts
from semisup_seg.training.learner import encoder_splitter, seg_learner
from semisup_seg.models.core import build_model, networks
from test_models import SMALL


def small(n): return SMALL.get(n.name, 'test_resnet') if n.encoders else None

CASES = [(n.name, small(n)) for n in networks.values()] + [('U-Net', None), ('Segformer', 'test_resnet'), ('DPT', 'vit_small_patch14_dinov2')]
each = pytest.mark.parametrize('name,backbone', CASES, ids=lambda o: o or 'own')

@pytest.fixture(scope='module', params=CASES, ids=lambda c: ' '.join(filter(None, c)))
def net(request):
    torch.manual_seed(0)
    return build_model(*request.param, n_out=3)

def image(net, n=1, h=None, w=None): return torch.rand(n, 3, h or net.min_size, w or net.min_size)

# --- shape

@pytest.mark.parametrize('h,w', [(65, 97), (33, 33), (128, 64)])
def test_odd_sizes(net, h, w):
    h,w = max(h, net.min_size), max(w, net.min_size)
    with torch.no_grad(): assert net.eval()(image(net, h=h, w=w)).shape==(1, 3, h, w)

def test_stated_minimum_works_and_below_it_is_refused(net):
    s = net.min_size
    assert net.train()(image(net, 2)).isfinite().all()
    for h,w in ((s-1, s), (s, s-1)):
        with pytest.raises(ValueError, match=re.escape(f'{s} pixels a side, got {h}×{w}')): net(image(net, h=h, w=w))

@pytest.mark.parametrize('n_in', [1, 2, 3, 4])
@each
def test_channels_in(name, backbone, n_in):
    m = build_model(name, backbone, n_in=n_in).eval()
    with torch.no_grad(): assert m(torch.rand(1, n_in, m.min_size, m.min_size)).shape==(1, 2, m.min_size, m.min_size)

@pytest.mark.parametrize('n_out', [2, 21])
@each
def test_classes_out(name, backbone, n_out):
    m = build_model(name, backbone, n_out).eval()
    with torch.no_grad(): assert m(image(m)).shape==(1, n_out, m.min_size, m.min_size)

# --- behaviour

def test_gradients_reach_every_parameter(net):
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d): torch.nn.init.ones_(m.weight)  # some begin at zero, which hides what lies behind
    net.train().zero_grad()
    s = max(64, net.min_size)  # a last map of one position leaves attention nothing to choose from
    net(image(net, 2, s, s)).square().mean().backward()
    assert not [n for n,p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert all(p.grad.abs().sum()>0 for n,p in net.encoder.named_parameters() if p.dim()>1)

def test_eval_is_deterministic_and_each_image_counts_alone(net):
    net.eval()
    x = image(net, 2)
    with torch.no_grad(): a,b,alone = net(x), net(x), net(x[1:])
    assert torch.equal(a, b) and torch.allclose(a[1:], alone, atol=1e-5)
    assert not torch.allclose(a[0], a[1], atol=1e-4)

def test_the_image_matters_everywhere(net):
    "No corner of the answer ignores the image, and none is a copy of another"
    net.eval()
    with torch.no_grad(): change = (net(image(net))-net(image(net))).abs().amax(1)[0]
    assert (change>0).float().mean()>0.99

def test_channels_last_gives_the_same(net):
    net.eval()
    x = image(net)
    with torch.no_grad():
        a = net(x)
        b = net.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    net.to(memory_format=torch.contiguous_format)
    assert torch.allclose(a, b, atol=1e-4)

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_finite(net, dtype):
    with torch.autocast('cpu', dtype), torch.no_grad(): y = net.eval()(image(net))
    assert y.dtype==dtype and y.isfinite().all()
    with torch.autocast('cpu', dtype): CEDiceLoss()(net.train()(image(net, 2)), torch.zeros(2, net.min_size, net.min_size, dtype=torch.long)).backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())

def test_state_dict_round_trip(net, tmp_path):
    torch.save(net.state_dict(), tmp_path/'m.pth')
    again = build_model(**net.config)
    again.load_state_dict(torch.load(tmp_path/'m.pth', weights_only=True))
    x = image(net)
    with torch.no_grad(): assert torch.equal(net.eval()(x), again.eval()(x))
    assert again.config==net.config

# --- export

def test_no_scripting(net):
    assert not [m for m in net.modules() if isinstance(m, torch.jit.ScriptModule)]
    assert not [f for f in Path(semisup_seg.__file__).parent.rglob('*.py') if 'torch.jit' in f.read_text(encoding='utf-8')]

def test_exported_programs_agree(net, tmp_path):
    x = image(net.eval(), h=net.min_size+1, w=net.min_size+33)
    with torch.no_grad(): y = net(x)
    program = torch.export.export(net, (x,))
    assert torch.allclose(program.module()(x), y, atol=1e-4)
    with contextlib.redirect_stdout(io.StringIO()): torch.onnx.export(program, dynamo=True).save(tmp_path/'m.onnx')
    session = onnxruntime.InferenceSession(tmp_path/'m.onnx', providers=['CPUExecutionProvider'])
    z = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    assert np.abs(z-y.numpy()).max()<1e-4 and y.std()>1e-3

# --- freezing

def test_freezing_finds_encoder_and_decoder(net):
    encoder,decoder = encoder_splitter(net)
    assert encoder and decoder and not {id(p) for p in encoder} & {id(p) for p in decoder}
    assert {id(p) for p in encoder+decoder}=={id(p) for p in net.parameters()}

@each
def test_a_frozen_encoder_stays_while_the_decoder_learns(name, backbone, trained_discs):
    from semisup_seg.data.loaders import seg_dls
    size = max(32, networks[name].min_size)
    learn = seg_learner(seg_dls(trained_discs, size=(size, size), bs=2), name, backbone)
    learn.freeze()
    norms = {id(p) for m in learn.model.modules() if isinstance(m, norm_types) for p in m.parameters()}
    held = [p for p in learn.model.encoder.parameters() if id(p) not in norms]
    assert held and not any(p.requires_grad for p in held) and all(p.requires_grad for p in encoder_splitter(learn.model)[1])
    before = [p.detach().clone() for p in held], [p.detach().clone() for p in encoder_splitter(learn.model)[1]]
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
    assert all(torch.equal(a, b) for a,b in zip(before[0], held))
    assert any(not torch.equal(a, b) for a,b in zip(before[1], encoder_splitter(learn.model)[1]))

# --- learning

LITE0 = 'tf_efficientnet_lite0'
LEARN = {  # encoder, side of the image, steps, highest learning rate, further options
    'CGNet': (None, 192, 60, 3e-3), 'FPENet': (None, 128, 80, 3e-3), 'LEDNet': (None, 192, 120, 1e-2), 'U-Net': (None, 64, 40, 3e-3),
    'HRNet': ('hrnet_w18_small', 128, 60, 3e-3), 'MANet': (LITE0, 96, 50, 3e-3), 'DeepLabV3+': (LITE0, 192, 60, 3e-3), 'PAN': (LITE0, 192, 60, 3e-3),
    'DenseASPP': (LITE0, 192, 60, 3e-3, dict(output_stride=8)), 'OCNet': (LITE0, 192, 60, 3e-3, dict(output_stride=8))}

def four_slices(size):
    "Four slices of `brain` without their dark margin, `(4, 3, size, size)` in 0–1, and their classes"
    image,label = (torch.from_numpy(v[45:91:15, 52:180, 34:162].copy())[:, None].float() for v in brain_volumes())
    x = F.interpolate(image/255, (size, size), mode='bilinear').repeat(1, 3, 1, 1)
    return x.contiguous(memory_format=torch.channels_last), F.interpolate(label, (size, size))[:, 0].long()

def test_all_ten_learn(): assert set(LEARN)=={n.name for n in networks.values() if not n.more}

@pytest.mark.slow
@pytest.mark.parametrize('name', LEARN)
def test_overfits_four_slices(name):
    backbone,size,steps,lr,*options = LEARN[name]
    torch.manual_seed(0)
    m = build_model(name, backbone, 3, backbone==LITE0, **dict(*options)).to(memory_format=torch.channels_last)
    x,y = four_slices(size)
    opt = torch.optim.AdamW(m.parameters(), lr)
    rate = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=steps)
    for _ in range(steps):
        opt.zero_grad()
        CEDiceLoss()(m(x), y).backward()
        opt.step()
        rate.step()
    with torch.no_grad(): grey,white = dice(confusion_counts(m.eval()(x).argmax(1), y, 3))[1:]
    assert min(grey, white)>0.9, f'Dice after {steps} steps: grey matter {grey:.3f}, white matter {white:.3f}'
