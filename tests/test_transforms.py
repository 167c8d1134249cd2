"""Every way to differentiate or batch an op gives the right value or one clear sentence, never a silent 0."""

import pytest
import torch
from torch import func
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import ppo_kernels as pk
from tests.lib.devices import IMPLEMENTATIONS

torch.manual_seed(0)
B, T, V = 2, 3, 5
LOGP, OLD, REF, ADV = torch.randn(4, B, T)
LOGITS, LABELS, SCORES = torch.randn(B, T, V), torch.randint(V, (B, T)), torch.randn(B)
OPS = {
    "policy_loss": (LOGP, lambda x, impl: pk.policy_loss(x, OLD, ADV, ref_logprobs=REF, kl_coef=0.1, impl=impl)[0]),
    "value_loss": (LOGP, lambda x, impl: pk.value_loss(x, OLD, ADV, impl=impl)[0]),
    "p3o_loss": (LOGP, lambda x, impl: pk.p3o_loss(x, OLD, REF, SCORES, impl=impl)[0]),
    "token_logprobs": (LOGITS, lambda x, impl: (pk.token_logprobs(x, LABELS, impl=impl) * ADV).sum()),
    "entropy": (LOGITS, lambda x, impl: (pk.token_logprobs(x, LABELS, entropy=True, impl=impl)[1] * ADV).sum()),
}


def autograd(f, x, **options):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x), x, **options)[0]


def twice(f, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(torch.autograd.grad(f(x), x, create_graph=True)[0].square().sum(), x)


def dual(f, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, x))).tangent


#: What gives the gradient, and what refuses: with which words, and whether "torch" gives the right value instead.
GRADIENTS = {
    "autograd": autograd,
    "create_graph": lambda f, x: autograd(f, x, create_graph=True).detach(),
    "checkpoint": lambda f, x: autograd(lambda y: checkpoint(f, y, use_reentrant=False), x),
    "grad": lambda f, x: func.grad(f)(x),
    "grad_and_value": lambda f, x: func.grad_and_value(f)(x)[0],
    "vjp": lambda f, x: func.vjp(f, x)[1](torch.ones(()))[0],
    "jacrev": lambda f, x: func.jacrev(lambda y: torch.stack([2 * f(y), f(y)]))(x)[1],
    "grad in vmap": lambda f, x: func.vmap(func.grad(f))(torch.stack([x + 1, x]))[1],
    "vmap in grad": lambda f, x: func.grad(lambda y: func.vmap(f)(torch.stack([y, 0 * y])).sum())(x),
}
REFUSED = {
    "jvp": ("forward-mode", lambda f, x: func.jvp(f, (x,), (x,))[1]),
    "jacfwd": ("forward-mode", lambda f, x: func.jacfwd(f)(x)),
    "hessian": ("forward-mode", lambda f, x: func.hessian(f)(x)),
    "grad of grad": ("twice", lambda f, x: func.grad(lambda y: func.grad(f)(y).square().sum())(x)),
}
#: What a graph can hold; without the rest, which Dynamo does not trace.
TRACED = ("grad_and_value", "jacrev", *(pytest.param(way, marks=pytest.mark.rest) for way in ("grad", "vjp")))
TRACED_REFUSED = ("jvp", *(pytest.param(way, marks=pytest.mark.rest) for way in REFUSED if way != "jvp"))


@pytest.fixture(params=OPS)
def case(request):
    return request.param, *OPS[request.param]


@pytest.fixture(params=IMPLEMENTATIONS)
def impl(request, require_impl):
    return require_impl("policy_loss", request.param)


@pytest.mark.parametrize("way", GRADIENTS)
def test_gradients_are_right(case, impl, way):
    _, x, op = case
    torch.testing.assert_close(GRADIENTS[way](lambda y: op(y, impl), x), autograd(lambda y: op(y, "torch"), x))


@pytest.mark.parametrize("way", REFUSED)
def test_what_is_refused_says_so(case, impl, way):
    name, x, op = case
    words, transform = REFUSED[way]
    with pytest.raises(RuntimeError, match=f"{name if name in dir(pk) else 'token_logprobs'}: .*{words}"):
        transform(lambda y: op(y, impl), x)


def test_only_who_differentiates_twice_is_refused(case, impl):
    _, x, op = case
    autograd(lambda y: op(y, impl), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiating twice"):
        twice(lambda y: op(y, impl), x)


def test_dual_tensors_have_the_right_tangent_or_are_refused(case, impl):
    _, x, op = case
    if impl == "torch":
        want = (autograd(lambda y: op(y, impl), x) * x).sum()
        torch.testing.assert_close(dual(lambda y: op(y, impl), x), want)
    else:
        with pytest.raises(RuntimeError, match="forward-mode"):
            dual(lambda y: op(y, impl), x)


def test_vmap_calls_the_op_for_each_element(case, impl):
    _, x, op = case
    batch = torch.stack([x, x + 1, 2 * x])
    torch.testing.assert_close(func.vmap(lambda y: op(y, impl))(batch), torch.stack([op(y, "torch") for y in batch]))


def test_vmap_of_ops_without_a_gradient(impl):
    batch = torch.stack([LOGP, 2 * LOGP])
    for op in (
        lambda x: pk.kl_rewards(x, REF, SCORES, impl=impl),
        lambda x: pk.gae(x, OLD, impl=impl),
        lambda x: (pk.whiten(x, impl=impl),),
        lambda x: (pk.group_advantages(x[:, 0], group_size=2, impl=impl),),
    ):
        for got, want in zip(func.vmap(op)(batch), zip(*(op(x) for x in batch), strict=True), strict=True):
            torch.testing.assert_close(got, torch.stack(want))


def compiled(f, **options):
    torch._dynamo.reset()
    return torch.compile(f, backend="aot_eager", **options)


@pytest.mark.large
@pytest.mark.parametrize("way", TRACED)
def test_compiled_gradients_are_right(case, impl, way):
    _, x, op = case
    got = compiled(lambda y: GRADIENTS[way](lambda z: op(z, impl), y), fullgraph=True)(x)
    torch.testing.assert_close(got, autograd(lambda y: op(y, "torch"), x))


@pytest.mark.large
@pytest.mark.parametrize("way", TRACED_REFUSED)
def test_compiled_refusals(case, impl, way):
    """A graph that cannot hold the transform says so; where Dynamo may break the graph, the eager sentence comes."""
    _, x, op = case
    words, transform = REFUSED[way]
    with pytest.raises(Exception, match=words):
        compiled(lambda y: transform(lambda z: op(z, impl), y), fullgraph=True)(x)
    with pytest.raises(RuntimeError, match=words):
        compiled(lambda y: transform(lambda z: op(z, impl), y))(x)


@pytest.mark.large
def test_compiled_vmap_and_dual_tensors(case, impl):
    _, x, op = case
    batch = torch.stack([x, 2 * x])
    got = compiled(lambda y: func.vmap(lambda z: op(z, impl))(y))(batch)
    torch.testing.assert_close(got, torch.stack([op(y, "torch") for y in batch]))
    if impl != "torch":
        with pytest.raises(RuntimeError, match="forward-mode"):
            dual(compiled(lambda y: op(y, impl)), x)


@pytest.mark.large
def test_compiled_autograd(case, impl):
    _, x, op = case
    torch._dynamo.reset()
    leaf = x.clone().requires_grad_()
    with torch._dynamo.compiled_autograd._enable(lambda graph: torch.compile(graph, backend="aot_eager")):
        op(leaf, impl).backward()
    torch.testing.assert_close(leaf.grad, autograd(lambda y: op(y, "torch"), x))


@pytest.mark.large
def test_a_graph_that_differentiates_twice_is_refused(case, impl):
    _, x, op = case

    def penalty(y):
        return torch.autograd.grad(op(1 * y, impl), y, create_graph=True)[0].square().sum()

    with torch._dynamo.config.patch(trace_autograd_ops=True), pytest.raises(Exception, match="differentiating twice"):
        autograd(compiled(penalty, fullgraph=True), x)
