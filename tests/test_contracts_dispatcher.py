"""The registered ops: opcheck on each, fake tensors, and torch.compile in one graph."""

import pytest
import torch

import ppo_kernels as pk
from tests.lib import cases
from tests.lib.cases import DIFFERENTIABLE, NAMES, run
from tests.lib.helpers import bit_equal, cu

INF = float("inf")


IMPLS = ("cpu", "triton")


def registered(library):
    names = torch._C._dispatch_get_all_op_names()
    return sorted(name.partition("::")[2] for name in names if name.startswith(f"{library}::"))


def samples(dtype):
    """Arguments of each registered op: with every optional tensor, and with none."""
    x, y, z = torch.randn(3, 3, 7, dtype=dtype)
    mask = (torch.rand(3, 7) < 0.7).to(torch.uint8)
    row, one, tau = torch.rand(3, dtype=dtype), torch.tensor(5.0).double(), y.double().abs() + 0.5
    flat, bounds = torch.randn(21, dtype=dtype), cu([7, 0, 14], torch.int64)
    logits, labels = torch.randn(3, 7, 33, dtype=dtype), torch.randint(0, 33, (3, 7))
    forward = pk.backends.kernel("token_logprobs", "cpu")
    logp, h, peak, log_sum = forward(logits, labels, mask, None, 0.7, -100, True)
    saved = (logp, h, peak, log_sum, 0.7)
    clips = (0.2, 0.3, 3.0, 20.0, 0.1, 3, 20.0, 10.0)
    moments = tuple(torch.tensor(v, dtype=torch.float64) for v in (10.0, 0.5, 3.0))
    return {
        "token_logprobs": [
            (logits, labels, mask, y.abs().double() + 0.5, 1.0, -100, True),
            (logits[0], labels[0], None, None, 0.7, -100, False),
        ],
        "token_logprobs_backward": [(logits, labels, tau, y, z, *saved), (logits, labels, None, y, None, *saved)],
        "token_logprobs_backward_": [(logits.clone(), labels, None, y, z, *saved)],
        "kl_rewards": [
            (x, y, row, mask, torch.tensor([0, -1, 3]), None, one, 0.0, 3, 5.0, 20.0, 10.0),
            (flat, flat + 1, row, None, None, bounds, None, 0.1, 0, INF, INF, INF),
        ],
        "gae": [
            (x, y, mask, row.double(), row, None, 0.9, 0.0, 0),
            (flat, flat + 1, None, None, None, bounds, 0.9, 0.95, 2),
        ],
        "moments": [(x, mask), (flat, None)],
        "whiten": [(x, mask, None, None, None, True, True, 1e-8), (flat, None, *moments, False, False, 1e-8)],
        "policy_loss": [
            (x, y, z, mask, y, z, row, one, None, one, *clips, True),
            (flat, flat, row[:, None], None, None, None, None, None, bounds, None, *clips, False),
        ],
        "value_loss": [
            (x, y, z, mask, row, one, None, 0.2, True),
            (flat, flat, flat, None, None, None, bounds, INF, False),
        ],
        "p3o_loss": [
            (x, y, z, row, mask, one, None, one, 1, 3, 0.0, 0.2, 10.0, 20.0, True),
            (flat, flat, flat, row, None, None, bounds, None, 0, 3, 0.1, 0.2, 10.0, INF, False),
        ],
        "group_advantages": [
            (row, torch.tensor([1, 1, 7]), torch.tensor([2, 0, 1]), 0, 1, 1e-4),
            (flat, None, None, 7, 0, 0.0),
        ],
    }


REGISTERED = (
    *("token_logprobs", "token_logprobs_backward", "token_logprobs_backward_", "kl_rewards", "gae"),
    *("moments", "whiten", "policy_loss", "value_loss", "p3o_loss", "group_advantages"),
)


def test_every_registered_op_has_samples_and_a_twin(require_impl):
    require_impl("gae", "cpu")
    for library in ("ppo_kernels", "ppo_kernels_triton"):
        assert registered(library) == sorted(REGISTERED) == sorted(samples(torch.float32))


@pytest.mark.parametrize("op", REGISTERED)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck_on_every_registered_op(require_impl, op, impl, dtype):
    require_impl("gae", impl)
    for args in samples(dtype)[op]:
        result = torch.library.opcheck(pk.backends.kernel(op, impl), args)
        assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("op", [op for op in REGISTERED if not op.endswith("_")])
@pytest.mark.parametrize("impl", IMPLS)
def test_fake_tensors_have_the_shapes_and_dtypes_of_real_ones(require_impl, op, impl):
    from torch._subclasses.fake_tensor import FakeTensorMode

    require_impl("gae", impl)
    fn = pk.backends.kernel(op, impl)
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


FEW = ("token_logprobs:entropy", "policy_loss", "gae:packed")


@pytest.mark.parametrize(
    ("impl", "name"),
    [
        *(("cpu", name) for name in NAMES),
        *((impl, name) for impl in ("triton", "torch") for name in FEW),
        *(
            pytest.param(impl, name, marks=pytest.mark.rest)
            for impl in ("triton", "torch")
            for name in NAMES
            if name not in FEW
        ),
    ],
)
def test_compiles_into_one_graph_and_equals_eager(require_impl, name, impl):
    require_impl(name.partition(":")[0], impl)
    wrap = compiled(name, "aot_eager")
    for batch, length in ((4, 9), (5, 12), (3, 33)):
        case = cases.make(name, batch=batch, length=cases.fit(name, impl, length))
        with torch.no_grad():
            assert bit_equal(wrap(case).call(case.tensors, impl), case.call(case.tensors, impl))
        if name in DIFFERENTIABLE:
            for got, want in zip(run(wrap(case), impl), run(case, impl), strict=True):
                torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


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
