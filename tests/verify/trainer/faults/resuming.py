"""A run that ends at some moment and is continued, beside one that nothing happened to."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from python_trainer import __main__ as command_line
from python_trainer import atomic, checkpoint, ppo
from python_trainer.ppo import Trainer
from python_trainer.rollout import InverseCdf
from tests.lib.trainer import as_options, metric_rows

from .processes import Ranks, refused, run, succeeded
from .rows import SETTINGS, row


def train(output: Path, before: Callable[[], None] = lambda: None, **settings: Any) -> Callable[[], int]:
    """The command as a person gives it, in a process where something may have been prepared."""

    def start() -> int:
        before()
        return command_line.run("train", None, as_options(SETTINGS | {"output_dir": output} | settings))

    return start


def die_in_a_rollout() -> None:
    plain = InverseCdf.__call__

    def call(self: InverseCdf, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if reached[0] == 2 and ids.shape[1] > 3:
            die()
        return plain(self, ids, scores)

    InverseCdf.__call__ = call
    at_each_step(lambda: None)


def die_between_epochs() -> None:
    plain, seen = ppo.step_together, [0]

    def step(models: Any) -> None:
        plain(models)
        seen[0] += reached[0] == 2
        if seen[0] == SETTINGS["num_mini_batches"]:
            die()

    ppo.step_together = step
    at_each_step(lambda: None)


def die_between_passes_over_the_data() -> None:
    at_each_step(lambda: die() if reached[0] == 2 else None)


def die_within_a_pass_over_the_data() -> None:
    at_each_step(lambda: die() if reached[0] == 1 else None)


def die_in_a_save() -> None:
    def commit(place: Path, folder: Path) -> None:
        if folder.name == "step-000002":
            die()
        plain(place, folder)

    plain, atomic._commit = atomic._commit, commit


CUTS = {
    "in a rollout": die_in_a_rollout,
    "between PPO epochs": die_between_epochs,
    "at the edge of a pass over the data": die_between_passes_over_the_data,
    "within a pass over the data": die_within_a_pass_over_the_data,
    "in a save": die_in_a_save,
}
reached = [0]  # steps this process has done


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_each_step(function: Callable[[], None]) -> None:
    plain = Trainer.train_step

    def step(self: Trainer) -> dict[str, float]:
        reached[0] = self.done
        function()
        return plain(self)

    Trainer.train_step = step


def same(left: Path, right: Path) -> None:
    """Two runs left the same record, the same models and, on every rank, the same state to go on from."""
    assert metric_rows(left) == metric_rows(right)
    assert [row["step"] for row in metric_rows(left)] == list(range(SETTINGS["total_steps"] + 1))
    for name in ("model", "ema", f"checkpoints/step-{SETTINGS['total_steps']:06d}"):
        one, two = (
            json.loads((folder / "train" / name / atomic.MANIFEST).read_text())["files"] for folder in (left, right)
        )
        if checkpoint.STATE in one:  # it names the run's folder too
            states = [folder / "train" / name / checkpoint.STATE for folder in (left, right)]
            was, now = (json.loads(state.read_text()) for state in states)
            assert now | {"config": None} == was | {"config": None}
            one.pop(checkpoint.STATE), two.pop(checkpoint.STATE)
        assert one == two, f"{name}: {[file for file in one if one[file] != two.get(file)]}"


def cuts(folder: Path, stages: range, ranks: int, names: Sequence[str] = tuple(CUTS)) -> str:
    for stage in stages:
        zero = {"deepspeed": f"ds_zero{stage}.json"}
        straight = folder / f"straight-{stage}"
        succeeded(run(folder / "outputs", train(straight, **zero), ranks))
        for number, name in enumerate(names):
            output = folder / f"cut-{stage}-{number}"
            ended = run(folder / "outputs", train(output, CUTS[name], **zero), ranks)
            assert -signal.SIGKILL in [one.code for one in ended], f"{name}: {ended[0].code} {ended[0].text[-800:]}"
            again = train(output, resume_from_checkpoint="latest", **zero)
            succeeded(run(folder / "outputs", again, ranks))
            try:
                same(straight, output)
            except AssertionError as error:
                raise AssertionError(f"ZeRO {stage}, {ranks} ranks, cut {name}: {error}") from error
            shutil.rmtree(output)
    return f"the same bits after {len(names)} cuts: {', '.join(names)}"


WANTED = "resumed, it has the record, weights, optimizers, averages and KL weight of an uninterrupted run, to the bit"


@row("kill -9 of a run, one rank, ZeRO 0", WANTED)
def cut_one_rank(folder: Path) -> str:
    return cuts(folder, range(1), 1, tuple(CUTS)[:3])


@row("kill -9 of a run, one rank, ZeRO 0, 1, 2, 3", WANTED, slow=True)
def cut_one_rank_at_every_stage(folder: Path) -> str:
    return cuts(folder, range(4), 1)


@row("kill -9 of a run, two ranks, ZeRO 0, 1, 2, 3", WANTED, slow=True)
def cut_two_ranks(folder: Path) -> str:
    return cuts(folder, range(4), 2, tuple(CUTS)[:3])


def terminated(folder: Path, ranks: int) -> str:
    straight, output = folder / "straight", folder / "terminated"
    succeeded(run(folder / "outputs", train(straight), ranks))

    def ask_in_step_two() -> None:
        at_each_step(lambda: os.kill(os.getpid(), signal.SIGTERM) if reached[0] == 1 and last else None)
        last = os.environ.get("RANK", "0") == str(ranks - 1)

    ended = run(folder / "outputs", train(output, ask_in_step_two, save_steps=0), ranks)
    succeeded(ended)
    assert "step 2 is saved" in ended[0].text, ended[0].text
    assert not (output / "train" / "model").exists()
    succeeded(run(folder / "outputs", train(output, resume_from_checkpoint="latest"), ranks))
    same(straight, output)
    return f"exit 0 after {ended[0].seconds:.0f} s; resumed to the same bits"


@row("SIGTERM in a step, no checkpoint so far", "the step ends, is saved, exit 0; resumed to the same bits")
def asked_to_stop(folder: Path) -> str:
    return terminated(folder, 1)


@row("SIGTERM to one of two ranks", "both save and exit 0", slow=True)
def one_rank_asked_to_stop(folder: Path) -> str:
    return terminated(folder, 2)


@row("a run is started anew where an earlier one left its results", "refused: nothing is overwritten", slow=True)
def started_over_a_run(folder: Path) -> str:
    output = folder / "run"
    succeeded(run(folder / "outputs", train(output)))
    before = metric_rows(output)
    ended = run(folder / "outputs", train(output))[0]
    refused(ended, "holds an earlier run: ")
    assert metric_rows(output) == before
    return "refused"


def soon(condition: Callable[[], bool], limit: float = 300) -> None:
    """Wait for it; the limit is for what would never come."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < limit
        time.sleep(0.05)


@row("a second run starts in the folder of one at work", "refused; the first is not disturbed", slow=True)
def second_run(folder: Path) -> str:
    output = folder / "run"
    first = Ranks(folder / "first", train(output, lambda: at_each_step(lambda: time.sleep(3))))
    soon(lambda: (output / "train" / "metrics.jsonl").exists())
    second = run(folder / "second", train(output, overwrite_output_dir=True))[0]
    refused(second, "another run is at work")
    succeeded(first.wait())
    atomic.verify(output / "train" / "model")
    return "refused"
