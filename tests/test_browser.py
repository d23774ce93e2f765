"The browser of annotations: what is listed, what the buttons do, bad input, thousands of annotations, and a real web browser"
import json, os, shutil, socket, subprocess, sys, time, urllib.request
from dataclasses import replace

import numpy as np, pytest
from axe_playwright_python.sync_playwright import Axe
from conftest import make_discs, save, tree

import semisup_seg.app.widgets as W
from semisup_seg.annotation.records import AnnotationRecord, Annotations, merge_annotations, read_annotations
from semisup_seg.annotation.review import Review
from semisup_seg.app.annotation_list import AnnotationList
from semisup_seg.app.browser import browse
from semisup_seg.data.folder import unlabeled_files
from semisup_seg.data.images import load_image

@pytest.fixture
def run(tmp_path):
    "A data set, and annotations of its unlabelled images; the agreement grows with the number of the image"
    path,out = make_discs(tmp_path/'data'), tmp_path/'out'
    records = []
    for i,f in enumerate(unlabeled_files(path)):
        bright = np.uint8(load_image(f).mean(2)>110)*255
        for folder in ('annotations', 'confidence'): save(out/folder/f'{f.stem}.png', bright)
        records.append(AnnotationRecord(str(f), f'annotations/{f.stem}.png', 0.9, 0.1, 0.5+i/10, used=True))
    merge_annotations(out, records)
    return path, out

def judgements(out): return [r.judgement for r in read_annotations(out).rows]

def picture(b, k): return b.thumbnails.slots[k].children[0].value

# --- the list

def test_orders_and_filters(run):
    path,out = run
    l = AnnotationList(Review(out, path), per_page=2)
    assert l.ids==[0, 1, 2, 3, 4] and l.pages==3
    l.order = 'most trusted first'
    l.refresh()
    assert l.ids==[4, 3, 2, 1, 0] and l.on_page==[4, 3]
    l.turn(1)
    assert (l.current, l.on_page)==(2, [2, 1])
    assert l.judge('accepted').startswith('u2.png accepted') and l.current==1
    l.turn(9)
    l.turn(-9)
    l.show,l.order = 'accepted', 'by name'
    l.refresh(1)
    assert l.ids==[2] and l.current==2

def test_an_image_without_a_mask_is_not_listed(run):
    path,out = run
    ann = read_annotations(out)
    ann.rows[1] = replace(ann.rows[1], mask='', used=False, error='cannot be read')
    ann.save()
    l = AnnotationList(Review(out, path))
    assert l.ids==[0, 2, 3, 4]
    l.show = 'all'
    l.refresh()
    assert l.ids==[0, 2, 3, 4]

def test_the_last_of_a_list_is_announced(run):
    path,out = run
    l = AnnotationList(Review(out, path))
    said = [l.judge('rejected') for _ in range(5)]
    assert 'last of this list' in said[-1] and not any('last of' in s for s in said[:-1]) and l.current is None
    assert 'no image' in l.judge('accepted') and judgements(out)==['rejected']*5
    l.show = 'all'
    l.refresh()
    l.step(9)
    assert 'last of this list' in l.judge('accepted') and l.current==4

# --- the buttons

def test_buttons_write_move_and_undo(run):
    path,out = run
    before = tree(path), tree(out)
    b = browse(out, path)
    for w in (b.accept, b.reject, b.accept, b.move): w.click()
    assert judgements(out)==['in training', 'rejected', 'in training', '', ''] and '2 of 2 accepted are in training' in b.message.value
    assert (path/'Labels/train/u0.png').exists() and '2 in training' in b.summary.value
    for _ in range(4): b.undo.click()
    assert (tree(path), tree(out))==before and b.listing.current==0
    b.undo.click()
    assert 'nothing to undo' in b.message.value and (tree(path), tree(out))==before

def test_next_and_previous_image(run):
    b = browse(*reversed(run))
    b.next.click()
    assert b.listing.current==1 and 'u1.png' in b.pictures.shown.value
    b.previous.click()
    b.thumbnails.slots[3].children[1].click()
    assert b.listing.current==3 and 'u3.png' in b.pictures.shown.value

def test_a_label_in_the_way_is_told_and_stays(run):
    path,out = run
    label = save(path/'Labels/train/u0.png', np.zeros((9, 9), np.uint8)).read_bytes()
    b = browse(out, path)
    b.accept.click()
    b.move.click()
    assert '0 of 1 accepted' in b.message.value and 'is there already' in b.message.value and (path/'Labels/train/u0.png').read_bytes()==label

def test_suggested_images_are_a_list_of_their_own(run):
    path,out = run
    b = browse(out, path)
    b.accept.click()
    b.n.value = 3
    b.suggest.click()
    assert b.show.value=='worth labelling' and len(b.listing.ids)==3 and 0 not in b.listing.ids
    b.reject.click()
    assert len(b.listing.ids)==3 and judgements(out).count('rejected')==1
    b.show.value = 'rejected'
    assert len(b.listing.ids)==1

def test_opacity_of_the_mask(run):
    b = browse(*reversed(run))
    old = b.pictures.shown.value
    b.pictures.slider.value = 0
    assert b.pictures.alpha.value==0 and b.pictures.shown.value!=old

def test_a_corrected_mask_is_read_anew(run):
    path,out = run
    b = browse(out, path)
    old = b.pictures.shown.value, picture(b, 0)
    h,w = load_image(path/'unlabeled_images/u0.png').shape[:2]
    save(out/'annotations/u0.png', np.full((h, w), 255, np.uint8))
    b.draw()
    assert b.pictures.shown.value!=old[0] and picture(b, 0)!=old[1]

def test_pictures_carry_a_text(run):
    path,out = run
    b = browse(out, path)
    shown = b.pictures.shown
    assert shown.value.count('<img')==3 and 'alt=""' not in shown.value+picture(b, 0)
    shutil.rmtree(out/'confidence')
    b.draw()
    assert shown.value.count('<img')==2 and 'kept no map' in shown.value

# --- bad input

def test_what_cannot_be_read_is_one_message(run):
    path,out = run
    table = out/'annotations.csv'
    text = table.read_text()
    spoilt = {'': 'is not a table', text.splitlines()[0]+'\n': 'holds no annotations', text.replace('0.9', 'much'): 'is not a table'}
    def check(said):
        before = tree(path), tree(out)
        w = browse(out, path)
        assert len(w.children)==1 and said in w.children[0].value and 'role="alert"' in w.children[0].value, said
        assert (tree(path), tree(out))==before
    for content,said in spoilt.items():
        table.write_text(content)
        check(said)
    table.unlink()
    check('no such file')
    table.write_text(text)
    (path/'codes.txt').unlink()
    check('codes.txt: missing')

def test_images_that_are_gone(run):
    path,out = run
    for f in unlabeled_files(path)[:2]: f.unlink()
    b = browse(out, path)
    assert b.notice.value.count('role="alert"')==1 and '2 of 5 images or masks are no longer there' in b.notice.value
    assert 'no such file' in b.pictures.shown.value and 'no picture' in picture(b, 0)
    b.accept.click()
    assert 'is gone' in b.message.value and judgements(out)==['']*5
    b.reject.click()
    assert judgements(out)[0]=='rejected'

def test_a_table_of_another_data_set(run, tmp_path):
    b = browse(run[1], make_discs(tmp_path/'other'))
    assert 'Is this the data set of that run?' in b.notice.value
    b.accept.click()
    b.move.click()
    assert 'does not lie in' in b.message.value and '0 of 1' in b.message.value

def test_a_table_changed_meanwhile(run):
    path,out = run
    b = browse(out, path)
    Review(out, path).judge(3, 'rejected')
    b.accept.click()
    assert 'was changed by someone else' in b.message.value and judgements(out)==['', '', '', 'rejected', '']

def test_five_thousand_annotations_are_read_a_page_at_a_time(tmp_path, monkeypatch):
    path,out,n = make_discs(tmp_path/'data', unlabeled=1), tmp_path/'out', 5000
    image = path/'unlabeled_images/u0.png'
    mask = save(out/'annotations/u0.png', np.zeros((64, 48), np.uint8))
    for i in range(1, n):
        os.link(image, image.with_stem(f'u{i}'))
        os.link(mask, mask.with_stem(f'u{i}'))
    records = [AnnotationRecord(str(image.with_stem(f'u{i}')), f'annotations/u{i}.png', 0.5, 0.5, i/n, used=True) for i in range(n)]
    Annotations(out, records, []).save()
    read,load = [], W.load_image
    monkeypatch.setattr(W, 'load_image', lambda f: (read.append(f), load(f))[1])
    b = browse(out, path)
    assert len(read)==13 and b.thumbnails.page.value=='page 1 of 417' and len(b.thumbnails.slots)==12
    b.thumbnails.next.click()
    assert len(read)==26
    b.accept.click()
    assert len(read)<=28, 'a judgement reads the next image and one thumbnail'
    b.undo.click()
    assert judgements(out)==['']*n

# --- in a web browser

CELLS = '''from semisup_seg.app.browser import browse
browse({out!r}, {path!r})''', '''from semisup_seg.app.form import run_form
run_form({path!r})'''

@pytest.fixture
def app(run, tmp_path):
    "The address of Voilà, serving a notebook with the browser of `run` and a form"
    path,out = map(str, run)
    cells = [dict(cell_type='code', id=f'c{i}', metadata={}, execution_count=None, outputs=[], source=c.format(path=path, out=out)) for i,c in enumerate(CELLS)]
    kernel = dict(name='python3', display_name='Python 3', language='python')
    (tmp_path/'app.ipynb').write_text(json.dumps(dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)))
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    command = [sys.executable, '-m', 'voila', tmp_path/'app.ipynb', '--no-browser', f'--port={port}', '--Voila.ip=127.0.0.1']
    with (tmp_path/'voila.log').open('w') as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
        yield f'http://127.0.0.1:{port}/'
        server.terminate()
        server.wait(30)

@pytest.fixture
def page(app, browser):
    "The widgets on the screen; other sites cannot be reached"
    for _ in range(300):
        try: urllib.request.urlopen(app+'voila/static/', timeout=1)
        except urllib.error.HTTPError: break
        except OSError: time.sleep(0.2)
    page = browser.new_page(viewport=dict(width=1100, height=1000))
    page.set_default_timeout(90_000)
    page.route(lambda u: not u.startswith(app) and not u.startswith('data:'), lambda r: r.abort())
    page.goto(app)
    page.get_by_role('button', name='Accept', exact=True).wait_for()
    yield page
    page.close()

def wait_for(check, seconds=20):
    end = time.time()+seconds
    while not check() and time.time()<end: time.sleep(0.05)
    return check()

def test_judging_in_a_browser_by_pointer_and_keyboard(page, run):
    path,out = run
    assert judgements(out)==['']*5
    page.get_by_role('button', name='Accept', exact=True).click()
    assert wait_for(lambda: judgements(out)[0]=='accepted'), 'a click on Accept does not reach annotations.csv'
    page.get_by_text('u1.png').first.wait_for()
    page.keyboard.press('Space')
    assert wait_for(lambda: judgements(out)[1]=='accepted'), 'the focus is not on Accept any more'
    page.keyboard.press('Tab')
    page.keyboard.press('Space')
    assert wait_for(lambda: judgements(out)[2]=='rejected'), 'Tab does not lead from Accept to Reject'
    page.keyboard.press('Tab')
    page.keyboard.press('Enter')
    assert wait_for(lambda: judgements(out)[2]==''), 'Tab does not lead from Reject to Undo'
    page.get_by_role('button', name='Move accepted into Labels/train').click()
    assert wait_for(lambda: (path/'Images/train/u1.png').exists() and judgements(out)[0]=='in training')
    page.get_by_role('combobox', name='Show').select_option('in training')
    page.get_by_role('button', name='★ u0').wait_for()
    page.get_by_label('Opacity of the mask, %').fill('0')
    sizes = page.locator('img').evaluate_all('ims => Promise.all(ims.map(i => i.decode().then(() => i.naturalWidth, () => 0)))')
    assert len(sizes)>=5 and all(sizes)
    page.get_by_role('button', name='Check the folder').click()
    page.get_by_text('The run can start.').wait_for()
    found = [v for v in Axe().run(page).response['violations'] if v['impact'] in ('serious', 'critical')]
    assert all('noUi-handle' in n['html'] for v in found for n in v['nodes']), found  # the slider's twin, a number with a label, is for screen readers
