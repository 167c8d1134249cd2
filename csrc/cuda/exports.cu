// What ppo_kernels/_native.py reads of this library by name, for it is no Python module.
#include <string>

#include "counters.h"

// "gae 3\nwhiten 1\n": calls of each registered CUDA op. Valid until the calling thread asks again.
extern "C" __attribute__((visibility("default"))) const char* ppo_kernels_call_counts() {
  static thread_local std::string text;
  text.clear();
  for (const auto& [op, calls] : ppo::call_counts()) text += op + " " + std::to_string(calls) + "\n";
  return text.c_str();
}
