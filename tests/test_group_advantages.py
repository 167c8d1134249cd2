"""Advantages over the responses to one prompt."""

import numpy as np
import pytest
import torch
from torch.distributed import ProcessGroup

from bench import oracle
from ppo_kernels import GroupStats, group_advantages, whiten
from tests.lib.helpers import NAN, assert_close_to_oracle, assert_raises, bit_equal, out_dtype

OP = "group_advantages"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MODES = ("rloo", "grpo", "dr_grpo", "reinforce++_baseline")  # of scores of any sign, linear or not
SCALED = ({"scale_rewards": "group"}, {"mode": "grpo", "scale_rewards": "batch"}, {"mode": "maxrl"}, {"mode": "gdpo"})


def shuffled_ids(sizes, seed=0):
    """Group ids of any value in any order, ``sizes`` of them each."""
    g = torch.Generator().manual_seed(seed)
    wild = torch.cat([torch.tensor([0, -1, 2**62, -(2**62)]), torch.randint(-1000, 1000, (len(sizes),), generator=g)])
    ids = wild[: len(sizes)].repeat_interleave(torch.tensor(sizes, dtype=torch.int64))
    return ids[torch.randperm(len(ids), generator=g)]


def check(impl, scores, group_ids=None, **options):
    got = group_advantages(scores, group_ids, impl=impl, **options)
    want = oracle.group_advantages(scores, group_ids, **options)
    assert got.dtype == out_dtype(scores.dtype)
    assert not got.requires_grad
    size = max(np.abs(want).max(initial=0.0, where=np.isfinite(want)), 1.0)
    assert_close_to_oracle(got, want, ceiling=5e-7 if got.dtype == torch.float32 else 1e-11, scale=size)
    return got


@pytest.mark.several_blocks(sizes=[33, 64, 1, 31, 32, 100], mode="grpo", dtype=torch.float32)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sizes", [[1], [2], [3, 1, 5, 2], [4] * 8, [33, 64, 1, 31, 32, 100], [1] * 20, [700, 3], []])
def test_matches_the_loop(impl, sizes, mode, dtype):
    ids = shuffled_ids(sizes)
    check(impl, torch.randn(len(ids)).to(dtype), ids, mode=mode)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("groups", "group_size"), [(1, 1), (5, 1), (6, 2), (3, 7), (2, 64), (1, 300), (0, 4)])
def test_contiguous_groups_match_the_loop(impl, groups, group_size, mode, dtype):
    scores = torch.randn(groups * group_size).to(dtype)
    got = check(impl, scores, group_size=group_size, mode=mode)
    ids = torch.arange(groups).repeat_interleave(group_size)
    assert bit_equal(group_advantages(scores, ids, mode=mode, impl=impl), got)
    assert bit_equal(group_advantages(scores, ids.int(), mode=mode, impl=impl), got)


@pytest.mark.large
def test_many_small_groups(impl):
    ids = torch.randint(0, 700, (2000,))
    for mode in MODES:
        check(impl, torch.randn(2000), ids, mode=mode)


@pytest.mark.parametrize("eps", [0.0, 1e-6, 1.0])
@pytest.mark.parametrize("mode", ["grpo", "reinforce++_baseline"])
def test_eps(impl, mode, eps):
    check(impl, torch.randn(12), group_size=3, mode=mode, eps=eps)
    check(impl, torch.ones(12), group_size=3, mode=mode, eps=eps)


def test_modes_written_out(impl):
    scores, ids = torch.tensor([1.0, 7.0, 3.0, 5.0, 2.0]), torch.tensor([4, 9, 4, 9, 4])
    call = {"group_ids": ids, "impl": impl}
    torch.testing.assert_close(
        group_advantages(scores, **call), torch.tensor([-1.5, 2.0, 1.5, -2.0, 0.0]), rtol=0, atol=0
    )
    torch.testing.assert_close(
        group_advantages(scores, mode="dr_grpo", **call), torch.tensor([-1.0, 1.0, 1.0, -1.0, 0.0]), rtol=0, atol=0
    )
    half = 0.5**0.5
    torch.testing.assert_close(
        group_advantages(scores, mode="grpo", eps=0.0, **call), torch.tensor([-1.0, half, 1.0, -half, 0.0])
    )


@pytest.mark.parametrize("mode", MODES)
def test_a_lone_response_has_no_advantage_and_equal_ones_have_none(impl, mode):
    scores, ids = torch.tensor([0.1, 1e8, 0.1, 3.0, 0.1, 4.0]), torch.tensor([0, 1, 0, 2, 0, 2])
    got = group_advantages(scores, ids, mode=mode, impl=impl)
    assert [float(x) for x in got[[0, 1, 2, 4]]] == [0.0] * 4
    assert got[3] < 0 < got[5]
    alone = group_advantages(torch.full((3,), 0.1, dtype=torch.float64), group_size=3, mode=mode, eps=0.0, impl=impl)
    assert not alone.any(), "no rounding of the mean may be blown up by a deviation of nearly 0"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shift", [64.0, -4096.0])
def test_scores_of_a_prompt_may_be_shifted(impl, mode, shift):
    scores, ids = (torch.randn(20) * 256).round() / 256, torch.arange(20) % 3
    moved = scores + torch.where(ids == 1, shift, 0.0)
    results = [group_advantages(s, ids, mode=mode, impl=impl) for s in (scores, moved)]
    assert bit_equal(*results)
    assert results[0].abs().max() > 0.5


@pytest.mark.parametrize("mode", ["rloo", "grpo", "dr_grpo"])
def test_groups_do_not_know_of_each_other(impl, mode):
    """Neither of their order nor of their names nor of who stands between them."""
    ids = shuffled_ids([5, 1, 40, 2, 9])
    scores = torch.randn(len(ids))
    whole = group_advantages(scores, ids, mode=mode, impl=impl)
    renamed = {int(g): n for n, g in enumerate(ids.unique().flip(0))}
    other = torch.tensor([renamed[int(g)] for g in ids])
    assert bit_equal(group_advantages(scores, other, mode=mode, impl=impl), whole)
    for name in renamed:
        mine = ids == name
        alone = group_advantages(scores[mine], group_size=int(mine.sum()), mode=mode, impl=impl)
        assert bit_equal(alone, whole[mine])


@pytest.mark.parametrize("mode", MODES)
def test_responses_may_change_places(impl, mode):
    scores, ids, order = torch.randn(60), torch.arange(60) % 7, torch.randperm(60)
    one = group_advantages(scores, ids, mode=mode, impl=impl)
    other = group_advantages(scores[order], ids[order], mode=mode, impl=impl)
    torch.testing.assert_close(other, one[order], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mode", MODES)
def test_the_advantages_of_a_group_add_up_to_zero(impl, mode):
    got = group_advantages(torch.randn(40), group_size=8, mode=mode, impl=impl)
    assert got.view(5, 8).double().sum(1).abs().max() < 1e-5
    assert got.abs().max() > 0.5


@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_a_score_that_is_no_number_is_no_member_of_its_group(impl, bad):
    """Its advantage is 0, and those of the others are what they are without it."""
    scores, ids = torch.randn(9).abs(), torch.tensor([0, 1, 0, 1, 2, 0, 1, 0, 3])
    spoiled, keep = scores.clone(), torch.ones(9, dtype=torch.bool)
    for place in (2, 8):  # one of several, and the only one of its group
        spoiled[place], keep[place] = bad if place == 2 else -bad, False
    for options in (*({"mode": mode} for mode in MODES), *SCALED):
        got, stats = group_advantages(spoiled, ids, stats=True, impl=impl, **options)
        want = group_advantages(scores[keep], ids[keep], impl=impl, **options)
        torch.testing.assert_close(got[keep], want, rtol=1e-6, atol=1e-7)
        assert got[keep].any()
        assert not got[~keep].any()
        assert stats == (4, 2, 2)
    nothing, stats = group_advantages(torch.full((4,), bad), group_size=2, mode="gdpo", stats=True, impl=impl)
    assert bit_equal(nothing, torch.zeros(4))
    assert stats == (2, 2, 4)


@pytest.mark.parametrize("options", SCALED)
@pytest.mark.parametrize("sizes", [[1], [2], [3, 1, 5, 2], [33, 64, 1, 31, 32, 100], []])
def test_further_modes_match_the_loop(impl, sizes, options):
    ids = shuffled_ids(sizes)
    scores = torch.randn(len(ids))
    scores = scores.abs() if options.get("mode") == "maxrl" else scores
    for eps in (None, 0.0, 0.5):
        check(impl, scores, ids, eps=eps, **options)
    check(impl, scores.double(), ids, **options)


def test_the_deviation_of_the_others_does_not_cancel(impl):
    """One response far from the others is divided by what these differ, not by a rounding of its own distance."""
    for far in (1e6, -1e6):
        check(impl, torch.tensor([1.1, far, 2.3, 3.7]), group_size=4, scale_rewards="group", eps=0.0)
    groups = torch.tensor([[-1e6, 1.1, 1.1, 1.1], [5.3, 5.3, 5.3, 1e8], [0.1, 0.1, 0.1, 0.1]])
    got = check(impl, groups.flatten(), group_size=4, scale_rewards="group", eps=0.0).view(3, 4)
    assert float(got[0, 0]) == pytest.approx(-1e6 - 1.1), "others that do not differ divide nothing"
    assert float(got[1, 3]) == pytest.approx(1e8 - 5.3)
    assert not got[2].any()
    pair = group_advantages(torch.tensor([1.0, 4.0]), group_size=2, scale_rewards="group", impl=impl)
    assert pair.tolist() == [-3.0, 3.0], "one other has no deviation"


def test_several_rewards_are_compared_one_by_one(impl):
    scores, ids, weights = torch.randn(12, 3), torch.arange(12) % 3, torch.tensor([1.0, -0.5, 2.0])
    scores[4, 1], scores[5] = NAN, NAN
    for options in ({}, {"mode": "grpo"}, {"mode": "grpo", "scale_rewards": "batch"}, {"mode": "gdpo"}):
        check(impl, scores, ids, **options)
        check(impl, scores.half(), ids, reward_weights=weights.half(), **options)
    got, stats = group_advantages(scores, ids, mode="grpo", reward_weights=weights, stats=True, impl=impl)
    alone = [group_advantages(scores[:, r], ids, mode="grpo", impl=impl) * weights[r] for r in range(3)]
    torch.testing.assert_close(got, sum(alone), rtol=1e-6, atol=1e-6)
    assert stats == (3, 0, 4)
    one = group_advantages(scores[:, :1], ids, mode="gdpo", impl=impl)
    assert bit_equal(one, group_advantages(scores[:, 0], ids, mode="gdpo", impl=impl))


def test_what_scale_rewards_names(impl):
    scores = torch.randn(20)
    call = {"group_size": 4, "impl": impl}
    for options, same in (
        ({"mode": "grpo", "scale_rewards": "group"}, {"mode": "grpo"}),
        ({"mode": "grpo", "scale_rewards": "none"}, {"mode": "dr_grpo"}),
        ({"mode": "rloo", "scale_rewards": "none"}, {"mode": "rloo"}),
    ):
        assert bit_equal(group_advantages(scores, **call, **options), group_advantages(scores, **call, **same))
    batch = group_advantages(scores, mode="grpo", scale_rewards="batch", eps=0.0, **call)
    centred = group_advantages(scores, mode="dr_grpo", **call)
    torch.testing.assert_close(batch, centred / scores.std())


def test_statistics_count_groups_without_a_difference(impl):
    scores, ids = torch.tensor([1.0, 2.0, 3.0, 2.0, 3.0, NAN, 0.0]), torch.tensor([4, 4, 9, 4, 9, 9, -1])
    advantages, stats = group_advantages(scores, ids, stats=True, impl=impl)
    assert stats == GroupStats(3, 2, 1)
    assert all(x.dtype == torch.int64 and x.shape == () for x in stats)
    assert bit_equal(advantages, group_advantages(scores, ids, impl=impl))
    one_differs = torch.tensor([[1.0, 0.0], [1.0, 2.0], [1.0, 1.0], [1.0, 1.0]])
    assert group_advantages(one_differs, group_size=2, mode="gdpo", stats=True, impl=impl)[1] == (2, 1, 0)
    assert group_advantages(scores[:0], group_size=2, stats=True, impl=impl)[1] == (0, 0, 0)


def test_maxrl_is_for_scores_from_0(impl):
    success = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0])
    got = group_advantages(success, group_size=4, mode="maxrl", eps=0.0, validate=True, impl=impl)
    assert got.tolist() == [3.0, -1.0, -1.0, -1.0, -1.0, -1.0, 1.0, 1.0]
    assert not group_advantages(success * 0, group_size=4, mode="maxrl", eps=0.0, impl=impl).any()
    missing = torch.tensor([1.0, 0.0, -torch.inf, torch.nan])
    assert group_advantages(missing, group_size=4, mode="maxrl", validate=True, impl=impl)[2:].tolist() == [0.0, 0.0]
    assert_raises(
        ValueError,
        lambda: group_advantages(success - 1, group_size=4, mode="maxrl", validate=True, impl=impl),
        "maxrl", "from 0",
    )  # fmt: skip


def test_the_baseline_of_reinforce_plus_plus_is_whitened_group_means(impl):
    scores, ids = torch.randn(30) + 5, torch.arange(30) % 4
    got = group_advantages(scores, ids, mode="reinforce++_baseline", impl=impl)
    centred = group_advantages(scores, ids, mode="dr_grpo", impl=impl)
    assert bit_equal(got, whiten(centred, impl=impl))
    assert abs(float(got.double().mean())) < 1e-6
    assert float(got.double().var()) == pytest.approx(1.0, abs=1e-6)


def test_strided_inputs(impl):
    scores, ids = torch.randn(24), torch.arange(24) % 5
    wide = torch.stack([scores, scores + 1], 1), torch.stack([ids, ids + 1], 1)
    for mode in MODES:
        want = group_advantages(scores, ids, mode=mode, impl=impl)
        assert bit_equal(group_advantages(wide[0][:, 0], wide[1][:, 0], mode=mode, impl=impl), want)


WRONG = [
    ({"mode": "ppo"}, ValueError, ("mode", "rloo", "grpo", "ppo")),
    ({"group_ids": None}, ValueError, ("group_ids", "group_size")),
    ({"group_size": 2}, ValueError, ("group_ids", "group_size", "not both")),
    ({"group_ids": None, "group_size": 4}, ValueError, ("6 scores", "group_size=4", "group_ids")),
    ({"group_ids": None, "group_size": 0}, ValueError, ("group_size", ">= 1", "0")),
    ({"group_ids": None, "group_size": 2.0}, TypeError, ("group_size", "integer", "float")),
    ({"group_ids": torch.arange(5)}, ValueError, ("group_ids", "(6,)", "(5,)")),
    ({"group_ids": torch.arange(6.0)}, TypeError, ("group_ids", "int64", "float32")),
    ({"group_ids": torch.arange(6, device="meta")}, ValueError, ("group_ids", "meta", "cpu")),
    ({"scores": torch.randn(2, 3, 1)}, ValueError, ("scores", "[B, R]", "(2, 3, 1)")),
    ({"scores": torch.randn(6, 0)}, ValueError, ("scores", "[B, R]", "(6, 0)")),
    ({"scores": torch.randn(6, 2), "reward_weights": torch.ones(3)}, ValueError, ("reward_weights", "(2,)", "(3,)")),
    ({"reward_weights": torch.ones(1, dtype=torch.int64)}, TypeError, ("reward_weights", "float32", "int64")),
    ({"reward_weights": torch.ones(1, requires_grad=True)}, ValueError, ("reward_weights", "detach")),
    ({"reward_weights": torch.ones(1, device="meta")}, ValueError, ("reward_weights", "meta")),
    ({"scale_rewards": "mean"}, ValueError, ("scale_rewards", "batch", "mean")),
    ({"scale_rewards": "batch"}, ValueError, ("scale_rewards", "batch", "rloo", "group")),
    ({"mode": "gdpo", "scale_rewards": "group"}, ValueError, ("scale_rewards", "group", "gdpo", "grpo")),
    ({"scores": torch.ones(6, dtype=torch.bool)}, TypeError, ("scores", "bool")),
    ({"eps": -1.0}, ValueError, ("eps", "0", "-1.0")),
    ({"process_group": object()}, TypeError, ("process_group", "ProcessGroup", "object")),
    ({"process_group": ProcessGroup(0, 1)}, ValueError, ("process_group", "reinforce++_baseline", "rloo")),
    ({"impl": "nonsense"}, ValueError, ("nonsense", "torch")),
]


@pytest.mark.parametrize(("change", "error", "mentions"), WRONG)
def test_wrong_arguments_are_named(impl, change, error, mentions):
    arguments = {"scores": torch.randn(6), "group_ids": torch.arange(6) % 2, "impl": impl}
    assert_raises(error, lambda: group_advantages(**(arguments | change)), *mentions)
