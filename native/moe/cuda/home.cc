// SPDX-License-Identifier: Apache-2.0
#include "moe/cuda/home.h"

#include "moe/fail.h"

namespace ept::moe::cuda {

namespace {

// Why GPU memory is no choice here; empty: it is one.
std::string against(const ept_caps &caps, Gpu &gpu) {
  if (ept::cuda::home_of(caps) != EPT_MEMORY_CUDA) return "the backend takes no GPU memory";
  if (caps.needs_visible) return "the backend says of arrivals that a GPU may not read them yet (needs_visible)";
  if (!gpu.orders_network()) return "this GPU doesn't order what a NIC writes before what its kernels read";
  return {};
}

std::unique_ptr<LaneMemory> registered(const std::shared_ptr<Gpu> &gpu, ept_engine *engine, const ept_caps &caps,
                                       uint64_t bytes, std::string *why) {
  void *const at = gpu->allocate_shared(bytes, ept::cuda::Sharing::ipc);
  const std::shared_ptr<void> owned(at, [gpu](void *memory) { gpu->release(memory); });
  ept::cuda::Described described;
  gpu->describe(at, caps, &described);
  *why = described.memory.kind == EPT_MEMORY_DMABUF ? "on the GPU, shown to the backend as a dmabuf"
                                                    : "on the GPU, shown to the backend by address";
  return std::make_unique<LaneMemory>(engine, described.memory, owned);
}

}  // namespace

std::unique_ptr<LaneMemory> device_home(const std::shared_ptr<Gpu> &gpu, ept_engine *engine, Home wish, uint64_t bytes,
                                        std::string *why) {
  *why = "pinned on the host: EPT_GPU_MEMORY=pinned";
  if (wish == Home::pinned) return nullptr;
  ept_engine_info info{};
  info.size = sizeof info;
  Error error;
  check(ept_engine_info_get(engine, &info, &error), error);
  const std::string reason = against(info.caps, *gpu);
  if (reason.empty()) {
    try {
      return registered(gpu, engine, info.caps, bytes, why);
    } catch (const Failure &failure) {
      if (wish == Home::device || failure.error.code == EPT_E_NOMEM) throw;
      *why = std::string("pinned on the host: GPU memory could not be registered (") + failure.error.text + ")";
      return nullptr;
    }
  }
  if (wish == Home::device)
    fail(EPT_E_UNSUPPORTED, -1, "EPT_GPU_MEMORY=device: %s; auto would pin the lanes on the host", reason.c_str());
  *why = "pinned on the host: " + reason;
  return nullptr;
}

}  // namespace ept::moe::cuda
