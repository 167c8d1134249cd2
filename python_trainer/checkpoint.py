"""Folders that appear complete or not at all, and the state of a run that continues exactly.

A folder is written in a temporary one, flushed to disk, described by manifest.json (size and sha256 of every file)
and then renamed. A crash at any moment leaves the folders committed before it. The checksums find damage, not
tampering; loading executes nothing, whatever the files hold: a checkpoint is safetensors and JSON.

Only what a run made is deleted, and it shows by its content: a temporary folder holds OWNER, a committed one the
manifest, of which the listed files go. Everything else is left alone, or renamed where it is in the way.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import re
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from . import files, launch, state
from .config import PPOConfig, UserError

if TYPE_CHECKING:
    from .engines import Trainable

MANIFEST = "manifest.json"
STATE = "state.json"
FORMAT = 2  # of the checkpoints written here; what DeepSpeed wrote before had none
STEP = re.compile(r"step-([0-9]{6,})")
TEMPORARY = ".tmp-"
OWNER = ".made-by-python-trainer"  # in a temporary folder: the name of what it is for
NEW, OLD, DISCARDED = "new", "old", "discarded"  # in a temporary folder

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
    """A place to write; on leaving the block it becomes `folder`, replacing what a run had left there."""
    work = _temporary(folder, launch.gather_objects(secrets.token_hex(4))[0])
    try:
        if launch.is_main():
            _begin(work, folder.name)
        barrier()
        yield work / NEW
        barrier()
        _commit(work, folder)
        barrier()
    except Exception as error:
        obstacle = _obstacle(folder.parent)  # asked before the stump makes room again
        if launch.is_main():  # another rank may have failed alone, with the first still at work there
            with contextlib.suppress(OSError):
                _clear(work)
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
    """Commit the state after `step` in `folder`, or beside it where something else is in the way; then drop
    the oldest checkpoints beyond `save_total_limit`.

    `memory` is what JSON can hold, `average` the moving average of the policy. No generator's state is saved: every
    draw of a step has its own seed, made from the run's and the step's number.
    """
    for name, model in trained.items():
        state.refuse_unknown_layout(name, model)
    place_of_step = launch.gather_objects(_free_place(folder, f"step-{step:06d}"))[0]
    held = {name: state.slices(model) for name, model in trained.items()} | {"ema": list(average)}
    _refuse_without_room(place_of_step.parent, held)
    with committed(place_of_step) as place:
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
        older = [path for path in _steps_in(folder.parent) if path.name < folder.name]
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
    steps = _steps(folder) or _steps_in(folder)  # in the second case behind a link
    if not steps:
        raise UserError(f"no checkpoint to resume from in {folder}; to start anew, leave resume_from_checkpoint out")
    for path in sorted(folder.glob("step-*")):
        incomplete = STEP.fullmatch(path.name) and files.is_folder(path) and not is_made(path)
        if incomplete and path.name > steps[-1].name and launch.is_main():
            print(f"warning: {path} is not complete (no {MANIFEST}); going back to {steps[-1]}", file=sys.stderr)
    return steps[-1]


def belongs(source: Path, folder: Path) -> bool:
    """Whether a checkpoint is one of the run whose checkpoints lie in `folder`."""
    return source.resolve().parent in [path.resolve() for path in (folder, *_folders(folder))]


@contextlib.contextmanager
def claimed(folder: Path, *, overwrite: bool, done: int = 0) -> Iterator[None]:
    """The folder of a command, for this run alone until the block is left; the record goes on after step `done`."""
    with contextlib.ExitStack() as held:
        with launch.together():
            if launch.is_main():
                files.make_folder(folder)
                if not held.enter_context(files.locked(folder / ".lock", wait=False)):
                    raise UserError(f"another run is at work in {folder}")
        refuse_existing(folder, overwrite=overwrite, resume=done > 0)
        barrier()
        if launch.is_main():
            _sweep(folder, overwrite=overwrite, done=done)
        barrier()
        yield


def refuse_existing(folder: Path, *, overwrite: bool, resume: bool) -> None:
    record = folder / "metrics.jsonl"
    if record.is_file() and not record.is_symlink() and not (overwrite or resume):
        raise UserError(f"{folder} holds an earlier run: resume it, or set another output_dir, or overwrite_output_dir")


def is_made(folder: Path) -> bool:
    """Whether a run committed this folder, and it is no link to one."""
    manifest = folder / MANIFEST
    return files.is_folder(folder) and manifest.is_file() and not manifest.is_symlink()


def barrier() -> None:
    if launch.world_size() > 1:
        dist.barrier()


def _temporary(folder: Path, token: str) -> Path:
    return folder.parent / f"{TEMPORARY}{folder.name}-{token}"


def _begin(work: Path, name: str) -> None:
    work.parent.mkdir(parents=True, exist_ok=True)
    work.mkdir()
    (work / OWNER).write_text(name)
    (work / NEW).mkdir()


def _commit(work: Path, folder: Path) -> None:
    place = work / NEW
    written = [path for path in sorted(place.rglob("*")) if path.is_file()]
    seen = launch.gather_objects({str(path.relative_to(place)): path.stat().st_size for path in written})
    sizes = {name: size for part in seen for name, size in part.items()}  # a shared disk may show one rank less
    checksums = _checksums(place, sizes, flush=True)
    if not launch.is_main():
        return
    listing = {name: {"bytes": size, "sha256": checksums[name]} for name, size in sizes.items()}
    (place / MANIFEST).write_text(json.dumps({"files": listing}, indent=1))
    for path in [place / MANIFEST, *(path for path in place.rglob("*") if path.is_dir()), place]:
        _flush(path)
    if is_made(folder):
        folder.rename(work / OLD)
    elif os.path.lexists(folder):
        files.keep(folder)
    place.rename(folder)
    for parent in (folder.parent, folder.parent.parent):  # the second where this is the first folder in the first
        _flush(parent)
    with contextlib.suppress(OSError):  # the next start tries again
        _clear(work)


def _discard(folder: Path) -> None:
    """Not under its own name, so that no half of a folder is ever taken for the whole."""
    if is_made(folder):
        work = _temporary(folder, secrets.token_hex(4))
        _begin(work, folder.name)
        folder.rename(work / DISCARDED)
        _clear(work)


def _clear(work: Path) -> None:
    """Remove a temporary folder of a run, once what it had put aside is back in its place or gone."""
    owner = work / OWNER
    if owner.is_file():
        original = work.with_name(owner.read_text())
        if files.is_folder(work / OLD) and not os.path.lexists(original):  # a crash between two renames
            (work / OLD).rename(original)
        for part in (OLD, DISCARDED):
            if files.is_folder(work / part):
                _remove_listed(work / part, original)
        if files.is_folder(work / NEW):
            shutil.rmtree(work / NEW)
        owner.unlink()
    work.rmdir()


def _remove_listed(folder: Path, original: Path) -> None:
    """Remove the files that the manifest lists; the others stay, in a folder that says so by its name."""
    try:
        names = [Path(name) for name in json.loads((folder / MANIFEST).read_text())["files"]]
    except (OSError, ValueError, KeyError, TypeError):
        names = []
    for name in names:
        path = folder / name
        inside = not name.is_absolute() and ".." not in name.parts
        if inside and all(files.is_folder(folder / parent) for parent in name.parents):
            with contextlib.suppress(FileNotFoundError, IsADirectoryError, PermissionError):
                path.unlink()
    for path in sorted((path for path in folder.rglob("*") if files.is_folder(path)), reverse=True):
        with contextlib.suppress(OSError):
            path.rmdir()
    if names and [path.name for path in folder.iterdir()] in ([MANIFEST], []):
        (folder / MANIFEST).unlink(missing_ok=True)
        folder.rmdir()
    else:
        kept = folder.rename(original.parent / folder.parent.name.removeprefix(TEMPORARY))
        files.keep(kept, original.name)


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
    checkpoints = folder / "checkpoints"
    for parent in (folder, *_folders(checkpoints)):
        for path in filter(_is_stump, parent.glob(TEMPORARY + "*")):
            with contextlib.suppress(OSError):  # it is named below
                _clear(path)
    if done:
        for checkpoint in _steps(checkpoints):
            if _number(checkpoint) > done:
                _discard(checkpoint)
    elif overwrite:
        for made in (*_steps(checkpoints), folder / "model", folder / "ema"):
            _discard(made)
        for empty in _folders(checkpoints):
            with contextlib.suppress(OSError):
                empty.rmdir()
        files.make_way(folder / "metrics.jsonl")
        (folder / "metrics.jsonl").unlink(missing_ok=True)
    if strays := _strays(folder):
        files.say(f"left alone, since no run made them: {', '.join(strays)}")


def _is_stump(path: Path) -> bool:
    """Whether a run made this temporary folder; one without a marker is of a run that ended before its first file."""
    if not files.is_folder(path):
        return False
    named = re.fullmatch(re.escape(TEMPORARY) + "(.+)-[0-9a-f]{8}", path.name)
    marker = path / OWNER
    if named is None or not (marker.is_file() and not marker.is_symlink()):
        return named is not None and not any(path.iterdir())
    return marker.read_text(errors="replace") == named[1]


def _strays(folder: Path) -> list[str]:
    """What looks like a run's, and is not."""
    found = [*folder.glob(TEMPORARY + "*")]
    for name in ("checkpoints", "model", "ema"):
        if os.path.lexists(folder / name) and not files.is_folder(folder / name):
            found.append(folder / name)
    for parent in _folders(folder / "checkpoints"):
        found += parent.glob(TEMPORARY + "*")
        found += [path for path in parent.glob("step-*") if not (STEP.fullmatch(path.name) and is_made(path))]
    return [f"{path} ({files.kind(path)})" for path in sorted(found)]


def _content(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / STATE).read_text()) if (folder / STATE).is_file() else {}
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


def _folders(checkpoints: Path) -> list[Path]:
    """Where a run's checkpoints lie: that folder, and those used in its stead where something else was in the way."""
    others = [
        x for x in checkpoints.parent.glob(f"{checkpoints.name}-*") if x.name[len(checkpoints.name) + 1 :].isdigit()
    ]
    return [path for path in (checkpoints, *sorted(others)) if files.is_folder(path)]


def _steps(checkpoints: Path) -> list[Path]:
    """The run's checkpoints, the oldest first."""
    return sorted((path for folder in _folders(checkpoints) for path in _steps_in(folder)), key=_number)


def _steps_in(folder: Path) -> list[Path]:
    return sorted((x for x in folder.glob("step-*") if STEP.fullmatch(x.name) and is_made(x)), key=_number)


def _free_place(checkpoints: Path, name: str) -> Path:
    """Where a checkpoint goes: neither through a link nor in the place of what no run made."""
    for number in itertools.count(1):
        folder = checkpoints if number == 1 else checkpoints.with_name(f"{checkpoints.name}-{number}")
        target = folder / name
        there = os.path.lexists(folder)
        if (files.is_folder(folder) or not there) and (is_made(target) or not os.path.lexists(target)):
            if number > 1 and not there and launch.is_main():
                files.say(f"{checkpoints / name} is not a place for a checkpoint of this run: it goes to {target}")
            return target
    raise AssertionError


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
