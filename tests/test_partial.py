"""Shards of a vocabulary by hand, in one process: partial and merge, and token_logprobs with a group of one rank."""

import pytest
import torch
from torch import func

from ppo_kernels import merge, partial, token_logprobs
from ppo_kernels.backends import op
from tests.lib.helpers import assert_raises, bit_equal
from tests.test_linear_shards import SHARDS, check_logits, make_logits, of_logits

OP = "token_logprobs"


def shards(logits, cuts=SHARDS[3]):
    return [(first, logits[..., first:last]) for first, last in zip(cuts, cuts[1:], strict=False)]


def merged(logits, labels, grads, impl, **options):
    """Results and gradients of each shard, as ``of_logits`` has them of the whole."""
    known = options | {"entropy": True, "impl": impl}
    parts = [partial(z, labels, vocab_start=first, **known) for first, z in shards(logits)]
    assert not any(part.requires_grad for part in parts)
    call = lambda z, y, **more: merge(parts, z, y, impl=impl, **options | more)  # noqa: E731
    return [of_logits(z, labels, grads, call, vocab_start=first) for first, z in shards(logits)]


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.large)])
def test_shards_by_hand_give_what_the_whole_vocabulary_gives(impl, dtype):
    logits, cases, options = make_logits()
    for labels, grads in cases[impl == "triton" :]:
        given = [logits.to(dtype), labels, [g.to(dtype) for g in grads]]
        check_logits(merged(*given, impl, **options), of_logits(*given, impl=impl, **options))


def test_a_label_of_no_shard_beside_one_of_a_shard(impl):
    """The gradient of the row is NaN in every column of every shard, that of the other label too."""
    logits, labels = torch.randn(2, SHARDS[3][-1]), torch.tensor([[1, SHARDS[3][-1] + 7], [2, 1]])
    for z, y, first in [(z.clone().requires_grad_(), labels, first) for first, z in shards(logits)]:
        parts = [partial(other, labels, vocab_start=at, impl=impl) for at, other in shards(logits)]
        found = merge(parts, z, y, vocab_start=first, impl=impl)
        assert found.isnan().tolist() == [[False, True], [False, False]]
        found.sum().backward()
        assert z.grad[0].isnan().all()
        assert z.grad[1].isfinite().all()


def test_half_precision_is_rounded_once(require_impl):
    """Half a unit in the last place of each element, and the noise of float32."""
    require_impl(OP, "cpu")
    logits, ((labels, grads), _), options = make_logits()
    logits = logits.bfloat16()
    exact = of_logits(logits.float(), labels, grads, impl="cpu", **options)[2]
    found = torch.cat([x[2] for x in merged(logits, labels, grads, "cpu", **options)], -1)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.isnan(), exact.isnan())
    found, exact = found[~found.isnan()].float(), exact[~exact.isnan()]
    half_a_unit = torch.ldexp(torch.tensor(torch.finfo(torch.bfloat16).eps / 4), torch.frexp(exact).exponent)
    assert ((found - exact).abs() <= half_a_unit + 1e-6 * exact.abs()).all()


@pytest.mark.parametrize("impl", ["cpu", "torch"])
def test_a_group_in_graphs_and_transforms(require_impl, process_group, impl):
    require_impl(OP, impl)
    group, logits, labels = torch.distributed.group.WORLD, torch.randn(2, 3, 50), torch.randint(50, (2, 3))
    calls = {
        "alone": lambda z: token_logprobs(z, labels, temperature=0.7, entropy=True, impl=impl),
        "group": lambda z: token_logprobs(z, labels, temperature=0.7, entropy=True, impl=impl, group=group),
    }
    sums = {name: lambda z, call=call: sum(x.sum() for x in call(z)) for name, call in calls.items()}
    want = func.grad(sums["alone"])(logits)
    torch.testing.assert_close(func.grad(sums["group"])(logits), want)
    batch = torch.stack([logits, 2 * logits])
    both = func.vmap(func.grad(sums["group"]))(batch)
    torch.testing.assert_close(both, torch.stack([want, func.grad(sums["alone"])(2 * logits)]))
    leaf = logits.clone().requires_grad_()
    compiled = torch.compile(calls["group"], backend="aot_eager", fullgraph=True)(leaf)
    torch.testing.assert_close(torch.autograd.grad(sum(x.sum() for x in compiled), leaf)[0], want)
    out, _ = calls["group"](leaf)
    many = torch.autograd.grad(out, leaf, torch.randn(2, 2, 3), is_grads_batched=True, retain_graph=True)[0]
    assert many.shape == (2, *leaf.shape)
    with pytest.raises(RuntimeError, match="twice"):
        torch.autograd.grad(torch.autograd.grad(out.sum(), leaf, create_graph=True)[0].sum(), leaf)
    assert_raises(RuntimeError, lambda: func.jvp(sums["group"], (logits,), (logits,)), "with group=", "forward-mode")


def test_opcheck(require_impl):
    require_impl(OP, "cpu")
    logits, (_, (labels, _)), options = make_logits()
    logits = logits.nan_to_num(0.0)  # opcheck compares outputs
    rows = options["temperature"].double()
    arguments = (logits, labels, options["mask"] != 0, rows, 1.0, -100, True)
    part = op("token_logprobs_partial").kernel("cpu")(*arguments, 5, "cpu")
    saved = op("token_logprobs_merge").kernel("cpu")(*arguments, part[None], 5, "cpu")
    grads = (torch.ones(2, 3, 3), torch.ones(2, 3))
    for name, args in (
        ("token_logprobs_partial", (*arguments, 5, "cpu")),
        ("token_logprobs_merge", (*arguments, torch.stack([part, part]), 5, "cpu")),
        ("token_logprobs_merge_backward", (logits, labels, rows, *grads, *saved, 1.0, -100, 5, "cpu")),
    ):
        tests = ("test_schema", "test_faketensor", "test_autograd_registration")
        result = torch.library.opcheck(op(name).kernel("cpu"), args, test_utils=tests)
        assert set(result.values()) == {"SUCCESS"}


def test_parts_in_another_order_and_rows_of_no_shard(require_impl):
    """Another order does not change the sum beyond rounding."""
    require_impl(OP, "cpu")
    logits, labels = torch.randn(4, 700) * 4, torch.tensor([0, 41, 699, 520])
    parts = [partial(z, labels, vocab_start=first, entropy=True) for first, z in shards(logits)]
    found = [merge(x, logits[:, :40], labels, entropy=True) for x in (parts, torch.stack(parts), parts[::-1])]
    assert bit_equal(found[0], found[1])
    torch.testing.assert_close(found[0], found[2], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[0], token_logprobs(logits, labels, entropy=True), rtol=1e-6, atol=1e-6)
    alone = merge(parts[:1], logits[:, :40], labels, entropy=True)
    assert alone[0].isnan().tolist() == alone[1].isnan().tolist() == [False, True, True, True]


def test_errors_say_what_is_allowed():
    logits, labels = torch.randn(2, 9), torch.tensor([1, 2])
    part = partial(logits, labels)
    for call, kind, words in (
        (lambda: merge([part], logits, labels, entropy=True), ValueError, "merge: parts must be [R, 4, 2]"),
        (lambda: merge([part, part[:, :1]], logits, labels), ValueError, "merge: parts must be alike"),
        (lambda: merge(part, logits, labels), ValueError, "merge: parts must be [R, 3, 2]"),
        (lambda: merge([], logits, labels), TypeError, "merge: parts must be a tensor [R, ...] or a sequence"),
        (lambda: merge([part, 1], logits, labels), TypeError, "merge: parts must be a tensor [R, ...] or a sequence"),
        (lambda: partial(logits, labels, vocab_start=-1), ValueError, "partial: vocab_start must be >= 0"),
        (lambda: partial(logits, labels[:1]), ValueError, "partial: labels must have the shape"),
        (lambda: partial(logits, labels, impl="tpu"), ValueError, "impl"),
        (lambda: token_logprobs(logits, labels, vocab_start=3), ValueError, "pass group= too"),
        (lambda: token_logprobs(logits, labels, group=3), TypeError, "group must be a torch.distributed.ProcessGroup"),
    ):
        assert_raises(kind, call, words)


def test_an_exported_merge_says_what_has_a_gradient(impl):
    logits, labels = torch.randn(2, 5), torch.tensor([1, 4])
    parts = [partial(logits, labels, impl=impl)]

    class Call(torch.nn.Module):
        def forward(self, z):
            return merge(parts, z, labels, impl=impl)

    program = torch.export.export(Call(), (logits,)).module()
    assert torch.equal(program(logits), token_logprobs(logits, labels, impl=impl))
    with pytest.raises(RuntimeError, match=r"no gradient; call ppo_kernels\.merge outside"):
        program(logits.clone().requires_grad_()).sum().backward()
