"""Head to head: wins that add up, their errors, and runs that cannot be compared."""

import csv
import json

import pytest
import torch

from python_trainer.__main__ import main
from python_trainer.compare import Drawn, head_to_head, win_rate
from python_trainer.config import UserError
from python_trainer.ppo_config import CompareConfig
from python_trainer.settings import load

JUDGE = """
def letters(prompts, completions, **_):
    return [len(set(text.split())) for text in completions]
"""


def drawn(scores, texts=None) -> Drawn:
    values = torch.tensor(scores, dtype=torch.float64)
    return Drawn(texts or [str(score) for score in scores], values, values, {"reward": values})


def test_rates_and_errors_are_those_of_their_definition():
    """Won, lost, tied, and the same text with a score that is off by rounding."""
    one = drawn([3.0, 1.0, 2.0, 0.5, 4.0], ["a", "b", "c", "same", "e"])
    other = drawn([1.0, 2.0, 2.0, 0.5 + 1e-9, 1.0], ["f", "g", "h", "same", "i"])
    rate, error = win_rate(one, other, "reward")
    assert rate == pytest.approx((1 + 0 + 0.5 + 0.5 + 1) / 5)
    assert error == pytest.approx((sum((won - rate) ** 2 for won in (1, 0, 0.5, 0.5, 1)) / 4 / 5) ** 0.5)
    back, error_of_back = win_rate(other, one, "reward")
    assert (rate + back, error) == pytest.approx((1, error_of_back))
    assert win_rate(one, one, "reward") == (0.5, 0)


@pytest.fixture
def trained(tiny, tmp_path):
    """Two runs from one reference, in folders of their own."""
    tiny(total_steps=1, output_dir=str(tmp_path / "ppo")).train()
    tiny(total_steps=2, algorithm="rloo", learning_rate=0.05, output_dir=str(tmp_path / "rloo")).train()
    (tmp_path / "judge.py").write_text(JUDGE)
    return tmp_path


def test_runs_against_each_other_and_themselves(trained, capsys):
    runs = [f"{trained}/ppo", f"again={trained}/ppo", f"{trained}/rloo"]
    options = [f"--output_dir={trained}", f"--judge={trained}/judge.py:letters"]
    config = load("compare", None, [f"--runs={','.join(runs)}", *options], CompareConfig)
    assert (config.task, config.response_length) == ("exact", 5)  # as the runs were
    assert main(["compare", *runs, *options]) == 0
    assert "wins by reward, of 4 prompts; a tie is half a win" in capsys.readouterr().out
    with (trained / "compare" / "wins.csv").open(newline="") as file:
        wins = list(csv.DictReader(file))
    rates = {(win["policy"], win["against"], win["by"]): float(win["win_rate"]) for win in wins}
    assert {judge for *_, judge in rates} == {"reward", f"{trained}/judge.py:letters"}
    for (one, other, judge), rate in rates.items():
        assert rate + rates[other, one, judge] == pytest.approx(1)
        assert rate == 0.5 or "rloo" in (one, other)
    rows = [json.loads(line) for line in (trained / "compare" / "responses.jsonl").read_text().splitlines()]
    for judge in ("reward", f"{trained}/judge.py:letters"):  # again from what a person can read
        pairs = [[row["responses"][name][judge] for name in ("ppo", "rloo")] for row in rows]
        assert rates["ppo", "rloo", judge] == pytest.approx(sum((a > b) + (a == b) / 2 for a, b in pairs) / len(rows))
    with (trained / "compare" / "policies.csv").open() as file:
        policies = {row["policy"]: row for row in csv.DictReader(file)}
    assert policies["ppo"]["kl"] == policies["again"]["kl"]
    assert float(policies["rloo"]["kl"]) == pytest.approx(
        sum(row["responses"]["rloo"]["kl"] for row in rows) / len(rows), rel=1e-4
    )
    assert (trained / "compare" / "compare.png").stat().st_size > 10_000


def test_what_cannot_be_compared_is_named(tiny, tmp_path):
    tiny(total_steps=1, output_dir=str(tmp_path / "one")).train()
    tiny(total_steps=1, seed=1, output_dir=str(tmp_path / "two")).train()
    one, two = tmp_path / "one", tmp_path / "two"
    for runs, message in (
        (f"{one}", "compare needs two runs or more, not 1"),
        (f"{one},{two}", "cannot compare two with one: they were trained with seed 1 and 0"),
        (f"{one},{tmp_path}/none", "none: there is no such folder; name the output_dir of a train command"),
        (f"{one},{tmp_path}", "it holds no trained policy"),
    ):
        with pytest.raises(UserError, match=message):
            head_to_head(load("compare", None, [f"--runs={runs}", f"--output_dir={tmp_path / 'out'}"], CompareConfig))
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="no reference for the KL: set sft_model_path"):
        head_to_head(CompareConfig(task="exact", response_length=5, runs=f"{one},{one}", output_dir=str(tmp_path)))


def test_folders_of_one_name_are_told_apart():
    config = CompareConfig(runs="a/ppo,b/ppo,c/ppo/train/model,sft=b/sft/model")
    assert list(config.entries()) == ["ppo", "ppo (2)", "ppo (3)", "sft"]
