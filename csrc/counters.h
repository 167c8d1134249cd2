// How often each registered op ran. One relaxed atomic add per call; torch.compile never sees it.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>

namespace ppo {

class CallCounts {
 public:
  // The counter of `op`. It stays valid for the life of the process, so a call site looks it up once.
  static std::atomic<int64_t>& of(const std::string& op) {
    const std::lock_guard<std::mutex> lock(mutex());
    return counters()[op];
  }
  static std::map<std::string, int64_t> snapshot() {
    const std::lock_guard<std::mutex> lock(mutex());
    return {counters().begin(), counters().end()};
  }
  static void reset() {
    const std::lock_guard<std::mutex> lock(mutex());
    for (auto& [op, calls] : counters()) calls.store(0, std::memory_order_relaxed);
  }

 private:
  static inline std::map<std::string, std::atomic<int64_t>>& counters() {
    static std::map<std::string, std::atomic<int64_t>> map;
    return map;
  }
  static inline std::mutex& mutex() {
    static std::mutex m;
    return m;
  }
};

}  // namespace ppo

// First statement of a registered op: PPO_COUNT("gae");
#define PPO_COUNT(op)                                               \
  do {                                                              \
    static std::atomic<int64_t>& calls = ::ppo::CallCounts::of(op); \
    calls.fetch_add(1, std::memory_order_relaxed);                  \
  } while (0)
