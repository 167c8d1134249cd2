"""TRL's functions by its names, without TRL: tests/verify/adapters compares them with its own."""

import inspect

import pytest
import torch

import ppo_kernels
from ppo_kernels import token_logprobs
from ppo_kernels.integrations import NotCoveredError, trl
from ppo_kernels.ops import token_logprobs as op_module
from tests.lib.checks import logits_and_labels as make
from tests.lib.helpers import NAN, assert_raises, bit_equal


def test_the_names_are_here_alone():
    """Two functions of one name, one with the temperature as its third argument, train at a wrong temperature."""
    for name in ("selective_log_softmax", "selective_log_softmax_and_entropy"):
        assert not hasattr(ppo_kernels, name)
        assert not hasattr(op_module, name)
    logits, index = make(6, 40)
    assert_raises(TypeError, lambda: trl.selective_log_softmax_and_entropy(logits, index, 0.7), "temperature by name")


@pytest.mark.parametrize("shape", [(40,), (5, 40), (2, 3, 40)])
@pytest.mark.parametrize("many", [None, 1, 3])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_selective_log_softmax_is_a_gather_of_log_softmax(shape, many, index_dtype):
    logits = torch.randn(shape).requires_grad_()
    index = torch.randint(0, 40, shape[:-1] if many is None else (*shape[:-1], many)).to(index_dtype)
    got = trl.selective_log_softmax(logits, index)
    log_p = torch.log_softmax(logits, -1)
    want = log_p.gather(-1, (index[..., None] if many is None else index).long()).reshape(index.shape)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)
    grad_output = torch.randn(index.shape)
    grads = [torch.autograd.grad(x, logits, grad_output)[0] for x in (got, want)]
    torch.testing.assert_close(*grads, rtol=0, atol=2e-6)


@pytest.mark.parametrize("temperature", [0.7, "0-d", "rows"])
@pytest.mark.parametrize("many", [None, 3])
def test_selective_log_softmax_with_temperature_and_row_mask(temperature, many):
    logits = torch.randn(2, 3, 40)
    tau = {"0-d": torch.tensor(0.7), "rows": torch.rand(2, 3) + 0.5}.get(temperature, temperature)
    index = torch.randint(0, 40, (2, 3) if many is None else (2, 3, many))
    mask = torch.tensor([[1, 0, 1], [0, 1, 1]])
    logits[mask == 0] = NAN
    got = trl.selective_log_softmax(logits, index, tau, mask)
    wide = index[..., None] if many is None else index
    rows_tau = tau[..., None] if temperature == "rows" else tau
    want = torch.log_softmax(logits / rows_tau, -1).gather(-1, wide)
    want = want.masked_fill(mask[..., None] == 0, 0.0).reshape(index.shape)
    torch.testing.assert_close(got, want, rtol=0, atol=3e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_selective_log_softmax_and_entropy(dtype):
    assert list(inspect.signature(trl.selective_log_softmax_and_entropy).parameters)[2] == "entropy_requires_grad"
    logits, _ = make(6, 40, dtype)
    index, mask = torch.randint(0, 40, (6, 3)), torch.rand(6, 3) < 0.6
    leaf = logits.clone().requires_grad_()
    for wanted in (True, False):
        logp, h = trl.selective_log_softmax_and_entropy(leaf, index, wanted, temperature=0.7, row_mask=mask[:, 0])
        assert logp.requires_grad
        assert h.requires_grad == wanted
        assert bit_equal((logp, h), token_logprobs(leaf, index, temperature=0.7, mask=mask[:, 0], entropy=True))
    entropy = trl.entropy_from_logits(leaf)
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=logits.float()).entropy())
    assert entropy.requires_grad


def head(hidden, weight, bias, targets, **options):
    """What TRL calls, beside the same with whole logits."""
    names = ("log_probs", "entropy", "mean_logits", "is_top1")
    ours = trl._chunked_logprobs(hidden, weight, bias, targets, 0.7, 32768, outputs=names, **options)
    logits = hidden @ weight.T + (0.0 if bias is None else bias)
    logits = logits * options.get("logit_scale", 1.0) / 0.7
    logp = torch.log_softmax(logits, -1)
    entropy = -(logp.exp() * logp).sum(-1)
    mine = logp.gather(-1, targets[:, None])[:, 0]
    return ours, (mine, entropy, None, logits.detach().mean(-1), logits.argmax(-1) == targets)


@pytest.mark.parametrize("tile", [1, 7 * 33, 1 << 25])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_fused_head_is_a_product_and_log_softmax(tile, with_bias, monkeypatch):
    monkeypatch.setattr(trl, "TILE", tile)
    leaves = [torch.randn(20, 8).requires_grad_(), torch.randn(33, 8).requires_grad_()]
    leaves += [torch.randn(33).requires_grad_()] if with_bias else []
    targets = torch.randint(0, 33, (20,))
    targets[:10] = (leaves[0] @ leaves[1].T)[:10].argmax(-1)  # some are the most likely
    ours, theirs = head(leaves[0], leaves[1], leaves[2] if with_bias else None, targets, logit_scale=0.5)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=5e-6)
    assert [x is not None and x.requires_grad for x in ours] == [True, True, False, False, False]
    weights = torch.randn(2, 20)
    for given in ((1, 0), (0, 1), (1, 1)):  # gradients of the log-probabilities, of the entropy, of both
        grads = [
            torch.autograd.grad(
                sum((x * w).sum() for x, w, wanted in zip(pair[:2], weights, given, strict=True) if wanted),
                leaves,
                retain_graph=True,
            )
            for pair in (ours, theirs)
        ]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=5e-6)


def test_the_fused_head_of_no_row_and_of_frozen_parts():
    hidden, weight = torch.randn(0, 8).requires_grad_(), torch.randn(33, 8).requires_grad_()
    logp, *_ = trl._chunked_logprobs(hidden, weight, None, torch.zeros(0, dtype=torch.int64), 1.0, 32768, outputs=())
    grads = torch.autograd.grad(logp.sum(), (hidden, weight))
    assert [g.shape for g in grads] == [hidden.shape, weight.shape]
    assert not grads[1].any()
    for frozen in (0, 1):
        parts = [torch.randn(4, 8), torch.randn(33, 8)]
        parts[1 - frozen].requires_grad_()
        logp, *_ = trl._chunked_logprobs(*parts, None, torch.zeros(4, dtype=torch.int64), 1.0, 32768, outputs=())
        logp.sum().backward()
        assert parts[frozen].grad is None
        assert parts[1 - frozen].grad.any()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"final_logit_softcapping": 30.0, "outputs": ("log_probs", "mean_logits")}, "soft cap"),
        ({"outputs": ("log_probs", "log_sum_sq_probs")}, "log_sum_sq_probs"),
        ({"ds_id": 1}, "ZeRO-3"),
    ],
)
def test_what_the_fused_head_does_not_cover(options, reason):
    weight = torch.randn(33, 8)
    if "ds_id" in options:
        weight.ds_id = options.pop("ds_id")
    with pytest.raises(NotCoveredError, match=reason):
        options = {"outputs": ()} | options
        trl._chunked_logprobs(torch.randn(4, 8), weight, None, torch.zeros(4, dtype=torch.int64), 1.0, 32768, **options)


def test_the_fused_head_under_autocast_multiplies_in_the_dtype_of_autocast():
    hidden, weight = torch.randn(20, 8), torch.randn(33, 8).requires_grad_()
    targets = torch.randint(0, 33, (20,))
    with torch.autocast("cpu", torch.bfloat16):
        logp, *_ = trl._chunked_logprobs(hidden, weight, None, targets, 1.0, 32768, outputs=())
    rounded = hidden.bfloat16().float() @ weight.bfloat16().float().T  # the logits themselves are not rounded
    torch.testing.assert_close(logp, token_logprobs(rounded, targets), rtol=0, atol=5e-6)
    logp.sum().backward()
    assert weight.grad.dtype == torch.float32
