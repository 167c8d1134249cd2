"""Every length of gae, and every vocabulary of token_logprobs, that a block size or an index could get wrong."""

import functools

import numpy as np
import pytest
import torch

from bench import oracle
from ppo_kernels import gae, token_logprobs
from tests.lib.checks import check_token_logprobs as check
from tests.lib.devices import IMPLEMENTATIONS
from tests.lib.helpers import MASKED_STEPS, assert_close_to_oracle, cu, holey_mask, magnitude

LONG = [4095, 4096, 4097, 8191, 8192, 8193, 65536]
DISCOUNTS = [(1.0, 1.0), (0.99, 0.95)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def rows_of_lengths(lengths, holes):
    """Packed rows: rewards, values, mask, bootstrap values. Rewards that do not cancel: sums grow along the row."""
    g = torch.Generator().manual_seed(len(lengths))
    n = sum(lengths)
    rewards, values = torch.rand(n, generator=g), torch.randn(n, generator=g) * 3
    mask = torch.rand(n, generator=g) < 0.8 if holes else None
    return rewards, values, mask, torch.randn(len(lengths), generator=g) * 3


@functools.cache
def advantages_of_lengths(lengths, holes, masked_steps, gamma, lam):
    rewards, values, mask, boot = rows_of_lengths(lengths, holes)
    options = {
        "gamma": gamma,
        "lam": lam,
        "masked_steps": masked_steps,
        "bootstrap_value": boot,
        "cu_seqlens": cu(lengths),
    }
    return options, oracle.gae(rewards, values, mask, **options)


def check_gae(impl, lengths, holes, masked_steps, gamma, lam):
    rewards, values, mask, _ = rows_of_lengths(lengths, holes)
    options, want = advantages_of_lengths(lengths, holes, masked_steps, gamma, lam)
    got = gae(rewards, values, mask, impl=impl, **options)
    padded = None
    if len(set(lengths)) == 1:
        shape = (len(lengths), lengths[0])
        one = {k: x for k, x in options.items() if k != "cu_seqlens"}
        tensors = [None if x is None else x.view(shape) for x in (rewards, values, mask)]
        padded = gae(*tensors, impl=impl, **one)
    rows = np.repeat(np.arange(len(lengths)), lengths)
    largest = np.zeros(len(lengths))
    for w in want:
        np.maximum.at(largest, rows, magnitude(w))
    for i, name in enumerate(("advantages", "returns")):
        assert_close_to_oracle(got[i], want[i], ceiling=1e-6, scale=largest[rows], what=name)
        if padded is not None:
            assert_close_to_oracle(padded[i].reshape(-1), want[i], ceiling=1e-6, scale=largest[rows], what=name)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("masked_steps", MASKED_STEPS)
@pytest.mark.parametrize(("gamma", "lam"), DISCOUNTS)
def test_gae_at_every_length_to_300(require_impl, impl, masked_steps, gamma, lam):
    check_gae(require_impl("gae", impl), tuple(range(301)), True, masked_steps, gamma, lam)


@pytest.mark.parametrize("impl", ["cpu", "torch"])  # the interpreter needs seconds for each run over all lengths
@pytest.mark.parametrize(("gamma", "lam"), DISCOUNTS)
def test_gae_at_every_length_to_300_without_a_mask(require_impl, impl, gamma, lam):
    check_gae(require_impl("gae", impl), tuple(range(301)), False, "skip", gamma, lam)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("length", LONG)
@pytest.mark.parametrize("masked_steps", MASKED_STEPS)
@pytest.mark.parametrize(("gamma", "lam"), DISCOUNTS)
def test_gae_of_long_rows(require_impl, impl, length, masked_steps, gamma, lam):
    check_gae(require_impl("gae", impl), (length,), masked_steps != "keep", masked_steps, gamma, lam)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("length", [*range(1, 34), 63, 64, 65, 127, 128, 129, 255, 256, 257])
def test_padded_gae_at_short_lengths(require_impl, impl, length):
    """The packed lengths above, padded: a row ends at the end of its memory."""
    impl = require_impl("gae", impl)
    rewards, values, mask = torch.rand(4, length), torch.randn(4, length), holey_mask(4, length)
    for masked_steps in MASKED_STEPS:
        got = gae(rewards, values, mask, gamma=1.0, lam=1.0, masked_steps=masked_steps, impl=impl)
        want = oracle.gae(rewards, values, mask, gamma=1.0, lam=1.0, masked_steps=masked_steps)
        scale = np.maximum(*(magnitude(w).max(1, keepdims=True) for w in want)) + 1e-30
        for g, w in zip(got, want, strict=True):
            assert_close_to_oracle(g, w, ceiling=1e-6, scale=scale)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4])
@pytest.mark.parametrize("vocab", [1, 2, 127, 50257, 151935, 151936])
def test_token_logprobs_of_real_vocabularies(require_impl, impl, vocab, shift, dtype):
    g = torch.Generator().manual_seed(vocab)
    logits = (torch.randn(2, vocab, generator=g) * 3 + shift).to(dtype)
    labels = torch.tensor([vocab - 1, vocab // 2])
    check(require_impl("token_logprobs", impl), logits, labels, eager=impl != "torch")


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("block", [256, 512, 1024, 2048, 4096, 8192])
def test_columns_beyond_the_vocabulary_add_nothing_to_rows_far_below_zero(require_impl, impl, block):
    """A column padded with 0 instead of -inf is invisible under peaked logits and costs nats here."""
    impl = require_impl("token_logprobs", impl)
    for vocab in (block - 1, block, block + 1, 2 * block - 1, 2 * block + 1):
        for low in (-1.0, -60.0):
            g = torch.Generator().manual_seed(vocab)
            logits = low - torch.rand(2, vocab, generator=g) * 3
            labels = torch.tensor([0, vocab - 1])
            check(impl, logits.to(DTYPES[vocab % 3]), labels)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_float16_gradients_below_the_normal_numbers_are_not_lost(require_impl, impl):
    """Most probabilities of a large vocabulary are below 6e-5, where float16 has fewer and fewer digits."""
    g = torch.Generator().manual_seed(0)
    leaf = torch.randn(2, 20000, generator=g).half().requires_grad_()
    labels = torch.tensor([1, 19999])
    token_logprobs(leaf, labels, impl=require_impl("token_logprobs", impl)).sum().backward()
    want = oracle.token_logprobs(leaf, labels)[2]
    assert (magnitude(want) < 6e-5).mean() > 0.5
    assert_close_to_oracle(leaf.grad, want, ceiling=1.0, scale=5e-4 * magnitude(want) + 2.0**-25 * 1.01)
