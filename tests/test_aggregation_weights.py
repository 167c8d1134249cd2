"""How token losses become one number."""

import pytest
import torch

from ppo_kernels import aggregation_weights, policy_loss, value_loss
from tests.lib.helpers import MASK_DTYPES, MODES, NAN, assert_raises, bit_equal, cu, holey_mask, pack

OP = "policy_loss"


def direct(losses, mask, mode, max_length):
    """The definition of each mode, row by row."""
    rows = [[float(x) for x, m in zip(r, valid, strict=True) if m] for r, valid in zip(losses, mask, strict=True)]
    filled = [row for row in rows if row]
    tokens, sequences = sum(len(row) for row in rows), len(filled)
    total = sum(sum(row) for row in rows)
    if mode == "token-sum":
        return total
    if not filled:
        return 0.0
    return {
        "token-mean": total / tokens,
        "seq-mean-token-mean": sum(sum(row) / len(row) for row in filled) / sequences,
        "seq-mean-token-sum": total / sequences,
        "seq-mean-token-sum-norm": total / sequences / max_length,
    }[mode]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch", [5, 1])
def test_losses_are_aggregated_as_defined(impl, mode, batch):
    values, returns, mask = torch.randn(batch, 12), torch.randn(batch, 12), holey_mask(batch, 12)
    row_weight, normalizer = aggregation_weights(mask, mode)
    assert row_weight.shape == (batch,)
    assert normalizer.shape == ()
    options = {"row_weight": row_weight, "normalizer": normalizer, "impl": impl}
    loss, _ = value_loss(values, values, returns, mask, **options)
    want = direct(0.5 * (values - returns) ** 2, mask, mode, 12)
    assert float(loss) == pytest.approx(want, rel=1e-5)
    old = values + 0.1
    loss, _ = policy_loss(values, old, returns, mask, **options)
    want = direct(-returns * (values - old).exp(), mask, mode, 12)
    assert float(loss) == pytest.approx(want, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("op", ["policy_loss", "value_loss"])
def test_micro_batches_with_the_global_normalizer_add_up_to_the_batch(impl, mode, op):
    fn = {"policy_loss": policy_loss, "value_loss": value_loss}[op]
    x, old, third, mask = torch.randn(8, 10) * 0.3, torch.randn(8, 10) * 0.3, torch.randn(8, 10), holey_mask(8, 10)
    weight, normalizer = aggregation_weights(mask, mode)
    whole = x.clone().requires_grad_()
    total, _ = fn(whole, old, third, mask, row_weight=weight, normalizer=normalizer, impl=impl)
    total.backward()
    parts, losses = x.clone().requires_grad_(), []
    cuts = [slice(0, 1), slice(1, 2), slice(2, 6), slice(6, 8)]
    shares = [aggregation_weights(mask[c], mode, max_length=10) for c in cuts]
    if mode != "token-sum":
        normalizer = sum(share[1] for share in shares)
        assert float(normalizer) == float(aggregation_weights(mask, mode)[1])
    for c, (row_weight, _) in zip(cuts, shares, strict=True):
        assert bit_equal(row_weight, weight[c])
        loss, _ = fn(parts[c], old[c], third[c], mask[c], row_weight=row_weight, normalizer=normalizer, impl=impl)
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(sum(losses), total.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("mode", MODES)
def test_packed_equals_padded_and_mask_dtypes_agree(mode):
    lengths = [3, 0, 9, 1]
    mask = (torch.rand(4, 9) < 0.6) & (torch.arange(9) < torch.tensor(lengths)[:, None])
    plain = aggregation_weights(mask, mode, max_length=9)
    assert bit_equal(plain, aggregation_weights(pack(mask, lengths), mode, max_length=9, cu_seqlens=cu(lengths)))
    for dtype in MASK_DTYPES:
        assert bit_equal(
            plain, aggregation_weights(mask.to(dtype) * 3 if dtype != torch.bool else mask, mode, max_length=9)
        )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(0, 0), (0, 4), (4, 0), (3, 5)])
def test_empty_and_all_masked_batches_have_finite_weights_and_zero_loss(impl, mode, shape):
    row_weight, normalizer = aggregation_weights(torch.zeros(shape), mode)
    assert row_weight.isfinite().all()
    x = torch.full(shape, NAN)
    loss, _ = value_loss(x, x, x, torch.zeros(shape), row_weight=row_weight, normalizer=normalizer, impl=impl)
    assert float(loss) == 0.0


def test_counts_past_the_float32_integers_do_not_stop():
    """A float32 that counts tokens one by one stops at 2^24."""
    mask = torch.ones(4097, 4096, dtype=torch.bool)
    assert float(aggregation_weights(mask, "token-mean")[1]) == mask.numel() > 2**24


@pytest.mark.parametrize(
    ("arguments", "options", "error", "mentions"),
    [
        ((torch.ones(2, 3), "mean"), {}, ValueError, ("mode", "token-mean", "mean")),
        ((torch.ones(6), "token-mean"), {}, ValueError, ("mask", "[B, T]", "(6,)")),
        ((torch.ones(2, 3), "token-mean"), {"cu_seqlens": torch.tensor([0, 6])}, ValueError, ("[N]", "(2, 3)")),
        ((torch.ones(6), "token-mean"), {"cu_seqlens": torch.tensor([0.0, 6.0])}, TypeError, ("cu_seqlens", "float32")),
        (([1, 1], "token-mean"), {}, TypeError, ("mask", "Tensor", "list")),
        ((torch.ones(2, 3), "seq-mean-token-sum-norm"), {"max_length": 0}, ValueError, ("max_length", "0")),
        ((torch.ones(6), "seq-mean-token-sum-norm"), {"cu_seqlens": torch.tensor([0, 6])}, ValueError, ("max_length",)),
    ],
)
def test_wrong_arguments_are_named(arguments, options, error, mentions):
    assert_raises(error, lambda: aggregation_weights(*arguments, **options), *mentions)
