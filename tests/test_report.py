"Verdicts that claim no more than the intervals allow, tables, and what a report keeps"
import html, json, re, shutil
from pathlib import Path

import numpy as np, pytest
from conftest import make_discs, make_model, score_rows

from semisup_seg.annotation.annotate import annotate
from semisup_seg.annotation.records import Annotations
from semisup_seg.core import DatasetError
from semisup_seg.data.folder import split_files
from semisup_seg.data.images import load_mask
from semisup_seg.evaluation.report import Report, evaluation_files, make_report, read_report, save_report
from semisup_seg.evaluation.scores import bootstrap_interval, score_images, score_masks
from semisup_seg.training.inference import predict

nan = float('nan')

def versus(target, base, split='test'): return Report(split, dict(teacher=score_rows(base), target=score_rows(target)), 'teacher')
def scored(model, path): return score_images(model, evaluation_files(path)[1])
def saved(out): return json.loads((out/'report.json').read_text(encoding='utf-8'))

def test_difference_is_paired():
    a = np.linspace(0.1, 0.9, 12)
    m,lo,hi = versus(a+0.05, a).difference('dice')
    assert m==pytest.approx(0.05) and lo==pytest.approx(0.05) and hi==pytest.approx(0.05)

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

def test_verdict():
    cases = [([0.7, 0.8, 0.9], 'the student is better'), ([0.1, 0.2, 0.3], 'the student is worse'), ([0.6]*3, 'no gain shown'),
        ([0.5, 0.7, 0.6], 'no gain shown'), ([0.5, 0.9, 0.7], 'no gain shown'), ([0.7, 0.3, 0.5], 'no gain shown')]
    for target,result in cases:
        for split in ('test', 'valid'):
            rep = versus(target, [0.6]*3, split)
            m,lo,hi = rep.difference('dice')
            assert m==pytest.approx(np.mean(target)-0.6)
            assert f'Gain over teacher in mean Dice {m:+.3f}, 95 % interval {lo:+.3f} to {hi:+.3f} over 3 images: {result}' in rep.verdict(), target
            assert ('There is no test set' in rep.verdict())==(split=='valid')

def test_verdict_of_no_gain_gives_its_reason():
    assert versus([0.5, 0.7, 0.6], [0.6]*3).verdict().endswith(' over 3 images: no gain shown, the interval includes zero.')

def test_verdict_with_nothing_to_compare(): assert Report('test', dict(teacher=score_rows([0, 0]), target=score_rows([0.5, 0.7]))).verdict()=='Mean Dice 0.600 on 2 images.'

@pytest.mark.parametrize('base', [None, [nan, nan]])
def test_verdict_where_nothing_can_be_scored(base):
    rep = versus([nan, nan], base) if base else Report('test', dict(target=score_rows([nan, nan])))
    assert 'nan' not in str(rep) and rep.verdict().startswith('No image could be scored')

def test_verdict_counts_only_images_that_both_are_scored_on(): assert 'over 2 images' in versus([0.5, 0.7, nan, 0.9], [0.4, 0.5, 0.3, nan]).verdict()

def test_one_image_is_no_proof():
    v = versus([0.9], [0.4]).verdict()
    assert 'the student is better' not in v and 'too few' in v

# --- tables

def test_table_has_a_row_for_each_model():
    rep = Report('test', dict(one=score_rows([0.4, 0.6]), two=score_rows([0.1, 0.3]), vote=score_rows([0.2, nan]), target=score_rows([0.5, 0.7])), 'two')
    t, = rep.tables()
    assert t.rows[0]==['', 'dice', 'jaccard'] and [r[0] for r in t.rows[1:]]==['one', 'two', 'vote (1 images)', 'target', 'gain over two']
    assert [r[1][:7] for r in t.rows[1:]]==['0.500 [', '0.200 [', '0.200 [', '0.600 [', '+0.400 ']
    assert str(t) in str(rep) and rep.verdict() in str(rep) and t._repr_markdown_() in rep._repr_markdown_()
    assert t._repr_html_() in rep._repr_html_() and html.escape(rep.verdict()) in rep._repr_html_()

def test_no_gain_row_with_nothing_to_compare(): assert [r[0] for r in Report('test', dict(a=score_rows([0.4]), target=score_rows([0.5]))).tables()[0].rows]==['', 'a', 'target']

def test_each_name_can_be_the_measure():
    scores = dict(one=score_rows([0.4, 0.6]), two=score_rows([0.1, 0.3]), target=score_rows([0.5, 0.7]))
    assert [Report('test', scores, n).difference('dice')[0] for n in ('one', 'two')]==pytest.approx([0.1, 0.4]) and Report('test', scores, 'One').against=='one'
    for wrong in ('target', 'three'):
        with pytest.raises(ValueError, match=f"Unknown name to compare with '{wrong}'.*Allowed: one, two"): Report('test', scores, wrong)

def test_scores_of_other_images_are_refused():
    other = [dict(r, image='x.png') for r in score_rows([0.5])]
    for scores in (dict(a=score_rows([0.5]), target=other), dict(a=score_rows([0.5]), b=score_rows([0.5, 0.5]), target=score_rows([0.5]))):
        with pytest.raises(ValueError, match='were not scored on the same images'): Report('test', scores)

def test_a_lower_value_is_better_where_the_metric_says_so(area_error, trained_discs, tiny, tmp_path):
    split,pairs = evaluation_files(trained_discs)
    labels = [load_mask(label, tiny.codes) for _,label in pairs]
    empty = score_masks([np.zeros_like(m) for m in labels], pairs, tiny.codes)
    report = make_report(tiny, trained_discs, dict(teacher=empty), 'teacher', scores=score_masks(labels, pairs, tiny.codes), masks=labels)
    column = [row[3] for row in report.tables()[0].rows]
    assert column[0]=='area_error (lower is better)' and column[2]=='0.000 [0.000, 0.000]'
    assert column[3].startswith('-') and column[3].endswith(' better') and report.verdict().endswith('the student is better.')
    save_report(report, tmp_path)
    d = saved(tmp_path)
    assert d['lower_is_better']==['area_error'] and d['difference']['area_error'][0]==pytest.approx(-np.mean([m.sum() for m in labels]))
    worse = Report(split, dict(teacher=report.target, target=empty), 'teacher')
    assert worse.tables()[0].rows[3][3].endswith(' worse') and read_report(tmp_path).lower_is_better==['area_error']

def test_report_keeps_its_direction_where_the_metric_is_not_registered(tmp_path):
    scores = [dict(image='0.png', dice=0.5, distance=2.), dict(image='1.png', dice=0.5, distance=3.)]
    save_report(Report('test', dict(target=scores), page='', lower_is_better=['distance']), tmp_path)
    assert read_report(tmp_path).tables()[0].rows[0][2]=='distance (lower is better)' 

# --- given scores and masks

def test_given_scores_and_masks_run_no_network(trained_discs, tiny, decoded, monkeypatch):
    pairs = evaluation_files(trained_discs)[1]
    masks = [load_mask(label, tiny.codes) for _,label in pairs]
    scores = score_masks(masks, pairs, tiny.codes)
    monkeypatch.setattr('semisup_seg.evaluation.report.predict', None)
    for given in (masks, dict(enumerate(masks))):
        decoded.clear()
        report = make_report(tiny, trained_discs, scores=scores, masks=given)
        assert report.target==scores and report.page.count('data:image/jpeg')==2*3
        assert decoded=={Path(f): 1 for pair in pairs for f in pair}, 'an image or a label is decoded again'

def test_only_the_drawn_images_are_predicted_where_scores_are_given(tmp_path, tiny, monkeypatch):
    root = make_discs(tmp_path/'d', test=9)
    pairs = evaluation_files(root)[1]
    predicted = []
    monkeypatch.setattr('semisup_seg.evaluation.report.predict', lambda model, files, **kw: predicted.extend(files) or predict(model, files, **kw))
    given = make_report(tiny, root, scores=[dict(r, image=i.name) for r,(i,_) in zip(score_rows(np.linspace(0, 1, 9)), pairs)])
    assert len(predicted)==6 and len(set(predicted))==6 and given.page.count('data:image/jpeg')==6*3
    predicted.clear()
    make_report(tiny, root)
    assert sorted(predicted)==sorted(i for i,_ in pairs), 'each image is predicted once'

def test_given_scores_must_be_of_the_images_of_the_folder(trained_discs, tiny):
    pairs = evaluation_files(trained_discs)[1]
    rows = [dict(r, image=i.name) for r,(i,_) in zip(score_rows([0.4, 0.6]), pairs)]
    for wrong in (rows[:1], rows[::-1]):
        with pytest.raises(ValueError, match='scores: not those of the 2 images of Images/test'): make_report(tiny, trained_discs, scores=wrong)

def test_scores_of_the_vote_are_not_computed_again(voted, tiny, monkeypatch):
    root,vote = voted
    pairs = evaluation_files(root)[1]
    given = [dict(r, image=i.name) for r,(i,_) in zip(score_rows([0.1, 0.2, 0.3]), pairs)]
    masks = [load_mask(label, tiny.codes) for _,label in pairs]
    scores = score_masks(masks, pairs, tiny.codes)
    monkeypatch.setattr('semisup_seg.evaluation.report.score_masks', None)
    report = make_report(tiny, root, dict(vote=given), 'vote', vote, scores=scores, masks=masks)
    assert report.scores['vote']==given and report.page.count('data:image/jpeg')==3*4

# --- files

def test_json_holds_it_all(full_report):
    rep,d = full_report.report, saved(full_report.out)
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

def test_report_comes_back(full_report):
    rep,back = full_report.report, read_report(full_report.out)
    assert (back.split, back.against, list(back.scores), back.settings)==(rep.split, rep.against, list(rep.scores), rep.settings)
    assert back.verdict()==rep.verdict()

def test_a_result_shows_its_report_and_where_it_lies(full_report):
    from semisup_seg.distillation.distill import Result
    res = Result(None, full_report.report, None, full_report.out)
    verdict,page = full_report.report.verdict(), str(full_report.out/'report.html')
    for shown in (str(res), res._repr_markdown_(), html.unescape(res._repr_html_())): assert verdict in shown and page in shown
    assert full_report.report._repr_html_() in res._repr_html_() and '<i>' not in res._repr_html_() and 'teacher 1 &lt;i&gt;' in res._repr_html_()

# --- the vote

@pytest.fixture
def voted(tmp_path, tiny):
    "A data set, and a vote of two teachers on its test images"
    root = make_discs(tmp_path/'d', test=3)
    return root, annotate([make_model(seed=4), make_model(seed=5)], [i for i,_ in split_files(root, 'test')], tmp_path/'vote')

def test_vote_is_scored_by_its_masks(voted, tiny):
    root,vote = voted
    pairs = split_files(root, 'test')
    rep = make_report(tiny, root, vote=vote, against='vote')
    assert rep.scores['vote']==score_masks([load_mask(vote.pairs[i], tiny.codes) for i,_ in pairs], pairs, tiny.codes) and rep.against=='vote' and list(rep.scores)==['vote', 'target']

@pytest.mark.parametrize('spoil', [lambda f: f.unlink(), lambda f: f.write_bytes(b'no')])
def test_masks_that_cannot_be_read_are_left_out(voted, tiny, spoil):
    root,vote = voted
    whole = make_report(tiny, root, vote=vote, against='vote')
    spoil(vote.out/vote.rows[1].mask)
    rep = make_report(tiny, root, vote=vote, against='vote')
    assert np.isnan(rep.scores['vote'][1]['dice']) and [rep.scores['vote'][i] for i in (0, 2)]==[whole.scores['vote'][i] for i in (0, 2)]
    assert 'over 2 images' in rep.verdict() and 'vote (2 images)' in rep.page and '<span>–</span>' in rep.page and rep.page.count('data:image/jpeg')==3*4-1 and 'nan' not in re.sub('base64,[^"]*', '', rep.page)

def test_vote_in_another_order_of_a_moved_folder(voted, tiny, tmp_path):
    root,vote = voted
    want = make_report(tiny, root, vote=vote).scores['vote']
    shutil.move(root, tmp_path/'moved')
    assert make_report(tiny, tmp_path/'moved', vote=Annotations(vote.out, vote.rows[::-1], [])).scores['vote']==want

def test_others_must_not_take_the_targets_name(trained_discs, tiny):
    with pytest.raises(ValueError, match="the name 'target' is reserved"): make_report(tiny, trained_discs, dict(target=scored(tiny, trained_discs)))

def test_validation_set_scores_where_there_is_no_test_set(tmp_path, tiny):
    rep = make_report(tiny, make_discs(tmp_path/'d', test=0))
    assert rep.split=='valid' and len(rep.target)==2 and 'validation set' in rep.page

def test_nothing_to_judge_on(tmp_path, tiny):
    with pytest.raises(DatasetError, match='neither Images/test nor Images/valid'): make_report(tiny, tmp_path)
