// The runtime behind include/cuda_runtime.h. A CUDA thread is a fiber; the fibers of a block share one OS thread, and
// up to HOST_CUDA_BLOCKS blocks run at the same time.
//
// For ThreadSanitizer every fiber is a thread of its own, ordered with others by what CUDA orders alone: barriers and
// the end of a launch. This file is not instrumented.
#include <cuda_runtime.h>
#include <dlfcn.h>
#ifdef HOST_CUDA_TSAN
#include <sanitizer/tsan_interface.h>
#endif

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace host_cuda {

thread_local Thread* current = nullptr;
unsigned block_size = 0, grid_size = 0;

namespace {

// What ThreadSanitizer is told: nothing without it.
#ifdef HOST_CUDA_TSAN
constexpr size_t kStack = 64 * 1024;
void acquire(void* at) { __tsan_acquire(at); }
void release(void* at) { __tsan_release(at); }
void* own_fiber() { return __tsan_get_current_fiber(); }
void* new_fiber() { return __tsan_create_fiber(0); }
void end_fiber(void* fiber) { __tsan_destroy_fiber(fiber); }
void show_switch(void* fiber) { __tsan_switch_to_fiber(fiber, __tsan_switch_to_fiber_no_sync); }
#else
constexpr size_t kStack = 256 * 1024;
void acquire(void*) {}
void release(void*) {}
void* own_fiber() { return nullptr; }
void* new_fiber() { return nullptr; }
void end_fiber(void*) {}
void show_switch(void*) {}
#endif

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

std::atomic<unsigned> blocks_running{0};

// Of a primary and its dependent launch: how many threads of the running launch have said what they have to, and
// whether a dependent has to follow. A primary's end orders only what waits for it.
std::atomic<uint64_t> allowed{0}, waited{0};
bool dependent_follows = false;
char ended[2];  // of the launches in turns, as a dependent may be the primary of another
unsigned launches = 0;

[[noreturn]] void stop(const char* why) {
  std::fprintf(stderr, "host_cuda: %s\n", why);
  std::abort();
}

struct Barrier {
  unsigned arrived = 0;
  uint64_t generation = 0;
  char passed[2];  // in turns: who is late must not learn what others did after the barrier
};

struct Fiber {
  Thread thread;
  void *stack_pointer, *shown;
  bool finished = false, waited = false;
};

class Block {
 public:
  static thread_local Block* running;

  Block(unsigned index, std::vector<std::unique_ptr<char[]>>& stacks)
      : fibers_(block_size), slots_((block_size + 31) / 32 * 32), barriers_(1 + (block_size + 31) / 32) {
    while (stacks.size() < block_size) stacks.emplace_back(new char[kStack]);
    for (unsigned i = 0; i < block_size; ++i) {
      auto* top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stacks[i].get()) + kStack) & ~uintptr_t{15});
      *--top = nullptr;                          // the return address of enter(), which never returns
      *--top = reinterpret_cast<void*>(&enter);  // what the first switch returns to
      fibers_[i].thread = {i, index};
      fibers_[i].stack_pointer = top - 6;  // six registers to pop, whatever they hold
      fibers_[i].shown = new_fiber();
    }
  }

  void run(const std::function<void()>& kernel) {
    kernel_ = &kernel;
    running = this;
    scheduler_shown_ = own_fiber();
    release(&begun_);
    for (unsigned live = block_size; live > 0;) {
      const uint64_t before = progress_;
      for (Fiber& fiber : fibers_) {
        if (fiber.finished) continue;
        at_ = &fiber;
        current = &fiber.thread;
        show_switch(fiber.shown);
        host_cuda_switch(&scheduler_, fiber.stack_pointer);
        if (fiber.finished) --live;
      }
      if (progress_ != before) continue;
      stop("deadlock: the threads of a block wait for what never comes");
    }
    if (!allows_dependent_) acquire(&ended_);
    for (Fiber& fiber : fibers_) end_fiber(fiber.shown);
    running = nullptr;
  }

  void yield() {
    Fiber& self = *at_;
    show_switch(scheduler_shown_);
    host_cuda_switch(&self.stack_pointer, scheduler_);
  }

  void wait(unsigned barrier, unsigned expected, bool orders_memory) {
    Barrier& b = barriers_[barrier];
    const uint64_t generation = b.generation;
    if (orders_memory) release(&b.passed[generation % 2]);
    ++progress_;
    if (++b.arrived == expected) {
      b.arrived = 0;
      ++b.generation;
    }
    while (b.generation == generation) yield();
    if (orders_memory) acquire(&b.passed[generation % 2]);
  }

  void wait_for_primary() {
    if (!at_->waited) ++waited;
    at_->waited = true;
  }
  void allow_dependent() { allows_dependent_ = true; }
  bool allows_dependent() const { return allows_dependent_; }

  uint64_t& slot(unsigned lane) { return slots_[at_->thread.index / 32 * 32 + lane]; }

 private:
  static void enter() {
    Block& block = *running;
    acquire(&block.begun_);
    (*block.kernel_)();
    release(block.allows_dependent_ ? &ended[launches % 2] : &block.ended_);
    block.at_->finished = true;
    ++block.progress_;
    block.yield();
  }

  std::vector<Fiber> fibers_;
  std::vector<uint64_t> slots_;
  std::vector<Barrier> barriers_;  // 0 is the block's; 1 + w is warp w's
  const std::function<void()>* kernel_ = nullptr;
  Fiber* at_ = nullptr;
  void *scheduler_ = nullptr, *scheduler_shown_ = nullptr;
  uint64_t progress_ = 0;
  bool allows_dependent_ = false;
  char begun_, ended_;
};

thread_local Block* Block::running = nullptr;

struct OwnBlock {
  std::vector<std::unique_ptr<char[]>> stacks;
  Block block;

  explicit OwnBlock(unsigned index) : block(index, stacks) {}
};

void wait_warp(unsigned mask, bool orders_memory) {
  Block::running->wait(1 + current->index / 32, __builtin_popcount(mask), orders_memory);
}

std::mutex one_launch;

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

// What becomes of launches, by the numbers that tests/lib/host_cuda/launches.py gives.
enum Recording { kRun, kRecord, kSkip };
int recording = kRun;
std::string recorded;

void sync_block() { Block::running->wait(0, block_size, true); }
void sync_warp(unsigned mask) { wait_warp(mask, true); }

void allow_dependent() {
  ++allowed;
  Block::running->allow_dependent();
}

void wait_for_primary() {
  Block::running->wait_for_primary();
  acquire(&ended[(launches + 1) % 2]);
}

uint64_t exchange(unsigned mask, uint64_t value, unsigned source) {
  Block::running->slot(current->index % 32) = value;
  wait_warp(mask, false);
  value = Block::running->slot(source);
  wait_warp(mask, false);
  return value;
}

void run(unsigned blocks, unsigned threads_per_block, bool dependent, std::shared_ptr<const Kernel> kernel) {
  const std::lock_guard<std::mutex> lock(one_launch);
  if (dependent != dependent_follows) stop("a dependent launch belongs behind one that allows it, and nowhere else");
  allowed = waited = 0;
  block_size = threads_per_block;
  grid_size = blocks;
#if HOST_CUDA_BLOCKS > 1
  // Those of primaries, until the last launch of the chain has ended and with it orders what was done with them.
  static std::vector<std::unique_ptr<OwnBlock>> unordered;
  static std::vector<std::shared_ptr<const Kernel>> with_arguments;
  static std::mutex adds;
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < blocks; ++i) {
    while (blocks_running >= HOST_CUDA_BLOCKS) std::this_thread::yield();
    ++blocks_running;
    threads.emplace_back([&kernel, index = block_at(i, blocks)] {
      auto block = std::make_unique<OwnBlock>(index);
      block->block.run(*kernel);
      if (block->block.allows_dependent()) {
        const std::lock_guard<std::mutex> lock(adds);
        unordered.push_back(std::move(block));
      }
      block.reset();
      --blocks_running;
    });
    // To join a thread orders what it did before what starts later, and so it is done rarely.
    if (i + 1 < blocks && threads.size() < 64) continue;
    for (std::thread& thread : threads) thread.join();
    threads.clear();
  }
#else
  static std::vector<std::unique_ptr<char[]>> stacks;
  for (unsigned i = 0; i < blocks; ++i) Block(block_at(i, blocks), stacks).run(*kernel);
#endif
  const uint64_t all = uint64_t{blocks} * threads_per_block;
  if (dependent && waited != all) stop("threads of a dependent launch have ended without waiting for its primary");
  if (allowed != 0 && allowed != all) stop("all threads of a primary say so, or none");
  dependent_follows = allowed != 0;
  if (!dependent_follows) acquire(&ended[0]), acquire(&ended[1]);
#if HOST_CUDA_BLOCKS > 1
  with_arguments.push_back(std::move(kernel));
  if (!dependent_follows) unordered.clear(), with_arguments.clear();
#endif
  ++launches;
}

bool note(const void* kernel, unsigned blocks, unsigned threads) {
  if (recording == kRun) return true;
  if (recording == kSkip) return false;
  Dl_info found{};
  if (kernel != nullptr) dladdr(kernel, &found);
  const auto offset = reinterpret_cast<uintptr_t>(kernel) - reinterpret_cast<uintptr_t>(found.dli_fbase);
  recorded += std::to_string(offset) + " " + std::to_string(blocks) + " " + std::to_string(threads) + "\n";
  return false;
}

}  // namespace host_cuda

extern "C" __attribute__((visibility("default"))) void host_cuda_record(int how) { host_cuda::recording = how; }

// "OFFSET BLOCKS THREADS" of each launch since the last question, the kernel's offset in the library; 0 is a memset.
extern "C" __attribute__((visibility("default"))) const char* host_cuda_recorded() {
  static std::string text;
  text = std::move(host_cuda::recorded);
  host_cuda::recorded.clear();
  return text.c_str();
}
