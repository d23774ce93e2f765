"One page that needs no other file, with pictures, curves and pseudo-labels"
import html, json, re, shutil
from pathlib import Path

import numpy as np, pytest
from conftest import HISTORY, Page, make_discs, photo, save, tree

from semisup_seg.annotation.records import AnnotationRecord, Annotations, read_annotations
from semisup_seg.data.images import load_mask
from semisup_seg.evaluation.page import curves, select_cases
from semisup_seg.evaluation.report import make_report, save_report

nan = float('nan')

def test_cases_are_distinct_and_in_order():
    for n in (1, 2, 3, 4, 6, 20):
        cases = select_cases(np.linspace(0, 1, n))
        assert len({i for _,i in cases})==len(cases)==min(n, 6), n
        assert [k for k,_ in cases]==sorted((k for k,_ in cases), key=('worst', 'typical', 'best').index), n
        assert dict(cases)['worst'] in (0, 1) and (n<3 or n-1 in [i for k,i in cases if k=='best']), n

def test_no_case_where_nothing_is_scored(): assert select_cases(np.array([nan, nan]))==[]

def test_page_refers_to_nothing_outside(full_report):
    p = Page(full_report.text)
    assert p.refs and all(r.startswith('data:image/') for r in p.refs)
    assert not re.search(r'https?:|url\(|@import|<link|<script|<iframe', full_report.text) and full_report.is_untouched

def test_page_escapes_names(full_report):
    text,evil = full_report.text,full_report.evil
    assert evil not in text and html.escape(evil) in text and '<b>bold</b>' not in text and '<i>' not in text and 'script' not in Page(text).tags

def test_page_shows_everything(full_report):
    text,rep = full_report.text,full_report.report
    p = Page(text)
    for o in (rep.verdict(), 'Gain over vote', 'image', 'truth', 'vote', 'target', 'worst', 'Training', 'Pseudo-labels', 'least trusted', 'most trusted', '"seed": 3'): assert o in p.text
    assert p.tags.count('img')==2*4 + 1 + 1 + 5
    said = p.text.replace('\xa0', ' ')
    for v,r in zip(rep.scores['vote'], rep.target): assert f'{r["image"]}, Dice vote {v["dice"]:.3f}, target {r["dice"]:.3f}' in p.text
    for r in rep.tables()[0].rows[1:]: assert all(c in said for c in r)

def test_page_tells_the_quality_to_expect(full_report):
    rep,facts = full_report.report, full_report.report.pseudo
    ann = read_annotations(full_report.out)
    def mean(measure, records): return pytest.approx(np.mean([getattr(r, measure) for r in records]))
    means = {k: mean(k, ann.rows) for k in ('confidence', 'agreement', 'predicted_dice')}
    assert facts==dict(images=5, used=5, checked=2, checked_dice=mean('dice', ann.checked), **means)
    assert f'Predicted mean Dice of the 5 pseudo-labels {facts["predicted_dice"]:.2f} (from 2 validation images, whose mean is {facts["checked_dice"]:.2f})' in rep.page

def test_no_prediction_no_sentence(full_report, trained_discs, tiny):
    ann = read_annotations(full_report.out)
    for r in ann.rows: r.predicted_dice = None
    for r in ann.rows[:2]: r.used = False
    rep = make_report(tiny, trained_discs, annotations=Annotations(ann.out, ann.rows, []))
    assert 'Predicted mean Dice' not in rep.page and 'least trusted' in rep.page and rep.pseudo['used']==3 and rep.pseudo['checked_dice'] is None and 'predicted_dice' not in rep.pseudo

def test_no_pseudo_label_could_be_made(trained_discs, tiny, tmp_path):
    unread = AnnotationRecord('u.png', error='u.png: cannot be read')
    rep = make_report(tiny, trained_discs, annotations=Annotations(tmp_path, [unread], []))
    assert rep.pseudo==dict(images=0, used=0, checked=0, checked_dice=None) and 'Pseudo-labels' not in rep.page

def test_page_tells_time_and_steps(full_report):
    cells = [re.findall('<td [^>]*>(.*?)</td>', r) for r in re.findall('<tr>(.*?)</tr>', full_report.text.partition('Time and steps')[2])]
    assert cells[1:]==[['teacher 1', '40', '4', '7.5'], ['annotations', '–', '–', '2'], ['target', '50', '–', '8.25'], ['in all', '–', '–', '17.8']]

def test_page_of_a_target_alone(trained_discs, tiny, tmp_path):
    rep = make_report(tiny, trained_discs)
    p = Page(save_report(rep, tmp_path).read_text(encoding='utf-8'))
    assert not re.search('teacher|vote|gain over|Time and steps', p.text) and p.tags.count('img')==2*3 and tree(tmp_path).keys()=={'report.html', 'report.json'}
    d = json.loads((tmp_path/'report.json').read_text(encoding='utf-8'))
    assert list(d['scores'])==['target'] and d['against'] is d['difference'] is d['pseudo'] is d['settings'] is None

def test_images_of_many_kinds_are_shown(tmp_path, tiny):
    root = make_discs(tmp_path/'d')
    f = root/'Images/test/test0.png'
    im = photo(np.zeros(load_mask(root/'Labels/test/test0.png').shape), np.random.default_rng(0))
    save(f, im.astype(np.uint16)*257)
    assert 'data:image/jpeg' in make_report(tiny, root).page

def test_curves_draw_each_training():
    top,low = curves(dict(teacher=HISTORY, target=HISTORY[:2])).axes
    assert [len(o.get_xdata()) for o in top.lines]==[3, 2] and len(low.lines)==4 and top.get_title() and low.get_xlabel()=='epoch'

def test_legend_of_many_teachers_is_beside_the_curves():
    names = [f'teacher {i} DeepLabV3+ / tf_efficientnet_lite0' for i in range(6)] + ['target']
    fig = curves(dict.fromkeys(names, HISTORY))
    fig.draw_without_rendering()
    box,legend = fig.get_window_extent(), fig.legends[0].get_window_extent()
    assert [o.get_text() for o in fig.legends[0].get_texts()]==names and box.x0<=legend.x0 and legend.x1<=box.x1
    assert all(legend.y1<=ax.get_tightbbox().y0 and ax.get_window_extent().height>80 for ax in fig.axes) and len({o.get_color() for o in fig.axes[0].lines})==7

# --- annotations

def noted(out, n, size=(300, 400), values=(0, 7, 255)):
    "`n` annotations of noise, the worst there is to compress, each of another agreement"
    rng,res = np.random.default_rng(0), []
    for i in range(n):
        f = save(out/f'in/{i}<b>.png', np.uint8(rng.integers(0, 256, (*size, 3))))
        save(out/f'annotations/{i}.png', np.uint8(values)[rng.integers(0, len(values), size)])
        res.append(AnnotationRecord(str(f), f'annotations/{i}.png', 0.9, 0.1, (7*i%n+1)/(n+1), used=i!=1))
    return Annotations(out, res, [])

def test_annotations_show_the_ends_small_and_escaped(tmp_path):
    ann = noted(tmp_path, 9)
    text,p = ann._repr_html_(), Page(ann._repr_html_())
    assert len(text)<60_000 and p.tags.count('img')==6 and all(r.startswith('data:image/jpeg') for r in p.refs) and 'b' not in p.tags
    want = [f'{Path(r.image).name}{r.confidence:.3f}{r.agreement:.3f}{"yes" if r.used else "no"}' for r in [*ann.ranked()[:3], *ann.ranked()[-3:]]]
    assert re.findall('(?:least|most) trusted(.*?(?:yes|no))', p.text)==want and p.text.replace('\xa0', ' ').endswith('pixel values: □ 0 ■ 7 ■ 255')

def test_each_annotation_is_shown_once(tmp_path):
    for n in (1, 2, 3, 5, 6):
        text = Page(noted(tmp_path/str(n), n, (20, 30))._repr_html_()).text
        assert [text.count(f'{i}<b>.png') for i in range(n)]==[1]*n and (text.count('least trusted'), text.count('most trusted'))==(-(-n//2), n//2), n

def test_pictures_that_are_gone_are_told(tmp_path):
    ann = noted(tmp_path, 4, (20, 30))
    Path(ann.rows[0].image).unlink()
    (tmp_path/'annotations/1.png').unlink()
    (tmp_path/'annotations/2.png').write_bytes(b'no picture')
    save(tmp_path/'annotations/3.png', np.zeros((9, 9), np.uint8))
    p = Page(ann._repr_html_())
    for o in ('0<b>.png: no such file', '1.png: no such file', '2.png: cannot be read as an image', 'image and mask differ in size'): assert o in p.text
    assert 'img' not in p.tags and str(tmp_path/'in') not in p.text
    shutil.rmtree(tmp_path/'annotations')
    assert Page(ann._repr_html_()).text.count('no such file')==4

def test_no_annotation_says_so(tmp_path):
    unread = AnnotationRecord('<u>.png')
    for rows,said in (([], '0 annotations'), ([unread], '1 could not be read: <u>.png')):
        p = Page(Annotations(tmp_path, rows, [])._repr_html_())
        assert said in p.text and 'There is no mask to show' in p.text and 'u' not in p.tags

def test_sixteen_bit_masks_are_shown(tmp_path):
    ann = noted(tmp_path, 2, (20, 30))
    for r in ann.rows: save(tmp_path/r.mask, np.full((20, 30), 4095, np.uint16))
    p = Page(ann._repr_html_())
    assert p.tags.count('img')==2 and '4095' in p.text
