"""Folders that appear complete or not at all, and the state of a run that continues exactly.

A folder is written under a temporary name, flushed to disk, described by manifest.json (size and sha256 of
every file) and then renamed. A crash at any moment leaves the folders committed before it. The checksums find
damage, not tampering; loading executes nothing, whatever the files hold: a checkpoint is safetensors and JSON.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from . import launch, state
from .config import PPOConfig, UserError

if TYPE_CHECKING:
    from .engines import Trainable

MANIFEST = "manifest.json"
STATE = "state.json"
FORMAT = 2  # of the checkpoints written here; what DeepSpeed wrote before had none
TEMPORARY = ".tmp-"
RETIRED = f"{TEMPORARY}old-"

# What may change when a run continues: how long, how often, where, how fast and how split; not what it computes.
FREE_TO_CHANGE = {
    "total_steps",
    "eval_steps",
    "save_steps",
    "save_total_limit",
    "disable_tqdm",
    "report_to",
    "ddp_timeout",
    "output_dir",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "per_device_train_batch_size",
    "local_rollout_forward_batch_size",
    "generation_engine",
    "vllm_gpu_memory_utilization",
    "ops_impl",
    "deepspeed",
}


@contextlib.contextmanager
def committed(folder: Path) -> Iterator[Path]:
    """A place to write; on leaving the block it becomes `folder`, replacing what had that name."""
    place = folder.parent / (TEMPORARY + folder.name)
    try:
        if launch.is_main():
            folder.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
        barrier()
        yield place
        barrier()
        _commit(place, folder)
        barrier()
    except Exception as error:
        obstacle = _obstacle(folder.parent)  # asked before the stump makes room again
        if launch.is_main():  # another rank may have failed alone, with the first still at work there
            shutil.rmtree(place, ignore_errors=True)
        if obstacle is None:
            raise
        raise UserError(
            f"{folder} could not be written: {obstacle}. What was there before is as it was; free some space, "
            "or set output_dir to another disk, or lower save_total_limit"
        ) from error


def verify(folder: Path) -> None:
    """Refuse a folder that is incomplete or whose bytes are not those that were written."""
    try:
        listing = json.loads((folder / MANIFEST).read_text())["files"]
        files = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in listing.items()}
    except FileNotFoundError as error:
        raise UserError(f"{folder} is not complete: it has no {MANIFEST}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / MANIFEST} is damaged") from error
    if not files:
        raise UserError(f"{folder / MANIFEST} is damaged: it lists no files")
    for name, (expected, _) in files.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != expected:
            found = "is missing" if size is None else f"has {size} bytes"
            raise UserError(f"{folder} refused: {path} {found}, expected {expected} bytes")
    found_now = _checksums(folder, {name: size for name, (size, _) in files.items()})
    for name, (_, sha256) in files.items():
        if found_now[name] != sha256:
            raise UserError(f"{folder} refused: the content of {folder / name} has changed since it was written")


def save(
    folder: Path,
    step: int,
    trained: "dict[str, Trainable]",
    config: PPOConfig,
    memory: dict[str, Any],
    average: Sequence[state.Slice] = (),
) -> None:
    """Commit the state after `step`, then drop the oldest checkpoints beyond `save_total_limit`.

    `memory` is what JSON can hold, `average` the moving average of the policy. No generator's state is saved: every
    draw of a step has its own seed, made from the run's and the step's number.
    """
    for name, model in trained.items():
        state.refuse_unknown_layout(name, model)
    held = {name: state.slices(model) for name, model in trained.items()} | {"ema": list(average)}
    _refuse_without_room(folder, held)
    with committed(folder / f"step-{step:06d}") as place:
        for name, slices in held.items():
            state.write(place, name, slices)
        content = {
            "format": FORMAT,
            "step": step,
            "config": dataclasses.asdict(config),
            "memory": memory,
            "models": {name: state.describe(model) for name, model in trained.items()},
        }
        if launch.is_main():
            (place / STATE).write_text(json.dumps(content, indent=1))
    if launch.is_main():
        for old in _steps(folder)[: -config.save_total_limit]:
            if _number(old) != step:
                _discard(old)


def load(
    folder: Path, trained: "dict[str, Trainable]", config: PPOConfig, average: Sequence[state.Slice] = ()
) -> tuple[int, dict[str, Any]]:
    """Bring every model, optimizer and schedule to the saved state, on any number of ranks and at any ZeRO stage.

    Fills `average` and returns the step and what else was remembered.
    """
    try:
        verify(folder)
    except UserError as error:
        older = [path for path in _steps(folder.parent) if path.name < folder.name]
        hint = f"; to go back further, set resume_from_checkpoint to {older[-1]}" if older else ""
        raise UserError(f"{error}{hint}") from error
    content = _content(folder)
    _refuse_changes(folder, content["config"], dataclasses.asdict(config))
    for name, model in trained.items():
        state.restore(model, folder, name, content["models"][name])
    state.read(folder, "ema", average)
    return content["step"], content["memory"]


def find(request: str, folder: Path) -> Path:
    """The checkpoint a person asked for: a path, or `latest` of this run."""
    if request != "latest":
        return Path(request)
    steps = _steps(folder)
    if not steps:
        raise UserError(f"no checkpoint to resume from in {folder}; to start anew, leave resume_from_checkpoint out")
    for path in sorted(folder.glob("step-*")):
        if path not in steps and path.name > steps[-1].name and launch.is_main():
            print(f"warning: {path} is not complete (no {MANIFEST}); going back to {steps[-1]}", file=sys.stderr)
    return steps[-1]


@contextlib.contextmanager
def claimed(folder: Path, *, overwrite: bool, done: int = 0) -> Iterator[None]:
    """The folder of a command, for this run alone until the block is left; the record goes on after step `done`."""
    with contextlib.ExitStack() as held:
        taken = False
        if launch.is_main():
            folder.mkdir(parents=True, exist_ok=True)
            lock = held.enter_context((folder / ".lock").open("w"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                taken = True
        if launch.gather_rows(torch.tensor([int(taken)], device=launch.device())).any():
            raise UserError(f"another run is at work in {folder}")
        refuse_existing(folder, overwrite=overwrite, resume=done > 0)
        barrier()
        if launch.is_main():
            _sweep(folder, overwrite=overwrite, done=done)
        barrier()
        yield


def refuse_existing(folder: Path, *, overwrite: bool, resume: bool) -> None:
    if (folder / "metrics.jsonl").exists() and not (overwrite or resume):
        raise UserError(f"{folder} holds an earlier run: resume it, or set another output_dir, or overwrite_output_dir")


def barrier() -> None:
    if launch.world_size() > 1:
        dist.barrier()


def _commit(place: Path, folder: Path) -> None:
    files = [path for path in sorted(place.rglob("*")) if path.is_file()]
    seen = launch.gather_objects({str(path.relative_to(place)): path.stat().st_size for path in files})
    sizes = {name: size for part in seen for name, size in part.items()}  # a shared disk may show one rank less
    checksums = _checksums(place, sizes, flush=True)
    if not launch.is_main():
        return
    listing = {name: {"bytes": size, "sha256": checksums[name]} for name, size in sizes.items()}
    (place / MANIFEST).write_text(json.dumps({"files": listing}, indent=1))
    for path in [place / MANIFEST, *(path for path in place.rglob("*") if path.is_dir()), place]:
        _flush(path)
    retired = folder.parent / (RETIRED + folder.name)
    if folder.exists():
        folder.rename(retired)
    place.rename(folder)
    for parent in (folder.parent, folder.parent.parent):  # the second where this is the first folder in the first
        _flush(parent)
    shutil.rmtree(retired, ignore_errors=True)


def _discard(folder: Path) -> None:
    """Not under its own name, so that no half of a folder is ever taken for the whole."""
    if folder.exists():
        stump = folder.parent / (TEMPORARY + folder.name)
        shutil.rmtree(stump, ignore_errors=True)
        folder.rename(stump)
        shutil.rmtree(stump)


def _refuse_without_room(folder: Path, held: dict[str, list[state.Slice]]) -> None:
    """Before the first byte: training stops with its last checkpoint and a full disk spared."""
    mine = sum(part.values.nbytes for slices in held.values() for part in state.own(slices))
    needed, lacking = sum(launch.gather_objects(mine)), False
    if launch.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        lacking = shutil.disk_usage(folder).free < needed
    if launch.gather_rows(torch.tensor([int(lacking)], device=launch.device())).any():
        free = shutil.disk_usage(folder).free
        raise UserError(
            f"a checkpoint takes about {needed / 1e9:.3g} GB and {folder} has {free / 1e9:.3g} GB left; earlier ones "
            "are as they were. Free some space, or set output_dir to another disk, or lower save_total_limit"
        )


def _obstacle(folder: Path) -> str | None:
    """Why nothing more can be written there; libraries hide the disk's answer behind errors of their own."""
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(1 << 20))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        return error.strerror
    return None


def _sweep(folder: Path, *, overwrite: bool, done: int) -> None:
    """Clear stumps and, so that two runs never mix, what is overwritten or was written after step `done`."""
    for retired in [*folder.glob(RETIRED + "*"), *folder.glob(f"*/{RETIRED}*")]:
        original = retired.with_name(retired.name.removeprefix(RETIRED))
        if not original.exists():  # a crash between the two renames of a commit
            retired.rename(original)
    for stump in [*folder.glob(TEMPORARY + "*"), *folder.glob(f"*/{TEMPORARY}*")]:
        shutil.rmtree(stump)
    if done:
        for checkpoint in _steps(folder / "checkpoints"):
            if _number(checkpoint) > done:
                _discard(checkpoint)
    elif overwrite:
        for name in ("checkpoints", "model", "ema"):
            _discard(folder / name)
        (folder / "metrics.jsonl").unlink(missing_ok=True)


def _content(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / STATE).read_text())
    except FileNotFoundError:
        content = {}
    except ValueError as error:
        raise UserError(f"{folder / STATE} is not what a checkpoint holds: {error}") from error
    if content.get("format") != FORMAT:
        raise UserError(
            f"{folder} was written by another version, in a format that this one does not read: go on with that "
            "version, or start anew from a saved model (sft_model_path)"
        )
    return content


def _refuse_changes(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    changed = [name for name in now if name not in FREE_TO_CHANGE and before.get(name) != now[name]]
    if changed:
        differences = ", ".join(f"{name} (was {before.get(name)}, is {now[name]})" for name in changed)
        raise UserError(f"cannot resume from {folder} with other settings: {differences}")


def _steps(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("step-*") if (path / MANIFEST).exists()), key=_number)


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _checksums(folder: Path, sizes: dict[str, int], *, flush: bool = False) -> dict[str, str]:
    """sha256 of each file; every rank reads a share, so that none waits long, and all learn all or fail together."""
    found: dict[str, str] = {}
    failure = None
    for name in sorted(sizes, key=sizes.__getitem__)[launch.rank() :: launch.world_size()]:
        try:
            if flush:
                _flush(folder / name)
            found[name] = _sha256(folder / name)
        except OSError as error:
            failure = error
    everywhere = {name: sum_ for part in launch.gather_objects(found) for name, sum_ in part.items()}
    if len(everywhere) < len(sizes):
        raise failure or OSError(f"another rank could not flush and read its share of {folder}")
    return everywhere


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
