"The benchmarks' splits: which image tests, validates, teaches, or has no label; fixed by `splits.csv`, whole groups together"
import csv, random, shutil
from pathlib import Path

SETS = 'kvasir_seg_256', 'busi_320', 'covid_ct_256'
TABLE = Path(__file__).parent/'splits.csv'

def deal(source):
    "`{image: split}` for a new set: a fifth tests, 60 train, 20 validate, the rest have no labels; `more` may be 60 further labels"
    groups,res = {}, {}
    for r in csv.DictReader((source/'groups.csv').open(encoding='utf-8')): groups.setdefault(r['group'], []).append(r['image'])
    order,total = sorted(groups), sum(map(len, groups.values()))
    random.Random(0).shuffle(order)
    for split,n in dict(test=total//5, train=60, valid=20).items():
        names = []
        while len(names)<n: names += groups[order.pop()]
        res.update({names[i*len(names)//n]: split for i in range(n)})
    rest = [name for g in order for name in groups[g]]
    return {**res, **{name: 'more' if i<60 else 'unlabeled' for i,name in enumerate(rest)}}

def splits(source, table=TABLE):
    "`{image: split}` of the set in the folder `source`; dealt and added to the table where it does not know the set"
    rows = list(csv.DictReader(table.open(encoding='utf-8'))) if table.exists() else []
    known = {r['image']: r['split'] for r in rows if r['set']==source.name}
    if known: return known
    new = deal(source)
    with table.open('w', newline='', encoding='utf-8') as f:
        w = csv.DictWriter(f, ['set', 'image', 'split'], lineterminator='\n')
        w.writeheader()
        w.writerows(rows + [dict(set=source.name, image=k, split=v) for k,v in new.items()])
    return new

def spread(source, table=TABLE):
    "As `splits`, but the 60 labels are taken evenly from all groups that neither test nor validate"
    group = {r['image']: r['group'] for r in csv.DictReader((source/'groups.csv').open(encoding='utf-8'))}
    kept = {n: s for n,s in splits(source, table).items() if s in ('test', 'valid')}
    rest = sorted((n for n in splits(source, table) if n not in kept), key=lambda n: (group[n], n))
    return {**dict.fromkeys(rest, 'unlabeled'), **{rest[i*len(rest)//60]: 'train' for i in range(60)}, **kept}

def lay_out(source, dest, labels=60, table=TABLE, deal=splits):
    "Copy a set into the project's layout with 60 or 120 `labels`, or, with labels=None, all but the test and validation images labelled"
    if dest.exists(): return dest
    new,where = dest.with_name(f'{dest.name}.new'), dict(test='test', valid='valid', train='train')
    where.update({None: dict(more='train', unlabeled='train'), 120: dict(more='train'), 60: {}}[labels])
    for name,split in deal(source, table).items():
        split = where.get(split)
        pairs = ((f'images/{name}', f'Images/{split}'), (f'masks/{Path(name).stem}.png', f'Labels/{split}')) if split else ((f'images/{name}', 'unlabeled_images'),)
        for src,dst in pairs:
            (new/dst).mkdir(parents=True, exist_ok=True)
            shutil.copy(source/src, new/dst)
    shutil.copy(source/'codes.txt', new)
    return new.rename(dest)
