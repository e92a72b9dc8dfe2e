// SPDX-License-Identifier: Apache-2.0
//
// combine.cuh: both halves of a combine. Sums are wire.h's: in fp32, by k at the expert's rank, by rank at the source.
#pragma once

#include "moe/cuda/arrivals.cuh"
#include "moe/cuda/dispatch_recv.cuh"
#include "moe/cuda/formats.cuh"
#include "moe/cuda/initiated.cuh"
#include "moe/cuda/shared.h"
#include "moe/cuda/sums.cuh"

namespace ept::moe::cuda {

// Messages are packed one rank after another, this rank's own last, so that each leaves as early as it can.
class CombineSender {
 public:
  EPT_DEVICE CombineSender(const CombineSend &args, const CombineShared &shared)
      : a(args),
        t(args.lane),
        s(shared),
        object(args.object),
        generation(args.lane.state->sent[EPT_PHASE_COMBINE]),
        world(fixed_or(EPT_FIXED_WORLD, args.lane.world)),
        top_k(fixed_or(EPT_FIXED_TOP_K, args.object.top_k)),
        row_bytes(ept_combine_row_bytes(args.object.returned, args.object.top_k, args.row_weights.data != nullptr)),
        groups(fixed_or(EPT_FIXED_HIDDEN, args.object.hidden) / kGroup) {}

  EPT_DEVICE void run() {
    note(t, kCombineSend, 0);
    const uint32_t fault = fault_of(t), membership = a.routing.membership[0], present = t.state->membership[kNext];
    begin();
    if (membership != present && threadIdx.x == 0)
      raise_fault(t, uint32_t(-EPT_E_FAULT), kCombineSend, -1, kMembers, generation, membership, present);
    const bool works =
        !is_faulted(fault | (membership ^ present)) && settle(t, kCombineSend, EPT_PHASE_COMBINE, generation);
    leave_send(t, kCombineSend, EPT_PHASE_COMBINE, generation);
    if (works) send();
    note(t, kCombineSend, 3);
    note(t, kCombineSend, 5);
  }

 protected:
  EPT_DEVICE void begin() {
    if (threadIdx.x == 0) *s.next = 0;
    for (uint32_t r = threadIdx.x; r <= world; r += blockDim.x) s.begin[r] = a.routing.begin[r];
    for (uint32_t r = blockDim.x - 1 - threadIdx.x; r < world; r += blockDim.x) {
      s.received[r] = t.map.recv(EPT_PHASE_COMBINE, slot()) + a.routing.return_at[r];
      s.message[r] = r == t.rank ? t.in[r] : device::window(t.paths[r], 0);
    }
  }
  EPT_DEVICE void send() {
    note(t, kCombineSend, 1);
    for (uint32_t r = threadIdx.x; r < world && blockIdx.x == 0; r += blockDim.x)
      expect(t, EPT_PHASE_COMBINE, generation, r, t.map.recv(EPT_PHASE_COMBINE, slot()) + a.routing.combine_at[r]);
    cut = divisor(parts_of((s.begin[world] + gridDim.x - 1) / gridDim.x, warps(), groups, 6, kPair));
    parts = cut.by;
    const Taking members = taking(t, kNext);
    for (uint32_t r = threadIdx.x; r < world; r += blockDim.x) {
      s.pieces[r] = s.pending[r] = pieces_of(r) + (r % gridDim.x == blockIdx.x && members.has(r));
      const uint64_t at =
          t.map.send(EPT_PHASE_COMBINE, slot()) + object.shape.combine_staging(r < t.rank ? r : r - 1).offset;
      s.message[r] = s.message[r] ? s.message[r] + s.received[r] : staged(t, r, at);
    }
    foresee();
    __syncthreads();
    headers();
    if (blockIdx.x == 0 && warp_id() == warps() - 1)
      tally(
          t, object, EPT_PHASE_COMBINE, [&](uint32_t r) { return rows_of(r); },
          [&](uint32_t r) { return EPT_MOE_HEADER_BYTES + rows_of(r) * row_bytes; });
    note(t, kCombineSend, 2);
    // Pieces are dealt to the blocks in turn, over all ranks together; a block's warps take them as they have time,
    // since a row is the sum of one row or of many.
    uint32_t before = 0, i = 1;  // rows of the ranks before, in the order of packing
    for (;;) {
      const uint32_t u = blockIdx.x + gridDim.x * take_one(s.next);
      if (u >= s.begin[world] * parts) break;
      while (u >= (before + rows_of(turn(i))) * parts) before += rows_of(turn(i++));
      const uint32_t number = cut.of(u);
      row(turn(i), number - before, u - number * parts);
    }
    post_initiated(
        t, kCombineSend, EPT_PHASE_COMBINE, generation,
        [&](uint32_t r) -> Packed {
          return {s.message[r], s.received[r], EPT_MOE_HEADER_BYTES + rows_of(r) * row_bytes, rows_of(r) * parts + 1};
        },
        true);
  }
  // Places and weights of the rows that this block sums come to its multiprocessor: each piece begins by reading them.
  EPT_DEVICE void foresee() const {
    const uint32_t all = s.begin[world], u = blockIdx.x + gridDim.x * threadIdx.x;
    if (u >= all * parts || (a.layout != kContiguous && a.layout != kMasked)) return;
    const uint32_t turned = cut.of(u) + s.begin[t.rank + 1], number = turned < all ? turned : turned - all;
    prefetch(reinterpret_cast<const char *>(a.routing.place + uint64_t(number) * top_k));
    prefetch(reinterpret_cast<const char *>(a.routing.row_weights + uint64_t(number) * top_k));
  }
  EPT_DEVICE uint32_t turn(uint32_t i) const { return t.rank + i < world ? t.rank + i : t.rank + i - world; }

  EPT_DEVICE uint32_t slot() const { return uint32_t(generation & 1); }
  // Of those of rank r, how many this block's warps take.
  EPT_DEVICE uint32_t pieces_of(uint32_t rank) const {
    uint32_t before = 0;
    for (uint32_t i = 1; turn(i) != rank; i++) before += rows_of(turn(i));
    return upto((before + rows_of(rank)) * parts) - upto(before * parts);
  }
  // Numbers below `end` that are this block's: u mod blocks == its number.
  EPT_DEVICE uint32_t upto(uint32_t end) const { return end / gridDim.x + (end % gridDim.x > blockIdx.x ? 1 : 0); }
  EPT_DEVICE uint32_t rows_of(uint32_t rank) const { return s.begin[rank + 1] - s.begin[rank]; }

  // Block r mod blocks writes the header for rank r: one piece of that message.
  EPT_DEVICE void headers() {
    const Taking members = taking(t, kNext);
    for (uint32_t r = blockIdx.x + gridDim.x * warp_id(); r < world; r += gridDim.x * warps()) {
      if (lane_id() != 0 || !members.has(r)) continue;
      ept_moe_header h = header_of(t, object, EPT_PHASE_COMBINE, generation, rows_of(r));
      h.row_bytes = uint32_t(row_bytes);
      h.payload_bytes = uint32_t(object.returned);
      h.payload_format = object.returned_format;
      if (a.row_weights.data) h.flags |= EPT_MOE_ROW_WEIGHTS;
      put_header(s.message[r], h);
      if (r == t.rank)
        post_own(t, EPT_PHASE_COMBINE, generation);
      else
        packed_one(r);
    }
    __syncwarp();
  }

  // A piece of the message to `rank` is packed by the caller's warp. Each block tells the others once, for all of its.
  EPT_DEVICE void packed_one(uint32_t rank) {
    if (rank == t.rank) return;
    fence_block();
    const uint32_t before = atomicSub(&s.pending[rank], 1u);
    fence_block();
    const bool went = goes_in_pieces(t, rank);
    if (before != 1 || !packed(t, rank, s.pieces[rank], rows_of(rank) * parts + 1, went)) return;
    post(t, kCombineSend, EPT_PHASE_COMBINE, generation, rank, s.message[rank], s.received[rank],
         EPT_MOE_HEADER_BYTES + (went ? 0 : rows_of(rank) * row_bytes));
  }

  EPT_DEVICE void row(uint32_t rank, uint32_t j, uint32_t part) {
    fill(s.message[rank] + EPT_MOE_HEADER_BYTES + j * row_bytes, rank, j, part);
    __syncwarp();
    if (goes_in_pieces(t, rank)) put_filled(rank, j, part);
    if (lane_id() == 0) packed_one(rank);
    __syncwarp();
  }
  // What fill has written, and nothing else: other warps write the row's other parts, now or later.
  EPT_DEVICE void put_filled(uint32_t rank, uint32_t j, uint32_t part) const {
    const bool copies = (a.layout == kRows || a.layout == kByRank) && a.format == int32_t(object.returned_format);
    const uint32_t each = copies ? 16 : kGroup * element_size(int32_t(object.returned_format));
    const uint32_t count = copies ? uint32_t(object.returned / 16) : groups;
    const Span16 span = share(count, part);
    const uint64_t row = EPT_MOE_HEADER_BYTES + j * row_bytes;
    const auto put = [&](uint64_t from, uint64_t to) {
      if (from < to)
        put_piece(t, kCombineSend, generation, rank, s.message[rank] + row + from, s.received[rank] + row + from,
                  to - from);
    };
    put(uint64_t(span.from) * each, parts == 1 ? row_bytes : uint64_t(span.to) * each);
    if (parts > 1 && part == 0) put(uint64_t(count) * each, row_bytes);
  }
  // What a part of a row of `count` pieces is: of all that fill it, and of who puts it.
  EPT_DEVICE Span16 share(uint32_t count, uint32_t part) const { return span_of(count, part, cut, kPair); }
  EPT_DEVICE void fill(char *to, uint32_t rank, uint32_t j, uint32_t part) const {
    const uint64_t number = uint64_t(s.begin[rank]) + j;
    if (a.layout == kRows || a.layout == kByRank) {
      const uint64_t place = a.layout == kRows ? number : rank * a.leading + j;
      convert(to, a.out.at(place), part);
      if (a.row_weights.data && part == 0) put_beside(to, place);
    } else if (a.format == kBF16 && object.returned_format == uint32_t(kBF16))
      sum<kBF16>(to, number, part);
    else if (element_size(a.format) == 2)
      sum<kAny2>(to, number, part);
    else
      sum<kF32>(to, number, part);
  }

  // A row's weights, and what pads them. top_k is at most a warp's lanes.
  EPT_DEVICE void put_beside(char *to, uint64_t place) const {
    const uint64_t payload = ept_combine_row_bytes(object.returned, top_k, 0);
    const uint32_t k = lane_id();
    if (k * 4 >= row_bytes - payload) return;
    const char *from = a.row_weights.at(place) + k * a.row_weights.column;
    reinterpret_cast<float *>(to + payload)[k] = k < top_k ? *reinterpret_cast<const float *>(from) : 0.0f;
  }

  EPT_DEVICE void convert(char *to, const char *from, uint32_t part) const {
    const auto format = int32_t(object.returned_format);
    const uint32_t in = element_size(a.format), out = element_size(format);
    if (a.format == format) {  // every bit as it is
      const Span16 span = share(uint32_t(object.returned / 16), part);
      uint32_t asked = span.from + lane_id(), v = asked;
      stream<kPair, false, kPairApart>(
          s.ring, span.rounds(kPair),
          [&] {
            const Fetch here = pair_at(from, asked, span.to);
            asked += kPair * kWarp;
            return here;
          },
          [&](const Vector(&held)[kPair]) {
            EPT_UNROLL
            for (uint32_t i = 0; i < kPair; i++, v += kWarp)
              if (v < span.to) store16(to + v * 16, held[i]);
          });
      return;
    }
    const Span16 span = share(groups, part);
    for (uint32_t g = span.from + lane_id(); g < span.to; g += kWarp) {
      float x[kGroup];
      load8(x, from + g * kGroup * in, a.format);
      store8(to + g * kGroup * out, x, format);
    }
    const uint32_t left = groups * kGroup + lane_id();
    if (part == 0 && left < object.hidden) store1(to + left * out, load1(from + left * in, a.format), format);
  }

  template <int32_t kFormat>
  EPT_DEVICE void sum(char *to, uint64_t number, uint32_t part) const {
    constexpr uint32_t kSize = kFormat == kF32 ? 4 : 2;
    const int32_t from_format = known<kFormat>(a.format), format = known<kFormat>(int32_t(object.returned_format));
    const uint32_t out = element_size(format);
    int32_t place = -1;
    float weight = 1.0f;
    if (lane_id() < top_k) {
      place = a.routing.place[number * top_k + lane_id()];
      if (!a.weights_applied) weight = a.routing.row_weights[number * top_k + lane_id()];
    }
    // Those of lanes that have one, by k, to the first lanes.
    const uint32_t places = __ballot_sync(kAll, int(place >= 0));
    const auto n = uint32_t(__popc(places));
    uint32_t rest = places, k = 0;
    for (uint32_t i = 0; rest; i++, rest &= rest - 1)
      if (i == lane_id()) k = uint32_t(__ffs(int(rest)) - 1);
    place = from_lane(place, k);
    weight = from_lane(weight, k);
    const char *row = lane_id() < n ? a.out.at(uint64_t(uint32_t(place))) : nullptr;
    sum_rows<kSize, true>(
        s.ring, row, weight, n, share(groups, part), from_format,
        [&](uint32_t group, const float (&acc)[kGroup]) { store8<true>(to + group * kGroup * out, acc, format); });
    if (part != 0 || groups * kGroup == object.hidden) return;
    const uint32_t at = groups * kGroup + lane_id();
    float acc = 0;
    for (uint32_t i = 0; i < n; i++) {
      const char *from = from_lane(row, i);
      const float w = from_lane(weight, i);
      if (at < object.hidden) acc = fused(w, load1(from + at * kSize, from_format), acc);
    }
    if (at < object.hidden) store1(to + at * out, acc, format);
  }

  const CombineSend &a;
  const LaneTable &t;
  const CombineShared &s;
  const ObjectTable &object;
  const uint64_t generation;
  const uint32_t world, top_k;
  const uint64_t row_bytes;
  const uint32_t groups;
  uint32_t parts = 1;  // that a row is summed in
  Divisor cut = divisor(1);
};

// Tokens in order; each waits for the ranks that have a part of it, in rank order.
class CombineReceiver {
 public:
  // `whole_rows`: a warp has a token by itself.
  EPT_DEVICE CombineReceiver(const CombineRecv &args, const CombineShared &shared, bool whole_rows = false)
      : a(args),
        t(args.lane),
        s(shared),
        object(args.object),
        generation(args.lane.state->received[EPT_PHASE_COMBINE]),
        membership(args.lane.state->membership[EPT_PHASE_COMBINE]),
        world(fixed_or(EPT_FIXED_WORLD, args.lane.world)),
        fan(uint32_t(args.object.shape.fan())),
        row_bytes(ept_combine_row_bytes(args.object.returned, args.object.top_k, 0)),
        groups(fixed_or(EPT_FIXED_HIDDEN, args.object.hidden) / kGroup),
        parts(
            divisor(whole_rows ? 1 : parts_of((args.tokens + gridDim.x - 1) / gridDim.x, warps(), groups, 4, kPair))) {}

  EPT_DEVICE void run() {
    note(t, kCombineRecv, 0);
    const uint32_t fault = fault_of(t);
    if (threadIdx.x == 0) *s.next = 0;
    // Of the tokens that this block sums, where their parts are.
    const uint32_t number = parts.of(blockIdx.x + gridDim.x * threadIdx.x);
    if (number < a.tokens) prefetch(reinterpret_cast<const char *>(a.routing.parts + uint64_t(number) * fan * 2));
    look_up(t, EPT_PHASE_COMBINE, generation, s.sources);
    const bool works = !is_faulted(fault);
    leave_recv(t, kCombineRecv, EPT_PHASE_COMBINE, generation);
    if (works) receive();
    note(t, kCombineRecv, 3);
    const bool faulted = is_faulted(t);
    tell_end(t, EPT_PHASE_COMBINE, generation);
    if (faulted && all_ended(t, EPT_PHASE_COMBINE, generation, s.word)) blank_all();
    note(t, kCombineRecv, 5);
  }

  EPT_DEVICE void receive() {
    note(t, kCombineRecv, 1);
    scout(t, kCombineRecv, EPT_PHASE_COMBINE, generation, s.sources, *this);
    note(t, kCombineRecv, 2);
    for (;;) {
      const uint32_t u = blockIdx.x + gridDim.x * take_one(s.next);
      const uint32_t number = parts.of(u);
      if (number >= a.tokens || !token(number, u - number * parts.by)) return;
    }
  }

  EPT_DEVICE void blank_all() const {
    const uint64_t first = threadIdx.x, step = blockDim.x;
    const uint64_t words = uint64_t(object.hidden) * element_size(a.format) / 2;
    for (uint64_t i = first; i < words * a.tokens; i += step)
      reinterpret_cast<uint16_t *>(a.y + int64_t(i / words) * a.y_stride)[i % words] = 0;
    for (uint64_t i = first; i < uint64_t(a.tokens) * object.top_k && a.row_weights.data; i += step)
      *reinterpret_cast<float *>(a.row_weights.at(i / object.top_k) + i % object.top_k * a.row_weights.column) = 0;
  }

  EPT_DEVICE bool header(uint32_t source, bool tells = blockIdx.x == 0) {
    if (tells) note_source(t, EPT_PHASE_COMBINE, source, false);
    uint32_t wrong = 0;
    if (lane_id() == 0) {
      const uint32_t rows = a.routing.rows_to[source];
      const ept_moe_header h = get_header(at(source));
      const uint32_t kind = h.flags & EPT_MOE_ROW_WEIGHTS;
      const uint64_t bytes = ept_combine_row_bytes(object.returned, object.top_k, kind != 0);
      wrong = wrong_in_header(t, object, EPT_PHASE_COMBINE, generation, membership, source, h, bytes, object.max_tokens,
                              kind);
      s.beside[source] = uint32_t(bytes - row_bytes);
      if (!wrong && h.total_rows != rows) wrong = 12;
      if (!wrong) hear(t, source, h, tells);
      if (wrong) refuse_header(t, kCombineRecv, source, generation, rows, wrong);
    }
    return from_lane(wrong, 0) == 0;
  }
  EPT_DEVICE bool may_begin(uint32_t) const { return true; }
  EPT_DEVICE bool begin(uint32_t) const { return true; }

 protected:
  EPT_DEVICE const char *at(uint32_t source) const {
    return s.sources.in[source] + t.map.recv(EPT_PHASE_COMBINE, uint32_t(generation & 1)) +
           a.routing.combine_at[source];
  }

  // False: the lane is faulted.
  EPT_DEVICE bool token(uint32_t number, uint32_t part) const {
    const char *from = nullptr;
    uint32_t beside = 0;
    bool rank_is_late = false;
    if (lane_id() < fan) {
      const int32_t *its = a.routing.parts + (uint64_t(number) * fan + lane_id()) * 2;
      const int32_t rank = its[0], row = its[1];
      if (rank >= 0) {
        while (!shown(&s.sources.standing[rank], kReady)) {
          if (fault_of(t)) {
            rank_is_late = true;
            break;
          }
          EPT_REST();
        }
        beside = peek(&s.beside[rank]);
        from = at(uint32_t(rank)) + EPT_MOE_HEADER_BYTES + uint64_t(uint32_t(row)) * (row_bytes + beside);
      }
    }
    __syncwarp();
    if (__ballot_sync(kAll, int(rank_is_late))) return false;
    const auto n = uint32_t(__popc(__ballot_sync(kAll, int(from != nullptr))));
    sum(number, part, from, n);
    if (a.row_weights.data && part == 0) sum_beside(number, from, beside, n);
    return true;
  }
  EPT_DEVICE void sum_beside(uint32_t number, const char *from, uint32_t beside, uint32_t n) const {
    float acc = 0;
    for (uint32_t p = 0; p < n; p++) {
      const char *row = from_lane(from, p);
      if (from_lane(beside, p) && lane_id() < object.top_k)
        acc = acc + reinterpret_cast<const float *>(row + row_bytes)[lane_id()];
    }
    if (lane_id() >= object.top_k) return;
    *reinterpret_cast<float *>(a.row_weights.at(number) + lane_id() * a.row_weights.column) = acc;
  }
  EPT_DEVICE void sum(uint32_t number, uint32_t part, const char *from, uint32_t n) const {
    if (a.format == kBF16 && object.returned_format == uint32_t(kBF16))
      sum<kBF16>(number, part, from, n);
    else if (element_size(int32_t(object.returned_format)) == 2)
      sum<kAny2>(number, part, from, n);
    else
      sum<kF32>(number, part, from, n);
  }
  // kFormat: of what came.
  template <int32_t kFormat>
  EPT_DEVICE void sum(uint32_t number, uint32_t part, const char *from, uint32_t n) const {
    constexpr uint32_t kSize = kFormat == kF32 ? 4 : 2;
    const int32_t format = known<kFormat>(int32_t(object.returned_format));
    const int32_t to_format = kFormat == kBF16 ? kBF16 : a.format;
    const uint32_t out = element_size(to_format);
    char *to = a.y + int64_t(number) * a.y_stride;
    sum_rows<kSize, false>(
        s.ring, from, 1.0f, n, span_of(groups, part, parts, kPair), format,
        [&](uint32_t group, const float (&acc)[kGroup]) { store8<true>(to + group * kGroup * out, acc, to_format); });
    if (part != 0 || groups * kGroup == object.hidden) return;
    const uint32_t left = groups * kGroup + lane_id();
    float acc = 0;
    for (uint32_t p = 0; p < n; p++) {
      const char *row = from_lane(from, p);
      if (left < object.hidden) acc = acc + load1(row + left * kSize, format);
    }
    if (left < object.hidden) store1(to + left * out, acc, to_format);
  }

  const CombineRecv &a;
  const LaneTable &t;
  const CombineShared &s;
  const ObjectTable &object;
  const uint64_t generation;
  const uint32_t membership;
  const uint32_t world, fan;
  const uint64_t row_bytes;
  const uint32_t groups;
  const Divisor parts;  // that a token is summed in
};

}  // namespace ept::moe::cuda

EPT_KERNEL moe_combine_send(EPT_ARGUMENT(ept::moe::cuda::CombineSend) args) {
  using namespace ept::moe::cuda;
  if (!args.lane.world) return;
  EPT_SHARED(memory);
  Carve carve(memory);
  const CombineShared shared = combine_shared(carve, blockDim.x, args.lane.world);
  CombineSender(args, shared).run();
}

EPT_KERNEL moe_combine_recv(EPT_ARGUMENT(ept::moe::cuda::CombineRecv) args) {
  using namespace ept::moe::cuda;
  if (!args.lane.world) return;
  EPT_SHARED(memory);
  Carve carve(memory);
  const CombineShared shared = combine_shared(carve, blockDim.x, args.lane.world);
  CombineReceiver(args, shared).run();
}
