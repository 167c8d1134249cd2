"""The KL-reward frontier: its optimum, and mistakes in its settings."""

import functools

import pytest

from python_trainer.config import UserError
from python_trainer.ppo_config import FrontierConfig
from python_trainer.rollout import score_tokens
from python_trainer.settings import load

ENUMERATES = True


def test_the_optimum_is_that_of_the_task(tiny):
    trainer = tiny(kl_coef=0.2)
    score = functools.partial(score_tokens, trainer.reference)
    ((_, kl, reward),) = trainer.task.best(score, [0.2])
    figures = trainer.task.exact(score, score, 0.2)
    assert reward - 0.2 * kl == pytest.approx(figures["exact/optimum"], abs=1e-6)


def test_mistakes_are_named():
    with pytest.raises(UserError, match="algorithms: 'ppoo' is none of ppo, p3o"):
        load("frontier", "exact_cpu.yaml", ["--algorithms=ppoo"], FrontierConfig)
    with pytest.raises(UserError, match="kl_coefs must be numbers"):
        load("frontier", "exact_cpu.yaml", ["--kl_coefs=small"], FrontierConfig)
    assert load("frontier", "exact_cpu.yaml", [], FrontierConfig).batch_size == 128  # as in train
