"""A disk that loses power or fills up at a chosen moment (disk.c)."""

import ctypes
import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

from torch import distributed

SOURCE = Path(__file__).with_name("disk.c")
COUNT, KILL, FULL, SYNC_FAILS = range(4)


def preload() -> None:
    """Start this program again with disk.c in front of libc, unless it is there already."""
    if "disk-" in os.environ.get("LD_PRELOAD", ""):
        return
    library = Path(tempfile.mkdtemp(prefix="disk-")) / "disk.so"
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC").split()[0])
    subprocess.run([*compiler, "-O1", "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"], check=True)
    os.environ["LD_PRELOAD"] = str(library)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def watch(folder: Path, action: int = COUNT, at: int = 0, log: Path | None = None) -> ctypes.CDLL:
    library = ctypes.CDLL(os.environ["LD_PRELOAD"])
    handle = -1 if log is None else os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
    library.disk_watch(os.fsencode(folder), action, ctypes.c_long(at), handle)
    return library


def events(log: Path) -> list[tuple[str, str, str]]:
    return [tuple(line.split("\t")) for line in log.read_text().splitlines()]


def alone() -> None:
    """For a fork of a process whose group has one rank: its communication threads are not here, and nobody waits."""
    distributed.barrier = lambda *_, **__: None
    distributed.all_reduce = lambda *_, **__: None


def unsynced(done: list[tuple[str, str, str]]) -> Iterator[str]:
    """What a power cut could undo: content that gets its name, or an elder put aside, before fsync had its say."""
    dirty: set[str] = set()  # files whose bytes, and folders whose entries, no fsync has followed
    known: set[str] = set()
    named: set[str] = set()  # folders in which content got its name since their last fsync
    for kind, path, second in done:
        folder = os.path.dirname(path)
        if kind in ("open", "mkdir", "write"):
            dirty |= {path} if path in known else {path, folder}
            known.add(path)
        elif kind == "sync":
            dirty.discard(path)
            named.discard(path)
        elif kind == "rename" and "/.tmp-" in second:
            yield from (f"{path} put aside while names in {place} were not on disk" for place in named)
        elif kind == "rename":
            yield from (
                f"{inner} not on disk when it got its name" for inner in dirty if f"{inner}/".startswith(path + "/")
            )
            named.add(os.path.dirname(second))
