// SPDX-License-Identifier: Apache-2.0
//
// lanes.h: the memory of one rank's lanes on a GPU, and the tables by which kernels find it and the peers'.
//
//   one allocation, which every peer has in its address space
//   +--------+--------+--- ... ---+-----------------------------------------+
//   | lane 0 | lane 1 |           | signals: uint64_t[lane][source][4]      |
//   +--------+--------+--- ... ---+-----------------------------------------+
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "eptransport/gpu.h"
#include "moe/cuda/args.h"
#include "moe/cuda/gpu.h"
#include "moe/object.h"

namespace ept::moe::cuda {

class Lanes {
 public:
  Lanes(std::shared_ptr<Gpu> gpu, const ept_gpu_config &config, const ept_moe_config &moe);
  ~Lanes();
  Lanes(const Lanes &) = delete;
  Lanes &operator=(const Lanes &) = delete;

  std::string exported() const;
  void connect(uint32_t rank, const std::string &blob);
  void start();
  void reset();
  // Throws INVALID, with the values, for an object that needs more than these have.
  void fit(const Object &object) const;
  void check(uint32_t lane) const;

  const LaneTable *table(uint32_t lane) const { return tables_ + lane; }
  uint32_t lanes() const { return count_; }
  uint32_t rank() const { return rank_; }
  uint32_t world() const { return world_; }
  uint32_t blocks() const { return blocks_; }
  uint32_t threads() const { return threads_; }
  Gpu &gpu() const { return *gpu_; }

 private:
  struct Peer {
    char *base = nullptr;
    void *opened = nullptr;  // by Gpu::open
    bool known = false, same_gpu = false;
  };
  uint64_t signals_at() const { return count_ * lane_bytes_; }
  uint64_t bytes() const { return signals_at() + uint64_t(count_) * world_ * kSignals * sizeof(uint64_t); }
  void choose_blocks();

  const std::shared_ptr<Gpu> gpu_;
  const ept_gpu_config config_;
  const uint32_t world_, rank_, count_;
  const LaneMap map_;
  const uint64_t lane_bytes_;
  uint32_t blocks_ = 0;
  const uint32_t threads_;
  std::vector<Peer> peers_;
  char *memory_ = nullptr;
  char *own_ = nullptr;  // tables, and what kernels write that no peer sees
  uint64_t own_bytes_ = 0, kept_bytes_ = 0;
  LaneTable *tables_ = nullptr;
  Told *told_ = nullptr;
};

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
