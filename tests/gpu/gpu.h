// SPDX-License-Identifier: Apache-2.0
//
// gpu.h: a GPU, the litmus kernels and its memory, for the parts of the litmus program (litmus.cc). A call that fails
// ends the test.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "cuda/image.h"
#include "cuda/memory.h"
#include "engine_world.h"
#include "eptransport/device.h"

namespace litmus {

using namespace ept::cuda;
using world::error;
using world::second;

extern bool quick;  // few rounds: under compute-sanitizer
// For what comes; only what is broken waits so long.
constexpr uint64_t kTimeout = 60 * second;

enum Kernel : size_t { mapped, counted, ring, flag, signalled, expires, put_once, look, exchange, noise };
inline const std::vector<std::string> kKernels = {"litmus_mapped",   "litmus_counted", "litmus_ring", "litmus_flag",
                                                  "litmus_signal",   "litmus_expires", "litmus_put",  "litmus_look",
                                                  "litmus_exchange", "litmus_noise"};

struct Gpu {
  std::shared_ptr<Primary> primary;
  std::unique_ptr<Module> module;
  Stream stream = nullptr;
  std::unique_ptr<DeviceMemory> wrong;

  Gpu() {
    OK(Primary::open(0, &primary, &error));
    OK(Module::load(primary, "litmus", kKernels, &module, &error));
    stream = new_stream();
    wrong = device(4);
  }
  Stream new_stream() {
    Entered entered(*primary);
    Stream made = nullptr;
    OK(checked(primary->driver().cuStreamCreate(&made, kStreamNonBlocking), "litmus", "a stream", &error));
    return made;
  }
  std::unique_ptr<DeviceMemory> device(uint64_t bytes) {
    std::unique_ptr<DeviceMemory> memory;
    OK(DeviceMemory::allocate(primary, bytes, &memory, &error));
    return memory;
  }
  std::unique_ptr<PinnedMemory> pinned(uint64_t bytes) {
    std::unique_ptr<PinnedMemory> memory;
    OK(PinnedMemory::allocate(primary, bytes, &memory, &error));
    return memory;
  }
  // Done when it returns: an upload alone may still be under way then, and streams of ours don't wait for it.
  template <class T>
  void upload(uint64_t to, const T *from, size_t count) {
    Entered entered(*primary);
    const Driver &d = primary->driver();
    OK(checked(d.cuMemcpyHtoDAsync(to, from, count * sizeof(T), stream), "litmus", "an upload", &error));
    OK(checked(d.cuStreamSynchronize(stream), "litmus", "an upload", &error));
  }
  template <class T>
  T download(uint64_t from) {
    T value;
    Entered entered(*primary);
    OK(checked(primary->driver().cuMemcpyDtoH(&value, from, sizeof value), "litmus", "a download", &error));
    return value;
  }
  template <class... Arguments>
  void launch_on(Stream on, Kernel kernel, unsigned blocks, unsigned threads, Arguments... arguments) {
    void *pointers[] = {&arguments...};
    OK(module->launch(kernel, blocks, threads, 0, on, pointers, &error));
  }
  template <class... Arguments>
  void launch(Kernel kernel, unsigned blocks, unsigned threads, Arguments... arguments) {
    launch_on(stream, kernel, blocks, threads, arguments...);
  }
  void finish(Stream of) {
    Entered entered(*primary);
    OK(checked(primary->driver().cuStreamSynchronize(of), "litmus", "waiting for the kernel", &error));
  }
  void finish() { finish(stream); }
  // What the kernels since the last call found wrong: their argument was wrong->address().
  int32_t found() {
    const auto code = download<int32_t>(wrong->address());
    const int32_t nothing = EPT_OK;
    upload(wrong->address(), &nothing, 1);
    return code;
  }
  void right() {
    finish();
    CHECK_EQ(found(), EPT_OK);
  }
};

// Keeps the memory system busy beside other kernels while it lives. Freeing memory waits for all kernels, so it must go
// before any memory does.
class Noise {
 public:
  explicit Noise(Gpu &gpu)
      : gpu_(gpu), stream_(gpu.new_stream()), memory_(gpu.device(kWords * 4)), stop_(gpu.pinned(8)) {
    gpu.launch_on(stream_, noise, 48, 256, memory_->address(), kWords, stop_->address(), kTimeout);
  }
  ~Noise() {
    std::atomic_ref<uint64_t>(*static_cast<uint64_t *>(stop_->host())).store(1);
    gpu_.finish(stream_);
  }
  Noise(const Noise &) = delete;
  Noise &operator=(const Noise &) = delete;

 private:
  static constexpr uint64_t kWords = 64 << 20;  // 256 MiB: past the L2
  Gpu &gpu_;
  Stream stream_;
  std::unique_ptr<DeviceMemory> memory_;
  std::unique_ptr<PinnedMemory> stop_;
};

inline ept_path mapped_path(uint64_t window, uint64_t bytes, uint64_t signals, uint32_t count = 1) {
  ept_path path{};
  path.kind = EPT_DEVICE_MAPPED;
  path.window = window;
  path.window_bytes = bytes;
  path.signals = signals;
  path.signal_count = count;
  return path;
}

// The parts of the program that go through a ring and its proxy: litmus_proxy.cc.
void through_the_ring(Gpu &gpu);
void through_the_ring_adversary(Gpu &gpu);
void peer_ends(Gpu &gpu);
void ranks_exchange(Gpu &gpu);
void rank_never_comes(Gpu &gpu);
void ways(Gpu &gpu);

}  // namespace litmus
