// SPDX-License-Identifier: Apache-2.0
//
// lanes.h: the memory of one rank's lanes on a GPU, and the tables by which kernels find it and the peers'.
//
//   one allocation, which every peer that maps it has in its address space; or in a symmetric heap (gpu.h), where
//   peers' kernels put, and then each lane has its send half too
//   +--------+--------+--- ... ---+-----------------------------------------+
//   | lane 0 | lane 1 |           | signals: uint64_t[lane][source][4]      |
//   +--------+--------+--- ... ---+-----------------------------------------+
// A lane of it is the receive half of layout.h, for messages of this rank and of peers that map it. Those of other
// peers come to the arena's lanes, and leave from them (net.h).
//
// WHO TAKES PART. The host knows (mask.cc); kernels go by tables in device memory that stand still while one of the
// lane's runs. So a change comes to a lane as a launch on its stream (take_members), before the step that it is for:
// then all blocks of a step have one set, and captured graphs that are replayed later have it too. A step takes the
// set at dispatch_send and keeps it (args.h, MemberSet). Waits for a rank that takes no part any more, or that has gone
// on to a reset, end at once: the host writes it into the status of the rank's path.
#pragma once

#include <array>
#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "eptransport/gpu.h"
#include "moe/cuda/args.h"
#include "moe/cuda/counts.h"
#include "moe/cuda/gpu.h"
#include "moe/cuda/net.h"
#include "moe/object.h"

namespace ept::moe::cuda {

class Lanes final : public Follower {
 public:
  // Over the arena's engine, where some pair of `places` has no other way: then as large as its lanes.
  // Else as `moe` needs them.
  Lanes(Opened opened, const ept_gpu_config &config, const ept_moe_config &moe, std::shared_ptr<Arena> arena,
        std::vector<Place> places);
  ~Lanes() override;
  Lanes(const Lanes &) = delete;
  Lanes &operator=(const Lanes &) = delete;

  std::string exported() const;
  void connect(uint32_t rank, const std::string &blob);
  // Those that map each other are connected, as far as they take part.
  void start();
  // With no kernel of these lanes under way, collective with Arena::reset: which it is.
  int32_t reset(uint64_t timeout_ns) { return arena_->reset(timeout_ns); }
  // Before a step begins in that lane: launches what brings the present membership to it, if it has another. Throws as
  // members_of_step, and FAULT where a reset has begun and not ended well. `captures`: the stream is, and nothing can
  // be launched that is not part of the graph.
  void take_members(uint32_t lane, bool captures, void *stream);
  // The routing of a dispatch under `membership` is to be summed: throws, and faults the lane, where that is past.
  void refuse_old(uint32_t lane, uint32_t membership, void *stream);
  std::shared_ptr<const Members> members() const { return arena_->members(); }

  void follow() override;
  uint64_t step() override;
  std::shared_ptr<void> before_reset(const Deadline &deadline) override;
  void after_reset(uint64_t number, uint32_t index, const Deadline &deadline) override;
  void refuse_sleep() const override;
  Rest rest() override;
  void fall_asleep() override;
  void let_go() override;
  std::unique_ptr<LaneMemory> lane_memory(uint64_t bytes) override;
  std::string wake() override;
  bool expects(uint32_t rank) const override { return places_[rank].known && places_[rank].on_gpu; }
  void meet_again(const std::vector<std::string> &offers, const Members &with) override;
  void awake() override;
  // SUSPENDED where the arena is.
  void refuse_suspended() const { arena_->refuse_suspended(); }
  // Throws INVALID, with the values, for an object that needs more than these have; UNSUPPORTED, what no lanes could
  // do.
  void fit(const Object &object) const;
  static void refuse(const Object &object);
  void check(uint32_t lane) const;

  const LaneTable &table(uint32_t lane) const { return tables_[lane]; }
  // Device memory that kernels leave at 0, and that a reset clears after one that hasn't: added, and taken out again.
  void keep_clear(void *memory, uint64_t bytes) { cleared_.emplace_back(memory, bytes); }
  void keep_no_more(const void *memory);
  // Device timestamps of what is launched from now on: times_of(blocks, world) words for each lane, or NULL.
  void write_times(uint64_t *times);
  uint32_t lanes() const { return count_; }
  uint32_t rank() const { return rank_; }
  uint32_t world() const { return world_; }
  uint32_t blocks() const { return blocks_; }
  uint32_t threads() const { return threads_; }
  // Bytes of shared memory that each launch of so many threads takes at least.
  uint64_t shared(uint32_t threads) const;
  // Throws where such kernels would not all be on the GPU at once (choose_blocks).
  void refuse_wider(const Kernels &kernels) const;
  // Of a combine of so many tokens here.
  uint32_t combine_threads(uint64_t tokens) const;
  bool over_engine() const { return net_ != nullptr; }
  // That rank's memory is in this GPU's address space; else what goes there goes through the engine.
  bool maps(uint32_t rank) const { return rank == rank_ || peers_[rank].base; }
  // This rank's kernels put into its memory through a device library.
  bool initiates(uint32_t rank) const { return peers_[rank].initiated; }
  bool initiates() const { return heap_ != nullptr; }  // to some rank
  // Puts so far by kernels that have ended, since the start or the last reset.
  uint64_t puts() const;
  bool shares_process() const { return ranks_here_ > 1; }
  Gpu &gpu() const { return *gpu_; }
  Opened opened() const { return {gpu_, offered_}; }
  // Whoever will raise no signal more ends the waits for it: by what the others say, and by what the engine sees, which
  // carries nothing between ranks that map each other but knows when a process is gone.
  void watch();
  // Where the lanes over the engine stand, and why (home.h); empty where there are none.
  std::string home;
  // How the last AllToAll that joined came to its way to ranks that kernels could put to, where both were measured.
  std::string way;

 private:
  struct Peer {
    char *base = nullptr;
    void *opened = nullptr;  // by Gpu::open
    std::string blob;        // what it was opened by
    bool same_gpu = false, same_process = false;
    bool initiated = false;  // by the heap
  };
  // What kernels keep of a lane from step to step.
  struct Kept {
    LaneState *state;
    uint32_t *done, *claimed;
    uint64_t *tickets, *offsets, *heard, *lands;
    uint8_t *out;
  };
  void begin_at(const std::vector<std::array<uint64_t, EPT_PHASES>> &next);
  void meet(uint64_t tag, bool tell, const Deadline &deadline);
  void allocate();
  void give_back();
  void let_go_of_peers();
  void lay(char *begin);
  void fill_peer(uint32_t lane, uint32_t rank);
  void launch_members(uint32_t lane, const Members &members, uint32_t code, int32_t peer, void *stream);
  template <class T>
  T *in_image(T *at) {
    return reinterpret_cast<T *>(image_.data() + (reinterpret_cast<char *>(at) - own_));
  }

  uint64_t signals_at() const { return count_ * lane_bytes_; }
  uint64_t bytes() const { return signals_at() + uint64_t(count_) * world_ * kSignals * sizeof(uint64_t); }
  uint32_t sharers() const;  // lanes whose kernels have this process's multiprocessors at the same time
  void choose_blocks();

  const std::shared_ptr<Gpu> gpu_;
  const std::shared_ptr<Heap> offered_, heap_;  // the second one NULL where no pair needs it
  const ept_gpu_config config_;
  const uint32_t world_, rank_, count_;
  const LaneMap map_;
  const uint64_t lane_bytes_;
  uint32_t blocks_ = 0, ranks_here_ = 1;
  const uint32_t threads_;
  const uint64_t besides_;  // least_shared's, of the AllToAll that they were made for
  bool wide_ = false;       // blocks of kWide threads would all be on the GPU at once, too
  std::vector<Peer> peers_;
  char *memory_ = nullptr;
  char *own_ = nullptr;  // tables, and what kernels write that no peer sees
  uint64_t own_bytes_ = 0, kept_bytes_ = 0;
  std::vector<Kept> kept_;
  uint64_t *no_words_ = nullptr;        // [kSignals] signals of nobody: 0 for ever
  std::vector<char> asleep_, counted_;  // while suspended: what kernels keep, and the signals
  std::vector<LaneTable> tables_;
  Told *told_ = nullptr;
  std::vector<char> image_;  // of what stands in own_ behind what kernels keep
  std::vector<ept_path *> paths_;
  std::vector<uint64_t **> words_;
  std::vector<char **> in_;
  ept_device_progress *progress_ = nullptr;  // [world] of peers that are mapped; pinned
  std::mutex following_;                     // progress_ is written
  bool stuck_ = false;                       // a reset gave up waiting for a kernel
  std::atomic<bool> whole_{true};            // false: from a reset's begin until one ends well
  std::vector<uint32_t> taken_;              // [lanes] the membership that the lane has, as far as was launched
  std::vector<std::pair<void *, uint64_t>> cleared_;
  const std::shared_ptr<Arena> arena_;
  std::vector<Place> places_;
  std::unique_ptr<Net> net_;
};

using Open = std::function<Opened(int32_t ordinal)>;
// Collective with Arena::create on every rank, of a GPU or not. `known`: of an earlier AllToAll of the arena; they are
// the lanes of this one too, unless peers are reached in another way now.
std::shared_ptr<Lanes> join(std::shared_ptr<Arena> arena, const ept_gpu_config &config, const ept_moe_config &moe,
                            std::shared_ptr<Lanes> known, Open open, uint32_t *number);

// What one AllToAll is, on the GPU.
class GpuObject {
 public:
  // `image`: kernels for this shape alone, or empty: the GPU's.
  GpuObject(std::shared_ptr<Lanes> lanes, const ept_moe_config &config, uint32_t number, const std::string &image = {});
  ~GpuObject();
  GpuObject(const GpuObject &) = delete;
  GpuObject &operator=(const GpuObject &) = delete;

  const std::shared_ptr<Lanes> lanes;
  std::shared_ptr<Kernels> kernels;  // NULL: the GPU's
  Object object;
  ObjectTable table{};
  // What a lane's dispatch under way carries, for its receiving half.
  struct Carried {
    uint32_t scale_size = 0, scale_bytes = 0;
    int32_t scale_format = 0;
  };
  std::vector<Carried> carried;
  // Where calls may be streamed: what a lane's first launches were told, for the second ones, which send the rest.
  struct Begun {
    DispatchSend dispatch{};
    CombineSend combine{};
  };
  std::vector<Begun> begun;
  bool streams() const { return object.shape.streams(); }
  // ChunkState of a lane's phase.
  char *chunk_state(uint32_t lane, uint32_t phase) const {
    return chunks_ + (lane * EPT_PHASES + phase) * chunk_bytes_;
  }
  // As ept_moe_stats_get: of kernels that have ended.
  void stats(ept_moe_stats *stats);
  // Where a lane's counts are mirrored, and what stands there; false: nothing yet.
  CountsPage *page(uint32_t lane) const {
    return reinterpret_cast<CountsPage *>(pages_ + lane * CountsPage::bytes(object.local()));
  }
  bool counts(uint32_t lane, ept_gpu_counts *counts, int32_t *per_expert) const;

 private:
  std::mutex reading_;
  std::vector<uint64_t> sent_;
  uint32_t *memory_ = nullptr;
  char *pages_ = nullptr;  // [lanes] CountsPage, pinned
  char *chunks_ = nullptr;
  uint64_t chunk_bytes_ = 0;
};

}  // namespace ept::moe::cuda

struct ept_gpu_lanes {
  std::shared_ptr<ept::moe::cuda::Lanes> lanes;
};
struct ept_gpu_moe {
  std::unique_ptr<ept::moe::cuda::GpuObject> object;
};
