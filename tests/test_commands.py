"""Every command that the documentation names is one: the target, the part, the module, the options are there."""

import dataclasses
import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest

from bench import __main__ as bench
from ppo_kernels.integrations import TRAINERS
from python_trainer.config import CONFIGS
from python_trainer.settings import COMMANDS
from tests.test_readme import PAGES, ROOT
from tests.verify.__main__ import GROUPS, PARTS

PAGES = [*PAGES, ROOT / "python_trainer" / "METRICS.md", ROOT / "bench" / "NOTES.md"]
MADE = {"run.yaml"}  # by the pages themselves
BEGIN = re.compile(
    r"(?:^|&& |; )((?:[A-Z_]+=\S* )*)(make(?= |$)|\S*python3? -m|\S*bench/gpu_run\.sh)(.*?)(?= && |;|  +#| \||$)"
)

pytestmark = pytest.mark.skipif(not PAGES[1].is_file(), reason="the copies that mutants are made in have no pages")


def commands() -> list[tuple[str, str, list[str]]]:
    """Page, program, words, of what stands in a block or between backticks."""
    found = []
    for page in filter(Path.is_file, PAGES):
        for block, words in re.findall(r"^ *```\w*\n(.*?)^ *```|`([^`\n]+)`", page.read_text(), re.M | re.S):
            for line in (block or words).replace("\\\n", " ").splitlines():
                for _, program, rest in BEGIN.findall(line.strip().replace("...", "")):
                    found.append((page.name, Path(program.split()[0]).name, shlex.split(rest, comments=True)))
    return found


def of(program: str, module: str = "") -> list:
    chosen = [(page, words) for page, name, words in commands() if name == program]
    chosen = [(page, words[bool(module) :]) for page, words in chosen if not module or words[:1] == [module]]
    return [pytest.param(words, id=f"{page}: {' '.join(words)}") for page, words in chosen]


@pytest.mark.parametrize("words", of("make"))
def test_make_has_the_target_and_its_part(words):
    rules = re.findall(r"^(?:\.PHONY:)?\s*([a-z ]+):", (ROOT / "Makefile").read_text(), re.M)
    settings = dict(word.split("=", 1) for word in words if "=" in word)
    targets = [word for word in words if "=" not in word]
    assert set(targets) <= {rule.strip() for rule in rules}
    assert set(settings) <= {"PYTHON", "TORCH", "PIP_ARGS", "VENV", "ARGS", "PART"}
    assert set(settings.get("PART", "").split()) <= {*PARTS, *GROUPS}


@pytest.mark.parametrize("words", of("python"))
def test_the_module_is_there(words):
    module = words[0].strip()
    if module.split(".")[0] in {*TRAINERS, "build"}:
        return  # not ours, and not here
    assert importlib.util.find_spec(module), module


BENCH = [pytest.param(*one.values, id=one.id) for one in of("python", "bench")]
for _one in of("make"):
    if _one.values[0][:1] == ["bench"]:
        _words = shlex.split(" ".join(word[5:] for word in _one.values[0] if word.startswith("ARGS=")))
        BENCH.append(pytest.param(_words, id=_one.id))


@pytest.mark.parametrize("words", BENCH)
def test_bench_takes_the_options(monkeypatch, words):
    monkeypatch.setattr(sys, "argv", ["bench", *words])
    bench.options()


@pytest.mark.parametrize("words", of("python", "python_trainer"))
def test_the_trainer_takes_the_settings(words):
    command, *rest = words
    if command.startswith("<"):
        return
    settings = COMMANDS["train" if command == "demo" else command]
    known = {field.name for field in dataclasses.fields(settings)} | {"config", "help"}
    assert {word[2:].split("=")[0] for word in rest if word.startswith("--")} <= known
    for before, word in zip(rest, rest[1:], strict=False):
        assert before != "--config" or (CONFIGS / word).is_file() or word in MADE | {"file.yaml"}
