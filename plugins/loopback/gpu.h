// SPDX-License-Identifier: Apache-2.0
//
// gpu.h: bytes that come from GPU memory or go there. Where the setting `gpu` is 0, which it is unless somebody sets
// it, nothing here makes a call of CUDA's.
//
// From one place on a GPU to another CUDA copies by a kernel, which finds no room beside kernels that wait for this
// very copy. So bytes go through pinned host memory, by the engines that copy to and from it, which nobody's kernels
// hold up. That, streams and all else that may wait for a GPU is made when memory is registered; a copy only queues and
// waits for itself, as threads may beside a capture.
#pragma once

#include <eptransport/backend.h>

#include <atomic>
#include <cstring>

namespace loopback {

// Of a memory of kind CUDA or DMABUF: an error of mem_register, with its sentence, or OK and then, once, `forget_gpu`.
int32_t keep_gpu(const ept_host *host, const ept_memory &memory);
void forget_gpu(const ept_memory &memory);

extern std::atomic<uint32_t> gpu_memories;  // that are kept now
bool move_gpu(void *to, const void *from, uint64_t length);

// False where CUDA refuses.
inline bool move(void *to, const void *from, uint64_t length) {
  if (gpu_memories.load(std::memory_order_acquire)) return move_gpu(to, from, length);
  memcpy(to, from, length);
  return true;
}

}  // namespace loopback
