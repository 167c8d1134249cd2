"""What only a GPU can show: streams, devices, graph capture, and that nothing waits for the device."""

import cases
import pytest
import torch
from cases import NAMES, run
from helpers import bit_equal

pytestmark = pytest.mark.gpu

IMPLS = ["auto", "triton"]


def on_device(name: str, device="cuda", seed: int = 0) -> cases.Case:
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
            upstream = [torch.full_like(x, 1.0 + i) for i, x in enumerate(got) if x.requires_grad]
            got = (*got, *torch.autograd.grad(got[: len(upstream)], static[case.leaf], upstream))
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
