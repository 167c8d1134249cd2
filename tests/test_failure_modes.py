"""The failures that users of such kernels have reported, each with the tests that would see it here.

Rows as in the survey of public issue trackers that the design started from; a test without a file is in this one.

 1  a first block of -inf gives NaN
      test_token_logprobs.py::test_minus_infinity_anywhere
 2  0 * -inf in the entropy or its gradient
      test_token_logprobs.py::test_minus_infinity_anywhere
      test_token_logprobs.py::test_equals_a_categorical_distribution
 3  padded columns add exp(0)
      verify/test_sizes.py::test_columns_beyond_the_vocabulary_add_nothing_to_rows_far_below_zero
 4  a bad label reads anywhere
      test_token_logprobs.py::test_a_label_outside_the_vocabulary_is_nan_in_its_row_alone
      test_token_logprobs.py::test_ignored_rows_are_not_read
      test_token_logprobs_api.py::test_validate_names_a_bad_label
 5  int32 offsets
      test_contracts_memory.py::test_rows_further_apart_than_32_bits_count
 6  sliced logits
      test_token_logprobs_api.py::test_strides_change_no_bit
 7  a strided or expanded gradient from above
      test_a_gradient_from_above_is_read_by_its_strides
 8  misaligned vector loads
      test_contracts_memory.py::test_every_alignment_of_base_and_rows
      test_token_logprobs_api.py::test_every_alignment_of_rows_and_base
 9  a matrix product rounded to bfloat16  - (there is no fused linear op; logits are taken as they are)
10  a ratio that is not 1 at first
      test_the_ratio_is_exactly_one_before_the_first_update
11  exp overflows, inf * 0 is NaN
      test_gaps_that_overflow_are_clamped_and_counted
12  k3 cancels
      test_k3_of_a_small_gap_keeps_its_digits_and_its_gradient
13  nothing valid, nothing at all
      test_policy_loss.py::test_empty_and_all_masked_batches_give_zeros
      test_value_loss.py::test_empty_and_all_masked_batches_give_zeros
      test_p3o_loss.py::test_empty_and_all_masked_batches_give_zeros
      test_gae.py::test_empty_and_all_masked_batches
      test_kl_rewards.py::test_empty_and_all_masked_batches
      test_whiten.py::test_empty_and_scalar_tensors
      test_token_logprobs.py::test_any_leading_shape_and_empty_batches
14  NaN under the mask leaks
      test_policy_loss.py::test_what_lies_under_the_mask_does_not_matter
      test_value_loss.py::test_what_lies_under_the_mask_does_not_matter
      test_p3o_loss.py::test_what_lies_under_the_mask_does_not_matter
      test_gae.py::test_what_lies_under_the_mask_does_not_matter
      test_kl_rewards.py::test_what_lies_under_the_mask_does_not_matter
      test_whiten.py::test_what_lies_under_the_mask_does_not_matter
      test_token_logprobs.py::test_masked_rows_are_not_read
15  gae reads padding, or misses the score on a masked token
      test_gae.py::test_tokens_after_the_last_valid_one_are_never_read
      test_a_score_on_a_masked_end_token_reaches_every_advantage
16  the entropy metric counts padding
      test_the_mean_entropy_does_not_count_padding
17  one-pass variance, one element
      test_group_advantages.py::test_a_lone_response_has_no_advantage_and_equal_ones_have_none
      test_whiten.py::test_a_large_mean_does_not_cancel_the_variance
      test_whiten.py::test_no_or_one_valid_element
18  a NaN reward poisons silently
      test_group_advantages.py::test_a_score_that_is_no_number_is_no_member_of_its_group
      test_p3o_loss.py::test_nan_in_a_valid_response_is_seen_in_its_group_alone
      trainer/test_bad_input.py::test_nan_reward_stops_before_the_weights
      trainer/test_step.py::test_non_finite_gradient_never_reaches_the_weights
      test_kl_rewards.py::test_nan_in_a_valid_token_stays_in_its_row
      test_gae.py::test_nan_and_infinity_in_valid_tokens_stay_in_their_row
19  the wrong stream or device
      verify/test_gpu.py::test_kernels_run_on_the_current_stream
      verify/test_gpu.py::test_kernels_run_on_the_device_of_their_inputs
20  a synchronisation breaks graph capture
      verify/test_gpu.py::test_a_captured_graph_replays_with_new_values
      verify/test_gpu.py::test_no_op_waits_for_the_device
21  a silently wrong double backward
      test_contracts.py::test_double_backward_raises
22  gradients made in the forward, inputs that change
      test_gradients_made_in_the_forward_obey_what_comes_from_above
      test_contracts.py::test_inputs_are_never_mutated
23  autocast
      test_contracts.py::test_autocast_changes_nothing
24  graph breaks
      test_contracts_dispatcher.py::test_compiles_into_one_graph_and_equals_eager
25  a head without weights (ZeRO-3)
      test_logits_of_a_head_that_was_not_gathered_are_refused
26  run-to-run drift
      test_contracts.py::test_runs_repeat_bit_by_bit
      test_hundreds_of_runs_are_one
"""

import math
import re
from pathlib import Path

import pytest
import torch

import ppo_kernels as pk
from bench import oracle
from tests.lib import cases
from tests.lib.cases import NAMES, run
from tests.lib.devices import IMPLEMENTATIONS
from tests.lib.helpers import INF, NAN, assert_close_to_oracle, assert_raises, bit_equal, grad_of, holey_mask


def test_the_table_names_tests_that_exist():
    rows = re.split(r"^ ?(\d+)  ", __doc__, flags=re.M)[1:]
    assert rows[::2] == [str(i) for i in range(1, 27)]
    for row, text in zip(rows[::2], rows[1::2], strict=True):
        named = re.findall(r"^ +(?:(\S+\.py)::)?(test_\w+)$", text, re.M)
        assert named or row == "9"
        for file, test in named:
            assert f"def {test}(" in (Path(__file__).parent / (file or Path(__file__).name)).read_text(), (row, test)


ABOVE = {
    "transposed": lambda g: g.t().contiguous().t(),
    "sliced": lambda g: torch.stack([g, torch.full_like(g, NAN)], -1)[..., 0],
    "rows apart": lambda g: torch.cat([g, torch.full_like(g, NAN)], 1)[:, : g.size(1)],
    "off a vector boundary": lambda g: torch.cat([g.new_full((1,), NAN), g.reshape(-1)])[1:].view(g.shape),
    "one row for all": lambda g: g[:1].expand(g.shape),
    "one number for all": lambda g: g[0, 0].expand(g.shape),
}


@pytest.mark.large
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("form", ABOVE)
@pytest.mark.parametrize("entropy", [False, True])
def test_a_gradient_from_above_is_read_by_its_strides(require_impl, impl, form, entropy):
    impl = require_impl("token_logprobs", impl)
    logits, labels = torch.randn(3, 4, 65), torch.randint(0, 65, (3, 4))
    above = [ABOVE[form](torch.randn(3, 4)) for _ in range(2)]
    grads = []
    for grad_output in (above, [g.contiguous() for g in above]):
        leaf = logits.clone().requires_grad_()
        out = pk.token_logprobs(leaf, labels, entropy=entropy, impl=impl)
        out = out if entropy else (out,)
        torch.autograd.backward(out, grad_output[: len(out)])
        grads.append(leaf.grad)
    assert bit_equal(*grads)
    want = oracle.token_logprobs(logits, labels, grad_logp=above[0], grad_entropy=above[1] if entropy else None)[2]
    assert_close_to_oracle(grads[0], want, ceiling=2e-6, scale=max(float(g.abs().max()) for g in above))


@pytest.mark.large
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("micro", [4, 1, 3])
def test_the_ratio_is_exactly_one_before_the_first_update(require_impl, impl, dtype, micro):
    """The rollout scores without gradient, entropy or slices, the update with all three and in micro-batches."""
    impl = require_impl("token_logprobs", impl)
    logits, labels = (torch.randn(4, 7, 1030) * 4).to(dtype), torch.randint(0, 1030, (4, 6))
    with torch.no_grad():
        old = pk.token_logprobs(logits[:, :-1].contiguous(), labels, temperature=0.7, impl=impl)
    parts = []
    for some, label in zip(logits.split(micro), labels.split(micro), strict=True):
        leaf = some.clone().requires_grad_()
        logp, _ = pk.token_logprobs(leaf[:, :-1], label, temperature=0.7, entropy=True, impl=impl)
        parts.append(logp)
    new = torch.cat(parts)
    assert torch.equal(new, old)
    _, stats = pk.policy_loss(new, old, torch.randn(4, 6), impl=require_impl("policy_loss", impl))
    assert [float(stats.ratio_mean), float(stats.ratio_max)] == [1.0, 1.0]
    assert not any(float(getattr(stats, f"approx_kl_k{i}")) for i in (1, 2, 3))


GAPS = [50.0, 1e4, 3e38, INF]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("estimator", ["k1", "abs", "k2", "k3"])
def test_gaps_that_overflow_are_clamped_and_counted(require_impl, impl, gap, estimator):
    """-inf is a legal log-probability, and 3e38 less -3e38 is one of float32's ways to infinity."""
    low = torch.tensor([[-gap, -1.0, -gap, -1.0, -1.0]])
    high = torch.tensor([[gap if gap > 1e30 and gap < INF else -1.0, -1.0, -1.0, -1.0, -1.0]])
    adv = torch.tensor([[1.0, 1.0, -1.0, -1.0, 0.0]])
    options = {"ref_logprobs": torch.full((1, 5), -1.0), "kl_coef": 0.1, "kl_estimator": estimator, "kl_clamp": 10.0}
    impl = require_impl("policy_loss", impl)
    for logp, old in ((low, high), (high, low)):
        (loss, stats), grad = grad_of(
            lambda x, old=old: pk.policy_loss(x, old, adv, weights=torch.zeros(1, 5), impl=impl, **options), logp
        )
        assert loss.isfinite()
        assert all(s.isfinite() for s in stats)
        assert grad.isfinite().all()
        assert float(stats.clamp_frac) == pytest.approx(0.4)
        assert float(stats.ratio_max) <= math.exp(20.0) * (1 + 1e-6)
    impl = require_impl("kl_rewards", impl)
    clamps = {"kl_estimator": estimator, "kl_log_clamp": 20.0, "kl_clamp": 10.0, "kl_coef": 0.0}
    rewards, kl = pk.kl_rewards(low, high, torch.ones(1), impl=impl, **clamps)
    assert rewards.tolist() == [[0.0, 0.0, 0.0, 0.0, 1.0]]
    assert kl.abs().tolist() == [20.0]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("gap", [1e-4, -1e-4, 1e-3, -1e-3, 3e-2, -3e-2, 0.4999, -0.4999, 0.5001, -0.5001, 2.0])
def test_k3_of_a_small_gap_keeps_its_digits_and_its_gradient(require_impl, impl, gap):
    logp = torch.tensor([[-gap]])
    zero, one = torch.zeros(1, 1), torch.ones(1)
    x = -float(logp)
    want = math.expm1(x) - x
    # The eager form subtracts two float32 numbers of the size of the gap; the kernels sum a series.
    limit = 2e-6 if impl != "torch" else 2e-6 + 1.2e-7 * abs(x) / want
    kl = pk.kl_rewards(logp, zero, one, kl_estimator="k3", impl=require_impl("kl_rewards", impl))[1]
    assert float(kl) == pytest.approx(want, rel=limit)
    options = {"ref_logprobs": zero, "kl_coef": 1.0, "kl_estimator": "k3", "impl": require_impl("policy_loss", impl)}
    (_, stats), grad = grad_of(lambda x: pk.policy_loss(x, x.detach(), zero, **options), logp)
    assert float(stats.ref_kl) == pytest.approx(want, rel=limit)
    slope = -math.expm1(x)
    assert float(grad) == pytest.approx(slope, rel=2e-6 if impl != "torch" else 2e-6 + 1.2e-7 / abs(slope))
    stats = pk.policy_loss(-logp, zero, zero, impl=require_impl("policy_loss", impl))[1]
    assert float(stats.approx_kl_k3) == pytest.approx(want, rel=limit)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_score_on_a_masked_end_token_reaches_every_advantage(require_impl, impl):
    """DeepSpeed-Chat and TRL score one past the last token of the loss: gae's mask has to include that one."""
    impl = require_impl("gae", require_impl("kl_rewards", impl))
    logp, ref, values = torch.randn(3, 3, 8).unbind(0)
    lengths = torch.tensor([3, 7, 1])
    inside = torch.arange(8) < lengths[:, None]
    scores, at = torch.tensor([2.0, -3.0, 1.5]), lengths
    rewards, _ = pk.kl_rewards(logp, ref, scores, inside, score_index=at, kl_coef=0.1, impl=impl)
    assert bit_equal(rewards.gather(1, at[:, None])[:, 0], scores)
    scored = torch.arange(8) <= lengths[:, None]
    adv, ret = pk.gae(rewards, values, scored, gamma=1.0, lam=1.0, masked_steps="keep", impl=impl)
    total = rewards.double() * scored
    want = total.flip(1).cumsum(1).flip(1) * scored
    assert_close_to_oracle(ret, want, ceiling=2e-6, scale=10.0)
    assert_close_to_oracle(adv, (want - values.double()) * scored, ceiling=2e-6, scale=10.0)
    without = pk.gae(rewards, values, inside, gamma=1.0, lam=1.0, masked_steps="keep", impl=impl)[1]
    torch.testing.assert_close(ret[:, 0] - without[:, 0], scores, rtol=0, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("sentinel", [0.0, -1e9, NAN])
def test_the_mean_entropy_does_not_count_padding(require_impl, impl, sentinel):
    logits, mask, labels = torch.randn(5, 9, 40), holey_mask(5, 9), torch.randint(0, 40, (5, 9))
    logits[~mask] = sentinel
    _, h = pk.token_logprobs(logits, labels, mask=mask, entropy=True, impl=require_impl("token_logprobs", impl))
    want = torch.distributions.Categorical(logits=logits[mask].double()).entropy().mean()
    assert float(h.double().sum() / mask.sum()) == pytest.approx(float(want), abs=1e-6)
    assert not h[~mask].any()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", cases.DIFFERENTIABLE)
def test_gradients_made_in_the_forward_obey_what_comes_from_above(require_impl, impl, name):
    """Not a mean, not a sum, twice through one graph, and beside another use of the same leaf."""
    case = cases.make(name, batch=3, length=5)
    impl = require_impl(case.op, impl)
    leaf = case.tensors[case.leaf].clone().requires_grad_()
    loss = case.call(case.tensors | {case.leaf: leaf}, impl)[0].sum()
    (once,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (again,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    assert bit_equal(once, again)
    assert once.abs().max() > 0
    slope = 3 + 2 * loss.detach()
    (curved,) = torch.autograd.grad(3 * loss + loss**2 + leaf.sum(), leaf)
    expected = once * slope + 1
    # Where a product sums what cancels, an entry is as exact as the largest one.
    torch.testing.assert_close(curved, expected, rtol=2e-6, atol=1e-6 * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_a_head_that_was_not_gathered_are_refused(require_impl, impl, dtype):
    hidden, partitioned = torch.randn(2, 3, 8, dtype=dtype), torch.empty(0, 8, dtype=dtype)
    logits = torch.nn.functional.linear(hidden, partitioned)
    call = {"impl": require_impl("token_logprobs", impl)}
    labels = torch.zeros(2, 3, dtype=torch.int64)
    assert_raises(ValueError, lambda: pk.token_logprobs(logits, labels, **call), "logits", "V >= 1", "(2, 3, 0)")
    assert_raises(ValueError, lambda: pk.token_logprobs(logits[:0], labels[:0], **call), "logits", "V >= 1")


@pytest.mark.rest  # `make test` has twenty: test_contracts.py::test_runs_repeat_bit_by_bit
@pytest.mark.parametrize("name", NAMES)
def test_hundreds_of_runs_are_one(require_impl, name):
    case = cases.make(name, batch=8, length=33)
    impl = require_impl(case.op, "cpu")
    first = run(case, impl)
    assert all(bit_equal(run(case, impl), first) for _ in range(250))
