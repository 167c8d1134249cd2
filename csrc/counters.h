// How often each registered op ran. One relaxed atomic add per call; torch.compile never sees it.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>

namespace ppo {

inline std::mutex counters_mutex;
inline std::map<std::string, std::atomic<int64_t>> counters;  // a map never moves its values

inline std::atomic<int64_t>& counter(const char* op) {
  const std::lock_guard<std::mutex> lock(counters_mutex);
  return counters[op];
}

inline std::map<std::string, int64_t> call_counts() {
  const std::lock_guard<std::mutex> lock(counters_mutex);
  return {counters.begin(), counters.end()};
}

}  // namespace ppo

// First statement of a registered op: PPO_COUNT("gae"). The name is looked up once per call site.
#define PPO_COUNT(op)                                            \
  do {                                                           \
    static std::atomic<int64_t>& ppo_calls = ::ppo::counter(op); \
    ppo_calls.fetch_add(1, std::memory_order_relaxed);           \
  } while (0)
