// SPDX-License-Identifier: Apache-2.0
//
// arrivals.cuh: who has come. A few warps of each block, the scouts, look at the signals of the sources and read their
// headers; all warps take work of sources that are ready. So rows of one source are not held up by another that is
// late, further than the layout needs.
#pragma once

#include "moe/cuda/protocol.cuh"
#include "moe/cuda/shared.h"

namespace ept::moe::cuda {

// Of a source, in shared memory. It only rises.
enum Standing : uint32_t { kAway = 0, kHeaderIn = 1, kReady = 2 };

// Looks at shared memory between two at the lane's fault, which is in memory.
constexpr uint32_t kLooks = 16;

// Where a source's messages come and its signals stand, whichever generation it is.
struct Origin {
  const char *in = nullptr;
  const uint64_t *words = nullptr;
  uint64_t offsets[EPT_MOE_SLOTS] = {};
};
EPT_DEVICE Origin ask_origin(const LaneTable &t, uint32_t phase, uint32_t source) {
  Origin its;
  if (source >= t.world) return its;
  its.in = t.in[source];
  its.words = t.words[source];
  EPT_UNROLL
  for (uint32_t slot = 0; slot < EPT_MOE_SLOTS; slot++)
    its.offsets[slot] = t.offsets[source * kSignals + signal_index(phase, slot)];
  return its;
}
// What a half that receives must know first, asked for together; each is waited for where it is used.
struct AtFirst {
  EPT_DEVICE AtFirst(const LaneTable &t, uint32_t phase)
      : state(t.state), fault(fault_of(t)), origin(ask_origin(t, phase, threadIdx.x)) {}
  const StateThen state;
  const uint32_t fault;
  const Origin origin;  // of source threadIdx.x
};

// Before the block's first barrier; all threads. A rank that takes no part is ready, with nothing. message_at(source):
// where in its lane's memory the message of this generation is; the same thread is asked for the same source always.
template <class At>
EPT_DEVICE void look_up(const LaneTable &t, uint32_t phase, uint64_t generation, uint32_t membership,
                        const Origin &first, const Sources &s, At message_at) {
  const auto slot = uint32_t(generation & 1);
  const Taking members = taking(t, phase, membership);
  for (uint32_t r = threadIdx.x; r < t.world; r += blockDim.x) {
    const Origin its = r == threadIdx.x ? first : ask_origin(t, phase, r);
    s.standing[r] = members.has(r) ? kAway : kReady;
    s.message[r] = its.in + message_at(r);
    s.word[r] = its.words + signal_index(phase, slot);
    s.target[r] = generation / 2 + 1 + (slot ? its.offsets[1] : its.offsets[0]);
  }
}

EPT_DEVICE uint32_t scouts(uint32_t world) {
  const uint32_t most = warps() < 4 ? 1 : warps() / 2;
  return world < most ? world : most;
}

// Scout `warp_id()` brings its sources to kReady. Visitor, all of whose calls are made by the whole warp:
//   bool header(source)     its signal was seen; false: the lane is faulted
//   bool may_begin(source)  those that must stand before it have their headers in
//   bool begin(source)      before it is ready; false as above
template <class Visitor>
EPT_DEVICE void scout(const LaneTable &t, uint32_t half, uint32_t phase, uint64_t generation, const Sources &s,
                      Visitor &visitor) {
  const uint32_t step = scouts(t.world);
  if (warp_id() >= step) return;
  uint64_t deadline = 0;  // the clock is asked when there is something to wait for
  uint32_t looks = 0;
  for (;;) {
    bool moved = false;
    uint32_t missing = t.world;  // the first one that has not come
    bool all = true;
    for (uint32_t source = warp_id(); source < t.world; source += step) {
      const uint32_t stands = peek(&s.standing[source]);
      if (stands == kReady) continue;
      if (stands == kAway) {
        const uint32_t here =
            lane_id() == 0 ? device::reached(Hardware::acquire_system(s.word[source]), s.target[source]) : 0;
        if (!from_lane(here, 0)) {
          all = false;
          if (missing == t.world) missing = source;
          continue;
        }
        if (!visitor.header(source)) return;
        moved = true;
      }
      // Others may wait for this header; where it waits for none of theirs, it is shown when the source is ready.
      if (!visitor.may_begin(source)) {
        if (stands == kAway) show(&s.standing[source], kHeaderIn);
        all = false;
        continue;
      }
      if (!visitor.begin(source)) return;
      show(&s.standing[source], kReady);
      moved = true;
    }
    if (all) return;
    if (moved) continue;
    // What is not in shared memory is a way that takes longer than what this waits for.
    if (missing == t.world && ++looks % kLooks) {
      Hardware::spin();
      continue;
    }
    // A scout whose own sources are all here waits for another scout's, which reports the one that is late.
    uint32_t go_on = 1;
    if (lane_id() == 0) {
      if (missing < t.world) {
        if (!deadline) deadline = device::deadline_in(t.timeout_ns);
        go_on = may_wait(t, half, phase, generation, missing, deadline);
      } else {
        go_on = fault_of(t) == 0;
        EPT_REST();
      }
    }
    if (!from_lane(go_on, 0)) return;
  }
}

// A warp that has no work of a source that is ready, before it looks once more. False: the lane is faulted.
EPT_DEVICE bool may_look(const LaneTable &t, uint32_t looks) {
  if (looks % kLooks) {
    Hardware::spin();
    return true;
  }
  if (from_lane(lane_id() == 0 ? fault_of(t) : 0, 0)) return false;
  EPT_REST();
  return true;
}

// All warps: work(source, unit) for each unit of each source as it is ready. units(source) may be asked then.
// all_in(): all headers are in. Each warp begins with another source, so that they help all. False: the lane is
// faulted.
template <class AllIn, class Units, class Work>
EPT_DEVICE bool work_as_they_come(const LaneTable &t, const uint32_t *standing, uint32_t *next, AllIn all_in,
                                  Units units, Work work) {
  const uint32_t begin = warp_id() % t.world;
  for (uint32_t looks = 1;; looks++) {
    bool all = true, in = true;
    for (uint32_t i = 0; i < t.world; i++) {
      const uint32_t source = begin + i < t.world ? begin + i : begin + i - t.world;
      const uint32_t stands = look(&standing[source]);
      if (stands != kReady) {
        all = false;
        if (stands == kAway) in = false;
        continue;
      }
      const uint32_t n = units(source);
      for (;;) {
        uint32_t unit = n;
        if (lane_id() == 0 && peek(&next[source]) < n) unit = atomicAdd(&next[source], 1u);
        unit = from_lane(unit, 0);
        if (unit >= n) break;
        work(source, unit);
      }
      __syncwarp();
    }
    if (in) all_in();
    if (all) return true;
    if (!may_look(t, looks)) return false;
  }
}

}  // namespace ept::moe::cuda
