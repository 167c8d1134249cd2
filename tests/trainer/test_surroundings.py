"""A terminal, a cache, a library of pictures and a service of curves: none of them decides how a run ends."""

import io
import json
import os
import pwd
import subprocess
import sys

import pytest
import torch

from python_trainer import __main__ as commands
from python_trainer import cache, logging
from python_trainer.config import UserError
from tests.lib.trainer import ROOT


class Dumb(io.TextIOWrapper):
    """A terminal that knows ASCII alone."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="ascii", errors="strict")


def test_a_terminal_may_lack_signs(monkeypatch):
    terminal = Dumb()
    monkeypatch.setattr(sys, "stdout", terminal)
    with commands._steady_output():
        print("0.1 ± 0.2 ─")
    assert sys.stdout is terminal
    assert terminal.buffer.getvalue() == b"0.1 \\xb1 0.2 \\u2500\n"


def test_there_may_be_no_terminal_at_all(monkeypatch):
    """Python has no streams where they are closed."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    with commands._steady_output():
        print("nowhere")
        sys.stderr.write("nowhere either")
    assert sys.stdout is None


SHOUT = """
import os, sys
from python_trainer.__main__ import _steady_output
child = os.fork()
if child == 0:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
with _steady_output():
    for _ in range(100000):
        print("a line that is long enough to fill a pipe")
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) if child else 0)
"""


def test_a_terminal_may_go_away():
    """The one of a process after its first line; that of its child takes none."""
    line = f"{sys.executable} -c '{SHOUT}' | head -1; exit ${{PIPESTATUS[0]}}"
    ended = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""


def test_curves_that_cannot_be_drawn_are_named(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text("{torn\n{}\n")
    logging.plot(tmp_path)
    assert "curves.png could not be drawn: UserError" in capsys.readouterr().err


def test_a_service_of_curves_that_fails_ends_nothing(tiny, tmp_path, monkeypatch, capsys):
    class Service:
        def record(self, step, metrics):
            raise ConnectionError("no route")

        close = record

    monkeypatch.setattr(logging, "open_reports", lambda *_: [Service()])
    tiny(total_steps=1).train()
    assert capsys.readouterr().err.count("no more curves for Service: ConnectionError: no route") == 1


def test_metrics_are_json_whatever_they_are():
    rows = {"a": float("nan"), "b": [float("inf"), 1], "c": {"d": -float("inf")}, "e": None}
    assert json.loads(logging.as_json(rows), parse_constant=pytest.fail) == {
        "a": None,
        "b": [None, 1],
        "c": {"d": None},
        "e": None,
    }


def test_the_cache_works_from_its_variable_alone(tmp_path, monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    monkeypatch.setenv("PPO_KERNELS_CACHE", str(tmp_path / "one" / "cache"))
    assert cache.make_cache_folder() == tmp_path / "one" / "cache"
    assert (tmp_path / "one" / "cache").stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("PPO_KERNELS_CACHE", "")
    with pytest.raises(UserError, match="no home folder .* set PPO_KERNELS_CACHE"):
        cache.cache_folder()


def test_a_cache_that_others_may_write_to_is_refused(tmp_path, monkeypatch):
    """The one in the home folder, which earlier versions left open, is closed."""
    monkeypatch.setenv("PPO_KERNELS_CACHE", str(tmp_path))
    for mode in (0o777, 0o1777, 0o775, 0o707):
        tmp_path.chmod(mode)
        with pytest.raises(UserError, match=f"others may write to the cache {tmp_path}.*PPO_KERNELS_CACHE"):
            cache.make_cache_folder()
    tmp_path.chmod(0o755)
    cache.make_cache_folder()
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(UserError, match="others may write"):
        cache.make_cache_folder()
    monkeypatch.undo()
    monkeypatch.delenv("PPO_KERNELS_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".cache" / "ppo_kernels").mkdir(parents=True)
    (tmp_path / ".cache" / "ppo_kernels").chmod(0o775)
    assert cache.make_cache_folder().stat().st_mode & 0o777 == 0o700


def test_folders_inside_the_cache_are_closed_too(tmp_path, monkeypatch):
    """Compiled code lies there with the modes of the umask."""
    monkeypatch.setenv("PPO_KERNELS_CACHE", str(tmp_path))
    tmp_path.chmod(0o755)
    (tmp_path / "made").mkdir(mode=0o755)
    inner = cache.make_cache_folder("made/by us")
    assert inner == tmp_path / "made" / "by us"
    assert [path.stat().st_mode & 0o777 for path in (inner, inner.parent, tmp_path)] == [0o700, 0o700, 0o755]
    inner.chmod(0o770)
    with pytest.raises(UserError, match="others may write to the cache .*by us"):
        cache.make_cache_folder("made/by us")


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PPO_KERNELS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(
        UserError, match=f"the cache {tmp_path}/file/cache cannot be made .Not a directory.*PPO_KERNELS"
    ):
        cache.make_cache_folder()
    monkeypatch.setenv("PPO_KERNELS_CACHE", str(tmp_path / "closed"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match=f"the cache {tmp_path}/closed cannot be written"):
        cache.make_cache_folder()


FAULTS = """
import resource
import torch
from python_trainer.deepspeed_engine import init_distributed

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

init_distributed(0, 60)
print("faults", *(faults() for _ in range(8)))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="a step's memory is the GPU's")
def test_memory_that_was_freed_is_taken_again():
    """Blocks of this size come from the system, page by page, each time that they are asked for. An older glibc takes
    a few rounds: it may not fit an aligned block into a free one of its size."""
    run = subprocess.run([sys.executable, "-c", FAULTS], cwd=ROOT, capture_output=True, text=True, check=True)
    first, *later = map(int, run.stdout.partition("faults ")[2].split())
    assert first > 10_000
    assert min(later) < 1000
