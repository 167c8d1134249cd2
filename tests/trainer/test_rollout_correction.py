"""Rollouts of another engine are weighed by how much likelier their tokens are to the policy; its own are not."""

import contextlib
from dataclasses import replace

import pytest
import torch

from ppo_kernels import importance_weights
from python_trainer import ppo
from python_trainer.algorithms import KlControl, load_algorithm
from python_trainer.config import UserError
from python_trainer.ppo_config import PPOConfig
from python_trainer.rollout import HfGenerator
from python_trainer.rollout_correction import corrected
from tests.lib.trainer import TINY

ENGINE = {"algorithm": "grpo", "generation_engine": "vllm", "rollout_correction": "truncate"}


class Engine(HfGenerator):
    """Draws as the policy does, and is off by `noise` in what it says of each token."""

    def __init__(self, noise: float) -> None:
        super().__init__(64)
        self.noise = noise

    @contextlib.contextmanager
    def serving(self, policy, tokenizer):
        with super().serving(policy, tokenizer) as generate:

            def off(*arguments):
                responses, logprobs = generate(*arguments)
                draw = torch.Generator().manual_seed(1)
                return responses, logprobs + self.noise * torch.randn(logprobs.shape, generator=draw)

            yield off


@pytest.fixture
def of_engine(tiny, monkeypatch):
    monkeypatch.setattr("python_trainer.rollout.GENERATION_TOLERANCE", {"exact": 1.0, "rounded": 1.0})

    def make(noise, **settings):
        monkeypatch.setattr(ppo, "choose_generator", lambda config: Engine(noise))
        return tiny(**ENGINE | settings)

    return make


def test_a_step_has_the_weights_of_its_rollout(of_engine):
    trainer = of_engine(0.2, rollout_correction_high=1.1)
    experience = trainer.collect_experience()
    assert (experience.logprobs - experience.rollout_logprobs).abs().max() > 0.1
    weighted, figures = corrected(experience, trainer.config)
    weights, _, stats = importance_weights(
        experience.logprobs, experience.rollout_logprobs, experience.mask, bounds=1.1
    )
    assert weighted.weights.equal(weights)
    assert weighted.mask.equal(experience.mask)
    assert figures["rollout/ess"] == float(stats.ess) < 1.0
    assert figures["rollout/kept"] == 1.0
    figures = trainer.train_step()
    assert 0.0 < figures["rollout/clipfrac"] < 1.0
    assert figures["rollout/kl_k3"] > 0.0


def test_weights_multiply_the_loss_of_a_token(of_engine):
    trainer = of_engine(0.2)
    batch, _ = corrected(trainer.collect_experience(), trainer.config)
    logprobs = batch.logprobs.clone().requires_grad_()
    loss, _ = trainer.algorithm.policy_loss(logprobs, batch, trainer.algorithm.normalizer(batch.mask))
    (got,) = torch.autograd.grad(loss, logprobs)
    plain = load_algorithm(PPOConfig(**TINY | {"algorithm": "grpo"}), KlControl(trainer.config))
    (want,) = torch.autograd.grad(plain.policy_loss(logprobs, batch, plain.normalizer(batch.mask))[0], logprobs)
    (penalty,) = torch.autograd.grad(
        plain.policy_loss(logprobs, replace(batch, advantages=0 * batch.advantages), plain.normalizer(batch.mask))[0],
        logprobs,
    )
    torch.testing.assert_close(got, (want - penalty) * batch.weights + penalty)
    assert got.any()


@pytest.mark.parametrize(("mode", "counted"), [("mask", False), ("icepop", True)])
def test_what_is_out_of_the_bounds_is_not_learned(of_engine, mode, counted):
    bounds = {"rollout_correction_low": 0.9, "rollout_correction_high": 1.1}
    trainer = of_engine(0.2, rollout_correction=mode, **bounds)
    experience = trainer.collect_experience()
    ratio = (experience.logprobs - experience.rollout_logprobs).exp()
    out = experience.mask & ((ratio < 0.9) | (ratio > 1.1))
    weighted, figures = corrected(experience, trainer.config)
    assert out.any()
    assert not weighted.weights[out].any()
    assert weighted.mask.equal(experience.mask if counted else experience.mask & ~out)
    assert figures["rollout/kept"] == pytest.approx(1.0 if counted else 1.0 - float(out.sum() / experience.mask.sum()))
    assert trainer.train_step()["rollout/kept"] <= 1.0


def test_an_engine_that_says_what_the_policy_says_changes_nothing(of_engine, tiny):
    runs = [of_engine(0.0), tiny(algorithm="grpo")]
    figures = [trainer.train_step() for trainer in runs]
    for mine, plain in zip(*(trainer.actor.module.parameters() for trainer in runs), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-6)
    assert figures[0]["rollout/ess"] == pytest.approx(1.0, abs=1e-6)
    assert not any(name.startswith("rollout/") for name in figures[1])


def test_without_a_correction_the_figures_alone(of_engine):
    trainer = of_engine(0.2, rollout_correction="none")
    experience = trainer.collect_experience()
    same, figures = corrected(experience, trainer.config)
    assert same is experience
    assert figures["rollout/ess"] < 1.0
    assert figures["rollout/clipfrac"] == 0.0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"rollout_correction": "mask"}, "generation_engine hf draws from the weights that are trained"),
        ({"rollout_correction_high": 3.0}, "rollout_correction_high is of rollout_correction"),
        ({"rollout_correction_level": "sequence"}, "rollout_correction_level is of rollout_correction"),
        (ENGINE | {"rollout_correction_low": 2.5}, "rollout_correction_low 2.5 is above rollout_correction_high 2.0"),
        (ENGINE | {"rollout_correction_high": 0.0}, "rollout_correction_high 0.0 leaves no token a weight"),
        (ENGINE | {"rollout_correction_low": -1.0}, "rollout_correction_low.*at least 0"),
    ],
)
def test_settings_that_correct_nothing_are_refused(given, said):
    with pytest.raises(UserError, match=said):
        PPOConfig(**TINY | given)
