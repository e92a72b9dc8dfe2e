// SPDX-License-Identifier: Apache-2.0
//
// side.h: where a rank computes, which all ranks learn when an AllToAll is made, and what a rank whose lanes are driven
// by kernels does then. Two GPU ranks that can map each other's memory do so; all other pairs talk through the engine.
#pragma once

#include <stdint.h>
#include <string.h>

#include <string>
#include <vector>

#include "moe/members.h"

namespace ept::moe {

struct Arena;

// Who drives a rank's lanes. They have one sequence of generations, so it is one of the two for good.
enum class Driver : uint32_t { none, calls, kernels };

// On the wire, in a config message.
struct Place {
  uint32_t on_gpu = 0;
  Driver lanes = Driver::none;  // so far
  uint64_t process = 0;         // a number of the process, different in every other
  char gpu[16] = {};            // UUID
  char machine[40] = {};        // boot id; empty: its memory is shown to nobody
  char node[32] = {};           // as its user named it
};

inline bool same_gpu(const Place &a, const Place &b) {
  return a.on_gpu && b.on_gpu && memcmp(a.gpu, b.gpu, sizeof a.gpu) == 0;
}
// Threads of one process on two GPUs can't open each other's handles.
inline bool maps(const Place &a, const Place &b) {
  return a.on_gpu && b.on_gpu && a.machine[0] && memcmp(a.machine, b.machine, sizeof a.machine) == 0 &&
         memcmp(a.node, b.node, sizeof a.node) == 0 && (a.process != b.process || same_gpu(a, b));
}
inline bool all_map(const std::vector<Place> &places) {
  for (const Place &a : places)
    for (const Place &b : places)
      if (!maps(a, b)) return false;
  return true;
}

class Side {
 public:
  virtual ~Side() = default;
  // All of these throw Failure, which every rank then raises.
  virtual Place place() = 0;
  // The lanes are there, and some pair talks through the engine: what the other GPU ranks need to map our memory.
  virtual std::string offer(Arena &arena, const std::vector<Place> &places) = 0;
  // What they offered, [world]; empty of a rank that is on no GPU.
  virtual void accept(const std::vector<std::string> &offers) = 0;
};

}  // namespace ept::moe
