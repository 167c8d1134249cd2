// Launches that keep the rules of csrc/cuda/dependent_launch.cuh and launches that break them, each by its name. The
// kernels are what a reader of those rules would write first; each block has two warps.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>

#include "cuda/dependent_launch.cuh"

constexpr unsigned kBlocks = 4, kThreads = 64, kAll = kBlocks * kThreads;
int first[kAll], second[kAll], third_sums[kAll];  // what no other file could see, the compiler would leave out

namespace {

int at() { return static_cast<int>(blockIdx.x * kThreads + threadIdx.x); }
int other() { return static_cast<int>(kAll) - 1 - at(); }

using Kernel = void (*)(int);

void launch(Kernel kernel, bool attribute, int allowed = 1) {
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = allowed;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(kBlocks);
  config.blockDim = dim3(kThreads);
  config.attrs = &overlap;
  config.numAttrs = attribute ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, 0);
}

void primary(int) {
  ppo::allow_dependent_launch();
  first[at()] = at();
}
void primary_of_some(int) {
  if (threadIdx.x != 0) ppo::allow_dependent_launch();
  first[at()] = at();
}
void quiet(int) { first[at()] = at(); }

void last(int) {
  ppo::wait_for_primary();
  second[at()] = first[other()];
}
void last_waits_twice(int) {
  if (threadIdx.x % 2 == 0) ppo::wait_for_primary();
  ppo::wait_for_primary();
  second[at()] = first[other()];
}
void last_reads_first(int) {
  const int x = first[other()];
  ppo::wait_for_primary();
  second[at()] = x;
}
void last_writes_first(int) {
  first[other()] = 0;
  ppo::wait_for_primary();
}
void last_of_some(int) {
  if (threadIdx.x == 0) return;
  ppo::wait_for_primary();
}

void middle(int) {
  ppo::allow_dependent_launch();
  ppo::wait_for_primary();
  second[at()] = first[other()];
}
void middle_allows_late(int) {
  ppo::wait_for_primary();
  ppo::allow_dependent_launch();
  second[at()] = first[other()];
}
void third(int) {
  ppo::wait_for_primary();
  third_sums[at()] = first[other()] + second[other()];
}
void third_reads_of_the_first(int) {
  const int x = first[other()];
  ppo::wait_for_primary();
  third_sums[at()] = x + second[other()];
}
void third_reads_of_the_second(int) {
  const int x = second[other()];
  ppo::wait_for_primary();
  third_sums[at()] = x;
}
void third_overwrites_what_the_second_reads(int) {
  first[other()] = 0;
  ppo::wait_for_primary();
}

void pair(Kernel a, Kernel b) { launch(a, false), launch(b, true); }
void chain(Kernel a, Kernel b, Kernel c) { pair(a, b), launch(c, true); }

}  // namespace

int main(int, char** arguments) {
  const auto is = [&](const char* name) { return std::strcmp(arguments[1], name) == 0; };
  for (int round = 0; round < 3; ++round) {  // what is kept of a launch has two places, in turns
    if (is("pair")) pair(primary, last);
    if (is("pair_waits_twice")) pair(primary, last_waits_twice);
    if (is("chain")) chain(primary, middle, third);
    if (is("chain_allows_late")) chain(primary, middle_allows_late, third);
    if (is("chain_of_four")) chain(primary, middle, middle), launch(last, true);
    if (is("plain_after_pair")) pair(primary, last), launch(quiet, false);
    if (is("pair_reads_early")) pair(primary, last_reads_first);
    if (is("pair_writes_early")) pair(primary, last_writes_first);
    if (is("chain_reads_the_first_early")) chain(primary, middle, third_reads_of_the_first);
    if (is("chain_reads_the_second_early")) chain(primary, middle, third_reads_of_the_second);
    if (is("chain_writes_early")) chain(primary, middle, third_overwrites_what_the_second_reads);
    if (is("waits_of_some")) pair(primary, last_of_some);
    if (is("allows_of_some")) pair(primary_of_some, last);
    if (is("behind_none")) pair(quiet, last);
    if (is("followed_by_none")) launch(primary, false), launch(quiet, false);
    if (is("attribute_is_off")) launch(primary, false), launch(last, true, 0);
  }
  std::puts("done");
  return 0;
}
