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

  EPT_DEVICE void run() { run(*this); }

  // What differs where rows are claimed (dispatch_claims.cuh), beside header():

  EPT_DEVICE void claim_first() {}
  // False: the lane is faulted.
  EPT_DEVICE bool rows() {
    return work_as_they_come(
        t, s.sources.standing, s.next, [&] { all_in(); }, [&](uint32_t source) { return units(source); },
        [&](uint32_t source, uint32_t unit) {
          Row row = dealt(source, unit);
          if (!row.at) return;
          const Span16 span = span_of(row);
          fetch(row, span);
          const int32_t place = placed(row);
          move(row, span, place, [] {});
          finish(row, place);
        });
  }

 protected:
  // `self`: this, as what it is.
  template <class Self>
  EPT_DEVICE void run(Self &self) {
    note(t, kDispatchRecv, 0);
    for (uint32_t r = threadIdx.x; r < world; r += blockDim.x) {
      s.rows[r] = s.begin[r] = 0;
      s.runs[r].rows = s.runs[r].claims = 0;
      s.next[r] = 0;
    }
    look_up(t, EPT_PHASE_DISPATCH, generation, membership, at_first.origin, s.sources,
            [&](uint32_t r) { return message_of(r); });
    if (threadIdx.x == 0) *s.totals = *s.next_blank = 0;
    bulk.begin();
    const bool all = membership == 0;
    // Of a rank that takes no part nobody else writes them.
    for (uint32_t i = threadIdx.x; i < world * local && !all; i += blockDim.x) s.counts[i] = 0;
    for (uint32_t r = threadIdx.x; r < world && !all; r += blockDim.x) s.return_at[r] = 0;
    const bool works = !is_faulted(at_first.fault);
    const Leaving leaving = leave_recv(t, kDispatchRecv);
    if (works) receive(self);
    end_recv(leaving, t, kDispatchRecv, EPT_PHASE_DISPATCH, generation);
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

  template <class Self>
  EPT_DEVICE void receive(Self &self) {
    note(t, kDispatchRecv, 1);
    self.claim_first();
    scout(t, kDispatchRecv, EPT_PHASE_DISPATCH, generation, s.sources, self);
    note(t, kDispatchRecv, 2);
    const bool whole = self.rows();
    note(t, kDispatchRecv, 4);
    if (whole) blanks();
  }
  // All headers are in, and this warp has no row.
  EPT_DEVICE void all_in() const {
    add_up();
    if (from_lane(peek(s.totals), 0) == 2) (void)blank_some();
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

 public:
  // ---- what the scouts ask ----

  EPT_DEVICE bool header(uint32_t source) {
    if (blockIdx.x == 0) note_source(t, EPT_PHASE_DISPATCH, source, false);
    // These are under way with the header.
    const uint32_t numbers = t.lists ? first_listed(source) : 0;
    const char *there = memory(source);
    Divisor cut;
    if (!read_header(source, there, [&] { cut = cut_for(lane_id() + 1); })) return false;
    if (lane_id() < kListed) s.runs[source].numbers[lane_id()] = numbers;
    share(source, there, cut);
    return true;
  }

  EPT_DEVICE bool may_begin(uint32_t source) const {
    if (a.layout == kByRank || (source == 0 && a.layout != kContiguous)) return true;
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
  EPT_DEVICE const char *memory(uint32_t source) const { return world > 1 ? memory_of(t, source) : nullptr; }
  EPT_DEVICE DispatchFormat format() const { return {a.scale_bytes, a.payload_format, a.scale_format}; }
  template <class Amid>
  EPT_DEVICE bool read_header(uint32_t source, const char *there, Amid amid) const {
    const bool good = read_dispatch_header(t, object, kDispatchRecv, generation, membership, source, format(), s, there,
                                           blockIdx.x == 0, amid);
    __syncwarp();
    return good;
  }

  // A part of a row that a warp moves, and what part 0 has beside its payload: that is asked for before the payload,
  // and so is there after it. With a wait of its own it took as long as the payload of half a row.
  struct Row {
    const char *at = nullptr;  // NULL: there is none
    uint32_t source = 0, j = 0, its = 0, part = 0;
    uint32_t token = 0, scales[2] = {};  // scales: numbers lane and lane + kWarp
    Pair pair;                           // number lane
  };
  // Unit `unit` of those that this block has of the source.
  EPT_DEVICE Row dealt(uint32_t source, uint32_t unit) const {
    const SourceRun &run = s.runs[source];
    const uint32_t nth = run.parts.of(unit), j = run.first + nth * run.step;
    Row row;
    row.part = unit - nth * run.parts.by;
    find(row, source, j, is_listed(source) ? number_of(source, nth) : j);
    return row;
  }
  // Row j of the source, which stands as row `its`.
  EPT_DEVICE void find(Row &row, uint32_t source, uint32_t j, uint32_t its) const {
    row.source = source, row.j = j, row.its = its;
    if (its < object.max_tokens)
      row.at = s.runs[source].from + uint64_t(its) * row_bytes;
    else
      (void)refuse(source, kRow, object.max_tokens, its);
  }
  // It comes.
  EPT_DEVICE void fetch(Row &row, const Span16 &span) {
    if (has_copies())
      start(row.at, stretch_of(row, span));
    else
      start(row.at, span);
    if (per_expert && lane_id() < top_k) row.pair = pair_of(row.source, row.at, lane_id());
    if (row.part == 0) ask(row);
  }
  // The place of the row that is the lane's, or -1.
  EPT_DEVICE int32_t placed(const Row &row) const {
    if (per_expert) return place_of(row.source, row.pair);
    if (lane_id() != 0) return -1;
    return int32_t((a.layout == kByRank ? row.source * leading : s.runs[row.source].begin) + row.j);
  }
  // A row that comes, to its places. amid(): when most of it has.
  template <class Amid>
  EPT_DEVICE void move(const Row &row, const Span16 &span, int32_t place, Amid amid) {
    if (has_copies()) {
      runs(row.at, stretch_of(row, span), place, amid);
    } else {
      payload(row.at, span, place);
      amid();
    }
  }
  EPT_DEVICE void finish(const Row &row, int32_t place) const {
    if (row.part == 0 && is_listed(row.source) && row.token != row.its) {
      (void)refuse(row.source, kRow, row.its, row.token);
    } else if (row.part == 0) {
      if (per_expert && lane_id() < top_k) keep_place(row.source, row.j, lane_id(), place, row.pair);
      rest(row, place);
    }
    note_source(t, EPT_PHASE_DISPATCH, row.source, true);
  }

  // Scales stand behind the payload, and move with its last part where they stand together in the output too.
  EPT_DEVICE bool scales_in_runs() const { return has_copies() && a.scale_runs; }
  // Bytes of a row: so many of its payload, and what follows them.
  struct Stretch {
    uint32_t from, payload, all;
  };
  EPT_DEVICE Stretch stretch_of(const Row &row, const Span16 &span) const {
    const bool last = row.part + 1 == s.runs[row.source].parts.by;
    const uint32_t payload = a.x.data ? (span.to - span.from) * 16 : 0;
    const uint32_t from = a.x.data ? span.from * 16 : uint32_t(ept_row_scales(object.payload));
    return {from, payload, payload + (last && scales_in_runs() ? a.scale_bytes : 0)};
  }
  EPT_DEVICE Span16 span_of(const Row &row) const {
    return cuda::span_of(vectors, row.part, s.runs[row.source].parts, kPair);
  }
  // By the copy engine: the first run of it.
  EPT_DEVICE void start(const char *row, const Stretch &its) const {
    if (its.all) bulk.fetch(row + its.from, smaller(its.all, BulkRun::kMost));
  }
  // All runs of it, of which the first comes. amid(): before the last is waited for.
  template <class Amid>
  EPT_DEVICE void runs(const char *row, const Stretch &its, int32_t place, Amid amid) {
    char *x = place >= 0 && its.payload ? a.x.at(uint64_t(place)) + its.from : nullptr;
    char *scales = place >= 0 && its.all > its.payload ? a.scales.at(uint64_t(place)) : nullptr;
    for (uint32_t done = 0;;) {
      const uint32_t bytes = smaller(its.all - done, BulkRun::kMost);
      if (done + bytes == its.all) amid();
      if (!bytes) return;
      const char *run = bulk.await();
      const uint32_t of_x = done < its.payload ? smaller(bytes, its.payload - done) : 0;
      if (x && of_x) bulk.put(x + done, run, of_x);
      if (scales && of_x < bytes) bulk.put(scales + (done + of_x - its.payload), run + of_x, bytes - of_x);
      bulk.end_puts();
      done += bytes;
      if (done == its.all) return;
      bulk.fetch(row + its.from + done, smaller(its.all - done, BulkRun::kMost));
    }
  }
  // By threads: its first steps, and, when they come, all of it.
  EPT_DEVICE auto pairs_of(const char *row, const Span16 &span, uint32_t step) const {
    return [row, until = a.x.data ? span.to : 0, v = span.from + step * kPair * kWarp + lane_id()]() mutable {
      const Fetch here = pair_at(row, v, until);
      v += kPair * kWarp;
      return here;
    };
  }
  EPT_DEVICE void start(const char *row, const Span16 &span) const {
    start_stream<kPair, false, kPairApart>(s.ring, pairs_of(row, span, 0));
  }
  EPT_DEVICE void payload(const char *row, const Span16 &span, int32_t place) const {
    const uint32_t places = a.x.data ? __ballot_sync(kAll, int(place >= 0)) : 0;
    const auto n = uint32_t(__popc(places));
    char **to = s.to + warp_id() * kWarp;
    if (places >> lane_id() & 1) to[__popc(places & below())] = a.x.at(uint64_t(place));
    __syncwarp();
    uint32_t v = span.from + lane_id();
    finish_stream<kPair, false, kPairApart>(s.ring, span.rounds(kPair), pairs_of(row, span, kFirst<kPair>),
                                            [&](const Vector(&held)[kPair]) {
                                              put_step(to, n, held, v, span.to);
                                              v += kPair * kWarp;
                                            });
    __syncwarp();
  }

  EPT_DEVICE void ask(Row &row) const {
    if (!per_expert && lane_id() < top_k) row.pair = pair_of(row.source, row.at, lane_id());
    row.token = *reinterpret_cast<const uint32_t *>(row.at + ept_row_token(object.payload, a.scale_bytes));
    if (scales_in_runs()) return;
    const char *scales = row.at + ept_row_scales(object.payload);
    EPT_UNROLL
    for (uint32_t i = 0; i < 2; i++) row.scales[i] = scale_at(scales, lane_id() + i * kWarp);
  }

  // Scales, and who the row is of and for.
  EPT_DEVICE void rest(const Row &its, int32_t place) const {
    const uint32_t source = its.source;
    const uint32_t places = __ballot_sync(kAll, int(place >= 0));
    if (its.token >= object.max_tokens && lane_id() == 0)
      raise_fault(t, uint32_t(-EPT_E_MISMATCH), kDispatchRecv, int32_t(source), kRow, generation, object.max_tokens,
                  its.token);
    if (a.scales.data && !scales_in_runs()) scatter(its.at + ept_row_scales(object.payload), its, place, places);
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
  EPT_DEVICE void scatter(const char *scales, const Row &its, int32_t place, uint32_t places) const {
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
