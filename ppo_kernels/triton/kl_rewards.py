"""KL-shaped rewards: one program per row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppo_kernels._types import KL_ESTIMATORS
from ppo_kernels.triton._launch import (
    as_vector,
    block_for,
    launch,
    mask_bytes,
    new_tokens,
    require_code,
    require_like,
    row_sizes,
    token_rows,
)
from ppo_kernels.triton._math import clamp, kl_term, last_valid, load_valid, row_span, scaled_or_off


@triton.jit(do_not_specialize=("logprobs_stride", "ref_stride", "mask_stride", "rewards_stride", "length"))
def _kl_rewards_rows(
    logprobs, ref_logprobs, scores, mask, score_index, starts, kl_coef_tensor, rewards, kl,
    logprobs_stride, ref_stride, mask_stride, rewards_stride, length,
    kl_coef, score_clip, kl_log_clamp, kl_clamp,
    UNIT: tl.constexpr, ESTIMATOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first, length = row_span(starts, length, row, UNIT)
    logprobs += first * logprobs_stride
    ref_logprobs += first * ref_stride
    rewards += first * rewards_stride
    if mask is not None:
        mask += first * mask_stride
    if kl_coef_tensor is not None:
        kl_coef = tl.load(kl_coef_tensor).to(logprobs.dtype.element_ty)
    at = last_valid(mask, length, BLOCK)
    if score_index is not None:
        at = tl.where(at < 0, -1, tl.load(score_index + row))
    score = clamp(tl.load(scores + row), score_clip)

    total = tl.zeros([BLOCK], logprobs.dtype.element_ty)
    for begin in range(0, length, BLOCK):
        t = begin + tl.arange(0, BLOCK)
        inside = t < length
        valid = load_valid(mask, t, inside)
        logp = tl.where(valid, tl.load(logprobs + t, mask=inside, other=0.0), 0.0)
        ref = tl.where(valid, tl.load(ref_logprobs + t, mask=inside, other=0.0), 0.0)
        k, _ = kl_term(logp, ref, kl_log_clamp, kl_clamp, ESTIMATOR)
        total += k
        # 0 - x is never -0, whatever the sign of the penalty.
        tl.store(rewards + t, tl.where(t == at, score, 0.0) - scaled_or_off(kl_coef, k), mask=inside)
    tl.store(kl + row, tl.sum(total, 0))


def kl_rewards(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    scores: Tensor,
    mask: Tensor | None,
    score_index: Tensor | None,
    cu_seqlens: Tensor | None,
    kl_coef_tensor: Tensor | None,
    kl_coef: float,
    kl_estimator: int,
    score_clip: float,
    kl_log_clamp: float,
    kl_clamp: float,
) -> tuple[Tensor, Tensor]:
    require_code("kl_estimator", kl_estimator, len(KL_ESTIMATORS))
    rows = token_rows(logprobs, cu_seqlens)
    require_like("ref_logprobs", ref_logprobs, logprobs)
    mask = mask_bytes(mask, logprobs)
    rewards = new_tokens(logprobs, rows)
    kl = torch.empty(rows.batch, dtype=logprobs.dtype, device=logprobs.device)
    # Packed lengths are not known here, and a block that followed their mean would let the neighbours of a row change
    # the order of its sum. Four elements per thread are 16-byte loads.
    block = block_for(rows.length, most=1024, least=128) if rows.starts is None else 512
    launch(
        _kl_rewards_rows, rows.batch,
        logprobs=logprobs, ref_logprobs=ref_logprobs, mask=mask, starts=rows.starts, rewards=rewards, kl=kl,
        scores=as_vector("scores", scores, (rows.batch,), logprobs.dtype),
        score_index=as_vector("score_index", score_index, (rows.batch,), torch.int64),
        kl_coef_tensor=as_vector("kl_coef_tensor", kl_coef_tensor, (), torch.float64),
        **row_sizes(rows, logprobs=logprobs, ref=ref_logprobs, mask=mask, rewards=rewards),
        kl_coef=kl_coef, score_clip=score_clip, kl_log_clamp=kl_log_clamp, kl_clamp=kl_clamp,
        ESTIMATOR=kl_estimator, BLOCK=block, num_warps=block // 128,
    )  # fmt: skip
    return rewards, kl
