"""python -m tests.verify.trainer.faults [--fast] [--json file] [row ...]: every event and what came of it."""

import argparse
import importlib
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # what forks must not have threads
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest

from . import disk
from .rows import ROWS, Row

MODULES = ("saving", "loading", "resuming", "ranks")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.verify.trainer.faults", description=__doc__)
    parser.add_argument("--fast", action="store_true", help="leave out what needs two ranks or every ZeRO stage")
    parser.add_argument("--json", type=Path, help="also write the outcome of each row there")
    parser.add_argument("rows", nargs="*")
    given = parser.parse_args()
    disk.preload()
    for module in MODULES:
        importlib.import_module(f".{module}", __package__)
    if unknown := set(given.rows) - set(ROWS):
        parser.error(f"no such row: {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    chosen = [row for row in ROWS.values() if row.name in given.rows or not (given.rows or (given.fast and row.slow))]
    import deepspeed  # noqa: F401  # once, for all forks

    from python_trainer.tasks import exact

    exact.OBJECTIVE.pop("score_scaling")  # running statistics are to be saved, whatever they do to the optimum

    outcomes = {}
    print("| event | wanted | result | seconds |\n|---|---|---|---:|")
    for row in chosen:
        started = time.monotonic()
        passed, text = outcome(row)
        outcomes[row.name] = {"passed": passed, "text": text}
        shown = text if passed else "**FAILED**: " + text.splitlines()[-1]
        print(f"| {row.event} | {row.wanted} | {shown} | {time.monotonic() - started:.0f} |", flush=True)
        if not passed:
            print(text, file=sys.stderr)
    if given.json:
        given.json.write_text(json.dumps(outcomes))
    shutil.rmtree(Path(os.environ["LD_PRELOAD"]).parent)
    return 0 if all(outcome["passed"] for outcome in outcomes.values()) else 1


def outcome(row: Row) -> tuple[bool, str]:
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    try:
        return True, row.check(folder)
    except (Exception, pytest.fail.Exception):
        return False, traceback.format_exc().strip()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
