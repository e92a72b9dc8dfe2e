// SPDX-License-Identifier: Apache-2.0
//
// dispatch_send.cuh: routing scan, quantisation and packing. Each block scans all ids for itself (they are few, and no
// block then waits for another), owns a run of tokens, reads each of them once, and stores its row at every rank that
// it goes to.
//
// A token's row number at rank r is the count of earlier tokens that go to r: by tiles of 32 tokens, a tile a warp, the
// tokens of a tile that go to r are one ballot. So numbers are the same in every block and on every run.
//
// All that a block must know before its first row (tables, windows, ids) is asked for at once, by other threads each,
// since a step of few tokens is a chain of waits for memory and little else.
#pragma once

#include "moe/cuda/formats.cuh"
#include "moe/cuda/protocol.cuh"
#include "moe/cuda/shared.h"
#include "moe/cuda/stream.cuh"

namespace ept::moe::cuda {

// Where an expert of a rank is that takes no part: no rank has this number.
constexpr uint32_t kNowhere = 0xffffffffu;

class DispatchSender {
 public:
  // `whole_rows`: a warp has a token by itself.
  EPT_DEVICE DispatchSender(const DispatchSend &args, const SendShared &shared, bool whole_rows = false)
      : a(args),
        t(args.lane),
        s(shared),
        generation(args.lane.state->sent[EPT_PHASE_DISPATCH]),
        world(fixed_or(EPT_FIXED_WORLD, args.lane.world)),
        top_k(fixed_or(EPT_FIXED_TOP_K, args.object.top_k)),
        fan(uint32_t(args.object.shape.fan())),
        row_bytes(uint32_t(ept_row_bytes(args.object.payload, args.scale_bytes, args.object.top_k))),
        vectors(fixed_or(EPT_FIXED_PAYLOAD, args.object.payload) / 16),
        parts(whole_rows ? 1 : parts_of((args.tokens + gridDim.x - 1) / gridDim.x, warps(), vectors, 2)),
        units(parts + ((args.tokens + gridDim.x - 1) / gridDim.x * (parts + 1) <= warps() ? 1 : 0)) {
    const uint32_t each = a.tokens / gridDim.x, more = a.tokens % gridDim.x;
    first = blockIdx.x * each + (blockIdx.x < more ? blockIdx.x : more);
    end = first + each + (blockIdx.x < more ? 1 : 0);
  }

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
    count();
    place();
    number();
    __syncthreads();
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
  EPT_DEVICE void tell_bad_ids() const {
    if (blockIdx.x == 0 && threadIdx.x == 0 && s.bad[0])
      raise_fault(t, uint32_t(-EPT_E_INVALID), kDispatchSend, -1, kIds, generation, a.object.experts, s.bad[1]);
  }

  EPT_DEVICE int64_t id(uint32_t token, uint32_t k) const {
    const int64_t at = token * a.ids_strides[0] + k * a.ids_strides[1];
    return a.ids_64 ? static_cast<const int64_t *>(a.ids)[at] : static_cast<const int32_t *>(a.ids)[at];
  }
  EPT_DEVICE bool valid(int64_t id) const { return id >= 0 && id < int64_t(a.object.experts); }
  // take(k, id) for all of a token's, -1 where there is no such token. Loads of eight are under way together.
  template <class Take>
  EPT_DEVICE void each_id(uint32_t token, Take take) const {
    constexpr uint32_t kTogether = 8;
    for (uint32_t base = 0; base < top_k; base += kTogether) {
      int64_t ids[kTogether];
      EPT_UNROLL
      for (uint32_t i = 0; i < kTogether; i++) ids[i] = base + i < top_k && token < a.tokens ? id(token, base + i) : -1;
      EPT_UNROLL
      for (uint32_t i = 0; i < kTogether; i++)
        if (base + i < top_k) take(base + i, ids[i]);
    }
  }
  // Of ranks [from, from + 64) those that a token goes to.
  EPT_DEVICE uint64_t ranks(uint32_t token, uint32_t from) const {
    uint64_t mask = 0;
    each_id(token, [&](uint32_t, int64_t expert) {
      const uint32_t rank = valid(expert) ? s.where[expert] >> 16 : 0xffffffffu;
      if (rank - from < 64) mask |= 1ull << (rank - from);
    });
    return mask;
  }
  EPT_DEVICE uint32_t tiles() const { return (a.tokens + kWarp - 1) / kWarp; }
  EPT_DEVICE uint64_t header_bytes(uint32_t rank) const {
    return ept_dispatch_header_bytes(s.first[rank + 1] - s.first[rank]);
  }
  EPT_DEVICE uint32_t slot() const { return uint32_t(generation & 1); }
  EPT_DEVICE uint64_t received() const {
    return t.map.recv(EPT_PHASE_DISPATCH, slot()) + a.object.shape.dispatch_region(t.rank).offset;
  }

  // What needs no plan: this warp's first row comes already, and the ids of its first tile.
  EPT_DEVICE void start() const {
    const uint32_t token = warp_id() * kWarp + lane_id();
    if (token < a.tokens) {
      const int64_t at = token * a.ids_strides[0] * (a.ids_64 ? 8 : 4);
      prefetch(static_cast<const char *>(a.ids) + at);
    }
    if (a.weights && token < a.tokens)
      prefetch(reinterpret_cast<const char *>(a.weights + token * a.weights_strides[0]));
    const uint32_t u = warp_id();
    if (u >= (end - first) * parts) return;
    const Span16 span = span_of(vectors, u % parts, parts);
    const uint32_t each = a.quantise ? 16 * element_size(a.x_format) : 16;
    const char *from = a.x + (first + u / parts) * a.x_stride;
    uint32_t asked = span.from + lane_id();
    const auto next = [&] {
      const char *here = asked < span.to ? from + asked * each : nullptr;
      asked += kWarp;
      return here;
    };
    if (each == 16)
      start_stream<1, false>(s.ring, span.rounds(), next);
    else if (each == 32)
      start_stream<2, true>(s.ring, span.rounds(), next);
    else
      start_stream<4, true>(s.ring, span.rounds(), next);
  }

  // Tables; the last warps take the short ones. The caller's barrier ends it.
  EPT_DEVICE void begin(uint32_t set = kNext) {
    const Taking members = taking(t, set);
    for (uint32_t e = threadIdx.x; e < a.object.experts; e += blockDim.x) {
      const uint32_t where = a.object.where[e];
      s.where[e] = members.has(where >> 16) ? where : kNowhere;
      s.counts[e] = 0;
    }
    if (set == kNext && blockIdx.x == 0 && threadIdx.x == 0) a.routing.membership[0] = t.state->membership[kNext];
    const uint32_t back = blockDim.x - 1 - threadIdx.x;
    for (uint32_t r = back; r < world; r += blockDim.x) {
      s.pending[r] = s.pieces[r] = 0;
      s.rows_at[r] = r == t.rank ? t.in[r] : device::window(t.paths[r], 0);
    }
    for (uint32_t r = back < kWarp ? world + 1 : back - kWarp; r <= world; r += blockDim.x - kWarp)
      s.first[r] = a.object.first[r];
    if (threadIdx.x < 2) s.bad[threadIdx.x] = 0;
  }

  // Tokens of each tile that go to each rank, and rows of each expert.
  EPT_DEVICE void count() {
    for (uint32_t tile = warp_id(); tile < tiles(); tile += warps()) {
      const uint32_t token = tile * kWarp + lane_id();
      uint64_t mask = 0;
      each_id(token, [&](uint32_t, int64_t expert) {
        if (valid(expert)) {
          const uint32_t where = s.where[expert], rank = where >> 16;
          if (where == kNowhere) return;
          atomicAdd(&s.counts[s.first[rank] + (where & 0xffff)], 1u);
          if (rank < 64) mask |= 1ull << rank;
        } else if (expert != -1) {  // nobody can be told before the messages go: it counts as none, and faults the lane
          s.bad[1] = uint32_t(expert);
          s.bad[0] = 1;
        }
      });
      for (uint32_t from = 0; from < world; from += 64) {
        if (from) mask = ranks(token, from);
        for (uint32_t r = from; r < world && r < from + 64; r++) {
          const uint32_t those = __ballot_sync(kAll, int(mask >> (r - from) & 1));
          if (lane_id() == 0) s.tile_rows[tile * world + r] = uint32_t(__popc(those));
        }
      }
    }
    __syncthreads();
    for (uint32_t r = threadIdx.x; r < world; r += blockDim.x) {
      uint32_t before = 0;
      for (uint32_t tile = 0; tile < tiles(); tile++) {
        const uint32_t here = s.tile_rows[tile * world + r];
        s.tile_rows[tile * world + r] = before;
        before += here;
      }
      s.rows_to[r] = before;
    }
    __syncthreads();
  }

  // Where each message is packed, and where each rank's sums go: one warp, while the others number rows.
  EPT_DEVICE void place() {
    if (warp_id() != warps() - 1) return;
    uint64_t begin = t.map.send(EPT_PHASE_DISPATCH, slot()), combine = 0;
    for (uint32_t base = 0; base < world; base += kWarp) {
      const uint32_t r = base + lane_id();
      uint64_t message = 0, sums = 0, header = 0;
      if (r < world) {
        header = header_bytes(r);
        message = r == t.rank ? 0 : align_up(header + uint64_t(s.rows_to[r]) * row_bytes, kAlign);
        sums = align_up(a.object.shape.combine_header() + s.rows_to[r] * a.object.shape.combine_row, kAlign);
      }
      const uint64_t messages = warp_prefix(message), all = warp_prefix(sums);
      if (r < world) {
        char *window = s.rows_at[r];
        s.rows_at[r] = (window ? window + received() : staged(t, r, begin + messages - message)) + header;
        s.combine_at[r] = combine + all - sums;
        if (blockIdx.x == 0) {
          a.routing.combine_at[r] = s.combine_at[r];
          a.routing.rows_to[r] = s.rows_to[r];
        }
      }
      begin += from_lane(messages, kWarp - 1);
      combine += from_lane(all, kWarp - 1);
    }
    if (blockIdx.x == 0)
      tally(
          t, a.object, EPT_PHASE_DISPATCH, [&](uint32_t r) { return s.rows_to[r]; },
          [&](uint32_t r) { return header_bytes(r) + uint64_t(s.rows_to[r]) * row_bytes; });
  }

  // The parts of this block's tokens.
  EPT_DEVICE void number() {
    const Taking members = taking(t, kNext);
    for (uint32_t r = blockIdx.x + gridDim.x * threadIdx.x; r < world; r += gridDim.x * blockDim.x)
      if (members.has(r)) add_pieces(r, 1);
    const uint32_t until = end > first ? (end + kWarp - 1) / kWarp : 0;
    for (uint32_t tile = first / kWarp + warp_id(); tile < until; tile += warps()) {
      const uint32_t token = tile * kWarp + lane_id();
      const bool mine = token >= first && token < end;
      uint32_t n = 0;
      int32_t *to = a.routing.parts + uint64_t(token) * fan * 2;
      int32_t *kept = mine && token - first < kKept ? s.parts + (token - first) * fan * 2 : nullptr;
      for (uint32_t from = 0; from < world; from += 64) {
        const uint64_t mask = ranks(token, from);
        for (uint32_t r = from; r < world && r < from + 64; r++) {
          const bool goes = mask >> (r - from) & 1;
          const uint32_t those = __ballot_sync(kAll, int(goes));
          if (!mine || !goes) continue;
          const auto number = int32_t(s.tile_rows[tile * world + r] + uint32_t(__popc(those & below())));
          to[2 * n] = int32_t(r);
          to[2 * n + 1] = number;
          if (kept) kept[2 * n] = int32_t(r), kept[2 * n + 1] = number;
          add_pieces(r, units);
          n++;
        }
      }
      if (!mine) continue;
      for (; n < fan; n++) {
        to[2 * n] = -1;
        if (kept) kept[2 * n] = -1;
      }
    }
  }
  EPT_DEVICE void add_pieces(uint32_t rank, uint32_t pieces) {
    atomicAdd(&s.pending[rank], pieces);
    atomicAdd(&s.pieces[rank], pieces);
  }

  // Block r mod blocks writes the header for rank r: one piece of that message.
  EPT_DEVICE void headers() {
    const Taking members = taking(t, kNext);
    for (uint32_t r = blockIdx.x + gridDim.x * warp_id(); r < world; r += gridDim.x * warps()) {
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
    __threadfence_block();  // the other warps of the block that packed for this rank have done so
    const uint32_t before = atomicSub(&s.pending[rank], 1u);
    __threadfence_block();
    if (before != 1 || !packed(t, rank, s.pieces[rank], s.rows_to[rank] * units + 1)) return;
    const uint64_t header = header_bytes(rank);
    post(t, kDispatchSend, EPT_PHASE_DISPATCH, generation, rank, s.rows_at[rank] - header, received(),
         header + uint64_t(s.rows_to[rank]) * row_bytes);
  }

  EPT_DEVICE void rows() {
    const uint32_t pieces = (end - first) * parts;
    for (uint32_t u = warp_id(); u < pieces; u += warps()) row(first + u / parts, u % parts, u == warp_id());
    for (uint32_t token = first + warps() - 1 - warp_id(); units > parts && token < end; token += warps()) about(token);
  }

  EPT_DEVICE void row(uint32_t token, uint32_t part, bool started) {
    int32_t rank = -1;
    uint32_t n = 0;
    char *to = nullptr;
    const auto look = [&] {
      n = plan(token, rank, to);
      if (part == 0 && units == parts) rest(token, rank, to, n);
    };
    if (!a.quantise)
      copy(token, part, started, look, to, n);
    else if (element_size(a.x_format) == 2)
      quantise<2>(token, part, started, look, to, n);
    else
      quantise<4>(token, part, started, look, to, n);
    __syncwarp();
    if (rank >= 0) packed_one(uint32_t(rank));
    __syncwarp();
  }

  // What a row has beside its payload, by a warp that has none of that.
  EPT_DEVICE void about(uint32_t token) {
    int32_t rank = -1;
    char *to = nullptr;
    const uint32_t n = plan(token, rank, to);
    rest(token, rank, to, n);
    __syncwarp();
    if (rank >= 0) packed_one(uint32_t(rank));
    __syncwarp();
  }
  // Of a lane the rank that has the token, and where; returns how many have one, the first lanes.
  EPT_DEVICE uint32_t plan(uint32_t token, int32_t &rank, char *&to) const {
    int32_t number = 0;
    if (lane_id() < fan) {
      const int32_t *from = token - first < kKept ? s.parts + ((token - first) * fan + lane_id()) * 2
                                                  : a.routing.parts + (uint64_t(token) * fan + lane_id()) * 2;
      rank = from[0];
      number = from[1];
    }
    if (rank >= 0) to = s.rows_at[rank] + uint64_t(uint32_t(number)) * row_bytes;
    return uint32_t(__popc(__ballot_sync(kAll, int(rank >= 0))));
  }

  template <class Plan>
  EPT_DEVICE void copy(uint32_t token, uint32_t part, bool started, Plan plan, char *const &to,
                       const uint32_t &n) const {
    const Span16 span = span_of(vectors, part, parts);
    const char *from = a.x + token * a.x_stride;
    uint32_t asked = span.from + lane_id(), v = asked;
    stream<1, false>(
        s.ring, span.rounds(), started,
        [&] {
          const char *here = asked < span.to ? from + asked * 16 : nullptr;
          asked += kWarp;
          return here;
        },
        plan,
        [&](const Vector(&held)[1]) {
          for (uint32_t p = 0; p < n; p++) {
            char *there = from_lane(to, p);
            if (v < span.to) store16(there + v * 16, held[0]);
          }
          v += kWarp;
        });
  }

  // Sixteen elements a lane, so eight lanes a block of EPT_FP8_BLOCK.
  template <uint32_t kSize, class Plan>
  EPT_DEVICE void quantise(uint32_t token, uint32_t part, bool started, Plan plan, char *const &to,
                           const uint32_t &n) const {
    const Span16 span = span_of(vectors, part, parts);
    const char *from = a.x + token * a.x_stride;
    const uint64_t scales_at = ept_row_scales(a.object.payload);
    uint32_t asked = span.from + lane_id(), v = asked;
    stream<kSize, true>(
        s.ring, span.rounds(), started,
        [&] {
          const char *here = asked < span.to ? from + asked * (16 * kSize) : nullptr;
          asked += kWarp;
          return here;
        },
        plan,
        [&](const Vector(&held)[kSize]) {
          const bool here = v < span.to;
          float x[16] = {};
          if (here) widen16<kSize>(x, held, a.x_format);
          uint32_t most = 0;  // sizes compare as integers do
          EPT_UNROLL
          for (uint32_t i = 0; i < 16; i++) {
            const uint32_t size = bits_of(x[i]) & 0x7fffffff;
            most = size > most ? size : most;
          }
          const bool has_nan = most > 0x7f800000;  // of which amax takes no notice
          if (has_nan) most = most_of_numbers(x);
          for (uint32_t step = 1; step < 8; step *= 2) {
            const uint32_t other = __shfl_xor_sync(kAll, most, int(step));
            most = other > most ? other : most;
          }
          const float amax = float_of(most);
          float scale = divided(amax > a.epsilon ? amax : a.epsilon, EPT_E4M3_MAX);
          uint32_t byte = 0;
          if (a.ue8m0) {
            byte = exponent_above(scale);
            scale = float_of(byte == 0 ? 0x400000 : byte << 23);
          }
          const Vector q = e4m3_of(x, scale, has_nan);
          const uint32_t block = v / 8;
          for (uint32_t p = 0; p < n; p++) {
            char *there = from_lane(to, p);
            if (!here) continue;
            store16(there + v * 16, q);
            if (lane_id() % 8) continue;
            if (a.ue8m0)
              there[scales_at + block] = char(byte);
            else
              *reinterpret_cast<float *>(there + scales_at + block * 4) = scale;
          }
          v += kWarp;
        });
  }

  // What is kept of a token; the caller's scales, what pads them, and what says whose row it is.
  EPT_DEVICE void rest(uint32_t token, int32_t rank, char *to, uint32_t n) const {
    const auto scales_at = uint32_t(ept_row_scales(a.object.payload));
    const auto tail_at = uint32_t(ept_row_token(a.object.payload, a.scale_bytes));
    const uint32_t padding = tail_at - scales_at - a.scale_bytes;
    const uint32_t words = (row_bytes - tail_at) / 4;
    for (uint32_t base = 0; base < words; base += kWarp) {
      const uint32_t w = base + lane_id(), k = (w - 2) % top_k;
      const bool pair = w >= 2 && w < 2 + 2 * top_k, weighs = w >= 2 + top_k;
      uint32_t where = 0xffffffffu, value = w == 0 ? token : 0;
      if (pair) {
        const int64_t expert = id(token, k);
        if (valid(expert)) where = s.where[expert];
        if (weighs) {
          if (a.weights) value = bits_of(a.weights[token * a.weights_strides[0] + k * a.weights_strides[1]]);
          a.routing.weights[uint64_t(token) * top_k + k] = float_of(value);
        } else {
          a.routing.ids[uint64_t(token) * top_k + k] = valid(expert) ? int32_t(expert) : -1;
          value = where & 0xffff;
        }
      }
      for (uint32_t p = 0; p < n; p++) {
        char *there = from_lane(to, p);
        const uint32_t peer = from_lane(uint32_t(rank), p);
        const bool at = !pair || where >> 16 == peer;
        if (w < words) reinterpret_cast<uint32_t *>(there + tail_at)[w] = at ? value : weighs ? 0 : 0xffffffffu;
      }
    }
    for (uint32_t p = 0; p < n && (padding || a.scales.data); p++) {
      char *there = from_lane(to, p) + scales_at;
      if (lane_id() < padding) there[a.scale_bytes + lane_id()] = 0;
      if (!a.scales.data) continue;
      for (uint32_t i = lane_id(); i * a.scale_size < a.scale_bytes; i += kWarp) {
        const char *from = a.scales.at(token) + i * a.scales.column;
        for (uint32_t b = 0; b < a.scale_size; b++) there[i * a.scale_size + b] = from[b];
      }
    }
  }

  const DispatchSend &a;
  const LaneTable &t;
  const SendShared &s;
  const uint64_t generation;
  const uint32_t world, top_k, fan;
  const uint32_t row_bytes, vectors;
  const uint32_t parts;  // a row's payload is packed in so many pieces
  const uint32_t units;  // and it in so many: one more, for what else is in it, where a warp would have none
  uint32_t first, end;   // this block's tokens
};

}  // namespace ept::moe::cuda

EPT_KERNEL moe_dispatch_send(EPT_ARGUMENT(ept::moe::cuda::DispatchSend) args) {
  using namespace ept::moe::cuda;
  if (!args.lane.world) return;
  EPT_SHARED(memory);
  Carve carve(memory);
  const SendShared shared = send_shared(carve, blockDim.x, args.lane.world, args.object.experts, args.tokens,
                                        uint32_t(args.object.shape.fan()));
  DispatchSender(args, shared).run();
}
