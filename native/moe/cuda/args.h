// SPDX-License-Identifier: Apache-2.0
//
// args.h: what the host and the kernels share: where a lane's tables are, a routing's arrays, and each kernel's
// argument. An argument says where things stand that don't move as long as the lane lives, so that no kernel begins by
// looking for them; no memory that a suspend gives back is among them (suspend.cc). What changes from step to step
// (generations, peers' addresses, faults) is never in it: that is read from device memory, so that a captured launch
// can be replayed.
#pragma once

#include "eptransport/device.h"
#include "moe/layout.h"

namespace ept::moe::cuda {

constexpr uint32_t kWarp = 32;

// Kernels that are compiled at run time for one shape (src/eptransport/_kernels.py) are given its numbers; 0: they are
// read from the tables, which have the same.
#ifndef EPT_FIXED_WORLD
#define EPT_FIXED_WORLD 0
#define EPT_FIXED_TOP_K 0
#define EPT_FIXED_LOCAL 0
#define EPT_FIXED_HIDDEN 0
#define EPT_FIXED_PAYLOAD 0
#endif
EPT_HD constexpr uint32_t fixed_or(uint32_t fixed, uint64_t value) { return fixed ? fixed : uint32_t(value); }

// Division by what stands still in a launch, by a multiplication: the GPU's own takes some 25 instructions, one after
// another. `inverse` is 2^32 / by, too small by one at most; so the first quotient is right or one too small, and what
// is left says which.
struct Divisor {
  uint32_t by, inverse;
#ifdef __CUDACC__
  __device__
#endif
      uint32_t of(uint32_t number) const {
    const auto q = uint32_t(uint64_t(number) * inverse >> 32);
    return number - q * by >= by ? q + 1 : q;
  }
};
EPT_HD constexpr Divisor divisor(uint32_t by) { return {by, by ? 0xffffffffu / by : 0}; }

EPT_HD constexpr uint32_t smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }

// A row is moved in vectors of 16 bytes, a warp's worth of them at a time: a round. Mostly by two vectors a lane and
// step, a warp's width apart: half of the instructions that a step takes beside its loads and stores.
EPT_HD constexpr uint32_t rounds_of(uint32_t vectors) { return (vectors + kWarp - 1) / kWarp; }
constexpr uint32_t kPair = 2;
// Sums are made of so many elements a lane, 16 bytes of the 2-byte formats; what is left of a row is done one by one.
constexpr uint32_t kGroup = 8;
// Into how many parts rows are cut so that each of `warps` has about `each` pieces or more: `rows` of them a block. The
// more pieces, the less warps wait for the one that has one more; but each begins with a wait for memory, so that no
// part is shorter than kLeast rounds, unless there would be a warp without work. `together`: rounds that are moved in
// one step, and so are in one part.
EPT_HD constexpr uint32_t parts_of(uint32_t rows, uint32_t warps, uint32_t vectors, uint32_t each,
                                   uint32_t together = 1) {
  // Of a row of 7168: halves in fp8, quarters in bf16.
  const uint32_t least = (7 + together - 1) / together;
  const uint32_t rounds = (rounds_of(vectors) + together - 1) / together, n = rows < 1 ? 1 : rows;
  const uint32_t needed = warps / n, most = (rounds + least - 1) / least, wanted = (each * warps + n - 1) / n;
  uint32_t parts = wanted < most ? wanted : most;
  parts = parts < needed ? needed : parts;
  parts = parts < rounds ? parts : rounds;
  return parts < 1 ? 1 : parts;
}

// Whether `rows` of a dispatch's recv, all blocks' together, are claimed one by one (dispatch_claims.cuh): where each
// warp has two or more.
EPT_HD constexpr bool are_claimed(uint64_t rows, uint32_t warps, uint32_t blocks) {
  return rows >= uint64_t(2) * warps * blocks;
}

// Gives out one piece of memory in parts, in the same order on both sides.
class Carve {
 public:
  EPT_HD explicit Carve(char *begin) : begin_(begin), at_(0) {}
  // At a multiple of the type's size. Lanes::lay leans on it: its paths begin where bytes() ended before them.
  template <class T>
  EPT_HD T *take(uint64_t count) {
    at_ = align_up(at_, sizeof(T));
    T *here = reinterpret_cast<T *>(begin_ + at_);
    at_ += count * sizeof(T);
    return here;
  }
  EPT_HD uint64_t bytes() const { return align_up(at_, 16); }

 private:
  char *begin_;
  uint64_t at_;
};

// A lane's signals of one source, in the order of moe/lane.h's Words: of its chunks in each ring position, then of our
// chunks that it has granted.
constexpr uint32_t kSignals = 10;
EPT_HD constexpr uint32_t signal_index(uint32_t phase, uint32_t slot, uint32_t position = 0) {
  return position * 4 + phase * 2 + slot;
}
EPT_HD constexpr uint32_t grant_index(uint32_t phase) { return 8 + phase; }

enum Half : uint32_t { kDispatchSend = 0, kDispatchRecv = 1, kCombineSend = 2, kCombineRecv = 3, kHalves = 4 };

// What went wrong first in a lane; in pinned host memory. `code` is written last.
struct Told {
  uint32_t half;
  int32_t peer;
  uint64_t generation, expected, seen;
  uint32_t what;  // Trouble
  uint32_t reserved;
  uint64_t code;  // ept_code as a positive number; 0: nothing
};

enum Trouble : uint32_t {
  kLate = 1,     // expected and seen are counts of a signal
  kHeader = 2,   // a peer's header is not of this step: seen is the field's number in check_header
  kIds = 3,      // expected: number of experts; seen: the id
  kRoom = 4,     // expected: rows that came; seen: rows that the output holds
  kRow = 5,      // a row is not what its header promised
  kPost = 6,     // seen: the code that the path answered
  kMembers = 9,  // expected: the membership of the dispatch that is summed; seen: the present one
  kLost = 7,     // expected: what was waited for, seen: the code that the proxy told of the peer
  kSlot = 8,     // expected and seen: what the peer must have consumed, and has
  kCut = 10      // expected: rows that the peer's message was to have, seen: what had come when it was cut short
};

// Of check_header's fields the one that is no fault of the calls.
constexpr uint32_t kMembershipField = 2;

// Device timestamps, for who asks for them (ept_gpu_lanes_times). kPoints of each half and block, by its first thread;
// then, of each phase and source, when its signal was first seen by a block and when the last of its rows was done.
constexpr uint32_t kPoints = 8;
EPT_HD constexpr uint64_t time_at(uint32_t half, uint32_t blocks, uint32_t block, uint32_t point) {
  return (uint64_t(half) * blocks + block) * kPoints + point;
}
EPT_HD constexpr uint64_t source_time_at(uint32_t blocks, uint32_t world, uint32_t phase, uint32_t source) {
  return (uint64_t(kHalves) * blocks) * kPoints + (uint64_t(phase) * world + source) * 2;
}
EPT_HD constexpr uint64_t times_of(uint32_t blocks, uint32_t world) { return source_time_at(blocks, world, 2, 0); }

// Who takes part, in three sets: what the open message of each phase has taken, by phase; and what the next dispatch
// takes. A send ends by copying the last into its phase's: so all halves of a message have one set, whatever comes to
// be in between.
enum MemberSet : uint32_t { kNext = 2, kSets = 3 };

// Written by kernels of the lane, which never run beside each other.
struct LaneState {
  uint64_t sent[2], received[2];  // generations of each phase; the last block of a half raises its own
  uint32_t blocks[kHalves];       // of the launch under way that have counted themselves out
  uint32_t ended[2][2];           // of a recv of each phase, by its generation mod 2: those whose rows are written
  uint32_t taken[kHalves][2];     // by generation mod 2: pieces of work that warps have taken (taken.cuh)
  uint32_t fault;                 // ept_code as a positive number
  uint32_t membership[kSets];     // 0: nobody was ever masked, and `out` is looked at by nobody
};

// Of a path of kind GPU: the library reaches the peer by a network, or has it mapped and copies (ept_path.memory).
enum Initiates : uint32_t { kFar = 1, kNear = 2 };

struct LaneTable {
  uint32_t world, rank, lane, epoch;
  LaneMap map;
  uint64_t timeout_ns;
  char *const *in;     // [world] where this lane's receive half for messages of that source begins
  uint32_t proxied;    // 1: some peer is behind a proxy, which sends from the lane's memory (a path's source)
  uint32_t initiates;  // Initiates, of all paths of kind GPU
  uint32_t lists;  // 1: dispatch's messages to this rank and to others of its GPU are listed (wire.h): there are some
  const ept_path *paths;   // [world]
  uint64_t *const *words;  // [world] where the signals of that source stand: uint64_t[kSignals]
  uint32_t *done;          // [world] pieces of the message to that rank that are packed; 0 between launches
  uint32_t *claimed;       // [2, world] by generation mod 2: rows of that source's dispatch that are claimed
  uint64_t *tickets;       // [world, kSignals] of the proxy's last put from its staging, + 1; 0: none. Of a path of
                           // kind GPU: how many puts there were
  // [world, kSignals] Of position 0: what that source's counts are ahead of generation / 2. Of position 1 and of
  // grants, which only calls that are streamed have: the count that was consumed (chunks.cuh).
  uint64_t *offsets;
  uint64_t *heard;       // [world, EPT_PHASES] what the source has consumed, as its headers said
  const uint64_t *acks;  // the same, as its messages to the engine said; NULL: no CPU rank is in the group
  uint64_t *lands;       // [EPT_PHASES, EPT_MOE_SLOTS, world] where in `in` that source's message comes
  uint8_t *out;          // [kSets, world] 1: that rank takes no part
  LaneState *state;
  Told *told;
  int32_t *group_fault;
  uint64_t *times;  // NULL: nobody asks
};

enum Tally : uint32_t { kGenerations = 0, kMessages = 1, kBytes = 2, kRowsSent = 3, kGrants = 4, kTallies = 5 };

struct ObjectTable {
  uint32_t number, experts, local, top_k, hidden, max_tokens;
  uint32_t alignment;
  uint32_t returned_format;
  uint64_t payload, returned;  // bytes of a row's payload, out and back
  const uint32_t *where;       // [experts] rank << 16 | local expert
  const uint32_t *first;       // [world + 1] where a rank's counts start in a table of all experts
  uint64_t *sent;              // [lanes, EPT_PHASES, kTallies] what has been sent, for stats
  uint64_t *mirrored;          // [lanes] dispatches whose counts were mirrored (counts.h)
  Shape shape;
};

// A tensor by flattened leading dimensions, as moe/check.h's Rows.
struct Strided {
  char *data;
  int64_t outer, inner, column;
  Divisor leading;
#ifdef __CUDACC__
  __device__
#endif
      char *at(uint64_t row) const {
    if (!leading.by) return data + int64_t(row) * inner;
    const auto number = uint32_t(row);  // there are at most INT32_MAX
    const uint32_t group = leading.of(number);
    return data + int64_t(group) * outer + int64_t(number - group * leading.by) * inner;
  }
};

// The arrays of one routing, in one allocation of the caller's. T: tokens sent; R: the most rows that can come.
struct RoutingArrays {
  uint64_t *combine_at;                  // [world] where in this rank's combine slot each rank's sums go
  uint64_t *return_at;                   // [world] where in each source's combine slot our sums go
  uint64_t *combine_room, *return_room;  // [world] bytes there, header included; only where calls may be streamed
  uint32_t *rows_to;                     // [world]
  uint32_t *begin;                       // [world + 1] of the rows that came, by source
  uint32_t *membership;                  // [1] of its dispatch
  int32_t *parts;                        // [T, fan, 2] rank and row of a token, by rank ascending; -1: no more
  uint32_t *own;                         // [max_tokens] the list of this rank's message to itself (wire.h, LISTED)
  int32_t *ids;                          // [T, top_k] as given
  uint32_t *ordinals;                    // [T, top_k] as rows say them (wire.h)
  float *weights;                        // [T, top_k]
  int32_t *place;                        // [R, top_k] row in the output; -1: none. CONTIGUOUS and MASKED only
  float *row_weights;                    // [R, top_k], likewise
};

EPT_HD inline RoutingArrays routing_arrays(Carve &carve, const Shape &shape, uint64_t tokens) {
  RoutingArrays r{};
  r.combine_at = carve.take<uint64_t>(shape.world);
  r.return_at = carve.take<uint64_t>(shape.world);
  r.combine_room = carve.take<uint64_t>(shape.world);
  r.return_room = carve.take<uint64_t>(shape.world);
  r.rows_to = carve.take<uint32_t>(shape.world);
  r.begin = carve.take<uint32_t>(shape.world + 1);
  r.membership = carve.take<uint32_t>(1);
  r.parts = carve.take<int32_t>(tokens * shape.fan() * 2);
  r.own = carve.take<uint32_t>(shape.max_tokens);
  r.ids = carve.take<int32_t>(tokens * shape.top_k);
  r.ordinals = carve.take<uint32_t>(tokens * shape.top_k);
  r.weights = carve.take<float>(tokens * shape.top_k);
  const uint64_t rows = uint64_t(shape.world) * shape.max_tokens;
  r.place = carve.take<int32_t>(rows * shape.top_k);
  r.row_weights = carve.take<float>(rows * shape.top_k);
  return r;
}

// How a launch deals out tokens, and pieces of their rows: what the host knows, no block works out.
struct Deal {
  Divisor tiles;           // of a warp's lanes' tokens each
  uint32_t shares, share;  // of a tile's ids so many shares, of so many of each token's
  uint32_t each, more;     // tokens of a block; as many of the first blocks have one more
  Divisor parts;           // a row's payload is packed in so many pieces
  uint32_t units;          // and it in so many: one more, for what else is in it, where a warp would have none
};
EPT_HD constexpr Deal deal_of(uint32_t tokens, uint32_t blocks, uint32_t warps, uint32_t vectors, uint32_t top_k) {
  const uint32_t most = (tokens + blocks - 1) / blocks, least = parts_of(most, warps, vectors, 2, kPair);
  // All warps wait for the one that has the most pieces; what a piece takes beside its bytes is a tenth of a row. So
  // ten tokens of 16 warps are cut in thirds: two of these take less than two halves.
  const auto takes = [&](uint32_t by) { return uint64_t((most * by + warps - 1) / warps) * (10 + by); };
  uint32_t parts = least;
  for (uint32_t by = least + 1; by <= 2 * least && by <= (rounds_of(vectors) + kPair - 1) / kPair; by++)
    if (takes(by) * parts < takes(parts) * by) parts = by;
  const uint32_t tiles = (tokens + kWarp - 1) / kWarp;
  const uint32_t shares = smaller(tiles && tiles < warps ? warps / tiles : 1, top_k);
  Deal deal{};
  deal.tiles = divisor(tiles);
  deal.shares = shares;
  deal.share = (top_k + shares - 1) / shares;
  deal.each = tokens / blocks;
  deal.more = tokens % blocks;
  deal.parts = divisor(parts);
  deal.units = parts + (most * (parts + 1) <= warps ? 1 : 0);
  return deal;
}

struct DispatchSend {
  LaneTable lane;
  ObjectTable object;
  RoutingArrays routing;
  const char *x;
  int64_t x_stride;  // bytes
  uint32_t tokens;
  int32_t x_format;
  const void *ids;
  int64_t ids_strides[2];  // elements
  const float *weights;    // NULL: none
  int64_t weights_strides[2];
  Strided scales;  // the caller's; data NULL: none
  uint32_t scale_size, scale_bytes;
  int32_t payload_format, scale_format;
  float epsilon;
  uint8_t ids_64, quantise, ue8m0, reserved;
  Deal deal;
};

struct DispatchRecv {
  LaneTable lane;
  ObjectTable object;
  RoutingArrays routing;
  int32_t layout;
  int32_t payload_format, scale_format;
  uint32_t scale_size, scale_bytes;
  uint32_t outer;                           // world, local experts, or 1
  Divisor leading;                          // N of the layout
  Divisor blocks;                           // of the launch
  uint32_t scale_runs;                      // 1: a row's scales stand together, in whole vectors
  uint32_t turn;                            // so many blocks later the next source's first rows are dealt
  Strided x, scales, ids, weights, source;  // data NULL: not wanted
  int32_t *counts, *offsets, *num_rows;
  struct CountsPage *mirror;  // NULL: nobody has asked for it
  uint64_t ticket;
};

// Rows that a dispatch under way brings, before there are outputs for them. arrival: uint64_t[4]: rows, of one rank at
// most, of the contiguous layout, of one expert at most.
struct DispatchWait {
  LaneTable lane;
  ObjectTable object;
  uint32_t scale_bytes;
  int32_t payload_format, scale_format;
  uint64_t *arrival;
};

// Rounds of messages of one length, over one way (trial.h). The messages of each rank, and to it, stand `room` bytes
// apart in the slots of a dispatch.
struct TrialArgs {
  LaneTable lane;
  uint64_t first;  // generation
  uint64_t bytes, room;
  uint32_t warm, rounds;  // rounds 0: nothing is done
  uint64_t *took;         // ns of one of `rounds`; pinned
};

// Takes a message of each source as if it had been read.
struct Drain {
  LaneTable lane;
  uint32_t phase;
};

// Brings who takes part to a lane (kNext), and a fault, where `code` is one.
struct TakeMembers {
  static constexpr uint32_t kMost = 16384;  // ranks: what an argument has room for
  LaneTable lane;
  uint32_t membership, code;
  int32_t peer;
  uint64_t out[kMost / 64];  // bits
};

struct CombineSend {
  LaneTable lane;
  ObjectTable object;
  RoutingArrays routing;
  int32_t layout;
  int32_t format;  // of expert_out
  Strided out;     // expert_out
  uint64_t leading;
  Strided row_weights;  // beside the rows; data NULL: none
  uint8_t weights_applied, reserved[7];
};

struct CombineRecv {
  LaneTable lane;
  ObjectTable object;
  RoutingArrays routing;
  char *y;
  int64_t y_stride;  // bytes
  uint32_t tokens;
  int32_t format;
  Divisor parts;        // that a token is summed in
  Strided row_weights;  // [tokens, top_k] sums of what came beside the rows; data NULL: not wanted
};

// Weights that are known only at combine, in a message of their own, in the phase of dispatch.
struct LateSend {
  LaneTable lane;
  ObjectTable object;
  RoutingArrays routing;
  uint32_t tokens;
  const float *weights;
  int64_t strides[2];  // elements
};
struct LateRecv {
  LaneTable lane;
  ObjectTable object;
  RoutingArrays routing;
  float *late;  // [rows, top_k] as RoutingArrays.row_weights
};

// What the kernels of a message that may come in chunks keep of it, in device memory: all 0 before its first one and
// after its last (chunks.cuh).
struct ChunkState {
  uint64_t *posted;                 // [world, 2] 1 + the number of the last chunk that was posted from that position
  uint64_t *begun;                  // [world] 1: the header of its first chunk is in, and what follows from it
  uint64_t *ready;                  // [world] rows that have come
  uint32_t *packed;                 // [world, 2] rows of the chunk in that position that are packed
  uint32_t *first, *count, *last;   // [world, 2] of the chunk that came there: 1 + its first row, its rows, whether
  uint32_t *number;                 // [world, 2] which one it is
  uint32_t *used;                   // [world, 2] of its rows, those that have been read
  uint32_t *granted;                // [world] twice the next that will be, and 1 where the one after it is read
  uint32_t *chunks;                 // [world] that have come
  uint32_t *total, *begin, *flags;  // [world] rows of the message; of those before it; flags of its header
  uint32_t *experts;                // [experts] rows that we send to each
  uint32_t *counts;                 // [world, local] rows that came for each
  uint32_t *token;                  // the next that no warp has taken
};
EPT_HD inline ChunkState chunk_state(Carve &carve, uint32_t world, uint32_t experts, uint32_t local) {
  ChunkState s{};
  s.posted = carve.take<uint64_t>(2ull * world);
  s.begun = carve.take<uint64_t>(world);
  s.ready = carve.take<uint64_t>(world);
  s.packed = carve.take<uint32_t>(2ull * world);
  s.first = carve.take<uint32_t>(2ull * world);
  s.count = carve.take<uint32_t>(2ull * world);
  s.last = carve.take<uint32_t>(2ull * world);
  s.number = carve.take<uint32_t>(2ull * world);
  s.used = carve.take<uint32_t>(2ull * world);
  s.granted = carve.take<uint32_t>(world);
  s.chunks = carve.take<uint32_t>(world);
  s.total = carve.take<uint32_t>(world);
  s.begin = carve.take<uint32_t>(world);
  s.flags = carve.take<uint32_t>(world);
  s.experts = carve.take<uint32_t>(experts);
  s.counts = carve.take<uint32_t>(uint64_t(world) * local);
  s.token = carve.take<uint32_t>(1);
  return s;
}

// A call that may be streamed is two launches a phase. The first sends what needs no grant: the first two chunks of
// each message. The second sends the others, and receives.
struct Streamed {
  char *state;       // ChunkState
  uint8_t first;     // which launch it is
  uint8_t discards;  // what comes is granted, and read by nobody
  uint8_t reserved[6];
};
struct StreamedDispatch {
  Streamed how;
  DispatchSend out;
  DispatchRecv in;
};
struct StreamedLate {
  Streamed how;
  LateSend out;
  LateRecv in;
};
struct StreamedCombine {
  Streamed how;
  CombineSend out;
  CombineRecv in;
};

}  // namespace ept::moe::cuda
