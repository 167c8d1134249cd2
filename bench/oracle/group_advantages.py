"""Advantages over the responses to one prompt."""

from __future__ import annotations

import math

import numpy as np

from bench.oracle._tokens import floats, shaped, total

EPS = {"maxrl": 1e-6, "reinforce++_baseline": 1e-8}


def group_advantages(
    scores, group_ids=None, *, group_size=None, mode="rloo", scale_rewards=None, reward_weights=None, eps=None
) -> np.ndarray:
    eps = EPS.get(mode, 1e-4) if eps is None else eps
    several = scores[:, None] if scores.dim() == 1 else scores
    weights = [1.0] * several.shape[1] if reward_weights is None else floats(reward_weights)
    batch = several.shape[0]
    ids = [b // group_size for b in range(batch)] if group_ids is None else [int(g) for g in group_ids.tolist()]
    out, scored = [0.0] * batch, [False] * batch
    for r, weight in enumerate(weights):
        score = floats(several[:, r])
        finite = [b for b in range(batch) if math.isfinite(score[b])]
        of_all = _deviation([score[b] for b in finite])
        for name in {ids[b] for b in finite}:
            group = [b for b in finite if ids[b] == name]
            for b in group:
                out[b] += weight * _one(score, b, group, of_all, mode, scale_rewards, eps)
                scored[b] = True
    if mode in ("reinforce++_baseline", "gdpo"):
        inside = [a for a, yes in zip(out, scored, strict=True) if yes]
        mean, deviation = _mean(inside), _deviation(inside)
        by = math.sqrt(deviation**2 + eps) if mode == "reinforce++_baseline" else deviation + eps
        out = [(a - mean) / by if yes and by else 0.0 for a, yes in zip(out, scored, strict=True)]
    return shaped(out, scores if scores.dim() == 1 else scores[:, 0])


def _one(score, b, group, of_all, mode, scale_rewards, eps) -> float:
    """The advantage of response b over its group, itself included, by one reward."""
    others = [score[c] for c in group if c != b]
    if not others:
        return 0.0
    if mode == "rloo":
        spread = _deviation(others) if scale_rewards == "group" else 0.0
        difference = score[b] - _mean(others)
        return difference / (spread + eps) if spread else difference
    members = [score[c] for c in group]
    by = 1.0
    if mode == "maxrl":
        by = _mean(members) + eps
    elif mode in ("grpo", "gdpo") and scale_rewards != "none":
        by = (of_all if scale_rewards == "batch" else _deviation(members)) + eps
    return (score[b] - _mean(members)) / by if by else 0.0


def _mean(numbers) -> float:
    return numbers[0] + total(x - numbers[0] for x in numbers) / len(numbers) if numbers else 0.0


def _deviation(numbers) -> float:
    mean = _mean(numbers)
    return math.sqrt(total((x - mean) ** 2 for x in numbers) / (len(numbers) - 1)) if len(numbers) > 1 else 0.0
