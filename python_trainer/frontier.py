"""The KL-reward frontier: what reward each algorithm reaches at what distance from the reference.

Figures 3 and 4 of the P3O article (arXiv 2310.00212) compare this way: reward alone, or one point of each algorithm,
says little, since every algorithm can buy reward with KL.
"""

import csv
import dataclasses
import functools
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from . import distributed, files
from .algorithms import ALGORITHMS, KlControl, load_algorithm
from .checkpoint import FREE_TO_CHANGE
from .config import UserError, by_new_names
from .data import load_task
from .deepspeed_engine import Policy, frozen, init_distributed
from .logging import read
from .models import stage_model, starting_point
from .ppo_config import FrontierConfig, PPOConfig
from .rollout import score_tokens
from .settings import make_folder, read_yaml


class Point(NamedTuple):
    algorithm: str
    kl_coef: float
    step: int
    kl: float  # nats per response
    reward: float
    gold: float | None  # an independent score, where there is one


def frontier(config: FrontierConfig, train: Callable[[PPOConfig], object]) -> Path:
    """Run with `train` what has not been run yet; returns the picture, beside which lies frontier.csv."""
    folder = Path(config.output_dir) / "frontier"
    places = {(name, coef): folder / f"{name}-{coef:g}" for name, coef in config.runs()}
    for place in (folder, *places.values()):
        make_folder(place)  # each rank looks: all refuse a link, before the first run
    wanted = {run: _run_config(config, *run, place) for run, place in places.items()}
    # Every mistake is found before the first run starts.
    missing = [run for run, place in places.items() if config.overwrite_output_dir or not is_done(place, wanted[run])]
    for settings in wanted.values():
        load_algorithm(settings, KlControl(settings))
    for run in missing:
        train(wanted[run])
    points = [point for run, place in places.items() for point in _points(place / "train", *run)]
    points += _optimum(config)
    with distributed.raise_on_all_ranks(UserError):
        if distributed.is_main():
            _write(folder / "frontier.csv", points)
            draw(folder / "frontier.csv", folder / "frontier.png")
    return folder / "frontier.png"


def _run_config(config: FrontierConfig, algorithm: str, coef: float, place: Path) -> PPOConfig:
    settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(PPOConfig)}
    for stage, name in (("sft", "sft_model_path"), ("reward", "reward_model_path")):
        found = stage_model(config, stage, settings[name])
        settings[name] = None if found is None else str(found)
    # What one algorithm is set to and another has no use for.
    settings |= {name: getattr(PPOConfig, name) for name in ALGORITHMS[algorithm].ignored}
    if algorithm == "online_dpo":
        settings["dpo_labels"] = "soft"
    settings |= {"algorithm": algorithm, "kl_coef": coef, "output_dir": str(place), "overwrite_output_dir": True}
    settings["eval_steps"] = config.eval_steps or max(config.total_steps // 6, 1)
    return PPOConfig(**settings)


def is_done(place: Path, wanted: PPOConfig) -> bool:
    if not (place / "train" / "model").exists():
        return False
    settings = place / "train" / "config.yaml"
    had = by_new_names(read_yaml(str(settings), settings) or {})
    computed = dataclasses.asdict(wanted).keys() - (FREE_TO_CHANGE - {"total_steps", "eval_steps"})
    changed = sorted(name for name in computed if had.get(name) != getattr(wanted, name))
    if changed:
        raise UserError(
            f"{place} was run with other {', '.join(changed)}: set another output_dir, or overwrite_output_dir"
        )
    return True


def _points(run: Path, algorithm: str, coef: float) -> list[Point]:
    """The evaluations of a run: enumerated where the task can do that, sampled on held-out prompts elsewhere."""
    found = []
    for row in read(run / "metrics.jsonl"):
        if "exact/kl" in row:
            found.append(Point(algorithm, coef, row["step"], row["exact/kl"], row["exact/reward"], None))
        elif "eval/kl" in row:
            found.append(Point(algorithm, coef, row["step"], row["eval/kl"], row["eval/score"], row.get("eval/gold")))
    return found


def _optimum(config: FrontierConfig) -> list[Point]:
    """The best there is at every KL, where the task knows it."""
    init_distributed(config.seed, config.ddp_timeout)
    task = load_task(config)
    policy, _ = starting_point(config, task)
    reference = Policy(frozen(policy, config), config.temperature, config.ops_impl)
    best = task.best(functools.partial(score_tokens, reference), _spread([coef for _, coef in config.runs()]))
    return [Point("optimum", coef, 0, kl, reward, None) for coef, kl, reward in best]


def _spread(coefs: Sequence[float]) -> list[float]:
    """Weights at which the optimum is drawn: beyond both ends of those that were run."""
    low, high = min(coefs) / 3, max(coefs) * 10
    return [low * (high / low) ** (index / 30) for index in range(31)]


def _write(path: Path, points: Sequence[Point]) -> None:
    make_folder(path.parent)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(Point._fields)
    writer.writerows([field if not isinstance(field, float) else f"{field:.6g}" for field in p] for p in points)
    files.write(path, table.getvalue())


def draw(table: Path, picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise UserError(f"{table} holds no points")
    panels = ["reward", "gold"] if any(row["gold"] for row in rows) else ["reward"]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(7 * len(panels), 5), layout="constrained", squeeze=False)
    names = list(dict.fromkeys(row["algorithm"] for row in rows if row["algorithm"] != "optimum"))
    for axis, panel in zip(axes.flat, panels, strict=True):
        best = sorted((float(row["kl"]), float(row["reward"])) for row in rows if row["algorithm"] == "optimum")
        if best:
            axis.plot(*zip(*best, strict=True), color="black", label="best there is", zorder=1)
        for number, name in enumerate(names):
            for at, coef in enumerate(dict.fromkeys(row["kl_coef"] for row in rows if row["algorithm"] == name)):
                mine = [row for row in rows if (row["algorithm"], row["kl_coef"]) == (name, coef)]
                x, y = ([float(row[column]) for row in mine] for column in ("kl", panel))
                axis.plot(x, y, "-", color=f"C{number}", alpha=0.35, linewidth=1)
                axis.plot(x[-1:], y[-1:], "o", color=f"C{number}", label=name if at == 0 else None)
                place = (7, -8 * (number + 1))  # labels of near points below each other
                axis.annotate(
                    coef, (x[-1], y[-1]), textcoords="offset points", xytext=place, fontsize=7, color=f"C{number}"
                )
        axis.set_xlabel("KL to the reference [nats per response]")
        axis.set_ylabel({"reward": "mean reward", "gold": "mean gold score, which nothing was trained on"}[panel])
        axis.grid(alpha=0.3)
        axis.legend()
    content = io.BytesIO()
    figure.savefig(content, dpi=120)
    files.write(picture, content.getvalue())
    pyplot.close(figure)
