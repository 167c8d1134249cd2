"""A checkpoint that is damaged, incomplete, hostile or not there."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from python_trainer import atomic
from python_trainer.config import UserError
from tests.lib.trainer import metric_rows

from .processes import refused, run, succeeded
from .resuming import train
from .rows import row

Damage = Callable[[Path], object]


def a_run(folder: Path) -> Path:
    """Two steps, two checkpoints."""
    output = folder / "run"
    succeeded(run(folder / "outputs", train(output, total_steps=2)))
    return output


def newest(output: Path) -> Path:
    return output / "train" / "checkpoints" / "step-000002"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: tuple[Damage, ...] = (
    flip,
    lambda path: path.write_bytes(path.read_bytes()[:-1]),
    lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    lambda path: path.write_bytes(b""),
    Path.unlink,
)


@row("one bit flipped, bytes missing or added, empty or missing: every file of a checkpoint and of a model", "refused")
def damaged(folder: Path) -> str:
    output, tried = a_run(folder), 0
    for whole in (newest(output), output / "train" / "model", output / "train" / "ema"):
        atomic.verify(whole)
        copy = folder / "copy"
        for name in [str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file()]:
            for damage in DAMAGE:
                shutil.copytree(whole, copy)
                damage(copy / name)
                # A damaged manifest may accuse another file.
                with pytest.raises(UserError, match=None if name == atomic.MANIFEST else Path(name).name):
                    atomic.verify(copy)
                shutil.rmtree(copy)
                tried += 1
    return f"{tried} cases refused, by the file's name"


@row("the newest checkpoint is damaged, resume `latest`", "refused; the earlier one is offered, and goes on")
def newest_damaged(folder: Path) -> str:
    output = a_run(folder)
    flip(max(newest(output).iterdir(), key=lambda path: path.stat().st_size))
    line = refused(run(folder / "outputs", train(output, resume_from_checkpoint="latest"))[0], "step-000001")
    offered = line.split()[-1]
    succeeded(run(folder / "outputs", train(output, resume_from_checkpoint=offered, total_steps=2)))
    assert [record["step"] for record in metric_rows(output)] == [0, 1, 2]
    return "refused by name; the one offered goes on"


@row("the newest checkpoint is incomplete (no manifest)", "goes back to the one before, and says so")
def newest_incomplete(folder: Path) -> str:
    output = a_run(folder)
    (newest(output) / atomic.MANIFEST).unlink()
    ended = run(folder / "outputs", train(output, resume_from_checkpoint="latest", total_steps=2))
    succeeded(ended)
    assert "step-000002 is not complete" in ended[0].text
    assert "step    1 " not in ended[0].text
    return "step-000002 named; goes on from step 1"


@row("no checkpoint, resume `latest`", "refused: never from step 0 in silence")
def no_checkpoint(folder: Path) -> str:
    output = a_run(folder)
    shutil.rmtree(output / "train" / "checkpoints")
    refused(run(folder / "outputs", train(output, resume_from_checkpoint="latest"))[0], "no checkpoint to resume from")
    return "refused"


@row("a pickle that runs code, with a manifest that fits, in every file", "refused by the file's name; nothing has run")
def hostile(folder: Path) -> str:
    output, canary = a_run(folder), folder / "canary"

    class Bomb:
        def __reduce__(self) -> tuple:
            return open, (str(canary), "w")

    places = sorted(path for path in newest(output).iterdir() if path.name != atomic.MANIFEST)
    whole = (newest(output) / atomic.MANIFEST).read_text()
    for place in places:
        kept = place.read_bytes()
        torch.save({"module": Bomb()}, place)
        manifest = json.loads(whole)
        manifest["files"][str(place.relative_to(newest(output)))] = {
            "bytes": place.stat().st_size,
            "sha256": atomic._sha256(place),
        }
        (newest(output) / atomic.MANIFEST).write_text(json.dumps(manifest))
        ended = run(folder / "outputs", train(output, resume_from_checkpoint="latest", total_steps=2))[0]
        refused(ended, "UserError", place.name)
        assert not canary.exists(), f"{place.name} has run its code"
        place.write_bytes(kept)
    return f"{len(places)} files: refused, nothing has run"
