"""group_advantages: scores of several responses to one prompt, in the order of a shuffled batch."""

from __future__ import annotations

import torch

from bench.cases import Case, Data, Target, normal, rows

MODES = ("rloo", "reinforce++_baseline", "maxrl", "gdpo", "grpo")
REWARDS = 3


def eager(scores, group_ids):
    """A loop over prompts, as most trainers have it."""
    advantages = torch.empty_like(scores)
    for prompt in group_ids.unique():
        mine = group_ids == prompt
        group = scores[mine]
        advantages[mine] = (group - group.mean()) / (group.std() + 1e-4)
    return advantages


def inputs(g, dtype, count):
    """Eight responses to each prompt, the prompts in turns."""
    prompts = max(1, count // 8)
    return {"scores": normal(g, count), "group_ids": torch.arange(count, device=g.device) % prompts}


def eager_gdpo(scores, group_ids):
    """Each reward by itself, then the batch."""
    total = sum(eager(reward, group_ids) for reward in scores.unbind(1))
    return (total - total.mean()) / (total.std() + 1e-4)


def several(g, dtype, count):
    one = inputs(g, dtype, count)
    return one | {"scores": normal(g, count, REWARDS)}


def accuracy(g):
    for offset in (0.0, 100.0):
        yield Data({"scores": (torch.randn(64, 8, generator=g) + offset).flatten()}, ("advantages",), {"group_size": 8})


def accurate_eager(scores, group_size, **options):
    groups = scores.view(-1, group_size)
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()


CASES = (
    Case(
        op="group_advantages",
        contract=True,
        rowwise=False,
        dense=True,
        per_token=False,
        inputs=lambda g, dtype, batch, length: rows(g, dtype, batch, "scores") | {"group_ids": torch.arange(batch) % 2},
        options={"mode": "grpo"},
        reach=(
            *((torch.float32, (count, 1), {"mode": mode}) for count in (64, 37) for mode in MODES),
            (torch.float32, (64, 1), {"mode": "rloo", "scale_rewards": "group"}),
            (torch.float32, (64, 1), {"stats": True}),
        ),
        choices={"mode": MODES},
        bare_options={"group_size": 1},
    ),
    Case(
        op="group_advantages",
        work="group_advantages grpo",
        inputs=inputs,
        options={"mode": "grpo"},
        eager=eager,
        moved=lambda x: 2 * x["scores"].nbytes + x["group_ids"].nbytes,
        eager_tolerance=1e-3,
        shapes={"quick": [(65536,)], "small": [(4096,)], "full": [(65536,)], "gpu": [(8192,)], "tiny": [(16,)]},
        accuracy=accuracy,
        accurate_eager=accurate_eager,
        targets=(Target("verl", 5),),
    ),
    Case(
        op="group_advantages",
        work="group_advantages gdpo",
        inputs=several,
        options={"mode": "gdpo"},
        eager=eager_gdpo,
        moved=lambda x: (2 * REWARDS + 3) * x["scores"][:, 0].numel() * 4 + x["group_ids"].nbytes,
        eager_tolerance=1e-3,
        shapes={"quick": [(65536,)], "small": [(4096,)], "full": [(65536,)], "gpu": [(8192,)], "tiny": [(16,)]},
        targets=(Target("verl", 5),),
    ),
)
