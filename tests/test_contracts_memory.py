"""No op reads or writes outside its tensors: guard pages around them, rows beyond 32 bits, every base alignment."""

import ctypes
import functools
import mmap
from collections import Counter

import pytest
import torch

import ppo_kernels as pk
from tests.lib import cases
from tests.lib.cases import NAMES, REGISTERED, run
from tests.lib.devices import IMPLEMENTATIONS, KERNELS
from tests.lib.helpers import bit_equal, in_fresh_process

PROT_NONE = 0
ALLOCATIONS = {
    torch: ("empty", "zeros", "full", "empty_like", "zeros_like"),
    torch.Tensor: ("new_empty", "new_zeros", "new_full"),
}
# A detached entropy has the kernels of one that is not; bfloat16 reaches no other kernel than those of the logits.
CALLS = tuple(name for name in NAMES if not name.endswith(":detached"))
DTYPES = {name: (torch.float32, torch.bfloat16)[: 1 + REGISTERED[name].vocabulary] for name in CALLS}
# Both sides of the tensors; Triton's interpreter tries one of them in `make test`.
FRONT = [False, pytest.param(True, marks=pytest.mark.large)]


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
        assert protect(ctypes.c_void_p(guard), ctypes.c_size_t(page), PROT_NONE) == 0
    begin = page if front else page + room - size
    out = torch.frombuffer(area, dtype=x.dtype, count=x.numel(), offset=begin).view(x.shape)
    return out.copy_(x)


def fence_allocations(front: bool) -> Counter:
    """From now on in this process, what Python code allocates lies between guard pages too: a Triton launcher's
    outputs and scratch. Returns the counts, so that a launcher that allocates by other means shows."""
    count: Counter = Counter()

    def wrap(function):
        @functools.wraps(function)
        def allocate(*args, **kwargs):
            count[function.__name__] += 1
            return fenced(function(*args, **kwargs), front)

        return allocate

    for owner, names in ALLOCATIONS.items():
        for name in names:
            setattr(owner, name, wrap(getattr(owner, name)))
    return count


def outputs_and_gradient(case, impl, tensors):
    """As ``cases.run``, but with the differentiable tensor used where it lies, not copied."""
    if case.leaf is None:
        return case.call(tensors, impl)
    leaf = tensors[case.leaf].detach().requires_grad_()
    out = case.call(tensors | {case.leaf: leaf}, impl)
    torch.autograd.backward([x.sum() * (1 + i) for i, x in enumerate(out) if x.requires_grad])
    return (*(x.detach() for x in out), leaf.grad)


def everything_between_guard_pages(impl, front):
    torch.set_num_threads(1)
    keys = [(name, dtype) for name in CALLS for dtype in DTYPES[name]]
    plain = {key: cases.make(*key, batch=3, length=cases.fit(key[0], impl, 13)) for key in keys}
    want = {key: outputs_and_gradient(case, impl, case.tensors) for key, case in plain.items()}
    allocated = fence_allocations(front)
    for key, case in plain.items():
        allocated.clear()
        tensors = {k: fenced(x, front) for k, x in case.tensors.items()}
        got = outputs_and_gradient(case, impl, tensors)
        assert bit_equal(got, want[key]), key
        assert allocated or impl != "triton", f"{key}: the launcher allocates by other means; fence those too"


def index_inputs(name):
    """Labels, positions, offsets of sequences, numbers of prompts: what a kernel might take for an address."""
    return [k for k, x in cases.make(name).tensors.items() if x.dtype in (torch.int32, torch.int64)]


INDEXED = tuple(name for name in CALLS if index_inputs(name))


def garbage_between_guard_pages(impl, front):
    torch.set_num_threads(1)
    fence_allocations(front)
    g = torch.Generator().manual_seed(0)
    wild = torch.tensor([0, 1, -1, 5, 39, 40, 2**31, -(2**31), 2**40, -(2**40), 2**62, -(2**62)])
    for _ in range(6 if impl == "triton" else 60):
        pick = lambda *shape: fenced(wild[torch.randint(0, len(wild), shape, generator=g)], front)  # noqa: E731
        row = fenced(torch.rand(4, generator=g), front)
        leaf, labels = fenced(torch.randn(6, 40, generator=g), front).requires_grad_(), pick(6)
        logp, h = pk.token_logprobs(leaf, labels, entropy=True, impl=impl)
        (logp + h).sum().backward()
        assert torch.equal(leaf.grad.isnan().all(1), ((labels < 0) | (labels >= 40)) & (labels != -100))
        for name in INDEXED:
            case = cases.make(name, batch=4, length=cases.fit(name, impl, 10))
            indices = {k: pick(*x.shape) for k, x in case.tensors.items() if k in index_inputs(name)}
            outputs_and_gradient(case, impl, {k: fenced(x, front) for k, x in case.tensors.items()} | indices)
        pk.backends.kernel("group_advantages", impl)(row, pick(4), pick(4), 0, 1, 0.0)


@pytest.mark.parametrize("front", FRONT)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_no_op_touches_what_lies_outside_its_tensors(require_impl, impl, front):
    require_impl("gae", impl)
    in_fresh_process(everything_between_guard_pages, impl, front)


@pytest.mark.parametrize("front", FRONT)
@pytest.mark.parametrize("impl", KERNELS)
def test_garbage_labels_and_offsets_read_nothing_outside(require_impl, impl, front):
    require_impl("gae", impl)
    in_fresh_process(garbage_between_guard_pages, impl, front)


def far_rows(x: torch.Tensor, stride: int) -> torch.Tensor:
    """The rows of x, ``stride`` elements apart, in memory that the system provides only where it is touched."""
    size = ((x.size(0) - 1) * stride + x[0].numel()) * x.element_size()
    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0))
    whole = torch.frombuffer(area, dtype=x.dtype, count=size // x.element_size())
    return whole.as_strided(x.shape, (stride, *x.stride()[1:])).copy_(x)


PADDED = tuple(name for name in CALLS if not REGISTERED[name].packed)


def rows_beyond_32_bits(impl, stride):
    for name in PADDED:
        case = cases.make(name, torch.float32, batch=2, length=cases.fit(name, impl, 33))
        far = {k: far_rows(x, stride) if x.dim() > 1 else x for k, x in case.tensors.items()}
        assert bit_equal(*(outputs_and_gradient(case, impl, tensors) for tensors in (far, case.tensors))), name
    gradient_written_over_rows_beyond_32_bits(impl, stride)


def gradient_written_over_rows_beyond_32_bits(impl, stride):
    logits, labels = torch.randn(2, 33).bfloat16(), torch.tensor([3, 30])
    grads = []
    for x in (logits.clone(), far_rows(logits, stride)):
        saved = pk.backends.kernel("token_logprobs", impl)(x, labels, None, None, 0.7, -100, True)
        backward = pk.backends.kernel("token_logprobs_backward_", impl)
        backward(x, labels, None, torch.ones(2), torch.ones(2), *saved, 0.7)
        grads.append(x)
    assert bit_equal(*grads)
    assert not bit_equal(grads[0], logits)


@pytest.mark.large
@pytest.mark.parametrize("stride", [2**31 - 40, 2**31 + 40])
@pytest.mark.parametrize("impl", KERNELS)
def test_rows_further_apart_than_32_bits_count(require_impl, impl, stride):
    require_impl("gae", impl)
    in_fresh_process(rows_beyond_32_bits, impl, stride)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_alignment_of_base_and_rows(require_impl, impl, dtype):
    """Vector loads may only be chosen where they are legal, and never show in the bits."""
    require_impl("token_logprobs", impl)
    for vocab in range(40, 48, 3 if impl == "triton" else 1):
        logits, labels = torch.randn(3, vocab).to(dtype), torch.tensor([0, vocab - 1, 7])
        case = cases.Case(
            "", {}, lambda t, i, y=labels: pk.token_logprobs(**t, labels=y, entropy=True, impl=i), "logits"
        )
        want = run(case, impl, {"logits": logits})
        for offset in range(8):
            area = torch.empty(3 * vocab + 8, dtype=dtype)
            leaf = area[offset : offset + 3 * vocab].view(3, vocab).copy_(logits).requires_grad_()
            logp, h = case.call({"logits": leaf}, impl)
            assert bit_equal((logp.detach(), h.detach()), want[:2]), (vocab, offset)
            torch.autograd.backward([logp.sum(), h.sum() * 2])
            assert bit_equal(leaf.grad, want[2]), (vocab, offset)
