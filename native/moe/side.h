// SPDX-License-Identifier: Apache-2.0
//
// side.h: where a rank computes, which all ranks learn when an AllToAll is made, and what a rank whose lanes are driven
// by kernels does then. Two GPU ranks that can map each other's memory do so; two others whose kernels are linked with
// a device library (NVSHMEM) put into each other's; all other pairs talk through the engine.
#pragma once

#include <stdint.h>
#include <string.h>

#include <memory>
#include <string>
#include <vector>

#include "moe/crossover.h"
#include "moe/fail.h"
#include "moe/members.h"

namespace ept::moe {

struct Arena;
class LaneMemory;

// Who drives a rank's lanes. They have one sequence of generations, so it is one of the two for good.
enum class Driver : uint32_t { none, calls, kernels };

// On the wire, in a config message.
struct Place {
  uint32_t on_gpu = 0;
  uint32_t known = 0;           // 0: of a rank that takes no part, or has not told yet; 2: told by another rank
  Driver lanes = Driver::none;  // so far
  uint64_t process = 0;         // a number of the process, different in every other
  char gpu[16] = {};            // UUID
  char machine[40] = {};        // boot id; empty: its memory is shown to nobody
  char node[32] = {};           // as its user named it
  uint32_t initiates = 0;       // 1: its kernels put into peers' memory through a device library, and peers' into its
  static constexpr uint32_t kMeasures = 1;    // weighs: whether they do is to be measured (weigh.cc)
  static constexpr uint32_t kKeepsProxy = 2;  //   it has lanes over the engine, from which they don't
  uint32_t weighs = 0;
};

inline bool same_gpu(const Place &a, const Place &b) {
  return a.on_gpu && b.on_gpu && memcmp(a.gpu, b.gpu, sizeof a.gpu) == 0;
}
// Threads of one process on two GPUs can't open each other's handles.
inline bool maps(const Place &a, const Place &b) {
  return a.on_gpu && b.on_gpu && a.machine[0] && memcmp(a.machine, b.machine, sizeof a.machine) == 0 &&
         memcmp(a.node, b.node, sizeof a.node) == 0 && (a.process != b.process || same_gpu(a, b));
}
inline bool initiates(const Place &a, const Place &b) { return a.initiates && b.initiates && !maps(a, b); }
// Kernels of each reach the other by themselves, and no engine.
inline bool direct(const Place &a, const Place &b) { return maps(a, b) || initiates(a, b); }
// All whose places are known.
inline bool all_direct(const std::vector<Place> &places) {
  for (const Place &a : places)
    for (const Place &b : places)
      if (a.known && b.known && !direct(a, b)) return false;
  return true;
}

// Both ways to the ranks that kernels could put to, over lanes that are there for this alone. All throw Failure.
class Trial {
 public:
  virtual ~Trial() = default;
  // Messages of that length to each of them, some rounds; until they have come from all.
  virtual void launch(Way way, uint32_t length) = 0;
  virtual void await(Way way, uint32_t length) = 0;
  // The least of each.
  virtual Figures figures() const = 0;
};

class Side {
 public:
  virtual ~Side() = default;
  // All of these throw Failure, which every rank then raises.
  virtual Place place() = 0;
  // A lane's memory where it is to be no host memory; NULL: it is. After place().
  virtual std::unique_ptr<LaneMemory> lane_memory(Arena &arena, uint64_t bytes) = 0;
  // `tried`: an arena with a lane of room for messages of all ranks. Both outlive what is given.
  virtual std::unique_ptr<Trial> trial(Arena &tried, const std::vector<Place> &places,
                                       const uint64_t (&lengths)[kLengths], const Deadline &deadline) = 0;
  // What came of it, for a log.
  virtual void chose(const std::string &how) = 0;
  // The lanes are there: what the other GPU ranks need to map our memory.
  virtual std::string offer(Arena &arena, const std::vector<Place> &places) = 0;
  // What they offered, [world]; empty of a rank that is on no GPU.
  virtual void accept(const std::vector<std::string> &offers) = 0;
};

// Whether a step is under way in lanes.
enum class Rest : uint8_t { busy, idle, faulted };

// What keeps a rank's lanes where no call does: it is emptied by a reset, and follows the membership. From its begin to
// its end it is listed in the arena (Arena::list).
class Follower {
 public:
  virtual ~Follower() = default;
  // The membership has moved, or a rank has begun a reset: waits for ranks that will not come end. Any thread; doesn't
  // throw, and waits for nothing.
  virtual void follow() = 0;
  // The highest generation that has begun.
  virtual uint64_t step() = 0;
  // Reset, with the arena's lanes held. Nothing of this rank's is under way any more: brings what was posted, and the
  // generations, into the arena's lanes. What it returns is kept until the reset is over.
  virtual std::shared_ptr<void> before_reset(const Deadline &deadline) = 0;
  // All that are up have come to the reset. `number`: of the reset, `index`: of this follower; the same on every rank.
  virtual void after_reset(uint64_t number, uint32_t index, const Deadline &deadline) = 0;

  // ---- suspend and resume, with the arena's lanes held (suspend.cc); all of these throw Failure ----
  // Throws UNSUPPORTED where its memory can't be given back.
  virtual void refuse_sleep() const = 0;
  // Asked until no rank has a step under way. Brings its generations into those of the arena's lanes that it drives.
  virtual Rest rest() = 0;
  // No rank has: whatever is launched from here on touches no lane, and peers' memory is let go of.
  virtual void fall_asleep() = 0;
  // No peer has hold of ours any more: gives it back. Again where a resume failed, in whatever state it is. Doesn't
  // throw.
  virtual void let_go() = 0;
  // A lane's memory, as Side::lane_memory.
  virtual std::unique_ptr<LaneMemory> lane_memory(uint64_t bytes) = 0;
  // Has memory again, as it was left as far as anybody reads it; what the other ones need to map it.
  virtual std::string wake() = 0;
  // Whether that rank has such a follower too, and so an offer for this one.
  virtual bool expects(uint32_t rank) const = 0;
  // What those of `with` said, [world]; empty of others.
  virtual void meet_again(const std::vector<std::string> &offers, const Members &with) = 0;
  // All have met: launches are steps again.
  virtual void awake() = 0;
};

}  // namespace ept::moe
