"""The exact task: what its figures mean, and what it refuses."""

import functools
import json

import pytest
import torch
import yaml

from python_trainer import distributed
from python_trainer.compare import beside_reference
from python_trainer.config import CONFIGS, EvalConfig, UserError
from python_trainer.data import load_task
from python_trainer.ppo_config import PPOConfig
from python_trainer.rollout import score_tokens
from python_trainer.settings import load

ENUMERATES = True


def test_evaluation_repeats_the_figures_of_the_run(tiny, tmp_path):
    """The reference comes from the run's settings, wherever they were set."""
    before, after = tiny(seed=1).train()
    config = load("eval", None, [f"--output_dir={tmp_path / 'run'}"], EvalConfig)
    for result, expected in zip(beside_reference(config), (before, after), strict=True):
        assert result.metrics == pytest.approx(expected.metrics, abs=1e-6)
    kept = json.loads((tmp_path / "run" / "eval" / "metrics.json").read_text())
    assert kept["policy"]["exact/kl"] == pytest.approx(after.metrics["exact/kl"], abs=1e-6)


@pytest.mark.parametrize(
    "setting",
    [
        {"response_length": 4},
        {"missing_eos_penalty": 1.0},
        {"score_clip": 0.5},
        {"gamma": 0.9},
        {"kl_estimator": "k3"},
        {"kl_coef": 0.0},
    ],
)
def test_an_objective_with_another_optimum_is_refused(setting):
    (name,) = setting
    with pytest.raises(UserError, match=f"task exact .*{name}"):
        load_task(PPOConfig(task="exact", **{"response_length": 5} | setting))


def test_enumeration_happens_where_the_model_is(monkeypatch):
    monkeypatch.setattr(distributed, "device", lambda: torch.device("meta"))
    rollout = load_task(PPOConfig(task="exact", response_length=5))._all_responses("a")
    assert {x.device.type for x in (rollout.sequences, rollout.attention_mask, rollout.mask)} == {"meta"}


def test_shipped_configurations_name_known_settings():
    from python_trainer.settings import COMMANDS

    for path in CONFIGS.glob("*.yaml"):
        for command in COMMANDS.keys() & yaml.safe_load(path.read_text()).keys():
            load(command, str(path), [], COMMANDS[command])


def test_probabilities_of_all_responses_sum_to_one(tiny):
    """The enumeration misses no response and counts none twice."""
    from python_trainer.tasks.exact import PROMPTS, _sequence_logprobs

    trainer = tiny()
    score = functools.partial(score_tokens, trainer.reference)
    for prompt in PROMPTS:
        rollout = trainer.task._all_responses(prompt)
        total = _sequence_logprobs(score, rollout).exp().sum()
        torch.testing.assert_close(total, torch.ones_like(total), atol=1e-6, rtol=0)
