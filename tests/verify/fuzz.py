"""The fuzz of the registered ops for longer than `make test` has it: ``fuzz.py [COUNT [FIRST_SEED]]``.

COUNT calls of each implementation (of Triton's, in its interpreter, a twentieth), 20000 unless given. A finding names
its seed: ``fuzz.py 1 SEED`` makes that call again.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.lib import devices, fuzz

BATCH = 2000  # calls of one process


def main(count: int, first: int) -> int:
    good = True
    for impl in devices.ON_CPU:
        begin, mine = time.monotonic(), max(1, count // 20) if impl == "triton" else count
        findings = []
        for start in range(first, first + mine, BATCH):
            found = fuzz.problem(impl, range(start, min(start + BATCH, first + mine)))
            if found:
                findings.append(found)
                print(found, flush=True)
        print(f"{impl}: {mine} calls, {len(findings)} findings, {time.monotonic() - begin:.0f} s", flush=True)
        good &= not findings
    return 0 if good else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.verify.fuzz", description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=20_000)
    parser.add_argument("first_seed", type=int, nargs="?", default=1_000_000)
    given = parser.parse_args()
    sys.exit(main(given.count, given.first_seed))
