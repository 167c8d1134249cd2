"""Every group estimator of TRL, verl, OpenRLHF and SkyRL is ``group_advantages`` with arguments.

A row of ``ROWS`` is a row of the table in ``docs/losses.md``, where a test looks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import ppo_kernels as pk
from tests.verify.parity_groups import openrlhf_advantages, skyrl_advantages, trl_advantages, verl_advantages, verl_gdpo
from tests.verify.test_parity import PAGE, installed

K, WEIGHTS = 4, [1.0, -0.5, 2.0]
NAN = float("nan")


class Row(NamedTuple):
    trainer: str
    name: str  # as the trainer calls it
    theirs: Callable[[Tensor, Tensor], Tensor]  # of scores and group ids; TRL and OpenRLHF have K neighbours
    options: dict
    several: bool = False  # rewards
    missing: bool = False  # scores are left out
    positive: bool = False
    whitened: bool = False  # over the tokens


GDPO = {"multi_objective_aggregation": "normalize_then_sum"}
ROWS = (
    Row("verl", "grpo", lambda s, g: verl_advantages("grpo", s, g), {"mode": "grpo", "eps": 1e-6}),
    Row("verl", "grpo_vectorized", lambda s, g: verl_advantages("grpo_vectorized", s, g),
        {"mode": "grpo", "eps": 1e-6}),
    Row("verl", "grpo, norm_adv_by_std_in_grpo=False",
        lambda s, g: verl_advantages("grpo", s, g, norm_adv_by_std_in_grpo=False), {"mode": "dr_grpo"}),
    Row("verl", "rloo", lambda s, g: verl_advantages("rloo", s, g), {}),
    Row("verl", "rloo_vectorized", lambda s, g: verl_advantages("rloo_vectorized", s, g), {}),
    Row("verl", "gdpo", verl_gdpo, {"mode": "grpo"}, several=True, whitened=True),
    Row("verl", "gdpo, gdpo_reward_weights", lambda s, g: verl_gdpo(s, g, WEIGHTS),
        {"mode": "grpo", "reward_weights": torch.tensor(WEIGHTS)}, several=True, whitened=True),
    Row("SkyRL", "grpo", lambda s, g: skyrl_advantages("compute_grpo_outcome_advantage", s, g),
        {"mode": "grpo", "eps": 1e-6}),
    Row("SkyRL", "rloo", lambda s, g: skyrl_advantages("compute_rloo_outcome_advantage", s, g), {}),
    Row("SkyRL", "maxrl", lambda s, g: skyrl_advantages("compute_maxrl_advantage", s, g), {"mode": "maxrl"},
        positive=True),
    Row("OpenRLHF", "rloo", lambda s, g: openrlhf_advantages("rloo", s, K), {}),
    Row("OpenRLHF", "dr_grpo", lambda s, g: openrlhf_advantages("dr_grpo", s, K), {"mode": "dr_grpo"}),
    Row("OpenRLHF", "group_norm", lambda s, g: openrlhf_advantages("group_norm", s, K), {"mode": "grpo", "eps": 1e-9}),
    Row("TRL", "grpo", lambda s, g: trl_advantages("grpo", s, K), {"mode": "grpo"}, missing=True),
    Row("TRL", "grpo, scale_rewards=batch", lambda s, g: trl_advantages("grpo", s, K, scale_rewards="batch"),
        {"mode": "grpo", "scale_rewards": "batch"}, missing=True),
    Row("TRL", "grpo, scale_rewards=none", lambda s, g: trl_advantages("grpo", s, K, scale_rewards="none"),
        {"mode": "dr_grpo"}, missing=True),
    Row("TRL", "grpo, normalize_then_sum", lambda s, g: trl_advantages("grpo", s, K, torch.tensor(WEIGHTS), **GDPO),
        {"mode": "gdpo", "reward_weights": torch.tensor(WEIGHTS)}, several=True, missing=True),
    Row("TRL", "rloo", lambda s, g: trl_advantages("rloo", s, K), {}, missing=True),
)  # fmt: skip


def scores_of(row: Row) -> Tensor:
    g = torch.Generator().manual_seed(5)
    scores = torch.randn(6 * K, 3, generator=g) + torch.arange(6).repeat_interleave(K)[:, None]
    scores = scores.abs() + 0.1 if row.positive else scores
    if row.missing:
        scores[2], scores[9], scores[10, 0] = NAN, NAN, NAN
    return scores if row.several else scores[:, 1]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.trainer}-{row.name}")
def test_the_advantages_of_a_trainer_are_group_advantages_with_arguments(row):
    installed(row.trainer)
    scores, ids = scores_of(row), torch.arange(6).repeat_interleave(K)
    order = torch.arange(6 * K) if row.trainer in ("TRL", "OpenRLHF") else torch.randperm(6 * K)
    scores, ids = scores[order], ids[order]
    want = row.theirs(scores.clone(), ids)
    for impl in ("torch", "cpu"):
        got, stats = pk.group_advantages(scores, ids, **row.options, stats=True, impl=impl)
        got = pk.whiten(got, impl=impl) if row.whitened else got
        torch.testing.assert_close(got, want.float(), rtol=2e-5, atol=2e-6)
        assert stats == (6, 0, int((~scores.isfinite()).sum()))
    assert want.abs().max() > 0.5


def test_the_page_has_every_row():
    text = PAGE.read_text()
    assert not [row.name for row in ROWS if f"| {row.trainer} | `{row.name}`" not in text]
