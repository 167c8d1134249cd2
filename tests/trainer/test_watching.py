"""What a person sees of a run while it goes on: completions, counts, warnings, and the best of it kept."""

import json
import math
import sys
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from python_trainer import logging
from python_trainer.config import UserError
from python_trainer.evaluate import Best
from python_trainer.models import save_model
from python_trainer.ppo_config import PPOConfig
from python_trainer.rollout import alike, learned_from
from tests.lib.trainer import TINY, TINY_MODEL, metric_rows


def completions(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / "train" / "completions.jsonl").read_text().splitlines()]


def test_completions_are_kept_every_so_many_steps(tiny, tmp_path):
    trainer = tiny(total_steps=5, log_completions_steps=2, save_steps=2)
    trainer.train()
    rows = completions(tmp_path)
    assert [row["step"] for row in rows] == [2] * 16 + [4] * 16
    prompts, experience = trainer.rolled_out
    assert {row["prompt"] for row in rows} <= {"a", "b a", "c", "d b"}
    assert all(row["score"] >= 0 and 1 <= row["length"] <= 5 and type(row["ended"]) is bool for row in rows)
    assert len(prompts) == len(experience.mask) == 16
    means = {row["step"]: row["objective/scores"] for row in metric_rows(tmp_path / "run") if "objective/scores" in row}
    assert sum(row["score"] for row in rows[16:]) / 16 == pytest.approx(means[4])
    assert sum(row["kl"] for row in rows[16:]) / 16 == pytest.approx(
        next(row["objective/kl"] for row in metric_rows(tmp_path / "run") if row["step"] == 4), abs=1e-6
    )
    tiny(total_steps=3, log_completions_steps=1, resume_from_checkpoint=str(step(tmp_path, 2))).train()
    assert [row["step"] for row in completions(tmp_path)] == [2] * 16 + [3] * 16


def step(folder, number):
    return folder / "run" / "train" / "checkpoints" / f"step-{number:06d}"


def test_some_go_to_the_curves_elsewhere(tiny, monkeypatch):
    shown = []

    class Service:
        def record(self, *_):
            pass

        def completions(self, step, rows):
            shown.append((step, len(rows)))

        def close(self):
            pass

    monkeypatch.setattr(logging, "open_reports", lambda *_: [Service()])
    monkeypatch.setattr(logging, "SHOWN", 3)
    tiny(total_steps=2, log_completions_steps=2).train()
    assert shown == [(2, 3)]


def test_warnings_stand_in_the_line():
    assert logging.warnings({"val/eos_rate": 0.6, "objective/scores_std": 0.1}, 8) == []
    assert logging.warnings({"val/eos_rate": 0.3}, 8) == ["70% of the responses are cut at response_length"]
    assert logging.warnings({"val/frac_reward_zero_std": 0.75, "objective/scores_std": 0.1}, 8) == [
        "in 75% of the groups all responses score alike"
    ]
    assert logging.warnings({"objective/scores_std": 0.0}, 8) == ["all responses score alike"]
    assert logging.warnings({"val/masked_responses": 7}, 8) == []
    assert logging.warnings({"val/masked_responses": 8}, 8) == ["nothing is learned: all responses are masked"]


@pytest.mark.parametrize("columns", [30, 80, 400])
def test_a_line_fits_the_terminal(tiny, monkeypatch, capsys, columns):
    """What is elsewhere, a file or a pipe, has all of it."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda _: True, raising=False)
    tiny(total_steps=2).train()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(lines) == 2
    assert all(len(line) <= columns for line in lines)
    assert [line[:15] for line in lines] == (
        ["step    1  obje", "step    2  obje"] if columns == 400 else ["step    1  kl 0", "step    2  kl 0"]
    )
    assert ("scores" in lines[1]) == (columns > 30)


def test_a_line_for_each_step(tiny, capsys):
    """Also where there is no terminal and no bar."""
    trainer = tiny(total_steps=2)
    trainer.reward_fn = lambda rollout: torch.ones(len(rollout))
    trainer.train()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(lines) == 2
    assert all("val/eos_rate" in line and "! all responses score alike" in line for line in lines)


@pytest.mark.parametrize("algorithm", ["ppo", "rloo", "grpo", "reinforce++"])
def test_masked_responses_move_nothing(tiny, algorithm):
    """Those that are cut, and groups that score alike: neither scores nor tokens of them have a part in the step."""
    settings = {"algorithm": algorithm, "num_generations": 2, "mask_truncated_completions": True}
    trainer = tiny(**settings, mask_zero_variance_groups=True, kl_coef=0.05)
    experience = trainer.collect_experience()
    experience.raw_scores[:2] = 1.0  # one group that scores alike
    experience.ended[:2] = True
    experience.ended[2:6] = torch.tensor([True, False, True, True])
    learned = learned_from(experience, trainer.config, trainer.algorithm.group_size)
    left_out = ~experience.ended | alike(experience.raw_scores, trainer.algorithm.group_size).repeat_interleave(
        trainer.algorithm.group_size
    )
    assert left_out[[0, 1, 3]].all()
    assert (learned.mask.any(dim=1) == ~left_out).all()
    gradients = []
    for noise in (0.0, 1.0):
        for name in ("advantages", "logprobs", "ref_logprobs", "returns"):
            getattr(experience, name)[left_out] += noise
        learned = learned_from(experience, trainer.config, trainer.algorithm.group_size)
        normalizer = trainer.algorithm.normalizer(learned.mask)
        logprobs = experience.logprobs.clone().requires_grad_()
        loss, _ = trainer.algorithm.policy_loss(logprobs * learned.mask, learned, normalizer)
        gradients.append(torch.autograd.grad(loss, logprobs)[0])
    assert gradients[0][left_out].count_nonzero() == 0
    assert gradients[0].count_nonzero() > 0
    torch.testing.assert_close(gradients[1][~left_out], gradients[0][~left_out])


@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_statistics_are_of_what_is_learned_from(tiny, algorithm):
    """The same of a batch, and of one that has responses beside those that are left out."""
    trainer = tiny(algorithm=algorithm, num_generations=2)
    experience = trainer.collect_experience()
    kept = torch.arange(16) < 4
    zeroed = {"mask": experience.mask & kept[:, None]}
    for name in ("logprobs", "ref_logprobs", "advantages"):
        zeroed[name] = getattr(experience, name) * kept[:, None]
    found = []
    for batch in (replace(experience, **zeroed), experience[kept.nonzero().squeeze(1)]):
        normalizer = trainer.algorithm.normalizer(batch.mask)
        _, statistics = trainer.algorithm.policy_loss((batch.logprobs + 0.1) * batch.mask, batch, normalizer)
        averages = logging.Averages()
        averages.add(statistics, trainer.algorithm.weight(batch.mask))
        averages.add({name: 3 * value for name, value in statistics.items()}, torch.tensor(4))  # of another micro-batch
        found.append(averages.reduce())
    assert found[0] == pytest.approx(found[1])
    assert found[0]["policy/approxkl_avg"] > 0.001


def test_masks_are_counted_and_a_batch_without_any_left_has_no_gradient(tiny):
    trainer = tiny(algorithm="grpo", num_generations=4, mask_zero_variance_groups=True, entropy_coef=0.1)
    row = trainer.train_step()
    assert (row["val/masked_responses"], row["val/frac_reward_zero_std"]) == (0, 0)
    trainer.reward_fn = lambda rollout: torch.ones(len(rollout))
    row = trainer.train_step()
    assert (row["val/masked_responses"], row["val/frac_reward_zero_std"]) == (16, 1)
    assert (row["actor/grad_norm"], row["val/skipped_updates"]) == (0, 0)


@pytest.mark.parametrize("algorithm", ["p3o", "online_dpo"])
def test_pairs_have_no_use_for_masks(tiny, algorithm):
    with pytest.raises(UserError, match="no use for mask_truncated_completions"):
        tiny(algorithm=algorithm, mask_truncated_completions=True)


def takes(best: Best, metrics: dict[str, float]) -> bool:
    beaten = best.is_beaten(metrics)
    best.observe(metrics)
    return beaten


def test_the_best_is_the_best():
    settings = {"eval_steps": 1, "early_stopping_patience": 2}
    best = Best(PPOConfig(metric_for_best_model="score", **settings))
    taken = [takes(best, {"eval/score": value}) for value in (math.nan, -1.0, -2.0, 3.0, math.nan, 3.0)]
    assert taken == [False, True, False, True, False, False]
    assert best.given_up
    for other in ({"metric_for_best_model": "kl"}, {"metric_for_best_model": "score", "greater_is_better": False}):
        fresh = Best(PPOConfig(**settings | other))
        fresh.restore(best.state())
        assert not fresh.given_up
        assert takes(fresh, {"eval/kl": 2.5, "eval/score": 4.0})
    same = Best(PPOConfig(metric_for_best_model="eval/score", **settings))
    same.restore(json.loads(json.dumps(best.state(), allow_nan=False)))
    assert same.given_up
    assert not takes(same, {"eval/score": 3.0})
    with pytest.raises(UserError, match="metric_for_best_model wibble is not evaluated; there are eval/score"):
        Best(PPOConfig(metric_for_best_model="wibble", eval_steps=1)).key({"eval/score": 1.0})


def test_the_best_model_is_kept_and_a_run_that_gets_no_better_stops(tiny, tmp_path, monkeypatch, capsys):
    scores = iter([0.1, 0.3, 0.2, 0.1, 0.0, 9.0])
    trainer = tiny(total_steps=9, eval_steps=1, metric_for_best_model="score", early_stopping_patience=3)
    weights, plain = [], trainer.evaluate

    def evaluate(policy):
        result = plain(policy)
        if policy is trainer.actor:
            weights.append(next(policy.module.parameters()).detach().clone())
            result.metrics["eval/score"] = next(scores)
        return result

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    trainer.train()
    assert trainer.done == 5
    assert "no better score in 3 evaluations: stopped after step 5" in capsys.readouterr().out
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "train" / "best")
    assert next(kept.parameters()).equal(weights[1])
    assert (tmp_path / "run" / "train" / "model").is_dir()
    with pytest.raises(UserError, match="earlier run"):
        tiny()


def test_the_best_of_another_run_and_one_that_was_not_saved_are_none(tiny, tmp_path, monkeypatch):
    settings = {"eval_steps": 1, "metric_for_best_model": "score", "total_steps": 2}
    trainer = tiny(**settings)
    plain = trainer._save_model

    def save_model(name):
        if name == "best":
            raise UserError("the disk is full")
        plain(name)

    monkeypatch.setattr(trainer, "_save_model", save_model)
    with pytest.raises(UserError, match="the disk is full; step 1 is saved"):
        trainer.train()
    source = str(step(tmp_path, 1))
    assert tiny(**settings, resume_from_checkpoint=source).best.state() == Best(trainer.config).state()
    trainer.best.observe({"eval/score": 1e9})
    trainer.save_checkpoint(trainer.folder / "checkpoints")
    assert tiny(**settings, resume_from_checkpoint=source).best.highest == 1e9
    other = tiny(**settings, resume_from_checkpoint=source, output_dir=str(tmp_path / "other"))
    assert other.best.state() == Best(trainer.config).state()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"early_stopping_patience": 3}, "early_stopping_patience needs metric_for_best_model"),
        ({"metric_for_best_model": "score"}, "metric_for_best_model needs eval_steps above 0"),
    ],
)
def test_best_of_nothing(settings, message):
    with pytest.raises(ValueError, match=message):
        PPOConfig(**TINY | settings)


def test_nothing_is_computed_behind_the_longest_response(tiny, tmp_path):
    """A rollout of short responses costs what it needs, whatever response_length allows."""
    first = tiny(model_config=json.dumps(TINY_MODEL | {"n_positions": 256}))
    save_model(first.actor.model, first.tokenizer, tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{a} {b}"}) + "\n" for a in "abc" for b in "de")
    )
    (tmp_path / "mine.py").write_text("def f(completions): return [float(len(text)) for text in completions]\n")
    trainer = tiny(
        task="files",
        data_path=str(tmp_path),
        sft_model_path=str(tmp_path / "model"),
        reward_function=f"{tmp_path / 'mine.py'}:f",
        response_length=200,
    )
    computed = []
    trainer.actor.module.register_forward_pre_hook(
        lambda _, __, given: computed.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    experience = trainer.collect_experience()
    longest = int(experience.mask.sum(dim=1).max())
    assert longest < 150
    assert experience.mask.shape == (16, longest)
    assert max(computed) == 2 + longest
    trainer.update(experience)
    assert max(computed) == 2 + longest
