"""Advantages over the responses to one prompt."""

import numpy as np
import pytest
import torch
from torch.distributed import ProcessGroup

from bench import oracle
from ppo_kernels import group_advantages, whiten
from tests.lib.helpers import NAN, assert_close_to_oracle, assert_raises, bit_equal, out_dtype

OP = "group_advantages"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MODES = ("rloo", "grpo", "dr_grpo", "reinforce++_baseline")


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


@pytest.mark.parametrize("eps", [0.0, 1e-4])
@pytest.mark.parametrize("mode", MODES[:-1])
def test_nan_shows_in_its_whole_group_and_nowhere_else(impl, mode, eps):
    scores = torch.tensor([NAN, 1.0, 2.0, NAN, 0.0, 0.0])
    got = group_advantages(scores, torch.tensor([7, 1, 1, 2, 2, 5]), mode=mode, eps=eps, impl=impl)
    assert got.isnan().tolist() == [True, False, False, True, True, False]


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
@pytest.mark.parametrize("mode", ["rloo", "grpo", "dr_grpo"])
def test_a_score_that_is_no_number_shows_in_its_group_alone(impl, mode, bad):
    scores, ids = torch.randn(9), torch.tensor([0, 1, 0, 1, 2, 0, 1, 0, 3])
    clean = group_advantages(scores, ids, mode=mode, impl=impl)
    scores[2] = bad
    got = group_advantages(scores, ids, mode=mode, impl=impl)
    assert bool(got[2].isnan())
    others = ids != 0
    assert bit_equal(got[others], clean[others])
    assert not got[[0, 5, 7]].isfinite().any()
    scores[8] = bad
    assert bool(group_advantages(scores, ids, mode=mode, impl=impl)[8].isnan()), "a lone one shows too"


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
    ({"scores": torch.randn(2, 3)}, ValueError, ("scores", "[B]", "(2, 3)")),
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
