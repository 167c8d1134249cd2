"""Results are the caller's to write to, constants may come from inference mode, and chunks may be overwritten."""

import weakref

import pytest
import torch

import ppo_kernels as pk
from tests.lib import cases
from tests.lib.cases import DIFFERENTIABLE, NAMES, REGISTERED
from tests.lib.devices import IMPLEMENTATIONS, KERNELS


@pytest.fixture(params=IMPLEMENTATIONS)
def impl_of(request, require_impl):
    return lambda name: require_impl(name.partition(":")[0], request.param)


def small(impl_of, name):
    """A row of logits takes Triton's interpreter 25 ms."""
    impl = impl_of(name)
    slow = impl == "triton" and REGISTERED[name].vocabulary
    return impl, cases.make(name, batch=2 if slow else 3, length=2 if slow else 4)


def gradient(case, impl, change):
    leaf = case.tensors[case.leaf].detach().clone().requires_grad_()
    out = case.call(case.tensors | {case.leaf: leaf}, impl)
    change(out).backward()
    return leaf.grad


@pytest.mark.large
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_results_may_be_written_to_before_the_backward(impl_of, name):
    impl, case = small(impl_of, name)
    wanted = REGISTERED[name].differentiable

    def weigh(out):
        return sum((0.5 * x).sum() for x in out[:wanted])

    def halve(out):
        for x in out:
            x.mul_(0.5)
        return sum(x.sum() for x in out[:wanted])

    def clear(out):
        for x in out[wanted:]:
            x.zero_()
        for x in out[:wanted]:
            if x.dim():
                x[::2] = 0
                x.masked_fill_(x < -1e30, 0.0).div_(2)
            else:
                x /= 2
        return sum(x.sum() for x in out[:wanted])

    def clear_after(out):
        odd = [x[1::2] if x.dim() else x for x in out[:wanted]]
        return sum((0.5 * x).sum() for x in odd)

    torch.testing.assert_close(gradient(case, impl, halve), gradient(case, "torch", weigh), equal_nan=True)
    torch.testing.assert_close(gradient(case, impl, clear), gradient(case, "torch", clear_after), equal_nan=True)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in DIFFERENTIABLE])
def test_results_without_a_gradient_may_be_written_to(impl_of, name):
    impl, case = small(impl_of, name)
    want = [x.clone() for x in case.call(case.tensors, impl)]
    for x in case.call(case.tensors, impl):
        x.zero_()
    for got, first in zip(case.call(case.tensors, impl), want, strict=True):
        torch.testing.assert_close(got, first, rtol=0, atol=0, equal_nan=True)


@pytest.mark.large
@pytest.mark.parametrize("name", NAMES)
def test_constants_may_be_tensors_of_inference_mode(impl_of, name):
    impl, case = small(impl_of, name)
    with torch.inference_mode():
        constants = {k: x.clone() for k, x in case.tensors.items()}
    if case.leaf is None:
        case.call(constants, impl)
        return
    want = gradient(case, impl, lambda out: out[0].sum())
    for changed in (constants, *({k: x} for k, x in constants.items() if k != case.leaf)):
        leaf = case.tensors[case.leaf].detach().clone().requires_grad_()
        case.call(case.tensors | changed | {case.leaf: leaf}, impl)[0].sum().backward()
        assert torch.equal(leaf.grad, want)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_labels_and_temperatures_of_inference_mode(require_impl, impl_name, dtype):
    impl = require_impl("token_logprobs", impl_name)
    with torch.inference_mode():
        tokens, tau = torch.randint(7, (3, 5), dtype=dtype), torch.full((3, 1), 0.7, dtype=torch.float64)
        coef = torch.tensor(0.1)
    logits = torch.randn(3, 4, 7, requires_grad=True)
    pk.token_logprobs(logits, tokens[:, 1:], temperature=tau, impl=impl).sum().backward()
    want, logits.grad = logits.grad, None
    pk.token_logprobs(logits, tokens[:, 1:].clone(), temperature=0.7, impl=impl).sum().backward()
    torch.testing.assert_close(logits.grad, want)
    logp = torch.zeros(3, 4, requires_grad=True)
    pk.policy_loss(logp, logp.detach(), logp.detach() + 1, ref_logprobs=logp.detach(), kl_coef=coef, impl=impl)[
        0
    ].backward()
    assert logp.grad.isfinite().all()


@pytest.fixture(params=IMPLEMENTATIONS)
def impl_name(request):
    return request.param


def chunk_gradient(impl, chunks, touch=lambda z: None):
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 6, 3), torch.randn(3, 8, requires_grad=True)
    logits, labels = hidden @ weight, torch.randint(8, (4, 6))
    parts = [pk.token_logprobs(logits[part], labels[part], inplace_backward=True, impl=impl).sum() for part in chunks]
    with torch.no_grad():
        touch(logits)
    sum(parts).backward()
    return weight.grad


ALL = slice(None)
HALVES = [(slice(0, 2), ALL), (slice(2, 4), ALL)]
TIMES = [(ALL, slice(0, 1)), (ALL, slice(1, 4)), (ALL, slice(4, 6))]


@pytest.mark.parametrize("chunks", [HALVES, TIMES], ids=["rows", "tokens"])
def test_disjoint_chunks_may_be_overwritten(require_impl, impl_name, chunks):
    impl = require_impl("token_logprobs", impl_name)
    torch.testing.assert_close(chunk_gradient(impl, chunks), chunk_gradient("torch", [(ALL, ALL)]))


@pytest.mark.parametrize("kernel", KERNELS)
def test_chunks_that_share_logits_or_were_written_to_are_refused(require_impl, kernel):
    impl = require_impl("token_logprobs", kernel)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        chunk_gradient(impl, [(slice(0, 3), ALL), (slice(2, 4), ALL)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        chunk_gradient(impl, [TIMES[0], (ALL, slice(0, 2))])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        chunk_gradient(impl, HALVES, lambda z: z.mul_(2))
    with pytest.raises(RuntimeError, match="overwritten the logits in a first backward"):
        logits = torch.randn(2, 3, 5, requires_grad=True) * 1
        loss = pk.token_logprobs(logits, torch.zeros(2, 3, dtype=torch.int64), inplace_backward=True, impl=impl).sum()
        loss.backward(retain_graph=True)
        loss.backward()


#: Ways to cut [4, 6, V] logits into disjoint chunks; the labels are cut likewise.
CUTS = {
    "rows": lambda x, rows: x.split(2),
    "tokens": lambda x, rows: x.split([1, 3, 2], dim=1),
    "flat": lambda x, rows: rows(x).split(7),
    "selected": lambda x, rows: [x[i] for i in range(4)],
    "unbound": lambda x, rows: x.unbind(0),
    "unbound tokens": lambda x, rows: x.unbind(1),
    "shifted": lambda x, rows: x[:, :-1].split(2, dim=1),
    "shifted rows": lambda x, rows: x[:, 1:].split(1),
    "every other": lambda x, rows: [x[::2, 3:], x[1::2, 2:], x[::2, :3]],
    "every other token": lambda x, rows: [x[:, ::2], x[:, 1::2]],
    "flat and not": lambda x, rows: [rows(x)[:6], x[1:, :2], x[1:, 2:]],
    "transposed": lambda x, rows: x.transpose(0, 1).split(2),
    "with an empty one": lambda x, rows: [x[:2], x[1:1], x[2:]],
}
OVERLAPPING = {
    "flat rows": lambda x, rows: [rows(x)[:7], rows(x)[6:]],
    "flat and not": lambda x, rows: [rows(x)[:7], x[1:]],
    "flat across rows": lambda x, rows: [rows(x)[3:8], x[:, :2]],
    "a row twice": lambda x, rows: [x[0], x[0:1]],
    "a token of all rows": lambda x, rows: [x[:, 2], x[:, 2:]],
    "a token of a row": lambda x, rows: [x[:, 1:3], x[3:, 2:]],
    "every other and a pair": lambda x, rows: [x[:, ::2], x[:, 2:4]],
}


def layer_gradient(impl, cut, bias, inplace):
    torch.manual_seed(0)
    layer, hidden, labels = torch.nn.Linear(3, 8, bias=bias), torch.randn(4, 6, 3), torch.randint(8, (4, 6))
    logits = cut(layer(hidden), lambda x: x.view(-1, 8))
    labels = cut(labels, lambda x: x.view(-1))
    call = {"inplace_backward": inplace, "impl": impl}
    sum(pk.token_logprobs(x, y, **call).sum() for x, y in zip(logits, labels, strict=True)).backward()
    return layer.weight.grad


@pytest.mark.large
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cut", CUTS)
def test_disjoint_chunks_of_a_layers_output_may_be_overwritten(require_impl, impl_name, cut, bias):
    impl = require_impl("token_logprobs", impl_name)
    want = layer_gradient("torch", CUTS[cut], bias, False)
    torch.testing.assert_close(layer_gradient(impl, CUTS[cut], bias, True), want)


@pytest.mark.parametrize("cut", OVERLAPPING)
def test_chunks_of_a_layers_output_that_share_logits_are_refused(require_impl, cut):
    impl = require_impl("token_logprobs", "cpu")
    for bias in (True, False):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            layer_gradient(impl, OVERLAPPING[cut], bias, True)


@pytest.mark.parametrize("name", [*DIFFERENTIABLE, "inplace_backward"])
def test_a_loss_that_is_kept_keeps_no_inputs(impl_of, name):
    if name == "inplace_backward":
        impl, x = impl_of("token_logprobs"), torch.randn(3, 8)
        leaf, labels = x.requires_grad_(), torch.zeros(3, dtype=torch.int64)

        def call(x):
            return (pk.token_logprobs(x, labels, inplace_backward=True, impl=impl),)
    else:
        impl, case = small(impl_of, name)
        leaf = case.tensors[case.leaf].detach().clone().requires_grad_()

        def call(x):
            return case.call(case.tensors | {case.leaf: x}, impl)

    x = leaf * 1
    alive = weakref.ref(x)
    out = call(x)
    out[0].sum().backward()
    leaf.grad = x = None
    assert out[0].requires_grad
    assert alive() is None
