"""Several labels per row of token_logprobs: one pass, gradients of a row summed before they are rounded."""

import pytest
import torch

from bench import oracle
from ppo_kernels import token_logprobs
from tests.lib.checks import check_token_logprobs as check
from tests.lib.devices import KERNELS
from tests.lib.helpers import INF, NAN, assert_raises, bit_equal, grad_of

OP = "token_logprobs"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


LARGE = pytest.param(1000, 130, marks=pytest.mark.large)


def make(rows, vocab, many, dtype=torch.float32, scale=3.0, seed=0):
    """Row 1 has one label alone, several times."""
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, vocab, generator=g) * scale).to(dtype)
    labels = torch.randint(0, vocab, (rows, many), generator=g)
    labels[1] = labels[1, 0]
    return logits, labels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("vocab", "many"), [(1, 3), (7, 2), (65, 64), (1025, 5), LARGE])
def test_matches_the_oracle(impl, vocab, many, dtype):
    check(impl, *make(4, vocab, many, dtype))


@pytest.mark.large
@pytest.mark.several_blocks(dtype=torch.bfloat16)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_labels_in_every_part_of_a_large_vocabulary(impl, dtype):
    logits, labels = make(2, 50257, 64, dtype)
    labels[0, :4] = torch.tensor([0, 50256, 16384, 16383])
    check(impl, logits, labels)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entropy", [False, True, "detached"])
def test_one_label_of_k_is_one_label(impl, dtype, entropy):
    """To the last bit, with all that may happen to a row."""
    logits, labels = make(7, 300, 1, dtype)
    logits[1, 5], logits[2, :], logits[3, labels[3, 0]] = NAN, -INF, -INF
    labels[4], labels[5], logits[6, labels[6, 0]] = 300, -100, 60.0
    results = []
    for y in (labels, labels[:, 0]):
        leaf = logits.clone().requires_grad_()
        out = token_logprobs(leaf, y, entropy=entropy, temperature=0.7, impl=impl)
        out = out if entropy else (out,)
        assert out[0].shape == y.shape
        torch.autograd.backward([(2 + i) * x.sum() for i, x in enumerate(out) if x.requires_grad])
        results.append((out[0].detach().view(7), *(x.detach() for x in out[1:]), leaf.grad))
    assert bit_equal(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_a_row_are_summed_before_they_are_rounded(impl, dtype):
    """Labels that another policy drew, p near 1e-3, the likeliest with weight 0; and a teacher that is the student on
    nearly all of its distribution, where what comes in for a label and what its row takes away almost cancel."""
    logits, labels = make(3, 1000, 4, dtype)
    labels[0, 3] = labels[0, 1]
    labels = labels.gather(-1, logits.gather(-1, labels).argsort(-1, descending=True))
    weights = torch.rand(labels.shape)
    weights[:, 0] = 0
    best = logits.float().topk(64, -1).indices
    p = logits.float().softmax(-1).gather(-1, best)
    for y, g in ((labels, weights), (best, p / p.sum(-1, keepdim=True))):
        got = grad_of(lambda x, y=y, g=g: (token_logprobs(x, y, impl=impl) * g).sum(), logits)[1]
        want = torch.from_numpy(oracle.token_logprobs(logits, y, grad_logp=g)[2])
        error = (got.double() - want).abs() / want.abs().clamp(min=torch.finfo(dtype).smallest_normal)
        assert error.max() <= 0.55 * torch.finfo(dtype).eps


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("gap", [17.0, 40.0])
def test_kernels_keep_the_digits_of_a_label_near_probability_one(require_impl, impl, gap):
    """Wherever among the labels it stands."""
    require_impl(OP, impl)
    logits, labels = torch.zeros(2, 33), torch.tensor([[3, 17, 5], [17, 3, 17]])
    logits[:, 17] = gap
    grad_output = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 2.0]])
    logp, grad = grad_of(lambda x: token_logprobs(x, labels, impl=impl).mul(grad_output).sum(), logits)
    logp = token_logprobs(logits, labels, impl=impl)
    want, _, want_grad = (torch.from_numpy(x) for x in oracle.token_logprobs(logits, labels, grad_logp=grad_output))
    torch.testing.assert_close(logp.double(), want, rtol=2e-6, atol=0)
    torch.testing.assert_close(grad.double(), want_grad, rtol=1e-5, atol=1e-37)


@pytest.mark.parametrize("label_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int8, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_and_ignored_labels(impl, dtype, label_dtype, mask_dtype):
    """They are masked alone; a row whose labels all are is not read."""
    logits, labels = make(6, 129, 5, dtype)
    mask = torch.rand(labels.shape) < 0.6
    mask[2], mask[5], labels[3], labels[5, ::2] = True, False, -100, -100
    labels[0, 1:3], mask[0] = -100, torch.tensor([1, 1, 1, 0, 0], dtype=torch.bool)
    labels[1, 4], mask[1, 4], mask[4, 0] = 2**20, False, True
    logits[3] = logits[5] = NAN
    logp, h, grad = check(impl, logits, labels.to(label_dtype), mask=mask.to(mask_dtype), eager=False)
    counts = mask & (labels != -100)
    assert not logp[~counts].any()
    assert not logp[~counts].signbit().any()
    assert logp[counts].all()
    for rows in (h, grad.flatten(1)):
        assert not rows[[3, 5]].any()
    assert h[[0, 1, 2, 4]].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_masked_label_gets_no_gradient_whatever_comes_in(impl, dtype):
    logits, labels = make(3, 65, 4, dtype)
    labels[0, 2], labels[2] = -100, -100
    grad_output = torch.rand(3, 4)
    dirty = torch.where(labels == -100, NAN, grad_output)
    grads = [
        torch.autograd.grad(token_logprobs(leaf, labels, impl=impl), leaf, g)[0]
        for leaf in [logits.requires_grad_()]
        for g in (grad_output, dirty)
    ]
    assert grads[0].isfinite().all()
    assert bit_equal(*grads)


def test_a_row_mask_masks_all_labels(impl):
    logits, labels = make(4, 65, 3)
    mask = torch.tensor([1, 0, 1, 0])
    torch.manual_seed(0)
    wide = check(impl, logits, labels, mask=mask[:, None].expand(4, 3), eager=False)
    logits[mask == 0] = NAN
    torch.manual_seed(0)
    assert bit_equal(check(impl, logits, labels, mask=mask, eager=False), wide)


@pytest.mark.parametrize("bad", [-1, 65, 2**31 + 3, -(2**62)])
def test_a_label_outside_the_vocabulary_leaves_the_others_their_values(impl, bad):
    logits, labels = make(3, 65, 4)
    clean = token_logprobs(logits, labels, impl=impl)
    labels[0, 2], labels[1] = bad, bad
    logp, h, grad = check(impl, logits, labels, eager=False)
    others = [0, 1, 3]
    assert logp[0, 2].isnan()
    assert bit_equal(logp[0, others], clean[0, others])
    assert bit_equal(logp[2], clean[2])
    assert logp[1].isnan().all()
    assert h.isnan().tolist() == [True, True, False]
    of_logp = grad_of(lambda x: token_logprobs(x, labels, impl=impl).sum(), logits)[1]
    for got in (grad, of_logp):
        assert got.isnan().all(-1).tolist() == got.isnan().any(-1).tolist() == [True, True, False]


@pytest.mark.parametrize("poison", ["all -inf", INF, NAN])
@pytest.mark.parametrize("at_label", [False, True])
def test_a_row_without_a_distribution_is_nan_alone(impl, poison, at_label):
    logits, labels = make(3, 65, 4)
    labels[:] = torch.tensor([5, 9, 9, 40])
    if poison == "all -inf":
        logits[1] = -INF
    else:
        logits[1, 9 if at_label else 30] = poison
    for got in check(impl, logits, labels, eager=False):
        assert got[1].isnan().all()
        assert got[[0, 2]].isfinite().all()


def test_labels_at_minus_infinity(impl):
    """Some of a row's labels, all of them, and all logits but one."""
    logits, labels = make(4, 65, 3)
    labels[:] = torch.tensor([7, 20, 7])
    logits[0, 20] = logits[1, 20] = logits[1, 7] = logits[2] = -INF
    logits[2, 20] = 1.0
    logp, h, grad = check(impl, logits, labels, eager=False)
    assert (logp == -INF).tolist() == [[False, True, False], [True] * 3, [True, False, True], [False] * 3]
    assert logp[2, 1] == 0
    assert h.isfinite().all()
    assert grad.isfinite().all()


def test_the_order_of_the_labels_changes_no_bit_of_the_forward(impl):
    logits, labels = make(4, 65, 6, torch.bfloat16)
    logits[:, 10:14] = logits.max()
    labels[:, 2:4] = torch.tensor([13, 11])
    order = torch.tensor([3, 5, 0, 2, 1, 4])
    plain, mixed = (token_logprobs(logits, y, entropy=True, impl=impl) for y in (labels, labels[:, order]))
    assert bit_equal((plain[0][:, order], plain[1]), mixed)


@pytest.mark.parametrize("temperature", [0.7, "0-d", "rows"])
@pytest.mark.parametrize("shape", [(9,), (0, 9), (2, 0, 9), (2, 3, 9), (2, 3, 2, 9)])
def test_any_leading_shape_and_temperature(impl, shape, temperature):
    logits = torch.randn(shape)
    labels = torch.randint(0, 9, (*shape[:-1], 4))
    tau = {"0-d": torch.tensor(0.7), "rows": torch.rand(shape[:-1] if logits.numel() else ()) + 0.5}
    tau = tau.get(temperature, temperature)
    logp, h, grad = check(impl, logits, labels, temperature=tau)
    assert logp.shape == labels.shape
    assert h.shape == shape[:-1]
    assert grad.shape == shape


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_and_an_overwritten_view_have_the_same_bits(require_impl, impl, dtype):
    require_impl(OP, impl)
    values, labels = make(12, 70, 5, dtype)
    whole, y = values.view(3, 4, 70), labels.view(3, 4, 5)[:, :, ::2]
    want = None
    for inplace in (False, True):
        leaf = torch.cat([whole, torch.full_like(whole[:, :1], NAN)], 1).requires_grad_()
        logits = (leaf * 1)[:, :-1]
        out = token_logprobs(logits, y, entropy=True, inplace_backward=inplace, impl=impl)
        torch.autograd.backward([x.sum() for x in out])
        got = (out[0].detach(), out[1].detach(), leaf.grad)
        want = want or got
        assert bit_equal(got, want)
        assert bit_equal(logits.detach(), leaf.grad[:, :-1]) == inplace
    flat = grad_of(lambda x: sum(r.sum() for r in token_logprobs(x, y, entropy=True, impl=impl)), whole)[1]
    assert bit_equal(want[2][:, :-1], flat)


@pytest.mark.parametrize("impl", KERNELS)
def test_compiled_and_vmapped_calls_have_the_values_of_eager_ones(require_impl, impl):
    require_impl(OP, impl)
    logits, labels = make(6, 33, 4)
    labels[2, 1] = -100
    mask = torch.rand(labels.shape) < 0.8

    def loss(x, y, m):
        logp, h = token_logprobs(x, y, mask=m, entropy=True, temperature=0.7, impl=impl)
        return (logp * torch.arange(4)).sum() + h.sum()

    want = grad_of(lambda x: loss(x, labels, mask), logits)[1]
    per_row = torch.func.vmap(torch.func.grad(loss))(logits, labels, mask)
    torch.testing.assert_close(per_row, want, rtol=0, atol=0)
    if impl != "triton":  # the interpreter cannot be traced
        compiled = grad_of(torch.compile(lambda x: loss(x, labels, mask), backend="aot_eager"), logits)[1]
        torch.testing.assert_close(compiled, want, rtol=0, atol=0)


WRONG = [
    ({"labels": torch.zeros(3, 0, dtype=torch.int64)}, ("labels", "(3,)", "K >= 1", "(3, 0)")),
    ({"labels": torch.zeros(4, 2, dtype=torch.int64)}, ("labels", "(3,)", "(4, 2)")),
    ({"labels": torch.zeros(3, 2, 2, dtype=torch.int64)}, ("labels", "(3,)", "(3, 2, 2)")),
    ({"mask": torch.ones(3, 1)}, ("mask", "(3, 2)", "(3, 1)")),
    ({"mask": torch.ones(4)}, ("mask", "(3,)", "(4,)")),
    ({"temperature": torch.ones(3, 2)}, ("temperature", "(3,)", "(3, 2)")),
]


@pytest.mark.parametrize(("change", "mentions"), WRONG)
def test_wrong_arguments_are_named(impl, change, mentions):
    arguments = {"logits": torch.randn(3, 4), "labels": torch.zeros(3, 2, dtype=torch.int64), "impl": impl} | change
    assert_raises(ValueError, lambda: token_logprobs(**arguments), *mentions)


def test_validate_names_a_bad_label(impl):
    logits, labels = make(3, 30, 2)
    labels[2, 1] = 30
    call = {"validate": True, "impl": impl}
    assert_raises(ValueError, lambda: token_logprobs(logits, labels, **call), "labels", "30", "1 are not")
    for mask in (torch.tensor([[1, 1], [1, 1], [1, 0]]), torch.tensor([1, 1, 0])):
        assert token_logprobs(logits, labels, mask=mask, **call).isfinite().all()
