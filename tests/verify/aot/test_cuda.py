"""Every CUDA kernel compiles for every architecture, without spills, and needs no more than the record in git says."""

from __future__ import annotations

import copy
import json
import re

import pytest

from tests.verify.aot import resources

needs_nvcc = pytest.mark.skipif(resources.nvcc() is None, reason="NO nvcc here: the CUDA kernels are NOT compiled")
needs_sources = pytest.mark.skipif(not (resources.ROOT / "csrc").is_dir(), reason="the sources are not here")
pytestmark = [pytest.mark.slow, needs_sources]
FORWARD = "token_logprobs_kernel<BFloat16, true>"
CROWDED = """
__global__ void __launch_bounds__(1024, 2) crowded(const float* x, float* y, int n) {
  float v[96];
#pragma unroll
  for (int i = 0; i < 96; ++i) v[i] = x[threadIdx.x * 96 + i];
  for (int j = 0; j < n; ++j) {
#pragma unroll
    for (int i = 0; i < 96; ++i) v[i] = v[(i + 7) % 96] * v[i] + x[j];
  }
#pragma unroll
  for (int i = 0; i < 96; ++i) y[threadIdx.x * 96 + i] = v[i];
}
"""


@pytest.fixture(scope="module")
def recorded():
    return json.loads(resources.RECORD.read_text())["cuda"]


@needs_nvcc
def test_no_kernel_spills_or_needs_more_than_recorded(recorded):
    found = resources.compile_all_cuda()
    assert {arch for _, arch, _ in resources.entries(found)} >= {"sm_80", "sm_90", "sm_100"}
    assert not resources.faults(found)
    if found["nvcc"] != recorded["nvcc"]:
        pytest.skip(f"the record is of nvcc {recorded['nvcc']}, here is {found['nvcc']}")
    assert not resources.regressions(found, recorded), "if it must be: python -m tests.verify.aot.resources --write"


@needs_nvcc
def test_a_spill_is_reported(tmp_path):
    (tmp_path / "crowded.cu").write_text(CROWDED)
    found = {"kernels": resources.compile_cuda(tmp_path / "crowded.cu", architectures=(90,))}
    assert any("crowded sm_90: spill_bytes" in fault for fault in resources.faults(found))


def test_the_record_names_every_kernel_and_holds_the_budgets(recorded):
    sources = "".join(path.read_text() for path in (resources.ROOT / "csrc" / "cuda").glob("*.cu*"))
    declared = set(re.findall(r"__global__[^{]*?(\w+_kernel)\(", sources))
    assert {kernel.partition("<")[0] for kernel in recorded["kernels"]} == declared
    assert not resources.faults(recorded)
    for kernel, _, entry in resources.entries(recorded):
        if kernel.startswith("token_logprobs"):
            assert entry["vector_loads"] >= 4, kernel


@pytest.mark.parametrize(
    ("key", "worse"), [("registers", 1), ("instructions", 1), ("instructions_per_element", 0.1), ("vector_loads", -1)]
)
def test_each_regression_is_reported(recorded, key, worse):
    found = copy.deepcopy(recorded)
    found["kernels"][FORWARD]["sm_90"][key] += worse
    (fault,) = resources.regressions(found, recorded)
    assert key in fault
    found["kernels"][FORWARD]["sm_90"][key] -= 2 * worse
    assert not resources.regressions(found, recorded)


def test_more_instructions_than_the_budget_are_reported(recorded):
    found = copy.deepcopy(recorded)
    found["kernels"][FORWARD]["sm_90"]["instructions_per_element"] = 8.5
    assert len(resources.faults(found)) == 1
