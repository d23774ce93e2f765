"""Is it worth labelling the images that `suggest` names? Twenty labels more, suggested, least trusted or drawn at random, and the same training again.

    pip install -e '.[bench,offline]'
    python benchmarks/distill.py --data FOLDER --arms supervised --steps 300
    python benchmarks/suggest.py --data FOLDER

The first call trains the teachers on 60 labels; their uncertainty guides the suggestion. Each training adds a row to `nbs/results/suggest.csv`, and is not repeated."""
import csv, random, shutil
from pathlib import Path

from semisup_seg.data.folder import split_files
from semisup_seg.annotation.review import add_label
from semisup_seg.annotation.suggest import suggest

from distill import VIEWS, Bench, have, options, parsed, put

HOW = 'random', 'suggested', 'least trusted'
COLUMNS = 'set', 'how', 'seed', 'more', 'groups', 'size', 'bs', 'steps', 'seconds', 'valid', 'test', 'each'

def choose(how, ann, n, labelled, seed):
    "`n` of the images that have no label"
    if how=='suggested': return suggest(ann, n, labelled)
    if how=='least trusted': return [Path(r.image) for r in ann.ranked()[:n]]
    return random.Random(seed).sample(sorted(ann.pairs), n)

def train(bench, how, seed, more):
    "The row of one training with `more` labels"
    ann = bench.label(f'data-{seed}', [bench.model('supervised', seed)], VIEWS[bench.name])
    source,path = bench.o.data/bench.name, bench.out/f'{how}-{seed}-{more}'
    chosen = choose(how, ann, more, [i for i,_ in split_files(bench.path, 'train')], seed)
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(bench.path, path)
    for f in chosen: add_label(path, path/'unlabeled_images'/f.name, source/f'masks/{f.stem}.png')
    groups = {r['image']: r['group'] for r in csv.DictReader((source/'groups.csv').open(encoding='utf-8'))}
    row = bench.teach(path, path/'model.pth', seed)[1]
    shutil.rmtree(path)
    return dict(set=bench.name, how=how, seed=seed, more=more, groups=len({groups[f.name] for f in chosen}), size=bench.o.size, bs=bench.o.bs, **row)

def main():
    "Train what has no row yet"
    p = options(__doc__, 'suggest.csv', 300)
    p.add_argument('--how', nargs='+', default=HOW, choices=HOW)
    p.add_argument('--more', type=int, default=20, help='labels to add to the 60')
    o = parsed(p)
    o.spread = False
    for name in o.sets:
        bench = Bench(o, name, 60, 'U-Net')
        for how in o.how:
            for seed in o.seeds:
                key = dict(set=name, how=how, seed=str(seed), more=str(o.more))
                if not bench.model('supervised', seed).exists(): raise SystemExit(f'{bench.model("supervised", seed)}: no such file; train the teachers first: distill.py --arms supervised --steps {o.steps}')
                if not have(o.out, key): put(o.out, key, train(bench, how, seed, o.more), COLUMNS)

if __name__=='__main__': main()
