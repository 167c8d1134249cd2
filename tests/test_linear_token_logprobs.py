"""Log-probabilities from hidden states: values, gradients, tiles, what enters a product, and memory."""

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from bench import oracle
from bench.cases.linear_token_logprobs import OPTIONS as OPTIONS_OF_THE_CASE
from bench.cases.linear_token_logprobs import accurate_eager
from bench.measure import peak_extra
from ppo_kernels import linear_token_logprobs, token_logprobs
from ppo_kernels.backends import op
from tests.lib.helpers import INF, NAN, assert_close_to_oracle, bit_equal

OP = "linear_token_logprobs"
VOCAB = 600  # in the smallest tiles four slabs of 150 columns
SMALLEST = 0.004  # MiB: two or three rows and the fewest columns at a time
NAMES = ("hidden", "weight", "bias")


def make(rows=5, width=12, vocab=VOCAB, dtype=torch.float32, scale=1.0, seed=0):
    """Labels include the first and last column and both sides of the edge between two slabs."""
    g = torch.Generator().manual_seed(seed)
    x = {"hidden": torch.randn(rows, width, generator=g) * scale, "weight": torch.randn(vocab, width, generator=g)}
    x |= {"bias": torch.randn(vocab, generator=g)}
    labels = torch.randint(vocab, (rows,), generator=g)
    edges = [edge for edge in (vocab - 1, 0, 149, 150) if edge < vocab][:rows]
    labels[: len(edges)] = torch.tensor(edges)
    return {name: t.to(dtype) for name, t in x.items()}, labels


def run(impl, tensors, labels, grads, **options):
    """Outputs, and the gradients of all inputs."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    out = linear_token_logprobs(**leaves, labels=labels, impl=impl, **options)
    out = out if isinstance(out, tuple) else (out,)
    torch.autograd.backward(out, [g.to(x.dtype) for g, x in zip(grads, out, strict=False)])
    return (*(x.detach() for x in out), *(leaves[name].grad for name in NAMES if name in leaves))


def check(impl, tensors, labels, **options):
    """Against the oracle, gradients within twice what rounding costs code that has all logits in float32."""
    grads = [torch.randn(labels.shape, dtype=torch.float64) for _ in range(2)]
    found = run(impl, tensors, labels, grads, entropy=True, **options)
    known = {name: x for name, x in options.items() if name not in ("memory_mib", "save_logits", "logits_dtype")}
    logp, h, *want = oracle.linear_token_logprobs(
        **tensors, labels=labels, grad_logp=grads[0], grad_entropy=grads[1], **known
    )
    double = found[0].dtype == torch.float64
    assert_close_to_oracle(found[0], logp, ceiling=1e-11 if double else 2e-5, what="logp")
    assert_close_to_oracle(found[1], h, ceiling=1e-11 if double else 2e-5, what="entropy")
    eager = run("torch", {name: x.float() for name, x in tensors.items()}, labels, grads, entropy=True, **known)
    bases = (None,) * 3 if double else eager[2:]
    for got, truth, base, name in zip(found[2:], (want[2], want[1], want[0]), bases, NAMES, strict=True):
        assert got.dtype == tensors[name].dtype
        assert got.shape == tensors[name].shape
        assert_close_to_oracle(got, truth, eager=base, what=f"gradient of {name}")
    return found


OPTIONS = (
    {},
    {"softcap": 3.0, "logit_scale": 0.7},
    {"temperature": 0.6, "logit_scale": 1.7},
    {"temperature": torch.tensor([0.5, 2.0, 1.0, 0.8, 1.3]), "softcap": 5.0},
    {"mask": torch.tensor([True, False, True, True, True]), "save_logits": True, "softcap": 4.0},
)


@pytest.mark.parametrize("memory_mib", [None, 0.01])  # of few columns; few rows too are for float64, as torch sums
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
def test_matches_the_oracle(impl, options, memory_mib):
    check(impl, *make(), memory_mib=memory_mib, **options)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
def test_the_smallest_tiles_match_the_oracle_in_float64(impl, options):
    check(impl, *make(dtype=torch.float64), memory_mib=SMALLEST, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_mib", [None, SMALLEST])
def test_other_dtypes(impl, dtype, memory_mib):
    check(impl, *make(dtype=dtype), memory_mib=memory_mib, softcap=6.0)


@pytest.mark.parametrize("vocab", [1, 2, 255, 256, 257, 511, 513, 1025])
def test_edges_of_tiles(require_impl, vocab):
    require_impl(OP, "cpu")
    for rows in (1, 3):
        for memory in (SMALLEST, 0.02):
            check("cpu", *make(rows, vocab=vocab, dtype=torch.float64), memory_mib=memory)


def test_every_tiling_gives_the_same_numbers(require_impl):
    """Whichever column the label is in."""
    require_impl(OP, "cpu")
    tensors, _ = make(7)
    grads = [torch.randn(7) for _ in range(2)]
    for first in range(0, VOCAB, 7):
        labels = (first + torch.arange(7)) % VOCAB
        whole = run("cpu", tensors, labels, grads, entropy=True)
        for memory in (SMALLEST, 0.01) if first % 49 == 0 else (SMALLEST,):
            for got, want in zip(
                run("cpu", tensors, labels, grads, entropy=True, memory_mib=memory), whole, strict=True
            ):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("impl", ["cpu", "torch"])
def test_the_ceiling_at_64_nats(require_impl, impl):
    """And p near 1, in tiles: what is beyond the maximum is all that the sum says."""
    require_impl(OP, impl)
    width, vocab = 16, 50257
    weight = torch.randn(vocab, width)
    hidden = torch.randn(4, width)
    hidden *= 64 / (hidden @ weight.t()).abs().amax(1, keepdim=True)
    labels = torch.tensor([int((hidden[0] @ weight.t()).argmax()), 5, 40000, vocab - 1])
    for memory in (None, 1.0):
        options = {} if impl == "torch" else {"memory_mib": memory}
        logp = linear_token_logprobs(hidden, weight, labels, impl=impl, **options)
        want, *_ = oracle.linear_token_logprobs(hidden, weight, labels)
        assert_close_to_oracle(logp, want, ceiling=2e-5, what="logp")
    if impl == "torch":
        return
    weight[7] = hidden[0] / hidden[0].square().sum() * 100
    logp = linear_token_logprobs(hidden[:1], weight, torch.tensor([7]), impl=impl, **options)
    want, *_ = oracle.linear_token_logprobs(hidden[:1], weight, torch.tensor([7]))
    assert -1e-12 < float(want[0]) < 0.0
    assert_close_to_oracle(logp, want, ceiling=1e-4 * abs(float(want[0])), what="logp near 0")


def test_a_slab_without_a_logit_and_labels_of_no_column(impl):
    """-inf over all columns of a slab leaves the others a distribution; what is no distribution is NaN in its row."""
    tensors, labels = make(4)
    tensors["bias"][150:320] = -INF
    labels[3] = 200
    grads = [torch.ones(4), torch.ones(4)]
    for memory in (None, SMALLEST):
        logp, h, of_hidden, *_ = run(impl, tensors, labels, grads, entropy=True, memory_mib=memory)
        z = tensors["hidden"] @ tensors["weight"].t() + tensors["bias"]
        want, want_h = token_logprobs(z, labels, entropy=True, impl="torch")
        torch.testing.assert_close(logp, want, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(h, want_h, atol=1e-5, rtol=1e-5)
        assert logp[3] == -INF
        bad = labels.clone()
        bad[0], bad[1] = VOCAB, -7
        tensors["hidden"][2, 0] = NAN
        logp, h, of_hidden, *_ = run(impl, tensors, bad, grads, entropy=True, memory_mib=memory)
        assert logp.isnan().tolist() == h.isnan().tolist() == [True, True, True, False]
        assert of_hidden.isnan().any(1).tolist() == [True, True, True, False]
        tensors["hidden"][2, 0] = 0.5


def test_what_is_masked_reaches_nothing(impl):
    tensors, labels = make(5)
    mask = torch.tensor([1, 0, 1, 0, 1])
    labels[4] = -100
    tensors["hidden"][mask == 0] = NAN
    tensors["hidden"][4] = INF
    found = run(impl, tensors, labels, [torch.ones(5)] * 2, mask=mask, entropy=True, memory_mib=SMALLEST)
    for x in found:
        assert torch.isfinite(x).all()
    for x in found[:3]:
        assert not x[[1, 3, 4]].any()
    tensors["hidden"][[1, 3, 4]] = 0.0
    assert bit_equal(
        found, run(impl, tensors, labels, [torch.ones(5)] * 2, mask=mask, entropy=True, memory_mib=SMALLEST)
    )


def products(call):
    """The shapes of the operands of every matrix product in a call."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        call()
    shapes = []
    for event in found.events():
        if event.name in ("aten::mm", "aten::addmm"):
            shapes.append(tuple(map(tuple, event.input_shapes[event.name == "aten::addmm" :][:2])))
    return shapes


@pytest.mark.parametrize("frozen", [(), ("hidden",), ("weight",), ("hidden", "weight"), ("bias",)])
@pytest.mark.parametrize("save_logits", [False, True])
def test_products_are_of_the_rows_that_count_and_of_what_needs_a_gradient(require_impl, frozen, save_logits):
    require_impl(OP, "cpu")
    tensors, labels = make(6, width=8)
    mask, h, v = torch.tensor([1, 1, 0, 1, 0, 1]), 8, VOCAB
    leaves = {name: x.requires_grad_(name not in frozen) for name, x in tensors.items()}

    def call():
        logp = linear_token_logprobs(**leaves, labels=labels, mask=mask, save_logits=save_logits, impl="cpu")
        logp.sum().backward()

    logits, of_hidden, of_weight = ((4, h), (h, v)), ((4, v), (v, h)), ((v, 4), (4, h))
    wanted = [logits] * (1 if save_logits else 2) + [of_hidden] * ("hidden" not in frozen)
    assert sorted(products(call)) == sorted(wanted + [of_weight] * ("weight" not in frozen))
    for name, x in leaves.items():
        assert (x.grad is None) == (name in frozen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_of_the_weight_is_added_up_in_float32(require_impl, dtype):
    require_impl(OP, "cpu")
    tensors, labels = make(400, width=4, vocab=40, dtype=dtype)
    wide = tensors | {"weight": tensors["weight"].float()}
    for memory in (SMALLEST, 0.01, None):  # of many blocks of rows, each of which adds to it
        low, full = (run("cpu", x, labels, [torch.ones(400)], memory_mib=memory)[2] for x in (tensors, wide))
        half_a_unit = torch.maximum(full.abs(), torch.tensor(torch.finfo(dtype).smallest_normal))
        assert ((low.float() - full).abs() <= half_a_unit * torch.finfo(dtype).eps / 2 * 1.01).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_mib", [2, 8])
def test_memory_is_what_was_allowed(require_impl, dtype, memory_mib):
    require_impl(OP, "cpu")
    rows, width, vocab = 512, 64, 20000
    tensors, labels = make(rows, width, vocab, dtype=dtype)
    leaves = [tensors[name].requires_grad_() for name in ("hidden", "weight")]
    mib, few = 2**20, 64 * 1024  # beside tiles there are some numbers for each row
    for more in ({}, {"softcap": 5.0}, {"mask": torch.rand(rows) < 0.9}):
        call = lambda more=more: linear_token_logprobs(*leaves, labels, memory_mib=memory_mib, impl="cpu", **more)  # noqa: E731
        with torch.no_grad():
            assert peak_extra(call) <= memory_mib * mib + few
        gradients = sum(x.nbytes for x in leaves) + rows * width * 4
        both = peak_extra(lambda call=call: torch.autograd.grad(call().sum(), leaves))
        assert both <= memory_mib * mib + gradients + few
    assert rows * vocab * 4 > 4 * memory_mib * mib


def test_tiles_in_half_precision(require_impl):
    """They round the logits, and only the logits."""
    require_impl(OP, "cpu")
    tensors, labels = make(6, dtype=torch.bfloat16)
    grads = [torch.ones(6)]
    low = run("cpu", tensors, labels, grads, logits_dtype=torch.bfloat16, memory_mib=SMALLEST)
    full = run("cpu", tensors, labels, grads, logits_dtype=torch.float32, memory_mib=SMALLEST)
    for got, want in zip(low, full, strict=True):
        assert got.dtype == want.dtype
        assert 0 < float((got - want).abs().max()) <= 0.06 * float(want.abs().max())


def test_layouts(impl):
    """[B, T, H], rows that no one stride leads along, incoming gradients with strides, no rows at all."""
    tensors, labels = make(6)
    grads = [torch.randn(6)]
    want = run(impl, tensors, labels, grads)
    wide = torch.full((2, 4, 24), NAN)
    wide[:, 1:, ::2] = tensors["hidden"].view(2, 3, 12)
    wider = torch.full((VOCAB, 15), NAN)
    wider[:, :12] = tensors["weight"]
    views = tensors | {"hidden": wide[:, 1:, ::2], "weight": wider[:, :12]}
    got = run(impl, views, labels.int().view(2, 3), [grads[0].view(2, 3).t().contiguous().t()])
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.reshape(y.shape), y, atol=1e-5, rtol=1e-5)
    expanded = run(impl, tensors, labels, [torch.ones(1).expand(6)])
    for x, y in zip(expanded, run(impl, tensors, labels, [torch.ones(6)]), strict=True):
        assert bit_equal(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_row_that_counts_all_is_zero(impl, dtype):
    """A micro-batch of nothing but padding. Memory that nobody has written is NaN meanwhile."""
    tensors, labels = make(6, dtype=dtype)
    torch.use_deterministic_algorithms(True)
    try:
        for nothing in (
            run(impl, tensors, labels, [torch.randn(6)], mask=torch.zeros(6)),
            run(impl, tensors, labels, [torch.randn(6)], mask=torch.zeros(6), save_logits=True),
            run(impl, tensors | {"hidden": tensors["hidden"][:0]}, labels[:0], [torch.zeros(0)]),
        ):
            assert not any(x.any() for x in nothing)
    finally:
        torch.use_deterministic_algorithms(False)


def test_shapes_alone(impl):
    """Meta tensors, under an autocast too."""
    tensors, labels = make(6)
    meta = {name: x.to("meta") for name, x in tensors.items()}
    found = run("auto", meta, labels.to("meta"), [torch.zeros(6, device="meta")], softcap=3.0)
    for got, want in zip(found, run(impl, tensors, labels, [torch.zeros(6)], softcap=3.0), strict=True):
        assert (got.shape, got.dtype, got.device.type) == (want.shape, want.dtype, "meta")


def test_a_label_that_does_not_count_may_be_beyond_the_dtype_of_labels(impl):
    tensors, labels = make(6)
    for ignore_index in (2**32 + int(labels[0]), np.int64(2**40)):
        got, want = (
            run(impl, tensors, y, [torch.ones(6)], ignore_index=i, validate=True)
            for y, i in ((labels.int(), ignore_index), (labels, -100))
        )
        assert all(bit_equal(x, y) for x, y in zip(got, want, strict=True))


def test_tied_weights_checkpoints_and_autocast(require_impl):
    require_impl(OP, "cpu")
    table = torch.randn(VOCAB, 8, requires_grad=True)
    tokens, labels = torch.randint(VOCAB, (2, 5)), torch.randint(VOCAB, (2, 5))

    def loss(impl, wrap=lambda f, *x: f(*x), weight=table):
        hidden = torch.tanh(weight[tokens])
        return wrap(lambda x, w: linear_token_logprobs(x, w, labels, impl=impl), hidden, weight).sum()

    want = torch.autograd.grad(loss("torch"), table)[0]
    again = lambda f, *x: checkpoint(f, *x, use_reentrant=False)  # noqa: E731
    for value in (loss("cpu"), loss("cpu", again)):
        torch.testing.assert_close(torch.autograd.grad(value, table)[0], want, atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss("cpu")
    torch.testing.assert_close(torch.autograd.grad(value, table)[0], want, atol=1e-5, rtol=1e-5)
    # A model under autocast: hidden in half precision, the head in float32.
    hidden = torch.tanh(table.detach()[tokens]).bfloat16()
    got = linear_token_logprobs(hidden, table.detach(), labels, impl="cpu")
    torch.testing.assert_close(got, linear_token_logprobs(hidden.float(), table.detach(), labels, impl="torch"))


def test_opcheck(require_impl):
    require_impl(OP, "cpu")
    tensors, labels = make(3, width=4, vocab=20)
    hidden, weight, bias = tensors.values()
    for kept in (False, True):
        mask = None if kept else torch.tensor([True, False, True])  # what is not kept is not written
        support = torch.tensor([[1, 2, -1], [3, 4, 5], [6, 7, 8]]) if kept else None
        inputs = (hidden, weight, bias, labels, mask, torch.ones(3).double(), support)
        options = (1.0, 4.0, 0.5, -100, None, 2**20, 0, "")
        args = (*inputs, *options, True, kept, 2 * kept, "cpu")
        assert set(torch.library.opcheck(op(OP).kernel("cpu"), args).values()) == {"SUCCESS"}
        saved = op(OP).kernel("cpu")(*args)[:3]
        grads = (torch.ones(3), torch.ones(3))
        args = (*inputs, *options, *saved, *grads, True, kept, True, "cpu")
        assert set(torch.library.opcheck(op(f"{OP}_backward").kernel("cpu"), args).values()) == {"SUCCESS"}


REFUSED = (
    ({"weight": torch.zeros(0)}, "ZeRO-3"),
    ({"weight": torch.zeros(7, 5)}, "hidden must be [..., H] and weight [V, H]"),
    ({"labels": torch.zeros(2, dtype=torch.int64)}, "labels must have the shape of hidden without H (3,)"),
    ({"bias": torch.zeros(3)}, "bias must have the shape of [V] (7,)"),
    ({"softcap": -1.0}, "softcap must be > 0.0"),
    ({"logit_scale": 0.0}, "logit_scale must be > 0.0"),
    ({"memory_mib": 0}, "memory_mib must be > 0.0"),
    ({"logits_dtype": torch.bfloat16}, "logits_dtype must be None, torch.float32"),
    ({"entropy": "yes"}, 'entropy must be False, True or "detached"'),
    ({"labels": torch.tensor([0, 7, 1]), "validate": True}, "labels must be in [0, 7)"),
    ({"temperature": torch.tensor([1.0, 0.0, 1.0]), "validate": True}, "every temperature must be > 0"),
)


@pytest.mark.parametrize(("change", "words"), REFUSED)
def test_errors_say_what_is_allowed(change, words):
    given = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(7, 4), "labels": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        linear_token_logprobs(**given | change)
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"{OP}: ")


def test_the_eager_code_of_the_accuracy_table_is_the_reference():
    tensors, labels = make(4)
    found = accurate_eager(**tensors, labels=labels)
    want = linear_token_logprobs(**tensors, labels=labels, **OPTIONS_OF_THE_CASE, entropy=True, impl="torch")
    for x, y in zip(found, want, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)
