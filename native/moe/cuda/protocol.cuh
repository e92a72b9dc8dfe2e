// SPDX-License-Identifier: Apache-2.0
//
// protocol.cuh: what the halves of a step share: faults, headers, a message's last piece, and sources that arrive.
//
// INVARIANTS
//  - Kernels of one lane never run beside each other (one stream at a time), so state->sent and received stand still
//    while one runs: each block reads its generation at its start, and counts itself out; the last one to do that
//    raises it (Leaving).
//  - At most one generation of a phase is open when the next is sent: the host launches a Drain before. So at send(g)
//    this rank has read every message of g - 1, each of which a GPU rank sent when it had read all of g - 2: slot g mod
//    2 is free at every GPU peer, and no send waits for one. It is also why a GPU rank owes nobody an ept_lane_ack: the
//    header of g - 1 has told.
//  - Of a dispatch that is listed (wire.h) rows stand in slot g mod 2 of this rank's own memory, and peers read them
//    there. They may be stored at send(g) for the same reason: each peer sent its g - 1 when it had read all of g - 2,
//    and this rank has read every message of g - 1. A list is checked as a row is: a number is below max_tokens, and
//    the row there says the same one.
//  - A CPU rank keeps two generations open, so send(g) waits until it has consumed g - 2, as it says in any header that
//    has landed here, read or not, or in an ack, which the proxy thread passes on (lane.h has why that ends).
//  - Generation g of a phase raises the signal of slot g mod 2 to g / 2 + 1, and to what the source is ahead of that
//    since a reset (signals of an engine only count up). A source's rows are read only after that was seen with
//    acquire, by ordinary loads, after a barrier of who saw it.
//  - What a rank sends to itself is counted by nobody: the kernel that reads it begins when this one has ended. Its
//    signal is raised with its header.
//  - A message is `done` in pieces: each block, by whichever of its threads finishes its last piece for a rank, adds
//    its own with acquire and release (device.cuh, 3); who completes the count zeroes it and raises the signal.
//  - A message over a path of kind GPU leaves when the whole kernel has packed it, by blocks that wait for the others,
//    or in the pieces that it is packed in (initiated.cuh). No proxy tells when its staging may be used again: at
//    send(g) each GPU rank has sent g - 1, so it has read all of g - 2, whose bytes so have left this rank's staging of
//    slot g mod 2.
//  - Who takes part is known to every block of a launch alike: state->membership[kNext] and its set are written by
//    take_members alone, which runs when no other kernel of the lane does. A rank that takes no part gets no row, no
//    header and no signal, and nothing of it is awaited; a message is read under the set that it was sent under.
//  - A fault is set once (compare and swap); a kernel of a faulted lane sends nothing, and leaves the outputs blank,
//    whatever its blocks had written by then: the block that sets a fault knows it at its end, when it waits until all
//    others have written what they write.
#pragma once

#include "moe/cuda/args.h"
#include "moe/cuda/simt.h"

namespace ept::moe::cuda {

using device::Hardware;

EPT_DEVICE uint32_t fault_of(const LaneTable &t) {
  return uint32_t(Hardware::relaxed_system(reinterpret_cast<const int32_t *>(&t.state->fault)));
}

EPT_SELDOM void raise_fault(const LaneTable &t, uint32_t code, uint32_t half, int32_t peer, uint32_t what,
                            uint64_t generation, uint64_t expected, uint64_t seen) {
  if (atomicCAS(&t.state->fault, 0u, code) != 0) return;
  t.told->half = half;
  t.told->peer = peer;
  t.told->generation = generation;
  t.told->expected = expected;
  t.told->seen = seen;
  t.told->what = what;
  Hardware::release_system(&t.told->code, code);
  if (t.group_fault) *t.group_fault = -int32_t(code);
}

// A lane's state as it stands when a kernel begins, a word a lane: it is asked for at once and waited for where a word
// of it is. Read by all lanes alike it would be the same in all, which the compiler moves to a uniform register, and so
// waits for before the kernel asks for anything else: a way to memory, 0.4 us of a half.
class StateThen {
 public:
  EPT_DEVICE explicit StateThen(const LaneState *state)
      : state_(state), word_(lane_id() < kWords ? words(state)[lane_id()] : 0) {}
  // All lanes of the warp.
  EPT_DEVICE uint64_t sent(uint32_t phase) const { return number(words(&state_->sent[phase])); }
  EPT_DEVICE uint64_t received(uint32_t phase) const { return number(words(&state_->received[phase])); }
  EPT_DEVICE uint32_t membership(uint32_t set) const { return word(&state_->membership[set]); }

 private:
  static constexpr uint32_t kWords = sizeof(LaneState) / 4;
  static_assert(kWords <= kWarp);
  template <class T>
  EPT_DEVICE static const uint32_t *words(const T *at) {
    return reinterpret_cast<const uint32_t *>(at);
  }
  EPT_DEVICE uint32_t word(const uint32_t *at) const { return from_lane(word_, uint32_t(at - words(state_))); }
  EPT_DEVICE uint64_t number(const uint32_t *at) const { return word(at) | uint64_t(word(at + 1)) << 32; }

  const LaneState *const state_;
  const uint32_t word_;
};

// The same answer for the whole block, all of whose threads call.
EPT_DEVICE bool is_faulted(uint32_t fault) { return __syncthreads_or(fault != 0) != 0; }
EPT_DEVICE bool is_faulted(const LaneTable &t) { return is_faulted(fault_of(t)); }

// The ranks that take part in a set.
struct Taking {
  const uint8_t *out;  // NULL: all do
  EPT_DEVICE bool has(uint32_t rank) const { return !out || !out[rank]; }
};
EPT_DEVICE Taking taking(const LaneTable &t, uint32_t set, uint32_t membership) {
  return {membership ? t.out + set * t.world : nullptr};
}
EPT_DEVICE Taking taking(const LaneTable &t, uint32_t set) { return taking(t, set, t.state->membership[set]); }
EPT_DEVICE uint32_t *claimed(const LaneTable &t, uint64_t generation) { return t.claimed + (generation & 1) * t.world; }
// A message is read, or is about to be by who has begun already. One thread. Who raises a generation readies the next
// one's counts.
EPT_DEVICE void raise_received(const LaneTable &t, uint32_t phase, uint64_t generation) {
  t.state->ended[phase][(generation + 1) & 1] = 0;
  t.state->taken[phase == EPT_PHASE_DISPATCH ? kDispatchRecv : kCombineRecv][(generation + 1) & 1] = 0;
  for (uint32_t r = 0; r < t.world && phase == EPT_PHASE_DISPATCH; r++) claimed(t, generation + 1)[r] = 0;
  t.state->received[phase] = generation + 1;
}
// The end of a half that waits for its blocks: all threads of the block call. True in the last block, for all its
// threads, before end_half.
EPT_DEVICE bool last_block(const LaneTable &t, uint32_t half, uint32_t *word) {
  __syncthreads();
  if (threadIdx.x == 0) *word = device::count_in(&t.state->blocks[half], 1);
  __syncthreads();
  return *word == gridDim.x - 1;
}
EPT_DEVICE void end_half(const LaneTable &t, uint32_t half, uint32_t phase, uint64_t generation) {
  __syncthreads();
  if (threadIdx.x != 0) return;
  t.state->blocks[half] = 0;
  raise_received(t, phase, generation);
}

// No half waits for its blocks where it needn't: each counts itself out as soon as all its threads have read what the
// last one changes, by one warp, and that has the answer when it has done its work. (Waited for at once, it was awaited
// at the block's next barrier by all its warps: 0.7 us of each half.) The count orders nothing: a read whose value was
// used has happened, and the last one fences before it changes anything. All threads make one, after a barrier.
class Leaving {
 public:
  EPT_DEVICE Leaving(const LaneTable &t, uint32_t half, uint32_t warp) : leaves_(warp_id() == warp) {
    if (leaves_ && lane_id() == 0) before_ = atomicAdd(&t.state->blocks[half], 1u);
  }
  // Of the block that was the last one to count: in that warp. So all have begun.
  EPT_DEVICE bool is_last() const {
    if (!leaves_ || from_lane(before_, 0) != gridDim.x - 1) return false;
    __threadfence();
    return true;
  }

 private:
  const bool leaves_;
  uint32_t before_ = 0;
};

// A recv's: by a warp that no scout is.
EPT_DEVICE Leaving leave_recv(const LaneTable &t, uint32_t half) { return Leaving(t, half, warps() - 1); }
EPT_DEVICE void end_recv(const Leaving &leaving, const LaneTable &t, uint32_t half, uint32_t phase,
                         uint64_t generation) {
  if (!leaving.is_last() || lane_id() != 0) return;
  t.state->blocks[half] = 0;
  raise_received(t, phase, generation);
}
// And it says that its rows are written, after a barrier, and waits for no answer.
EPT_DEVICE void tell_end(const LaneTable &t, uint32_t phase, uint64_t generation) {
  if (threadIdx.x == 0) Hardware::add_release_device(&t.state->ended[phase][generation & 1], 1);
}
// Until all blocks have said so, of who must know it: the host is to be told, or the lane is faulted, and outputs shall
// be blank at last. All threads. True in the first block that asks.
EPT_DEVICE bool all_ended(const LaneTable &t, uint32_t phase, uint64_t generation, uint32_t *word) {
  __syncthreads();
  if (threadIdx.x == 0) {
    uint32_t *ended = &t.state->ended[phase][generation & 1];
    while (device::count_in(ended, 0) < gridDim.x) EPT_REST();
    *word = device::count_in(ended, 1);
  }
  __syncthreads();
  return *word == gridDim.x;
}

// A send's, which reads generation, and in settle() what is open. True in the last block's warp: a fault that it sets
// then hinders none of this launch.
EPT_DEVICE Leaving leave_send(const LaneTable &t, uint32_t half) { return Leaving(t, half, (warps() - 1) / 2); }
EPT_DEVICE bool end_send(const Leaving &leaving, const LaneTable &t, uint32_t half, uint32_t phase,
                         uint64_t generation) {
  if (!leaving.is_last()) return false;
  // What it takes (kNext) is what its phase has.
  const uint32_t taken = t.state->membership[kNext];
  const bool moves = t.state->membership[phase] != taken;
  for (uint32_t r = lane_id(); r < t.world && moves; r += kWarp)
    t.out[phase * t.world + r] = t.out[kNext * t.world + r];
  __syncwarp();
  if (lane_id() != 0) return true;
  t.state->membership[phase] = taken;
  t.state->blocks[half] = 0;
  t.state->taken[half][(generation + 1) & 1] = 0;
  t.state->sent[phase] = generation + 1;
  return true;
}

// ---- out ----

// A message is packed at the peer itself where its memory is mapped here (a path's window), or in our own memory, where
// it is read here or put from here.

// Where in a reader's lane the message of that source is; in the source's own, the rows that its lists name.
EPT_DEVICE Region dispatch_place(const LaneTable &t, const Shape &shape, uint32_t slot, uint32_t source) {
  const Region region = shape.dispatch_region(source);
  return {t.map.recv(EPT_PHASE_DISPATCH, slot) + region.offset, region.bytes};
}

EPT_DEVICE void post_own(const LaneTable &t, uint32_t phase, uint64_t generation) {
  Hardware::add_release_system(t.words[t.rank] + signal_index(phase, uint32_t(generation & 1)), 1);
}
// The whole message is packed, and seen by the caller, a single thread.
EPT_SELDOM void post(const LaneTable &t, uint32_t half, uint32_t phase, uint64_t generation, uint32_t peer, char *from,
                     uint64_t received, uint64_t bytes) {
  const uint32_t signal = signal_index(phase, uint32_t(generation & 1));
  const ept_path &path = t.paths[peer];
  const bool direct = device::window(path, received) != nullptr;
  const device::Put put = device::put(device::Thread(), path, direct ? nullptr : from, received, direct ? 0 : bytes,
                                      signal, device::deadline_in(t.timeout_ns));
  if (put.code != EPT_OK)
    raise_fault(t, uint32_t(-put.code), half, int32_t(peer), kPost, generation, bytes, uint64_t(-put.code));
  else if (path.kind == EPT_DEVICE_GPU)
    t.tickets[peer * kSignals + signal]++;
  else if (!direct)
    t.tickets[peer * kSignals + signal] = put.ticket + 1;
}

// What a send must know of a rank's path, asked for together. This rank's own memory is as a peer's that is mapped.
struct Way {
  bool mapped = false;
  uint32_t memory = 0;               // the path's
  uint64_t window = 0, staging = 0;  // where its lane begins, if that is mapped; else what is packed for it goes here
};
EPT_DEVICE Way ask_way(const LaneTable &t, uint32_t rank) {
  const ept_path &path = t.paths[rank];
  Way its{path.kind == EPT_DEVICE_MAPPED, path.memory, path.window, path.source};
  if (rank == t.rank) its.mapped = true, its.window = reinterpret_cast<uintptr_t>(t.in[rank]);
  return its;
}

EPT_DEVICE bool is_initiated(const LaneTable &t, uint32_t peer) {
  return t.initiates && t.paths[peer].kind == EPT_DEVICE_GPU;
}
// Where the message to a peer whose memory isn't mapped is packed: at `at` of the memory that its path sends from.
EPT_DEVICE char *staged(const LaneTable &t, uint32_t peer, uint64_t at) {
  return device::address<char>(t.paths[peer].source + at);
}

// `pieces` of the message to `peer` are packed, of `all`; the caller, one thread, has seen them. True for the last, who
// posts it, or what is left of it if it went piece by piece, unless post_initiated does.
EPT_DEVICE bool packed(const LaneTable &t, uint32_t peer, uint32_t pieces, uint32_t all, bool went = false) {
  if (device::count_in(&t.done[peer], pieces) + pieces != all || (!went && is_initiated(t, peer))) return false;
  t.done[peer] = 0;
  return true;
}

// What a generation sends to other ranks, for stats: by one warp of one block. A lane's kernels never run beside each
// other, so nobody else adds to the lane's tallies.
template <class Rows, class Bytes, class Messages>
EPT_DEVICE void tally(const LaneTable &t, const ObjectTable &object, uint32_t phase, Rows rows, Bytes bytes,
                      Messages messages) {
  const Taking members = taking(t, kNext);
  uint64_t sums[kTallies] = {};
  for (uint32_t r = lane_id(); r < t.world; r += kWarp) {
    if (r == t.rank || !members.has(r)) continue;
    sums[kMessages] += messages(r);
    sums[kBytes] += bytes(r);
    sums[kRowsSent] += rows(r);
  }
  __syncwarp();
  EPT_UNROLL
  for (uint32_t i = kMessages; i < kGrants; i++)
    for (uint32_t step = 1; step < kWarp; step *= 2) sums[i] += __shfl_xor_sync(kAll, sums[i], int(step));
  if (lane_id() != 0) return;
  uint64_t *to = object.sent + (uint64_t(t.lane) * EPT_PHASES + phase) * kTallies;
  sums[kGenerations] = 1;
  EPT_UNROLL
  for (uint32_t i = 0; i < kGrants; i++) to[i] += sums[i];
}
template <class Rows, class Bytes>
EPT_DEVICE void tally(const LaneTable &t, const ObjectTable &object, uint32_t phase, Rows rows, Bytes bytes) {
  tally(t, object, phase, rows, bytes, [](uint32_t) { return 1u; });
}

// A header as it is moved. Each stands at a multiple of 16.
union HeaderWords {
  ept_moe_header header;
  Vector pieces[EPT_MOE_HEADER_BYTES / 16];
};
EPT_DEVICE ept_moe_header header_of(const LaneTable &t, const ObjectTable &object, uint32_t phase, uint64_t generation,
                                    uint64_t rows) {
  ept_moe_header h{};
  h.magic = EPT_MOE_MAGIC;
  h.version = EPT_WIRE_VERSION;
  h.phase = uint16_t(phase);
  h.source = t.rank;
  h.lane = t.lane;
  h.generation = generation;
  h.flags = EPT_MOE_LAST;
  h.rows = h.total_rows = uint32_t(rows);
  h.top_k = object.top_k;
  for (uint32_t p = 0; p < EPT_PHASES; p++) h.consumed[p] = t.state->received[p];
  h.epoch = t.epoch;
  h.object = object.number;
  h.membership = t.state->membership[kNext];
  return h;
}
EPT_DEVICE void put_header(char *to, const ept_moe_header &h) {
  const HeaderWords from{h};
  EPT_UNROLL
  for (uint32_t i = 0; i < EPT_MOE_HEADER_BYTES / 16; i++) store16(to + i * 16, from.pieces[i]);
}

// ---- in ----

EPT_DEVICE const uint64_t *arrival_word(const LaneTable &t, uint32_t source, uint32_t phase, uint64_t generation) {
  return t.words[source] + signal_index(phase, uint32_t(generation & 1));
}
EPT_DEVICE uint64_t arrival_count(const LaneTable &t, uint32_t source, uint32_t phase, uint64_t generation) {
  return generation / 2 + 1 + t.offsets[source * kSignals + signal_index(phase, uint32_t(generation & 1))];
}
EPT_DEVICE bool has_arrived(const LaneTable &t, uint32_t source, uint32_t phase, uint64_t generation) {
  return device::reached(Hardware::acquire_system(arrival_word(t, source, phase, generation)),
                         arrival_count(t, source, phase, generation));
}
// Nothing moved: true where the wait for that count of a word of `source`'s shall go on. One thread.
EPT_SELDOM bool may_wait(const LaneTable &t, uint32_t half, uint64_t generation, uint32_t source, const uint64_t *word,
                         uint64_t target, uint64_t deadline) {
  if (fault_of(t)) return false;
  const uint64_t now = Hardware::now();
  const int32_t *status = device::status(t.paths[source]);
  // The status is a way over PCIe, as the signal is: it is asked for in one of 32 pieces of time.
  const int32_t lost = status && (now >> 12) % 32 == 0 ? Hardware::relaxed_system(status) : EPT_OK;
  if (now <= deadline && lost == EPT_OK) {
    EPT_REST();
    return true;
  }
  const uint64_t seen = Hardware::acquire_system(word);
  if (device::reached(seen, target)) return true;  // before it was lost
  const bool late = lost == EPT_OK;
  raise_fault(t, uint32_t(late ? -EPT_E_TIMEOUT : -lost), half, int32_t(source), late ? kLate : kLost, generation,
              target, seen);
  return false;
}
EPT_DEVICE bool may_wait(const LaneTable &t, uint32_t half, uint32_t phase, uint64_t generation, uint32_t source,
                         uint64_t deadline) {
  return may_wait(t, half, generation, source, arrival_word(t, source, phase, generation),
                  arrival_count(t, source, phase, generation), deadline);
}

// 0, or the number of the first field that is not of this step. `kind`: of the flags that say which message it is. One
// thread, after the signal was seen.
EPT_SELDOM uint32_t check_header(const LaneTable &t, const ObjectTable &object, uint32_t phase, uint64_t generation,
                                 uint32_t membership, uint32_t source, const ept_moe_header &h, uint64_t row_bytes,
                                 uint64_t most_rows, uint32_t kind = 0) {
  if (h.magic != EPT_MOE_MAGIC || h.version != EPT_WIRE_VERSION) return 1;
  if (h.membership != membership) return kMembershipField;
  if (h.phase != phase || h.source != source || h.lane != t.lane || h.chunk != 0) return 3;
  if (h.generation != generation) return 4;
  if (h.object != object.number) return 5;
  if ((h.flags & (EPT_MOE_LATE_WEIGHTS | EPT_MOE_ROW_WEIGHTS)) != kind) return 6;
  if (h.top_k != object.top_k || (h.rows && h.row_bytes != row_bytes)) return 7;
  // A message in several chunks comes where calls may be streamed (chunks.cuh looks at the others).
  const bool whole = h.rows == h.total_rows && h.flags & EPT_MOE_LAST;
  if (h.total_rows > most_rows || h.rows > h.total_rows || (!whole && !object.shape.streams())) return 8;
  return 0;
}
// A message of which that field is not of this step. A mask changes the membership under ranks that make the same
// calls: that is no mismatch, but mended by a reset, as on a CPU.
EPT_DEVICE void refuse_header(const LaneTable &t, uint32_t half, uint32_t source, uint64_t generation,
                              uint64_t expected, uint32_t field) {
  raise_fault(t, uint32_t(field == kMembershipField ? -EPT_E_FAULT : -EPT_E_MISMATCH), half, int32_t(source), kHeader,
              generation, expected, field);
}
// A plain copy of what a peer's header said when its signal was seen: what was checked is what is used.
EPT_DEVICE ept_moe_header get_header(const char *from) {
  HeaderWords to{};
  EPT_UNROLL
  for (uint32_t i = 0; i < EPT_MOE_HEADER_BYTES / 16; i++) to.pieces[i] = load16(from + i * 16);
  return to.header;
}

// Where that field of a header stands, in bytes. NVRTC has no offsetof.
#ifdef __CUDACC__
#define EPT_FIELD(name) uint32_t(reinterpret_cast<uint64_t>(&static_cast<ept_moe_header *>(nullptr)->name))
#else
#define EPT_FIELD(name) uint32_t(offsetof(ept_moe_header, name))
static_assert(EPT_FIELD(phase) == EPT_FIELD(version) + 2, "header_word takes them together");
#endif

// What the lane's word of a header must be, in the bits of `mask`: of a message that is whole and has rows.
struct HeaderWord {
  uint32_t value = 0, mask = 0;
  EPT_DEVICE void is(uint32_t offset, uint32_t its, uint32_t bits = ~0u) {
    if (lane_id() == offset / 4) value = its, mask = bits;
  }
};
// A header that has come, a word a lane: asked for by one load, and looked at by one comparison, where a thread that
// does it field by field has hundreds of instructions to go before the first row can. All lanes of the warp.
class HeaderThen {
 public:
  EPT_DEVICE explicit HeaderThen(const char *from) : word_(reinterpret_cast<const uint32_t *>(from)[lane_id()]) {}
  // `offset`: of a field, in bytes.
  EPT_DEVICE uint32_t word(uint32_t offset) const { return from_lane(word_, offset / 4); }
  EPT_DEVICE uint64_t number(uint32_t offset) const { return word(offset) | uint64_t(word(offset + 4)) << 32; }
  EPT_DEVICE bool says(const HeaderWord &expected) const {
    return __ballot_sync(kAll, int((word_ ^ expected.value) & expected.mask)) == 0;
  }
  EPT_DEVICE ept_moe_header whole() const {
    HeaderWords to{};
    EPT_UNROLL
    for (uint32_t i = 0; i < kWarp; i++) to.pieces[i / 4].word[i % 4] = from_lane(word_, i);
    return to.header;
  }

 private:
  static_assert(EPT_MOE_HEADER_BYTES == 4 * kWarp);
  const uint32_t word_;
};
EPT_DEVICE HeaderWord header_word(const LaneTable &t, const ObjectTable &object, uint32_t phase, uint64_t generation,
                                  uint32_t membership, uint32_t source, uint32_t row_bytes) {
  HeaderWord w;
  w.is(EPT_FIELD(magic), EPT_MOE_MAGIC);
  w.is(EPT_FIELD(version), EPT_WIRE_VERSION | phase << 16);
  w.is(EPT_FIELD(source), source);
  w.is(EPT_FIELD(lane), t.lane);
  w.is(EPT_FIELD(generation), uint32_t(generation));
  w.is(EPT_FIELD(generation) + 4, uint32_t(generation >> 32));
  w.is(EPT_FIELD(chunk), 0);
  w.is(EPT_FIELD(flags), EPT_MOE_LAST, EPT_MOE_LATE_WEIGHTS | EPT_MOE_ROW_WEIGHTS | EPT_MOE_LAST);
  w.is(EPT_FIELD(row_bytes), row_bytes);
  w.is(EPT_FIELD(top_k), object.top_k);
  w.is(EPT_FIELD(object), object.number);
  w.is(EPT_FIELD(membership), membership);
  return w;
}
// Whether it says that, and that it is whole. Else check_header tells what is wrong, if anything is.
EPT_DEVICE bool is_as_expected(const HeaderThen &h, const HeaderWord &expected, uint64_t most_rows) {
  const uint32_t rows = h.word(EPT_FIELD(total_rows));
  return h.says(expected) && h.word(EPT_FIELD(rows)) == rows && rows <= most_rows;
}

// ---- what a send must wait for, where there is a network ----

// What the header of a message of that source says, checked or not, is true of the source.
EPT_DEVICE void hear(const LaneTable &t, uint32_t source, const ept_moe_header &h, bool tells = blockIdx.x == 0) {
  if (!t.acks || !tells) return;  // one block tells for all
  for (uint32_t p = 0; p < EPT_PHASES; p++) {
    uint64_t *heard = &t.heard[source * EPT_PHASES + p];
    if (!device::reached(*heard, h.consumed[p])) *heard = h.consumed[p];
  }
}
// The same, by the whole warp.
EPT_DEVICE void hear(const LaneTable &t, uint32_t source, const HeaderThen &h, bool tells) {
  const ept_moe_header all = h.whole();
  if (lane_id() == 0) hear(t, source, all, tells);
}
// A send tells where what answers it will land, for who looks at a header before it is received.
EPT_DEVICE void expect(const LaneTable &t, uint32_t phase, uint64_t generation, uint32_t source, uint64_t at) {
  if (t.acks) t.lands[(phase * EPT_MOE_SLOTS + (generation & 1)) * t.world + source] = at;
}
EPT_DEVICE ept_moe_header landed(const LaneTable &t, uint32_t phase, uint64_t generation, uint32_t source) {
  return get_header(t.in[source] + t.lands[(phase * EPT_MOE_SLOTS + (generation & 1)) * t.world + source]);
}
EPT_DEVICE uint64_t has_consumed(const LaneTable &t, uint32_t phase, uint32_t peer) {
  const uint32_t at = peer * EPT_PHASES + phase;
  uint64_t most = t.heard[at];
  const uint64_t told = Hardware::acquire_system(&t.acks[at]);
  if (!device::reached(most, told)) most = told;
  for (uint32_t p = 0; p < EPT_PHASES; p++) {
    const uint64_t next = t.state->received[p];
    if (next == t.state->sent[p] || !has_arrived(t, peer, p, next)) continue;
    const uint64_t said = landed(t, p, next, peer).consumed[phase];
    if (!device::reached(most, said)) most = said;
  }
  return most;
}

// Staging of generation - 2 is no longer read by the network, and the slot is free at every CPU rank. Each block asks
// for itself: no other has told it. All threads call; false, for all of them: the lane is faulted.
EPT_SELDOM bool settle_network(const LaneTable &t, uint32_t half, uint32_t phase, uint64_t generation) {
  const uint64_t deadline = device::deadline_in(t.timeout_ns);
  const Taking members = taking(t, kNext);
  for (uint32_t r = threadIdx.x; r < t.world; r += blockDim.x) {
    for (uint32_t position = 0; position < EPT_MOE_POSITIONS; position++) {
      const uint64_t ticket = t.tickets[r * kSignals + signal_index(phase, uint32_t(generation & 1), position)];
      if (!ticket) continue;
      const device::Seen seen = device::flush(t.paths[r], ticket - 1, deadline);
      if (!seen.came()) raise_fault(t, uint32_t(-seen.code), half, int32_t(r), kPost, generation, ticket, seen.count);
    }
    if (!t.acks || t.paths[r].kind != EPT_DEVICE_PROXY || !members.has(r)) continue;
    uint64_t consumed;
    while (consumed = has_consumed(t, phase, r), !device::reached(consumed, generation - 1) && !fault_of(t)) {
      if (Hardware::now() > deadline)
        raise_fault(t, uint32_t(-EPT_E_TIMEOUT), half, int32_t(r), kSlot, generation, generation - 1, consumed);
      EPT_REST();
    }
  }
  return !is_faulted(t);
}
EPT_DEVICE bool settle(const LaneTable &t, uint32_t half, uint32_t phase, uint64_t generation) {
  return !t.proxied || settle_network(t, half, phase, generation);
}

// Device timestamps, where somebody asks for them.
EPT_DEVICE void note(const LaneTable &t, uint32_t half, uint32_t point) {
  if (t.times && threadIdx.x == 0) t.times[time_at(half, gridDim.x, blockIdx.x, point)] = Hardware::now();
}
// One thread of the warp. `done`: the last of the source's rows that this warp had is.
EPT_DEVICE void note_source(const LaneTable &t, uint32_t phase, uint32_t source, bool done) {
  if (!t.times || lane_id() != 0) return;
  uint64_t *at = t.times + source_time_at(gridDim.x, t.world, phase, source) + done;
  const uint64_t now = Hardware::now();
  if (done)
    atomicMax(reinterpret_cast<unsigned long long *>(at), now);
  else
    *at = now;
}

// A warp goes through (row, k) pairs in order, several rows at a time: each row has 2^wide lanes.
struct PairLanes {
  uint32_t wide;
  EPT_DEVICE explicit PairLanes(uint32_t top_k) : wide(top_k > 16 ? 5 : top_k > 8 ? 4 : top_k > 4 ? 3 : 2) {}
  EPT_DEVICE uint32_t rows() const { return kWarp >> wide; }
  EPT_DEVICE uint32_t row() const { return lane_id() >> wide; }
  EPT_DEVICE uint32_t k() const { return lane_id() & ((1u << wide) - 1); }
};

// A warp's share of a row of `vectors` pieces of 16 bytes, in whole rounds of a warp; `together` of them in one part.
struct Span16 {
  uint32_t from, to;
  EPT_DEVICE uint32_t rounds(uint32_t together = 1) const {
    const uint32_t of = kWarp * together;
    return to > from ? (to - from + of - 1) / of : 0;
  }
};
EPT_DEVICE Span16 span_of(uint32_t vectors, uint32_t part, Divisor parts, uint32_t together = 1) {
  const uint32_t rounds = (rounds_of(vectors) + together - 1) / together, of = kWarp * together;
  const uint32_t from = parts.of(rounds * part) * of, to = parts.of(rounds * (part + 1)) * of;
  return {from, to < vectors ? to : vectors};
}

}  // namespace ept::moe::cuda
