"""The hash of the C++ sources, for the build (csrc/build_info.py) and for the check of the binaries at import."""

from __future__ import annotations

import hashlib
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
_SUFFIXES = (".cpp", ".cu", ".cuh", ".h", ".py")


def source_hash(root: Path = _ROOT) -> str | None:
    """The hash that a binary built from this checkout carries; None without sources (a wheel)."""
    if not (root / "csrc").is_dir() or not (root / "CMakeLists.txt").is_file():
        return None
    found = (path for path in (root / "csrc").rglob("*") if path.suffix in _SUFFIXES)
    files = [path for path in found if not path.name.startswith(".")]  # an editor's own
    names = sorted(path.relative_to(root).as_posix() for path in (*files, root / "CMakeLists.txt"))
    listing = "".join(f"{name} {hashlib.sha256((root / name).read_bytes()).hexdigest()}\n" for name in names)
    return hashlib.sha256(listing.encode()).hexdigest()
