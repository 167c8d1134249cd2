"""The column of torch.compile's own backend in the table of ``tests/test_transforms.py``, which takes minutes."""

import pytest

from tests.lib import transforms
from tests.lib.devices import IMPLEMENTATIONS


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cell", transforms.cells(("inductor",), IMPLEMENTATIONS), ids="-".join)
def test_cell(require_impl, request, cell):
    row, _, op, impl = cell
    require_impl("token_logprobs" if op == "entropy" else op, impl)
    if row == "DDP":
        request.getfixturevalue("process_group")
    transforms.check(*cell)
