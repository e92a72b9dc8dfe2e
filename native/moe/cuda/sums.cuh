// SPDX-License-Identifier: Apache-2.0
//
// sums.cuh: the sums of rows that both halves of a combine make: wire.h's, in fp32, one row after another.
//
// What bounds them is instructions, not memory: a multiprocessor moves 90 GB/s if it does little else. So what a step
// takes beside loads and sums is shared by two groups of 2-byte elements, and formats are known where they are the
// usual ones (kBF16).
#pragma once

#include "moe/cuda/formats.cuh"
#include "moe/cuda/stream.cuh"

namespace ept::moe::cuda {

// Of who has nothing to do around a step.
struct Nothing {
  EPT_DEVICE void operator()(char *, uint32_t, uint32_t = 0) const {}
};

// The sum of `n` rows, in their order, group by group of columns: a warp's share of it, by kPair rounds together. Lane
// i has row i and its weight; take(group, sum) has a group's, in fp32. kWeighed: by fma. Where sums are taken,
// before(at, first) and after(at, first, groups) go around a step's, by the whole warp: `at` is 1 KiB of shared memory
// that is free in between, and `first` the first of its groups.
template <uint32_t kSize, bool kWeighed, class Take, class Before = Nothing, class After = Nothing>
EPT_DEVICE void sum_rows(Piece *ring, const char *row, float weight, uint32_t n, const Span16 &span, int32_t format,
                         Take take, Before before = {}, After after = {}) {
  // Of 2 bytes: a step has two groups, a warp's width apart. Of 4: one, in two vectors.
  constexpr uint32_t kGroups = kSize == 2 ? kPair : 1, kApart = kSize == 2 ? kPairApart : 16;
  float acc[kGroups][kGroup] = {};
  const uint32_t until = n ? span.to : 0;
  uint32_t ahead = span.from + lane_id(), ahead_row = 0, group = ahead, at = 0, step = 0;
  stream<kPair, false, kApart>(
      ring, span.rounds(kGroups) * n,
      [&] {
        const char *from = from_lane(row, ahead_row);
        Fetch here;
        if constexpr (kSize == 2)
          here = pair_at(from, ahead, until);
        else
          here = {from + uint64_t(ahead) * (kGroup * kSize), ahead < until ? int32_t(kPair) : 0};
        if (++ahead_row == n) ahead_row = 0, ahead += kGroups * kWarp;
        return here;
      },
      [&](const Vector(&held)[kPair]) {
        const float w = kWeighed ? from_lane(weight, at) : 1.0f;
        EPT_UNROLL
        for (uint32_t g = 0; g < kGroups; g++) {
          float x[kGroup];
          if constexpr (kSize == 2) {
            widen8(x, held[g], format);
          } else {
            EPT_UNROLL
            for (uint32_t e = 0; e < kGroup; e++) x[e] = float_of(held[e / 4].word[e % 4]);
          }
          EPT_UNROLL
          for (uint32_t e = 0; e < kGroup; e++) acc[g][e] = kWeighed ? fused(w, x[e], acc[g][e]) : acc[g][e] + x[e];
        }
        step++;
        if (++at != n) return;
        char *const free = warps_step_at<kPair>(ring, step - 1);
        const uint32_t first = group - lane_id();
        before(free, first);
        EPT_UNROLL
        for (uint32_t g = 0; g < kGroups; g++, group += kWarp) {
          if (group < span.to) take(group, acc[g]);
          EPT_UNROLL
          for (uint32_t e = 0; e < kGroup; e++) acc[g][e] = 0;
        }
        after(free, first, smaller(kGroups * kWarp, span.to - first));
        at = 0;
      });
  if (n) return;
  for (; group < span.to; group += kWarp) take(group, acc[0]);
}

}  // namespace ept::moe::cuda
