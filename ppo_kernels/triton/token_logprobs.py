"""Token log-probabilities on Triton: one read of the logits forward, one read and one write backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppo_kernels._registered import require
from ppo_kernels._types import compute_dtype
from ppo_kernels.triton import _labels
from ppo_kernels.triton._labels import NOT_READ, leading, log2_per_logit, row_start
from ppo_kernels.triton._launch import (
    as_vector,
    launch,
    mask_bytes,
    require_dtype,
    require_shape,
    require_unit_stride,
)
from ppo_kernels.triton._math import INF, LN2, LOG2E, exp, expm1, log1p

_VECTOR_BYTES = 16
_TILE = 16384  # logits of a backward program, whole blocks: enough to pay for the row's values, and many programs
# Nothing is specialized on a size or an address: the few variants are those of the tl.constexpr arguments.
_SIZES = "outer_stride inner_stride out_outer_stride out_inner_stride inner vocab tiles ignore_index"
_ROW_VALUES = "labels mask temperature_rows grad_logprobs grad_entropy logprobs entropy row_max log_sum"
_GENERAL = f"logits out {_SIZES} {_ROW_VALUES}".split()


@triton.jit
def _misalignment(start, K: tl.constexpr):
    """How many elements ``start`` lies past a boundary of K elements (16 bytes)."""
    SIZE: tl.constexpr = start.dtype.element_ty.primitive_bitwidth // 8
    return (start.to(tl.uint64) % (SIZE * K)).to(tl.int32) // SIZE


@triton.jit
def _negligible(DTYPE: tl.constexpr):
    """2^this is 0. An exponent is not let below it, because 0 * -inf would be NaN."""
    return -2000.0 if DTYPE.primitive_bitwidth == 64 else -200.0


@triton.jit
def _bounded(x):
    return tl.maximum(x, _negligible(x.dtype), propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _rebase(peak, top, c):
    """What to subtract for the maximum ``top``, and log2 of the scale that moves sums from ``peak`` to it, a column."""
    base = tl.where(top == -INF, 0.0, top)  # -inf alone: nothing to subtract
    return base, _bounded((tl.where(peak == -INF, base, peak) - base) * c)[:, None]


# A lane reads U groups of K consecutive columns of a block, whatever the address of the row, so that the address
# changes no bit. It reads them from the 16-byte boundary before the group and, where that cuts the group, from the one
# after: column j of the group then is in place (j + shift) % K. There is one tensor per group: with a third axis it
# would be for the version of Triton to say which axis goes to the threads.


@triton.jit
def _inner_block(
    vectors, begin, shift,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, U: tl.constexpr, LANES: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The U groups of every lane in a block that lies inside its row, vectors included, and without the label."""
    k = tl.arange(0, K)[None, :]
    groups = ()
    for u in tl.static_range(U):
        at = begin + ((u * LANES + tl.arange(0, LANES)[:, None]) * K + k)
        z = tl.load(vectors + at)
        if not ALIGNED:
            z = tl.where(k >= shift, z, tl.load(vectors + (at + K)))
        groups += (z.to(DTYPE),)  # type: ignore[assignment]
    return groups


@triton.jit
def _other_block(
    vectors, begin, shift, vocab, label,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, U: tl.constexpr, LANES: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The same of any block: -inf takes the place of the label and of what lies beyond the row."""
    k = tl.arange(0, K)[None, :]
    groups = ()
    for u in tl.static_range(U):
        at = begin + ((u * LANES + tl.arange(0, LANES)[:, None]) * K + k)
        column = at - shift
        z = tl.load(vectors + at, mask=(k >= shift) & (column < vocab), other=-INF).to(DTYPE)
        if not ALIGNED:
            after = tl.load(vectors + (at + K), mask=(k < shift) & (column + K < vocab), other=-INF).to(DTYPE)
            z = tl.where(k >= shift, z, after)
            column = tl.where(k >= shift, column, column + K)
        groups += (tl.where(column == label, -INF, z),)  # type: ignore[assignment]
    return groups


@triton.jit(do_not_specialize=_GENERAL)
def _forward(
    logits, labels, mask, temperature_rows, logprobs, entropy, row_max, log_sum,
    outer_stride, inner_stride, inner, vocab, ignore_index, temperature: tl.float64,
    ENTROPY: tl.constexpr, ALIGNED: tl.constexpr, U: tl.constexpr, LANES: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = logprobs.dtype.element_ty
    BLOCK: tl.constexpr = U * LANES * K
    row = tl.program_id(0)
    label = tl.load(labels + row)
    live = label != ignore_index
    if mask is not None:
        live = live & (tl.load(mask + row) != 0)
    read = live & (label >= 0) & (label < vocab)
    label = tl.where(read, label, 0).to(tl.int32)
    start = row_start(logits, row, outer_stride, inner_stride, inner)
    target = tl.load(start + label, mask=read, other=-INF).to(DTYPE)
    c64 = log2_per_logit(temperature_rows, temperature, row, DTYPE)
    c = c64.to(DTYPE)
    shift = _misalignment(start, K)
    vectors = tl.multiple_of(start - shift, 16)

    # Each lane has its own maximum, and a sum of 2^x and of 2^x x for each place in its vectors, where x is
    # (z - maximum) c: nothing crosses lanes until the row is read. The target is left out (see _finish).
    peak = tl.full((LANES,), -INF, DTYPE)
    s = tl.zeros((LANES, K), DTYPE)
    e = tl.zeros((LANES, K), DTYPE)
    for begin in range(0, tl.where(read, vocab, 0), BLOCK):
        inside = begin + BLOCK <= vocab if ALIGNED else (begin > 0) & (begin + (BLOCK + K) <= vocab)
        if inside & ((label < begin) | (label >= begin + BLOCK)):
            z = _inner_block(vectors, begin, shift, DTYPE, ALIGNED, U, LANES, K)
        else:
            z = _other_block(vectors, begin, shift, vocab, label, DTYPE, ALIGNED, U, LANES, K)
        top = peak
        for u in tl.static_range(U):
            top = tl.maximum(top, tl.max(z[u], axis=1))
        base, rescale = _rebase(peak, top, c)
        peak = top
        block_s = tl.zeros((LANES, K), DTYPE)
        block_e = tl.zeros((LANES, K), DTYPE)
        for u in tl.static_range(U):
            x = (z[u] - base[:, None]) * c
            if ENTROPY:
                x = _bounded(x)
            p = tl.exp2(x)
            if ENTROPY:
                block_e += p * x
            block_s += p
        scale = tl.exp2(rescale)
        if ENTROPY:
            e = (e + s * rescale) * scale + block_e
        s = s * scale + block_s

    top = tl.max(peak, axis=0)
    _, rescale = _rebase(peak, top, c)
    e = _in_column_order(tl.sum((e + s * rescale) * tl.exp2(rescale), axis=0), shift, K)
    s = _in_column_order(tl.sum(s * tl.exp2(rescale), axis=0), shift, K)
    logp, h, peak, logz = _finish(target, top, s, e, c64)
    tl.store(logprobs + row, tl.where(live, logp, 0.0))
    tl.store(row_max + row, tl.where(live, peak, 0.0))
    tl.store(log_sum + row, tl.where(live, logz, NOT_READ))
    if ENTROPY:
        tl.store(entropy + row, tl.where(live, h, 0.0))


@triton.jit
def _in_column_order(x, shift, K: tl.constexpr):
    """The sum of x, whose element j is in place (j + shift) % K, in the order of j."""
    j = tl.arange(0, K)
    chosen = (j[:, None] + shift) % K == j[None, :]
    return tl.sum(tl.sum(tl.where(chosen, x[None, :], 0.0), axis=1), axis=0)


@triton.jit
def _finish(target, top, s, e, c64):
    """(log p, entropy, maximum, log of the sum) of a row, from its target and the statistics of all other logits.

    For p near 1 the sum over the others is the whole information, and log1p keeps it. The distance between the two
    is float64: one rounding of it would be most of the error.
    """
    DTYPE: tl.constexpr = top.dtype
    leads = (target >= top) | (s == 0.0)  # the target is the largest
    far = -tl.abs(target.to(tl.float64) - top.to(tl.float64)) * c64
    far = tl.where((s == 0.0) | (target == -INF), -INF, far)
    bounded = tl.maximum(far, 10.0 * _negligible(DTYPE))
    whole = tl.floor(bounded)
    small = tl.exp2((bounded - whole).to(DTYPE)) * tl.exp2(_bounded(whole.to(DTYPE)))  # 2^far, exact for any far
    x = bounded.to(DTYPE)
    rest = s * small
    total = tl.where(leads, 1.0 + rest, s + small)
    logz = tl.where(leads, log1p(rest), tl.log(total))
    logp = tl.where(leads, 0.0, far * LN2) - logz.to(tl.float64)
    h = logz - tl.where(leads, (e + s * x) * small, e + small * x) / total * LN2
    fine = (s < INF) & (target < INF) & ((s > 0.0) | (target > -INF))
    logp = tl.where(fine, tl.where(logp > 0.0, 0.0, logp), float("nan")).to(DTYPE)
    h = tl.where(fine, tl.where(h < 0.0, 0.0, h), float("nan"))
    return logp, h, tl.where(fine, tl.where(leads, target, top), float("nan")), tl.where(fine, logz, float("nan"))


@triton.jit
def _gradient(z, column, label, target_gradient, live, base, c, a, b, k, ENTROPY: tl.constexpr):
    """2^x (a + b (x + k)) with x = (z - base) c; its own formula at the label, zeros in a row without a gradient."""
    x = (z.to(base.dtype) - base) * c
    if ENTROPY:
        x = _bounded(x)
        weight = a + b * (x + k)
    else:
        weight = a
    return tl.where(live, tl.where(column == label, target_gradient, tl.exp2(x) * weight), 0.0)


@triton.jit(do_not_specialize=_GENERAL)
def _backward(
    logits, out, labels, temperature_rows, grad_logprobs, grad_entropy, logprobs, entropy, row_max, log_sum,
    outer_stride, inner_stride, out_outer_stride, out_inner_stride, inner, vocab, tiles, temperature: tl.float64,
    TILE: tl.constexpr, U: tl.constexpr, LANES: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Gradient of TILE logits of one row: vectors of K that begin at a boundary, and the ends that fill no vector."""
    DTYPE: tl.constexpr = logprobs.dtype.element_ty
    ENTROPY: tl.constexpr = grad_entropy is not None
    row = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    label = tl.load(labels + row)
    label = tl.where((label >= 0) & (label < vocab), label, -1).to(tl.int32)
    logp = tl.load(logprobs + row)
    logz = tl.load(log_sum + row)
    base = tl.load(row_max + row)
    c64 = log2_per_logit(temperature_rows, temperature, row, DTYPE)
    per_tau = (c64 * LN2).to(DTYPE)
    c = c64.to(DTYPE)
    scale = exp(-logz) * per_tau
    target = tl.zeros((), DTYPE)
    live = logz != logz  # false
    a = target
    b = target
    k = target
    if grad_logprobs is not None:
        g = tl.load(grad_logprobs + row)
        live = g != 0.0
        a = -g * scale
        target = -g * expm1(logp)
    if ENTROPY:
        g = tl.load(grad_entropy + row)
        h = tl.load(entropy + row)
        live = live | (g != 0.0)
        b = -g * scale * LN2
        k = (h - logz) * LOG2E
        p = exp(logp)
        target += tl.where(p > 0.0, -g * p * (logp + h), 0.0 * p)
    target = target * per_tau
    live = live & (logz != NOT_READ)
    readable = tl.where(live, vocab, 0)  # nothing of a row without a gradient

    start = row_start(logits, row, outer_stride, inner_stride, inner)
    to = row_start(out, row, out_outer_stride, out_inner_stride, inner)
    shift = _misalignment(start, K)  # of both
    BYTES: tl.constexpr = K * (logits.dtype.element_ty.primitive_bitwidth // 8)
    vectors = tl.multiple_of(start - shift, BYTES)
    vectors_out = tl.multiple_of(to - shift, BYTES)
    at = tl.arange(0, U)[:, None, None] * (LANES * K) + tl.arange(0, LANES)[None, :, None] * K
    place = tl.arange(0, K)[None, None, :]
    for begin in range(tile * TILE, tl.minimum((tile + 1) * TILE, vocab + shift), U * LANES * K):
        first = begin + at - shift
        whole = (first >= 0) & (first + K <= vocab)
        z = tl.load(vectors + begin + (at + place), mask=whole & (first < readable), other=-INF)
        grad = _gradient(z, first + place, label, target, live, base, c, a, b, k, ENTROPY)
        tl.store(vectors_out + begin + (at + place), grad.to(out.dtype.element_ty), mask=whole)

    # The vectors that hold the row's first and last logit, where they reach beyond it.
    end = tl.arange(0, 2)[:, None]
    at = end * ((shift + vocab - 1) // K) * K
    column = at - shift + tl.arange(0, K)[None, :]
    cut = (at - shift < 0) | (at - shift + K > vocab)
    mine = (tile == 0) & cut & (column >= 0) & (column < vocab) & ((end == 0) | (at > 0))
    z = tl.load(start + column, mask=mine & (column < readable), other=-INF)
    grad = _gradient(z, column, label, target, live, base, c, a, b, k, ENTROPY)
    tl.store(to + column, grad.to(out.dtype.element_ty), mask=mine)


def _shape(vocab: int, dtype: torch.dtype) -> tuple[int, dict[str, int]]:
    """Warps and block of a vocabulary: 32 logits a thread, so that sums are rescaled rarely and enough loads are under
    way; few warps, but enough that at most 32 float32 additions follow each other at 256 000 logits."""
    warps, logits = (1, 8) if vocab <= 512 else (1, 32) if vocab <= 8192 else (4, 32) if vocab <= 65536 else (8, 32)
    k = _VECTOR_BYTES // dtype.itemsize
    return warps, {"U": logits // k, "LANES": 32 * warps, "K": k}


def _phase(x: Tensor, *strides: int) -> list[int]:
    """Bytes from a 16-byte boundary to x and from row to row: where these agree, boundaries are at the same columns."""
    return [offset % _VECTOR_BYTES for offset in (x.data_ptr(), *(stride * x.itemsize for stride in strides))]


def _check_logits(logits: Tensor) -> None:
    fits = logits.is_floating_point() and logits.dim() > 0 and 1 <= logits.size(-1) < 2**30
    require(fits, f"logits must be floating [..., V] with 1 <= V < 2^30, got {logits.dtype} {list(logits.shape)}")
    require_unit_stride("logits", logits)


def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    temperature_rows: Tensor | None,
    temperature: float,
    ignore_index: int,
    entropy: bool,
) -> tuple[Tensor, Tensor]:
    _check_logits(logits)
    vocab, dtype = logits.size(-1), compute_dtype(logits)
    rows = logits.numel() // vocab
    layout = leading(logits)
    if layout is None:
        logits = logits.contiguous()
        layout = (0, vocab, rows)
    many = _labels.per_row(labels, logits)
    logprobs = logits.new_empty(labels.shape, dtype=dtype)
    stats = logits.new_empty((3 if entropy else 2, *logits.shape[:-1]), dtype=dtype)
    row_max, log_sum, *h = stats
    warps, shape = _shape(vocab, logits.dtype)
    label = as_vector("labels", labels, labels.shape, torch.int64)
    valid = as_vector("mask", mask_bytes(mask, row_max), row_max.shape, torch.uint8)
    tau = as_vector("temperature_rows", temperature_rows, logits.shape[:-1], torch.float64)
    more = (h[0] if h else None, row_max, log_sum)
    read_for, results = label, (logprobs, *more)
    if many > 1:
        read_for = _labels.anchors(logits, label, valid, layout, many, ignore_index)
        results = (torch.empty_like(row_max), *more)  # of the anchors
    sizes = (*layout, vocab, ignore_index, temperature)
    shape |= {"ENTROPY": entropy, "ALIGNED": not any(_phase(logits, *layout[:2]))}
    launch(_forward, rows, logits, read_for, valid, tau, *results, *sizes, num_warps=warps, fp_fusion=True, **shape)
    if many > 1:
        outputs = (logprobs, *more)
        _labels.write_logprobs(logits, label, tau, outputs, layout, many, ignore_index, temperature)
    return logprobs, stats


def token_logprobs_backward(logits: Tensor, *rest) -> Tensor:
    return _write_gradient(torch.empty_like(logits, memory_format=torch.contiguous_format), logits, *rest)


def token_logprobs_backward_(logits: Tensor, *rest) -> None:
    _write_gradient(logits, logits, *rest)


def _write_gradient(
    out: Tensor,
    logits: Tensor,
    labels: Tensor,
    temperature_rows: Tensor | None,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    logprobs: Tensor,
    softmax_stats: Tensor,
    temperature: float,
    ignore_index: int,
) -> Tensor:
    """Write the gradient to ``out``: contiguous, or the logits themselves."""
    _check_logits(logits)
    vocab, dtype = logits.size(-1), compute_dtype(logits)
    rows = logits.numel() // vocab
    layout = leading(logits)
    to = out
    if layout is None:
        if out is logits:
            to = torch.empty(out.shape, dtype=out.dtype, device=out.device)
        logits, layout = logits.contiguous(), (0, vocab, rows)
    inner = layout[2]
    to_strides = layout[:2] if to is logits else (inner * vocab if inner < rows else 0, vocab)
    warps, shape = _shape(vocab, logits.dtype)
    if to.dtype != logits.dtype or _phase(to, *to_strides) != _phase(logits, *layout[:2]):
        shape |= {"U": 8, "K": 1}  # no vectors: those of the logits and of the gradient hold different columns
    tiles = triton.cdiv(vocab + shape["K"] - 1, _TILE)
    many = _labels.per_row(labels, logits)
    label = as_vector("labels", labels, labels.shape, torch.int64)
    tau = as_vector("temperature_rows", temperature_rows, logits.shape[:-1], torch.float64)
    g = as_vector("grad_logprobs", grad_logprobs, labels.shape, dtype)
    logp = as_vector("logprobs", logprobs, labels.shape, dtype)
    g_h = as_vector("grad_entropy", grad_entropy, logits.shape[:-1], dtype)
    each = 3 if g_h is not None or (softmax_stats.dim() > 0 and softmax_stats.size(0) == 3) else 2
    require_shape("softmax_stats", softmax_stats, (each, *logits.shape[:-1]))
    require_dtype("softmax_stats", softmax_stats, dtype)
    peak, logz, *more = softmax_stats.contiguous().view(each, rows)
    h = None if g_h is None else more[0]
    row_data = (label, tau, g, g_h, logp, h, peak, logz)
    if many > 1:  # of rows without a label
        g_row = None if g is None else _labels.sums(g, label, logz, vocab, many, ignore_index)
        none = torch.full((rows,), -1, device=logits.device)
        row_data = (none, tau, g_row, g_h, peak, h, peak, logz)
    sizes = (*layout[:2], *to_strides, inner, vocab, tiles, temperature)
    launch(_backward, rows * tiles, logits, to, *row_data, *sizes, num_warps=warps, fp_fusion=True, TILE=_TILE, **shape)
    if many > 1 and g is not None:
        label_data = (label, tau, g, g_h, logp, h, logz)
        _labels.write_gradients(to, label_data, (*to_strides, inner), many, ignore_index, temperature)
    return out if to is out else out.copy_(to)
