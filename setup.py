"Hand the metadata of `settings.ini` to setuptools; `pyproject.toml` lists these fields as `dynamic`."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
cp = ConfigParser(delimiters=['='])
cp.read(root/'settings.ini', encoding='utf-8')
cfg = cp['DEFAULT']
STATUSES = 'Planning', 'Pre-Alpha', 'Alpha', 'Beta', 'Production/Stable', 'Mature', 'Inactive'

def reqs(key): return [r.strip() for r in cfg[key].splitlines() if r.strip()]

extras = {k: reqs(f'{k}_requirements') for k in ('offline', 'docs', 'bench', 'dev')}
extras['dev'] += [r for k in ('offline', 'docs') for r in extras[k] if r not in extras['dev']]
status = int(cfg['status'])

setup(
    version=cfg['version'],
    description=cfg['description'],
    long_description=(root/'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    author=cfg['author'],
    author_email=cfg['author_email'],
    license_expression=cfg['license'],
    keywords=cfg['keywords'].split(),
    classifiers=[
        f'Development Status :: {status} - {STATUSES[status - 1]}',
        'Intended Audience :: Science/Research',
        'Topic :: Scientific/Engineering :: Image Recognition'
    ] + [f'Programming Language :: Python :: {v}' for v in cfg['python_versions'].split()],
    packages=find_packages(include=[cfg['lib_path'], cfg['lib_path'] + '.*']),
    package_data={cfg['lib_path']: ['*.csv']},
    install_requires=reqs('requirements'),
    extras_require=extras,
    entry_points=dict(
        console_scripts=[cfg['console_scripts']],
        nbdev=[f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]))
