// Test only: the ops compiled for the host have a namespace of their own, and their tensors are CPU tensors.
#pragma once

#include_next <torch/csrc/stable/library.h>

#undef STABLE_TORCH_LIBRARY
#define STABLE_TORCH_LIBRARY(ns, m) STABLE_TORCH_LIBRARY_FRAGMENT(ns##_host_cuda, m)
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, device, m) _STABLE_TORCH_LIBRARY_IMPL(ns##_host_cuda, CPU, m, C10_UID)
