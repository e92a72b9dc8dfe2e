// SPDX-License-Identifier: Apache-2.0
//
// lanes.h: the memory of one rank's lanes on a GPU, and the tables by which kernels find it and the peers'.
//
//   one allocation, which every peer that maps it has in its address space
//   +--------+--------+--- ... ---+-----------------------------------------+
//   | lane 0 | lane 1 |           | signals: uint64_t[lane][source][4]      |
//   +--------+--------+--- ... ---+-----------------------------------------+
// A lane of it is the receive half of layout.h, for messages of this rank and of peers that map it. Those of other
// peers come to the arena's lanes, and leave from them (net.h).
#pragma once

#include <array>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "eptransport/gpu.h"
#include "moe/cuda/args.h"
#include "moe/cuda/gpu.h"
#include "moe/cuda/net.h"
#include "moe/object.h"

namespace ept::moe::cuda {

class Lanes {
 public:
  Lanes(std::shared_ptr<Gpu> gpu, const ept_gpu_config &config, const ept_moe_config &moe);
  // Over the arena's engine, where some pair of `places` can't map each other's memory.
  Lanes(std::shared_ptr<Gpu> gpu, const ept_gpu_config &config, std::shared_ptr<Arena> arena,
        std::vector<Place> places);
  ~Lanes();
  Lanes(const Lanes &) = delete;
  Lanes &operator=(const Lanes &) = delete;

  std::string exported() const;
  void connect(uint32_t rank, const std::string &blob);
  // No memory of that rank is mapped.
  void know(uint32_t rank) { peers_[rank].known = true; }
  void start();
  // Collective. LATER: the membership moves; learn of it and call again. Never without an engine, which asks for
  // barriers of the caller's.
  int32_t reset(uint64_t timeout_ns);
  // Throws INVALID, with the values, for an object that needs more than these have; UNSUPPORTED, what no lanes could
  // do.
  void fit(const Object &object) const;
  static void refuse(const Object &object);
  void check(uint32_t lane) const;

  const LaneTable &table(uint32_t lane) const { return tables_[lane]; }
  // Device timestamps of what is launched from now on: times_of(blocks, world) words for each lane, or NULL.
  void write_times(uint64_t *times);
  uint32_t lanes() const { return count_; }
  uint32_t rank() const { return rank_; }
  uint32_t world() const { return world_; }
  uint32_t blocks() const { return blocks_; }
  uint32_t threads() const { return threads_; }
  bool over_engine() const { return net_ != nullptr; }
  // That rank's memory is in this GPU's address space; else what goes there goes through the engine.
  bool maps(uint32_t rank) const { return rank == rank_ || peers_[rank].base; }
  bool shares_process() const { return ranks_here_ > 1; }
  Gpu &gpu() const { return *gpu_; }

 private:
  struct Peer {
    char *base = nullptr;
    void *opened = nullptr;  // by Gpu::open
    bool known = false, same_gpu = false, same_process = false;
  };
  // What kernels keep of a lane from step to step.
  struct Kept {
    LaneState *state;
    uint32_t *done;
    uint64_t *tickets, *offsets, *heard, *lands;
  };
  Lanes(std::shared_ptr<Gpu> gpu, const ept_gpu_config &config, uint32_t world, uint32_t rank, uint32_t count,
        const LaneMap &map);
  void begin_at(const std::vector<std::array<uint64_t, EPT_PHASES>> &next);
  void meet(const Deadline &deadline);

  uint64_t signals_at() const { return count_ * lane_bytes_; }
  uint64_t bytes() const { return signals_at() + uint64_t(count_) * world_ * kSignals * sizeof(uint64_t); }
  void choose_blocks();

  const std::shared_ptr<Gpu> gpu_;
  const ept_gpu_config config_;
  const uint32_t world_, rank_, count_;
  const LaneMap map_;
  const uint64_t lane_bytes_;
  uint32_t blocks_ = 0, ranks_here_ = 1;
  const uint32_t threads_;
  std::vector<Peer> peers_;
  char *memory_ = nullptr;
  char *own_ = nullptr;  // tables, and what kernels write that no peer sees
  uint64_t own_bytes_ = 0, kept_bytes_ = 0;
  std::vector<Kept> kept_;
  std::vector<LaneTable> tables_;
  Told *told_ = nullptr;
  std::shared_ptr<Arena> arena_;
  std::vector<Place> places_;
  uint64_t meetings_ = 0;
  std::unique_ptr<Net> net_;
};

using Open = std::function<std::shared_ptr<Gpu>(int32_t ordinal)>;
// Collective with Arena::create on every rank, of a GPU or not. NULL: all ranks map each other's memory, and lanes are
// made by themselves. `known`: of an earlier AllToAll of the arena, and then they are the lanes of this one too.
std::shared_ptr<Lanes> join(std::shared_ptr<Arena> arena, const ept_gpu_config &config, const ept_moe_config &moe,
                            std::shared_ptr<Lanes> known, Open open, uint32_t *number);

// What one AllToAll is, on the GPU.
class GpuObject {
 public:
  GpuObject(std::shared_ptr<Lanes> lanes, const ept_moe_config &config, uint32_t number);
  ~GpuObject();
  GpuObject(const GpuObject &) = delete;
  GpuObject &operator=(const GpuObject &) = delete;

  const std::shared_ptr<Lanes> lanes;
  Object object;
  ObjectTable table{};
  // What a lane's dispatch under way carries, for its receiving half.
  struct Carried {
    uint32_t scale_size = 0, scale_bytes = 0;
    int32_t scale_format = 0;
  };
  std::vector<Carried> carried;

 private:
  uint32_t *memory_ = nullptr;
};

}  // namespace ept::moe::cuda

struct ept_gpu_lanes {
  std::shared_ptr<ept::moe::cuda::Lanes> lanes;
};
struct ept_gpu_moe {
  std::unique_ptr<ept::moe::cuda::GpuObject> object;
};
