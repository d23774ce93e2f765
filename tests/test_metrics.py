"A metric is one function: it is scored for each image, and is a column of the training table"
from types import SimpleNamespace

import numpy as np, pytest, torch
from scipy.ndimage import distance_transform_edt

from semisup_seg.core import IGNORE
from semisup_seg.training import metrics as M
from semisup_seg.training.metrics import confusion_counts, dice, foreground_mean, jaccard, metrics, overlap_metrics, register_metric, score_mask

THREE = 'rest', 'a', 'b'

@pytest.fixture
def registry(monkeypatch):
    "A test's own copy of the registry"
    monkeypatch.setattr(M, 'metrics', dict(metrics))
    return M.metrics

@pytest.fixture
def hausdorff(registry):
    "A registered metric in few lines: lower is better, and it needs the size of a pixel"
    @register_metric(higher_is_better=False, needs_spacing=True)
    def hausdorff(pred, truth, n, spacing):
        def _farthest(a, b): return distance_transform_edt(~b, spacing)[a].max() if a.any() and b.any() else np.nan
        return [max(_farthest(pred==c, truth==c), _farthest(truth==c, pred==c)) for c in range(n)]
    return hausdorff

def batch(pred, truth, n=3):
    "What a fastai metric reads of a Learner: logits whose highest are `pred`, and `truth`"
    return SimpleNamespace(pred=torch.eye(n)[torch.tensor(pred)].movedim(-1, 1), y=torch.tensor(truth))

def masks():
    "A square, and the same two pixels to the right"
    truth = np.zeros((8, 8), np.uint8)
    truth[2:6, 1:5] = 1
    return np.roll(truth, 2, axis=1), truth

@pytest.mark.parametrize('pred,targ,d,j', [([1, 1, 0, 0], [1, 0, 1, 0], 0.5, 1/3), ([1, 1], [1, 1], 1, 1), ([1, 0], [0, 1], 0, 0), ([1, 0, 1], [1, 0, IGNORE], 1, 1)])
def test_scores_by_hand(pred, targ, d, j):
    c = confusion_counts(torch.tensor(pred), torch.tensor(targ), 2)
    assert dice(c)[1].item()==pytest.approx(d) and jaccard(c)[1].item()==pytest.approx(j)

def test_foreground_mean_leaves_out_background_and_nan():
    assert foreground_mean(torch.tensor([[1., 0.5, 0.7], [1., float('nan'), 0.3]])).tolist()==pytest.approx([0.6, 0.3])
    assert foreground_mean(torch.tensor([1., float('nan')])).isnan()

def test_columns_pool_the_counts_of_all_batches():
    columns = overlap_metrics(THREE)
    for m in columns: m.reset()
    for b in (batch([[[0, 1, 1]]], [[[0, 1, 2]]]), batch([[[2, 2, 2]]], [[[2, 2, IGNORE]]])):
        for m in columns: m.accumulate(b)
    got = {m.name: round(m.value, 4) for m in columns}
    assert got==dict(dice=0.7333, jaccard=0.5833, dice_a=0.6667, dice_b=0.8, jaccard_a=0.5, jaccard_b=0.6667) and list(got)[2]=='dice_a'

def test_a_batch_is_counted_once_for_all_columns(monkeypatch):
    calls = []
    monkeypatch.setattr(M, 'confusion_counts', lambda *args: calls.append(args) or confusion_counts(*args))
    columns,one = overlap_metrics(THREE), batch([[[0, 1]]], [[[0, 1]]])
    for _ in range(2):
        for m in columns: m.reset()
        for m in columns: m.accumulate(one)
    assert len(calls)==2 and columns[0].scores.counts[2].tolist()==[1, 1, 0]

def test_any_column_stands_alone():
    *_,last = overlap_metrics(THREE)
    last.reset()
    last.accumulate(batch([[[0, 2]]], [[[0, 2]]]))
    assert (last.name, last.value)==('jaccard_b', 1)

def test_score_mask_gives_means_and_classes_in_order():
    pred,truth = np.uint8([[0, 1, 1, 2, 2, 2]]), np.uint8([[0, 1, 2, 2, 2, IGNORE]])
    got = score_mask(pred, truth, THREE)
    assert list(got)==['dice', 'dice_a', 'dice_b', 'jaccard', 'jaccard_a', 'jaccard_b']
    assert list(got.values())==pytest.approx([11/15, 2/3, 0.8, 7/12, 0.5, 2/3]) and {type(v) for v in got.values()}=={float}
    assert np.isnan(score_mask(truth*0, truth*0, ('rest', 'a'))['dice'])

def test_score_mask_refuses_masks_of_two_shapes():
    with pytest.raises(ValueError, match=r'the mask has \(2, 3\) pixels, the truth \(3, 2\)'): score_mask(np.zeros((2, 3), np.uint8), np.zeros((3, 2), np.uint8), THREE)

def test_a_registered_metric_is_scored_with_its_spacing(registry, hausdorff):
    pred,truth = masks()
    assert score_mask(pred, truth, ('rest', 'a'), (1., 0.5))==dict(dice=0.5, jaccard=1/3, hausdorff=1.)
    assert score_mask(pred, truth, ('rest', 'a'))['hausdorff']==2
    assert {n: (m.higher_is_better, m.needs_spacing, m.from_counts) for n,m in registry.items()}==dict(
        dice=(True, False, True), jaccard=(True, False, True), hausdorff=(False, True, False))

def test_a_registered_metric_is_the_last_column_and_a_mean_over_images(hausdorff):
    pred,truth = (torch.from_numpy(o).long() for o in masks())
    columns = overlap_metrics(THREE)
    assert [m.name for m in columns[6:]]==['hausdorff', 'hausdorff_a', 'hausdorff_b']
    for m in columns: m.reset()
    both = batch(torch.stack([pred, truth]).tolist(), torch.stack([truth, truth]).tolist())
    for m in columns: m.accumulate(both)
    assert [m.value for m in columns[6:8]]==[1, 1] and np.isnan(columns[8].value)

def test_ignored_pixels_are_ignored_in_both_masks(registry):
    @register_metric()
    def area(pred, truth, n): return [(pred==c).sum()/max(1, (truth==c).sum()) for c in range(n)]
    assert score_mask(np.uint8([[1, 1, 1]]), np.uint8([[0, 1, IGNORE]]), ('rest', 'a'))['area']==2

def test_a_metric_gives_one_value_per_class(registry):
    @register_metric()
    def total(pred, truth, n): return [1.]
    with pytest.raises(ValueError, match=r'total: returned values of shape \(1,\); expected one for each of 3 classes'): score_mask(*masks(), THREE)

def test_a_name_is_registered_once(registry):
    def other(pred, truth, n): return [0.]*n
    other.__name__ = 'dice'
    with pytest.raises(ValueError, match="'dice' is registered already"): register_metric()(other)
    assert registry['dice'].func is dice and register_metric(from_counts=True)(dice) is dice
