"One tester for every registered network: what all of them promise, over small encoders"
import contextlib, copy, gc, io, re
from pathlib import Path

import numpy as np, onnxruntime, pytest, torch
from conftest import disc, photo
from fastai.torch_core import norm_types
from torch import nn

import semisup_seg
from semisup_seg.data.loaders import seg_dls
from semisup_seg.models.core import build_model, networks
from semisup_seg.training.learner import encoder_splitter, fit, seg_learner
from semisup_seg.training.losses import CEDiceLoss
from semisup_seg.training.metrics import confusion_counts, dice
from semisup_seg.models.smp import ClassicUNet

SMALL = dict(HRNet='hrnet_w18_small', DPT='vit_small_patch14_dinov2', Segformer='mit_b0')
def small(n): return SMALL.get(n.name, 'test_resnet') if n.encoders else None

CASES = [(n.name, small(n)) for n in networks.values()] + [('U-Net', None), ('Segformer', 'test_resnet')]
FIRST = 'LEDNet', 'CGNet', 'OCNet', 'PSPNet', 'FPN', 'Linknet', 'Segformer', 'DPT'  # these have all operators, see `CONVERTED`
CASES.sort(key=lambda c: c[0] not in FIRST)

@pytest.fixture(scope='module', autouse=True)
def narrow_unet():
    "The classic U-Net with an eighth of its channels: the same structure in a fraction of the time"
    with pytest.MonkeyPatch.context() as m:
        m.setattr(ClassicUNet.__init__, '__defaults__', (3, (8, 16, 32, 64, 128)))
        yield

@pytest.fixture(scope='module', params=CASES, ids=lambda c: ' '.join(filter(None, c)))
def net(request):
    "Each network once; a test that changes more than running means and gradients takes a copy"
    torch.manual_seed(0)
    return build_model(*request.param, n_out=3)

def image(net, n=1, h=None, w=None): return torch.rand(n, 3, h or net.min_size, w or net.min_size)

# --- shape

def test_sizes_that_no_power_of_two_divides(net):
    net.eval()
    for h,w in ((65, 97), (33, 33)):
        h,w = max(h, net.min_size), max(w, net.min_size)
        with torch.no_grad(): assert net(image(net, h=h, w=w)).shape==(1, 3, h, w)

def test_channels_in_and_classes_out(net):
    s = net.min_size
    for n_in,n_out in ((1, 2), (4, 21)):
        m = build_model(**net.config | dict(n_in=n_in, n_out=n_out)).eval()
        with torch.no_grad(): assert m(torch.rand(1, n_in, s, s)).shape==(1, n_out, s, s), f'{n_in} channels, {n_out} classes'

def test_stated_minimum_works_and_below_it_is_refused(net):
    s = net.min_size
    assert net.train()(image(net, 2)).isfinite().all()
    for h,w in ((s-1, s), (s, s-1)):
        with pytest.raises(ValueError, match=re.escape(f'{s} pixels a side, got {h}×{w}')): net(image(net, h=h, w=w))

# --- a batch of one image

POOLED = {'LEDNet', 'DeepLabV3+', 'DeepLabV3', 'PAN', 'UPerNet'}  # normalise a map of one pixel

def test_one_image_trains_the_network_or_the_error_names_it_and_bs(net):
    name,s = net.config['name'], max(64, net.min_size)
    one = image(net, 1, s, s)
    if name not in POOLED: return net.train()(one).mean().backward()
    message = f'{name}: a batch of one image of {s}×{s} pixels cannot be normalised in training; use bs of 2 or more'
    with pytest.raises(ValueError, match=re.escape(message)): net.train()(one)
    assert net(torch.cat([one, one])).isfinite().all() and net.eval()(one).isfinite().all()

def test_one_image_of_the_smallest_size_reads_the_same():
    m = build_model('U-Net', 'test_resnet').train()
    with pytest.raises(ValueError, match='U-Net: a batch of one image of 32×32 pixels.*bs of 2 or more'): m(image(m))

def test_training_with_a_batch_size_of_one_ends_with_that_error(trained_discs):
    learn = seg_learner(seg_dls(trained_discs, size=(64, 64), bs=1), 'DeepLabV3+', 'test_resnet')
    with learn.no_bar(), learn.no_logging(), pytest.raises(ValueError, match=r'DeepLabV3\+: a batch of one image'): fit(learn, 1, lr=1e-3)

def test_other_errors_of_a_network_pass():
    m = build_model('U-Net', 'test_resnet')
    m.net.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(ValueError('another fault')))
    with pytest.raises(ValueError, match='^another fault$'): m(image(m))

# --- behaviour

def test_gradients_reach_every_parameter(net):
    m = copy.deepcopy(net).train()
    for o in m.modules():
        if isinstance(o, nn.BatchNorm2d): nn.init.ones_(o.weight)  # some begin at zero, which hides what lies behind
    s = max(64, m.min_size)  # a last map of one position leaves attention nothing to choose from
    m(image(m, 2, s, s)).square().mean().backward()
    assert not [n for n,p in m.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert all(p.grad.abs().sum()>0 for n,p in m.encoder.named_parameters() if p.dim()>1)

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

def test_autocast_is_finite(net):
    "Half precision has the smaller range, so its gradients stand for those of bfloat16"
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast('cpu', dtype), torch.no_grad(): y = net.eval()(image(net))
        assert y.dtype==dtype and y.isfinite().all(), dtype
    net.zero_grad()
    truth = torch.zeros(2, net.min_size, net.min_size, dtype=torch.long)
    with torch.autocast('cpu', torch.float16): CEDiceLoss()(net.train()(image(net, 2)), truth).backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())

def test_state_dict_round_trip(net, tmp_path):
    torch.save(net.state_dict(), tmp_path/'m.pth')
    again = build_model(**net.config)
    again.load_state_dict(torch.load(tmp_path/'m.pth', weights_only=True))
    x = image(net)
    with torch.no_grad(): assert torch.equal(net.eval()(x), again.eval()(x))
    assert again.config==net.config

# --- export

def kind(m): return type(m), [p.shape for p in m.parameters()]

class Maps(nn.Module):
    "Stands for an encoder: maps of the same shapes"
    def __init__(self, encoder):
        super().__init__()
        with torch.no_grad(): maps = encoder(torch.rand(1, 3, 128, 128))
        self.convs = nn.ModuleList(nn.Conv2d(3, m.shape[1], 1, 128//m.shape[-1]) for m in maps)

    def forward(self, x): return [conv(x) for conv in self.convs]

def shortened(net):
    "A copy of `net` without what is exported anyway: blocks like the one before, and the encoder that U-Net has, too"
    net = copy.deepcopy(net).eval()
    for m in [o for o in net.modules() if isinstance(o, nn.Sequential)]:
        blocks = list(m.named_children())
        for (_,before),(k,block) in zip(blocks, blocks[1:]):
            if len(kind(block)[1])>3 and kind(block)==kind(before): m.add_module(k, nn.Identity())
    if net.config['backbone']=='test_resnet' and net.config['name'] not in ('U-Net', 'DenseASPP', 'OCNet'):
        net.net.encoder.model = Maps(net.net.encoder.model)
    return net

def operators(program):
    "What `program` consists of: its operators, those that pool with the sizes they pool to"
    calls = [n for n in program.graph.nodes if n.op=='call_function']
    return {str(n.target) for n in calls} | {str(n.args[1:]) for n in calls if 'adaptive' in str(n.target)}

def onnx_logits(program, x, file):
    "The logits of `x` after `program` went through an ONNX file"
    with contextlib.redirect_stdout(io.StringIO()): torch.onnx.export(program, dynamo=True).save(file)
    session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])

CONVERTED = set()  # operators that went to ONNX; a network of these alone is not converted again

def test_exported_programs_agree(net, tmp_path):
    m = shortened(net)
    x = image(m, h=m.min_size+1, w=m.min_size+33)
    with torch.no_grad(): y = m(x)
    gc.disable()  # thousands of small objects, for a second
    try:
        program = torch.export.export(m, (x,))
        z = program.module()(x) if operators(program)<=CONVERTED else onnx_logits(program, x, tmp_path/'m.onnx')
    finally: gc.enable()
    CONVERTED.update(operators(program))
    assert torch.allclose(z, y, atol=1e-4) and y.std()>1e-3

def test_no_scripting(net): assert not [m for m in net.modules() if isinstance(m, torch.jit.ScriptModule)]

def test_no_module_scripts():
    assert not [f for f in Path(semisup_seg.__file__).parent.rglob('*.py') if 'torch.jit' in f.read_text(encoding='utf-8')]

# --- freezing

def test_freezing_finds_encoder_and_decoder(net):
    encoder,decoder = ({id(p) for p in group} for group in encoder_splitter(net))
    assert encoder=={id(p) for p in net.encoder.parameters()} and decoder and not encoder & decoder
    assert encoder | decoder=={id(p) for p in net.parameters()}

@pytest.mark.parametrize('name,backbone', [('CGNet', None), ('U-Net', 'test_resnet'), ('DPT', 'test_vit')])
def test_a_frozen_encoder_stays_while_the_decoder_learns(name, backbone, trained_discs):
    learn = seg_learner(seg_dls(trained_discs, size=(32, 32), bs=2), name, backbone)
    learn.freeze()
    encoder,decoder = encoder_splitter(learn.model)
    norms = {id(p) for m in learn.model.modules() if isinstance(m, norm_types) for p in m.parameters()}
    held = [p for p in encoder if id(p) not in norms]
    assert held and not any(p.requires_grad for p in held) and all(p.requires_grad for p in decoder)
    held_before,before = ([p.detach().clone() for p in group] for group in (held, decoder))
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
    assert all(torch.equal(a, b) for a,b in zip(held_before, held))
    assert any(not torch.equal(a, b) for a,b in zip(before, decoder))

# --- learning

LEARN = {  # encoder, side of the image, steps, highest learning rate, further options
    'CGNet': (None, 64, 12, 1e-2), 'FPENet': (None, 64, 16, 1e-2), 'LEDNet': (None, 64, 30, 2e-2), 'U-Net': (None, 64, 16, 1e-2),
    'HRNet': ('hrnet_w18_small', 64, 16, 1e-2), 'MANet': ('test_resnet', 64, 16, 1e-2), 'DeepLabV3+': ('test_resnet', 64, 16, 1e-2),
    'PAN': ('test_resnet', 128, 16, 1e-2), 'DenseASPP': ('test_resnet', 64, 16, 1e-2, dict(output_stride=8)),
    'OCNet': ('test_resnet', 64, 16, 1e-2, dict(output_stride=8))}

def four_discs(size):
    "Four images of a disc, `(4, 3, size, size)` in 0–1, and their masks"
    rng = np.random.default_rng(0)
    masks = [disc(size, size, rng) for _ in range(4)]
    images = [torch.from_numpy(photo(m, rng)/255).float() for m in masks]
    x = torch.stack(images)[:, None].repeat(1, 3, 1, 1)
    return x.contiguous(memory_format=torch.channels_last), torch.from_numpy(np.stack(masks)).long()

def test_all_ten_learn(): assert set(LEARN)=={n.name for n in networks.values() if not n.more}

@pytest.mark.parametrize('name', LEARN)
def test_learns_four_images(name):
    backbone,size,steps,lr,*options = LEARN[name]
    torch.manual_seed(0)
    m = build_model(name, backbone, **dict(*options)).to(memory_format=torch.channels_last)
    for o in m.modules():
        if isinstance(o, nn.BatchNorm2d): o.momentum = 0.4  # running means that follow within so few steps
    x,y = four_discs(size)
    opt = torch.optim.AdamW(m.parameters(), lr)
    rate = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=steps)
    for _ in range(steps):
        opt.zero_grad()
        CEDiceLoss()(m(x), y).backward()
        opt.step()
        rate.step()
    with torch.no_grad(): score = dice(confusion_counts(m.eval()(x).argmax(1), y, 2))[1].item()
    assert score>0.85, f'Dice of the disc after {steps} steps: {score:.3f}'
