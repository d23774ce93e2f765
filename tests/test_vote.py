"Votes by hand, and windows that leave no seam"
import math

import numpy as np, pytest, torch

from semisup_seg.annotation.voting import VoteAccumulator, agreement, entropy, voter_confusion, vote, vote_rules
from semisup_seg.training.sliding_window import cut_windows, merge_windows, window_starts

def random_opinions(n=3, shape=(2, 3, 6, 7), seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(4*torch.rand(shape, generator=g)).softmax(1) for _ in range(n)]

BY_HAND = dict(mean=lambda ps, ws: sum(w*p for w,p in zip(ws, ps))/sum(ws),
    majority=lambda ps, ws: sum(w*(p==p.max(1, keepdim=True).values) for w,p in zip(ws, ps))/sum(ws),
    geometric=lambda ps, ws: (lambda g: g/g.sum(1, keepdim=True))(torch.stack([p**(w/sum(ws)) for w,p in zip(ws, ps)]).prod(0)))

@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('weights', [[1, 1, 1], [0.2, 0.9, 0.7], [0, 2, 0]])
@pytest.mark.parametrize('how', vote_rules)
def test_votes_by_hand(how, weights, layout):
    ps = [p.to(memory_format=layout) for p in random_opinions()]
    probs,_ = vote(ps, how, weights)
    assert torch.allclose(probs, BY_HAND[how](ps, weights).float(), atol=1e-5) and torch.allclose(probs.sum(1), torch.ones(2, 6, 7), atol=1e-5)

def test_no_opinion_is_changed_by_the_count():
    ps = random_opinions()
    before = [p.clone() for p in ps]
    for how in vote_rules: vote(ps, how)
    assert all(torch.equal(a, b) for a,b in zip(ps, before))

def test_geometric_survives_a_certain_no():
    p = torch.tensor([0., 1]).view(1, 2, 1, 1)
    probs,_ = vote([p, 1-p], 'geometric')
    assert torch.allclose(probs, torch.full_like(probs, 0.5))

def test_agreement_by_hand():
    labels = [torch.from_numpy(np.random.default_rng(i).integers(0, 3, (4, 9, 11))) for i in range(3)]
    mask = torch.from_numpy(np.random.default_rng(9).integers(0, 3, (4, 9, 11)))
    mask[2],labels[0][2],labels[1][2],labels[2][2] = 0, 0, 0, 0  # nobody sees anything
    mask[3][mask[3]==2] = 1
    for l in labels: l[3][l[3]==2] = 1                           # a class that nobody sees
    got = agreement(voter_confusion(labels, mask, 3))
    for i in range(4):
        each = []
        for l in labels:
            scores = [2*int(((l[i]==c)&(mask[i]==c)).sum())/n for c in (1, 2) if (n := int((l[i]==c).sum()+(mask[i]==c).sum()))]
            each.append(np.mean(scores) if scores else 1)
        assert got[i].item()==pytest.approx(np.mean(each))
    assert got[2]==1

def test_one_voter_agrees_with_itself(): assert vote(random_opinions(1))[1].tolist()==[1, 1]

def test_entropy_by_hand():
    p = random_opinions(1)[0]
    want = [-(p[i]*p[i].log()).sum(0).mean().item()/math.log(3) for i in range(2)]
    assert entropy(p).tolist()==pytest.approx(want, abs=1e-5)
    assert entropy(torch.tensor([0., 1]).view(1, 2, 1, 1)).item()==0

def test_only_one_sum_is_kept():
    b = VoteAccumulator()
    for p in random_opinions(20): b.add(p)
    assert b.total.shape==(2, 3, 6, 7) and {l.dtype for l in b.labels}=={torch.uint8}

# --- windows

@pytest.mark.parametrize('window', [16, 33, 64])
@pytest.mark.parametrize('length', [1, 15, 16, 17, 64, 65, 100, 257])
def test_windows_cover_and_overlap(length, window):
    s = window_starts(length, window)
    assert s[0]==0 and s==sorted(set(s)) and s[-1]==max(0, length-window)
    assert all(b-a<=window*3/4+1 for a,b in zip(s, s[1:]))

@pytest.mark.parametrize('shape', [(300, 200), (40, 300), (64, 64), (10, 12), (65, 64)])
def test_what_is_cut_comes_back(shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)
    corners,parts = zip(*cut_windows(image, 64))
    assert {p.shape for p in parts}=={(64, 64, 3)}
    maps = list(merge_windows(np.float32(parts).transpose(0, 3, 1, 2), corners, 64, shape))
    assert len(maps)==3 and np.abs(np.stack(maps, -1)-image).max()<0.01

def test_joined_answers_stay_between_the_windows():
    corners = [p for p,_ in cut_windows(np.zeros((150, 150, 3), np.uint8), 64)]
    answers = np.random.default_rng(0).random((len(corners), 2, 16, 16)).astype(np.float32)
    for m in merge_windows(answers, corners, 64, (150, 150)): assert m.shape==(150, 150) and answers.min()-1e-5<=m.min() and m.max()<=answers.max()+1e-5
