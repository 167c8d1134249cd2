"""Several labels per row of logits on Triton: what surrounds the kernels of token_logprobs, which know of one.

They read a row for its likeliest label, its anchor, and write the gradient of a row without labels for the sum of what
came in. Both take K labels of a row at a time, whatever K is.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ppo_kernels._registered import require
from ppo_kernels.triton._launch import launch
from ppo_kernels.triton._math import INF, LN2, LOG2E, exp, expm1

NOT_READ = tl.constexpr(-1.0)  # log_sum of a row that is masked or ignored: no softmax has a negative one
_NO_LABEL = tl.constexpr(2**62)
_BLOCK = 64  # labels at a time
_OTHERS = 16  # that those are compared with at a time
_SIZES = "outer_stride inner_stride inner vocab many blocks ignore_index"
_VALUES = "labels mask temperature_rows grad_logprobs grad_entropy logprobs entropy row_max log_sum anchors sums"
_GENERAL = f"logits out {_SIZES} {_VALUES}".split()


@triton.jit
def row_start(pointer, row, outer_stride, inner_stride, inner):
    outer = (row // inner).to(tl.int64) * outer_stride
    return pointer + (outer + (row % inner).to(tl.int64) * inner_stride)


@triton.jit
def log2_per_logit(temperature_rows, temperature, row, DTYPE: tl.constexpr):
    """log2(e) / temperature, float64, at the nearest temperature at which it is a normal number of DTYPE."""
    tau = tl.full((), 0.0, tl.float64) + temperature
    if temperature_rows is not None:
        tau = tl.load(temperature_rows + row)
    smallest = tl.full((), 2.0**-1022 if DTYPE.primitive_bitwidth == 64 else 2.0**-126, tl.float64)
    least = smallest * 2.0**13  # the gradient multiplies 1 / tau by exponents
    return LOG2E / tl.where(tau > 0.0, tl.minimum(tl.maximum(tau, least), 1.0 / smallest), float("nan"))


@triton.jit
def _labels_from(labels, row, begin, many, used, vocab, ignore_index, BLOCK: tl.constexpr):
    """Labels of a row from number ``begin`` on: where they are in memory, themselves, which count, and which of those
    are tokens. ``used`` is their number, or 0."""
    k = begin + tl.arange(0, BLOCK)
    at = row.to(tl.int64) * many + k
    label = tl.load(labels + at, mask=k < used, other=ignore_index)
    counts = (k < used) & (label != ignore_index)
    return at, label, counts, counts & (label >= 0) & (label < vocab)


@triton.jit(do_not_specialize=_GENERAL)
def _anchors(
    logits, labels, mask, anchors, outer_stride, inner_stride, inner, vocab, many, ignore_index, BLOCK: tl.constexpr,
):  # fmt: skip
    """The likeliest label of a row, of equals the one with the lower number; without a token among them another label
    that counts, or ``ignore_index``."""
    row = tl.program_id(0)
    start = row_start(logits, row, outer_stride, inner_stride, inner)
    best = tl.full((), -INF, tl.float64)
    chosen = tl.full((), _NO_LABEL, tl.int64)
    other = tl.full((), ignore_index, tl.int64)
    used = many
    if mask is not None:
        used = tl.where(tl.load(mask + row) != 0, many, 0)
    for begin in range(0, used, BLOCK):
        _, label, counts, inside = _labels_from(labels, row, begin, many, used, vocab, ignore_index, BLOCK)
        z = tl.load(start + tl.where(inside, label, 0), mask=inside, other=-INF).to(tl.float64)
        z = tl.where(z != z, INF, z)  # makes the row NaN from wherever it is
        top = tl.max(z, axis=0)
        first = tl.min(tl.where(inside & (z == top), label, _NO_LABEL), axis=0)
        better = (top > best) | ((top == best) & (first < chosen))
        chosen = tl.where(better, first, chosen)
        best = tl.where(better, top, best)
        bad = tl.min(tl.where(counts & (inside == 0), label, _NO_LABEL), axis=0)
        other = tl.where(bad != _NO_LABEL, bad, other)
    tl.store(anchors + row, tl.where(chosen == _NO_LABEL, other, chosen))


@triton.jit(do_not_specialize=_GENERAL)
def _logprobs(
    logits, labels, temperature_rows, logprobs, entropy, row_max, log_sum,
    outer_stride, inner_stride, inner, vocab, many, ignore_index, temperature: tl.float64, BLOCK: tl.constexpr,
):  # fmt: skip
    """log p of each label from the statistics of its row, whose entropy becomes NaN with a label that is no token."""
    DTYPE: tl.constexpr = logprobs.dtype.element_ty
    row = tl.program_id(0)
    start = row_start(logits, row, outer_stride, inner_stride, inner)
    c64 = log2_per_logit(temperature_rows, temperature, row, DTYPE)
    logz = tl.load(log_sum + row)
    peak = tl.load(row_max + row)
    used = tl.where(logz != NOT_READ, many, 0)
    bad = 0
    for begin in range(0, many, BLOCK):
        at, label, counts, inside = _labels_from(labels, row, begin, many, used, vocab, ignore_index, BLOCK)
        z = tl.load(start + tl.where(inside, label, 0), mask=inside, other=float("nan"))
        logp = (z.to(tl.float64) - peak.to(tl.float64)) * c64 * LN2 - logz.to(tl.float64)
        logp = tl.where(logp > 0.0, 0.0, logp)
        there = begin + tl.arange(0, BLOCK) < many
        tl.store(logprobs + at, tl.where(counts, logp, 0.0).to(DTYPE), mask=there)
        bad += tl.max(tl.where(counts & (inside == 0), 1, 0), axis=0)
    if entropy is not None:
        tl.store(entropy + row, tl.full((), float("nan"), DTYPE), mask=bad > 0)


@triton.jit(do_not_specialize=_GENERAL)
def _sums(grad_logprobs, labels, log_sum, sums, vocab, many, ignore_index, BLOCK: tl.constexpr):
    """What comes in for a row: 0 only if nothing does, or if the row's gradient lies in its labels alone."""
    row = tl.program_id(0)
    logz = tl.load(log_sum + row)
    total = tl.zeros((), sums.dtype.element_ty)
    some = 0
    for begin in range(0, many, BLOCK):
        at, _, counts, inside = _labels_from(labels, row, begin, many, many, vocab, ignore_index, BLOCK)
        g = tl.load(grad_logprobs + at, mask=counts, other=0.0)
        some += tl.max(tl.where(g != 0.0, 1, 0), axis=0)
        total += tl.sum(tl.where(counts & (inside == 0), float("nan"), g), axis=0)
    total = tl.where(logz != logz, float("nan"), total)
    tl.store(sums + row, tl.where(some > 0, total, 0.0))


@triton.jit(do_not_specialize=_GENERAL)
def _gradients(
    out, labels, temperature_rows, grad_logprobs, grad_entropy, logprobs, entropy, log_sum,
    outer_stride, inner_stride, inner, vocab, many, blocks, ignore_index, temperature: tl.float64,
    BLOCK: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    """The gradient of BLOCK labels of a row: own (1 - p) - others p, with what comes in for the same label and for the
    others. A label that a row has several times is written as often, each time the same bits."""
    row = tl.program_id(0) // blocks
    begin = tl.program_id(0) % blocks * BLOCK
    at, label, _, inside = _labels_from(labels, row, begin, many, many, vocab, ignore_index, BLOCK)
    logp = tl.load(logprobs + at, mask=inside, other=0.0)
    own = tl.zeros_like(logp)
    others = tl.zeros_like(logp)
    some = 0
    for begin_other in range(0, many, OTHERS):
        at_g, other, counts, known = _labels_from(labels, row, begin_other, many, many, vocab, ignore_index, OTHERS)
        g = tl.load(grad_logprobs + at_g, mask=counts, other=0.0)
        some += tl.max(tl.where(g != 0.0, 1, 0), axis=0)
        g = tl.where(counts & (known == 0), float("nan"), g)
        same = label[:, None] == other[None, :]
        own += tl.sum(tl.where(same, g[None, :], 0.0), axis=1)
        others += tl.sum(tl.where(same, 0.0, g[None, :]), axis=1)
    p = exp(logp)
    grad = -own * expm1(logp) - others * p
    live = some > 0
    if grad_entropy is not None:
        g_h = tl.load(grad_entropy + row)
        h = tl.load(entropy + row)
        live = live | (g_h != 0.0)
        grad += tl.where(p > 0.0, -g_h * p * (logp + h), 0.0 * p)
    c64 = log2_per_logit(temperature_rows, temperature, row, logprobs.dtype.element_ty)
    per_tau = (c64 * LN2).to(grad.dtype)
    used = tl.where(live & (tl.load(log_sum + row) != NOT_READ), many, 0)
    to = row_start(out, row, outer_stride, inner_stride, inner)
    mask = inside & (begin + tl.arange(0, BLOCK) < used)
    tl.store(to + tl.where(inside, label, 0), (grad * per_tau).to(out.dtype.element_ty), mask=mask)


def leading(x: Tensor) -> tuple[int, int, int] | None:
    """(outer stride, inner stride, inner size): row i is at i // inner * outer stride + i % inner * inner stride.

    None for leading dimensions that are not two steps of fixed size.
    """
    dims = [(1, 0), (1, 0)]
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if dims[-1][1] == size * stride and len(dims) > 2:
            dims[-1] = (dims[-1][0] * size, stride)
        elif size != 1:
            dims.append((size, stride))
    (_, outer_stride), (inner, inner_stride) = dims[-2:]
    return (outer_stride, inner_stride, inner) if len(dims) <= 4 else None


def per_row(labels: Tensor, logits: Tensor) -> int:
    """K of labels ``[..., K]``, and 1 of labels ``[...]``."""
    many = labels.size(-1) if labels.dim() == logits.dim() else 1
    rows = labels.shape[:-1] if labels.dim() == logits.dim() else labels.shape
    require(
        many >= 1 and rows == logits.shape[:-1],
        f"labels must have the shape {list(logits.shape[:-1])}, or that and K >= 1, got {list(labels.shape)}",
    )
    return many


def anchors(logits, labels, mask, layout, many, ignore_index):
    found = labels.new_empty(labels.numel() // many)
    sizes = (*layout, logits.size(-1), many, ignore_index)
    launch(_anchors, found.numel(), logits, labels, mask, found, *sizes, num_warps=1, BLOCK=_BLOCK)
    return found


def write_logprobs(logits, labels, temperature_rows, outputs, layout, many, ignore_index, temperature):
    sizes = (*layout, logits.size(-1), many, ignore_index, temperature)
    rows = labels.numel() // many
    launch(_logprobs, rows, logits, labels, temperature_rows, *outputs, *sizes, num_warps=1, BLOCK=_BLOCK)


def sums(grad_logprobs, labels, log_sum, vocab, many, ignore_index):
    found = log_sum.new_empty(log_sum.numel())
    data = (grad_logprobs, labels, log_sum, found)
    launch(_sums, found.numel(), *data, vocab, many, ignore_index, num_warps=1, BLOCK=_BLOCK)
    return found


def write_gradients(out, data, layout, many, ignore_index, temperature):
    blocks = triton.cdiv(many, _BLOCK)
    sizes = (*layout, out.size(-1), many, blocks, ignore_index, temperature)
    programs = out.numel() // out.size(-1) * blocks
    launch(_gradients, programs, out, *data, *sizes, num_warps=4, BLOCK=_BLOCK, OTHERS=_OTHERS)
