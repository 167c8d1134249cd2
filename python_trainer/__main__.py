"""python -m python_trainer sft|reward|train|eval|compare|frontier|demo --config file.yaml [--key value ...]"""

import argparse
import contextlib
import errno
import io
import itertools
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

from . import distributed
from .compare import Comparison, beside_reference, head_to_head
from .config import CONFIGS, EvalConfig, RewardConfig, RunConfig, SftConfig, UserError
from .data import Task, load_task
from .evaluate import Evaluation
from .frontier import frontier
from .models import stage_model
from .ppo import Trainer
from .ppo_config import CompareConfig, FrontierConfig, PPOConfig
from .settings import COMMANDS, load
from .sft import reward, sft

DEMO_CONFIG = "reviews_cpu.yaml"
INTERRUPTED = 128 + signal.SIGINT
LEAST_GOLD_GAIN = 0.2
MOST_KL = 12.0
SHOWN = 6

HELP = f"""{__doc__}

  sft      imitate texts                          -> <output_dir>/sft/model
  reward   a reward model from preference pairs   -> <output_dir>/reward/model
  train    reinforcement learning                 -> <output_dir>/train/model, metrics.jsonl, curves.png
  eval     a trained policy beside its reference  -> <output_dir>/eval/metrics.json
  compare  RUN RUN ...: each against each other   -> <output_dir>/compare/wins.csv, policies.csv, compare.png
  frontier algorithms x kl_coefs                  -> <output_dir>/frontier/frontier.csv and .png
  demo     sft, reward and train on real reviews; fails if nothing is learned. Replaces its earlier results.

Shipped configurations: {", ".join(sorted(path.name for path in CONFIGS.glob("*.yaml")))}
Every setting of a command: python -m python_trainer <command> --help"""


def main(arguments: Sequence[str]) -> int:
    # The deepspeed launcher puts its --local_rank=N before everything else; the environment says the same.
    rest = [argument for argument in map(_underscored, arguments) if not argument.startswith("--local_rank")]
    if not rest or rest[0] in ("-h", "--help"):
        print(HELP)
        return 0 if rest else 2
    command, *rest = rest
    try:
        with _steady_output():
            return _parsed(command, rest)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; what is committed is safe", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) and error.filename is None:
            raise
        print(f"error: {error.strerror}: {error.filename or 'output_dir'}; what is committed is safe", file=sys.stderr)
        return 1


class _Steady:
    """A stream that ends no run: what it cannot take any more (a closed pipe, a full disk) goes nowhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._try(self._stream.write, text) or len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, work: Callable[..., Any], *arguments: str) -> Any:
        try:
            return work(*arguments)
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # also for what is written at the process's end
            os.close(nowhere)
            return None


@contextlib.contextmanager
def _steady_output() -> Iterator[None]:
    """Inside, neither a sign that a terminal lacks nor a terminal that goes away decides how a run ends."""
    before = sys.stdout, sys.stderr
    for stream in before:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = (_Steady(stream or open(os.devnull, "w")) for stream in before)  # noqa: SIM115  # closed
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before


def _underscored(argument: str) -> str:
    """--output-dir is --output_dir; the value behind a = stays as it is."""
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value if name.startswith("--") else argument


def _parsed(command: str, rest: list[str]) -> int:
    if command not in (*COMMANDS, "demo"):
        raise UserError(f"unknown command {command!r}; choose from {', '.join(COMMANDS)}, demo")
    if command == "compare":
        runs = list(itertools.takewhile(lambda argument: not argument.startswith("-"), rest))
        rest = [*([f"--runs={','.join(runs)}"] if runs else []), *rest[len(runs) :]]
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config")
    try:
        given, rest = parser.parse_known_args(rest)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from error
    return run(command, given.config, rest)


def run(command: str, path: str | None, overrides: Sequence[str]) -> int:
    status = 0
    try:
        run_command(command, path, overrides)
    except distributed.Stopped as stop:
        _say(str(stop))
        status = INTERRUPTED if stop.by_hand else 0
    except RuntimeError as error:
        if (loss := distributed.loss_of_a_rank(error)) is None:
            raise
        raise UserError(loss) from error
    distributed.stop()
    return status


def run_command(command: str, path: str | None, overrides: Sequence[str]) -> None:
    if command == "sft":
        _say(_figures("sft", sft(load("sft", path, overrides, SftConfig))))
    elif command == "reward":
        _say(_figures("reward", reward(load("reward", path, overrides, RewardConfig))))
    elif command == "train":
        trainer = Trainer(load("train", path, overrides, PPOConfig))
        _report(trainer.task, *trainer.train())
        _say(f"train: {trainer.folder / 'model'}, and curves.png beside it")
    elif command == "eval":
        config = load("eval", path, overrides, EvalConfig)
        _report(load_task(config), *beside_reference(config))
    elif command == "compare":
        rivals = load("compare", path, overrides, CompareConfig)
        _show(head_to_head(rivals))
        _say(f"compare: {Path(rivals.output_dir) / 'compare' / 'compare.png'}")
    elif command == "frontier":
        study = load("frontier", path, overrides, FrontierConfig)
        _prepare(study, path)
        _say(f"frontier: {frontier(study, lambda config: Trainer(config).train())}")
    else:
        demo(path or DEMO_CONFIG, overrides)


def _prepare(study: FrontierConfig, path: str | None) -> None:
    """A task with texts and pairs gets its first policy and reward model, unless they are there."""
    if study.model_config is None or load_task(study).verifiable or study.reward_function is not None:
        return
    names = ("task", "data_path", "model_config", "output_dir", "seed", "disable_tqdm")
    shared = [f"--{name}={value}" for name in names if (value := getattr(study, name)) is not None]
    for stage, given in (("sft", study.sft_model_path), ("reward", study.reward_model_path)):
        if stage_model(study, stage, given) is None:
            run_command(stage, path, shared)


def demo(path: str, overrides: Sequence[str]) -> None:
    """sft, reward and PPO on real reviews; fails unless an independent score rises."""
    overrides = ["--overwrite_output_dir=True", *overrides]
    shared = load("demo", path, overrides, RunConfig)  # only what all stages share can be set for all of them
    if load_task(shared).gold([]) is None:
        raise UserError(f"the demonstration needs a task with an independent score (gold); task {shared.task} has none")
    settings = (
        load("sft", path, overrides, SftConfig),
        load("reward", path, overrides, RewardConfig),
        load("train", path, overrides, PPOConfig),
    )
    started = time.perf_counter()
    as_it_is = Path(path).name == DEMO_CONFIG and len(overrides) == 1
    how_long = ": about three minutes on two CPU cores" if as_it_is else ""
    _say(f"demo: three stages on the task {shared.task}, into {shared.output_dir}{how_long}")
    _say("1/3 sft: a first policy, from texts")
    _say(_figures("sft", sft(settings[0])) + f"  ({time.perf_counter() - started:.0f} s so far)")
    _say("2/3 reward: a model that says which of two texts is better")
    _say(_figures("reward", reward(settings[1])) + f"  ({time.perf_counter() - started:.0f} s so far)")
    train = settings[2]
    _say(f"3/3 train: {train.total_steps} steps of {train.algorithm}, {train.batch_size} responses each")
    trainer = Trainer(train)
    before, after = trainer.train()
    _report(trainer.task, before, after)
    _say(f"curves: {trainer.folder / 'curves.png'}   time: {time.perf_counter() - started:.0f} s")
    refuse_failure(before, after)


def refuse_failure(before: Evaluation, after: Evaluation) -> None:
    gain = after.metrics["eval/gold"] - before.metrics["eval/gold"]
    kl = after.metrics["eval/kl"]
    if not (gain >= LEAST_GOLD_GAIN and kl <= MOST_KL):  # NaN fails too
        raise UserError(
            f"the demonstration failed: the gold score rose by {gain:.3f} (at least {LEAST_GOLD_GAIN} expected), "
            f"the KL is {kl:.1f} (at most {MOST_KL})"
        )


def _report(task: Task, before: Evaluation, after: Evaluation) -> None:
    if not distributed.is_main():
        return
    table = Table(title=f"completions of {'held-out ' if task.holds_out else ''}prompts", show_lines=True)
    for name in ("prompt", "before", "after"):
        table.add_column(name)
    for prompt, *completions in list(zip(before.prompts, before.completions, after.completions, strict=True))[:SHOWN]:
        table.add_row(prompt, *(text if gold is None else f"{text} ({gold:+.2f})" for text, gold in completions))
    Console().print(table, markup=False)
    for name in sorted(after.metrics):
        if name.endswith("_se"):
            continue
        error = after.metrics.get(f"{name}_se")
        if error is None:
            print(f"{name:22} {before.metrics[name]:8.3f} -> {after.metrics[name]:8.3f}")
        else:
            old = f"{before.metrics[name]:8.3f} ± {before.metrics[f'{name}_se']:.3f}"
            print(f"{name:22} {old} -> {after.metrics[name]:8.3f} ± {error:.3f}")


def _show(found: Comparison) -> None:
    """What each policy reached, and a table of wins for each judge."""
    if not distributed.is_main():
        return
    table = Table(title="held-out prompts, the same for all")
    for column in ("policy", "reward", "gold", "KL", "length"):
        table.add_column(column)
    for each in found.policies:
        gold = "" if each.gold is None else f"{each.gold:.3f} ± {each.gold_se:.3f}"
        reward, kl = f"{each.reward:.3f} ± {each.reward_se:.3f}", f"{each.kl:.2f} ± {each.kl_se:.2f}"
        table.add_row(each.policy, reward, gold, kl, f"{each.response_length:.1f}")
    Console().print(table, markup=False)
    for judge in dict.fromkeys(win.by for win in found.wins):
        wins = {(win.policy, win.against): win for win in found.wins if win.by == judge}
        table = Table(title=f"wins by {judge}, of {found.wins[0].prompts} prompts; a tie is half a win")
        for column in ("policy", *(f"against {each.policy}" for each in found.policies)):
            table.add_column(column)
        for one in found.policies:
            rates = [wins.get((one.policy, other.policy)) for other in found.policies]
            table.add_row(one.policy, *(f"{w.win_rate:.1%} ± {w.se:.1%}" if w else "" for w in rates))
        Console().print(table, markup=False)


def _figures(stage: str, figures: dict[str, float]) -> str:
    return f"{stage}: " + "  ".join(f"{name} {value:.4g}" for name, value in figures.items())


def _say(text: str) -> None:
    if distributed.is_main():
        print(text, flush=True)


if __name__ == "__main__":
    status = main(sys.argv[1:])
    if status == INTERRUPTED:  # by the signal itself: otherwise a shell goes on with the next line of its script
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    sys.exit(status)
