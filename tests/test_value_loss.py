"""The clipped value loss, its statistics and its gradient."""

import numpy as np
import pytest
import torch

from bench import oracle
from ppo_kernels import ValueStats, value_loss
from tests.lib.checks import check_views
from tests.lib.helpers import (
    JUNK,
    MASK_DTYPES,
    NAN,
    assert_close_to_oracle,
    assert_raises,
    bit_equal,
    cu,
    grad_of,
    holey_mask,
    out_dtype,
    pack,
    with_junk,
)

OP = "value_loss"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FIELDS = ("clipfrac", "error_mean", "explained_variance", "count")


def make(batch, length, dtype=torch.float32, seed=0, spread=0.4):
    g = torch.Generator().manual_seed(seed)
    old = torch.randn(batch, length, generator=g) * 2
    values = old + torch.randn(batch, length, generator=g) * spread
    returns = old + torch.randn(batch, length, generator=g)
    return [x.to(dtype) for x in (values, old, returns)]


def check(impl, values, old, returns, mask=None, grad_output=None, **options):
    (loss, stats), grad = grad_of(
        lambda x: value_loss(x, old, returns, mask, impl=impl, **options), values, grad_output
    )
    want, want_stats, want_grad = oracle.value_loss(values, old, returns, mask, **options)
    dtype = out_dtype(values.dtype, old.dtype, returns.dtype)
    assert isinstance(stats, ValueStats)
    assert stats._fields == FIELDS
    assert loss.dtype == dtype
    assert grad.dtype == values.dtype
    limit = 2e-6 if dtype == torch.float32 else 1e-11
    assert_close_to_oracle(loss.detach(), want, ceiling=limit, scale=max(abs(want), 1.0), what="loss")
    for name, value in zip(FIELDS, stats, strict=True):
        assert value.shape == ()
        assert value.dtype == dtype
        assert not value.requires_grad
        assert_close_to_oracle(value, want_stats[name], ceiling=limit, scale=max(abs(want_stats[name]), 1.0), what=name)
    scale = 1.0 if grad_output is None else float(grad_output)
    largest = max(np.abs(want_grad * scale).max(initial=0.0), 1e-30)
    rounding = torch.finfo(values.dtype).eps if values.dtype.itemsize == 2 else 0.0
    least = torch.finfo(values.dtype).smallest_normal * torch.finfo(values.dtype).eps / largest
    assert_close_to_oracle(grad, want_grad * scale, ceiling=limit + rounding + least, scale=largest, what="gradient")
    return loss.detach(), stats, grad


@pytest.mark.several_blocks(shape=(2, 9001), clip=0.2, dtype=torch.float32)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clip", [0.2, 0.0, None, 5.0])
@pytest.mark.parametrize("shape", [(1, 1), (4, 2), (6, 33), (5, 128), (3, 1025), (2, 9001)])
def test_matches_the_loop(impl, shape, clip, dtype):
    data = make(*shape, dtype)
    check(impl, *data, cliprange_value=clip)
    check(impl, *data, holey_mask(*shape), cliprange_value=clip)


@pytest.mark.parametrize("normalizer", [None, 3, torch.tensor(11.0), torch.tensor(12), 0, torch.tensor(0)])
@pytest.mark.parametrize("weighted", [False, True])
def test_normalizers_and_row_weights(impl, normalizer, weighted):
    weight = {"row_weight": torch.rand(4)} if weighted else {}
    loss, _, grad = check(impl, *make(4, 9), holey_mask(4, 9), normalizer=normalizer, **weight)
    if normalizer is not None and float(normalizer) == 0:
        assert float(loss) == 0.0
        assert not grad.any()


@pytest.mark.parametrize("grad_output", [1.0, -2.5, 0.0])
def test_incoming_gradients_scale(impl, grad_output):
    check(impl, *make(4, 9), holey_mask(4, 9), grad_output=torch.tensor(grad_output))


@pytest.mark.parametrize("grad_output", [float("inf"), -float("inf"), float("nan")])
def test_an_overflow_from_above_shows_in_every_entry(impl, grad_output):
    """As documented: the kernels' masked entries are NaN then, the reference's 0."""
    values, old, returns = make(4, 9)
    mask = holey_mask(4, 9)
    fn = lambda x: value_loss(x, old, returns, mask, cliprange_value=None, impl=impl)  # noqa: E731
    grad = grad_of(fn, values, torch.tensor(grad_output))[1]
    assert not grad[mask].isfinite().any()
    assert not grad[~mask].any() if impl == "torch" else grad[~mask].isnan().all()


@pytest.mark.parametrize(
    ("value", "ret", "want"),
    [
        (0.5, 3.0, -2.5),  # inside the clip
        (1.0, 3.0, -2.0),  # at its upper bound: the clamp passes the gradient
        (-1.0, 3.0, -4.0),  # at its lower bound
        (3.0, 2.0, 0.5),  # both squares are 1: the gradient is halved
        (3.0, 1.0, 2.0),  # the plain square is the larger
        (3.0, 4.0, 0.0),  # the clipped one is, and passes nothing
        (1.5, 1.5, 0.0),
    ],
)
def test_gradient_at_bounds_and_ties(impl, value, ret, want):
    values, returns, old = torch.tensor([[value]]), torch.tensor([[ret]]), torch.zeros(1, 1)
    (_, stats), grad = grad_of(lambda x: value_loss(x, old, returns, cliprange_value=1.0, impl=impl), values)
    assert float(grad) == want
    larger = (min(max(value, -1.0), 1.0) - ret) ** 2 > (value - ret) ** 2
    assert float(stats.clipfrac) == float(larger)


def test_without_clip_it_is_half_the_squared_error(impl):
    values, old, returns = make(4, 40)
    loss, stats = value_loss(values, old, returns, cliprange_value=None, impl=impl)
    torch.testing.assert_close(loss, 0.5 * (values - returns).square().mean(), rtol=1e-6, atol=0)
    assert float(stats.clipfrac) == 0.0


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (0.5, 3.0), (0.0, 1.0), (-1.0, 0.0)])
def test_explained_variance(impl, scale, offset):
    returns = torch.randn(3, 50)
    stats = value_loss(returns * scale + offset, returns, returns, impl=impl)[1]
    assert float(stats.explained_variance) == pytest.approx(1 - (1 - scale) ** 2, abs=1e-5)


def test_explained_variance_is_zero_where_returns_do_not_vary(impl):
    stats = value_loss(torch.randn(2, 3), torch.randn(2, 3), torch.full((2, 3), 0.5), impl=impl)[1]
    assert float(stats.explained_variance) == 0.0


def test_explained_variance_with_a_large_mean(impl):
    values, old, returns = (x + 1000.0 for x in make(4, 200))
    stats = value_loss(values, old, returns, impl=impl)[1]
    want = oracle.value_loss(values, old, returns)[1]
    assert float(stats.explained_variance) == pytest.approx(want["explained_variance"], abs=1e-6)
    assert float(stats.error_mean) == pytest.approx(want["error_mean"], abs=1e-6)


@pytest.mark.parametrize("mask_dtype", MASK_DTYPES)
@pytest.mark.parametrize("junk", JUNK)
def test_what_lies_under_the_mask_does_not_matter(impl, junk, mask_dtype):
    values, old, returns = make(6, 37)
    mask, row_weight = holey_mask(6, 37), torch.rand(6)
    (loss, stats), grad = grad_of(lambda x: value_loss(x, old, returns, mask, row_weight=row_weight, impl=impl), values)
    dirty = [with_junk(x, mask, j) for x, j in ((values, junk), (old, -junk), (returns, junk))]
    row_weight = torch.where(mask.any(1), row_weight, junk)
    call = {"row_weight": row_weight, "impl": impl}
    again, dirty_grad = grad_of(lambda x: value_loss(x, *dirty[1:], mask.to(mask_dtype), **call), dirty[0])
    assert bit_equal((loss, *stats), (again[0], *again[1]))
    assert bit_equal(grad, dirty_grad)
    assert not grad[~mask].any()


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (3, 4)])
def test_empty_and_all_masked_batches_give_zeros(impl, shape):
    x = torch.full(shape, NAN)
    (loss, stats), grad = grad_of(lambda leaf: value_loss(leaf, x, x, torch.zeros(shape), impl=impl), x)
    assert float(loss) == 0.0
    assert [float(s) for s in stats] == [0.0] * 4
    assert grad.shape == shape
    assert not grad.any()


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_packed_equals_padded(impl, kind):
    lengths = [5, 0, 31, 1, 17]
    data, row_weight = make(5, 31), torch.rand(5)
    mask = (torch.rand(5, 31) < 0.7) & (torch.arange(31) < torch.tensor(lengths)[:, None])
    padded = check(impl, *data, mask, row_weight=row_weight)
    packed = check(
        impl, *(pack(x, lengths) for x in (*data, mask)), row_weight=row_weight, cu_seqlens=cu(lengths, kind)
    )
    torch.testing.assert_close(packed[0], padded[0], rtol=1e-6, atol=1e-7)
    assert bit_equal(packed[2], pack(padded[2], lengths))


@pytest.mark.parametrize("pad", [1, 5])
def test_views(impl, pad):
    check_views(value_loss, make(5, 19), holey_mask(5, 19), impl, pad)


def test_only_the_current_values_get_a_gradient(impl):
    values, old, returns = (x.requires_grad_() for x in make(3, 4))
    row_weight = torch.ones(3, requires_grad=True)
    value_loss(values, old, returns, row_weight=row_weight, impl=impl)[0].backward()
    assert values.grad is not None
    assert [x.grad for x in (old, returns, row_weight)] == [None] * 3


def test_nan_in_a_valid_token_is_seen(impl):
    values, old, returns = make(3, 4)
    values[1, 2] = NAN
    (loss, stats), grad = grad_of(lambda x: value_loss(x, old, returns, impl=impl), values)
    assert loss.isnan()
    assert stats.error_mean.isnan()
    assert torch.equal(grad.isnan().nonzero(), torch.tensor([[1, 2]]))


@pytest.mark.parametrize("name", ["old_values", "returns"])
def test_nan_in_another_input_of_a_valid_token_is_seen(impl, name):
    values, old, returns = make(3, 4)
    data = {"old_values": old, "returns": returns, "impl": impl}
    clean = grad_of(lambda x: value_loss(x, **data), values)[1]
    data[name][1, 2] = NAN
    (loss, _), grad = grad_of(lambda x: value_loss(x, **data), values)
    assert loss.isnan()
    others = torch.ones(3, 4, dtype=torch.bool)
    others[1, 2] = False
    assert bit_equal(grad[others], clean[others])
    unclipped = value_loss(values, **data, cliprange_value=None)[0]
    assert bool(unclipped.isnan()) == (name == "returns"), "without a clip the old values are not read"


@pytest.mark.parametrize("bounds", [[-5, 3, 12], [0, 100, 7], [2**40, -(2**40), 12], [3, 3, 3], [12, 0], [5]])
def test_wrong_cu_seqlens_never_read_outside(impl, bounds):
    x, call = torch.randn(12), {"row_weight": torch.ones(len(bounds) - 1), "cu_seqlens": torch.tensor(bounds)}
    assert value_loss(x, x, x + 1, impl=impl, **call)[0].isfinite()
    assert_raises(ValueError, lambda: value_loss(x, x, x, validate=True, impl=impl, **call), "cu_seqlens", "12")


WRONG = [
    ({"cliprange_value": -0.1}, ValueError, ("cliprange_value", "0", "-0.1")),
    ({"cliprange_value": "x"}, TypeError, ("cliprange_value", "number", "str")),
    ({"values": torch.randn(12)}, ValueError, ("values", "[B, T]", "(12,)")),
    ({"old_values": torch.randn(4, 3)}, ValueError, ("old_values", "(3, 4)", "(4, 3)")),
    ({"returns": torch.randn(3)}, ValueError, ("returns", "(3, 4)", "(3,)")),
    ({"returns": torch.ones(3, 4, dtype=torch.int64)}, TypeError, ("returns", "int64")),
    ({"mask": torch.ones(4, 3)}, ValueError, ("mask", "(3, 4)", "(4, 3)")),
    ({"row_weight": torch.ones(4)}, ValueError, ("row_weight", "(3,)", "(4,)")),
    ({"normalizer": torch.ones(2)}, ValueError, ("normalizer", "(2,)")),
    ({"normalizer": -1.0}, ValueError, ("normalizer", "-1.0")),
    ({"cu_seqlens": torch.tensor([0.0, 12.0])}, TypeError, ("cu_seqlens", "float32")),
    ({"returns": torch.randn(3, 4, device="meta")}, ValueError, ("returns", "meta", "cpu")),
    ({"impl": "CUDA"}, ValueError, ("CUDA", "cpu", "auto")),
    ({"impl": "nonsense"}, ValueError, ("nonsense", "torch")),
]


@pytest.mark.parametrize(("change", "error", "mentions"), WRONG)
def test_wrong_arguments_are_named(impl, change, error, mentions):
    arguments = dict(zip(("values", "old_values", "returns"), make(3, 4), strict=True)) | {"impl": impl}
    assert_raises(error, lambda: value_loss(**(arguments | change)), *mentions)
