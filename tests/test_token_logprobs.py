"""Log-probabilities and entropy of the sampled tokens: values and gradients."""

import math

import numpy as np
import pytest
import torch

from bench import oracle
from ppo_kernels import token_logprobs
from tests.lib.checks import check_token_logprobs as check
from tests.lib.checks import logits_and_labels as make
from tests.lib.devices import KERNELS
from tests.lib.helpers import (
    INF,
    MASK_DTYPES,
    NAN,
    assert_close_to_oracle,
    bit_equal,
)

OP = "token_logprobs"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "vocab", [1, 2, 3, 7, 31, 64, 127, 128, 129, 1000, 1023, 1025, 4097, pytest.param(50257, marks=pytest.mark.large)]
)
def test_matches_the_oracle(impl, vocab, dtype):
    check(impl, *make(3 if vocab > 40000 else 7, vocab, dtype))


@pytest.mark.several_blocks(dtype=torch.bfloat16)
@pytest.mark.large
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_vocabulary_of_151936(impl, dtype):
    check(impl, *make(2, 151936, dtype))


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("vocab", [50257, pytest.param(256000, marks=pytest.mark.large)])
def test_kernels_hold_the_ceilings_at_64_nats(require_impl, impl, vocab):
    """Ceilings alone, and for kernels alone: at these sizes the eager error is far above them."""
    require_impl(OP, impl)
    logits = torch.empty(2, vocab).uniform_(-64, 64)
    logits[1] = torch.randn(vocab) * 0.01 + 60
    labels = torch.tensor([int(logits[0].argmax()), 5])
    logp, h = token_logprobs(logits, labels, entropy=True, impl=impl)
    want, want_h, _ = oracle.token_logprobs(logits, labels)
    assert_close_to_oracle(logp, want, ceiling=5e-6, what="logp")
    assert_close_to_oracle(h, want_h, ceiling=1e-5, what="entropy")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [-100.0, 100.0, -1e4, 1e4, -5e4])
@pytest.mark.parametrize("vocab", [5, 127, 1001])
def test_shifted_rows(impl, dtype, shift, vocab):
    """Rows far below zero show columns that were padded with 0, and a running maximum that starts at 0."""
    check(impl, *make(4, vocab, dtype, scale=1.0, shift=shift))


@pytest.mark.parametrize("scale", [0.0, 1e-3, 30.0, 1e3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_flat_and_peaked_rows(impl, scale, dtype):
    check(impl, *make(6, 777, dtype, scale=scale))


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 1.7, 100, "tensor", "rows", "broadcast", "half"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_temperature_as_number_tensor_and_per_row(impl, temperature, dtype):
    logits, labels = make(12, 130, dtype)
    logits, labels = logits.view(3, 4, 130), labels.view(3, 4)
    forms = {
        "tensor": torch.tensor(0.7),
        "rows": torch.rand(3, 4) + 0.4,
        "broadcast": torch.rand(3, 1) + 0.4,
        "half": (torch.rand(4) + 0.4).to(torch.bfloat16),
    }
    check(impl, logits, labels, temperature=forms.get(temperature, temperature))


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("gap", [5.0, 17.0, 20.0, 30.0, 40.0, 87.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_keep_the_digits_of_logp_near_probability_one(require_impl, impl, gap, dtype):
    """log p = -log1p(sum of the others), and the target's gradient is -expm1(log p); eager log_softmax says 0."""
    require_impl(OP, impl)
    vocab = 33
    logits = torch.zeros(3, vocab)
    logits[0, 0], logits[1, 17], logits[2, vocab - 1] = gap, gap, gap
    logits = (logits - torch.tensor([[0.0], [50.0], [-50.0]])).to(dtype)
    labels = torch.tensor([0, 17, vocab - 1])
    leaf = logits.clone().requires_grad_()
    logp = token_logprobs(leaf, labels, impl=impl)
    logp.sum().backward()
    want, _, want_grad = oracle.token_logprobs(logits, labels)
    np.testing.assert_allclose(logp.detach().double().numpy(), want, rtol=2e-6, atol=1e-44)
    if dtype == torch.float32:
        target = leaf.grad.gather(1, labels[:, None]).double().numpy()
        exact = np.take_along_axis(want_grad, labels[:, None].numpy(), 1)
        np.testing.assert_allclose(target, exact, rtol=1e-5, atol=1e-44)
        np.testing.assert_allclose(leaf.grad.double().numpy(), want_grad, rtol=1e-5, atol=1e-37)


def minus_infinity_rows(vocab, dtype):
    """Leading, trailing and middle blocks, all but one, all but two, and every other column at -inf."""
    logits, _ = make(8, vocab, dtype)
    keep = torch.zeros(8, vocab, dtype=torch.bool)
    keep[0, vocab // 2 :] = keep[1, : vocab // 2] = keep[2, : vocab // 4] = keep[2, -vocab // 4 :] = True
    keep[3, vocab // 2] = keep[4, [0, -1]] = keep[5, ::2] = keep[6, -1] = keep[7, 0] = True
    logits[~keep] = -INF
    return logits, keep.float().argmax(-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [8, 64, 1000, 5000, 16384])
@pytest.mark.parametrize("entropy", [True, "detached"])
def test_minus_infinity_anywhere(impl, vocab, dtype, entropy):
    logits, labels = minus_infinity_rows(vocab, dtype)
    logp, h, grad = check(impl, logits, labels, entropy=entropy)
    assert logp.isfinite().all()
    assert (h >= -1e-6).all()
    assert not grad[logits == -INF].any()
    assert logp[[3, 6, 7]].tolist() == [0.0] * 3, "certain tokens"


def test_a_label_at_minus_infinity_has_logp_minus_infinity(impl):
    logits, labels = make(3, 40)
    logits[1, labels[1]] = -INF
    logp, h, _ = check(impl, logits, labels, eager=False)
    assert logp[1] == -INF
    assert h.isfinite().all()


@pytest.mark.parametrize("poison", ["all -inf", INF, NAN])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at_label", [False, True])
def test_a_row_without_a_distribution_is_nan_alone(impl, poison, dtype, at_label):
    logits, labels = make(5, 300, dtype)
    clean = check(impl, logits, labels)
    if poison == "all -inf":
        logits[2] = -INF
    else:
        logits[2, int(labels[2]) if at_label else (int(labels[2]) + 1) % 300] = poison
    torch.manual_seed(0)
    logp, h, grad = check(impl, logits, labels, eager=False)
    for got in (logp, h, grad):
        assert got[2].isnan().all()
    others = [0, 1, 3, 4]
    assert bit_equal(logp[others], clean[0][others])
    assert bit_equal(h[others], clean[1][others])


@pytest.mark.parametrize("bad", [-1, -2, 300, 301, 2**31 - 1, -(2**31), 2**31, 2**40, -(2**62), 2**62])
@pytest.mark.parametrize("label_dtype", [torch.int32, torch.int64])
def test_a_label_outside_the_vocabulary_is_nan_in_its_row_alone(impl, bad, label_dtype):
    if label_dtype == torch.int32 and not -(2**31) <= bad < 2**31:
        bad = bad % 1000 + 1000
    logits, labels = make(4, 300)
    labels[1] = bad
    logp, h, grad = check(impl, logits, labels.to(label_dtype), eager=False)
    assert logp[1].isnan()
    assert h[1].isnan()
    assert grad[1].isnan().all()
    assert logp.isnan().sum() == 1
    assert grad.isnan().sum() == 300


@pytest.mark.parametrize("label_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("ignore_index", [-100, -1, 7, 2**31 - 1])
@pytest.mark.parametrize("junk", [NAN, INF, -INF])
def test_ignored_rows_are_not_read(impl, label_dtype, ignore_index, junk):
    logits, labels = make(6, 33)
    labels[[1, 4]] = ignore_index
    if ignore_index == 7:
        labels[[0, 2, 3, 5]] = 8
    logits[[1, 4]] = junk
    logp, h, grad = check(impl, logits, labels.to(label_dtype), eager=False, ignore_index=ignore_index)
    for got in (logp, h, grad):
        assert not got[[1, 4]].any()
        assert got[[0, 2, 3, 5]].any(-1).all() if got.dim() > 1 else got[[0, 2, 3, 5]].all()


@pytest.mark.parametrize("mask_dtype", MASK_DTYPES)
@pytest.mark.parametrize("junk", [NAN, INF, -INF, 1e30])
def test_masked_rows_are_not_read(impl, mask_dtype, junk):
    logits, labels = make(9, 65)
    mask = torch.tensor([1, 0, 1, 1, 0, 0, 1, 1, 0], dtype=torch.bool)
    torch.manual_seed(0)
    clean = check(impl, logits, labels, mask=mask, eager=False)
    logits[~mask], labels[~mask] = junk, 2**40
    torch.manual_seed(0)
    dirty = check(impl, logits, labels, mask=mask.to(mask_dtype), eager=False)
    assert bit_equal(clean, dirty)
    for got in dirty:
        assert not got[~mask].any()


@pytest.mark.parametrize("shape", [(0, 5), (0, 3, 5), (2, 0, 5), (5,), (2, 3, 4, 5), (0, 1)])
def test_any_leading_shape_and_empty_batches(impl, shape):
    logits = torch.randn(shape)
    labels = torch.randint(0, shape[-1], shape[:-1])
    logp, h, grad = check(impl, logits, labels)
    assert logp.shape == h.shape == shape[:-1]
    assert grad.shape == shape


def test_all_masked_batch_gives_zeros(impl):
    logits, labels = make(4, 9)
    for got in check(impl, logits * NAN, labels, mask=torch.zeros(4), eager=False):
        assert not got.any()


def test_gradients_of_a_row_sum_to_zero_and_padding_the_vocabulary_adds_nothing(impl):
    logits, labels = make(6, 515)
    logp, h, grad = check(impl, logits, labels)
    assert grad.double().sum(1).abs().max() < 1e-6
    wide = torch.cat([logits, torch.full((6, 77), -INF)], 1)
    torch.manual_seed(0)
    wide_logp, wide_h, wide_grad = check(impl, wide, labels)
    torch.testing.assert_close(wide_logp, logp, rtol=0, atol=2e-6)
    torch.testing.assert_close(wide_h, h, rtol=0, atol=4e-6)
    assert not wide_grad[:, 515:].any()


def test_equals_a_categorical_distribution(impl):
    logits, labels = make(6, 97, torch.float64)
    d = torch.distributions.Categorical(logits=logits)
    logp, h = token_logprobs(logits, labels, entropy=True, impl=impl)
    torch.testing.assert_close((logp, h), (d.log_prob(labels), d.entropy()), rtol=0, atol=1e-12)


def test_uniform_and_single_word_rows_are_exact(impl):
    logp, h = token_logprobs(torch.full((2, 1024), 3.0), torch.tensor([0, 1023]), entropy=True, impl=impl)
    assert logp.tolist() == pytest.approx([-math.log(1024)] * 2, rel=1e-6)
    assert h.tolist() == pytest.approx([math.log(1024)] * 2, rel=1e-6)
    logp, h = token_logprobs(torch.tensor([[-7.0], [9.0]]), torch.tensor([0, 0]), entropy=True, impl=impl)
    assert logp.tolist() == h.tolist() == [0.0, 0.0]


EXTREME = (2.0**-1074, 1e-320, 1e-300, 1e-46, 1e-40, 1e-37, 1e30, 1e40, 1e46, 1e300, 1.7e308, INF)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tau", EXTREME)
def test_temperatures_without_an_inverse_give_the_limit(impl, tau, dtype):
    """The largest logits alone count, or all logits alike; the gradient is finite, and all of it that there is."""
    logits = torch.tensor([[1.0, 2.0, -3.0, 2.0], [5.0, -INF, 0.0, 1.0], [1.0, 2.0, 3.0, 4.0]], dtype=dtype)
    labels = torch.tensor([1, 0, 0])
    hot = tau > 1.0
    want = torch.tensor([-math.log(4), -math.log(3), -math.log(4)] if hot else [-math.log(2), 0.0, -INF])
    entropy = torch.tensor([math.log(4), math.log(3), math.log(4)] if hot else [math.log(2), 0.0, 0.0])
    for temperature in (tau, torch.tensor(tau, dtype=torch.float64)):
        if temperature == INF and not torch.is_tensor(temperature):
            continue
        leaf = logits.clone().requires_grad_()
        logp, h = token_logprobs(leaf, labels, temperature=temperature, entropy=True, impl=impl, validate=True)
        assert logp[:2].tolist() == pytest.approx(want[:2].tolist(), abs=1e-6)
        assert logp[2].item() == pytest.approx(want[2].item(), abs=1e-6) if hot else logp[2] < -1e30
        assert h.tolist() == pytest.approx(entropy.tolist(), abs=1e-6)
        (logp[:2].sum() + h.sum()).backward()
        assert leaf.grad.isfinite().all()
        assert bool((leaf.grad.abs() < 1e-29).all()) == hot


@pytest.mark.parametrize("tau", [0.0, -0.0, -1.0, -INF, NAN])
def test_a_temperature_that_is_not_above_0_makes_its_row_nan(impl, tau):
    leaf = torch.randn(3, 5).requires_grad_()
    rows = torch.tensor([1.0, tau, tau])
    mask = torch.tensor([1, 1, 0])
    logp, h = token_logprobs(leaf, torch.tensor([0, 1, 2]), temperature=rows, mask=mask, entropy=True, impl=impl)
    assert logp.isnan().tolist() == h.isnan().tolist() == [False, True, False]
    (logp + h).sum().backward()
    assert leaf.grad.isnan().any(1).tolist() == [False, True, False]
