"""The effective sample size of policy_loss's weights, and its entropy bonus."""

import numpy as np
import pytest
import torch

import ppo_kernels as pk
from bench.oracle.policy_loss import entropy_bonus
from ppo_kernels import policy_loss
from tests.lib import transforms
from tests.lib.devices import IMPLEMENTATIONS
from tests.lib.helpers import (
    INF,
    JUNK,
    NAN,
    assert_close_to_oracle,
    bit_equal,
    cu,
    grad_of,
    holey_mask,
    pack,
    with_junk,
)
from tests.test_policy_loss import check, extras, make

OP = "policy_loss"


def entropies(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(5)) * 4


def some_zero(batch, length):
    weights = extras(batch, length)["weights"]
    weights[:, ::3] = 0.0
    return weights


WEIGHTS = {
    "some 0": some_zero(5, 41),
    "all 0": torch.zeros(5, 41),
    "float64": extras(5, 41, torch.float64)["weights"],
    "bfloat16": extras(5, 41, torch.bfloat16)["weights"],
    "of rows": torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0]),
    "huge": 1e20 * some_zero(5, 41),  # the squares are beyond float32
    "tiny": 1e-30 * some_zero(5, 41),
    "largest": torch.full((5, 41), torch.finfo(torch.float32).max),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_effective_sample_size(impl, name):
    weights, mask = WEIGHTS[name], holey_mask(5, 41)
    data = make(5, 41, torch.float64 if weights.dtype == torch.float64 else torch.float32)
    got = policy_loss(*data, mask, weights=weights, impl=impl)[1].ess
    used = weights.view(5, -1).expand(5, 41)[mask].double()
    want = used.sum() ** 2 / (len(used) * used.square().sum()) if used.any() else torch.zeros(())
    assert float(got) == pytest.approx(float(want), rel=1e-6)
    if weights.dim() == 1:
        return
    assert bit_equal(policy_loss(*data, mask, weights=with_junk(weights, mask, NAN), impl=impl)[1].ess, got)
    lengths = [41, 0, 7, 20, 1]
    logp, old, adv, mask, weights = (pack(x, lengths) for x in (*data, mask, weights))
    if name == "largest":  # the loss is beyond float32
        packed = policy_loss(logp, old, adv, mask, weights=weights, cu_seqlens=cu(lengths), impl=impl)[1]
        assert packed.ess == 1
    else:
        check(impl, logp, old, adv, mask, weights=weights, cu_seqlens=cu(lengths))


def check_bonus(impl, data, mask, entropy, **options):
    """Loss, statistics and both gradients against the loops."""
    loss, stats, _ = check(impl, *data, mask, entropy=entropy, **options)
    leaf = entropy.clone().requires_grad_()
    got = policy_loss(*data, mask, entropy=leaf, impl=impl, **options)
    assert bit_equal((got[0].detach(), *got[1]), (loss, *stats))
    got[0].backward()
    given = options.get("entropy_normalizer"), options.get("normalizer"), float(stats.count)
    scale = float(next(x for x in given if x is not None))
    cu_seqlens, row_weight = options.get("cu_seqlens"), options.get("row_weight")
    want = entropy_bonus(entropy, mask, options["entropy_coef"], row_weight, scale, cu_seqlens)[1]
    size = np.abs(want).max(initial=1e-30)
    assert leaf.grad.dtype == entropy.dtype
    assert_close_to_oracle(leaf.grad, want, ceiling=torch.finfo(entropy.dtype).eps, scale=size, what="gradient")
    return loss, stats, leaf.grad


@pytest.mark.large
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("extra", [(), ("row_weight",), ("weights", "ref_logprobs", "row_weight")])
@pytest.mark.parametrize(
    ("normalizer", "own"), [(None, None), (7.0, None), (None, torch.tensor(3.0)), (7.0, 11), (0, 5.0), (5.0, 0)]
)
def test_the_bonus_matches_the_loop(impl, normalizer, own, extra, dtype):
    options = {k: v for k, v in extras(5, 41).items() if k in extra}
    options |= {"entropy_coef": 0.3, "normalizer": normalizer, "entropy_normalizer": own}
    data, mask, entropy = make(5, 41, torch.promote_types(dtype, torch.float32)), holey_mask(5, 41), entropies(5, 41)
    check_bonus(impl, data, mask, entropy.to(dtype), **options)
    lengths = [41, 0, 7, 20, 1]
    options |= {name: pack(options[name], lengths) for name in ("weights", "ref_logprobs") if name in options}
    *data, mask, entropy = (pack(x, lengths) for x in (*data, mask, entropy.to(dtype)))
    check_bonus(impl, data, mask, entropy, cu_seqlens=cu(lengths), **options)


@pytest.mark.large
def test_long_rows_and_no_mask(impl):
    check_bonus(impl, make(3, 1500), None, entropies(3, 1500), entropy_coef=torch.tensor(-0.5))


@pytest.mark.large
@pytest.mark.parametrize("junk", JUNK)
def test_what_lies_under_the_mask_does_not_matter(impl, junk):
    mask, entropy, options = holey_mask(6, 37), entropies(6, 37), {"entropy_coef": 0.3}
    row_weight = extras(6, 37)["row_weight"]
    clean = check_bonus(impl, make(6, 37), mask, entropy, row_weight=row_weight, **options)
    leaf = with_junk(entropy, mask, junk).requires_grad_()
    options["row_weight"] = torch.where(mask.any(1), row_weight, junk)
    loss, stats = policy_loss(*make(6, 37), mask.byte(), entropy=leaf, impl=impl, **options)
    loss.backward()
    assert bit_equal((loss.detach(), *stats, leaf.grad), (clean[0], *clean[1], clean[2]))


@pytest.mark.large
@pytest.mark.parametrize("zero", [0, 0.0, np.float32(0), torch.tensor(0.0), 1e-50])
@pytest.mark.parametrize("lost", [NAN, INF, -INF])
def test_a_coefficient_of_0_is_off(impl, zero, lost):
    data, entropy = make(3, 4), entropies(3, 4)
    want = grad_of(lambda x: policy_loss(x, *data[1:], impl=impl), data[0])
    entropy[1, 2] = lost
    entropy.requires_grad_()
    (loss, stats), grad = grad_of(
        lambda x: policy_loss(x, *data[1:], entropy=entropy, entropy_coef=zero, impl=impl), data[0]
    )
    assert bit_equal((loss, grad), (want[0][0], want[1]))
    assert not entropy.grad.any()
    assert not stats.entropy.isfinite()
    assert not stats.entropy.requires_grad


@pytest.mark.large
def test_without_a_valid_token_there_is_no_entropy(impl):
    for shape in ((3, 4), (0, 5), (5, 0)):
        x = torch.full(shape, NAN)
        leaf = x.clone().requires_grad_()
        loss, stats = policy_loss(x, x, x, torch.zeros(shape), entropy=leaf, entropy_coef=1.0, impl=impl)
        loss.backward()
        assert loss == stats.entropy == 0
        assert not leaf.grad.any()


@pytest.mark.large
def test_the_bonus_is_that_of_a_second_call(impl):
    """A bonus by the loss's own aggregation is a policy loss of the entropy as log-probability with advantage 1."""
    mask, entropy = holey_mask(5, 41), entropies(5, 41)
    row_weight, normalizer = pk.aggregation_weights(mask, "seq-mean-token-mean")
    options = {"row_weight": row_weight, "normalizer": normalizer, "impl": impl}
    plain, both = (
        policy_loss(*make(5, 41), mask, **given, **options)[0]
        for given in ({}, {"entropy": entropy, "entropy_coef": 0.5})
    )
    alone, _ = policy_loss(entropy, entropy, torch.ones(5), mask, surrogate="cispo", cliprange=None, **options)
    torch.testing.assert_close(both, plain + 0.5 * alone)


@pytest.mark.large
@pytest.mark.parametrize("row", ["autograd", "checkpoint", "hooks", "make_fx", "grad", "jacrev", "vmap", "twice"])
def test_transforms_of_the_entropy(impl, row):
    """Rows of ``tests/test_transforms.py`` that do not differentiate forward, which is for the first argument."""
    data, of, x = make(2, 3), transforms.ROWS[row], entropies(2, 3)
    f = lambda y: policy_loss(*data, entropy=y, entropy_coef=0.3, impl=impl)[0]  # noqa: E731
    if of.refused:
        with pytest.raises(RuntimeError, match=f"policy_loss: .*{of.refused}"):
            of.run(f, x, "eager")
    else:
        torch.testing.assert_close(of.run(f, x, "eager"), of.want(f, x))


@pytest.mark.large
def test_a_mask_and_weights_of_inference_mode(impl):
    """Constants may be made there, and autograd saves none of them."""
    data, leaf = make(4, 9), entropies(4, 9).requires_grad_()
    with torch.inference_mode():
        constants = {"mask": holey_mask(4, 9), "row_weight": torch.rand(4)}
    for names in (("mask",), ("row_weight",), ("mask", "row_weight")):
        given = {name: constants[name] for name in names}
        loss, _ = policy_loss(*data, **given, entropy=leaf, entropy_coef=0.3, impl=impl)
        copies = {name: x.clone() for name, x in given.items()}
        want, _ = policy_loss(*data, **copies, entropy=leaf, entropy_coef=0.3, impl=impl)
        assert bit_equal(*(torch.autograd.grad(x, leaf)[0] for x in (loss, want)))


def test_one_graph_with_both_gradients(require_impl):
    data, entropy = make(4, 6), entropies(4, 6)
    for impl in (require_impl(OP, "cpu"), "torch"):
        torch._dynamo.reset()
        step = lambda x, h, c: policy_loss(x, *data[1:], entropy=h, entropy_coef=c, impl=impl)[0]  # noqa: B023, E731
        graph = torch.compile(step, fullgraph=True, backend="aot_eager")
        leaves = [x.clone().requires_grad_() for x in (data[0], entropy)]
        for coef in (0.3, 0.4):
            want = torch.autograd.grad(step(*leaves, coef), leaves)
            torch.testing.assert_close(torch.autograd.grad(graph(*leaves, coef), leaves), want)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_tangent_of_the_entropy_alone(require_impl, impl):
    require_impl(OP, impl)
    x, old, advantages, h = torch.randn(4, 2, 3, dtype=torch.float64)

    def loss(y):
        return policy_loss(x, old, advantages, entropy=y, entropy_coef=0.3, impl=impl)[0]

    want = (transforms.gradient(loss, h) * h).sum()
    torch.testing.assert_close(transforms.tangent(loss, h), want)
    torch.testing.assert_close(torch.func.jvp(loss, (h,), (h,))[1], want)
    with pytest.raises(RuntimeError, match="policy_loss: differentiating twice"):
        torch.func.hessian(loss)(h)
    torch._dynamo.reset()
    graph = torch.compile(loss, backend="eager")
    graph(h)
    with pytest.raises(RuntimeError, match="policy_loss: forward-mode.*no dual tensors"):
        transforms.tangent(graph, h)
    inner = torch.compile(lambda y: torch.func.jvp(loss, (y,), (y,))[1], backend="eager", fullgraph=True)
    torch.testing.assert_close(inner(h), want)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_tangent_of_hidden_states_reaches_the_bonus(require_impl, impl):
    require_impl("linear_policy_loss", impl)
    hidden, weight, labels = torch.randn(2, 3, 4), torch.randn(5, 4), torch.randint(5, (2, 3))
    old, advantages = torch.randn(2, 2, 3)

    def loss(x):
        return pk.linear_policy_loss(
            x, weight, labels, old, advantages, entropy=True, entropy_coef=0.3, impl=impl
        )[0]  # fmt: skip

    want = (transforms.gradient(loss, hidden) * hidden).sum()
    torch.testing.assert_close(transforms.tangent(loss, hidden), want)
