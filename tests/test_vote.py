"Votes by hand: every rule, the agreement of the voters, and the entropy"
import math

import numpy as np, pytest, torch

from semisup_seg.annotation.voting import VoteAccumulator, agreement, entropy, voter_confusion, vote, vote_rules

def random_probs(n=3, shape=(2, 3, 6, 7), seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(4*torch.rand(shape, generator=g)).softmax(1) for _ in range(n)]

def geometric_by_hand(ps, ws):
    product = torch.stack([p**(w/sum(ws)) for w,p in zip(ws, ps)]).prod(0)
    return product/product.sum(1, keepdim=True)

BY_HAND = dict(mean=lambda ps, ws: sum(w*p for w,p in zip(ws, ps))/sum(ws), geometric=geometric_by_hand,
    majority=lambda ps, ws: sum(w*(p==p.max(1, keepdim=True).values) for w,p in zip(ws, ps))/sum(ws))

@pytest.mark.parametrize('how', vote_rules)
def test_votes_by_hand(how):
    for layout in (torch.contiguous_format, torch.channels_last):
        for weights in ([1, 1, 1], [0.2, 0.9, 0.7], [0, 2, 0]):
            ps = [p.to(memory_format=layout) for p in random_probs()]
            probs,_ = vote(ps, how, weights)
            assert torch.allclose(probs, BY_HAND[how](ps, weights).float(), atol=1e-5), (layout, weights)
            assert torch.allclose(probs.sum(1), torch.ones(2, 6, 7), atol=1e-5), (layout, weights)

def test_no_voter_is_changed_by_the_vote():
    ps = random_probs()
    before = [p.clone() for p in ps]
    for how in vote_rules: vote(ps, how)
    assert all(torch.equal(a, b) for a,b in zip(ps, before))

def test_geometric_survives_a_certain_no():
    p = torch.tensor([0., 1]).view(1, 2, 1, 1)
    probs,_ = vote([p, 1-p], 'geometric')
    assert torch.allclose(probs, torch.full_like(probs, 0.5))

def test_an_unknown_rule_is_told():
    with pytest.raises(ValueError, match="Unknown vote 'medain'.*Allowed: mean, majority, geometric"): vote(random_probs(), 'medain')

def test_agreement_by_hand():
    labels = [torch.from_numpy(np.random.default_rng(i).integers(0, 3, (4, 9, 11))) for i in range(3)]
    mask = torch.from_numpy(np.random.default_rng(9).integers(0, 3, (4, 9, 11)))
    for m in (mask, *labels):
        m[2] = 0           # nobody sees anything
        m[3][m[3]==2] = 1  # a class that nobody sees
    got = agreement(voter_confusion(labels, mask, 3))
    for i in range(4):
        each = []
        for l in labels:
            pairs = [(l[i]==c, mask[i]==c) for c in (1, 2)]
            scores = [2*int((a&b).sum())/int(a.sum()+b.sum()) for a,b in pairs if (a|b).any()]
            each.append(np.mean(scores) if scores else 1)
        assert got[i].item()==pytest.approx(np.mean(each))
    assert got[2]==1

def test_counts_of_windows_add_up():
    labels = [torch.from_numpy(np.random.default_rng(i).integers(0, 3, (1, 8, 8))) for i in range(3)]
    mask = labels[0].clone()
    parts = [voter_confusion([l[..., s] for l in labels], mask[..., s], 3) for s in (slice(4), slice(4, 8))]
    assert torch.equal(sum(parts), voter_confusion(labels, mask, 3))

def test_one_voter_agrees_with_itself(): assert vote(random_probs(1))[1].tolist()==[1, 1]

def test_entropy_by_hand():
    p = random_probs(1)[0]
    want = [-(p[i]*p[i].log()).sum(0).mean().item()/math.log(3) for i in range(2)]
    assert entropy(p).tolist()==pytest.approx(want, abs=1e-5)
    assert entropy(torch.tensor([0., 1]).view(1, 2, 1, 1)).item()==0

def test_only_one_sum_is_kept():
    votes = VoteAccumulator()
    for p in random_probs(20): votes.add(p)
    assert votes.total.shape==(2, 3, 6, 7) and {l.dtype for l in votes.labels}=={torch.uint8}

def test_added_one_by_one_is_the_same_vote():
    ps,weights = random_probs(), [0.2, 0.9, 0.7]
    for how in vote_rules:
        votes = VoteAccumulator(how)
        for p,w in zip(ps, weights): votes.add(p, w)
        probs,counts = votes.result()
        want,agree = vote(ps, how, weights)
        assert torch.equal(probs, want) and torch.equal(agreement(counts), agree), how
