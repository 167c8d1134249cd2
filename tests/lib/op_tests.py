"""The files of tests of each op in the registry, one a line: ``python -m tests.lib.op_tests``."""

from __future__ import annotations

from pathlib import Path

from bench.cases import OPS

ROOT = Path(__file__).resolve().parents[2]


def files() -> list[str]:
    """tests/test_<op>.py, and what else begins with the name of the op."""
    found = [path for op in OPS for path in sorted((ROOT / "tests").glob(f"test_{op}*.py"))]
    return [str(path.relative_to(ROOT)) for path in found]


if __name__ == "__main__":
    print("\n".join(files()))
