"""Each published rule on attention made by hand: what is kept is worked out on paper, not by the same code."""

import pytest
import torch

import dyrate
from by_hand import HEADS, kept, seen, tower
from dyrate.attention import LayerAttention
from dyrate.seen import choose, kept_count
from dyrate.strategies.controls import evenly
from dyrate.strategies.sparsevlm import cluster


def test_kept_count():
    # N - floor(N r), Eq. 3; 576 * .1 is 57.6 and 576 * .9 is 518.4
    assert [kept_count(576, 1 - r) for r in (0, 0.5, 0.9, 0.1, 1)] == [576, 288, 58, 519, 0]
    assert kept_count(10, 1 - 0.3) == 7 and kept_count(3, 1 - 2 / 3) == 1  # 1 - 2 / 3 is a little more than a third
    singles = torch.tensor([k / 32 for k in range(33)] + [0.3, 0.7])  # float32, as predictors compute
    assert [kept_count(n, x) for n in (10, 2880) for x in singles[-2:].tolist()] == [3, 7, 864, 2016]
    assert [kept_count(2880, x) for x in singles[:33].tolist()] == [90 * k for k in range(33)]


def test_choose_takes_the_first_of_equals_and_never_what_was_dropped():
    score = torch.tensor([[1.0, 3.0, 3.0, 2.0]])
    there = torch.tensor([[True, False, True, True]])
    assert choose(score, there, [1]).tolist() == [[False, False, True, False]]
    assert choose(score, there, [4]).tolist() == [[True, False, True, True][:1] + [False, True, True]]
    assert choose(torch.ones(1, 4), torch.ones(1, 4, dtype=torch.bool), [2]).tolist() == [[True, True, False, False]]


def test_fastv_keeps_the_most_attended_by_mean_over_heads():
    assert kept(dyrate.FastV(rate=0.5), seen(HEADS)) == [1, 3]
    assert kept(dyrate.FastV(rate=0.75), seen(HEADS)) == [1]
    assert kept(dyrate.WorstFirst(rate=0.5), seen(HEADS)) == [0, 2]
    assert dyrate.FastV().each_step is False
    again = dyrate.FastVRerank()
    assert again.each_step and again.residency == "mask"


def test_vtw_keeps_nothing_from_its_layer_on():
    assert kept(dyrate.VTW(), seen(HEADS, layer=16)) == []
    assert list(dyrate.VTW().stages(32)) == [16]
    assert list(dyrate.VTW.at(0.5, 8).stages(8)) == [4]


def test_pyramiddrop_halves_at_quarters_of_the_depth():
    strategy = dyrate.PyramidDrop()
    assert list(strategy.stages(32)) == [8, 16, 24]
    assert [strategy.keep(seen(HEADS, layer=k, n_layers=32)) for k in (8, 16, 24)] == [0.5, 0.25, 0.125]
    spread = dyrate.PyramidDrop.at(0.25, 32)
    assert abs(sum(spread.keep(seen(HEADS, layer=k, n_layers=32)) for k in (8, 16, 24)) / 3 - 0.25) < 1e-6


def test_depth_prune_starts_at_the_fourth_layer_and_grows():
    strategy = dyrate.DepthPrune(rate=0.5, deepest=0.9)
    rates = [1 - strategy.keep(seen(HEADS, layer=k, n_layers=8)) for k in strategy.stages(8)]
    assert list(strategy.stages(8)) == [3, 4, 5, 6, 7]
    assert rates == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9])
    fixed = dyrate.FixedPrune(rate=0.5)
    assert list(fixed.stages(8)) == [3] and fixed.keep(seen(HEADS, layer=3)) == 0.5


def test_sparsevlm_raters_are_relevant_words_and_rank_says_how_many():
    # one system, four image, two instruction tokens; hidden states: the second word alone resembles the image
    hidden = [[0.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [0.0, 9.0]]
    first, second = [0.0, 0.9, 0.0, 0.1, 0.0, 0.0, 0.0], [0.0, 0.0, 0.5, 0.1, 0.4, 0.0, 0.0]
    rows = [[[0.0] * 7] * 5 + [first, second]]
    at = seen(weights=rows, hidden=hidden)
    assert kept(dyrate.SparseVLM(retention=1.0), at) == [0, 1, 2, 3]
    # only the second word rates: tokens 1 and 3, not 0. share^(1/3) of 4 is 2 at the first of three stages (n_layers 32)
    at = seen(weights=rows, hidden=hidden, layer=2, n_layers=32)
    assert kept(dyrate.SparseVLM(retention=0.125, recycled=0.0), at) == [1, 3]
    # rank of a single row is 1: of 4 tokens floor(.7 * (4 - 1)) = 2 are dropped
    assert kept(dyrate.SparseVLM(scale=0.7, recycled=0.0), at) == [1, 3]
    assert list(dyrate.SparseVLM().stages(32)) == [2, 6, 15]


def test_sparsevlm_merges_what_it_recycles():
    # rated .5 .4 .1 .0 (one head, both words alike): best two stay; of the two dropped all are recycled into one cluster
    hidden = [[0.0]] + [[8.0], [6.0], [4.0], [2.0], [3.0], [0.5], [0.25]] + [[1.0], [1.0]]
    row = [0.0, 0.4, 0.3, 0.1, 0.08, 0.06, 0.04, 0.02, 0.0, 0.0]
    at = seen(weights=[[[0.0] * 10] * 8 + [row, row]], hidden=hidden, layer=2, n_layers=32)
    # retention^(1/3) = 4/7: four are kept, one of them a cluster centre for the recycled three (tokens 3 to 6 without the best)
    strategy = dyrate.SparseVLM(retention=(4 / 7 + 1e-9) ** 3, recycled=1.0, clusters=0.34)
    assert kept(strategy, at)[:3] == [0, 1, 2] and len(kept(strategy, at)) == 4
    centre = kept(strategy, at)[3]
    merged = strategy.merge(at, None)[0]
    assert merged[:3].tolist() == [[8.0], [6.0], [4.0]]
    # recycled: the best round(3 * 1) = 3 of the rest by rating are tokens 3, 4, 5: hidden 2, 3, .5
    assert centre in (3, 4, 5) and merged[centre].item() == pytest.approx((2.0 + 3.0 + 0.5) / 3)


def test_clusters_have_dense_far_centres():
    points = torch.tensor([[0.0], [0.1], [0.2], [9.0], [9.1], [50.0]])
    members = torch.tensor([True, True, True, True, True, False])
    found = cluster(points, members, 2, neighbours=2)
    assert sorted(sorted(m) for m in found.values()) == [[0, 1, 2], [3, 4]]


def test_visionzip_keeps_dominant_and_merges_contextual():
    # 8 tokens, half kept: three dominant by [CLS] (1, 4, 6), one contextual: first of the rest (0, 2, 3, 5, 7)
    cls = [0.05, 0.3, 0.04, 0.03, 0.2, 0.06, 0.3, 0.02]
    features = [[float(i)] for i in range(8)]
    at = seen(n_image=8, layer=0, vision=tower(cls, features=features))
    strategy = dyrate.VisionZip(rate=0.5, contextual=0.25)
    assert kept(strategy, at) == [0, 1, 4, 6]
    merged = strategy.merge(at, None)[0, :, 0].tolist()
    assert merged[0] == pytest.approx((0 + 2 + 3 + 5 + 7) / 5)  # all that is not dominant goes to the only target
    assert [merged[i] for i in (1, 4, 6)] == [1, 4, 6]


def test_visionzip_merges_into_the_most_similar():
    # two dominant (0, 1), two contextual among 2..5, evenly: 2 and 4; 3 resembles 4, 5 resembles 2
    keys = [[1.0, 0], [1, 0], [1, 0], [0, 1], [0, 1], [1, 0.1]]
    at = seen(n_image=6, layer=0, vision=tower([0.4, 0.3, 0.1, 0.1, 0.05, 0.05], keys, [[float(i)] for i in range(6)]))
    strategy = dyrate.VisionZip(rate=2 / 6, contextual=0.5)
    assert kept(strategy, at) == [0, 1, 2, 4]
    merged = strategy.merge(at, None)[0, :, 0].tolist()
    assert merged[2] == pytest.approx((2 + 5) / 2) and merged[4] == pytest.approx((3 + 4) / 2)


def test_prumerge_keeps_outliers_and_merges_neighbours():
    # quartiles of seven .1 and one .9 are .1 and .1: only .9 lies above .1 + 1.5 * 0
    cls = [0.1, 0.1, 0.1, 0.9, 0.1, 0.1, 0.1, 0.1]
    keys = [[1.0, 0.0], [0, 1], [0, 1], [1, 0.1], [0, 1], [0, 1], [0, 1], [0, 1]]
    at = seen(n_image=8, layer=0, vision=tower(cls, keys, [[float(i)] for i in range(8)]))
    strategy = dyrate.PruMerge(neighbours=1)
    assert kept(strategy, at) == [3]
    # token 3 with its nearest, token 0, weighted .9 to .1
    assert strategy.merge(at, None)[0, 3].item() == pytest.approx(0.9 * 3 + 0.1 * 0)
    assert kept(dyrate.PruMerge(retention=0.25), at) == [0, 3]


def test_dycoke_leaves_the_prefill_whole():
    strategy = dyrate.DyCoke(rate=0.75)
    assert kept(strategy, seen(HEADS, step=0)) == [0, 1, 2, 3]
    assert kept(strategy, seen(HEADS, step=1)) == [1]
    assert strategy.residency == "mask"


def test_schedules():
    steps = [seen(HEADS, step=t) for t in range(5)]
    anneal = dyrate.LinearAnneal(start=0.0, end=0.8, steps=4)
    assert [anneal.keep(s) for s in steps] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    mean = dyrate.MeanTrajectory(rates=(0.0, 0.5))
    assert [mean.keep(s) for s in steps] == [1, 0.5, 0.5, 0.5, 0.5]
    assert dyrate.Constant(rate=0.25).keep(steps[3]) == 0.75
    assert dyrate.LinearAnneal.at(0.25, 8).start == 0.5 and dyrate.LinearAnneal.at(0.25, 8).end == 1.0


def test_random_scores_belong_to_the_example():
    one, other = ([dyrate.Example(name, "", "", ())] for name in "ab")
    strategy = dyrate.RandomPrune(seed=1)
    first = strategy.score(seen(HEADS, examples=one))
    assert torch.equal(first, strategy.score(seen(HEADS, examples=one)))
    assert not torch.equal(first, strategy.score(seen(HEADS, examples=other)))
    assert not torch.equal(first, dyrate.RandomPrune(seed=2).score(seen(HEADS, examples=one)))


def test_evenly_spread_ranks_cover_the_grid():
    rank = evenly(144)
    assert sorted(rank.tolist()) == list(range(144))
    for n in (18, 36, 72):
        cells = (rank < n).reshape(3, 4, 3, 4).sum((1, 3))  # nine fields of sixteen patches
        assert cells.min() >= n / 9 / 2 and cells.max() <= n / 9 * 2


def test_uniform_pool_averages_the_nearest():
    at = seen(n_image=4, layer=0, hidden=[[9.0], [1.0], [2.0], [3.0], [4.0], [9.0], [9.0]])
    strategy = dyrate.UniformPool(rate=0.75)
    (centre,) = kept(strategy, at)
    mask = torch.zeros(1, 4, dtype=torch.bool)
    mask[0, centre] = True
    assert strategy.merge(at, mask)[0, centre].item() == pytest.approx(2.5)


def test_no_rope_ignores_positions():
    """Two image tokens with equal keys before rotation score equally, whatever their distance."""
    at = seen(HEADS)
    at.read_no_rope = lambda: torch.tensor([[[0.0, 0.3, 0.1, 0.1, 0.2, 0.0, 0.0]]])
    assert kept(dyrate.NoRoPE(rate=0.5), at) == [0, 3]


def test_layer_attention_gives_causal_and_masked_rows():
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    full = (query @ key.repeat_interleave(2, 1).transpose(2, 3)) * 0.3
    causal = full.masked_fill(~torch.tril(torch.ones(5, 5)).bool(), -torch.inf).softmax(-1)
    attention = LayerAttention(query, key, None, 0.3)
    assert torch.allclose(attention.newest, causal[:, :, -1], atol=1e-6)
    index = torch.tensor([[1, 3], [4, 0]])
    rows = attention.rows(index)
    for i in range(2):
        assert torch.allclose(rows[i], causal[i][:, index[i]], atol=1e-6)
    padded = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    for mask in (padded, (torch.tril(torch.ones(5, 5)).bool() & padded[:, None].bool())[:, None]):
        rows = LayerAttention(query, key, mask, 0.3).rows(index[:, :1].clamp(min=1))
        assert (rows[0, :, :, 0] == 0).all() and torch.allclose(rows.sum(-1), torch.ones(2, 4, 1))
    free = LayerAttention(query, key, None, 0.3, causal=False)
    assert torch.allclose(free.rows(index)[0], full.softmax(-1)[0][:, index[0]], atol=1e-6)
