// Fresh memory is the dearest part of a large output: a fault on every 4 KiB costs more than what the kernels compute.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "checks.h"

namespace ppo {

// Asks for 2 MiB pages under a tensor that is about to be written. Only a hint: where it is refused nothing changes.
inline Tensor on_huge_pages(Tensor x) {
#ifdef __linux__
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const auto begin = reinterpret_cast<uintptr_t>(x.data_ptr());
  const uintptr_t end = begin + static_cast<uintptr_t>(x.numel()) * x.element_size();
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return x;
}

}  // namespace ppo
