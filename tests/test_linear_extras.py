"""Extras and support sets of the ops from hidden states: those of token_logprobs of the logits."""

import pytest
import torch

from bench.measure import peak_extra
from ppo_kernels import linear_policy_loss, linear_token_logprobs, policy_loss, token_logprobs
from tests.lib.helpers import INF, bit_equal
from tests.test_linear_token_logprobs import SMALLEST, VOCAB, make, products

OP = "linear_token_logprobs"
BOTH = ("sum_sq_probs", "top1")
GIVEN = {"mask": torch.tensor([1, 1, 0, 1, 1, 1]), "temperature": torch.linspace(0.5, 2.0, 6), "entropy": True}


def supported(rows=6):
    """Ids of every slab, the label among them but in the last row; with padding and one that is there twice."""
    g = torch.Generator().manual_seed(3)
    tensors, labels = make(rows)
    ids = torch.stack([torch.randperm(VOCAB, generator=g)[:40] for _ in range(rows)])
    ids[:, 0], ids[1, 20:], ids[2, 7] = labels, -1, labels[2]
    ids[-1][ids[-1] == labels[-1]] = -1
    return tensors, labels, ids


def outputs(tensors, grads, call):
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    *out, extras = call(**leaves)
    gradients = torch.autograd.grad(out, list(leaves.values()), grads)
    return *(x.detach() for x in out), *extras, *gradients


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("narrow", [False, True])
def test_extras_and_supports_are_those_of_the_logits(impl, softcap, narrow):
    tensors, labels, ids = supported()
    tensors["bias"][100:130] = -INF if softcap is None else 0.0
    grads = [torch.randn(6), torch.randn(6)]
    grads[0][-1] = grads[1][-1] = 0.0 if narrow else 1.0  # a row without its label has NaN, or 0
    more = {"support": ids} if narrow else {}

    def of_logits(hidden, weight, bias):
        z = hidden @ weight.t() + bias
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        return token_logprobs(z, labels, impl="cpu" if impl == "triton" else impl, extras=BOTH, **GIVEN, **more)

    want = outputs(tensors, grads, of_logits)
    for memory_mib, save_logits in ((None, False), (SMALLEST, False), (0.02, True)):
        options = {"memory_mib": memory_mib, "save_logits": save_logits, "softcap": softcap, "extras": BOTH}
        got = outputs(
            tensors,
            grads,
            lambda o=options, **x: linear_token_logprobs(**x, labels=labels, impl=impl, **GIVEN, **more, **o),
        )
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-5, equal_nan=True)
        if impl == "torch":
            return
    assert bool(want[0][-1].isnan()) == narrow


def test_extras_cost_no_product_and_change_no_result(require_impl):
    require_impl(OP, "cpu")
    tensors, labels, _ = supported()
    plain = linear_token_logprobs(**tensors, labels=labels, impl="cpu")
    calls = []
    shapes = products(lambda: calls.append(linear_token_logprobs(**tensors, labels=labels, extras=BOTH, impl="cpu")))
    assert len(shapes) == 1
    assert bit_equal(calls[0][0], plain)
    alone = linear_token_logprobs(**tensors, labels=labels, extras=("top1",), impl="cpu")[1]
    assert torch.equal(alone.top1, calls[0][1].top1)
    assert alone.sum_sq_probs is None


def test_graphs_and_transforms(require_impl):
    require_impl(OP, "cpu")
    tensors, labels, ids = supported()
    weight = tensors["weight"]

    def call(hidden):
        return linear_token_logprobs(hidden, weight, labels, support=ids, extras=BOTH, mask=GIVEN["mask"], softcap=5.0)

    leaf = tensors["hidden"].clone().requires_grad_()
    want, extras = call(leaf)
    (gradient,) = torch.autograd.grad(want[:-1].sum(), leaf)
    got, beside = torch.compile(call, backend="aot_eager", fullgraph=True)(leaf)
    torch.testing.assert_close((got, *beside), (want, *extras), equal_nan=True)
    torch.testing.assert_close(torch.autograd.grad(got[:-1].sum(), leaf)[0], gradient, equal_nan=True)
    found = torch.func.grad(lambda x: call(x)[0][:-1].sum())(tensors["hidden"])
    torch.testing.assert_close(found, gradient, equal_nan=True)


def test_the_policy_loss_of_a_support(impl):
    tensors, labels, ids = supported()
    old, advantages, mask = -4 * torch.rand(1, 6), torch.randn(1, 6), torch.tensor([[1, 1, 1, 0, 1, 0]])
    leaf = tensors["hidden"][None].clone().requires_grad_()
    logprobs = linear_token_logprobs(leaf, tensors["weight"], labels[None], mask=mask, support=ids[None], impl=impl)
    loss = policy_loss(logprobs, old, advantages, mask, impl=impl)[0]
    got = linear_policy_loss(
        leaf, tensors["weight"], labels[None], old, advantages, mask, support=ids[None], impl=impl, validate=True
    )[0]
    torch.testing.assert_close(got, loss)
    torch.testing.assert_close(*(torch.autograd.grad(x, leaf)[0] for x in (got, loss)))


def test_memory_with_a_support_and_extras_is_what_was_allowed(require_impl):
    require_impl(OP, "cpu")
    (hidden, weight), labels = (torch.randn(512, 64), torch.randn(20000, 64)), torch.randint(20000, (512,))
    ids = torch.randint(20000, (512, 64))
    ids[:, 0] = labels
    narrowed = 64 * 512 * 64 * 2  # of the ids, sorted, and where the labels are among them
    for more in ({"support": ids}, {"extras": BOTH}):
        call = lambda more=more: linear_token_logprobs(hidden, weight, labels, memory_mib=8, impl="cpu", **more)  # noqa: E731
        assert peak_extra(call) <= 8 * 2**20 + 128 * 2**10 + narrowed * ("support" in more)
