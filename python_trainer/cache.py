"""Where what is fetched or compiled once stays. Compiled code that lies there is run, so it is nobody's but ours."""

import os
from pathlib import Path

from .config import UserError

VARIABLE = "PPO_KERNELS_CACHE"


def cache_folder() -> Path:
    """That of the variable, or else one in the home folder."""
    if named := os.environ.get(VARIABLE):
        return Path(named).absolute()
    try:
        return Path.home().absolute() / ".cache" / "ppo_kernels"
    except RuntimeError as error:
        raise UserError(f"there is no home folder for a cache: set {VARIABLE} to a folder of your own") from error


def make_cache_folder(inner: str = "") -> Path:
    """The same, or a folder inside it: made, and closed to others at every level."""
    folder = cache_folder()
    _make_private(folder)
    for part in Path(inner).parts:
        folder = folder / part
        _make_private(folder)
        folder.chmod(0o700)  # what is compiled into it has the modes of the umask
    return folder


def _make_private(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = folder.stat()
        if facts.st_uid == os.geteuid() and facts.st_mode & 0o022 and VARIABLE not in os.environ:
            folder.chmod(0o700)  # earlier versions left it as the umask had it
            facts = folder.stat()
    except OSError as error:
        raise UserError(
            f"the cache {folder} cannot be made ({error.strerror}): set {VARIABLE} to another folder"
        ) from error
    if facts.st_uid != os.geteuid() or facts.st_mode & 0o022:
        raise UserError(
            f"others may write to the cache {folder}, and compiled code in it is run: set {VARIABLE} to a folder "
            "that is yours alone (chmod go-w)"
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"the cache {folder} cannot be written: set {VARIABLE} to another folder")
