// SPDX-License-Identifier: Apache-2.0
//
// combine.cuh: both halves of a combine. Sums are wire.h's: in fp32, by k at the expert's rank, by rank at the source.
#pragma once

#include "moe/cuda/arrivals.cuh"
#include "moe/cuda/dispatch_recv.cuh"
#include "moe/cuda/formats.cuh"
#include "moe/cuda/shared.h"

namespace ept::moe::cuda {

// Eight elements are 16 bytes of the 2-byte formats; what is left of a row of fp32 is done one by one.
constexpr uint32_t kGroup = 8;
constexpr uint32_t kAtOnce = 4;  // loads of 16 bytes in flight a lane

// Messages are packed one rank after another, this rank's own last, so that each leaves as early as it can.
class CombineSender {
 public:
  EPT_DEVICE CombineSender(const CombineSend &args, const CombineShared &shared)
      : a(args),
        t(*args.lane),
        s(shared),
        object(args.object),
        generation(t.state->sent[EPT_PHASE_COMBINE]),
        slot(uint32_t(generation & 1)),
        world(t.world),
        top_k(args.object.top_k),
        row_bytes(ept_combine_row_bytes(args.object.returned, args.object.top_k, 0)),
        groups(args.object.hidden / kGroup) {}

  EPT_DEVICE void run() {
    if (!is_faulted(t)) send();
    if (last_block(t, kCombineSend, s.word)) end_half(t, kCombineSend, &t.state->sent[EPT_PHASE_COMBINE], generation);
  }

 private:
  EPT_DEVICE void send() {
    if (!settle(t, kCombineSend, EPT_PHASE_COMBINE, generation)) return;
    for (uint32_t r = threadIdx.x; r < world && blockIdx.x == 0; r += blockDim.x)
      expect(t, EPT_PHASE_COMBINE, generation, r, t.map.recv(EPT_PHASE_COMBINE, slot) + a.routing.combine_at[r]);
    for (uint32_t r = threadIdx.x; r <= world; r += blockDim.x) s.begin[r] = a.routing.begin[r];
    __syncthreads();
    parts = parts_of((s.begin[world] + gridDim.x - 1) / gridDim.x, warps(), groups);
    for (uint32_t r = threadIdx.x; r < world; r += blockDim.x) s.pieces[r] = s.pending[r] = pieces_of(r);
    __syncthreads();
    headers();
    uint32_t before = 0;  // rows of the ranks before, in the order of packing
    for (uint32_t i = 1; i <= world; i++) {
      const uint32_t r = (t.rank + i) % world, n = s.begin[r + 1] - s.begin[r];
      // Pieces are dealt to all warps of all blocks in turn, over all ranks together.
      const uint32_t first = before * parts, end = first + n * parts, step = gridDim.x * warps();
      const uint32_t own = blockIdx.x + gridDim.x * warp_id();
      uint32_t u = first + (own + step - first % step) % step;
      for (; u < end; u += step) row(r, (u - first) / parts, (u - first) % parts);
      before += n;
    }
  }

  // Of those of rank r, how many this block's warps take.
  EPT_DEVICE uint32_t pieces_of(uint32_t rank) const {
    uint32_t before = 0;
    for (uint32_t i = 1; (t.rank + i) % world != rank; i++) {
      const uint32_t r = (t.rank + i) % world;
      before += s.begin[r + 1] - s.begin[r];
    }
    const uint32_t first = before * parts, end = first + (s.begin[rank + 1] - s.begin[rank]) * parts;
    return upto(end) - upto(first);
  }
  // Numbers below `end` that are this block's: u mod blocks == its number.
  EPT_DEVICE uint32_t upto(uint32_t end) const { return end / gridDim.x + (end % gridDim.x > blockIdx.x ? 1 : 0); }
  EPT_DEVICE uint64_t received(uint32_t rank) const {
    return t.map.recv(EPT_PHASE_COMBINE, slot) + a.routing.return_at[rank];
  }
  EPT_DEVICE char *message(uint32_t rank) const {
    const uint32_t index = rank < t.rank ? rank : rank - 1;
    return packs_at(
        t, rank, received(rank),
        t.map.send(EPT_PHASE_COMBINE, slot) + (rank == t.rank ? 0 : object.shape.combine_staging(index).offset));
  }
  EPT_DEVICE uint32_t rows_of(uint32_t rank) const { return s.begin[rank + 1] - s.begin[rank]; }

  EPT_DEVICE void headers() {
    for (uint32_t r = blockIdx.x + gridDim.x * warp_id(); r < world; r += gridDim.x * warps()) {
      if (lane_id() != 0) continue;
      ept_moe_header h = header_of(t, object, EPT_PHASE_COMBINE, generation, rows_of(r));
      h.row_bytes = uint32_t(row_bytes);
      h.payload_bytes = uint32_t(object.returned);
      h.payload_format = object.returned_format;
      put_header(message(r), h);
      add(r, 1);
    }
    __syncwarp();
  }

  EPT_DEVICE void add(uint32_t rank, uint32_t pieces) {
    if (!packed(t, rank, pieces, rows_of(rank) * parts + 1)) return;
    post(t, kCombineSend, EPT_PHASE_COMBINE, generation, rank, message(rank), received(rank),
         EPT_MOE_HEADER_BYTES + rows_of(rank) * row_bytes);
  }

  EPT_DEVICE void row(uint32_t rank, uint32_t j, uint32_t part) {
    char *to = message(rank) + EPT_MOE_HEADER_BYTES + j * row_bytes;
    const uint64_t number = uint64_t(s.begin[rank]) + j;
    if (a.layout == kRows || a.layout == kByRank)
      convert(to, a.out.at(a.layout == kRows ? number : rank * a.leading + j), part);
    else
      sum(to, number, part);
    __syncwarp();
    if (lane_id() != 0) return;
    __threadfence_block();
    const uint32_t before = atomicSub(&s.pending[rank], 1u);
    __threadfence_block();
    if (before == 1) add(rank, s.pieces[rank]);
  }

  EPT_DEVICE void convert(char *to, const char *from, uint32_t part) const {
    const auto format = int32_t(object.returned_format);
    const uint32_t in = element_size(a.format), out = element_size(format);
    if (a.format == format) {  // every bit as it is
      const Span16 span = span_of(object.returned / 16, part, parts);
      for (uint64_t v = span.from + lane_id(); v < span.to; v += kWarp) store16(to + v * 16, load16(from + v * 16));
      return;
    }
    const Span16 span = span_of(groups, part, parts);
    for (uint64_t g = span.from + lane_id(); g < span.to; g += kWarp) {
      float x[kGroup];
      load8(x, from + g * kGroup * in, a.format);
      store8(to + g * kGroup * out, x, format);
    }
    const uint32_t left = groups * kGroup + lane_id();
    if (part == 0 && left < object.hidden) store1(to + left * out, load1(from + left * in, a.format), format);
  }

  EPT_DEVICE void sum(char *to, uint64_t number, uint32_t part) const {
    const auto format = int32_t(object.returned_format);
    const uint32_t in = element_size(a.format), out = element_size(format);
    const char *from = nullptr;
    float weight = 1.0f;
    if (lane_id() < top_k) {
      const int32_t place = a.routing.place[number * top_k + lane_id()];
      if (place >= 0) from = a.out.at(uint64_t(place));
      if (!a.weights_applied) weight = a.routing.row_weights[number * top_k + lane_id()];
    }
    const uint32_t places = __ballot_sync(kAll, int(from != nullptr));
    const Span16 span = span_of(groups, part, parts);
    for (uint64_t g = span.from + lane_id(); g - lane_id() < span.to; g += kWarp) {
      float acc[kGroup] = {};
      uint32_t left = places;
      while (in == 2 && left) {  // by k, kAtOnce rows in flight
        const auto n = uint32_t(__popc(left));
        Vector held[kAtOnce];
        float w[kAtOnce];
        EPT_UNROLL
        for (uint32_t i = 0; i < kAtOnce; i++) {
          const uint32_t k = left ? uint32_t(__ffs(int(left)) - 1) : 0;
          left &= left - 1;
          const char *row = from_lane(from, k);
          w[i] = from_lane(weight, k);
          if (i < n && g < span.to) held[i] = load16(row + g * 16);
        }
        EPT_UNROLL
        for (uint32_t i = 0; i < kAtOnce; i++) {
          if (i >= n || g >= span.to) continue;
          float x[kGroup];
          widen8(x, held[i], a.format);
          EPT_UNROLL
          for (uint32_t e = 0; e < kGroup; e++) acc[e] = fused(w[i], x[e], acc[e]);
        }
      }
      for (; left; left &= left - 1) {
        const auto k = uint32_t(__ffs(int(left)) - 1);
        const char *row = from_lane(from, k);
        const float w = from_lane(weight, k);
        if (g >= span.to) continue;
        float x[kGroup];
        load8(x, row + g * kGroup * in, a.format);
        EPT_UNROLL
        for (uint32_t i = 0; i < kGroup; i++) acc[i] = fused(w, x[i], acc[i]);
      }
      if (g < span.to) store8(to + g * kGroup * out, acc, format);
    }
    if (part != 0 || groups * kGroup == object.hidden) return;
    const uint32_t at = groups * kGroup + lane_id();
    float acc = 0;
    for (uint32_t left = places; left; left &= left - 1) {
      const auto k = uint32_t(__ffs(int(left)) - 1);
      const char *row = from_lane(from, k);
      const float w = from_lane(weight, k);
      if (at < object.hidden) acc = fused(w, load1(row + at * in, a.format), acc);
    }
    if (at < object.hidden) store1(to + at * out, acc, format);
  }

  const CombineSend &a;
  const LaneTable &t;
  const CombineShared &s;
  const ObjectTable &object;
  const uint64_t generation;
  const uint32_t slot, world, top_k;
  const uint64_t row_bytes;
  const uint32_t groups;
  uint32_t parts = 1;
};

// Tokens in order; each waits for the ranks that have a part of it, in rank order.
class CombineReceiver {
 public:
  EPT_DEVICE CombineReceiver(const CombineRecv &args, const CombineShared &shared)
      : a(args),
        t(*args.lane),
        s(shared),
        object(args.object),
        generation(t.state->received[EPT_PHASE_COMBINE]),
        world(t.world),
        fan(uint32_t(args.object.shape.fan())),
        row_bytes(ept_combine_row_bytes(args.object.returned, args.object.top_k, 0)),
        groups(args.object.hidden / kGroup),
        parts(parts_of((args.tokens + gridDim.x - 1) / gridDim.x, warps(), groups)) {}

  EPT_DEVICE void run() {
    if (!is_faulted(t)) receive();
    if (!last_block(t, kCombineRecv, s.word)) return;
    if (fault_of(t)) blank_all();
    end_half(t, kCombineRecv, &t.state->received[EPT_PHASE_COMBINE], generation);
  }

  EPT_DEVICE void receive() {
    for (uint32_t r = threadIdx.x; r < world; r += blockDim.x) s.standing[r] = kAway;
    __syncthreads();
    scout(t, kCombineRecv, EPT_PHASE_COMBINE, generation, s.standing, *this);
    const uint32_t step = gridDim.x * warps();
    bool whole = true;
    for (uint32_t u = blockIdx.x + gridDim.x * warp_id(); u < a.tokens * parts && whole; u += step)
      whole = token(u / parts, u % parts);
  }

  EPT_DEVICE void blank_all() const {
    const uint64_t first = threadIdx.x, step = blockDim.x;
    const uint64_t words = uint64_t(object.hidden) * element_size(a.format) / 2;
    for (uint64_t i = first; i < words * a.tokens; i += step)
      reinterpret_cast<uint16_t *>(a.y + int64_t(i / words) * a.y_stride)[i % words] = 0;
  }

  EPT_DEVICE bool header(uint32_t source) {
    uint32_t wrong = 0;
    if (lane_id() == 0) {
      const ept_moe_header h = get_header(at(source));
      wrong = check_header(t, object, EPT_PHASE_COMBINE, generation, source, h, row_bytes, object.max_tokens);
      if (!wrong && h.rows != a.routing.rows_to[source]) wrong = 12;
      if (!wrong) hear(t, source, h);
      if (wrong)
        raise_fault(t, uint32_t(-EPT_E_MISMATCH), kCombineRecv, int32_t(source), kHeader, generation,
                    a.routing.rows_to[source], wrong);
    }
    return from_lane(wrong, 0) == 0;
  }
  EPT_DEVICE bool may_begin(uint32_t) const { return true; }
  EPT_DEVICE bool begin(uint32_t) const { return true; }

 private:
  EPT_DEVICE const char *at(uint32_t source) const {
    return t.in[source] + t.map.recv(EPT_PHASE_COMBINE, uint32_t(generation & 1)) + a.routing.combine_at[source];
  }

  // False: the lane is faulted.
  EPT_DEVICE bool token(uint32_t number, uint32_t part) const {
    const char *from = nullptr;
    bool rank_is_late = false;
    if (lane_id() < fan) {
      const int32_t *its = a.routing.parts + (uint64_t(number) * fan + lane_id()) * 2;
      const int32_t rank = its[0];
      if (rank >= 0) {
        while (!shown(&s.standing[rank], kReady)) {
          if (fault_of(t)) {
            rank_is_late = true;
            break;
          }
          EPT_REST();
        }
        from = at(uint32_t(rank)) + EPT_MOE_HEADER_BYTES + uint64_t(uint32_t(its[1])) * row_bytes;
      }
    }
    __syncwarp();
    if (__ballot_sync(kAll, int(rank_is_late))) return false;
    const auto n = uint32_t(__popc(__ballot_sync(kAll, int(from != nullptr))));
    const auto format = int32_t(object.returned_format);
    const uint32_t in = element_size(format), out = element_size(a.format);
    char *to = a.y + int64_t(number) * a.y_stride;
    const Span16 span = span_of(groups, part, parts);
    for (uint64_t g = span.from + lane_id(); g - lane_id() < span.to; g += kWarp) {
      float acc[kGroup] = {};
      uint32_t done = 0;
      for (; in == 2 && done < n; done += kAtOnce) {  // by rank, kAtOnce rows in flight
        Vector held[kAtOnce];
        EPT_UNROLL
        for (uint32_t i = 0; i < kAtOnce; i++) {
          const char *row = from_lane(from, done + i < n ? done + i : 0);
          if (done + i < n && g < span.to) held[i] = load16(row + g * 16);
        }
        EPT_UNROLL
        for (uint32_t i = 0; i < kAtOnce; i++) {
          if (done + i >= n || g >= span.to) continue;
          float x[kGroup];
          widen8(x, held[i], format);
          EPT_UNROLL
          for (uint32_t e = 0; e < kGroup; e++) acc[e] = acc[e] + x[e];
        }
      }
      for (uint32_t p = done; p < n; p++) {
        const char *row = from_lane(from, p);
        if (g >= span.to) continue;
        float x[kGroup];
        load8(x, row + g * kGroup * in, format);
        EPT_UNROLL
        for (uint32_t i = 0; i < kGroup; i++) acc[i] = acc[i] + x[i];
      }
      if (g < span.to) store8(to + g * kGroup * out, acc, a.format);
    }
    if (part != 0 || groups * kGroup == object.hidden) return true;
    const uint32_t left = groups * kGroup + lane_id();
    float acc = 0;
    for (uint32_t p = 0; p < n; p++) {
      const char *row = from_lane(from, p);
      if (left < object.hidden) acc = acc + load1(row + left * in, format);
    }
    if (left < object.hidden) store1(to + left * out, acc, a.format);
    return true;
  }

  const CombineRecv &a;
  const LaneTable &t;
  const CombineShared &s;
  const ObjectTable &object;
  const uint64_t generation;
  const uint32_t world, fan;
  const uint64_t row_bytes;
  const uint32_t groups, parts;
};

}  // namespace ept::moe::cuda

EPT_KERNEL moe_combine_send(const ept::moe::cuda::CombineSend args) {
  using namespace ept::moe::cuda;
  if (!args.lane) return;
  EPT_SHARED(memory);
  Carve carve(memory);
  const CombineShared shared = combine_shared(carve, args.lane->world);
  CombineSender(args, shared).run();
}

EPT_KERNEL moe_combine_recv(const ept::moe::cuda::CombineRecv args) {
  using namespace ept::moe::cuda;
  if (!args.lane) return;
  EPT_SHARED(memory);
  Carve carve(memory);
  const CombineShared shared = combine_shared(carve, args.lane->world);
  CombineReceiver(args, shared).run();
}
