"A vote is checked before it begins, is what one gets by hand, and writes nothing"
from dataclasses import replace

import numpy as np, pytest, torch
from conftest import Bright, make_model, save, tree
from fastai.torch_core import default_device
from PIL import Image

from semisup_seg.annotation.annotate import annotate, validation_dice
from semisup_seg.annotation.batch import annotate_batch, pending_batches
from semisup_seg.annotation.vote_setup import prepare_vote
from semisup_seg.annotation.journal import ImageJob
from semisup_seg.annotation.records import merge_annotations
from semisup_seg.annotation.views import get_views
from semisup_seg.annotation.voting import vote
from semisup_seg.core import DatasetError
from semisup_seg.data.folder import split_files, unlabeled_files
from semisup_seg.data.images import load_image, load_mask
from semisup_seg.data.loaders import resize_image, seg_dls
from semisup_seg.training.inference import Predictor, load_model, predict, save_model
from semisup_seg.training.learner import seg_learner
from semisup_seg.training.metrics import score_mask

@pytest.fixture
def files(trained_discs): return unlabeled_files(trained_discs)

@pytest.fixture
def pairs(trained_discs): return split_files(trained_discs, 'valid') + split_files(trained_discs, 'train')

@pytest.fixture(scope='module')
def other(): return make_model(seed=1)

# --- prepare_vote

def test_teachers_with_different_classes(tiny):
    for codes,n in (('rest,0\nblob,255', 2), ('rest,0\ndisc,254', 2), ('rest,0\na,1\nb,2', 3)):
        with pytest.raises(ValueError, match='teachers: .*must be the same'): prepare_vote([tiny, make_model(codes, n)])

def test_a_vote_that_cannot_work_is_refused(tiny):
    for bad,message in ((dict(teachers=[]), 'teachers: none'), (dict(views=['Rotate']), 'Unknown view'), (dict(size=(4, 4)), 'size is'),
        (dict(views=['Gamma', 'gamma']), 'more than once'), (dict(vote='mode'), 'Unknown vote'), (dict(weights=[1, 1]), 'weights'),
        (dict(weights=[-1]), 'weights'), (dict(weights=[0]), 'weights'), (dict(weights=[float('nan')]), 'weights'),
        (dict(teachers=['nowhere.pth']), 'nowhere.pth: no such file')):
        with pytest.raises(ValueError, match=message): prepare_vote(**dict(dict(teachers=tiny), **bad))

def test_networks_need_a_smallest_size_in_every_view():
    m = make_model(name='PAN', size=(128, 128))
    with pytest.raises(ValueError, match='64 pixels at the smallest view; PAN needs'): prepare_vote(m, size=(64, 64))
    with pytest.raises(ValueError, match='96 pixels at the smallest view; PAN needs'): prepare_vote(m, ['Scale 0.75'])
    assert prepare_vote(m, ['Scale 1.25']).size==(128, 128)

def test_what_a_mask_depends_on(tiny, other, tmp_path):
    asked = [prepare_vote(**{**dict(teachers=tiny), **kw}).asked() for kw in ({}, dict(teachers=other), dict(views='H Flip'), dict(size=(32, 64)),
        dict(vote='majority'), dict(weights=[2]), dict(window=64))]
    assert all(asked.count(o)==1 for o in asked)
    f = save_model(tiny, tmp_path/'m.pth')
    assert asked[0]==prepare_vote([str(f)], bs=3).asked()

# --- the vote

def views_vote(nets, arrays, views):
    "The vote of `nets` under `views`, through a `Predictor`"
    predictor = Predictor(arrays[0].shape[:2])
    return vote(p for _,_,p in predictor.predict_views(nets, arrays, get_views(views)))

def test_vote_is_the_mean_of_softmax_undone(tiny, other, files):
    arrays = [resize_image(load_image(f), (32, 48)) for f in files]
    x = torch.from_numpy(np.stack(arrays)).movedim(-1, 1)/255
    with torch.no_grad(): p = [m(x).softmax(1) for m in (tiny, other)] + [m(x.flip(-1)).softmax(1).flip(-1) for m in (tiny, other)]
    mean,agree = views_vote([tiny, other], arrays, 'H Flip')
    want = sum(p)/4
    assert torch.allclose(mean, want, atol=1e-5)
    for i,a in enumerate(agree):
        won = want[i].argmax(0)==1
        voters = [q[i].argmax(0)==1 for q in p]
        scores = [(2*(o&won).sum()/(o.sum()+won.sum())).nan_to_num(1).item() for o in voters]
        assert a.item()==pytest.approx(np.mean(scores), abs=1e-5)

def test_same_as_ttach(tiny):
    import ttach
    arrays = [np.random.default_rng(i).integers(0, 256, (32, 64, 3)).astype(np.uint8) for i in range(4)]
    flips = ttach.Compose([ttach.HorizontalFlip(), ttach.VerticalFlip()])
    theirs = ttach.SegmentationTTAWrapper(torch.nn.Sequential(tiny, torch.nn.Softmax(1)), flips)
    with torch.no_grad(): want = theirs(torch.from_numpy(np.stack(arrays)).movedim(-1, 1)/255)
    got,_ = views_vote([tiny], arrays, ['H Flip', 'V Flip', 'H+V Flip'])
    assert (got-want).abs().max()<1e-5

# --- annotate_batch

def test_nothing_is_written(monkeypatch, tiny, files, pairs, tmp_path):
    monkeypatch.chdir(tmp_path)
    before = tree(files[0].parent.parent)
    got = annotate_batch(prepare_vote(tiny, ['Gamma']), [*files, pairs[0][0]], dict(pairs), soft=True)
    assert len(got)==6 and tree(tmp_path)=={} and tree(files[0].parent.parent)==before

def check_same(setup, files, ann):
    "`annotate_batch` gives for `files` what is in `ann`, bit for bit"
    got = annotate_batch(setup, files, soft=True)
    assert [o.job.image for o in got]==files
    for o,r in zip(got, ann.rows):
        assert replace(o.record, mask=r.mask)==r and o.record.stamp==r.stamp
        if r.error: assert o.mask is o.soft is o.confidence is None
        else:
            mask = ann.out/r.mask
            assert o.mask.shape==load_image(r.image).shape[:2]
            assert (load_mask(mask)==setup.codes.decode(o.mask)).all()
            assert (np.load(ann.out/f'soft/{mask.stem}.npy')==o.soft).all()
            assert (np.array(Image.open(ann.out/'confidence'/mask.name))==np.uint8(o.confidence*255+0.5)).all()

def test_masks_are_those_of_annotate_bit_for_bit(tiny, other, files, tmp_path):
    broken = tmp_path/'in/broken.png'
    save(broken, np.zeros((9, 9), np.uint8)).write_bytes(b'no')
    files = [files[0], broken, *files[1:], tmp_path/'in/gone.png']
    for i,kw in enumerate((dict(teachers=[tiny, other], views=['H Flip', 'Scale 1.25'], bs=2, weights=[1, 0.3]), dict(teachers=tiny, bs=64),
        dict(teachers=[tiny, other], views='V Flip', window=40, bs=3), dict(teachers=[other, tiny], vote='majority', bs=1))):
        ann = annotate(files=files[:-1], out=tmp_path/str(i), confidence=True, soft=True, **kw)
        check_same(prepare_vote(**kw), files[:-1], ann)
    assert 'gone.png: no such file' in annotate_batch(prepare_vote(tiny), files[-1:])[0].record.error

def test_batches_keep_their_members():
    jobs = [ImageJob(f'{i}.png') for i in range(5)]
    assert pending_batches(jobs, 2)==[(0, jobs[:2]), (2, jobs[2:4]), (4, jobs[4:])]
    assert pending_batches(jobs, 2, {jobs[0].key, jobs[4].key, jobs[2].key})==[(0, jobs[:2]), (2, jobs[2:4])]
    assert pending_batches(jobs, 8, {j.key for j in jobs})==[]

def test_bad_arguments_of_a_batch(tiny, files, pairs):
    for kw,message in ((dict(bs=0), 'bs is 0'), (dict(window=3), 'window is 3')):
        with pytest.raises(ValueError, match=message): annotate_batch(prepare_vote(tiny, **kw), files)
    with pytest.raises(DatasetError, match='its image'): annotate_batch(prepare_vote(tiny), files[:1], {files[0]: pairs[0][1]})

def test_records_of_two_workers_are_one_table(tiny, other, files, pairs, tmp_path):
    files,valid = files[:4], pairs[:4]
    ann = annotate([tiny, other], files, tmp_path/'one', ['H Flip'], bs=2, valid=valid)
    records = []
    for part,held in ((files[:2], valid[:2]), (files[2:], valid[2:])):
        setup = prepare_vote([tiny, other], ['H Flip'], bs=2)
        for o in annotate_batch(setup, part):
            o.record.mask = f'annotations/{o.job.image.stem}.png'
            save(tmp_path/'two'/o.record.mask, setup.codes.decode(o.mask))
            records.append(o.record)
        records += [o.record for o in annotate_batch(setup, [i for i,_ in held], dict(held))]
    merged = merge_annotations(tmp_path/'two', records)
    assert (merged.rows, merged.checked)==(ann.rows, ann.checked)
    for name in ('annotations.csv', 'calibration.csv'): assert (tmp_path/'one'/name).read_bytes()==(tmp_path/'two'/name).read_bytes()
    for a,b in zip(ann.pairs.values(), merged.pairs.values()): assert (load_mask(a)==load_mask(b)).all()

# --- scores where the truth is known

def test_each_teacher_is_scored_with_each_view_in_the_same_pass(tiny, other, files, pairs, tmp_path):
    teachers,views = [tiny, other], ['V Flip', 'Rotate 90', 'Gamma']
    want = [{v: validation_dice([t], pairs, views=[] if v=='image' else v)[0] for v in ('image', *views)} for t in teachers]
    assert len({round(d, 3) for w in want for d in w.values()})>4
    for turn in (True, False):
        checked = annotate(teachers, files[:1], tmp_path/str(turn), views, valid=pairs, together=turn).checked
        for k,w in enumerate(want):
            got = {v: np.mean([r.voter_scores[k][v]['dice'] for r in checked]) for v in w}
            assert got==pytest.approx(w, abs=1e-4) and list(checked[0].voter_scores[k])==['image', *views]

def test_scores_of_labelled_images(tiny, other, files, pairs, tmp_path):
    images,codes = [i for i,_ in pairs], tiny.codes
    ann = annotate([tiny, other], [*files[:1], *images], tmp_path, ['H Flip'], labels=dict(pairs))
    assert ann.rows[0].scores is ann.rows[0].voter_scores is ann.rows[0].dice is None and not ann.checked
    for r,(i,l) in zip(ann.rows[1:], pairs):
        truth = load_mask(l, codes)
        assert r.scores==score_mask(load_mask(tmp_path/r.mask, codes), truth, codes.names) and r.dice==round(r.scores['dice'], 5)
        assert r.label==str(l) and r.predicted_dice is None and r.used
        for s,t in zip(r.voter_scores, (tiny, other), strict=True):
            assert list(s)==['image'] and s['image']['dice']==pytest.approx(score_mask(predict(t, i), truth, codes.names)['dice'], abs=2e-3)
    batch = annotate_batch(prepare_vote([tiny, other], ['H Flip']), list(map(str, images)), {str(i): str(l) for i,l in pairs})
    assert [o.record.scores for o in batch]==[pytest.approx(r.scores, abs=2e-3) for r in ann.rows[1:]]

def test_teachers_vote_one_after_another_on_their_own_device(files, tmp_path):
    "On the GPU where there is one: the votes that wait on disk are added there"
    teachers = [Bright(w).to(default_device()) for w in (5., 1.)]
    together,in_turn = (annotate(teachers, files, tmp_path/str(t), ['H Flip'], together=t) for t in (True, False))
    for a,b in zip(together.pairs.values(), in_turn.pairs.values(), strict=True): assert (load_mask(a)==load_mask(b)).all()

def test_strong_teachers_train_and_vote_for_a_small_student(trained_discs, tmp_path):
    dls,files = seg_dls(trained_discs, size=(64, 64), bs=2), []
    for name,backbone in (('DPT', 'vit_tiny_patch16_dinov3_qkvb'), ('UPerNet', 'convnext_atto'), ('Linknet', 'test_resnet')):
        learn = seg_learner(dls, name, backbone, pretrained=False)
        x,y = dls.one_batch()
        learn.loss_func(learn.model.train()(x), y).backward()
        assert all(p.grad.isfinite().all() for p in learn.model.parameters())
        files.append(save_model(learn, tmp_path/f'base_{name}_{backbone}.pth'))
        assert load_model(files[-1]).config==learn.model.config
    ann = annotate(files, unlabeled_files(trained_discs)[:2], tmp_path/'out', ['H Flip'], together=False)
    assert len(ann.pairs)==2 and all(0<r.agreement<=1 for r in ann.rows)
