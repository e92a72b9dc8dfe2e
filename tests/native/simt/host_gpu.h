// SPDX-License-Identifier: Apache-2.0
//
// host_gpu.h: a Gpu (native/moe/cuda/gpu.h) whose memory is the host's and whose kernels are fibers.
#pragma once

#include <atomic>
#include <map>
#include <mutex>
#include <set>

#include "machine.h"
#include "moe/cuda/gpu.h"
#include "moe/cuda/shared.h"

namespace simt {

class HostGpu final : public ept::moe::cuda::Gpu {
 public:
  HostGpu(uint64_t seed, uint32_t room) : machine(seed), room_(room) {}
  ~HostGpu() override;

  // Images are a GPU's; fibers run what they were compiled with.
  std::shared_ptr<ept::moe::cuda::Kernels> load(const void *, uint64_t) override { return nullptr; }
  int32_t ordinal() const override { return 0; }
  std::string identity() const override { return "GPU of fibers   "; }
  uint32_t connections() const override { return streams; }
  uint32_t shares() const override { return shared_by; }
  uint32_t room(uint32_t threads, uint64_t shared) const override {
    return uint32_t(room_ * ept::moe::cuda::least_shared(threads) / shared);
  }
  void *allocate(uint64_t bytes) override;
  void release(void *memory) override;
  void *allocate_pinned(uint64_t bytes) override { return allocate(bytes); }
  void release_pinned(void *memory) override { release(memory); }
  char *pin(void *host, uint64_t) override {
    pins++;
    pinned++;
    return static_cast<char *>(host);
  }
  void unpin(void *) override { pinned--; }
  void copy_in(void *to, const void *from, uint64_t bytes) override;
  void copy_out(void *to, const void *from, uint64_t bytes) override { copy_in(to, from, bytes); }
  void clear(void *memory, uint64_t bytes) override;
  // A reset's, by each rank's thread; all else is by one.
  void synchronise(void *) override {
    const std::lock_guard<std::mutex> lock(running_);
    machine.run();
  }
  bool ends(void *, uint64_t deadline_ns) override {
    const std::lock_guard<std::mutex> lock(running_);
    return machine.run(deadline_ns);
  }
  void *make_stream() override { return allocate(1); }
  void end_stream(void *stream) override { release(stream); }
  void *allocate_shared(uint64_t bytes, ept::cuda::Sharing) override;
  std::string share(void *) override { return {}; }
  void *open(const std::string &) override { return nullptr; }  // all its ranks are of one process
  void close(void *) override {}
  void describe(void *memory, const ept_caps &caps, ept::cuda::Described *out) override;
  bool orders_network() const override { return orders; }
  void launch(ept::moe::cuda::Kernel kernel, const ept::moe::cuda::Launch &as, void *stream, void *argument) override;

  // What was launched while `records` pointed here, to be launched again as a captured graph is.
  struct Launched {
    ept::moe::cuda::Kernel kernel;
    ept::moe::cuda::Launch as;
    void *stream;
    std::vector<char> argument;
  };
  void replay(const std::vector<Launched> &graph) {
    for (Launched each : graph) launch(each.kernel, each.as, each.stream, each.argument.data());
  }

  Machine machine;
  std::vector<Launched> *records = nullptr;
  std::map<uint32_t, std::set<uint64_t>> took;  // by threads of a block, the bytes of shared memory of all launches
  bool is_full = false;                         // no memory for peers or networks is left
  size_t shown() {                              // allocations that peers or networks are shown
    const std::lock_guard<std::mutex> lock(sharing_);
    return shared.size();
  }
  std::atomic<uint32_t> allocations = 0;
  uint32_t streams = 32;   // kept apart
  uint32_t shared_by = 1;  // processes that have a share of it each
  bool orders = true;
  std::atomic<uint32_t> pins = 0;      // of host memory, so far
  std::atomic<int32_t> pinned = 0;     // of which still are
  std::atomic<int32_t> described = 0;  // to a network last: the kind of memory; 0: none
  std::map<void *, uint64_t> shared;   // that peers or networks are shown, and its bytes

 private:
  const uint32_t room_;
  std::atomic<uint32_t> held_ = 0;
  std::mutex sharing_, running_;
};

}  // namespace simt
