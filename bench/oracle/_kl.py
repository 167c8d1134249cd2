"""The KL estimate of one token."""

from __future__ import annotations

from bench.oracle._tokens import clamp, expm1


def kl_token(logp: float, ref: float, estimator: str, log_clamp=None, value_clamp=None) -> tuple[float, float]:
    """The KL estimate of one token and its derivative with respect to logp."""
    x, passes_in = clamp(ref - logp, log_clamp)
    if estimator == "k1":
        k, dk_dx = -x, -1.0
    elif estimator == "abs":
        k, dk_dx = abs(x), float((x > 0) - (x < 0))
    elif estimator == "k2":
        k, dk_dx = 0.5 * x * x, x
    elif estimator == "k3":
        k, dk_dx = expm1(x) - x, expm1(x)
    else:
        raise AssertionError(estimator)
    k, passes_out = clamp(k, value_clamp)
    return k, -dk_dx * passes_in * passes_out
