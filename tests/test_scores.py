"Scores of masks and of models, image by image, and intervals"
import numpy as np, pytest

from semisup_seg.data.folder import split_files
from semisup_seg.data.images import load_mask
from semisup_seg.evaluation.scores import bootstrap_interval, score_images, score_masks
from semisup_seg.training.inference import predict
from semisup_seg.training.metrics import score_mask

nan = float('nan')

def test_interval_holds_the_mean():
    for v in ([0.5], [0.2, 0.4], [0.1, 0.5, 0.9, 0.3], [0.7]*5):
        m,lo,hi = bootstrap_interval(v)
        assert m==pytest.approx(np.mean(v)) and min(v)-1e-9<=lo<=m+1e-9 and m-1e-9<=hi<=max(v)+1e-9, v
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
    assert bootstrap_interval([0.2, nan, 0.4])==bootstrap_interval([0.2, 0.4])
    assert np.isnan(bootstrap_interval([nan, nan])).all() and np.isnan(bootstrap_interval([])).all()

def test_scores_per_image(trained_discs, tiny):
    pairs = split_files(trained_discs, 'test')
    for r,(i,l) in zip(score_images(tiny, pairs), pairs):
        p,t = predict(tiny, i)==1, load_mask(l, tiny.codes)==1
        both = (p&t).sum()
        assert r==dict(image=i.name, dice=pytest.approx(2*both/(p.sum()+t.sum())), jaccard=pytest.approx(both/(p|t).sum()))

def test_masks_are_scored_as_a_model_is(trained_discs, tiny):
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
            assert len(read)==i  # the mask before has been scored
            yield load_mask(pairs[i][1], tiny.codes)
    pairs = split_files(trained_discs, 'test')
    monkeypatch.setattr('semisup_seg.evaluation.scores.score_mask', lambda *a, real=score_mask: read.append(1) or real(*a))
    assert len(score_masks(masks(), pairs, tiny.codes))==2

def test_a_registered_metric_is_scored_with_its_spacing(area_error, trained_discs, tiny):
    pairs = split_files(trained_discs, 'test')[:1]
    truth = load_mask(pairs[0][1], tiny.codes)
    in_pixels,in_mm = (score_masks([np.zeros_like(truth)], pairs, tiny.codes, s)[0] for s in (None, (0.5, 2.)))
    assert list(in_pixels)==['image', 'dice', 'jaccard', 'area_error'] and in_pixels['area_error']==truth.sum()==in_mm['area_error']
    assert score_masks([np.zeros_like(truth)], pairs, tiny.codes, (0.5, 0.5))[0]['area_error']==truth.sum()/4
