// SPDX-License-Identifier: Apache-2.0
//
// stream.cuh: rows as they are read: by 16 bytes a thread, kAhead of them under way at any time, in a ring of the
// thread's own in shared memory. So a warp waits for memory once a row and not once a load, and no register is held by
// what is under way.
//
// INVARIANT. A thread reads only what it fetched itself, after it has waited for that fetch; and it fetches into a
// place only after its read of that place in program order. So no barrier is needed, and rows are seen as ordinary
// loads see them: what was ordered before the call (an acquire and a barrier) is ordered before the fetches.
#pragma once

#include "moe/cuda/shared.h"
#include "moe/cuda/simt.h"

namespace ept::moe::cuda {

// For each of `steps` steps, the same number in all lanes: next() gives where kEach vectors of 16 bytes stand, or NULL
// for none in this lane; use(vectors) takes those of a step, in the same order. kNear: lanes share sectors of memory,
// which then come through the cache. plan() is done while the first are under way. `started`: they are since
// start_stream, with the same steps.
template <uint32_t kEach, bool kNear, class Next, class Plan, class Use>
EPT_DEVICE void stream(Piece *ring, uint32_t steps, bool started, Next next, Plan plan, Use use) {
  constexpr uint32_t kSteps = kAhead / kEach;
  const uint32_t stride = blockDim.x;
  Piece *mine = ring + threadIdx.x;
  uint32_t asked = 0, slot = 0;
  const auto ask = [&](uint32_t into) {
    if (asked < steps) {
      const char *from = next();
      EPT_UNROLL
      for (uint32_t i = 0; i < kEach && from && !started; i++)
        fetch16<kNear>(reinterpret_cast<char *>(mine + (into * kEach + i) * stride), from + i * 16);
    }
    if (!started) end_fetches();
    asked++;
  };
  EPT_UNROLL
  for (uint32_t i = 0; i + 1 < kSteps; i++) ask(i);
  started = false;
  plan();
  for (uint32_t step = 0; step < steps; step++) {
    ask(slot == 0 ? kSteps - 1 : slot - 1);  // the place that the last step was read from
    await_fetches<kSteps - 1>();
    Vector held[kEach];
    EPT_UNROLL
    for (uint32_t i = 0; i < kEach; i++)
      held[i] = load16(reinterpret_cast<const char *>(mine + (slot * kEach + i) * stride));
    use(held);
    slot = slot + 1 == kSteps ? 0 : slot + 1;
  }
}

template <uint32_t kEach, bool kNear, class Next, class Use>
EPT_DEVICE void stream(Piece *ring, uint32_t steps, Next next, Use use) {
  stream<kEach, kNear>(ring, steps, false, next, [] {}, use);
}

// The first of them, long before stream(): the thread fetches nothing else in between.
template <uint32_t kEach, bool kNear, class Next>
EPT_DEVICE void start_stream(Piece *ring, uint32_t steps, Next next) {
  Piece *mine = ring + threadIdx.x;
  for (uint32_t step = 0; step + 1 < kAhead / kEach; step++) {
    const char *from = step < steps ? next() : nullptr;
    EPT_UNROLL
    for (uint32_t i = 0; i < kEach && from; i++)
      fetch16<kNear>(reinterpret_cast<char *>(mine + (step * kEach + i) * blockDim.x), from + i * 16);
    end_fetches();
  }
}

}  // namespace ept::moe::cuda
