"""Every op beside the reference, eager code, torch.compile and other libraries: one table. ``python -m bench --help``.

The providers of a row take turns on the same tensors, and medians are compared. All of them are checked against the
reference in float64 before any is timed; a row that is off is not timed and named as WRONG. ``pytest bench
--benchmark-only`` has the same rows with pytest-benchmark's options.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

if "--accuracy" in sys.argv and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the package is imported

from bench import clocks, measure, report, trainers
from bench.accuracy import main as accuracy
from bench.results import Results
from bench.rows import PHASES, SIZES, Row, all_of, phase
from ppo_kernels import _native


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__, allow_abbrev=False)
    size = parser.add_mutually_exclusive_group()
    for name, text in SIZES.items():
        size.add_argument(f"--{name}", dest="size", action="store_const", const=name, default="small", help=text)
    size.add_argument("--accuracy", action="store_true", help="errors against float64 beside those of eager code")
    size.add_argument("--trainers", action="store_true", help="a step of our trainer beside TRL's")
    size.add_argument("--results", type=Path, metavar="FILE", help="measure nothing; take the results of this file")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose name contains this")
    parser.add_argument("--providers", nargs="+", choices=PHASES, default=PHASES, help="whose rows (default: all)")
    parser.add_argument("--resume", action="store_true", help="keep what the file of --json has of this commit")
    parser.add_argument("--clocks", type=Path, metavar="FILE", help="a log of nvidia-smi (bench/clocks.py)")
    parser.add_argument("--seconds", type=float, help="of timing per group (default: by size)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="write results.json, report.md and figures")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a target is missed or not measured")
    return parser.parse_args()


def kept(file: Path | None, size: str) -> dict:
    """The results of an earlier run of this commit and size, without rows that were wrong; else none."""
    if file is None or not file.is_file():
        return header()
    data = json.loads(file.read_text())
    data["untimed"] = [row for row in data.get("untimed", []) if row["state"] == "absent"]
    same = {row["extra_info"]["commit"] for row in data["benchmarks"]} <= {measure.commit()}
    return data if same and data.get("run", {}).get("size") == size else header()


def run(rows: list[Row], data: dict, size: str, seconds: float | None, file: Path | None) -> dict:
    """``data``, and the rows that it lacks, in the form of pytest-benchmark's JSON. The file has them as they come."""
    done = {row["fullname"] for row in data["benchmarks"]}
    done |= {f"{row['group']} {row['provider']}" for row in data.get("untimed", [])}
    rows = [row for row in rows if not {row.fullname, f"{row.group} {row.provider}"} & done]
    session = measure.Session(rows, size, seconds)
    session.untimed += data.get("untimed", [])
    session.rates |= data.get("run", {}).get("GB/s", {})
    if rows:
        session.measure_bandwidth()
    for group in session.groups.values():
        for row in group:
            outcome = session.outcome(row)
            if outcome.samples:
                benchmark = {"group": row.group, "name": row.name, "fullname": row.fullname}
                benchmark |= {"extra_info": outcome.facts, "stats": statistics_of(outcome.samples)}
                data["benchmarks"].append(benchmark)
        write(data | session.facts(), file)
        print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    if rows:
        session.measure_bandwidth()
    return data | session.facts()


def write(data: dict, file: Path | None) -> None:
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(data, indent=1) + "\n")


def header() -> dict:
    machine = {"python_version": platform.python_version(), "machine": platform.machine()} | measure.machine()
    return {"machine_info": machine, "datetime": datetime.now(UTC).isoformat(), "version": "1", "benchmarks": []}


def statistics_of(samples: list[float]) -> dict[str, float]:
    quartiles = statistics.quantiles(samples, n=4) if len(samples) > 1 else samples * 3
    return {
        "min": min(samples),
        "max": max(samples),
        "mean": statistics.fmean(samples),
        "stddev": statistics.stdev(samples) if len(samples) > 1 else 0.0,
        "rounds": len(samples),
        "median": statistics.median(samples),
        "iqr": quartiles[2] - quartiles[0],
    }


def main() -> int:
    chosen = options()
    if chosen.accuracy:
        return accuracy()
    if chosen.trainers:
        return trainers.main(chosen.only)
    start = time.perf_counter()
    if chosen.results:
        data = json.loads(chosen.results.read_text())
    elif chosen.size == "gpu" and measure.DEVICE != "cuda":
        print("no GPU is visible to torch; --tiny runs every row without one", file=sys.stderr)
        return 2
    elif measure.DEVICE == "cpu" and _native.CPU_ERROR is not None:
        print(f"the C++ ops are not there: {_native.CPU_ERROR}", file=sys.stderr)
        return 2
    else:
        rows = [row for row in all_of(chosen.size) if chosen.only in row.group]
        rows = [row for row in rows if phase(row.provider) in chosen.providers]
        data = kept(chosen.json, chosen.size) if chosen.resume else header()
        data = run(rows, data, chosen.size, chosen.seconds, chosen.json)
    if chosen.clocks:
        data["clocks"] = clocks.read(chosen.clocks) if chosen.clocks.is_file() else []
    if not chosen.results:
        write(data, chosen.json)
    results = Results(data)
    print(report.overview(results), "\n".join(report.facts(results)), sep="\n\n")
    if chosen.report:
        if chosen.clocks or not chosen.results:
            write(data, chosen.report / "results.json")
        print("Written:", *report.write(results, chosen.report), sep="\n  ")
    table, missed = report.targets(results, chosen.only)
    if chosen.check or results.run.get("size") in ("quick", "full"):
        print("", table.markdown(), f"\n{report.verdict(table)}; {time.perf_counter() - start:.0f} s", sep="\n")
    return 1 if results.wrong or (chosen.check and missed) else 0


if __name__ == "__main__":
    sys.exit(main())
