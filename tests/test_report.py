"Numbers with intervals, verdicts that say no more than they allow, and one page that needs nothing else"
import html, json, re

import numpy as np, pytest
from conftest import make_discs, make_model, photo, save, tree
from html.parser import HTMLParser

from semisup_seg.annotate import annotate
from semisup_seg.core import DatasetError, load_mask, split_files, unlabeled_files
from semisup_seg.learner import predict
from semisup_seg.report import Report, curves, interval, make_report, pick_cases, save_report, score_images, table_rows

HISTORY = [dict(stage='all', train_loss=1., valid_loss=1.1, dice=0.5, jaccard=0.4)]*3
nan = float('nan')

def rows(values): return [dict(image=f'{i}.png', dice=v, jaccard=v/(2-v)) for i,v in enumerate(values)]

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
    m,lo,hi = interval(v)
    assert m==pytest.approx(np.mean(v)) and min(v)-1e-9<=lo<=m+1e-9 and m-1e-9<=hi<=max(v)+1e-9
    assert interval(v)==interval(v)

def test_interval_agrees_with_theory():
    v = np.random.default_rng(0).normal(0.6, 0.1, 100)
    m,lo,hi = interval(v)
    assert hi-lo==pytest.approx(2*1.96*v.std()/10, rel=0.1) and m-lo==pytest.approx(hi-m, rel=0.2)

def test_interval_covers_the_truth_19_times_in_20():
    rng = np.random.default_rng(0)
    hits = [lo<=0.5<=hi for _ in range(200) for _,lo,hi in [interval(rng.normal(0.5, 0.1, 40), n=400)]]
    assert 0.90<=np.mean(hits)<=0.99

def test_interval_leaves_nan_out():
    assert interval([0.2, nan, 0.4])==interval([0.2, 0.4]) and np.isnan(interval([nan, nan])).all() and np.isnan(interval([])).all()

def test_difference_is_paired():
    a = np.linspace(0.1, 0.9, 12)
    m,lo,hi = Report('test', rows(a+0.05), rows(a)).difference('dice')
    assert m==pytest.approx(0.05) and lo==pytest.approx(0.05) and hi==pytest.approx(0.05)

def test_scores_per_image(trained_discs, tiny):
    pairs = split_files(trained_discs, 'test')
    for r,(i,l) in zip(score_images(tiny, pairs), pairs):
        p,t = predict(tiny, i)==1, load_mask(l, tiny.codes)==1
        both = (p&t).sum()
        assert r==dict(image=i.name, dice=pytest.approx(2*both/(p.sum()+t.sum())), jaccard=pytest.approx(both/(p|t).sum()))

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
    rep = make_report(m, root, m)
    save_report(rep, tmp_path/'out')
    saved = json.loads((tmp_path/'out/report.json').read_text())
    assert saved['target']['dice_ghost']==[None]*3 and saved['per_image']['target'][0]['dice_ghost'] is None
    assert 'NaN' not in (tmp_path/'out/report.json').read_text()

# --- verdicts

@pytest.mark.parametrize('target,base,said', [
    ([0.7, 0.8, 0.9], [0.6]*3, 'the target is better'), ([0.1, 0.2, 0.3], [0.6]*3, 'the target is worse'), ([0.5, 0.7, 0.6], [0.6]*3, 'no gain shown'), ([0.6]*3, [0.6]*3, 'no gain shown')])
@pytest.mark.parametrize('split', ['test', 'valid'])
def test_verdict(split, target, base, said):
    v = Report(split, rows(target), rows(base)).verdict()
    assert said in v and 'over 3 images' in v and f'{np.mean(target)-np.mean(base):+.3f}' in v
    assert ('There is no test set' in v)==(split=='valid')

def test_verdict_without_baseline(): assert Report('test', rows([0.5, 0.7])).verdict()=='Mean Dice 0.600 on 2 images.'

@pytest.mark.parametrize('base', [None, [nan, nan]])
def test_verdict_where_nothing_can_be_scored(base):
    v = Report('test', rows([nan, nan]), base and rows(base)).verdict()
    assert 'nan' not in v and 'no' in v

def test_verdict_counts_only_scored_images(): assert 'over 2 images' in Report('test', rows([0.5, 0.7, nan]), rows([0.4, 0.5, nan])).verdict()

def test_one_image_is_no_proof():
    v = Report('test', rows([0.9]), rows([0.4])).verdict()
    assert 'the target is better' not in v

def test_table():
    t = table_rows(Report('test', rows([0.5, 0.7]), rows([0.4, 0.6])))
    assert t[0]==['', 'teacher', 'target', 'difference'] and [r[0] for r in t[1:]]==['dice', 'jaccard'] and t[1][2].startswith('0.600 [') and t[1][3].startswith('+0.100 [')
    assert table_rows(Report('test', rows([0.5])))[0]==['', 'target']

@pytest.mark.parametrize('n', [1, 2, 3, 4, 6, 20])
def test_cases_are_distinct_and_in_order(n):
    cases = pick_cases(np.linspace(0, 1, n))
    assert len({i for _,i in cases})==len(cases)==min(n, 6)
    assert [k for k,_ in cases]==sorted((k for k,_ in cases), key=('worst', 'typical', 'best').index)
    assert dict(cases)['worst'] in (0, 1) and (n<3 or n-1 in [i for k,i in cases if k=='best'])

def test_no_case_where_nothing_is_scored(): assert pick_cases(np.array([nan, nan]))==[]

# --- the page

@pytest.fixture(scope='module')
def page(tmp_path_factory):
    root = make_discs(tmp_path_factory.mktemp('r')/'d')
    evil = '<script>alert(1)</script>&"x"'.replace('/', '∕')
    for d in ('Images', 'Labels'): (root/d/'test/test0.png').rename(root/d/f'test/{evil}.png')
    before = tree(root)
    a,b = make_model(seed=1), make_model(seed=2)
    ann = annotate(a, unlabeled_files(root), root.parent/'out', ['Gamma'])
    rep = make_report(b, root, a, dict(teacher=HISTORY, target=HISTORY), ann, dict(seed=3, note='<b>bold</b>'))
    f = save_report(rep, root.parent/'out')
    return f.read_text(encoding='utf-8'), rep, evil, tree(root)==before

def test_page_refers_to_nothing_outside(page):
    p = Page(page[0])
    assert p.refs and all(r.startswith('data:image/') for r in p.refs)
    assert not re.search(r'https?:|url\(|@import|<link|<script|<iframe', page[0]) and page[3]

def test_page_escapes_names(page):
    text,_,evil,_ = page
    assert evil not in text and html.escape(evil) in text and '<b>bold</b>' not in text and 'script' not in Page(text).tags

def test_page_shows_everything(page):
    text,rep,evil,_ = page
    p = Page(text)
    for o in (rep.verdict(), '+0.' if rep.difference('dice')[0]>=0 else '-0.', 'image', 'truth', 'teacher', 'target', 'worst', 'Training', 'Pseudo-labels, the least and the most trusted', 'least trusted', 'most trusted', '"seed": 3'): assert o in p.text
    assert p.tags.count('img')==2*4 + 1 + 1 + 2*4
    for r in table_rows(rep)[1:]: assert all(c in p.text for c in r)

def test_page_without_baseline(trained_discs, tiny, tmp_path):
    rep = make_report(tiny, trained_discs)
    p = Page(save_report(rep, tmp_path).read_text(encoding='utf-8'))
    assert 'teacher' not in p.text and p.tags.count('img')==2*3 and tree(tmp_path).keys()=={'report.html', 'report.json'}
    assert rep.baseline is None

def test_json_is_what_the_page_says(trained_discs, tmp_path, tiny):
    rep = make_report(tiny, trained_discs, make_model(seed=4))
    save_report(rep, tmp_path)
    d = json.loads((tmp_path/'report.json').read_text())
    assert d['verdict']==rep.verdict() and d['split']=='test' and d['images']==2
    for k in ('dice', 'jaccard'): assert d['difference'][k]==pytest.approx(rep.difference(k), abs=1e-4)
    assert [o['dice'] for o in d['per_image']['baseline']]==pytest.approx(rep.values('baseline', 'dice'), abs=1e-4)

def test_validation_set_judges_where_there_is_no_test_set(tmp_path, tiny):
    rep = make_report(tiny, make_discs(tmp_path/'d', test=0), make_model(seed=4))
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
    left,right = curves(dict(teacher=HISTORY, target=HISTORY[:2])).axes
    assert [len(o.get_xdata()) for o in left.lines]==[3, 2] and len(right.lines)==4 and left.get_title() and right.get_xlabel()=='epoch'
