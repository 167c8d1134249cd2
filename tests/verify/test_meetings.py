"""Blocks that hand one another their parts: what test_gpu.py calls on a GPU is checked here, and on the host, the same.

The launchers run as they are, and say how many blocks they launch; kernels run at the small sizes alone. Under
ThreadSanitizer (tests/verify/sanitize/run.py) those show whether each handing over is ordered.
"""

import math

import pytest
import torch

from ppo_kernels import backends
from tests.lib import cases
from tests.lib.cases import run
from tests.lib.host_cuda import launches

MEETINGS = {where: cases.meetings(where) for where in ("gpu", "host")}
EVERY = [(where, meeting) for where, found in MEETINGS.items() for meeting in found]
#: A warp computes a group alone, whatever the size.
NO_MEETING = {"group_advantages"}


def test_every_op_whose_blocks_meet_is_called():
    for where, found in MEETINGS.items():
        ops = {meeting.case.op for meeting in found}
        assert ops == {name for name in backends.OPS if not name.endswith("backward_")} - NO_MEETING, where
    gpu = {(m.case.op, m.case.packed): set() for m in MEETINGS["gpu"]}
    for m in MEETINGS["gpu"]:
        gpu[m.case.op, m.case.packed].add((m.shape, *m.options.values()))
    modes = {((64, 32768), mode) for mode in ("skip", "zero", "keep")}
    assert gpu["gae", False] == gpu["gae", True] == modes
    assert {shape[1] for shape, *_ in gpu["token_logprobs", False]} == set(range(1, 9))
    for op in {m.case.op for m in MEETINGS["gpu"] if not m.case.rowwise or (m.case.leaf and not m.case.vocabulary)}:
        assert (512, 2048) in {shape for shape, *_ in gpu[op, False]}, op


@pytest.mark.parametrize(("where", "meeting"), EVERY, ids=[f"{where}-{meeting}" for where, meeting in EVERY])
def test_several_blocks_are_launched_for_what_one_result_is_made_of(where, meeting):
    """By the launcher's own formula. A row of logits or of a recursion is one result, and so is a loss or statistic."""
    call = meeting.make()
    launched = launches.recorded(lambda: run(call, "cuda"))
    alone = meeting.case.rowwise and all(x.dim() for x in run(call, "torch"))
    results = math.prod(meeting.shape[: -1 if meeting.case.vocabulary else 1]) if alone else 1
    assert max(launch.blocks for launch in launched) >= 2 * results, launched
    assert sum(x.nbytes for x in call.tensors.values()) < 2**29  # several workers share a GPU


@pytest.mark.several_blocks
@pytest.mark.parametrize("meeting", MEETINGS["host"], ids=str)
@pytest.mark.parametrize("impl", ["cuda"])
def test_blocks_that_meet_give_the_values_of_the_reference(meeting, impl):
    launches.library()
    call = meeting.make()
    for got, want in zip(run(call, impl), run(call, "torch"), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-2 if meeting.dtype == torch.bfloat16 else 1e-4, atol=2e-5)
