"""Files as nobody should write them: whoever reads one succeeds, or says in one sentence what is wrong with it."""

import hashlib
import json
import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from python_trainer import atomic, logging
from python_trainer.config import UserError
from python_trainer.models import load_policy, load_tokenizer, save_model
from python_trainer.ppo import Trainer
from python_trainer.ppo_config import PPOConfig
from python_trainer.settings import load
from python_trainer.tasks.files import Files

LIMIT = 20  # seconds
FRAGMENTS = [  # in the place of a value
    *("null", "true", "[]", "{}", '""', "-1", "0", "1e400", "NaN", "-Infinity", "1.5", "[1]", '{"a": 1}', '"x"'),
    *("9" * 5000, "-" + "9" * 400, "1" + "0" * 400 + ".0", "[" * 100_000, '{"a":' * 50_000, "[" * 3000 + "]" * 3000),
    *('"\\ud800"', '"\\u0000"', '"../../x"', '"/etc/passwd"', '"' + "x" * 5000 + '"', "*a", "&a [*a]", "!!python/none"),
    *("yes", "2001-99-99", "0x", "\ufeff", "\x00", "\u2028", "'", '"', "#", ":", ",", "\n", "\t"),
]
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{','.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(9)
)
WHOLE = ["", "null", "[]", "0", '"x"', "\ufeff", "[" * 100_000, BOMB, "yes: 1\n", "1: 2\n", "{\n", "\x00" * 100]


@dataclass
class Reader:
    """A file, and what reads it."""

    path: Path
    read: Callable[[], object]
    listed: bool = False  # the manifest beside it has to fit


def damaged(content: bytes, draw: random.Random) -> bytes:
    """With one to three of: a value or a stretch replaced, cut, doubled; a byte changed; or another file altogether."""
    if draw.random() < 0.05:
        return draw.choice(WHOLE).encode("utf-8", "surrogatepass")
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(content) + 1)
        end = min(len(content), at + draw.choice([0, 1, 4, 30]))
        places = [place for place in range(len(content)) if content[place : place + 1] in (b":", b",", b"[")]
        kind = draw.choice(["value", "value", "value", "insert", "cut", "double", "byte", "short"])
        fragment = draw.choice(FRAGMENTS).encode("utf-8", "surrogatepass")
        if kind == "value" and places:
            at = draw.choice(places) + 1
            end = next((stop for stop in range(at, len(content)) if content[stop : stop + 1] in b",}]\n"), len(content))
            content = content[:at] + b" " + fragment + content[end:]
        elif kind == "insert":
            content = content[:at] + fragment + content[end:]
        elif kind == "cut":
            content = content[:at] + content[end:]
        elif kind == "double":
            content = content[:end] + content[at:]
        elif kind == "byte" and content:
            at = draw.randrange(len(content))
            content = content[:at] + bytes([draw.randrange(256)]) + content[at + 1 :]
        elif kind == "short":
            content = content[:at]
    return content


def readers(trainer: Trainer, folder: Path) -> dict[str, Reader]:
    """Every kind of file that a person can bring; `trainer` has written the checkpoint and the model."""
    config = trainer.config
    settings, deepspeed, record = folder / "run.yaml", folder / "ds.json", folder / "metrics.jsonl"
    settings.write_text(
        'seed: 3\nmodel_config: {model_type: gpt2, n_layer: 1}\ntrain: {kl_coef: 0.1, report_to: "none"}\n'
    )
    deepspeed.write_text(json.dumps({"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000}, "bf16": {}}))
    record.write_text('{"step": 0, "eval/kl": 0.1}\n{"step": 1, "eval/kl": null}\n{"step": 2}\n')
    rows = {
        "prompts": [{"prompt": f"a {n}", "answer": n} for n in range(4)],
        "pairs": [{"chosen": f"a {n}", "rejected": "b", "margin": 0.5} for n in range(4)],
        "texts": [{"text": f"a {n}"} for n in range(4)],
    }
    for name, content in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    trainer.save_checkpoint(folder)
    checkpoint, model = folder / f"step-{trainer.done:06d}", folder / "model"
    save_model(trainer.actor.model, trainer.tokenizer, model)
    task = Files(str(folder), for_function=True)

    def read_model() -> None:
        load_policy(model, config, load_tokenizer(model))

    def read_checkpoint() -> None:
        trainer.load_checkpoint(checkpoint)

    (weights,) = checkpoint.glob("actor-*.safetensors")
    found = {
        "settings": Reader(settings, lambda: load("train", str(settings), [], PPOConfig)),
        "deepspeed": Reader(deepspeed, lambda: load("train", None, [f"--deepspeed={deepspeed}"], PPOConfig)),
        "metrics": Reader(record, lambda: logging.read(record)),
        "prompts": Reader(folder / "prompts.jsonl", task.prompts),
        "pairs": Reader(folder / "pairs.jsonl", task.pairs),
        "texts": Reader(folder / "texts.jsonl", task.texts),
        "manifest": Reader(
            checkpoint / atomic.MANIFEST, lambda: (atomic.is_made(checkpoint), atomic.verify(checkpoint))
        ),
        "state": Reader(checkpoint / "state.json", read_checkpoint, listed=True),
        "weights": Reader(weights, read_checkpoint, listed=True),
    }
    of_model = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
    return found | {f"model/{name}": Reader(model / name, read_model) for name in of_model}


def commit(folder: Path) -> None:
    """A manifest that fits the files that are there."""
    listing = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in folder.iterdir()
        if path.is_file() and path.name != atomic.MANIFEST
    }
    (folder / atomic.MANIFEST).write_text(json.dumps({"files": listing}))


def failures(name: str, reader: Reader, count: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """What came of those files that were neither read nor refused in one sentence."""
    whole = reader.path.read_bytes()
    draw = random.Random(f"{name} {seed}")
    try:
        for _ in range(count):
            content = damaged(whole, draw)
            reader.path.write_bytes(content)
            if reader.listed:
                commit(reader.path.parent)
            end = attempt(reader.read)
            if end is not None:
                yield end, content
    finally:
        reader.path.write_bytes(whole)
        if reader.listed:
            commit(reader.path.parent)


def attempt(read: Callable[[], object]) -> str | None:
    """How it ended, where it neither succeeded nor said what is wrong."""

    def late(*_: object) -> None:
        raise TimeoutError(f"hangs: not done after {LIMIT} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT)
    try:
        read()
    except UserError as error:
        return f"more than one line: {str(error)[:200]!r}" if "\n" in str(error) else None
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return None
