"""The commands, and the demonstration that runs them in a row."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from . import files, generation, launch
from .config import EvalConfig, PPOConfig, RewardConfig, RunConfig, SftConfig, UserError
from .data import Task, encode_prompts, load_task
from .engines import Policy, frozen
from .evaluation import Evaluation, chosen, evaluate
from .frontier import FrontierConfig, frontier
from .loop import Trainer
from .models import context_of, load_policy, load_tokenizer, stage_model
from .roles import find_judge
from .settings import load, save
from .supervised import reward, sft

DEMO_CONFIG = "reviews_cpu.yaml"
LEAST_GOLD_GAIN = 0.2
MOST_KL = 12.0
SHOWN = 6


def run(command: str, path: str | None, overrides: Sequence[str]) -> int:
    try:
        _run(command, path, overrides)
    except launch.Stopped as stop:
        _say(str(stop))
    except RuntimeError as error:
        if (loss := launch.loss_of_a_rank(error)) is None:
            raise
        raise UserError(loss) from error
    launch.stop()
    return 0


def _run(command: str, path: str | None, overrides: Sequence[str]) -> None:
    if command == "sft":
        _say(_figures("sft", sft(load("sft", path, overrides, SftConfig))))
    elif command == "reward":
        _say(_figures("reward", reward(load("reward", path, overrides, RewardConfig))))
    elif command == "train":
        trainer = Trainer(load("train", path, overrides, PPOConfig))
        _report(trainer.task, *trainer.train())
    elif command == "eval":
        config = load("eval", path, overrides, EvalConfig)
        _report(load_task(config), *compare(config))
    elif command == "frontier":
        study = load("frontier", path, overrides, FrontierConfig)
        _prepare(study, path)
        _say(f"frontier: {frontier(study)}")
    else:
        demo(path or DEMO_CONFIG, overrides)


def compare(config: EvalConfig) -> tuple[Evaluation, Evaluation]:
    """The reference and a trained policy on the same prompts with the same noise; the figures are kept."""
    launch.start(config.seed, config.ddp_timeout)
    trained = stage_model(config, "train", config.model_path)
    if trained is None:
        raise UserError("no policy to evaluate: give model_path, or run the train command first")
    generator = generation.chosen(config)
    task = load_task(config)
    heldout = task.prompts()[1]
    chosen(heldout, config)  # before the models load
    tokenizer = load_tokenizer(trained)
    start = stage_model(config, "sft", config.sft_model_path)
    models = [frozen(load_policy(path, config, tokenizer), config) for path in (start, trained)]
    reference, policy = (Policy(model, config.temperature, config.ops_impl) for model in models)
    judge = find_judge(config, task, tokenizer) if task.verifiable or config.reward_function else None
    prompts = encode_prompts(
        heldout,
        tokenizer,
        response_length=config.response_length,
        context=context_of(policy.module),
    )
    before, after = (
        evaluate(p, reference, prompts, task, tokenizer, generator, judge, config) for p in (reference, policy)
    )
    for result, of in ((before, reference), (after, policy)):
        result.metrics |= task.exact(of, reference, config.kl_coef)
    if launch.is_main():
        folder = Path(config.output_dir) / "eval"
        save(config, folder)
        figures = {"reference": before.metrics, "policy": after.metrics}
        files.write(folder / "metrics.json", json.dumps(figures, indent=2) + "\n")
    return before, after


def _prepare(study: FrontierConfig, path: str | None) -> None:
    """A task with texts and pairs gets its first policy and reward model, unless they are there."""
    if study.model_config is None or load_task(study).verifiable or study.reward_function is not None:
        return
    names = ("task", "data_path", "model_config", "output_dir", "seed", "disable_tqdm")
    shared = [f"--{name}={value}" for name in names if (value := getattr(study, name)) is not None]
    for stage, given in (("sft", study.sft_model_path), ("reward", study.reward_model_path)):
        if stage_model(study, stage, given) is None:
            _run(stage, path, shared)


def demo(path: str, overrides: Sequence[str]) -> None:
    """sft, reward and PPO on real reviews; fails unless an independent judge likes the result better."""
    overrides = ["--overwrite_output_dir=True", *overrides]
    shared = load("demo", path, overrides, RunConfig)  # only what all stages share can be set for all of them
    if load_task(shared).gold([]) is None:
        raise UserError(f"the demonstration needs a task with an independent judge; task {shared.task} has none")
    settings = (
        load("sft", path, overrides, SftConfig),
        load("reward", path, overrides, RewardConfig),
        load("train", path, overrides, PPOConfig),
    )
    started = time.perf_counter()
    _say(_figures("sft", sft(settings[0])) + f"  ({time.perf_counter() - started:.0f} s so far)")
    _say(_figures("reward", reward(settings[1])) + f"  ({time.perf_counter() - started:.0f} s so far)")
    trainer = Trainer(settings[2])
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
    if not launch.is_main():
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


def _figures(stage: str, figures: dict[str, float]) -> str:
    return f"{stage}: " + "  ".join(f"{name} {value:.4g}" for name, value in figures.items())


def _say(text: str) -> None:
    if launch.is_main():
        print(text, flush=True)
