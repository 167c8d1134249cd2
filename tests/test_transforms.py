"""Every way to differentiate or batch an op gives the right value or one clear sentence, never a silent 0."""

import pytest
import torch
from torch import func

import ppo_kernels as pk
from tests.lib import transforms
from tests.lib.devices import IMPLEMENTATIONS
from tests.lib.transforms import LOGP, OLD, OPS, REF, ROWS, SCORES

COMPILED = ("dynamo", "aot_eager")


def table():
    """All cells, of which `make test` runs those that ``in_make_test`` names."""
    cells = transforms.cells(("eager", *COMPILED), IMPLEMENTATIONS)
    rest = [pytest.mark.rest]
    return [pytest.param(cell, id="-".join(cell), marks=[] if in_make_test(*cell) else rest) for cell in cells]


def in_make_test(row, mode, op, impl):
    """The eager cells, in Triton's interpreter of one op; of the others, half a second each, one or two of a row."""
    if mode == "eager":
        return impl != "triton" or op == "policy_loss"
    if mode == "dynamo" and not ROWS[row].refused and "aot_eager" in ROWS[row].modes:
        return False
    at = list(ROWS).index(row) + COMPILED.index(mode)
    return op == list(OPS)[at % len(OPS)] and (impl == "cpu" or (impl == "torch" and at % 6 == 0))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cell", table())
def test_cell(require_impl, request, cell):
    row, _, op, impl = cell
    require_impl("token_logprobs" if op == "entropy" else op, impl)
    if row == "DDP":
        request.getfixturevalue("process_group")
    transforms.check(*cell)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_vmap_of_ops_without_a_gradient(require_impl, impl):
    require_impl("gae", impl)
    batch = torch.stack([LOGP, 2 * LOGP])
    for op in (
        lambda x: pk.kl_rewards(x, REF, SCORES, impl=impl),
        lambda x: pk.gae(x, OLD, impl=impl),
        lambda x: (pk.whiten(x, impl=impl),),
        lambda x: (pk.group_advantages(x[:, 0], group_size=2, impl=impl),),
    ):
        for got, want in zip(func.vmap(op)(batch), zip(*(op(x) for x in batch), strict=True), strict=True):
            torch.testing.assert_close(got, torch.stack(want))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_graph_that_differentiates_twice_is_refused(require_impl, impl):
    require_impl("policy_loss", impl)
    x, op = OPS["policy_loss"]

    def penalty(y):
        return torch.autograd.grad(op(1 * y, impl), y, create_graph=True)[0].square().sum()

    with torch._dynamo.config.patch(trace_autograd_ops=True), pytest.raises(Exception, match="differentiating twice"):
        transforms.gradient(transforms.compiled(penalty, "aot_eager"), x)
