"""Soft clipping."""

import pytest
import torch

from bench import oracle
from ppo_kernels import soft_clip
from tests.lib.helpers import FLOATS, NAN, assert_close_to_oracle, assert_raises, holey_mask

OP = "soft_clip"


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 1), (4, 33), (2, 17000), (0, 3), (5,)])
def test_matches_the_loop(impl, shape, dtype):
    x = (torch.randn(shape) * 9).to(dtype)
    mask = holey_mask(*shape) if len(shape) == 2 else torch.ones(shape)
    for kept in (None, mask):
        assert_close_to_oracle(soft_clip(x, kept, cap=2.0, impl=impl), oracle.soft_clip(x, kept, cap=2.0))


def test_what_lies_under_the_mask_does_not_matter(impl):
    assert soft_clip(torch.tensor([4.0, NAN]), torch.tensor([1, 0]), cap=4.0, impl=impl).tolist() == [2.0, 0.0]


def test_wrong_arguments_are_named(impl):
    assert_raises(ValueError, lambda: soft_clip(torch.ones(2), cap=0.0, impl=impl), "cap", "> 0", "0.0")
    assert_raises(ValueError, lambda: soft_clip(torch.ones(2), torch.ones(3), impl=impl), "mask", "(2,)", "(3,)")
