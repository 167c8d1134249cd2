"""The column of torch.compile's own backend in the table of ``tests/test_transforms.py``, which takes minutes."""

import pytest
import torch

import ppo_kernels as pk
from tests.lib import transforms
from tests.lib.devices import IMPLEMENTATIONS

torch.manual_seed(0)
OLD, ADV = torch.randn(2, 2, 3)
LOGITS, LABELS = torch.randn(2, 3, 5), torch.randint(5, (2, 3))
HIDDEN, WEIGHT = torch.randn(2, 3, 4), torch.randn(5, 4)
IDS = torch.stack([LABELS, (LABELS + 1) % LOGITS.size(-1)], -1)
SUPPORTED = {"support": IDS, "extras": ("sum_sq_probs", "top1"), "entropy": True}
#: What the table's calls do without: the first result is differentiated.
OPTIONS = {
    "logits of a support": (LOGITS, lambda x: pk.token_logprobs(x, LABELS, **SUPPORTED)),
    "hidden states and a support": (HIDDEN, lambda x: pk.linear_token_logprobs(x, WEIGHT, LABELS, **SUPPORTED)),
    "loss with the entropy": (
        HIDDEN,
        lambda x: pk.linear_policy_loss(x, WEIGHT, LABELS, OLD, ADV, entropy=True, entropy_coef=0.1)[:2],
    ),
    "shards by hand": (
        LOGITS,
        lambda x: pk.merge(
            [pk.partial(x[..., :2], LABELS), pk.partial(x[..., 2:], LABELS, vocab_start=2)], x[..., :2], LABELS
        ),
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cell", transforms.cells(("inductor",), IMPLEMENTATIONS), ids="-".join)
def test_cell(require_impl, request, cell):
    row, _, op, impl = cell
    require_impl(op.partition(":")[0], impl)
    if row == "DDP":
        request.getfixturevalue("process_group")
    transforms.check(*cell)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OPTIONS)
def test_options_in_a_graph(name):
    torch._dynamo.reset()
    x, call = OPTIONS[name]
    found = []
    for f in (call, torch.compile(call, fullgraph=True)):
        leaf = x.clone().requires_grad_()
        results = f(leaf)
        first = results if isinstance(results, torch.Tensor) else results[0]
        found.append((results, torch.autograd.grad(first.sum(), leaf)))
    torch.testing.assert_close(*found)
