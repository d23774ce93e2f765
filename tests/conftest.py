"Fixtures and small helpers that all tests share"
import hashlib, os, shutil, subprocess, sys
from pathlib import Path

import matplotlib
import numpy as np, pytest, torch
from PIL import Image

matplotlib.use('Agg')

ROOT = Path(__file__).parent.parent
NET = 'U-Net', 'test_resnet'
SIZE = 32, 32

def save(
    path:Path,    # Its folder is made
    a:np.ndarray, # uint8 or uint16
    **kw,         # For Pillow
):
    "Write the array `a` as a picture"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(a).save(path, **kw)
    return path

def disc(h, w, rng):
    "A boolean disc somewhere in an image of `h`×`w` pixels"
    yy,xx = np.mgrid[:h, :w]
    return np.hypot(yy-h*rng.uniform(0.3, 0.7), xx-w*rng.uniform(0.3, 0.7)) < min(h, w)*0.3

def photo(d, rng): return np.uint8(d*110 + rng.integers(20, 90, d.shape))

def make_discs(
    root:Path,         # The data set folder to write
    train=4, valid=2,  # Images per split
    test=2, unlabeled=5,
    seed=0,
):
    "A data set whose images all differ in size"
    rng,k = np.random.default_rng(seed), 0
    for split,n in dict(train=train, valid=valid, test=test, unlabeled=unlabeled).items():
        for i in range(n):
            d,k = disc(40+3*k, 64-2*k, rng), k+1
            if split=='unlabeled': save(root/f'unlabeled_images/u{i}.png', photo(d, rng))
            else:
                save(root/f'Images/{split}/{split}{i}.png', photo(d, rng))
                save(root/f'Labels/{split}/{split}{i}.png', np.uint8(d)*255)
    (root/'codes.txt').write_text('rest,0\ndisc,255\n')
    return root

def tree(path):
    "Every file below `path`, with a digest of its contents"
    return {f.relative_to(path).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(Path(path).rglob('*')) if f.is_file()}

def make_model(codes='rest,0\ndisc,255', n_out=2, name='U-Net', backbone='test_resnet', size=SIZE, seed=0):
    "A network that was never trained, but knows its classes and its size"
    from semisup_seg.data.images import parse_codes
    from semisup_seg.models.core import build_model
    import semisup_seg.models.smp  # registers its networks  # chkstyle: ignore
    torch.manual_seed(seed)
    m = build_model(name, backbone, n_out)
    m.codes,m.size = parse_codes(codes), size
    return m.eval()

def python(
    code:str,     # A program
    *args,        # Its arguments
    timeout=60,   # Seconds until a hanging one is stopped
    **env,        # Environment variables
):
    "Run `code` in a fresh interpreter that sees the same package"
    paths = os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])
    return subprocess.run([sys.executable, '-c', code, *map(str, args)], capture_output=True, text=True, timeout=timeout,
        env={**os.environ, 'PYTHONPATH': paths, 'OMP_NUM_THREADS': '1', **{k: str(v) for k,v in env.items()}})

BROWSERS = 'chromium', 'google-chrome', 'google-chrome-stable', 'chromium-browser', 'chrome'
FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-background-networking', '--disable-component-update', '--disable-sync',
    '--no-first-run']

@pytest.fixture(scope='session')
def browser():
    from playwright.sync_api import sync_playwright
    exe = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not exe: pytest.fail('These tests need Chromium or Chrome on PATH: `apt-get install chromium` on Debian.', pytrace=False)
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=exe, args=FLAGS)
        yield browser
        browser.close()

class Touch:
    "A pickle of this creates the file `path` where it is trusted"
    def __init__(self, path): self.path = path
    def __reduce__(self): return Path.touch, (self.path,)

@pytest.fixture
def discs(tmp_path): return make_discs(tmp_path/'discs')

@pytest.fixture(scope='session')
def tiny(): return make_model()

@pytest.fixture(scope='session')
def trained_discs(tmp_path_factory): return make_discs(tmp_path_factory.mktemp('data')/'discs')

# --- distillation

OPTIONS = dict(size=SIZE, bs=4, epochs=2, freeze_epochs=0, lr=1e-3, pretrained=False)

def weights(out, name='target_U-Net_test_resnet'):
    "The weights that the run in `out` saved under `name`"
    return torch.load(out/f'{name}.pth', weights_only=True)

def same(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def make_experiment(path, out, bases=(), target=NET, views=(), trainings=1, **schedule):
    "The `Experiment` of a run in `out`, new or resumed"
    from semisup_seg.data.loaders import ImageCache
    from semisup_seg.distillation.experiment import Experiment, check_run
    from semisup_seg.distillation.run import EventLog, fingerprint, open_run
    bases,target,views,size,summary = check_run(bases, target, views, path, out, SIZE, False)
    run = open_run(out, {}, fingerprint(path), True)
    schedule = dict(epochs=2, freeze_epochs=0, lr=1e-3, **schedule)
    return Experiment(path, out, bases, target, views, size, 4, schedule, 0, False, summary, run, EventLog(out, trainings), ImageCache(size))
