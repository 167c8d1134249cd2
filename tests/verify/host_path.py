"""What a call of a CUDA op costs on the host, without its launch: ``python -m tests.verify.host_path``.

The launchers are compiled for the host and launch nothing, so that what is left is Python, the dispatcher, the checks,
the allocations and the launcher. That is NOT the time of a call on a GPU: the driver's launches and memsets are missing
(2 to 4 µs each), the outputs come from the allocator of CPUs in place of torch's for CUDA, the stream and the device
are not asked for, and this CPU is another than a GPU's host. So a target that is exceeded here is missed for certain,
and one that is not is not yet met.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial

import torch

from bench import measure
from bench.cases import Case, benchmarks
from bench.results import Table
from bench.rows import Setup
from ppo_kernels import backends
from tests.lib import devices, recorded
from tests.lib.host_cuda import launches

SECONDS = 3.0
#: Of a whole call on a GPU, in µs (design of the library): the only one that has a figure of its own.
TARGETS = {"gae": 15.0}


def calls(case: Case) -> dict[str, Callable[[], object]]:
    """The registered op alone, the public function, and with the gradient where there is one."""
    setup = Setup(case, case.small_call)
    inputs = setup.inputs
    ((op, arguments), *_) = recorded.calls(case, inputs, "cuda")
    public = partial(case.call("cuda"), **inputs)
    found = {"registered op": partial(devices.registered(op, "cuda"), *arguments), "public function": public}
    if case.leaf:
        found["forward and backward"] = lambda: setup.finish(public())
    return found


def least(found: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds of each, by turns, the least of all samples: what else runs here only adds."""
    timed = {name: measure.Timed([call], threads=1) for name, call in found.items()}
    measure.in_turns(timed, SECONDS)
    return {name: min(one.samples) for name, one in timed.items()}


def cases() -> list[Case]:
    return [case for case in benchmarks() if case.small_call]


def table() -> Table:
    launches.library()
    for name in {case.op for case in cases()}:  # the kernels themselves, without what the tests put around them
        backends.op(name).serve("cuda", devices.registered(name, "cuda"))
    note = (
        "µs on the host, the least of many, one thread, nothing launched; launches are the kernels and memsets that a "
        "GPU would get besides, of the backward too."
    )
    header = ["call", "registered op", "public function", "forward and backward", "launches", "target", "verdict"]
    found = Table("Host path of the CUDA ops", note, header)
    ones = torch.ones(8)
    with launches.skipped():
        scale = least({"torch.add": lambda: torch.add(ones, ones)})["torch.add"]
        for case in cases():
            every = calls(case)
            times = least(every)
            with_backward = "forward and backward" if case.leaf else "public function"
            launched = launches.recorded(every[with_backward])
            cells = ["" if name not in times else f"{1e6 * times[name]:.1f}" for name in header[1:4]]
            target = TARGETS.get(case.work)
            late = target is not None and 1e6 * times["public function"] > target
            verdict = "" if target is None else "over it already" if late else "not excluded"
            shown = "" if target is None else f"≤ {target:g}"
            found.lines.append([case.group(case.small_call), *cells, str(len(launched)), shown, verdict])
    found.lines.append(["torch.add of 8 numbers on this CPU", "", f"{1e6 * scale:.1f}", "", "", "", ""])
    return found


def main() -> int:
    found = table()
    print(found.title, found.note, found.markdown(), sep="\n\n")
    return 1 if any(line[-1] == "over it already" for line in found.lines) else 0


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m tests.verify.host_path", description=__doc__).parse_args()
    sys.exit(main())
