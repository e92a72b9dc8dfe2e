// SPDX-License-Identifier: Apache-2.0
//
// join.cc: a GPU rank's part in making an AllToAll: it says where it is, and makes its lanes or takes those it has.
#include <string.h>

#include "engine/boot.h"
#include "moe/cuda/home.h"
#include "moe/cuda/lanes.h"
#include "moe/cuda/trial.h"
#include "moe/fail.h"

namespace ept::moe::cuda {

namespace {

// What this rank brings to Arena::create.
class GpuSide final : public Side {
 public:
  GpuSide(std::shared_ptr<Arena> arena, const ept_gpu_config &config, const ept_moe_config &moe,
          std::shared_ptr<Lanes> known, Open open)
      : lanes(std::move(known)), arena_(std::move(arena)), config_(config), moe_(moe), open_(std::move(open)) {}

  Place place() override {
    opened_ = lanes ? lanes->opened() : open_(config_.device);
    const std::string identity = opened_.gpu->identity();
    Lanes::refuse(Object(moe_));
    Place place;
    place.on_gpu = 1;
    place.process = config_.process;
    identity.copy(place.gpu, sizeof place.gpu);
    // Who can't be told from another machine is reached through the engine.
    if (config_.mapped) ept::boot_id().copy(place.machine, sizeof place.machine - 1);
    memcpy(place.node, config_.node, sizeof place.node);
    place.initiates = opened_.heap && puts();
    if (measures()) place.weighs |= Place::kMeasures;
    if (lanes && lanes->over_engine() && !lanes->initiates()) place.weighs |= Place::kKeepsProxy;
    return place;
  }
  std::unique_ptr<Trial> trial(Arena &tried, const std::vector<Place> &places, const uint64_t (&lengths)[kLengths],
                               const Deadline &deadline) override {
    return std::make_unique<GpuTrial>(opened_, config_, tried, places, lengths, deadline);
  }
  void chose(const std::string &how) override { how_ = how; }
  std::unique_ptr<LaneMemory> lane_memory(Arena &arena, uint64_t bytes) override {
    return device_home(opened_.gpu, arena.engine, Home(config_.memory), bytes, &home_);
  }
  std::string offer(Arena &, const std::vector<Place> &places) override {
    places_ = places;
    if (lanes && lanes->over_engine() == all_direct(places)) lanes = nullptr;
    if (lanes) return {};
    lanes = std::make_shared<Lanes>(opened_, config_, moe_, arena_, places);
    if (lanes->over_engine()) lanes->home = home_;  // else it is of lanes that were tried
    fresh_ = true;
    return lanes->exported();
  }
  void accept(const std::vector<std::string> &offers) override {
    if (!fresh_) return;
    for (uint32_t r = 0; r < offers.size(); r++)
      if (places_[r].known == 1 && (r == arena_->rank || direct(places_[r], places_[arena_->rank])))
        lanes->connect(r, offers[r]);  // others are met in the reset that takes this rank in
    lanes->start();
  }
  const std::string &how() const { return how_; }

  std::shared_ptr<Lanes> lanes;

 private:
  // Alike on every rank, as config and settings are.
  bool measures() const { return config_.path == EPT_GPU_PATH_AUTO && !config_.crossover_bytes; }
  bool puts() const {
    if (config_.path != EPT_GPU_PATH_AUTO) return config_.path == EPT_GPU_PATH_GPU;
    return measures() || Object(moe_).message(EPT_PHASE_DISPATCH) <= config_.crossover_bytes;
  }
  const std::shared_ptr<Arena> arena_;
  const ept_gpu_config config_;
  const ept_moe_config moe_;
  const Open open_;
  Opened opened_;
  std::vector<Place> places_;
  std::string home_, how_;
  bool fresh_ = false;
};

}  // namespace

std::shared_ptr<Lanes> join(std::shared_ptr<Arena> arena, const ept_gpu_config &config, const ept_moe_config &moe,
                            std::shared_ptr<Lanes> known, Open open, uint32_t *number) {
  GpuSide side(arena, config, moe, std::move(known), std::move(open));
  std::vector<Lane *> its;
  const std::shared_ptr<Object> object = arena->create(moe, its, &side);
  *number = object->number;
  side.lanes->way = side.how();
  return side.lanes;
}

}  // namespace ept::moe::cuda
