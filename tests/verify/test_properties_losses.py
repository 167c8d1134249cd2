"""policy_loss and value_loss on random batches of every kind: loss, statistics and gradient against the oracle."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import oracle
from ppo_kernels import policy_loss, value_loss
from tests.lib.devices import IMPLEMENTATIONS
from tests.lib.helpers import ESTIMATORS, assert_close_to_oracle, grad_of, magnitude
from tests.lib.strategies import SCALES, batches, poisoned, poisons

EXAMPLES = settings(max_examples=200, deadline=None, derandomize=True)
NORMALIZERS = st.sampled_from([None, 4.0, torch.tensor(7), torch.tensor([2.5]), 0.0])
GRAD_OUTPUTS = st.sampled_from([None, torch.tensor(-2.5), torch.ones(()).expand(()), torch.tensor([3.0, 0.0])[1]])


def double(x) -> np.ndarray:
    return x.detach().double().numpy()


def rounding(dtype: torch.dtype) -> float:
    """Of a gradient that leaves in its input's dtype."""
    return torch.finfo(dtype).eps if dtype.itemsize == 2 else 0.0


def assert_statistics(stats, want, scales, unit: float) -> None:
    """A statistic that is infinite or NaN has to be one of the two: which, the order of merging decides."""
    for name, got in stats._asdict().items():
        if np.isfinite(want[name]):
            scale = scales.get(name, abs(want[name])) + 1e-30
            assert_close_to_oracle(got, want[name], ceiling=32 * unit, scale=scale, what=name)
        else:
            assert not got.isfinite(), name


def least(dtype: torch.dtype) -> float:
    """What a gradient may lose below the smallest numbers, of its dtype or of a float32 on the way."""
    info = torch.finfo(dtype)
    return max(info.smallest_normal * info.eps, torch.finfo(torch.float32).smallest_normal)


@st.composite
def policy_calls(draw):
    batch = draw(batches())
    # Without a clamp e^x has to stay a float32; with one any gap is legal.
    clamp = draw(st.sampled_from([20.0, 1.0, None]))
    gap = draw(st.sampled_from([0.25, 0.0, 2.0**-10, 4.0, *([1024.0] if clamp else [])]))
    old = batch.normal(2.0)
    tensors = {
        "logprobs": (old.double() + batch.normal(gap).double()).to(batch.dtype),
        "old_logprobs": old,
        "advantages": batch.normal(draw(st.sampled_from([1.0, 0.0, 32.0]))),
    }
    options = batch.options | {
        "cliprange": draw(st.sampled_from([0.2, (0.2, 0.28), (0.0, 1.0), 0.0])),
        "dual_clip": draw(st.sampled_from([None, 1.5, 3.0])),
        "log_ratio_clamp": clamp,
        "normalizer": draw(NORMALIZERS),
    }
    if draw(st.booleans()):
        tensors["weights"] = batch.normal().abs()
    if draw(st.booleans()):
        tensors["ref_logprobs"] = (old.double() + batch.normal(0.5).double()).to(batch.dtype)
        options["kl_coef"] = draw(st.sampled_from([0.5, 0.0, torch.tensor(0.125)]))
        options["kl_estimator"] = draw(st.sampled_from(ESTIMATORS))
        options["kl_log_clamp"] = 20.0 if gap == 1024.0 else draw(st.sampled_from([20.0, None, 0.5]))
        options["kl_clamp"] = draw(st.sampled_from([None, 10.0, 0.125]))
    spots = poisoned(batch, tensors, draw(poisons(tuple(tensors))))
    tensors = {name: batch.view(x) for name, x in tensors.items()}
    for name in ("advantages", "weights"):
        if name in tensors and draw(st.integers(0, 3)) == 0:
            rows = batch.normal(rows=True).abs() if name == "weights" else batch.normal(rows=True)
            tensors[name] = rows if draw(st.booleans()) else rows[:, None]
    if draw(st.booleans()):
        options["row_weight"] = batch.normal(rows=True).abs()
    return batch, tensors, options, spots, draw(GRAD_OUTPUTS)


def sizes_of_policy(tensors, mask, options):
    """What the errors of the loss, the statistics and the gradient are compared with: sums of magnitudes."""
    steep = dict(tensors) | {"advantages": -tensors["advantages"].abs()}
    positive = options | {"dual_clip": None}
    if options.get("kl_estimator") == "k1":
        positive["kl_estimator"] = "abs"
    loss, stats, _ = oracle.policy_loss(**steep, mask=mask, **positive)
    gap = oracle.policy_loss(
        tensors["logprobs"],
        tensors["old_logprobs"],
        tensors["advantages"],
        mask,
        log_ratio_clamp=options["log_ratio_clamp"],
        ref_logprobs=tensors["old_logprobs"],
        kl_estimator="abs",
        kl_log_clamp=options["log_ratio_clamp"],
        cu_seqlens=options.get("cu_seqlens"),
    )[1]["ref_kl"]
    plain = {k: x for k, x in (tensors | options).items() if k not in ("ref_logprobs", "kl_coef")}
    surrogate = oracle.policy_loss(**plain, mask=mask)[2]
    return loss, gap, stats["ref_kl"], surrogate


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@EXAMPLES
@given(call=policy_calls())
def test_any_policy_loss_matches_the_oracle(require_impl, impl, call):
    batch, tensors, options, spots, grad_output = call
    impl, logp = require_impl("policy_loss", impl), tensors["logprobs"]
    others = {k: x for k, x in tensors.items() if k != "logprobs"}
    (loss, stats), grad = grad_of(
        lambda x: policy_loss(x, **others, mask=batch.mask, impl=impl, **options), logp, grad_output
    )
    want, want_stats, want_grad = oracle.policy_loss(**tensors, mask=batch.mask, **options)
    size, gap, ref_kl, surrogate = sizes_of_policy(tensors, batch.mask, options)
    u, largest = batch.unit(), max(want_stats["ratio_max"], 1.0)  # kernels work with ratio - 1
    assert_close_to_oracle(loss.detach(), want, ceiling=32 * u, scale=abs(size) + 1e-30, what="loss")
    scales = {
        "approx_kl_k1": gap,
        "approx_kl_k3": want_stats["approx_kl_k3"] + gap / 8,
        "ratio_mean": max(want_stats["ratio_mean"], 1.0),
        "ratio_max": largest,
        "ratio_var": want_stats["ratio_var"] + want_stats["ratio_var"] ** 0.5 * largest + u * largest**2,
        "ref_kl": abs(ref_kl) + 2.0**-8,
    }
    assert_statistics(stats, want_stats, scales, u)

    scale = 1.0 if grad_output is None else float(grad_output)
    # Token by token: the surrogate's part and the penalty's may cancel; autograd's exp(x) - 1 of k3 does.
    parts = 2 * magnitude(surrogate) + magnitude(want_grad)
    normalizer = options["normalizer"] if options["normalizer"] is not None else want_stats["count"]
    slip = float(options.get("kl_coef", 0.0)) / (float(normalizer) or 1.0)
    slip *= float(options["row_weight"].double().abs().max()) if "row_weight" in options and batch.rows else 1.0
    limit = (32 * u + rounding(grad.dtype)) * parts * abs(scale) + 2 * u * slip * abs(scale) + least(grad.dtype)
    want_grad = np.where(
        spots, double(grad), np.where(spots, 0.0, want_grad) * scale
    )  # of the poison itself only the loss is promised
    assert_close_to_oracle(grad, want_grad, ceiling=1.0, scale=np.where(spots, 1.0, limit), what="gradient")
    assert not grad[~batch.valid].any()


@st.composite
def value_calls(draw):
    batch, scale = draw(batches()), draw(SCALES)
    old = batch.normal(scale)
    tensors = {
        "values": (old.double() + batch.normal(draw(SCALES)).double()).to(batch.dtype),
        "old_values": old,
        "returns": (old.double() + batch.normal(scale).double()).to(batch.dtype),
    }
    spots = poisoned(batch, tensors, draw(poisons(tuple(tensors))))
    tensors = {name: batch.view(x) for name, x in tensors.items()}
    options = batch.options | {
        "cliprange_value": draw(st.sampled_from([0.2, 0.0, 0.5, 2.0, None])),
        "normalizer": draw(NORMALIZERS),
    }
    if draw(st.booleans()):
        options["row_weight"] = batch.normal(rows=True)
    return batch, tensors, options, spots, draw(GRAD_OUTPUTS)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@EXAMPLES
@given(call=value_calls())
def test_any_value_loss_matches_the_oracle(require_impl, impl, call):
    batch, tensors, options, spots, grad_output = call
    impl, values = require_impl("value_loss", impl), tensors["values"]
    others = (tensors["old_values"], tensors["returns"])
    (loss, stats), grad = grad_of(
        lambda x: value_loss(x, *others, batch.mask, impl=impl, **options), values, grad_output
    )
    want, want_stats, want_grad = oracle.value_loss(**tensors, mask=batch.mask, **options)

    # Everything is made of errors, and those of values that were rounded at the size of the old ones.
    u = batch.unit()
    positive = {"row_weight": options["row_weight"].abs()} if "row_weight" in options else {}
    size = oracle.value_loss(**tensors, mask=batch.mask, **(options | positive))[0]
    numbers = [np.where(batch.valid, double(x), 0.0) for x in tensors.values()]
    largest = max(magnitude(x).max(initial=0.0) for x in numbers)
    assert_close_to_oracle(loss.detach(), want, ceiling=32 * u, scale=abs(size) + u * largest**2 + 1e-30, what="loss")
    apart = abs(1.0 - want_stats["explained_variance"])
    scales = {"error_mean": largest, "explained_variance": 1.0 + apart}
    assert_statistics(stats, want_stats, scales, u)

    scale = 1.0 if grad_output is None else float(grad_output)
    share = (
        np.abs(oracle.per_token(options["row_weight"], values, oracle.rows_of(values, options.get("cu_seqlens"))))
        if "row_weight" in options
        else np.ones(values.numel())
    )
    normalizer = float(options["normalizer"] if options["normalizer"] is not None else want_stats["count"]) or 1.0
    slip = 2 * u * largest * share.reshape(want_grad.shape) / normalizer if options["cliprange_value"] else 0.0
    limit = ((8 * u + rounding(grad.dtype)) * magnitude(want_grad) + slip) * abs(scale) + least(grad.dtype)
    want_grad = np.where(spots, double(grad), np.where(spots, 0.0, want_grad) * scale)
    assert_close_to_oracle(grad, want_grad, ceiling=1.0, scale=np.where(spots, 1.0, limit), what="gradient")
    assert not grad[~batch.valid].any()
