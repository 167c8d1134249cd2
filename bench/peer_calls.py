"""How other libraries are called: what to load of them, and what a trainer does with it.

Each ``<library>_<work>`` takes the library's functions and the inputs of a case, does what the trainer does once per
batch (casts of masks, shapes), and returns the call that is timed. Its outputs are the first of ours.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import distribution
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

from bench.cases import CLIP, ENTROPY_COEF, GAMMA, KL_COEF, LAM, SCORE_CLIP
from bench.source import functions

Call = Callable[[], object]


class AbsentError(Exception):
    """Why a provider has no row."""


def _module(package: str, file: str) -> ModuleType:
    """A file that imports nothing of its package (Triton wants its kernels in a real file)."""
    spec = importlib.util.spec_from_file_location(f"bench_{package}", distribution(package).locate_file(file))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_trl() -> SimpleNamespace:
    try:
        import transformers.utils
    except ImportError as error:
        raise AbsentError(f"needs transformers: {error}") from error
    given: dict[str, object] = {"_use_triton": lambda device: device.type == "cuda"}
    if transformers.utils.is_triton_available():
        fused = _module("trl", "trl/kernels/logprob_entropy.py")
        given["_fused_logprob_entropy"] = fused.selective_log_softmax_and_entropy
    names = ("selective_log_softmax", "entropy_from_logits", "selective_log_softmax_and_entropy")
    # What the backward imports of the package: a context for weights that ZeRO-3 has parted.
    utils = sys.modules["bench_trl.trainer.utils"] = ModuleType("bench_trl.trainer.utils")
    utils.maybe_gather_lm_head_ctx = lambda *_parameters: nullcontext()
    chunked = functions(
        "trl", "trl/kernels/chunked_logprob.py", "ChunkedLogProbFunction", __package__="bench_trl.kernels"
    )
    return SimpleNamespace(**functions("trl", "trl/trainer/utils.py", *names, **given), **chunked)


def as_sequences(logits, labels):
    """[B, T, V] and [B, T], as their callers have them: some of these functions loop over B."""
    sequences = math.gcd(len(labels), 4)
    return logits.view(sequences, -1, logits.size(-1)), labels.view(sequences, -1)


def trl_logprobs(trl, logits, labels):
    logits, labels = as_sequences(logits, labels)
    return lambda: trl.selective_log_softmax(logits, labels).flatten()


def trl_entropy(trl, logits, labels):
    logits, labels = as_sequences(logits, labels)
    return lambda: tuple(x.flatten() for x in trl.selective_log_softmax_and_entropy(logits, labels))


def trl_linear(trl, hidden, weight, labels):
    apply, chunk = trl.ChunkedLogProbFunction.apply, 32768  # as its trainers have it
    return lambda: apply(hidden, weight, None, labels, 1.0, chunk, None, 1.0, ())[0]


def trl_linear_policy_loss(trl, hidden, weight, labels, old_logprobs, advantages, mask):
    """Its GRPO loss: log-probabilities of the rows that count, then a few lines of PyTorch."""
    y, old, count = labels[mask], old_logprobs[mask], mask.sum()
    a = advantages[:, None].expand_as(mask)[mask]
    apply, chunk = trl.ChunkedLogProbFunction.apply, 32768

    def call():
        ratio = (apply(hidden[mask], weight, None, y, 1.0, chunk, None, 1.0, ())[0] - old).exp()
        return -torch.min(a * ratio, a * ratio.clamp(1 - CLIP, 1 + CLIP)).sum() / count

    return call


class _Config(SimpleNamespace):
    """verl's actor config: attributes and ``get``."""

    def get(self, name: str, default: object) -> object:
        return getattr(self, name, default)


def load_verl() -> SimpleNamespace:
    tensors = functions(
        "verl",
        "verl/utils/torch_functional.py",
        *("logprobs_from_logits", "entropy_from_logits", "masked_sum", "masked_mean", "masked_whiten", "clip_by_value"),
    )
    core = functions(
        "verl",
        "verl/trainer/ppo/core_algos.py",
        *("compute_gae_advantage_return", "compute_policy_loss_vanilla", "compute_value_loss", "kl_penalty"),
        *("compute_policy_loss_gspo", "compute_policy_loss_sapo", "compute_policy_loss_dppo_tv", "agg_loss"),
        "FixedKLController",
        *("compute_grpo_outcome_advantage", "compute_gdpo_outcome_advantage"),
        verl_F=SimpleNamespace(**tensors),
        AlgoConfig=type("AlgoConfig", (), {}),  # what the config must not be
        ActorConfig=_Config,  # what some want it to be
    )
    correction = functions(
        "verl",
        "verl/trainer/ppo/rollout_corr_helper.py",
        "compute_rollout_correction_weights",
        verl_F=SimpleNamespace(**tensors),
    )
    penalty = functions(
        "verl",
        "verl/trainer/ppo/ray_trainer.py",
        "apply_kl_penalty",
        core_algos=SimpleNamespace(**core),
        masked_mean=tensors["masked_mean"],
    )
    return SimpleNamespace(**tensors, **core, **correction, **penalty)


VERL_CLIP = _Config(
    clip_ratio=CLIP, clip_ratio_low=CLIP, clip_ratio_high=CLIP, tau_pos=1.0, tau_neg=1.05, global_batch_info={}
)


class _Batch(dict):
    """verl's TensorDict, as far as the KL penalty uses it."""

    @property
    def batch_size(self) -> torch.Size:
        return self["response_mask"].shape[:1]


def verl_logprobs(verl, logits, labels):
    return lambda: verl.logprobs_from_logits(logits, labels, inplace_backward=False)


def verl_entropy(verl, logits, labels):
    return lambda: (
        verl.logprobs_from_logits(logits, labels, inplace_backward=False),
        verl.entropy_from_logits(logits),
    )


def verl_gae(verl, rewards, values, mask):
    mask = mask.long()
    return lambda: verl.compute_gae_advantage_return(rewards, values, mask, GAMMA, LAM)


def verl_penalty(verl, logprobs, ref_logprobs, scores, mask, estimator):
    batch = _Batch(
        response_mask=mask.long(),
        token_level_scores=_at_last_token(scores, mask),
        old_log_probs=logprobs,
        ref_log_prob=ref_logprobs,
    )
    data, control = SimpleNamespace(batch=batch), verl.FixedKLController(KL_COEF)

    def call():
        verl.apply_kl_penalty(data, control, estimator)
        return batch["token_level_rewards"]

    return call


def verl_experience(verl, values, **rollout):
    rewards = verl_penalty(verl, **rollout, estimator="k1")
    mask = rollout["mask"].long()

    def call():
        r = rewards()
        return r, *verl.compute_gae_advantage_return(r, values, mask, GAMMA, LAM)

    return call


def verl_sapo_loss(verl, logprobs, old_logprobs, advantages, mask, row_weight, normalizer):
    """Whatever mode it is given, it takes the mean over rows of the mean over tokens."""
    return verl_policy_loss(verl, logprobs, old_logprobs, advantages, mask, loss="sapo")


def verl_policy_loss(verl, logprobs, old_logprobs, advantages, mask, loss="vanilla"):
    mask, compute = mask.long(), getattr(verl, f"compute_policy_loss_{loss}")
    return lambda: compute(old_logprobs, logprobs, advantages, mask, "token-mean", config=VERL_CLIP)[0]


def verl_policy_loss_with_entropy(verl, logprobs, old_logprobs, advantages, mask, entropy):
    """As ``ppo_loss`` of its workers ends."""
    policy_loss, mask = verl_policy_loss(verl, logprobs, old_logprobs, advantages, mask), mask.long()
    return lambda: policy_loss() - ENTROPY_COEF * verl.agg_loss(entropy, mask, "token-mean")


def verl_importance_weights(verl, logprobs, rollout_logprobs, mask):
    weigh, live = verl.compute_rollout_correction_weights, mask.float()
    return lambda: (weigh(logprobs - rollout_logprobs, live, "token", 2.0)[0], mask)


def verl_group_advantages(verl, scores, group_ids):
    """Of one reward by its "grpo", of several by its "gdpo": responses of one token."""
    mask, index = torch.ones(len(scores), 1, device=scores.device), group_ids.cpu().numpy()
    if scores.dim() == 1:
        compute = verl.compute_grpo_outcome_advantage
        return lambda: compute(scores[:, None], mask, index, epsilon=1e-4)[0][:, 0]
    names = [f"reward{r}" for r in range(scores.size(1))]
    found = dict(zip(names, scores.cpu().numpy().T, strict=True))
    batch = {"prompts": mask, "attention_mask": torch.ones(len(scores), 2, dtype=torch.int64, device=scores.device)}
    options = {"config": {"gdpo_reward_keys": names}, "non_tensor_batch": found, "batch": batch, "epsilon": 1e-4}
    return lambda: verl.compute_gdpo_outcome_advantage(mask, mask, index, **options)[0][:, 0]


def verl_value_loss(verl, values, old_values, returns, mask):
    mask = mask.long()
    return lambda: verl.compute_value_loss(values, returns, old_values, mask, CLIP)[0]


def verl_from_logits(verl, logits, labels, old_logprobs, advantages, mask):
    advantages, mask = advantages[:, None].expand_as(mask), mask.long()

    def call():
        logprobs = verl.logprobs_from_logits(logits[:, :-1], labels, inplace_backward=False)
        return verl.compute_policy_loss_vanilla(old_logprobs, logprobs, advantages, mask, config=VERL_CLIP)[0]

    return call


def load_openrlhf() -> SimpleNamespace:
    names = ("log_probs_from_logits", "compute_approx_kl", "compute_reward", "masked_mean")
    utils = functions("openrlhf", "openrlhf/models/utils.py", *names)
    losses = functions(
        "openrlhf", "openrlhf/models/loss.py", "PolicyLoss", "ValueLoss", masked_mean=utils["masked_mean"]
    )
    maker, method = "openrlhf/trainer/ppo_utils/experience_maker.py", "get_advantages_and_returns"
    return SimpleNamespace(**utils, **losses, **functions("openrlhf", maker, f"RemoteExperienceMaker.{method}"))


def openrlhf_logprobs(openrlhf, logits, labels):
    logits, labels = as_sequences(logits, labels)
    return lambda: openrlhf.log_probs_from_logits(logits, labels).flatten()


def skyrl_logprobs(skyrl, logits, labels):
    logits, labels = as_sequences(logits, labels)
    return lambda: skyrl.logprobs_from_logits(logits, labels, False).flatten()


def openrlhf_gae(openrlhf, rewards, values, mask):
    return lambda: openrlhf.get_advantages_and_returns(None, values, rewards, mask, GAMMA, LAM)


def openrlhf_rewards(openrlhf, logprobs, ref_logprobs, scores, mask, estimator):
    def call():
        kl = openrlhf.compute_approx_kl(logprobs, ref_logprobs, kl_estimator=estimator)
        return openrlhf.compute_reward(scores, KL_COEF, kl, mask, (-SCORE_CLIP, SCORE_CLIP))

    return call


def openrlhf_policy_loss(openrlhf, logprobs, old_logprobs, advantages, mask):
    loss = openrlhf.PolicyLoss(CLIP, CLIP)
    return lambda: loss(logprobs, old_logprobs, advantages, mask)[0]


def openrlhf_value_loss(openrlhf, values, old_values, returns, mask):
    loss = openrlhf.ValueLoss(CLIP)
    return lambda: loss(values, old_values, returns, mask)


def load_skyrl() -> SimpleNamespace:
    tensors = functions(
        "skyrl", "skyrl/backends/skyrl_train/utils/torch_utils.py", "logprobs_from_logits", "masked_mean"
    )
    ppo = functions(
        "skyrl",
        "skyrl/backends/skyrl_train/utils/ppo_utils.py",
        "compute_gae_advantage_return",
        "masked_whiten",
        masked_mean=tensors["masked_mean"],
        register_advantage_estimator=lambda name: lambda function: function,  # a registry of ray actors
    )
    return SimpleNamespace(**tensors, **ppo)


def skyrl_gae(skyrl, rewards, values, mask):
    rewards, values, live = rewards * mask, values * mask, mask.float()  # padding is 0 in its batches
    return lambda: skyrl.compute_gae_advantage_return(rewards, values, live, GAMMA, LAM)


def torchrl_gae(torchrl, rewards, values, mask):
    done = torch.zeros_like(mask)
    done.scatter_(1, mask.sum(1, keepdim=True) - 1, True)
    done[:, -1] = True
    following = torch.nn.functional.pad(values[:, 1:], (0, 1))
    arguments = [x[..., None].contiguous() for x in (values, following, rewards, done)]

    def call():
        advantages, returns = torchrl.vec_generalized_advantage_estimate(GAMMA, LAM, *arguments)
        return advantages.squeeze(-1), returns.squeeze(-1)

    return call


def load_liger() -> SimpleNamespace:
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    cross_entropy = LigerCrossEntropyFunction.apply
    return SimpleNamespace(selective=fused_selective_log_softmax, grpo=triton_grpo_loss, cross_entropy=cross_entropy)


def liger_selective(liger, logits, labels):
    """It leaves out the last position, so one more row follows."""
    padded = torch.nn.functional.pad(logits, (0, 0, 0, 1))[None]
    return lambda: liger.selective(padded, labels[None], temperature=1.0)[0]


def liger_cross_entropy(liger, logits, labels):
    """In place it would overwrite the logits of the next call; a clone is what its caller would need then."""
    return lambda: -liger.cross_entropy(logits.clone(), labels, None, -100, 0.0, 0.0, "none")[0]


def liger_grpo(liger, logits, labels, old_logprobs, advantages, mask):
    count = mask.sum()

    def call():
        losses = liger.grpo(
            logits,
            *(old_logprobs, None, labels, advantages, mask),
            temperature=1.0,
            beta=0.0,
            eps_low=CLIP,
            eps_high=CLIP,
            inplace=False,
        )[0]
        return (losses * mask).sum() / count

    return call


def flash_attn_logprobs(flash_attn, logits, labels):
    return lambda: -flash_attn.cross_entropy_loss(logits, labels, inplace_backward=False)[0]


def quack_logprobs(quack, logits, labels):
    return lambda: -quack.cross_entropy(logits, labels, reduction="none")


def torch_logprobs(_, logits, labels):
    return lambda: -torch.nn.functional.cross_entropy(logits, labels, reduction="none")


def torch_linear(_, hidden, weight, labels):
    return lambda: -torch.nn.functional.linear_cross_entropy(hidden, weight, labels, reduction="none")


def _at_last_token(scores: Tensor, mask: Tensor) -> Tensor:
    return torch.zeros_like(mask, dtype=scores.dtype).scatter_(1, mask.sum(1, keepdim=True) - 1, scores[:, None])
