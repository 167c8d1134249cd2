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
def test_replicas_in_a_pair_are_taken(require_impl, mesh, impl):
    from torch.distributed.tensor import DTensor, Replicate

    require_impl("token_logprobs", impl)
    logits, labels = torch.randn(2, 3, 5), torch.randint(5, (2, 3))
    ids, offsets = torch.arange(5).repeat(6), torch.arange(0, 31, 5)
    part = pk.partial(logits, labels, impl=impl)

    def replica(x):
        return DTensor.from_local(x, mesh, [Replicate()])

    def results(given):
        yield pk.token_logprobs(logits, labels, support=(given(ids), given(offsets)), impl=impl)
        yield pk.merge([given(part)], logits, labels, impl=impl)
        yield pk.policy_loss(*logits[:, :, :3].unbind(-1), cliprange=(None, given(torch.tensor(0.1))), impl=impl)[0]

    for got, want in zip(results(replica), results(lambda x: x), strict=True):
        assert type(got) is torch.Tensor
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_an_option_that_is_no_plain_tensor_is_named(require_impl, mesh, impl):
    """The number of tokens of all ranks, before anybody has added it up, is the likeliest."""
    from torch.distributed.tensor import DTensor, Partial, Shard

    require_impl("policy_loss", impl)
    x, one = torch.randn(2, 3), torch.tensor([0.5])
    sharded = [(DTensor.from_local(one, mesh, [placement]), "DTensor") for placement in (Shard(0), Partial())]
    nested = torch.nested.nested_tensor([torch.ones(1)])
    for given, what in (*sharded, (nested, "NestedTensor"), (one.to_sparse(), "sparse_coo")):
        for op in (
            lambda y: pk.policy_loss(x, x, x, normalizer=y, impl=impl),
            lambda y: pk.policy_loss(x, x, x, ref_logprobs=x, kl_coef=y, impl=impl),
            lambda y: pk.policy_loss(x, x, x, cliprange=(0.2, y), impl=impl),
            lambda y: pk.gae(x, x, gamma=y, impl=impl),
            lambda y: pk.token_logprobs(x, torch.zeros(2, dtype=torch.int64), temperature=y, impl=impl),
        ):
            with pytest.raises(TypeError, match=what):
                op(given)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_graph_of_any_shape_takes_one_packed_row(require_impl, impl):
    require_impl("policy_loss", impl)
    torch._dynamo.reset()

    def loss(x, advantages, cu_seqlens):
        return pk.policy_loss(x, 2 * x, advantages, cu_seqlens=cu_seqlens, impl=impl)[0]

    graph = torch.compile(loss, fullgraph=True, backend="eager", dynamic=True)
    for ends in ([0, 3, 8], [0, 4]):
        cu_seqlens, x = torch.tensor(ends), torch.randn(ends[-1])
        for advantages in (torch.randn(len(ends) - 1), torch.randn(len(ends) - 1, 1)):
            torch.testing.assert_close(graph(x, advantages, cu_seqlens), loss(x, advantages, cu_seqlens))


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
