"The benchmark runs, and what it wrote covers all that is claimed"
import csv, json, subprocess, sys

import numpy as np, pytest
from conftest import ROOT, photo, disc, save

from semisup_seg.models.core import networks

def read(f): return list(csv.DictReader(f.open(encoding='utf-8')))

def bench(*args): return subprocess.run([sys.executable, ROOT/'benchmarks/networks.py', *map(str, args)], capture_output=True, text=True, timeout=120)

def test_rows_of_one_network_are_replaced_and_others_stay(tmp_path):
    f = tmp_path/'s.csv'
    old = read(ROOT/'semisup_seg/speeds.csv')
    f.write_text((ROOT/'semisup_seg/speeds.csv').read_text())
    res = bench('--networks', 'ocnet', '--size', 32, '--budget', 0, '--out', f)
    assert res.returncode==0, res.stderr
    new = read(f)
    assert [r for r in new if r['network']!='OCNet']==[r for r in old if r['network']!='OCNet']
    mine = [r for r in new if r['network']=='OCNet']
    assert {(r['pass'], r['channels_last']) for r in mine}=={(p, c) for p in ('forward', 'training') for c in ('yes', 'no')}
    assert all(r['rounds']=='5' and float(r['seconds'])>0 and not r['ratio'] for r in mine) and mine!=[r for r in old if r['network']=='OCNet']

def test_unknown_network():
    res = bench('--networks', 'nonet')
    assert res.returncode and "Unknown network 'nonet'" in res.stderr

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

@pytest.fixture(scope='module')
def three_sets(tmp_path_factory):
    "Tiny sets in the layout of the benchmark's data, two images a group"
    root,rng = tmp_path_factory.mktemp('sets'), np.random.default_rng(0)
    for s in ('kvasir_seg_256', 'busi_320', 'covid_ct_256'):
        for i in range(40):
            d = disc(32, 32, rng)
            save(root/s/f'images/{i:03}.jpg', photo(d, rng))
            save(root/s/f'masks/{i:03}.png', np.uint8(d)*255)
        (root/s/'codes.txt').write_text('rest,0\ndisc,255\n')
        (root/s/'groups.csv').write_text('image,group\n' + ''.join(f'{i:03}.jpg,{i//2}\n' for i in range(40)))
    return root

def test_groups_stay_together(monkeypatch, three_sets, tmp_path):
    monkeypatch.syspath_prepend(ROOT/'benchmarks')
    import annotate as B
    path = B.lay_out(three_sets/'busi_320', tmp_path/'set', 10, 5)
    stems = {s: {f.stem for f in (path/d).iterdir()} for s,d in (('test', 'Images/test'), ('train', 'Images/train'), ('valid', 'Images/valid'), ('rest', 'unlabeled_images'))}
    assert [len(stems[s]) for s in ('test', 'train', 'valid')]==[8, 10, 5] and len(stems['rest'])==16
    groups = [{int(n)//2 for n in v} for v in stems.values()]
    assert all(not a&b for i,a in enumerate(groups) for b in groups[i+1:])

def test_annotation_is_measured_and_other_figures_stay(three_sets, tmp_path):
    f = tmp_path/'a.json'
    f.write_text('{"speed": "as it was"}')
    res = subprocess.run([sys.executable, ROOT/'benchmarks/annotate.py', '--data', three_sets, '--parts', 'ttach', '--work', tmp_path, '--out', f], capture_output=True, text=True, timeout=200)
    assert res.returncode==0, res.stderr
    got = json.loads(f.read_text())
    assert got['speed']=='as it was' and got['ttach']['difference']<1e-5 and got['ttach']['ratio']>0 and 'threads' in got['machine']

def test_data_that_are_not_there(tmp_path):
    res = subprocess.run([sys.executable, ROOT/'benchmarks/annotate.py', '--data', tmp_path], capture_output=True, text=True, timeout=100)
    assert res.returncode and 'has no kvasir_seg_256, busi_320, covid_ct_256' in res.stderr and 'Traceback' not in res.stderr
