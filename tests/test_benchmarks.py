"The benchmarks run, and their committed results hold what the pages claim"
import csv, importlib, json, random, runpy, sys
from types import SimpleNamespace

import numpy as np, pytest, torch
from conftest import ROOT, SMALL_NET, photo, disc, save

from semisup_seg.models.core import networks

def read(f): return list(csv.DictReader(f.open(encoding='utf-8')))

@pytest.fixture
def scripts(monkeypatch):
    "The folder of the benchmarks on the import path; a function that imports one of them"
    monkeypatch.syspath_prepend(ROOT/'benchmarks')
    return importlib.import_module

@pytest.fixture
def call(scripts, monkeypatch, capsys):
    "Call a benchmark with arguments as from the command line; its output, or the text with which it exits"
    def _call(script, *args):
        module = scripts(script)
        monkeypatch.setattr(sys, 'argv', [f'{script}.py', *map(str, args)])
        capsys.readouterr()
        module.main()
        return capsys.readouterr().out
    return _call

@pytest.fixture
def distill(scripts): return scripts('distill')

@pytest.mark.parametrize('script', ['annotate', 'distill', 'networks', 'suggest'])
def test_each_script_starts_and_lists_its_arguments(scripts, monkeypatch, capsys, script):
    monkeypatch.setattr(sys, 'argv', [f'{script}.py', '--help'])
    with pytest.raises(SystemExit) as e: runpy.run_path(str(ROOT/f'benchmarks/{script}.py'), run_name='__main__')
    assert not e.value.code and '--out' in capsys.readouterr().out

def test_rows_of_one_network_are_replaced_and_others_stay(scripts, call, tmp_path, monkeypatch):
    monkeypatch.delitem(scripts('networks').PEERS, 'CGNet')
    f = tmp_path/'s.csv'
    old = read(ROOT/'semisup_seg/speeds.csv')
    f.write_text((ROOT/'semisup_seg/speeds.csv').read_text())
    call('networks', '--networks', 'cgnet', '--size', 32, '--budget', 0, '--out', f)
    new = read(f)
    assert [r for r in new if r['network']!='CGNet']==[r for r in old if r['network']!='CGNet']
    mine = [r for r in new if r['network']=='CGNet']
    assert {(r['pass'], r['channels_last']) for r in mine}=={(p, c) for p in ('forward', 'training') for c in ('yes', 'no')}
    assert all(r['rounds']=='5' and float(r['seconds'])>0 and not r['ratio'] for r in mine) and mine!=[r for r in old if r['network']=='CGNet']

def test_unknown_network(call):
    with pytest.raises(ValueError, match="Unknown network 'nonet'"): call('networks', '--networks', 'nonet')

def test_committed_speeds_are_complete():
    rows = read(ROOT/'semisup_seg/speeds.csv')
    assert {r['network'] for r in rows}=={n.name for n in networks.values() if not n.more} and len(rows)==40
    assert len({r['machine'] for r in rows})==1
    compared = {r['network'] for r in rows if r['other']}
    assert compared=={'CGNet', 'FPENet', 'LEDNet', 'U-Net', 'DeepLabV3+', 'MANet', 'PAN'}
    for r in rows: assert not r['other'] or float(r['ratio'])<=1.05, r

@pytest.mark.parametrize('name', ['CGNet', 'U-Net'])
def test_page_shows_the_committed_speeds(name):
    page = (ROOT/'nbs/benchmarks/networks.ipynb').read_text(encoding='utf-8')
    for r in read(ROOT/'semisup_seg/speeds.csv'):
        if r['network']==name: assert f"| {float(r['seconds']):.3f} |" in page and f"| {float(r['ratio']):.2f}× |" in page

# --- annotation

FOUND = json.loads((ROOT/'nbs/results/annotate.json').read_text(encoding='utf-8'))

def test_committed_figures_hold_what_is_claimed():
    ratios,mb = {r['network']: r['ratio'] for r in FOUND['speed']}, {r['case']: r['mb'] for r in FOUND['memory']}
    assert ratios['CGNet']<=1.25 and ratios['FPENet']<=2 and {r['images'] for r in FOUND['speed']}=={200}
    assert mb['500 images, 3 views']-mb['50 images, 3 views']<50 and FOUND['ttach']['difference']<1e-5
    assert len(FOUND['doubt'])==3 and all(r['images']>=100 and r['error']<r['error_of_mean'] for r in FOUND['doubt'])

def test_page_shows_the_figures_of_the_annotation():
    page = json.loads((ROOT/'nbs/benchmarks/annotate.ipynb').read_text(encoding='utf-8'))
    shown = ''.join(''.join(o.get('text', [])) + ''.join(o.get('data', {}).get('text/markdown', [])) for c in page['cells'] for o in c.get('outputs', []))
    assert FOUND['machine'] in shown
    for r in FOUND['speed']: assert f"| {r['ratio']:.2f}× |" in shown
    for r in FOUND['memory']: assert f"| {r['case']} | {r['mb']:.0f} MB |" in shown
    for r in FOUND['doubt']: assert f"| {r['set']} | {r['images']} | {r['dice']:.3f} | {r['agreement']:+.2f} |" in shown

def prose(page):
    cells = json.loads((ROOT/f'nbs/benchmarks/{page}.ipynb').read_text(encoding='utf-8'))['cells']
    return '\n'.join(''.join(c['source']) for c in cells if c['cell_type']=='markdown')

def test_prose_tells_the_errors_of_the_prediction():
    errors = [r['error'] for r in FOUND['doubt']]
    less = [1-r['error']/r['error_of_mean'] for r in FOUND['doubt']]
    assert f'a mean error of {min(errors):.2f} to {max(errors):.2f}' in prose('annotate')
    assert 0.18<min(less)<0.25 and max(less)>1/3 and 'a fifth to more than a third less' in prose('annotate')

@pytest.fixture(scope='module')
def three_sets(tmp_path_factory):
    "Tiny sets in the layout of the benchmark's data, two images in each group; two of the sets are too small to train on"
    root,rng = tmp_path_factory.mktemp('sets'), np.random.default_rng(0)
    for s in ('kvasir_seg_256', 'busi_320', 'covid_ct_256'):
        for i in range(200 if s=='busi_320' else 8):
            d = disc(32, 32, rng)
            save(root/s/f'images/{i:03}.jpg', photo(d, rng))
            save(root/s/f'masks/{i:03}.png', np.uint8(d)*255)
        (root/s/'codes.txt').write_text('rest,0\ndisc,255\n')
        (root/s/'groups.csv').write_text('image,group\n' + ''.join(f'{i:03}.jpg,{i//2}\n' for i in range(200)))
    return root

@pytest.fixture
def splits(scripts): return scripts('splits')

@pytest.fixture(scope='module')
def table(three_sets):
    "The file of the splits of `three_sets`"
    return three_sets/'splits.csv'

@pytest.fixture
def tiny_args(three_sets, table, tmp_path):
    "Arguments of the smallest trainings"
    return ['--data', three_sets, '--work', tmp_path, '--splits', table, '--sets', 'busi_320', '--size', 32, '--bs', 40, '--seeds', 0]

def test_groups_stay_together(splits, three_sets, tmp_path):
    where = splits.splits(three_sets/'busi_320', tmp_path/'t.csv')
    names = {s: {int(k[:3]) for k,v in where.items() if v==s} for s in ('test', 'train', 'valid', 'more', 'unlabeled')}
    assert [len(names[s]) for s in ('test', 'train', 'valid', 'more', 'unlabeled')]==[40, 60, 20, 60, 20]
    groups = [{n//2 for n in names[s]} for s in ('test', 'train', 'valid')] + [{n//2 for s in ('more', 'unlabeled') for n in names[s]}]
    assert all(not a&b for i,a in enumerate(groups) for b in groups[i+1:])
    assert splits.splits(three_sets/'busi_320', tmp_path/'t.csv')==where and len(read(tmp_path/'t.csv'))==200

@pytest.mark.parametrize('labels,train,rest', [(60, 60, 80), (120, 120, 20), (None, 140, 0)])
def test_layout_of_a_split(splits, three_sets, tmp_path, labels, train, rest):
    path = splits.lay_out(three_sets/'busi_320', tmp_path/'set', labels, tmp_path/'t.csv')
    assert [len(list((path/d).glob('*'))) for d in ('Images/train', 'Labels/train', 'Images/test', 'Labels/valid', 'unlabeled_images')]==[train, train, 40, 20, rest]

def test_labels_are_spread_over_groups(splits, three_sets, tmp_path):
    strict,where = (f(three_sets/'busi_320', tmp_path/'t.csv') for f in (splits.splits, splits.spread))
    for k in ('test', 'valid'): assert {n for n,s in where.items() if s==k}=={n for n,s in strict.items() if s==k}
    assert set(where)==set(strict) and sorted(where.values()).count('train')==60 and set(where.values())=={'test', 'valid', 'train', 'unlabeled'}
    groups = lambda d: {int(n[:3])//2 for n,s in d.items() if s=='train'}
    assert len(groups(strict))==30 and len(groups(where))==60

def test_committed_splits_are_those_of_the_annotation(splits):
    rows = read(splits.TABLE)
    for r in FOUND['doubt']: assert sum(o['set']==r['set'] and o['split']=='test' for o in rows)>=r['images']
    assert {r['set'] for r in rows}==set(splits.SETS)
    for s in splits.SETS: assert [sum((r['set'], r['split'])==(s, k) for r in rows) for k in ('train', 'more', 'valid')]==[60, 60, 20]

@pytest.fixture
def annotate(scripts, monkeypatch):
    "The benchmark of annotation, with networks at 32 pixels"
    annotate = scripts('annotate')
    network = annotate.network
    monkeypatch.setattr(annotate, 'network', lambda name, size: network(name, 32))
    return annotate

def test_annotation_is_measured_and_other_figures_stay(annotate, call, three_sets, tmp_path):
    f = tmp_path/'a.json'
    f.write_text('{"speed": "as it was"}')
    call('annotate', '--data', three_sets, '--parts', 'ttach', '--work', tmp_path, '--out', f)
    got = json.loads(f.read_text())
    assert got['speed']=='as it was' and got['ttach']['difference']<1e-5 and got['ttach']['ratio']>0 and 'threads' in got['machine']

def test_each_step_of_the_annotation_is_timed(annotate, three_sets):
    rows = annotate.steps(SimpleNamespace(data=three_sets))
    assert {(r['network'], r['step']) for r in rows}=={(r['network'], r['step']) for r in FOUND['steps']} and all(r['ms']>0 for r in rows)

@pytest.mark.parametrize('script', ['annotate', 'distill', 'suggest'])
def test_data_that_are_not_there(call, tmp_path, script):
    with pytest.raises(SystemExit, match='has no kvasir_seg_256, busi_320, covid_ct_256'): call(script, '--data', tmp_path, '--out', tmp_path/'o.csv')

# --- distillation

@pytest.fixture
def small_net(distill, monkeypatch):
    "All trainings take a small network with random weights"
    learner = distill.seg_learner
    monkeypatch.setattr(distill, 'seg_learner', lambda dls, name, backbone, pretrained: learner(dls, *SMALL_NET))

def test_distillation_is_measured_and_goes_on(small_net, call, tiny_args, tmp_path):
    def go(*arms): return call('distill', *tiny_args, '--out', tmp_path/'d.csv', '--network', 'CGNet', '--steps', 3, '--arms', *arms)
    go('supervised', 'naive')
    printed = go('supervised', 'naive', 'supervised, seen', 'data', 'mix', 'mix, again')
    rows = read(tmp_path/'d.csv')
    assert [r['arm'] for r in rows]==['supervised', 'naive', 'supervised, seen', 'data', 'mix', 'mix, again'] and printed.count('busi_320 60 CGNet')==4
    assert {r['steps'] for r in rows}=={'3'}
    for r in rows: assert len(r['each'].split())==40 and float(r['test'])==pytest.approx(np.nanmean([float(d) for d in r['each'].split()]), abs=1e-3)
    assert [bool(r['pseudo']) for r in rows]==[False, True, False, True, True, True]
    assert len({r['each'] for r in rows if r['arm'].startswith('supervised')})==2, 'the views made no difference to the teacher'

def test_each_arm_has_a_recipe(distill):
    for arm,how in distill.ARMS.items():
        recipe = distill.recipe_of(arm)
        assert how is None or how[1]=='naive' or recipe.mix, arm
        assert (recipe.rounds==2)==(arm=='mix, again'), arm
        if how: assert distill.has_views(arm)==(arm in ('data', 'model', 'both') or arm.startswith('both, ') and arm!='both, not seen' or arm.endswith(', seen')), arm
    assert [repr(c) for c in distill.recipe_of('both, swap').callbacks]==['HardLabels()', 'Swap()', 'EMA(decay=0.99)']

def test_views_are_tried_with_the_teachers_of_an_arm(distill, tmp_path, monkeypatch):
    bench = distill.Bench.__new__(distill.Bench)
    bench.key,bench.path,bench.out,bench.o = 'busi_320', tmp_path, tmp_path, SimpleNamespace(bs=4)
    asked = []
    monkeypatch.setattr(distill, 'split_files', lambda *a: [])
    monkeypatch.setattr(distill, 'validation_dice', lambda teachers, pairs, bs, views: asked.append(teachers) or [0.5, 0.6, len(views)/10])
    rows = bench.views('supervised, seen')
    assert [r['views'] for r in rows]==['', 'H Flip', 'V Flip', 'H+V Flip', 'H Flip, V Flip, H+V Flip', ', '.join(distill.GEOMETRIC_VIEWS)] and rows[-1]['teacher 2']=='0.5000'
    assert {r['arm'] for r in rows}=={'supervised, seen'} and {f.name for o in asked for f in o}=={f'supervised, seen-{s}.pth' for s in range(3)}

def test_rows_of_a_process_beside_are_kept(distill, call, tiny_args, tmp_path, monkeypatch):
    out = tmp_path/'d.csv'
    def row(arm): return dict.fromkeys(distill.COLUMNS, '1') | dict(set='busi_320', labels='60', network='U-Net', arm=arm, seed='0')
    def train(self, arm, seed):
        with out.open('w', newline='') as f:  # another process ends its training while this one is running
            w = csv.DictWriter(f, distill.COLUMNS)
            w.writeheader()
            w.writerow(row('ceiling'))
        return row(arm)
    monkeypatch.setattr(distill.Bench, 'train', train)
    call('distill', *tiny_args, '--out', out, '--arms', 'naive')
    assert [r['arm'] for r in read(out)]==['ceiling', 'naive']

def test_trainings_of_another_length_have_rows_of_their_own(distill, call, tiny_args, tmp_path, monkeypatch):
    def train(self, arm, seed):
        return dict.fromkeys(distill.COLUMNS, '1') | dict(set=self.key, labels=self.labels, network=self.network, arm=arm, seed=seed, steps=self.epochs*self.every)
    monkeypatch.setattr(distill.Bench, 'train', train)
    for steps in (5, 10, 10): call('distill', *tiny_args, '--out', tmp_path/'d.csv', '--arms', 'naive', '--steps', steps)
    assert len({r['steps'] for r in read(tmp_path/'d.csv')})==len(read(tmp_path/'d.csv'))==2

def test_swapped_boxes_take_their_targets_along(distill):
    x = torch.arange(8.)[:, None, None, None].expand(8, 3, 16, 16).clone()
    swap = distill.Swap()
    swap.learn = SimpleNamespace(labelled=4, x=x, y=x.clone())
    random.seed(1)
    swap.before_batch()
    (a,),(b,) = swap.learn.xb, swap.learn.yb
    assert (a==b).all() and (a!=x).any() and (x==swap.learn.y).all()
    for i in range(4): assert {*a[[i, i+4]].unique().tolist()}=={i, i+4} and (a[i]+a[i+4]==2*i+4).all()

def test_all_teachers_vote_whatever_seeds_are_asked_for(distill, tmp_path, monkeypatch):
    bench = distill.Bench.__new__(distill.Bench)
    bench.o,bench.name,bench.out,bench.path,bench.size = SimpleNamespace(seeds=[1]), 'busi_320', tmp_path, tmp_path, (32, 32)
    monkeypatch.setattr(distill, 'annotate', lambda teachers, *a, **kw: ([f.stem for f in teachers], a[2]))
    monkeypatch.setattr(distill, 'split_files', lambda *a: [])
    three = ['supervised-0', 'supervised-1', 'supervised-2']
    plain = [f'{arm}, not seen' for arm in ('data', 'model', 'both')]
    assert [bench.pseudo(arm, 1, distill.Recipe()) for arm in plain]==[(three[1:2], ['H Flip']), (three, []), (three, ['H Flip'])]
    seen = [f'supervised, seen-{s}' for s in range(3)]
    asked = [bench.pseudo(arm, 1, distill.Recipe()) for arm in ('data', 'model', 'both')]
    assert asked==[(seen[1:2], distill.GEOMETRIC_VIEWS), (seen, []), (seen, distill.GEOMETRIC_VIEWS)]

def test_labels_to_add_are_measured(small_net, call, tiny_args, tmp_path):
    def go(*args): return call('suggest', *tiny_args, '--steps', 3, '--out', tmp_path/'s.csv', *args)
    with pytest.raises(SystemExit, match='train the teachers first'): go()
    call('distill', *tiny_args, '--steps', 3, '--out', tmp_path/'d.csv', '--arms', 'supervised')
    go('--more', 10, '--how', 'random', 'suggested')
    printed = go('--more', 10)
    rows = read(tmp_path/'s.csv')
    assert [r['how'] for r in rows]==['random', 'suggested', 'least trusted'] and printed.count("'how'")==1
    for r in rows: assert r['more']=='10' and 1<=int(r['groups'])<=10 and r['steps']==read(tmp_path/'d.csv')[0]['steps'] and len(r['each'].split())==40
    assert not list(tmp_path.glob('*/*/random-0-10')), 'the copied data set is left behind'

SUGGESTED = read(ROOT/'nbs/results/suggest.csv')

def test_committed_suggestions_are_whole(splits):
    for n in splits.SETS:
        for how in ('suggested', 'random'): assert sorted(r['seed'] for r in SUGGESTED if (r['set'], r['how'])==(n, how))==['0', '1', '2']
        mine = [r for r in SUGGESTED if r['set']==n]
        assert len({(r['size'], r['bs'], r['steps'], r['more'], len(r['each'].split())) for r in mine})==1
        for r in mine: assert float(r['test'])==pytest.approx(np.nanmean([float(d) for d in r['each'].split()]), abs=1e-3)

def test_page_shows_the_suggestions(splits):
    page = json.loads((ROOT/'nbs/benchmarks/suggest.ipynb').read_text(encoding='utf-8'))
    shown = ''.join(''.join(v) for c in page['cells'] for o in c.get('outputs', []) for k,v in o.get('data', {}).items() if k=='text/markdown')
    for n in splits.SETS:
        for how in {r['how'] for r in SUGGESTED if r['set']==n}: assert ', '.join(f'{float(r["test"]):.3f}' for r in sorted(SUGGESTED, key=lambda r: r['seed']) if (r['set'], r['how'])==(n, how)) in shown

DISTILLED = read(ROOT/'nbs/results/distill.csv')

LONG = 500  # steps: fewer are of the earlier, shorter trainings

def rows_of(name, labels, net, arm, long): return [r for r in DISTILLED if (r['set'], r['labels'], r['network'], r['arm'], int(r['steps'])>LONG)==(name, labels, net, arm, long)]

def wanted_rows(sets):
    "`{(set, labels, network, long): arms}` that the page shows"
    short = {'supervised', 'naive', 'data, not seen', 'model, not seen', 'both, not seen', 'ceiling'}
    seen = short | {'supervised, seen', 'data', 'model', 'both'}
    main = {'supervised', 'supervised, seen', 'naive', 'data', 'model', 'both', 'ceiling', 'ceiling, seen'}
    return {**{(n, '60', 'U-Net', True): main for n in sets}, **{(n, '60', 'U-Net', False): seen-{'model'} for n in sets}, **{(n, '60', 'CGNet', False): seen for n in sets},
        ('kvasir_seg_256', '120', 'U-Net', False): seen, ('covid_ct_256, spread', '60', 'U-Net', False): short-{'ceiling'}}

def test_every_setting_has_three_seeds(splits):
    for (n,labels,net,long),arms in wanted_rows(splits.SETS).items():
        for arm in arms: assert sorted(r['seed'] for r in rows_of(n, labels, net, arm, long))==['0', '1', '2'], (n, labels, net, arm, long)
        assert len({(r['size'], r['bs'], r['steps']) for arm in arms for r in rows_of(n, labels, net, arm, long)})==1

def test_prose_compares_shares_of_pseudo_labels_by_development_images():
    def development(arm, name):
        row = next(r for r in rows_of(name, '60', 'U-Net', arm, False) if r['seed']=='0')
        return f"{(20*float(row['valid'])+60*float(row['dev']))/80:.3f}"
    quarter,half = ([development(arm, n) for n in ('busi_320', 'covid_ct_256')] for arm in ('mix a quarter, EMA, seen', 'data'))
    assert f'{quarter[0]} and {quarter[1]} on the development images compared with {half[0]} and {half[1]}' in prose('distill')

def test_page_shows_every_setting(splits):
    page = json.loads((ROOT/'nbs/benchmarks/distill.ipynb').read_text(encoding='utf-8'))
    shown = ''.join(''.join(v) for c in page['cells'] for o in c.get('outputs', []) for k,v in o.get('data', {}).items() if k=='text/markdown')
    for (n,labels,net,long),arms in wanted_rows(splits.SETS).items():
        for arm in arms:
            tests = sorted(np.nanmean([float(d) for d in r['each'].split()]) for r in rows_of(n, labels, net, arm, long))
            assert f'({", ".join(f"{t:.3f}" for t in tests)})' in shown, (n, labels, net, arm, long)
