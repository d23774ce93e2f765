"The package that users install: what it holds, and what it says of itself"
import builtins, importlib, inspect, shutil, subprocess, sys
from configparser import ConfigParser
from email.parser import BytesParser
from pathlib import Path
from zipfile import ZipFile

import pytest

import semisup_seg

root = Path(__file__).resolve().parent.parent
cp = ConfigParser(delimiters=['='])
cp.read(root/'settings.ini', encoding='utf-8')
cfg = cp['DEFAULT']

@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "A wheel built from the sdist of a copy of the project"
    src = tmp_path_factory.mktemp('src')/'project'
    skip = shutil.ignore_patterns('.*', '_docs', '_proc', 'nbs', 'build', 'dist', 'demo', '*.egg-info', '__pycache__')
    shutil.copytree(root, src, ignore=skip)
    cmd = [sys.executable, '-W', 'error::DeprecationWarning:setuptools', '-m', 'build', '--no-isolation', '.']
    res = subprocess.run(cmd, cwd=src, capture_output=True, text=True)
    assert res.returncode==0, res.stdout + res.stderr
    said = res.stdout + res.stderr
    assert 'Deprecat' not in said, said
    return ZipFile(next(src.glob('dist/*.whl')))

@pytest.fixture(scope='module')
def metadata(wheel): return BytesParser().parsebytes(wheel.read(next(n for n in wheel.namelist() if n.endswith('.dist-info/METADATA'))))

def test_wheel_holds_the_modules(wheel):
    want = {str(p.relative_to(root)) for s in ('py', 'csv') for p in (root/'semisup_seg').rglob(f'*.{s}')}
    assert 'semisup_seg/speeds.csv' in want
    assert {n for n in wheel.namelist() if '.dist-info/' not in n}==want

def test_metadata(metadata):
    assert metadata['Name']=='semisup-segmentation'
    assert metadata['Version']==cfg['version']
    assert metadata['Summary']==cfg['description']
    assert metadata['License-Expression']==cfg['license']=='Apache-2.0'
    assert metadata['Author'] or metadata['Author-email']
    assert metadata['Requires-Python']==f">={cfg['min_python']}"
    assert set(metadata.get_all('Provides-Extra'))=={'offline', 'dev', 'docs', 'bench'}
    assert metadata['Description-Content-Type']=='text/markdown'
    assert metadata.get_payload(decode=True).decode().strip()==(root/'README.md').read_text(encoding='utf-8').strip()
    for v in cfg['python_versions'].split(): assert f'Programming Language :: Python :: {v}' in metadata.get_all('Classifier')

def test_requirements(metadata):
    said = metadata.get_all('Requires-Dist')
    for r in cfg['requirements'].split(): assert any(s.startswith(r.split('>')[0].split('=')[0]) for s in said), r
    for r in cfg['offline_requirements'].split(): assert sum(r in s for s in said)==2, f'{r}: wanted in offline and in dev'

def test_commands(wheel):
    entries = ConfigParser(delimiters=['='])
    entries.read_string(wheel.read(next(n for n in wheel.namelist() if n.endswith('entry_points.txt'))).decode())
    assert entries['console_scripts']['semisup-seg']=='semisup_seg.app.cli:main'
    assert entries['nbdev']['semisup_seg']=='semisup_seg._modidx:d'

def test_one_version(): assert semisup_seg.__version__==cfg['version']

def test_import_is_light():
    code = 'import sys, semisup_seg; print([m for m in ("torch", "fastai", "matplotlib") if m in sys.modules])'
    assert subprocess.check_output([sys.executable, '-c', code], text=True, cwd=root).strip()=='[]'

# --- one import

# Modules whose names nobody needs after the one import: networks are built by name, the command is for a terminal, the rest are parts.
APART = {  # chkstyle: ignore-node
    'data.archives', *(f'models.{n}' for n in ('weights', 'cgnet', 'denseaspp', 'fpenet', 'hrnet', 'lednet', 'ocnet', 'smp')),
    'training.checkpoint', 'training.sliding_window', 'annotation.journal', 'distillation.experiment',
    'app.annotation_list', 'app.widgets', 'app.cli'}

def modules():
    "The exported modules, by their names within the package"
    files = [p for p in (root/'semisup_seg').rglob('*.py') if p.name[0]!='_' and p.name!='all.py']
    names = ['.'.join(p.relative_to(root/'semisup_seg').with_suffix('').parts) for p in files]
    return {n: importlib.import_module(f'semisup_seg.{n}') for n in sorted(names)}

def chapters(): return [m for n,m in modules().items() if n not in APART]

def test_every_public_object_has_a_docstring():
    bare = []
    for name,m in modules().items():
        public = {n: getattr(m, n) for n in m.__all__}
        functions = {n: o for n,o in public.items() if inspect.isclass(o) or inspect.isfunction(o)}
        bare += [f'{name}.{n}' for n,o in functions.items() if not o.__doc__ or o.__doc__.startswith(f'{n}(')]
    assert not bare, f'no docstring: {bare}'

def test_one_import_is_a_tidy_list():
    from semisup_seg import all as one
    here = {}
    exec('from semisup_seg.all import *', here)
    assert one.__all__==sorted({*here} - {'__builtins__'})==[n for n in dir(one) if n[0]!='_']
    assert not {*one.__all__} & {*dir(builtins)}
    strangers = [n for n in one.__all__ if not any(n in m.__all__ and getattr(m, n) is getattr(one, n) for m in chapters())]
    assert not strangers, f'public in no chapter: {strangers}'

def test_one_import_forgets_no_chapter():
    from semisup_seg.all import __all__ as here
    forgotten = [m.__name__ for m in chapters() if not {*m.__all__} & {*here}]
    assert not forgotten, f'not in semisup_seg/all.py: {forgotten}'

def test_one_import_has_the_pieces_of_the_named_recipes():
    from semisup_seg import all as one
    for name,recipe in one.recipes.items():
        pieces = [recipe.select, recipe.mix, *recipe.callbacks]
        assert not {type(p).__name__ for p in pieces if p} - {*one.__all__}, name
