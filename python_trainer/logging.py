"""What a person sees: a line and a bar per step, metrics.jsonl, curves.png (METRICS.md explains them), reports."""

import csv
import dataclasses
import io
import json
import math
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

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
    "val/eos_rate",
)
SHOWN = 16  # completions for curves elsewhere; completions.jsonl has all

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
        self.responses = config.batch_size
        self._reports: list[Report] = []
        self._file: IO[str] | None = None
        self._said: IO[str] | None = None
        hidden = True if config.disable_tqdm or not distributed.is_main() else None  # None: shown on a terminal only
        self._bar = tqdm(total=total, initial=start, desc=title, disable=hidden, leave=False)
        with distributed.raise_on_all_ranks(UserError):
            if distributed.is_main():
                self._file = _continued(self.path, start)
                if getattr(config, "log_completions_steps", 0):  # sft and reward have none
                    self._said = _continued(self.path.with_name("completions.jsonl"), start)
                self._reports = open_reports(config, folder, start)

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        self._write(self._file, self.path, [{"step": step, **metrics}])
        self._report(lambda report: report.record(step, metrics))

    def completions(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """What was said in a step: all of it in completions.jsonl, some of it in the curves elsewhere."""
        self._write(self._said, self.path.with_name("completions.jsonl"), [{"step": step, **row} for row in rows])
        self._report(lambda report: report.completions(step, rows[:SHOWN]))

    def _write(self, file: IO[str] | None, path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
        with distributed.raise_on_all_ranks(UserError):
            try:
                if file is not None:
                    file.write("".join(as_json(row) + "\n" for row in rows))
                    file.flush()
            except OSError as error:
                raise UserError(f"{path} could not be written: {error.strerror}; free some space") from error

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
        shown = [f"step {step:4d}", *(f"{name} {metrics[name]:.3g}" for name in line if name in metrics)]
        said = [f"! {text}" for text in warnings(metrics, self.responses)]
        self.say("  ".join(shown + said) if (room := _columns()) is None else "\n".join([_fitting(shown, room), *said]))
        self._bar.update(step - self._bar.n)

    def progress(self, step: int) -> None:
        self._bar.update(step - self._bar.n)

    def say(self, text: str) -> None:
        if distributed.is_main():
            tqdm.write(text)

    def close(self) -> None:
        self._bar.close()
        self._report(lambda report: report.close())
        for file in (self._file, self._said):
            if file is not None:
                file.close()


def _columns() -> int | None:
    """Of the terminal; None where the lines go elsewhere."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def _fitting(figures: Sequence[str], room: int) -> str:
    """One line: where it is too long, names without their group, and only the first figures. The record has all."""
    shown = "  ".join(figures)
    if len(shown) > room:
        figures = [figure.rpartition("/")[2] for figure in figures]
        shown = figures[0]
        for figure in figures[1:]:
            if len(shown) + 2 + len(figure) > room:
                break
            shown += f"  {figure}"
    return shown


def _continued(path: Path, start: int) -> IO[str]:
    """A record that goes on behind the step a run starts from."""
    files.make_way(path)
    _keep_until(path, start)
    return files.append(path)


def _keep_until(path: Path, step: int) -> None:
    """A resumed run continues the record at its checkpoint: what came after it never happened."""
    if not path.exists():
        return
    kept = [row for row in read(path) if row["step"] <= step]
    files.write(path, "".join(as_json(row) + "\n" for row in kept))


def warnings(metrics: Mapping[str, float], responses: int) -> list[str]:
    """What a person should look at, in words; a step has so many responses."""
    found = []
    if metrics.get("val/masked_responses", 0.0) >= responses:
        found.append("nothing is learned: all responses are masked")
    if (cut := 1 - metrics.get("val/eos_rate", 1.0)) > 0.5:
        found.append(f"{cut:.0%} of the responses are cut at response_length")
    if (same := metrics.get("val/frac_reward_zero_std", 0.0)) > 0.5:
        found.append(f"in {same:.0%} of the groups all responses score alike")
    elif metrics.get("objective/scores_std", 1.0) == 0:
        found.append("all responses score alike")
    return found


def write_table(path: Path, rows: Sequence[Any]) -> None:
    """Named tuples of one kind as CSV; nothing where there are none."""
    if not rows:
        return
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(rows[0]._fields)
    writer.writerows([field if not isinstance(field, float) else f"{field:.6g}" for field in row] for row in rows)
    files.write(path, table.getvalue())


def as_json(value: Any, indent: int | None = None) -> str:
    """JSON has no NaN and no infinity: null stands for them, and for a date of Parquet its text."""

    def finite(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: finite(inner) for key, inner in part.items()}
        if isinstance(part, list | tuple):
            return [finite(inner) for inner in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(finite(value), indent=indent, allow_nan=False, default=str)


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
        if axis.get_legend_handles_labels()[0]:  # matplotlib warns of a legend of nothing
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

    def completions(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None: ...

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

    def completions(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        self._writer.add_text("completions", "\n\n".join(as_json(row) for row in rows), step)

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

    def completions(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        import wandb

        table = wandb.Table(columns=list(rows[0]), data=[[str(value) for value in row.values()] for row in rows])
        self._run.log({"completions": table}, step=step)

    def close(self) -> None:
        self._run.finish()
