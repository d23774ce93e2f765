"Numbers with intervals, verdicts that say no more than they allow, and one page that needs nothing else"
import html, json, re, shutil
from pathlib import Path

import numpy as np, pytest
from conftest import make_discs, make_model, photo, save, tree
from html.parser import HTMLParser

from semisup_seg.annotation.annotate import annotate
from semisup_seg.evaluation.compare import compare_runs
from semisup_seg.core import DatasetError
from semisup_seg.data.images import load_mask
from semisup_seg.data.folder import split_files, unlabeled_files
from semisup_seg.training.metrics import confusion_counts
from semisup_seg.training.inference import predict
from semisup_seg.annotation.records import Annotations, read_annotations
from semisup_seg.evaluation.report import Report, curves, evaluation_files, make_report, select_cases, read_report, save_report
from semisup_seg.evaluation.scores import bootstrap_interval, score_images, score_masks

HISTORY = [dict(stage='all', train_loss=1., valid_loss=1.1, dice=0.5, jaccard=0.4)]*3
nan = float('nan')

def rows(values): return [dict(image=f'{i}.png', dice=v, jaccard=v/(2-v)) for i,v in enumerate(values)]
def versus(target, base, split='test'): return Report(split, dict(teacher=rows(base), target=rows(target)), 'teacher')
def scored(model, path): return score_images(model, evaluation_files(path)[1])
def saved(out): return json.loads((out/'report.json').read_text(encoding='utf-8'))

class Page(HTMLParser):
    "What a page refers to, and its text"
    def __init__(self, text):
        super().__init__()
        self.refs,self.tags,self.text = [], [], ''
        self.feed(text)
    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.refs += [v for k,v in attrs if k in ('src', 'href', 'srcset', 'data', 'action', 'poster')]
    def handle_data(self, data): self.text += data

# --- numbers

@pytest.mark.parametrize('v', [[0.5], [0.2, 0.4], [0.1, 0.5, 0.9, 0.3], [0.7]*5])
def test_interval_holds_the_mean(v):
    m,lo,hi = bootstrap_interval(v)
    assert m==pytest.approx(np.mean(v)) and min(v)-1e-9<=lo<=m+1e-9 and m-1e-9<=hi<=max(v)+1e-9
    assert bootstrap_interval(v)==bootstrap_interval(v)

def test_interval_agrees_with_theory():
    v = np.random.default_rng(0).normal(0.6, 0.1, 100)
    m,lo,hi = bootstrap_interval(v)
    assert hi-lo==pytest.approx(2*1.96*v.std()/10, rel=0.1) and m-lo==pytest.approx(hi-m, rel=0.2)

def test_interval_covers_the_truth_19_times_in_20():
    rng = np.random.default_rng(0)
    hits = [lo<=0.5<=hi for _ in range(200) for _,lo,hi in [bootstrap_interval(rng.normal(0.5, 0.1, 40), n=400)]]
    assert 0.90<=np.mean(hits)<=0.99

def test_interval_leaves_nan_out():
    assert bootstrap_interval([0.2, nan, 0.4])==bootstrap_interval([0.2, 0.4]) and np.isnan(bootstrap_interval([nan, nan])).all() and np.isnan(bootstrap_interval([])).all()

def test_difference_is_paired():
    a = np.linspace(0.1, 0.9, 12)
    m,lo,hi = versus(a+0.05, a).difference('dice')
    assert m==pytest.approx(0.05) and lo==pytest.approx(0.05) and hi==pytest.approx(0.05)

def test_scores_per_image(trained_discs, tiny):
    pairs = split_files(trained_discs, 'test')
    for r,(i,l) in zip(score_images(tiny, pairs), pairs):
        p,t = predict(tiny, i)==1, load_mask(l, tiny.codes)==1
        both = (p&t).sum()
        assert r==dict(image=i.name, dice=pytest.approx(2*both/(p.sum()+t.sum())), jaccard=pytest.approx(both/(p|t).sum()))

def test_masks_are_judged_as_a_model_is(trained_discs, tiny):
    pairs = split_files(trained_discs, 'test')
    assert score_masks((predict(tiny, i) for i,_ in pairs), pairs, tiny.codes)==score_images(tiny, pairs)

def test_no_mask_no_score(trained_discs, tiny):
    pairs = split_files(trained_discs, 'test')
    there,gone = score_masks([load_mask(pairs[0][1], tiny.codes), None], pairs, tiny.codes)
    assert there==dict(image='test0.png', dice=1, jaccard=1) and gone.keys()==there.keys() and np.isnan([gone['dice'], gone['jaccard']]).all()
    with pytest.raises(ValueError): score_masks([None], pairs, tiny.codes)

def test_masks_are_read_one_at_a_time(monkeypatch, trained_discs, tiny):
    read = []
    def masks():
        for i in range(2):
            assert len(read)==i  # the mask before has been judged
            yield load_mask(pairs[i][1], tiny.codes)
    pairs = split_files(trained_discs, 'test')
    monkeypatch.setattr('semisup_seg.evaluation.scores.overlap_counts', lambda *a, real=confusion_counts: read.append(1) or real(*a))
    assert len(score_masks(masks(), pairs, tiny.codes))==2

def test_several_classes_and_one_that_is_nowhere(tmp_path):
    m = make_model('rest,0\na,100\nghost,200', 3)
    root = make_discs(tmp_path/'d', train=1, valid=1, test=2, unlabeled=0)
    (root/'codes.txt').write_text('rest,0\na,255\nghost,200')
    m.codes = m.codes.__class__(('rest', 'a', 'ghost'), ((0,), (255,), (200,)))
    m.net.segmentation_head[0].bias.data[2] = -1e4
    pairs = split_files(root, 'test')
    got = score_images(m, pairs)
    assert list(got[0])==['image', 'dice', 'dice_a', 'dice_ghost', 'jaccard', 'jaccard_a', 'jaccard_ghost']
    assert all(np.isnan(r['dice_ghost']) and r['dice']==pytest.approx(r['dice_a']) for r in got)
    rep = make_report(m, root, dict(twin=got), 'twin')
    save_report(rep, tmp_path/'out')
    d = saved(tmp_path/'out')
    assert d['scores']['target']['dice_ghost']==[None]*3 and d['per_image']['target'][0]['dice_ghost'] is None and d['difference']['dice_a']==[0]*3
    means,a,ghost = [t.rows for t in rep.tables()]
    assert [t[0] for t in (means, a, ghost)]==[['', 'dice', 'jaccard'], ['', 'dice, a', 'jaccard, a'], ['', 'dice, ghost', 'jaccard, ghost']]
    assert {c for r in ghost[1:] for c in r[1:]}=={'–'} and a[3]==['gain over twin'] + ['+0.000 [+0.000, +0.000]']*2 and 'nan' not in f'{rep}{rep.page}'
    assert 'NaN' not in (tmp_path/'out/report.json').read_text()

# --- verdicts

@pytest.mark.parametrize('target,base,said', [
    ([0.7, 0.8, 0.9], [0.6]*3, 'the target is better'), ([0.1, 0.2, 0.3], [0.6]*3, 'the target is worse'), ([0.5, 0.7, 0.6], [0.6]*3, 'no gain shown'), ([0.6]*3, [0.6]*3, 'no gain shown'),
    ([0.5, 0.9, 0.7], [0.6]*3, 'no gain shown'), ([0.7, 0.3, 0.5], [0.6]*3, 'no gain shown')])
@pytest.mark.parametrize('split', ['test', 'valid'])
def test_verdict(split, target, base, said):
    rep = versus(target, base, split)
    v = rep.verdict()
    m,lo,hi = rep.difference('dice')
    assert m==pytest.approx(np.mean(target)-np.mean(base)) and f'Gain over teacher in mean Dice {m:+.3f}, 95 % interval {lo:+.3f} to {hi:+.3f} over 3 images: {said}' in v
    assert ('There is no test set' in v)==(split=='valid')

def test_verdict_of_no_gain_gives_its_reason():
    assert versus([0.5, 0.7, 0.6], [0.6]*3).verdict().endswith(' over 3 images: no gain shown, the interval includes zero.')

def test_verdict_with_nothing_to_compare(): assert Report('test', dict(teacher=rows([0, 0]), target=rows([0.5, 0.7]))).verdict()=='Mean Dice 0.600 on 2 images.'

@pytest.mark.parametrize('base', [None, [nan, nan]])
def test_verdict_where_nothing_can_be_scored(base):
    rep = versus([nan, nan], base) if base else Report('test', dict(target=rows([nan, nan])))
    assert 'nan' not in str(rep) and rep.verdict().startswith('No image could be scored')

def test_verdict_counts_only_images_that_both_are_scored_on(): assert 'over 2 images' in versus([0.5, 0.7, nan, 0.9], [0.4, 0.5, 0.3, nan]).verdict()

def test_one_image_is_no_proof():
    v = versus([0.9], [0.4]).verdict()
    assert 'the target is better' not in v and 'too few' in v

def test_table_has_a_row_for_each_model():
    rep = Report('test', dict(one=rows([0.4, 0.6]), two=rows([0.1, 0.3]), vote=rows([0.2, nan]), target=rows([0.5, 0.7])), 'two')
    t, = rep.tables()
    assert t.rows[0]==['', 'dice', 'jaccard'] and [r[0] for r in t.rows[1:]]==['one', 'two', 'vote (1 images)', 'target', 'gain over two']
    assert [r[1][:7] for r in t.rows[1:]]==['0.500 [', '0.200 [', '0.200 [', '0.600 [', '+0.400 ']
    assert str(t) in str(rep) and rep.verdict() in str(rep) and t._repr_markdown_() in rep._repr_markdown_()
    assert t._repr_html_() in rep._repr_html_() and html.escape(rep.verdict()) in rep._repr_html_()

def test_no_gain_row_with_nothing_to_compare(): assert [r[0] for r in Report('test', dict(a=rows([0.4]), target=rows([0.5]))).tables()[0].rows]==['', 'a', 'target']

def test_each_name_can_be_the_measure():
    scores = dict(one=rows([0.4, 0.6]), two=rows([0.1, 0.3]), target=rows([0.5, 0.7]))
    assert [Report('test', scores, n).difference('dice')[0] for n in ('one', 'two')]==pytest.approx([0.1, 0.4]) and Report('test', scores, 'One').against=='one'
    for wrong in ('target', 'three'):
        with pytest.raises(ValueError, match=f"Unknown name to compare with '{wrong}'.*Allowed: one, two"): Report('test', scores, wrong)

def test_scores_of_other_images_are_refused():
    other = [dict(r, image='x.png') for r in rows([0.5])]
    for scores in (dict(a=rows([0.5]), target=other), dict(a=rows([0.5]), b=rows([0.5, 0.5]), target=rows([0.5]))):
        with pytest.raises(ValueError, match='were not judged on the same images'): Report('test', scores)

@pytest.mark.parametrize('n', [1, 2, 3, 4, 6, 20])
def test_cases_are_distinct_and_in_order(n):
    cases = select_cases(np.linspace(0, 1, n))
    assert len({i for _,i in cases})==len(cases)==min(n, 6)
    assert [k for k,_ in cases]==sorted((k for k,_ in cases), key=('worst', 'typical', 'best').index)
    assert dict(cases)['worst'] in (0, 1) and (n<3 or n-1 in [i for k,i in cases if k=='best'])

def test_no_case_where_nothing_is_scored(): assert select_cases(np.array([nan, nan]))==[]

# --- the page

@pytest.fixture(scope='module')
def page(tmp_path_factory):
    "A report with all that it can hold: its HTML, itself, a name that is code, whether the data stayed as they were, where it lies"
    root = make_discs(tmp_path_factory.mktemp('r')/'d')
    evil = '<script>alert(1)</script>&"x"'.replace('/', '∕')
    for d in ('Images', 'Labels'): (root/d/'test/test0.png').rename(root/d/f'test/{evil}.png')
    before,out = tree(root), root.parent/'out'
    a,b,c = (make_model(seed=i) for i in range(3))
    vote = annotate([a, b], [i for i,_ in split_files(root, 'test')], out/'vote')
    ann = annotate([a, b], unlabeled_files(root), out, ['Gamma'], valid=split_files(root, 'valid'))
    others = {'teacher 1 <i>': scored(a, root), 'teacher 2': scored(b, root)}
    settings = dict(seed=3, note='<b>bold</b>', training={'teacher 1': dict(steps=40, epochs=4, seconds=7.5), 'annotations': dict(images=5, seconds=2), 'target': dict(steps=50, seconds=8.25)})
    rep = make_report(c, root, others, 'vote', vote, {**dict.fromkeys(others, HISTORY), 'target': HISTORY}, ann, settings)
    f = save_report(rep, out)
    return f.read_text(encoding='utf-8'), rep, evil, tree(root)==before, out

def test_page_refers_to_nothing_outside(page):
    p = Page(page[0])
    assert p.refs and all(r.startswith('data:image/') for r in p.refs)
    assert not re.search(r'https?:|url\(|@import|<link|<script|<iframe', page[0]) and page[3]

def test_page_escapes_names(page):
    text,_,evil,*_ = page
    assert evil not in text and html.escape(evil) in text and '<b>bold</b>' not in text and '<i>' not in text and 'script' not in Page(text).tags

def test_page_shows_everything(page):
    text,rep,*_ = page
    p = Page(text)
    for o in (rep.verdict(), 'Gain over vote', 'image', 'truth', 'vote', 'target', 'worst', 'Training', 'Pseudo-labels, the least and the most trusted', 'least trusted', 'most trusted', '"seed": 3'): assert o in p.text
    assert p.tags.count('img')==2*4 + 1 + 1 + 2*4
    said = p.text.replace('\xa0', ' ')
    for v,r in zip(rep.scores['vote'], rep.target): assert f'{r["image"]}, Dice vote {v["dice"]:.3f}, target {r["dice"]:.3f}' in p.text
    for r in rep.tables()[0].rows[1:]: assert all(c in said for c in r)

def test_page_tells_the_quality_to_expect(page):
    rep,facts = page[1], page[1].pseudo
    ann = read_annotations(page[4])
    assert facts==dict(images=5, used=5, confidence=pytest.approx(np.mean([r['confidence'] for r in ann.rows])), agreement=pytest.approx(np.mean([r['agreement'] for r in ann.rows])),
        predicted_dice=pytest.approx(np.mean([r['predicted_dice'] for r in ann.rows])), checked=2, checked_dice=pytest.approx(np.mean([r['dice'] for r in ann.checked])))
    assert f'Predicted mean Dice of the 5 pseudo-labels {facts["predicted_dice"]:.2f} (from 2 validation images, whose mean is {facts["checked_dice"]:.2f})' in rep.page

def test_no_prediction_no_sentence(page, trained_discs, tiny):
    ann = read_annotations(page[4])
    for r in ann.rows: r['predicted_dice'] = None
    for r in ann.rows[:2]: r['used'] = False
    rep = make_report(tiny, trained_discs, annotations=Annotations(ann.out, ann.rows, []))
    assert 'Predicted mean Dice' not in rep.page and 'least trusted' in rep.page and rep.pseudo['used']==3 and rep.pseudo['checked_dice'] is None and 'predicted_dice' not in rep.pseudo

def test_no_pseudo_label_could_be_made(trained_discs, tiny, tmp_path):
    blind = dict(image='u.png', mask='', confidence=None, entropy=None, agreement=None, predicted_dice=None, used=False, error='u.png: cannot be read')
    rep = make_report(tiny, trained_discs, annotations=Annotations(tmp_path, [blind], []))
    assert rep.pseudo==dict(images=0, used=0, checked=0, checked_dice=None) and 'Pseudo-labels' not in rep.page

def test_page_tells_time_and_steps(page):
    cells = [re.findall('<td [^>]*>(.*?)</td>', r) for r in re.findall('<tr>(.*?)</tr>', page[0].partition('Time and steps')[2])]
    assert cells[1:]==[['teacher 1', '40', '4', '7.5'], ['annotations', '–', '–', '2'], ['target', '50', '–', '8.25'], ['in all', '–', '–', '17.8']]

def test_page_of_a_target_alone(trained_discs, tiny, tmp_path):
    rep = make_report(tiny, trained_discs)
    p = Page(save_report(rep, tmp_path).read_text(encoding='utf-8'))
    assert not re.search('teacher|vote|gain over|Time and steps', p.text) and p.tags.count('img')==2*3 and tree(tmp_path).keys()=={'report.html', 'report.json'}
    d = saved(tmp_path)
    assert list(d['scores'])==['target'] and d['against'] is d['difference'] is d['pseudo'] is d['settings'] is None

def test_json_holds_it_all(page):
    rep,d = page[1], saved(page[4])
    names = ['teacher 1 <i>', 'teacher 2', 'vote', 'target']
    assert list(d['scores'])==list(d['per_image'])==names and d['verdict']==rep.verdict() and (d['split'], d['images'], d['against'])==('test', 2, 'vote')
    for k in ('dice', 'jaccard'):
        assert d['difference'][k]==pytest.approx(rep.difference(k), abs=1e-4)
        for n in names:
            v = [o[k] for o in d['per_image'][n]]
            assert v==pytest.approx(rep.values(n, k), abs=1e-4) and d['scores'][n][k]==pytest.approx(bootstrap_interval(v), abs=1e-4)
    assert d['difference']['dice'][0]==pytest.approx(d['scores']['target']['dice'][0] - d['scores']['vote']['dice'][0], abs=1e-4)
    assert d['settings']==rep.settings and d['pseudo']==pytest.approx(rep.pseudo, abs=1e-4)
    assert len({str(d['per_image'][n]) for n in names})==4

def test_report_comes_back(page):
    rep,back = page[1], read_report(page[4])
    assert (back.split, back.against, list(back.scores), back.settings)==(rep.split, rep.against, list(rep.scores), rep.settings)
    assert back.verdict()==rep.verdict()

def test_a_result_shows_its_report_and_where_it_lies(page):
    from semisup_seg.distillation.distill import Result
    res = Result(None, page[1], None, page[4])
    for shown in (str(res), res._repr_markdown_(), html.unescape(res._repr_html_())): assert page[1].verdict() in shown and str(page[4]/'report.html') in shown
    assert page[1]._repr_html_() in res._repr_html_() and '<i>' not in res._repr_html_() and 'teacher 1 &lt;i&gt;' in res._repr_html_()

# --- annotations

def noted(out, n, size=(300, 400), values=(0, 7, 255)):
    "`n` annotations of noise, the worst there is to compress, each of another agreement"
    rng,res = np.random.default_rng(0), []
    for i in range(n):
        f = save(out/f'in/{i}<b>.png', np.uint8(rng.integers(0, 256, (*size, 3))))
        save(out/f'annotations/{i}.png', np.uint8(values)[rng.integers(0, len(values), size)])
        res.append(dict(image=str(f), mask=f'annotations/{i}.png', confidence=0.9, entropy=0.1, agreement=(7*i%n+1)/(n+1), predicted_dice=None, used=i!=1, error=''))
    return Annotations(out, res, [])

def test_annotations_show_the_ends_small_and_escaped(tmp_path):
    ann = noted(tmp_path, 9)
    text,p = ann._repr_html_(), Page(ann._repr_html_())
    assert len(text)<60_000 and p.tags.count('img')==6 and all(r.startswith('data:image/jpeg') for r in p.refs) and 'b' not in p.tags
    want = [f'{Path(r["image"]).name}{r["confidence"]:.3f}{r["agreement"]:.3f}{"yes" if r["used"] else "no"}' for r in [*ann.ranked()[:3], *ann.ranked()[-3:]]]
    assert re.findall('(?:least|most) trusted(.*?(?:yes|no))', p.text)==want and p.text.replace('\xa0', ' ').endswith('pixel values: □ 0 ■ 7 ■ 255')

@pytest.mark.parametrize('n', [1, 2, 3, 5, 6])
def test_each_annotation_is_shown_once(tmp_path, n):
    said = Page(noted(tmp_path, n, (20, 30))._repr_html_()).text
    assert [said.count(f'{i}<b>.png') for i in range(n)]==[1]*n and (said.count('least trusted'), said.count('most trusted'))==(-(-n//2), n//2)

def test_pictures_that_are_gone_are_told(tmp_path):
    ann = noted(tmp_path, 4, (20, 30))
    Path(ann.rows[0]['image']).unlink()
    (tmp_path/'annotations/1.png').unlink()
    (tmp_path/'annotations/2.png').write_bytes(b'no picture')
    save(tmp_path/'annotations/3.png', np.zeros((9, 9), np.uint8))
    p = Page(ann._repr_html_())
    for o in ('0<b>.png: no such file', '1.png: no such file', '2.png: cannot be read as an image', 'image and mask differ in size'): assert o in p.text
    assert 'img' not in p.tags and str(tmp_path/'in') not in p.text
    shutil.rmtree(tmp_path/'annotations')
    assert Page(ann._repr_html_()).text.count('no such file')==4

def test_no_annotation_says_so(tmp_path):
    unread = dict(image='<u>.png', mask='', confidence=None, entropy=None, agreement=None, predicted_dice=None, used=False, error='')
    for rows,said in (([], '0 annotations'), ([unread], '1 could not be read: <u>.png')):
        p = Page(Annotations(tmp_path, rows, [])._repr_html_())
        assert said in p.text and 'There is no mask to show' in p.text and 'u' not in p.tags

def test_sixteen_bit_masks_are_shown(tmp_path):
    ann = noted(tmp_path, 2, (20, 30))
    for r in ann.rows: save(tmp_path/r['mask'], np.full((20, 30), 4095, np.uint16))
    p = Page(ann._repr_html_())
    assert p.tags.count('img')==2 and '4095' in p.text

# --- the vote

@pytest.fixture
def voted(tmp_path, tiny):
    "A data set, and a vote of two teachers on its test images"
    root = make_discs(tmp_path/'d', test=3)
    return root, annotate([make_model(seed=4), make_model(seed=5)], [i for i,_ in split_files(root, 'test')], tmp_path/'vote')

def test_vote_is_judged_by_its_masks(voted, tiny):
    root,vote = voted
    pairs = split_files(root, 'test')
    rep = make_report(tiny, root, vote=vote, against='vote')
    assert rep.scores['vote']==score_masks([load_mask(vote.pairs[i], tiny.codes) for i,_ in pairs], pairs, tiny.codes) and rep.against=='vote' and list(rep.scores)==['vote', 'target']

@pytest.mark.parametrize('spoil', [lambda f: f.unlink(), lambda f: f.write_bytes(b'no')])
def test_masks_that_cannot_be_read_are_left_out(voted, tiny, spoil):
    root,vote = voted
    whole = make_report(tiny, root, vote=vote, against='vote')
    spoil(vote.out/vote.rows[1]['mask'])
    rep = make_report(tiny, root, vote=vote, against='vote')
    assert np.isnan(rep.scores['vote'][1]['dice']) and [rep.scores['vote'][i] for i in (0, 2)]==[whole.scores['vote'][i] for i in (0, 2)]
    assert 'over 2 images' in rep.verdict() and 'vote (2 images)' in rep.page and '<span>–</span>' in rep.page and rep.page.count('data:image/jpeg')==3*4-1 and 'nan' not in re.sub('base64,[^"]*', '', rep.page)

def test_vote_in_another_order_of_a_moved_folder(voted, tiny, tmp_path):
    root,vote = voted
    want = make_report(tiny, root, vote=vote).scores['vote']
    shutil.move(root, tmp_path/'moved')
    assert make_report(tiny, tmp_path/'moved', vote=Annotations(vote.out, vote.rows[::-1], [])).scores['vote']==want

def test_others_must_not_take_the_targets_name(trained_discs, tiny):
    with pytest.raises(TypeError, match='target'): make_report(tiny, trained_discs, dict(target=scored(tiny, trained_discs)))

def test_validation_set_judges_where_there_is_no_test_set(tmp_path, tiny):
    rep = make_report(tiny, make_discs(tmp_path/'d', test=0))
    assert rep.split=='valid' and len(rep.target)==2 and 'validation set' in rep.page

def test_nothing_to_judge_on(tmp_path, tiny):
    with pytest.raises(DatasetError, match='neither Images/test nor Images/valid'): make_report(tiny, tmp_path)

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

# --- several runs

MADE = dict(bases=[['U-Net', 'resnet18'], ['CGNet', None]], target=['MANet', 'resnet18'], views=['H Flip', 'Gamma'], recipe='soft', size=[64, 96], seed=5, data='abc',
    training=dict(base=dict(steps=40, seconds=7), target=dict(steps=50, seconds=8.5)))

@pytest.fixture
def finished(tmp_path):
    "Leave a run in the folder `name`, with the target's scores and the changed settings"
    def _finished(name, values, split='test', images=None, **made):
        scores = rows(values) if images is None else [dict(r, image=i) for r,i in zip(rows(values), images)]
        save_report(Report(split, dict(teacher=scores, target=scores), settings={**MADE, **made}, page=''), tmp_path/name)
        return tmp_path/name
    return _finished

def test_gains_are_paired_with_the_first_run(finished):
    base = np.linspace(0.1, 0.9, 9)
    d = np.array([0.02, 0.04, 0, 0.02, 0.02, 0.05, 0.01, 0.02, 0.03])
    c = compare_runs(finished('a', base), finished('b', base+d), finished('c', base-d), finished('d', base[::-1]))
    means = np.random.default_rng(0).choice(d, (2000, 9)).mean(1)
    want = f'{d.mean():+.3f} [{np.percentile(means, 2.5):+.3f}, {np.percentile(means, 97.5):+.3f}]'
    head,a,b,worse,same = c.tables[0].rows
    assert head[2]=='gain over a' and a[2:4]==['', ''] and b[2:4]==[want, 'better'] and worse[3]=='worse' and same[3]=='no gain shown'
    assert [r[0] for r in (a, b, worse, same)]==list('abcd') and a[1].startswith('0.500 [') and b[1].startswith('0.523 [')

def test_images_without_a_score_are_left_out_of_the_gain(finished):
    c = compare_runs(finished('a', [0.5, nan, 0.7, 0.9]), finished('b', [0.6, 0.9, 0.8, nan]))
    assert c.tables[0].rows[2][2]=='+0.100 [+0.100, +0.100]' and compare_runs(finished('a', [0.5]), finished('b', [0.6])).tables[0].rows[2][3]=='too few images to say'

def test_comparison_tells_how_the_runs_were_made(finished):
    c = compare_runs(finished('a', [0.5, 0.7]), finished('b', [0.5, 0.7], bases=[], views=[], recipe=None, training={}))
    assert c.tables[0].rows[1][4:]==['50', '15.5'] and c.tables[0].rows[2][4:]==['–', '–']
    assert [r[1:] for r in c.tables[1].rows[1:]]==[['U-Net / resnet18, CGNet → MANet / resnet18', 'H Flip, Gamma', 'soft', '64×96', '5'], ['no teacher → MANet / resnet18', '–', '–', '64×96', '5']]
    for t in c.tables: assert str(t) in str(c) and t._repr_markdown_() in c._repr_markdown_() and t._repr_html_() in c._repr_html_()
    assert 'not over seeds' in c._repr_html_()

def test_reports_without_settings_are_compared(tmp_path):
    for n in 'ab': save_report(Report('test', dict(target=rows([0.5, 0.7])), page=''), tmp_path/n)
    assert compare_runs(tmp_path/'a', tmp_path/'b').tables[1].rows[2]==['b', '–', '–', '–', '–', '–']

def test_unequal_steps_are_remarked(finished):
    a,b = finished('a', [0.5, 0.7]), finished('b', [0.6, 0.8], training=dict(target=dict(steps=90)))
    assert 'unequal numbers of steps (a 50, b 90): a longer training alone may explain a gain' in str(compare_runs(a, b))
    assert 'unequal' not in str(compare_runs(a, finished('c', [0.6, 0.8]))) and 'not over seeds' in str(compare_runs(a, b))

def test_comparison_on_a_validation_set_says_so(finished):
    a,b = (finished(n, [0.5, 0.7], 'valid') for n in 'ab')
    assert '2 images of the validation set' in str(compare_runs(a, b)) and 'There is no test set' in str(compare_runs(a, b))
    assert 'There is no test set' not in str(compare_runs(finished('c', [0.5]), finished('d', [0.5])))

@pytest.mark.parametrize('other,said', [
    (dict(split='valid'), r'split \(test and valid\)'), (dict(values=[0.5]), r'names of the images \(2 and 1\)'), (dict(images=['0.png', 'x.png']), r'names of the images \(2 and 2\)'),
    (dict(data='xyz'), r'data \(abc and xyz\)'), (dict(split='valid', data='xyz'), r'split \(test and valid\), the data \(abc and xyz\)')])
def test_runs_on_other_images_are_refused(finished, other, said):
    runs = finished('a', [0.5, 0.7]), finished('b', [0.6, 0.8]), finished('c', **{'values': [0.6, 0.8], **other})
    with pytest.raises(ValueError, match='a and .*c cannot be compared: they differ in the ' + said): compare_runs(*runs)

def test_unknown_data_are_no_hindrance(finished): assert compare_runs(finished('a', [0.5, 0.7]), finished('b', [0.5, 0.7], data=None)).gains('b').tolist()==[0, 0]

def test_comparison_needs_two_runs(finished, tmp_path):
    a = finished('a', [0.5, 0.7])
    for outs in ((), (a,)):
        with pytest.raises(ValueError, match='at least two runs'): compare_runs(*outs)
    with pytest.raises(ValueError, match='two runs, each once'): compare_runs(a, tmp_path/'a/../a')
    (tmp_path/'empty').mkdir()
    for gone in ('empty', 'nowhere'):
        with pytest.raises(ValueError, match=f'{gone}.report.json: no such file'): compare_runs(a, tmp_path/gone)

def test_runs_of_the_same_name_are_told_apart(finished, tmp_path):
    c = compare_runs(finished('x/out', [0.5, 0.7]), finished('y/out', [0.5, 0.7]))
    assert list(c.runs)==[str(tmp_path/'x/out'), str(tmp_path/'y/out')]

@pytest.mark.parametrize('text', ['', '{', '[]', '5', '{}', '{"split": "test", "target": {}, "per_image": {"target": [], "baseline": null}}',
    '{"split": "test", "against": null, "settings": null, "pseudo": null, "per_image": {}}', '{"split": "test", "against": null, "settings": 5, "pseudo": null, "per_image": {"target": []}}',
    '{"split": "test", "against": null, "settings": null, "pseudo": null, "per_image": {"target": [{"image": "a"}]}}', '{"split": "test", "against": null, "settings": null, "pseudo": null, "per_image": {"target": [{"image": "a", "dice": "b"}]}}'])
def test_damaged_report(finished, text):
    a,b = finished('a', [0.5, 0.7]), finished('b', [0.5, 0.7])
    (b/'report.json').write_text(text)
    with pytest.raises(ValueError, match='b.report.json: is not a report of this package'): compare_runs(a, b)
