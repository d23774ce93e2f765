"A folder of masks votes like a teacher, is trusted as far as labels say, and is checked before anything is predicted"
import os, shutil

import numpy as np, pytest
from conftest import Bright, counted, disc, make_model, pictures, save, tree
from PIL import Image

from semisup_seg.annotation.annotate import annotate, calibrate_voters, validation_dice
from semisup_seg.annotation.batch import annotate_batch
from semisup_seg.annotation.vote_setup import MaskFolder, prepare_vote
from semisup_seg.annotation.voting import class_likelihoods, cohen_kappa, vote_rules
from semisup_seg.data.images import load_image, load_mask, parse_codes
from semisup_seg.training.metrics import score_mask

CODES = parse_codes('rest,7\ndisc,200')  # those of `Bright`

def masks(folder, truth, draw=lambda d, rng: d, codes=CODES, suffix='.png'):
    "A folder with a mask of each image, made from its disc by `draw`"
    rng = np.random.default_rng(3)
    for f,d in truth.items(): save(folder/f'{f.stem}{suffix}', codes.decode(draw(d, rng).astype(np.uint8)))
    return folder

def noise(d, rng): return rng.random(d.shape)<0.5
def somewhere(d, rng): return disc(*d.shape, rng)
def nothing(d, rng): return np.zeros_like(d)

@pytest.fixture
def truth(tmp_path): return pictures(tmp_path/'in', 8)

@pytest.fixture
def pairs(tmp_path, truth): return [(f, save(tmp_path/f'labels/{f.name}', CODES.decode(d.astype(np.uint8)))) for f,d in truth.items()]

class Dim(Bright):
    "A teacher that sees half of the dark background as disc: it is `w` sure, and wrong there"
    def forward(self, x):
        logits = super().forward(x)
        logits[:, 1, :, ::2] += 2*abs(float(self.w))
        return logits

def dices(ann): return [r.dice for r in ann.rows]
def mean_dice(ann): return np.mean(dices(ann))

# --- the vote

def test_a_folder_votes_as_much_as_a_teacher_with_all_its_views(tmp_path, truth):
    "Beside one teacher under three views the vote is the mean of its vote and the mask; `soft` holds it"
    folder = masks(tmp_path/'sam', truth, somewhere)
    views = ['H Flip', 'Gamma', 'Rotate 90']
    m = Bright(5.)
    for vote in vote_rules:
        alone,both = (annotate(t, list(truth), tmp_path/f'{vote}{len(t)}', views, vote='mean' if len(t)==1 else vote, soft=True) for t in ([m], [m, folder]))
        for f in truth:
            a,b = (np.load(o.out/f'soft/{f.stem}.npy')/255 for o in (alone, both))
            mask = Image.fromarray(np.float32(load_mask(folder/f.name, CODES)))
            share = np.array(mask.resize((64, 48), Image.Resampling.BOX))
            if vote=='mean': assert abs(b[1]-(a[1]+share)/2).mean()<0.01, f
            if vote=='geometric': assert ((b[1]>0.5)==(share>0.5)).mean()>0.9, f  # a mask is certain, and rules the other class out

def test_a_weight_counts_for_a_folder_too(tmp_path, truth):
    folder = masks(tmp_path/'sam', truth, somewhere)
    def vote(weights): return [load_mask(m, CODES) for m in annotate([Bright(), folder], list(truth), tmp_path/str(weights), weights=weights).pairs.values()]
    for got,d in zip(vote([1, 0.1]), truth.values()): assert (got==d).mean()>0.96
    for got,f in zip(vote([0.1, 1]), truth): assert (got==load_mask(folder/f.name, CODES)).mean()>0.96

def test_folders_alone_can_vote(tmp_path, truth):
    "Three folders, two of which agree: without a network, classes and size are named"
    folders = [MaskFolder(masks(tmp_path/n, truth, draw), CODES) for n,draw in (('a', somewhere), ('b', lambda d, rng: d), ('c', lambda d, rng: d))]
    ann = annotate(folders, list(truth), tmp_path/'out', size=(64, 64))
    for mask,d in zip(ann.pairs.values(), truth.values()): assert (load_mask(mask, CODES)==d).mean()>0.96

def test_masks_may_have_values_and_formats_of_their_own(tmp_path, truth):
    own = parse_codes('rest,0\ndisc,1')
    folder = MaskFolder(masks(tmp_path/'nnunet', truth, codes=own, suffix='.tif'), own)
    (tmp_path/'nnunet/plans.json').write_text('{}')
    (tmp_path/'nnunet/p0.json').write_text('{}')
    ann = annotate([Bright(-60.), folder], list(truth), tmp_path/'out', weights=[0.1, 1])
    for mask,d in zip(ann.pairs.values(), truth.values()): assert (load_mask(mask, CODES)==d).mean()>0.96  # in the values of the data set

@pytest.mark.parametrize('views', [[], ['H Flip', 'Rotate 90']])
def test_together_in_turn_and_in_a_batch_the_votes_are_the_same(tmp_path, truth, pairs, views):
    a,b = (masks(tmp_path/n, truth, draw) for n,draw in (('a', somewhere), ('b', lambda d, rng: np.roll(d, 2, 1))))
    for i,teachers in enumerate(([a, Bright(5.), b], [Bright(5.), a], [Bright(5.), a, Bright(1.)])):
        args = dict(files=list(truth)[3:], views=views, valid=pairs[:3], labels=dict(pairs[3:]), bs=2, soft=True)
        one,two = (annotate(teachers, out=tmp_path/f'{i}{t}', together=t, **args) for t in (True, False))
        voters,weights = calibrate_voters(teachers, pairs[:3], bs=2)
        batch = annotate_batch(prepare_vote(voters, views, bs=2, weights=weights), list(truth)[3:], dict(pairs[3:]), soft=True)
        for r,s,o in zip(one.rows, two.rows, batch):
            assert r.voter_scores==s.voter_scores==o.record.voter_scores and len(r.voter_scores)==len(teachers)
            assert (load_mask(one.out/r.mask, CODES)==o.mask).all() and o.record.stamp==r.stamp==s.stamp
            assert r.confidence==pytest.approx(s.confidence, abs=1e-4) and (load_mask(one.out/r.mask)==load_mask(two.out/s.mask)).mean()>0.999

def test_large_images_are_voted_on_in_windows(tmp_path):
    truth = {save(tmp_path/'in/big.png', np.uint8(d*200+20)): d for d in [disc(150, 200, np.random.default_rng(0))]}
    folder = masks(tmp_path/'sam', truth)
    ann = annotate([Bright(-60.), folder], list(truth), tmp_path/'out', window=64, weights=[0.1, 1])
    assert (load_mask(*ann.pairs.values(), CODES)==truth[tmp_path/'in/big.png']).mean()>0.98

# --- what a voter is worth

def test_a_folder_is_scored_alone_like_a_teacher(tmp_path, truth, pairs):
    folder = masks(tmp_path/'sam', truth, somewhere)
    ann = annotate([Bright(), folder], list(truth)[:4], tmp_path/'out', ['H Flip'], valid=pairs[4:], labels=dict(pairs[:4]))
    for r in ann.rows+ann.checked:
        mask = load_mask(folder/f'{os.path.basename(r.image)}', CODES)
        want = score_mask(mask, load_mask(r.label, CODES), CODES.names)
        assert r.voter_scores[1]==dict(image=want) and r.voter_scores[0]['image']['dice']>0.9
    teacher,sam = validation_dice([Bright(), folder], pairs)
    assert teacher>0.9 and sam==pytest.approx(np.mean([r.voter_scores[1]['image']['dice'] for r in ann.rows+ann.checked]))

# --- calibration

def test_likelihoods_and_kappa_by_hand():
    n = np.array([[80, 5], [10, 15]])  # by class of the voter, by true class
    rates = np.array([[81/92, 6/22], [11/92, 16/22]])
    assert np.allclose(class_likelihoods(n), rates/rates.sum(1, keepdims=True))
    chance = (85*90+25*20)/110**2
    assert cohen_kappa(n)==pytest.approx((95/110-chance)/(1-chance))
    assert cohen_kappa(np.diag([9, 0]))==0 and cohen_kappa(np.diag([9, 1]))==1 and cohen_kappa(np.array([[0, 1], [1, 0]]))==-1

def test_a_class_that_no_label_shows_is_neither_trusted_nor_excluded():
    likely = class_likelihoods(np.array([[90, 0, 0], [10, 0, 0], [0, 0, 0]]))
    assert np.isfinite(likely).all() and np.allclose(likely.sum(1), 1) and (likely[2, 1:]>likely[2, 0]).all()

def test_a_perfect_folder_beats_bad_teachers(tmp_path, truth, pairs):
    "Two teachers that are sure and wrong outvote it while all count the same"
    folder = masks(tmp_path/'sam', truth)
    teachers = [Dim(60.), Dim(50.), folder]
    for vote in vote_rules:
        plain = annotate(teachers, list(truth)[4:], tmp_path/f'plain{vote}', ['V Flip'], vote=vote, labels=dict(pairs[4:]))
        ann = annotate(teachers, list(truth)[4:], tmp_path/f'cal{vote}', ['V Flip'], vote=vote, valid=pairs[:4], labels=dict(pairs[4:]))
        assert mean_dice(ann)>0.9>0.8>mean_dice(plain), (vote, mean_dice(plain), mean_dice(ann))

@pytest.mark.parametrize('draw', [noise, somewhere, nothing, lambda d, rng: ~d])
def test_a_folder_without_use_does_no_harm(tmp_path, truth, pairs, draw):
    folder = masks(tmp_path/'bad', truth, draw)
    m,files = Bright(5.), list(truth)[4:]
    args = dict(files=files, labels=dict(pairs[4:]))
    alone = annotate(m, out=tmp_path/'alone', **args)
    for vote in vote_rules:
        ann = annotate([m, folder], out=tmp_path/vote, valid=pairs[:4], vote=vote, **args)
        assert mean_dice(ann)>mean_dice(alone)-0.02, vote
    assert mean_dice(annotate([m, folder], out=tmp_path/'plain', **args))<mean_dice(alone)-0.1  # not calibrated

def test_labels_of_annotated_images_do_not_calibrate(tmp_path, truth, pairs):
    folder = masks(tmp_path/'sam', truth, somewhere)
    a,b = (annotate([Bright(5.), folder], list(truth), tmp_path/str(i), labels=labels) for i,labels in enumerate((dict(pairs), {})))
    for x,y in zip(a.pairs.values(), b.pairs.values()): assert (load_mask(x)==load_mask(y)).all()

def test_weights_of_the_caller_stay(tmp_path, truth, pairs):
    folder = masks(tmp_path/'sam', truth)
    def vote(**kw): return annotate([Bright(-60.), folder], list(truth)[4:], tmp_path/'out', valid=pairs[:4], labels=dict(pairs[4:]), **kw)
    assert mean_dice(vote(weights=[1, 0.1]))<0.5<0.9<mean_dice(vote())

def test_what_is_calibrated_can_be_used_elsewhere(tmp_path, truth, pairs):
    "A vote on test images takes over voters and weights; nothing is learned from their labels"
    folder = masks(tmp_path/'bad', truth, noise)
    voters,weights = calibrate_voters([Bright(5.), folder], pairs[:4])
    assert weights[0]>0.8 and weights[1]==pytest.approx(0, abs=0.05) and voters[1].counts.sum()==sum(d.size for d in list(truth.values())[:4])
    files = list(truth)[4:]
    a = annotate(voters, files, tmp_path/'a', weights=weights, labels=dict(pairs[4:]))
    b = annotate([Bright(5.), folder], files, tmp_path/'b', valid=pairs[:4], labels=dict(pairs[4:]))
    assert [r.scores for r in a.rows]==[r.scores for r in b.rows] and mean_dice(a)>0.9

def test_where_nobody_is_better_than_chance_all_count_the_same(tmp_path, truth, pairs, capsys):
    voters = [MaskFolder(masks(tmp_path/n, truth, nothing), CODES) for n in 'ab']
    assert calibrate_voters(voters, pairs, (64, 64))[1]==[1, 1] and 'no voter agrees with the labels better than chance' in capsys.readouterr().out

def test_an_unreadable_image_does_not_stop_the_calibration(tmp_path, truth, pairs):
    folder = masks(tmp_path/'sam', truth)
    bad = tmp_path/'in/p9.png'
    bad.write_bytes(b'broken')
    shutil.copy(folder/'p0.png', folder/'p9.png')
    ann = annotate([Bright(), folder], [bad, *list(truth)[4:]], tmp_path/'out', valid=pairs[:4])
    assert [r.image for r in ann.unread]==[str(bad)] and len(ann.pairs)==4

# --- going on

def test_a_mask_that_has_changed_is_voted_on_again(tmp_path, truth):
    folder = masks(tmp_path/'sam', truth)
    m,files = Bright(-60.), list(truth)
    def run(**kw): return annotate([m, folder], files, tmp_path/'out', weights=[0.1, 1], bs=1, **kw)
    first = run()
    n = counted(m)
    assert run()==first and counted(m)==n
    save(folder/f'{files[2].stem}.png', CODES.decode((~truth[files[2]]).astype(np.uint8)))
    for together in (True, False):
        ann = run(together=together)
        assert counted(m)==n+1 and (load_mask(ann.pairs[files[2]], CODES)!=truth[files[2]]).mean()>0.96
        assert [a==b for a,b in zip(first.rows, ann.rows)]==[f!=files[2] for f in files]

def test_another_folder_or_calibration_is_another_vote(tmp_path, truth, pairs):
    a,b = (masks(tmp_path/n, truth) for n in 'ab')
    for f in truth: os.utime(a/f'{f.stem}.png', ns=(1, 1)), os.utime(b/f'{f.stem}.png', ns=(1, 1))
    m = Bright()
    asked = [prepare_vote([m, o]).asked() for o in (a, b, MaskFolder(a, CODES).calibrate(pairs), MaskFolder(a, CODES).calibrate(pairs[:1]))]
    assert all(asked.count(o)==1 for o in asked) and prepare_vote([m, str(a)]).asked()==prepare_vote([m, MaskFolder(a, CODES)]).asked()

def test_a_call_that_continues_finds_the_same_weights(tmp_path, truth, pairs):
    folder = masks(tmp_path/'sam', truth, somewhere)
    def run(bs): return annotate([Bright(5.), folder], list(truth)[4:], tmp_path/'out', valid=pairs[:4], bs=bs)
    first = run(2)
    before = tree(tmp_path/'out')
    assert run(3)==first and tree(tmp_path/'out')==before

# --- what is refused

def refused(tmp_path, truth, match, teachers, **kw):
    "`annotate` raises one error, predicts nothing and writes nothing; so does `annotate_batch`, unless it is about `out`"
    m = Bright()
    with pytest.raises(ValueError, match=match) as e: annotate([m, *teachers], list(truth), tmp_path/'out', **kw)
    assert counted(m)==0 and not (tmp_path/'out').exists() and len(str(e.value))<1500
    if kw: return
    with pytest.raises(ValueError, match=match): annotate_batch(prepare_vote([m, *teachers]), list(truth))
    assert counted(m)==0

def test_a_folder_that_is_missing_or_empty(tmp_path, truth):
    refused(tmp_path, truth, 'teachers: nowhere: no such folder of masks', ['nowhere'])
    (tmp_path/'empty').mkdir()
    (tmp_path/'empty/plans.json').write_text('{}')
    refused(tmp_path, truth, 'empty: the folder holds no masks', [tmp_path/'empty'])

def test_missing_masks_are_counted_and_named(tmp_path, truth, pairs):
    folder = masks(tmp_path/'sam', dict(list(truth.items())[4:]))
    refused(tmp_path, truth, 'sam: no mask for 4 of 8 images: p0.png, p1.png, p2.png…; a mask has the stem of its image, the folder holds p4, p5, p6…', [folder])
    others = {f: truth[f] for f in list(truth)[4:]}
    refused(tmp_path, others, 'no mask for 1 of 5 images: p0.png', [folder], valid=pairs[:1])

def test_foreign_masks(tmp_path, truth):
    folder = masks(tmp_path/'values', truth, codes=parse_codes('rest,0\ndisc,1'))
    refused(tmp_path, truth, '8 faults found:(.|\n)*p0.png: pixel values not in codes.txt: 0, 1', [folder])
    folder = masks(tmp_path/'size', truth)
    f = save(folder/'p1.png', np.full((5, 9), 7, np.uint8))
    h,w = load_image(list(truth)[1]).shape[:2]
    refused(tmp_path, truth, f'{f}: has 9×5 pixels, its image {w}×{h}', [folder])
    f.write_bytes(b'broken')
    refused(tmp_path, truth, 'p1.png: cannot be read', [folder])

def test_a_long_list_of_faults_is_cut(tmp_path):
    truth = pictures(tmp_path/'in', 15)
    refused(tmp_path, truth, 'p9.png(.|\n)*- .*values: 5 masks more', [masks(tmp_path/'values', truth, codes=parse_codes('rest,0\ndisc,1'))])

def test_two_masks_of_one_stem_and_two_images_for_one_mask(tmp_path, truth):
    folder = masks(tmp_path/'sam', truth)
    shutil.copy(folder/'p1.png', folder/'p1.tif')
    refused(tmp_path, truth, r"sam: two masks have the stem 'p1' \(p1.png, p1.tif\)", [folder])
    (folder/'p1.tif').unlink()
    twin = tmp_path/'other/p1.png'
    twin.parent.mkdir()
    shutil.copy(list(truth)[1], twin)
    refused(tmp_path, [*truth, twin], 'sam: one mask for .*in/p1.png and .*other/p1.png', [folder])

def test_the_output_folder_cannot_vote(tmp_path, truth):
    out = tmp_path/'run'
    for folder in (out, out/'annotations'):
        masks(folder, truth)
        before = tree(tmp_path)
        with pytest.raises(ValueError, match='out: masks would be written into .*, which votes; choose another folder'):
            annotate([Bright(), folder], list(truth), out)
        assert tree(tmp_path)==before
    masks(out/'sam', truth)
    shutil.rmtree(out/'annotations')
    assert len(annotate([Bright(), out/'sam'], list(truth), out).pairs)==8  # beside the masks that are written

def test_classes_of_a_folder_are_those_of_the_networks(tmp_path, truth):
    folder = masks(tmp_path/'sam', truth)
    refused(tmp_path, truth, 'teachers: .*sam knows the classes .*blob.*must be the same', [MaskFolder(folder, parse_codes('rest,7\nblob,200'))])
    with pytest.raises(ValueError, match='no network votes that knows the classes; give MaskFolder'): prepare_vote(folder)
    with pytest.raises(ValueError, match='size: none given, and no network votes that has one'): prepare_vote(MaskFolder(folder, CODES))
    m = make_model()
    m.codes = None
    with pytest.raises(ValueError, match='U-Net has no classes yet'): prepare_vote([folder, m])
    for wrong,message in ((dict(pairs=[]), 'no labelled images'), (dict(pairs=[(list(truth)[0], folder/'p0.png')]), 'codes are not known')):
        f = MaskFolder(folder, None if len(wrong['pairs']) else CODES)
        with pytest.raises(ValueError, match=message): f.calibrate(**wrong)
