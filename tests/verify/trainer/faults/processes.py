"""Processes forked from one that has imported everything: importing takes longer than most of what happens here."""

import contextlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.lib.trainer import free_port

# Both in seconds, and neither counts what other programs take of a busy machine.
STILL = 120  # without work: whoever waits as long waits for ever
LIMIT = 300  # of work: nothing here needs as much unless it turns in a circle


@dataclass
class Ended:
    code: int  # minus the signal's number where one ended it
    text: str
    seconds: float
    result: Any

    @property
    def last_line(self) -> str:
        lines = [line for line in self.text.splitlines() if line.strip()]
        return lines[-1] if lines else ""


class Ranks:
    """One process, or several that find each other, each running the same function."""

    def __init__(self, folder: Path, function: Callable[[], Any], count: int = 1) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.started = time.monotonic()
        self.outputs = [folder / f"output-{rank}" for rank in range(count)]
        port = free_port()
        self.ids = [_fork(function, output, _place(rank, count, port)) for rank, output in enumerate(self.outputs)]

    def wait(self, limit: float = LIMIT, still: float = STILL, only: Sequence[int] | None = None) -> list[Ended]:
        """How each ended, or each of `only`; whoever is left after a limit is killed, and the call fails."""
        waited_for = list(range(len(self.ids)) if only is None else only)
        codes: dict[int, tuple[int, float]] = {}
        worked, moved, looked = 0.0, time.monotonic(), 0.0
        while len(codes) < len(waited_for):
            now = time.monotonic()
            for rank in waited_for:
                if rank not in codes and (done := os.waitpid(self.ids[rank], os.WNOHANG))[0]:
                    codes[rank] = os.waitstatus_to_exitcode(done[1]), now - self.started
            if now - looked > 1:
                left = [rank for rank in waited_for if rank not in codes]
                looked, seconds = now, sum(_seconds_of_work(self.ids[rank]) for rank in left)
                if abs(seconds - worked) > still / 100:  # also where one has ended
                    worked, moved = seconds, now
                if left and (seconds > limit or now - moved > still):
                    self._give_up(left, seconds, now - moved)
            time.sleep(0.01)
        return [self._ended(rank, *codes[rank]) for rank in waited_for]

    def _give_up(self, left: Sequence[int], seconds: float, still: float) -> None:
        self.kill(left)
        said = "\n".join(self.outputs[rank].read_text()[-1500:] for rank in left)
        raise AssertionError(f"ranks {left} still there after {seconds:.0f} s of work, {still:.0f} s without\n{said}")

    def kill(self, ranks: Sequence[int]) -> None:
        for rank in ranks:
            os.kill(self.ids[rank], signal.SIGKILL)
            os.waitpid(self.ids[rank], 0)

    def _ended(self, rank: int, code: int, seconds: float) -> Ended:
        result = self.outputs[rank].with_suffix(".json")
        return Ended(
            code,
            self.outputs[rank].read_text(errors="replace"),
            seconds,
            json.loads(result.read_text()) if result.exists() else None,
        )


def run(
    folder: Path, function: Callable[[], Any], count: int = 1, limit: float = LIMIT, still: float = STILL
) -> list[Ended]:
    return Ranks(folder, function, count).wait(limit, still)


def succeeded(ended: Sequence[Ended]) -> Any:
    """The first one's result; fails if any of them did."""
    for one in ended:
        assert one.code == 0, f"ended with {one.code}:\n{one.text[-3000:]}"
    return ended[0].result


def refused(one: Ended, *words: str) -> str:
    """The last line of what failed for a reason that it names."""
    assert one.code == 1, f"ended with {one.code}:\n{one.text[-3000:]}"
    for word in words:
        assert word in one.last_line, f"{word!r} is not in {one.last_line!r}"
    return one.last_line


def _fork(function: Callable[[], Any], output: Path, environment: dict[str, str]) -> int:
    result = output.with_suffix(".json")
    result.unlink(missing_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    if process := os.fork():
        return process
    code = 1
    try:
        handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.environ.update(environment)
        returned = function()
        result.write_text(json.dumps(returned))
        code = 0
    except SystemExit as request:
        code = int(request.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _seconds_of_work(process: int) -> float:
    """Of a processor: its own, and what it has started."""
    try:
        one = psutil.Process(process)
        everyone = [one, *one.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0.0
    total = 0.0
    for each in everyone:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = each.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def _place(rank: int, count: int, port: int) -> dict[str, str]:
    if count == 1:
        return {}
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in place.items()}
