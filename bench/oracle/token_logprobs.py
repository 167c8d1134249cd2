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
    """logp, entropy, and the gradient of ``sum(grad_logp * logp) + sum(grad_entropy * entropy)``."""
    vocab, rows = logits.shape[-1], tuple(logits.shape[:-1])
    z = np.array(logits.detach().double().reshape(-1, vocab).numpy())
    many = labels.numel() // max(len(z), 1)
    y = labels.reshape(len(z), many).tolist()
    if mask is not None and mask.shape != labels.shape:
        mask = mask[..., None].expand(labels.shape)
    valid = bools(mask, labels)
    per_row = hasattr(temperature, "expand")
    taus = floats(temperature.expand(rows)) if per_row else [float(temperature)] * len(z)
    g1 = [1.0] * labels.numel() if grad_logp is None else floats(grad_logp)
    g2 = [0.0] * len(z) if grad_entropy is None else floats(grad_entropy)
    logp, entropy, grad = np.zeros(labels.numel()), np.zeros(len(z)), np.zeros_like(z)
    for i, row in enumerate(y):
        own = []
        for k, label in enumerate(row, start=i * many):
            if valid[k] and label != ignore_index:
                logp[k], h, d_logp, d_entropy = token_row(z[i], label, taus[i])
                grad[i] += g1[k] * d_logp
                own.append((h, d_entropy))
        if own:
            entropy[i], d_entropy = max(own, key=lambda found: math.isnan(found[0]))  # a bad label makes them NaN
            grad[i] += g2[i] * d_entropy if grad_entropy is not None else 0.0
    return logp.reshape(tuple(labels.shape)), entropy.reshape(rows), grad.reshape(tuple(logits.shape))
