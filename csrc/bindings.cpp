// The Python module ppo_kernels._C. Importing it loads the ops; what it offers itself are plain values: no
// tensor crosses pybind11, so the binary depends on one Python version but on no particular torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "build_info.h"
#include "counters.h"
#include "cpu/avx512.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict facts;
  for (int i = 0; i < ppo::kNumBuildFacts; ++i) {
    const ppo::BuildFact& fact = ppo::kBuildFacts[i];
    facts[fact.name] = *fact.value ? py::object(py::str(fact.value)) : py::object(py::none());
  }
  return facts;
}

// The clone that the row loops resolved to when the library was loaded.
std::string cpu_capability() {
#ifdef PPO_TARGET_CLONES
  if (__builtin_cpu_supports("x86-64-v4")) return "x86-64-v4";
  if (__builtin_cpu_supports("x86-64-v3")) return "x86-64-v3";
#endif
  return "default";
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU ops of ppo_kernels (torch.ops.ppo_kernels.*) and facts about this build.";
  m.def("build_info", &build_info, "Compiler, flags, versions and source hash of this binary.");
  m.def("cpu_capability", &cpu_capability, "Instruction set level in use: x86-64-v4, x86-64-v3 or default.");
  m.def("avx512_loops", &ppo::avx512::here, "Whether token_logprobs runs its loops for AVX-512.");
  m.def("set_avx512_loops", &ppo::avx512::choose, py::arg("wanted"),
        "Chooses between those loops and the portable ones, for comparisons; without AVX-512 the portable ones stay.");
  m.def("call_counts", &ppo::call_counts, "Calls of each registered CPU op since the start.");
}
