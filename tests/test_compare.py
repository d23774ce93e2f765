"Tables of several runs: paired gains, how they were made, and what cannot be compared"
import numpy as np, pytest
from conftest import score_rows

from semisup_seg.data.images import load_mask
from semisup_seg.evaluation.compare import compare_runs
from semisup_seg.evaluation.report import Report, evaluation_files, save_report
from semisup_seg.evaluation.scores import score_masks

nan = float('nan')

MADE = dict(bases=[['U-Net', 'resnet18'], ['CGNet', None]], target=['MANet', 'resnet18'], views=['H Flip', 'Gamma'], recipe='soft', size=[64, 96], seed=5, data='abc',
    training=dict(base=dict(steps=40, seconds=7), target=dict(steps=50, seconds=8.5)))

@pytest.fixture
def finished(tmp_path):
    "Leave a run in the folder `name`, with the target's scores and the changed settings"
    def _finished(name, values, split='test', images=None, **made):
        scores = score_rows(values) if images is None else [dict(r, image=i) for r,i in zip(score_rows(values), images)]
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

def test_comparison_names_the_method_where_there_is_no_recipe(finished):
    online = finished('a', [0.5, 0.7], bases=[], views=[], recipe=None, method='Mean Teacher')
    rows = compare_runs(online, finished('b', [0.5, 0.7], method='distillation')).tables[1].rows
    assert rows[1]==['a', 'no teacher → MANet / resnet18', '–', 'Mean Teacher', '64×96', '5'] and rows[2][3]=='soft'

def test_each_metric_is_compared_in_its_direction(area_error, trained_discs, tiny, tmp_path):
    split,pairs = evaluation_files(trained_discs)
    labels = [load_mask(label, tiny.codes) for _,label in pairs]
    for name,masks in dict(empty=[np.zeros_like(m) for m in labels], true=labels).items():
        save_report(Report(split, dict(target=score_masks(masks, pairs, tiny.codes)), page=''), tmp_path/name)
    c = compare_runs(tmp_path/'empty', tmp_path/'true')
    head,_,true = c.tables[1].rows
    assert head[:3]==['run', 'mean area_error (lower is better)', 'gain over empty'] and true[2].startswith('-') and true[3]=='better'
    assert c.gains('true', 'area_error').tolist()==[-float(m.sum()) for m in labels] and c.tables[0].rows[2][3]=='better' and len(c.tables)==3
    assert compare_runs(tmp_path/'true', tmp_path/'empty').tables[1].rows[2][3]=='worse'

def test_reports_without_settings_are_compared(tmp_path):
    for n in 'ab': save_report(Report('test', dict(target=score_rows([0.5, 0.7])), page=''), tmp_path/n)
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

DAMAGED = ['', '{', '[]', '5', '{}', '{"split": "test", "target": {}, "per_image": {"target": [], "baseline": null}}',
    '{"split": "test", "against": null, "settings": null, "pseudo": null, "per_image": {}}', '{"split": "test", "against": null, "settings": 5, "pseudo": null, "per_image": {"target": []}}',
    '{"split": "test", "against": null, "settings": null, "pseudo": null, "per_image": {"target": [{"image": "a"}]}}', '{"split": "test", "against": null, "settings": null, "pseudo": null, "per_image": {"target": [{"image": "a", "dice": "b"}]}}']

def test_damaged_report(finished):
    a,b = finished('a', [0.5, 0.7]), finished('b', [0.5, 0.7])
    for text in DAMAGED:
        (b/'report.json').write_text(text)
        with pytest.raises(ValueError, match='b.report.json: is not a report of this package'): compare_runs(a, b)
