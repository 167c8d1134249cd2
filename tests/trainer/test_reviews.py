"""The reviews task: where its data comes from, and what the demonstration has to reach."""

import hashlib
import subprocess

import pytest

from python_trainer.__main__ import demo, refuse_failure
from python_trainer.config import UserError
from python_trainer.evaluate import Evaluation
from python_trainer.tasks import reviews


@pytest.mark.parametrize(("gain", "kl"), [(float("nan"), 1.0), (0.5, float("nan")), (0.1, 1.0), (0.5, 13.0)])
def test_gates_of_the_demo(gain, kl):
    before, after = (Evaluation({"eval/gold": gold, "eval/kl": kl}, [], []) for gold in (0.0, gain))
    with pytest.raises(UserError, match="the demonstration failed"):
        refuse_failure(before, after)


def test_demo_without_gold_scores_is_refused_before_training(tmp_path):
    with pytest.raises(UserError, match=r"independent score .*; task exact has none"):
        demo("exact_cpu.yaml", [f"--output_dir={tmp_path / 'run'}"])
    assert list(tmp_path.iterdir()) == []


def test_held_out_rows_are_independent(ratings):
    """No prompt is one of the training prompts, and no snippet is in two of the pairs."""
    task = reviews.Reviews(str(ratings))
    train, heldout = task.prompts()
    assert heldout
    assert not {prompt.content for prompt in heldout} & {prompt.content for prompt in train}
    shown = [text for pair in task.pairs()[1] for text in pair[:2]]
    assert shown
    assert len(shown) <= len(task.heldout)
    rating = dict(task.heldout)
    assert all(rating[chosen] > rating[rejected] for chosen, rejected, *_ in task.pairs()[1])


def test_without_a_network_the_wanted_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PPO_KERNELS_CACHE", str(tmp_path))
    failure = subprocess.CompletedProcess([], 1, "", "ERROR: no matching distribution\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failure)
    with pytest.raises(UserError, match=f"no matching distribution.*{reviews.RATINGS}.*put it at {tmp_path}"):
        reviews.fetch_ratings()
    assert list(tmp_path.iterdir()) == []


def test_a_ratings_file_that_is_not_one_is_refused(tmp_path):
    path = tmp_path / "other.txt"
    for first in ("some text", "id\trating\ttext", "1\tnan\ta text of some words"):
        path.write_text(f"{first}\n")
        with pytest.raises(UserError, match="other.txt, line 1: expected id, mean rating and text"):
            reviews.Reviews(str(path))
    path.write_text("1\t2.5\ta text of some words\n")
    with pytest.raises(UserError, match="1 texts of more than 4 words"):
        reviews.Reviews(str(path))
    with pytest.raises(UserError, match="cannot read the ratings file"):
        reviews.Reviews(str(tmp_path / "nothing"))


def test_real_ratings(tmp_path, monkeypatch):
    monkeypatch.setenv("PPO_KERNELS_CACHE", str(tmp_path))
    try:
        path = reviews.fetch_ratings()
    except UserError as error:
        pytest.skip(f"the ratings cannot be fetched here: {error}")
    assert [file.name for file in tmp_path.iterdir()] == [reviews.RATINGS]
    assert hashlib.sha256(path.read_bytes()).hexdigest().startswith("c8293b0d942e90e2")
    task = reviews.Reviews()
    assert len(task.train) + len(task.heldout) > 10_000
    assert not {text for text, _ in task.heldout} & {text for text, _ in task.train}
    assert len(task.prompts()[1]) >= 500
    chosen, rejected, *_ = task.pairs()[0][0]
    rating = dict(task.train)
    assert rating[chosen] > rating[rejected]
