// SPDX-License-Identifier: Apache-2.0
//
// dispatch_recv.cuh: rows that came, into a layout (dispatch_places.cuh says where each goes).
#pragma once

#include "moe/cuda/arrivals.cuh"
#include "moe/cuda/counts.h"
#include "moe/cuda/dispatch_headers.cuh"
#include "moe/cuda/dispatch_places.cuh"
#include "moe/cuda/stream.cuh"

namespace ept::moe::cuda {

class DispatchReceiver : public DispatchPlaces {
 public:
  EPT_DEVICE DispatchReceiver(const DispatchRecv &args, const RecvShared &shared) : DispatchPlaces(args, shared) {}

  EPT_DEVICE void run() {
    note(t, kDispatchRecv, 0);
    const uint32_t fault = fault_of(t);
    for (uint32_t r = threadIdx.x; r < world; r += blockDim.x) {
      s.rows[r] = s.begin[r] = 0;
      s.runs[r] = {0, 0, {1, 0}};
      s.next[r] = s.to_count[r] = s.counted[r] = 0;
    }
    look_up(t, EPT_PHASE_DISPATCH, generation, s.sources);
    if (threadIdx.x == 0) *s.totals = *s.next_blank = 0;
    const bool all = !taking(t, EPT_PHASE_DISPATCH).out;
    for (uint32_t i = threadIdx.x; i < world * local; i += blockDim.x) {
      s.cursor[i] = 0;
      if (!all) s.counts[i] = 0;  // of a rank that takes no part nobody else writes them
    }
    for (uint32_t r = threadIdx.x; r < world && !all; r += blockDim.x) s.return_at[r] = 0;
    if (!is_faulted(fault)) receive();
    note(t, kDispatchRecv, 3);
    const bool last = last_block(t, kDispatchRecv, s.word);
    if (last) {
      const uint32_t met = fault_of(t);
      if (met) blank_all();
      if (a.mirror && warp_id() == 0) mirror(met);
      end_half(t, kDispatchRecv, &t.state->received[EPT_PHASE_DISPATCH], generation);
    }
    note(t, kDispatchRecv, 5);
  }

  EPT_DEVICE void receive() {
    note(t, kDispatchRecv, 1);
    scout(t, kDispatchRecv, EPT_PHASE_DISPATCH, generation, s.sources, *this);
    note(t, kDispatchRecv, 2);
    const bool whole = work_as_they_come(
        t, s.sources.standing, s.next, [&](uint32_t source) { help(source); },
        [&] {
          add_up();
          if (from_lane(peek(s.totals), 0) == 2) (void)blank_some();
        },
        [&](uint32_t source) { return units(source); },
        [&](uint32_t source, uint32_t unit) {
          copy(source, unit);
          note_source(t, EPT_PHASE_DISPATCH, source, true);
        });
    note(t, kDispatchRecv, 4);
    if (whole) blanks();
  }

  // Outputs as if nothing had come: what a faulted lane gives. One block.
  EPT_DEVICE void blank_all() const {
    const uint64_t first = threadIdx.x, step = blockDim.x;
    const uint64_t rows = uint64_t(leading) * a.outer, per_row = vectors;
    for (uint64_t i = first; i < rows * per_row && a.x.data; i += step)
      store16(a.x.at(i / per_row) + i % per_row * 16, Vector{});
    for (uint64_t row = first; row < rows; row += step) {
      blank(row);
      for (uint32_t i = 0; a.scales.data && i * a.scale_size < a.scale_bytes; i++)
        for (uint32_t b = 0; b < a.scale_size; b++) a.scales.at(row)[i * a.scales.column + b] = 0;
    }
    for (uint64_t e = first; e <= local; e += step) {
      if (a.counts && e < local) a.counts[e] = 0;
      if (a.offsets) a.offsets[e] = 0;
    }
    if (first == 0) *a.num_rows = 0;
    for (uint64_t r = first; r <= world; r += step) a.routing.begin[r] = 0;
  }

  // By one warp of the last block, whose own sums are there where the lane has no fault.
  EPT_DEVICE void mirror(uint32_t met) const {
    const uint64_t epoch = object.mirrored[t.lane] + 1;
    Counts *to = a.mirror->slot(epoch, local);
    auto *counts = reinterpret_cast<int32_t *>(to + 1);
    for (uint32_t e = lane_id(); e < local; e += kWarp) counts[e] = met ? 0 : int32_t(s.sums[e]);
    __syncwarp();
    if (lane_id() != 0) return;
    to->ticket = a.ticket;
    to->rows = met ? 0 : int32_t(a.layout == kContiguous ? s.starts[local] : s.begin[world]);
    to->fault = int32_t(met);
    object.mirrored[t.lane] = epoch;
    Hardware::release_system(&a.mirror->epoch, epoch);
  }

  // ---- what the scouts ask ----

  EPT_DEVICE bool header(uint32_t source) {
    if (blockIdx.x == 0) note_source(t, EPT_PHASE_DISPATCH, source, false);
    if (!read_dispatch_header(t, object, kDispatchRecv, generation, membership, source, a.scale_bytes, a.payload_format,
                              a.scale_format, s))
      return false;
    __syncwarp();
    share(source);
    __syncwarp();
    foresee(source);
    return true;
  }

  EPT_DEVICE bool may_begin(uint32_t source) const {
    if (a.layout == kByRank) return true;
    if (per_expert) {
      help(source);
      const uint32_t counted = from_lane(peek(&s.counted[source]), 0);
      __threadfence_block();
      if (counted != groups_before(source)) return false;
    }
    const uint32_t until = a.layout == kContiguous ? world : source;
    uint32_t lacks = 0;
    for (uint32_t r = lane_id(); r < until; r += kWarp)
      if (r != source && peek(&s.sources.standing[r]) == kAway) lacks = 1;
    const bool may = __ballot_sync(kAll, int(lacks)) == 0;
    __threadfence_block();  // their headers were written before they were shown
    return may;
  }

  EPT_DEVICE bool begin(uint32_t source) {
    uint64_t needed = s.rows[source];
    if (a.layout != kByRank) {
      uint32_t before = 0;
      for (uint32_t r = lane_id(); r < source; r += kWarp) before += s.rows[r];
      before = warp_sum(before);
      if (lane_id() == 0) s.begin[source] = before;
      if (a.layout == kRows) needed += before;
    }
    __syncwarp();
    if (a.layout == kContiguous) needed = groups(source);
    if (a.layout == kMasked) needed = 0;  // place by place, in index()
    if (needed > leading) {
      if (lane_id() == 0)
        raise_fault(t, uint32_t(-EPT_E_CAPACITY), kDispatchRecv, int32_t(source), kRoom, generation, needed, leading);
      return false;
    }
    return !per_expert || index(source);
  }

 protected:
  EPT_DEVICE void copy(uint32_t source, uint32_t unit) const {
    const BlockRun run = run_of(source);
    const uint32_t nth = run.parts.of(unit), part = unit - nth * run.parts.by, j = run.first + nth;
    const char *row = rows_of(source) + uint64_t(j) * row_bytes;
    const uint64_t number = uint64_t(s.begin[source]) + j;
    // What rest() reads comes beside the payload.
    const uint32_t beside = uint32_t(ept_row_scales(object.payload)) + lane_id() * 32;
    if (part == 0 && beside < row_bytes) prefetch(row + beside);
    int32_t place = -1;
    if (per_expert) {
      const int32_t *places =
          nth < s.kept ? s.places + (source * s.kept + nth) * top_k : &a.routing.place[number * top_k];
      if (lane_id() < top_k) place = places[lane_id()];
    } else if (lane_id() == 0) {
      place = int32_t(a.layout == kByRank ? source * leading + j : number);
    }
    const uint32_t places = __ballot_sync(kAll, int(place >= 0));
    payload(row, place, places, part, run.parts);
    if (part == 0) rest(source, row, place, places);
  }

  EPT_DEVICE void payload(const char *row, int32_t place, uint32_t places, uint32_t part, Divisor cut) const {
    if (!a.x.data) return;
    char *to = place >= 0 ? a.x.at(uint64_t(place)) : nullptr;
    const Span16 span = span_of(vectors, part, cut, kPair);
    const uint32_t until = places ? span.to : 0;
    uint32_t asked = span.from + lane_id(), v = asked;
    stream<kPair, false, kPairApart>(
        s.ring, places ? span.rounds(kPair) : 0,
        [&] {
          const Fetch here = pair_at(row, asked, until);
          asked += kPair * kWarp;
          return here;
        },
        [&](const Vector(&held)[kPair]) {
          EPT_ROLLED
          for (uint32_t left = places; left; left &= left - 1) {
            char *there = from_lane(to, uint32_t(__ffs(int(left)) - 1)) + uint64_t(v) * 16;
            if (v < span.to) store16(there, held[0]);
            if (v + kWarp < span.to) store16(there + kPairApart, held[1]);
          }
          v += kPair * kWarp;
        });
  }

  // Scales, and who the row is of and for.
  EPT_DEVICE void rest(uint32_t source, const char *row, int32_t place, uint32_t places) const {
    const uint32_t token = *reinterpret_cast<const uint32_t *>(row + ept_row_token(object.payload, a.scale_bytes));
    const char *scales = row + ept_row_scales(object.payload);
    const auto *experts = reinterpret_cast<const int32_t *>(row + ept_row_experts(object.payload, a.scale_bytes));
    const auto *weights = reinterpret_cast<const float *>(row + ept_row_weights(object.payload, a.scale_bytes, top_k));
    const bool weighed = !(s.flags[source] & EPT_MOE_NO_WEIGHTS);
    int32_t expert = -1;
    float weight = 1.0f;
    if (lane_id() < top_k) {
      if (!per_expert) expert = experts[lane_id()];
      if (weighed) weight = weights[lane_id()];
    }
    if (token >= object.max_tokens && lane_id() == 0)
      raise_fault(t, uint32_t(-EPT_E_MISMATCH), kDispatchRecv, int32_t(source), kRow, generation, object.max_tokens,
                  token);
    if (a.scales.data) {
      if (a.scale_size == 4)
        scatter<uint32_t>(scales, place, places);
      else
        scatter<uint8_t>(scales, place, places);
    }
    // A place a lane.
    if (place >= 0 && a.source.data) {
      char *to = a.source.at(uint64_t(place));
      *reinterpret_cast<uint32_t *>(to) = source;
      *reinterpret_cast<uint32_t *>(to + a.source.column) = token;
    }
    if (per_expert) {
      if (place >= 0 && a.weights.data) *reinterpret_cast<float *>(a.weights.at(uint64_t(place))) = weight;
      return;
    }
    const auto at = uint64_t(uint32_t(from_lane(place, 0)));
    if (lane_id() >= top_k) return;
    if (expert < -1 || expert >= int32_t(local))
      raise_fault(t, uint32_t(-EPT_E_MISMATCH), kDispatchRecv, int32_t(source), kRow, generation, local,
                  uint32_t(expert));
    if (a.ids.data) *reinterpret_cast<int32_t *>(a.ids.at(at) + lane_id() * a.ids.column) = expert;
    if (a.weights.data)
      *reinterpret_cast<float *>(a.weights.at(at) + lane_id() * a.weights.column) =
          !weighed && expert < 0 ? 0.0f : weight;
  }
  // A row's scales to its places, by whole scales or by bytes of them.
  template <class T>
  EPT_DEVICE void scatter(const char *from, int32_t place, uint32_t places) const {
    const uint32_t count = a.scale_bytes / uint32_t(sizeof(T)), each = a.scale_size / uint32_t(sizeof(T));
    char *to = place >= 0 ? a.scales.at(uint64_t(place)) : nullptr;
    EPT_ROLLED
    for (uint32_t base = 0; base < count; base += kWarp) {
      const uint32_t i = base + lane_id();
      const T value = i < count ? reinterpret_cast<const T *>(from)[i] : T(0);
      const int64_t offset = int64_t(i / each) * a.scales.column + i % each * uint32_t(sizeof(T));
      EPT_ROLLED
      for (uint32_t left = places; left; left &= left - 1) {
        char *there = from_lane(to, uint32_t(__ffs(int(left)) - 1));
        if (i < count) *reinterpret_cast<T *>(there + offset) = value;
      }
    }
  }

  EPT_DEVICE void blank(uint64_t row) const {
    for (uint32_t i = 0; i < 2 && a.source.data; i++)
      *reinterpret_cast<int32_t *>(a.source.at(row) + i * a.source.column) = -1;
    for (uint32_t k = 0; k < (per_expert ? 1 : top_k); k++) {
      if (a.weights.data) *reinterpret_cast<float *>(a.weights.at(row) + k * a.weights.column) = 0.0f;
      if (a.ids.data && !per_expert) *reinterpret_cast<int32_t *>(a.ids.at(row) + k * a.ids.column) = -1;
    }
  }

  // All headers are in: counts, offsets, and what combine must know. One warp does it, while others have rows to copy.
  EPT_DEVICE void add_up() const {
    uint32_t mine = 0;
    if (lane_id() == 0 && peek(s.totals) == 0) mine = atomicCAS(s.totals, 0u, 1u) == 0;
    if (!from_lane(mine, 0)) return;
    __threadfence_block();  // headers were written before they were shown
    const bool tells = blockIdx.x == 0;
    for (uint32_t e = lane_id(); e < local; e += kWarp) {
      uint32_t n = 0;
      for (uint32_t r = 0; r < world; r++) n += s.counts[r * local + e];
      s.sums[e] = n;
      if (tells && a.counts) a.counts[e] = int32_t(n);
    }
    __syncwarp();
    const uint32_t rows = prefix(s.begin, world, [&](uint32_t r) { return s.rows[r]; });
    const uint32_t ends = prefix(s.starts, local, [&](uint32_t e) { return aligned(s.sums[e]); });
    if (lane_id() == 0) {
      s.begin[world] = rows;
      s.starts[local] = ends;
      if (tells) *a.num_rows = int32_t(a.layout == kContiguous ? ends : rows);
    }
    show(s.totals, 2);
    if (!tells) return;
    for (uint32_t r = lane_id(); r <= world; r += kWarp) a.routing.begin[r] = s.begin[r];
    for (uint32_t r = lane_id(); r < world; r += kWarp) a.routing.return_at[r] = s.return_at[r];
    for (uint32_t e = lane_id(); e <= local && a.offsets; e += kWarp) a.offsets[e] = int32_t(s.starts[e]);
  }
  // What stands where no row does: by warps that wait for rows, and in the end by all.
  EPT_DEVICE void blanks() const {
    while (from_lane(peek(s.totals), 0) != 2) EPT_REST();
    while (blank_some()) {}
  }
  // A warp's worth of rows. Totals are there. False: no row was left.
  EPT_DEVICE bool blank_some() const {
    __threadfence_block();
    const uint32_t rows = leading * a.outer;
    uint32_t unit = ~0u;
    if (lane_id() == 0 && uint64_t(peek(s.next_blank)) * gridDim.x * kWarp < rows) unit = atomicAdd(s.next_blank, 1u);
    unit = from_lane(unit, 0);
    const uint64_t first = uint64_t(unit) * gridDim.x * kWarp + blockIdx.x * kWarp;
    if (unit == ~0u || first >= rows) return false;
    const uint32_t row = uint32_t(first) + lane_id();
    if (row < rows && !filled(row)) blank(row);
    __syncwarp();
    return true;
  }
  // to[i]: what stands before i, of n. One warp; returns the sum of all.
  template <class Of>
  EPT_DEVICE uint32_t prefix(uint32_t *to, uint32_t n, Of of) const {
    uint32_t before = 0;
    for (uint32_t base = 0; base < n; base += kWarp) {
      const uint32_t i = base + lane_id(), value = i < n ? of(i) : 0, upto = warp_prefix(value);
      if (i < n) to[i] = before + upto - value;
      before += from_lane(upto, kWarp - 1);
    }
    return before;
  }
  EPT_DEVICE bool filled(uint32_t row) const {
    if (a.layout == kRows) return row < s.begin[world];
    const uint32_t group = a.leading.of(row);
    if (a.layout == kByRank) return row - group * leading < s.rows[group];
    if (a.layout == kMasked) return row - group * leading < s.sums[group];
    if (row >= s.starts[local]) return false;
    uint32_t low = 0, high = local;  // the last group that begins at or before the row
    while (high - low > 1) {
      const uint32_t middle = (low + high) / 2;
      (s.starts[middle] <= row ? low : high) = middle;
    }
    return row - s.starts[low] < s.sums[low];
  }
};

}  // namespace ept::moe::cuda

EPT_KERNEL moe_dispatch_recv(EPT_ARGUMENT(ept::moe::cuda::DispatchRecv) args) {
  using namespace ept::moe::cuda;
  if (!args.lane.world) return;
  EPT_SHARED(memory);
  Carve carve(memory);
  const RecvShared shared = recv_shared(carve, blockDim.x, args.lane.world, args.object.local, args.object.top_k);
  DispatchReceiver(args, shared).run();
}
