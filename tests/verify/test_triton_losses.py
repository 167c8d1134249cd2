"""The Triton losses cut tokens into chunks, whose sums a second launch folds: neither may show in the result."""

import pytest
import torch

import ppo_kernels as pk
from tests.lib.helpers import bit_equal, cu, grad_of, holey_mask

LENGTHS = [5, 0, 40, 1, 17, 0, 3]


@pytest.fixture(params=["policy_loss", "value_loss"])
def op(request, require_impl):
    require_impl(request.param, "triton")
    return request.param


@pytest.fixture
def small_chunks(monkeypatch):
    """Sixteen tokens a chunk, and two lines of sums at a time in the fold."""
    from ppo_kernels.triton import _loss, policy_loss, value_loss

    def shrink():
        for module in (policy_loss, value_loss):
            monkeypatch.setattr(module, "chunk_for", lambda tokens: (16, 1))
        monkeypatch.setattr(_loss, "FOLD", 2)

    return shrink


def call(op, x, a, b, mask, cu_seqlens=None, row=None):
    """The op in x, with row-level inputs where there are any, which makes a kernel look for rows."""
    options = {"row_weight": row, "cu_seqlens": cu_seqlens, "impl": "triton"}
    if op == "value_loss":
        return grad_of(lambda leaf: pk.value_loss(leaf, a, b, mask, **options), x)
    more = {"ref_logprobs": a + 0.5, "kl_coef": 0.1, "dual_clip": 1.5, "log_ratio_clamp": 1.0}
    advantages = b if row is None else row.flip(0)[:, None] - 0.5
    return grad_of(lambda leaf: pk.policy_loss(leaf, a, advantages, mask, **more, **options), x)


def layouts():
    """Padded and packed tokens, with and without row-level inputs, in memory as it is and in views of wider rows."""
    for batch, length in ((3, 21), (20, 3), (1, 60), (60, 1)):
        tokens = torch.randn(3, batch, length)
        wide = torch.randn(3, batch, length + 3)
        wide[:, :, 1:-2] = tokens
        for x, a, b in (tokens, wide[:, :, 1:-2]):
            for row in (None, torch.rand(batch)):
                yield x, a, b, holey_mask(batch, length), None, row
    x, a, b = torch.randn(3, sum(LENGTHS))
    for row in (None, torch.rand(len(LENGTHS))):
        yield x, a, b, None, cu(LENGTHS), row
        yield x, a, b, torch.rand(len(x)) < 0.5, cu([3, *LENGTHS[1:3]]), None if row is None else row[:3]


def test_chunks_do_not_show(op, small_chunks):
    inputs = list(layouts())
    whole = [call(op, *case) for case in inputs]
    small_chunks()
    for case, ((loss, stats), grad) in zip(inputs, whole, strict=True):
        (loss_again, stats_again), grad_again = call(op, *case)
        assert bit_equal(grad_again, grad)
        for got, want in zip((loss_again, *stats_again), (loss, *stats), strict=True):
            torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)


def test_nan_of_one_chunk_shows_in_the_statistics(op, small_chunks):
    small_chunks()
    x, a, b = torch.randn(3, 4, 40)
    x[1, 30] = float("nan")
    (loss, stats), grad = call(op, x, a, b, None)
    assert loss.isnan()
    for name in ("ratio_mean", "ratio_var", "ratio_max", "approx_kl_k3") if op == "policy_loss" else ("error_mean",):
        assert getattr(stats, name).isnan(), name
    assert torch.isfinite(grad).sum() >= 159


def test_equal_returns_have_no_variance(require_impl, small_chunks):
    require_impl("value_loss", "triton")
    x = torch.randn(6, 37)
    for shrink in (lambda: None, small_chunks):
        shrink()
        stats = pk.value_loss(x, x, torch.full_like(x, 0.1), impl="triton")[1]
        assert float(stats.explained_variance) == 0.0
