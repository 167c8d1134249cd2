"""No op reads or writes outside its tensors: guard pages around them, rows beyond 32 bits, every base alignment."""

import pytest
import torch

import ppo_kernels as pk
from tests.lib import cases
from tests.lib.cases import NAMES, REGISTERED, run
from tests.lib.devices import IMPLEMENTATIONS, KERNELS
from tests.lib.helpers import bit_equal, in_fresh_process
from tests.lib.memory import far_rows, fence_allocations, fenced, outputs_and_gradient

pytestmark = pytest.mark.host

# A detached entropy has the kernels of one that is not; bfloat16 reaches no other kernel than those of the logits.
CALLS = tuple(name for name in NAMES if not name.endswith(":detached"))
DTYPES = {name: (torch.float32, torch.bfloat16)[: 1 + REGISTERED[name].vocabulary] for name in CALLS}
# Both sides of the tensors; Triton's interpreter tries one of them in `make test`.
FRONT = [False, pytest.param(True, marks=pytest.mark.large)]


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
    for turn in range(3 if impl == "triton" else 60):  # the interpreter makes more in the fuzz
        pick = lambda *shape: fenced(wild[torch.randint(0, len(wild), shape, generator=g)], front)  # noqa: E731
        row = fenced(torch.rand(4, generator=g), front)
        leaf, labels = fenced(torch.randn(6, 40, generator=g), front).requires_grad_(), pick(6, *(3,) * (turn % 2))
        logp, h = pk.token_logprobs(leaf, labels, entropy=True, impl=impl)
        (logp.sum() + h.sum()).backward()
        bad = (labels < 0) | (labels >= 40)
        assert torch.equal(leaf.grad.isnan().all(1), bad.view(6, -1).any(1))
        for name in INDEXED:
            case = cases.make(name, batch=4, length=cases.fit(name, impl, 10))
            indices = {k: pick(*x.shape) for k, x in case.tensors.items() if k in index_inputs(name)}
            outputs_and_gradient(case, impl, {k: fenced(x, front) for k, x in case.tensors.items()} | indices)
        pk.backends.op("group_advantages").kernel(impl)(row[None], pick(4), pick(4), 0, turn % 5, 0.0, True)


@pytest.mark.large
@pytest.mark.parametrize("front", FRONT)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_no_op_touches_what_lies_outside_its_tensors(require_impl, impl, front):
    require_impl("gae", impl)
    in_fresh_process(everything_between_guard_pages, impl, front)


@pytest.mark.large
@pytest.mark.parametrize("front", FRONT)
@pytest.mark.parametrize("impl", KERNELS)
def test_garbage_labels_and_offsets_read_nothing_outside(require_impl, impl, front):
    require_impl("gae", impl)
    in_fresh_process(garbage_between_guard_pages, impl, front)


PADDED = tuple(name for name in CALLS if not REGISTERED[name].packed)


def rows_beyond_32_bits(impl, rows, stride):
    for name in PADDED:
        case = cases.make(name, torch.float32, batch=rows, length=cases.fit(name, impl, 33))
        apart = [k for k, x in case.tensors.items() if x.dim() > 1 and len(x) == rows]  # a weight's rows are others
        far = case.tensors | {k: far_rows(case.tensors[k], stride) for k in apart}
        assert bit_equal(*(outputs_and_gradient(case, impl, tensors) for tensors in (far, case.tensors))), name
    gradient_written_over_rows_beyond_32_bits(impl, rows, stride)


def gradient_written_over_rows_beyond_32_bits(impl, rows, stride):
    logits, labels, grad_output = torch.randn(rows, 33).bfloat16(), torch.arange(rows) * 10, torch.ones(rows)
    grads = []
    for x in (logits.clone(), far_rows(logits, stride)):
        saved = pk.backends.op("token_logprobs").kernel(impl)(x, labels, None, None, 0.7, -100, True)
        backward = pk.backends.op("token_logprobs_backward_").kernel(impl)
        backward(x, labels, None, grad_output, grad_output, *saved, 0.7, -100)
        grads.append(x)
    assert bit_equal(*grads)
    assert not bit_equal(grads[0], logits)


# Of three rows the last begins beyond 2^31 where the stride fits 32 bits: it is the product that overflows.
FAR = [(3, 2**30 + 40), *(pytest.param(2, 2**31 + k, marks=pytest.mark.large) for k in (-40, 40))]


@pytest.mark.parametrize(("rows", "stride"), FAR)
@pytest.mark.parametrize("impl", KERNELS)
def test_rows_further_apart_than_32_bits_count(require_impl, impl, rows, stride):
    require_impl("gae", impl)
    in_fresh_process(rows_beyond_32_bits, impl, rows, stride)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_alignment_of_base_and_rows(require_impl, impl, dtype):
    """Vector loads may only be chosen where they are legal, and never show in the bits."""
    require_impl("token_logprobs", impl)
    for vocab in range(40, 48, 3 if impl == "triton" else 1):
        logits, labels = torch.randn(3, vocab).to(dtype), torch.tensor([0, vocab - 1, 7])
        case = cases.Call(
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
