"""KL-shaped rewards, token by token."""

from __future__ import annotations

import numpy as np

from bench.oracle._kl import kl_token
from bench.oracle._tokens import bools, clamp, floats, rows_of, scaled_or_off, shaped


def kl_rewards(
    logprobs,
    ref_logprobs,
    scores,
    mask=None,
    *,
    kl_coef=0.1,
    kl_estimator="k1",
    score_clip=None,
    kl_log_clamp=None,
    kl_clamp=None,
    score_index=None,
    cu_seqlens=None,
) -> tuple[np.ndarray, np.ndarray]:
    logp, ref, valid, kl_coef = floats(logprobs), floats(ref_logprobs), bools(mask, logprobs), float(kl_coef)
    rewards, sums = [0.0] * len(logp), []
    for b, row in enumerate(rows_of(logprobs, cu_seqlens)):
        total, last = 0.0, None
        for t in row:
            if valid[t]:
                k, _ = kl_token(logp[t], ref[t], kl_estimator, kl_log_clamp, kl_clamp)
                total += k
                rewards[t] = -scaled_or_off(kl_coef, k)
                last = t
        sums.append(total)
        if last is None:
            continue
        at = last
        if score_index is not None:
            local = int(score_index[b])
            at = row[local] if 0 <= local < len(row) else None
        if at is not None:
            rewards[at] += clamp(float(scores[b].double()), score_clip)[0]
    return shaped(rewards, logprobs), np.array(sums)
