// SPDX-License-Identifier: Apache-2.0
//
// reports.h: what other ranks have said for a reset. Kept between calls: a rank that has said it once says it again
// only in its next reset, and this rank may not be in one yet.
#pragma once

#include <stdint.h>

#include <mutex>
#include <string>
#include <vector>

#include "eptransport/eptransport.h"

namespace ept::moe {

// Two lives of two ranks make a link; a message that names others is of an older one and means nothing.
struct Lives {
  uint32_t from, to;
};

struct Report {  // of one lane
  Lives lives;
  uint64_t number;  // of the sender's resets
  uint32_t membership, objects;
  uint32_t lane, lanes;
  uint32_t attempts, reserved;  // collective calls under this membership
  uint64_t step;
  uint64_t next[2];
  uint64_t posted[2][2][2];  // to the reader
  uint64_t grants[2];
  uint64_t map[4];  // LaneMap
};

struct Clean {
  Lives lives;
  uint64_t answers;  // the reader's reset whose report has been drained
  uint64_t number;   // the sender's own
};

struct Offer {  // then what a link of this lane needs: region, signals
  Lives lives;
  uint32_t lane, lanes;
};

struct Heard {
  uint32_t life = 0;            // of the sender
  uint64_t number = 0;          // of its newest report
  std::vector<Report> reports;  // [lanes]
  size_t have = 0;
  std::vector<std::string> offers;  // [lanes], for the present link
  size_t offered = 0;
  Clean clean = {};         // the newest
  uint64_t answered = 0;    // its report that we have answered
  uint64_t ended_well = 0;  // its report that a reset here ended well with

  bool reported() const { return number > ended_well && have == reports.size(); }
};

class Reports {
 public:
  // Forgets all.
  void begin(uint32_t world) {
    const std::lock_guard<std::mutex> lock(mutex_);
    heard_.assign(world, Heard());
  }
  // Takes what has come; true where something has. `life`: of this rank.
  bool hear(ept_engine *engine, uint32_t life);
  // `rank` is in a reset that none here has ended well with.
  bool resets(uint32_t rank) const;
  // For who holds every lane, since nobody else takes messages then.
  Heard &of(uint32_t rank) { return heard_[rank]; }

 private:
  Heard &sender(uint32_t rank, uint32_t life);

  mutable std::mutex mutex_;
  std::vector<Heard> heard_;
};

}  // namespace ept::moe
