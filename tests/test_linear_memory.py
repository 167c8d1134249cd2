"""The ops on hidden states and a head's weight: the memory that strides and masks cost, and a weight that is gone."""

import numpy as np
import pytest
import torch

from bench.measure import peak_extra
from ppo_kernels import linear_policy_loss, linear_token_logprobs
from tests.lib.helpers import assert_raises

MIB, FEW = 2**20, 128 * 2**10  # beside tiles there are some numbers for each row
LAYOUTS = {
    "every second column": lambda dtype, *shape: torch.randn(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., ::2],
    "columns first": lambda dtype, *shape: torch.randn(shape[-1], *shape[:-1], dtype=dtype).movedim(0, -1),
}


def call(op, hidden, weight, labels, **options):
    if op is linear_token_logprobs:
        return op(hidden, weight, labels, impl="cpu", **options)
    old = torch.linspace(-12, -8, labels.numel()).view(labels.shape)
    return op(hidden, weight, labels, old, old + 10, impl="cpu", **options)[0]


@pytest.fixture(params=[linear_token_logprobs, linear_policy_loss], ids=["logprobs", "loss"])
def op(request, require_impl):
    require_impl(request.param.__name__, "cpu")
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_inputs_are_copied_a_tile_at_a_time(op, layout, dtype):
    rows, width, vocab, most = 256, 512, 3000, 2
    hidden, weight = LAYOUTS[layout](dtype, 1, rows, width), LAYOUTS[layout](dtype, vocab, width)
    assert hidden.stride(-1) != 1 != weight.stride(-1)
    labels = torch.randint(vocab, (1, rows))
    with torch.no_grad():
        found, want = (
            call(op, h, w, labels) for h, w in ((hidden, weight), (hidden.contiguous(), weight.contiguous()))
        )
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
        assert peak_extra(lambda: call(op, hidden, weight, labels, memory_mib=most)) <= most * MIB + FEW
    assert weight.nbytes > 1.4 * most * MIB
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    plain = [x.detach().contiguous().requires_grad_() for x in leaves]
    given = torch.autograd.grad(call(op, *leaves, labels).sum(), leaves)
    for x, y in zip(given, torch.autograd.grad(call(op, *plain, labels).sum(), plain), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4 if dtype == torch.float32 else 2e-2, atol=1e-4)


def test_a_masked_backward_in_half_precision_takes_what_was_allowed(op):
    rows, width, vocab, most = 512, 1024, 64, 0.5
    hidden = torch.randn(1, rows, width).bfloat16().requires_grad_()
    weight, labels = torch.randn(vocab, width).bfloat16(), torch.randint(vocab, (1, rows))
    mask = torch.arange(rows)[None] % 16 != 0
    kept = int(mask.sum()) * width * 4 + rows * width * 2  # the gradient added up, and rounded

    def both(**more):
        return torch.autograd.grad(call(op, hidden, weight, labels, mask=mask, memory_mib=most, **more).sum(), hidden)

    assert peak_extra(both) <= most * MIB + kept + FEW
    (masked,) = both()
    live = [x[:, mask[0]] for x in (hidden, labels)]
    if op is linear_token_logprobs:
        (alone,) = torch.autograd.grad(call(op, live[0], weight, live[1], memory_mib=most).sum(), live[0])
        torch.testing.assert_close(masked[:, mask[0]], alone)
    assert not masked[~mask].any()


def test_a_weight_that_was_released_is_named(op):
    labels = torch.tensor([[1, 2]])
    for release in ("shape", "memory"):
        hidden, weight = torch.randn(1, 2, 4, requires_grad=True), torch.nn.Parameter(torch.randn(5, 4))
        result = call(op, hidden, weight, labels).sum()
        if release == "shape":
            weight.data = torch.empty(0)
        else:
            weight.data.untyped_storage().resize_(0)
        if op is linear_policy_loss and release == "memory":
            result.backward()  # reads no weight
            assert weight.grad.shape == (5, 4)
        else:
            assert_raises(RuntimeError, result.backward, op.__name__, "released by ZeRO-3", "until backward()")
        message = ("gather a weight",) if release == "shape" else ("0 bytes of memory", "released by ZeRO-3")
        kind = ValueError if release == "shape" else RuntimeError
        assert_raises(kind, lambda hidden=hidden, weight=weight: call(op, hidden, weight, labels), *message)


def test_memory_may_be_any_number(op):
    hidden, weight, labels = torch.randn(1, 7, 4), torch.randn(300, 4), torch.arange(7)[None]
    want = call(op, hidden, weight, labels, memory_mib=1)
    for number in (np.int64(1), np.float32(1), np.array(1), torch.tensor(1), torch.tensor([1.0])):
        assert torch.equal(call(op, hidden, weight, labels, memory_mib=number), want)
    for wrong, kind in (
        (True, TypeError),
        ("1", TypeError),
        (0, ValueError),
        (1e300, ValueError),
        (np.nan, ValueError),
    ):
        assert_raises(
            kind,
            lambda wrong=wrong: call(op, hidden, weight, labels, memory_mib=wrong),
            f"{op.__name__}: memory_mib must be",
        )
    assert_raises(
        ValueError, lambda: call(op, hidden, weight, labels, memory_mib=torch.ones(2)), "memory_mib must be a number"
    )
