"""Every way to differentiate or batch an op gives the right value or one clear sentence, never a silent 0."""

import pytest
import torch
from torch import func

import ppo_kernels as pk
from tests.lib import cases, transforms
from tests.lib.devices import IMPLEMENTATIONS
from tests.lib.options import NUMBERS
from tests.lib.transforms import OPS, OTHERS, ROWS

COMPILED = ("dynamo", "aot_eager")
torch.manual_seed(0)
LOGP, OLD, ADV = torch.randn(3, 2, 3)
LOGITS, LABELS = torch.randn(2, 3, 5), torch.randint(5, (2, 3))


def table():
    """All cells, of which `make test` runs those that ``in_make_test`` names."""
    cells = transforms.cells(("eager", *COMPILED), IMPLEMENTATIONS)
    rest = [pytest.mark.rest]
    return [pytest.param(cell, id="-".join(cell), marks=[] if in_make_test(*cell) else rest) for cell in cells]


def in_make_test(row, mode, op, impl):
    """The eager cells, in Triton's interpreter of one op; of the others, half a second each, one or two of a row.

    Graphs of a language model's head take ten times as long: test_contracts_dispatcher.py has one of each op.
    """
    if mode == "eager":
        return impl != "triton" or op == "policy_loss"
    if mode == "dynamo" and not ROWS[row].refused and "aot_eager" in ROWS[row].modes:
        return False
    at = list(ROWS).index(row) + COMPILED.index(mode)
    small = sorted((name for name in OPS if not name.startswith("linear")), key=lambda name: name.startswith("token"))
    return op == small[at % len(small)] and impl == "cpu"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cell", table())
def test_cell(require_impl, request, cell):
    row, _, op, impl = cell
    require_impl(op.partition(":")[0], impl)
    if row == "DDP":
        request.getfixturevalue("process_group")
    transforms.check(*cell)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_vmap_of_ops_without_a_gradient(require_impl, impl):
    for name in (name for name, case in cases.REGISTERED.items() if not case.leaf):
        require_impl(name.partition(":")[0], impl)
        case = cases.make(name, batch=2, length=3)
        first, x = next(iter(case.tensors.items()))
        batch = torch.stack([x, 2 * x])
        call = lambda y, case=case, first=first: case.call(case.tensors | {first: y}, impl)  # noqa: E731
        for got, want in zip(func.vmap(call)(batch), zip(*map(call, batch), strict=True), strict=True):
            torch.testing.assert_close(got, torch.stack(want))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_graph_that_differentiates_twice_is_refused(require_impl, impl):
    require_impl("policy_loss", impl)
    x, op = OPS["policy_loss"]

    def penalty(y):
        return torch.autograd.grad(op(1 * y, impl), y, create_graph=True)[0].square().sum()

    with torch._dynamo.config.patch(trace_autograd_ops=True), pytest.raises(Exception, match="differentiating twice"):
        transforms.gradient(transforms.compiled(penalty, "aot_eager"), x)


@pytest.mark.parametrize("impl", ["cpu", pytest.param("torch", marks=pytest.mark.rest)])
def test_a_graph_of_a_slope_within_grad_gives_no_zero(require_impl, impl):
    """PyTorch fails an assertion of its own here, whatever the function is; with a graph that has a slope of its own
    the second derivative was 0."""
    require_impl("policy_loss", impl)
    x, op = OPS["policy_loss"]
    slope = transforms.broken(lambda y: transforms.slope_of(lambda z: op(z, impl), y))
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"differentiating twice|False != True"):
        torch.compile(lambda y: func.grad(lambda z: slope(z).square().sum())(y), backend="eager")(x)


FORWARD = {
    "dual": transforms.tangent,
    "jvp": lambda f, x: func.jvp(f, (x,), (x,)),
    "jvp of grad": lambda f, x: func.jvp(func.grad(lambda y: f(y).sum()), (x,), (x,)),
    "jvp of vmap": lambda f, x: func.jvp(func.vmap(f), (x[None],), (x[None],)),
    "vmap of jvp": lambda f, x: func.vmap(lambda y: func.jvp(f, (y,), (y,)))(x[None]),
    "compiled": lambda f, x: transforms.tangent(transforms.compiled(f, "whole"), x),
    "jvp in a graph": lambda f, x: transforms.compiled(lambda y: func.jvp(f, (y,), (y,)), "aot_eager")(x),
}


def first_of_each(names):
    """`make test` tries one of each op."""
    first = {name.partition(".")[0]: name for name in reversed(names)}
    return [x if x in first.values() else pytest.param(x, marks=pytest.mark.rest) for x in names]


@pytest.mark.parametrize("impl", [impl for impl in IMPLEMENTATIONS if impl != "triton"])
@pytest.mark.parametrize("name", first_of_each(tuple(OTHERS)))
def test_a_tangent_of_another_input_is_refused(require_impl, impl, name):
    require_impl("gae", impl)
    x, op = OTHERS[name]
    for differentiate in FORWARD.values():
        torch._dynamo.reset()
        with pytest.raises(Exception, match=f"{name.partition('.')[0]}: forward-mode"):
            differentiate(lambda y: op(y, impl), x)


def test_a_tangent_by_name_and_in_another_dtype():
    want = transforms.slope(lambda x: pk.policy_loss(x, OLD, ADV, impl="torch")[0], LOGP)
    got = transforms.tangent(lambda x: pk.policy_loss(old_logprobs=OLD, advantages=ADV, logprobs=x)[0], LOGP)
    torch.testing.assert_close(got, want)
    got = transforms.tangent(lambda x: pk.policy_loss(x, OLD, ADV)[0], LOGP.double())
    torch.testing.assert_close(got, want.double(), rtol=1e-6, atol=0.0)
    with pytest.raises(ValueError, match="impl"):
        transforms.tangent(lambda x: pk.policy_loss(x, OLD, ADV, impl="tpu")[0], LOGP)


def test_a_call_without_a_tangent_within_forward_mode_is_computed():
    with torch.autograd.forward_ad.dual_level():
        other = torch.autograd.forward_ad.make_dual(ADV, ADV)
        for name, (x, op) in OTHERS.items():
            assert torch.isfinite(op(x, "auto")).all(), name
        assert func.vmap(lambda x: pk.gae(x, OLD)[0] * other)(ADV[None]).shape == (1, *ADV.shape)


@pytest.mark.parametrize("impl", [impl for impl in IMPLEMENTATIONS if impl != "triton"])
@pytest.mark.parametrize("name", NUMBERS)
def test_an_option_that_requires_grad_is_refused(require_impl, impl, name):
    require_impl("gae", impl)
    number = NUMBERS[name]
    parameter = torch.nn.Parameter(torch.tensor(number.value))
    names = "|".join(transforms.refusing(number.function))
    sentence = f"^({names}): {number.option}( .low.| .high.)? requires grad and is not differentiated; pass .detach..$"
    with pytest.raises(ValueError, match=sentence):
        number(impl, parameter)
    with pytest.raises(ValueError, match=sentence):
        func.grad(lambda x: number(impl, x)[0].sum())(parameter.detach())
    want = number(impl, number.value)
    torch.testing.assert_close(number(impl, parameter.detach()), want)
    with torch.no_grad():
        torch.testing.assert_close(number(impl, parameter), want)


@pytest.mark.parametrize("impl", ["cpu", "torch"])
def test_options_of_rows_that_require_grad_are_refused(require_impl, impl):
    require_impl("gae", impl)
    with pytest.raises(ValueError, match="^gae: lam requires grad"):
        pk.gae(LOGP, OLD, lam=torch.full((2,), 0.5, requires_grad=True), impl=impl)
    with pytest.raises(ValueError, match="^token_logprobs: temperature requires grad"):
        pk.token_logprobs(LOGITS, LABELS, temperature=torch.ones(2, 1, requires_grad=True), impl=impl)
    with pytest.raises(ValueError, match="^token_logprobs: temperature requires grad"):
        tau = torch.ones(3, 2, 1)
        func.grad(lambda t: func.vmap(lambda u: pk.token_logprobs(LOGITS, LABELS, temperature=u, impl=impl))(t).sum())(
            tau
        )
