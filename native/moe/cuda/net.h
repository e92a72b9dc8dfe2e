// SPDX-License-Identifier: Apache-2.0
//
// net.h: a rank's lanes on a GPU over an engine, for the peers that no mapping reaches. The arena's lanes are a CPU
// rank's (memory, regions, signals and how they are agreed on), on the GPU (home.h) or pinned: kernels pack rows
// straight into a lane's staging and push a command, the proxy posts the write, and what peers write lands in the lane,
// where kernels read it. So a peer can't tell a GPU from a CPU.
//
// INVARIANTS
//  - Between Arena::create and the end of the lanes, and but for a reset, nobody but kernels, the engine and this
//    object's proxy thread touches them: no exchange is ever open in them.
//  - The proxy's number of a signal is lane * kSignals + signal_index, of a memory and a region the lane.
//  - What has been posted over a link is what the proxy has raised of it: a write that failed has raised nothing.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "cuda/proxy.h"
#include "moe/arena.h"
#include "moe/cuda/args.h"
#include "moe/cuda/gpu.h"

namespace ept::moe::cuda {

class Net {
 public:
  // `calls`: some rank is on a CPU, and may acknowledge by messages.
  Net(std::shared_ptr<Gpu> gpu, Arena &arena, bool calls);
  ~Net();
  Net(const Net &) = delete;
  Net &operator=(const Net &) = delete;

  // As kernels see them.
  ept_path path(uint32_t lane, uint32_t peer) const;
  char *memory(uint32_t lane) const { return pinned_[lane].memory; }
  uint64_t *words(uint32_t lane, uint32_t source) const { return pinned_[lane].words + source * Words::kEach; }
  const uint64_t *acks(uint32_t lane) const { return acks_ ? acks_ + uint64_t(lane) * world_ * EPT_PHASES : nullptr; }

  // Follower's, for lanes whose next generations are `next`, [lane][phase], while no kernel of this rank runs; and
  // those that all ranks go on with.
  std::shared_ptr<void> before_reset(const std::vector<std::array<uint64_t, EPT_PHASES>> &next,
                                     const Deadline &deadline);
  void after_reset(std::vector<std::array<uint64_t, EPT_PHASES>> &next);
  // Every write that kernels have asked for has ended.
  bool idle() const { return proxy_->quiesce(0); }
  // The arena's lanes are to lose their memory, and have one again.
  void let_go();
  void take_again();
  // Waits of kernels for that rank end with `code`, until the next reset. What is posted to it goes on.
  void end_waits(uint32_t rank, int32_t code) { proxy_->end_waits(rank, code); }
  // Since then, or since the start: the count of the signal that the source's next message raises it from.
  uint64_t taken(uint32_t lane, uint32_t source, uint32_t phase, uint32_t slot, uint32_t position) const;
  // Likewise of chunks of ours that the rank has granted.
  uint64_t granted(uint32_t lane, uint32_t rank, uint32_t phase) const;

 private:
  struct Pinned {
    char *memory = nullptr;
    void *host = nullptr;  // that was pinned for it
    uint64_t *words = nullptr;
  };
  void pin(uint32_t lane);
  void name_all();
  void pass_acks();
  void give_back();
  // A link that was made anew counts from 0, and the proxy goes on.
  void rebase();
  uint64_t &base(uint32_t rank, uint32_t signal) { return bases_[uint64_t(rank) * pinned_.size() * kSignals + signal]; }

  const std::shared_ptr<Gpu> gpu_;
  Arena &arena_;
  const uint32_t world_;
  std::vector<Pinned> pinned_;  // [lanes]
  void *pinned_ring_ = nullptr;
  void *ring_ = nullptr;
  uint64_t *acks_ = nullptr;             // [lanes, world, EPT_PHASES] pinned
  std::vector<uint64_t> bases_;          // [world, lanes, kSignals] of proxy_->raised
  std::vector<uint32_t> mine_, theirs_;  // [world] lives of the links that they are of
  std::mutex taking_acks_;
  uint64_t looked_ = 0;
  std::unique_ptr<ept::cuda::Proxy> proxy_;
};

}  // namespace ept::moe::cuda
