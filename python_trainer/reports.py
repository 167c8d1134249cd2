"""Curves elsewhere: TensorBoard and wandb, for who has them installed."""

import dataclasses
import importlib.util
import math
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

PACKAGES = ("tensorboard", "wandb")


class Report(Protocol):
    def record(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def installed() -> list[str]:
    return [name for name in PACKAGES if importlib.util.find_spec(name) is not None]


def wanted(report_to: str) -> list[str]:
    """The packages that `report_to` names: `none`, one of them, or `all` that are installed."""
    if report_to == "none":
        return []
    if report_to == "all":
        return installed()
    if report_to not in installed():
        raise ValueError(f"report_to {report_to}: the package is not installed; pip install {report_to}")
    return [report_to]


def opened(config: Any, folder: Path, start: int) -> list[Report]:
    """The reports of one run; a resumed one continues them after step `start`."""
    kinds: dict[str, Callable[[Any, Path, int], Report]] = {"tensorboard": TensorBoard, "wandb": Wandb}
    return [kinds[name](config, folder, start) for name in wanted(config.report_to)]


class TensorBoard:
    """Event files in <folder>/tensorboard."""

    def __init__(self, config: Any, folder: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        from . import files

        files.folder_makes_way(folder / "tensorboard")
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1 if start else None)

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run of the project that WANDB_PROJECT names; its id is kept beside the metrics, for a resumed run."""

    def __init__(self, config: Any, folder: Path, start: int) -> None:
        import wandb

        from . import files

        files.folder_makes_way(folder / "wandb")
        kept = folder / "wandb-id"
        files.make_way(kept)
        if not (start and kept.exists()):
            files.write(kept, secrets.token_hex(8))
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "python_trainer"),
            dir=str(folder),
            id=kept.read_text(),
            resume="allow",
            config=dataclasses.asdict(config),
        )

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({name: value for name, value in metrics.items() if math.isfinite(value)}, step=step)

    def close(self) -> None:
        self._run.finish()
