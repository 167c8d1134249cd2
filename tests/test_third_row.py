"""A third row begins beyond 2^31 where the stride fits 32 bits: the product of two such numbers is what overflows."""

from __future__ import annotations

import pytest
import torch

from tests.lib import cases
from tests.lib.devices import KERNELS
from tests.lib.helpers import bit_equal, in_fresh_process
from tests.test_contracts_memory import PADDED, far_rows, outputs_and_gradient


def three_rows(impl):
    for name in PADDED:
        case = cases.make(name, torch.float32, batch=3, length=5)
        far = {k: far_rows(x, 2**30 + 40) if x.dim() > 1 else x for k, x in case.tensors.items()}
        assert bit_equal(*(outputs_and_gradient(case, impl, tensors) for tensors in (far, case.tensors))), name


@pytest.mark.parametrize("impl", KERNELS)
def test_the_offset_of_a_third_row_is_64_bits(require_impl, impl):
    require_impl("gae", impl)
    in_fresh_process(three_rows, impl)
