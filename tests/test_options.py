"""A float option is a number in any form, None and inf switch a clip off, and a new value compiles nothing anew."""

import math

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

import ppo_kernels as pk
from ppo_kernels import backends
from ppo_kernels._schemas import SCHEMAS
from tests.lib.devices import IMPLEMENTATIONS
from tests.lib.helpers import bit_equal
from tests.lib.options import BOUNDS, NUMBERS

torch.manual_seed(0)
LOGP, OLD, REF, ADV = torch.randn(4, 4, 6)
SCORES = 3 * torch.randn(4)
POLICY = {"ref_logprobs": REF, "kl_coef": 0.3, "kl_estimator": "k3"}


def policy(x, impl, **options):
    return pk.policy_loss(x, OLD, ADV, impl=impl, **(POLICY | options))


def bonus(x, impl, **options):
    return pk.policy_loss(x, OLD, ADV, entropy=REF, impl=impl, **({"entropy_coef": 0.3} | options))


def value(x, impl, **options):
    return pk.value_loss(x, OLD, ADV, impl=impl, **options)


def gae(x, impl, **options):
    return pk.gae(x, OLD, impl=impl, **options)


def logprobs(x, impl, **options):
    return (pk.token_logprobs(x, torch.arange(4), impl=impl, **options),)


FORMS = (np.float32, np.float64, np.array, torch.tensor, lambda x: torch.tensor([[x]], dtype=torch.float64))


def compiled_for(options):
    """Of each op with a kernel of its own `make test` compiles for one: half a second each."""
    some = {number.function: name for name, number in reversed(options.items())}
    return [
        x
        if some.get(x.partition(".")[0]) == x and x.partition(".")[0] in SCHEMAS
        else pytest.param(x, marks=pytest.mark.rest)
        for x in options
    ]


def flat(found):
    return tuple(x for y in found for x in (y if isinstance(y, tuple) else (y,)))


@pytest.fixture(params=IMPLEMENTATIONS)
def impl(request, require_impl):
    return require_impl("policy_loss", request.param)


@pytest.mark.large
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_may_come_in_any_form(impl, name):
    number = NUMBERS[name]
    want = number(impl, number.value)
    assert not bit_equal(number(impl, 2 * number.value), want)  # it is in use
    for form in FORMS:
        for got, expected in zip(number(impl, form(number.value)), want, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", BOUNDS)
def test_none_and_infinity_switch_a_clip_off(impl, name):
    number = BOUNDS[name]
    off = number(impl, None)
    for form in (math.inf, np.float32(math.inf), torch.tensor(math.inf)):
        assert bit_equal(number(impl, form), off)
    assert not bit_equal(number(impl, number.value), off)
    far = number(impl, 1e30)
    if number.option == "softcap":  # it rounds there, as 1e30 tanh(z / 1e30) does
        torch.testing.assert_close(far, off)
    else:
        assert bit_equal(far, off)


def test_scores_are_not_clipped_unless_asked(impl):
    assert bit_equal(pk.kl_rewards(OLD, OLD, 100 * SCORES, impl=impl)[0][:, -1], 100 * SCORES)


@pytest.mark.large
@pytest.mark.parametrize("name", compiled_for(NUMBERS))
def test_a_new_value_compiles_nothing_anew(impl, name):
    number = NUMBERS[name]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")  # AOTAutograd makes constants of floats that Dynamo lets change
    step = torch.compile(lambda v: number(impl, v), fullgraph=True, backend=counter)
    for i in range(10):
        changed = number.value * (1 + 0.01 * i)
        torch.testing.assert_close(step(changed), number(impl, changed))
        assert counter.frame_count <= 2  # the first makes a constant of the float


@pytest.mark.large
@pytest.mark.parametrize("name", compiled_for(BOUNDS))
def test_an_element_compiles_once(impl, name):
    number = BOUNDS[name]
    torch._dynamo.reset()
    counter = CompileCounter()
    step = torch.compile(lambda v: number(impl, v), fullgraph=True, backend=counter)
    for v in (number.value, 1.5 * number.value, math.inf):
        torch.testing.assert_close(step(torch.tensor(v)), number(impl, v))
    assert counter.frame_count == 1


#: Options that a call does not read: what nothing in a graph needs, AOTAutograd makes a constant.
UNREAD = {
    "sapo_temperature_pos": policy,
    "sapo_temperature_neg": lambda x, impl, **given: policy(x, impl, surrogate="cispo", **given),
    "cliprange": lambda x, impl, **given: policy(x, impl, surrogate="sapo", **given),
    "kl_log_clamp": bonus,
    "kl_clamp": bonus,
    "entropy_normalizer": policy,
    "eps": lambda x, impl, **given: (pk.group_advantages(x[:, 0], group_size=2, impl=impl, **given),),
    "dr_grpo eps": lambda x, impl, **given: (
        pk.group_advantages(x[:, 0], group_size=2, mode="grpo", scale_rewards="none", impl=impl, **given),
    ),
    "max_length": lambda x, impl, **given: pk.aggregation_weights(x > 0, "seq-mean-token-mean", **given),
}


@pytest.mark.parametrize(
    "option", [x if x in ("eps", "max_length") else pytest.param(x, marks=pytest.mark.rest) for x in UNREAD]
)
def test_what_is_not_read_compiles_nothing_anew(option):
    """The other implementations take all numbers as one tensor."""
    torch._dynamo.reset()
    counter, name = CompileCounterWithBackend("aot_eager"), option.split()[-1]
    call = lambda x, v: flat(UNREAD[option](x, "torch", **{name: v}))  # noqa: E731
    step = torch.compile(call, fullgraph=True, backend=counter)
    for i in range(6):
        torch.testing.assert_close(step(LOGP, 1.5 + 0.1 * i), call(LOGP, 1.5 + 0.1 * i))
    assert counter.frame_count <= 3  # a constant, an input, and a graph without it


@pytest.mark.large
@pytest.mark.parametrize("form", [np.float32, np.float64, np.array])
def test_numpy_numbers_are_compiled(impl, form):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(lambda x, v: gae(x, impl, gamma=v, lam=v)[0], fullgraph=True, backend=counter)
    for number in (0.25, 0.5, 0.75, 0.875):
        torch.testing.assert_close(step(LOGP, form(number)), gae(LOGP, impl, gamma=number, lam=number)[0])
    assert counter.frame_count <= 2


def test_no_cuda_graph_keeps_a_value():
    tag = getattr(torch.Tag, "cudagraph_unsafe", None)
    if tag is None:
        pytest.skip("this torch has no tag that keeps an op out of CUDA graphs")
    traced = {op for name in SCHEMAS for op in backends.op(name).traced.values()}
    assert {tag in op.tags for op in traced} == {True}


#: Of each op with a kernel of its own the last: a graph of all would take twenty seconds, and Triton's interpreter six.
ONE_OF_EACH = {number.function: number for number in NUMBERS.values() if number.function in SCHEMAS}


def check_other_defaults(numbers, impl, compiled=lambda call: call):
    def call_all(impl):
        return [number(impl, number.value) for number in numbers]

    want = call_all(impl)
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    try:
        found = compiled(call_all)(impl)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    for got, expected in zip(found, want, strict=True):
        for x, y in zip(got, expected, strict=True):
            torch.testing.assert_close(x, y)


def test_the_default_device_and_dtype_matter_to_no_op(impl):
    check_other_defaults((ONE_OF_EACH if impl == "triton" else NUMBERS).values(), impl)


@pytest.mark.parametrize("impl", ["cpu", pytest.param("torch", marks=pytest.mark.rest)])
def test_the_default_device_and_dtype_matter_to_no_graph(impl):
    torch._dynamo.reset()
    check_other_defaults(ONE_OF_EACH.values(), impl, lambda call: torch.compile(call, backend="aot_eager"))


NO_NUMBERS = (
    *(True, "0.2", 1j, np.complex64(1), np.bool_(True), np.ones(2), np.str_("0.2")),
    *(torch.tensor([0.1, 0.2]), torch.tensor(True), torch.tensor(1j)),
)


@pytest.mark.parametrize("bad", NO_NUMBERS)
@pytest.mark.parametrize("name", ["policy_loss.cliprange", "gae.gamma", "policy_loss.kl_coef"])
def test_what_is_not_a_number_is_refused(impl, name, bad):
    number = NUMBERS[name]
    with pytest.raises((TypeError, ValueError), match=f"{number.option}.* must be a number or one"):
        number(impl, bad)
    with pytest.raises(ValueError, match=number.option):
        number(impl, torch.tensor(float("nan")) if number.option != "kl_coef" else float("nan"))


def test_an_option_is_not_mapped_over(impl):
    with pytest.raises(ValueError, match="gamma is one number for the whole call, and torch.func.vmap maps over it"):
        torch.func.vmap(lambda v: gae(LOGP, impl, gamma=v)[0])(torch.tensor([0.5, 0.75]))


def test_one_temperature_comes_in_any_shape_dtype_and_from_the_cpu(impl):
    for form in (torch.tensor(2), torch.full((1, 1), 2), torch.full((1, 1, 1), 2.0, dtype=torch.float16)):
        assert bit_equal(
            logprobs(LOGP, impl, temperature=form), logprobs(LOGP, impl, temperature=torch.full((4,), 2.0))
        )
    assert logprobs(LOGP, impl, temperature=torch.tensor(0.0))[0].isnan().all()  # a tensor's values are not read
    with pytest.raises(ValueError, match="every temperature must be > 0"):
        logprobs(LOGP, impl, temperature=torch.tensor(0.0), validate=True)
    with pytest.raises(ValueError, match="temperature must be a number or one real element"):
        logprobs(LOGP, impl, temperature=torch.tensor(1j))
    labels = torch.zeros(4, dtype=torch.int64, device="meta")
    elsewhere = pk.token_logprobs(LOGP.to("meta"), labels, temperature=torch.tensor(0.5), impl="torch")
    assert elsewhere.device.type == "meta"


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_without_a_value_is_named(impl, name):
    with pytest.raises(ValueError, match=f"{NUMBERS[name].option}( .low.| .high.)? is on meta"):
        NUMBERS[name](impl, torch.tensor(0.5, device="meta"))


def test_a_normalizer_is_no_truth_value(impl):
    for option, op in (("normalizer", policy), ("normalizer", value), ("entropy_normalizer", bonus)):
        with pytest.raises(ValueError, match=f"{option} must be a number or one real element, got torch.bool"):
            op(LOGP, impl, **{option: torch.tensor(True)})


def test_numbers_that_a_dtype_holds_no_more(impl):
    x, zero, one = torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2)
    assert pk.policy_loss(x, zero, one, normalizer=1e-320, impl=impl)[0] == -math.inf  # as -2 / 1e-320 is in float64
    assert pk.policy_loss(x, zero, 1e30 * one, normalizer=1e39, impl=impl)[0].item() == pytest.approx(-2e-9)
    if impl == "triton":  # whose interpreter keeps the float64 of an argument that a GPU gets in float32
        return
    # A coefficient that is 0 in float32 is off: what it would multiply is infinite or NaN.
    for lost in (torch.full((1, 2), math.inf), torch.full((1, 2), math.nan)):
        off = {"ref_logprobs": lost, "kl_coef": 1e-50, "kl_log_clamp": None, "impl": impl}
        y = x.clone().requires_grad_()
        loss, _ = pk.policy_loss(y, zero, one, **off)
        loss.backward()
        assert loss == -1
        assert y.grad.tolist() == [[-0.5, -0.5]]
        rewarded, _ = pk.kl_rewards(x, lost, torch.ones(1), kl_coef=1e-50, impl=impl)
        assert rewarded.tolist() == [[0, 1]]


def test_max_length_is_a_length():
    with pytest.raises(ValueError, match=r"max_length must be >= 1\.0, got 0\.5"):
        pk.aggregation_weights(LOGP > 0, "seq-mean-token-sum-norm", max_length=0.5)
    assert pk.aggregation_weights(LOGP[:, :0] > 0, "seq-mean-token-sum-norm")[0].tolist() == [1.0] * 4


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.uint8, torch.int32, torch.int64])
def test_masks_and_scores_of_integers(impl, dtype):
    mask, scores = torch.tensor([[1, 2, 0, 3, 0, 1]] * 4, dtype=dtype), torch.tensor([1, 0, 3, 2], dtype=dtype)
    want = pk.kl_rewards(LOGP, REF, scores.float(), mask != 0, impl=impl)
    assert bit_equal(pk.kl_rewards(LOGP, REF, scores, mask, impl=impl), want)
    for op in (
        lambda s: pk.p3o_loss(LOGP, OLD, REF, s, mask, impl=impl)[0],
        lambda s: pk.group_advantages(s, group_size=2, impl=impl),
    ):
        assert bit_equal((op(scores),), (op(scores.float()),))


def test_scores_in_bfloat16(impl):
    scores = SCORES.bfloat16()
    assert bit_equal(pk.kl_rewards(LOGP, REF, scores, impl=impl), pk.kl_rewards(LOGP, REF, scores.float(), impl=impl))
