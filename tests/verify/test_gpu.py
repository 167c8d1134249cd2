"""What only a GPU can show: streams, devices, graph capture, and that nothing waits for the device."""

import pytest
import torch

import ppo_kernels as pk
from tests.lib import cases
from tests.lib.cases import NAMES, run
from tests.lib.helpers import bit_equal

pytestmark = pytest.mark.gpu

IMPLS = ["auto", "cuda", "triton"]
GIGABYTE = 2**30


def on_device(name: str, device="cuda", seed: int = 0) -> cases.Call:
    case = cases.make(name, batch=8, length=65, seed=seed)
    return case._replace(tensors={k: x.to(device) for k, x in case.tensors.items()})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("impl", IMPLS)
def test_kernels_run_on_the_current_stream(name, impl):
    """The inputs arrive late, on a side stream: a kernel on another stream reads what was there before."""
    case, late = on_device(name), on_device(name, seed=1)
    want = run(late, impl)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        for k, x in case.tensors.items():
            x.copy_(late.tensors[k])
        got = run(case, impl)
    side.synchronize()
    assert bit_equal(got, want)


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


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("impl", IMPLS)
def test_a_captured_graph_replays_with_new_values(name, impl):
    case, other = on_device(name), on_device(name, seed=1)
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
        graph.replay()
        torch.cuda.synchronize()
        assert bit_equal(tuple(x.detach() for x in got), want)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("impl", IMPLS)
def test_no_op_waits_for_the_device(name, impl):
    case = on_device(name)
    run(case, impl)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(case, impl)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("impl", IMPLS)
def test_a_thousand_repeats_give_the_same_bits(name, impl):
    case = on_device(name)
    want = run(case, impl)
    for _ in range(1000):
        assert bit_equal(run(case, impl), want)


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
