// SPDX-License-Identifier: Apache-2.0
//
// initiated.cuh: messages that this kernel puts by itself, through a device library (paths of kind GPU).
//
// INVARIANTS
//  - A message is one put-with-signal, the last thing that is put of it, and `tickets` counts those.
//  - The message to r is whole when `done[r]` has reached its pieces (protocol.cuh). Until all its parts are put the
//    count only grows, so that none of the blocks that wait for it misses it; who puts the last one zeroes it.
//  - To a NIC (kFar) it is one put and so one work request: what two puts carry arrives in any order, but a signal only
//    after the bytes of its own put.
//  - Where the library copies (kNear), its puts are stores by who puts (device.cuh, 8), and a message may go in parts,
//    each counted, with release, by who has put it. Who counts the last one puts the header, which no part had, with
//    the signal: it and so the reader has all of them. Of a dispatch, whose warps write each row for several ranks,
//    blocks put parts of whole messages, where they outnumber those. Of a combine each warp puts the piece of a row
//    that it has packed, before it counts it, and nobody waits for others: those exact bytes, which no other warp has.
//  - All blocks of a launch are on the GPU together (Lanes::choose_blocks) and each has packed its own pieces before it
//    comes here, so what is waited for comes. A fault of the lane, which may have ended a block before, ends the wait.
#pragma once

#include "moe/cuda/protocol.cuh"

namespace ept::moe::cuda {

struct WholeBlock {
  static constexpr bool is_block = true;
  EPT_DEVICE uint32_t rank() const { return threadIdx.x; }
  EPT_DEVICE uint32_t size() const { return blockDim.x; }
  EPT_DEVICE void meet() const { __syncthreads(); }
};

// Where a message was packed, where it goes, and in how many pieces it was packed.
struct Packed {
  const char *from;
  uint64_t received, bytes;
  uint32_t pieces;
};

struct WholeWarp {
  static constexpr bool is_block = false;
  EPT_DEVICE uint32_t rank() const { return lane_id(); }
  EPT_DEVICE uint32_t size() const { return kWarp; }
  EPT_DEVICE void meet() const { __syncwarp(); }
};

// Where a phase's messages go in pieces: whether this one does.
EPT_DEVICE bool goes_in_pieces(const LaneTable &t, uint32_t peer) {
#ifdef EPT_GPU_INITIATED
  return t.initiates & kNear && t.paths[peer].kind == EPT_DEVICE_GPU && t.paths[peer].memory;
#else
  return (void)t, (void)peer, false;
#endif
}
// A piece of such a message, which stands at `from` in this rank's staging and belongs at `to` in the peer's lane. All
// threads of the warp that packed it, which have met since; they meet again at the end.
EPT_SELDOM void put_piece(const LaneTable &t, uint32_t half, uint64_t generation, uint32_t peer, const char *from,
                          uint64_t to, uint64_t bytes) {
#ifdef EPT_GPU_INITIATED
  const int32_t code = device::put_part(WholeWarp(), t.paths[peer], from, to, bytes);
  if (code != EPT_OK && lane_id() == 0)
    raise_fault(t, uint32_t(-code), half, int32_t(peer), kPost, generation, bytes, uint64_t(-code));
#else
  (void)t, (void)half, (void)generation, (void)peer, (void)from, (void)to, (void)bytes;
#endif
}

#ifdef EPT_GPU_INITIATED

// A part shorter than this takes longer to be counted than to be copied.
#ifndef EPT_LEAST_PART  // fibers send less
#define EPT_LEAST_PART (16 << 10)
#endif
constexpr uint64_t kLeastPart = EPT_LEAST_PART;
constexpr uint64_t kPartAlign = 128;

class Initiated {
 public:
  EPT_DEVICE Initiated(const LaneTable &table, uint32_t of_half, uint32_t phase, uint64_t of_generation, bool pieces)
      : t(table),
        far_alone(pieces),
        half(of_half),
        generation(of_generation),
        signal(signal_index(phase, uint32_t(of_generation & 1))),
        deadline(device::deadline_in(table.timeout_ns)) {}

  // All threads of all blocks. Parts are dealt to the blocks in turn, over all messages together, beginning with the
  // next rank: not all ranks put to the same one at first.
  template <class Message>
  EPT_DEVICE void run(Message message) const {
    const Taking members = taking(t, kNext);
    uint32_t copied = 0;
    for (uint32_t r = 0; r < t.world; r++) copied += goes(members, r) && t.paths[r].memory;
    const uint32_t sharers = copied && gridDim.x > copied ? gridDim.x / copied : 1;
    uint32_t unit = 0;
    for (uint32_t i = 1; i < t.world; i++) {
      const uint32_t r = t.rank + i < t.world ? t.rank + i : t.rank + i - t.world;
      if (!goes(members, r)) continue;
      if (sharers == 1 || !t.paths[r].memory) {
        if (unit++ % gridDim.x == blockIdx.x) whole(r, message(r));
        continue;
      }
      const Packed its = message(r);
      const uint64_t body = its.bytes - EPT_MOE_HEADER_BYTES, most = body / kLeastPart;
      const uint32_t parts = most < sharers ? uint32_t(most) : sharers;
      if (parts <= 1) {
        if (unit++ % gridDim.x == blockIdx.x) whole(r, its);
        continue;
      }
      for (uint32_t p = 0; p < parts; p++)
        if (unit++ % gridDim.x == blockIdx.x && is_whole(r, its)) part(r, its, body, p, parts);
    }
  }

 private:
  EPT_DEVICE bool goes(const Taking &members, uint32_t r) const {
    return r != t.rank && members.has(r) && t.paths[r].kind == EPT_DEVICE_GPU && !(far_alone && t.paths[r].memory);
  }

  // Waits for it. The same answer for the whole block.
  EPT_DEVICE bool is_whole(uint32_t r, const Packed &its) const {
    bool stopped = false;
    if (threadIdx.x == 0) {
      while (!stopped && device::count_in(&t.done[r], 0) < its.pieces) {
        EPT_REST();
        stopped = fault_of(t) != 0;
        if (stopped || Hardware::now() <= deadline) continue;
        fault(r, its.pieces, EPT_E_TIMEOUT);
        stopped = true;
      }
    }
    return !is_faulted(stopped);
  }

  EPT_DEVICE void whole(uint32_t r, const Packed &its) const {
    if (is_whole(r, its)) put(r, its, its.bytes);
  }

  // The first `bytes` of the message, with its signal; all else has arrived.
  EPT_DEVICE void put(uint32_t r, const Packed &its, uint64_t bytes) const {
    const device::Put put = device::put(WholeBlock(), t.paths[r], its.from, its.received, bytes, signal, 0);
    if (threadIdx.x != 0) return;
    t.done[r] = 0;
    if (put.code != EPT_OK)
      fault(r, its.bytes, put.code);
    else
      t.tickets[r * kSignals + signal]++;
  }

  EPT_DEVICE void part(uint32_t r, const Packed &its, uint64_t body, uint32_t p, uint32_t parts) const {
    const uint64_t each = align_up((body + parts - 1) / parts, kPartAlign);
    const uint64_t begin = each * p < body ? each * p : body, end = begin + each < body ? begin + each : body;
    const uint64_t at = EPT_MOE_HEADER_BYTES + begin;
    const int32_t code = device::put_part(WholeBlock(), t.paths[r], its.from + at, its.received + at, end - begin);
    bool last = false;
    if (threadIdx.x == 0) {
      if (code != EPT_OK)
        fault(r, its.bytes, code);
      else
        last = device::count_in(&t.done[r], 1) == its.pieces + parts - 1;
    }
    if (__syncthreads_or(last)) put(r, its, EPT_MOE_HEADER_BYTES);
  }

  EPT_DEVICE void fault(uint32_t r, uint64_t expected, int32_t code) const {
    raise_fault(t, uint32_t(-code), half, int32_t(r), kPost, generation, expected, uint64_t(-code));
  }

  const LaneTable &t;
  const bool far_alone;
  const uint32_t half;
  const uint64_t generation;
  const uint32_t signal;
  const uint64_t deadline;
};

#endif

// The end of a send that is no fault, by all threads of all blocks. message(peer): Packed. `pieces`: messages to peers
// that are near have gone so.
template <class Message>
EPT_DEVICE void post_initiated(const LaneTable &t, uint32_t half, uint32_t phase, uint64_t generation, Message message,
                               bool pieces = false) {
  if (!(t.initiates & (pieces ? kFar : kFar | kNear))) return;
#ifdef EPT_GPU_INITIATED
  Initiated(t, half, phase, generation, pieces).run(message);
#else
  (void)half, (void)phase, (void)generation, (void)message;
#endif
}

}  // namespace ept::moe::cuda
