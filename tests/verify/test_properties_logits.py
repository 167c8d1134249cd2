"""token_logprobs on random batches of every kind: values, entropy and gradient against the oracle."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import oracle
from ppo_kernels import token_logprobs
from tests.lib.devices import IMPLEMENTATIONS
from tests.lib.helpers import INF, MASK_DTYPES, NAN, assert_close_to_oracle, magnitude, out_dtype, strided

OP = "token_logprobs"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BAD_LABELS = (-1, -101, 2**31, 2**40, "V")
VOCABULARIES = st.sampled_from([129, 1, 2, 3, 4, 5, 7, 8, 127, 128, 1009, 1023, 1025, 2047, 2048, 2049, 4095, 4097])


def grad_output(rows: int, form: str, dtype: torch.dtype, g: torch.Generator) -> torch.Tensor:
    """A gradient that comes from above, in a layout that autograd may hand down."""
    if form == "expanded":
        return torch.randn((), generator=g, dtype=dtype).expand(rows)
    x = torch.randn(rows, generator=g, dtype=dtype)
    if form == "sliced":
        return torch.stack([x, torch.full_like(x, NAN)], 1)[:, 0]
    return x * (torch.rand(rows, generator=g) < 0.7) if form == "partly zero" else x


@st.composite
def batches(draw):
    """``(logits, labels, options, entropy, incoming gradients)``."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    rows, vocab, dtype = draw(st.sampled_from([3, 1, 2, 4, 5, 0])), draw(VOCABULARIES), draw(st.sampled_from(DTYPES))
    scale, shift = draw(st.sampled_from([1.0, 0.0, 1e-3, 30.0, 1e4])), draw(st.sampled_from([0.0, 1e4, -1e4]))
    logits = torch.randn(rows, vocab, generator=g, dtype=torch.float64) * scale + shift
    logits = logits.clamp(-6e4, 6e4).to(dtype)
    labels = torch.randint(0, vocab, (rows,), generator=g)
    labels[:2] = torch.tensor([0, vocab - 1])[:rows]

    lost = torch.rand(rows, vocab, generator=g) < draw(st.sampled_from([0.0, 0.3, 0.99]))
    edge = draw(st.integers(0, vocab))
    block = draw(st.sampled_from(["none", "leading", "trailing"]))
    lost[:, : edge if block == "leading" else 0] = True
    lost[:, edge if block == "trailing" else vocab :] = True
    if draw(st.booleans()):  # else the label itself may be at -inf
        lost.scatter_(1, labels[:, None], False)
    logits = logits.masked_fill(lost, -INF)
    if rows:
        poison = draw(st.sampled_from([None, None, NAN, INF, "-inf everywhere"]))
        if poison == "-inf everywhere":
            logits[-1] = -INF
        elif poison is not None:
            logits[-1, draw(st.integers(0, vocab - 1))] = poison
        odd = draw(st.sampled_from([None, -100, *BAD_LABELS]))
        if odd is not None:
            labels[rows // 2] = vocab if odd == "V" else odd
    if draw(st.booleans()) and int(labels.max() if rows else 0) < 2**31:
        labels = labels.to(torch.int32)

    options = {"temperature": draw(st.sampled_from([1.0, 0.7, 1.3, "rows"]))}
    if options["temperature"] == "rows":
        options["temperature"] = torch.rand(rows, generator=g) + 0.5
    if draw(st.booleans()):
        valid = torch.rand(rows, generator=g) < 0.7
        logits = torch.where(valid[:, None], logits, NAN)
        options["mask"] = valid.to(draw(st.sampled_from(MASK_DTYPES)))
    forms = st.sampled_from(["plain", "expanded", "sliced", "partly zero"])
    above = [grad_output(rows, draw(forms), out_dtype(dtype), g) for _ in range(2)]
    view = strided(logits, draw(st.integers(0, 7)), draw(st.integers(0, 7)))
    return view, labels, options, draw(st.sampled_from([True, True, "detached", False])), above


def stretch(logits: torch.Tensor, temperature) -> float:
    """How much coarser than at 64 nats the logits are spaced: the ceilings are for |z| <= 64."""
    largest = float(logits.double().nan_to_num(0.0, 0.0, 0.0).abs().max()) if logits.numel() else 0.0
    coldest = float(torch.as_tensor(temperature).min()) if logits.numel() else 1.0
    return max(largest / coldest / 64.0, 1.0)


def limits(batch, impl: str, coarse: float) -> np.ndarray:
    """For each element of the gradient: relative to its two parts, which may cancel, as may p (log p + H)."""
    logits, labels, options, entropy, (g_logp, g_entropy) = batch
    unit = oracle.token_logprobs(logits, labels, **options)[2]
    of_entropy = oracle.token_logprobs(
        logits, labels, grad_logp=torch.zeros(labels.shape), grad_entropy=torch.ones(labels.shape), **options
    )[2]
    g1, g2 = magnitude(g_logp.double())[:, None], magnitude(g_entropy.double())[:, None] * (entropy is True)
    info, least = torch.finfo(logits.dtype), 1e-35  # kernels flush 2^-126 to zero, before they multiply it by log p
    share = (1e-10 if logits.dtype == torch.float64 else 2e-5) * coarse
    rounding = info.eps if info.bits == 16 else 0.0
    parts = g1 * magnitude(unit) + g2 * (magnitude(of_entropy) + magnitude(unit))
    slack = 2 * torch.finfo(out_dtype(logits.dtype)).eps * (g1 + g2) * coarse if impl == "torch" else 0.0  # 1 - p
    return (share + rounding) * parts + slack + max(info.smallest_normal * info.eps, least)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@settings(max_examples=200, deadline=None, derandomize=True)
@given(batch=batches())
def test_any_batch_of_logits_matches_the_oracle(require_impl, impl, batch):
    logits, labels, options, entropy, (g_logp, g_entropy) = batch
    leaf = logits.detach().requires_grad_()
    out = token_logprobs(leaf, labels, entropy=entropy, impl=require_impl(OP, impl), **options)
    logp, h = (out, None) if entropy is False else out
    gradients = [(logp, g_logp), *([(h, g_entropy)] if entropy is True else [])]
    torch.autograd.backward(*zip(*gradients, strict=True))
    want, want_h, want_grad = oracle.token_logprobs(
        logits, labels, grad_logp=g_logp, grad_entropy=g_entropy if entropy is True else None, **options
    )
    assert logp.dtype == out_dtype(logits.dtype)
    assert leaf.grad.dtype == logits.dtype
    coarse, wide = stretch(logits, options["temperature"]), logp.dtype == torch.float64
    limit = (1e-12 if wide else 5e-6) * coarse
    if impl == "torch":
        # Eager code rounds the distance from the maximum, the temperature and their quotient, which is about logp.
        limit = limit + 1.5 * torch.finfo(logp.dtype).eps * magnitude(want)
        coarse *= 2.0 if coarse > 1.0 else 1.0
    assert_close_to_oracle(logp.detach(), want, ceiling=1.0, scale=limit, what="logp")
    assert not (logp > 0).any(), "a probability above 1"
    if h is not None:
        assert_close_to_oracle(h.detach(), want_h, ceiling=(1e-12 if wide else 1e-5) * coarse, what="entropy")
        assert not (h < 0).any(), "a negative entropy"
    # A row without a distribution that nobody asks a gradient of may have none or a NaN one.
    silent = (g_logp == 0) & ((g_entropy == 0) if entropy is True else True)
    quiet = (silent & torch.as_tensor(want).isnan())[:, None] & (leaf.grad == 0)
    want_grad = np.where(quiet.numpy(), 0.0, want_grad)
    assert_close_to_oracle(leaf.grad, want_grad, ceiling=1.0, scale=limits(batch, impl, coarse), what="gradient")
    assert not leaf.grad[torch.as_tensor(want == 0) & (labels == -100)].any()
