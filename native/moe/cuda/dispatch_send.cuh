// SPDX-License-Identifier: Apache-2.0
//
// dispatch_send.cuh: quantisation and packing. Each block reads each of its tokens once, and stores its row at every
// rank that it goes to (dispatch_plan.cuh says where).
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
    const uint32_t fault = fault_of(t);
    start();
    begin();
    const bool works = !is_faulted(fault) && settle(t, kDispatchSend, EPT_PHASE_DISPATCH, generation);
    leave_half(t, kDispatchSend, EPT_PHASE_DISPATCH, generation);
    if (works) send();
    note(t, kDispatchSend, 5);
  }

 protected:
  EPT_DEVICE void send() {
    note(t, kDispatchSend, 1);
    for (uint32_t r = threadIdx.x; r < world && blockIdx.x == 0; r += blockDim.x)
      expect(t, EPT_PHASE_DISPATCH, generation, r,
             t.map.recv(EPT_PHASE_DISPATCH, slot()) + a.object.shape.dispatch_region(r).offset);
    const Taking members = taking(t, kNext);
    count(from_last() < world, [&](uint32_t r) {
      const bool heads = r % gridDim.x == from_last() && members.has(r);
      s.pieces[r] = s.pending[r] = own_rows(r) * units + (heads ? 1 : 0);
      if (s.rows_at[r]) s.rows_at[r] += received() + header_bytes(r);
    });
    place();
    if (warp_id() == (warps() > 1 ? warps() - 2 : 0)) order();
    // Else place() is for the last warp alone, which writes this block's header.
    if (stages() || world > gridDim.x) __syncthreads();
    note(t, kDispatchSend, 2);
    headers();
    rows();
    post_initiated(t, kDispatchSend, EPT_PHASE_DISPATCH, generation, [&](uint32_t r) -> Packed {
      const uint64_t header = header_bytes(r);
      return {s.rows_at[r] - header, received(), header + uint64_t(s.rows_to[r]) * row_bytes, s.rows_to[r] * units + 1};
    });
    note(t, kDispatchSend, 3);
    tell_bad_ids();
  }

  // What needs no plan: this warp's first row comes already, and the ids of its first tile.
  EPT_DEVICE void start() const {
    const uint32_t token = warp_id() * kWarp + lane_id();
    if (token < a.tokens) prefetch(ids_of(token));
    if (a.weights && token < a.tokens)
      prefetch(reinterpret_cast<const char *>(a.weights + token * a.weights_strides[0]));
    const uint32_t u = warp_id();
    if (u >= (end - first) * parts) return;
    const uint32_t nth = a.deal.parts.of(u);
    fetch(first + nth, u - nth * parts);
  }
  // A part of a row comes.
  EPT_DEVICE void fetch(uint32_t token, uint32_t part) const {
    const Span16 span = span_of(vectors, part, a.deal.parts);
    const uint32_t each = a.quantise ? 16 * element_size(a.x_format) : 16;
    const char *from = a.x + token * a.x_stride;
    uint32_t asked = span.from + lane_id();
    const auto next = [&] {
      const Fetch here = {from + uint64_t(asked) * each, asked < span.to ? int32_t(each / 16) : 0};
      asked += kWarp;
      return here;
    };
    if (each == 16)
      start_stream<1, false>(s.ring, next);
    else if (each == 32)
      start_stream<2, true>(s.ring, next);
    else
      start_stream<4, true>(s.ring, next);
  }

  // Block r mod blocks, from the last, writes the header for rank r: one piece of that message.
  EPT_DEVICE void headers() {
    const Taking members = taking(t, kNext);
    EPT_ROLLED
    for (uint32_t r = from_last() + gridDim.x * (warps() - 1 - warp_id()); r < world; r += gridDim.x * warps()) {
      if (!members.has(r)) continue;
      const uint32_t local = s.first[r + 1] - s.first[r];
      const uint64_t bytes = header_bytes(r);
      char *to = s.rows_at[r] - bytes;
      if (lane_id() == 0) {
        ept_moe_header h = header_of(t, a.object, EPT_PHASE_DISPATCH, generation, s.rows_to[r]);
        if (!a.weights && a.tokens) h.flags |= EPT_MOE_NO_WEIGHTS;
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
    if (before != 1 || !packed(t, rank, s.pieces[rank], s.rows_to[rank] * units + 1)) return;
    const uint64_t header = header_bytes(rank);
    post(t, kDispatchSend, EPT_PHASE_DISPATCH, generation, rank, s.rows_at[rank] - header, received(),
         header + uint64_t(s.rows_to[rank]) * row_bytes);
  }

  EPT_DEVICE void rows() {
    const uint32_t pieces = (end - first) * parts;
    EPT_ROLLED
    for (uint32_t u = warp_id(); u < pieces; u += warps()) {
      const uint32_t nth = a.deal.parts.of(u);
      row(first + nth, u - nth * parts, u == warp_id());
    }
    EPT_ROLLED
    for (uint32_t token = first + warps() - 1 - warp_id(); units > parts && token < end; token += warps()) about(token);
  }

  EPT_DEVICE void row(uint32_t token, uint32_t part, bool started) {
    if (!started) fetch(token, part);
    Parts its;
    const uint32_t n = plan(token, its);
    payload(token, part, its.to, n);
    if (part == 0 && units == parts) about(token, its, n);
    packed_part(its);
  }
  // What a row has beside its payload, by a warp that has none of that.
  EPT_DEVICE void about(uint32_t token) {
    Parts its;
    const uint32_t n = plan(token, its);
    about(token, its, n);
    packed_part(its);
  }

  // Of a lane the rank that has the token, as which of its rows, and where.
  struct Parts {
    int32_t rank = -1;
    uint32_t row = 0;
    char *to = nullptr;
  };
  // Returns how many ranks have one: so many of the first lanes.
  EPT_DEVICE uint32_t plan(uint32_t token, Parts &its) const {
    const uint32_t n = ranks_of(token, its.rank, its.row);
    if (its.rank >= 0) its.to = s.rows_at[its.rank] + uint64_t(its.row) * row_bytes;
    return n;
  }
  EPT_DEVICE void about(uint32_t token, const Parts &its, uint32_t n) const {
    keep(token, n, its.rank, its.row);
    while (look(s.ordered) == 0) EPT_REST();
    rest(token, its.rank, its.to, n);
  }
  EPT_DEVICE void packed_part(const Parts &its) {
    __syncwarp();
    if (its.rank >= 0) packed_one(uint32_t(its.rank));
    __syncwarp();
  }

  // A part of a row, which comes since fetch(), to the first n lanes' places.
  EPT_DEVICE void payload(uint32_t token, uint32_t part, char *to, uint32_t n) const {
    if (!a.quantise)
      copy(token, part, to, n);
    else if (a.x_format == kBF16)
      quantise<kBF16>(token, part, to, n);
    else if (element_size(a.x_format) == 2)
      quantise<kAny2>(token, part, to, n);
    else
      quantise<kF32>(token, part, to, n);
  }

  EPT_DEVICE void copy(uint32_t token, uint32_t part, char *to, uint32_t n) const {
    const Span16 span = span_of(vectors, part, a.deal.parts);
    const char *from = a.x + token * a.x_stride;
    uint32_t v = span.from + lane_id(), asked = v + kFirst<1> * kWarp;
    finish_stream<1, false>(
        s.ring, span.rounds(),
        [&] {
          const Fetch here = {from + uint64_t(asked) * 16, asked < span.to ? 1 : 0};
          asked += kWarp;
          return here;
        },
        [&](const Vector(&held)[1]) {
          EPT_ROLLED
          for (uint32_t p = 0; p < n; p++) {
            char *there = from_lane(to, p);
            if (v < span.to) store16(there + v * 16, held[0]);
          }
          v += kWarp;
        });
  }

  // Sixteen elements a lane, so eight lanes a block of EPT_FP8_BLOCK, and four blocks a round. Scales are kept until a
  // warp has one for each lane.
  template <int32_t kFormat>
  EPT_DEVICE void quantise(uint32_t token, uint32_t part, char *to, uint32_t n) const {
    constexpr uint32_t kSize = kFormat == kF32 ? 4 : 2, kBlocks = 4, kRounds = kWarp / kBlocks;
    const Span16 span = span_of(vectors, part, a.deal.parts);
    const char *from = a.x + token * a.x_stride;
    const uint32_t rounds = span.rounds();
    uint32_t v = span.from + lane_id(), asked = v + kFirst<kSize> * kWarp, round = 0, kept = 0;
    finish_stream<kSize, true>(
        s.ring, rounds,
        [&] {
          const Fetch here = {from + uint64_t(asked) * (16 * kSize), asked < span.to ? int32_t(kSize) : 0};
          asked += kWarp;
          return here;
        },
        [&](const Vector(&held)[kSize]) {
          const bool here = v < span.to;
          Sixteen of{};
          if (here) widen16<kSize>(of.x, held, known<kFormat>(a.x_format));
          uint32_t most = 0;  // sizes compare as integers do
          if (kFormat == kBF16 && here) most = most_of_bf16(held[0], held[1]);
          if (kFormat != kBF16) most = most_of(of);
          const bool has_nan = most > 0x7f800000;  // of which amax takes no notice
          if (has_nan) most = most_of_numbers(of);
          EPT_UNROLL
          for (uint32_t step = 1; step < 8; step *= 2) {
            const uint32_t other = __shfl_xor_sync(kAll, most, int(step));
            most = other > most ? other : most;
          }
          const float amax = float_of(most);
          float scale = divided(amax > a.epsilon ? amax : a.epsilon, EPT_E4M3_MAX);
          uint32_t said = bits_of(scale);
          if (a.ue8m0) {
            said = exponent_above(scale);
            scale = float_of(said == 0 ? 0x400000 : said << 23);
          }
          const Vector q = e4m3_of(of, scale, has_nan);
          EPT_ROLLED
          for (uint32_t p = 0; p < n; p++) {
            char *there = from_lane(to, p) + uint64_t(v) * 16;
            if (here) store16(there, q);
          }
          const uint32_t turn = round % kRounds;
          said = from_lane(said, lane_id() % kBlocks * 8);
          if (lane_id() / kBlocks == turn) kept = said;
          if (turn == kRounds - 1 || round + 1 == rounds)
            put_scales(kept, (span.from + (round - turn) * kWarp) / 8, (turn + 1) * kBlocks, to, n);
          v += kWarp;
          round++;
        });
  }
  // Lane i has the scale of block first + i, of so many or as many as the row has.
  EPT_DEVICE void put_scales(uint32_t scale, uint32_t first, uint32_t count, char *to, uint32_t n) const {
    const uint32_t block = first + lane_id();
    const bool here = lane_id() < count && block * 8 < vectors;
    const uint64_t at = ept_row_scales(a.object.payload) + (a.ue8m0 ? block : block * 4);
    EPT_ROLLED
    for (uint32_t p = 0; p < n; p++) {
      char *there = from_lane(to, p) + at;
      if (here && a.ue8m0) *there = char(scale);
      if (here && !a.ue8m0) *reinterpret_cast<uint32_t *>(there) = scale;
    }
  }

  // What is kept of a token; the caller's scales, what pads them, and what says whose row it is.
  EPT_DEVICE void rest(uint32_t token, int32_t rank, char *to, uint32_t n) const {
    const auto scales_at = uint32_t(ept_row_scales(a.object.payload));
    const auto tail_at = uint32_t(ept_row_token(a.object.payload, a.scale_bytes));
    const uint32_t padding = tail_at - scales_at - a.scale_bytes;
    const uint32_t words = (row_bytes - tail_at) / 4;
    EPT_ROLLED
    for (uint32_t base = 0; base < words; base += kWarp) {
      const uint32_t w = base + lane_id();
      const bool pair = w >= 2 && w < 2 + 3 * top_k, counts = w >= 2 + top_k, weighs = w >= 2 + 2 * top_k;
      const uint32_t k = w - 2 - (weighs ? 2 * top_k : counts ? top_k : 0);
      uint32_t where = 0xffffffffu, value = w == 0 ? token : 0;
      if (pair) {
        const int64_t expert = id_at(id_of(token, k));
        if (valid(expert)) where = s.where[expert];
        if (weighs) {
          if (a.weights) value = bits_of(a.weights[token * a.weights_strides[0] + k * a.weights_strides[1]]);
          a.routing.weights[uint64_t(token) * top_k + k] = float_of(value);
        } else if (counts) {
          value = a.routing.ordinals[uint64_t(token) * top_k + k];
        } else {
          a.routing.ids[uint64_t(token) * top_k + k] = valid(expert) ? int32_t(expert) : -1;
          value = where & 0xffff;
        }
      }
      EPT_ROLLED
      for (uint32_t p = 0; p < n; p++) {
        char *there = from_lane(to, p);
        const uint32_t peer = from_lane(uint32_t(rank), p);
        const bool at = !pair || where >> 16 == peer;
        if (w < words) reinterpret_cast<uint32_t *>(there + tail_at)[w] = at ? value : counts ? 0 : 0xffffffffu;
      }
    }
    EPT_ROLLED
    for (uint32_t p = 0; p < n && (padding || a.scales.data); p++) {
      char *there = from_lane(to, p) + scales_at;
      if (lane_id() < padding) there[a.scale_bytes + lane_id()] = 0;
      if (!a.scales.data) continue;
      EPT_ROLLED
      for (uint32_t i = lane_id(); i * a.scale_size < a.scale_bytes; i += kWarp) {
        const char *from = a.scales.at(token) + i * a.scales.column;
        for (uint32_t b = 0; b < a.scale_size; b++) there[i * a.scale_size + b] = from[b];
      }
    }
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
