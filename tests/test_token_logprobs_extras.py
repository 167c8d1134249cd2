"""What token_logprobs says beyond probabilities of the whole vocabulary: extras, and support sets."""

import pytest
import torch

from bench import oracle
from ppo_kernels import LogprobExtras, token_logprobs
from ppo_kernels.backends import op
from tests.lib.helpers import INF, NAN, assert_raises, bit_equal

OP = "token_logprobs"
BOTH = ("sum_sq_probs", "top1")
VOCAB = 300


def make(dtype=torch.float32):
    """Rows with ties, of -inf alone, with NaN, masked and ignored; and three labels of each."""
    g = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(3, 4, VOCAB, generator=g)).to(dtype)
    labels = torch.randint(VOCAB, (3, 4, 3), generator=g)
    logits[0, 0, [5, 9]] = logits[0, 0].amax() + 1
    labels[0, 0], labels[0, 1, 0] = torch.tensor([5, 9, 7]), logits[0, 1].argmax()
    logits[1, 0], logits[1, 1, 3], logits[2, 0, 100:] = -INF, NAN, -INF
    labels[1, 2], labels[2, 1] = -100, torch.tensor([VOCAB, 1, -100])
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[2, 3] = False
    logits[2, 3] = NAN
    return logits, labels, {"mask": mask, "temperature": torch.linspace(0.4, 2.0, 12).view(3, 4)}


def wanted(logits, labels, mask, temperature):
    """Eagerly in float64, row by row."""
    squares, top = torch.zeros(mask.shape, dtype=torch.float64), torch.zeros(labels.shape, dtype=torch.bool)
    for at in mask.nonzero().tolist():
        z, y, i = logits[tuple(at)].double(), labels[tuple(at)], tuple(at)
        counted = y[y != -100]
        if not len(counted):
            continue
        bad = bool((counted >= len(z)).any()) or bool((z == -INF).all())
        squares[i] = NAN if bad else (z / temperature[i]).softmax(-1).square().sum()
        top[i] = torch.tensor([0 <= k < len(z) and bool(z[k] == z.max()) and bool(z[k] > -INF) for k in y.tolist()])
    return squares, top


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_extras_match_eager_float64(impl, dtype):
    logits, labels, options = make(dtype)
    squares, top = wanted(logits, labels, **options)
    plain = token_logprobs(logits, labels, entropy=True, impl=impl, **options)
    *found, extras = token_logprobs(logits, labels, entropy=True, extras=BOTH, impl=impl, **options)
    assert bit_equal(tuple(found), plain)
    assert isinstance(extras, LogprobExtras)
    assert extras.sum_sq_probs.dtype == plain[0].dtype
    tolerance = 1e-12 if dtype == torch.float64 and impl != "triton" else 1e-5
    torch.testing.assert_close(extras.sum_sq_probs.double(), squares, rtol=tolerance, atol=0, equal_nan=True)
    assert torch.equal(extras.top1, top)
    assert top[0, 0].tolist() == [True, True, False]  # equal ones are both the top
    logp, first = token_logprobs(logits, labels[..., 0], extras=["top1"], impl=impl, **options)
    assert logp.shape == first.top1.shape
    assert torch.equal(first.top1[0], top[0, :, 0])
    assert first.sum_sq_probs is None


def supports():
    """Ids of each row: padded, with one twice, of one token, of none; as a pair too."""
    g = torch.Generator().manual_seed(1)
    ids = torch.stack([torch.randperm(VOCAB, generator=g)[:9] for _ in range(12)]).view(3, 4, 9)
    ids[0, 0, 4:], ids[0, 1, 3], ids[0, 3, 1:], ids[1, 0] = -1, ids[0, 1, 0], -1, -1
    flat, lengths = ids[ids >= 0], (ids >= 0).sum(-1).flatten()
    return ids, (flat.int(), torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]))


def make_supported():
    g = torch.Generator().manual_seed(2)
    logits, (ids, _) = torch.randn(3, 4, VOCAB, generator=g), supports()
    labels = torch.stack([ids[..., 0], ids[..., 2], ids[..., 0]], -1)
    labels[1, 3, 1], labels[2, 0] = -100, -100
    allowed = torch.zeros(3, 4, VOCAB + 1, dtype=torch.bool).scatter(-1, ids % (VOCAB + 1), True)[..., :VOCAB]
    return logits, labels, allowed


@pytest.mark.parametrize("csr", [False, True])
@pytest.mark.parametrize("many", [False, True])
def test_a_support_is_minus_infinity_elsewhere(impl, csr, many):
    logits, labels, allowed = make_supported()
    labels = labels if many else labels[..., 0].clone()
    mask = torch.ones(labels.shape if many else (3, 4))
    mask[2, 2] = 0
    temperature = torch.linspace(0.4, 2.0, 12).view(3, 4)
    grads = torch.randn(labels.shape), torch.randn(3, 4)
    options = {"mask": mask, "temperature": temperature, "entropy": True, "extras": BOTH}
    got, want = [], []
    for found, more, implementation in ((got, {"support": supports()[csr]}, impl), (want, {}, "torch")):
        leaf = logits.clone().requires_grad_()
        z = leaf if more else torch.where(allowed, leaf, -INF)
        *out, extras = token_logprobs(z, labels, impl=implementation, **options, **more)
        found += [*(x.detach() for x in out), extras.sum_sq_probs, extras.top1]
        found += torch.autograd.grad(out, leaf, grads)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert got[0][1, 0].isnan().all()  # without a support
    ids = supports()[0]
    outside = torch.where(labels == -100, -100, (ids.amax(-1) + 1) % VOCAB if not many else labels)
    if not many:
        found = token_logprobs(logits, outside, support=ids, entropy=True, impl=impl)
        assert all(x.isnan().sum() == (outside != -100).sum() for x in found)


def test_supports_are_accurate_and_may_hold_the_whole_vocabulary(require_impl):
    require_impl(OP, "cpu")
    logits, labels = torch.randn(4, 64) * 4, torch.tensor([0, 63, 5, 6])
    every = torch.arange(64).flip(0).expand(4, 64)
    found = token_logprobs(logits, labels, support=every, entropy=True)
    truth = oracle.token_logprobs(logits, labels, grad_logp=torch.ones(4), grad_entropy=torch.ones(4))
    torch.testing.assert_close(found[0].double(), torch.as_tensor(truth[0]).double(), atol=2e-6, rtol=0)
    half = logits.bfloat16().requires_grad_()  # a gradient in half precision has one value for each id, rounded once
    (got,) = torch.autograd.grad(token_logprobs(half, labels, support=every).sum(), half)
    (want,) = torch.autograd.grad(token_logprobs(half, labels).sum(), half)
    torch.testing.assert_close(got, want, rtol=8e-3, atol=1e-6)
    none = token_logprobs(logits, labels, support=every[:, :0])
    assert none.isnan().all()


def test_ids_of_no_token_are_padding_and_ignored_labels_may_be_tokens(impl):
    logits, labels = torch.randn(2, 20), torch.tensor([0, 3])
    ids = torch.tensor([[0, 3, 20], [3, 2**40, -7]])
    want = token_logprobs(logits, labels, support=torch.tensor([[0, 3], [3, -1]]), ignore_index=0, impl=impl)
    assert bit_equal(token_logprobs(logits, labels, support=ids, ignore_index=0, impl=impl), want)
    assert want.tolist() == [0.0, 0.0]


def test_a_label_of_no_column_is_nan_whatever_its_support_says(impl):
    logits = torch.randn(2, 7, requires_grad=True)
    logp, entropy = token_logprobs(
        logits, torch.tensor([9, 1]), support=torch.tensor([[9, 2, 3], [1, 2, -1]]), entropy=True, impl=impl
    )
    assert logp.isnan().tolist() == entropy.isnan().tolist() == [True, False]
    (grad,) = torch.autograd.grad(logp.sum(), logits)
    assert grad.isnan().any(-1).tolist() == [True, False]


def test_graphs_and_transforms(require_impl):
    require_impl(OP, "cpu")
    logits, labels, _ = make_supported()
    ids = supports()[0]
    logits, labels, ids = logits[2:], labels[2:, :, 0], ids[2:]

    def call(z):
        return token_logprobs(z, labels, support=ids, extras=BOTH, temperature=0.7)

    leaf = logits.clone().requires_grad_()
    want, extras = call(leaf)
    got, beside = torch.compile(call, backend="aot_eager", fullgraph=True)(leaf)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(tuple(beside), tuple(extras))
    (gradient,) = torch.autograd.grad(want.sum(), leaf)
    torch.testing.assert_close(torch.autograd.grad(got.sum(), leaf)[0], gradient)
    torch.testing.assert_close(torch.func.grad(lambda z: call(z)[0].sum())(logits), gradient)
    batch = torch.func.vmap(lambda z: call(z)[0])(torch.stack([logits, logits]))
    torch.testing.assert_close(batch[1], want.detach())


def test_opcheck(require_impl):
    require_impl(OP, "cpu")
    logits, labels, options = make()
    logits = logits.nan_to_num(0.0, neginf=-3.0)
    labels = labels.clamp(max=VOCAB - 1)
    args = (logits, labels, options["mask"], options["temperature"].double(), 1.0, -100, True, 0, "", "cpu")
    kinds = ("test_schema", "test_faketensor", "test_autograd_registration")
    result = torch.library.opcheck(op("token_logprobs_extras").kernel("cpu"), args, test_utils=kinds)
    assert set(result.values()) == {"SUCCESS"}


def test_errors_say_what_is_allowed():
    logits, labels, ids = torch.randn(2, 9), torch.tensor([1, 2]), torch.tensor([[1, 2], [1, 3]])
    for more, kind, words in (
        ({"extras": "top1"}, ValueError, "extras must be a tuple of names out of ('sum_sq_probs', 'top1'), got 'top1'"),
        ({"extras": ("top2",)}, ValueError, "extras must be"),
        ({"support": ids.float()}, TypeError, "support must be int32 or int64"),
        ({"support": ids[0]}, ValueError, "support must be ids [..., S], padded with -1, for the rows (2,)"),
        ({"support": (ids[0], ids[0])}, ValueError, "needs R = 2 rows; got (2,) and (2,)"),
        *(
            ({"support": (ids[0], torch.tensor(x)), "validate": True}, ValueError, "must rise from 0 to 2")
            for x in ([0, 1, 9], [0, 2, 1], [1, 1, 2])
        ),
        ({"support": ids, "validate": True}, ValueError, "every label must be in the support of its row; 1 are not"),
    ):
        assert_raises(kind, lambda more=more: token_logprobs(logits, labels, **more), "token_logprobs: ", words)
