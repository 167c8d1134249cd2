"""Generalised advantage estimation, from the last token to the first."""

from __future__ import annotations

import numpy as np

from bench.oracle._tokens import bools, floats, rows_of, shaped


def gae(
    rewards,
    values,
    mask=None,
    *,
    gamma=1.0,
    lam=0.95,
    masked_steps="skip",
    bootstrap_value=None,
    cu_seqlens=None,
) -> tuple[np.ndarray, np.ndarray]:
    r, v, valid = floats(rewards), floats(values), bools(mask, rewards)
    adv, ret = [0.0] * len(r), [0.0] * len(r)
    for b, row in enumerate(rows_of(rewards, cu_seqlens)):
        row_lam = lam if isinstance(lam, float | int) else float(lam[b].double())
        ahead_v = 0.0 if bootstrap_value is None else float(bootstrap_value[b].double())
        ahead_a = 0.0
        reached = False
        for t in reversed(row):
            reached = reached or valid[t]
            if not reached or (masked_steps == "skip" and not valid[t]):
                continue
            seen = valid[t] or masked_steps == "keep"
            r_t, v_t = (r[t], v[t]) if seen else (0.0, 0.0)
            ahead_a = r_t + gamma * ahead_v - v_t + gamma * row_lam * ahead_a
            ahead_v = v_t
            if valid[t]:
                adv[t], ret[t] = ahead_a, ahead_a + v_t
    return shaped(adv, rewards), shaped(ret, rewards)
