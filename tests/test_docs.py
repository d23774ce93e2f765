"The website as a reader meets it: built, opened in a browser, followed from page to page."
import shutil, subprocess, sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from playwright.sync_api import sync_playwright

root = Path(__file__).resolve().parent.parent
DOCS_URL = 'https://semisup-seg.github.io/semisup_seg/'
BROWSERS = 'chromium', 'google-chrome', 'google-chrome-stable', 'chromium-browser', 'chrome'
FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-background-networking', '--disable-component-update', '--disable-sync',
    '--no-first-run']

@pytest.fixture(scope='module')
def site():
    subprocess.run([sys.executable, root/'.ci/build_docs.py', 'site'], check=True)
    return root/'_docs'

@pytest.fixture(scope='module')
def browser():
    exe = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not exe: pytest.fail('These tests need Chromium or Chrome on PATH: `apt-get install chromium` on Debian.', pytrace=False)
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=exe, args=FLAGS)
        yield browser
        browser.close()

@pytest.fixture
def page(browser):
    page = browser.new_page()
    page.set_default_timeout(20_000)
    yield page
    page.close()

def visit(page, path):
    page.goto(path.as_uri(), wait_until='load')
    return page.locator('main')

def test_index(site, page):
    main = visit(page, site/'index.html')
    assert main.locator('h1').first.inner_text().strip()
    assert len(main.inner_text()) > 300
    check_images(main)
    assert page.locator('#quarto-sidebar').get_by_text('Quickstart').count()

def check_images(main, n=1):
    "At least `n` images of the site stand in `main`, and each is really drawn"
    sizes = main.locator('img:not([src^=http])').evaluate_all('ims => Promise.all(ims.map(i => i.decode().then(() => i.naturalWidth, () => 0)))')
    assert len(sizes) >= n and all(sizes), f'widths of the images: {sizes}'

def test_api_page(site, page):
    main = visit(page, site/'core.html')
    assert main.locator('#check_dataset').count()
    signature = main.locator('pre', has_text='def check_dataset').first.inner_text()
    assert 'path' in signature and '# The data set folder' in signature
    check_images(main)
    assert page.locator('.nav-page-next a').count()

def test_quickstart(site, page):
    main = visit(page, site/'tutorials/quickstart.html')
    assert main.locator('pre').count()
    check_images(main)

def test_next_page_can_be_followed(site, page):
    visit(page, site/'index.html')
    title = page.title()
    link = page.locator('.nav-page-next a')
    name = link.inner_text().strip()
    link.click()
    page.wait_for_load_state()
    assert page.title()!=title and name in page.locator('h1').first.inner_text()

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
