"""Golden outputs: what seeded tiny runs give, number by number, and the public names.

    python tests/golden.py record    # after a change that is meant to change them; say in the commit which and why
    python tests/golden.py check     # every number that has changed since

`test_golden.py` runs the check with a tolerance, since another processor may round otherwise."""
import csv, json, os, signal, subprocess, sys, tempfile, time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import numpy as np, torch
from conftest import NET, SIZE, make_discs, make_model
from PIL import Image

import semisup_seg.all as library
from semisup_seg.all import annotate, data_distillation, distill, model_data_distillation, predict, simple_training, split_files, unlabeled_files

FILE = Path(__file__).parent/'golden.json'
CGNET = 'CGNet', None
RUN = dict(size=SIZE, bs=4, epochs=2, freeze_epochs=1, lr=3e-3, pretrained=False, seed=3)
VIEWS = ['H Flip', 'Gamma']

def rounded(o):
    "`o` with every number at five digits"
    if isinstance(o, dict): return {k: rounded(v) for k,v in o.items()}
    if isinstance(o, (list, tuple)): return [rounded(v) for v in o]
    return round(o, 5) if isinstance(o, float) else o

def pixels(mask):
    "How many pixels of `mask` have each value"
    values,n = np.unique(np.asarray(mask), return_counts=True)
    return dict(zip(map(str, values.tolist()), n.tolist()))

def cell(text):
    try: return float(text)
    except ValueError: return Path(text).name if '/' in text else text

def table(file):
    "The rows of a table, file names without their folders"
    with open(file, newline='', encoding='utf-8') as f: return [{k: cell(v) for k,v in r.items()} for r in csv.DictReader(f)]

def annotations(out):
    "The tables and the masks that `annotate` left in `out`"
    tables = {f.stem: table(f) for f in sorted(Path(out).glob('*.csv'))}
    return dict(tables, masks={f.stem: pixels(Image.open(f)) for f in sorted((Path(out)/'annotations').glob('*.png'))})

def outcome(out):
    "What a run left in `out`, without times, versions and digests"
    report = json.loads((Path(out)/'report.json').read_text(encoding='utf-8'))
    settings = report.pop('settings')
    stages = json.loads((Path(out)/'run.json').read_text(encoding='utf-8'))['stages']
    histories = {k: s['history'] for k,s in stages.items() if 'history' in s}
    res = dict(report, histories=histories, views=settings['views_on_validation'], files=sorted(f.name for f in Path(out).iterdir()))
    return res | (dict(vote=annotations(Path(out)/'vote'), **annotations(out)) if (Path(out)/'annotations.csv').is_file() else {})

def one(data, out): return data_distillation(NET, NET, VIEWS, data, out, **RUN)
def two(data, out): return model_data_distillation([NET, CGNET], NET, VIEWS, data, out, **RUN)
def naive(data, out): return distill([NET], NET, ['H Flip'], data, out, recipe='naive', **RUN)
def simple(data, out): return simple_training(NET, data, out, **RUN)

RUNS = dict(one=one, two=two, naive=naive, simple=simple)

def train(name, data, out):
    "The run `name` of `RUNS` in `out`, on one core so that it gives the same numbers everywhere in this process"
    torch.set_num_threads(1)
    return RUNS[name](data, out)

def killed(data, out):
    "Start the run 'one', kill it while the target trains, and resume it"
    code = f'import sys; sys.path[:0] = {sys.path[:2]!r}; import golden; golden.train("one", {str(data)!r}, {str(out)!r})'
    p = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.DEVNULL)
    while p.poll() is None and not list(Path(out).glob('target_*.checkpoint')): time.sleep(0.01)
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert not (Path(out)/'report.json').is_file(), 'the run ended before it was killed'
    train('one', data, out)
    return outcome(out)

def voted(data, tmp):
    "What `annotate` makes of the unlabelled images of `data`: teachers together, one after another, and one of them on windows"
    models = [make_model(seed=s) for s in (0, 1)]
    files = unlabeled_files(data)
    options = dict(bs=2, valid=split_files(data, 'valid'), weights=[2, 1], confidence=True)
    annotate(models, files, tmp/'together', VIEWS, SIZE, together=True, **options)
    annotate(models, files, tmp/'in_turn', VIEWS, SIZE, together=False, **options)
    annotate(models[0], files, tmp/'windows', ['V Flip'], SIZE, window=40)
    res = {name: annotations(tmp/name) for name in ('together', 'in_turn', 'windows')}
    return dict(res, predict=[pixels(o) for o in predict(models[0], files)])

def golden(
    tmp,       # Where what is missing is made
    data=None, # The folder of the data; None: a new one
    runs=None, # `{name: folder}` of finished `RUNS`; None: they are trained, and one of them is killed and resumed
):
    "All golden outputs"
    torch.set_num_threads(1)
    data = data or make_discs(tmp/'discs')
    res = dict(names=library.__all__)
    if runs is None:
        runs = {name: tmp/name for name in RUNS}
        for name,out in runs.items(): train(name, data, out)
        res['killed_is_same'] = killed(data, tmp/'killed')==outcome(runs['one'])
    outcomes = {key: outcome(runs[name]) for key,name in dict(one_teacher='one', two_teachers='two', naive='naive', simple='simple').items()}
    res.update(outcomes)
    return rounded(dict(res, **voted(data, tmp)))

def is_near(old, new, tolerance, where):
    "Whether two numbers differ by `tolerance` at most, counts of pixels by 20 times that share"
    counted = '/masks/' in where or '/predict/' in where
    return abs(old-new)<=tolerance*(20*abs(old) if counted else 1)

def differences(old, new, tolerance=0., where=''):
    "Yield each place where `new` is not `old`, as far as numbers are not near"
    if isinstance(old, dict) and isinstance(new, dict):
        for k in sorted({*old, *new}): yield from differences(old.get(k), new.get(k), tolerance, f'{where}/{k}')
    elif isinstance(old, list) and isinstance(new, list) and len(old)==len(new):
        for i,(a,b) in enumerate(zip(old, new)): yield from differences(a, b, tolerance, f'{where}/{i}')
    elif isinstance(old, (int, float)) and isinstance(new, (int, float)) and is_near(old, new, tolerance, where): return
    elif old!=new: yield f'{where}: {old!r} is now {new!r}'

def main(what='check'):
    with tempfile.TemporaryDirectory() as tmp, redirect_stdout(StringIO()): new = json.loads(json.dumps(golden(Path(tmp))))
    if what=='record': return FILE.write_text(json.dumps(new, indent=1, sort_keys=True)+'\n', encoding='utf-8')
    found = list(differences(json.loads(FILE.read_text(encoding='utf-8')), new))
    print('\n'.join(found) or 'all golden outputs hold')
    return len(found)

if __name__=='__main__': main(*sys.argv[1:])
