// SPDX-License-Identifier: Apache-2.0
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <vector>

#include "cuda/image.h"
#include "engine/device_half.h"
#include "engine/engine.h"
#include "moe/cuda/gpu.h"
#include "moe/cuda/shared.h"
#include "moe/fail.h"

namespace ept::moe::cuda {

const char *const kernel_names[kKernels] = {
    "moe_dispatch_send", "moe_dispatch_wait", "moe_dispatch_recv",     "moe_dispatch_claims", "moe_combine_send",
    "moe_combine_recv",  "moe_drain",         "moe_take_members",      "moe_late_send",       "moe_late_recv",
    "moe_quiet",         "moe_trial",         "moe_streamed_dispatch", "moe_streamed_late",   "moe_streamed_combine"};

namespace {

using ept::cuda::DeviceMemory;
using ept::cuda::Entered;
using ept::cuda::MappedMemory;
using ept::cuda::Module;
using ept::cuda::Pointer;
using ept::cuda::Primary;
using ept::cuda::Result;
using ept::cuda::Stream;

Pointer number(void *memory) { return Pointer(reinterpret_cast<uintptr_t>(memory)); }
void *pointer(Pointer memory) { return reinterpret_cast<void *>(uintptr_t(memory)); }

void want(Result result, const char *what) {
  Error error;
  check(ept::cuda::checked(result, "cuda", what, &error), error);
}

class DriverKernels final : public Kernels {
 public:
  // Of the library, or those of `image`; `half`: whose device library that is linked with.
  DriverKernels(std::shared_ptr<Primary> primary, std::string image, ept::DeviceHalf *half = nullptr)
      : primary_(std::move(primary)), image_(std::move(image)) {
    Error error;
    const Entered entered(*primary_);
    std::vector<std::string> names(kernel_names, kernel_names + kKernels);
    if (image_.empty()) {
      check(Module::load(primary_, "moe", names, &module_, &error), error);
    } else {
      own_ = {"moe", primary_->capability(), false, reinterpret_cast<const unsigned char *>(image_.data()),
              image_.size()};
      check(Module::load(primary_, own_, names, &module_, &error), error);
    }
    if (half) check(half->module(module_->handle(), &error), error);
    const ept::cuda::Driver &d = primary_->driver();
    const int most = primary_->attribute(ept::cuda::kMaxSharedPerBlock);
    for (uint32_t k = 0; k < kKernels; k++)
      want(d.cuFuncSetAttribute(module_->kernel(k), ept::cuda::kMaxDynamicShared, most), "cuFuncSetAttribute");
    // Each kernel runs once, without a lane: what the driver does at a first launch may wait until the GPU is idle, and
    // it never is beside kernels that wait for one another.
    Stream stream = nullptr;
    want(d.cuStreamCreate(&stream, ept::cuda::kStreamNonBlocking), "cuStreamCreate");
    for (uint32_t k = 0; k < kKernels; k++) {
      alignas(16) char nothing[4096] = {};
      launch(Kernel(k), {1, 32, 0, 0}, stream, nothing);
    }
    const Result ran = d.cuStreamSynchronize(stream);
    (void)d.cuStreamDestroy(stream);
    want(ran, "cuStreamSynchronize");
  }

  uint32_t room(uint32_t threads, uint64_t shared) const override {
    const Entered entered(*primary_);
    int least = 1 << 30;
    for (uint32_t k = 0; k < kKernels; k++) {
      int blocks = 0;
      want(primary_->driver().cuOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, module_->kernel(k), int(threads),
                                                                          size_t(shared)),
           "cuOccupancyMaxActiveBlocksPerMultiprocessor");
      least = blocks < least ? blocks : least;
    }
    return uint32_t(least) * uint32_t(primary_->attribute(ept::cuda::kMultiprocessors));
  }

  void launch(Kernel kernel, const Launch &as, void *stream, void *argument) override {
    const Entered entered(*primary_);
    Error error;
    void *arguments[] = {argument};
    const auto shared = unsigned(std::max(as.shared, as.least));
    check(module_->launch(kernel, as.blocks, as.threads, shared, static_cast<Stream>(stream), arguments, &error),
          error);
  }

 private:
  const std::shared_ptr<Primary> primary_;
  const std::string image_;
  ept::cuda::Image own_{};
  std::unique_ptr<Module> module_;
};

class DriverGpu final : public Gpu {
 public:
  // `half`: with the kernels that are linked with its device library.
  explicit DriverGpu(int32_t ordinal, ept::DeviceHalf *half = nullptr) {
    Error error;
    check(Primary::open(ordinal, &primary_, &error), error);
    std::string image;
    if (half) {
      const void *data = nullptr;
      size_t length = 0;
      check(half->image(&data, &length, &error), error);
      image.assign(static_cast<const char *>(data), length);
    }
    kernels_ = std::make_unique<DriverKernels>(primary_, std::move(image), half);
  }
  std::shared_ptr<Kernels> load(const void *image, uint64_t bytes) override {
    // One of an image, however many AllToAlls have its shape.
    std::string held(static_cast<const char *>(image), bytes);
    const std::lock_guard<std::mutex> lock(sharing_);
    std::weak_ptr<Kernels> &known = loaded_[held];
    std::shared_ptr<Kernels> kernels = known.lock();
    if (!kernels) known = kernels = std::make_shared<DriverKernels>(primary_, std::move(held));
    return kernels;
  }

  int32_t ordinal() const override { return primary_->ordinal(); }

  std::string identity() const override {
    char uuid[16] = {};
    want(driver().cuDeviceGetUuid(uuid, primary_->device()), "cuDeviceGetUuid");
    return std::string(uuid, sizeof uuid);
  }

  uint32_t connections() const override {
    const char *told = getenv("CUDA_DEVICE_MAX_CONNECTIONS");
    const long given = told ? strtol(told, nullptr, 10) : 0;
    return given > 0 ? uint32_t(given) : 8;  // what CUDA has by itself
  }

  uint32_t room(uint32_t threads, uint64_t shared) const override { return kernels_->room(threads, shared); }
  // MPS gives a process that starts with this so many of the multiprocessors, and CUDA then says that there are no
  // more. Where no MPS runs it means nothing: processes have the GPU in turn, so their kernels never meet either.
  uint32_t shares() const override {
    const char *told = getenv("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE");
    const double percent = told ? strtod(told, nullptr) : 100;
    return percent > 0 && percent <= 50 ? uint32_t(100 / percent) : 1;
  }

  void *allocate(uint64_t bytes) override {
    const Entered entered(*primary_);
    Pointer memory = 0;
    want(driver().cuMemAlloc(&memory, bytes), "cuMemAlloc");
    clear(pointer(memory), bytes);
    return pointer(memory);
  }
  void release(void *memory) override {
    {
      std::unique_ptr<DeviceMemory> its;
      const std::lock_guard<std::mutex> lock(sharing_);
      if (const auto found = shared_.find(memory); found != shared_.end()) {
        its = std::move(found->second);
        shared_.erase(found);
        return;
      }
    }
    const Entered entered(*primary_);
    (void)driver().cuMemFree(number(memory));
  }
  void *allocate_pinned(uint64_t bytes) override {
    const Entered entered(*primary_);
    void *memory = nullptr;
    want(driver().cuMemHostAlloc(&memory, bytes, ept::cuda::kHostPortable | ept::cuda::kHostMapped), "cuMemHostAlloc");
    memset(memory, 0, bytes);
    return memory;  // with unified addressing, which every 64-bit system has, kernels use the same address
  }
  void release_pinned(void *memory) override {
    const Entered entered(*primary_);
    (void)driver().cuMemFreeHost(memory);
  }
  char *pin(void *host, uint64_t bytes) override {
    const Entered entered(*primary_);
    want(driver().cuMemHostRegister(host, bytes, ept::cuda::kHostPortable | ept::cuda::kHostMapped),
         "cuMemHostRegister (pinning host memory, see ulimit -l)");
    Pointer there = 0;
    const Result result = driver().cuMemHostGetDevicePointer(&there, host, 0);
    if (result != ept::cuda::kSuccess) unpin(host);
    want(result, "cuMemHostGetDevicePointer");
    return static_cast<char *>(pointer(there));
  }
  void unpin(void *host) override {
    const Entered entered(*primary_);
    (void)driver().cuMemHostUnregister(host);
  }
  void copy_in(void *to, const void *from, uint64_t bytes) override {
    const Entered entered(*primary_);
    want(driver().cuMemcpyHtoD(number(to), from, bytes), "cuMemcpyHtoD");
  }
  void copy_out(void *to, const void *from, uint64_t bytes) override {
    const Entered entered(*primary_);
    want(driver().cuMemcpyDtoH(to, number(const_cast<void *>(from)), bytes), "cuMemcpyDtoH");
  }
  void clear(void *memory, uint64_t bytes) override {
    const Entered entered(*primary_);
    // On a stream of its own: the default one may wait for kernels that wait for this rank.
    Stream stream = nullptr;
    want(driver().cuStreamCreate(&stream, ept::cuda::kStreamNonBlocking), "cuStreamCreate");
    Result result = driver().cuMemsetD8Async(number(memory), 0, bytes, stream);
    if (result == ept::cuda::kSuccess) result = driver().cuStreamSynchronize(stream);
    (void)driver().cuStreamDestroy(stream);
    want(result, "cuMemsetD8Async");
  }
  void synchronise(void *stream) override {
    const Entered entered(*primary_);
    want(driver().cuStreamSynchronize(static_cast<Stream>(stream)), "cuStreamSynchronize");
  }
  bool ends(void *stream, uint64_t deadline_ns) override {
    const Entered entered(*primary_);
    for (;;) {
      const Result result = driver().cuStreamQuery(static_cast<Stream>(stream));
      if (result != ept::cuda::kNotReady) {
        want(result, "cuStreamQuery");
        return true;
      }
      if (now_ns() >= deadline_ns) return false;
      const timespec pause = {0, 50'000};
      nanosleep(&pause, nullptr);
    }
  }

  void *make_stream() override {
    const Entered entered(*primary_);
    Stream stream = nullptr;
    want(driver().cuStreamCreate(&stream, ept::cuda::kStreamNonBlocking), "cuStreamCreate");
    return stream;
  }
  void end_stream(void *stream) override {
    const Entered entered(*primary_);
    (void)driver().cuStreamDestroy(static_cast<Stream>(stream));
  }

  void *allocate_shared(uint64_t bytes, ept::cuda::Sharing sharing) override {
    std::unique_ptr<DeviceMemory> memory;
    Error error;
    check(DeviceMemory::allocate(primary_, bytes, &memory, &error, sharing), error);
    void *const at = pointer(memory->address());
    const std::lock_guard<std::mutex> lock(sharing_);
    shared_[at] = std::move(memory);
    return at;
  }
  std::string share(void *memory) override {
    std::string blob;
    Error error;
    check(shared(memory).blob(&blob, &error), error);
    return blob;
  }
  void *open(const std::string &blob) override {
    std::unique_ptr<MappedMemory> memory;
    Error error;
    check(MappedMemory::open(primary_, blob, &memory, &error), error);
    void *const at = pointer(memory->address());
    const std::lock_guard<std::mutex> lock(sharing_);
    opened_[at] = std::move(memory);
    return at;
  }
  void close(void *opened) override {
    std::unique_ptr<MappedMemory> memory;
    const std::lock_guard<std::mutex> lock(sharing_);
    memory = std::move(opened_[opened]);
    opened_.erase(opened);
  }
  void describe(void *memory, const ept_caps &caps, ept::cuda::Described *out) override {
    Error error;
    check(shared(memory).describe(caps, out, &error), error);
  }
  bool orders_network() const override {
    return primary_->attribute(ept::cuda::kWritesOrdering) >= ept::cuda::kOwnerOrdering &&
           !primary_->attribute(ept::cuda::kHostPageTables);
  }

  void launch(Kernel kernel, const Launch &as, void *stream, void *argument) override {
    kernels_->launch(kernel, as, stream, argument);
  }

 private:
  const ept::cuda::Driver &driver() const { return primary_->driver(); }
  DeviceMemory &shared(void *memory) {
    const std::lock_guard<std::mutex> lock(sharing_);
    return *shared_.at(memory);
  }
  std::shared_ptr<Primary> primary_;
  std::unique_ptr<DriverKernels> kernels_;
  std::map<std::string, std::weak_ptr<Kernels>> loaded_;
  std::mutex sharing_;
  std::map<void *, std::unique_ptr<DeviceMemory>> shared_;
  std::map<void *, std::unique_ptr<MappedMemory>> opened_;
};

class HalfHeap final : public Heap {
 public:
  HalfHeap(std::shared_ptr<ept::DeviceHalf> half, uint32_t rank) : half_(std::move(half)) {
    base_ = reinterpret_cast<char *>(uintptr_t(entry(rank).words[1]));
  }
  char *allocate(uint64_t bytes) override {
    void *memory = nullptr;
    Error error;
    check(half_->allocate(bytes, &memory, &error), error);
    return static_cast<char *>(memory);
  }
  void release(char *memory) override { half_->release(memory); }
  char *base() const override { return base_; }
  uint32_t number(uint32_t rank) const override { return uint32_t(entry(rank).words[0]); }
  char *mapped(uint32_t rank) const override { return reinterpret_cast<char *>(uintptr_t(entry(rank).words[3])); }

 private:
  ept_device_entry entry(uint32_t rank) const {
    ept_device_entry its;
    Error error;
    check(half_->peer(rank, &its, &error), error);
    if (its.kind != EPT_DEVICE_GPU || its.version != EPT_DEVICE_ABI)
      fail(EPT_E_VERSION, int32_t(rank), "the backend's entry of a peer is of kind %d and version %u; kernels know %d",
           its.kind, its.version, EPT_DEVICE_ABI);
    return its;
  }
  const std::shared_ptr<ept::DeviceHalf> half_;
  char *base_ = nullptr;
};

}  // namespace

Opened driver_gpu(int32_t ordinal, ept_engine *engine) {
  std::shared_ptr<ept::DeviceHalf> half;
  Error error;
  check(ept::DeviceHalf::open(engine, ordinal, &half, &error), error);
  if (!half) return driver_gpu(ordinal);
  // Kept for the life of the process: the library knows of the module from then on, and would write to one that is
  // gone.
  static std::mutex mutex;
  static auto *opened = new std::map<std::pair<int32_t, const void *>, std::shared_ptr<Gpu>>;
  const std::lock_guard<std::mutex> lock(mutex);
  std::shared_ptr<Gpu> &gpu = (*opened)[{ordinal, engine->plugin}];
  if (!gpu) gpu = std::make_shared<DriverGpu>(ordinal, half.get());
  return {gpu, std::make_shared<HalfHeap>(half, engine->rank)};
}

std::shared_ptr<Gpu> driver_gpu(int32_t ordinal) {
  // One a device and process: all its AllToAlls share the loaded kernels.
  static std::mutex mutex;
  static std::map<int32_t, std::weak_ptr<Gpu>> opened;
  const std::lock_guard<std::mutex> lock(mutex);
  std::shared_ptr<Gpu> gpu = opened[ordinal].lock();
  if (!gpu) opened[ordinal] = gpu = std::make_shared<DriverGpu>(ordinal);
  return gpu;
}

}  // namespace ept::moe::cuda
