"""Which algorithm reads which setting: the table is what the arithmetic does."""

import dataclasses

import pytest
import torch

from python_trainer import algorithms, ppo_config
from python_trainer.algorithms import ALGORITHMS, KlControl, load_algorithm
from python_trainer.config import UserError
from python_trainer.data import Experience
from python_trainer.ppo_config import NAMED, USED_BY, PPOConfig

OTHER = {  # values that matter where the setting is read at all
    "gamma": [0.5],
    "lam": [0.5],
    "whiten_rewards": [True],
    "whiten_advantages": [False],
    "loss_aggregation": ["seq-mean-token-sum", "seq-mean-token-mean"],
    "surrogate": ["cispo", "sapo", "dppo_tv", "dppo_kl"],
    "importance_sampling_level": ["sequence", "sequence_token", "geometric"],
    "rollout_correction": ["truncate"],
    "cliprange": [0.01, 100.0],
    "cliprange_high": [0.01, 2.0],
    "dual_clip": [1.05],
    "kl_estimator": ["k2", "k3"],
    "weight_clip": [1.01],
    "p3o_variant": ["separate"],
    "dpo_labels": ["soft"],
}
OF_THE_LOOP = ("mask_truncated_completions", "mask_zero_variance_groups")
OF_THE_CRITIC = {*USED_BY} - {*OTHER} - {*OF_THE_LOOP}


def settings(algorithm, **given) -> PPOConfig:
    engine = "vllm" if "rollout_correction" in given else "hf"
    return PPOConfig(algorithm=algorithm, num_generations=4, response_length=6, generation_engine=engine, **given)


def outcome(config: PPOConfig) -> torch.Tensor:
    """Advantages and the loss's gradient on made-up responses, some way from the policy that sampled them."""
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randn(8, 6, generator=draw) for _ in range(4)]
    mask = torch.arange(6) < torch.tensor([6, 3, 5, 2, 6, 4, 1, 6])[:, None]
    logprobs, reference, values, step = (row * mask for row in rows)
    scores = torch.randn(8, generator=draw)
    experience = Experience(
        torch.zeros(8, 8, dtype=torch.long), torch.ones(8, 8, dtype=torch.bool), mask, mask[:, -1], logprobs, logprobs,
        reference, values, scores, scores, torch.zeros(8), torch.zeros(8, 6), torch.zeros(8, 6), values.exp(),
    )  # fmt: skip
    algorithm = load_algorithm(config, KlControl(config))
    algorithm.compute_advantages(experience, algorithm.token_rewards(experience))
    moved = (logprobs + 0.5 * step).requires_grad_()
    loss, _ = algorithm.policy_loss(moved * mask, experience, algorithm.normalizer(mask))
    return torch.cat([experience.advantages.flatten(), torch.autograd.grad(loss, moved)[0].flatten()])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_setting_is_read_where_the_table_says_so(algorithm, monkeypatch):
    monkeypatch.setattr(ppo_config, "USED_BY", {})  # nothing is refused
    plain = outcome(settings(algorithm))
    changed = {
        name
        for name, values in OTHER.items()
        if any(not outcome(settings(algorithm, **{name: value})).equal(plain) for value in values)
    }
    assert changed == {name for name in OTHER if algorithm in USED_BY[name]}
    critic = ALGORITHMS[algorithm].needs_critic
    assert all((algorithm in USED_BY[name]) == critic for name in OF_THE_CRITIC)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_is_not_read_is_refused_or_named(algorithm, capsys):
    values = {name: values[0] for name, values in OTHER.items()} | dict.fromkeys(OF_THE_LOOP, True)
    values |= {"critic_warmup_steps": 1, "critic_lora_r": 2, "value_model_path": "x", "value_model_init": "reward"}
    values |= {"critic_learning_rate": 1.0, "vf_coef": 0.5, "cliprange_value": 0.5}
    assert values.keys() == USED_BY.keys() <= {field.name for field in dataclasses.fields(PPOConfig)}
    algorithms.files.say_once.cache_clear()
    for name, value in values.items():
        config = settings(algorithm, **{name: value})
        if algorithm in USED_BY[name] or name in NAMED:
            load_algorithm(config, KlControl(config))
        else:
            with pytest.raises(UserError, match=f"has no use for {name}; leave it out"):
                load_algorithm(config, KlControl(config))
    said = capsys.readouterr().err
    assert all((f"no use for {name}" in said) == (algorithm not in USED_BY[name]) for name in NAMED)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"surrogate": "cispo", "dual_clip": 3.0}, "dual_clip"),
        ({"surrogate": "dppo_tv", "importance_sampling_level": "sequence"}, "dppo_tv"),
        ({"surrogate": "sapo", "cliprange": 0.3}, "sapo clips nothing and has no use for cliprange;"),
        ({"surrogate": "sapo", "cliprange_high": 0.28}, "no use for cliprange_high; leave it out"),
    ],
)
def test_what_does_not_go_together_is_refused_before_the_first_step(given, said):
    config = settings("grpo", **given)
    with pytest.raises(UserError, match=said):
        load_algorithm(config, KlControl(config))
