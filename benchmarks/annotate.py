"""Measure the annotation: its speed beside bare forward passes, its memory, and whether the uncertainty of a vote predicts errors.

    pip install -e '.[bench,offline]'
    python benchmarks/annotate.py --data FOLDER

`FOLDER` holds `kvasir_seg_256`, `busi_320` and `covid_ct_256`, each with `images/`, `masks/`, `codes.txt` and `groups.csv`; `splits.csv` names the test images.
The figures go to `nbs/results/annotate.json`, which the benchmark's notebook reads."""
import argparse, json, platform, statistics, subprocess, sys, tempfile, time
from pathlib import Path

from semisup_seg.annotation.annotate import annotate
from semisup_seg.data.images import load_image, parse_codes
from semisup_seg.data.folder import split_files
from semisup_seg.data.loaders import resize_image, seg_dls
from semisup_seg.training.learner import fit, seg_learner
from semisup_seg.training.inference import Predictor, load_model, save_model, probs_to_mask
from semisup_seg.models.core import build_model
from semisup_seg.annotation.records import spearman
from semisup_seg.annotation.views import get_views
from semisup_seg.annotation.voting import VoteAccumulator, entropy

import numpy as np, torch
from fastai.torch_core import set_seed
from PIL import Image
from splits import SETS, lay_out

PARTS = {}
FLIPS = ['H Flip', 'V Flip', 'H+V Flip']

def teacher(path, file, steps=300):
    "A U-Net over EfficientNet-Lite0, trained at 128 pixels, or the one that an earlier run left in `file`"
    if file.exists(): return load_model(file)
    set_seed(0)
    learn = seg_learner(seg_dls(path, size=(128, 128), bs=8, epoch_len=steps*8//6), 'U-Net', 'tf_efficientnet_lite0', pretrained=True)
    fit(learn, epochs=6, freeze_epochs=0, lr=2e-3)
    save_model(learn, file)
    return load_model(file)

def part(f):
    PARTS[f.__name__] = f
    return f

def network(name, size):
    "An untrained network for two classes and images of `size` pixels"
    torch.manual_seed(0)
    m = build_model(name).to(memory_format=torch.channels_last).eval()
    m.codes,m.size = parse_codes('rest,0\nthing,255'), (size, size)
    return m

def predict_flips(m, arrays):
    "Probabilities of the image and of its three flips, each flipped back"
    predictor = Predictor(m.size, len(arrays))
    return [probs for _,_,probs in predictor.predict_views([m], arrays, get_views(FLIPS))]

def seconds(f, *args, **kw):
    start = time.perf_counter()
    f(*args, **kw)
    return time.perf_counter()-start

@part
def speed(o):
    "From 200 files to their masks, image and three flips, beside the network alone on the same batches, turn by turn"
    files = sorted((o.data/'kvasir_seg_256/images').iterdir())[:200]
    rows = []
    for name,size in (('CGNet', 256), ('FPENet', 128)):
        m = network(name, size)
        arrays = [resize_image(load_image(f), m.size) for f in files]
        batches = [torch.from_numpy(np.stack([v.apply(a) for a in arrays[i:i+8]] if v else arrays[i:i+8])).movedim(-1, 1).float()/255
            for i in range(0, len(files), 8) for v in [None, *get_views(FLIPS)]]
        @torch.inference_mode()
        def bare():
            for x in batches: m(x)
        def ours():
            with tempfile.TemporaryDirectory() as d: annotate(m, files, d, FLIPS)
        for f in (bare, ours): f()
        times = [[seconds(f) for f in ((bare, ours) if i%2 else (ours, bare))] for i in range(o.rounds)]
        times = [t if i%2 else t[::-1] for i,t in enumerate(times)]
        rows.append(dict(network=name, size=size, images=len(files), rounds=o.rounds,
            bare=statistics.median(a for a,_ in times), ours=statistics.median(b for _,b in times),
            ratio=statistics.median(b/a for a,b in times), ratios=[b/a for a,b in times]))
    return rows

@part
def steps(o):
    "Where the time goes: milliseconds an image, each step by itself on one batch of eight, medians"
    files = sorted((o.data/'kvasir_seg_256/images').iterdir())[:8]
    rows = []
    for name,size in (('CGNet', 256), ('FPENet', 128)):
        m,images = network(name, size), [load_image(f) for f in files]
        arrays = [resize_image(i, m.size) for i in images]
        x = torch.from_numpy(np.stack(arrays)).movedim(-1, 1).float()/255
        with torch.inference_mode():
            logits,probs = m(x), predict_flips(m, arrays)
            def count():
                b = VoteAccumulator()
                for p in probs: b.add(p)
                return b
            ballot = count()
            mean = ballot.result()[0]
            masks = [probs_to_mask(p, (256, 256))[0]*255 for p in mean]
            def write():
                for i,k in enumerate(masks): Image.fromarray(k).save(Path(d)/f'{i}.png', compress_level=3)
            work = {'decode': lambda: [load_image(f) for f in files], 'resize': lambda: [resize_image(i, m.size) for i in images],
                'change and convert, 4 views': lambda: [torch.from_numpy(np.stack([v.apply(a) for a in arrays])).movedim(-1, 1).float()/255 for v in get_views([*FLIPS, 'H Flip'][:3])],
                'network, 4 views': lambda: [m(x) for _ in range(4)], 'softmax, 4 views': lambda: [logits.float().softmax(1) for _ in range(4)],
                'count the votes': count, 'agreement, entropy': lambda: (ballot.result(), entropy(mean)), 'to size, decide': lambda: [probs_to_mask(p, (256, 256)) for p in mean], 'write': write}
            with tempfile.TemporaryDirectory() as d:
                for step,f in work.items():
                    f()
                    rows.append(dict(network=name, step=step, ms=statistics.median(seconds(f) for _ in range(7))/8*1000))
    return rows

PROBE = """import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from annotate import network
from semisup_seg.annotation.annotate import annotate
files, out, kw = sys.argv[2].split('|'), sys.argv[3], eval(sys.argv[4])
teachers = [network('FPENet', 128) for _ in range(kw.pop('teachers', 1))]
annotate(teachers, files, out, **kw)
print(next(int(l.split()[1])/1024 for l in open('/proc/self/status') if l.startswith('VmHWM')))"""

def peak(files, **kw):
    "Peak resident memory of a process that annotates `files`, MB, and its seconds"
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as d:
        res = subprocess.run([sys.executable, '-c', PROBE, Path(__file__).parent, '|'.join(map(str, files)), d, repr(kw)], capture_output=True, text=True, check=True)
    return float(res.stdout.split()[-1]), time.perf_counter()-start

@part
def memory(o):
    "Peak resident memory for more images, more voters, and one large image, FPENet at 128 pixels, batches of eight"
    files,rows = sorted((o.data/'kvasir_seg_256/images').iterdir()), []
    with tempfile.TemporaryDirectory() as d:
        slide = Path(d)/'slide.png'
        Image.open(files[0]).resize((4000, 3000)).save(slide)
        cases = [('50 images, 3 views', files[:50], dict(views=FLIPS)), ('500 images, 3 views', files[:500], dict(views=FLIPS)), ('50 images, no views', files[:50], {}),
            ('50 images, 3 views, 3 teachers', files[:50], dict(views=FLIPS, teachers=3)), ('50 images, 3 views, 3 teachers one after another', files[:50], dict(views=FLIPS, teachers=3, together=False)),
            ('one image of 4000 × 3000, seen whole', [slide], {}), ('one image of 4000 × 3000 in windows of 256, at 256', [slide], dict(window=256, size=(256, 256)))]
        for what,some,kw in cases:
            mb,s = peak(some, **kw)
            rows.append(dict(case=what, mb=mb, seconds=s))
            print(f'{mb:.0f} MB  {s:.0f} s  {what}', flush=True)
    return rows

@part
def ttach(o):
    "The same four flips by ttach: the largest difference in any probability, and seconds beside seconds, turn by turn"
    import ttach
    m,rows = network('CGNet', 256), []
    arrays = [resize_image(load_image(f), m.size) for f in sorted((o.data/'kvasir_seg_256/images').iterdir())[:8]]
    theirs = ttach.SegmentationTTAWrapper(torch.nn.Sequential(m, torch.nn.Softmax(1)), ttach.Compose([ttach.HorizontalFlip(), ttach.VerticalFlip()]))
    def ours():
        b = VoteAccumulator()
        for p in predict_flips(m, arrays): b.add(p)
        return b.total/b.weight
    @torch.inference_mode()
    def peer(): return theirs(torch.from_numpy(np.stack(arrays)).movedim(-1, 1).float()/255)
    difference = (ours()-peer()).abs().max().item()
    times = [(seconds(ours), seconds(peer)) if i%2 else (seconds(peer), seconds(ours))[::-1] for i in range(9)]
    return dict(difference=difference, ratio=statistics.median(a/b for a,b in times), rounds=len(times))

@part
def doubt(o):
    "Does uncertainty predict errors? A teacher of 60 images on test images, calibrated on 20 others"
    rows = []
    for name in SETS:
        path = lay_out(o.data/name, o.work/f'{name}-60')
        m,test,valid = teacher(path, o.work/f'{name}.pth'), split_files(path, 'test'), split_files(path, 'valid')
        with tempfile.TemporaryDirectory() as d: ann = annotate(m, [f for f,_ in valid], d, [*FLIPS, 'Gamma'], valid=test)
        known = {r.image: r for r in ann.checked if r.dice is not None}
        with tempfile.TemporaryDirectory() as d: ann = annotate(m, [f for f,_ in test], d, [*FLIPS, 'Gamma'], valid=valid)
        mine = [r for r in ann.rows if r.image in known]
        true = [known[r.image].dice for r in mine]
        rows.append(dict(set=name, images=len(mine), dice=float(np.mean(true)), **{k: spearman([getattr(r, k) for r in mine], true) for k in ('agreement', 'confidence', 'entropy')},
            valid=spearman([r.agreement for r in ann.checked], [r.dice for r in ann.checked]),
            error=float(np.mean(np.abs(np.subtract([r.predicted_dice for r in mine], true)))),
            error_of_mean=float(np.mean(np.abs(np.mean([r.dice for r in ann.checked])-np.array(true)))),
            points=[[r.agreement, r.predicted_dice, t] for r,t in zip(mine, true)]))
        print({k: v for k,v in rows[-1].items() if k!='points'}, flush=True)
    return rows

def main():
    "Measure and write"
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', type=Path, required=True, help='folder of the three sets')
    p.add_argument('--work', type=Path, default=Path(tempfile.gettempdir())/'semisup_seg_bench', help='where splits and teachers are kept for the next run')
    p.add_argument('--parts', nargs='+', choices=PARTS, default=list(PARTS), help='what to measure; the figures of the others stay')
    p.add_argument('--rounds', type=int, default=3, help='rounds of the speed part (3)')
    p.add_argument('--out', type=Path, default=Path(__file__).parent.parent/'nbs/results/annotate.json')
    o = p.parse_args()
    if gone := [s for s in SETS if not (o.data/s/'images').is_dir()]: raise SystemExit(f'{o.data}: has no {", ".join(gone)}')
    o.work.mkdir(parents=True, exist_ok=True)
    for name in o.parts:
        print(f'{name}: {PARTS[name].__doc__}', flush=True)
        found = PARTS[name](o)
        old = json.loads(o.out.read_text(encoding='utf-8')) if o.out.exists() else {}
        new = dict(old, **{name: found}, machine=f'{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}')
        o.out.write_text(json.dumps(new, indent=1), encoding='utf-8')

if __name__=='__main__': main()
