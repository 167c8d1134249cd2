"""Log-probability and entropy of each row of logits, and their gradients."""

from __future__ import annotations

import math

import numpy as np

from bench.oracle._tokens import bools, floats


def token_row(z: np.ndarray, label: int, tau: float) -> tuple[float, float, np.ndarray, np.ndarray]:
    """One live row: logp, entropy, d logp / d z and d entropy / d z."""
    vocab = len(z)
    poisoned = np.full(vocab, math.nan)
    if not 0 <= label < vocab or np.isnan(z).any() or (z == np.inf).any() or (z == -np.inf).all():
        return math.nan, math.nan, poisoned, poisoned
    x = z / tau
    peak = int(np.argmax(x))
    shifted = x - x[peak]
    others = np.exp(np.delete(shifted, peak)).sum()
    log_z = math.log1p(others)
    log_p = shifted - log_z
    p = np.exp(log_p)
    safe = np.where(p > 0, log_p, 0.0)
    entropy = -float((p * safe).sum())
    one_hot = np.zeros(vocab)
    one_hot[label] = 1.0
    d_logp = one_hot - p
    d_logp[label] = -math.expm1(log_p[label]) if log_p[label] > -np.inf else 1.0
    d_entropy = np.where(p > 0, -p * (safe + entropy), 0.0)
    return float(log_p[label]), entropy, d_logp / tau, d_entropy / tau


def token_logprobs(
    logits, labels, *, temperature=1.0, mask=None, ignore_index=-100, grad_logp=None, grad_entropy=None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """logp, entropy, and the gradient of ``sum(grad_logp * logp + grad_entropy * entropy)``."""
    vocab = logits.shape[-1]
    z = np.array(logits.detach().double().reshape(-1, vocab).numpy())
    y = [int(v) for v in labels.reshape(-1).tolist()]
    valid = bools(mask, labels)
    per_row = hasattr(temperature, "expand")
    taus = floats(temperature.expand(labels.shape)) if per_row else [float(temperature)] * len(y)
    g1 = [1.0] * len(y) if grad_logp is None else floats(grad_logp)
    g2 = [0.0] * len(y) if grad_entropy is None else floats(grad_entropy)
    logp, entropy, grad = np.zeros(len(y)), np.zeros(len(y)), np.zeros_like(z)
    for i, label in enumerate(y):
        if valid[i] and label != ignore_index:
            logp[i], entropy[i], d_logp, d_entropy = token_row(z[i], label, taus[i])
            grad[i] = g1[i] * d_logp + (g2[i] * d_entropy if grad_entropy is not None else 0.0)
    shape = tuple(labels.shape)
    return logp.reshape(shape), entropy.reshape(shape), grad.reshape(tuple(logits.shape))
