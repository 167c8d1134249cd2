"""Our trainer beside TRL's: seconds and memory of one step with the same model, data and reward. ``--trainers``.

GPT-2 of 4 layers and 256 channels with random weights, on the CPU in float32: 32 responses of 64 tokens to 8 prompts,
one update per rollout, a reference model in both. The two are processes that take turns, step by step, so what slows
the machine slows both; medians are compared.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bench.results import MIB, Table, times

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "build" / "trainers"
INSTALL = f"pip install --no-deps --target {FOLDER} -r {ROOT / 'bench' / 'trainers.txt'}"
ALGORITHMS, VOCABULARIES = ("rloo", "grpo"), (50_000, 8_000)
ROWS, GENERATIONS, PROMPT, RESPONSE = 32, 4, 16, 64
STEPS = 5  # timed; one before them is not
KL_COEF, LEARNING_RATE = 0.05, 1e-5
REWARD = """
def different(prompts, completions, **_):
    return [len(set(completion.split())) / 64 for completion in completions]
"""


def make_inputs(folder: Path, vocabulary: int) -> None:
    """A model with its tokenizer, prompts and a reward function, as both trainers read them."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", *(f"w{i}" for i in range(vocabulary - 2))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    size = {"n_layer": 4, "n_embd": 256, "n_head": 4, "n_positions": 256, "vocab_size": vocabulary}
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = GPT2Config(**size, **rates, pad_token_id=0, bos_token_id=1, eos_token_id=1)
    for part in (GPT2LMHeadModel(config), fast):
        part.save_pretrained(folder / "model")
    draw = random.Random(0)
    rows = [{"prompt": " ".join(draw.choices(words[2:], k=PROMPT))} for _ in range(1000)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text(REWARD)


class Turns:
    """The child's side: a step begins when the parent says so, and ends with a line for it."""

    def __init__(self) -> None:
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what the libraries print goes elsewhere

    def begin(self) -> None:
        if not sys.stdin.readline():
            sys.exit("the parent is gone")
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def end(self) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux
        row = {"seconds": time.perf_counter() - self.wall, "cpu": time.process_time() - self.cpu, "peak": peak}
        print(json.dumps(row), file=self.out, flush=True)


def run_ours(algorithm: str, folder: Path, turns: Turns) -> None:
    from python_trainer.ppo import Trainer
    from python_trainer.ppo_config import PPOConfig

    config = PPOConfig(
        task="files",
        data_path=str(folder),
        sft_model_path=str(folder / "model"),
        reward_function=f"{folder}/reward.py:different",
        output_dir=str(folder / "ours"),
        algorithm=algorithm,
        num_generations=GENERATIONS,
        batch_size=ROWS,
        per_device_train_batch_size=ROWS,
        num_ppo_epochs=1,
        response_length=RESPONSE,
        kl_coef=KL_COEF,
        learning_rate=LEARNING_RATE,
        total_steps=1 + STEPS,
        disable_tqdm=True,
    )
    trainer = Trainer(config)
    for _ in range(1 + STEPS):
        turns.begin()
        trainer.train_step()
        turns.end()


def run_trl(algorithm: str, folder: Path, turns: Turns) -> None:
    sys.path.append(str(FOLDER))
    import trl
    from datasets import Dataset
    from transformers import TrainerCallback

    class TakeTurns(TrainerCallback):
        """From here to there are rollout, loss and optimizer."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            turns.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.end()

    reward: dict[str, Any] = {}
    exec(REWARD, reward)
    settings = getattr(trl, f"{algorithm.upper()}Config")(
        output_dir=str(folder / "trl"),
        num_generations=GENERATIONS,
        per_device_train_batch_size=ROWS,
        max_completion_length=RESPONSE,
        beta=KL_COEF,
        learning_rate=LEARNING_RATE,
        max_steps=1 + STEPS,
        gradient_checkpointing=False,  # nor is there in ours
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    getattr(trl, f"{algorithm.upper()}Trainer")(
        model=str(folder / "model"),
        reward_funcs=reward["different"],
        args=settings,
        train_dataset=Dataset.from_list(rows),
        callbacks=[TakeTurns()],
    ).train()


RUNS = {"ppo_kernels": run_ours, "TRL": run_trl}


def start(name: str, algorithm: str, folder: Path) -> subprocess.Popen[str]:
    """A child that waits for its turns."""
    code = f"from bench import trainers as t; t.RUNS[{name!r}]({algorithm!r}, t.Path({str(folder)!r}), t.Turns())"
    # Both on the CPU, with as many threads as it has cores, and neither with our ops in TRL.
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(os.cpu_count()), "HF_HUB_OFFLINE": "1"}
    env["PPO_KERNELS_PATCH"] = "none"
    with (folder / f"{name}.log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-c", code],
            **{"cwd": ROOT, "env": env, "text": True},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
        )


def in_turns(algorithm: str, folder: Path) -> dict[str, list[dict[str, float]]]:
    """The steps of both, without each one's first."""
    children = {name: start(name, algorithm, folder) for name in RUNS}
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in RUNS}
    try:
        for _ in range(1 + STEPS):
            for name, child in children.items():
                with contextlib.suppress(BrokenPipeError):
                    print(file=child.stdin, flush=True)
                line = child.stdout.readline()
                if not line:
                    log = (folder / f"{name}.log").read_text()
                    raise SystemExit(f"{name} ended before its last step:\n{log[-3000:]}")
                rows[name].append(json.loads(line))
            print(".", end="", file=sys.stderr, flush=True)
    finally:
        for child in children.values():
            child.kill()
            child.wait()
    return {name: steps[1:] for name, steps in rows.items()}


def main(only: str = "") -> int:
    sys.path.append(str(FOLDER))
    try:
        trl = version("trl")
        version("datasets")
    except PackageNotFoundError as error:
        print(f"{error.name} is not here; install it with: {INSTALL}", file=sys.stderr)
        return 2
    table = Table("Trainers", "", ["step", "ours", "TRL", "ratio", "of CPU time", "ours, MiB", "TRL, MiB"])
    for vocabulary in VOCABULARIES:
        for algorithm in ALGORITHMS:
            name = f"{algorithm} V = {vocabulary}"
            if only not in name:
                continue
            with tempfile.TemporaryDirectory() as place:
                make_inputs(Path(place), vocabulary)
                ours, its = in_turns(algorithm, Path(place)).values()
            seconds, cpu = (
                [statistics.median(row[key] for row in rows) for rows in (ours, its)] for key in ("seconds", "cpu")
            )
            peaks = [f"{max(row['peak'] for row in rows) / MIB:.0f}" for rows in (ours, its)]
            cells = [f"{one:.2f} s" for one in seconds]
            table.lines.append([name, *cells, times(seconds[1] / seconds[0]), times(cpu[1] / cpu[0]), *peaks])
    load = ", ".join(f"{load:.1f}" for load in os.getloadavg())
    print(f"\n{table.markdown()}\n")
    print(
        f"Medians of {STEPS} steps in turns, each of {ROWS} responses of {RESPONSE} tokens; ratios are TRL's over ours."
    )
    print(f"TRL {trl}, torch {version('torch')}; load averages {load} on {os.cpu_count()} cores.")
    return 0
