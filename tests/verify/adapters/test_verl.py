"""verl's own functions, and the code of its trainer and workers around them, with the adapter and without."""

from __future__ import annotations

import subprocess
import sys
import tomllib

import numpy as np
import pytest
import torch

from ppo_kernels import integrations
from tests.lib.checkout import ROOT, environment
from tests.verify.adapters.lib import FOLDERS, MASKS, B, T, both, close, draw, grad, load, make_mask

load("verl", "verl.workers.utils.losses", "verl.trainer.ppo.ray_trainer")

V = 97
UIDS = np.array(["b", "a", "b", "c", "a", "b"], dtype=object)  # c stands alone


def modules():
    """By name at each call, as verl's code finds them."""
    import verl.trainer.ppo.core_algos as core
    import verl.trainer.ppo.ray_trainer as trainer
    import verl.utils.torch_functional as tensors
    import verl.workers.utils.losses as losses

    return core, trainer, tensors, losses


@pytest.mark.parametrize("shape", [(40, V), (4, 10, V)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inplace", [True, False])
def test_logprobs(shape, dtype, inplace):
    labels = torch.randint(0, V, shape[:-1], generator=torch.Generator().manual_seed(0))
    logits = draw(*shape, scale=3.0).to(dtype)
    weights = draw(*shape[:-1], seed=2)
    widen = iter((True, False))  # theirs rounds to bfloat16; ours is as exact as theirs is in float32

    def call():
        leaf = logits.clone().requires_grad_()
        given = leaf.float() if next(widen) else leaf
        logprobs = modules()[2].logprobs_from_logits(given * 1, labels, inplace_backward=inplace)
        return logprobs, grad((logprobs * weights).sum(), leaf)

    ours, theirs = both("verl", call, {"logprobs_from_logits": 1})
    assert ours[0].dtype == torch.float32
    close(ours[0], theirs[0], atol=5e-6)
    close(ours[1], theirs[1], rtol=1e-5 if dtype == torch.float32 else 8e-3, atol=5e-6)


@pytest.mark.parametrize("flash_attn", [False, True])
def test_the_gradient_is_written_over_the_logits_where_flash_attn_would(flash_attn, monkeypatch):
    tensors = modules()[2]
    monkeypatch.setattr(tensors, "FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE", flash_attn)
    adapter = integrations.adapter("verl")
    adapter.apply()
    try:
        leaf, labels = draw(40, V).requires_grad_(), torch.zeros(40, dtype=torch.int64)
        logits = leaf * 1
        kept = logits.detach().clone()
        tensors.logprobs_from_logits(logits, labels).sum().backward()
        assert torch.equal(logits, kept) != flash_attn
        close(leaf.grad, torch.nn.functional.one_hot(labels, V) - torch.softmax(kept, -1))
    finally:
        adapter.revert()


@pytest.mark.parametrize("chunked", [False, True])
def test_entropy(chunked):
    name = "entropy_from_logits_with_chunking" if chunked else "entropy_from_logits"
    logits, weights = draw(40, V, scale=3.0), draw(40, seed=2)

    def call():
        leaf = logits.clone().requires_grad_()
        entropy = getattr(modules()[2], name)(leaf)
        return entropy, grad((entropy * weights).sum(), leaf)

    close(*both("verl", call, {name: 1}), rtol=1e-5, atol=5e-6)


def test_the_engines_bind_ours():
    (engine,) = load("verl", "verl.workers.engine.fsdp.transformer_impl")
    theirs = engine.logprobs_from_logits
    adapter = integrations.adapter("verl")
    adapter.apply()
    assert engine.logprobs_from_logits is modules()[2].logprobs_from_logits
    assert engine.logprobs_from_logits.__wrapped__ is theirs
    adapter.revert()
    assert engine.logprobs_from_logits is theirs


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten(kind, shift_mean):
    x, mask = draw(B, T, scale=4.0) + 3.0, make_mask(kind)
    call = lambda: modules()[2].masked_whiten(x, mask, shift_mean) * mask  # noqa: E731
    close(*both("verl", call, {"masked_whiten": 1}), atol=5e-6)


def proto(kind, mask_dtype=torch.int64):
    """A batch as verl's trainer has it."""
    from verl import DataProto

    mask = make_mask(kind).to(mask_dtype)
    tensors = {
        "token_level_rewards": draw(B, T),
        "token_level_scores": draw(B, T, seed=1),
        "old_log_probs": draw(B, T, seed=2),
        "ref_log_prob": draw(B, T, seed=3),
        "values": draw(B, T, seed=4),
        "response_mask": mask,
    }
    return DataProto.from_dict(tensors=tensors, non_tensors={"uid": UIDS}), mask


ESTIMATORS = {
    "gae": "compute_gae_advantage_return",
    "grpo": "compute_grpo_outcome_advantage",
    "gpg": "compute_gpg_outcome_advantage",
    "grpo_vectorized": "compute_grpo_vectorized_outcome_advantage",
    "rloo": "compute_rloo_outcome_advantage",
    "rloo_vectorized": "compute_rloo_vectorized_outcome_advantage",
    "reinforce_plus_plus": "compute_reinforce_plus_plus_outcome_advantage",
    "reinforce_plus_plus_baseline": "compute_reinforce_plus_plus_baseline_outcome_advantage",
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_advantages_as_the_trainer_computes_them(estimator, kind):
    from verl.trainer.config import AlgoConfig

    def call():
        data, mask = proto(kind)
        config = AlgoConfig(gamma=0.98, lam=0.9)
        data = modules()[1].compute_advantage(data, estimator, gamma=0.98, lam=0.9, config=config)
        return data.batch["advantages"] * mask, data.batch["returns"] * mask

    served = {ESTIMATORS[estimator]: 1}
    close(*both("verl", call, served), atol=5e-6)


@pytest.mark.parametrize("estimator", ["grpo", "grpo_vectorized"])
def test_dr_grpo(estimator):
    data, mask = proto("interior")

    def call():
        function = modules()[0].get_adv_estimator_fn(estimator)
        rewards = data.batch["token_level_rewards"]
        return function(rewards, mask, index=UIDS, norm_adv_by_std_in_grpo=False)

    close(*both("verl", call, {ESTIMATORS[estimator]: 1}), atol=5e-6)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("penalty", ["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3", "k3+", "k1+"])
@pytest.mark.parametrize("far", [1.0, 30.0])
def test_kl_penalty_in_the_reward(kind, penalty, far):
    def call():
        core, trainer, _, _ = modules()
        data, _ = proto(kind)
        data.batch["ref_log_prob"] *= far  # beyond the bounds of the log-ratio and the estimate
        control = core.AdaptiveKLController(0.1, 6.0, 1000)
        data, metrics = trainer.apply_kl_penalty(data, control, penalty)
        return data.batch["token_level_rewards"], metrics, control.value

    ours, theirs = both("verl", call, {"apply_kl_penalty": 1})
    close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_what_is_not_covered_is_left_to_verl():
    core = modules()[0]
    adapter = integrations.adapter("verl")
    adapter.apply()
    adapter.reset_status()
    x, mask = draw(B, T).requires_grad_(), make_mask("prefix")
    whitened = modules()[2].masked_whiten(x, mask)
    assert whitened.requires_grad
    with pytest.raises(ValueError, match="batch_num_tokens is required"):
        modules()[0].compute_value_loss(x, x, x, mask, 0.2, dp_size=2)
    with pytest.raises(NotImplementedError):
        modules()[1].apply_kl_penalty(proto("prefix")[0], core.FixedKLController(0.1), "full")
    index = torch.arange(B)
    with pytest.raises(KeyError):  # verl looks each element up by its identity
        modules()[0].compute_grpo_outcome_advantage(x.detach(), mask, index)
    status = adapter.status()
    adapter.revert()
    assert {name: list(counts["not covered"]) for name, counts in status.items()} == {
        "masked_whiten": ["the call is differentiated"],
        "compute_value_loss": ["token-mean over 2 ranks without the count of all"],
        "apply_kl_penalty": ["kl_penalty='full'"],
        "compute_grpo_outcome_advantage": ["an index that is a tensor"],
    }
    assert not any(counts["served"] for counts in status.values())


PLUGIN = """
import logging, sys
logging.getLogger("ppo_kernels").setLevel(logging.INFO)
logging.getLogger("ppo_kernels").addHandler(logging.StreamHandler(sys.stdout))
import verl
import verl.utils.torch_functional as tensors
import verl.trainer.ppo.core_algos as core
print("core", hasattr(core.POLICY_LOSS_REGISTRY["vanilla"], "__wrapped__"))
import torch
tensors.logprobs_from_logits(torch.randn(3, 5), torch.zeros(3, dtype=torch.long))
from ppo_kernels import integrations
print(integrations.status())
print({row.state for row in integrations.adapter("verl").report()})
print("openrlhf", {row.state for row in integrations.adapter("openrlhf").report()})
"""


def test_import_verl_puts_ours_in_place(tmp_path):
    """By its entry point, which a folder of metadata declares here as the wheel does."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["verl.plugins"]
    (name, module), *_ = declared.items()
    info = tmp_path / "declares-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: declares\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[verl.plugins]\n{name} = {module}\n")
    path = ":".join(map(str, (ROOT, tmp_path, *FOLDERS)))
    command = [sys.executable, "-c", PLUGIN]
    env = environment(PYTHONPATH=path)
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert sum(line.startswith("verl: ") and "waiting" in line for line in lines) == 1, "it says so once"
    assert any(line.startswith("verl: replaced ") and "compute_value_loss" in line for line in lines)
    assert "core True" in lines
    assert "{'verl': {'logprobs_from_logits': {'served': 1, 'not covered': {}}}}" in lines
    assert "openrlhf {'left out'}" in lines
    env["PPO_KERNELS_PATCH"] = "openrlhf"
    other = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert "core False" in other.stdout, "PPO_KERNELS_PATCH decides where it is set"
    assert "openrlhf {'waiting'}" in other.stdout
