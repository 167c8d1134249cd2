"""What outputs hold to the bit: +0 where masked, and the nearest number of the dtype elsewhere."""

from __future__ import annotations

import pytest
import torch

import ppo_kernels as pk
from ppo_kernels import backends
from tests.lib import cases
from tests.lib.cases import DIFFERENTIABLE, MASKED, run
from tests.lib.devices import IMPLEMENTATIONS, KERNELS
from tests.lib.helpers import grad_of


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", MASKED)
def test_masked_outputs_are_plus_zero(require_impl, impl, name):
    """-0 becomes -inf where somebody divides by it, and other bits where bits are compared."""
    case = cases.make(name, batch=4, length=cases.fit(name, impl, 9))
    impl = require_impl(case.op, impl)
    mask = case.tensors["mask"]
    if "score_index" in case.tensors:  # a score may go to a masked token
        case.tensors["score_index"] = torch.full((4,), -1)
    for kept in (mask, torch.zeros_like(mask)):
        outputs = run(case, impl, case.tensors | {"mask": kept})
        tokens = [x for x in outputs if x.shape[: mask.dim()] == mask.shape]
        assert tokens
        for out in tokens:
            assert not out[~kept].any()
            assert not out[~kept].signbit().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gradients_are_rounded_to_the_nearest(require_impl, impl, dtype):
    impl = require_impl("token_logprobs", impl)
    logits, labels = (torch.randn(3, 500) * 2).to(dtype), torch.randint(0, 500, (3,))
    low, full = (
        grad_of(lambda x: pk.token_logprobs(x, labels, impl=impl).sum(), x)[1] for x in (logits, logits.float())
    )
    assert low.dtype == dtype
    assert_rounded_once(low, full)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_no_part_of_a_gradient_is_rounded_before_the_parts_are_added(require_impl, impl, name):
    impl = require_impl(name.partition(":")[0], impl)
    case = cases.make(name, torch.bfloat16, batch=4, length=cases.fit(name, impl, 9))
    leaf = case.tensors[case.leaf]
    low, full = (run(case, impl, case.tensors | {case.leaf: x})[-1] for x in (leaf, leaf.float()))
    assert low.dtype == torch.bfloat16
    assert_rounded_once(low, full)


def assert_rounded_once(low, full):
    assert full.dtype == torch.float32
    kind = torch.finfo(low.dtype)
    half_a_unit = torch.maximum(full.abs(), torch.tensor(kind.smallest_normal)) * kind.eps / 2
    assert ((low.float() - full).abs() <= half_a_unit * 1.001).all()


@pytest.mark.parametrize("impl", KERNELS)
def test_traced_outputs_have_the_dtypes_of_real_ones(require_impl, impl):
    """For logits whose dtype is not that of the results; float32 ones would show no difference."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    forward = backends.op("token_logprobs").kernel(require_impl("token_logprobs", impl))
    logits, labels = torch.randn(3, 40, dtype=torch.bfloat16), torch.tensor([1, 2, 3])
    if not isinstance(forward, torch._ops.OpOverload):
        pytest.skip("on a GPU, or for one, the tests call a wrapper")
    options = (None, None, 1.0, -100, True)
    with FakeTensorMode() as mode:
        fake = forward(mode.from_tensor(logits), mode.from_tensor(labels), *options)
    assert [x.dtype for x in fake] == [x.dtype for x in forward(logits, labels, *options)]
