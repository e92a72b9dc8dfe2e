// SPDX-License-Identifier: Apache-2.0
//
// dispatch_claims.cuh: a dispatch's recv whose rows are no block's: warps of all blocks claim them as they have time.
// Where ranks share a GPU, some blocks have a multiprocessor to themselves and others half of one; with equal shares a
// recv ended when the slowest block had moved its own (8 ranks x 16: the median block's were done at 20 us, the last
// one's at 31). A kernel of its own, since it makes the way to a first row longer, and a recv of few rows is little
// else (one rank: 1.2 us of 12.4).
//
// INVARIANT. A row of a source is moved by the warp that has moved the source's count (LaneTable.claimed) over it, and
// nobody claims beyond what is its next: each warp has one row under way and one claimed, at most. All blocks decide
// by the header alone whether a source's rows are claimed or dealt, so that they decide alike. What is claimed before
// the header is in may be no row: it is one where it is below the number that the header says. Counts are by
// generation, and who raises a generation has emptied the next one's (protocol.cuh).
#pragma once

#include "moe/cuda/dispatch_recv.cuh"

namespace ept::moe::cuda {

class ClaimingReceiver : public DispatchReceiver {
 public:
  EPT_DEVICE ClaimingReceiver(const DispatchRecv &args, const RecvShared &shared) : DispatchReceiver(args, shared) {}

  EPT_DEVICE void run() { DispatchReceiver::run(*this); }

  // A row is claimed for each warp before the header of the source that it begins with is in: by the source's scout, a
  // lane a source.
  EPT_DEVICE void claim_first() {
    const uint32_t step = scouts(world), source = warp_id() + lane_id() * step;
    if (warp_id() < step && source < world) first_ = atomicAdd(&claimed(t, generation)[source], beginners(source));
  }
  EPT_DEVICE bool header(uint32_t source) {
    if (blockIdx.x == 0) note_source(t, EPT_PHASE_DISPATCH, source, false);
    // Numbers of rows that are dealt, and of those that this block has claimed, are under way with the header.
    const uint32_t first = first_claimed(source), i = lane_id() % kListed, j = first + i;
    uint32_t numbers = t.lists ? first_listed(source) : 0;
    if (t.lists && lane_id() / kListed == 1 && j < object.max_tokens) numbers = list_of(source)[j];
    const char *there = memory(source);
    Divisor cut;
    if (!read_header(source, there, [&] { cut = cut_for(lane_id() + 1); })) return false;
    // As if all sources had as many.
    const bool claims = has_copies() && are_claimed(s.rows[source] * world, warps(), gridDim.x);
    numbers = from_lane(numbers, claims ? kListed + i : i);
    if (lane_id() < kListed) s.runs[source].numbers[lane_id()] = numbers;
    if (claims)
      share_claimed(source, first, there);
    else
      share(source, there, cut);
    if (lane_id() == 0) s.runs[source].claims = claims;
    return true;
  }
  // False: the lane is faulted. The next row is claimed and found while this one comes, and comes while what stands
  // beside this one's payload is done.
  EPT_DEVICE bool rows() {
    for (uint32_t looks = 1;; looks++) {
      Row row = next();
      if (row.at) fetch(row, span_of(row));
      while (row.at) {
        const int32_t place = placed(row);
        Row then;
        move(row, span_of(row), place, [&] { then = next(); });
        if (then.at) fetch(then, span_of(then));
        finish(row, place);
        row = then;
      }
      if (in_) all_in();
      if (all_) return true;
      if (!may_look(t, looks)) return false;
    }
  }

 private:
  // So many warps of a block begin with that source.
  EPT_DEVICE uint32_t beginners(uint32_t source) const {
    return source < warps() ? (warps() - 1 - source) / world + 1 : 0;
  }
  // Of more sources than a scout has lanes no row is claimed so early: a number that no row has.
  EPT_DEVICE uint32_t first_claimed(uint32_t source) const {
    const uint32_t whose = __ballot_sync(kAll, int(warp_id() + lane_id() * scouts(world) == source));
    return from_lane(whose ? first_ : 0xffffffffu - kListed, uint32_t(__ffs(int(whose)) - 1) % kWarp);
  }
  EPT_DEVICE void share_claimed(uint32_t source, uint32_t first, const char *there) const {
    if (lane_id() != 0) return;
    const uint32_t rows = s.rows[source];
    SourceRun &run = s.runs[source];
    run.first = first;
    run.step = 1;
    run.rows = first < rows ? smaller(rows - first, beginners(source)) : 0;
    run.parts = divisor(1);
    find_rows(source, there);
  }

  // Of a source that is ready, from that on where the last one was; or none, and all_ and in_ say whether all sources
  // are ready, and their headers in.
  EPT_DEVICE Row next() {
    all_ = in_ = true;
    for (uint32_t i = 0; i < world; i++) {
      const uint32_t stands = look(&s.sources.standing[at_]);
      if (stands == kReady) {
        const Row row = next_of(at_);
        if (row.at) return row;
      } else {
        all_ = false;
        if (stands == kAway) in_ = false;
      }
      at_ = at_ + 1 < world ? at_ + 1 : 0;
    }
    return {};
  }
  // Those of this block first.
  EPT_DEVICE Row next_of(uint32_t source) const {
    SourceRun &run = s.runs[source];
    const uint32_t n = units(source);
    for (;;) {
      uint32_t unit = n;
      if (lane_id() == 0 && peek(&s.next[source]) < n) unit = atomicAdd(&s.next[source], 1u);
      unit = from_lane(unit, 0);
      Row row;
      if (unit < n) {
        row = dealt(source, unit);
      } else {
        if (!from_lane(peek(&run.claims), 0)) return {};
        const uint32_t j = take_one(&claimed(t, generation)[source]);
        if (j >= s.rows[source]) {
          if (lane_id() == 0) *const_cast<volatile uint32_t *>(&run.claims) = 0;
          return {};
        }
        find(row, source, j, is_listed(source) ? list_of(source)[j] : j);
      }
      if (row.at) return row;  // else it was refused
    }
  }

  uint32_t first_ = 0;  // the lane's, of its source as a scout
  uint32_t at_ = warp_id() % world;
  bool all_ = false, in_ = false;
};

}  // namespace ept::moe::cuda

EPT_KERNEL moe_dispatch_claims(EPT_ARGUMENT(ept::moe::cuda::DispatchRecv) args) {
  using namespace ept::moe::cuda;
  if (!args.lane.world) return;
  EPT_SHARED(memory);
  Carve carve(memory);
  const RecvShared shared = recv_shared(carve, blockDim.x, args.lane.world, args.object.local);
  ClaimingReceiver(args, shared).run();
}
