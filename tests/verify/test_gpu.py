"""What only a GPU can show: streams, devices, graph capture, and that nothing waits for the device."""

import functools

import pytest
import torch

import ppo_kernels as pk
from tests.lib import cases
from tests.lib.cases import NAMES, run
from tests.lib.helpers import bit_equal

pytestmark = pytest.mark.gpu

IMPLS = ["auto", "cuda", "triton"]
GIGABYTE = 2**30
#: The small call of each contract, and those in which many blocks hand one another their parts (tests/lib/cases.py).
CALLS = [(name, impl) for name in NAMES for impl in IMPLS]
CALLS += [(meeting, impl) for meeting in cases.meetings("gpu") for impl in ("cuda", "triton")]
each_call = pytest.mark.parametrize(("call", "impl"), CALLS, ids=[f"{call}-{impl}" for call, impl in CALLS])
LATE = 20_000_000  # cycles of a device that is made to wait


@functools.lru_cache(maxsize=4)
def inputs_of(call: str | cases.Meeting, seed: int) -> cases.Call:
    return cases.make(call, batch=8, length=65, seed=seed) if isinstance(call, str) else call.make(seed)


def on_device(call: str | cases.Meeting, device="cuda", seed: int = 0) -> cases.Call:
    case = inputs_of(call, seed)
    return case._replace(tensors={k: x.to(device) for k, x in case.tensors.items()})


@each_call
def test_kernels_run_on_the_current_stream(call, impl):
    """The inputs arrive late, on a side stream: a kernel on another stream reads what was there before."""
    case, late = on_device(call), on_device(call, seed=1)
    want = run(late, impl)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(LATE)
        for k, x in case.tensors.items():
            x.copy_(late.tensors[k])
        got = run(case, impl)
    side.synchronize()
    assert bit_equal(got, want)


@each_call
def test_two_streams_at_once_give_what_each_gives_alone(call, impl):
    """Blocks of two launches share the device; no counter, flag or scratch memory may be theirs together."""
    both = [on_device(call, seed=seed) for seed in (0, 1)]
    want = [run(case, impl) for case in both]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in both]
    got = [[], []]
    for turn in range(20):
        for case, stream, results in zip(both, streams, got, strict=True):
            with torch.cuda.stream(stream):
                if turn == 0:
                    torch.cuda._sleep(LATE)
                results.append(run(case, impl))
    torch.cuda.synchronize()
    for results, alone in zip(got, want, strict=True):
        assert all(bit_equal(result, alone) for result in results)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("impl", IMPLS)
def test_kernels_run_on_the_device_of_their_inputs(name, impl):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    want = run(on_device(name, "cuda:0"), impl)
    with torch.cuda.device(0):
        got = run(on_device(name, "cuda:1"), impl)
    assert {x.device.index for x in got} == {1}
    assert bit_equal(tuple(x.cpu() for x in got), tuple(x.cpu() for x in want))


@each_call
def test_a_captured_graph_replays_with_new_values(call, impl):
    case, other = on_device(call), on_device(call, seed=1)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run(case, impl)
    torch.cuda.current_stream().wait_stream(side)
    static = dict(case.tensors)
    if case.leaf:
        static[case.leaf] = static[case.leaf].detach().requires_grad_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = case.call(static, impl)
        if case.leaf:
            grad_output = [torch.full_like(x, 1.0 + i) for i, x in enumerate(got) if x.requires_grad]
            got = (*got, *torch.autograd.grad(got[: len(grad_output)], static[case.leaf], grad_output))
    for source in (other, case._replace(tensors={k: x.clone() for k, x in case.tensors.items()})):
        want = run(source, impl)
        with torch.no_grad():
            for k, x in source.tensors.items():
                static[k].copy_(x)
        for _ in range(10):  # at once: a counter that a replay leaves behind shows in the next
            graph.replay()
        torch.cuda.synchronize()
        assert bit_equal(tuple(x.detach() for x in got), want)


@each_call
def test_no_op_waits_for_the_device(call, impl):
    case = on_device(call)
    run(case, impl)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(case, impl)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_call
def test_a_thousand_repeats_give_the_same_bits(call, impl):
    """Compared on the device, so that the launches follow one another closely."""
    case = on_device(call)
    want = run(case, impl)
    differ = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        for x, y in zip(run(case, impl), want, strict=True):
            differ += ((x != y) & ~(x.isnan() & y.isnan())).any()
    assert differ.item() == 0


def needs(gigabytes: int) -> None:
    free = torch.cuda.mem_get_info()[0] / GIGABYTE
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GB of free GPU memory, and {free:.0f} are there")


@pytest.mark.parametrize("impl", IMPLS)
def test_logits_on_both_sides_of_2_31_elements(impl):
    """The rows around element 2^31 and 2^32 have the bits that they have alone."""
    needs(24)
    vocab = 2**17 + 1
    logits = torch.randn(64, vocab, device="cuda", dtype=torch.bfloat16).repeat(2**32 // vocab // 64 + 2, 1)
    labels = torch.randint(vocab, (len(logits),), device="cuda")
    logp, entropy = pk.token_logprobs(logits, labels, entropy=True, impl=impl)
    for row in (0, 2**31 // vocab - 1, 2**31 // vocab, 2**32 // vocab, len(logits) - 1):
        some = slice(row, row + 1)
        want = pk.token_logprobs(logits[some].clone(), labels[some], entropy=True, impl=impl)
        assert bit_equal((logp[some], entropy[some]), tuple(want))


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_of_logits_on_both_sides_of_2_31_elements(impl):
    needs(24)
    vocab = 2**17 + 1
    leaf = torch.randn(64, vocab, device="cuda", dtype=torch.bfloat16).repeat(2**31 // vocab // 64 + 2, 1)
    leaf.requires_grad_()
    labels = torch.randint(vocab, (len(leaf),), device="cuda")
    pk.token_logprobs(leaf, labels, impl=impl).sum().backward()
    for row in (0, 2**31 // vocab - 1, 2**31 // vocab, len(leaf) - 1):
        one = leaf.detach()[row : row + 1].clone().requires_grad_()
        pk.token_logprobs(one, labels[row : row + 1], impl=impl).sum().backward()
        assert bit_equal(leaf.grad[row : row + 1], one.grad)


@pytest.mark.parametrize("impl", IMPLS)
def test_tokens_on_both_sides_of_2_31_elements(impl):
    needs(60)
    length = 2**16 + 1
    rewards, values = torch.randn(2, 64, length, device="cuda").repeat(1, 2**31 // length // 64 + 2, 1)
    advantages, _ = pk.gae(rewards, values, lam=0.95, impl=impl)
    shaped, _ = pk.kl_rewards(rewards, values, rewards[:, 0], impl=impl)
    for row in (0, 2**31 // length - 1, 2**31 // length, len(rewards) - 1):
        some = slice(row, row + 1)
        want, _ = pk.gae(rewards[some].clone(), values[some].clone(), lam=0.95, impl=impl)
        torch.testing.assert_close(advantages[some], want, rtol=1e-6, atol=1e-5)
        want, _ = pk.kl_rewards(rewards[some].clone(), values[some].clone(), rewards[some, 0], impl=impl)
        assert bit_equal(shaped[some], want)
