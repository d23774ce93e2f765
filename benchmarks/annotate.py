"""Measure the annotation: its speed beside bare forward passes, its memory, and whether its doubt is deserved.

    pip install -e '.[bench,offline]'
    python benchmarks/annotate.py --data FOLDER

`FOLDER` holds `kvasir_seg_256`, `busi_320` and `covid_ct_256`, each with `images/`, `masks/`, `codes.txt` and `groups.csv`.
The figures go to `nbs/results/annotate.json`, which the benchmark's notebook reads."""
import argparse, csv, json, platform, random, shutil, statistics, subprocess, sys, tempfile, time
from pathlib import Path

import semisup_seg.models  # registers the networks
from semisup_seg.annotate import Look, annotate, correlation, opinions, predict_dice
from semisup_seg.core import load_image, parse_codes, split_files
from semisup_seg.data import resize_image, seg_dls
from semisup_seg.learner import fit, load_model, save_model, seg_learner, to_mask
from semisup_seg.models.core import build_model
from semisup_seg.views import get_views
from semisup_seg.vote import Ballot, entropy

import numpy as np, torch
from fastai.torch_core import set_seed
from PIL import Image

PARTS,FLIPS = {}, ['H Flip', 'V Flip', 'H+V Flip']
SETS = 'kvasir_seg_256', 'busi_320', 'covid_ct_256'

def copy(source, dest, split, name):
    "Copy one image, and its mask if it goes into a `split`"
    for src,dst in ((source/'images'/name, f'Images/{split}'), (source/'masks'/f'{Path(name).stem}.png', f'Labels/{split}')) if split else ((source/'images'/name, 'unlabeled_images'),):
        (dest/dst).mkdir(parents=True, exist_ok=True)
        shutil.copy(src, dest/dst)

def lay_out(source, dest, n_train=60, n_valid=20, seed=0):
    "Copy a set into the project's layout, whole groups together: a fifth tests, then training, validation, the rest unlabelled"
    if dest.exists(): return dest
    groups = {}
    for r in csv.DictReader((source/'groups.csv').open(encoding='utf-8')): groups.setdefault(r['group'], []).append(r['image'])
    order,new,total = sorted(groups), dest.with_name(f'{dest.name}.new'), sum(map(len, groups.values()))
    random.Random(seed).shuffle(order)
    for split,n in dict(test=total//5, train=n_train, valid=n_valid).items():
        names = []
        while len(names)<n: names += groups[order.pop()]
        for i in range(n): copy(source, new, split, names[i*len(names)//n])
    for g in order:
        for name in groups[g]: copy(source, new, None, name)
    shutil.copy(source/'codes.txt', new)
    return new.rename(dest)

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
    "An untrained network that knows two classes and looks at `size` pixels"
    torch.manual_seed(0)
    m = build_model(name).to(memory_format=torch.channels_last).eval()
    m.codes,m.size = parse_codes('rest,0\nthing,255'), (size, size)
    return m

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
        arrays = [resize_image(load_image(f), (size, size)) for f in files]
        batches = [torch.from_numpy(np.stack([v.change(a) for a in arrays[i:i+8]] if v else arrays[i:i+8])).movedim(-1, 1).float()/255
            for i in range(0, len(files), 8) for v in [None, *get_views(FLIPS)]]
        @torch.inference_mode()
        def bare():
            for x in batches: m(x)
        def ours():
            with tempfile.TemporaryDirectory() as d: annotate(m, files, d, FLIPS)
        for f in (bare, ours): f()
        times = [[seconds(f) for f in ((bare, ours) if i%2 else (ours, bare))] for i in range(o.rounds)]
        times = [t if i%2 else t[::-1] for i,t in enumerate(times)]
        rows.append(dict(network=name, size=size, images=len(files), rounds=o.rounds, bare=statistics.median(a for a,_ in times), ours=statistics.median(b for _,b in times),
            ratio=statistics.median(b/a for a,b in times), ratios=[b/a for a,b in times]))
    return rows

@part
def steps(o):
    "Where the time goes: milliseconds an image, each step by itself on one batch of eight, medians"
    files = sorted((o.data/'kvasir_seg_256/images').iterdir())[:8]
    rows = []
    for name,size in (('CGNet', 256), ('FPENet', 128)):
        m,images = network(name, size), [load_image(f) for f in files]
        arrays = [resize_image(i, (size, size)) for i in images]
        x = torch.from_numpy(np.stack(arrays)).movedim(-1, 1).float()/255
        with torch.inference_mode():
            logits,probs = m(x), list(opinions([m], arrays, get_views(FLIPS)))
            def count():
                b = Ballot()
                for p in probs: b.add(p)
                return b
            ballot = count()
            mean = ballot.result()[0]
            masks = [to_mask(p, (256, 256))[0]*255 for p in mean]
            def write():
                for i,k in enumerate(masks): Image.fromarray(k).save(Path(d)/f'{i}.png', compress_level=3)
            work = {'decode': lambda: [load_image(f) for f in files], 'resize': lambda: [resize_image(i, (size, size)) for i in images],
                'change and convert, 4 views': lambda: [torch.from_numpy(np.stack([v.change(a) for a in arrays])).movedim(-1, 1).float()/255 for v in get_views([*FLIPS, 'H Flip'][:3])],
                'network, 4 views': lambda: [m(x) for _ in range(4)], 'softmax, 4 views': lambda: [logits.float().softmax(1) for _ in range(4)],
                'count the votes': count, 'agreement, entropy': lambda: (ballot.result(), entropy(mean)), 'to size, decide': lambda: [to_mask(p, (256, 256)) for p in mean], 'write': write}
            with tempfile.TemporaryDirectory() as d:
                for step,f in work.items():
                    f()
                    rows.append(dict(network=name, step=step, ms=statistics.median(seconds(f) for _ in range(7))/8*1000))
    return rows
