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
#include "moe/cuda/taken.cuh"

namespace ept::moe::cuda {

// Messages are packed one rank after another, this rank's own last, so that each leaves as early as it can.
class CombineSender {
 public:
  EPT_DEVICE CombineSender(const CombineSend &args, const CombineShared &shared)
      : a(args),
        t(args.lane),
        s(shared),
        object(args.object),
        world(fixed_or(EPT_FIXED_WORLD, args.lane.world)),
        top_k(fixed_or(EPT_FIXED_TOP_K, args.object.top_k)),
        row_bytes(ept_combine_row_bytes(args.object.returned, args.object.top_k, args.row_weights.data != nullptr)),
        groups(fixed_or(EPT_FIXED_HIDDEN, args.object.hidden) / kGroup),
        state(args.lane.state),
        fault(fault_of(args.lane)),
        source(ask_source(threadIdx.x)),
        membership(args.routing.membership[0]),
        generation(state.sent(EPT_PHASE_COMBINE)),
        present(state.membership(kNext)) {}

  EPT_DEVICE void run() {
    note(t, kCombineSend, 0);
    Taken taken(t, kCombineSend, generation, s.word);
    taken.begin();
    begin();
    if (membership != present && threadIdx.x == 0)
      raise_fault(t, uint32_t(-EPT_E_FAULT), kCombineSend, -1, kMembers, generation, membership, present);
    const bool works =
        !is_faulted(fault | (membership ^ present)) && settle(t, kCombineSend, EPT_PHASE_COMBINE, generation);
    const Leaving leaving = leave_send(t, kCombineSend);
    if (works) send(taken);
    end_send(leaving, t, kCombineSend, EPT_PHASE_COMBINE, generation);
    note(t, kCombineSend, 3);
    note(t, kCombineSend, 5);
  }

 protected:
  // What a dispatch that met a fault leaves is anything, and nobody goes there: so no pointer is moved by it.
  EPT_DEVICE void begin() {
    for (uint32_t r = threadIdx.x; r <= world; r += blockDim.x) {
      const Source its = r == threadIdx.x ? source : ask_source(r);
      s.begin[r] = its.begin;
      if (r == world) break;
      const uint64_t received = t.map.recv(EPT_PHASE_COMBINE, slot()) + its.return_at;
      const uint64_t at =
          t.map.send(EPT_PHASE_COMBINE, slot()) + object.shape.combine_staging(r < t.rank ? r : r - 1).offset;
      s.received[r] = received;
      s.message[r] = device::address<char>(its.way.mapped ? its.way.window + received : its.way.staging + at);
      s.packing[r] = s.packed[r] = 0;
    }
  }
  // What is known of a rank before the step: where its rows begin, where it wants their sums, and its path.
  struct Source {
    uint32_t begin = 0;
    uint64_t return_at = 0;
    Way way;
  };
  EPT_DEVICE Source ask_source(uint32_t r) const {
    Source its;
    if (r > world) return its;
    its.begin = a.routing.begin[r];
    if (r == world) return its;
    its.return_at = a.routing.return_at[r];
    its.way = ask_way(t, r);
    return its;
  }
  EPT_DEVICE void send(Taken &taken) {
    note(t, kCombineSend, 1);
    for (uint32_t r = threadIdx.x; r < world && blockIdx.x == 0; r += blockDim.x)
      expect(t, EPT_PHASE_COMBINE, generation, r, t.map.recv(EPT_PHASE_COMBINE, slot()) + a.routing.combine_at[r]);
    cut = divisor(parts_of((s.begin[world] + gridDim.x - 1) / gridDim.x, warps(), groups, 6, kPair));
    parts = cut.by;
    const auto look = [&](uint32_t u) { return places_of(u); };
    const uint32_t first = taken.first(pieces());
    const Places its = look(first);  // on its way
    headers();
    if (blockIdx.x == 0 && warp_id() == warps() - 1)
      tally(
          t, object, EPT_PHASE_COMBINE, [&](uint32_t r) { return rows_of(r); },
          [&](uint32_t r) { return EPT_MOE_HEADER_BYTES + rows_of(r) * row_bytes; });
    note(t, kCombineSend, 2);
    uint32_t i = 1, before = 0;  // the rank that a piece goes to, in the order of packing, and rows of those before
    work_at(taken, pieces(), first, its, look, [&](uint32_t u, const Places &of) {
      while (u >= (before + rows_of(turn(i))) * parts) before += rows_of(turn(i++));
      const uint32_t number = cut.of(u);
      row(turn(i), number - before, u - number * parts, of);
      return true;
    });
    post_initiated(
        t, kCombineSend, EPT_PHASE_COMBINE, generation,
        [&](uint32_t r) -> Packed {
          return {s.message[r], s.received[r], EPT_MOE_HEADER_BYTES + rows_of(r) * row_bytes, rows_of(r) * parts + 1};
        },
        true);
  }
  // Pieces are parts of rows, of all ranks in the order of packing.
  EPT_DEVICE uint32_t pieces() const { return s.begin[world] * parts; }
  // Where the rows stand that a row is the sum of, and by what each is multiplied: a lane's k, where it has one.
  struct Places {
    int32_t place = -1;
    float weight = 1.0f;
  };
  EPT_DEVICE bool sums() const { return a.layout == kContiguous || a.layout == kMasked; }
  EPT_DEVICE Places places_of_row(uint64_t number) const {
    Places its;
    if (lane_id() >= top_k || !sums()) return its;
    its.place = a.routing.place[number * top_k + lane_id()];
    if (!a.weights_applied) its.weight = a.routing.row_weights[number * top_k + lane_id()];
    return its;
  }
  EPT_DEVICE Places places_of(uint32_t u) const {
    if (u >= pieces()) return Places();
    const uint32_t all = s.begin[world], turned = cut.of(u) + s.begin[t.rank + 1];
    return places_of_row(turned < all ? turned : turned - all);
  }
  EPT_DEVICE uint32_t turn(uint32_t i) const { return t.rank + i < world ? t.rank + i : t.rank + i - world; }

  EPT_DEVICE uint32_t slot() const { return uint32_t(generation & 1); }
  EPT_DEVICE uint32_t rows_of(uint32_t rank) const { return s.begin[rank + 1] - s.begin[rank]; }

  // One piece of the message to that rank, by one thread. Who packs its first row writes it too.
  EPT_DEVICE void header(uint32_t r) {
    begin_one(r);
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
  // Of the messages without rows, that to rank r by block r mod blocks.
  EPT_DEVICE void headers() {
    const Taking members = taking(t, kNext);
    for (uint32_t r = blockIdx.x + gridDim.x * warp_id(); r < world; r += gridDim.x * warps())
      if (lane_id() == 0 && rows_of(r) == 0 && members.has(r)) header(r);
    __syncwarp();
  }

  // A piece of the message to `rank` is being packed by the caller's warp, and then it is. What a block has packed is
  // told to the others when none of its warps is at a piece of that message: mostly once, since they are at others
  // then.
  EPT_DEVICE void begin_one(uint32_t rank) {
    if (rank != t.rank) atomicAdd(&s.packing[rank], 1u);
  }
  EPT_DEVICE void packed_one(uint32_t rank) {
    if (rank == t.rank) return;
    fence_block();  // who counts this piece has its bytes
    atomicAdd(&s.packed[rank], 1u);
    fence_block();  // who finds nobody at a piece any more has counted this one
    if (atomicSub(&s.packing[rank], 1u) != 1) return;
    fence_block();
    const uint32_t pieces = atomicExch(&s.packed[rank], 0u);
    fence_block();
    const bool went = goes_in_pieces(t, rank);
    if (!pieces || !packed(t, rank, pieces, rows_of(rank) * parts + 1, went)) return;
    post(t, kCombineSend, EPT_PHASE_COMBINE, generation, rank, s.message[rank], s.received[rank],
         EPT_MOE_HEADER_BYTES + (went ? 0 : rows_of(rank) * row_bytes));
  }

  EPT_DEVICE void row(uint32_t rank, uint32_t j, uint32_t part, const Places &its) {
    if (lane_id() == 0) {
      begin_one(rank);
      if (j == 0 && part == 0) header(rank);
    }
    __syncwarp();
    const uint64_t at = EPT_MOE_HEADER_BYTES + j * row_bytes;
    const bool goes = goes_in_pieces(t, rank);
    Going going;
    if (goes) going = {belongs(t, kCombineSend, generation, rank, s.received[rank] + at, row_bytes), is_summed(its)};
    fill(s.message[rank] + at, rank, j, part, its, going);
    __syncwarp();
    if (goes) put_filled(s.message[rank] + at, going, part);
    if (lane_id() == 0) packed_one(rank);
    __syncwarp();
  }
  // A row that goes by itself, piece by piece: where in the peer's lane it belongs. `summed`: its sums go as they are
  // made, out of shared memory; what is packed before it goes is read once more, and that from farther away.
  struct Going {
    Belongs row;
    bool summed = false;
  };
  // A row that is the sum of none has no step, and one of fp32 from 2 bytes no room in the ring.
  EPT_DEVICE bool is_summed(const Places &its) const {
    return sums() && element_size(int32_t(object.returned_format)) <= element_size(a.format) &&
           __ballot_sync(kAll, int(its.place >= 0));
  }
  // What fill has written and not put, and nothing else: other warps write the row's other parts, now or later.
  EPT_DEVICE void put_filled(const char *row, const Going &going, uint32_t part) const {
    const bool copies = !sums() && a.format == int32_t(object.returned_format);
    const uint32_t each = copies ? 16 : kGroup * element_size(int32_t(object.returned_format));
    const uint32_t count = copies ? uint32_t(object.returned / 16) : groups;
    const Span16 span = share(count, part);
    const auto send = [&](uint64_t from, uint64_t to) {
      if (from < to) put_piece(going.row, from, row + from, to - from);
    };
    if (!going.summed) send(uint64_t(span.from) * each, uint64_t(span.to) * each);
    if (part == 0) send(uint64_t(count) * each, row_bytes);
  }
  // What a part of a row of `count` pieces is: of all that fill it, and of who puts it.
  EPT_DEVICE Span16 share(uint32_t count, uint32_t part) const { return span_of(count, part, cut, kPair); }
  EPT_DEVICE void fill(char *to, uint32_t rank, uint32_t j, uint32_t part, const Places &its,
                       const Going &going) const {
    const uint64_t number = uint64_t(s.begin[rank]) + j;
    if (!sums()) {
      const uint64_t place = a.layout == kRows ? number : rank * a.leading + j;
      convert(to, a.out.at(place), part);
      if (a.row_weights.data && part == 0) put_beside(to, place);
    } else if (a.format == kBF16 && object.returned_format == uint32_t(kBF16))
      sum<kBF16>(to, its, part, going);
    else if (element_size(a.format) == 2)
      sum<kAny2>(to, its, part, going);
    else
      sum<kF32>(to, its, part, going);
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
  EPT_DEVICE void sum(char *to, const Places &its, uint32_t part, const Going &going) const {
    constexpr uint32_t kSize = kFormat == kF32 ? 4 : 2;
    const int32_t from_format = known<kFormat>(a.format), format = known<kFormat>(int32_t(object.returned_format));
    const uint32_t out = element_size(format);
    // Those of lanes that have one, by k, to the first lanes.
    const uint32_t places = __ballot_sync(kAll, int(its.place >= 0));
    const auto n = uint32_t(__popc(places));
    const uint32_t k = moves_from(places);
    const int32_t place = from_lane(its.place, k);
    const float weight = from_lane(its.weight, k);
    const char *row = lane_id() < n ? a.out.at(uint64_t(uint32_t(place))) : nullptr;
    char *begin = to;  // where the row would begin, that a group's sum be at its place
    sum_rows<kSize, true>(
        s.ring, row, weight, n, share(groups, part), from_format,
        [&](uint32_t group, const float (&acc)[kGroup]) { store8<true>(begin + group * kGroup * out, acc, format); },
        [&](char *free, uint32_t first) {
          if (!going.summed) return;
          __syncwarp();
          begin = free - first * kGroup * out;
        },
        [&](char *free, uint32_t first, uint32_t count) {
          if (going.summed) put_piece(going.row, uint64_t(first) * kGroup * out, free, uint64_t(count) * kGroup * out);
        });
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
  const uint32_t world, top_k;
  const uint64_t row_bytes;
  const uint32_t groups;
  uint32_t parts = 1;  // that a row is summed in
  Divisor cut = divisor(1);
  // In the order in which it is asked for; what is to be waited for last.
  const StateThen state;
  const uint32_t fault;       // when this block began
  const Source source;        // number threadIdx.x
  const uint32_t membership;  // of the dispatch that is summed
  const uint64_t generation;
  const uint32_t present;  // the membership now
};

// Tokens in order; each waits for the ranks that have a part of it, in rank order.
class CombineReceiver {
 public:
  EPT_DEVICE CombineReceiver(const CombineRecv &args, const CombineShared &shared)
      : a(args),
        t(args.lane),
        s(shared),
        object(args.object),
        world(fixed_or(EPT_FIXED_WORLD, args.lane.world)),
        fan(uint32_t(args.object.shape.fan())),
        at_first(args.lane, EPT_PHASE_COMBINE),
        asked(ask(threadIdx.x)),
        generation(at_first.state.received(EPT_PHASE_COMBINE)),
        membership(at_first.state.membership(EPT_PHASE_COMBINE)),
        row_bytes(ept_combine_row_bytes(args.object.returned, args.object.top_k, 0)),
        groups(fixed_or(EPT_FIXED_HIDDEN, args.object.hidden) / kGroup),
        parts(args.parts) {}

  EPT_DEVICE void run() {
    note(t, kCombineRecv, 0);
    Taken taken(t, kCombineRecv, generation, s.word);
    taken.begin(pieces());
    // Of few tokens, where the parts of those are that this block sums first.
    const uint32_t number = parts.of(blockIdx.x + gridDim.x * threadIdx.x);
    if (number < a.tokens) prefetch(reinterpret_cast<const char *>(a.routing.parts + uint64_t(number) * fan * 2));
    look_up(t, EPT_PHASE_COMBINE, generation, membership, at_first.origin, s.sources,
            [&](uint32_t r) { return expect_sums(r); });
    const bool works = !is_faulted(at_first.fault);
    const Leaving leaving = leave_recv(t, kCombineRecv);
    if (works) receive(taken);
    end_recv(leaving, t, kCombineRecv, EPT_PHASE_COMBINE, generation);
    note(t, kCombineRecv, 3);
    const bool faulted = is_faulted(t);
    tell_end(t, EPT_PHASE_COMBINE, generation);
    if (faulted && all_ended(t, EPT_PHASE_COMBINE, generation, s.word)) blank_all();
    note(t, kCombineRecv, 5);
  }

  // Where a token's parts are: a lane's, where it has one.
  struct PartsOf {
    int32_t rank = -1;
    uint32_t row = 0;
  };
  EPT_DEVICE PartsOf parts_of_token(uint32_t u) const {
    const uint32_t number = parts.of(u);
    if (lane_id() >= fan || number >= a.tokens) return PartsOf();
    const int32_t *its = a.routing.parts + (uint64_t(number) * fan + lane_id()) * 2;
    return {its[0], uint32_t(its[1])};
  }

  // Pieces of work are parts of tokens.
  EPT_DEVICE uint32_t pieces() const { return a.tokens * parts.by; }
  EPT_DEVICE void receive(Taken &taken) {
    note(t, kCombineRecv, 1);
    const auto look = [&](uint32_t u) { return parts_of_token(u); };
    const uint32_t first = taken.first(pieces());
    scout(t, kCombineRecv, EPT_PHASE_COMBINE, generation, s.sources, *this);
    note(t, kCombineRecv, 2);
    work_at(taken, pieces(), first, look(first), look, [&](uint32_t u, const PartsOf &of) {
      const uint32_t number = parts.of(u);
      return token(number, u - number * parts.by, of);
    });
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
    const HeaderThen h(s.sources.message[source]);
    // Whether its rows have weights beside them, and so how long they are, it says itself.
    HeaderWord expected = header_word(t, object, EPT_PHASE_COMBINE, generation, membership, source, 0);
    expected.is(EPT_FIELD(flags), EPT_MOE_LAST, EPT_MOE_LATE_WEIGHTS | EPT_MOE_LAST);
    expected.is(EPT_FIELD(row_bytes), 0, 0);
    const uint32_t rows = s.coming[source], kind = h.word(EPT_FIELD(flags)) & EPT_MOE_ROW_WEIGHTS;
    const auto bytes = uint32_t(ept_combine_row_bytes(object.returned, object.top_k, kind != 0));
    uint32_t wrong = 0;
    if (!is_as_expected(h, expected, object.max_tokens) || h.word(EPT_FIELD(row_bytes)) != bytes)
      wrong = check_header(t, object, EPT_PHASE_COMBINE, generation, membership, source, h.whole(), bytes,
                           object.max_tokens, kind);
    if (!wrong && h.word(EPT_FIELD(total_rows)) != rows) wrong = 12;
    if (!wrong && t.acks && tells) hear(t, source, h, tells);
    if (lane_id() == 0) {
      s.beside[source] = bytes - uint32_t(row_bytes);
      if (wrong) refuse_header(t, kCombineRecv, source, generation, rows, wrong);
    }
    return wrong == 0;
  }
  EPT_DEVICE bool may_begin(uint32_t) const { return true; }
  EPT_DEVICE bool begin(uint32_t) const { return true; }

 protected:
  // What a dispatch has told a rank: where its sums go, and of how many rows.
  struct Asked {
    uint64_t at = 0;
    uint32_t rows = 0;
  };
  EPT_DEVICE Asked ask(uint32_t r) const {
    if (r >= world) return {};
    return {a.routing.combine_at[r], a.routing.rows_to[r]};
  }
  // look_up's message_at; and it keeps how many rows come.
  EPT_DEVICE uint64_t expect_sums(uint32_t r) const {
    const Asked its = r == threadIdx.x ? asked : ask(r);
    s.coming[r] = its.rows;
    return t.map.recv(EPT_PHASE_COMBINE, uint32_t(generation & 1)) + its.at;
  }

  // False: the lane is faulted.
  EPT_DEVICE bool token(uint32_t number, uint32_t part, const PartsOf &its) const {
    const char *from = nullptr;
    uint32_t beside = 0;
    bool rank_is_late = false;
    if (its.rank >= 0) {
      while (!shown(&s.sources.standing[its.rank], kReady)) {
        if (fault_of(t)) {
          rank_is_late = true;
          break;
        }
        EPT_REST();
      }
      beside = peek(&s.beside[its.rank]);
      from = s.sources.message[its.rank] + EPT_MOE_HEADER_BYTES + uint64_t(its.row) * (row_bytes + beside);
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
  const uint32_t world, fan;
  const AtFirst at_first;
  const Asked asked;  // of rank threadIdx.x
  const uint64_t generation;
  const uint32_t membership;
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
