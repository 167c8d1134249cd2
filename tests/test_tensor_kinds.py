"""Tensors that are not plain ones on an ordinary device: jagged, distributed, and where there is no float64."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ppo_kernels as pk
from tests.lib import cases
from tests.lib.cases import NAMES
from tests.lib.devices import IMPLEMENTATIONS
from tests.lib.memory import outputs_and_gradient


@pytest.fixture(params=IMPLEMENTATIONS)
def impl_of(request, require_impl):
    return lambda name: require_impl(name.partition(":")[0], request.param)


class NoFloat64(TorchDispatchMode):
    """A device that refuses to make a float64 tensor, as Apple's MPS does."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if any(isinstance(x, torch.Tensor) and x.dtype == torch.float64 for x in tree_leaves(out)):
            raise TypeError(f"this device has no float64 ({function})")
        return out


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_runs_without_float64(name):
    case = cases.make(name)
    tensors = {k: x.float() if x.dtype == torch.float64 else x for k, x in case.tensors.items()}
    want = outputs_and_gradient(case, "torch", tensors)
    with NoFloat64():
        found = outputs_and_gradient(case, "torch", tensors)
    for got, expected in zip(found, want, strict=True):
        assert got.dtype != torch.float64
        finite = expected[expected.isfinite()].abs()
        size = float(finite.max()) if finite.numel() else 0.0
        torch.testing.assert_close(got.double(), expected.double(), rtol=0, atol=2e-6 * size, equal_nan=True)


def test_options_that_are_tensors_without_float64():
    x, ones = torch.randn(3, 4), torch.ones(3)
    with NoFloat64():
        pk.token_logprobs(torch.randn(3, 4, 5), torch.zeros(3, 4).long(), temperature=torch.tensor(0.7), impl="torch")
        pk.kl_rewards(x, x, ones, kl_coef=torch.tensor(0.1), impl="torch")
        pk.gae(x, x, lam=ones, bootstrap_value=ones, impl="torch")
        pk.policy_loss(x, x, x, normalizer=torch.tensor(3), impl="torch")
        pk.aggregation_weights(x > 0, "seq-mean-token-mean")


NESTED = r"NestedTensor; pass its \.values\(\)"
KINDS = {
    "jagged": (NESTED, lambda: torch.nested.nested_tensor([torch.randn(3), torch.randn(5)], layout=torch.jagged)),
    "nested": ("layout=torch.jagged, then pass its", lambda: torch.nested.nested_tensor([torch.randn(3)] * 2)),
    "sparse": (r"sparse_coo.*pass \.to_dense\(\)", lambda: torch.randn(2, 3).to_sparse()),
    "csr": (r"sparse_csr.*pass \.to_dense\(\)", lambda: torch.randn(2, 3).to_sparse_csr()),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_tensors_of_another_kind_are_named(impl_of, kind):
    words, make = KINDS[kind]
    with pytest.raises(TypeError, match=words):
        pk.aggregation_weights(make())
    for name in NAMES:
        impl, case = impl_of(name), cases.make(name, batch=2, length=4)
        for given in case.tensors:
            with pytest.raises(TypeError, match=words):
                case.call(case.tensors | {given: make()}, impl)


@pytest.fixture(scope="module")
def mesh(process_group):
    return torch.distributed.device_mesh.init_device_mesh("cpu", (1,))


@pytest.mark.large
@pytest.mark.parametrize("name", NAMES)
def test_a_replicated_dtensor_is_read_as_its_local_tensor(impl_of, mesh, name):
    from torch.distributed.tensor import Replicate, distribute_tensor

    impl, case = impl_of(name), cases.make(name, batch=2, length=4)
    replicas = {k: distribute_tensor(x, mesh, [Replicate()]) for k, x in case.tensors.items()}
    want = outputs_and_gradient(case, impl, dict(case.tensors))
    for tensors in (replicas, case.tensors | {case.leaf: replicas.get(case.leaf)} if case.leaf else replicas):
        *outputs, last = outputs_and_gradient(case, impl, dict(tensors))
        assert all(type(x) is torch.Tensor for x in outputs)
        if case.leaf:
            assert last.placements == (Replicate(),)
            last = last.to_local()
        for got, expected in zip((*outputs, last), want, strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_sharded_dtensor_is_named(require_impl, mesh, impl):
    from torch.distributed.tensor import DTensor, Partial, Shard

    for name in NAMES:
        require_impl(name.partition(":")[0], impl)
        case = cases.make(name, batch=2, length=4)
        for given, x in case.tensors.items():
            for placement in (Shard(0), Shard(-1), Partial()) if x.dim() else (Partial(),):
                tensors = case.tensors | {given: DTensor.from_local(x, mesh, [placement])}
                with pytest.raises(TypeError, match=r"DTensor.*\.to_local\(\).*group="):
                    case.call(tensors, impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gae_compiles_once_for_all_lengths(require_impl, impl):
    require_impl("gae", impl)
    torch._dynamo.reset()
    counter = CompileCounter()
    step = torch.compile(lambda r, v: pk.gae(r, v, impl=impl)[0], fullgraph=True, backend=counter, dynamic=True)
    for length in (3, 6, 12, 100, 300):
        r, v = torch.randn(2, length), torch.randn(2, length)
        torch.testing.assert_close(step(r, v), pk.gae(r, v, impl="torch")[0])
    assert counter.frame_count == 1
