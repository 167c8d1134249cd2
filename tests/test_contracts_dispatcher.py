"""The registered ops: opcheck on each, torch.compile in one graph, and no read outside the inputs."""

import ctypes
import mmap

import cases
import pytest
import torch
from cases import DIFFERENTIABLE, NAMES, run
from helpers import bit_equal, cu, in_fresh_process

import ppo_kernels as pk

INF = float("inf")


def registered():
    names = torch._C._dispatch_get_all_op_names()
    return sorted(name.partition("::")[2] for name in names if name.startswith("ppo_kernels::"))


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
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck_on_every_registered_op(require_impl, dtype):
    require_impl("gae", "cpu")
    calls = samples(dtype)
    assert sorted(calls) == registered(), "an op without samples here is an untested op"
    for name, arguments in calls.items():
        for args in arguments:
            result = torch.library.opcheck(getattr(torch.ops.ppo_kernels, name).default, args)
            assert set(result.values()) == {"SUCCESS"}, name


@pytest.mark.parametrize(
    "op", ["token_logprobs", "kl_rewards", "gae", "moments", "whiten", "policy_loss", "value_loss"]
)
def test_fake_tensors_have_the_shapes_and_dtypes_of_real_ones(require_impl, op):
    from torch._subclasses.fake_tensor import FakeTensorMode

    require_impl(op, "cpu")
    fn = pk.backends.kernel(op, "cpu")
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


EAGER_TOO = ("token_logprobs:entropy", "kl_rewards", "gae:packed", "whiten", "moments", "policy_loss", "value_loss")


@pytest.mark.parametrize(("impl", "name"), [*(("cpu", n) for n in NAMES), *(("torch", n) for n in EAGER_TOO)])
def test_compiles_into_one_graph_and_equals_eager(require_impl, name, impl):
    require_impl(name.partition(":")[0], impl)
    wrap = compiled(name, "aot_eager")
    for batch, length in ((4, 9), (5, 12), (3, 33)):
        case = cases.make(name, batch=batch, length=length)
        with torch.no_grad():
            assert bit_equal(wrap(case).call(case.tensors, impl), case.call(case.tensors, impl))
        if name in DIFFERENTIABLE:
            for got, want in zip(run(wrap(case), impl), run(case, impl), strict=True):
                torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["policy_loss", "gae"])
def test_compiles_with_inductor(require_impl, name):
    impl, wrap = require_impl(name, "cpu"), compiled(name, "inductor")
    for batch, length in ((4, 9), (5, 12)):
        case = cases.make(name, batch=batch, length=length)
        for got, want in zip(run(wrap(case), impl), run(case, impl), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


def test_compiled_graphs_count_too(require_impl):
    impl, wrap = require_impl("gae", "cpu"), compiled("gae", "aot_eager")
    case = cases.make("gae")
    wrap(case).call(case.tensors, impl)
    before = pk.status()["gae"]["cpu"]
    for _ in range(3):
        wrap(case).call(case.tensors, impl)
    assert pk.status()["gae"]["cpu"] == before + 3


def fenced(x: torch.Tensor, front: bool) -> torch.Tensor:
    """A copy whose memory begins, or ends, at a page that cannot be touched: one element too far is a crash."""
    page, size = mmap.PAGESIZE, x.numel() * x.element_size()
    if size == 0:
        return x
    room = -(-size // page) * page
    area = mmap.mmap(-1, room + 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    for guard in (start, start + page + room):
        assert protect(ctypes.c_void_p(guard), ctypes.c_size_t(page), mmap.ACCESS_DEFAULT) == 0
    begin = page if front else page + room - size
    out = torch.frombuffer(area, dtype=x.dtype, count=x.numel(), offset=begin).view(x.shape)
    return out.copy_(x)


def everything_between_guard_pages(front):
    torch.set_num_threads(1)
    for impl in ("cpu", "torch"):
        for name in NAMES:
            for dtype in (torch.float32, torch.bfloat16):
                case = cases.make(name, dtype, batch=3, length=13)
                tensors = {k: fenced(x, front) for k, x in case.tensors.items()}
                want = run(case, impl)
                if case.leaf:
                    leaf = tensors[case.leaf].requires_grad_()
                    out = case.call(tensors, impl)
                    torch.autograd.backward([x.sum() * (1 + i) for i, x in enumerate(out) if x.requires_grad])
                    got = (*(x.detach() for x in out), leaf.grad)
                else:
                    got = case.call(tensors, impl)
                assert bit_equal(got, want), name


def garbage_between_guard_pages(front):
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(0)
    wild = torch.tensor([0, 1, -1, 5, 39, 40, 2**31, -(2**31), 2**40, -(2**40), 2**62, -(2**62)])
    for _ in range(60):
        pick = lambda n: fenced(wild[torch.randint(0, len(wild), (n,), generator=g)], front)  # noqa: E731
        x, row = fenced(torch.randn(40, generator=g), front), fenced(torch.rand(4, generator=g), front)
        leaf, labels = fenced(torch.randn(6, 40, generator=g), front).requires_grad_(), pick(6)
        logp, h = pk.token_logprobs(leaf, labels, entropy=True, impl="cpu")
        (logp + h).sum().backward()
        assert torch.equal(leaf.grad.isnan().all(1), ((labels < 0) | (labels >= 40)) & (labels != -100))
        bounds = {"cu_seqlens": pick(5), "impl": "cpu"}
        pk.kl_rewards(x, x, row, score_index=pick(4), **bounds)
        pk.gae(x, x, bootstrap_value=row, lam=row, **bounds)
        pk.policy_loss(x, x, row, weights=row, row_weight=row, **bounds)
        pk.value_loss(x, x, x, row_weight=row, **bounds)


@pytest.mark.parametrize("front", [False, True])
def test_no_op_reads_outside_its_inputs(require_impl, front):
    require_impl("gae", "cpu")
    in_fresh_process(everything_between_guard_pages, front)


@pytest.mark.parametrize("front", [False, True])
def test_garbage_labels_and_offsets_read_nothing_outside(require_impl, front):
    require_impl("gae", "cpu")
    in_fresh_process(garbage_between_guard_pages, front)


def far_rows(x: torch.Tensor, stride: int) -> torch.Tensor:
    """The rows of x, ``stride`` elements apart, in memory that the system provides only where it is touched."""
    size = ((x.size(0) - 1) * stride + x.size(1)) * x.element_size()
    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0))
    whole = torch.frombuffer(area, dtype=x.dtype, count=size // x.element_size())
    return whole.as_strided(x.shape, (stride, 1)).copy_(x)


@pytest.mark.parametrize("stride", [2**31 - 40, 2**31 + 40])
def test_rows_further_apart_than_32_bits_count(require_impl, stride):
    require_impl("gae", "cpu")
    logits, labels = torch.randn(2, 33, dtype=torch.bfloat16), torch.tensor([3, 30])
    far = far_rows(logits, stride)
    near = pk.token_logprobs(logits, labels, entropy=True, impl="cpu")
    assert bit_equal(pk.token_logprobs(far, labels, entropy=True, impl="cpu"), near)
    leaves = [x.detach().requires_grad_() for x in (logits, far)]
    grads = [torch.autograd.grad(pk.token_logprobs(x, labels, impl="cpu").sum(), x)[0] for x in leaves]
    assert bit_equal(*grads)
    rewards, values = torch.randn(2, 2, 33)
    want = pk.gae(rewards, values, impl="cpu")
    assert bit_equal(pk.gae(far_rows(rewards, stride), far_rows(values, stride), impl="cpu"), want)
