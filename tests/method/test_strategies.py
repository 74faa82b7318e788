"""Each published rule on attention made by hand: what is kept is worked out on paper, not by the same code."""

import pytest
import torch

import dyrate
from by_hand import HEADS, kept, seen, tower
from dyrate.attention import LayerAttention
from dyrate.seen import choose, kept_count
from dyrate.strategies.controls import evenly
from dyrate.strategies.sparsevlm import cluster, counts
from dyrate.strategy import retention_of


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


def test_sparsevlm_raters_are_relevant_tokens():
    # one system, four image, two instruction tokens; embeddings: the second instruction token alone resembles the image
    embedded = [[0.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [0.0, 9.0]]
    first, second = [0.0, 0.9, 0.0, 0.1, 0.0, 0.0, 0.0], [0.0, 0.0, 0.5, 0.1, 0.4, 0.0, 0.0]
    at = seen(weights=[[[0.0] * 7] * 5 + [first, second]], hidden=embedded, layer=3, n_layers=32)
    # only the second rates: tokens 1 and 3, not 0. A quarter stays for its rating, and of the three others one is recycled
    assert kept(dyrate.SparseVLM(shares=(0.25, 0.25, 0.25)), at) == [1, 3]
    assert kept(dyrate.SparseVLM(shares=(1.0, 1.0, 1.0)), at) == [0, 1, 2, 3]
    assert list(dyrate.SparseVLM().stages(32)) == [3, 7, 16]


def test_sparsevlm_counts_as_published():
    # v1.5 on 576 tokens for a mean of 192: 300, 200 and 110 stay, and clusters of the recycled
    assert counts(576, 576, 300 / 576) == (300, 83, 9)  # int(.3 * 276) + 1 recycled, int(83 / 10) + 1 clusters
    assert counts(576, 309, 200 / 576) == (200, 33, 4)
    assert counts(576, 204, 110 / 576) == (110, 29, 3)
    spread = dyrate.SparseVLM.at(0.25, 32)
    assert spread.mean_kept(32) / 576 == pytest.approx(0.25, abs=0.002)


def test_clusters_have_dense_far_centres():
    points = torch.tensor([[0.0], [0.1], [0.2], [9.0], [9.1], [50.0]])
    members = torch.tensor([True, True, True, True, True, False])
    found = cluster(points, members, 2)
    assert sorted(sorted(m) for m in found.values()) == [[0, 1, 2], [3, 4]]


def test_visionzip_keeps_cls_dominant_and_merged_contextual_tokens():
    # 8 tokens, half kept: [CLS], two dominant (1, 6), one contextual: the first of the rest (0); [CLS] has the place of token 4
    cls = [0.05, 0.3, 0.04, 0.03, 0.2, 0.06, 0.3, 0.02]
    at = seen(n_image=8, layer=0, vision=tower(cls, features=[[float(i)] for i in range(8)]))
    strategy = dyrate.VisionZip(rate=0.5, contextual=0.25)
    assert kept(strategy, at) == [0, 1, 4, 6]
    merged = strategy.merge(at, None)[0, :, 0].tolist()
    # in this order: [CLS] (100), the dominant ones, the target with the mean of all others that are not dominant
    assert [merged[i] for i in (0, 1, 4, 6)] == pytest.approx([100, 1, 6, 0 + (2 + 3 + 4 + 5 + 7) / 5])
    alone = dyrate.VisionZip(rate=0.5, contextual=0.25, positions="kept").merge(at, None)[0, :, 0].tolist()
    assert [alone[i] for i in (4, 1, 6)] == [100, 1, 6]


def test_visionzip_merges_into_the_most_similar():
    # dominant 0, [CLS] in the place of 1; contextual 1 and 3 of 1..5; 2 resembles 1, 4 and 5 resemble 3
    keys = [[1.0, 0], [1, 0], [1, 0.1], [0, 1], [0, 1], [0.1, 1]]
    at = seen(n_image=6, layer=0, vision=tower([0.4, 0.1, 0.1, 0.1, 0.2, 0.1], keys, [[float(i)] for i in range(6)]))
    merged = dyrate.VisionZip(rate=2 / 6, contextual=0.5, positions="kept").merge(at, None)[0, :, 0].tolist()
    assert merged[1] == pytest.approx(1 + 2) and merged[3] == pytest.approx(3 + (4 + 5) / 2)


def test_prumerge_keeps_outliers_adds_neighbours_and_sums_up_the_rest():
    # quartiles of seven .1 and one .9 are .1 and .1: only .9 lies above .1 + 1.5 * 0
    cls = [0.1, 0.1, 0.1, 0.9, 0.1, 0.1, 0.1, 0.1]
    keys = [[1.0, 0.0], [0, 1], [0, 1], [1, 0.1], [0, 1], [0, 1], [0, 1], [0, 1]]
    at = seen(n_image=8, layer=0, vision=tower(cls, keys, [[float(i)] for i in range(8)]))
    strategy = dyrate.PruMerge(neighbours=1)
    assert kept(strategy, at) == [0, 3]  # and the place of the last token
    mask = torch.tensor([[True, False, False, True, False, False, False, False]])
    merged = strategy.merge(at, mask)[0, :, 0].tolist()
    assert [merged[0], merged[3]] == pytest.approx([3 + 0.1 * 0, 0.1 * (0 + 1 + 2 + 4 + 5 + 6 + 7)])
    assert kept(dyrate.PruMerge(retention=0.25), at) == [0, 3]


def test_prumerge_plus_adds_tokens_spread_evenly():
    # one outlier of 16: every int(16 / 3) = 5th token of the first 15 beside it
    cls = [0.1] * 7 + [0.9] + [0.1] * 8
    at = seen(n_image=16, layer=0, vision=tower(cls))
    chosen = dyrate.PruMergePlus()._chosen(at, 0).tolist()
    assert chosen == [7, 0, 5, 10]


def test_dycoke_leaves_the_prefill_whole():
    strategy = dyrate.DyCoke(rate=0.75)
    assert kept(strategy, seen(HEADS, step=0)) == [0, 1, 2, 3]
    assert kept(strategy, seen(HEADS, step=1)) == [1]
    assert strategy.residency == "mask"


def test_dstp_swaps_only_what_no_longer_catches_attention():
    # attention .1, .25, .2, .25: the tokens in use, 1 and 2, catch .45 of the .5 that 1 and 3 would
    at = seen(HEADS, step=1)
    at.held = torch.tensor([[False, True, True, False]])
    assert kept(dyrate.DSTP(rate=0.5, caught=0.89), at) == [1, 2]
    assert kept(dyrate.DSTP(rate=0.5, caught=0.91), at) == [1, 3]


def test_a_budget_in_tokens_is_a_share():
    assert [retention_of(x, 576) for x in (192, 0.25, 1, 0)] == [192 / 576, 0.25, 1, 0]
    assert dyrate.FastV.at(144, 32, 576) == dyrate.FastV.at(0.25, 32) == dyrate.FastV(rate=0.75)
    for budget, tokens, message in ((192, None, "of how many"), (577, 576, "more than the 576"), (1.5, 576, "whole number"),
                                    (-1, 576, "whole number")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            dyrate.FastV.at(budget, 32, tokens)


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
