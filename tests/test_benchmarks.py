"The benchmark runs, and what it wrote covers all that is claimed"
import csv, subprocess, sys

import pytest
from conftest import ROOT

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
