// SPDX-License-Identifier: Apache-2.0
//
// trial.h: both ways to the ranks that this one's kernels could put to, on its GPU: a piece of the symmetric heap, and
// a lane over the engine (net.h), of the same layout, with tables by which one kernel posts over either as a send does
// (trial.cuh).
#pragma once

#include <memory>
#include <vector>

#include "eptransport/gpu.h"
#include "moe/cuda/args.h"
#include "moe/cuda/gpu.h"
#include "moe/cuda/net.h"
#include "moe/side.h"

namespace ept::moe::cuda {

class GpuTrial final : public ept::moe::Trial {
 public:
  // Nothing is measured where this rank's kernels put to nobody.
  GpuTrial(Opened opened, const ept_gpu_config &config, Arena &tried, const std::vector<Place> &places,
           const uint64_t (&lengths)[kLengths], const Deadline &deadline);
  ~GpuTrial() override;
  GpuTrial(const GpuTrial &) = delete;
  GpuTrial &operator=(const GpuTrial &) = delete;

  void launch(Way way, uint32_t length) override;
  void await(Way way, uint32_t length) override;
  Figures figures() const override { return figures_; }

 private:
  struct Tables;
  void fill(Way way, const Tables &at);
  void give_back();
  void end_waits(int32_t code);
  void look_at_peers();

  const Opened opened_;
  const ept_gpu_config config_;
  Arena &arena_;
  const std::vector<Place> places_;
  const Deadline deadline_;
  uint64_t lengths_[kLengths];
  std::vector<uint32_t> peers_;
  uint32_t blocks_ = 0, threads_ = 0;
  std::unique_ptr<Net> net_;
  char *heap_ = nullptr, *own_ = nullptr;
  Told *told_ = nullptr;                     // [kWays]
  ept_device_progress *progress_ = nullptr;  // [world]
  uint64_t *took_ = nullptr;
  uint64_t next_[kWays] = {};  // generation
  LaneTable tables_[kWays] = {};
  void *stream_ = nullptr;
  bool under_way_ = false;
  Figures figures_;
};

}  // namespace ept::moe::cuda
