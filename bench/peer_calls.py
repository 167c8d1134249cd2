"""How other libraries are called where that is more than an expression (bench/peers.py).

Each ``<library>_<work>`` takes the library's functions and the inputs of a case, does what the trainer does once per
batch (casts of masks, shapes), and returns the call that is timed. Its outputs are the first of ours.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch

from bench.cases import CLIP, ENTROPY_COEF, GAMMA, KL_COEF, LAM, SCORE_CLIP


def sequences(x):
    """[B, T, V] and [B, T], as the callers of these functions have them: some loop over B."""
    return x.unflatten(0, (math.gcd(len(x), 4), -1))


def trl_chunked(trl, hidden, weight, labels):
    """In chunks as its trainers have them."""
    return trl.ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, 32768, None, 1.0, ())[0]


def trl_linear_policy_loss(trl, hidden, weight, labels, old_logprobs, advantages, mask):
    """Its GRPO loss: log-probabilities of the rows that count, then a few lines of PyTorch."""
    y, old, count = labels[mask], old_logprobs[mask], mask.sum()
    a = advantages[:, None].expand_as(mask)[mask]

    def call():
        ratio = (trl_chunked(trl, hidden[mask], weight, y) - old).exp()
        return -torch.min(a * ratio, a * ratio.clamp(1 - CLIP, 1 + CLIP)).sum() / count

    return call


class VerlConfig(SimpleNamespace):
    """verl's actor config: attributes and ``get``."""

    def get(self, name: str, default: object) -> object:
        return getattr(self, name, default)


VERL_CLIP = VerlConfig(
    clip_ratio=CLIP, clip_ratio_low=CLIP, clip_ratio_high=CLIP, tau_pos=1.0, tau_neg=1.05, global_batch_info={}
)


class _Batch(dict):
    """verl's TensorDict, as far as the KL penalty uses it."""

    @property
    def batch_size(self) -> torch.Size:
        return self["response_mask"].shape[:1]


def verl_logprobs(verl, x):
    return verl.logprobs_from_logits(x.logits, x.labels, inplace_backward=False)


def verl_penalty(verl, logprobs, ref_logprobs, scores, mask, estimator):
    batch = _Batch(
        response_mask=mask.long(),
        token_level_scores=torch.zeros_like(logprobs).scatter_(1, mask.sum(1, keepdim=True) - 1, scores[:, None]),
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


def verl_from_logits(verl, logits, labels, old_logprobs, advantages, mask):
    advantages, mask = advantages[:, None].expand_as(mask), mask.long()

    def call():
        logprobs = verl.logprobs_from_logits(logits[:, :-1], labels, inplace_backward=False)
        return verl.compute_policy_loss_vanilla(old_logprobs, logprobs, advantages, mask, config=VERL_CLIP)[0]

    return call


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


def liger_selective(liger, logits, labels):
    """It leaves out the last position, so one more row follows."""
    padded = torch.nn.functional.pad(logits, (0, 0, 0, 1))[None]
    return lambda: liger.fused_selective_log_softmax(padded, labels[None], temperature=1.0)[0]


def liger_cross_entropy(liger, logits, labels):
    """In place it would overwrite the logits of the next call; a clone is what its caller would need then."""
    cross_entropy = liger.LigerCrossEntropyFunction.apply
    return lambda: -cross_entropy(logits.clone(), labels, None, -100, 0.0, 0.0, "none")[0]


def liger_grpo(liger, logits, labels, old_logprobs, advantages, mask):
    count = mask.sum()
    options = {"temperature": 1.0, "beta": 0.0, "eps_low": CLIP, "eps_high": CLIP, "inplace": False}

    def call():
        losses = liger.triton_grpo_loss(logits, old_logprobs, None, labels, advantages, mask, **options)[0]
        return (losses * mask).sum() / count

    return call
