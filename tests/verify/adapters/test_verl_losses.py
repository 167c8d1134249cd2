"""verl's losses of actor and critic and its fused head, and its workers around them, with the adapter and without."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from ppo_kernels import integrations
from tests.verify.adapters.lib import MASKS, B, T, both, close, draw, grad, load, make_mask
from tests.verify.adapters.test_verl import modules

load("verl", "verl", "verl.workers.utils.losses", "verl.trainer.ppo.ray_trainer")

AGGREGATIONS = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")
COUNTS = (
    {},
    {"dp_size": 4, "batch_num_tokens": 100, "global_batch_size": 24, "loss_scale_factor": None},
    {"dp_size": 1, "batch_num_tokens": torch.tensor(50.0), "global_batch_size": 7, "loss_scale_factor": 40},
)


def config(mode, counts, **changes):
    from verl.workers.config import ActorConfig

    actor = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=2, loss_agg_mode=mode, **changes)
    actor.global_batch_info.update(counts)
    object.__setattr__(actor.policy_loss, "dro_beta", 0.3)
    return actor


def compare_policy_loss(loss_mode, kind, mode, counts, weighted):
    mask = make_mask(kind).bool()
    old = -draw(B, T).abs() - 0.02  # dppo takes them to probabilities
    new, advantages = (old + draw(B, T, seed=1, scale=0.7)).clamp(max=-0.01), draw(B, T, seed=2)
    advantages[1], advantages[:, 2] = 0.0, 0.0  # as of a group with equal rewards
    weights = draw(B, T, seed=3).abs() if weighted else None
    actor = config(mode, COUNTS[counts], clip_ratio_low=0.1, clip_ratio_high=0.2, clip_ratio_c=1.5)

    def call():
        leaf = new.clone().requires_grad_()
        loss, metrics = modules()[0].get_policy_loss_fn(loss_mode)(
            old_log_prob=old,
            log_prob=leaf,
            advantages=advantages,
            response_mask=mask,
            loss_agg_mode=mode,
            config=actor,
            rollout_is_weights=weights,
        )
        loss *= 0.5  # its callers write to it
        return loss.detach(), metrics, grad(loss, leaf)

    ours, theirs = both("verl", call, {f"compute_policy_loss_{loss_mode}": 1})
    shares = [theirs[1].get(f"actor/pg_clipfrac{which}", 1.0) for which in ("", "_lower")]
    assert shares[0] > 0 or loss_mode == "sapo"
    assert shares[1] > 0 or loss_mode in ("sapo", "cispo", "gspo")
    close(ours, theirs, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(("mode", "counts"), list(product(AGGREGATIONS, range(3))))
@pytest.mark.parametrize("weighted", [False, True])
def test_policy_loss(kind, mode, counts, weighted):
    compare_policy_loss("vanilla", kind, mode, counts, weighted)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(("mode", "counts"), [("token-mean", 0), ("seq-mean-token-mean", 1), ("seq-mean-token-sum", 2)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("loss_mode", ["cispo", "gspo", "sapo", "dppo_tv", "dppo_kl", "geo_mean", "gpg", "dro"])
def test_other_policy_losses(kind, mode, counts, weighted, loss_mode):
    if loss_mode == "dro" and weighted:
        pytest.skip("left to verl")
    compare_policy_loss(loss_mode, kind, mode, counts, weighted)


@pytest.mark.parametrize(
    "loss_mode", ["vanilla", "cispo", "gspo", "sapo", "dppo_tv", "dppo_kl", "geo_mean", "gpg", "dro"]
)
def test_garbage_at_masked_tokens_reaches_nothing(loss_mode):
    """Where verl's own losses would be NaN."""
    mask, actor = make_mask("interior").bool(), config("token-mean", {})
    old = -draw(B, T).abs() - 0.02
    new, advantages = (old + draw(B, T, seed=1, scale=0.7)).clamp(max=-0.01), draw(B, T, seed=2)
    weights = None if loss_mode == "dro" else draw(B, T, seed=3).abs()
    found = []
    adapter = integrations.adapter("verl")
    adapter.apply()
    for value in (0.0, torch.nan):
        given = [x if x is None else torch.where(mask, x, value) for x in (old, new, advantages, weights)]
        leaf = given[1].requires_grad_()
        function = modules()[0].get_policy_loss_fn(loss_mode)
        loss, metrics = function(given[0], leaf, given[2], mask, "token-mean", actor, given[3])
        found.append((loss.detach(), metrics, grad(loss, leaf)))
    adapter.revert()
    close(*found, rtol=0, atol=0)
    assert not found[1][2][~mask].any()


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("loss_type", ["reinforce", "ppo_clip"])
@pytest.mark.parametrize("rollout_is", [None, "token"])
def test_bypass_mode_takes_ours_for_the_loss_behind_it(kind, loss_type, rollout_is):
    mask, actor = make_mask(kind).float(), config("seq-mean-token-sum", COUNTS[1])
    settings = {"loss_type": loss_type, "rollout_is": rollout_is, "rollout_is_threshold": 1.5}
    object.__setattr__(actor, "policy_loss", {"rollout_correction": settings})
    old, advantages = draw(B, T), draw(B, T, seed=2)

    def call():
        leaf = (old + draw(B, T, seed=1, scale=0.7)).requires_grad_()
        function = modules()[0].get_policy_loss_fn("bypass_mode")
        loss, metrics = function(old, leaf, advantages, mask, "seq-mean-token-sum", actor)
        return loss.detach(), metrics, grad(loss, leaf)

    name = "reinforce" if loss_type == "reinforce" else "vanilla"
    close(*both("verl", call, {f"compute_policy_loss_{name}": 1}), rtol=1e-5, atol=5e-6)


def test_losses_that_are_left_to_verl():
    """For what they compute: the covariances of clip_cov and kl_cov are no choice of policy_loss's."""
    core, adapter = modules()[0], integrations.adapter("verl")
    functions = core.POLICY_LOSS_REGISTRY
    before = dict(functions)
    adapter.apply()
    theirs = {name for name in functions if functions[name] is before[name]}
    actor, leaf = config("token-mean", {}), draw(B, T).requires_grad_()
    given = (draw(B, T, seed=1), leaf, draw(B, T), make_mask("prefix").bool(), "token-mean", actor)
    adapter.reset_status()
    core.compute_policy_loss_dro(*given, draw(B, T))
    object.__setattr__(actor.policy_loss, "dro_beta", -1.0)
    with pytest.raises(ValueError, match="dro_beta must be a positive value"):
        core.compute_policy_loss_dro(*given)
    status = adapter.status()
    adapter.revert()
    assert theirs == {"clip_cov", "kl_cov", "bypass_mode"}
    reasons = {"rollout_is_weights": 1, "dro_beta=-1.0": 1}
    assert status == {"compute_policy_loss_dro": {"served": 0, "not covered": reasons}}


@pytest.mark.parametrize("backend", ["torch", "liger"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(40,), (4, 10)])
def test_the_fused_head(backend, dtype, shape, monkeypatch):
    """The liger backend needs a GPU: without, the torch backend says what it should give."""
    heads = load("verl", "verl.utils.experimental.torch_functional")[0]
    monkeypatch.setattr(heads, "_LIGER_FUSED_LINEAR_SCALED_CROSS_ENTROPY", None)
    hidden, weight = draw(*shape, 16).to(dtype), draw(97, 16, seed=1).to(dtype)
    labels = torch.randint(0, 97, shape, generator=torch.Generator().manual_seed(0))
    seeds = draw(2, *shape, seed=2)
    widen = iter((True, False))  # theirs rounds logits to bfloat16

    def call():
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        given = [x.float() for x in leaves] if next(widen) else leaves
        found = heads.FusedLinearForPPO(chunk_size=16, impl_backend=backend)(*given, labels, 0.7)
        return found, torch.autograd.grad(found, leaves, [seeds[0], seeds[1].to(found[1].dtype)])

    ours, theirs = both("verl", call, {"FusedLinearForPPO.forward": 1})
    assert ours[0][1].dtype == torch.float32
    close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    # Gradients reach 10, and theirs are off by 1.3e-5 in float32, ours by 4e-6.
    rounding = {"rtol": 1e-5, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 0.02}
    close(ours[1], theirs[1], **rounding)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(("mode", "counts"), list(product(AGGREGATIONS, range(3))))
def test_value_loss(kind, mode, counts):
    mask = make_mask(kind).bool()
    old, new, returns = draw(B, T), draw(B, T, seed=1), draw(B, T, seed=2)

    def call():
        leaf = new.clone().requires_grad_()
        loss, clipfrac = modules()[3].compute_value_loss(leaf, returns, old, mask, 0.3, mode, **COUNTS[counts])
        return loss.detach(), clipfrac, grad(loss, leaf)

    close(*both("verl", call, {"compute_value_loss": 1}), rtol=1e-5, atol=5e-6)


def worker_batch(kind, dp_size=2):
    """What an actor's worker is given: nested prompts and responses, and the model's packed outputs."""
    from tensordict import TensorDict
    from verl.utils import tensordict_utils as tu

    mask = make_mask("prefix")
    lengths = mask.sum(-1)
    if kind == "interior":
        mask = mask * make_mask("interior")
    prompts = [torch.zeros(3, dtype=torch.int64)] * B
    nested = lambda rows: torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)  # noqa: E731

    def rows(x):
        return nested([row[:n] for row, n in zip(x, lengths, strict=True)])

    fields = {
        "prompts": nested(prompts),
        "responses": rows(torch.zeros(B, T, dtype=torch.int64)),
        "response_mask": rows(mask),
        "old_log_probs": rows(draw(B, T)),
        "ref_log_prob": rows(draw(B, T, seed=1)),
        "advantages": rows(draw(B, T, seed=2)),
        "values": rows(draw(B, T, seed=3)),
        "returns": rows(draw(B, T, seed=4)),
    }
    data = TensorDict(fields, batch_size=[B])
    tu.assign_non_tensor(data, dp_size=dp_size, batch_num_tokens=60, global_batch_size=2 * B)
    return data, int((lengths + 3).sum())


@pytest.mark.parametrize("kind", ["prefix", "interior"])
@pytest.mark.parametrize("mode", AGGREGATIONS)
@pytest.mark.parametrize("use_kl_loss", [False, True])
def test_losses_as_the_workers_compute_them(kind, mode, use_kl_loss):
    from verl.workers.config import CriticConfig

    actor = config(mode, {}, use_kl_loss=use_kl_loss, entropy_coeff=0.01, loss_scale_factor=20)
    critic = CriticConfig(strategy="fsdp", ppo_micro_batch_size_per_gpu=2, loss_agg_mode=mode)

    def call():
        losses = modules()[3]
        data, n = worker_batch(kind)
        logprobs, entropy, values = (draw(n, seed=i).requires_grad_() for i in (5, 6, 7))
        loss, metrics = losses.ppo_loss(actor, {"log_probs": logprobs, "entropy": entropy}, data)
        value_loss, value_metrics = losses.value_loss(critic, {"values": values}, data)
        found = {name: getattr(m, "values", m) for name, m in (metrics | value_metrics).items()}
        gradients = torch.autograd.grad(loss + value_loss, (logprobs, entropy, values))
        return loss.detach(), value_loss.detach(), {name: torch.tensor(x) for name, x in found.items()}, gradients

    served = {"compute_policy_loss_vanilla": 1, "compute_value_loss": 1}
    close(*both("verl", call, served), rtol=1e-5, atol=5e-6)
