"""What every op promises to PyTorch: gradients, tracing, determinism, dtypes, and that it leaves its inputs alone."""

import pytest
import torch

import ppo_kernels as pk
from ppo_kernels import backends
from ppo_kernels._compositions import compositions
from tests.lib import cases, recorded
from tests.lib.cases import DIFFERENTIABLE, NAMES, REGISTERED, ROWWISE, run
from tests.lib.devices import IMPLEMENTATIONS, KERNELS
from tests.lib.helpers import bit_equal, in_fresh_process

pytestmark = pytest.mark.host

GRADCHECKED = tuple(name for name in DIFFERENTIABLE if REGISTERED[name].gradcheck)


@pytest.fixture(params=IMPLEMENTATIONS)
def impl_of(request, require_impl):
    """``impl_of(case name)``: one of the implementations, which must be there."""
    return lambda name: require_impl(name.partition(":")[0], request.param)


@pytest.mark.large
@pytest.mark.parametrize("name", GRADCHECKED)
def test_gradcheck(impl_of, name):
    impl, case = impl_of(name), cases.make(name, torch.float64, batch=3, length=5)

    def fn(x):
        out = case.call(case.tensors | {case.leaf: x}, impl)
        return tuple(y for y in out if y.requires_grad)

    assert torch.autograd.gradcheck(fn, case.tensors[case.leaf].clone().requires_grad_(), fast_mode=True)


@pytest.mark.large
@pytest.mark.parametrize("name", [name for name in GRADCHECKED if not REGISTERED[name].packed])
def test_gradcheck_without_an_optional_input(impl_of, name):
    impl, case = impl_of(name), cases.make(name, torch.float64, batch=3, length=5, seed=3)
    needed = recorded.bare_inputs(REGISTERED[name], case.tensors)
    for without in case.tensors.keys() - needed.keys() - {"ref_logprobs", "entropy"}:  # which coefficients need
        tensors = {k: v for k, v in case.tensors.items() if k != without}
        leaf = tensors[case.leaf].clone().requires_grad_()
        fn = lambda x, tensors=tensors: case.call(tensors | {case.leaf: x}, impl)[0]  # noqa: E731
        assert torch.autograd.gradcheck(fn, leaf, fast_mode=True), without


@pytest.mark.large
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_double_backward_raises(impl_of, name):
    impl, case = impl_of(name), cases.make(name, torch.float64, batch=2, length=4)
    leaf = case.tensors[case.leaf].clone().requires_grad_()
    out = case.call(case.tensors | {case.leaf: leaf}, impl)
    with pytest.raises(RuntimeError, match="twice|double|second"):
        (grad,) = torch.autograd.grad(out[0].sum(), leaf, create_graph=True)
        grad.square().sum().backward()


@pytest.mark.large
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_gradient_depends_on_what_scales_the_loss(impl_of, name):
    """A learned scale: its derivative through the gradient is refused, and not silently 0."""
    impl, case = impl_of(name), cases.make(name, torch.float64, batch=2, length=4)
    leaf = case.tensors[case.leaf].clone().requires_grad_()
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="twice|double|second"):
        out = case.call(case.tensors | {case.leaf: leaf}, impl)[0].sum() * scale
        (grad,) = torch.autograd.grad(out, leaf, create_graph=True)
        torch.autograd.grad(grad.sum() + scale, scale)  # nothing else, so that no other way is refused


@pytest.mark.large
@pytest.mark.parametrize("name", NAMES)
def test_outputs_require_grad_only_where_the_op_is_differentiable(impl_of, name):
    case, options = cases.make(name), {"temperature", "lam"}  # refused where they require grad, as numbers are
    tensors = {
        k: x.requires_grad_(x.is_floating_point() and x.dim() > 0 and k not in options) for k, x in case.tensors.items()
    }
    flags = [x.requires_grad for x in case.call(tensors, impl_of(name))]
    assert flags == [i < REGISTERED[name].differentiable for i in range(len(flags))]
    with torch.no_grad():
        assert not any(x.requires_grad for x in case.call(tensors, impl_of(name)))


@pytest.mark.large
@pytest.mark.parametrize("name", NAMES)
def test_no_grad_inference_mode_and_training_give_the_same_bits(impl_of, name):
    impl, case = impl_of(name), cases.make(name)
    with torch.no_grad():
        plain = case.call(case.tensors, impl)
    with torch.inference_mode():
        assert bit_equal(case.call(case.tensors, impl), plain)
    assert bit_equal(run(case, impl)[: len(plain)], plain)


@pytest.mark.parametrize("name", NAMES)
def test_inputs_are_never_mutated(impl_of, name):
    case = cases.make(name)
    copies = {k: x.clone() for k, x in case.tensors.items()}
    versions = {k: x._version for k, x in case.tensors.items()}
    leaf = case.tensors[case.leaf].requires_grad_() if case.leaf else None
    out = case.call(case.tensors, impl_of(name))
    if leaf is not None:
        out[0].sum().backward()
    for k, x in case.tensors.items():
        assert bit_equal(x.detach(), copies[k]), k
        assert x._version == versions[k], k
    pointers = {x.data_ptr() for x in case.tensors.values()}
    assert not pointers & {x.data_ptr() for x in out}, "an output is an input"


@pytest.mark.parametrize("name", [name for name in NAMES if not REGISTERED[name].packed])
def test_each_input_alone_may_be_a_view_of_wider_rows(impl_of, name):
    impl, case = impl_of(name), cases.make(name, length=5)
    with torch.no_grad():
        want = case.call(case.tensors, impl)
        for key, x in case.tensors.items():
            if x.dim() > 1:
                view = torch.cat([x, x[..., :3]], -1)[..., : x.shape[-1]]
                assert bit_equal(case.call(case.tensors | {key: view}, impl), want), key


@pytest.mark.large
@pytest.mark.parametrize("name", NAMES)
def test_runs_repeat_bit_by_bit(impl_of, name):
    impl = impl_of(name)
    case = cases.make(name, batch=7, length=cases.fit(name, impl, 130))
    first = run(case, impl)
    for _ in range(2 if impl == "triton" else 20):  # the interpreter is slow, and has one thread
        assert bit_equal(run(case, impl), first)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_and_two_threads_give_the_same_bits(require_impl, name, dtype):
    impl = require_impl(name.partition(":")[0], "cpu")
    case = cases.make(name, dtype, batch=32, length=96 if REGISTERED[name].vocabulary else 1100)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(case, impl))
    finally:
        torch.set_num_threads(before)
    assert alike(name, results[0], results[1])
    assert alike(name, results[0], results[2])


def alike(name, one, other):
    """To the bit, but for what torch's matrix products make of another shape or number of threads."""
    if not REGISTERED[name].matrix_products:
        return bit_equal(one, other)
    return all(torch.allclose(x, y, rtol=1e-5, atol=1e-5) for x, y in zip(one, other, strict=True))


def by_row(case, impl, tensors=None):
    """Everything that belongs to one row: outputs and gradients as [rows, ...]; not a loss or its statistics."""
    tensors = case.tensors if tensors is None else tensors
    rows = len(tensors["cu_seqlens"]) - 1 if "cu_seqlens" in tensors else len(tensors["mask"])
    return tuple(x.reshape(rows, -1) for x in run(case, impl, tensors) if x.dim())


@pytest.mark.parametrize("name", ROWWISE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [[0], [5], [4, 2, 5], [3, 0, 1, 5, 4, 2, 0]], ids=str)
def test_a_row_does_not_depend_on_the_batch_around_it(impl_of, name, dtype, rows):
    impl = impl_of(name)
    length = 30 if REGISTERED[name].vocabulary else 1500
    case = cases.make(name, dtype, batch=6, length=cases.fit(name, impl, length))
    whole = by_row(case, impl)
    assert bit_equal(by_row(case, impl, cases.pick_rows(case, rows)), tuple(x[rows] for x in whole))


@pytest.mark.large
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_a_large_vocabulary_does_not_depend_on_the_batch_around_it(impl_of, dtype):
    impl = impl_of("token_logprobs")
    logits, labels = torch.randn(5, 5003).to(dtype), torch.randint(0, 5003, (5,))

    def call(t, impl):
        return pk.token_logprobs(t["logits"], t["labels"], entropy=True, impl=impl)

    case = cases.Call("token_logprobs", {"logits": logits, "labels": labels}, call, "logits")
    whole = run(case, impl)
    for rows in ([0], [4], [3, 1, 4, 2, 0]):
        got = run(case, impl, {"logits": logits[rows], "labels": labels[rows]})
        assert bit_equal(got, tuple(x[rows] for x in whole))


@pytest.mark.parametrize("name", NAMES)
def test_status_counts_each_call_once(impl_of, name):
    impl, case = impl_of(name), cases.make(name)
    before = _counts()
    case.call(case.tensors, impl)
    assert counts(name, impl, _counts_since(before))
    before = _counts()
    case.call(case.tensors, "auto")
    found = _counts_since(before)
    assert counts(name, backends.op(case.op).implementations("cpu")[0], found)
    with pytest.raises(ValueError, match="nonsense"):
        case.call(case.tensors, "nonsense")
    assert _counts_since(before) == found


def counts(name, impl, found):
    """One call of the op; of one that is made of others, theirs, and by no other implementation."""
    case = REGISTERED[name]
    if not case.composed:
        return found == {(case.op, impl): 1}
    return (
        found and {op for op, _ in found} <= {case.op, *backends.op(case.op).parts} and {i for _, i in found} == {impl}
    )


def _counts():
    return {(op, impl): n for op, calls in pk.status().items() for impl, n in calls.items()}


def _counts_since(before):
    return {key: n - before.get(key, 0) for key, n in _counts().items() if n != before.get(key, 0)}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("impl", KERNELS)
def test_status_counts_backward_kernels(require_impl, name, impl):
    """A loss has its gradient from the forward, and scales it."""
    case = cases.make(name)
    before = _counts()
    run(case, require_impl(case.op, impl))
    if REGISTERED[name].composed:
        assert _counts_since(before).get(("token_logprobs_backward_", impl))
        return
    backward = f"{case.op}_backward" if REGISTERED[name].vocabulary else "loss_backward"
    extra = {} if case.leaf == "entropy" else {(backward, impl): 1}  # which no kernel looks at
    assert _counts_since(before) == {(case.op, impl): 1} | extra


def refused(case, impl):
    with pytest.raises(ValueError, match="auto") as caught:
        case.call(case.tensors, impl)
    text = str(caught.value)
    assert repr(impl)[1:-1] in text
    assert "'torch'" in text
    return text


@pytest.mark.parametrize("name", NAMES)
def test_an_implementation_that_cannot_serve_is_refused_with_a_remedy(name):
    absent = [] if "cuda" in IMPLEMENTATIONS else ["cuda"]
    for impl in (*absent, "nonsense", "", "CPU"):
        refused(cases.make(name), impl)


def triton_is_refused():
    for name in NAMES:
        text = refused(cases.make(name), "triton")
        assert "TRITON_INTERPRET=1" in text or not backends.triton.INSTALLED
        assert "pip install triton" in text or backends.triton.INSTALLED


def test_triton_on_cpu_tensors_is_refused_without_its_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    in_fresh_process(triton_is_refused, start=lambda: torch.multiprocessing.get_context("spawn"))


@pytest.mark.large
@pytest.mark.parametrize("name", NAMES)
def test_output_dtypes_follow_the_widest_input(impl_of, name):
    impl, always = impl_of(name), REGISTERED[name].output_dtype
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        expected = always or (torch.float64 if dtype == torch.float64 else torch.float32)
        case = cases.make(name, dtype, batch=2, length=5)
        assert {x.dtype for x in case.call(case.tensors, impl)} == {expected}
        if case.leaf:
            assert run(case, impl)[-1].dtype == dtype


def float_tokens(name):
    return [k for k, x in cases.make(name).tensors.items() if x.dim() == 2 and x.is_floating_point()]


@pytest.mark.large
@pytest.mark.parametrize("name", [name for name in NAMES if len(float_tokens(name)) > 1])
def test_one_float64_input_is_enough(impl_of, name):
    case, tokens = cases.make(name, torch.bfloat16), float_tokens(name)
    for key in tokens:
        out = case.call(case.tensors | {key: case.tensors[key].double()}, impl_of(name))
        assert {x.dtype for x in out} == {torch.float64}, key


@pytest.mark.large
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(impl_of, name, low):
    impl, case = impl_of(name), cases.make(name)
    plain = run(case, impl)
    with torch.autocast("cpu", low):
        found = run(case, impl)
    if impl == "torch" and REGISTERED[name].matrix_products:  # in whose backward autocast rounds torch's own products
        found, plain = found[:-1], plain[:-1]
    assert bit_equal(found, plain)


def test_autocast_logits_of_a_linear_layer(impl_of):
    impl, layer, x = impl_of("token_logprobs"), torch.nn.Linear(16, 50), torch.randn(6, 16)
    labels = torch.randint(0, 50, (6,))
    with torch.autocast("cpu", torch.bfloat16):
        logits = layer(x)
        assert logits.dtype == torch.bfloat16
        logp = pk.token_logprobs(logits, labels, impl=impl)
        loss, _ = pk.policy_loss(logp[None], logp.detach()[None], torch.randn(1, 6), impl=impl)
    assert logp.dtype == loss.dtype == torch.float32
    loss.backward()
    assert layer.weight.grad.dtype == torch.float32
    assert layer.weight.grad.abs().max() > 0


@pytest.mark.large
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_accumulate_and_undefined_ones_are_none(impl_of, name):
    impl, case = impl_of(name), cases.make(name)
    leaf = case.tensors[case.leaf].clone().requires_grad_()
    out = case.call(case.tensors | {case.leaf: leaf}, impl)
    out[0].sum().backward(retain_graph=True)
    once = leaf.grad.clone()
    out[0].sum().backward()
    torch.testing.assert_close(leaf.grad, 2 * once)
    assert torch.autograd.grad((leaf * 2).sum(), leaf)[0].eq(2).all()


@pytest.mark.large
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_saved_tensor_hooks_see_every_saved_tensor(impl_of, name):
    impl, case = impl_of(name), cases.make(name)
    plain = run(case, impl)
    packed = []

    def pack(x):
        packed.append(x)
        return x.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        assert bit_equal(run(case, impl), plain)
    assert packed


def test_public_names():
    for name in pk.__all__:
        assert getattr(pk, name) is not None
    for op in (*backends.OPS, *compositions(), "aggregation_weights"):
        doc = getattr(pk, op).__doc__
        for word in ("Args:", "Returns:", "Raises:"):
            assert word in doc, (op, word)
