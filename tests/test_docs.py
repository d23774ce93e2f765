"The website as a reader meets it: built, opened in a browser, followed from page to page"
import re, subprocess, sys
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from test_sync import MACHINE_PATH

root = Path(__file__).resolve().parent.parent
DOCS_URL = 'https://semisup-seg.github.io/semisup_seg/'
MAIN = 'index', 'tutorials/quickstart', 'data.folder', 'distillation.distill', 'benchmarks/distill'
WIDTHS = 390, 1440

@pytest.fixture(scope='module')
def site():
    subprocess.run([sys.executable, root/'.ci/build_docs.py', 'site'], check=True)
    return root/'_docs'

class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass

@pytest.fixture(scope='module')
def url(site):
    "The address of the site on a server of its own"
    with ThreadingHTTPServer(('127.0.0.1', 0), partial(Handler, directory=site)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}/'
        server.shutdown()

def new_page(browser, url, width):
    "A page `width` pixels wide on which every other site answers with an empty picture"
    page = browser.new_page(viewport=dict(width=width, height=900), base_url=url)
    page.set_default_timeout(60_000)
    svg = '<svg xmlns="http://www.w3.org/2000/svg" width="90" height="20"/>'
    page.route(lambda u: not u.startswith(url), lambda r: r.fulfill(content_type='image/svg+xml', body=svg))
    return page

@pytest.fixture
def page(browser, url):
    page = new_page(browser, url, 1440)
    yield page
    page.close()

@pytest.fixture(scope='module', params=MAIN)
def shown(request, browser, url):
    "A main page, and the errors that its console reported while it was opened"
    page,errors = new_page(browser, url, WIDTHS[0]), []
    page.on('console', lambda m: errors.append(m.text) if m.type=='error' else None)
    page.on('pageerror', lambda e: errors.append(str(e)))
    visit(page, request.param)
    yield page, errors
    page.close()

def visit(page, name):
    page.goto(f'{name}.html', wait_until='load')
    return page.locator('main')

def check_images(main, n=1):
    "At least `n` images of the site stand in `main`, and each is really drawn"
    sizes = main.locator('img:not([src^=http])').evaluate_all('ims => Promise.all(ims.map(i => i.decode().then(() => i.naturalWidth, () => 0)))')
    assert len(sizes) >= n and all(sizes), f'widths of the images: {sizes}'

def check_access(page, **options):
    "axe-core finds nothing on `page` that keeps readers out"
    grave = [v for v in Axe().run(page, options=dict(resultTypes=['violations'], **options)).response['violations'] if v['impact'] in ('serious', 'critical')]
    assert not grave, '\n'.join(f'{v["help"]}: {n["html"][:120]}' for v in grave for n in v['nodes'])

def test_index(page):
    main = visit(page, 'index')
    assert main.locator('h1').first.inner_text().strip()
    assert len(main.inner_text()) > 300
    check_images(main)
    assert page.locator('#quarto-sidebar').get_by_text('Quickstart').count()

def test_api_page(page):
    main = visit(page, 'annotation.views')
    assert main.locator('#view_size').count()
    signature = main.locator('pre', has_text='def view_size').first.inner_text()
    assert 'size' in signature and '# `(height, width)`' in signature
    check_images(main)
    assert page.locator('.nav-page-next a').count()

def test_quickstart(page):
    main = visit(page, 'tutorials/quickstart')
    assert main.locator('pre').count()
    check_images(main)

def test_next_page_can_be_followed(page):
    visit(page, 'index')
    title = page.title()
    link = page.locator('.nav-page-next a')
    name = link.inner_text().strip()
    link.click()
    page.wait_for_load_state()
    assert page.title()!=title and name in page.locator('h1').first.inner_text()

def test_changelog_is_reached_from_the_front_page(page):
    visit(page, 'index')
    page.get_by_role('link', name='Changelog').click()
    text = page.locator('main', has=page.get_by_role('heading', name='Changelog')).inner_text()
    versions = re.findall(r'^## (.+)', (root/'CHANGELOG.md').read_text(encoding='utf-8'), re.M)
    assert versions and all(v in text for v in versions)

def test_search_finds_a_function(page):
    visit(page, 'index')
    page.keyboard.press('/')
    page.keyboard.type('check_dataset')
    result = page.locator('.smalldocs-search-results a, .aa-Panel a').first
    result.wait_for()
    check_access(page, runOnly=['color-contrast'])
    result.click()
    page.locator('main', has_text='def check_dataset').wait_for()
    assert urlsplit(page.url).path!='/index.html'

CUT_OFF = """() => {
    const scrolls = e => e && (/auto|scroll/.test(getComputedStyle(e).overflowX) || scrolls(e.parentElement))
    const out = [...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1)
    return out.filter(e => !scrolls(e.parentElement)).map(e => e.outerHTML.slice(0, 120))
}"""
FONT_SIZES = 'es => es.map(e => parseFloat(getComputedStyle(e).fontSize))'

@pytest.mark.parametrize('width', WIDTHS)
def test_page_fits_the_window(shown, width):
    page,_ = shown
    page.set_viewport_size(dict(width=width, height=900))
    assert page.evaluate('document.documentElement.scrollWidth <= innerWidth')
    assert not page.evaluate(CUT_OFF)
    for what,least in dict(p=15, td=13, pre=13).items():
        sizes = page.locator(f'main {what}').evaluate_all(FONT_SIZES)
        assert min(sizes, default=least) >= least, f'{what}: {min(sizes)} px'

def test_page_is_accessible_and_its_console_silent(shown):
    page,errors = shown
    check_access(page)
    assert not errors

class Links(HTMLParser):
    "The `links` that a page makes and the `anchors` that it offers"
    def __init__(self, path):
        super().__init__()
        self.links, self.anchors = [], {''}
        self.feed(path.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors |= {attrs[k] for k in ('id', 'name') if attrs.get(k)}
        self.links += [attrs[k] for k in ('href', 'src') if attrs.get(k)]

def target(site, path, link):
    "The file and the anchor that `link` on the page `path` leads to; no file for another site"
    published = link.startswith(DOCS_URL)
    u = urlsplit(link.removeprefix(DOCS_URL))
    if u.scheme or u.netloc: return None, ''
    if not u.path and not published: return path, unquote(u.fragment)
    to = ((site if published else path.parent)/unquote(u.path)).resolve()
    return (to/'index.html' if to.is_dir() else to), unquote(u.fragment)

def test_no_broken_links(site):
    pages = {p: Links(p) for p in site.rglob('*.html') if 'site_libs' not in p.parts}
    broken = []
    for path,page in pages.items():
        for link in page.links:
            to, anchor = target(site, path, link)
            if to is None: continue
            ok = to.exists() and (not anchor or to not in pages or anchor in pages[to].anchors)
            if not ok: broken.append(f'{path.relative_to(site)}: {link}')
    assert not broken, '\n'.join(broken)

# --- the reference

class Text(HTMLParser):
    "The text of the element `main`"
    def __init__(self, path):
        super().__init__()
        self.inside, self.parts = False, []
        self.feed(path.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attrs): self.inside |= tag=='main'
    def handle_endtag(self, tag): self.inside &= tag!='main'
    def handle_data(self, data):
        if self.inside: self.parts.append(data)

@pytest.fixture(scope='module')
def texts(site): return {p.name: ''.join(Text(p).parts) for p in site.rglob('*.html') if 'site_libs' not in p.parts}

def test_no_page_shows_a_warning_or_a_machine_path(texts):
    for name,text in texts.items():
        shown = re.findall(r'\w+Warning: .*|site-packages.*', text) + MACHINE_PATH.findall(text)
        assert not shown, f'{name}: {shown}'

def test_links_are_drawn_as_links(texts):
    for name,text in texts.items():
        raw = re.findall(r'\]\([\w./-]+\.(?:ipynb|html)[^)]*\)', text)
        assert not raw, f'{name}: links that are no links: {raw}'

def test_callbacks_show_their_own_arguments_only(texts):
    assert 'def EpochLogger():' in texts['training.learner.html']
    inherited = {n for n,text in texts.items() if re.search(r'\bafter_cancel_fit\b.*=None', text)}
    assert not inherited, f'pages that list the events of fastai: {inherited}'

def test_fields_of_a_dataclass_are_explained(texts):
    for name in ('app.job.html', 'app.form.html'): assert "teachers:tuple=('U-Net',), # " in texts[name]

def test_properties_have_a_section(texts): assert '@property\ndef bases()->list:' in texts['app.job.html']

def test_private_parts_are_no_sections(site):
    private = [f'{p.name}: {a}' for p in site.rglob('*.html') for a in Links(p).anchors if re.search(r'(^|\.)_', a)]
    assert not private
