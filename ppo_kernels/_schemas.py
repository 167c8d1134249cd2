"""The schema of every registered op, read from the text that C++ compiles: it is written once, in ``csrc/ops.cpp``."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def parse(source: str) -> dict[str, str]:
    """Schemas by the name of the op, in the order of the text.

    They stand in the only raw string literal of the source, and are read by the loop that reads them there in C++.
    """
    schemas: list[str] = []
    for line in source.partition('R"(')[2].partition(')"')[0].split("\n"):
        if not line or line.startswith("//"):
            continue
        if not line.startswith(" ") or not schemas:
            schemas.append("")
        schemas[-1] += line
    return {schema.partition("(")[0]: " ".join(schema.split()) for schema in schemas}


def _read() -> dict[str, str]:
    # setup.py puts the first into a wheel, the second is in a checkout.
    for path in (PACKAGE / "ops.cpp", PACKAGE.parent / "csrc" / "ops.cpp"):
        if path.is_file():
            return parse(path.read_text(encoding="utf-8"))
    raise ImportError(f"{PACKAGE} has no ops.cpp, which holds the schemas of the ops: install ppo_kernels again")


SCHEMAS = _read()
