"""How to train from few labels: augmentation, learning rates and averaged weights, compared on development images.

    pip install -e '.[bench,offline]'
    python benchmarks/training.py --data FOLDER

`FOLDER` is as in `distill.py`. Each training adds a row to `nbs/results/training.csv`; a row that is there is not trained again.
Test images are not read: the labels are drawn from all groups but those of the test and development images."""
import argparse, csv, random, shutil, tempfile, time
from functools import partial
from pathlib import Path

from semisup_seg.core import IGNORE, atomic
from semisup_seg.data.folder import split_files
from semisup_seg.data.loaders import seg_dls, standard_augment
from semisup_seg.distillation.recipe import EMA
from semisup_seg.evaluation.scores import score_images
from semisup_seg.training.learner import seg_learner

import albumentations as A, numpy as np, torch
from fastai.torch_core import set_seed
from splits import SETS, TABLE, splits

COLUMNS = 'set', 'labels', 'arm', 'seed', 'network', 'size', 'bs', 'steps', 'seconds', 'last', 'average', 'each'

def mild_augment():
    "Horizontal flips, small changes of scale, place, brightness and contrast"
    affine = A.Affine(scale=(0.8, 1.2), rotate=(-20, 20), translate_percent=0.08, fill_mask=IGNORE, p=0.9)
    return A.Compose([A.HorizontalFlip(p=0.5), affine, A.RandomBrightnessContrast(0.2, 0.2, p=0.5)])

def strong_augment():
    "As `standard_augment`, with twice its changes of scale, place and colour, and blur"
    flips = standard_augment().transforms[0]
    affine = A.Affine(scale=(0.6, 1.6), rotate=(-30, 30), shear=(-8, 8), translate_percent=0.15, fill_mask=IGNORE, p=0.9)
    colours = A.ColorJitter((0.6, 1.4), (0.6, 1.4), (0.6, 1.4), (-0.05, 0.05), p=0.8)
    return A.Compose([flips, affine, colours, A.RandomGamma((70, 140), p=0.3), A.GaussianBlur(blur_limit=(3, 5), p=0.2)])

ARMS = {
    'standard': dict(),
    'mild': dict(augment=mild_augment),
    'strong': dict(augment=strong_augment),
    'no flips': dict(augment=partial(standard_augment, flips=False)),
    'rate 0.005': dict(lr=5e-3),
    'rate 0.0008': dict(lr=8e-4),
    'encoder tenth': dict(encoder=0.1)}

def lay_out(source, dest, labels, seed):
    "Copy `labels` training images, spread over the groups, and the development images into the project's layout"
    if dest.exists(): return dest
    table = splits(source, TABLE)
    group = {r['image']: r['group'] for r in csv.DictReader((source/'groups.csv').open(encoding='utf-8'))}
    pool = sorted((n for n,s in table.items() if s in ('train', 'unlabeled')), key=lambda n: (group[n], n))
    start = random.Random(seed).random()
    train = [pool[int((i+start)*len(pool)/labels)] for i in range(labels)]
    dev = [n for n,s in table.items() if s in ('valid', 'more')]
    new = dest.with_name(f'{dest.name}.new')
    for split,names in dict(train=train, valid=dev).items():
        for n in names:
            for folder,file in (('Images', f'images/{n}'), ('Labels', f'masks/{Path(n).stem}.png')):
                (new/folder/split).mkdir(parents=True, exist_ok=True)
                shutil.copy(source/file, new/folder/split)
    shutil.copy(source/'codes.txt', new)
    return new.rename(dest)

def train(o, path, augment=standard_augment, lr=2e-3, encoder=1.):
    "Train once; Dice on the development images by the last weights, and one by one by the averaged ones"
    set_seed(o.seed, reproducible=True)
    dls = seg_dls(path, (o.size, o.size), o.bs, augment, epoch_len=o.steps*o.bs)
    learn = seg_learner(dls, *o.network, pretrained=True)
    pairs = split_files(path, 'valid')
    average = EMA(0.99)
    began = time.time()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, slice(lr*encoder, lr), cbs=average)
    seconds = time.time()-began
    found = {}
    for name,weights in dict(last=average.raw, average=average.average).items():
        learn.model.load_state_dict(weights)
        found[name] = [r['dice'] for r in score_images(learn, pairs)]
    return dict(seconds=round(seconds), **{k: f'{np.nanmean(v):.4f}' for k,v in found.items()}, each=' '.join(f'{v:.3f}' for v in found['average']))

def main():
    "Train what has no row yet"
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', type=Path, required=True, help='folder of the three sets')
    p.add_argument('--work', type=Path, default=Path(tempfile.gettempdir())/'semisup_seg_training')
    p.add_argument('--out', type=Path, default=Path(__file__).parent.parent/'nbs/results/training.csv')
    p.add_argument('--sets', nargs='+', default=SETS, choices=SETS)
    p.add_argument('--arms', nargs='+', default=list(ARMS), choices=list(ARMS))
    p.add_argument('--network', nargs=2, default=('Linknet', 'tf_efficientnet_lite0'))
    p.add_argument('--labels', type=int, default=20)
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--size', type=int, default=96)
    p.add_argument('--bs', type=int, default=16)
    p.add_argument('--steps', type=int, default=400)
    o = p.parse_args()
    for arm in o.arms:
        for name in o.sets:
            key = dict(set=name, labels=str(o.labels), arm=arm, seed=str(o.seed), network=o.network[0], size=str(o.size), bs=str(o.bs), steps=str(o.steps))
            rows = list(csv.DictReader(o.out.open(encoding='utf-8'))) if o.out.exists() else []
            if any(all(r[k]==v for k,v in key.items()) for r in rows): continue
            path = lay_out(o.data/name, o.work/f'{name}-{o.labels}-{o.seed}', o.labels, o.seed)
            row = key | train(o, path, **ARMS[arm])
            print({k: v for k,v in row.items() if k!='each'}, flush=True)
            rows = list(csv.DictReader(o.out.open(encoding='utf-8'))) if o.out.exists() else []
            with atomic(o.out) as f, f.open('w', newline='', encoding='utf-8') as fh:
                w = csv.DictWriter(fh, COLUMNS, lineterminator='\n')
                w.writeheader()
                w.writerows([*rows, row])

if __name__=='__main__': main()
