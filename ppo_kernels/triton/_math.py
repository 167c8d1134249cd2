"""The formulas of the Triton kernels: the twin of csrc/math, for float32 and (in the interpreter) float64."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))


@triton.jit
def exp(x):
    """e^x to a few units in the last place. Triton's own rounds x * log2(e) first: an error of |x| units."""
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
    """e^x - 1 - x without cancellation: 1 % of k3 is lost at x = 1e-3 when the three terms are added in float32."""
    TERMS: tl.constexpr = 16 if x.dtype == tl.float64 else 7
    p = x * 0.0 + 1.0
    for i in tl.static_range(TERMS - 1):
        p = p * x * (1.0 / (TERMS + 1 - i)) + 1.0
    near = p * x * x * 0.5
    return tl.where((x > -0.5) & (x < 0.5), near, exp_x - 1.0 - x)


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, exact to a few units for small x (Kahan's correction of the rounding of 1 + x)."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def clamp(x, bound):
    """x within +-bound. NaN stays NaN, an infinite bound does nothing."""
    return tl.where(x < -bound, -bound, tl.where(x > bound, bound, x))


@triton.jit
def clamp_gradient(x, bound, gradient):
    """The gradient that torch.clamp lets through: at its bounds too, for a NaN only when it is off."""
    within = tl.where((x >= -bound) & (x <= bound), gradient, 0.0)
    return tl.where(bound == INF, gradient, within)
