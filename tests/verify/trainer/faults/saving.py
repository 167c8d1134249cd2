"""While a checkpoint or a model is being written."""

import hashlib
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from python_trainer import atomic, checkpoint
from python_trainer.config import UserError
from python_trainer.models import save_model
from python_trainer.ppo import Trainer
from python_trainer.ppo_config import PPOConfig

from . import disk
from .processes import Ended, refused, run, succeeded
from .rows import SETTINGS, row

ONE_KEPT = SETTINGS | {"save_total_limit": 1}


class Scene:
    """A run after its second step, whose first is committed; every act plays in a fork, on a copy of its folder."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        self.run = folder / "original" / "train"
        self.trainer = Trainer(PPOConfig(**settings | {"output_dir": str(self.run.parent)}))
        self.prints = {}
        for step in (1, 2):
            self.trainer.train_step()
            self.prints[step] = fingerprint(self.trainer)
            if step == 1:
                self.save(self.run)

    def save(self, place: Path) -> None:
        self.trainer.save_checkpoint(place / "checkpoints")

    def act(self, function: Callable[[Path], Any], *, action: int = disk.COUNT, at: int = 0) -> tuple[Path, Ended]:
        place = self.folder / "copy" / "train"
        shutil.rmtree(place.parent, ignore_errors=True)
        shutil.copytree(self.run, place)

        def scene() -> Any:
            disk.alone()
            library = disk.watch(place, action, at, self.folder / "events")
            function(place)
            return library.disk_events()

        return place, run(self.folder / "outputs", scene)[0]

    def aftermath(self, place: Path) -> Ended:
        """The next start: what loads is one of the two, bit for bit; leftovers go, and a save succeeds."""

        def scene() -> int:
            disk.alone()
            source = checkpoint.find("latest", place / "checkpoints")
            t = self.trainer
            t.load_checkpoint(source)
            assert fingerprint(t) == self.prints[t.done], f"what was loaded is not what step {t.done} had"
            loaded = t.done
            for folder in checkpoint._steps(place / "checkpoints"):
                atomic.verify(folder)
            with checkpoint.lock_run_dir(place, overwrite=False, done=t.done):
                assert not list(place.rglob(".tmp-*")), "leftovers"
                assert not list(place.rglob("*.kept-*")), "somebody else's, it is said, and nobody's are there"
                t.done = 3
                self.save(place)
            atomic.verify(place / "checkpoints" / "step-000003")
            return loaded

        return run(self.folder / "outputs", scene)[0]


def fingerprint(trainer: Trainer) -> str:
    seen = hashlib.sha256(repr(trainer.kl.coef).encode() + repr(trainer.shaping.state()).encode())

    def take(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            seen.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key in value:
                take(value[key])
        elif isinstance(value, list | tuple):
            for part in value:
                take(part)
        elif isinstance(value, int | float | str):
            seen.update(repr(value).encode())

    take(trainer.ema.average if trainer.ema else {})
    for model in trainer.trained.values():
        take(model.module.state_dict())
        take(model.engine.optimizer.state_dict())
        take(model.engine.lr_scheduler.state_dict())
    return seen.hexdigest()


def each_event(folder: Path, stage: int) -> str:
    def sweep() -> str:
        scene = Scene(folder, ONE_KEPT | {"deepspeed": f"ds_zero{stage}.json"})
        _, whole = scene.act(scene.save)
        count, found = succeeded([whole]), {1: 0, 2: 0}
        kinds = [kind for kind, _, _ in disk.events(folder / "events")]
        assert len(kinds) == count
        assert {"write", "sync", "rename", "unlink"} <= set(kinds)
        for at in range(1, count + 1):
            place, ended = scene.act(scene.save, action=disk.KILL, at=at)
            assert ended.code == -signal.SIGKILL, f"event {at} of {count} was not reached: {ended.text[-500:]}"
            found[succeeded([scene.aftermath(place)])] += 1
        assert min(found.values()) > 0  # killed before as well as after the rename
        return (
            f"{count} points ({', '.join(f'{kinds.count(kind)} {kind}' for kind in dict.fromkeys(kinds))}): "
            f"{found[1]} load step 1, {found[2]} step 2"
        )

    return succeeded(run(folder / "sweep", sweep, limit=500))


@row("kill -9 at every write, fsync, rename and unlink of a save", "this step or the one before loads, to the bit")
def killed_while_saving(folder: Path) -> str:
    return each_event(folder, 0)


@row("the same, ZeRO 3", "the same", slow=True)
def killed_while_saving_partitioned(folder: Path) -> str:
    return each_event(folder, 3)


@row("kill -9 at every point of writing a model over an earlier one", "one of the two is there, whole")
def killed_while_replacing_a_model(folder: Path) -> str:
    def sweep() -> str:
        scene = Scene(folder, SETTINGS)

        def export(place: Path) -> None:
            with atomic.atomic_dir(place / "model") as temporary:
                save_model(scene.trainer.actor.model, scene.trainer.tokenizer, temporary)

        export(scene.run)
        with torch.no_grad():
            next(scene.trainer.actor.module.parameters()).add_(1)
        old, found = _content(scene.run / "model"), {"old": 0, "new": 0}
        _, whole = scene.act(export)
        count = succeeded([whole])
        for at in range(1, count + 1):
            place, ended = scene.act(export, action=disk.KILL, at=at)
            assert ended.code == -signal.SIGKILL
            with checkpoint.lock_run_dir(place, overwrite=False, done=1):
                atomic.verify(place / "model")
                assert not list(place.rglob(".tmp-*"))
                assert not list(place.rglob("*.kept-*"))
            found["old" if _content(place / "model") == old else "new"] += 1
        assert min(found.values()) > 0
        return f"{count} points: {found['old']} leave the old one, {found['new']} the new one"

    return succeeded(run(folder / "sweep", sweep))


@row("power cut during a save", "what has its final name is on disk, and only then an older step goes")
def power_cut(folder: Path) -> str:
    def check() -> str:
        scene = Scene(folder, ONE_KEPT)
        place, ended = scene.act(scene.save)
        succeeded([ended])
        done = disk.events(folder / "events")
        written = {path for kind, path, _ in done if kind == "write"}
        there = [path for path in (place / "checkpoints" / "step-000002").rglob("*") if path.is_file()]
        unseen = [path.name for path in there if not any(name.endswith("/" + path.name) for name in written)]
        assert not unseen, f"written past the watch: {unseen}"
        lost = list(disk.unsynced(done))
        assert not lost, lost
        reordered = [event for event in done if event[0] != "sync"]
        assert list(disk.unsynced(reordered)), "without any fsync this row must fail"
        return f"{len(there)} files and their folders synced before the rename, the rename before the removal"

    return succeeded(run(folder / "check", check))


@row("disk full at every write of a save", "error names the disk; stump removed; the step before loads")
def disk_full(folder: Path) -> str:
    def sweep() -> str:
        scene = Scene(folder, SETTINGS)
        _, whole = scene.act(scene.save)
        succeeded([whole])
        kinds = [kind for kind, _, _ in disk.events(folder / "events")]
        places = [at for at, kind in enumerate(kinds, 1) if kind in ("write", "open", "mkdir")]
        for at in places:
            place, ended = scene.act(scene.save, action=disk.FULL, at=at)
            refused(ended, "UserError", "No space left on device", "output_dir")
            assert not list(place.rglob(".tmp-*")), f"event {at}: stump left"
            assert succeeded([scene.aftermath(place)]) == 1
        return f"{len(places)} points: No space left on device; step 1 loads"

    return succeeded(run(folder / "sweep", sweep))


@row("too little room for a checkpoint", "refused before the first byte, with both figures")
def too_little_room(folder: Path) -> str:
    def check() -> str:
        scene = Scene(folder, SETTINGS)
        path = scene.run / "checkpoints"
        size = sum(file.stat().st_size for file in (path / "step-000001").rglob("*"))
        usage = shutil.disk_usage(path)
        shutil.disk_usage = lambda _: usage._replace(free=size // 2)
        before = sorted(path.rglob("*"))
        with pytest.raises(UserError, match=r"takes about .* GB left.*output_dir"):
            scene.save(scene.run)
        assert sorted(path.rglob("*")) == before
        return "refused; nothing written"

    return succeeded(run(folder / "check", check))


@row("fsync fails", "the save fails; the step before loads")
def sync_fails(folder: Path) -> str:
    def check() -> str:
        scene = Scene(folder, SETTINGS)
        place, ended = scene.act(scene.save, action=disk.SYNC_FAILS)
        refused(ended, "Input/output error")
        assert succeeded([scene.aftermath(place)]) == 1
        return "Input/output error; step 1 loads"

    return succeeded(run(folder / "check", check))


def _content(folder: Path) -> dict[str, bytes]:
    return {os.fspath(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
