// SPDX-License-Identifier: Apache-2.0
//
// moe_ranks.h: a group and its log of who takes part, for the tests of masks in dispatch and combine. Each rank carries
// out the log as far as it has learned of it, in its order, as src/eptransport/_members.py does: the engine masks or
// opens before the arena is told. The log is written between steps alone, by the thread that starts them.
#pragma once

#include <stdint.h>

#include <functional>
#include <vector>

#include "moe_steps.h"

namespace moe_test {

class Ranks {
 public:
  explicit Ranks(const ept_moe_config &config);
  ~Ranks();

  uint32_t membership() const { return uint32_t(states_.size() - 1); }
  std::vector<uint32_t> all() const;
  std::vector<uint32_t> active() const;

  // ---- the log, and what it says done to a rank's engine and arena ----
  void log_mask(uint32_t rank);
  // `rank`, whose engine has begun another life, takes part from the generation `step` on.
  void log_return(uint32_t rank, uint64_t step);
  void carry_out(uint32_t by, uint32_t upto);
  void carry_out(uint32_t by) { carry_out(by, membership()); }
  // A link to `rank` in its present life.
  void open(uint32_t by, uint32_t rank) const;

  // ---- steps under the membership as the log has it now ----
  Step step(uint64_t seed) const;
  // The first one from `seed` on in which every rank has rows of every rank, so that each is missed: in lane 0, with
  // one combine. Not of weights that come late, for which combine_send itself waits.
  Step mixed(uint64_t seed) const;
  // On all that take part, one of them mixed.
  void good_steps(uint64_t seed);
  // On all that take part.
  void reset() const;
  // The highest that any lane of a rank has begun.
  uint64_t generation(uint32_t rank) const;

  // On a thread for each of `ranks`; `beside`, where given, on one more.
  void on(const std::vector<uint32_t> &ranks, const std::function<void(uint32_t)> &body,
          const std::function<void()> &beside = nullptr) const;
  // Until every one of `ranks` is seen to wait in `operation`.
  void until_waiting(const std::vector<uint32_t> &ranks, const char *operation) const;

  const ept_moe_config config;
  const Group group;
  const std::vector<ept_moe *> objects;
  std::vector<Runner> runners;

 private:
  struct State {  // after a change
    std::vector<uint8_t> active;
    uint64_t step;
    uint32_t rank;  // that changed
    bool back;
  };
  void log(uint32_t rank, bool back, uint64_t step);

  std::vector<State> states_;  // by membership
  std::vector<std::vector<char>> addresses_;
  std::vector<uint32_t> lives_, carried_out_;
};

}  // namespace moe_test
