"The tutorials as a newcomer meets them: short, opened in Colab by one click, installed only there, saved with their pictures, found in the sidebar"
import json, re, sys, types
from inspect import signature
from pathlib import Path

import pytest, yaml
from IPython.core.inputtransformer2 import TransformerManager

from semisup_seg.data.sources import kvasir_seg
from test_sync import MACHINE_PATH

root = Path(__file__).resolve().parent.parent
tutorials = sorted((root/'nbs/tutorials').glob('*.ipynb'))
COLAB = 'https://colab.research.google.com/github/semisup-seg/semisup_seg/blob/main/'
INSTALL = re.compile(r'\bpip3?\b.*\binstall\b', re.S)
KVASIR = re.compile(r"^# path = (kvasir_seg\('\w+', n_labelled=\d+\))", re.M)
each = pytest.mark.parametrize('path', tutorials, ids=lambda p: p.stem)

def cells(path, kind): return [c for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type']==kind]

def source(c): return ''.join(c['source'])

def test_there_are_tutorials(): assert 'quickstart' in [p.stem for p in tutorials]

@each
def test_is_short(path): assert len(cells(path, 'code'))<=15

@each
def test_begins_with_a_title_and_a_promise(path):
    first = json.loads(path.read_text(encoding='utf-8'))['cells'][0]
    assert first['cell_type']=='markdown' and re.fullmatch(r'# \S.*\n\n> \S.*', source(first))

@each
def test_badge_opens_this_very_notebook(path):
    found = re.findall(r'\[!\[Open in Colab\]\([^)]+colab-badge\.svg\)\]\(([^)]+)\)', '\n'.join(map(source, cells(path, 'markdown'))))
    assert found==[COLAB+path.relative_to(root).as_posix()]

# --- installing

class Shell:
    "Stands in for the notebook and the system: notes what is to be run, and runs nothing of it"
    def __init__(self): self.ran = []
    def note(self, *words, **kw): self.ran.append(' '.join(map(str, words)))
    system = getoutput = run_line_magic = run_cell_magic = note

def installs(code, monkeypatch, colab):
    "What the cell `code` would install"
    shell = Shell()
    for m in ('google', 'google.colab'): monkeypatch.setitem(sys.modules, m, types.ModuleType(m)) if colab else monkeypatch.delitem(sys.modules, m, raising=False)
    for f in ('os.system', 'os.popen', 'subprocess.run', 'subprocess.Popen', 'subprocess.check_call'): monkeypatch.setattr(f, shell.note)
    exec(TransformerManager().transform_cell(code), dict(get_ipython=lambda: shell))
    return [c for c in shell.ran if INSTALL.search(c)]

def install_cells(path): return [source(c) for c in cells(path, 'code') if any(map(INSTALL.search, source(c).splitlines()))]

@each
def test_installs_in_colab_and_nowhere_else(path, monkeypatch):
    code, = install_cells(path)
    inside = installs(code, monkeypatch, True)
    assert len(inside)==1 and "'semisup-segmentation[offline]'" in inside[0]
    assert not installs(code, monkeypatch, False)

@pytest.mark.parametrize('code', ['!pip install -q x', '%pip install -q x', 'import os\nos.system("pip install x")', 'import subprocess\nsubprocess.run("pip install x", shell=True)',
    '%%bash\npip install x', 'get_ipython().run_line_magic("pip", "install x")'])
def test_an_unguarded_install_is_noticed(code, monkeypatch): assert installs(code, monkeypatch, False)

# --- what it shows

@each
def test_one_line_leads_to_real_images(path):
    "The line stands beside the one it replaces, and is a call that `kvasir_seg` takes"
    beside, = [source(c) for c in cells(path, 'code') if 'brain_slices(' in source(c)]
    call, = KVASIR.findall(beside)
    assert re.search(r'^path = brain_slices\(', beside, re.M)
    eval(call, dict(kvasir_seg=signature(kvasir_seg).bind))

@each
def test_outputs_are_saved_with_pictures(path):
    outputs = [o for c in cells(path, 'code') for o in c['outputs']]
    assert any(k.startswith('image/') for o in outputs for k in o.get('data', {}))

def test_a_machine_path_is_noticed(): assert MACHINE_PATH.findall('saved in /tmp/abc/model.pth') and not MACHINE_PATH.findall('brain/Images/tmp/a.png')

@each
def test_is_in_the_sidebar(path):
    sections = yaml.safe_load((root/'_quarto.yml').read_text())['website']['sidebar']['contents']
    listed, = [s['contents'] for s in sections if s.get('section')=='Tutorials']
    assert listed.count(path.relative_to(root/'nbs').as_posix())==1

def test_the_second_round_shows_its_gain():
    shown = [''.join(o['data'].get('text/markdown', '')) for c in cells(root/'nbs/tutorials/annotations.ipynb', 'code') for o in c['outputs'] if 'data' in o]
    assert re.search(r'gain over first.*\n.*\n.*\n\| second \| 0\.\d+ \[.*\| [-+]0\.\d+ \[', '\n'.join(shown))
