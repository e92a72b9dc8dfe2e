// SPDX-License-Identifier: Apache-2.0
//
// kernels.h: moe.cu's kernels on machine.h's fibers, in the order of native/moe/cuda/gpu.h.
#pragma once

#include <stddef.h>

namespace simt {

struct Kernel {
  void (*run)(const void *argument);
  size_t argument_bytes;
};
extern const Kernel kernels[15];

}  // namespace simt
