"Networks by name, and weights that are what they claim to be"
import json, subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest, timm, torch
from conftest import Touch, python
from safetensors.torch import save_file

import semisup_seg.models.smp  # registers its networks  # chkstyle: ignore
from semisup_seg.models.core import LITE, build_model, file_weights, load_encoder, networks, packaged_weights

LITE0 = 'tf_efficientnet_lite0'
each_network = pytest.mark.parametrize('name', networks)

@pytest.fixture(scope='module')
def resnet():
    torch.manual_seed(7)
    return timm.create_model('resnet10t').state_dict()

def holds(model, weights):
    "True if every tensor of the encoder stands in `weights`"
    ours = {k.removeprefix('model.').replace('_', '.'): v for k,v in model.encoder.state_dict().items()}
    theirs = {k.replace('_', '.'): v for k,v in weights.items()}
    return len(ours)>20 and all(torch.equal(v, theirs[k]) for k,v in ours.items())

# --- the register

def test_registry_says_what_each_network_is():
    assert list(networks)[:4]==['U-Net', 'DeepLabV3+', 'MANet', 'PAN']
    for n in networks.values(): assert n.idea and n.paper.startswith('https://') and n.min_size>=16

# --- names and numbers

@pytest.mark.parametrize('typed,name', [
    ('unet', 'U-Net'), ('U NET', 'U-Net'), ('u_net', 'U-Net'), ('MAnet', 'MANet'), ('DeepLabV3+', 'DeepLabV3+'),
    ('deeplab v3', 'DeepLabV3+'), ('DeepLab', 'DeepLabV3+'), ('pan', 'PAN')])
def test_names_are_forgiving(typed, name): assert build_model(typed, 'resnet10t').config['name']==name

@pytest.mark.parametrize('args,message', [
    (('U-Nett',), "Unknown network 'U-Nett'. Did you mean 'U-Net'.*Allowed: U-Net"), (('zzz',), "Unknown network 'zzz'. Allowed: .*PAN"), ((None,), 'Unknown network'),
    (('U-Net', 'resnet5O'), "Unknown backbone 'resnet5O'. Did you mean 'resnet50'"), (('U-Net', 'qqqqqqq'), "Unknown backbone 'qqqqqqq'"),
    (('U-Net', 'resnet10t', 1), 'n_out is 1'), (('U-Net', 'resnet10t', 2.0), 'n_out is 2.0'), (('U-Net', 'resnet10t', 2, False, 0), 'n_in is 0')])
def test_wrong_requests(args, message):
    with pytest.raises(ValueError, match=message) as e: build_model(*args)
    assert len(str(e.value))<2000

@pytest.mark.parametrize('name,backbone', [('U-Net', 'vit_tiny_patch16_224'), ('DeepLabV3+', 'edgenext_xx_small'), ('PAN', 'dla34')])
def test_an_encoder_that_does_not_suit_the_network(name, backbone):
    with pytest.raises(ValueError, match=backbone): build_model(name, backbone)

def test_hub_tag_of_a_backbone_is_dropped(): assert build_model('U-Net', 'resnet10t.c3_in1k').config['backbone']=='resnet10t'

# --- weights

@pytest.mark.parametrize('backbone', [b for b in LITE if packaged_weights(b)])
def test_packaged_weights_are_the_packages(backbone):
    theirs = torch.load(next((Path(find_spec(LITE[backbone]).origin).parent/'models').glob('*.pth')), weights_only=True)
    assert all(torch.equal(a, b) for a,b in zip(theirs.values(), packaged_weights(backbone).values()))

@each_network
def test_packaged_weights_land_in_the_encoder(name):
    m = build_model(name, LITE0, pretrained=True)
    assert holds(m, packaged_weights(LITE0)) and not holds(build_model(name, LITE0), packaged_weights(LITE0))
    assert m.mean.flatten().tolist()==m.std.flatten().tolist()==[0.5]*3

@pytest.mark.parametrize('name,kind', [*((n, 'pth') for n in networks), ('U-Net', 'safetensors'), ('PAN', 'state_dict'), ('MANet', 'Path')])
def test_weights_from_a_file(tmp_path, resnet, name, kind):
    f = tmp_path/('w.safetensors' if kind=='safetensors' else 'w.pth')
    if kind=='safetensors': save_file(resnet, f)
    else: torch.save(dict(state_dict=resnet, epoch=3) if kind=='state_dict' else resnet, f)
    assert holds(build_model(name, 'resnet10t', pretrained=f if kind=='Path' else str(f)), resnet)

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

@each_network
def test_weights_of_another_encoder_are_refused(tmp_path, resnet, name):
    torch.save(resnet, tmp_path/'w.pth')
    with pytest.raises(ValueError, match='do not fit the encoder'): build_model(name, LITE0, pretrained=str(tmp_path/'w.pth'))

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

class Hub(http.server.BaseHTTPRequestHandler):
    def log_message(self, *a): pass
    def do_HEAD(self): self.do_GET()
    def do_GET(self):
        good = kind=='hub' and self.path=='/timm/resnet10t.c3_in1k/resolve/main/model.safetensors'
        data = (folder/'w.safetensors').read_bytes() if good else b'<html>Sign in to the guest network</html>'
        self.send_response(200 if good or kind=='portal' or self.path=='/' else 503 if kind=='broken' else 404)
        self.send_header('Content-Length', str(len(data)))
        if good: self.send_header('ETag', '"' + hashlib.sha256(data).hexdigest() + '"')
        if good: self.send_header('X-Repo-Commit', '0'*40)
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

import torch, semisup_seg.models.smp
from semisup_seg.models.core import build_model
for kind in ('closed', 'silent', 'missing', 'portal', 'hub', 'cached', 'broken'):
    if kind=='broken':
        for f in (folder/'hf').rglob('*'): f.unlink() if f.is_file() or f.is_symlink() else None
    os.environ['HF_ENDPOINT'] = f'http://127.0.0.1:{port.get(kind, port["hub"])}'
    try: m = build_model('U-Net', 'resnet10t', pretrained=True)
    except Exception as e: said = f'{type(e).__name__}: {e}'
    else:
        torch.save(m.encoder.state_dict(), folder/f'{kind}.pth')
        said = 'built'
    print(json.dumps([kind, said]), flush=True)
"""

@pytest.fixture(scope='module')
def hub(tmp_path_factory, resnet):
    "A folder, and what was said to a user when the hub behaved in each of several ways"
    folder = tmp_path_factory.mktemp('hub')
    save_file(resnet, folder/'w.safetensors')
    env = dict(HF_HOME=folder/'hf', HF_HUB_DISABLE_XET=1, HF_HUB_DISABLE_TELEMETRY=1, NO_PROXY='127.0.0.1', no_proxy='127.0.0.1')
    try: out = python(ASK, folder, timeout=45, **env).stdout
    except subprocess.TimeoutExpired as e: out = (e.stdout or b'').decode()
    return folder, dict(json.loads(o) for o in out.splitlines() if o[:1]=='[')

@pytest.mark.parametrize('kind', ['closed', 'silent', 'missing', 'broken', 'portal'])
def test_unreachable_hub_names_three_ways_out(hub, kind):
    said = hub[1].get(kind, 'nothing: it hung')
    assert said.startswith('ConnectionError') and "'resnet10t'" in said
    for w in WAYS: assert w in said

@pytest.mark.parametrize('kind', ['hub', 'cached'])
def test_hub_weights_are_the_hubs(hub, resnet, kind):
    folder,said = hub
    assert said[kind]=='built'
    got = torch.load(folder/f'{kind}.pth', weights_only=True)
    assert len(got)>20 and all(torch.equal(v, resnet[k.removeprefix('model.')]) for k,v in got.items())

def test_no_weights_are_published():
    name = next(n for n in timm.list_models() if not timm.get_pretrained_cfg(n).has_weights)
    with pytest.raises(ValueError, match=f'timm publishes no weights for {name!r}'): build_model('U-Net', name, pretrained=True)
