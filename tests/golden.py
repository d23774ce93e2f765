"""Golden outputs: what seeded tiny runs give, number by number, and the public names.

    python tests/golden.py record    # after a change that is meant to change them; say in the commit which and why
    python tests/golden.py check     # every number that has changed since

`test_golden.py` runs the check with a tolerance, since another processor may round otherwise."""
import csv, json, os, signal, subprocess, sys, tempfile, time
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

def killed(data, out):
    "Start the run of `one`, kill it while the target trains, and go on"
    code = f'import sys; sys.path[:0] = {sys.path[:2]!r}; import golden; golden.one({str(data)!r}, {str(out)!r})'
    p = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.DEVNULL)
    while p.poll() is None and not list(Path(out).glob('target_*.checkpoint')): time.sleep(0.01)
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert not (Path(out)/'report.json').is_file(), 'the run ended before it was killed'
    return one(data, out)

def one(data, out):
    data_distillation(NET, NET, VIEWS, data, out, **RUN)
    return outcome(out)

def golden(tmp):
    "All golden outputs, made in the folder `tmp`"
    torch.set_num_threads(1)
    data,models = make_discs(tmp/'discs'), [make_model(seed=s) for s in (0, 1)]
    files,valid = unlabeled_files(data), split_files(data, 'valid')
    model_data_distillation([NET, CGNET], NET, VIEWS, data, tmp/'two', **RUN)
    distill([NET], NET, ['H Flip'], data, tmp/'naive', recipe='naive', **RUN)
    simple_training(NET, data, tmp/'simple', **RUN)
    for turn in (True, False): annotate(models, files, tmp/f'together {turn}', VIEWS, SIZE, bs=2, valid=valid, weights=[2, 1], together=turn, confidence=True)
    annotate(models[0], files, tmp/'windows', ['V Flip'], SIZE, window=40)
    first = one(data, tmp/'one')
    return rounded(dict(names=library.__all__, one_teacher=first, killed_is_same=killed(data, tmp/'killed')==first, two_teachers=outcome(tmp/'two'),
        naive=outcome(tmp/'naive'), simple=outcome(tmp/'simple'), together=annotations(tmp/'together True'), in_turn=annotations(tmp/'together False'),
        windows=annotations(tmp/'windows'), predict=[pixels(o) for o in predict(models[0], files)]))

def differences(old, new, tolerance=0., where=''):
    "Yield each place where `new` is not `old`; numbers may differ by `tolerance`, counts of pixels by 20 times that share"
    if isinstance(old, dict) and isinstance(new, dict):
        for k in sorted({*old, *new}): yield from differences(old.get(k), new.get(k), tolerance, f'{where}/{k}')
    elif isinstance(old, list) and isinstance(new, list) and len(old)==len(new):
        for i,(a,b) in enumerate(zip(old, new)): yield from differences(a, b, tolerance, f'{where}/{i}')
    elif isinstance(old, (int, float)) and isinstance(new, (int, float)) and abs(old-new)<=tolerance*max(1, 20*abs(old)): return
    elif old!=new: yield f'{where}: {old!r} is now {new!r}'

def main(what='check'):
    with tempfile.TemporaryDirectory() as tmp: new = json.loads(json.dumps(golden(Path(tmp))))
    if what=='record': return FILE.write_text(json.dumps(new, indent=1, sort_keys=True)+'\n', encoding='utf-8')
    found = list(differences(json.loads(FILE.read_text(encoding='utf-8')), new))
    print('\n'.join(found) or 'all golden outputs hold')
    return len(found)

if __name__=='__main__': main(*sys.argv[1:])
