"""A terminal, a cache, a library of pictures and a service of curves: none of them decides how a run ends."""

import io
import json
import os
import pwd
import subprocess
import sys

import pytest

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
