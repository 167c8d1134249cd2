"""Token log-probabilities as a function in a program: views, incoming gradients, in-place, errors."""

import pytest
import torch

from bench import oracle
from ppo_kernels import token_logprobs
from tests.lib.checks import logits_and_labels as make
from tests.lib.devices import KERNELS
from tests.lib.helpers import NAN, assert_close_to_oracle, assert_raises, bit_equal, in_fresh_process, strided
from tests.lib.memory import fenced

OP = "token_logprobs"


VIEWS = {
    "shifted logits[:, :-1]": lambda x: torch.cat([x, torch.full_like(x[:, :1], NAN)], 1)[:, :-1],
    "sliced vocabulary": lambda x: torch.cat([x, torch.full_like(x[..., :3], NAN)], -1)[..., :-3],
    "off a vector boundary": lambda x: strided(x, pad=5, offset=1),
    "transposed leading dims": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "last stride not 1": lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
    "every second row": lambda x: torch.stack([x, x * NAN], 2)[:, :, 0],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("vocab", [7, 64, 1003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_change_no_bit(impl, view, vocab, dtype):
    logits, labels = make(12, vocab, dtype)
    logits, labels = logits.view(3, 4, vocab), labels.view(3, 4)
    results = []
    for form in (logits, VIEWS[view](logits)):
        leaf = form.detach().requires_grad_()
        logp, h = token_logprobs(leaf, labels, entropy=True, impl=impl)
        (logp.sum() + 0.5 * h.sum()).backward()
        results.append((logp.detach(), h.detach(), leaf.grad.contiguous()))
    assert torch.equal(form.detach(), logits)
    assert bit_equal(*results)


@pytest.mark.rest  # for sanitizers; `make test` has test_contracts_memory.py::test_every_alignment_of_base_and_rows
@pytest.mark.parametrize("lead", [1, 2, 3, 5, 8])
def test_every_alignment_of_rows_and_base(impl, lead):
    for vocab in range(60, 76):
        logits, labels = make(3, vocab, torch.bfloat16)
        plain = token_logprobs(logits, labels, impl=impl)
        assert bit_equal(plain, token_logprobs(strided(logits, pad=lead, offset=lead), labels, impl=impl))


def rows_that_end_at_a_page(impl):
    """Row 8 begins at a vector boundary, as its neighbours do not, and its last vector is the last of the memory."""
    for vocab in (512, 2048):  # whole blocks
        memory = fenced(torch.randn(8 * (vocab + 1) + vocab).bfloat16(), front=False)
        logits, labels = memory.as_strided((9, vocab), (vocab + 1, 1)), torch.arange(9)
        assert logits[8].data_ptr() % 16 == 0
        leaf = logits.detach().requires_grad_()
        for entropy in (False, True):
            want = token_logprobs(logits.contiguous(), labels, entropy=entropy, impl=impl)
            got = token_logprobs(leaf, labels, entropy=entropy, impl=impl)
            assert bit_equal(got, want)
        got[0].sum().backward()


@pytest.mark.large
@pytest.mark.parametrize("impl", KERNELS)
def test_vectors_end_with_the_row(require_impl, impl):
    require_impl(OP, impl)
    in_fresh_process(rows_that_end_at_a_page, impl)


def test_expanded_logits_and_labels(impl):
    logits, labels = make(1, 50)
    wide, many = logits.expand(4, 50), labels.expand(4)
    leaf = logits.clone().requires_grad_()
    token_logprobs(leaf.expand(4, 50), many, impl=impl).sum().backward()
    one = logits.clone().requires_grad_()
    token_logprobs(one, labels, impl=impl).sum().backward()
    assert bit_equal(token_logprobs(wide, many, impl=impl), token_logprobs(logits, labels, impl=impl).expand(4))
    torch.testing.assert_close(leaf.grad, 4 * one.grad)


GRAD_OUTPUTS = {
    "expanded": lambda g: g[:1].expand(g.shape),
    "sliced": lambda g: torch.stack([g, torch.full_like(g, NAN)], 1)[:, 0],
    "off a vector boundary": lambda g: torch.cat([torch.full_like(g[:1], NAN), g])[1:],
}


@pytest.mark.parametrize("form", GRAD_OUTPUTS)
@pytest.mark.parametrize("entropy", [False, True])
def test_strided_incoming_gradients(impl, form, entropy):
    logits, labels = make(6, 70)
    apart = GRAD_OUTPUTS[form](torch.rand(6) + 0.5)
    grads = []
    for grad_output in (apart.contiguous(), apart):
        leaf = logits.clone().requires_grad_()
        out = token_logprobs(leaf, labels, entropy=entropy, impl=impl)
        out = out if isinstance(out, tuple) else (out,)
        torch.autograd.backward(out, tuple(grad_output for _ in out))
        grads.append(leaf.grad)
    assert bit_equal(*grads)


def test_incoming_gradient_of_one_output_alone(impl):
    logits, labels = make(5, 60)
    for weights in ((1.0, 0.0), (0.0, 1.0)):
        leaf = logits.clone().requires_grad_()
        logp, h = token_logprobs(leaf, labels, entropy=True, impl=impl)
        (logp if weights[0] else h).sum().backward()
        ones = torch.ones(5)
        want = oracle.token_logprobs(logits, labels, grad_logp=ones * weights[0], grad_entropy=ones * weights[1])[2]
        assert_close_to_oracle(leaf.grad, want, ceiling=1e-6, what="gradient")


def test_entropy_modes(impl):
    logits, labels = make(5, 60)
    leaf = logits.clone().requires_grad_()
    logp = token_logprobs(leaf, labels, impl=impl)
    assert torch.is_tensor(logp)
    with_h, h = token_logprobs(leaf, labels, entropy=True, impl=impl)
    detached, metric = token_logprobs(leaf, labels, entropy="detached", impl=impl)
    assert bit_equal((logp, h), (with_h, metric))
    assert bit_equal(logp, detached)
    assert h.requires_grad
    assert detached.requires_grad
    assert not metric.requires_grad


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("entropy", [False, True, "detached"])
def test_inplace_backward_writes_the_gradient_over_the_logits(require_impl, impl, dtype, entropy):
    require_impl(OP, impl)
    values, labels = make(5, 70, dtype)
    labels[2] = -100
    results = []
    for inplace in (False, True):
        leaf = values.clone().requires_grad_()
        logits = leaf * 1
        version = logits._version
        out = token_logprobs(logits, labels, entropy=entropy, inplace_backward=inplace, impl=impl)
        assert torch.equal(logits, values), "the forward writes nothing"
        torch.autograd.backward([x.sum() for x in (out if entropy else (out,)) if x.requires_grad])
        results.append(leaf.grad)
        assert (logits._version > version) == inplace
        assert bit_equal(logits.detach(), leaf.grad if inplace else values)
    assert bit_equal(*results)


@pytest.mark.parametrize("impl", KERNELS)
def test_inplace_backward_stays_inside_a_view(require_impl, impl):
    require_impl(OP, impl)
    whole = torch.randn(3, 5, 20)
    leaf = whole.clone().requires_grad_()
    full = leaf * 1
    logits, labels = full[:, :-1, :17], torch.randint(0, 17, (3, 4))
    token_logprobs(logits, labels, inplace_backward=True, impl=impl).sum().backward()
    want = oracle.token_logprobs(whole[:, :-1, :17], labels)[2]
    assert_close_to_oracle(full.detach()[:, :-1, :17].contiguous(), want, ceiling=1e-6)
    assert torch.equal(full.detach()[:, -1], whole[:, -1])
    assert torch.equal(full.detach()[..., 17:], whole[..., 17:])
    assert not leaf.grad[:, -1].any()


@pytest.mark.parametrize("impl", KERNELS)
def test_whoever_needs_overwritten_logits_is_told(require_impl, impl):
    require_impl(OP, impl)
    values, labels = make(4, 30)
    logits = values.clone().requires_grad_() * 1
    other = (logits * logits).sum()
    logp = token_logprobs(logits, labels, inplace_backward=True, impl=impl)
    logp.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace operation"):
        other.backward()
    with pytest.raises(RuntimeError, match="overwritten the logits in a first backward"):
        logp.sum().backward()


def test_inplace_backward_is_refused_where_it_would_destroy_something(impl):
    values, labels = make(4, 30)
    leaf = values.clone().requires_grad_()
    call = {"inplace_backward": True, "impl": impl}
    assert_raises(ValueError, lambda: token_logprobs(leaf, labels, **call), "inplace_backward", "leaf")
    wide = (leaf * 1)[:1].expand(4, 30)
    assert_raises(ValueError, lambda: token_logprobs(wide, labels, **call), "inplace_backward", "expanded")
    if impl != "torch":
        logp = token_logprobs(leaf * 1, labels, **call)
        grads = torch.ones(2, *logp.shape)
        batch = lambda: torch.autograd.grad(logp, leaf, grads, is_grads_batched=True)  # noqa: E731
        assert_raises(RuntimeError, batch, "token_logprobs: inplace_backward=True", "asks for several")
    token_logprobs(values, labels, **call)
    with torch.no_grad():
        token_logprobs(leaf * 1, labels, **call)
    assert torch.equal(leaf.detach(), values)


@pytest.mark.parametrize("bad", [-1, 30, 2**40, -101])
def test_validate_names_a_bad_label(impl, bad):
    logits, labels = make(4, 30)
    labels[2] = bad
    call = {"validate": True, "impl": impl}
    assert_raises(ValueError, lambda: token_logprobs(logits, labels, **call), "labels", str(bad), "30", "-100")
    assert token_logprobs(logits, labels, mask=torch.tensor([1, 1, 0, 1]), **call).isfinite().all()
    assert token_logprobs(logits, labels, ignore_index=bad, **call).isfinite().all()
    assert_raises(
        ValueError,
        lambda: token_logprobs(logits, torch.ones_like(labels), temperature=-torch.ones(4), **call),
        "temperature",
    )


LABELS = torch.zeros(3, dtype=torch.int64)
WRONG = [
    ({"logits": torch.ones(3, 4, dtype=torch.int64)}, TypeError, ("logits", "bfloat16", "int64")),
    ({"logits": [[1.0]]}, TypeError, ("logits", "Tensor", "list")),
    ({"logits": torch.tensor(1.0)}, ValueError, ("logits", "[..., V]", "()")),
    ({"logits": torch.ones(3, 0)}, ValueError, ("logits", "V >= 1", "(3, 0)")),
    ({"labels": torch.zeros(4, dtype=torch.int64)}, ValueError, ("labels", "(3,)", "(4,)")),
    ({"labels": torch.zeros(1, 3, dtype=torch.int64)}, ValueError, ("labels", "(3,)", "(1, 3)")),
    ({"labels": torch.zeros(3)}, TypeError, ("labels", "int64", "float32")),
    ({"labels": torch.zeros(3, dtype=torch.uint8)}, TypeError, ("labels", "int64", "uint8")),
    ({"labels": torch.zeros(3, dtype=torch.int64, device="meta")}, ValueError, ("labels", "meta", "cpu")),
    ({"temperature": 0.0}, ValueError, ("temperature", "> 0", "0.0")),
    ({"temperature": -1}, ValueError, ("temperature", "> 0", "-1")),
    ({"temperature": NAN}, ValueError, ("temperature", "nan")),
    ({"temperature": None}, TypeError, ("temperature", "number", "NoneType")),
    ({"temperature": torch.ones(2)}, ValueError, ("temperature", "(3,)", "(2,)")),
    ({"temperature": torch.ones(3, dtype=torch.int64)}, TypeError, ("temperature", "int64")),
    ({"mask": torch.ones(4)}, ValueError, ("mask", "(3,)", "(4,)")),
    ({"mask": torch.ones(3, dtype=torch.complex64)}, TypeError, ("mask", "complex64")),
    ({"ignore_index": 1.5}, TypeError, ("ignore_index", "int", "float")),
    ({"entropy": "yes"}, ValueError, ("entropy", "detached", "yes")),
    ({"impl": "CUDA"}, ValueError, ("CUDA", "cpu", "auto")),
    ({"impl": "nonsense"}, ValueError, ("nonsense", "torch")),
]


@pytest.mark.parametrize(("change", "error", "mentions"), WRONG)
def test_wrong_arguments_are_named(impl, change, error, mentions):
    arguments = {"logits": torch.randn(3, 4), "labels": LABELS, "impl": impl} | change
    assert_raises(
        error, lambda: token_logprobs(arguments.pop("logits"), arguments.pop("labels"), **arguments), *mentions
    )
