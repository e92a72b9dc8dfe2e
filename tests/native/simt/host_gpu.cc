// SPDX-License-Identifier: Apache-2.0
#include "host_gpu.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "../check.h"
#include "kernels.h"
#include "moe/fail.h"

namespace simt {

constexpr size_t kAlign = 256;  // as CUDA's

HostGpu::~HostGpu() {
  if (held_) check::failed(__FILE__, __LINE__, std::to_string(held_) + " allocations were never released");
}
void *HostGpu::allocate(uint64_t bytes) {
  void *memory = aligned_alloc(kAlign, (bytes + kAlign - 1) / kAlign * kAlign);
  if (!memory) check::failed(__FILE__, __LINE__, "no memory");
  memset(memory, 0, bytes);
  allocations++;
  held_++;
  return memory;
}
void HostGpu::release(void *memory) {
  {
    const std::lock_guard<std::mutex> lock(sharing_);
    shared.erase(memory);
  }
  free(memory);
  held_--;
}
void HostGpu::copy_in(void *to, const void *from, uint64_t bytes) { memcpy(to, from, bytes); }
void HostGpu::clear(void *memory, uint64_t bytes) { memset(memory, 0, bytes); }
// Its "GPU" memory has a descriptor that names it where that is asked for.
void HostGpu::describe(void *memory, const ept_caps &caps, ept::cuda::Described *out) {
  out->memory = {};
  out->memory.size = sizeof out->memory;
  out->memory.kind = caps.memory_kinds & EPT_MEMORY_DMABUF ? EPT_MEMORY_DMABUF : EPT_MEMORY_CUDA;
  out->memory.address = memory;
  out->memory.length = shared.at(memory);
  out->memory.fd = out->memory.kind == EPT_MEMORY_DMABUF ? memfd_create("a dmabuf of fibers", MFD_CLOEXEC) : -1;
  out->memory.role = EPT_ROLE_DATA;
  out->memory.access = EPT_ACCESS_LOCAL | EPT_ACCESS_REMOTE_WRITE;
  described = out->memory.kind;
}
void *HostGpu::allocate_shared(uint64_t bytes, ept::cuda::Sharing) {
  if (is_full) ept::moe::fail(EPT_E_NOMEM, -1, "the GPU of fibers has no memory left");
  void *const memory = allocate(bytes);
  const std::lock_guard<std::mutex> lock(sharing_);
  shared[memory] = bytes;
  return memory;
}
void HostGpu::launch(ept::moe::cuda::Kernel kernel, const ept::moe::cuda::Launch &as, void *stream, void *argument) {
  const std::lock_guard<std::mutex> lock(running_);
  const char *bytes = static_cast<const char *>(argument);
  if (records) records->push_back({kernel, as, stream, {bytes, bytes + kernels[kernel].argument_bytes}});
  took[as.threads].insert(std::max(as.shared, as.least));
  machine.launch(stream, kernels[kernel].run, std::vector<char>(bytes, bytes + kernels[kernel].argument_bytes),
                 as.blocks, as.threads, as.shared);
}

}  // namespace simt
