"""The formulas of csrc/math in Triton, for float32 and (in the interpreter) float64."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))


@triton.jit
def exp(x):
    """e^x to a few units in the last place. Triton's exp rounds x * log2(e) first, an error of |x| units."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    n = tl.floor(x * LOG2E + 0.5)
    # Beyond this 2^n is 0 or infinite whatever r is; NaN stays NaN in r.
    n = tl.where(n < -150.0, -150.0, tl.where(n > 129.0, 129.0, n))
    r = (x - n * 0.693145751953125) - n * 1.42860677e-06  # ln 2 in two parts: the first product is exact
    r = tl.where(x < -104.0, -104.0, tl.where(x > 89.5, 0.0, r))
    return tl.exp2(r * LOG2E) * tl.exp2(n)


@triton.jit
def expm1_minus(x, exp_x):
    """e^x - 1 - x without cancellation: adding the three terms in float32 loses 1 % of k3 at x = 1e-3."""
    TERMS: tl.constexpr = 16 if x.dtype == tl.float64 else 7
    p = x * 0.0 + 1.0
    for i in tl.static_range(TERMS - 1):
        p = p * x * (1.0 / (TERMS + 1 - i)) + 1.0
    near = p * x * x * 0.5
    return tl.where((x > -0.5) & (x < 0.5), near, exp_x - 1.0 - x)


@triton.jit
def expm1(x):
    """e^x - 1 for x <= 0, exact to a few units near 0."""
    exp_x = exp(x)
    return tl.where(x > -0.5, expm1_minus(x, exp_x) + x, exp_x - 1.0)


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, exact to a few units for small x (Kahan's correction of the rounding of 1 + x)."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def clamp(x, bound):
    """Clamp x to +-bound. NaN stays NaN, an infinite bound does nothing."""
    bound = tl.full(x.shape, bound, x.dtype)  # tl.where would round a Python number to float32
    return tl.where(x < -bound, -bound, tl.where(x > bound, bound, x))


@triton.jit
def max_or_nan(a, b):
    """The larger of two numbers, NaN if one of them is."""
    return tl.where((b <= a) | (a != a), a, b)


@triton.jit
def clamp_gradient(x, bound, gradient):
    """The gradient that torch.clamp lets through: at its bounds too, for a NaN only when it is off."""
    within = tl.where((x >= -bound) & (x <= bound), gradient, 0.0)
    return tl.where(bound == INF, gradient, within)


@triton.jit
def scaled_or_off(coef, term):
    """A coefficient of 0 switches its term off, be that infinite or NaN."""
    return tl.where(coef == 0.0, 0.0, coef * term)


@triton.jit
def kl_term(logp, ref, log_clamp, value_clamp, ESTIMATOR: tl.constexpr):
    """An estimate of KL(pi || ref) and its gradient in logp: k1, abs, k2 or k3 by number, bounded before and after."""
    raw = ref - logp
    x = clamp(raw, log_clamp)
    if ESTIMATOR == 0:
        k = -x
        slope = tl.full(x.shape, 1.0, x.dtype)
    elif ESTIMATOR == 1:
        k = tl.abs(x)
        slope = tl.where(x > 0.0, -1.0, tl.where(x < 0.0, 1.0, 0.0)).to(x.dtype)
    elif ESTIMATOR == 2:
        k = 0.5 * x * x
        slope = -x
    else:
        exp_x = exp(x)
        k = expm1_minus(x, exp_x)
        slope = tl.where((x > -0.5) & (x < 0.5), -(k + x), 1.0 - exp_x)  # 1 at -inf
    return clamp(k, value_clamp), clamp_gradient(raw, log_clamp, clamp_gradient(k, value_clamp, slope))


@triton.jit
def row_span(starts, length, row, UNIT: tl.constexpr):
    """A row as (first, length): its tokens are at ``first * stride + [0, length)`` of a tensor with that first stride.

    That stride and ``length`` come in units of UNIT elements (see ``row_sizes``); the length returned is in elements.
    ``starts`` is None for padded rows of equal length.
    """
    if starts is None:
        return row * UNIT, tl.cast(length, tl.int64) * UNIT
    else:
        first = tl.load(starts + row)
        return first, tl.load(starts + row + 1) - first


@triton.jit
def load_valid(mask, t, inside):
    """Which of a row's tokens ``t`` are valid: bytes at ``mask``, the row's first one, or None for all."""
    if mask is None:
        return inside
    else:
        return inside & (tl.load(mask + t, mask=inside, other=0) != 0)


@triton.jit
def last_valid(mask, length, BLOCK: tl.constexpr):
    """A row's last valid token, -1 if it has none. The search starts at the end and stops when it finds one."""
    if mask is None:
        return length - 1
    else:
        begin = tl.cdiv(length, BLOCK) * BLOCK - BLOCK
        last = length * 0 - 1
        while (last < 0) & (begin >= 0):
            t = begin + tl.arange(0, BLOCK)
            last = tl.max(tl.where(load_valid(mask, t, t < length), t, -1), 0)
            begin -= BLOCK
        return last
