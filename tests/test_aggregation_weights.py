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


@pytest.mark.parametrize("ids", [[4, 4, 4, 4], [7, -2, 7, 9], [0, 1, 2, 3]])
def test_a_prompt_is_the_mean_over_the_tokens_of_its_responses(ids):
    mask, losses = holey_mask(4, 12), torch.randn(4, 12)
    weight, normalizer = aggregation_weights(mask, "prompt-mean", group_ids=torch.tensor(ids))
    prompts = {i: [b for b in range(4) if ids[b] == i and mask[b].any()] for i in ids}
    filled = [rows for rows in prompts.values() if rows]
    want = sum(float(losses[rows][mask[rows]].mean()) for rows in filled) / len(filled)
    assert float((weight[:, None] * losses * mask).sum() / normalizer) == pytest.approx(want, rel=1e-5)


def test_neighbours_are_the_groups_of_a_size():
    mask = holey_mask(6, 12)
    by_size = aggregation_weights(mask, "prompt-mean", group_size=2)
    assert bit_equal(by_size, aggregation_weights(mask, "prompt-mean", group_ids=torch.arange(6) // 2))
    lengths = [12] * 6
    packed = aggregation_weights(pack(mask, lengths), "prompt-mean", group_size=2, cu_seqlens=cu(lengths))
    assert bit_equal(by_size, packed)
    alone = aggregation_weights(mask, "prompt-mean", group_size=1)
    assert bit_equal(alone, aggregation_weights(mask, "seq-mean-token-mean"))


@pytest.mark.parametrize("mode", [*MODES, "prompt-mean"])
def test_what_is_rejected_counts_or_not(mode):
    mask = holey_mask(6, 12)
    keep = (torch.rand(6, 12) < 0.5) & (torch.arange(6) != 4)[:, None]
    groups = {"group_size": 3} if mode == "prompt-mean" else {}
    call = {"max_length": 12, **groups}
    assert bit_equal(aggregation_weights(mask, mode, keep=keep, **call), aggregation_weights(mask, mode, **call))
    surviving = aggregation_weights(mask, mode, keep=keep.float(), count="surviving", **call)
    assert bit_equal(surviving, aggregation_weights(mask & keep, mode, **call))


FORMS = [{}, {"importance_sampling_level": "sequence"}, {"surrogate": "cispo"}]


@pytest.mark.parametrize("form", FORMS, ids=["clip", "sequence", "cispo"])
@pytest.mark.parametrize("mode", [*MODES, "prompt-mean"])
def test_no_split_into_micro_batches_changes_the_gradient(impl, mode, form):
    """The law: weights and normalizer of the batch, rows in any order, cut anywhere, gradients accumulated."""
    x, old, adv = torch.randn(9, 10) * 0.3, torch.randn(9, 10) * 0.3, torch.randn(9)
    mask, ids = holey_mask(9, 10), torch.tensor([5, 5, 1, 1, 1, 8, 8, 8, 5])
    groups = {"group_ids": ids} if mode == "prompt-mean" else {}
    weight, normalizer = aggregation_weights(mask, mode, max_length=10, **groups)

    def gradient(pieces):
        leaf = x.clone().requires_grad_()
        for rows in pieces:
            given = {"row_weight": weight[rows], "normalizer": normalizer, "impl": impl} | form
            policy_loss(leaf[rows], old[rows], adv[rows], mask[rows], **given)[0].backward()
        return leaf.grad

    whole = gradient([torch.arange(9)])
    shuffled = torch.randperm(9)
    for cuts in ([1] * 9, [4, 5], [2, 3, 4]):
        torch.testing.assert_close(gradient(shuffled.split(cuts)), whole, rtol=1e-6, atol=1e-9)


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
        ((torch.ones(6), "token-mean"), {"cu_seqlens": torch.ones(2, 2).long()}, ValueError, ("cu_seqlens", "(2, 2)")),
        ((torch.ones(6), "token-mean"), {"cu_seqlens": torch.ones(2, device="meta").long()}, ValueError, ("meta",)),
        ((torch.ones(2, 3) * 1j, "token-mean"), {}, TypeError, ("mask", "complex64")),
        ((torch.ones(2, 3), "token-mean"), {"keep": torch.ones(2, 3) * 1j}, TypeError, ("keep", "complex64")),
        (([1, 1], "token-mean"), {}, TypeError, ("mask", "Tensor", "list")),
        ((torch.ones(2, 3), "prompt-mean"), {}, ValueError, ("group_ids", "group_size")),
        ((torch.ones(3, 3), "prompt-mean"), {"group_size": 2}, ValueError, ("3 rows", "group_size=2", "group_ids")),
        ((torch.ones(2, 3), "token-mean"), {"group_size": 2}, ValueError, ("prompt-mean", "token-mean")),
        ((torch.ones(2, 3), "prompt-mean"), {"group_ids": torch.ones(2)}, TypeError, ("group_ids", "float32")),
        ((torch.ones(2, 3), "prompt-mean"), {"group_ids": torch.ones(3).long()}, ValueError, ("group_ids", "(3,)")),
        ((torch.ones(2, 3), "token-mean"), {"count": "all"}, ValueError, ("count", "surviving", "all")),
        ((torch.ones(2, 3), "token-mean"), {"count": "surviving"}, ValueError, ("count", "keep")),
        ((torch.ones(2, 3), "token-mean"), {"keep": torch.ones(3, 2)}, ValueError, ("keep", "(2, 3)", "(3, 2)")),
        ((torch.ones(2, 3), "seq-mean-token-sum-norm"), {"max_length": 0}, ValueError, ("max_length", "0")),
        ((torch.ones(6), "seq-mean-token-sum-norm"), {"cu_seqlens": torch.tensor([0, 6])}, ValueError, ("max_length",)),
    ],
)
def test_wrong_arguments_are_named(arguments, options, error, mentions):
    assert_raises(error, lambda: aggregation_weights(*arguments, **options), *mentions)
