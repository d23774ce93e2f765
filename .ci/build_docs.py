"Build the website with Quarto, or without it where it is not installed; write README.md from the index notebook."
import inspect, os, re, shutil, sys, warnings
from base64 import b64decode
from dataclasses import is_dataclass
from importlib import import_module
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

from nbdev.config import get_config, nbpath2html
from nbdev.doclinks import NbdevLookup
from nbdev.process import Processor
from nbdev.processors import FilterDefaults, exec_show_docs
from nbdev.quarto import nbdev_docs, refresh_quarto_yml
from nbdev.readme_filter import doc_link
from nbdev.serve import proc_nbs
from nbdev.showdoc import BasicMarkdownRenderer
from fastcore.docments import docments
from fastcore.nbio import read_nb
from fastcore.xtras import dict2obj

root = Path(__file__).resolve().parent.parent
NUMBERED = re.compile(r'((?:\]\(|- |href: )(?:[\w.-]+/)*)\d+[a-zA-Z0-9]*_([\w.-]+\.ipynb)')
LINK = re.compile(r'(!?)\[((?:[^\[\]]|!\[[^\]]*\]\([^)]*\))*)\]\(([^)\s]+)((?:\s+"[^"]*")?)\)(\{[^}\n]*\})?')
SYMBOL_LINK = re.compile(r'\[(`[^`\n]+`)\]\([^)\n]*\)')
LINK_TEXT = re.compile(rf'\[((?:[^\[\]\n]|{SYMBOL_LINK.pattern})+)\]\(')
HEADING = re.compile(r'^#+ +(.+)', re.M)
QUALIFIED = re.compile(r'\b(?:\w+\.)+(?=[A-Z])|<built-in function (?=callable>)|(?<=callable)>')
FENCE = re.compile(r'(^```.*?^```[^\n]*\n?)', re.M|re.S)

PACKAGE = 'semisup_seg'

class ApiSection(BasicMarkdownRenderer):
    "The section of a public object: its signature with the comments of the parameters, its docstring, a link to its source"
    def __init__(self, sym, name):
        self.is_property = isinstance(sym, property)
        use_dataclass_comments(sym)
        super().__init__(sym, name=name)
        described = [self.sym]
        if inspect.isclass(sym) and not is_dataclass(sym): described = own_constructors(sym)
        params = docments(described[0], full=True, args_kwargs=True) if described else {}
        hidden = ('self', 'cls', 'return') if inspect.isclass(sym) else ('self', )
        self.dm.dm = {k: v for k,v in params.items() if k not in hidden}

    def source(self):
        "The address of the code, down to the line"
        _,_,file = NbdevLookup()[f'{self.sym.__module__}.{self.nm}']
        return f'{file}#L{inspect.getsourcelines(inspect.unwrap(self.sym))[1]}'

    def signature(self):
        "The signature; types are named without their modules"
        lines = [l.partition(' # ') for l in str(self.dm).splitlines()]
        text = '\n'.join(QUALIFIED.sub('', code) + mark + comment for code,mark,comment in lines)
        return f'@property\n{text}' if self.is_property else text

    def _repr_markdown_(self):
        link = f'[source]({self.source()}){{target="_blank" style="float:right; font-size:smaller"}}'
        parts = ['---', link, f'### {self.nm}', f'```python\n{self.signature()}\n```']
        if self.docs: parts.append(f'*{self.docs.strip()}*')
        return '\n\n'.join(parts)

def own_constructors(cls):
    "The constructor of `cls`, unless it is inherited from another library, as fastai's callbacks inherit it"
    return [f for f in (cls.__init__, cls.__new__) if str(getattr(f, '__module__', '')).startswith(PACKAGE)]

def use_dataclass_comments(f):
    "Where `f` delegates to a dataclass, whose `__init__` has no source, let it delegate to the class itself, which has"
    to = getattr(f, '__delwrap__', None)
    if not inspect.isfunction(to) or not to.__qualname__.endswith('.__init__'): return
    cls = getattr(sys.modules[to.__module__], to.__qualname__.split('.')[0])
    if is_dataclass(cls): f.__delwrap__ = cls

class ShowDocs(Processor):
    "Fill the `show_doc` cells from the exported module, so that no cell is run; a warning is an error"
    def begin(self):
        names = [c.directives_['default_exp'] for c in self.nb.cells if 'default_exp' in c.get('directives_', ())]
        self.names = vars(import_module(f'{PACKAGE}.{names[0]}')) if names else {}
        groups = [list(g) for _,g in groupby(self.nb.cells, lambda c: bool(c.get('has_sd')))]
        self.nb.cells = [c for g in groups for c in (g[::-1] if g[0].get('has_sd') else g)]  # nbdev has them last to first

    def cell(self, cell):
        call = re.search(r'^show_doc\(([\w.]+)\)', cell.source, re.M)
        if cell.cell_type!='code' or not call: return
        sym = eval(call[1], self.names)
        if call[1].split('.')[-1].startswith('_'):
            del cell['source']
            return
        home = getattr(sym.fget if isinstance(sym, property) else sym, '__module__', '')
        if not home.startswith(PACKAGE):  # such as a function that fastai dispatches: links to it end here
            cell.cell_type = 'markdown'
            cell.source = f'<span id="{call[1]}"></span>'
            return
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            text = ApiSection(sym, call[1])._repr_markdown_()
        cell.outputs = [dict2obj(dict(output_type='display_data', metadata={}, data={'text/markdown': text}))]

class AltTexts(Processor):
    "Name each picture that a cell drew, unless its `fig-alt` does, by the heading that it stands under"
    def begin(self): self.heading = self.nb.frontmatter_.get('title', '')

    def cell(self, cell):
        if cell.cell_type=='markdown': self.heading = ([self.heading] + HEADING.findall(FENCE.sub('', cell.source)))[-1]
        elif cell.cell_type=='code' and 'image/png' in str(cell.get('outputs')) and 'fig-alt' not in cell.source:
            name = re.sub(r"""[`*"'\\]""", '', self.heading)
            cell.source = f'#| fig-alt: "{name}: drawn by the code above"\n{cell.source}'

def use_processors():
    "Let nbdev fill the sections of the API by `ShowDocs`, and name pictures by `AltTexts`"
    base = FilterDefaults.base_procs
    FilterDefaults.base_procs = lambda self: [ShowDocs if p is exec_show_docs else p for p in base(self)]
    FilterDefaults.xtra_procs = lambda self: [AltTexts]

def local_links(text, depth):
    "Make the links to the published site in `text` relative, for a page `depth` folders down, and unpack links in links"
    text = LINK_TEXT.sub(lambda m: '[' + SYMBOL_LINK.sub(r'\1', m[1]) + '](', text)
    return re.sub(re.escape(get_config().doc_url) + r'(?=[\w./-]+\.(?:html|svg|jpg))', '../'*depth, text)

def unnumber(pages):
    "Name each page of `pages` as its address on the site is named, and the links to it likewise"
    for p in sorted(pages.rglob('*.ipynb')):
        text = local_links(p.read_text(encoding='utf-8'), len(p.relative_to(pages).parts) - 1)
        p.unlink()
        p.with_name(nbpath2html(p).stem + '.ipynb').write_text(NUMBERED.sub(r'\1\2', text), encoding='utf-8')
    conf = pages/'_quarto.yml'
    conf.write_text(NUMBERED.sub(r'\1\2', conf.read_text(encoding='utf-8')), encoding='utf-8')

def site():
    "Build the website into `_docs`"
    use_processors()
    if shutil.which('quarto'): return nbdev_docs.__wrapped__(n_workers=0)
    if not find_spec('smalldocs'):
        sys.exit('The website needs Quarto (https://quarto.org/docs/get-started/), or Python 3.11 or later, '
            'where the docs extra installs a replacement for it.')
    from smalldocs.site import build
    refresh_quarto_yml()
    pages = proc_nbs(force=True, n_workers=0)
    shutil.copy(root/'nbs/nbdev.yml', pages)
    unnumber(pages)
    built = build(pages, quiet=True)
    print(f'{len(built.pages)} pages in _docs', *[w for w in built.warnings if 'broken link' in w], sep='\n')
    shutil.rmtree(root/'_docs', ignore_errors=True)
    shutil.move(pages/'_docs', root/'_docs')

def _option(cell, name): return re.search(rf'^#\|\s*{name}:\s*false', cell.source, re.M) is None

def _block(text): return f'```\n{text.rstrip()}\n```'

def _output(out, images):
    "One output as Markdown; an image is added to `images` under the name it is linked by"
    if out.output_type=='stream': return _block(''.join(out.text))
    data = {k: v if isinstance(v, str) else ''.join(v) for k,v in out.get('data', {}).items()}
    if 'text/markdown' in data: return data['text/markdown']
    if 'image/png' in data:
        name = f'index_files/figure-{len(images) + 1}.png'
        images[name] = b64decode(data['image/png'])
        return f'![]({name})'
    if 'text/html' in data: return re.sub(r'<style.*?</style>\s*', '', data['text/html'], flags=re.S)
    return _block(data['text/plain']) if 'text/plain' in data else ''

def _cell(cell, images):
    if cell.cell_type=='markdown': return cell.source
    if cell.cell_type!='code' or not _option(cell, 'include'): return ''
    code = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M).strip()
    parts = [f'```python\n{code}\n```'] if code and _option(cell, 'echo') else []
    if _option(cell, 'output'): parts += [_output(o, images) for o in cell.get('outputs', [])]
    return '\n\n'.join(p for p in parts if p)

def _relink(m):
    bang, text, target, title, attrs = m.groups()
    if not bang: target, text = doc_link(target, get_config().doc_url), LINK.sub(_relink, text)
    elif not re.match(r'\w+:|index_files/', target): target = f'nbs/{target}'
    return f'{bang}[{text}]({target}{title})'

def relink(text):
    "Point the links and images of the index page in `text` to where they are seen from the repository's root"
    parts = FENCE.split(text)
    parts[::2] = [LINK.sub(_relink, re.sub(r'^:::.*\n?', '', p, flags=re.M)) for p in parts[::2]]
    return ''.join(parts)

def readme_files():
    "What README.md and the images that it shows should hold, by path"
    nb, images = read_nb(root/'nbs/index.ipynb'), {}
    FilterDefaults()(nb)
    fm = nb.frontmatter_
    head = [f"# {fm['title']}"] + ([f"> {fm['description']}"] if 'description' in fm else [])
    body = [_cell(c, images) for c in nb.cells if c.cell_type!='raw']
    text = relink('\n\n'.join(s.strip() for s in head + body if s.strip()))
    text = text.replace('THIS FILE WAS AUTOGENERATED! DO NOT EDIT!', 'made from nbs/index.ipynb by `make readme`')
    return {'README.md': (text + '\n').encode(), **images}

def readme():
    "Write README.md and `index_files`"
    shutil.rmtree(root/'index_files', ignore_errors=True)
    for name,data in readme_files().items():
        (root/name).parent.mkdir(exist_ok=True)
        (root/name).write_bytes(data)

if __name__=='__main__':
    os.chdir(root)
    commands = dict(site=site, readme=readme)
    if sys.argv[1:] not in [[c] for c in commands]: sys.exit(f"usage: build_docs.py {'|'.join(commands)}")
    commands[sys.argv[1]]()
