"""What the unlabelled images bring: supervised training, the routines and the ceiling, all with the same number of steps.

    pip install -e '.[bench,offline]'
    python benchmarks/distill.py --data FOLDER

`FOLDER` holds `kvasir_seg_256`, `busi_320` and `covid_ct_256`, each with `images/`, `masks/`, `codes.txt` and `groups.csv`.
Each training adds a row to `nbs/results/distill.csv`; a row that is there is not trained again, so the same call goes on after an interruption."""
import argparse, copy, csv, random, tempfile, time
from functools import partial
from pathlib import Path

from semisup_seg.annotation.annotate import annotate, validation_dice
from semisup_seg.core import atomic
from semisup_seg.data.images import load_mask, read_codes
from semisup_seg.data.folder import split_files, unlabeled_files
from semisup_seg.data.loaders import seg_dls, standard_augment
from semisup_seg.training.learner import fit, seg_learner
from semisup_seg.training.inference import load_model, save_model
from semisup_seg.distillation.batches import ConfidenceThreshold, CutMix, HardLabels, MixedBatches, PseudoCallback, StrongAugment, random_box
from semisup_seg.distillation.recipe import EMA, Recipe, TopReliable, get_recipe
from semisup_seg.evaluation.scores import score_images
from semisup_seg.training.metrics import score_mask

import numpy as np, torch
from fastai.torch_core import set_seed
from fastai.callback.core import Callback
from splits import SETS, TABLE, lay_out, splits, spread

NETWORKS = {'U-Net': ('U-Net', 'tf_efficientnet_lite0'), 'CGNet': ('CGNet', None)}
VIEWS = dict(kvasir_seg_256=['H Flip', 'V Flip', 'H+V Flip'], busi_320=['H Flip'], covid_ct_256=['H Flip'])  # chosen on the validation images, see --views
GEOMETRIC_VIEWS = ['H Flip', 'V Flip', 'H+V Flip', 'Rotate 90', 'Rotate 270']
TEACHERS = 0, 1, 2  # seeds of the teachers that vote together
COLUMNS = 'set', 'labels', 'network', 'arm', 'seed', 'size', 'bs', 'steps', 'seconds', 'valid', 'dev', 'test', 'pseudo', 'each'

class Following(PseudoCallback):
    "Replace the pseudo-labels step by step, and wholly from half of the training on, by predictions of the moving average of the student (Tarvainen & Valpola 2017)"
    order = 2.5
    def before_fit(self): self.net = copy.deepcopy(self.model).eval().requires_grad_(False)
    def transform(self, x, p):
        w = min(1, 2*self.learn.pct_train)
        if not w: return x, p
        self.net.load_state_dict(next(c for c in self.learn.cbs if isinstance(c, EMA)).average)
        with torch.no_grad(): q = self.net.eval()(x.as_subclass(torch.Tensor)).float().softmax(1)
        return x, torch.where(p.sum(1, keepdim=True)>0, (1-w)*p+w*q, 0)

class Swap(Callback):
    "Exchange a box between half of the pseudo-labelled images and a labelled one each (Bai et al. 2023)"
    order = 6
    run_valid = False
    needs_mix = True
    def __repr__(self): return 'Swap()'
    def before_batch(self):
        n,x,p = self.learn.labelled, self.x.clone(), self.y.clone()
        for i in range(n, len(x)):
            if random.random()<0.5: continue
            top,left,h,w = random_box(*x.shape[-2:], random.uniform(0.05, 0.5))
            for o in (x, p): o[[i-n, i], :, top:top+h, left:left+w] = o[[i, i-n], :, top:top+h, left:left+w]
        self.learn.xb,self.learn.yb = (x,), (p,)

MAIN = {'supervised': None, 'ceiling': None, 'supervised, seen': None, 'ceiling, seen': None,
    'naive': ('data', 'naive'), 'data': ('data', 'default'), 'model': ('model', 'default'), 'both': ('both', 'default')}
OTHER = {  # chkstyle: ignore-node
    'both, soft': ('both', [MixedBatches(), EMA()]),
    'both, swap': ('both', [MixedBatches(), HardLabels(), Swap(), EMA()]),
    'both, CutMix': ('both', [MixedBatches(), HardLabels(), CutMix(), EMA()]),
    'both, a quarter': ('both', [MixedBatches(0.25), HardLabels(), EMA()]),
    'data, not seen': ('data', [MixedBatches(), HardLabels(), EMA()]),
    'model, not seen': ('model', [MixedBatches(), HardLabels(), EMA()]),
    'both, not seen': ('both', [MixedBatches(), HardLabels(), EMA()]),
    **{arm: ('data', recipe) for arm,recipe in {
        'mix': [MixedBatches(), HardLabels()],
        'mix, soft': [MixedBatches()],
        'mix, confident': [MixedBatches(), ConfidenceThreshold(), HardLabels()],
        'mix, strong': [MixedBatches(), HardLabels(), StrongAugment()],
        'mix, CutMix': [MixedBatches(), HardLabels(), CutMix()],
        'mix, EMA': [MixedBatches(), HardLabels(), EMA()],
        'mix, trusted': [TopReliable(), MixedBatches(), HardLabels()],
        'mix, again': Recipe(mix=MixedBatches(), callbacks=(HardLabels(),), rounds=2),
        'mix, CutMix, EMA': [MixedBatches(), HardLabels(), CutMix(), EMA()],
        'mix, soft, EMA': [MixedBatches(), EMA()],
        'mix, strong, CutMix, EMA': [MixedBatches(), HardLabels(), StrongAugment(), CutMix(), EMA()],
        'mix, soft, CutMix, EMA': [MixedBatches(), CutMix(), EMA()],
        'mix, strong, CutMix, EMA, following': [MixedBatches(), HardLabels(), StrongAugment(), CutMix(), EMA(), Following()],
        'mix, EMA, from the teacher': [MixedBatches(), HardLabels(), EMA()],  # begins with the teacher's weights
        'mix, soft, EMA, seen': [MixedBatches(), EMA()],
        'mix, confident, EMA, seen': [MixedBatches(), ConfidenceThreshold(), HardLabels(), EMA()],
        'mix, CutMix, EMA, seen': [MixedBatches(), HardLabels(), CutMix(), EMA()],
        'mix a quarter, EMA, seen': [MixedBatches(0.25), HardLabels(), EMA()],
        'all but again': [TopReliable(), MixedBatches(), ConfidenceThreshold(), StrongAugment(), CutMix(), EMA()]}.items()}}
ARMS = {**MAIN, **OTHER}

def recipe_of(arm):
    "The recipe of an arm; one that changes nothing where no student is trained"
    return get_recipe(ARMS[arm][1]) if ARMS[arm] else Recipe()

def has_views(arm):
    "Whether the networks of an arm are trained with the flips and quarter turns"
    return arm.endswith(', seen') or arm.startswith(('data', 'model', 'both')) and not arm.endswith(', not seen')

class Bench:
    "All trainings on one set with one number of labels and one network"
    def __init__(self, o, name, labels, network):
        self.o,self.name,self.labels,self.network,self.size = o,name,labels,network,(o.size, o.size)
        self.key,deal = (f'{name}, spread', spread) if o.spread else (name, splits)
        self.path,self.whole = (lay_out(o.data/name, o.work/f'{self.key}-{n}', n, o.splits, deal) for n in (labels, None))
        self.every = len(split_files(self.whole, 'train'))//o.bs  # steps an epoch in every arm: one pass over all images
        self.epochs = max(1, round(o.steps/self.every))
        self.out = o.work/f'{self.key}-{labels}-{network}-{o.size}-{o.bs}-{self.epochs*self.every}'

    def others(self, arm):
        "Labelled images that no training of this setting knew as such, on which recipes are compared; none for the ceiling, for 120 labels and for labels that are spread"
        if arm.startswith('ceiling') or self.labels!=60 or self.o.spread: return []
        names = [Path(k) for k,v in splits(self.o.data/self.name, self.o.splits).items() if v=='more']
        return [(self.o.data/self.name/'images'/n, self.o.data/self.name/f'masks/{n.stem}.png') for n in names]

    def model(self, arm, seed): return self.out/f'{arm}-{seed}.pth'

    def label(self, kind, files, views):
        "Pseudo-labels by the models `files`"
        return annotate(files, unlabeled_files(self.path), self.out/kind, views, self.size, soft=True, valid=split_files(self.path, 'valid'))

    def pseudo(self, arm, seed, recipe):
        "The pseudo-labels of an arm: of one teacher, of all, or of the student of an earlier arm"
        kind = ARMS[arm][0]
        seen = ', seen' if has_views(arm) else ''
        views = [] if kind=='model' else GEOMETRIC_VIEWS if seen else VIEWS[self.name]
        if recipe.rounds>1: ann = self.label(f'{arm}-{seed}', [self.model(arm.partition(', again')[0], seed)], views)
        elif kind=='data': ann = self.label(f'data{seen}-{seed}', [self.model(f'supervised{seen}', seed)], views)
        else: ann = self.label(f'{kind}{seen}', [self.model(f'supervised{seen}', s) for s in TEACHERS], views)
        return recipe.select.select(ann) if recipe.select else ann

    def truth(self, ann):
        "Mean true Dice of pseudo-labels; their truth is known here, and used for nothing else"
        pairs = [(mask, self.o.data/self.name/f'masks/{image.stem}.png') for image,mask in ann.pairs.items()]
        codes = read_codes(self.path)
        return np.nanmean([score_mask(load_mask(m, codes), load_mask(t, codes), codes.names)['dice'] for m,t in pairs])

    def teach(self, path, file, seed, recipe=Recipe(), ann=None, start=None, augment=standard_augment):
        "Train on the labels in `path` and on `ann`, beginning with the weights in `start`; save as `file`; what it cost and the scores, one by one on the test images"
        o = self.o
        set_seed(seed + (1000 if ann else 0), reproducible=True)
        n,_ = recipe.batch_sizes(o.bs)
        dls = seg_dls(path, self.size, n, augment, pseudo=ann.pairs if ann and not recipe.mix else None, epoch_len=self.every*n)
        callbacks = recipe.make_callbacks(ann, self.size, o.bs, augment)
        if not any(isinstance(cb, EMA) for cb in callbacks): callbacks.append(EMA())
        learn = seg_learner(dls, *NETWORKS[self.network], pretrained=self.network=='U-Net')
        if start: learn.model.load_state_dict(load_model(start).state_dict())
        learn.add_cbs(callbacks)
        began = time.time()
        fit(learn, self.epochs, 0, o.lr)
        save_model(learn, file)
        seconds = round(time.time()-began)
        valid,test = (self.scores(learn, split_files(self.path, s)) for s in ('valid', 'test'))
        return learn, dict(steps=self.epochs*len(dls.train), seconds=seconds, valid=f'{np.nanmean(valid):.4f}', test=f'{np.nanmean(test):.4f}', each=' '.join(f'{s:.3f}' for s in test))

    def scores(self, learn, pairs): return [r['dice'] for r in score_images(learn, pairs, self.o.bs)]

    def train(self, arm, seed):
        "Train one arm; its row"
        recipe = recipe_of(arm)
        ann = self.pseudo(arm, seed, recipe) if ARMS[arm] else None
        path = self.whole if arm.startswith('ceiling') else self.path
        start = self.model('supervised', seed) if arm.endswith('from the teacher') else None
        augment = partial(standard_augment, has_views(arm))
        learn,row = self.teach(path, self.model(arm, seed), seed, recipe, ann, start, augment)
        dev = self.scores(learn, self.others(arm))
        return dict(set=self.key, labels=self.labels, network=self.network, arm=arm, seed=seed, size=self.o.size, bs=self.o.bs, **row,
            dev=f'{np.nanmean(dev):.4f}' if dev else '', pseudo=f'{self.truth(ann):.4f}' if ann else '')

    def views(self, arm):
        "Dice of the teachers of `arm` on the validation images with each flip, with all flips, and with the quarter turns too"
        teachers,pairs,flips = [self.model(arm, s) for s in TEACHERS], split_files(self.path, 'valid'), GEOMETRIC_VIEWS[:3]
        return [dict(set=self.key, arm=arm, views=', '.join(v), **{f'teacher {s}': f'{d:.4f}' for s,d in zip(TEACHERS, validation_dice(teachers, pairs, self.o.bs, v))})
            for v in ([], *([f] for f in flips), flips, GEOMETRIC_VIEWS)]

def write_rows(file, rows, columns):
    with atomic(file) as f, f.open('w', newline='', encoding='utf-8') as fh:
        w = csv.DictWriter(fh, columns, lineterminator='\n')
        w.writeheader()
        w.writerows(rows)

def read_rows(file): return list(csv.DictReader(file.open(encoding='utf-8'))) if file.exists() else []

def same(key): return lambda row: all(row[k]==v for k,v in key.items())

def have(file, key): return any(map(same(key), read_rows(file)))

def put(file, key, row, columns):
    "Write `row` in the place of the one with this key; the file is read again, since other processes write too"
    print({k: v for k,v in row.items() if k!='each'}, flush=True)
    write_rows(file, [*(r for r in read_rows(file) if not same(key)(r)), row], columns)

def options(doc, out, steps):
    "The arguments that the benchmarks of this folder share, and those of one training"
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', type=Path, required=True, help='folder of the three sets')
    p.add_argument('--work', type=Path, default=Path(tempfile.gettempdir())/'semisup_seg_bench', help='where splits, models and pseudo-labels are kept')
    p.add_argument('--out', type=Path, default=Path(__file__).parent.parent/f'nbs/results/{out}')
    p.add_argument('--splits', type=Path, default=TABLE, help='which image is for testing, training, validation; a set that it does not know is added')
    p.add_argument('--sets', nargs='+', default=SETS, choices=SETS)
    p.add_argument('--seeds', nargs='+', type=int, default=TEACHERS, help='of the trainings; those of the teachers that vote together are always 0, 1 and 2')
    p.add_argument('--size', type=int, default=64)
    p.add_argument('--bs', type=int, default=16)
    p.add_argument('--steps', type=int, default=steps, help='about; whole epochs')
    p.add_argument('--lr', type=float, default=2e-3)
    return p

def parsed(p):
    "The arguments, once it is sure that the data are there"
    o = p.parse_args()
    if gone := [s for s in o.sets if not (o.data/s/'images').is_dir()]: raise SystemExit(f'{o.data}: has no {", ".join(gone)}')
    o.work.mkdir(parents=True, exist_ok=True)
    return o

def main():
    "Train what has no row yet"
    p = options(__doc__, 'distill.csv', 600)
    p.add_argument('--labels', type=int, default=60, choices=(60, 120))
    p.add_argument('--spread', action='store_true', help='take the labels evenly from all groups, a few slices of each scan, rather than whole groups')
    p.add_argument('--network', default='U-Net', choices=NETWORKS)
    p.add_argument('--arms', nargs='+', default=list(MAIN), choices=list(ARMS))
    p.add_argument('--views', choices=('supervised', 'supervised, seen'), help='instead of training, try views on the validation images with the teachers of this arm; writes its rows to views.csv beside OUT')
    o = parsed(p)
    if o.views:
        rows,file = [r for name in o.sets for r in Bench(o, name, o.labels, o.network).views(o.views)], o.out.with_name('views.csv')
        return write_rows(file, [*(r for r in read_rows(file) if r['arm']!=o.views), *rows], list(rows[0]))
    for name in o.sets:
        bench = Bench(o, name, o.labels, o.network)
        for arm in o.arms:
            for seed in o.seeds:
                key = dict(set=bench.key, labels=str(o.labels), network=o.network, arm=arm, seed=str(seed), steps=str(bench.epochs*bench.every))
                if have(o.out, key) and (not arm.startswith('supervised') or bench.model(arm, seed).exists()): continue
                print(*key.values(), flush=True)
                put(o.out, key, bench.train(arm, seed), COLUMNS)

if __name__=='__main__': main()
