"""The registered ops refuse by themselves what compiled graphs and C++ callers can hand over, in one sentence."""

import functools

import pytest
import torch
from torch.autograd import forward_ad

import ppo_kernels as pk
from ppo_kernels._registered import arguments
from ppo_kernels._schemas import SCHEMAS
from tests.lib import cases, recorded
from tests.lib.devices import KERNELS, ON_CPU, registered
from tests.lib.helpers import bit_equal

pytestmark = pytest.mark.host

#: How many values a code has. Whole numbers of the schemas that are no codes: another is one, and needs its count here.
CODES = {"masked_steps": 3, "kl_estimator": 4, "variant": 2, "surrogate": 5, "level": 4, "reject": 4, "reject_level": 4}
CODES |= {"group_advantages.mode": 5, "importance_weights.mode": 3, "importance_weights.level": 3}
NO_CODES = ("ignore_index", "group_size")
CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


@pytest.fixture(params=KERNELS)
def impl(request, require_impl):
    return require_impl("gae", request.param)


@functools.cache
def samples():
    return recorded.samples(torch.float32, "cpu")


def calls():
    """Every sample of every op: its name, its arguments by their names, and how to call it."""
    for op, kinds in samples().items():
        names = [argument.split()[-1] for argument in arguments(SCHEMAS[op])]
        for args in kinds:
            yield op, dict(zip(names, args, strict=True))


def kernel(op, impl):
    return pk.backends.op(op).kernel(impl)


def others(args):
    """The tensors but the first, which says what the others must be."""
    tensors = [name for name, x in args.items() if torch.is_tensor(x)][1:]
    return [name for name in tensors if name != "entropy" or args.get("grad_entropy") is not None]  # else not read


def sentence(call, args):
    """What the call is refused with."""
    with pytest.raises(RuntimeError) as caught:
        call(*args.values())
    text = str(caught.value)
    assert "\n" not in text
    return text


def of_another_shape(x):
    return x[None] if x.dim() != 2 or 1 in x.shape or x.size(0) == x.size(1) else x.reshape(x.size(1), x.size(0))


def test_another_shape_of_as_many_elements_is_refused(impl):
    for op, args in calls():
        for name in others(args):
            text = sentence(kernel(op, impl), args | {name: of_another_shape(args[name])})
            assert text.startswith(f"{op}: "), text
            assert name in text, text


def test_another_dtype_is_refused(impl):
    for op, args in calls():
        for name in others(args):
            x = args[name]
            text = sentence(kernel(op, impl), args | {name: x.half() if x.is_floating_point() else x.to(torch.int16)})
            assert text.startswith(f"{op}: {name} must be "), text
            assert "16" in text, text


def test_a_code_that_stands_for_nothing_is_refused(impl):
    for op, args in calls():
        kinds = (argument.split()[:2] for argument in arguments(SCHEMAS[op]))
        for name in (name for kind, name in kinds if kind == "int" and name not in NO_CODES):
            count = CODES.get(f"{op}.{name}") or CODES[name]
            for code in (-1, count, 99, 2**62, -(2**63)):
                text = sentence(kernel(op, impl), args | {name: code})
                assert text == f"{op}: {name} must be from 0 to {count - 1}, got {code}"


def test_a_meta_tensor_among_others_is_refused(require_impl):
    """It sends the call to the op's fake: memory that nobody wrote would come back."""
    for impl in ("cpu", "triton"):
        require_impl("gae", impl)
        for op, args in calls():
            for name in others(args):
                text = sentence(kernel(op, impl), args | {name: args[name].to("meta")})
                first = next(iter(args))
                assert text == f"{op}: {name} is on meta and must be on cpu, as {first} is on cpu"


@pytest.mark.parametrize("impl", ON_CPU)
def test_kernels_check_the_device_of_every_tensor(require_impl, impl):
    """Here no other device has memory; what the dispatcher sends elsewhere is handed to the kernel itself."""
    require_impl("gae", impl)
    for op, args in calls():
        for name in others(args):
            call = functools.partial(registered(op, impl).redispatch, CPU)
            text, place = sentence(call, args | {name: args[name].to("meta")}), list(args).index(name) + 1
            assert text.startswith((f"{op}: {name} is on meta", f"{op}: argument {place} is on another device")), text


def test_traced_ops_check_the_device_and_their_numbers(require_impl):
    for impl in ("cpu", "triton"):
        require_impl("gae", impl)
        for op, args in calls():
            traced, given = pk.backends.op(op).traceable(impl, tuple(args.values()))
            if traced is kernel(op, impl):
                continue
            at = next(i for i, argument in enumerate(traced._schema.arguments) if argument.name == "numbers")
            for numbers in (given[at].float(), given[at][:0], given[at][None], given[at].to("meta")):
                text = sentence(traced, dict(enumerate((*given[:at], numbers, *given[at + 1 :]))))
                assert "numbers" in text, text
            meta = [x.to("meta") if torch.is_tensor(x) and i == 1 else x for i, x in enumerate(given)]
            if torch.is_tensor(given[1]):
                assert "is on meta and must be on cpu" in sentence(traced, dict(enumerate(meta)))


def test_tangents_are_refused(impl):
    for op, args in calls():
        for name in [name for name, x in args.items() if torch.is_tensor(x) and x.is_floating_point()]:
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(args[name], torch.ones_like(args[name]))
                assert sentence(kernel(op, impl), args | {name: dual}).startswith(f"{op}: forward-mode"), name


def test_an_order_that_is_no_permutation_writes_every_output(impl):
    scores, one_group = torch.arange(12.0).view(2, 6), torch.zeros(6, dtype=torch.int64)
    wild = ([0] * 6, [5, 5, 5, 5, 5, 5], [-1, 99, 2**62, -(2**62), 3, 3], [0, 1, 2, 3, 4, 4])
    for order in map(torch.tensor, wild):
        named = torch.zeros(6, dtype=torch.bool).index_fill(0, order.clamp(0, 5), True)
        for mode in range(5):
            got, heads = kernel("group_advantages", impl)(scores, one_group, order, 0, mode, 0.0, True)
            assert bit_equal(got[:, ~named], torch.zeros(2, int((~named).sum())))
            assert got.isfinite().all()
            assert heads[:, 0].bool().all()
            assert not heads[:, 1:].any()


def test_a_bound_of_the_weights_that_has_no_logarithm_is_no_other_error(impl):
    for args in samples()["p3o_loss"][:1]:
        names = [argument.split()[-1] for argument in arguments(SCHEMAS["p3o_loss"])]
        given = dict(zip(names, args, strict=True))
        for bound in (0.0, -1.0, float("-inf"), float("nan")):
            loss, *_ = kernel("p3o_loss", impl)(*(given | {"weight_clip": bound}).values())
            assert loss.shape == ()


LOGITS, LABELS = torch.randn(2, 5), torch.tensor([0, 1])


def overwrite(impl, logits):
    saved = kernel("token_logprobs", impl)(logits.detach(), LABELS, None, None, 1.0, -100, True)
    upstream = torch.ones(2)
    kernel("token_logprobs_backward_", impl)(logits, LABELS, None, upstream, None, *saved, 1.0, -100)


def test_what_overlaps_itself_is_not_overwritten(impl):
    for view in (torch.randn(1, 5).expand(2, 5), torch.randn(20).as_strided((2, 5), (2, 1))):
        before = view.clone()
        with pytest.raises(RuntimeError, match="token_logprobs_backward_: logits .* must not overlap itself"):
            overwrite(impl, view)
        assert torch.equal(view, before)
    overwrite(impl, torch.randn(1, 5).expand(2, 5)[:0].new_empty(2, 5))


def _within(memory, x, at):
    """The values of ``x`` as a view of that memory, from byte ``at`` on."""
    part = memory[at : at + x.numel() * x.element_size()]
    return part.view(x.dtype).view(x.shape).copy_(x)


def test_what_shares_memory_with_another_argument_is_not_overwritten(impl):
    """It would be read while it changes; what begins where the other ends is apart."""
    found = [(op, args) for op, args in calls() if "!" in SCHEMAS[op]]
    assert found
    for op, args in found:
        (first, x), *rest = args.items()
        size = x.numel() * x.element_size()
        for name, other in rest:
            if not torch.is_tensor(other) or other.numel() == 0:
                continue
            memory = torch.zeros(4096, dtype=torch.uint8)
            near = {first: _within(memory, x, 2048), name: _within(memory, other, 2048 + -(-size // 8) * 8)}
            alone = {first: x.clone()}
            kernel(op, impl)(*(args | near).values())
            kernel(op, impl)(*(args | alone).values())
            assert bit_equal(near[first], alone[first])
            for at in (2048, 2048 + (size - 1) // 8 * 8, 2048 - other.numel() * other.element_size() + 8):
                shared = args | {first: _within(memory, x, 2048), name: _within(memory, other, at)}
                before = memory.clone()
                text = sentence(kernel(op, impl), shared)
                place = list(args).index(name) + 1
                ends = f"shares memory with {first}, which is overwritten; pass a copy"
                assert text.startswith((f"{op}: {name} {ends}", f"{op}: argument {place} {ends}")), text
                assert torch.equal(memory, before)


def test_what_autograd_tracks_is_not_overwritten(impl):
    leaf = LOGITS.clone().requires_grad_()
    for x in (leaf, leaf[:], leaf * 2):
        with pytest.raises(RuntimeError, match="logits is overwritten and requires grad"):
            overwrite(impl, x)
    assert torch.equal(leaf, LOGITS)
    with torch.no_grad():  # as torch's own in-place ops have it
        overwrite(impl, leaf)
    assert not torch.equal(leaf, LOGITS)


def test_whoever_has_saved_what_is_overwritten_is_told(impl):
    x = LOGITS.clone().requires_grad_()
    y = x * 2
    z = y * y
    version = y._version
    overwrite(impl, y.detach())
    assert y._version == version + 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()
    with torch.inference_mode():  # where there are no versions
        overwrite(impl, LOGITS.clone())


@pytest.mark.parametrize("impl", ["cpu", pytest.param("triton", marks=pytest.mark.rest)])
def test_fakes_agree_with_kernels_in_shape_and_dtype(require_impl, impl):
    """In float64 and of 16-bit logits too, and for the ops that graphs hold."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    require_impl("gae", impl)
    for dtype in (torch.float64, torch.bfloat16):
        for op, kinds in recorded.samples(dtype, "cpu").items():
            if dtype == torch.bfloat16 and not op.startswith("token_logprobs"):
                continue  # computes in float32 and float64
            for args in kinds:
                for fn, given in ((kernel(op, impl), args), pk.backends.op(op).traceable(impl, args)):
                    real = fn(*given)
                    with FakeTensorMode() as mode:
                        fake = fn(*(mode.from_tensor(a) if torch.is_tensor(a) else a for a in given))
                    for r, f in zip(cases.outputs(real), cases.outputs(fake), strict=True):
                        assert r is f is None or (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())
