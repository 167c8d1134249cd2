// Test only: the host has no device to make current and no streams.
#pragma once

#include_next <torch/csrc/stable/accelerator.h>

namespace torch::stable::accelerator {

struct HostDeviceGuard {
  explicit HostDeviceGuard(DeviceIndex) {}
};

}  // namespace torch::stable::accelerator

#define DeviceGuard HostDeviceGuard

inline AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**) { return AOTI_TORCH_SUCCESS; }
