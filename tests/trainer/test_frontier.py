"""The KL-reward frontier: its optimum, and mistakes in its settings."""

import csv
import functools
import json
from pathlib import Path

import pytest

from python_trainer.compare import Figures, Win
from python_trainer.config import UserError
from python_trainer.frontier import Choice, Line, Point, at_edges, draw, fitted, frontier
from python_trainer.ppo_config import FrontierConfig
from python_trainer.rollout import score_tokens
from python_trainer.settings import load
from tests.lib.trainer import ROOT, TINY

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


def test_the_line_is_that_of_least_squares():
    points = [Point("ppo", 0.1, step, kl, 0.5 + 2 * kl, None) for step, kl in enumerate((0.0, 1.0, 4.0))]
    line = fitted("ppo", [*points, Point("rloo", 0.1, 0, 1.0, 9.0, None)])
    assert (line.intercept, line.slope, line.r2) == pytest.approx((0.5, 2.0, 1.0))
    assert line.r2_of_root < 1
    assert fitted("ppo", points[:1]) is None


def test_a_score_that_is_not_finite_is_no_point_of_the_line(tmp_path, capsys):
    """metrics.jsonl has null for it; all runs are done by then."""

    def run(config) -> None:
        folder = Path(config.output_dir) / "train"
        folder.mkdir()
        rows = [
            {"step": step, "exact/kl": kl, "exact/reward": r} for step, kl, r in ((0, 0, 0), (1, 1, None), (2, 2, 4))
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    study = {"algorithms": "rloo", "kl_coefs": "0.1", "output_dir": str(tmp_path)}
    frontier(FrontierConfig(**TINY | study), run)
    assert "run 1 of 1: rloo, kl_coef 0.1, learning_rate 0.001, num_mini_batches 1, seed 0" in capsys.readouterr().out
    with (tmp_path / "frontier" / "lines.csv").open() as file:
        assert [row["slope"] for row in csv.DictReader(file)] == ["2"]


def made_up(runs: list, config) -> None:
    """A run that learns best at the rate 0.003 with PPO, where others pay more KL for their reward than it is worth."""
    runs.append(config)
    reward = config.learning_rate + 0.0001 * config.num_mini_batches + 0.01 * config.seed
    kl = 0.5 if config.algorithm == "ppo" else 500 * config.learning_rate
    folder = Path(config.output_dir) / "train"
    folder.mkdir()
    rows = [{"step": 0, "exact/kl": 0.0, "exact/reward": 0.0}, {"step": 3, "exact/kl": kl, "exact/reward": reward}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_each_algorithm_gets_what_it_learned_best_with_on_another_seed(tmp_path, capsys):
    study = {
        "algorithms": "ppo,rloo",
        "kl_coefs": "0.1,0.2,0.4",
        "learning_rates": "0.001,0.003",
        "mini_batches": "1,2",
    }
    runs: list = []
    frontier(FrontierConfig(**TINY | study | {"output_dir": str(tmp_path)}), functools.partial(made_up, runs))
    trials, drawn = runs[:8], runs[8:]
    assert {(run.seed, run.kl_coef) for run in trials} == {(0, 0.2)}
    assert {run.seed for run in drawn} == {1, 2}
    assert len(drawn) == 2 * 3 * 2
    assert {(run.algorithm, run.learning_rate, run.num_mini_batches) for run in drawn} == {
        ("ppo", 0.003, 2),
        ("rloo", 0.001, 2),
    }
    assert {run.total_steps * run.batch_size for run in runs} == {48}  # responses
    with (tmp_path / "frontier" / "choices.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["responses"] for row in rows] == ["48"] * 8
    assert [row["learning_rate"] for row in rows if row["chosen"] == "True"] == ["0.003", "0.001"]
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("frontier: ")]
    assert [line.split(": ")[1].split(",")[0] for line in told] == [
        "ppo chose learning_rate 0.003",
        "ppo chose num_mini_batches 2",
        "rloo chose learning_rate 0.001",
        "rloo chose num_mini_batches 2",
    ]


def test_a_choice_inside_what_was_tried_lies_at_no_edge():
    rates = (0.1, 0.2, 0.3)
    assert at_edges([Choice("ppo", rate, 1, 0.0, 8, rate == 0.2) for rate in rates]) == []
    assert (
        at_edges(
            [Choice("ppo", rate, number, 0.0, 8, (rate, number) == (0.2, 1)) for rate in rates for number in (1, 4)]
        )
        == []
    )
    assert len(at_edges([Choice("ppo", rate, 1, 0.0, 8, rate == 0.1) for rate in rates])) == 1


TABLES = {"choices": Choice, "lines": Line, "policies": Figures, "wins": Win}


@pytest.mark.parametrize("table", sorted((ROOT / "bench" / "results").glob("[cf]*_*.csv")), ids=lambda path: path.stem)
def test_the_tables_that_are_shown_have_todays_columns(tmp_path, table):
    kind = TABLES.get(table.stem.rpartition("_")[2], Point)
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == kind._fields
    if kind is Point:
        draw(table, tmp_path / "frontier.png")
        assert (tmp_path / "frontier.png").stat().st_size > 10_000


def test_what_is_compared_is_not_what_was_chosen_on():
    with pytest.raises(ValueError, match="with seed 1 learning_rates and mini_batches are chosen"):
        FrontierConfig(**TINY | {"seed": 1, "seeds": "1,2", "learning_rates": "0.1"})
