"""Masked moments and whitening, alone and over a process group."""

import importlib
import math
import os
import socket

import numpy as np
import pytest
import torch

from bench import oracle
from ppo_kernels import moments, whiten
from tests.lib import devices
from tests.lib.helpers import (
    JUNK,
    MASK_DTYPES,
    NAN,
    assert_close_to_oracle,
    assert_raises,
    bit_equal,
    holey_mask,
    out_dtype,
    strided,
    with_junk,
)

OP = "whiten"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OPTIONS = [{"shift_mean": s, "unbiased": u} for s in (True, False) for u in (True, False)]


def check(impl, x, mask=None, **options):
    got = whiten(x, mask, impl=impl, **options)
    want = oracle.whiten(x, mask, **options)
    assert got.dtype == out_dtype(x.dtype)
    assert got.shape == x.shape
    limit = 1e-6 if got.dtype == torch.float32 else 1e-11
    assert_close_to_oracle(got, want, ceiling=limit, scale=max(np.abs(want).max(initial=0.0), 1.0), what="whiten")
    return got


def check_moments(impl, x, mask=None):
    got, want = moments(x, mask, impl=impl), oracle.moments(x, mask)
    assert [(g.dtype, g.shape) for g in got] == [(torch.float64, ())] * 3
    count, mean, m2 = (float(g) for g in got)
    size = float(x.double().abs().nan_to_num(0, 0, 0).max()) if x.numel() else 0.0
    assert count == want[0]
    assert abs(mean - want[1]) <= 1e-12 * max(size, 1e-300)
    assert abs(m2 - want[2]) <= 1e-11 * max(want[2], want[0] * (size * 1e-6) ** 2)
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (6, 7), (6, 129), (257,), (2, 3, 4), (3, 17000)])
def test_matches_the_loop(impl, require_impl, shape, dtype):
    if impl == "triton" and math.prod(shape) > 10000:
        shape = (3, 3000)  # five parts, two programs that apply: enough for the interpreter
    x = (torch.randn(shape) * 3 + 1).to(dtype)
    mask = torch.rand(shape) < 0.7
    for options in OPTIONS:
        check(impl, x, mask, **options)
        check(impl, x, **options)
    check_moments(require_impl("moments", impl), x, mask)
    check_moments(impl, x)


@pytest.mark.parametrize("eps", [0.0, 1e-8, 1e-2, 10.0])
def test_eps_is_added_to_the_variance(impl, eps):
    check(impl, torch.randn(4, 50), holey_mask(4, 50), eps=eps)


@pytest.mark.parametrize("count", [1, 2048, 2049, 8 * 2048, 8 * 2048 + 1, 25000])
def test_parts_of_several_blocks(require_impl, monkeypatch, count):
    impl = require_impl(OP, "triton")
    monkeypatch.setattr(importlib.import_module("ppo_kernels.triton.whiten"), "PARTS", 4)
    x, mask = torch.randn(count) + torch.arange(count) / count, torch.rand(count) < 0.6
    check(impl, x, mask)
    check_moments(impl, x, mask)


@pytest.mark.several_blocks(count=9001)
@pytest.mark.parametrize("count", [9001, 2_500_001])
def test_a_mean_that_drifts(impl, count):
    """A block's mean is not its neighbours': of 2.5 million elements a fold takes several rounds."""
    if impl == "triton" and count > 20000:
        count = 20001
    x = torch.randn(count) * 0.1 + torch.arange(count) * (5 / count)
    mask = torch.rand(count) < 0.6
    wide = x[mask].double()
    got = moments(x, mask, impl=impl)
    assert got[0].item() == len(wide)
    torch.testing.assert_close(got[1], wide.mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(got[2], (wide - wide.mean()).square().sum(), rtol=1e-11, atol=0)
    want = (wide - wide.mean()) / wide.std()
    torch.testing.assert_close(whiten(x, mask, eps=0.0, impl=impl)[mask].double(), want, rtol=1e-5, atol=1e-5)


def test_counts_stay_exact_beyond_float32(impl, monkeypatch):
    if impl == "triton":  # all in one part, and few steps for the interpreter
        for name, value in (("BLOCK", 2**20), ("PARTS", 1)):
            monkeypatch.setattr(importlib.import_module("ppo_kernels.triton.whiten"), name, value)
    x = torch.ones(2**24 + 3)
    assert [float(m) for m in moments(x, impl=impl)] == [2**24 + 3, 1.0, 0.0]


def test_hand_computed_values(impl):
    x = torch.tensor([[1.0, 3.0, 99.0]])
    mask = torch.tensor([[1, 1, 0]])
    assert moments(x, mask, impl=impl)[2].item() == 2.0
    for unbiased, variance in ((True, 2.0), (False, 1.0)):
        want = torch.tensor([[-1.0, 1.0, 0.0]]) / math.sqrt(variance)
        got = whiten(x, mask, unbiased=unbiased, eps=0.0, impl=impl)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
        shifted = whiten(x, mask, unbiased=unbiased, eps=0.0, shift_mean=False, impl=impl)
        torch.testing.assert_close(shifted, (want + 2.0) * mask, rtol=1e-6, atol=0)


@pytest.mark.several_blocks
@pytest.mark.parametrize("mean", [100.0, -1e4, 1e6])
def test_a_large_mean_does_not_cancel_the_variance(impl, mean):
    x = torch.randn(4, 300) + mean
    check(impl, x, holey_mask(4, 300))
    check_moments(impl, x, holey_mask(4, 300))


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("eps", [1e-8, 0.0])
def test_no_or_one_valid_element(impl, shift_mean, unbiased, eps):
    options = {"shift_mean": shift_mean, "unbiased": unbiased, "eps": eps, "impl": impl}
    x = torch.tensor([[2.5, NAN, -1.0]])
    assert not whiten(x, torch.zeros(1, 3), **options).any()
    one = whiten(x, torch.tensor([[True, False, False]]), **options)
    assert one.tolist() == [[0.0 if shift_mean else 2.5, 0.0, 0.0]]
    assert whiten(torch.tensor([7.0]), **options).tolist() == [0.0 if shift_mean else 7.0]


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), ()])
def test_empty_and_scalar_tensors(impl, shape):
    x = torch.ones(shape)
    assert whiten(x, impl=impl).shape == shape
    assert [float(m) for m in moments(x, impl=impl)] == [x.numel(), float(x.numel() > 0), 0.0]


def test_equal_values_have_no_nan(impl):
    x = torch.full((3, 4), 0.1)
    assert whiten(x, impl=impl).abs().max() < 1e-3
    assert not whiten(torch.full((3, 4), 0.5), eps=0.0, impl=impl).any()
    torch.testing.assert_close(whiten(x, shift_mean=False, impl=impl), x, rtol=1e-3, atol=0)


@pytest.mark.parametrize("mask_dtype", MASK_DTYPES)
@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("shift_mean", [True, False])
def test_what_lies_under_the_mask_does_not_matter(impl, junk, shift_mean, mask_dtype):
    x, mask = torch.randn(6, 37), holey_mask(6, 37)
    clean, clean_moments = whiten(x, mask, shift_mean=shift_mean, impl=impl), moments(x, mask, impl=impl)
    assert not clean[~mask].any()
    dirty, other_mask = with_junk(x, mask, junk), mask.to(mask_dtype)
    assert bit_equal(clean, whiten(dirty, other_mask, shift_mean=shift_mean, impl=impl))
    assert bit_equal(clean_moments, moments(dirty, other_mask, impl=impl))


def test_padding_changes_nothing(impl):
    x, mask = torch.randn(3, 150), torch.rand(3, 150) < 0.8
    wide = torch.cat([x, torch.full((3, 200), NAN)], 1)
    wide_mask = torch.cat([mask, torch.zeros(3, 200, dtype=torch.bool)], 1)
    padded = whiten(wide, wide_mask, impl=impl)[:, :150]
    torch.testing.assert_close(padded, whiten(x, mask, impl=impl), rtol=0, atol=3e-7)


def test_views(impl):
    x, mask = torch.randn(5, 19), holey_mask(5, 19)
    plain = whiten(x, mask, impl=impl)
    assert bit_equal(plain, whiten(strided(x), mask, impl=impl))
    assert bit_equal(plain, whiten(x.t().contiguous().t(), mask.t().contiguous().t(), impl=impl))
    row = torch.randn(1, 19)
    assert bit_equal(whiten(row.expand(5, 19), mask, impl=impl), whiten(row.repeat(5, 1), mask, impl=impl))


def test_nan_in_a_valid_element_shows_in_every_valid_one_only(impl):
    x, mask = torch.randn(4, 9), holey_mask(4, 9)
    x[0, 3] = NAN
    assert torch.equal(whiten(x, mask, impl=impl).isnan(), mask)


@pytest.mark.parametrize(
    ("change", "error", "mentions"),
    [
        ({"x": torch.ones(3, dtype=torch.int64)}, TypeError, ("x", "float32", "int64")),
        ({"x": [1.0]}, TypeError, ("x", "Tensor", "list")),
        ({"mask": torch.ones(4)}, ValueError, ("mask", "(3,)", "(4,)")),
        ({"eps": -1e-3}, ValueError, ("eps", "0", "-0.001")),
        ({"eps": None}, TypeError, ("eps", "number", "NoneType")),
        ({"mask": torch.ones(3, device="meta")}, ValueError, ("mask", "meta", "cpu")),
        ({"impl": "CUDA"}, ValueError, ("CUDA", "cpu", "auto")),
        ({"impl": "nonsense"}, ValueError, ("nonsense", "torch")),
    ],
)
def test_wrong_arguments_are_named(impl, change, error, mentions):
    arguments = {"x": torch.randn(3), "mask": None, "impl": impl} | change
    assert_raises(error, lambda: whiten(**arguments), *mentions)
    if "eps" not in arguments:
        assert_raises(error, lambda: moments(**arguments), *mentions)


def _rank(rank, port, batches, impl, results):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    devices.serve()
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    group = torch.distributed.group.WORLD
    for i, (shards, masks) in enumerate(batches):
        for j, options in enumerate(OPTIONS):
            out = whiten(shards[rank], masks[rank], group=group, impl=impl, **options)
            torch.save(out, f"{results}/{rank}-{i}-{j}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.large
def test_a_group_whitens_like_one_process_over_the_concatenation(impl, tmp_path):
    batches = []
    for second in (40, 0):
        masks = [torch.rand(60) < 0.7, torch.arange(second) % 3 == 0]
        batches.append(([torch.randn(60) * 4 + 2, torch.randn(second) - 7], masks))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (port, batches, impl, str(tmp_path)), nprocs=2)
    for i, (shards, masks) in enumerate(batches):
        for j, options in enumerate(OPTIONS):
            got = torch.cat([torch.load(tmp_path / f"{rank}-{i}-{j}.pt", weights_only=True) for rank in range(2)])
            want = oracle.whiten(torch.cat(shards), torch.cat(masks), **options)
            assert_close_to_oracle(got, want, ceiling=1e-6, scale=4.0)
