// SPDX-License-Identifier: Apache-2.0
#include "gpu.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <type_traits>
#include <vector>

#include "common.h"

namespace loopback {

std::atomic<uint32_t> gpu_memories{0};

namespace {

using Pointer = unsigned long long;
using Context = void *;
using Stream = void *;

// Of CUDA's driver, what is used here; names and types as in cuda.h.
struct Cuda {
  int (*init)(unsigned) = nullptr;
  int (*retain)(Context *, int) = nullptr;
  int (*release)(int) = nullptr;
  int (*push)(Context) = nullptr;
  int (*pop)(Context *) = nullptr;
  int (*host_alloc)(void **, size_t, unsigned) = nullptr;
  int (*host_free)(void *) = nullptr;
  int (*stream_create)(Stream *, unsigned) = nullptr;
  int (*stream_destroy)(Stream) = nullptr;
  int (*stream_synchronize)(Stream) = nullptr;
  int (*to_gpu)(Pointer, const void *, size_t, Stream) = nullptr;
  int (*from_gpu)(void *, Pointer, size_t, Stream) = nullptr;
  int (*exchange_mode)(int *) = nullptr;

  // The name of what is missing, or NULL.
  const char *load(const ept_host *host) {
    const char *missing = nullptr;
    const auto get = [&](auto &entry, const char *name) {
      entry = reinterpret_cast<std::decay_t<decltype(entry)>>(host->cuda(host->context, name));
      if (!entry && !missing) missing = name;
    };
    get(init, "cuInit");
    get(retain, "cuDevicePrimaryCtxRetain");
    get(release, "cuDevicePrimaryCtxRelease_v2");
    get(push, "cuCtxPushCurrent_v2");
    get(pop, "cuCtxPopCurrent_v2");
    get(host_alloc, "cuMemHostAlloc");
    get(host_free, "cuMemFreeHost");
    get(stream_create, "cuStreamCreate");
    get(stream_destroy, "cuStreamDestroy_v2");
    get(stream_synchronize, "cuStreamSynchronize");
    get(to_gpu, "cuMemcpyHtoDAsync_v2");
    get(from_gpu, "cuMemcpyDtoHAsync_v2");
    get(exchange_mode, "cuThreadExchangeStreamCaptureMode");
    return missing;
  }
};

constexpr uint64_t kBounce = 256 << 10;  // 10 us of PCIe: a call more costs about as much
constexpr unsigned kPortable = 1, kNonBlocking = 1;
constexpr int kRelaxed = 2;  // CU_STREAM_CAPTURE_MODE_RELAXED

Pointer number(const void *at) { return Pointer(reinterpret_cast<uintptr_t>(at)); }

// A stream and its piece of pinned memory, in a device's primary context. One copy at a time has it.
class Way {
 public:
  Way(const Cuda &cuda, int device) : cuda_(cuda), device_(device) {
    retained_ = cuda_.retain(&context_, device) == 0;
    if (!retained_ || cuda_.push(context_)) return;
    if (cuda_.host_alloc(&bounce_, kBounce, kPortable)) bounce_ = nullptr;
    if (cuda_.stream_create(&stream_, kNonBlocking)) stream_ = nullptr;
    Context left;
    cuda_.pop(&left);
  }
  ~Way() {
    if (retained_ && cuda_.push(context_) == 0) {
      if (stream_) cuda_.stream_destroy(stream_);
      if (bounce_) cuda_.host_free(bounce_);
      Context left;
      cuda_.pop(&left);
    }
    if (retained_) cuda_.release(device_);
  }
  Way(const Way &) = delete;
  Way &operator=(const Way &) = delete;
  bool works() const { return bounce_ && stream_; }

  bool move(char *to, bool to_gpu, const char *from, bool from_gpu, uint64_t length) {
    if (cuda_.push(context_)) return false;
    int mode = kRelaxed;
    cuda_.exchange_mode(&mode);
    bool moved = true;
    for (uint64_t at = 0; at < length && moved; at += kBounce) {
      const uint64_t part = std::min(kBounce, length - at);
      if (from_gpu)
        moved = !cuda_.from_gpu(bounce_, number(from + at), part, stream_);
      else
        memcpy(bounce_, from + at, part);
      if (to_gpu && moved) moved = !cuda_.to_gpu(number(to + at), bounce_, part, stream_);
      if (cuda_.stream_synchronize(stream_)) moved = false;
      if (!to_gpu && moved) memcpy(to + at, bounce_, part);
    }
    cuda_.exchange_mode(&mode);
    Context left;
    cuda_.pop(&left);
    return moved;
  }

 private:
  const Cuda &cuda_;
  const int device_;
  bool retained_ = false;
  Context context_ = nullptr;
  void *bounce_ = nullptr;
  Stream stream_ = nullptr;
};

struct Kept {
  const char *begin;
  uint64_t length;
  int descriptor;  // of a dmabuf, ours: as a NIC's registration keeps it
  std::unique_ptr<Way> way;
  bool busy = false;
};

// A memory brings a way; a copy takes any that is free. A way goes with its memory, when nobody has it.
struct Gpus {
  std::mutex lock;
  std::condition_variable freed;
  std::vector<std::unique_ptr<Kept>> kept;
  Cuda cuda;

  bool holds(const void *at) const {
    return std::any_of(kept.begin(), kept.end(),
                       [&](const std::unique_ptr<Kept> &k) { return number(at) - number(k->begin) < k->length; });
  }
};

Gpus &gpus() {
  static Gpus *const all = new Gpus;  // until the process ends: a rank's last copy may be late
  return *all;
}

}  // namespace

int32_t keep_gpu(const ept_host *host, const ept_memory &memory) {
  const bool dmabuf = memory.kind == EPT_MEMORY_DMABUF;
  if (dmabuf && fcntl(memory.fd, F_GETFD) < 0) {
    return fail(EPT_E_INVALID, "mem_register", -1, "loopback mem_register: a dmabuf whose descriptor is %d", memory.fd);
  }
  Gpus &all = gpus();
  std::lock_guard hold(all.lock);
  const char *const missing = all.cuda.load(host);
  if (missing || all.cuda.init(0)) {
    return fail(EPT_E_UNAVAILABLE, "mem_register", -1,
                "loopback mem_register: no CUDA driver to copy GPU memory by (%s)", missing ? missing : "cuInit fails");
  }
  auto kept = std::make_unique<Kept>();
  kept->begin = static_cast<const char *>(memory.address);
  kept->length = memory.length;
  kept->way = std::make_unique<Way>(all.cuda, memory.cuda_device);
  if (!kept->way->works()) {
    return fail(EPT_E_NOMEM, "mem_register", -1,
                "loopback mem_register: CUDA gives no stream, or no %llu bytes of pinned memory, on device %d",
                static_cast<unsigned long long>(kBounce), memory.cuda_device);
  }
  kept->descriptor = dmabuf ? fcntl(memory.fd, F_DUPFD_CLOEXEC, 0) : -1;
  all.kept.push_back(std::move(kept));
  gpu_memories.fetch_add(1, std::memory_order_release);
  return EPT_OK;
}

void forget_gpu(const ept_memory &memory) {
  Gpus &all = gpus();
  std::unique_lock hold(all.lock);
  const auto its = [&](const std::unique_ptr<Kept> &k) { return k->begin == memory.address; };
  // Its way may carry another memory's bytes.
  all.freed.wait(hold, [&] { return !(*std::find_if(all.kept.begin(), all.kept.end(), its))->busy; });
  const auto found = std::find_if(all.kept.begin(), all.kept.end(), its);
  if ((*found)->descriptor >= 0) close((*found)->descriptor);
  all.kept.erase(found);
  gpu_memories.fetch_sub(1, std::memory_order_release);
}

bool move_gpu(void *to, const void *from, uint64_t length) {
  Gpus &all = gpus();
  std::unique_lock hold(all.lock);
  const bool to_gpu = all.holds(to), from_gpu = all.holds(from);
  if (!to_gpu && !from_gpu) {
    hold.unlock();
    memcpy(to, from, length);
    return true;
  }
  Kept *taken = nullptr;
  all.freed.wait(hold, [&] {
    for (const auto &k : all.kept)
      if (!k->busy) taken = k.get();
    return taken != nullptr;
  });
  taken->busy = true;
  hold.unlock();
  const bool moved =
      taken->way->move(static_cast<char *>(to), to_gpu, static_cast<const char *>(from), from_gpu, length);
  hold.lock();
  taken->busy = false;
  all.freed.notify_all();
  return moved;
}

}  // namespace loopback
