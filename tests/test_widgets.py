"The widgets: what is on show, what the buttons do, bad input, thousands of annotations, and all of it in a real browser"
import json, shutil, signal, socket, subprocess, sys, time, urllib.request

import numpy as np, pytest
from axe_playwright_python.sync_playwright import Axe
from conftest import make_discs, make_model, save, tree

import semisup_seg.app.browser as widgets
from semisup_seg.annotation.annotate import annotate
from semisup_seg.data.folder import unlabeled_files
from semisup_seg.app.form import run_form
from semisup_seg.app.job import Plan
from semisup_seg.annotation.records import Annotations, read_annotations
from semisup_seg.evaluation.report import read_report
from semisup_seg.annotation.review import Review
from semisup_seg.app.browser import AnnotationList, browse

@pytest.fixture
def run(tmp_path):
    "A data set, and the annotations of its unlabelled images, the last the most trusted"
    path = make_discs(tmp_path/'data')
    ann = annotate(make_model(), unlabeled_files(path), tmp_path/'out', confidence=True)
    for i,r in enumerate(ann.rows): r.update(agreement=0.5+i/10, confidence=0.9)
    ann.save()
    return path, tmp_path/'out'

def judgements(out): return [r['judgement'] for r in read_annotations(out).rows]

# --- without a browser

def test_orders_and_filters(run):
    path,out = run
    l = AnnotationList(Review(out, path), per_page=2)
    assert l.ids==[0, 1, 2, 3, 4] and l.pages==3
    l.by = 'most trusted first'
    l.refresh()
    assert l.ids==[4, 3, 2, 1, 0] and l.on_page==[4, 3]
    l.turn(1)
    assert (l.current, l.on_page)==(2, [2, 1])
    assert l.judge('accepted').startswith('u2.png accepted') and l.current==1
    l.turn(9)
    l.turn(-9)
    l.show,l.by = 'accepted', 'by name'
    l.refresh(1)
    assert l.ids==[2] and l.current==2

def test_the_last_of_a_list(run):
    path,out = run
    l = AnnotationList(Review(out, path))
    said = [l.judge('rejected') for _ in range(5)]
    assert 'last of this list' in said[-1] and not any('last of' in s for s in said[:-1]) and l.current is None
    assert 'no image' in l.judge('accepted') and judgements(out)==['rejected']*5
    l.show = 'all'
    l.refresh()
    l.step(9)
    assert 'last of this list' in l.judge('accepted') and l.current==4

def test_buttons_write_move_and_undo(run):
    path,out = run
    before = tree(path), tree(out)
    b = browse(out, path)
    for w in (b.accept, b.reject, b.accept, b.move): w.click()
    assert judgements(out)==['in training', 'rejected', 'in training', '', ''] and '2 of 2 accepted are in training' in b.said.value
    assert (path/'Labels/train/u0.png').exists() and '2 in training' in b.facts.value
    for _ in range(4): b.undo.click()
    assert (tree(path), tree(out))==before and b.listing.current==0
    b.undo.click()
    assert 'nothing to undo' in b.said.value and (tree(path), tree(out))==before

def test_a_label_in_the_way_is_told_and_stays(run):
    path,out = run
    label = save(path/'Labels/train/u0.png', np.zeros((9, 9), np.uint8)).read_bytes()
    b = browse(out, path)
    b.accept.click()
    b.move.click()
    assert '0 of 1 accepted' in b.said.value and 'is there already' in b.said.value and (path/'Labels/train/u0.png').read_bytes()==label

def test_suggested_images_are_a_list_of_their_own(run):
    path,out = run
    b = browse(out, path)
    b.accept.click()
    b.n.value = 3
    b.suggest.click()
    assert b.show.value=='worth labelling' and len(b.listing.ids)==3 and 0 not in b.listing.ids
    b.reject.click()
    assert len(b.listing.ids)==3 and judgements(out).count('rejected')==1

def test_opacity_of_the_mask(run):
    path,out = run
    b = browse(out, path)
    old = b.pictures.value
    b.slider.value = 0
    assert b.alpha.value==0 and b.pictures.value!=old

def test_a_corrected_mask_is_read_anew(run):
    path,out = run
    b = browse(out, path)
    old = b.pictures.value, b.slots[0].children[0].value
    save(out/'annotations/u0.png', np.full((52, 56), 255, np.uint8))
    b.draw()
    assert all(a!=c for a,c in zip(old, (b.pictures.value, b.slots[0].children[0].value)))

def test_pictures_carry_a_text(run):
    path,out = run
    b = browse(out, path)
    assert b.pictures.value.count('<img')==3 and 'alt=""' not in b.pictures.value + b.slots[0].children[0].value
    shutil.rmtree(out/'confidence')
    b.draw()
    assert b.pictures.value.count('<img')==2 and 'kept no map' in b.pictures.value

@pytest.mark.parametrize('spoil,said', [
    (lambda p, o: (o/'annotations.csv').unlink(), 'no such file'), (lambda p, o: (o/'annotations.csv').write_text(''), 'is not a table'),
    (lambda p, o: (o/'annotations.csv').write_text((o/'annotations.csv').read_text().splitlines()[0]+'\n'), 'holds no annotations'),
    (lambda p, o: (o/'annotations.csv').write_text((o/'annotations.csv').read_text().replace('0.9', 'much')), 'is not a table'),
    (lambda p, o: (p/'codes.txt').unlink(), 'codes.txt: missing'), (lambda p, o: shutil.rmtree(o), 'no such file')])
def test_what_cannot_be_read_is_one_message(run, spoil, said):
    path,out = run
    spoil(path, out)
    before = tree(path), tree(out)
    w = browse(out, path)
    assert len(w.children)==1 and said in w.children[0].value and 'role="alert"' in w.children[0].value and (tree(path), tree(out))==before

def test_images_that_are_gone(run):
    path,out = run
    for f in unlabeled_files(path)[:2]: f.unlink()
    b = browse(out, path)
    assert b.notice.value.count('role="alert"')==1 and '2 of 5 images or masks are no longer there' in b.notice.value
    assert 'no such file' in b.pictures.value and 'no picture' in b.slots[0].children[0].value
    b.accept.click()
    assert 'is gone' in b.said.value and judgements(out)==['']*5
    b.reject.click()
    assert judgements(out)[0]=='rejected'

def test_a_table_of_another_data_set(run, tmp_path):
    b = browse(run[1], make_discs(tmp_path/'other'))
    assert 'Is this the data set of that run?' in b.notice.value
    b.accept.click()
    b.move.click()
    assert 'does not lie in' in b.said.value and '0 of 1' in b.said.value

def test_a_table_changed_meanwhile(run):
    path,out = run
    b = browse(out, path)
    Review(out, path).judge(3, 'rejected')
    b.accept.click()
    assert 'was changed by someone else' in b.said.value and judgements(out)==['', '', '', 'rejected', '']

def test_five_thousand_annotations_are_read_a_page_at_a_time(tmp_path, monkeypatch):
    path,rows,n = make_discs(tmp_path/'data', unlabeled=1), [], 5000
    one = (path/'unlabeled_images/u0.png').read_bytes()
    mask = save(tmp_path/'out/annotations/u0.png', np.zeros((64, 48), np.uint8)).read_bytes()
    for i in range(n):
        (path/f'unlabeled_images/u{i}.png').write_bytes(one)
        (tmp_path/f'out/annotations/u{i}.png').write_bytes(mask)
        rows.append(dict(image=str(path/f'unlabeled_images/u{i}.png'), mask=f'annotations/u{i}.png', confidence=0.5, entropy=0.5, agreement=i/n, predicted_dice=None, used=True, judgement='', error=''))
    Annotations(tmp_path/'out', rows, []).save()
    read,load = [], widgets.load_image
    monkeypatch.setattr(widgets, 'load_image', lambda f: (read.append(f), load(f))[1])
    widgets._thumb.cache_clear()
    b = browse(tmp_path/'out', path)
    assert len(read)==13 and b.paging.value=='page 1 of 417' and len(b.slots)==12
    b.on.click()
    assert len(read)==26
    b.accept.click()
    assert len(read)<=28, 'a judgement reads the next image and one small picture'
    b.undo.click()
    assert judgements(tmp_path/'out')==['']*n

# --- the form

def form(path, out, **kw): return run_form(path, **{**dict(out=str(out), teachers=('CGNet',), target='CGNet', size=32, bs=4, epochs=2, freeze_epochs=0), **kw})

def test_form_and_plan_agree(tmp_path):
    plan = Plan('d', 'o', 'model distillation', ('CGNet', 'PAN'), 2, 'MANet', 'resnet34', ('Gamma', 'V Flip'), 'naive', 64, 4, 3, 1, 7, True, True)
    assert run_form(**vars(plan)).plan==plan

@pytest.mark.parametrize('kw,said', [(dict(data=''), 'not named yet'), (dict(data='nowhere'), 'no such folder'), (dict(teachers=()), 'one teacher; 0 are chosen'),
    (dict(routine='model distillation'), '1 is chosen'), (dict(views=()), 'at least one view'), (dict(out=''), 'results is not named yet')])
def test_form_says_what_is_wrong_and_starts_nothing(discs, tmp_path, kw, said):
    f = form(**{'path': kw.pop('data', discs), 'out': tmp_path/'out', **kw})
    for b in (f.check, f.start):
        f.answer.value = ''
        b.click()
        assert said in f.answer.value and 'role="alert"' in f.answer.value and f.job is None
    assert not (tmp_path/'out').exists()

@pytest.mark.parametrize('kw,said', [(dict(teachers=('Unet5',)), "Did you mean 'U-Net'"), (dict(target='nonet'), 'Unknown network'), (dict(views=('H Flop',)), "Did you mean 'H Flip'"),
    (dict(routine='distil'), 'Unknown routine'), (dict(recipe='best'), 'Unknown recipe'), (dict(size=8), 'from 32 to 2048'), (dict(bs=1), 'from 2 to 512')])
def test_form_refuses_what_its_menus_do_not_have(kw, said):
    with pytest.raises(ValueError, match=said): run_form('data', **kw)

def test_menus_describe_what_they_offer():
    f = run_form('data', teachers=('cgnet',), target='unet', views=('h flip',))
    assert f.plan.teachers==('CGNet',) and f.plan.target=='U-Net' and f.plan.views==('H Flip',)
    for k,n in dict(routine=4, teachers=10, target=10, views=14, recipe=2).items():
        labels = [label for label,_ in f.fields[k].options]
        assert len(labels)==n and all(len(label.partition(': ')[2])>5 for label in labels), labels

def test_a_hidden_field_counts_for_nothing(discs, tmp_path):
    f = form(discs, tmp_path/'out', routine='model distillation', each=2)
    assert len(f.plan.bases)==2
    f.fields['routine'].value = 'data distillation'
    f.check.click()
    assert 'The run can start' in f.answer.value

def test_form_names_every_fault_of_a_folder(discs, tmp_path):
    for i in (0, 1): (discs/f'Labels/train/train{i}.png').unlink()
    f = form(discs, tmp_path/'out')
    f.check.click()
    assert 'train0.png: no label' in f.answer.value and 'train1.png: no label' in f.answer.value and '<br>' in f.answer.value

@pytest.fixture(params=['in front', 'in the background'])
def shell(request):
    "A shell that starts a program in the background lets it ignore interruptions, and so all that this program starts"
    old = signal.signal(signal.SIGINT, signal.SIG_IGN if request.param=='in the background' else signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, old)

def test_form_stops_a_run_and_goes_on_to_its_report(discs, tmp_path, shell):
    f = form(discs, tmp_path/'out', epochs=40)
    f.start.click()
    while f.job.progress.rows<3 and f.job.process.poll() is None: time.sleep(0.1)
    f.start.click()
    assert 'going on already' in f.answer.value
    f.stop.click()
    f.thread.join(60)
    assert 'goes on from what is finished' in f.answer.value and 0<f.bar.value<1 and not (tmp_path/'out/report.json').exists()
    f.start.click()
    f.thread.join(120)
    assert f.bar.value==1 and 'Gain over teacher' in f.report.value and str(tmp_path/'out/report.html') in f.answer.value
    assert 'base_CGNet.checkpoint: going on after' in f.job.said[1]
    assert read_report(tmp_path/'out').settings['epochs']==40
    f.look.click()
    f.more.children[0].accept.click()
    assert 'accepted' in judgements(tmp_path/'out')
    f.stop.click()
    assert 'No run is going on' in f.answer.value

def test_form_shows_why_a_run_ended(discs, tmp_path):
    (tmp_path/'out').mkdir()
    (tmp_path/'out/mine.txt').write_text('mine')
    f = form(discs, tmp_path/'out')
    f.start.click()
    f.thread.join(60)
    assert 'holds files that no run has written' in f.answer.value and 'role="alert"' in f.answer.value

# --- in a browser

@pytest.fixture
def app(run, tmp_path):
    "The address of Voilà, serving a notebook with the browser of `run`"
    cell = dict(cell_type='code', id='a', metadata={}, execution_count=None, outputs=[], source=f'from semisup_seg.app.browser import browse\nbrowse({str(run[1])!r}, {str(run[0])!r})')
    kernel = dict(name='python3', display_name='Python 3', language='python')
    (tmp_path/'app.ipynb').write_text(json.dumps(dict(cells=[cell], metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)))
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    with (tmp_path/'voila.log').open('w') as log:
        server = subprocess.Popen([sys.executable, '-m', 'voila', tmp_path/'app.ipynb', '--no-browser', f'--port={port}', '--Voila.ip=127.0.0.1'], stdout=log, stderr=log)
        yield f'http://127.0.0.1:{port}/'
        server.terminate()
        server.wait(30)

@pytest.fixture
def page(app, browser):
    "The widget on the screen; other sites cannot be reached"
    for _ in range(120):
        try: urllib.request.urlopen(app.rstrip('/')+'/voila/static/', timeout=1)
        except urllib.error.HTTPError: break
        except OSError: time.sleep(0.5)
    page = browser.new_page(viewport=dict(width=1100, height=1000))
    page.set_default_timeout(90_000)
    page.route(lambda u: not u.startswith(app) and not u.startswith('data:'), lambda r: r.abort())
    page.goto(app)
    page.get_by_role('button', name='Accept', exact=True).wait_for()
    yield page
    page.close()

def wait_for(check, seconds=20):
    end = time.time()+seconds
    while not check() and time.time()<end: time.sleep(0.1)
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
    found = [v for v in Axe().run(page).response['violations'] if v['impact'] in ('serious', 'critical')]
    assert all('noUi-handle' in n['html'] for v in found for n in v['nodes']), found  # the slider's twin, a number with a label, is for screen readers
