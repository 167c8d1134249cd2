"""The policy loss from hidden states: what linear_token_logprobs and policy_loss give one after the other."""

import numpy as np
import pytest
import torch

from bench import oracle
from bench.measure import peak_extra
from ppo_kernels import PolicyStats, linear_policy_loss, linear_token_logprobs, policy_loss
from tests.lib.helpers import INF, NAN, assert_close_to_oracle, bit_equal, cu
from tests.test_linear_token_logprobs import products

OP = "linear_policy_loss"
B, T, H, V = 3, 5, 12, 600
SMALLEST = 0.012  # MiB: two or three rows at a time
HEAD = ("hidden", "weight", "bias")


def make(dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = {"hidden": torch.randn(B, T, H, generator=g), "weight": torch.randn(V, H, generator=g)}
    x = {name: t.to(dtype) for name, t in x.items()} | {"bias": torch.randn(V, generator=g).to(dtype)}
    labels = torch.randint(V, (B, T), generator=g)
    labels[0, :2], labels[1, 2] = torch.tensor([V - 1, 0]), -100
    mask = torch.rand(B, T, generator=g) < 0.6  # fewer than H: the weight waits for the backward
    logp = linear_token_logprobs(**x, labels=labels, impl="torch").float()
    given = {"old_logprobs": logp + 0.3 * torch.randn(B, T, generator=g), "advantages": torch.randn(B, T, generator=g)}
    return x, labels, given, mask


def some(name, generator=None):
    g = torch.Generator().manual_seed(1)
    return {
        "weights": lambda: torch.rand(B, T, generator=g),
        "ref_logprobs": lambda: -8 * torch.rand(B, T, generator=g),
        "row_weight": lambda: torch.rand(B, generator=g),
        "temperature": lambda: 1.0 + torch.rand(B, T, generator=g),
    }[name]()


OPTIONS = (
    {},
    {"cliprange": (0.1, 0.3), "dual_clip": 1.5, "normalizer": 7.0},
    {"weights": some("weights"), "row_weight": some("row_weight"), "softcap": 4.0, "logit_scale": 0.8},
    {"ref_logprobs": some("ref_logprobs"), "kl_coef": 0.25, "kl_estimator": "k1", "temperature": some("temperature")},
    {"weights": some("weights")[:, 0], "normalizer": torch.tensor(3), "temperature": 0.7},
    {"surrogate": "sapo", "row_weight": some("row_weight")},
    {"surrogate": "dppo_kl", "ref_logprobs": some("ref_logprobs"), "kl_coef": 0.25, "unbiased_kl": True},
    {"importance_sampling_level": "sequence", "softcap": 4.0},
    {"entropy": True, "normalizer": 7.0},
    {"entropy": True, "entropy_coef": 0.3, "normalizer": 7.0, "row_weight": some("row_weight"), "softcap": 4.0},
    {"entropy": True, "entropy_coef": torch.tensor(0.3), "entropy_normalizer": 2.5, "temperature": some("temperature")},
    {"entropy": "detached", "entropy_coef": 0.3},
    {"entropy": True, "entropy_coef": 0.3, "importance_sampling_level": "sequence"},
)


def run(impl, head, labels, given, mask, upstream=1.0, function=linear_policy_loss, **options):
    leaves = {name: x.detach().requires_grad_() for name, x in head.items()}
    loss, stats, logprobs = function(**leaves, labels=labels, **given, mask=mask, impl=impl, **options)
    loss.backward(torch.tensor(upstream, dtype=loss.dtype))
    return loss.detach(), *stats, logprobs.detach(), *(leaves[name].grad for name in HEAD)


def one_after_the_other(hidden, weight, labels, old_logprobs, advantages, mask, *, impl, **options):
    of_head = {k: options.pop(k) for k in ("bias", "temperature", "softcap", "logit_scale") if k in options}
    entropy = options.pop("entropy", False)
    found = linear_token_logprobs(hidden, weight, labels, mask=mask, impl=impl, entropy=entropy, **of_head)
    logprobs, of_tokens = found if entropy else (found, None)
    valid = mask & (labels != -100)
    return *policy_loss(logprobs, old_logprobs, advantages, valid, entropy=of_tokens, impl=impl, **options), logprobs


@pytest.mark.large
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
def test_is_one_after_the_other(impl, options):
    head, labels, given, mask = make()
    for upstream, memory in ((1.0, None), (-2.5, SMALLEST)):
        got = run(impl, head, labels, given, mask, upstream, memory_mib=memory, **options)
        want = run(impl, head, labels, given, mask, upstream, one_after_the_other, **options)
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y, rtol=2e-5, atol=1e-5)
        assert not got[len(PolicyStats._fields) + 1][~(mask & (labels != -100))].any()


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
@pytest.mark.parametrize("memory_mib", [None, SMALLEST])
def test_matches_the_oracle_in_float64(impl, options, memory_mib):
    head, labels, given, mask = make(torch.float64)
    loss, *stats, logp, of_hidden, of_weight, of_bias = run(
        impl, head, labels, given, mask, memory_mib=memory_mib, **options
    )
    known = options | {"normalizer": float(options["normalizer"])} if "normalizer" in options else options
    want, want_stats, want_logp, *grads = oracle.linear_policy_loss(**head, labels=labels, **given, mask=mask, **known)
    assert_close_to_oracle(loss, want, ceiling=1e-9, what="loss")
    assert_close_to_oracle(logp, want_logp, ceiling=1e-9, what="log p")
    for x, name in zip(stats, PolicyStats._fields, strict=True):
        assert_close_to_oracle(x, np.float64(want_stats[name]), ceiling=1e-7, what=name)
    for x, y, name in zip((of_bias, of_weight, of_hidden), grads, HEAD[::-1], strict=True):
        assert_close_to_oracle(x, y, ceiling=1e-8, what=f"gradient of {name}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(require_impl, dtype):
    require_impl(OP, "cpu")
    head, labels, given, mask = make(dtype)
    wide = {name: x.float() for name, x in head.items()}
    low, full = (run("cpu", x, labels, given, mask, 3.0, memory_mib=SMALLEST) for x in (head, wide))
    for x, y in zip(low[:-3], full[:-3], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    for x, y in zip(low[-3:], full[-3:], strict=True):
        assert x.dtype == dtype
        half_a_unit = (
            torch.maximum(y.abs(), torch.tensor(torch.finfo(dtype).smallest_normal)) * torch.finfo(dtype).eps / 2
        )
        assert ((x.float() - y).abs() <= half_a_unit + 1e-6 * y.abs().max()).all()


def test_packed_sequences_are_padded_ones(impl):
    head, labels, given, _ = make()
    lengths = [5, 0, 3]
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    labels[labels == -100] = 3
    more = {"row_weight": some("row_weight"), "entropy": True, "entropy_coef": 0.3}
    want = run(impl, head, labels, given, mask, **more)
    pack = lambda x: x[mask]  # noqa: E731
    packed = head | {"hidden": pack(head["hidden"])}
    others = {name: pack(x) for name, x in given.items()}
    for memory in (None, SMALLEST):
        got = run(impl, packed, pack(labels), others, None, cu_seqlens=cu(lengths), memory_mib=memory, **more)
        for x, y in zip(got, want, strict=True):
            y = y[mask] if y.shape[:2] == (B, T) else y
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    per_row = given["advantages"][:, 0]
    want = run(impl, head, labels, given | {"advantages": per_row}, mask)
    got = run(impl, packed, pack(labels), others | {"advantages": per_row}, None, cu_seqlens=cu(lengths))
    torch.testing.assert_close(got[-2], want[-2], rtol=1e-5, atol=1e-5)


@pytest.mark.large
@pytest.mark.parametrize(
    "normalizers", [(0.0, 3.0), (5.0, 0.0), (torch.tensor(0), None), (None, 2.0), (torch.tensor(float("inf")), None)]
)
def test_each_sum_has_its_normalizer(impl, normalizers):
    """Where one is 0 its part of the loss is, and the other's is not."""
    head, labels, given, mask = make()
    bonus = {"entropy": True, "entropy_coef": 0.3, "row_weight": some("row_weight")}
    bonus |= {
        name: x for name, x in zip(("normalizer", "entropy_normalizer"), normalizers, strict=True) if x is not None
    }
    for of_mask in (mask, torch.zeros_like(mask)):
        want = run(impl, head, labels, given, of_mask, 2.0, one_after_the_other, **bonus)
        for memory in (None, SMALLEST):
            got = run(impl, head, labels, given, of_mask, 2.0, memory_mib=memory, **bonus)
            for x, y in zip(got, want, strict=True):
                torch.testing.assert_close(x, y, rtol=2e-5, atol=1e-5)
    assert not any(x.any() for x in got)


def test_an_entropy_costs_no_product_and_has_the_same_in_a_graph(require_impl):
    require_impl(OP, "cpu")
    head, labels, given, mask = make()
    hidden, found = head["hidden"].requires_grad_(), []

    def call(x, **options):
        return linear_policy_loss(x, head["weight"], labels, **given, mask=mask, entropy=True, impl="cpu", **options)

    for options in ({}, {"entropy_coef": 0.3, "entropy_normalizer": torch.tensor(4.0)}):
        loss, stats, _ = call(hidden, **options)
        assert (
            len(products(lambda options=options: found.append(torch.autograd.grad(call(hidden, **options)[0], hidden))))
            == 2
        )
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)(hidden, **options)
        torch.testing.assert_close((compiled[0], compiled[1].entropy), (loss, stats.entropy))
        torch.testing.assert_close(torch.autograd.grad(compiled[0], hidden), found[-1])
    bare = linear_policy_loss(hidden, head["weight"], labels, **given, mask=mask, impl="cpu")
    assert torch.equal(torch.autograd.grad(bare[0], hidden)[0], found[0][0])
    with pytest.raises(ValueError, match="entropy must be"):
        linear_policy_loss(hidden, head["weight"], labels, **given, entropy="mean")
    with pytest.raises(ValueError, match="entropy_coef=0.1 needs the entropy; pass entropy=True"):
        linear_policy_loss(hidden, head["weight"], labels, **given, entropy_coef=0.1)


def test_offsets_that_lead_elsewhere_read_nothing_outside(require_impl):
    require_impl(OP, "cpu")
    head, labels, given, _ = make()
    packed = head | {"hidden": head["hidden"].view(-1, H)}
    others = {name: x.view(-1) for name, x in given.items()}
    for offsets in ([0, 2, 7], [3, 9, 2], [0, 99, 15], [-5, 4, 2**40]):
        got = run(
            "cpu", packed, labels.view(-1), others, None, row_weight=torch.ones(2), cu_seqlens=torch.tensor(offsets)
        )
        assert all(torch.isfinite(x).all() for x in got)


def test_tokens_behind_the_last_packed_row_do_not_count(impl):
    head, labels, given, _ = make()
    packed = head | {"hidden": head["hidden"].view(-1, H)}
    others, offsets = {name: x.view(-1) for name, x in given.items()}, torch.tensor([0, 4, 9])
    got = run(impl, packed, labels.view(-1), others, None, cu_seqlens=offsets)
    mask = torch.arange(B * T) < 9
    want = run(impl, packed, labels.view(-1), others, mask, 1.0, one_after_the_other, cu_seqlens=offsets)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-5, atol=1e-5)
    assert not got[-3][9:].any()


@pytest.mark.parametrize("group", ["token", "sequence"])
def test_values_and_shapes_are_refused_before_a_product(require_impl, group):
    require_impl(OP, "cpu")
    head, labels, given, mask = make()
    options = {"importance_sampling_level": group, "mask": mask}
    beyond = torch.where(labels == -100, labels, V + 5)
    for wrong, named in (
        ({"labels": beyond, "validate": True}, "linear_policy_loss: labels must be in"),
        ({"temperature": torch.zeros(B, T), "validate": True}, "linear_policy_loss: every temperature must be > 0"),
        (
            {"old_logprobs": given["old_logprobs"][:, :4]},
            "old_logprobs must have the labels' shape",
        ),
    ):
        with pytest.raises(ValueError, match=named):
            linear_policy_loss(**head | {"labels": labels} | given | options | wrong, impl="cpu")


@pytest.mark.parametrize("frozen", [(), ("hidden",), ("weight", "bias"), HEAD])
def test_three_products_of_the_rows_that_count(require_impl, frozen):
    require_impl(OP, "cpu")
    head, labels, given, mask = make()
    leaves = {name: x.requires_grad_(name not in frozen) for name, x in head.items()}

    def call():
        loss = linear_policy_loss(**leaves, labels=labels, **given, mask=mask, impl="cpu")[0]
        if loss.requires_grad:
            loss.backward()

    n = int((mask & (labels != -100)).sum())
    logits, of_hidden, of_weight = ((n, H), (H, V)), ((n, V), (V, H)), ((V, n), (n, H))
    wanted = [logits] + [of_hidden] * ("hidden" not in frozen) + [of_weight] * ("weight" not in frozen)
    assert sorted(products(call)) == sorted(wanted)
    for name, x in leaves.items():
        assert (x.grad is None) == (name in frozen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [4, 64])
def test_the_weight_waits_for_the_backward_where_the_logits_are_smaller(require_impl, width, dtype):
    """Its product is then the third, and until then there is the gradient of the logits in place of that of it."""
    require_impl(OP, "cpu")
    rows, vocab, found = 16, 1000, []
    hidden, weight = torch.randn(2, 8, width).to(dtype), torch.randn(vocab, width).to(dtype)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    labels, old = torch.randint(vocab, (2, 8)), torch.randn(2, 8) - 8

    def call(**more):
        return linear_policy_loss(*leaves, labels, old, old, impl="cpu", **more)[0]

    assert len(products(lambda: found.append(call()))) == 3 - (width == 64)
    assert len(products(lambda: found.append(torch.autograd.grad(found[0], leaves)))) == (width == 64)
    blocks = torch.autograd.grad(call(memory_mib=0.1), leaves)
    for x, y in zip(found[1], blocks, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4 if dtype == torch.float32 else 1e-2, atol=1e-6)
    if dtype == torch.float32:  # else there is a copy of the weight
        of_weight = vocab * width * 4 if width < rows else 0
        assert peak_extra(lambda: found.append(call())) <= rows * vocab * 4 + of_weight + 2**16 < vocab * 64 * 4


def test_what_is_masked_reaches_nothing(impl):
    head, labels, given, mask = make()
    junk = {name: torch.where(mask, x, NAN) for name, x in given.items()}
    bad = head | {"hidden": torch.where(mask[..., None], head["hidden"], INF)}
    for memory in (None, SMALLEST):
        want = run(impl, head, labels, given, mask, memory_mib=memory)
        got = run(impl, bad, labels, junk, mask, memory_mib=memory)
        assert bit_equal(got, want)
        assert not got[-3][~mask].any()
        nothing = run(impl, bad, labels, junk, torch.zeros_like(mask), memory_mib=memory)
        assert not any(x.any() for x in nothing)


def test_a_second_backward_and_one_that_scales(impl):
    head, labels, given, mask = make()
    weight = head["weight"].requires_grad_()
    loss = linear_policy_loss(**head, labels=labels, **given, mask=mask, impl=impl)[0]
    once = torch.autograd.grad(loss, weight, retain_graph=True)[0]
    again = torch.autograd.grad(loss, weight, torch.tensor(4.0))[0]
    torch.testing.assert_close(again, 4 * once)
    loss = linear_policy_loss(**head, labels=labels, **given, mask=mask, impl=impl)[0]
    with pytest.raises(RuntimeError, match="twice"):
        torch.autograd.grad(loss, weight, create_graph=True)[0].square().sum().backward()


@pytest.mark.parametrize("memory_mib", [2, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_what_was_allowed(require_impl, memory_mib, dtype):
    require_impl(OP, "cpu")
    rows, width, vocab = 512, 64, 20000
    hidden, weight = (
        torch.randn(1, rows, width).to(dtype).requires_grad_(),
        torch.randn(vocab, width).to(dtype).requires_grad_(),
    )
    labels, old, few, mib = torch.randint(vocab, (1, rows)), torch.randn(1, rows) - 10, 128 * 1024, 2**20
    totals = (rows + vocab) * width * 4
    for more in ({}, {"softcap": 5.0}, {"mask": torch.rand(1, rows) < 0.9}):
        call = lambda more=more: linear_policy_loss(  # noqa: E731
            hidden, weight, labels, old, old, memory_mib=memory_mib, impl="cpu", **more
        )[0]
        assert peak_extra(call) <= memory_mib * mib + totals + few
        returned = (rows + vocab) * width * (dtype.itemsize if dtype != torch.float32 else 0) + rows * width * 4
        both = peak_extra(lambda call=call: torch.autograd.grad(call(), (hidden, weight)))
        assert both <= max(memory_mib * mib, returned) + totals + few
    assert rows * vocab * 4 > 4 * memory_mib * mib


def test_labels_of_int32_are_those_of_int64(impl):
    head, labels, given, mask = make()
    for ignore_index in (-100, 2**32 + int(labels[0, 0])):
        got, want = (run(impl, head, y, given, mask, ignore_index=ignore_index) for y in (labels.int(), labels))
        assert all(bit_equal(x, y) for x, y in zip(got, want, strict=True))


def test_shapes_alone(impl):
    from torch._subclasses.fake_tensor import FakeTensorMode

    head, labels, given, mask = make()
    real = run(impl, head, labels, given, mask, entropy=True)
    with FakeTensorMode() as mode:
        fake = [{name: mode.from_tensor(x) for name, x in some.items()} for some in (head, given)]
        found = run(impl, fake[0], mode.from_tensor(labels), fake[1], mode.from_tensor(mask), entropy=True)
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in real]


@pytest.mark.parametrize("offsets", [[], [[0, 6]], 6, [0.0, 6.0], "meta"])
def test_offsets_that_are_none_are_named(require_impl, offsets):
    require_impl(OP, "cpu")
    head, labels, given, _ = make()
    device = "meta" if offsets == "meta" else "cpu"
    cu_seqlens = torch.tensor([0, 6] if offsets == "meta" else offsets, device=device)
    cu_seqlens = cu_seqlens if cu_seqlens.is_floating_point() and cu_seqlens.numel() else cu_seqlens.long()
    packed = {name: x.view(-1) for name, x in given.items()}
    head["hidden"] = head["hidden"].view(-1, H)
    for impl in ("cpu", "torch"):
        with pytest.raises((TypeError, ValueError), match="linear_policy_loss: .*cu_seqlens"):
            linear_policy_loss(**head, labels=labels.view(-1), **packed, cu_seqlens=cu_seqlens, impl=impl)


def test_errors_are_raised_before_any_product(require_impl):
    require_impl(OP, "cpu")
    head, labels, given, mask = make()
    head["weight"].requires_grad_()
    for change, words in (
        ({"cliprange": -1.0}, "policy_loss: cliprange"),
        ({"old_logprobs": torch.zeros(2)}, "policy_loss"),
        ({"kl_coef": 0.1}, "needs ref_logprobs"),
        ({"softcap": 0.0}, "linear_policy_loss: softcap must be > 0.0"),
    ):
        with pytest.raises(ValueError, match=words):
            products(lambda change=change: linear_policy_loss(**head, labels=labels, **given | {"mask": mask} | change))


def test_a_batch_of_gradients_is_one_for_each(impl):
    head, labels, given, mask = make()
    head = {name: x.requires_grad_() for name, x in head.items()}
    for of_mask in (mask, torch.ones_like(mask)):
        safe = torch.where(labels == -100, 1, labels)
        loss = linear_policy_loss(**head, labels=safe, **given, mask=of_mask, impl=impl)[0]
        one = torch.autograd.grad(loss, list(head.values()), retain_graph=True)
        many = torch.autograd.grad(loss, list(head.values()), torch.tensor([1.0, -2.0]), is_grads_batched=True)
        for x, y in zip(many, one, strict=True):
            torch.testing.assert_close(x, torch.stack([y, -2.0 * y]))
