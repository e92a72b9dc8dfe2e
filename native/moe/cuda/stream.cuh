// SPDX-License-Identifier: Apache-2.0
//
// stream.cuh: rows as they are read: by 16 bytes a thread, kAhead of them under way at any time, in a ring of the
// thread's own in shared memory. So a warp waits for memory once a row and not once a load, and no register is held by
// what is under way.
//
// INVARIANT. A thread reads only what it fetched itself, after it has waited for that fetch; and it fetches into a
// place only after its read of that place in program order. So no barrier is needed, and rows are seen as ordinary
// loads see them: what was ordered before the call (an acquire and a barrier) is ordered before the fetches. From a
// step's read until use() returns its place is free, for what the warp makes of it (warps_step_at): who writes beyond
// its own pieces, or reads there, meets the others before and after.
#pragma once

#include "moe/cuda/shared.h"
#include "moe/cuda/simt.h"

namespace ept::moe::cuda {

// So many steps of kEach vectors are under way before the first is read.
template <uint32_t kEach>
constexpr uint32_t kFirst = kAhead / kEach - 1;

// Of a step: where its first vector stands, and how far the row goes on from there, in vectors: 0 or less where this
// lane has none. The kEach of a step stand in runs of kRun, kApart bytes apart; no row ends within a run.
struct Fetch {
  const char *from;
  int32_t left;
};

// Which pieces of the ring are a thread's: each a warp's width behind the one before, a distance that the compiler
// knows. The next in turn is found in the bits between lane and warp.
EPT_DEVICE uint32_t own_piece() { return warp_id() * (kAhead * kWarp) + lane_id(); }
template <uint32_t kEach>
EPT_DEVICE uint32_t next_piece(uint32_t at) {
  constexpr uint32_t kTurn = (kAhead - 1) * kWarp;
  static_assert((kAhead & (kAhead - 1)) == 0 && kAhead % kEach == 0);
  return (at & ~kTurn) | ((at + kEach * kWarp) & kTurn);
}

// next() is what a lane fetches in the next step. It is asked kFirst times more than there are steps, and has nothing
// then. kNear: lanes share sectors of memory, which then come through the cache.
template <uint32_t kEach, bool kNear, uint32_t kApart, uint32_t kRun, class Next>
EPT_DEVICE void fetch_step(Piece *into, Next &next) {
  const Fetch step = next();
  EPT_UNROLL
  for (uint32_t i = 0; i < kEach; i++) {
    const uint32_t run = i / kRun * kApart;
    if (step.left > int32_t(run / 16))
      fetch16<kNear>(reinterpret_cast<char *>(into + i * kWarp), step.from + run + i % kRun * 16);
  }
  end_fetches();
}

// Asks for the first kFirst steps; until finish_stream the thread fetches nothing else.
template <uint32_t kEach, bool kNear, uint32_t kApart = 16, uint32_t kRun = 1, class Next>
EPT_DEVICE void start_stream(Piece *ring, Next &&next) {
  uint32_t into = own_piece();
  EPT_ROLLED
  for (uint32_t step = 0; step < kFirst<kEach>; step++, into += kEach * kWarp)
    fetch_step<kEach, kNear, kApart, kRun>(ring + into, next);
}

// next() goes on with step kFirst; use(vectors) takes those of a step, in the same order, of `steps`: the same number
// in all lanes. What a lane didn't fetch is anything.
template <uint32_t kEach, bool kNear, uint32_t kApart = 16, uint32_t kRun = 1, class Next, class Use>
EPT_DEVICE void finish_stream(Piece *ring, uint32_t steps, Next &&next, Use use) {
  uint32_t at = own_piece(), into = at + kFirst<kEach> * kEach * kWarp;  // the place that the last step was read from
  EPT_ROLLED
  for (uint32_t step = 0; step < steps; step++) {
    fetch_step<kEach, kNear, kApart, kRun>(ring + into, next);
    await_fetches<int(kFirst<kEach>)>();
    Vector held[kEach];
    EPT_UNROLL
    for (uint32_t i = 0; i < kEach; i++) held[i] = load16(reinterpret_cast<const char *>(ring + at + i * kWarp));
    into = at;
    at = next_piece<kEach>(at);
    use(held);
  }
}

// Where the vectors of a step of finish_stream stand until use() returns, a warp's width apart.
template <uint32_t kEach>
EPT_DEVICE const Piece *step_at(Piece *ring, uint32_t step) {
  return ring + own_piece() + step % (kAhead / kEach) * (kEach * kWarp);
}
// The warp's memory that they stand in, kEach of its widths: it is free when all its lanes have read theirs.
template <uint32_t kEach>
EPT_DEVICE char *warps_step_at(Piece *ring, uint32_t step) {
  return reinterpret_cast<char *>(ring + own_piece() - lane_id() + step % (kAhead / kEach) * (kEach * kWarp));
}

template <uint32_t kEach, bool kNear, uint32_t kApart = 16, class Next, class Use>
EPT_DEVICE void stream(Piece *ring, uint32_t steps, Next next, Use use) {
  start_stream<kEach, kNear, kApart>(ring, next);
  finish_stream<kEach, kNear, kApart>(ring, steps, next, use);
}

constexpr uint32_t kPairApart = kWarp * 16;
// A step's vectors to each of n places, v of the row being the lane's first.
template <uint32_t kRounds>
EPT_DEVICE void put_step(char *const *to, uint32_t n, const Vector (&held)[kRounds], uint32_t v, uint32_t until) {
  EPT_ROLLED
  for (uint32_t p = 0; p < n; p++) {
    char *there = to[p] + uint64_t(v) * 16;
    EPT_UNROLL
    for (uint32_t i = 0; i < kRounds; i++)
      if (v + i * kWarp < until) store16(there + i * kPairApart, held[i]);
  }
}
// A lane's next two of the vectors below `to`, of the row at `from`.
EPT_DEVICE Fetch pair_at(const char *from, uint32_t vector, uint32_t to) {
  return {from + uint64_t(vector) * 16, int32_t(to - vector)};
}

}  // namespace ept::moe::cuda
