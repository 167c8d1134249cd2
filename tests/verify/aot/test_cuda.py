"""Every CUDA kernel compiles for every architecture, without spills, and needs no more than the record in git says."""

from __future__ import annotations

import copy
import json
import re

import pytest

from tests.verify.aot import launches, paths, resources, table

needs_nvcc = pytest.mark.skipif(resources.nvcc() is None, reason="NO nvcc here: the CUDA kernels are NOT compiled")
needs_sources = pytest.mark.skipif(not (resources.ROOT / "csrc").is_dir(), reason="the sources are not here")
pytestmark = [pytest.mark.slow, needs_sources]
FORWARD = "token_logprobs_kernel<BFloat16, true>"
CROWDED = """
__global__ void __launch_bounds__(1024, 2) crowded_fold_kernel(const float* x, float* y, int n) {
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
WAITS = """
template <bool kWaits>
__global__ void __launch_bounds__(256) whiten_kernel(const uint2* mask, const float4* x, float4* y, int n) {
  const int at = blockIdx.x * 256 + threadIdx.x;
  if (!kWaits && at >= n) return;
  uint2 bytes = mask[at];
  if (kWaits && !__syncthreads_or(bytes.x & 0xff)) return;
  const float4 v = x[at], w = x[at + n];
  const float a = (bytes.x & 0xff) != 0 ? v.x + w.x : 0, b = (bytes.y >> 24) != 0 ? v.y * w.y : 0;
  y[at] = make_float4(a, b, v.z, w.w);
}
template __global__ void whiten_kernel<true>(const uint2*, const float4*, float4*, int);
template __global__ void whiten_kernel<false>(const uint2*, const float4*, float4*, int);
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
    assert any("crowded_fold_kernel sm_90: spill_bytes" in fault for fault in resources.faults(found))


def test_the_record_names_every_kernel_and_holds_the_budgets(recorded):
    sources = "".join(path.read_text() for path in (resources.ROOT / "csrc" / "cuda").glob("*.cu*"))
    declared = set(re.findall(r"__global__[^{]*?(\w+_kernel)\(", sources))
    assert {kernel.partition("<")[0] for kernel in recorded["kernels"]} == declared
    assert not resources.faults(recorded)
    for kernel, _, entry in resources.entries(recorded):
        if kernel.startswith("token_logprobs"):
            assert entry["vector_loads"] >= 4, kernel


def test_a_kernel_that_may_begin_early_waits_and_the_one_before_it_allows_that(recorded):
    sources = "".join(path.read_text() for path in (resources.ROOT / "csrc" / "cuda").glob("*.cu*"))
    dependent = set(re.findall(r"(?:launch\.dependent|work\.launch)\((\w+)", sources))
    assert dependent
    never = {"gae_teams_kernel<8>", "gae_segments_kernel<0>", "kl_teams_kernel<8>"}  # of padded batches alone
    for kernel, arch, entry in resources.entries(recorded):
        name, before_sm_90 = kernel.partition("<")[0], arch == "sm_80"
        waits = "waits" in entry.get("dependent_launch", "")
        assert waits == (name in dependent and kernel not in never and not before_sm_90), kernel
        if not waits:
            continue
        reads_inputs = kernel in ("whiten_kernel", "gae_segments_kernel<2>")  # beside the end of the primary
        assert (entry["loads_before_wait"] > 0) == reads_inputs, (kernel, arch)
        # Bounds of a packed batch are the first thing that is read, and a launch before has written them.
        assert (entry["loads_before_first_wait"] > 0) == (kernel == "whiten_kernel"), (kernel, arch)
    allowing = {
        kernel.partition("<")[0]
        for kernel, arch, entry in resources.entries(recorded)
        if "allows" in entry.get("dependent_launch", "")
    }
    assert allowing == set(re.findall(r"(\w+_kernel)\([^{]*\{[^}]*?(?:allow_dependent_launch|load_block<)", sources))


@pytest.mark.parametrize(
    ("key", "worse"),
    [
        ("registers", 1),
        ("instructions", 1),
        ("instructions_per_element", 0.1),
        ("odd_instructions_per_element", 0.1),
        ("barriers", 1),
        ("membars", 1),
        ("barriers_before_data", 1),
        ("vector_loads", -1),
        ("blocks_per_sm", -1),
    ],
)
def test_each_regression_is_reported(recorded, key, worse):
    found = copy.deepcopy(recorded)
    entry = found["kernels"][FORWARD]["sm_90"]
    entry[key] += worse
    (fault,) = resources.regressions(found, recorded)
    assert key in fault
    entry[key] -= 2 * worse
    assert not resources.regressions(found, recorded)


def test_a_wait_before_the_loads_is_reported_and_a_use_that_comes_sooner_is_not(recorded):
    found = copy.deepcopy(recorded)
    entry = found["kernels"][FORWARD]["sm_90"]
    assert entry["first_use"] > 1
    entry["first_use"] = 1
    assert not resources.regressions(found, recorded)
    entry["first_use"] = -1
    (fault,) = resources.regressions(found, recorded)
    assert "first_use" in fault


def test_launches_are_recorded_and_another_one_is_reported():
    found, recorded = launches.all_of(), json.loads(resources.RECORD.read_text())["launches"]
    assert not resources.more_launches(found, recorded), "if it must be: python -m tests.verify.aot.resources --write"
    call = next(iter(found))
    assert len(resources.more_launches(found | {call: [*found[call], "memset"]}, recorded)) == 1
    assert len(resources.more_launches({call: found[call]}, recorded)) == len(recorded) - 1


def test_the_table_is_that_of_the_record():
    assert resources.TABLE.read_text() == table.markdown(json.loads(resources.RECORD.read_text()))


@needs_nvcc
def test_a_mask_that_is_waited_for_before_the_data_is_asked_for_is_told_from_one_that_is_not(tmp_path):
    """The two kernels differ in the order of the loads alone."""
    (tmp_path / "waits.cu").write_text(WAITS)
    kernels = resources.compile_cuda(tmp_path / "waits.cu", architectures=(80, 90, 100))
    for arch in ("sm_80", "sm_90", "sm_100"):
        waits, asks = (kernels[f"whiten_kernel<{first}>"][arch] for first in ("true", "false"))
        assert waits["first_use"] < 0 <= asks["first_use"], arch
        assert (waits["barriers_before_data"], asks["barriers_before_data"]) == (1, 0)
        assert waits["barriers"] == 1


def test_blocks_that_fit_by_registers_shared_memory_threads_and_number():
    assert paths.blocks_per_sm(90, 64, 9216, 256) == 4
    assert paths.blocks_per_sm(90, 82, 13468, 256) == 2
    assert paths.blocks_per_sm(90, 32, 0, 256) == 8
    assert paths.blocks_per_sm(90, 32, 100 * 1024, 256) == 2
    assert paths.blocks_per_sm(120, 32, 0, 256) == 6
    assert paths.blocks_per_sm(90, 16, 0, 32) == 32


def test_more_instructions_than_the_budget_are_reported(recorded):
    found = copy.deepcopy(recorded)
    found["kernels"][FORWARD]["sm_90"]["instructions_per_element"] = 8.5
    assert len(resources.faults(found)) == 1
