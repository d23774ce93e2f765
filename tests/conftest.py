"Fixtures and small helpers that all tests share"
import hashlib, multiprocessing, os, re, shutil, signal, stat, subprocess, sys, threading, zipfile
from collections import Counter
from contextlib import contextmanager, redirect_stdout
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace

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

# --- the data room: a registered format, archives, and a server that misbehaves

@pytest.fixture
def registry():
    "The registered readers, which are as before after the test"
    from semisup_seg.data.images import readers
    before = dict(readers)
    yield readers
    readers.clear()
    readers.update(before)

@pytest.fixture
def npy(registry):
    "A reader of NumPy's files"
    from semisup_seg.data.images import register_reader
    @register_reader('.npy')
    def read_npy(path): return np.load(path)

    return read_npy

def npy_discs(root):
    "`make_discs` with all images and labels as NumPy's files"
    for f in [*make_discs(root).rglob('*.png')]:
        np.save(f.with_suffix('.npy'), np.array(Image.open(f)))
        f.unlink()
    return root

def pack(
    file:Path,    # The zip archive to write
    members:dict, # Contents by name; None for a symbolic link
):
    "Write a zip archive"
    with zipfile.ZipFile(file, 'w') as z:
        for name,data in members.items():
            info = zipfile.ZipInfo(name)
            if data is None: info.external_attr = (stat.S_IFLNK | 0o777)<<16
            z.writestr(info, b'/etc/passwd' if data is None else data)
    return file

class BadHandler(BaseHTTPRequestHandler):
    def log_message(self, *args): pass

    def do_GET(self):
        s,name = self.server,self.path.split('?')[0][1:]
        how = s.moods.pop(0) if s.moods else ''
        s.log.append((name, self.headers.get('Range'), how))
        if not (s.root/name).is_file() or how in ('404', '503'): return self.send_error(int(how or 404))
        if how=='nonsense': return self.wfile.write(b'no HTTP\r\n\r\n')
        data = (s.root/name).read_bytes()
        start = int(m[1]) if (m := re.match(r'bytes=(\d+)-$', self.headers.get('Range', ''))) and how!='no range' else 0
        if start and start>=len(data): return self.send_error(416)
        body = data[start:]
        self.send_response(206 if start else 200)
        if start: self.send_header('Content-Range', f'bytes {start}-{len(data)-1}/{len(data)}')
        if how!='no size': self.send_header('Content-Length', str(len(body) + dict(more=500, less=-500).get(how, 0)))
        self.end_headers()
        self.wfile.write(body[:len(body)//2] if how in ('break', 'hang') else body[:len(body)-500] if how=='less' else body)
        if how=='hang': s.hanging.wait(3)

@pytest.fixture
def server(tmp_path):
    "A server of `tmp_path/'www'`; `moods` says how it misbehaves, request by request, `log` what was asked"
    s = ThreadingHTTPServer(('127.0.0.1', 0), BadHandler)
    s.daemon_threads,s.root,s.moods,s.log,s.hanging = True,tmp_path/'www',[],[],threading.Event()
    s.root.mkdir()
    s.url = f'http://127.0.0.1:{s.server_port}'
    threading.Thread(target=s.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True).start()
    yield s
    s.hanging.set()
    s.shutdown()
    s.server_close()

# --- training

SMALL_NET = 'Linknet', 'test_resnet'  # a fifth of the weights of `NET`, and half its time for a step

def state(model): return {k: v.clone() for k,v in model.state_dict().items()}
def same(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)

# --- annotation: teachers whose masks anyone can check

class Bright(torch.nn.Module):
    "A network that is sure of the second class where the image is brighter than half; `seen` holds the size of each batch"
    config,size,min_size = dict(name='Bright'), (48, 64), 16
    def __init__(self, w=60.):
        from semisup_seg.data.images import parse_codes
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(w))
        self.codes = parse_codes('rest,7\ndisc,200')
        self.seen = []
    def forward(self, x):
        self.seen.append(len(x))
        return torch.cat([0*x[:, :1], (x[:, :1]-0.5)*self.w], 1)

class Greedy(Bright):
    "A `Bright` network for which memory runs out with more than `most` images"
    def __init__(self, most, error):
        super().__init__()
        self.most,self.error = most, error
    def forward(self, x):
        if len(x)>self.most: raise self.error
        return super().forward(x)

def counted(m): return sum(m.seen)

def pictures(folder, n=5):
    "`n` images of different sizes with a bright disc at different places, and where it is"
    rng,res = np.random.default_rng(1), {}
    for i in range(n):
        d = disc(50+20*i, 90-9*(i%6), rng)
        res[save(folder/f'p{i}.png', np.uint8(d*200+20))] = d
    return res

def is_disc(mask, where):
    "Whether the mask file of a `Bright` network shows a disc `where` it is"
    a = np.array(Image.open(mask))
    return a.shape==where.shape and set(np.unique(a))<={7, 200} and ((a==200)==where).mean()>0.96

@pytest.fixture
def decoded(registry):
    "How often each PNG file is decoded during a test, `{path: times}`"
    times = Counter()
    def read(path):
        times[path] += 1
        with Image.open(path) as im: return im.copy()
    registry['.png'] = read
    return times

# --- distillation

OPTIONS = dict(size=SIZE, bs=4, epochs=2, freeze_epochs=0, lr=1e-3, pretrained=False)

def weights(out, name='target_U-Net_test_resnet'):
    "The weights that the run in `out` saved under `name`"
    return torch.load(out/f'{name}.pth', weights_only=True)

def make_experiment(path, out, bases=(), target=NET, views=(), size=SIZE):
    "The `Experiment` of a run in `out`, new or resumed"
    from semisup_seg.data.loaders import ImageCache
    from semisup_seg.distillation.experiment import Experiment, check_run
    from semisup_seg.distillation.run import EventLog, fingerprint, open_run
    bases,target,views,size,summary = check_run(bases, target, views, path, out, size, False)
    run = open_run(out, {}, fingerprint(path), True)
    schedule = dict(epochs=2, freeze_epochs=0, lr=1e-3)
    return Experiment(path, out, bases, target, views, size, 4, schedule, 2, 0, False, summary, run, EventLog(out, len(bases)+1), ImageCache(size))

def digest(a): return hashlib.sha256(a.tobytes()).hexdigest()

def first_weights(model): return digest(next(model.parameters()).detach().cpu().numpy())

class Watch:
    "What a run does: whom it trains, which images networks see outside training, which files it reads, what it scores and prints"
    def __init__(self):
        self.fits = []     # how many training images each training had
        self.passes = []   # `(first weights, pixels)` of each image that a network saw, as digests
        self.reads = []    # `(module, file)`
        self.scored = 0    # masks that were compared with labels for the report
        self.printed = []  # lines

    @contextmanager
    def watching(self):
        import semisup_seg.data.images, semisup_seg.distillation.experiment as experiment
        import semisup_seg.evaluation.scores as scoring, semisup_seg.training.inference as inference
        real = SimpleNamespace(fit=experiment.fit, load=semisup_seg.data.images.load_image, score=scoring.score_mask, forward=inference.forward_probs)
        def fit(learn, **kwargs):
            self.fits.append(len(learn.dls.train_ds))
            return real.fit(learn, **kwargs)
        def forward_probs(network, images):
            self.passes += [(first_weights(network), digest(o)) for o in images.numpy()]
            return real.forward(network, images)
        def score_mask(*args):
            self.scored += 1
            return real.score(*args)
        def reader(module):
            def load_image(im):
                if isinstance(im, (str, Path)): self.reads.append((module, Path(im)))
                return real.load(im)
            return load_image
        out = StringIO()
        with pytest.MonkeyPatch.context() as m, redirect_stdout(out):
            m.setattr(experiment, 'fit', fit)
            m.setattr(inference, 'forward_probs', forward_probs)
            m.setattr(scoring, 'score_mask', score_mask)
            for name,module in list(sys.modules.items()):
                if name.startswith('semisup_seg.') and getattr(module, 'load_image', None) is real.load: m.setattr(module, 'load_image', reader(name))
            yield self
        self.printed += out.getvalue().splitlines()

@pytest.fixture(scope='session')
def runs(trained_discs, tmp_path_factory):
    "A function that gives one of the runs of `golden.py`, trained when it is asked for first: its data, folder, result, and what it did"
    import golden
    made = {}
    def get(name):
        if name in made: return made[name]
        root = tmp_path_factory.mktemp(name)
        (root/'work').mkdir()
        with pytest.MonkeyPatch.context() as m, Watch().watching() as seen:
            m.chdir(root/'work')
            result = golden.train(name, trained_discs, root/'out')
        made[name] = SimpleNamespace(data=trained_discs, out=root/'out', work=root/'work', result=result, seen=seen)
        return made[name]
    return get

class Untrained(list):
    "The trainings that were skipped: `steps`, training `images`, callbacks `cbs` and weights of the `encoder` of each"
    dices = repeat(0.5)  # the validation Dice that each of them reports

@pytest.fixture
def untrained(monkeypatch):
    "Runs in this test train nothing, and draw no curves and histograms"
    import semisup_seg.distillation.experiment as experiment, semisup_seg.evaluation.report as report
    fits = Untrained()
    def fit(learn, cbs=(), **kwargs):
        images = {f.name for f in learn.dls.train_ds.items}
        encoder = {k: v.clone() for k,v in learn.model.encoder.state_dict().items()}
        fits.append(SimpleNamespace(steps=len(learn.dls.train), images=images, cbs=cbs, encoder=encoder))
        learn.history = [dict(stage='all', train_loss=1., valid_loss=1., dice=next(fits.dices), jaccard=0.4)]
    monkeypatch.setattr(experiment, 'fit', fit)
    monkeypatch.setattr(experiment.gc, 'collect', lambda: None)
    monkeypatch.setattr(report, 'curves', lambda histories: np.zeros((8, 8, 3), np.uint8))
    monkeypatch.setattr(report, 'draw_annotations', lambda *args: '')
    return fits

def _run_and_kill(owner, name, at, run, args):
    real = getattr(owner, name)
    calls = []
    def call(self, *args, **kwargs):
        calls.append((args, kwargs))
        if at(calls): os.kill(os.getpid(), signal.SIGKILL)
        return real(self, *args, **kwargs)
    setattr(owner, name, call)
    run(*args)

def kill_when(
    owner,   # A class
    name,    # Its method
    at,      # `(calls)` to whether the last of these calls of the method, `(args, kwargs)`, is the one to die in
    run,     # What to do until then
    *args,   # Its arguments
):
    "Run `run(*args)` in a process of its own that is killed at a certain call"
    fork = hasattr(os, 'fork') and not torch.cuda.is_available()
    context = multiprocessing.get_context('fork' if fork else 'spawn')
    p = context.Process(target=_run_and_kill, args=(owner, name, at, run, args))
    p.start()
    p.join(120)
    assert p.exitcode==-signal.SIGKILL

def ends_epoch(stage, epoch, calls):
    "Whether the last of these calls of `EventLog.emit` tells of the end of an epoch, from 1 on, of `stage`"
    args,kwargs = calls[-1]
    return args==('epoch', stage) and kwargs['epoch']==epoch

# --- evaluation: made-up scores, a page, and a report with all that it can hold

def score_rows(values): return [dict(image=f'{i}.png', dice=v, jaccard=v/(2-v)) for i,v in enumerate(values)]

class Page(HTMLParser):
    "What an HTML page refers to, its tags and its text"
    def __init__(self, text):
        super().__init__()
        self.refs = []
        self.tags = []
        self.text = ''
        self.feed(text)
    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.refs += [v for k,v in attrs if k in ('src', 'href', 'srcset', 'data', 'action', 'poster')]
    def handle_data(self, data): self.text += data

HISTORY = [dict(stage='all', train_loss=1., valid_loss=1.1, dice=0.5, jaccard=0.4)]*3

@pytest.fixture(scope='session')
def full_report(tmp_path_factory):
    "A report with all that it can hold, of data with a file name that is code"
    from semisup_seg.annotation.annotate import annotate
    from semisup_seg.data.folder import split_files, unlabeled_files
    from semisup_seg.evaluation.report import evaluation_files, make_report, save_report
    from semisup_seg.evaluation.scores import score_images
    root = make_discs(tmp_path_factory.mktemp('r')/'d')
    evil = '<script>alert(1)</script>&"x"'.replace('/', '∕')
    for d in ('Images', 'Labels'): (root/d/'test/test0.png').rename(root/d/f'test/{evil}.png')
    before = tree(root)
    out = root.parent/'out'
    a,b,c = (make_model(seed=i) for i in range(3))
    pairs = evaluation_files(root)[1]
    vote = annotate([a, b], [i for i,_ in pairs], out/'vote')
    ann = annotate([a, b], unlabeled_files(root), out, ['Gamma'], valid=split_files(root, 'valid'))
    others = {'teacher 1 <i>': score_images(a, pairs), 'teacher 2': score_images(b, pairs)}
    training = {'teacher 1': dict(steps=40, epochs=4, seconds=7.5), 'annotations': dict(images=5, seconds=2), 'target': dict(steps=50, seconds=8.25)}
    settings = dict(seed=3, note='<b>bold</b>', training=training)
    report = make_report(c, root, others, 'vote', vote, {**dict.fromkeys(others, HISTORY), 'target': HISTORY}, ann, settings)
    text = save_report(report, out).read_text(encoding='utf-8')
    return SimpleNamespace(text=text, report=report, evil=evil, is_untouched=tree(root)==before, out=out)

@pytest.fixture
def area_error():
    "A metric for the time of a test: the difference of two areas, of which a lower value is better"
    from semisup_seg.training.metrics import metrics, register_metric
    before = dict(metrics)
    @register_metric(higher_is_better=False, needs_spacing=True)
    def area_error(pred, truth, n, spacing):
        areas = [np.bincount(m.ravel(), minlength=n)[:n] for m in (pred, truth)]
        return np.abs(areas[0]-areas[1])*spacing[0]*spacing[1]

    yield area_error
    metrics.clear()
    metrics.update(before)

# --- the quick tests

SLOW = ('annotate', 'batch', 'benchmarks', 'browser', 'checkpoint', 'cli', 'distill', 'docs', 'experiment', 'fixmatch', 'form', 'golden', 'job', 'journal',
    'learner', 'mask_folder', 'mean_teacher', 'methods', 'models', 'networks', 'online', 'packaging', 'tutorials', 'unimatch')

def pytest_collection_modifyitems(items):
    "Tests of the files that train, draw pages or build every network are left out by `-m 'not slow'`"
    for item in items:
        if item.path.stem.removeprefix('test_') in SLOW: item.add_marker('slow')
