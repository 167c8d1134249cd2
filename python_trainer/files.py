"""Files of a run, in folders that others may write too: no link is followed, and what is not ours stays.

What stands where a file of the run belongs, and is none (a link, a pipe, a folder), is renamed to `<name>.kept-1` and
named in one line; its content, and what a link points to, are never touched.

The folders above are trusted: paths are looked up again at each call, so who may rename a run's folder while it works
can lead it elsewhere, and what appears under a `kept` name between the look and the rename is replaced.
"""

import contextlib
import fcntl
import functools
import os
import secrets
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO


def write(path: Path, content: str | bytes) -> None:
    """Put a file in place by a rename, so that a reader sees the old one or the new one."""
    make_way(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with os.fdopen(os.open(temporary, flags, 0o666), "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def append(path: Path) -> IO[str]:
    """Open a file to add lines to."""
    make_way(path)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, 0o666), "a")


@contextlib.contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold the lock of a file until the block is left; False where another process has it. Nothing is written to it."""
    make_way(path)
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # nor does a pipe make it wait
    handle = os.open(path, flags, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)


def make_way(path: Path) -> None:
    """Rename what is no plain file."""
    if os.path.lexists(path) and not is_plain(path):
        keep(path)


def folder_makes_way(path: Path) -> None:
    """Rename what is no folder."""
    if os.path.lexists(path) and not is_folder(path):
        keep(path)


def keep(path: Path, name: str | None = None) -> None:
    """Rename what is not ours to `<name>.kept-<number>` beside where it stood, or where `name` did, and say so."""
    base = path if name is None else path.with_name(name)
    number = 1
    while os.path.lexists(kept := base.with_name(f"{base.name}.kept-{number}")):
        number += 1
    what = kind(path)
    path.rename(kept)
    say(f"{base} was {what} that this run did not make: it is now {kept.name}")


def is_folder(path: Path) -> bool:
    """Whether it is a folder itself, and no link to one."""
    return path.is_dir() and not path.is_symlink()


def is_plain(path: Path) -> bool:
    """Whether it is a file itself: no link, pipe or folder."""
    return path.is_file() and not path.is_symlink()


def would_wait(path: Path) -> bool:
    """Whether who opens it could wait forever: a pipe or a device, also behind a link."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def kind(path: Path) -> str:
    if path.is_symlink():
        return "a link"
    mode = path.lstat().st_mode
    kinds = ((stat.S_ISREG, "a file"), (stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"))
    return next((name for test, name in kinds if test(mode)), "no plain file")


def say(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)


@functools.cache
def say_once(text: str) -> None:
    say(text)
