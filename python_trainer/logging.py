"""What a person sees: a line and a bar per step, metrics.jsonl, curves.png (METRICS.md explains them), reports."""

import dataclasses
import io
import json
import math
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from tqdm import tqdm

from . import distributed, files
from .config import OptimizerConfig, UserError, report_packages

LINE = (
    "objective/kl",
    "objective/scores",
    "objective/rlhf_reward",
    "policy/clipfrac_avg",
    "policy/entropy_avg",
    "val/ratio",
    "val/explained_variance",
    "val/response_length",
)

PANELS = (
    ("loss", None, "loss of sft or reward"),
    ("eval/perplexity", None, "perplexity of held-out texts"),
    ("eval/accuracy", None, "accuracy on held-out pairs"),
    ("objective/scores", "eval/score", "score"),
    ("objective/kl", "eval/kl", "KL to the reference [nats per response]"),
    ("eval/gold", None, "gold score on held-out prompts"),
    ("policy/entropy_avg", None, "entropy [nats per token]"),
    ("val/response_length", None, "response length [tokens]"),
    ("val/explained_variance", None, "explained variance of the critic"),
)


class Averages:
    """Means weighted by counts (of tokens, of responses) over micro-batches and ranks, reduced once per step.

    The variances of parts do not average: `x_var`, beside `x`, adds up as the mean square and ends as the variance.
    """

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._weights: dict[str, torch.Tensor] = {}

    def add(self, values: Mapping[str, torch.Tensor], weight: torch.Tensor) -> None:
        exact = {name: value.detach().double() for name, value in values.items()}
        for name, value in exact.items():
            if name.endswith("_var"):
                value = value + exact[name.removesuffix("_var")] ** 2
            # No valid token, no say: its statistics are 0, and 0·NaN never enters.
            term = torch.where(weight > 0, value * weight, 0.0)
            self._sums[name] = self._sums.get(name, 0.0) + term
            self._weights[name] = self._weights.get(name, 0.0) + weight.double()

    def merge(self, other: "Averages") -> None:
        for name, value in other._sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._weights[name] = self._weights.get(name, 0.0) + other._weights[name]

    def reduce(self) -> dict[str, float]:
        if not self._sums:
            return {}
        pair = torch.stack([torch.stack(list(x.values())) for x in (self._sums, self._weights)])
        if distributed.world_size() > 1:
            dist.all_reduce(pair)
        means = dict(zip(self._sums, (pair[0] / pair[1].clamp(min=1)).tolist(), strict=True))
        return {
            name: max(mean - means[name.removesuffix("_var")] ** 2, 0.0) if name.endswith("_var") else mean
            for name, mean in means.items()
        }


class Log:
    """metrics.jsonl and the terminal; silent on every rank but the first."""

    def __init__(self, folder: Path, config: OptimizerConfig, total: int, *, start: int = 0, title: str = "") -> None:
        self.path = folder / "metrics.jsonl"
        self._reports: list[Report] = []
        self._file = None
        hidden = True if config.disable_tqdm or not distributed.is_main() else None  # None: shown on a terminal only
        self._bar = tqdm(total=total, initial=start, desc=title, disable=hidden, leave=False)
        with distributed.raise_on_all_ranks(UserError):
            if distributed.is_main():
                files.make_way(self.path)
                self._keep_until(start)
                self._file = files.append(self.path)
                self._reports = open_reports(config, folder, start)

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        self._last = metrics
        if self._file is not None:
            self._file.write(as_json({"step": step, **metrics}) + "\n")
            self._file.flush()
        self._report(lambda report: report.record(step, metrics))

    def _report(self, work: Callable[["Report"], None]) -> None:
        """Curves elsewhere end no run: one that fails is named, and left out from then on."""
        for report in list(self._reports):
            try:
                work(report)
            except Exception as error:  # whatever a service and its client may have
                self._reports.remove(report)
                files.say(f"no more curves for {type(report).__name__}: {type(error).__name__}: {error}")

    def step(self, step: int, metrics: Mapping[str, float], line: Sequence[str] = LINE) -> None:
        self.record(step, metrics)
        shown = "  ".join(f"{name} {metrics[name]:.3g}" for name in line if name in metrics)
        self.say(f"step {step:4d}  {shown}")
        self._bar.update(step - self._bar.n)

    def progress(self, step: int) -> None:
        self._bar.update(step - self._bar.n)

    def say(self, text: str) -> None:
        if distributed.is_main():
            tqdm.write(text)

    def close(self) -> None:
        self._bar.close()
        self._report(lambda report: report.close())
        if self._file is not None:
            self._file.close()

    def _keep_until(self, step: int) -> None:
        """A resumed run continues the record at its checkpoint: what came after it never happened."""
        if not self.path.exists():
            return
        kept = [row for row in read(self.path) if row["step"] <= step]
        files.write(self.path, "".join(as_json(row) + "\n" for row in kept))


def as_json(value: Any, indent: int | None = None) -> str:
    """JSON has no NaN and no infinity: null stands for them."""

    def finite(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: finite(inner) for key, inner in part.items()}
        if isinstance(part, list | tuple):
            return [finite(inner) for inner in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(finite(value), indent=indent, allow_nan=False)


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, without a last one that a crash cut short."""
    rows, lines = [], path.read_text(errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if type(row["step"]) is not int:
                raise ValueError
            rows.append(row)
        except (ValueError, RecursionError, KeyError, TypeError) as error:
            if number < len(lines):
                raise UserError(f"{path}, line {number} is not JSON with a step") from error
    return rows


def plot(folder: Path) -> None:
    """curves.png from metrics.jsonl, or a line that says why there is none: what was trained is saved all the same."""
    try:
        _draw(folder)
    except Exception as error:  # whatever a library of pictures may have
        files.say(f"{folder / 'curves.png'} could not be drawn: {type(error).__name__}: {error}")


def _draw(folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read(folder / "metrics.jsonl")
    panels = [panel for panel in PANELS if any(panel[0] in row for row in rows)]
    figure, axes = pyplot.subplots(2, 3, figsize=(13, 7), layout="constrained")
    for axis, (name, heldout, label) in zip(axes.flat, panels, strict=False):
        for key, style in ((name, "-"), (heldout, "o--")):
            points = [
                (row["step"], row[key], row.get(f"{key}_se") or 0.0) for row in rows if key and row.get(key) is not None
            ]
            if points:
                steps, values, errors = zip(*points, strict=True)
                marker = "held-out" if key and key.startswith("eval/") else "rollout"
                axis.errorbar(steps, values, yerr=errors if any(errors) else None, fmt=style, label=marker, capsize=3)
        axis.set_xlabel("step")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        axis.legend()
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    path = folder / "curves.png"
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120)
    files.write(path, picture.getvalue())
    pyplot.close(figure)


class Report(Protocol):
    def record(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def open_reports(config: Any, folder: Path, start: int) -> list[Report]:
    """The reports of one run; a resumed one continues them after step `start`."""
    kinds: dict[str, Callable[[Any, Path, int], Report]] = {"tensorboard": TensorBoard, "wandb": Wandb}
    return [kinds[name](config, folder, start) for name in report_packages(config.report_to)]


class TensorBoard:
    """Event files in <folder>/tensorboard."""

    def __init__(self, config: Any, folder: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

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

        # It would ask on the terminal.
        key = os.environ.get("WANDB_API_KEY") or getattr(getattr(wandb, "api", None), "api_key", None)
        if not key and not os.environ.get("WANDB_MODE"):
            raise UserError("report_to wandb: not logged in; run `wandb login`, or set WANDB_API_KEY or WANDB_MODE")
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
