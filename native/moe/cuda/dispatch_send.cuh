// SPDX-License-Identifier: Apache-2.0
//
// dispatch_send.cuh: routing scan, quantisation and packing. Each block scans all ids for itself (they are few, and no
// block then waits for another), owns the tokens t with t mod blocks == its number, reads each of them once, and stores
// its row at every rank that it goes to.
//
// A token's row number at rank r is the count of earlier tokens that go to r: by tiles of 32 tokens, a tile a warp, the
// tokens of a tile that go to r are one ballot. So numbers are the same in every block and on every run.
#pragma once

#include "moe/cuda/formats.cuh"
#include "moe/cuda/protocol.cuh"
#include "moe/cuda/shared.h"

namespace ept::moe::cuda {

class DispatchSender {
 public:
  EPT_DEVICE DispatchSender(const DispatchSend &args, const SendShared &shared)
      : a(args),
        t(*args.lane),
        s(shared),
        generation(t.state->sent[EPT_PHASE_DISPATCH]),
        slot(uint32_t(generation & 1)),
        world(t.world),
        top_k(args.object.top_k),
        fan(uint32_t(args.object.shape.fan())),
        row_bytes(ept_row_bytes(args.object.payload, args.scale_bytes, args.object.top_k)),
        vectors(args.object.payload / 16),
        parts(parts_of((args.tokens + gridDim.x - 1) / gridDim.x, warps(), vectors)) {}

  EPT_DEVICE void run() {
    if (!is_faulted(t)) send();
    if (last_block(t, kDispatchSend, s.word))
      end_half(t, kDispatchSend, &t.state->sent[EPT_PHASE_DISPATCH], generation);
  }

 private:
  EPT_DEVICE void send() {
    if (!settle(t, kDispatchSend, EPT_PHASE_DISPATCH, generation)) return;
    for (uint32_t r = threadIdx.x; r < world && blockIdx.x == 0; r += blockDim.x)
      expect(t, EPT_PHASE_DISPATCH, generation, r,
             t.map.recv(EPT_PHASE_DISPATCH, slot) + a.object.shape.dispatch_region(r).offset);
    begin();
    count();
    place();
    number();
    __syncthreads();
    for (uint32_t r = threadIdx.x; r < world; r += blockDim.x) s.pieces[r] = s.pending[r];
    __syncthreads();
    headers();
    rows();
    if (blockIdx.x == 0 && threadIdx.x == 0 && s.bad[0])
      raise_fault(t, uint32_t(-EPT_E_INVALID), kDispatchSend, -1, kIds, generation, a.object.experts, s.bad[1]);
  }

  EPT_DEVICE int64_t id(uint32_t token, uint32_t k) const {
    const int64_t at = token * a.ids_strides[0] + k * a.ids_strides[1];
    return a.ids_64 ? static_cast<const int64_t *>(a.ids)[at] : static_cast<const int32_t *>(a.ids)[at];
  }
  EPT_DEVICE bool valid(int64_t id) const { return id >= 0 && id < int64_t(a.object.experts); }
  // Of ranks [first, first + 64) those that a token goes to.
  EPT_DEVICE uint64_t ranks(uint32_t token, uint32_t first) const {
    uint64_t mask = 0;
    for (uint32_t k = 0; k < top_k && token < a.tokens; k++) {
      const int64_t expert = id(token, k);
      if (!valid(expert)) continue;
      const uint32_t rank = s.where[expert] >> 16;
      if (rank >= first && rank < first + 64) mask |= 1ull << (rank - first);
    }
    return mask;
  }
  EPT_DEVICE uint32_t tiles() const { return (a.tokens + kWarp - 1) / kWarp; }

  EPT_DEVICE void begin() {
    for (uint32_t e = threadIdx.x; e < a.object.experts; e += blockDim.x) {
      s.where[e] = a.object.where[e];
      s.counts[e] = 0;
    }
    for (uint32_t r = threadIdx.x; r < world; r += blockDim.x) s.pending[r] = 0;
    if (threadIdx.x < 2) s.bad[threadIdx.x] = 0;
    __syncthreads();
  }

  // Tokens of each tile that go to each rank, and rows of each expert.
  EPT_DEVICE void count() {
    for (uint32_t tile = warp_id(); tile < tiles(); tile += warps()) {
      const uint32_t token = tile * kWarp + lane_id();
      for (uint32_t k = 0; k < top_k && token < a.tokens; k++) {
        const int64_t expert = id(token, k);
        if (valid(expert)) {
          const uint32_t where = s.where[expert];
          atomicAdd(&s.counts[a.object.first[where >> 16] + (where & 0xffff)], 1u);
        } else if (expert != -1) {  // nobody can be told before the messages go: it counts as none, and faults the lane
          s.bad[1] = uint32_t(expert);
          s.bad[0] = 1;
        }
      }
      for (uint32_t first = 0; first < world; first += 64) {
        const uint64_t mask = ranks(token, first);
        for (uint32_t r = first; r < world && r < first + 64; r++) {
          const uint32_t those = __ballot_sync(kAll, int(mask >> (r - first) & 1));
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

  // Where each message is packed, and where each rank's sums go.
  EPT_DEVICE void place() {
    if (threadIdx.x == 0) {
      uint64_t staged = t.map.send(EPT_PHASE_DISPATCH, slot), combine = 0;
      const uint64_t received = t.map.recv(EPT_PHASE_DISPATCH, slot) + a.object.shape.dispatch_region(t.rank).offset;
      for (uint32_t r = 0; r < world; r++) {
        const uint64_t header = ept_dispatch_header_bytes(a.object.first[r + 1] - a.object.first[r]);
        s.rows_at[r] = packs_at(t, r, received, staged) + header;
        if (r != t.rank) staged += align_up(header + s.rows_to[r] * row_bytes, kAlign);
        s.combine_at[r] = combine;
        combine += align_up(a.object.shape.combine_header() + s.rows_to[r] * a.object.shape.combine_row, kAlign);
      }
    }
    __syncthreads();
    if (blockIdx.x != 0) return;
    for (uint32_t r = threadIdx.x; r < world; r += blockDim.x) {
      a.routing.combine_at[r] = s.combine_at[r];
      a.routing.rows_to[r] = s.rows_to[r];
    }
  }

  // The parts of this block's tokens, and what is kept of them.
  EPT_DEVICE void number() {
    for (uint32_t tile = warp_id(); tile < tiles(); tile += warps()) {
      const uint32_t token = tile * kWarp + lane_id();
      const bool mine = token < a.tokens && token % gridDim.x == blockIdx.x;
      if (!__ballot_sync(kAll, int(mine))) continue;
      uint32_t n = 0;
      int32_t *to = a.routing.parts + uint64_t(token) * fan * 2;
      for (uint32_t first = 0; first < world; first += 64) {
        const uint64_t mask = ranks(token, first);
        for (uint32_t r = first; r < world && r < first + 64; r++) {
          const bool goes = mask >> (r - first) & 1;
          const uint32_t those = __ballot_sync(kAll, int(goes));
          if (!mine || !goes) continue;
          to[2 * n] = int32_t(r);
          to[2 * n + 1] = int32_t(s.tile_rows[tile * world + r] + uint32_t(__popc(those & below())));
          atomicAdd(&s.pending[r], parts);
          n++;
        }
      }
      if (!mine) continue;
      for (; n < fan; n++) to[2 * n] = -1;
      for (uint32_t k = 0; k < top_k; k++) {
        const int64_t expert = id(token, k);
        a.routing.ids[uint64_t(token) * top_k + k] = valid(expert) ? int32_t(expert) : -1;
        a.routing.weights[uint64_t(token) * top_k + k] = weight(token, k);
      }
    }
  }
  EPT_DEVICE float weight(uint32_t token, uint32_t k) const {
    return a.weights ? a.weights[token * a.weights_strides[0] + k * a.weights_strides[1]] : 0.0f;
  }

  // Block r mod blocks writes the header for rank r: one piece of that message.
  EPT_DEVICE void headers() {
    for (uint32_t r = blockIdx.x + gridDim.x * warp_id(); r < world; r += gridDim.x * warps()) {
      const uint32_t local = a.object.first[r + 1] - a.object.first[r];
      const uint64_t bytes = ept_dispatch_header_bytes(local);
      char *to = s.rows_at[r] - bytes;
      if (lane_id() == 0) {
        ept_moe_header h = header_of(t, a.object, EPT_PHASE_DISPATCH, generation, s.rows_to[r]);
        if (!a.weights && a.tokens) h.flags |= EPT_MOE_NO_WEIGHTS;
        h.row_bytes = uint32_t(row_bytes);
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
        counts[e] = e < local ? s.counts[a.object.first[r] + e] : 0;
      __syncwarp();
      if (lane_id() == 0) add(r, 1);
    }
  }

  EPT_DEVICE void add(uint32_t rank, uint32_t pieces) {
    if (!packed(t, rank, pieces, s.rows_to[rank] * parts + 1)) return;
    const uint64_t header = ept_dispatch_header_bytes(a.object.first[rank + 1] - a.object.first[rank]);
    const uint64_t received = t.map.recv(EPT_PHASE_DISPATCH, slot) + a.object.shape.dispatch_region(t.rank).offset;
    post(t, kDispatchSend, EPT_PHASE_DISPATCH, generation, rank, s.rows_at[rank] - header, received,
         header + s.rows_to[rank] * row_bytes);
  }

  EPT_DEVICE void rows() {
    const uint32_t mine = a.tokens > blockIdx.x ? (a.tokens - blockIdx.x + gridDim.x - 1) / gridDim.x : 0;
    for (uint32_t u = warp_id(); u < mine * parts; u += warps()) row(blockIdx.x + u / parts * gridDim.x, u % parts);
  }

  EPT_DEVICE void row(uint32_t token, uint32_t part) {
    int32_t rank = -1, number = 0;
    if (lane_id() < fan) {
      const int32_t *from = a.routing.parts + (uint64_t(token) * fan + lane_id()) * 2;
      rank = from[0];
      number = rank >= 0 ? from[1] : 0;
    }
    const auto n = uint32_t(__popc(__ballot_sync(kAll, int(rank >= 0))));  // they stand at the front
    if (!n) return;
    char *to = rank >= 0 ? s.rows_at[rank] + uint64_t(number) * row_bytes : nullptr;
    if (a.quantise)
      quantise(token, part, to, n);
    else
      copy(token, part, to, n);
    if (part == 0) rest(token, rank, to, n);
    __syncwarp();
    if (rank < 0) return;
    __threadfence_block();  // the other warps of the block that packed for this rank have done so
    const uint32_t before = atomicSub(&s.pending[rank], 1u);
    __threadfence_block();
    if (before == 1) add(uint32_t(rank), s.pieces[rank]);
  }

  EPT_DEVICE void copy(uint32_t token, uint32_t part, char *to, uint32_t n) const {
    constexpr uint32_t kAtOnce = 4;
    const Span16 span = span_of(vectors, part, parts);
    const char *from = a.x + token * a.x_stride;
    for (uint64_t v = span.from + lane_id(); v - lane_id() < span.to; v += kAtOnce * kWarp) {
      Vector held[kAtOnce];
      EPT_UNROLL
      for (uint32_t i = 0; i < kAtOnce; i++)
        if (v + i * kWarp < span.to) held[i] = load16(from + (v + i * kWarp) * 16);
      for (uint32_t p = 0; p < n; p++) {
        char *there = from_lane(to, p);
        EPT_UNROLL
        for (uint32_t i = 0; i < kAtOnce; i++)
          if (v + i * kWarp < span.to) store16(there + (v + i * kWarp) * 16, held[i]);
      }
    }
  }

  // Sixteen elements a lane, so eight lanes a block of EPT_FP8_BLOCK.
  EPT_DEVICE void quantise(uint32_t token, uint32_t part, char *to, uint32_t n) const {
    const Span16 span = span_of(vectors, part, parts);
    const char *from = a.x + token * a.x_stride;
    const uint32_t size = element_size(a.x_format);
    const uint64_t scales_at = ept_row_scales(a.object.payload);
    for (uint64_t base = span.from; base < span.to; base += kWarp) {
      const uint64_t v = base + lane_id();
      const bool here = v < span.to;
      float x[16];
      if (here) {
        load8(x, from + v * 16 * size, a.x_format);
        load8(x + 8, from + (v * 16 + 8) * size, a.x_format);
      }
      uint32_t most = 0;  // sizes compare as integers do; a NaN is none
      EPT_UNROLL
      for (uint32_t i = 0; i < 16 && here; i++) {
        const uint32_t u = bits_of(x[i]) & 0x7fffffff;
        if (u <= 0x7f800000 && u > most) most = u;
      }
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
      Vector q{};
      if (here) {
        EPT_UNROLL
        for (uint32_t i = 0; i < 16; i++) q.word[i / 4] |= e4m3(divided(x[i], scale)) << (i % 4 * 8);
      }
      const uint64_t block = v / 8;
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
    }
  }

  // The caller's scales, what pads them, and what says whose row it is.
  EPT_DEVICE void rest(uint32_t token, int32_t rank, char *to, uint32_t n) const {
    const uint64_t scales_at = ept_row_scales(a.object.payload);
    const uint64_t tail_at = ept_row_token(a.object.payload, a.scale_bytes);
    const auto padding = uint32_t(tail_at - scales_at) - a.scale_bytes;
    const uint32_t words = uint32_t(row_bytes - tail_at) / 4;
    for (uint32_t p = 0; p < n; p++) {
      char *there = from_lane(to, p);
      const uint32_t peer = from_lane(uint32_t(rank), p);
      if (a.scales.data)
        for (uint32_t i = lane_id(); i * a.scale_size < a.scale_bytes; i += kWarp) {
          const char *from = a.scales.at(token) + i * a.scales.column;
          for (uint32_t b = 0; b < a.scale_size; b++) there[scales_at + i * a.scale_size + b] = from[b];
        }
      if (lane_id() < padding) there[scales_at + a.scale_bytes + lane_id()] = 0;
      for (uint32_t w = lane_id(); w < words; w += kWarp) {
        uint32_t value = 0;
        if (w == 0) {
          value = token;
        } else if (w >= 2 && w < 2 + 2 * top_k) {
          const uint32_t k = (w - 2) % top_k;
          const int32_t expert = a.routing.ids[uint64_t(token) * top_k + k];
          const uint32_t where = expert >= 0 ? s.where[expert] : 0xffffffffu;
          const bool at = expert >= 0 && where >> 16 == peer;
          if (w < 2 + top_k)
            value = at ? where & 0xffff : 0xffffffffu;
          else
            value = at ? bits_of(a.routing.weights[uint64_t(token) * top_k + k]) : 0;
        }
        reinterpret_cast<uint32_t *>(there + tail_at)[w] = value;
      }
    }
  }

  const DispatchSend &a;
  const LaneTable &t;
  const SendShared &s;
  const uint64_t generation;
  const uint32_t slot, world, top_k, fan;
  const uint64_t row_bytes, vectors;
  const uint32_t parts;  // a row is packed in so many pieces
};

}  // namespace ept::moe::cuda

EPT_KERNEL moe_dispatch_send(const ept::moe::cuda::DispatchSend args) {
  using namespace ept::moe::cuda;
  if (!args.lane) return;
  EPT_SHARED(memory);
  Carve carve(memory);
  const SendShared shared = send_shared(carve, args.lane->world, args.object.experts, args.tokens);
  DispatchSender(args, shared).run();
}
