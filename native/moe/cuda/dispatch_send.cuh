// SPDX-License-Identifier: Apache-2.0
//
// dispatch_send.cuh: quantisation and packing. Each block reads each of its tokens once. It stores its row once in this
// rank's own memory, where it is read by itself and by those of its GPU that have that mapped (wire.h, LISTED), and at
// every other rank that it goes to (dispatch_plan.cuh says where).
//
// All that a block must know before its first row (tables, windows, ids) is asked for at once, by other threads each,
// since a step of few tokens is a chain of waits for memory and little else.
#pragma once

#include "moe/cuda/dispatch_plan.cuh"
#include "moe/cuda/formats.cuh"
#include "moe/cuda/initiated.cuh"
#include "moe/cuda/stream.cuh"

namespace ept::moe::cuda {

class DispatchSender : public DispatchPlan {
 public:
  EPT_DEVICE DispatchSender(const DispatchSend &args, const SendShared &shared) : DispatchPlan(args, shared) {}

  EPT_DEVICE void run() {
    note(t, kDispatchSend, 0);
    begin(members());
    if (blockIdx.x == 0 && threadIdx.x == 0) a.routing.membership[0] = present;
    const bool works = !is_faulted(fault) && settle(t, kDispatchSend, EPT_PHASE_DISPATCH, generation);
    const Leaving leaving = leave_send(t, kDispatchSend);
    if (works) send();
    if (end_send(leaving, t, kDispatchSend, EPT_PHASE_DISPATCH, generation)) tell_bad_ids();
    note(t, kDispatchSend, 5);
  }

 protected:
  EPT_DEVICE void send() {
    note(t, kDispatchSend, 1);
    for (uint32_t r = threadIdx.x; r < world && blockIdx.x == 0; r += blockDim.x)
      expect(t, EPT_PHASE_DISPATCH, generation, r, dispatch_place(t, a.object.shape, slot(), r).offset);
    scan(from_last() < world);
    start();
    __syncthreads();
    sum([&](uint32_t r) {
      const bool heads = r % gridDim.x == from_last() && members().has(r);
      s.pieces[r] = s.pending[r] = own_rows(r) * units + (heads ? 1 : 0);
    });
    __syncthreads();
    place();
    if (warp_id() == (warps() > 1 ? warps() - 2 : 0)) order();
    // Else place() is for the last warp alone, which writes this block's header.
    if (stages() || world > gridDim.x) __syncthreads();
    note(t, kDispatchSend, 2);
    headers();
    rows();
    post_initiated(
        t, kDispatchSend, EPT_PHASE_DISPATCH, generation,
        [&](uint32_t r) -> Packed {
          const uint64_t header = header_bytes(r);
          return {message_to(r), received(), header + uint64_t(s.rows_to[r]) * row_bytes, s.rows_to[r] * units + 1};
        },
        true);
    note(t, kDispatchSend, 3);
  }

  // What needs no plan: weights, and this warp's first piece, come already. Of its steps the ring holds the first, so
  // all of it is asked into the cache.
  EPT_DEVICE void start() const {
    const uint32_t token = first + threadIdx.x;
    if (a.weights && token < end) prefetch(reinterpret_cast<const char *>(a.weights + token * a.weights_strides[0]));
    const uint32_t u = warp_id();
    if (u >= (end - first) * parts) return;
    const uint32_t nth = a.deal.parts.of(u);
    fetch(first + nth, u - nth * parts);
    const Span16 span = span_of(vectors, u - nth * parts, a.deal.parts, kPair);
    const uint32_t size = a.quantise ? element_size(a.x_format) * 16 : 16;
    const char *row = row_of(first + nth);
    for (uint32_t at = span.from * size + lane_id() * kLine; at < span.to * size; at += kWarp * kLine)
      prefetch_far(row + at);
  }
  static constexpr uint32_t kLine = 128;  // bytes of a line of the cache
  // How a row of a format is read: kRounds of a warp in a step, in each of which a lane has kSize vectors of the row,
  // and one of the message. kPacked: it goes as it is.
  static constexpr int32_t kPacked = -1;
  template <int32_t kFormat>
  struct Step {
    static constexpr int32_t kIts = kFormat;
    static constexpr uint32_t kRounds = kFormat == kPacked || kFormat == kBF16 ? kPair : 1;
    static constexpr uint32_t kSize = kFormat == kPacked ? 1 : element_size(kFormat);
    static constexpr uint32_t kEach = kRounds * kSize, kApart = kWarp * kSize * 16;
    static constexpr bool kNear = kSize > 1;
  };
  // What a lane fetches next of a part of a row.
  template <int32_t kFormat>
  struct Asked {
    const char *from;
    int32_t left;
    EPT_DEVICE Asked(const char *row, const Span16 &span, uint32_t step) {
      const uint32_t vector = span.from + step * Step<kFormat>::kRounds * kWarp + lane_id();
      from = row + uint64_t(vector) * (Step<kFormat>::kSize * 16);
      left = (int32_t(span.to) - int32_t(vector)) * int32_t(Step<kFormat>::kSize);
    }
    EPT_DEVICE Fetch operator()() {
      const Fetch here = {from, left};
      from += Step<kFormat>::kEach * kWarp * 16;
      left -= int32_t(Step<kFormat>::kEach * kWarp);
      return here;
    }
  };
  EPT_DEVICE const char *row_of(uint32_t token) const { return a.x + token * a.x_stride; }

  // act(step), of the Step that rows of this dispatch are read by.
  template <class Act>
  EPT_DEVICE void by_step(Act act) const {
    if (!a.quantise)
      act(Step<kPacked>());
    else if (a.x_format == kBF16)
      act(Step<kBF16>());
    else if (element_size(a.x_format) == 2)
      act(Step<kAny2>());
    else
      act(Step<kF32>());
  }
  // A part of a row comes.
  EPT_DEVICE void fetch(uint32_t token, uint32_t part) const {
    by_step([&](auto step) {
      using Its = decltype(step);
      start_stream<Its::kEach, Its::kNear, Its::kApart, Its::kSize>(
          s.ring, Asked<Its::kIts>(row_of(token), span_of(vectors, part, a.deal.parts, kPair), 0));
    });
  }
  // use(held, v): v is the lane's vector of the message in the first round of a step.
  template <int32_t kFormat, class Use>
  EPT_DEVICE void finish(uint32_t token, const Span16 &span, Use use) const {
    using Its = Step<kFormat>;
    uint32_t v = span.from + lane_id();
    finish_stream<Its::kEach, Its::kNear, Its::kApart, Its::kSize>(
        s.ring, span.rounds(Its::kRounds), Asked<kFormat>(row_of(token), span, kFirst<Its::kEach>),
        [&](const Vector(&held)[Its::kEach]) {
          use(held, v);
          v += Its::kRounds * kWarp;
        });
  }

  // Block r mod blocks, from the last, writes the header for rank r: one piece of that message.
  EPT_DEVICE void headers() {
    EPT_ROLLED
    for (uint32_t r = from_last() + gridDim.x * (warps() - 1 - warp_id()); r < world; r += gridDim.x * warps()) {
      if (!members().has(r)) continue;
      const uint32_t local = s.first[r + 1] - s.first[r];
      const uint64_t bytes = header_bytes(r);
      char *to = message_to(r);
      if (lane_id() == 0) {
        ept_moe_header h = header_of(t, a.object, EPT_PHASE_DISPATCH, generation, s.rows_to[r]);
        if (!a.weights && a.tokens) h.flags |= EPT_MOE_NO_WEIGHTS;
        if (s.lists[r]) h.flags |= EPT_MOE_LISTED;
        h.row_bytes = row_bytes;
        h.payload_bytes = uint32_t(a.object.payload);
        h.scale_bytes = a.scale_bytes;
        h.payload_format = uint32_t(a.payload_format);
        h.scale_format = uint32_t(a.scale_format);
        h.combine_offset = s.combine_at[r];
        h.combine_capacity = a.object.shape.combine_header() + s.rows_to[r] * a.object.shape.combine_row;
        put_header(to, h);
      }
      uint32_t *counts = reinterpret_cast<uint32_t *>(to + EPT_MOE_HEADER_BYTES);
      for (uint32_t e = lane_id(); e < (bytes - EPT_MOE_HEADER_BYTES) / 4; e += kWarp)
        counts[e] = e < local ? s.counts[s.first[r] + e] : 0;
      __syncwarp();
      if (lane_id() == 0) r == t.rank ? post_own(t, EPT_PHASE_DISPATCH, generation) : packed_one(r);
      __syncwarp();
    }
  }

  // A piece of the message to `rank` is packed by the caller's warp. Each block tells the others once, for all of its.
  EPT_DEVICE void packed_one(uint32_t rank) {
    if (rank == t.rank) return;
    fence_block();  // the other warps of the block that packed for this rank have done so
    const uint32_t before = atomicSub(&s.pending[rank], 1u);
    fence_block();
    const bool went = goes_in_pieces(t, rank);
    if (before != 1 || !packed(t, rank, s.pieces[rank], s.rows_to[rank] * units + 1, went)) return;
    post(t, kDispatchSend, EPT_PHASE_DISPATCH, generation, rank, message_to(rank), received(),
         header_bytes(rank) + (went ? 0 : uint64_t(s.rows_to[rank]) * row_bytes));
  }

  EPT_DEVICE void rows() {
    const uint32_t pieces = (end - first) * parts;
    EPT_ROLLED
    for (uint32_t u = warp_id(); u < pieces; u += warps()) {
      const uint32_t nth = a.deal.parts.of(u);
      row(first + nth, u - nth * parts, u == warp_id());
    }
    EPT_ROLLED
    for (uint32_t u = warp_id(); units > parts && u < pieces + (end - first); u += warps())
      if (u >= pieces) about(first + u - pieces);
  }

  EPT_DEVICE void row(uint32_t token, uint32_t part, bool started) {
    if (!started) fetch(token, part);
    payload(token, part, put_places(token));
    if (part == 0 && units == parts) beside(token);
    packed_part(token);
  }
  // What a row has beside its payload, by a warp that has none of that.
  EPT_DEVICE void about(uint32_t token) {
    beside(token);
    packed_part(token);
  }

  // take(has, where, whose) for all places that a token's row is stored at, by a lane each, and all lanes of the warp.
  // Ranks that a list tells of it share one, of `kEveryone`.
  static constexpr uint32_t kEveryone = 0xffffffffu;
  template <class Take>
  EPT_DEVICE void each_place(uint32_t token, Take take) const {
    bool told = false;
    each_rank(token, [&](uint32_t r, uint32_t row, bool goes) {
      const bool listed = goes && s.lists[r];
      const uint32_t those = __ballot_sync(kAll, int(listed));
      const bool leads = !told && listed && !(those & below());
      told = told || those;
      char *where = nullptr;
      if (goes) where = s.rows_at[leads ? t.rank : r] + uint64_t(leads ? token : row) * row_bytes;
      take(leads || (goes && !listed), where, leads ? kEveryone : r);
    });
  }
  // Those of the warp's token that its row is stored at, side by side in shared memory; and those that it is put to
  // piece by piece (initiated.cuh), a lane's each.
  struct Places {
    uint32_t stored = 0, put = 0;
    Belongs belongs;
  };
  EPT_DEVICE Places put_places(uint32_t token) const {
    char **to = s.to + warp_id() * kWarp;
    Places n;
    each_place(token, [&](bool has, char *where, uint32_t whose) {
      const uint32_t those = __ballot_sync(kAll, int(has && !is_near(whose)));
      if (those >> lane_id() & 1) to[n.stored + uint32_t(__popc(those & below()))] = where;
      n.stored += uint32_t(__popc(those));
    });
    each_near(token, [&](const Belongs &row, const char *) {
      if (lane_id() == n.put) n.belongs = row;
      n.put++;
    });
    __syncwarp();
    return n;
  }
  EPT_DEVICE bool is_near(uint32_t whose) const { return whose != kEveryone && goes_in_pieces(t, whose); }
  // act(row, packed) by the whole warp for each rank that a token goes to in pieces: where its row belongs, and where
  // it would be packed.
  template <class Act>
  EPT_DEVICE void each_near(uint32_t token, Act act) const {
    if (!may_go_in_pieces(t)) return;
    each_place(token, [&](bool has, char *where, uint32_t whose) {
      EPT_ROLLED
      for (uint32_t near = __ballot_sync(kAll, int(has && is_near(whose))); near; near &= near - 1) {
        const uint32_t p = uint32_t(__ffs(int(near)) - 1), peer = from_lane(whose, p);
        char *packed = from_lane(where, p);
        const uint64_t at = received() + uint64_t(packed - message_to(peer));
        act(belongs(t, kDispatchSend, generation, peer, at, row_bytes), packed);
      }
    });
  }
  // Bytes that stand in the warp's part of the ring, to `at` of each of those rows.
  EPT_DEVICE void put_all(const Places &n, uint64_t at, const char *from, uint64_t bytes) const {
    EPT_ROLLED
    for (uint32_t p = 0; p < n.put; p++)
      put_piece({from_lane(n.belongs.to, p), from_lane(n.belongs.number, p)}, at, from, bytes);
  }
  // Of a step of a row, whose vectors have been read: a warp's rounds of the message, to all.
  template <uint32_t kEach, uint32_t kRounds>
  EPT_DEVICE void put_round(const Places &n, uint32_t step, const Vector (&q)[kRounds], uint32_t v,
                            const Span16 &span) const {
    put_step(places(), n.stored, q, v, span.to);
    if (n.put == 0) return;
    char *const at = warps_step_at<kEach>(s.ring, step);
    const uint32_t first = v - lane_id(), until = smaller(first + kRounds * kWarp, span.to);
    put_step(&at, 1, q, lane_id(), until - first);
    put_all(n, uint64_t(first) * 16, at, uint64_t(until - first) * 16);
  }
  EPT_DEVICE void beside(uint32_t token) const {
    keep(token);
    each_rank(token, [&](uint32_t r, uint32_t row, bool goes) {
      if (goes && s.lists[r]) s.lists[r][row] = token;
    });
    while (look(s.ordered) == 0) EPT_REST();
    rest(token, [&](auto write) {
      each_place(token,
                 [&](bool has, char *where, uint32_t whose) { write(__ballot_sync(kAll, int(has)), where, whose); });
    });
    const uint64_t from = ept_row_scales(a.object.payload) + (a.quantise ? a.scale_bytes : 0);
    each_near(token,
              [&](const Belongs &row, const char *packed) { put_piece(row, from, packed + from, row_bytes - from); });
  }
  EPT_DEVICE void packed_part(uint32_t token) {
    __syncwarp();
    each_rank(token, [&](uint32_t r, uint32_t, bool goes) {
      if (goes) packed_one(r);
      __syncwarp();
    });
  }

  // A part of a row, which comes since fetch(), to places().
  EPT_DEVICE void payload(uint32_t token, uint32_t part, const Places &n) const {
    const Span16 span = span_of(vectors, part, a.deal.parts, kPair);
    by_step([&](auto step) {
      if constexpr (decltype(step)::kIts == kPacked) {
        uint32_t number = 0;
        finish<kPacked>(token, span,
                        [&](const Vector(&held)[kPair], uint32_t v) { put_round<kPair>(n, number++, held, v, span); });
      } else
        quantise<decltype(step)::kIts>(token, span, n);
    });
    __syncwarp();
  }
  EPT_DEVICE char *const *places() const { return s.to + warp_id() * kWarp; }
  // Sixteen elements a lane and round, so eight lanes a block of EPT_FP8_BLOCK. Scales are kept until a warp has one
  // for each lane.
  template <int32_t kFormat>
  EPT_DEVICE void quantise(uint32_t token, const Span16 &span, const Places &n) const {
    using Its = Step<kFormat>;
    constexpr uint32_t kBlocks = 4 * Its::kRounds, kTurns = kWarp / kBlocks;
    const uint32_t steps = span.rounds(Its::kRounds);
    uint32_t step = 0, kept = 0;
    finish<kFormat>(token, span, [&](const Vector(&held)[Its::kEach], uint32_t v) {
      Vector q[Its::kRounds];
      uint32_t said;
      bool good;
      if constexpr (kFormat == kBF16)
        said = pair_of_bf16(q, good, held, v, span);
      else
        said = sixteen_of(q[0], good, held, v < span.to);
      if (__ballot_sync(kAll, !good)) said = exactly<kFormat>(q, step, v, span);
      put_round<Its::kEach>(n, step, q, v, span);
      const uint32_t turn = step % kTurns;
      said = from_lane(said, lane_id() % 4 * 8 + lane_id() / 4 % Its::kRounds);
      if (lane_id() / kBlocks == turn) kept = said;
      step++;
      if (turn == kTurns - 1 || step == steps)
        put_scales(kept, span.from / 8 + (step - 1 - turn) * kBlocks, span, n,
                   warps_step_at<Its::kEach>(s.ring, step - 1));
    });
  }
  // The codes of a lane's sixteen elements; returns what stands for the scale of its block.
  template <uint32_t kSize>
  EPT_DEVICE uint32_t sixteen_of(Vector &q, bool &good, const Vector (&held)[kSize], bool here) const {
    Sixteen of{};
    if (here) widen16(of.x, held, a.x_format);
    const Scaling by = scaling_of(float_of(most_of_block(most_of(of))), a.epsilon, a.ue8m0);
    good = by.good;
    q = e4m3_of(of.x, by.inverse);
    return by.said;
  }
  // The same of two rounds of bf16, whose largest sizes are a half each of one word: an even lane works out the scale
  // of its block of the first round for itself and its neighbour, which does that for the second.
  EPT_DEVICE uint32_t pair_of_bf16(Vector (&q)[kPair], bool &good, const Vector (&held)[2 * kPair], uint32_t v,
                                   const Span16 &span) const {
    const bool here[] = {v < span.to, v + kWarp < span.to};
    const uint32_t one = here[0] ? most_of_bf16(held[0], held[1]) : 0;
    const uint32_t two = here[1] ? most_of_bf16(held[2], held[3]) : 0;
    uint32_t most = larger_bf16((one & 0xffff) | two << 16, one >> 16 | (two & 0xffff0000));
    EPT_UNROLL
    for (uint32_t step = 1; step < 8; step *= 2) most = larger_bf16(most, __shfl_xor_sync(kAll, most, int(step)));
    most = (lane_id() % 2 ? most : most << 16) & 0x7fff0000;
    const Scaling by = scaling_of(float_of(most), a.epsilon, a.ue8m0);
    good = by.good;
    EPT_UNROLL
    for (uint32_t i = 0; i < kPair; i++) {
      const uint32_t whose = (lane_id() & ~1u) + i;
      const Inverse inverse = {from_lane(by.inverse.high, whose), from_lane(by.inverse.low, whose)};
      if (i && !here[i]) continue;  // a part of an odd number of rounds has half a step
      Sixteen of;
      widen8(of.x, held[2 * i], kBF16);
      widen8(of.x + 8, held[2 * i + 1], kBF16);
      q[i] = e4m3_of(of.x, inverse);
    }
    return by.said;
  }
  // The same of a step as it stands in the ring.
  template <int32_t kFormat>
  EPT_DEVICE uint32_t exactly(Vector (&q)[Step<kFormat>::kRounds], uint32_t step, uint32_t v,
                              const Span16 &span) const {
    using Its = Step<kFormat>;
    const Piece *at = step_at<Its::kEach>(s.ring, step);
    uint32_t said = 0;
    EPT_UNROLL
    for (uint32_t i = 0; i < Its::kRounds; i++, at += Its::kSize * kWarp) {
      const Quantised its =
          quantise_exactly(reinterpret_cast<const char *>(at), v + i * kWarp < span.to, a.x_format, a.epsilon, a.ue8m0);
      q[i] = its.q;
      if (lane_id() % Its::kRounds == i) said = its.said;
    }
    return said;
  }
  // Lane i has the scale of block first + i, where the span has that. `free`: shared memory of the warp's.
  EPT_DEVICE void put_scales(uint32_t scale, uint32_t first, const Span16 &span, const Places &n, char *free) const {
    const uint32_t block = first + lane_id();
    const bool here = block * 8 < span.to;
    const uint64_t scales = ept_row_scales(a.object.payload), at = scales + (a.ue8m0 ? block : block * 4);
    char *const *to = places();
    EPT_ROLLED
    for (uint32_t p = 0; p < n.stored; p++) put_scale(to[p] + at, scale, here);
    if (n.put == 0) return;
    const uint32_t size = a.ue8m0 ? 1 : 4;
    put_scale(free + lane_id() * size, scale, here);
    put_all(n, scales + first * size, free, smaller(kWarp, (span.to + 7) / 8 - first) * size);
  }
  EPT_DEVICE void put_scale(char *there, uint32_t scale, bool here) const {
    if (here && a.ue8m0) *there = char(scale);
    if (here && !a.ue8m0) *reinterpret_cast<uint32_t *>(there) = scale;
  }

  // What is kept of a token's pairs; the caller's scales, what pads them, and what says whose row it is. places(write):
  // write(those, where, whose) by all lanes, of which `those` have a place. At that of everyone a pair's expert stands
  // with its rank, and at others alone, if it is of that rank.
  template <class Places>
  EPT_DEVICE void rest(uint32_t token, Places places) const {
    const auto scales_at = uint32_t(ept_row_scales(a.object.payload));
    const auto tail_at = uint32_t(ept_row_token(a.object.payload, a.scale_bytes));
    const uint32_t padding = tail_at - scales_at - a.scale_bytes;
    const uint32_t words = (row_bytes - tail_at) / 4;
    EPT_ROLLED
    for (uint32_t base = 0; base < words; base += kWarp) {
      const uint32_t w = base + lane_id();
      const bool pair = w >= 2 && w < 2 + 3 * top_k, counts = w >= 2 + top_k, weighs = w >= 2 + 2 * top_k;
      const uint32_t k = w - 2 - (weighs ? 2 * top_k : counts ? top_k : 0);
      const uint64_t kept = uint64_t(token) * top_k + k;
      // Both words that a lane needs are asked for before the first is used.
      const uint32_t *from = nullptr;
      if (pair && weighs && a.weights)
        from = reinterpret_cast<const uint32_t *>(a.weights + token * a.weights_strides[0] + k * a.weights_strides[1]);
      if (pair && counts && !weighs) from = a.routing.ordinals + kept;
      int64_t expert = -1;
      if (pair) expert = id_at(id_of(token, k));
      uint32_t value = w == 0 ? token : 0;
      if (from) value = *from;
      const uint32_t where = valid(expert) ? s.where[expert] : kNowhere;
      if (pair && weighs) a.routing.weights[kept] = float_of(value);
      if (pair && !counts) {
        a.routing.ids[kept] = valid(expert) ? int32_t(expert) : -1;
        value = where & 0xffff;
      }
      places([&](uint32_t those, char *to, uint32_t whose) {
        EPT_ROLLED
        for (; those; those &= those - 1) {
          const uint32_t p = uint32_t(__ffs(int(those)) - 1);
          char *there = from_lane(to, p);
          const uint32_t peer = from_lane(whose, p);
          const bool every = peer == kEveryone, at = !pair || every || where >> 16 == peer;
          const uint32_t said = every && pair && !counts ? where : value;
          if (w < words) reinterpret_cast<uint32_t *>(there + tail_at)[w] = at ? said : counts ? 0 : 0xffffffffu;
        }
      });
    }
    if (!padding && !a.scales.data) return;
    places([&](uint32_t those, char *to, uint32_t) {
      EPT_ROLLED
      for (; those; those &= those - 1) {
        char *there = from_lane(to, uint32_t(__ffs(int(those)) - 1)) + scales_at;
        if (lane_id() < padding) there[a.scale_bytes + lane_id()] = 0;
        if (!a.scales.data) continue;
        EPT_ROLLED
        for (uint32_t i = lane_id(); i * a.scale_size < a.scale_bytes; i += kWarp) {
          const char *from = a.scales.at(token) + i * a.scales.column;
          for (uint32_t b = 0; b < a.scale_size; b++) there[i * a.scale_size + b] = from[b];
        }
      }
    });
  }
};

}  // namespace ept::moe::cuda

EPT_KERNEL moe_dispatch_send(EPT_ARGUMENT(ept::moe::cuda::DispatchSend) args) {
  using namespace ept::moe::cuda;
  if (!args.lane.world) return;
  EPT_SHARED(memory);
  Carve carve(memory);
  const SendShared shared = send_shared(carve, blockDim.x, args.lane.world, args.object.experts, args.tokens);
  DispatchSender(args, shared).run();
}
