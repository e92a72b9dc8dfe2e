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

// So many steps of kEach vectors are under way before the first is read.
template <uint32_t kEach>
constexpr uint32_t kFirst = kAhead / kEach - 1;

// Of a step: where its first vector stands, and how far the row goes on from there, in vectors: 0 or less where this
// lane has none. The kEach of a step stand kApart bytes apart.
struct Fetch {
  const char *from;
  int32_t left;
};

// next() is what a lane fetches in the next step. It is asked kFirst times more than there are steps, and has nothing
// then. kNear: lanes share sectors of memory, which then come through the cache.
template <uint32_t kEach, bool kNear, uint32_t kApart, class Next>
EPT_DEVICE void fetch_step(Piece *into, Next &next) {
  const Fetch step = next();
  EPT_UNROLL
  for (uint32_t i = 0; i < kEach; i++)
    if (step.left > int32_t(i * kApart / 16))
      fetch16<kNear>(reinterpret_cast<char *>(into + i * blockDim.x), step.from + i * kApart);
  end_fetches();
}

// Asks for the first kFirst steps; until finish_stream the thread fetches nothing else.
template <uint32_t kEach, bool kNear, uint32_t kApart = 16, class Next>
EPT_DEVICE void start_stream(Piece *ring, Next &&next) {
  EPT_ROLLED
  for (uint32_t step = 0; step < kFirst<kEach>; step++)
    fetch_step<kEach, kNear, kApart>(ring + threadIdx.x + step * kEach * blockDim.x, next);
}

// next() goes on with step kFirst; use(vectors) takes those of a step, in the same order, of `steps`: the same number
// in all lanes. What a lane didn't fetch is anything.
template <uint32_t kEach, bool kNear, uint32_t kApart = 16, class Next, class Use>
EPT_DEVICE void finish_stream(Piece *ring, uint32_t steps, Next &&next, Use use) {
  constexpr uint32_t kSteps = kAhead / kEach;
  const uint32_t stage = kEach * blockDim.x;
  Piece *const begin = ring + threadIdx.x, *const last = begin + (kSteps - 1) * stage;
  Piece *at = begin, *into = last;  // the place that the last step was read from
  EPT_ROLLED
  for (uint32_t step = 0; step < steps; step++) {
    fetch_step<kEach, kNear, kApart>(into, next);
    await_fetches<kSteps - 1>();
    Vector held[kEach];
    EPT_UNROLL
    for (uint32_t i = 0; i < kEach; i++) held[i] = load16(reinterpret_cast<const char *>(at + i * blockDim.x));
    into = at;
    at = at == last ? begin : at + stage;
    use(held);
  }
}

template <uint32_t kEach, bool kNear, uint32_t kApart = 16, class Next, class Use>
EPT_DEVICE void stream(Piece *ring, uint32_t steps, Next next, Use use) {
  start_stream<kEach, kNear, kApart>(ring, next);
  finish_stream<kEach, kNear, kApart>(ring, steps, next, use);
}

// Rows are moved by two vectors a lane and step, a warp's width apart: half of the instructions that a step takes
// beside its loads and stores.
constexpr uint32_t kPair = 2, kPairApart = kWarp * 16;
// A lane's next two of the vectors below `to`, of the row at `from`.
EPT_DEVICE Fetch pair_at(const char *from, uint32_t vector, uint32_t to) {
  return {from + uint64_t(vector) * 16, int32_t(to - vector)};
}

}  // namespace ept::moe::cuda
