"""Every op in float64 by plain loops over tokens: what the tests believe, sharing no code with the package.

Tensors come in, Python floats and numpy float64 arrays go out. Gradients are derived by hand from the formulas, with
the subgradients that the ops promise: a clamp passes the gradient at its bounds, a tie of max or min halves it.
"""

from __future__ import annotations

import math

import numpy as np

NAN = float("nan")


def floats(x) -> list[float]:
    return [float(v) for v in x.detach().double().reshape(-1).tolist()]


def bools(mask, like) -> list[bool]:
    if mask is None:
        return [True] * like.numel()
    return [v != 0 for v in mask.detach().reshape(-1).tolist()]


def rows_of(like, cu_seqlens=None) -> list[range]:
    """For each row the flat positions of its tokens."""
    if cu_seqlens is None:
        batch, length = like.shape
        return [range(b * length, (b + 1) * length) for b in range(batch)]
    cu = [int(c) for c in cu_seqlens.tolist()]
    return [range(start, end) for start, end in zip(cu[:-1], cu[1:], strict=True)]


def shaped(values: list[float], like) -> np.ndarray:
    return np.array(values, dtype=np.float64).reshape(tuple(like.shape))


def exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def expm1(x: float) -> float:
    try:
        return math.expm1(x)
    except OverflowError:
        return math.inf


def total(values) -> float:
    """The exact sum; with infinities or an overflow among the terms, whatever adding them gives."""
    values = list(values)
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):
        return sum(values)


def clamp(x: float, bound: float | None) -> tuple[float, float]:
    """The clamped value and its derivative. NaN stays NaN, and passes no gradient."""
    if bound is None or -bound <= x <= bound:
        return x, 1.0
    return (x if math.isnan(x) else math.copysign(bound, x)), 0.0


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


def kl_rewards(
    logprobs,
    ref_logprobs,
    scores,
    mask=None,
    *,
    kl_coef=0.1,
    kl_estimator="k1",
    score_clip=5.0,
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
                rewards[t] = -kl_coef * k
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


def moments(x, mask=None) -> tuple[int, float, float]:
    chosen = [v for v, m in zip(floats(x), bools(mask, x), strict=True) if m]
    if not chosen:
        return 0, 0.0, 0.0
    mean = total(chosen) / len(chosen)
    return len(chosen), mean, total((v - mean) ** 2 for v in chosen)


def whiten(x, mask=None, *, shift_mean=True, unbiased=True, eps=1e-8, statistics=None) -> np.ndarray:
    count, mean, m2 = moments(x, mask) if statistics is None else statistics
    variance = m2 / (count - 1 if unbiased else count) if count > 1 else 0.0
    out = []
    for value, m in zip(floats(x), bools(mask, x), strict=True):
        scaled = (value - mean) / math.sqrt(variance + eps) if m and variance + eps != 0 else 0.0
        out.append((scaled if shift_mean else scaled + mean) if m else 0.0)
    return shaped(out, x)


def per_token(x, like, rows) -> list[float]:
    """A token-level input as it is, a row-level one repeated over the tokens of its rows."""
    if tuple(x.shape) == tuple(like.shape):
        return floats(x)
    out = [0.0] * like.numel()
    for value, row in zip(floats(x), rows, strict=True):
        for t in row:
            out[t] = value
    return out


def mean_of(values) -> float:
    values = list(values)
    return total(values) / len(values) if values else 0.0


def surrogate(rho, a, low, high, dual_clip) -> tuple[float, float, bool]:
    """Clipped loss of one token, its derivative with respect to rho, and whether the dual clip lowered it."""
    inside = 1.0 - low <= rho <= 1.0 + high
    plain, clipped = -a * rho, -a * min(max(rho, 1.0 - low), 1.0 + high)
    d_plain, d_clipped = -a, -a if inside else 0.0
    if plain == clipped:
        loss, slope = plain, 0.5 * (d_plain + d_clipped)
    else:
        loss, slope = (plain, d_plain) if plain > clipped else (clipped, d_clipped)
    lowered = False
    if dual_clip is not None and a < 0:
        ceiling = -dual_clip * a
        lowered = loss > ceiling
        slope = 0.0 if lowered else 0.5 * slope if loss == ceiling else slope
        loss = min(loss, ceiling)
    return loss, slope, lowered


def policy_loss(
    logprobs,
    old_logprobs,
    advantages,
    mask=None,
    *,
    cliprange=0.2,
    dual_clip=None,
    log_ratio_clamp=20.0,
    weights=None,
    ref_logprobs=None,
    kl_coef=0.0,
    kl_estimator="k2",
    kl_log_clamp=20.0,
    kl_clamp=None,
    row_weight=None,
    normalizer=None,
    cu_seqlens=None,
) -> tuple[float, dict[str, float], np.ndarray]:
    """Loss, statistics and d loss / d logprobs."""
    kl_coef = float(kl_coef)
    low, high = cliprange if isinstance(cliprange, tuple) else (cliprange, cliprange)
    rows = rows_of(logprobs, cu_seqlens)
    logp, old, valid = floats(logprobs), floats(old_logprobs), bools(mask, logprobs)
    adv = per_token(advantages, logprobs, rows)
    w = [1.0] * len(logp) if weights is None else per_token(weights, logprobs, rows)
    ref = None if ref_logprobs is None else floats(ref_logprobs)
    owned = [(b, t) for b, row in enumerate(rows) for t in row if valid[t]]
    scale = float(len(owned)) if normalizer is None else float(normalizer)
    inverse = 0.0 if scale == 0 else 1.0 / scale
    terms, ds, rhos, kls, high_n, low_n, dual_n, clamped_n = [], [], [], [], 0, 0, 0, 0
    grad = [0.0] * len(logp)
    for b, t in owned:
        raw, a = logp[t] - old[t], adv[t]
        d, passes = clamp(raw, log_ratio_clamp)
        rho = exp(d)
        loss, slope, lowered = surrogate(rho, a, low, high, dual_clip)
        loss, g = loss * w[t], slope * rho * passes * w[t]
        if ref is not None:
            k, dk = kl_token(logp[t], ref[t], kl_estimator, kl_log_clamp, kl_clamp)
            loss, g = loss + kl_coef * k, g + kl_coef * dk
            kls.append(k)
        share = 1.0 if row_weight is None else float(row_weight[b].double())
        terms.append(loss * share)
        grad[t] = g * share * inverse
        ds.append(d)
        rhos.append(rho)
        high_n += a > 0 and rho > 1.0 + high
        low_n += a < 0 and rho < 1.0 - low
        dual_n += lowered
        clamped_n += log_ratio_clamp is not None and abs(raw) > log_ratio_clamp
    n = max(len(owned), 1)
    rho_mean = mean_of(rhos)
    stats = {
        "approx_kl_k1": -mean_of(ds),
        "approx_kl_k2": mean_of(0.5 * d * d for d in ds),
        "approx_kl_k3": mean_of(expm1(d) - d for d in ds),
        "ratio_mean": rho_mean,
        "ratio_var": mean_of((rho - rho_mean) ** 2 for rho in rhos),
        "ratio_max": max(rhos, default=0.0) if not math.isnan(rho_mean) else NAN,
        "clipfrac_high": high_n / n,
        "clipfrac_low": low_n / n,
        "dual_clipfrac": dual_n / n,
        "ref_kl": mean_of(kls),
        "clamp_frac": clamped_n / n,
        "count": float(len(owned)),
    }
    return (total(terms) * inverse if scale else 0.0), stats, shaped(grad, logprobs)


def value_loss(
    values,
    old_values,
    returns,
    mask=None,
    *,
    cliprange_value=0.2,
    row_weight=None,
    normalizer=None,
    cu_seqlens=None,
) -> tuple[float, dict[str, float], np.ndarray]:
    """Loss, statistics and d loss / d values."""
    v, old, ret, valid = floats(values), floats(old_values), floats(returns), bools(mask, values)
    owned = [(b, t) for b, row in enumerate(rows_of(values, cu_seqlens)) for t in row if valid[t]]
    scale = float(len(owned)) if normalizer is None else float(normalizer)
    inverse = 0.0 if scale == 0 else 1.0 / scale
    grad, terms, larger = [0.0] * len(v), [], 0
    for b, t in owned:
        error, share = v[t] - ret[t], 1.0 if row_weight is None else float(row_weight[b].double())
        best, g = error * error, error
        if cliprange_value is not None:
            lo, hi = old[t] - cliprange_value, old[t] + cliprange_value
            clipped_error = NAN if math.isnan(old[t]) else min(max(v[t], lo), hi) - ret[t]
            square, g_clipped = clipped_error * clipped_error, clipped_error if lo <= v[t] <= hi else 0.0
            larger += square > best
            if square == best:
                g = 0.5 * (g + g_clipped)
            elif square > best:
                g = g_clipped
            best = square if square > best or math.isnan(square) else best
        terms.append(0.5 * best * share)
        grad[t] = g * share * inverse
    targets, errors = [ret[t] for _, t in owned], [v[t] - ret[t] for _, t in owned]
    target_mean, error_mean = mean_of(targets), mean_of(errors)
    target_var = mean_of((x - target_mean) ** 2 for x in targets)
    error_var = mean_of((x - error_mean) ** 2 for x in errors)
    stats = {
        "clipfrac": larger / max(len(owned), 1),
        "error_mean": error_mean,
        "explained_variance": 1.0 - error_var / target_var if target_var > 0 else 0.0,
        "count": float(len(owned)),
    }
    return (total(terms) * inverse if scale else 0.0), stats, shaped(grad, values)


def token_row(z: np.ndarray, label: int, tau: float) -> tuple[float, float, np.ndarray, np.ndarray]:
    """One live row: logp, entropy, d logp / d z and d entropy / d z."""
    vocab = len(z)
    poisoned = np.full(vocab, NAN)
    if not 0 <= label < vocab or np.isnan(z).any() or (z == np.inf).any() or (z == -np.inf).all():
        return NAN, NAN, poisoned, poisoned
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
