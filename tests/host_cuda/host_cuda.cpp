// The runtime behind include/cuda_runtime.h: fibers, or std::threads with HOST_CUDA_THREADS.
#include <cuda_runtime.h>

#include <algorithm>
#include <barrier>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace host_cuda {

thread_local Thread* current = nullptr;
unsigned block_size = 0, grid_size = 0;

namespace {

std::mutex one_launch;
unsigned launches = 0;
std::vector<uint64_t> slots;
std::vector<Thread> threads;

// Forwards, backwards, and by a stride: no result may depend on the order in which blocks run.
unsigned block_at(unsigned i, unsigned blocks) {
  switch (launches % 3) {
    case 0:
      return i;
    case 1:
      return blocks - 1 - i;
    default: {
      const unsigned odd = (blocks + 1) / 2;
      return i < odd ? 2 * i : 2 * (i - odd) + 1;
    }
  }
}

}  // namespace

uint64_t& slot(unsigned lane) { return slots[warp() * 32 + lane]; }

#ifdef HOST_CUDA_THREADS

namespace {
std::vector<std::unique_ptr<std::barrier<>>> barriers;
}

void wait(int barrier, unsigned) { barriers[barrier]->arrive_and_wait(); }

static void run_block(const std::function<void()>& kernel) {
  const unsigned warps = (block_size + 31) / 32;
  barriers.clear();
  barriers.push_back(std::make_unique<std::barrier<>>(block_size));
  for (unsigned w = 0; w < warps; ++w) {
    barriers.push_back(std::make_unique<std::barrier<>>(std::min(32u, block_size - 32 * w)));
  }
  std::vector<std::thread> running;
  for (Thread& thread : threads) {
    running.emplace_back([&] {
      current = &thread;
      kernel();
    });
  }
  for (std::thread& thread : running) thread.join();
}

#else

namespace {

struct Barrier {
  unsigned arrived = 0;
  uint64_t generation = 0;
};

constexpr size_t kStack = 256 * 1024;

std::vector<std::unique_ptr<char[]>> stacks;
std::vector<void*> stack_pointers;
std::vector<bool> finished;
std::vector<Barrier> barriers;
const std::function<void()>* body = nullptr;
void* scheduler = nullptr;
unsigned running = 0;
uint64_t progress = 0;

extern "C" void host_cuda_switch(void** save, void* load);
asm(R"(
.text
.type host_cuda_switch, @function
host_cuda_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size host_cuda_switch, .-host_cuda_switch
)");

void yield() { host_cuda_switch(&stack_pointers[running], scheduler); }

void enter() {
  (*body)();
  finished[running] = true;
  ++progress;
  yield();
}

void* fresh_stack(unsigned i) {
  if (stacks.size() <= i) stacks.resize(i + 1);
  if (!stacks[i]) stacks[i] = std::make_unique<char[]>(kStack);
  auto* top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stacks[i].get()) + kStack) & ~uintptr_t{15});
  *--top = nullptr;                          // the return address of enter(), which never returns
  *--top = reinterpret_cast<void*>(&enter);  // what the first switch returns to
  return top - 6;                            // six registers to pop, whatever they hold
}

}  // namespace

void wait(int barrier, unsigned expected) {
  Barrier& b = barriers[barrier];
  const uint64_t generation = b.generation;
  if (++b.arrived == expected) {
    b.arrived = 0;
    ++b.generation;
    ++progress;
    return;
  }
  while (b.generation == generation) yield();
}

static void run_block(const std::function<void()>& kernel) {
  barriers.assign(1 + (block_size + 31) / 32, {});
  finished.assign(block_size, false);
  stack_pointers.assign(block_size, nullptr);
  for (unsigned i = 0; i < block_size; ++i) stack_pointers[i] = fresh_stack(i);
  body = &kernel;
  unsigned live = block_size;
  while (live > 0) {
    const uint64_t before = progress;
    for (unsigned i = 0; i < block_size; ++i) {
      if (finished[i]) continue;
      running = i;
      current = &threads[i];
      host_cuda_switch(&scheduler, stack_pointers[i]);
      if (finished[i]) --live;
    }
    if (progress == before) {
      std::fprintf(stderr, "host_cuda: deadlock: the threads of a block wait at different barriers\n");
      std::abort();
    }
  }
}

#endif

void run(unsigned blocks, unsigned threads_per_block, const std::function<void()>& kernel) {
  const std::lock_guard<std::mutex> lock(one_launch);
  block_size = threads_per_block;
  grid_size = blocks;
  slots.assign((block_size + 31) / 32 * 32, 0);
  threads.resize(block_size);
  for (unsigned i = 0; i < blocks; ++i) {
    for (unsigned t = 0; t < block_size; ++t) threads[t] = {t, block_at(i, blocks)};
    run_block(kernel);
  }
  ++launches;
}

}  // namespace host_cuda
