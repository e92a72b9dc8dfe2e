// SPDX-License-Identifier: Apache-2.0
//
// initiated.cuh: messages that this kernel puts by itself, through a device library (paths of kind GPU).
//
// INVARIANTS
//  - A message is one put-with-signal, the last thing that is put of it, and `tickets` counts those.
//  - The message to r is whole when `done[r]` has reached its pieces (protocol.cuh); who puts it then zeroes it.
//  - To a NIC (kFar) it is one put and so one work request: what two puts carry arrives in any order, but a signal only
//    after the bytes of its own put.
//  - Where the library copies (kNear), its puts are stores by who puts (device.cuh, 8), and rows go in the pieces that
//    they are packed in: each warp puts what it has worked out, out of its part of the ring, before it counts it, with
//    release, and nobody waits for others. Who counts the last one puts the header, which no piece had, with the
//    signal: it and so the reader has all of them.
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

// Where a phase's messages go in pieces: whether any does, and whether this one does.
EPT_DEVICE bool may_go_in_pieces(const LaneTable &t) {
#ifdef EPT_GPU_INITIATED
  return t.initiates & kNear;
#else
  return (void)t, false;
#endif
}
EPT_DEVICE bool goes_in_pieces(const LaneTable &t, uint32_t peer) {
  return may_go_in_pieces(t) && t.paths[peer].kind == EPT_DEVICE_GPU && t.paths[peer].memory;
}
// Where a row of such a message belongs. Its pieces are put there out of any memory that the warp reads, shared memory
// above all: what is packed in the GPU's first is read from there once more. All lanes of the warp call both.
struct Belongs {
  char *to = nullptr;   // as the library is told; NULL: nowhere, and the lane has a fault
  uint32_t number = 0;  // the peer's there
};
EPT_DEVICE Belongs belongs(const LaneTable &t, uint32_t half, uint64_t generation, uint32_t peer, uint64_t at,
                           uint64_t bytes) {
#ifdef EPT_GPU_INITIATED
  const ept_path &path = t.paths[peer];
  const int32_t code = device::refused(path, at, bytes, EPT_NO_SIGNAL);
  if (code == EPT_OK) return {device::address<char>(path.window + at), path.number};
  if (lane_id() == 0) raise_fault(t, uint32_t(-code), half, int32_t(peer), kPost, generation, bytes, uint64_t(-code));
  return {};
#else
  return (void)t, (void)half, (void)generation, (void)peer, (void)at, (void)bytes, Belongs();
#endif
}
EPT_DEVICE void put_piece(const Belongs &row, uint64_t at, const char *from, uint64_t bytes) {
#ifdef EPT_GPU_INITIATED
  if (row.to && bytes) ept_library_part_warp(row.to + at, from, bytes, row.number);
#else
  (void)row, (void)at, (void)from, (void)bytes;
#endif
}

#ifdef EPT_GPU_INITIATED

class Initiated {
 public:
  EPT_DEVICE Initiated(const LaneTable &table, uint32_t of_half, uint32_t phase, uint64_t of_generation, bool pieces)
      : t(table),
        far_alone(pieces),
        half(of_half),
        generation(of_generation),
        signal(signal_index(phase, uint32_t(of_generation & 1))),
        deadline(device::deadline_in(table.timeout_ns)) {}

  // All threads of all blocks, to which the messages are dealt, beginning with the next rank: not all ranks put to the
  // same one at first.
  template <class Message>
  EPT_DEVICE void run(Message message) const {
    const Taking members = taking(t, kNext);
    uint32_t unit = 0;
    for (uint32_t i = 1; i < t.world; i++) {
      const uint32_t r = t.rank + i < t.world ? t.rank + i : t.rank + i - t.world;
      if (goes(members, r) && unit++ % gridDim.x == blockIdx.x) whole(r, message(r));
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
    if (!is_whole(r, its)) return;
    const device::Put put = device::put(WholeBlock(), t.paths[r], its.from, its.received, its.bytes, signal, 0);
    if (threadIdx.x != 0) return;
    t.done[r] = 0;
    if (put.code != EPT_OK)
      fault(r, its.bytes, put.code);
    else
      t.tickets[r * kSignals + signal]++;
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
