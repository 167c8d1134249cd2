"""The models of a run: the policy, its reference, the critic and whoever gives the scores."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import lora
from .config import PPOConfig, SamplingConfig, UserError
from .data import Task
from .engines import Policy, Trainable, frozen
from .experience import Judge, score_responses
from .models import ScalarModel, checked, load_policy, load_scalar, load_tokenizer, stage_model
from .rewards import FunctionReward


@dataclass
class Roles:
    actor: Policy
    reference: Policy
    critic: Trainable | None
    judge: Judge

    @property
    def trained(self) -> dict[str, Trainable]:
        assert isinstance(self.actor.model, Trainable)
        return {"actor": self.actor.model} | ({"critic": self.critic} if self.critic else {})


def cast(
    config: PPOConfig, task: Task, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, needs_critic: bool
) -> Roles:
    """All models of a run; the reference is a copy of the policy before its first update."""
    per_step = config.num_ppo_epochs * config.num_mini_batches
    judge = find_judge(config, task, tokenizer)
    reference: Any = load_policy(stage_model(config, "sft", config.sft_model_path), config, tokenizer)
    reference.load_state_dict(policy.state_dict())
    reference = frozen(reference, config)  # split at once, where models are: the next one needs the host's memory
    critic = None
    if needs_critic:
        rate = config.learning_rate if config.critic_learning_rate is None else config.critic_learning_rate
        body = lora.adapted(_critic(config, policy), config, config.critic_lora_r)
        critic = Trainable(body, config, rate, config.total_steps * per_step)
    updates = (config.total_steps - config.critic_warmup_steps) * per_step
    actor = Trainable(lora.adapted(policy, config, config.lora_r), config, config.learning_rate, max(updates, 1))
    return Roles(
        Policy(actor, config.temperature, config.ops_impl),
        Policy(reference, config.temperature, config.ops_impl),
        critic,
        judge,
    )


def starting_point(config: PPOConfig, task: Task) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The policy before training, and its tokenizer."""
    start = stage_model(config, "sft", config.sft_model_path)
    tokenizer = checked(task.tokenizer()) if start is None else load_tokenizer(start)
    return load_policy(start, config, tokenizer), tokenizer


def find_judge(config: SamplingConfig, task: Task, tokenizer: PreTrainedTokenizerBase) -> Judge:
    """A Python function, the task's own verifier, or a reward model: whichever comes first."""
    if config.reward_function is not None:
        return FunctionReward(config.reward_function, tokenizer, task.columns())
    if task.verifiable:
        return task.score
    assert isinstance(config, PPOConfig)
    reward_model = frozen(load_scalar(_reward_path(config), "reward_model_path"), config)
    return lambda rollout: score_responses(reward_model, rollout)


def _critic(config: PPOConfig, policy: PreTrainedModel) -> ScalarModel:
    if config.value_model_path is not None:
        return load_scalar(config.value_model_path, "value_model_path")
    return (
        load_scalar(_reward_path(config), "reward_model_path")
        if config.value_model_init == "reward"
        else ScalarModel.on(policy, zero_head=True)
    )


def _reward_path(config: PPOConfig) -> Path:
    path = stage_model(config, "reward", config.reward_model_path)
    if path is None:
        raise UserError("no reward model: give reward_model_path or reward_function, or run the reward command first")
    return path
