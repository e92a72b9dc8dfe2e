// SPDX-License-Identifier: Apache-2.0
//
// gpu.h: what the executor asks of a GPU: memory, copies while it is set up, and launches. The driver's
// (driver_gpu.cc), and a CPU's that stands in for it in tests.
#pragma once

#include <stdint.h>

#include <memory>
#include <string>

#include "cuda/memory.h"

struct ept_engine;

namespace ept::moe::cuda {

// Of a block where no number is asked for; and blocks of a rank, of which more bring nothing: a GPU's memory is busy
// with as many.
constexpr uint32_t kBlockThreads = 512, kEnoughBlocks = 132;

enum Kernel : uint32_t {
  kKernelDispatchSend,
  kKernelDispatchWait,
  kKernelDispatchRecv,
  kKernelDispatchClaims,
  kKernelCombineSend,
  kKernelCombineRecv,
  kKernelDrain,
  kKernelTakeMembers,
  kKernelLateSend,
  kKernelLateRecv,
  kKernelQuiet,
  kKernelTrial,
  kKernelStreamedDispatch,
  kKernelStreamedLate,
  kKernelStreamedCombine,
  kKernels
};
// As moe.cu names them, in that order.
extern const char *const kernel_names[kKernels];

struct Launch {
  uint32_t blocks, threads;
  uint64_t shared;  // bytes of it that a block uses
  uint64_t least;   // bytes of it that a block takes at least, so that it stands beside others (shared.h)
};

// Kernels that were compiled for one shape (args.h, fixed_or), loaded.
class Kernels {
 public:
  virtual ~Kernels() = default;
  // As the Gpu's.
  virtual uint32_t room(uint32_t threads, uint64_t shared) const = 0;
  virtual void launch(Kernel kernel, const Launch &as, void *stream, void *argument) = 0;
};

class Gpu {
 public:
  virtual ~Gpu() = default;
  // Throws where this GPU can't run the image, which is copied.
  virtual std::shared_ptr<Kernels> load(const void *image, uint64_t bytes) = 0;
  virtual int32_t ordinal() const = 0;
  // Of the GPU, the same in every process that sees it.
  virtual std::string identity() const = 0;
  // Streams of this process whose kernels never wait behind one another's.
  virtual uint32_t connections() const = 0;
  // Blocks of so many threads and bytes of shared memory that can be on the GPU at once, or on this process's share of
  // it.
  virtual uint32_t room(uint32_t threads, uint64_t shared) const = 0;
  // The most processes that have such a share each, of which no two meet (MPS); 1: there are no shares.
  virtual uint32_t shares() const { return 1; }

  // All of these throw Failure. Memory is zeroed. They are for set-up and reset: none is called in a step.
  virtual void *allocate(uint64_t bytes) = 0;
  virtual void release(void *memory) = 0;  // of allocate and allocate_shared
  virtual void *allocate_pinned(uint64_t bytes) = 0;
  virtual void release_pinned(void *memory) = 0;
  // Host memory that is there already, for kernels: where they see it. It is unpinned before it goes.
  virtual char *pin(void *host, uint64_t bytes) = 0;
  virtual void unpin(void *host) = 0;
  virtual void copy_in(void *to, const void *from, uint64_t bytes) = 0;
  virtual void copy_out(void *to, const void *from, uint64_t bytes) = 0;
  virtual void clear(void *memory, uint64_t bytes) = 0;
  virtual void synchronise(void *stream) = 0;
  // Until what is on the stream has ended; false: not by then (CLOCK_MONOTONIC, ns).
  virtual bool ends(void *stream, uint64_t deadline_ns) = 0;
  // A stream beside all others.
  virtual void *make_stream() = 0;
  virtual void end_stream(void *stream) = 0;
  // Memory for another process as well, what tells it, and the other end of it.
  virtual void *allocate_shared(uint64_t bytes, ept::cuda::Sharing sharing) = 0;
  virtual std::string share(void *memory) = 0;
  virtual void *open(const std::string &shared) = 0;
  virtual void close(void *opened) = 0;
  // All of such memory as a network with these caps takes it. Throws UNSUPPORTED where it can't.
  virtual void describe(void *memory, const ept_caps &caps, ept::cuda::Described *out) = 0;
  // Kernels that have seen a signal see what a NIC wrote into this GPU's memory before it was raised.
  virtual bool orders_network() const = 0;

  // Waits for nothing; allowed during a capture.
  virtual void launch(Kernel kernel, const Launch &as, void *stream, void *argument) = 0;
};

// This rank's part of a symmetric heap, into which peers' kernels put through a device library (NVSHMEM): memory that
// was allocated in the same calls stands at the same place of every rank's part. All throw Failure.
class Heap {
 public:
  virtual ~Heap() = default;
  // Every rank makes the same calls in the same order; waits for none of them. Not zeroed.
  virtual char *allocate(uint64_t bytes) = 0;
  virtual void release(char *memory) = 0;
  // Where this rank's part begins.
  virtual char *base() const = 0;
  // That rank's number in the device library.
  virtual uint32_t number(uint32_t rank) const = 0;
  // Where that rank's part is in this GPU's address space; NULL: it isn't.
  virtual char *mapped(uint32_t rank) const = 0;
};

// A GPU, and the heap where its kernels are linked with a device library.
struct Opened {
  template <class G>
  Opened(std::shared_ptr<G> its, std::shared_ptr<Heap> with = nullptr) : gpu(std::move(its)), heap(std::move(with)) {}
  Opened() = default;
  std::shared_ptr<Gpu> gpu;
  std::shared_ptr<Heap> heap;
};

// Throws UNAVAILABLE where there is no driver, or the library was built without kernels; INVALID: no such device.
std::shared_ptr<Gpu> driver_gpu(int32_t ordinal);
// The same, over an engine whose backend has a device half (device_half.h): with its kernels and its heap.
Opened driver_gpu(int32_t ordinal, ept_engine *engine);

}  // namespace ept::moe::cuda
