"""The state of a run that continues exactly, and the folder that a run has for itself.

Loading executes nothing, whatever the files hold: a checkpoint is safetensors and JSON.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from . import atomic, distributed, files, zero_state
from .config import UserError, by_new_names
from .deepspeed_engine import all_finite
from .ppo_config import PPOConfig
from .settings import make_folder
from .state_file import refuse_another_form, remembered_of

STATE = "state.json"
FORMAT = 2  # of the checkpoints written here; what DeepSpeed wrote before had none
RESULTS = ("model", "ema", "best")  # models that a run leaves
RECORDS = ("metrics.jsonl", "completions.jsonl")
STEP = re.compile(r"step-([0-9]{6,})")
PLACE = ".made-by-python-trainer"  # in a folder beside `checkpoints`, with that folder's name: a run made it

# What may change when a run continues: how long, how often, where, how fast and how split; not what it computes.
FREE_TO_CHANGE = {
    "total_steps",
    "eval_steps",
    "save_steps",
    "save_total_limit",
    "disable_tqdm",
    "report_to",
    "log_completions_steps",
    "metric_for_best_model",
    "greater_is_better",
    "early_stopping_patience",
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
    "lora_save",
    "attn_implementation",
    "fused_head",
}

# What must be the same when a run continues, and is looked at itself; so where it lies may change.
SAME = {"data": "the data have changed", "reference": "the reference's weights (sft_model_path) have changed"}
PLACES = {"data_path", "eval_data_path", "sft_model_path"}


def save(
    folder: Path,
    step: int,
    trained: dict[str, Any],
    config: PPOConfig,
    memory: dict[str, Any],
    average: Sequence[zero_state.Slice] = (),
) -> None:
    """Commit the state after `step` in `folder`, or beside it where something else is in the way; then drop
    the oldest checkpoints beyond `save_total_limit`.

    `memory` is what JSON can hold, `average` the moving average of the policy. No generator's state is saved: every
    draw of a step has its own seed, made from the run's and the step's number.
    """
    for name, model in trained.items():
        zero_state.refuse_unknown_layout(name, model)
    with _raise_on_all_ranks(folder):
        mine = free_place(folder, f"step-{step:06d}") if distributed.is_main() else folder
    target = distributed.gather_objects(mine)[0]
    shards = {name: zero_state.slices(model) for name, model in trained.items()} | {"ema": list(average)}
    for name, slices in shards.items():
        _refuse_non_finite(f"the {name}'s weights or moments are not finite: nothing is saved in {target}", slices)
    _make_room(folder, target.parent, shards, config.save_total_limit)
    with atomic.atomic_dir(target) as place:
        for name, slices in shards.items():
            zero_state.write(place, name, slices)
        content = {
            "format": FORMAT,
            "step": step,
            "config": dataclasses.asdict(config),
            "memory": memory,
            "models": {name: zero_state.describe(model) for name, model in trained.items()},
        }
        if distributed.is_main():
            (place / STATE).write_text(json.dumps(content, indent=1))
    if distributed.is_main():
        for old in _steps(folder)[: -config.save_total_limit]:
            if _number(old) != step:
                atomic.discard(old)


def load(
    folder: Path,
    trained: dict[str, Any],
    config: PPOConfig,
    memory: dict[str, Any],
    average: Sequence[zero_state.Slice] = (),
) -> tuple[int, dict[str, Any]]:
    """Bring every model, optimizer and schedule to the saved state, on any number of ranks and at any ZeRO stage.

    Fills `average` and returns the step and what was remembered of `memory`, which is what would be saved now.
    """
    try:
        names = atomic.verify(folder)
    except UserError as error:
        older = [path for path in _steps_in(folder.parent) if path.name < folder.name]
        hint = f"; to go back further, set resume_from_checkpoint to {older[-1]}" if older else ""
        raise UserError(f"{error}{hint}") from error
    content = _content(folder, listed=STATE in names)
    refuse_another_form(folder / STATE, content, list(trained))
    _refuse_changes(folder, content, dataclasses.asdict(config))
    remembered = remembered_of(content["memory"], memory, folder / STATE)
    for key, what in SAME.items():
        if remembered.get(key) != memory.get(key):
            raise UserError(f"cannot resume from {folder}: {what} since then; start anew from a saved model with that")
    for name, model in trained.items():
        zero_state.restore(model, folder, names, name, content["models"][name])
    zero_state.read(folder, names, "ema", average)
    loaded = {name: zero_state.slices(model) for name, model in trained.items()} | {"ema": list(average)}
    for name, slices in loaded.items():
        _refuse_non_finite(
            f"{folder} holds weights or moments of the {name} that are not finite: resume from one before", slices
        )
    return content["step"], remembered


def find(request: str, folder: Path) -> Path:
    """The checkpoint a person asked for: a path, or `latest` of this run."""
    if request != "latest":
        return Path(request)
    steps = _steps(folder) or _steps_in(folder)  # in the second case behind a link
    if not steps:
        raise UserError(f"no checkpoint to resume from in {folder}; to start anew, leave resume_from_checkpoint out")
    for path in sorted(folder.glob("step-*")):
        incomplete = STEP.fullmatch(path.name) and files.is_folder(path) and not atomic.is_made(path)
        if incomplete and path.name > steps[-1].name and distributed.is_main():
            print(
                f"warning: {path} is not complete (no {atomic.MANIFEST} of it); going back to {steps[-1]}",
                file=sys.stderr,
            )
    return steps[-1]


def belongs(source: Path, folder: Path) -> bool:
    """Whether a checkpoint is one of the run whose checkpoints lie in `folder`."""
    return source.resolve().parent in [path.resolve() for path in (folder, *_folders(folder))]


@contextlib.contextmanager
def last_step_kept(save_last: Callable[[], int | None]) -> Iterator[None]:
    """What ends a run inside, a failing reward function or a full disk, costs none of the steps that are whole.

    `save_last` saves the last one and returns its number; None where there is none that is not saved.
    """
    try:
        yield
    except (UserError, OSError) as error:
        if distributed.world_size() > 1 and not getattr(error, "everywhere", False):
            raise  # of one rank, for all that is known: the others would not come to the save, which takes all of them
        text = str(error)
        if isinstance(error, OSError):
            text = f"{error.filename or 'a file'}: {error.strerror or error}"
        try:
            step = save_last()
        except UserError as again:
            raise UserError(f"{text}; nor could the last step be saved: {again}") from error
        if step is None:
            raise
        raise UserError(
            f"{text}; step {step} is saved: once that is put right, --resume_from_checkpoint latest goes on from there"
        ) from error


@contextlib.contextmanager
def lock_run_dir(folder: Path, *, overwrite: bool, done: int = 0) -> Iterator[None]:
    """The folder of a command, for this run alone until the block is left; the record goes on after step `done`."""
    with contextlib.ExitStack() as held:
        with _raise_on_all_ranks(folder):
            if distributed.is_main():
                make_folder(folder)
                if not held.enter_context(files.locked(folder / ".lock", wait=False)):
                    raise UserError(f"another run is at work in {folder}")
        refuse_existing(folder, overwrite=overwrite, resume=done > 0)
        distributed.barrier()
        with _raise_on_all_ranks(folder):
            if distributed.is_main():
                _sweep(folder, overwrite=overwrite, done=done)
        yield


def refuse_existing(folder: Path, *, overwrite: bool, resume: bool) -> None:
    """Whatever of an earlier run is there; its record may have been moved, and linked."""
    if overwrite or resume:
        return
    checkpoints = folder / "checkpoints"
    results = any(atomic.is_made(folder / name) for name in RESULTS)
    saved = _steps(checkpoints) or _steps_in(checkpoints)
    if results or (folder / "metrics.jsonl").is_file() or saved:
        resume_it = "resume it (resume_from_checkpoint latest), or " if saved else ""
        raise UserError(f"{folder} holds an earlier run: {resume_it}set another output_dir, or overwrite_output_dir")


@contextlib.contextmanager
def _raise_on_all_ranks(folder: Path) -> Iterator[None]:
    """Also what the disk answers to the first rank alone."""
    with distributed.raise_on_all_ranks(UserError):
        try:
            yield
        except OSError as error:
            raise UserError(f"{error.filename or folder}: {error.strerror}; set output_dir to another place") from error


def _refuse_non_finite(text: str, slices: Sequence[zero_state.Slice]) -> None:
    """Weights, averages and the optimizer's moments, with which the next update would spoil them; buffers may hold
    infinities."""
    if not all_finite(part.values for part in slices if not part.name.startswith("buffer/")):
        raise UserError(text)


def _make_room(folder: Path, place: Path, shards: dict[str, list[zero_state.Slice]], limit: int) -> None:
    """Before the first byte: where the disk is full, older checkpoints go that would go after it, but not the last.

    Where that is not enough, training stops with its last checkpoint and a full disk spared.
    """
    mine = sum(part.values.nbytes for slices in shards.values() for part in zero_state.shards_to_write(slices))
    needed, free = sum(distributed.gather_objects(mine)), 0
    if distributed.is_main():
        place.mkdir(parents=True, exist_ok=True)
        free, freed, going = shutil.disk_usage(place).free, 0, []
        for old in _steps(folder)[: -max(limit - 1, 1)]:
            if free + freed < needed:
                going.append(old)
                freed += _freed_by(old)
        if going and free + freed >= needed:  # else they would be lost for nothing
            for old in going:
                atomic.discard(old)
            free = shutil.disk_usage(place).free
    free = distributed.gather_objects(free)[0]
    if free < needed:
        raise UserError(
            f"a checkpoint takes about {needed / 1e9:.3g} GB and {place} has {free / 1e9:.3g} GB left; earlier ones "
            "are as they were. Free some space, or set output_dir to another disk, or lower save_total_limit"
        )


def _freed_by(checkpoint: Path) -> int:
    """Bytes that go with it: not those of a file that has another name too."""
    found = [path.lstat() for path in checkpoint.rglob("*")]
    return sum(one.st_size for one in found if stat.S_ISREG(one.st_mode) and one.st_nlink == 1)


def _sweep(folder: Path, *, overwrite: bool, done: int) -> None:
    """Clear stumps and, so that two runs never mix, what is overwritten or was written after step `done`."""
    checkpoints = folder / "checkpoints"
    for parent in (folder, *_folders(checkpoints)):
        for path in filter(atomic.is_stump, parent.glob(atomic.TEMPORARY + "*")):
            with contextlib.suppress(OSError):  # it is named below
                atomic.clear(path)
    if done:
        for checkpoint in _steps(checkpoints):
            if _number(checkpoint) > done:
                atomic.discard(checkpoint)
    elif overwrite:
        for made in (*_steps(checkpoints), *(folder / name for name in RESULTS)):
            atomic.discard(made)
        for place in _folders(checkpoints):
            with contextlib.suppress(OSError):
                if [path.name for path in place.iterdir()] in ([], [PLACE]):
                    (place / PLACE).unlink(missing_ok=True)
                    place.rmdir()
        for name in RECORDS:
            files.make_way(folder / name)
            (folder / name).unlink(missing_ok=True)
    if strays := _strays(folder):
        files.say(f"left alone, since no run made them: {', '.join(strays)}")


def _strays(folder: Path) -> list[str]:
    """What looks like a run's, and is not."""
    found = [*folder.glob(atomic.TEMPORARY + "*")]
    found += [path for path in folder.glob("checkpoints-*") if path.name[12:].isdigit() and not _is_place(path)]
    for name in ("checkpoints", *RESULTS):
        if os.path.lexists(folder / name) and not files.is_folder(folder / name):
            found.append(folder / name)
    for parent in _folders(folder / "checkpoints"):
        found += parent.glob(atomic.TEMPORARY + "*")
        found += set(parent.glob("step-*")) - set(_steps_in(parent))
    return [f"{path} ({_kind(path)})" for path in sorted(found)]


def _kind(path: Path) -> str:
    former = path.name.removeprefix(atomic.TEMPORARY + "old-")
    if former != path.name and files.is_folder(path):
        return f"put aside by an earlier version: where {former} is missing beside it, rename it to {former}"
    return files.kind(path)


def _content(folder: Path, *, listed: bool = True) -> dict[str, Any]:
    try:
        content = json.loads((folder / STATE).read_text()) if listed and (folder / STATE).is_file() else {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{folder / STATE} is not what a checkpoint holds: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(
            f"{folder} was written by another version, in a format that this one does not read: go on with that "
            "version, or start anew from a saved model (sft_model_path)"
        )
    return content


def _refuse_changes(folder: Path, content: dict[str, Any], now: dict[str, Any]) -> None:
    # Settings that came after it was written were at their defaults.
    before = {field.name: field.default for field in dataclasses.fields(PPOConfig)} | by_new_names(content["config"])
    free = FREE_TO_CHANGE | (PLACES if content["memory"].keys() >= SAME.keys() else set())
    changed = [name for name in now if name not in free and before.get(name) != now[name]]
    if changed:
        differences = ", ".join(f"{name} (was {before.get(name)}, is {now[name]})" for name in changed)
        raise UserError(f"cannot resume from {folder} with other settings: {differences}")


def _folders(checkpoints: Path) -> list[Path]:
    """Where a run's checkpoints lie: that folder, and those used in its stead where something else was in the way."""
    others = [path for path in sorted(checkpoints.parent.glob(f"{checkpoints.name}-*")) if _is_place(path)]
    return [path for path in (*others, checkpoints) if files.is_folder(path)]


def _is_place(folder: Path) -> bool:
    """Whether a run made it for its checkpoints; a copy under another name is somebody's."""
    try:
        return files.is_plain(folder / PLACE) and (folder / PLACE).read_text() == folder.name
    except (OSError, UnicodeDecodeError):
        return False


def _steps(checkpoints: Path) -> list[Path]:
    """The run's checkpoints, the oldest first; of the same step that in `checkpoints` last."""
    return sorted((path for folder in _folders(checkpoints) for path in _steps_in(folder)), key=_number)


def _steps_in(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("step-*") if _is_step(path)), key=_number)


def _is_step(path: Path) -> bool:
    """Whether it is the checkpoint that its name says: a copy under another number is none."""
    if not (STEP.fullmatch(path.name) and atomic.is_made(path)):
        return False
    try:
        return _content(path)["step"] == _number(path)
    except (UserError, OSError, KeyError):
        return True  # of another version, or damaged: to be refused by name


def free_place(checkpoints: Path, name: str) -> Path:
    """Where a checkpoint goes: neither through a link nor in the place of what no run made."""
    for number in itertools.count(1):
        folder = checkpoints if number == 1 else checkpoints.with_name(f"{checkpoints.name}-{number}")
        target = folder / name
        there = os.path.lexists(folder)
        ours = not there or (files.is_folder(folder) if number == 1 else _is_place(folder))
        if ours and (_is_step(target) or not os.path.lexists(target)):
            if number > 1 and not there:
                folder.mkdir(parents=True)
                (folder / PLACE).write_text(folder.name)
                files.say(f"{checkpoints / name} is not a place for a checkpoint of this run: it goes to {target}")
            return target
    raise AssertionError


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))
