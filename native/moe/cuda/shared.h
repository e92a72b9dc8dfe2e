// SPDX-License-Identifier: Apache-2.0
//
// shared.h: what stands in a block's shared memory, kernel by kernel; the host says by it how much a launch takes.
#pragma once

#include "moe/cuda/args.h"

namespace ept::moe::cuda {

// Pieces of 16 bytes that each thread has under way (stream.cuh). 64 KiB a block of 512: a multiprocessor's share of a
// GPU's memory takes some 20 KiB under way to be busy all the time, and rows begin and end.
constexpr uint32_t kAhead = 8;
struct alignas(16) Piece {
  uint32_t word[4];
};

// What a launch takes at least, so that all take the same: the ring, and beside it 16 KiB, or, if that is more, each
// thread's place, each warp's barrier and the most that a kernel of the lane needs besides. A multiprocessor divides
// its memory between cache and shared memory when it is idle, by what its next block takes, and not while that block
// runs. So a block of 66 KiB that waits for a peer's left no room for that one of 70, with memory for three of them. 16
// KiB are enough for 64 ranks and 256 experts, but for long batches.
constexpr uint64_t least_shared(uint32_t threads, uint64_t besides = 0) {
  const uint64_t ring = kAhead * sizeof(Piece) * threads;
  const uint64_t beside = sizeof(char *) * threads + sizeof(uint64_t) * (threads / kWarp) + besides;
  return ring + (beside < 16384 ? 16384 : beside);
}

// What a block knows of the sources of a phase; looked up before it begins, by a thread each (arrivals.cuh).
struct Sources {
  const uint64_t **word;  // [world] its signal
  uint64_t *target;       // [world] what that must reach
  const char **message;   // [world] where that comes
  uint32_t *standing;     // [world]
};
EPT_HD inline Sources sources(Carve &carve, uint32_t world) {
  Sources s{};
  s.word = carve.take<const uint64_t *>(world);
  s.target = carve.take<uint64_t>(world);
  s.message = carve.take<const char *>(world);
  s.standing = carve.take<uint32_t>(world);
  return s;
}

// Of a tile's tokens those that go to a rank, and how many of the tokens of the tiles before do.
struct alignas(8) TileRows {
  uint32_t those, before;
};

struct SendShared {
  Piece *ring;           // [kAhead, threads]
  char **to;             // [threads] of a warp its token's places; a broadcast costs less than two shuffles
  uint64_t *combine_at;  // [world]
  char **rows_at;        // [world] where row 0 for that rank is packed; before, where the rank's window begins
  uint32_t **lists;      // [world] of a message that is listed (wire.h), where its list goes, once that is known; NULL:
                         // it has rows
  uint32_t *where;       // [experts]
  uint32_t *counts;      // [experts], placed as `first` says
  uint32_t *before;      // [experts], likewise: of tokens before this block's, and of its own whose ordinals are there
  uint32_t *ordered;     // 1: those of all its own are
  uint32_t *first;       // [world + 1] ObjectTable's
  TileRows *tiles;       // [tiles, world]
  uint32_t *rows_to;     // [world]
  uint32_t *pieces;      // [world] pieces of this block's part of the message to that rank
  uint32_t *pending;     // [world] of which not yet packed
  uint32_t *bad;         // [2] 1, and the id, where one was out of range
};
EPT_HD inline SendShared send_shared(Carve &carve, uint32_t threads, uint32_t world, uint32_t experts,
                                     uint32_t tokens) {
  SendShared s{};
  s.ring = carve.take<Piece>(uint64_t(kAhead) * threads);
  s.to = carve.take<char *>(threads);
  s.combine_at = carve.take<uint64_t>(world);
  s.rows_at = carve.take<char *>(world);
  s.lists = carve.take<uint32_t *>(world);
  s.where = carve.take<uint32_t>(experts);
  s.counts = carve.take<uint32_t>(experts);
  s.before = carve.take<uint32_t>(experts);
  s.ordered = carve.take<uint32_t>(1);
  s.first = carve.take<uint32_t>(world + 1);
  s.tiles = carve.take<TileRows>(uint64_t(tokens + kWarp - 1) / kWarp * world);
  s.rows_to = carve.take<uint32_t>(world);
  s.pieces = carve.take<uint32_t>(world);
  s.pending = carve.take<uint32_t>(world);
  s.bad = carve.take<uint32_t>(2);
  return s;
}

// Of a block's rows of a source, so many numbers are read with the header where they are listed: as many as there
// mostly are (6 of 128 tokens, 8 ranks, 16 blocks). Others are read when their row is.
constexpr uint32_t kListed = 8;

// What a block copies a source's rows by. They stand together, so that a row's warp reckons one place in shared memory.
struct SourceRun {
  const char *from;            // where the source's row 0 stands
  uint32_t first, rows, step;  // of this block: so many, from the first on each so much further
  Divisor parts;               // in so many pieces each
  uint32_t claims;             // 1: there may be rows beside those that nobody has claimed yet (dispatch_claims.cuh)
  uint32_t begin;              // of the source's rows in the order of all rows
  uint32_t flags;              // of the header
  uint32_t numbers[kListed];   // of the first rows, if they are listed
};

struct RecvShared {
  Piece *ring;  // [kAhead, threads]
  Sources sources;
  char **to;             // [threads] as SendShared's
  SourceRun *runs;       // [world]
  uint64_t *arrived;     // [warps] barriers of the copy engine (bulk.cuh)
  uint64_t *return_at;   // [world]
  uint32_t *rows;        // [world]
  uint32_t *begin;       // [world + 1] of each source's rows in the order of all rows
  uint32_t *next;        // [world] unit that nobody has taken
  uint32_t *counts;      // [world, local]
  uint32_t *groups;      // [world, local] in the output, where the source's rows of that expert begin
  uint32_t *sums;        // [local] rows of each expert
  uint32_t *starts;      // [local + 1] of each expert's group
  uint32_t *totals;      // 0: nobody has them; 1: a warp adds up; 2: sums, starts and begin are there
  uint32_t *next_blank;  // rows that no row fills are gone through by groups: the next that nobody has taken
  uint32_t *word;
};
EPT_HD inline RecvShared recv_shared(Carve &carve, uint32_t threads, uint32_t world, uint32_t local) {
  RecvShared s{};
  s.ring = carve.take<Piece>(uint64_t(kAhead) * threads);
  s.sources = sources(carve, world);
  s.to = carve.take<char *>(threads);
  s.runs = carve.take<SourceRun>(world);
  s.arrived = carve.take<uint64_t>(threads / kWarp);
  s.return_at = carve.take<uint64_t>(world);
  s.rows = carve.take<uint32_t>(world);
  s.begin = carve.take<uint32_t>(world + 1);
  s.next = carve.take<uint32_t>(world);
  s.counts = carve.take<uint32_t>(uint64_t(world) * local);
  s.groups = carve.take<uint32_t>(uint64_t(world) * local);
  s.sums = carve.take<uint32_t>(local);
  s.starts = carve.take<uint32_t>(local + 1);
  s.totals = carve.take<uint32_t>(1);
  s.next_blank = carve.take<uint32_t>(1);
  s.word = carve.take<uint32_t>(1);
  return s;
}

struct CombineShared {
  Piece *ring;         // [kAhead, threads]
  Sources sources;     // of the receiving half
  uint64_t *received;  // [world] where in that rank's memory it is to be
  char **message;      // [world] where the message to that rank is packed
  uint32_t *begin;     // [world + 1] of the rows that came
  uint32_t *packing;   // [world] pieces of the message to that rank that warps of this block are at,
  uint32_t *packed;    // [world] and that they have packed, and told nobody of yet
  uint32_t *beside;    // [world] bytes of row weights in a row of that source
  uint32_t *coming;    // [world] rows of its sums
  uint32_t *word;
};
EPT_HD inline CombineShared combine_shared(Carve &carve, uint32_t threads, uint32_t world) {
  CombineShared s{};
  s.ring = carve.take<Piece>(uint64_t(kAhead) * threads);
  s.sources = sources(carve, world);
  s.received = carve.take<uint64_t>(world);
  s.message = carve.take<char *>(world);
  s.begin = carve.take<uint32_t>(world + 1);
  s.packing = carve.take<uint32_t>(world);
  s.packed = carve.take<uint32_t>(world);
  s.beside = carve.take<uint32_t>(world);
  s.coming = carve.take<uint32_t>(world);
  s.word = carve.take<uint32_t>(1);
  return s;
}

// What a block knows of messages that may go in chunks (chunks.cuh).
struct OutShared {
  char **at;                      // [world] where the first chunk to that rank is packed
  uint64_t *there;                // [world] and where in its lane it is to be
  uint32_t *half;                 // [world] bytes from there to where the second is packed,
  uint32_t *half_there;           // [world] and is to be
  uint32_t *rows, *per, *chunks;  // [world] of the message; rows of a chunk
};
EPT_HD inline OutShared out_shared(Carve &carve, uint32_t world) {
  OutShared s{};
  s.at = carve.take<char *>(world);
  s.there = carve.take<uint64_t>(world);
  s.half = carve.take<uint32_t>(world);
  s.half_there = carve.take<uint32_t>(world);
  s.rows = carve.take<uint32_t>(world);
  s.per = carve.take<uint32_t>(world);
  s.chunks = carve.take<uint32_t>(world);
  return s;
}
struct InShared {
  uint32_t *chunk;      // [world] that the source's leader waits for, or is at
  uint32_t *leading;    // [world] how far it is
  uint32_t *row_bytes;  // [world] of the source's rows
  uint32_t *next;       // [warps, world] the next row that is this warp's
};
EPT_HD inline InShared in_shared(Carve &carve, uint32_t threads, uint32_t world) {
  InShared s{};
  s.chunk = carve.take<uint32_t>(world);
  s.leading = carve.take<uint32_t>(world);
  s.row_bytes = carve.take<uint32_t>(world);
  s.next = carve.take<uint32_t>(uint64_t(threads / kWarp) * world);
  return s;
}

// Both halves of a call that may be streamed. They share a ring: a warp has one role.
struct StreamedDispatchShared {
  SendShared send;
  RecvShared recv;
  OutShared out;
  InShared in;
};
EPT_HD inline StreamedDispatchShared streamed_dispatch_shared(Carve &carve, uint32_t threads, uint32_t world,
                                                              uint32_t experts, uint32_t local, uint32_t tokens) {
  StreamedDispatchShared s{};
  s.send = send_shared(carve, threads, world, experts, tokens);
  s.recv = recv_shared(carve, 0, world, local);
  s.recv.ring = s.send.ring;
  s.recv.to = s.send.to;
  s.recv.arrived = carve.take<uint64_t>(threads / kWarp);
  s.out = out_shared(carve, world);
  s.in = in_shared(carve, threads, world);
  return s;
}
struct StreamedCombineShared {
  CombineShared both;
  OutShared out;
  InShared in;
  uint32_t *next_out;  // [warps, world] the next row to that rank that is this warp's
};
EPT_HD inline StreamedCombineShared streamed_combine_shared(Carve &carve, uint32_t threads, uint32_t world) {
  StreamedCombineShared s{};
  s.both = combine_shared(carve, threads, world);
  s.out = out_shared(carve, world);
  s.in = in_shared(carve, threads, world);
  s.next_out = carve.take<uint32_t>(uint64_t(threads / kWarp) * world);
  return s;
}
struct StreamedLateShared {
  OutShared out;
  InShared in;
  uint32_t *word;
};
EPT_HD inline StreamedLateShared streamed_late_shared(Carve &carve, uint32_t threads, uint32_t world) {
  StreamedLateShared s{};
  s.out = out_shared(carve, world);
  s.in = in_shared(carve, threads, world);
  s.word = carve.take<uint32_t>(1);
  return s;
}

}  // namespace ept::moe::cuda
