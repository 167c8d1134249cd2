"""The KL-reward frontier: its points, its optimum, its picture."""

import csv

import pytest
import yaml

from python_trainer import __main__ as command_line
from python_trainer.config import UserError
from python_trainer.frontier import frontier
from python_trainer.ppo import Trainer
from python_trainer.ppo_config import FrontierConfig
from tests.lib.trainer import TINY

from .test_reviews import MODEL


def run(config):
    return Trainer(config).train()


def study(folder, **settings) -> FrontierConfig:
    return FrontierConfig(**TINY | {"output_dir": str(folder), "total_steps": 1, "eval_steps": 1} | settings)


def test_points_and_picture(tmp_path):
    settings = {"algorithms": "p3o, rloo", "kl_coefs": "0.1", "lam": 0.9}  # of use to others
    picture = frontier(study(tmp_path, **settings), run)
    with picture.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    trained = [row for row in rows if row["algorithm"] != "optimum"]
    assert {(row["algorithm"], row["kl_coef"], row["step"]) for row in trained} == {
        (name, "0.1", step) for name in ("p3o", "rloo") for step in "01"
    }
    best = sorted((float(row["kl"]), float(row["reward"])) for row in rows if row["algorithm"] == "optimum")
    assert [reward for _, reward in best] == sorted(reward for _, reward in best)
    for row in trained:  # nobody gets more reward from as much KL
        beyond = [reward for kl, reward in best if kl >= float(row["kl"])]
        assert float(row["reward"]) <= min(beyond) + 1e-6
    assert picture.stat().st_size > 10_000
    before = (tmp_path / "frontier" / "p3o-0.1" / "train" / "metrics.jsonl").stat().st_mtime_ns
    first = picture.with_suffix(".csv").read_text()
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    picture = frontier(study(moved, **settings, save_total_limit=5), run)  # what has been run stays
    assert (moved / "frontier" / "p3o-0.1" / "train" / "metrics.jsonl").stat().st_mtime_ns == before
    assert picture.with_suffix(".csv").read_text() == first
    with pytest.raises(UserError, match="p3o-0.1 was run with other learning_rate"):
        frontier(study(moved, **settings, learning_rate=0.5), run)


def test_mistakes_are_found_before_the_first_run(tmp_path):
    with pytest.raises(UserError, match="rloo needs num_generations of at least 2"):
        frontier(study(tmp_path, algorithms="ppo,rloo", kl_coefs="0.1", num_generations=1), run)
    assert not (tmp_path / "frontier").exists()


def test_a_task_without_an_optimum_gets_its_models_first(ratings, tmp_path):
    """On text: sft and reward come before the runs, and the independent judge gets a panel of its own."""
    file = tmp_path / "small.yaml"
    stage = {"max_steps": 5, "batch_size": 32, "learning_rate": 1e-2}
    shared = {"task": "reviews", "data_path": "elsewhere", "model_config": {"model_type": "gpt2"}}
    sizes = {"batch_size": 16, "total_steps": 1, "eval_prompts": 20, "response_length": 8}
    file.write_text(yaml.safe_dump(shared | {"sft": stage, "reward": stage, "train": sizes}))
    options = ["--algorithms=p3o", "--kl_coefs=0.1", "--disable_tqdm", f"--output_dir={tmp_path / 'run'}"]
    options += [f"--data_path={ratings}", f"--model_config={MODEL}"]  # above the file, for sft and reward too
    assert command_line.run("frontier", str(file), options) == 0
    assert (tmp_path / "run" / "reward" / "model").exists()
    with (tmp_path / "run" / "frontier" / "frontier.csv").open() as table:
        rows = list(csv.DictReader(table))
    assert [row["step"] for row in rows] == ["0", "1"]
    assert all(-1 <= float(row["gold"]) <= 1 for row in rows)
