// SPDX-License-Identifier: Apache-2.0
//
// arena.h: the lanes of one engine, shared by all its AllToAlls, and the collective calls that set them up.
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "engine/metrics.h"
#include "engine/spans.h"
#include "moe/control.h"
#include "moe/cpu/pool.h"
#include "moe/lane.h"
#include "moe/members.h"
#include "moe/reports.h"
#include "moe/side.h"

namespace ept::moe {

// A lane's registered memory.
class LaneMemory {
 public:
  LaneMemory(ept_engine *engine, uint64_t bytes);
  // A GPU's, which no CPU may touch; `owned` is let go of when nobody uses it any more.
  LaneMemory(ept_engine *engine, const ept_memory &described, std::shared_ptr<void> owned);
  ~LaneMemory();
  LaneMemory(const LaneMemory &) = delete;
  LaneMemory &operator=(const LaneMemory &) = delete;

  char *base() const { return base_; }
  ept_memory_id id() const { return id_; }
  bool on_gpu() const { return owned_ != nullptr; }

 private:
  ept_engine *engine_;
  std::shared_ptr<void> owned_;
  char *base_ = nullptr;
  uint64_t bytes_ = 0;
  ept_memory_id id_ = 0;
};

struct Arena {
  explicit Arena(ept_engine *engine);
  ~Arena();

  ept_engine *const engine;
  Metrics &metrics;
  Spans *const spans;  // NULL: no trace is taken
  uint32_t rank = 0, world = 0;
  std::atomic<uint32_t> epoch{0};  // the life of this rank
  uint64_t timeout_ns = 0;
  LaneMap map = {0, 0, 0, 0};
  Pool pool;
  std::vector<std::unique_ptr<Lane>> lanes;  // grows under `collective`, and with every lane held

  // Collective calls: one at a time.
  // `its_lanes`: the lanes of the new object, which live as long as the arena. `side`: of a rank whose kernels will
  // drive them. Where all ranks are such and need no engine between them, there is one of next to no bytes for all
  // objects, which carries resets and no steps.
  std::shared_ptr<Object> create(const ept_moe_config &config, std::vector<Lane *> &its_lanes, Side *side = nullptr);
  // LATER: the membership moves; learn of it and call again.
  int32_t reset(uint64_t timeout_ns);
  void close(uint64_t timeout_ns);
  void suspend(uint64_t timeout_ns);
  void resume(uint64_t timeout_ns);
  bool closed() const { return closed_; }
  // SUSPENDED from suspend until resume.
  void refuse_suspended() const;

  // ---- who takes part (mask.cc) ----
  // As agreed above, in the order of epochs; an older one than the last is ignored. `step`: the lanes go on with a
  // generation not below it after the next reset.
  void set_members(uint32_t epoch, const uint8_t *active, uint64_t step);
  std::shared_ptr<const Members> members() const;
  // The same for a step or a set-up that begins: FAULT where a rank has come back and no reset has taken it in.
  std::shared_ptr<const Members> members_of_step() const;
  // This process is a later life of its rank: the others have so many AllToAlls already. The first ones made here are
  // made by this rank alone, and the first reset joins them to the others'.
  // `places`: what all_places gave at one of them; empty: not known, all compute on CPUs.
  void expect(uint32_t objects, const std::string &places);
  // Where each rank computes, as far as it has told.
  std::string all_places() const;
  void learn_place(uint32_t rank, const Place &place);
  // The highest generation that has begun here.
  uint64_t step();
  // Takes the messages of resets that have come, for a call that isn't one: FAULT where a rank that it needs has gone
  // on to a reset.
  void hear_resets() { reports_.hear(engine, epoch); }
  void refuse_reset(uint32_t rank) const;
  bool resets(uint32_t rank) const { return reports_.resets(rank); }

  // ---- lanes that no call drives ----
  void list(Follower *follower);
  void unlist(Follower *follower);
  // From a thread that nothing waits for, now and then: followers learn what calls learn while they wait.
  void watch();

 private:
  using Holds = std::vector<std::unique_ptr<Lane::Held>>;
  // A lane's memory where it is to be no host memory; NULL: it is.
  using MakeMemory = std::function<std::unique_ptr<LaneMemory>(uint64_t bytes)>;
  friend struct Resetting;
  struct Growth;
  std::shared_ptr<Object> agree(const ept_moe_config &config, const Members &with, const Deadline &deadline, Side *side,
                                std::vector<Place> &places);
  // Sets `initiates` of all places to 0 where both ways were measured and the other one is faster.
  void weigh(std::vector<Place> &places, const Object &object, const Members &with, const Deadline &deadline,
             Side *side);
  void refuse_drivers(const std::vector<Place> &places, const Members &with, bool larger) const;
  void bring_sides(const std::vector<Place> &places, const Members &with, const Deadline &deadline, Side *side);
  Holds until_idle(const Members &with, const Deadline &deadline, const char *what);
  void grow(const LaneMap &larger, uint32_t lanes, const Members &with, const Deadline &deadline, const char *what,
            const MakeMemory &elsewhere);
  std::vector<Follower *> followers();
  void let_go_of_lanes();
  // Throws `failed`, or what failed at another rank; else what each said beside.
  std::vector<Bytes> tell(const Failure &failed, uint64_t tag, const std::string &more, const Members &with,
                          const Deadline &deadline, const char *what);

  std::mutex collective_;
  std::vector<std::unique_ptr<LaneMemory>> memories_;  // [lanes]
  // Collective calls so far under this membership. A rank that learns of a mask inside such a call begins it again,
  // another one learns before it: so each membership counts its own.
  uint32_t attempts_ = 0, attempts_under_ = 0;
  void begin_attempt(const Members &with);  // of a collective call
  uint64_t attempt() const { return uint64_t(attempts_under_ & 0xffff) << 32 | (attempts_ & 0xffff) << 16; }
  uint64_t resets_ = 0;
  Reports reports_;
  std::atomic<uint32_t> expected_{0};  // AllToAlls still to be made by this rank alone
  mutable std::mutex members_mutex_;
  std::shared_ptr<const Members> members_;
  std::atomic<uint64_t> step_{0};
  std::vector<Place> places_;      // [world]
  std::vector<uint8_t> returned_;  // [world] is back, and not taken in by a reset yet
  uint32_t objects_ = 0;
  Driver driver_ = Driver::none;
  std::atomic<bool> closed_{false}, suspended_{false};
  std::mutex followers_mutex_;
  std::vector<Follower *> followers_;  // in the order in which every rank made them
};

}  // namespace ept::moe
