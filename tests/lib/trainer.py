"""A trainer small enough to run in seconds: the enumerable task with one narrow layer; and how a person starts one."""

import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from python_trainer.data import Task
from python_trainer.ppo import Trainer
from python_trainer.ppo_config import PPOConfig
from python_trainer.tasks.exact import Exact

ROOT = Path(__file__).parents[2]

TINY_MODEL = {"model_type": "gpt2", "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
TINY = {
    "task": "exact",
    "model_config": json.dumps(TINY_MODEL | {"initializer_range": 0.08}),
    "response_length": 5,
    "batch_size": 16,
    "per_device_train_batch_size": 8,
    "num_mini_batches": 1,
    "num_ppo_epochs": 1,
    "learning_rate": 1e-3,
    "total_steps": 3,
    "disable_tqdm": True,
}

HEADS = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}  # of width 32: vLLM's least on a CPU
ROTARY = HEADS | {"head_dim": 32, "intermediate_size": 96, "num_key_value_heads": 1, "max_position_embeddings": 32}
WIDE = {
    "gpt2": {"model_type": "gpt2", "n_positions": 32, "n_embd": 64, "n_layer": 2, "n_head": 2},
    "llama": ROTARY | {"model_type": "llama"},
    "llama, tied": ROTARY | {"model_type": "llama", "tie_word_embeddings": True},
    "qwen2": ROTARY | {"model_type": "qwen2", "use_sliding_window": False, "tie_word_embeddings": True},
    "qwen3": ROTARY | {"model_type": "qwen3"},
}
SHARP = {"initializer_range": 0.3}  # far from uniform: what a weight does can be seen

REWARD = """
def most_wanted(prompts, completions, wanted, **_):
    return [completion.split().count(letter) for completion, letter in zip(completions, wanted)]

def too_few(prompts, completions, **_):
    return [1.0]

def words(prompts, completions, **_):
    return ["good"] * len(prompts)
"""
ROWS = [{"prompt": "a", "wanted": "b"}, {"prompt": "b c", "wanted": "c"}, {"prompt": "d", "wanted": "e"}]


@pytest.fixture
def tiny(tmp_path):
    """``tiny(**settings)`` is a Trainer writing under tmp_path."""

    def make(**settings) -> Trainer:
        return Trainer(PPOConfig(**TINY | {"output_dir": str(tmp_path / "run")} | settings))

    return make


@pytest.fixture(autouse=True, scope="module")
def evaluation_of_prompts_alone(request):
    """No run scores the 37 324 responses that there are to the exact task's prompts, before and after: 2 s of its 2.5.
    A module whose tests are about those figures says so by its variable ENUMERATES."""
    with pytest.MonkeyPatch.context() as patch:
        if not getattr(request.module, "ENUMERATES", False):
            patch.setattr(Exact, "exact", Task.exact)
        yield


@pytest.fixture
def ratings(tmp_path):
    """Praise rated high, blame rated low, in the layout of the real file."""
    draw = random.Random(0)
    lines = []
    for number in range(200):
        good = number % 2 == 0
        word = draw.choice(["great", "moving", "brilliant"] if good else ["awful", "boring", "terrible"])
        person = " ".join(draw.choices(["old", "young", "shy", "loud", "tall", "calm", "odd", "kind"], k=3))
        rating = draw.uniform(1, 3) * (1 if good else -1)
        lines.append(f"{number}\t{rating}\t{person} people find it {word} , and {word} again .\r\n")
    path = tmp_path / "ratings.txt"
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path):
    """A person's own reward functions, and prompts with a column for them."""
    (tmp_path / "mine.py").write_text(REWARD)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def as_options(settings: dict) -> list[str]:
    return [f"--{key}={value}" for key, value in settings.items()]


def command(*arguments: str, launcher: tuple[str, ...] = (sys.executable, "-m"), **environment: str):
    """The trainer as a person starts it."""
    return python(*launcher, "python_trainer", *arguments, **environment)


def python(*command: str, **environment: str):
    """Any command, which finds the trainer of this checkout."""
    return subprocess.run(
        command,
        env=os.environ
        | {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def free_port() -> int:
    """At which ranks can find each other."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def metric_rows(run: Path) -> list[dict]:
    """metrics.jsonl without the clock."""
    rows = [json.loads(line) for line in (run / "train" / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


def wide(kind: str) -> str:
    return json.dumps(WIDE[kind] | SHARP)


def drawn(generator, trainer, rows: int = 40, length: int = 12) -> torch.Tensor:
    """Responses to prompts of one to eight letters, padded on the left."""
    draw = torch.Generator().manual_seed(5)
    ids = torch.randint(2, 7, (rows, 8), generator=draw)
    attention = torch.arange(8) >= torch.randint(0, 8, (rows, 1), generator=draw)
    ids[~attention] = trainer.tokenizer.pad_token_id
    uniforms = torch.rand(rows, length, generator=draw, dtype=torch.float64)
    with torch.no_grad(), generator.serving(trainer.actor, trainer.tokenizer) as generate:
        return generate(ids, attention, uniforms)[0]


def as_nobody(work: Callable[[], object]) -> str:
    """What it says, in a process that may read what everybody may."""
    if os.getuid():
        return str(work())
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgid(65534)
            os.setuid(65534)
            answer = str(work())
        except BaseException as error:
            answer = repr(error)
        os.write(writer, answer.encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as file:
        return file.read()
