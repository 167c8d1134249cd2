"""Generalised advantage estimation."""

import importlib

import numpy as np
import pytest
import torch

from bench import oracle
from ppo_kernels import gae
from tests.lib.helpers import (
    JUNK,
    MASK_DTYPES,
    MASKED_STEPS,
    NAN,
    assert_close_to_oracle,
    assert_raises,
    bit_equal,
    cu,
    holey_mask,
    out_dtype,
    pack,
    row_scale,
    strided,
    unpack,
    with_junk,
)
from tests.lib.memory import far_rows

OP = "gae"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def make(batch, length, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, length, generator=g).to(dtype) for _ in range(2)]


def check(impl, rewards, values, mask=None, **options):
    got = gae(rewards, values, mask, impl=impl, **options)
    want = oracle.gae(rewards, values, mask, **options)
    dtype = out_dtype(rewards.dtype, values.dtype)
    for name, g, w in zip(("advantages", "returns"), got, want, strict=True):
        assert g.dtype == dtype
        assert g.shape == rewards.shape
        limit = 1e-6 if dtype == torch.float32 else 1e-12
        if rewards.dim() == 2:
            assert_close_to_oracle(g, w, ceiling=limit, scale=row_scale(*want), what=name)
        else:
            assert_close_to_oracle(g, w, ceiling=limit, scale=max(np.abs(want).max(initial=0), 1e-9), what=name)
    return got


@pytest.mark.parametrize("masked_steps", MASKED_STEPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 2, 3, 7, 31, 32, 33, 127, 128, 129, 257])
def test_matches_the_loop_at_awkward_lengths(impl, length, dtype, masked_steps):
    check(impl, *make(6, length, dtype), holey_mask(6, length), gamma=0.97, lam=0.9, masked_steps=masked_steps)


@pytest.mark.large
def test_every_length_to_300_in_one_packed_batch(impl):
    for i, masked_steps in enumerate(MASKED_STEPS):
        # A row takes the interpreter 20 ms: there each length meets one of the modes.
        lengths = list(range(301))[i :: 3 if impl == "triton" else 1]
        mask = torch.rand(sum(lengths)) < 0.8
        rewards, values = torch.randn(sum(lengths)), torch.randn(sum(lengths))
        check(impl, rewards, values, mask, masked_steps=masked_steps, gamma=0.99, cu_seqlens=cu(lengths))


@pytest.mark.several_blocks(length=4097)
@pytest.mark.parametrize("length", [1023, 1025, 2047, 2048, 2049, 4095, 4096, 4097, 8191, 8193])
def test_lengths_around_the_blocks_of_a_kernel(impl, length):
    boot = torch.tensor([3.0, -2.0])
    rewards, values = make(2, length)
    mask = torch.rand(2, length) < torch.tensor([[0.9], [0.01]])
    for masked_steps in MASKED_STEPS:
        check(impl, rewards, values, mask, gamma=0.99, lam=1.0, masked_steps=masked_steps, bootstrap_value=boot)
    both = [x.reshape(-1) for x in (rewards, values, mask)]
    check(impl, *both, gamma=1.0, bootstrap_value=boot, cu_seqlens=cu([length, length]))


@pytest.mark.parametrize(
    ("gamma", "lam"), [(0.0, 0.0), (1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.5, 0.9), (0.999, 0.998), (1, 1)]
)
@pytest.mark.parametrize("masked_steps", MASKED_STEPS)
def test_discounts_including_their_bounds(impl, gamma, lam, masked_steps):
    check(impl, *make(5, 65), holey_mask(5, 65), gamma=gamma, lam=lam, masked_steps=masked_steps)


@pytest.mark.parametrize("masked_steps", MASKED_STEPS)
def test_lambda_per_row_and_bootstrap_values(impl, masked_steps):
    rewards, values = make(6, 41)
    lam = torch.tensor([0.0, 1.0, 0.5, 0.95, 0.9, 0.1])
    boot = torch.tensor([1.5, -2.0, 3.0, 0.0, 10.0, -7.0])
    check(impl, rewards, values, holey_mask(6, 41), gamma=0.9, lam=lam, masked_steps=masked_steps, bootstrap_value=boot)
    check(impl, rewards, values, None, gamma=0.9, masked_steps=masked_steps, bootstrap_value=boot)


@pytest.mark.several_blocks
def test_hand_computed_rows_tell_the_masked_steps_apart(impl):
    rewards = torch.tensor([[1.0, 100.0, 2.0, 50.0]])
    values = torch.tensor([[4.0, 200.0, 8.0, 70.0]])
    mask = torch.tensor([[True, False, True, False]])
    boot = torch.tensor([16.0])
    want = {
        "skip": [2 + 0.5 * 16 - 8, 1 + 0.5 * 8 - 4],
        "zero": [2 + 0.5 * 16 - 8, 1 + 0.5 * 0 - 4],
        "keep": [2 + 0.5 * 16 - 8, 1 + 0.5 * 200 - 4],
    }
    a2 = want["skip"][0]
    want["skip"][1] += 0.25 * a2
    want["zero"][1] += 0.25 * (0.5 * 8 + 0.25 * a2)
    want["keep"][1] += 0.25 * (100 + 0.5 * 8 - 200 + 0.25 * a2)
    for masked_steps, (last, first) in want.items():
        adv, ret = gae(
            rewards, values, mask, gamma=0.5, lam=0.5, masked_steps=masked_steps, bootstrap_value=boot, impl=impl
        )
        assert adv.tolist() == [[first, 0.0, last, 0.0]]
        assert ret.tolist() == [[first + 4, 0.0, last + 8, 0.0]]


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("masked_steps", ["skip", "zero"])
@pytest.mark.parametrize("mask_dtype", MASK_DTYPES)
def test_what_lies_under_the_mask_does_not_matter(impl, junk, masked_steps, mask_dtype):
    rewards, values = make(6, 37)
    mask = holey_mask(6, 37)
    clean = gae(rewards, values, mask, masked_steps=masked_steps, impl=impl)
    dirty = gae(
        with_junk(rewards, mask, junk),
        with_junk(values, mask, junk),
        mask.to(mask_dtype),
        masked_steps=masked_steps,
        impl=impl,
    )
    assert bit_equal(clean, dirty)
    assert not clean[0][~mask].any()
    assert not clean[1][~mask].any()


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("masked_steps", MASKED_STEPS)
def test_tokens_after_the_last_valid_one_are_never_read(impl, junk, masked_steps):
    rewards, values = make(6, 37)
    mask = holey_mask(6, 37)
    after = mask.flip(-1).cumsum(-1).flip(-1) == 0
    clean = gae(rewards, values, mask, masked_steps=masked_steps, impl=impl)
    dirty = gae(
        with_junk(rewards, ~after, junk), with_junk(values, ~after, junk), mask, masked_steps=masked_steps, impl=impl
    )
    assert bit_equal(clean, dirty)


def test_any_non_zero_mask_value_is_valid(impl):
    rewards, values = make(2, 5)
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 0, 0, 1]])
    plain = gae(rewards, values, mask != 0, impl=impl)
    assert bit_equal(plain, gae(rewards, values, mask * 256, impl=impl))
    assert bit_equal(plain, gae(rewards, values, (mask * 255).to(torch.uint8), impl=impl))
    assert bit_equal(plain, gae(rewards, values, mask * -0.25, impl=impl))


@pytest.mark.parametrize("masked_steps", MASKED_STEPS)
@pytest.mark.parametrize("cu_dtype", [torch.int32, torch.int64])
def test_packed_equals_padded(impl, masked_steps, cu_dtype):
    lengths = [5, 0, 31, 1, 17, 0]
    rewards, values = make(6, 31)
    inside = torch.arange(31) < torch.tensor(lengths)[:, None]
    mask = (torch.rand(6, 31) < 0.7) & inside
    boot = torch.randn(6)
    options = {"masked_steps": masked_steps, "bootstrap_value": boot, "gamma": 0.98, "impl": impl}
    padded = gae(rewards, values, mask, **options)
    packed = gae(*(pack(x, lengths) for x in (rewards, values, mask)), cu_seqlens=cu(lengths, cu_dtype), **options)
    for a, b in zip(padded, packed, strict=True):
        assert_close_to_oracle(unpack(b, lengths, 31), a, ceiling=2e-7, scale=row_scale(a.numpy()))
        if impl == "cpu":
            assert bit_equal(unpack(b, lengths, 31), a)


@pytest.mark.several_blocks(masked_steps="skip")
@pytest.mark.parametrize("masked_steps", MASKED_STEPS)
def test_packed_rows_of_several_blocks_equal_padded_ones(impl, masked_steps):
    lengths = [2100, 0, 6200, 1, 700]
    rewards, values = make(5, 6200)
    mask = (torch.rand(5, 6200) < 0.7) & (torch.arange(6200) < torch.tensor(lengths)[:, None])
    options = {"masked_steps": masked_steps, "bootstrap_value": torch.randn(5), "gamma": 0.99, "impl": impl}
    padded = gae(rewards, values, mask, **options)
    packed = gae(*(pack(x, lengths) for x in (rewards, values, mask)), cu_seqlens=cu(lengths), **options)
    for a, b in zip(padded, packed, strict=True):
        assert_close_to_oracle(unpack(b, lengths, 6200), a, ceiling=2e-7, scale=row_scale(a.numpy()))


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (3, 4)])
def test_empty_and_all_masked_batches(impl, shape):
    rewards, values = torch.full(shape, NAN), torch.full(shape, NAN)
    adv, ret = gae(rewards, values, torch.zeros(shape), bootstrap_value=torch.ones(shape[0]), impl=impl)
    assert adv.shape == ret.shape == shape
    assert not adv.any()
    assert not ret.any()


@pytest.mark.parametrize("rows", [0, 3])
def test_packed_without_tokens(impl, rows):
    adv, ret = gae(torch.empty(0), torch.empty(0), cu_seqlens=torch.zeros(rows + 1, dtype=torch.int32), impl=impl)
    assert adv.shape == ret.shape == (0,)


@pytest.mark.parametrize("length", [4096, pytest.param(131072, marks=pytest.mark.large)])
def test_long_rows_keep_the_error_bound_at_gamma_lambda_one(impl, length):
    check(impl, *make(2, length), None, gamma=1.0, lam=1.0)
    rewards = torch.full((1, length), 1e-3)
    check(impl, rewards, torch.full((1, length), 0.3), torch.rand(1, length) < 0.9, gamma=1.0, lam=0.95)


def test_discounts_close_to_one_keep_their_digits(impl):
    """gamma * lam = 0.997 in float32 is wrong by 1e-5 of 1 - gamma * lam, and the sum of equal rewards with it."""
    check(impl, torch.ones(1, 3000), torch.zeros(1, 3000), gamma=0.999, lam=0.998)


def test_the_scan_of_the_interpreter_itself(require_impl, monkeypatch):
    """The other tests replace it, because it runs element by element."""
    scan = importlib.import_module("triton.runtime.interpreter").ScanOps
    monkeypatch.setattr(scan, "generic_scan", scan.own_scan)
    impl = require_impl(OP, "triton")
    for masked_steps in MASKED_STEPS:
        check(
            impl,
            *make(4, 200),
            holey_mask(4, 200),
            gamma=0.97,
            masked_steps=masked_steps,
            bootstrap_value=torch.randn(4),
        )
    check(impl, *make(1, 4500), torch.rand(1, 4500) < 0.8, gamma=1.0, lam=1.0)


def test_rows_beyond_the_reach_of_32_bits(impl):
    rewards, values = make(9, 5)
    mask = holey_mask(9, 5)
    far = gae(*(far_rows(x, 2**28) for x in (rewards, values, mask)), bootstrap_value=torch.ones(9), impl=impl)
    assert bit_equal(far, gae(rewards, values, mask, bootstrap_value=torch.ones(9), impl=impl))


def test_padding_the_batch_or_time_changes_no_bit(impl):
    rewards, values = make(3, 150)
    mask = torch.rand(3, 150) < 0.8
    adv, _ = gae(rewards, values, mask, impl=impl)
    wide = [torch.cat([x, torch.full((3, 90), NAN)], 1) for x in (rewards, values)]
    padded, _ = gae(*wide, torch.cat([mask, torch.zeros(3, 90, dtype=torch.bool)], 1), impl=impl)
    torch.testing.assert_close(padded[:, :150], adv, rtol=0, atol=1e-6)
    if impl == "cpu":
        assert bit_equal(padded[:, :150], adv)
    tall, _ = gae(*(torch.cat([torch.randn(5, 150), x]) for x in (rewards, values)), impl=impl)
    alone, _ = gae(rewards, values, impl=impl)
    assert bit_equal(tall[5:], alone)


@pytest.mark.parametrize("pad", [1, 3, 8])
def test_padded_rows_transposed_and_expanded_inputs(impl, pad):
    rewards, values = make(5, 19)
    mask = holey_mask(5, 19)
    plain = gae(rewards, values, mask, impl=impl)
    wide_mask = torch.ones(5, 19 + pad, dtype=torch.bool)
    wide_mask[:, :19] = mask
    assert bit_equal(plain, gae(strided(rewards, pad), strided(values, pad, 2), wide_mask[:, :19], impl=impl))
    assert bit_equal(
        plain, gae(rewards.t().contiguous().t(), values.t().contiguous().t(), mask.t().contiguous().t(), impl=impl)
    )
    one = torch.randn(1, 19)
    assert bit_equal(gae(one.expand(5, 19), values, mask, impl=impl), gae(one.repeat(5, 1), values, mask, impl=impl))


def test_nan_and_infinity_in_valid_tokens_stay_in_their_row(impl):
    rewards, values = make(4, 300)
    clean = gae(rewards, values, impl=impl)[0]
    rewards[1, 200], values[2, 10] = NAN, float("inf")
    adv = gae(rewards, values, impl=impl)[0]
    assert bit_equal(adv[[0, 3]], clean[[0, 3]])
    assert adv[1, :201].isnan().all()
    assert adv[1, 201:].isfinite().all()
    assert not adv[2, :11].isfinite().any()
    assert bit_equal(adv[2, 11:], clean[2, 11:])


@pytest.mark.parametrize(
    "bounds", [[-5, 3, 12], [0, 100, 7], [0, 9, 4, 12], [2**40, -(2**40), 12], [3, 3, 3], [12, 0], [5]]
)
def test_wrong_cu_seqlens_never_read_outside(impl, bounds):
    rows = len(bounds) - 1
    adv, ret = gae(
        torch.randn(12),
        torch.randn(12),
        torch.rand(12) < 0.7,
        bootstrap_value=torch.ones(rows),
        cu_seqlens=torch.tensor(bounds),
        impl=impl,
    )
    assert adv.shape == ret.shape == (12,)
    assert adv.isfinite().all()
    assert_raises(
        ValueError,
        lambda: gae(torch.randn(12), torch.randn(12), cu_seqlens=torch.tensor(bounds), validate=True, impl=impl),
        "cu_seqlens",
        "12",
    )


@pytest.mark.parametrize("bounds", [[0], [5]])
def test_packed_tokens_of_no_row(impl, bounds):
    x = torch.randn(9000)  # more than a block clears
    for result in gae(x, x, bootstrap_value=torch.ones(0), cu_seqlens=torch.tensor(bounds), impl=impl):
        assert result.shape == (9000,)
        assert not result.any()


@pytest.mark.parametrize(
    ("change", "error", "mentions"),
    [
        ({"rewards": torch.randn(3, 4, 1)}, ValueError, ("rewards", "[B, T]", "(3, 4, 1)")),
        ({"values": torch.randn(3, 5)}, ValueError, ("values", "(3, 4)", "(3, 5)")),
        ({"values": torch.ones(3, 4, dtype=torch.int64)}, TypeError, ("values", "float32", "int64")),
        ({"mask": torch.ones(3)}, ValueError, ("mask", "(3, 4)", "(3,)")),
        ({"mask": torch.ones(3, 4, dtype=torch.complex64)}, TypeError, ("mask", "bool", "complex64")),
        ({"mask": [[1] * 4] * 3}, TypeError, ("mask", "Tensor", "list")),
        ({"masked_steps": "carry"}, ValueError, ("masked_steps", "skip", "carry")),
        ({"gamma": 1.5}, ValueError, ("gamma", "1", "1.5")),
        ({"gamma": -0.1}, ValueError, ("gamma", "0", "-0.1")),
        ({"gamma": NAN}, ValueError, ("gamma", "nan")),
        ({"lam": 2.0}, ValueError, ("lam", "2.0")),
        ({"lam": "x"}, TypeError, ("lam", "number", "str")),
        ({"lam": torch.ones(4)}, ValueError, ("lam", "(3,)", "(4,)")),
        ({"bootstrap_value": torch.ones(3, 1)}, ValueError, ("bootstrap_value", "(3,)", "(3, 1)")),
        ({"cu_seqlens": torch.tensor([0, 12])}, ValueError, ("cu_seqlens", "[N]", "(3, 4)")),
        ({"values": torch.randn(3, 4, device="meta")}, ValueError, ("values", "meta", "cpu")),
        ({"impl": "CUDA"}, ValueError, ("CUDA", "cpu", "auto")),
        ({"impl": "nonsense"}, ValueError, ("nonsense", "torch")),
    ],
)
def test_wrong_arguments_are_named(impl, change, error, mentions):
    arguments = {"rewards": torch.randn(3, 4), "values": torch.randn(3, 4), "mask": None, "impl": impl} | change
    assert_raises(error, lambda: gae(arguments.pop("rewards"), arguments.pop("values"), **arguments), *mentions)


@pytest.mark.parametrize(
    "bounds", [torch.tensor([0.0, 12.0]), torch.tensor([[0, 12]]), torch.empty(0, dtype=torch.int64)]
)
def test_cu_seqlens_of_a_wrong_kind(impl, bounds):
    assert_raises(
        (TypeError, ValueError),
        lambda: gae(torch.randn(12), torch.randn(12), cu_seqlens=bounds, impl=impl),
        "cu_seqlens",
    )


def test_validate_catches_lambda_out_of_range(impl):
    lam = torch.tensor([0.5, 1.5])
    assert_raises(ValueError, lambda: gae(*make(2, 3), lam=lam, validate=True, impl=impl), "lam", "1.5")
