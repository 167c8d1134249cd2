"""What ``nvidia-smi`` noted beside a run: the clock of the SMs and why it was held down.

nvidia-smi --query-gpu=timestamp,clocks.sm,clocks_event_reasons.active --format=csv,noheader,nounits -lms 500
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import NamedTuple

#: Bits of the reasons that say that the GPU was slower than its work asked for (nvml.h, nvmlClocksEventReasons).
HELD = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}


class Sample(NamedTuple):
    when: float  # seconds since 1970
    mhz: int
    reasons: int


def read(file: Path) -> list[Sample]:
    """The samples of a log. A line that is cut off or not a number ("[N/A]") is passed over."""
    found = []
    for line in file.read_text().splitlines():
        try:
            when, mhz, reasons = (part.strip() for part in line.split(","))
            moment = datetime.strptime(when, "%Y/%m/%d %H:%M:%S.%f")
            found.append(Sample(moment.timestamp(), int(mhz), int(reasons, 16)))
        except ValueError:
            continue
    return found


def held(reasons: int) -> list[str]:
    return [name for bit, name in HELD.items() if reasons & bit]


def between(samples: list[Sample], begin: float, end: float) -> list[Sample]:
    return [sample for sample in samples if begin - 0.5 <= sample.when <= end + 0.5]


def summary(samples: list[Sample]) -> str:
    """One line of the report."""
    if not samples:
        return "SM clock: not logged"
    clocks = sorted(sample.mhz for sample in samples)
    slowed = [sample for sample in samples if held(sample.reasons)]
    reasons = ", ".join(sorted({name for sample in slowed for name in held(sample.reasons)}))
    text = f"SM clock: {clocks[0]} to {clocks[-1]} MHz, median {clocks[len(clocks) // 2]}, {len(clocks)} samples"
    return f"{text}; held down in {len(slowed)} of them: {reasons}" if slowed else f"{text}; never held down"
