// SPDX-License-Identifier: Apache-2.0
//
// layout.h: where everything stands in a lane's memory. Small value types, plain C++, no allocation, so that a CUDA
// build uses the same code. All ranks have the same Shape and so the same geometry: a sender knows where at the
// receiver its message goes without asking.
//
//   a lane's memory, one registration
//   +----------------+----------------+---------------+---------------+---------------+--- ... ---+
//   | dispatch recv 0| dispatch recv 1| combine recv 0| combine recv 1| dispatch send | combine   |
//   |  (slot 0)      |  (slot 1)      |               |               |  0, 1         |  send 0, 1|
//   +----------------+----------------+---------------+---------------+---------------+--- ... ---+
//   |<------------- exported to every peer ------------------------->|<---- ours alone ---------->|
//
//   dispatch recv slot: one region a source, all of dispatch_stride()
//   combine recv slot:  one region a rank, packed by this rank's own routing (or even shares where streamed)
//   dispatch send slot: one message a peer, packed (or even shares where streamed)
//   combine send slot:  one message a source, all of combine_stride()
#pragma once

#include <stdint.h>

#include "eptransport/wire.h"

namespace ept::moe {

// Messages start at multiples of this: a cache line pair, so that two peers' headers never share one.
constexpr uint64_t kAlign = 128;

struct Region {
  uint64_t offset;  // from the start of the slot
  uint64_t bytes;
};

EPT_HD constexpr uint64_t align_up(uint64_t bytes, uint64_t to) { return (bytes + to - 1) / to * to; }
EPT_HD constexpr uint64_t at_least(uint64_t a, uint64_t b) { return a > b ? a : b; }

// One of the two ring positions of a region; a message of several chunks alternates between them.
EPT_HD constexpr Region position(Region whole, uint32_t index) {
  const uint64_t half = whole.bytes / 2 / kAlign * kAlign;
  return {whole.offset + index * half, half};
}

EPT_HD constexpr uint64_t rows_that_fit(uint64_t bytes, uint64_t header, uint64_t row) {
  return bytes < header ? 0 : (bytes - header) / row;
}

// What the ranks agreed on, as far as sizes go.
struct Shape {
  uint32_t world;
  uint32_t top_k;
  uint32_t max_local;     // experts of the rank that holds most
  uint32_t max_tokens;    // of one call
  uint32_t chunk_tokens;  // of one call whose every message is one chunk
  uint64_t dispatch_row;  // bytes, at most
  uint64_t combine_row;   // bytes, row weights included

  EPT_HD constexpr bool streams() const { return chunk_tokens < max_tokens; }
  // Ranks that one token can go to: all, and all but its own.
  EPT_HD constexpr uint64_t fan() const { return top_k < world ? top_k : world; }
  EPT_HD constexpr uint64_t fan_out() const { return top_k < world - 1 ? top_k : world - 1; }

  EPT_HD constexpr uint64_t dispatch_header() const { return EPT_MOE_HEADER_BYTES + align_up(4ull * max_local, 64); }
  EPT_HD constexpr uint64_t combine_header() const { return EPT_MOE_HEADER_BYTES; }
  // The least that a ring position must hold: a header and one row.
  EPT_HD constexpr uint64_t least_dispatch() const { return align_up(dispatch_header() + dispatch_row, kAlign); }
  EPT_HD constexpr uint64_t least_combine() const { return align_up(combine_header() + combine_row, kAlign); }

  EPT_HD constexpr uint64_t dispatch_stride() const {
    return align_up(dispatch_header() + chunk_tokens * dispatch_row, kAlign);
  }
  EPT_HD constexpr uint64_t combine_stride() const {
    return align_up(combine_header() + chunk_tokens * combine_row, kAlign);
  }

  // Bytes of one slot.
  EPT_HD constexpr uint64_t dispatch_recv() const { return world * dispatch_stride(); }
  EPT_HD constexpr uint64_t dispatch_send() const {
    const uint64_t packed = (world - 1) * (dispatch_header() + kAlign) + chunk_tokens * fan_out() * dispatch_row;
    const uint64_t shares = streams() ? (world - 1) * 2 * least_dispatch() : 0;
    return world == 1 ? 0 : align_up(at_least(packed, shares), kAlign);
  }
  EPT_HD constexpr uint64_t combine_recv() const {
    const uint64_t packed = world * (combine_header() + kAlign) + chunk_tokens * fan() * combine_row;
    const uint64_t shares = streams() ? world * 2 * least_combine() : 0;
    return align_up(at_least(packed, shares), kAlign);
  }
  EPT_HD constexpr uint64_t combine_send() const { return (world - 1) * combine_stride(); }

  // Whether a longer call can be cut up at all: each ring position holds a row.
  EPT_HD constexpr bool can_stream() const {
    return position({0, dispatch_stride()}, 0).bytes >= least_dispatch() &&
           (world == 1 || position({0, combine_stride()}, 0).bytes >= least_combine());
  }

  EPT_HD constexpr Region dispatch_region(uint32_t source) const {
    return {source * dispatch_stride(), dispatch_stride()};
  }
  EPT_HD constexpr Region combine_staging(uint32_t index) const { return {index * combine_stride(), combine_stride()}; }
};

// How a message is cut into chunks: by where it is packed and where it is to be, as regions whose halves are the ring
// positions of one that is not sent whole. No rows are one chunk; per_chunk 0: not one row fits.
struct Cut {
  uint64_t per_chunk, chunks;
};
EPT_HD constexpr Cut cut(uint64_t rows, uint64_t header, uint64_t row, Region staging, Region target) {
  const uint64_t whole = header + rows * row;
  if (whole <= staging.bytes && whole <= target.bytes) return {rows, 1};
  const uint64_t here = rows_that_fit(position(staging, 0).bytes, header, row);
  const uint64_t there = rows_that_fit(position(target, 0).bytes, header, row);
  const uint64_t each = here < there ? here : there;
  return {each, each ? (rows + each - 1) / each : 0};
}

// An even share of a slot, for calls that are streamed.
EPT_HD constexpr Region share(uint64_t slot_bytes, uint32_t parts, uint32_t index) {
  const uint64_t each = slot_bytes / parts / kAlign * kAlign;
  return {index * each, each};
}

// Sizes of the slots of a lane, and where each slot stands. The arena's are the largest of all its objects'.
struct LaneMap {
  uint64_t dispatch_recv;
  uint64_t combine_recv;
  uint64_t dispatch_send;
  uint64_t combine_send;

  EPT_HD constexpr uint64_t recv(uint32_t phase, uint32_t slot) const {
    return phase == EPT_PHASE_DISPATCH ? slot * dispatch_recv : 2 * dispatch_recv + slot * combine_recv;
  }
  EPT_HD constexpr uint64_t recv_bytes(uint32_t phase) const {
    return phase == EPT_PHASE_DISPATCH ? dispatch_recv : combine_recv;
  }
  EPT_HD constexpr uint64_t exported() const { return 2 * (dispatch_recv + combine_recv); }
  EPT_HD constexpr uint64_t send(uint32_t phase, uint32_t slot) const {
    return exported() + (phase == EPT_PHASE_DISPATCH ? slot * dispatch_send : 2 * dispatch_send + slot * combine_send);
  }
  EPT_HD constexpr uint64_t bytes(uint64_t page) const {
    return align_up(exported() + 2 * (dispatch_send + combine_send), page);
  }
};

EPT_HD constexpr LaneMap lane_map(const Shape &shape) {
  return {shape.dispatch_recv(), shape.combine_recv(), shape.dispatch_send(), shape.combine_send()};
}

}  // namespace ept::moe
