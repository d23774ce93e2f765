"Networks by name, and weights that are what they claim to be"
import json, re, subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest, timm, torch
from conftest import ROOT, Touch, python
from safetensors.torch import save_file

from semisup_seg.display import Table
from semisup_seg.models.weights import LITE, _published, file_weights, load_encoder
from semisup_seg.models.core import build_model, check_request
from semisup_seg.models.cost import cost, more_networks, n_params
from semisup_seg.models.cost import STRONG, network_table, speeds, stages, strong_teachers
from semisup_seg.models.core import networks
from semisup_seg.models.weights import packaged_weights

LITE0 = 'tf_efficientnet_lite0'
DINO = 'vit_small_patch14_dinov2'
DINOV3,DINOV3_VIT = 'convnext_tiny.dinov3_lvd1689m', 'vit_tiny_patch16_dinov3_qkvb'
SMALL = dict(HRNet='hrnet_w18_small', DPT='test_vit', Segformer='mit_b0')
KINDS = 'U-Net', 'DeepLabV3+', 'DenseASPP'  # one network for each way of building an encoder: as it is, dilated by smp, by us

def on_meta(name, backbone=None, *args, **kw):
    "A network on the `meta` device, where tensors have a shape and no values"
    device = 'cpu' if backbone=='mit_b0' else 'meta'  # smp reads numbers from tensors while it builds this one
    with torch.device(device): return build_model(name, backbone, *args, **kw).to('meta')

@pytest.fixture(scope='module')
def table(): return network_table().rows

def encoder_weights(name):
    torch.manual_seed(7)
    return timm.create_model(name).state_dict()

@pytest.fixture(scope='module')
def resnet(): return encoder_weights('resnet10t')

@pytest.fixture(scope='module')
def dino(): return encoder_weights(DINO)

@pytest.fixture(scope='module')
def mit():
    torch.manual_seed(7)
    return build_model('Segformer', 'mit_b0').encoder.state_dict()

def holds(model, weights):
    "True if every tensor of the encoder stands in `weights`"
    ours = {k.removeprefix('model.').replace('_', '.'): v for k,v in model.encoder.state_dict().items()}
    theirs = {k.replace('_', '.'): v for k,v in weights.items()}
    return len(ours)>20 and all(torch.equal(v, theirs[k]) for k,v in ours.items())

# --- the register

TEN = 'CGNet', 'DeepLabV3+', 'DenseASPP', 'FPENet', 'HRNet', 'LEDNet', 'MANet', 'OCNet', 'PAN', 'U-Net'
MORE = 'Unet++', 'Linknet', 'FPN', 'PSPNet', 'DeepLabV3', 'UPerNet', 'Segformer', 'DPT'

def test_registry_says_what_each_network_is():
    assert sorted(n.name for n in networks.values() if not n.more)==sorted(TEN) and sorted(more_networks())==sorted(MORE)
    for n in networks.values(): assert 3<=len(n.idea.split())<=5 and n.paper.startswith('https://') and n.min_size in (32, 128)

def test_one_module_registers_all(hub): assert hub[1]['registered']==len(TEN)+len(MORE)

@pytest.mark.parametrize('name', TEN)
def test_a_name_is_enough(name):
    m = on_meta(name.lower())
    assert m.config['name']==name and m.config['backbone']==networks[name].backbone

def test_encoder_where_none_is_named():
    for name in ('CGNet', 'FPENet', 'LEDNet', 'U-Net'): assert networks[name].backbone is None
    assert networks['DeepLabV3+'].backbone=='resnet50' and networks['HRNet'].backbone=='hrnet_w48'

@pytest.mark.parametrize('name', ['CGNet', 'FPENet', 'LEDNet'])
def test_own_encoder_takes_no_backbone(name):
    with pytest.raises(ValueError, match=f"{name} has an encoder of its own; backbone must be None, got 'resnet50'"): check_request(name, 'resnet50')
    with pytest.raises(ValueError, match='trains from scratch'): build_model(name, pretrained=True)

def test_a_network_for_one_family_of_encoders():
    with pytest.raises(ValueError, match="Unknown HRNet backbone 'resnet50'.*hrnet_w18") as e: build_model('HRNet', 'resnet50')
    assert 'resnet101' not in str(e.value)

@pytest.mark.parametrize('name', ['DenseASPP', 'OCNet', 'DeepLabV3+'])
def test_output_stride(name):
    x = torch.rand(1, 3, 64, 64, device='meta')
    for stride,side in ((None, 4), (16, 4), (8, 8)):
        m = on_meta(name, 'resnet10t', output_stride=stride).eval()
        assert m.encoder(x)[-1].shape[-1]==side and m(x).shape==(1, 2, 64, 64), stride
    again = on_meta(**m.config).eval()
    assert m.config['output_stride']==8 and again.encoder(x)[-1].shape[-1]==8

@pytest.mark.parametrize('name,backbone', [('DenseASPP', 'vit_tiny_patch16_224'), ('OCNet', 'edgenext_xx_small'), ('OCNet', 'dla34'), ('DenseASPP', 'mit_b0')])
def test_encoders_that_cannot_be_dilated(name, backbone):
    message = f"{name} cannot be built over '{backbone}': {backbone} cannot be dilated.*'resnet50'"
    with pytest.raises(ValueError, match=message): build_model(name, backbone)

@pytest.mark.parametrize('backbone', ['resnet50', 'convnext_tiny', LITE0])
def test_encoders_that_are_said_to_be_dilatable(backbone): assert on_meta('OCNet', backbone).encoder.feature_info.reduction()[-1]==16

def test_nothing_is_fetched_for_a_request_that_is_wrong(monkeypatch):
    monkeypatch.setattr('semisup_seg.models.core.hub_weights', lambda backbone: pytest.fail('asked the hub'))
    for wrong in (dict(n_out=1), dict(n_in=0), dict(output_stride=8)):
        with pytest.raises(ValueError): build_model('U-Net', 'resnet10t', pretrained=True, **wrong)

@pytest.mark.parametrize('args,message', [(dict(name='OCNet', output_stride=4), 'output_stride is 4; expected 8 or 16'),
    (dict(name='U-Net', output_stride=8), 'U-Net has no dilated encoder'), (dict(name='CGNet', output_stride=16), 'CGNet has no dilated encoder')])
def test_wrong_output_stride(args, message):
    with pytest.raises(ValueError, match=message): build_model(**args)

# --- what they cost

KNOWN = {'CGNet': (0.492, 1.31), 'DeepLabV3+': (26.7, 14.3), 'DenseASPP': (27.0, 14.1), 'FPENet': (0.1146, 0.27), 'HRNet': (65.8, 36.6),
    'LEDNet': (0.92, 2.19), 'MANet': (147.4, 29.1), 'OCNet': (33.9, 16.9), 'PAN': (24.3, 13.5), 'U-Net': (31.04, 75.3)}

@pytest.mark.parametrize('name', ['CGNet', 'FPENet', 'LEDNet', 'U-Net'])
def test_cost(name):
    "The others have theirs in the table, to two digits"
    p,m = cost(name)
    assert p/1e6==pytest.approx(KNOWN[name][0], rel=0.02) and m/1e9==pytest.approx(KNOWN[name][1], rel=0.05)

def test_unet_over_resnet50_as_published():
    p,m = cost('U-Net', 'resnet50')
    assert p/1e6==pytest.approx(32.5, rel=0.02) and m/1e9==pytest.approx(16.6, rel=0.05)

def test_cost_depends_on_size_and_classes():
    p,m = cost('U-Net', size=64)
    assert cost('U-Net', size=128)==(p, 4*m) and cost('U-Net', n_out=21, size=64)[0]-p==19*(64+1)

def test_cost_of_an_encoder_that_the_meta_device_cannot_build():
    assert cost('Segformer', 'mit_b0', size=64)[0]==n_params(build_model('Segformer', 'mit_b0'))

@pytest.mark.parametrize('name', [*TEN, 'Segformer', 'DPT'])
def test_stages_add_up(name):
    backbone = SMALL.get(name, 'test_resnet') if networks[name].backbone else None
    m = on_meta(name, backbone, n_out=5, n_in=1).train()
    head,*rows,last = stages(m, (128, 160)).rows
    parameters = [int(r[2].replace(',', '')) for r in rows]
    alone = m.encoder.model.pos_embed.numel()+m.encoder.model.cls_token.numel() if name=='DPT' else 0
    assert len(rows)>=3 and last[1]=='5 × 128 × 160' and int(last[2].replace(',', ''))==n_params(m)
    assert m.training and sum(parameters)==n_params(m)-alone

def test_stages_of_an_image_that_is_too_small_leave_the_model_as_it_was():
    m = on_meta('CGNet').train()
    with pytest.raises(ValueError, match='at least 32 pixels'): stages(m, (16, 16))
    assert m.training and not any(o._forward_hooks for o in m.modules())

def test_table_of_networks(table):
    head,*rows = table
    assert [r[0] for r in rows]==sorted(TEN, key=str.lower) and head[:2]==['network', 'idea']
    for name,idea,encoder,parameters,madds,speed,paper in rows:
        n,(p,m) = networks[name], KNOWN[name]
        assert idea==n.idea and encoder==(n.backbone or 'its own') and paper==n.paper
        assert float(parameters.split()[0])==pytest.approx(p, rel=0.02, abs=0.005) and float(madds.split()[0])==pytest.approx(m, rel=0.05)
        assert float(speed.strip('×'))>=1
    assert set(speeds())==set(TEN)

def test_front_page_shows_the_table(table):
    readme = (ROOT/'README.md').read_text(encoding='utf-8')
    for *cells,paper in table[1:]: assert f'| {" | ".join(cells)} | [paper]({paper}) |' in readme
    assert ', '.join(more_networks()) in readme

def test_table_of_strong_teachers(monkeypatch):
    "Its costs are counted in the notebook"
    def cost(name, backbone, size): return 10**6*size, 10**9*(1 if backbone=='resnet10t' else 4)
    monkeypatch.setattr('semisup_seg.models.cost.cost', cost)
    head,student,*rows = strong_teachers(('Linknet', 'resnet10t'), 128).rows
    assert student[:6]==['Linknet', 'resnet10t', 'a student, for comparison', '128.0 M', '1.0 G', '1.0×'] and [(*r[:2],) for r in rows]==[*STRONG]
    for r in rows:
        assert r[3:6]==['128.0 M', '4.0 G', '4.0×'] and check_request(*r[:2])[1]==r[1] and r[7].startswith(f'timm/{r[1]}')
        assert r[6]==('apache-2.0' if 'dinov2' in r[1] else 'dinov3-license')

def test_table_is_aligned_and_drawn():
    t = Table([('a', 'bb'), (10, 'x'), (200, '')])
    assert str(t)==repr(t)=='a    bb\n10   x\n200' and t._repr_markdown_()=='| a | bb |\n| --- | --- |\n| 10 | x |\n| 200 |  |'

# --- names and numbers

def test_names_are_forgiving():
    for typed,name in (('unet', 'U-Net'), ('U NET', 'U-Net'), ('u_net', 'U-Net'), ('MAnet', 'MANet'), ('DeepLabV3+', 'DeepLabV3+'),
        ('deeplab v3', 'DeepLabV3'), ('deeplabv3plus', 'DeepLabV3+'), ('DeepLab', 'DeepLabV3+'), ('pan', 'PAN'), ('cg-net', 'CGNet'),
        ('Unet++', 'Unet++'), ('UnetPlusPlus', 'Unet++'), ('dense aspp', 'DenseASPP'), ('SegFormer', 'Segformer')):
        assert check_request(typed)[0].name==name, typed

@pytest.mark.parametrize('args,message', [
    (('U-Nett',), "Unknown network 'U-Nett'. Did you mean 'U-Net'.*Allowed: CGNet"), (('zzz',), "Unknown network 'zzz'. Allowed: .*PAN"), ((None,), 'Unknown network'),
    (('U-Net', 'resnet5O'), "Unknown backbone 'resnet5O'. Did you mean 'resnet50'"), (('U-Net', 'qqqqqqq'), "Unknown backbone 'qqqqqqq'"),
    (('U-Net', 'resnet10t', 1), 'n_out is 1'), (('U-Net', 'resnet10t', 2.0), 'n_out is 2.0'), (('U-Net', 'resnet10t', 2, False, 0), 'n_in is 0')])
def test_wrong_requests(args, message):
    with pytest.raises(ValueError, match=message) as e: build_model(*args)
    assert len(str(e.value))<2000

@pytest.mark.parametrize('name,backbone', [('U-Net', 'vit_tiny_patch16_224'), ('DeepLabV3+', 'edgenext_xx_small'), ('PAN', 'dla34')])
def test_an_encoder_that_does_not_suit_the_network(name, backbone):
    with pytest.raises(ValueError, match=backbone): build_model(name, backbone)

def test_the_tag_of_an_encoder_says_which_weights():
    "`convnext_tiny` alone has ImageNet's; a tag of timm's first choice is dropped"
    for typed,kept in (('resnet10t.c3_in1k', 'resnet10t'), (f'{LITE0}.in1k', LITE0), (DINOV3, DINOV3), ('ConvNeXt-tiny.DINOv3-lvd1689m', DINOV3)):
        assert check_request('U-Net', typed)[1]==kept, typed
    assert _published(DINOV3)[0]=='timm/convnext_tiny.dinov3_lvd1689m'!=_published('convnext_tiny')[0]
    m = on_meta('U-Net', DINOV3)
    assert on_meta(**m.config).config==m.config
    for wrong in ('convnext_tiny.dinov3', 'mit_b0.in1k'):
        with pytest.raises(ValueError, match='Unknown weights of'): check_request('U-Net', wrong)

@pytest.mark.parametrize('name', ['U-Net', 'UPerNet', 'Linknet', 'DeepLabV3+'])
def test_a_plain_transformer_is_for_dpt(name):
    for backbone in (DINO, 'vit_small_patch16_dinov3', 'deit3_small_patch16_224'):
        with pytest.raises(ValueError, match=f"{backbone}.*all maps of this vision transformer have one size; 'DPT' takes it"): on_meta(name, backbone)

# --- weights

@pytest.mark.parametrize('backbone', [b for b in LITE if packaged_weights(b)])
def test_packaged_weights_are_the_packages(backbone):
    theirs = torch.load(next((Path(find_spec(LITE[backbone]).origin).parent/'models').glob('*.pth')), weights_only=True)
    assert all(torch.equal(a, b) for a,b in zip(theirs.values(), packaged_weights(backbone).values()))

@pytest.mark.parametrize('name', KINDS)
def test_packaged_weights_land_in_the_encoder(name):
    weights = packaged_weights(LITE0)
    m = build_model(name, LITE0, pretrained=True)
    assert holds(m, weights) and not holds(build_model(name, LITE0), weights)
    assert m.mean.flatten().tolist()==m.std.flatten().tolist()==[0.5]*3

@pytest.mark.parametrize('name,kind', [*((n, 'pth') for n in KINDS), ('U-Net', 'safetensors'), ('PAN', 'state_dict'), ('MANet', 'Path')])
def test_weights_from_a_file(tmp_path, resnet, name, kind):
    f = tmp_path/('w.safetensors' if kind=='safetensors' else 'w.pth')
    if kind=='safetensors': save_file(resnet, f)
    else: torch.save(dict(state_dict=resnet, epoch=3) if kind=='state_dict' else resnet, f)
    assert holds(build_model(name, 'resnet10t', pretrained=f if kind=='Path' else str(f)), resnet)

@pytest.mark.parametrize('name,backbone', [('HRNet', 'hrnet_w18_small'), ('DPT', 'test_vit'), ('DPT', DINO), ('DPT', DINOV3_VIT)])
def test_weights_of_encoders_that_are_cut_down(name, backbone, dino):
    weights = dict(dino) if backbone==DINO else encoder_weights(backbone)
    m = build_model(name, backbone)
    assert not holds(m, weights)
    load_encoder(m.encoder, weights)
    assert holds(m, weights)
    del weights[next(k for k in weights if k.endswith(('blocks.0.mlp.fc1.weight', 'stage2.0.branches.0.0.conv1.weight')))]
    with pytest.raises(ValueError, match='1 of .* are missing'): load_encoder(m.encoder, weights)

def as_published(weights):
    "timm's weights of DINOv3 under the names of its publisher"
    names = {'stem.': 'downsample_layers.0.', 'conv_dw': 'dwconv', 'mlp.fc1': 'pwconv1', 'mlp.fc2': 'pwconv2', 'head.norm': 'norm'}
    if 'reg_token' in weights: names = dict(reg_token='storage_tokens', gamma_1='ls1.gamma', gamma_2='ls2.gamma')
    res = {}
    for k,v in weights.items():
        for ours,theirs in names.items(): k = k.replace(ours, theirs)
        k = re.sub(r'stages.(\d).downsample.', r'downsample_layers.\1.', k)
        if k.endswith('q_bias'): res[k.replace('q_bias', 'qkv.bias')] = torch.cat([v, v*0, weights[k.replace('q_bias', 'v_bias')]])
        elif not k.endswith('v_bias'): res[k.replace('blocks.', '') if 'stages' in k else k] = v
    return res

@pytest.mark.parametrize('name,backbone', [('U-Net', DINOV3), ('DPT', DINOV3_VIT)])
def test_a_file_of_the_publisher_of_dinov3(tmp_path, name, backbone, capsys):
    weights = encoder_weights(backbone)
    published = as_published(weights)
    assert {'downsample_layers.0.0.weight', 'storage_tokens'} & {*published} and 'stages.0.0.gamma' in published or name=='DPT'
    torch.save(published, tmp_path/'dinov3.pth')
    assert holds(build_model(name, backbone, pretrained=str(tmp_path/'dinov3.pth')), weights) and not capsys.readouterr().out
    with pytest.raises(ValueError, match='do not fit the encoder'): build_model('U-Net', 'resnet10t', pretrained=str(tmp_path/'dinov3.pth'))

def test_each_network_of_a_run_may_have_a_file_of_its_own(tmp_path, resnet):
    torch.save(resnet, tmp_path/'w.pth')
    files = {'ResNet10t.c3_in1k': str(tmp_path/'w.pth')}
    assert holds(build_model('U-Net', 'resnet10t', pretrained=files), resnet)
    assert holds(build_model('U-Net', LITE0, pretrained=files), packaged_weights(LITE0))
    with pytest.raises(ValueError, match="Unknown backbone 'resnet10u'"): build_model('U-Net', LITE0, pretrained={'resnet10u': 'w.pth'})

def test_a_transformer_for_one_channel(tmp_path, dino):
    torch.save(dino, tmp_path/'w.pth')
    own = build_model('DPT', DINO, pretrained=str(tmp_path/'w.pth'), n_in=1).encoder.model.state_dict()
    first = own.pop('patch_embed.proj.weight')
    assert first.shape==(384, 1, 14, 14) and all(torch.equal(v, dino[k]) for k,v in own.items())
    assert torch.allclose(first, dino['patch_embed.proj.weight'].sum(1, keepdim=True), atol=1e-5)

@pytest.mark.parametrize('n_in', [1, 2, 4])
def test_weights_for_other_channels(tmp_path, resnet, n_in):
    torch.save(resnet, tmp_path/'w.pth')
    own = build_model('U-Net', 'resnet10t', pretrained=str(tmp_path/'w.pth'), n_in=n_in).encoder.state_dict()
    first,*rest = [(k.removeprefix('model.'), v) for k,v in own.items()]
    assert first[1].shape[1]==n_in and all(torch.equal(v, resnet[k]) for k,v in rest)
    if n_in==1: assert torch.allclose(first[1], resnet[first[0]].sum(1, keepdim=True), atol=1e-5)

def test_weights_fit_the_normalisation():
    m = build_model('U-Net', 'resnet10t')
    cfg = timm.get_pretrained_cfg('resnet10t')
    assert torch.allclose(m.mean.flatten(), torch.tensor(cfg.mean)) and torch.allclose(m.std.flatten(), torch.tensor(cfg.std))

def test_malicious_pickle_is_refused_and_not_run(tmp_path):
    torch.save(dict(w=Touch(tmp_path/'ran')), tmp_path/'evil.pth')
    with pytest.raises(ValueError, match='evil.pth is not a state dict'): build_model('U-Net', 'resnet10t', pretrained=str(tmp_path/'evil.pth'))
    assert not (tmp_path/'ran').exists()
    torch.load(tmp_path/'evil.pth', weights_only=False)
    assert (tmp_path/'ran').exists()

@pytest.mark.parametrize('name,contents', [('a.pth', b''), ('a.pth', b'nothing'), ('a.safetensors', b''), ('a.safetensors', b'\xff'*64), ('a.bin', b'zip')])
def test_files_that_hold_no_weights(tmp_path, name, contents):
    (tmp_path/name).write_bytes(contents)
    with pytest.raises(ValueError, match=name): file_weights(tmp_path/name)

@pytest.mark.parametrize('o', [[1, 2], {}, dict(a=3), torch.zeros(3), dict(state_dict=dict(a='x'))])
def test_files_that_hold_something_else(tmp_path, o):
    torch.save(o, tmp_path/'a.pth')
    with pytest.raises(ValueError, match='a.pth'): file_weights(tmp_path/'a.pth')

@pytest.mark.parametrize('name', KINDS)
def test_weights_of_another_encoder_are_refused(tmp_path, resnet, name):
    torch.save(resnet, tmp_path/'w.pth')
    with pytest.raises(ValueError, match='do not fit the encoder'): build_model(name, 'test_resnet', pretrained=str(tmp_path/'w.pth'))

def test_incomplete_weights_change_nothing(resnet):
    m = build_model('U-Net', 'resnet10t')
    before = {k: v.clone() for k,v in m.state_dict().items()}
    with pytest.raises(ValueError, match='1 of'): load_encoder(m.encoder, {k: v for k,v in resnet.items() if k!='layer1.0.conv1.weight'})
    assert all(torch.equal(v, before[k]) for k,v in m.state_dict().items())

def test_missing_file_is_named():
    with pytest.raises(ValueError, match="pretrained='nowhere.pth': no such file"): build_model('U-Net', 'resnet10t', pretrained='nowhere.pth')

# --- the hub; huggingface_hub reads the environment once, so all of it happens in an interpreter of its own

WAYS = "pip install 'semisup-segmentation[offline]'", "pretrained='…'", 'pretrained=False'
ASK = """
import hashlib, http.server, json, os, pathlib, socket, sys, threading
folder,kind = pathlib.Path(sys.argv[1]), ''
HELD = {'timm/resnet10t.c3_in1k': 'w.safetensors', 'smp-hub/mit_b0.imagenet': 'mit.safetensors'}

class Hub(http.server.BaseHTTPRequestHandler):
    def log_message(self, *a): pass
    def do_HEAD(self): self.do_GET()
    def do_GET(self):
        repo = next((r for r in HELD if self.path.startswith(f'/{r}/resolve/') and self.path.endswith(('/model.safetensors', '/config.json'))), None)
        good = kind=='hub' and repo
        data = (b'{}' if self.path.endswith('json') else (folder/HELD[repo]).read_bytes()) if good else b'<html>Sign in to the guest network</html>'
        self.send_response(200 if good or kind=='portal' or self.path=='/' else 503 if kind=='broken' else 404)
        self.send_header('Content-Length', str(len(data)))
        if good: self.send_header('ETag', '"' + hashlib.sha256(data).hexdigest() + '"')
        if good: self.send_header('X-Repo-Commit', self.path.split('/')[-2].replace('main', '0'*40))
        self.end_headers()
        if self.command=='GET': self.wfile.write(data)

server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
silent,closed = socket.socket(), socket.socket()
for s in (silent, closed): s.bind(('127.0.0.1', 0))
silent.listen()
at = dict(hub=server, closed=closed, silent=silent, cached=closed)
port = {k: (o.server_address if o is server else o.getsockname())[1] for k,o in at.items()}
closed.close()
os.environ['HF_ENDPOINT'] = f'http://127.0.0.1:{port["hub"]}'

import torch, urllib.request
from semisup_seg.models.core import build_model, networks
print(json.dumps(['registered', len(networks)]))
urlopen = urllib.request.urlopen
urllib.request.urlopen = lambda request, timeout: urlopen(request, timeout=timeout/10)  # as many seconds as the test can wait
for kind in ('closed', 'silent', 'missing', 'portal', 'hub', 'cached', 'broken'):
    if kind=='broken':
        for f in (folder/'hf').rglob('*'): f.unlink() if f.is_file() or f.is_symlink() else None
    os.environ['HF_ENDPOINT'] = f'http://127.0.0.1:{port.get(kind, port["hub"])}'
    for name,backbone in (('U-Net', 'resnet10t'), ('Segformer', 'mit_b0')):
        try: m = build_model(name, backbone, pretrained=True)
        except Exception as e: said = f'{type(e).__name__}: {e}'
        else:
            torch.save(m.encoder.state_dict(), folder/f'{kind} {backbone}.pth')
            said = 'built'
        print(json.dumps([f'{kind} {backbone}', said]), flush=True)
"""

@pytest.fixture(scope='module')
def hub(tmp_path_factory, resnet, mit):
    "A folder, and what was said to a user when the hub behaved in each of several ways"
    folder = tmp_path_factory.mktemp('hub')
    save_file(resnet, folder/'w.safetensors')
    save_file(mit, folder/'mit.safetensors')
    env = dict(HF_HOME=folder/'hf', HF_HUB_DISABLE_XET=1, HF_HUB_DISABLE_TELEMETRY=1, NO_PROXY='127.0.0.1', no_proxy='127.0.0.1')
    try: out = python(ASK, folder, timeout=60, **env).stdout
    except subprocess.TimeoutExpired as e: out = (e.stdout or b'').decode()
    return folder, dict(json.loads(o) for o in out.splitlines() if o[:1]=='[')

@pytest.mark.parametrize('backbone', ['resnet10t', 'mit_b0'])
@pytest.mark.parametrize('kind', ['closed', 'silent', 'missing', 'broken', 'portal'])
def test_unreachable_hub_names_three_ways_out(hub, kind, backbone):
    said = hub[1].get(f'{kind} {backbone}', 'nothing: it hung')
    assert said.startswith('ConnectionError') and repr(backbone) in said
    for w in WAYS: assert w in said

@pytest.mark.parametrize('backbone', ['resnet10t', 'mit_b0'])
@pytest.mark.parametrize('kind', ['hub', 'cached'])
def test_hub_weights_are_the_hubs(hub, resnet, mit, kind, backbone):
    folder,said = hub
    assert said[f'{kind} {backbone}']=='built'
    got,theirs = torch.load(folder/f'{kind} {backbone}.pth', weights_only=True), dict(resnet10t=resnet, mit_b0=mit)[backbone]
    assert len(got)>20 and all(torch.equal(v, theirs[k.removeprefix('model.')]) for k,v in got.items())

def test_no_weights_are_published():
    name = next(n for n in timm.list_models() if not timm.get_pretrained_cfg(n).has_weights)
    with pytest.raises(ValueError, match=f'timm publishes no weights for {name!r}'): build_model('U-Net', name, pretrained=True)
