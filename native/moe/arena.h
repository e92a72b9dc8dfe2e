// SPDX-License-Identifier: Apache-2.0
//
// arena.h: the lanes of one engine, shared by all its AllToAlls, and the collective calls that set them up.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "moe/control.h"
#include "moe/cpu/pool.h"
#include "moe/lane.h"

namespace ept::moe {

// A lane's registered memory.
class LaneMemory {
 public:
  LaneMemory(ept_engine *engine, uint64_t bytes);
  ~LaneMemory();
  LaneMemory(const LaneMemory &) = delete;
  LaneMemory &operator=(const LaneMemory &) = delete;

  char *base() const { return base_; }
  ept_memory_id id() const { return id_; }

 private:
  ept_engine *engine_;
  char *base_ = nullptr;
  uint64_t bytes_ = 0;
  ept_memory_id id_ = 0;
};

struct Arena {
  explicit Arena(ept_engine *engine);
  ~Arena();

  ept_engine *const engine;
  uint32_t rank = 0, world = 0;
  uint32_t epoch = 0;
  uint64_t timeout_ns = 0;
  LaneMap map = {0, 0, 0, 0};
  Pool pool;
  std::vector<std::unique_ptr<Lane>> lanes;  // grows under `collective`, and with every lane held

  // Collective calls: one at a time.
  // `its_lanes`: the lanes of the new object, which live as long as the arena.
  std::shared_ptr<Object> create(const ept_moe_config &config, std::vector<Lane *> &its_lanes);
  void reset(uint64_t timeout_ns);
  void close(uint64_t timeout_ns);
  bool closed() const { return closed_; }

 private:
  using Holds = std::vector<std::unique_ptr<Lane::Held>>;
  struct Growth;
  struct Reset;
  std::shared_ptr<Object> agree(const ept_moe_config &config, const Deadline &deadline);
  Holds until_idle(const Deadline &deadline);
  void grow(const LaneMap &larger, uint32_t lanes, const Deadline &deadline);

  std::mutex collective_;
  std::vector<std::unique_ptr<LaneMemory>> memories_;  // [lanes]
  uint64_t attempts_ = 0;                              // collective calls so far
  uint64_t resets_ = 0;
  std::vector<uint64_t> reset_seen_;  // [world] the peer's reset that was the last to end well
  uint32_t objects_ = 0;
  std::atomic<bool> closed_{false};
};

}  // namespace ept::moe
