// torch's parallel_for with plain threads, to be preloaded under ThreadSanitizer: it knows when they start and end, and
// takes OpenMP's, whose barriers it cannot see, for races. The grain is left out, so that small tensors are shared too.
#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

extern "C" int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t, void (*f)(int64_t, int64_t, void*),
                                      void* context) {
  const int64_t chunk = (end - begin + 3) / 4;
  std::vector<std::thread> threads;
  for (int64_t i = begin; i < end; i += chunk) {
    threads.emplace_back([=] { f(i, std::min(end, i + chunk), context); });
  }
  for (std::thread& thread : threads) thread.join();
  return 0;
}
