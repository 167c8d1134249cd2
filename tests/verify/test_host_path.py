"""The host path of the CUDA ops is measured for every op with a small call, and nothing is computed for it."""

import torch

import ppo_kernels
from bench.cases import benchmarks
from tests.lib.host_cuda import launches
from tests.verify import host_path


def test_every_small_call_is_measured_and_a_target_can_be_missed(monkeypatch):
    monkeypatch.setattr(host_path, "SECONDS", 0.0)
    monkeypatch.setattr(host_path, "TARGETS", {"gae": 1e-3})
    found = host_path.table()
    ops = {case.op for case in host_path.cases()}
    assert ops == {case.op for case in benchmarks() if case.small_call}
    for line in found.lines[:-1]:
        times = [float(cell) for cell in line[1:4] if cell]
        assert len(times) >= 2, line
        assert min(times) > 0, line
        assert int(line[4]) >= 1, line
    verdicts = [line[-1] for line in found.lines]
    assert verdicts.count("over it already") == 1
    monkeypatch.setattr(host_path, "table", lambda: found)
    assert host_path.main() == 1
    found.lines = [line for line in found.lines if line[-1] == ""]
    assert host_path.main() == 0


def test_a_call_whose_kernels_are_skipped_computes_nothing():
    """Also after a record within it."""
    launches.library()
    x = torch.randn(4, 64)
    with launches.skipped():
        assert launches.recorded(lambda: ppo_kernels.whiten(x, impl="cuda"))
        left = ppo_kernels.whiten(x, impl="cuda")
    assert not torch.equal(left, ppo_kernels.whiten(x, impl="cuda"))
