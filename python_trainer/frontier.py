"""The KL-reward frontier: what reward each algorithm reaches at what distance from the reference.

Figures 3 and 4 of the P3O article (arXiv 2310.00212) compare this way: reward alone, or one point of each algorithm,
says little, since every algorithm can buy reward with KL.
"""

import csv
import dataclasses
import functools
import io
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import distributed, files
from .algorithms import KlControl, load_algorithm
from .checkpoint import FREE_TO_CHANGE
from .config import UserError, by_new_names
from .data import Policy, load_task
from .deepspeed_engine import frozen, init_distributed
from .logging import read, write_table
from .models import stage_model, starting_point
from .ppo_config import FrontierConfig, PPOConfig, without_use
from .rollout import score_tokens
from .settings import make_folder, read_yaml


class Point(NamedTuple):
    algorithm: str
    kl_coef: float
    step: int
    kl: float  # nats per response
    reward: float
    gold: float | None  # an independent score, where there is one
    seed: int = 0


class Choice(NamedTuple):
    """What an algorithm was tried with, and what came of it."""

    algorithm: str
    learning_rate: float
    num_mini_batches: int
    objective: float  # reward - kl_coef · KL at the end
    responses: int  # that were drawn for it in training
    chosen: bool = False


class Line(NamedTuple):
    """Least squares through all points of an algorithm: reward = intercept + slope · KL."""

    algorithm: str
    intercept: float
    slope: float
    r2: float  # the part of the reward's variance that it explains
    r2_of_root: float  # what a line over the root of the KL would explain


def frontier(config: FrontierConfig, train: Callable[[PPOConfig], object]) -> Path:
    """Run with `train` what has not been run yet; returns the picture, beside which lie the tables."""
    folder = Path(config.output_dir) / "frontier"
    places = {run: _place(config, folder, *run) for run in config.runs()}
    options = config.candidates() if config.chooses else []
    tried = {(name, *option): _place_of(folder, name, *option) for name in config.names() for option in options}
    # Every mistake is found before the first run starts.
    trials = {key: _trial_config(config, *key, place) for key, place in tried.items()}
    untuned = {run: _run_config(config, *run, place) for run, place in places.items()}
    for settings in (*trials.values(), *untuned.values()):
        load_algorithm(settings, KlControl(settings)).refuse_sizes()
    for place in (folder, *tried.values(), *places.values()):
        make_folder(place)  # each rank looks: all refuse a link
    _run_missing(config, trials, tried, train)
    choices = [choice for name in config.names() for choice in _choices(config, name, tried)] if options else []
    for edge in at_edges(choices) if distributed.is_main() else ():
        print(f"frontier: {edge}", flush=True)
    own = {choice.algorithm: choice for choice in choices if choice.chosen}
    wanted = {run: _with(settings, own.get(run[0])) for run, settings in untuned.items()}
    _run_missing(config, wanted, places, train)
    points = [point for run, place in places.items() for point in _points(place / "train", *run)]
    lines = [line for name in config.names() if (line := fitted(name, points))]
    points += _optimum(config)
    with distributed.raise_on_all_ranks(UserError):
        if distributed.is_main():
            write_table(folder / "frontier.csv", points)
            write_table(folder / "lines.csv", lines)
            write_table(folder / "choices.csv", choices)
            draw(folder / "frontier.csv", folder / "frontier.png")
    return folder / "frontier.png"


def _place(config: FrontierConfig, folder: Path, algorithm: str, coef: float, seed: int) -> Path:
    return folder / (f"{algorithm}-{coef:g}" + (f"-seed{seed}" if seed != config.seed else ""))


def _place_of(folder: Path, algorithm: str, rate: float, batches: int) -> Path:
    return folder / "choice" / f"{algorithm}-lr{rate:g}-batches{batches}"


def _run_missing(
    config: FrontierConfig,
    wanted: Mapping[Any, PPOConfig],
    places: Mapping[Any, Path],
    train: Callable[[PPOConfig], object],
) -> None:
    missing = [run for run, place in places.items() if config.overwrite_output_dir or not is_done(place, wanted[run])]
    for number, run in enumerate(missing, 1):
        own = wanted[run]
        settings = [
            f"{name} {getattr(own, name):g}" for name in ("kl_coef", "learning_rate", "num_mini_batches", "seed")
        ]
        if distributed.is_main():
            print(f"run {number} of {len(missing)}: {own.algorithm}, {', '.join(settings)}", flush=True)
        train(own)


def _trial_config(config: FrontierConfig, algorithm: str, rate: float, batches: int, place: Path) -> PPOConfig:
    """At the middle weight of the penalty, with the seed that is for choosing; evaluated at its end alone."""
    coef = sorted(config.coefs())[len(config.coefs()) // 2]
    settings = _run_config(config, algorithm, coef, config.seed, place)
    return dataclasses.replace(settings, learning_rate=rate, num_mini_batches=batches, eval_steps=config.total_steps)


def _choices(config: FrontierConfig, algorithm: str, tried: Mapping[tuple[str, float, int], Path]) -> list[Choice]:
    """Of an algorithm, the best one marked."""
    found = []
    for (name, rate, batches), place in tried.items():
        if name == algorithm:
            coef = sorted(config.coefs())[len(config.coefs()) // 2]
            last = _points(place / "train", name, coef, config.seed)[-1]
            objective = last.reward - coef * last.kl
            found.append(Choice(name, rate, batches, objective, config.total_steps * config.batch_size))
    finite = [choice for choice in found if math.isfinite(choice.objective)]
    if not finite:
        raise UserError(f"no run of {algorithm} with one of learning_rates has a finite result: lower them")
    best = max(finite, key=lambda choice: choice.objective)
    return [choice._replace(chosen=choice is best) for choice in found]


def at_edges(choices: Sequence[Choice]) -> list[str]:
    """Which of the best values are the largest or smallest that were tried; nothing is below one minibatch."""
    found = []
    for best in (choice for choice in choices if choice.chosen):
        for name in ("learning_rate", "num_mini_batches"):
            tried = {getattr(choice, name) for choice in choices if choice.algorithm == best.algorithm}
            value = getattr(best, name)
            if len(tried) > 1 and value in (min(tried), max(tried)) and (name, value) != ("num_mini_batches", 1):
                edge = "largest" if value == max(tried) else "smallest"
                found.append(
                    f"{best.algorithm} chose {name} {value:g}, the {edge} of those tried: a better may lie beyond"
                )
    return found


def _with(settings: PPOConfig, choice: Choice | None) -> PPOConfig:
    if choice is None:
        return settings
    return dataclasses.replace(settings, learning_rate=choice.learning_rate, num_mini_batches=choice.num_mini_batches)


def fitted(algorithm: str, points: Sequence[Point]) -> Line | None:
    """The article's line through all evaluations of an algorithm, the start among them."""
    mine = [point for point in points if point.algorithm == algorithm and math.isfinite(point.kl + point.reward)]
    kl, reward = ([getattr(point, name) for point in mine] for name in ("kl", "reward"))
    if len(set(kl)) < 2:
        return None
    slope, intercept = statistics.linear_regression(kl, reward)
    roots = [max(x, 0.0) ** 0.5 for x in kl]
    return Line(algorithm, intercept, slope, _explained(kl, reward), _explained(roots, reward))


def _explained(x: Sequence[float], y: Sequence[float]) -> float:
    """The square of the correlation; nothing is explained of what does not vary."""
    return statistics.correlation(x, y) ** 2 if len(set(x)) > 1 and len(set(y)) > 1 else 0.0


def _run_config(config: FrontierConfig, algorithm: str, coef: float, seed: int, place: Path) -> PPOConfig:
    settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(PPOConfig)}
    for stage, name in (("sft", "sft_model_path"), ("reward", "reward_model_path")):
        found = stage_model(config, stage, settings[name])
        settings[name] = None if found is None else str(found)
    # What one algorithm is set to and another has no use for.
    settings |= {name: getattr(PPOConfig, name) for name in without_use(algorithm)}
    if algorithm == "online_dpo":
        settings["dpo_labels"] = "soft"
    settings |= {"algorithm": algorithm, "kl_coef": coef, "seed": seed}
    settings |= {"output_dir": str(place), "overwrite_output_dir": True}
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


def _points(run: Path, algorithm: str, coef: float, seed: int) -> list[Point]:
    """The evaluations of a run: enumerated where the task can do that, sampled on held-out prompts elsewhere."""
    found = []
    for row in read(run / "metrics.jsonl"):
        # null stands for what is not finite, a score of a function's for example
        row = {name: math.nan if figure is None else figure for name, figure in row.items()}
        if "exact/kl" in row:
            found.append(Point(algorithm, coef, row["step"], row["exact/kl"], row["exact/reward"], None, seed))
        elif "eval/kl" in row:
            figures = row["eval/kl"], row["eval/score"], row.get("eval/gold")
            found.append(Point(algorithm, coef, row["step"], *figures, seed))
    return found


def _optimum(config: FrontierConfig) -> list[Point]:
    """The best there is at every KL, where the task knows it."""
    init_distributed(config.seed, config.ddp_timeout)
    task = load_task(config)
    policy, _ = starting_point(config, task)
    reference = Policy(frozen(policy, config), config.temperature, config.ops_impl)
    best = task.best(functools.partial(score_tokens, reference), _spread(config.coefs()))
    return [Point("optimum", coef, 0, kl, reward, None) for coef, kl, reward in best]


def _spread(coefs: Sequence[float]) -> list[float]:
    """Weights at which the optimum is drawn: beyond both ends of those that were run."""
    low, high = min(coefs) / 3, max(coefs) * 10
    return [low * (high / low) ** (index / 30) for index in range(31)]


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
            runs = dict.fromkeys((row["kl_coef"], row["seed"]) for row in rows if row["algorithm"] == name)
            every: list[tuple[float, float]] = []
            for at, (coef, seed) in enumerate(runs):
                mine = [row for row in rows if (row["algorithm"], row["kl_coef"], row["seed"]) == (name, coef, seed)]
                x, y = ([float(row[column]) for row in mine] for column in ("kl", panel))
                every += zip(x, y, strict=True)
                axis.plot(x, y, "-", color=f"C{number}", alpha=0.35, linewidth=1)
                axis.plot(x[-1:], y[-1:], "o", color=f"C{number}", label=name if at == 0 else None)
                place = (7, -8 * (number + 1))  # labels of near points below each other
                axis.annotate(
                    coef, (x[-1], y[-1]), textcoords="offset points", xytext=place, fontsize=7, color=f"C{number}"
                )
            line = fitted(name, [Point(name, 0.0, 0, *point, None) for point in every])
            if line:
                ends = min(x for x, _ in every), max(x for x, _ in every)
                heights = [line.intercept + line.slope * x for x in ends]
                axis.plot(ends, heights, "--", color=f"C{number}", linewidth=1.5, label=f"  line, R² {line.r2:.2f}")
        axis.set_xlabel("KL to the reference [nats per response]")
        axis.set_ylabel({"reward": "mean reward", "gold": "mean gold score, which nothing was trained on"}[panel])
        axis.grid(alpha=0.3)
        axis.legend()
    content = io.BytesIO()
    figure.savefig(content, dpi=120)
    files.write(picture, content.getvalue())
    pyplot.close(figure)
