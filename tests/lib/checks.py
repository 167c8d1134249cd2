"""Inputs and comparisons with the oracle that more than one file of tests needs."""

from __future__ import annotations

import numpy as np
import torch

from bench import oracle
from ppo_kernels import token_logprobs
from tests.lib.helpers import (
    NAN,
    assert_close_to_oracle,
    bit_equal,
    eager_entropy,
    eager_logprobs,
    grad_of,
    out_dtype,
    strided,
)

CEILINGS = {
    ("logp", torch.float32): 5e-6,
    ("entropy", torch.float32): 1e-5,
    ("logp", torch.float64): 1e-12,
    ("entropy", torch.float64): 1e-12,
}
NOISE = {"logp": 0.02, "entropy": 0.1}  # of the ceiling: eager code is sometimes exact by luck


def logits_and_labels(rows, vocab, dtype=torch.float32, scale=4.0, shift=0.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, vocab, generator=g) * scale + shift).clamp(-6e4, 6e4).to(dtype)
    return logits, torch.randint(0, vocab, (rows,), generator=g)


def check_token_logprobs(impl, logits, labels, temperature=1.0, entropy=True, eager=True, **options):
    """Forward and backward against the oracle, with random incoming gradients."""
    leaf = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    logp, h = token_logprobs(leaf, labels, temperature=temperature, entropy=entropy, impl=impl, **options)
    dtype = out_dtype(logits.dtype)
    g1, g2 = (torch.randn(x.shape, dtype=torch.float64).to(dtype) for x in (logp, h))
    if entropy == "detached":
        assert not h.requires_grad
        torch.autograd.backward(logp, g1)
    else:
        torch.autograd.backward((logp, h), (g1, g2))
    want, want_h, want_grad = oracle.token_logprobs(
        logits,
        labels,
        temperature=temperature,
        grad_logp=g1,
        grad_entropy=None if entropy == "detached" else g2,
        **options,
    )
    assert logp.dtype == h.dtype == dtype
    assert leaf.grad.dtype == logits.dtype
    assert leaf.grad.shape == logits.shape
    coldest = float(torch.as_tensor(temperature).min())
    largest = float(logits.double().nan_to_num(0.0, 0.0, 0.0).abs().max()) / coldest if logits.numel() else 1.0
    stretch = max(largest / 64.0, 1.0)  # the ceilings are for |z| <= 64; beyond, the spacing of the logits rules
    vast = impl == "torch" and logits.shape[-1] > 10000  # eager log_softmax misses the ceilings here
    for name, got, oracle_value, eager_fn in (
        ("logp", logp, want, eager_logprobs),
        ("entropy", h, want_h, eager_entropy),
    ):
        ceiling = CEILINGS[name, dtype] * stretch
        if not vast:
            assert_close_to_oracle(got.detach(), oracle_value, ceiling=ceiling, what=name)
        if eager:
            args = (logits, labels, temperature) if name == "logp" else (logits, temperature)
            base = np.where(np.isnan(oracle_value), NAN, eager_fn(*args).double().numpy())
            assert_close_to_oracle(got.detach(), oracle_value, eager=base + NOISE[name] * ceiling, what=name)
    size = max(float(np.abs(want_grad[np.isfinite(want_grad)]).max(initial=0.0)), 1e-30)
    fraction = {torch.float64: 1e-10, torch.float32: 2e-5}.get(logits.dtype, 2e-5 + torch.finfo(logits.dtype).eps)
    least = torch.finfo(logits.dtype).smallest_normal
    assert_close_to_oracle(leaf.grad, want_grad, ceiling=fraction * stretch + least / size, scale=size, what="gradient")
    assert not (logp > 0).any(), "a probability above 1"
    return logp.detach(), h.detach(), leaf.grad


def pairs_of_responses(batch, length, dtype=torch.float32, seed=0, spread=0.3):
    """Log-ratios of whole rows are about ``spread`` in size, whatever the length."""
    g = torch.Generator().manual_seed(seed)
    old = -torch.rand(batch, length, generator=g) * 3
    step = spread / max(length, 1) ** 0.5
    logp = old + torch.randn(batch, length, generator=g) * step
    ref = old + torch.randn(batch, length, generator=g) * 3 * step
    return [x.to(dtype) for x in (logp, old, ref, torch.randn(batch, generator=g))]


def check_views(loss, tensors, mask, impl, pad):
    """A loss of token tensors, differentiated in the first, has the same bits for views of them."""
    first, *others = tensors
    wide = torch.ones(len(mask), mask.size(1) + pad, dtype=torch.bool)
    wide[:, : mask.size(1)] = mask
    (value, _), grad = grad_of(lambda x: loss(x, *others, mask, impl=impl), first)
    for view in (lambda x: strided(x, pad), lambda x: x.t().contiguous().t()):
        leaf = view(first).requires_grad_()
        again, _ = loss(leaf, *map(view, others), wide[:, : mask.size(1)], impl=impl)
        again.backward()
        assert bit_equal(again, value)
        assert bit_equal(leaf.grad, grad)
