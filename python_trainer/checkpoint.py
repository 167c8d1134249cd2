"""Folders that appear complete or not at all, and the state of a run that continues exactly.

A folder is written under a temporary name, flushed to disk, described by manifest.json (size and sha256 of
every file) and then renamed. A crash at any moment leaves the folders committed before it. The checksums find
damage, not tampering; loading executes nothing, whatever the files hold.
"""

import contextlib
import hashlib
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist

from . import launch
from .config import UserError
from .models import Trainable

MANIFEST = "manifest.json"
TEMPORARY = ".tmp-"


@contextlib.contextmanager
def committed(folder: Path) -> Iterator[Path]:
    """A place to write; on leaving the block it becomes `folder`, replacing what had that name."""
    place = folder.parent / (TEMPORARY + folder.name)
    if launch.is_main():
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
    barrier()
    yield place
    barrier()
    if launch.is_main():
        _commit(place, folder)
    barrier()


def verify(folder: Path) -> None:
    """Refuse a folder that is incomplete or whose bytes are not those that were written."""
    try:
        files: dict[str, dict[str, Any]] = json.loads((folder / MANIFEST).read_text())["files"]
    except FileNotFoundError as error:
        raise UserError(f"{folder} is not a complete checkpoint: it has no {MANIFEST}") from error
    except (ValueError, KeyError) as error:
        raise UserError(f"{folder / MANIFEST} is damaged") from error
    for name, expected in files.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != expected["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes"
            raise UserError(f"checkpoint refused: {path} {found}, expected {expected['bytes']} bytes")
        if _sha256(path) != expected["sha256"]:
            raise UserError(f"checkpoint refused: the content of {path} has changed since it was written")


def save(folder: Path, step: int, trained: dict[str, Trainable], keep: int) -> None:
    """Commit the state after `step`, then drop the oldest checkpoints beyond `keep`."""
    with committed(folder / f"step-{step:06d}") as place:
        with launch.quiet():
            for name, model in trained.items():
                model.engine.save_checkpoint(str(place), tag=name, save_latest=False)
        state = {
            "step": step,
            "world_size": launch.world_size(),
            "skipped": {name: model.skipped for name, model in trained.items()},
            "random": _random_state(),
        }
        torch.save(state, place / f"trainer-rank{launch.rank()}.pt")
    if launch.is_main():
        for old in _steps(folder)[:-keep]:
            shutil.rmtree(old)


def load(folder: Path, trained: dict[str, Trainable]) -> int:
    """Bring every model, optimizer, schedule and generator to the saved state; returns the step."""
    verify(folder)
    path = folder / f"trainer-rank{launch.rank()}.pt"
    if not path.exists():
        raise UserError(f"{folder} was written by fewer ranks than the {launch.world_size()} of this run")
    state = torch.load(path, weights_only=True)
    if state["world_size"] != launch.world_size():
        writers, ranks = state["world_size"], launch.world_size()
        raise UserError(f"{folder} was written by {writers} ranks, this run has {ranks}")
    with launch.quiet():
        for name, model in trained.items():
            _load_without_code(model, str(folder), name)
            model.skipped = state["skipped"][name]
    _set_random_state(state["random"])
    return state["step"]


def find(request: str, folder: Path) -> Path:
    """The checkpoint a person asked for: a path, or `latest` of this run."""
    if request != "latest":
        return Path(request)
    steps = _steps(folder)
    if not steps:
        raise UserError(f"no checkpoint to resume from in {folder}")
    return steps[-1]


def claim(folder: Path, *, overwrite: bool, resume: bool) -> None:
    """Make the folder of a command ready: sweep stumps, and never mix two runs."""
    if launch.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        for stump in [*folder.glob(TEMPORARY + "*"), *folder.glob(f"*/{TEMPORARY}*")]:
            shutil.rmtree(stump)
        if overwrite and not resume:
            for name in ("checkpoints", "model"):
                shutil.rmtree(folder / name, ignore_errors=True)
            (folder / "metrics.jsonl").unlink(missing_ok=True)
    barrier()


def refuse_existing(folder: Path, *, overwrite: bool, resume: bool) -> None:
    if (folder / "metrics.jsonl").exists() and not (overwrite or resume):
        raise UserError(f"{folder} holds an earlier run: resume it, or set another output_dir, or overwrite_output_dir")


def barrier() -> None:
    if launch.world_size() > 1:
        dist.barrier()


def _commit(place: Path, folder: Path) -> None:
    listing = {
        str(path.relative_to(place)): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(place.rglob("*"))
        if path.is_file()
    }
    (place / MANIFEST).write_text(json.dumps({"files": listing}, indent=1))
    for path in [*place.rglob("*"), place]:
        _flush(path)
    retired = folder.parent / f"{TEMPORARY}old-{folder.name}"
    if folder.exists():
        folder.rename(retired)
    place.rename(folder)
    _flush(folder.parent)
    shutil.rmtree(retired, ignore_errors=True)


def _load_without_code(model: Trainable, folder: str, tag: str) -> None:
    """DeepSpeed unpickles with full rights; its files need no more than tensors and these three names."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    class WeightsOnly(TorchCheckpointEngine):
        def load(self, path: str, map_location: Any = None) -> Any:
            with torch.serialization.safe_globals([fragment_address, LossScaler, ZeroStageEnum]):
                return torch.load(path, map_location=map_location, weights_only=True)

    own, model.engine.checkpoint_engine = model.engine.checkpoint_engine, WeightsOnly()
    path, _ = model.engine.load_checkpoint(folder, tag=tag)
    model.engine.checkpoint_engine = own
    if path is None:
        raise UserError(f"{folder} holds no state for {tag}")


def _steps(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if (path / MANIFEST).exists())


def _random_state() -> dict[str, Any]:
    name, keys, *rest = cast(tuple[Any, ...], np.random.get_state(legacy=True))
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": [str(name), torch.from_numpy(keys.astype(np.int64)), *rest],
    }


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
