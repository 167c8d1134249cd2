"""The registered ops: opcheck on each, fake tensors, and torch.compile in one graph."""

import functools

import pytest
import torch

import ppo_kernels as pk
from tests.lib import cases, recorded
from tests.lib.cases import DIFFERENTIABLE, NAMES, run
from tests.lib.helpers import bit_equal

pytestmark = pytest.mark.host

IMPLS = ("cpu", "triton")


def registered(library):
    names = torch._C._dispatch_get_all_op_names()
    return sorted(name.partition("::")[2] for name in names if name.startswith(f"{library}::"))


REGISTERED = registered("ppo_kernels_triton") or registered("ppo_kernels")


@functools.cache
def samples(dtype):
    return recorded.samples(dtype, "cpu")


def test_every_registered_op_has_samples_and_a_triton_kernel(require_impl):
    require_impl("gae", "cpu")
    for library in ("ppo_kernels", "ppo_kernels_triton"):
        assert registered(library) == REGISTERED == sorted(samples(torch.float32))


#: A call of opcheck's makes dozens of the op, with a row of logits each: not in the interpreter.
CHECKED = [pytest.param(op, marks=pytest.mark.large) if op.startswith("token_logprobs") else op for op in REGISTERED]


@pytest.mark.parametrize("op", CHECKED)
@pytest.mark.parametrize(
    ("impl", "dtype"),
    [
        ("cpu", torch.float32),
        ("cpu", torch.float64),
        ("triton", torch.float32),
        pytest.param("triton", torch.float64, marks=pytest.mark.rest),
    ],
)
def test_opcheck_on_every_registered_op(require_impl, op, impl, dtype):
    require_impl("gae", impl)
    for args in samples(dtype)[op]:
        result = torch.library.opcheck(pk.backends.op(op).kernel(impl), args)
        assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("op", [op for op in REGISTERED if not op.endswith("_")])
@pytest.mark.parametrize("impl", IMPLS)
def test_fake_tensors_have_the_shapes_and_dtypes_of_real_ones(require_impl, op, impl):
    from torch._subclasses.fake_tensor import FakeTensorMode

    require_impl("gae", impl)
    fn = pk.backends.op(op).kernel(impl)
    for args in samples(torch.float32)[op]:
        real = fn(*args)
        with FakeTensorMode() as mode:
            fake = fn(*(mode.from_tensor(a) if torch.is_tensor(a) else a for a in args))
        pairs = zip(cases.outputs(real), cases.outputs(fake), strict=True)
        assert all((r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride()) for r, f in pairs)


def compiled(name, backend):
    torch._dynamo.reset()
    fn = torch.compile(cases.make(name).call, fullgraph=True, dynamic=True, backend=backend)
    return lambda case: case._replace(call=fn)


def one_of_each_kind() -> tuple[str, ...]:
    """Differentiable or not, with a vocabulary or not, packed or not: within a kind a graph holds the same."""
    known = {name: cases.REGISTERED[name] for name in reversed(NAMES)}
    return tuple({(case.leaf is None, case.vocabulary, case.packed): name for name, case in known.items()}.values())


FEW = one_of_each_kind()


@pytest.mark.parametrize(
    ("impl", "name"),
    [
        *(("cpu", name) for name in NAMES),
        *(("triton", name) for name in FEW),
        *(pytest.param("triton", name, marks=pytest.mark.rest) for name in NAMES if name not in FEW),
        *(pytest.param("torch", name, marks=pytest.mark.rest) for name in NAMES),
    ],
)
def test_compiles_into_one_graph_and_equals_eager(require_impl, name, impl):
    require_impl(name.partition(":")[0], impl)
    wrap = compiled(name, "aot_eager")
    for batch, length in ((4, 9), (5, 12), (3, 33)):
        case = cases.make(name, batch=batch, length=cases.fit(name, impl, length))
        with torch.no_grad():
            got, want = wrap(case).call(case.tensors, impl), case.call(case.tensors, impl)
        if cases.REGISTERED[name].matrix_products:  # of other shapes in a graph
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        else:
            assert bit_equal(got, want)
        if name in DIFFERENTIABLE:
            tolerance = 1e-5 if cases.REGISTERED[name].matrix_products else 1e-6
            for got, want in zip(run(wrap(case), impl), run(case, impl), strict=True):
                torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance / 10)


@pytest.mark.parametrize("name", ["policy_loss", pytest.param("gae", marks=pytest.mark.rest)])
def test_compiles_with_inductor(require_impl, name):
    impl, wrap = require_impl(name, "cpu"), compiled(name, "inductor")
    for batch, length in ((4, 9), (5, 12)):
        case = cases.make(name, batch=batch, length=length)
        for got, want in zip(run(wrap(case), impl), run(case, impl), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("impl", IMPLS)
def test_compiled_graphs_count_too(require_impl, impl):
    wrap, case = compiled("gae", "aot_eager"), cases.make("gae")
    wrap(case).call(case.tensors, require_impl("gae", impl))
    before = pk.status()["gae"][impl]
    for _ in range(3):
        wrap(case).call(case.tensors, impl)
    assert pk.status()["gae"][impl] == before + 3
