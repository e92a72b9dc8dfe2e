// SPDX-License-Identifier: Apache-2.0
//
// arrivals.cuh: who has come. A few warps of each block, the scouts, look at the signals of the sources and read their
// headers; all warps take work of sources that are ready. So rows of one source are not held up by another that is
// late, further than the layout needs.
#pragma once

#include "moe/cuda/protocol.cuh"

namespace ept::moe::cuda {

// Of a source, in shared memory. It only rises.
enum Standing : uint32_t { kAway = 0, kHeaderIn = 1, kReady = 2 };

EPT_DEVICE uint32_t scouts(uint32_t world) {
  const uint32_t most = warps() < 4 ? 1 : warps() / 2;
  return world < most ? world : most;
}

// Scout `warp_id()` brings its sources to kReady. Visitor, all of whose calls are made by the whole warp:
//   bool header(source)     its signal was seen; false: the lane is faulted
//   bool may_begin(source)  those that must stand before it have their headers in
//   bool begin(source)      before it is ready; false as above
template <class Visitor>
EPT_DEVICE void scout(const LaneTable &t, uint32_t half, uint32_t phase, uint64_t generation, uint32_t *standing,
                      Visitor &visitor) {
  const uint32_t step = scouts(t.world);
  if (warp_id() >= step) return;
  const uint64_t deadline = device::deadline_in(t.timeout_ns);
  for (;;) {
    bool moved = false;
    uint32_t missing = t.world;  // the first one that has not come
    bool all = true;
    for (uint32_t source = warp_id(); source < t.world; source += step) {
      const uint32_t stands = peek(&standing[source]);
      if (stands == kReady) continue;
      if (stands == kAway) {
        const uint32_t here = lane_id() == 0 ? has_arrived(t, source, phase, generation) : 0;
        if (!from_lane(here, 0)) {
          all = false;
          if (missing == t.world) missing = source;
          continue;
        }
        if (!visitor.header(source)) return;
        show(&standing[source], kHeaderIn);
        moved = true;
      }
      if (!visitor.may_begin(source)) {
        all = false;
        continue;
      }
      if (!visitor.begin(source)) return;
      show(&standing[source], kReady);
      moved = true;
    }
    if (all) return;
    if (moved) continue;
    // A scout whose own sources are all here waits for another scout's, which reports the one that is late.
    uint32_t go_on = 1;
    if (lane_id() == 0) {
      if (missing < t.world) {
        go_on = may_wait(t, half, phase, generation, missing, deadline);
      } else {
        go_on = fault_of(t) == 0;
        EPT_REST();
      }
    }
    if (!from_lane(go_on, 0)) return;
  }
}

// All warps: work(source, unit) for each unit of each source as it is ready. units(source) may be asked then.
// help(source): what is to be done between header and begin, by whichever warp has time.
template <class Help, class Units, class Work>
EPT_DEVICE void work_as_they_come(const LaneTable &t, const uint32_t *standing, uint32_t *next, Help help, Units units,
                                  Work work) {
  for (;;) {
    bool all = true;
    for (uint32_t source = 0; source < t.world; source++) {
      // One thread looks for the warp, which must not part here.
      const uint32_t stands = from_lane(peek(&standing[source]), 0);
      __threadfence_block();
      if (stands != kReady) {
        all = false;
        if (stands == kHeaderIn) help(source);
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
    const uint32_t stop = lane_id() == 0 ? (all || fault_of(t) != 0) : 0;
    if (from_lane(stop, 0)) return;
    EPT_REST();
  }
}

}  // namespace ept::moe::cuda
