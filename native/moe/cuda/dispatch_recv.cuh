// SPDX-License-Identifier: Apache-2.0
//
// dispatch_recv.cuh: rows that came, into a layout (dispatch_places.cuh says where each goes).
#pragma once

#include "moe/cuda/arrivals.cuh"
#include "moe/cuda/bulk.cuh"
#include "moe/cuda/counts.h"
#include "moe/cuda/dispatch_headers.cuh"
#include "moe/cuda/dispatch_places.cuh"
#include "moe/cuda/stream.cuh"

namespace ept::moe::cuda {

class DispatchReceiver : public DispatchPlaces {
 public:
  EPT_DEVICE DispatchReceiver(const DispatchRecv &args, const RecvShared &shared)
      : DispatchPlaces(args, shared), bulk(shared.ring, shared.arrived) {}

  EPT_DEVICE void run() {
    note(t, kDispatchRecv, 0);
    const uint32_t fault = fault_of(t);
    for (uint32_t r = threadIdx.x; r < world; r += blockDim.x) {
      s.rows[r] = s.begin[r] = 0;
      s.runs[r].rows = 0;
      s.next[r] = 0;
    }
    look_up(t, EPT_PHASE_DISPATCH, generation, s.sources);
    if (threadIdx.x == 0) *s.totals = *s.next_blank = 0;
    bulk.begin();
    const bool all = !taking(t, EPT_PHASE_DISPATCH).out;
    // Of a rank that takes no part nobody else writes them.
    for (uint32_t i = threadIdx.x; i < world * local && !all; i += blockDim.x) s.counts[i] = 0;
    for (uint32_t r = threadIdx.x; r < world && !all; r += blockDim.x) s.return_at[r] = 0;
    const bool works = !is_faulted(fault);
    leave_recv(t, kDispatchRecv, EPT_PHASE_DISPATCH, generation);
    if (works) receive();
    const uint32_t met = fault_of(t);  // on its way while rows are written
    bulk.end();
    note(t, kDispatchRecv, 3);
    const bool faulted = is_faulted(met), tells = a.mirror && blockIdx.x == 0;
    tell_end(t, EPT_PHASE_DISPATCH, generation);
    if (faulted || tells) {
      const bool first = all_ended(t, EPT_PHASE_DISPATCH, generation, s.word);
      if (faulted && first) blank_all();
      if (tells && warp_id() == 0) mirror(fault_of(t));
    }
    note(t, kDispatchRecv, 5);
  }

  EPT_DEVICE void receive() {
    note(t, kDispatchRecv, 1);
    scout(t, kDispatchRecv, EPT_PHASE_DISPATCH, generation, s.sources, *this);
    note(t, kDispatchRecv, 2);
    const bool whole = work_as_they_come(
        t, s.sources.standing, s.next,
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

  // By one warp of a block whose own sums are there, where the lane has no fault.
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
    // These are under way with the header.
    const uint32_t numbers = t.lists ? first_listed(source) : 0;
    const char *there = world > 1 ? memory_of(t, source) : nullptr;
    if (!read_dispatch_header(t, object, kDispatchRecv, generation, membership, source, a.scale_bytes, a.payload_format,
                              a.scale_format, s, there))
      return false;
    __syncwarp();
    if (lane_id() < kListed) s.runs[source].numbers[lane_id()] = numbers;
    share(source, there);
    return true;
  }

  EPT_DEVICE bool may_begin(uint32_t source) const {
    if (a.layout == kByRank) return true;
    const uint32_t until = a.layout == kContiguous ? world : source;
    uint32_t lacks = 0;
    for (uint32_t r = lane_id(); r < until; r += kWarp)
      if (r != source && peek(&s.sources.standing[r]) == kAway) lacks = 1;
    const bool may = __ballot_sync(kAll, int(lacks)) == 0;
    fence_block();  // their headers were written before they were shown
    return may;
  }

  EPT_DEVICE bool begin(uint32_t source) {
    uint64_t needed = s.rows[source];
    if (a.layout != kByRank) {
      uint32_t before = 0;
      for (uint32_t r = lane_id(); r < source; r += kWarp) before += s.rows[r];
      before = warp_sum(before);
      if (lane_id() == 0) s.runs[source].begin = before;
      if (a.layout == kRows) needed += before;
    }
    __syncwarp();
    if (per_expert) needed = groups(source);  // MASKED: pair by pair, in place_of
    if (needed > leading) {
      if (lane_id() == 0)
        raise_fault(t, uint32_t(-EPT_E_CAPACITY), kDispatchRecv, int32_t(source), kRoom, generation, needed, leading);
      return false;
    }
    return true;
  }

 protected:
  EPT_DEVICE void copy(uint32_t source, uint32_t unit) {
    const SourceRun &run = s.runs[source];
    const uint32_t nth = run.parts.of(unit), part = unit - nth * run.parts.by, j = run.first + nth * gridDim.x;
    const uint32_t its = is_listed(source) ? number_of(source, nth) : j;
    if (its >= object.max_tokens) return (void)refuse(source, kRow, object.max_tokens, its);
    const char *row = run.from + uint64_t(its) * row_bytes;
    Beside beside;
    int32_t place = -1;
    move(row, span_of(vectors, part, run.parts, kPair), part + 1 == run.parts.by, [&] {
      if (per_expert && lane_id() < top_k) beside.pair = pair_of(source, row, lane_id());
      if (part == 0) ask(source, row, beside);
      if (per_expert)
        place = place_of(source, beside.pair);
      else if (lane_id() == 0)
        place = int32_t((a.layout == kByRank ? source * leading : run.begin) + j);
      return place;
    });
    if (part != 0) return;
    if (is_listed(source) && beside.token != its) return (void)refuse(source, kRow, its, beside.token);
    if (per_expert && lane_id() < top_k) keep_place(source, j, lane_id(), place, beside.pair);
    rest(source, row, beside, place);
  }

  // where() gives the lane a place of the row, or -1, while the first of it comes.
  template <class Where>
  EPT_DEVICE void move(const char *row, const Span16 &span, bool last, Where where) {
    if (has_copies())
      runs(row, span, last, where);
    else
      payload(row, span, where);
  }
  // Scales stand behind the payload, and move with its last part where they stand together in the output too.
  EPT_DEVICE bool scales_in_runs() const { return has_copies() && a.scale_runs; }
  // By the copy engine.
  template <class Where>
  EPT_DEVICE void runs(const char *row, const Span16 &span, bool last, Where where) {
    const uint32_t payload = a.x.data ? (span.to - span.from) * 16 : 0;
    const uint32_t from = a.x.data ? span.from * 16 : uint32_t(ept_row_scales(object.payload));
    const uint32_t all = payload + (last && scales_in_runs() ? a.scale_bytes : 0);
    uint32_t done = 0, bytes = smaller(all, BulkRun::kMost);
    if (bytes) bulk.fetch(row + from, bytes);
    const int32_t place = where();
    char *x = place >= 0 && payload ? a.x.at(uint64_t(place)) + from : nullptr;
    char *scales = place >= 0 && all > payload ? a.scales.at(uint64_t(place)) : nullptr;
    while (bytes) {
      const char *run = bulk.await();
      const uint32_t its = done < payload ? smaller(bytes, payload - done) : 0;
      if (x && its) bulk.put(x + done, run, its);
      if (scales && its < bytes) bulk.put(scales + (done + its - payload), run + its, bytes - its);
      bulk.end_puts();
      done += bytes;
      bytes = smaller(all - done, BulkRun::kMost);
      if (bytes) bulk.fetch(row + from + done, bytes);
    }
  }
  // By threads.
  template <class Where>
  EPT_DEVICE void payload(const char *row, const Span16 &span, Where where) const {
    const uint32_t until = a.x.data ? span.to : 0;
    uint32_t asked = span.from + lane_id(), v = asked;
    const auto next = [&] {
      const Fetch here = pair_at(row, asked, until);
      asked += kPair * kWarp;
      return here;
    };
    start_stream<kPair, false, kPairApart>(s.ring, next);
    const int32_t place = where();
    const uint32_t places = a.x.data ? __ballot_sync(kAll, int(place >= 0)) : 0;
    const auto n = uint32_t(__popc(places));
    char **to = s.to + warp_id() * kWarp;
    if (places >> lane_id() & 1) to[__popc(places & below())] = a.x.at(uint64_t(place));
    __syncwarp();
    finish_stream<kPair, false, kPairApart>(s.ring, span.rounds(kPair), next, [&](const Vector(&held)[kPair]) {
      put_step(to, n, held, v, span.to);
      v += kPair * kWarp;
    });
    __syncwarp();
  }

  // What a row has beside its payload, as this lane knows it. It is asked for before the payload, and so is there after
  // it: with a wait of its own it took as long as the payload of half a row.
  struct Beside {
    uint32_t token = 0, scales[2] = {};  // scales: numbers lane and lane + kWarp
    Pair pair;                           // number lane
  };
  EPT_DEVICE void ask(uint32_t source, const char *row, Beside &its) const {
    if (!per_expert && lane_id() < top_k) its.pair = pair_of(source, row, lane_id());
    its.token = *reinterpret_cast<const uint32_t *>(row + ept_row_token(object.payload, a.scale_bytes));
    if (scales_in_runs()) return;
    const char *scales = row + ept_row_scales(object.payload);
    EPT_UNROLL
    for (uint32_t i = 0; i < 2; i++) its.scales[i] = scale_at(scales, lane_id() + i * kWarp);
  }

  // Scales, and who the row is of and for.
  EPT_DEVICE void rest(uint32_t source, const char *row, const Beside &its, int32_t place) const {
    const uint32_t places = __ballot_sync(kAll, int(place >= 0));
    if (its.token >= object.max_tokens && lane_id() == 0)
      raise_fault(t, uint32_t(-EPT_E_MISMATCH), kDispatchRecv, int32_t(source), kRow, generation, object.max_tokens,
                  its.token);
    if (a.scales.data && !scales_in_runs()) scatter(row + ept_row_scales(object.payload), its, place, places);
    // A place a lane.
    if (place >= 0 && a.source.data) {
      char *to = a.source.at(uint64_t(place));
      *reinterpret_cast<uint32_t *>(to) = source;
      *reinterpret_cast<uint32_t *>(to + a.source.column) = its.token;
    }
    if (per_expert) {
      if (place >= 0 && a.weights.data) *reinterpret_cast<float *>(a.weights.at(uint64_t(place))) = its.pair.weight;
      return;
    }
    const auto at = uint64_t(uint32_t(from_lane(place, 0)));
    if (!places || lane_id() >= top_k) return;
    if (its.pair.expert < -1 || its.pair.expert >= int32_t(local))
      raise_fault(t, uint32_t(-EPT_E_MISMATCH), kDispatchRecv, int32_t(source), kRow, generation, local,
                  uint32_t(its.pair.expert));
    if (a.ids.data) *reinterpret_cast<int32_t *>(a.ids.at(at) + lane_id() * a.ids.column) = its.pair.expert;
    if (a.weights.data)
      *reinterpret_cast<float *>(a.weights.at(at) + lane_id() * a.weights.column) =
          !is_weighed(source) && its.pair.expert < 0 ? 0.0f : its.pair.weight;
  }

  // Scales move by whole ones, or by bytes of them.
  EPT_DEVICE bool by_words() const { return a.scale_size == 4; }
  // That of them, where there is one.
  EPT_DEVICE uint32_t scale_at(const char *scales, uint32_t i) const {
    if (!a.scales.data) return 0;
    if (by_words()) return i * 4 < a.scale_bytes ? reinterpret_cast<const uint32_t *>(scales)[i] : 0;
    return i < a.scale_bytes ? uint8_t(scales[i]) : 0;
  }
  // A row's scales to its places.
  EPT_DEVICE void scatter(const char *scales, const Beside &its, int32_t place, uint32_t places) const {
    const uint32_t count = by_words() ? a.scale_bytes / 4 : a.scale_bytes;
    char *to = place >= 0 ? a.scales.at(uint64_t(place)) : nullptr;
    EPT_ROLLED
    for (uint32_t round = 0; round * kWarp < count; round++) {
      const uint32_t i = round * kWarp + lane_id();
      const uint32_t value = round == 0 ? its.scales[0] : round == 1 ? its.scales[1] : scale_at(scales, i);
      const int64_t offset = by_words() ? i * a.scales.column : i / a.scale_size * a.scales.column + i % a.scale_size;
      EPT_ROLLED
      for (uint32_t left = places; left; left &= left - 1) {
        char *there = from_lane(to, uint32_t(__ffs(int(left)) - 1)) + offset;
        if (i >= count) continue;
        if (by_words())
          *reinterpret_cast<uint32_t *>(there) = value;
        else
          *there = char(value);
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
    fence_block();  // headers were written before they were shown
    const bool tells = blockIdx.x == 0;
    for (uint32_t e = lane_id(); e < local; e += kWarp) {
      uint32_t n = 0;
      for (uint32_t r = 0; r < world; r++) n += s.counts[r * local + e];
      s.sums[e] = n;
      if (tells && a.counts) a.counts[e] = int32_t(n);
    }
    __syncwarp();
    const uint32_t rows = prefix(s.begin, world, [&](uint32_t r) { return s.rows[r]; });
    // Where groups follow one another: with 256 experts all warps would wait for it.
    const bool follow = a.layout == kContiguous || a.offsets;
    const uint32_t ends = follow ? prefix(s.starts, local, [&](uint32_t e) { return aligned(s.sums[e]); }) : 0;
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
    fence_block();
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

 protected:
  BulkRun bulk;
};

}  // namespace ept::moe::cuda

EPT_KERNEL moe_dispatch_recv(EPT_ARGUMENT(ept::moe::cuda::DispatchRecv) args) {
  using namespace ept::moe::cuda;
  if (!args.lane.world) return;
  EPT_SHARED(memory);
  Carve carve(memory);
  const RecvShared shared = recv_shared(carve, blockDim.x, args.lane.world, args.object.local);
  DispatchReceiver(args, shared).run();
}
