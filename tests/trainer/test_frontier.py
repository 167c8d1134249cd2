"""The KL-reward frontier: its points, its optimum, its picture."""

import csv

import pytest

from python_trainer.config import UserError
from python_trainer.frontier import FrontierConfig, frontier
from python_trainer.settings import load

from .conftest import TINY


def study(folder, **settings) -> FrontierConfig:
    return FrontierConfig(**TINY | {"output_dir": str(folder), "total_steps": 2, "eval_steps": 1} | settings)


def test_points_and_picture(tmp_path):
    settings = {"algorithms": "p3o, rloo", "kl_coefs": "0.1,0.3"}
    picture = frontier(study(tmp_path, **settings))
    with picture.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    trained = [row for row in rows if row["algorithm"] != "optimum"]
    assert {(row["algorithm"], row["kl_coef"], row["step"]) for row in trained} == {
        (name, coef, step) for name in ("p3o", "rloo") for coef in ("0.1", "0.3") for step in "012"
    }
    best = sorted((float(row["kl"]), float(row["reward"])) for row in rows if row["algorithm"] == "optimum")
    assert [reward for _, reward in best] == sorted(reward for _, reward in best)
    for row in trained:  # nobody gets more reward from as much KL
        beyond = [reward for kl, reward in best if kl >= float(row["kl"])]
        assert float(row["reward"]) <= min(beyond) + 1e-6
    assert picture.stat().st_size > 10_000
    before = (tmp_path / "frontier" / "p3o-0.1" / "train" / "metrics.jsonl").stat().st_mtime_ns
    first = picture.with_suffix(".csv").read_text()
    frontier(study(tmp_path, **settings))  # what has been run stays
    assert (tmp_path / "frontier" / "p3o-0.1" / "train" / "metrics.jsonl").stat().st_mtime_ns == before
    assert picture.with_suffix(".csv").read_text() == first


def test_the_optimum_is_that_of_the_task(tiny):
    trainer = tiny(kl_coef=0.2)
    ((_, kl, reward),) = trainer.task.best(trainer.reference, [0.2])
    figures = trainer.task.exact(trainer.reference, trainer.reference, 0.2)
    assert reward - 0.2 * kl == pytest.approx(figures["exact/optimum"], abs=1e-6)


def test_mistakes_are_named():
    with pytest.raises(UserError, match="algorithms: 'ppoo' is none of ppo, p3o"):
        load("frontier", "exact_cpu.yaml", ["--algorithms=ppoo"], FrontierConfig)
    with pytest.raises(UserError, match="kl_coefs must be numbers"):
        load("frontier", "exact_cpu.yaml", ["--kl_coefs=small"], FrontierConfig)
    assert load("frontier", "exact_cpu.yaml", [], FrontierConfig).batch_size == 128  # as in train
