"""Advantages over the responses to one prompt."""

from __future__ import annotations

import math

import numpy as np

from bench.oracle._tokens import floats, shaped, total


def group_advantages(scores, group_ids=None, *, group_size=None, mode="rloo", eps=None) -> np.ndarray:
    score = floats(scores)
    ids = [b // group_size for b in range(len(score))] if group_ids is None else [int(g) for g in group_ids.tolist()]
    out = []
    for b, mine in enumerate(ids):
        group = [c for c, other in enumerate(ids) if other == mine]
        mean = total(score[c] for c in group) / len(group)
        if mode == "rloo":
            rest = [score[c] for c in group if c != b]
            out.append(score[b] - total(rest) / len(rest) if rest else score[b] - score[b])
        elif mode == "grpo":
            m2 = total((score[c] - mean) ** 2 for c in group)
            spread = (math.sqrt(m2 / (len(group) - 1)) if len(group) > 1 else 0.0) + (1e-4 if eps is None else eps)
            out.append((score[b] - mean) / spread if spread else 0.0)
        else:
            out.append(score[b] - mean)
    if mode == "reinforce++_baseline" and len(out) > 1:
        mean = total(out) / len(out)
        variance = total((a - mean) ** 2 for a in out) / (len(out) - 1) + (1e-8 if eps is None else eps)
        out = [(a - mean) / math.sqrt(variance) if variance else 0.0 for a in out]
    return shaped(out, scores)
