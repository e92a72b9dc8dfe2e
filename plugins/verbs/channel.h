// SPDX-License-Identifier: Apache-2.0
// A channel: one way to one peer, and how it outlives its queue pairs. Why nothing is lost, counted twice or early.
//
// A CHANNEL is two sequences of numbered operations, one each way, between queue pairs of one NIC here and one there.
// An operation is a WRITE WITH IMMEDIATE or a SEND, and takes exactly one receive at the target. A channel has one
// queue pair at a time, of a GENERATION. Each side says its half (wire.h, ChannelState): its generation, its queue
// pair's number and first PSN, the other side's generation that it is connected to, and `consumed`.
//
//   fresh --- connect ---> connected --- probe answered ---> up
//     ^                        |                             |
//     +---- drained, renewed --+--------- retiring <---------+      a failed completion, an event of the NIC, or word
//                                                                   that the other side has a newer generation
//
//   1. RETIRE BEFORE YOU SPEAK. A side whose queue pair is broken, or that hears of a newer generation, first moves its
//      queue pair to ERR: from then on the NIC takes no packet for it. Then it reads its completion queue until every
//      receive that was posted has completed, as a success or flushed; one receive gives one completion, and those of a
//      queue pair come in order. Only then it makes the next queue pair and says the next generation, with the number
//      of operations that it has consumed on all before it. So that number is final.
//   2. CONSUMED IS WHOLE. It goes up with a receive that completed well, which comes after every byte, and with nothing
//      else. What came in half has told nobody.
//   3. REPLAY FROM THERE, ONCE. A side connects a queue pair only to one of the SAME generation, of which it first
//      hears together with `consumed`; its own is retired by then. Its operations below that number are done, whatever
//      became of their completions; those from it on were not consumed and never will be by an old queue pair (1). They
//      are posted again, by any channel of that peer that is up. So each is consumed exactly once. An operation that is
//      replayed has raised no signal, so its target can't have been reused by one who counts; where the exporter took
//      the key back meanwhile, the replay meets a dead key and changes nothing.
//   4. LATE PACKETS MEET NOBODY. Each generation has a queue pair of its own, so another number; should the NIC give
//      the same number again, the first PSN is drawn at random.
//   5. SOURCES STAY. An operation may be posted again until it is known to be consumed, so its source is held from post
//      to LOCAL_DONE or ERROR, and ERROR comes only when its queue pair is destroyed or it was refused.
//   6. REFUSED IS NOT CONSUMED. A completion which says that the target refused the access (or that the request was
//      wrong) names the first operation that failed: all before it are done, and it took no receive. It is not replayed
//      but told as an ERROR, and those behind it go on as in 3.
//
// What a side says is checked: `consumed` between what is known to be done and what was posted. Else the peer is ended.
// A side that breaks again before the other has connected just says a still newer generation: `consumed` is a count on
// the channel and not on a queue pair, so it says the same or more.
//
// ORDER. On one queue pair the completion of a receive is written after the bytes of its operation and of all before
// it, by the NIC in strict order over PCIe, which pushes out what was written in relaxed order before (PCIe 2.4.1: a
// posted write without the attribute passes none). So relaxed ordering is for memory alone, never for completion
// queues.
#pragma once

#include <algorithm>
#include <vector>

#include "nic.h"

struct ept_mem;
struct ept_region;

namespace verbs {

struct Peer;

struct Operation {
  enum class Kind : uint8_t { kWrite, kMessage, kProbe } kind = Kind::kWrite;
  uint8_t blamed = 0;   // times that a queue pair broke with it
  int16_t refused = 0;  // ept_code: why it must not go again
  uint32_t immediate = 0;
  uint32_t number = 0;  // the provider's, of `refused`
  uint64_t cookie = 0;
  uint64_t length = 0;
  uint64_t serial = 0;  // of the instance, rising: for quiesce
  uint64_t target = 0;  // address over there
  const void *source = nullptr;
  ept_mem *mem = nullptr;        // kWrite with a source
  ept_region *region = nullptr;  // kWrite: held
  int32_t buffer = -1;           // kMessage: of the instance's send buffers

  bool dead() const;  // it would be refused
};

// What of a request goes into its wr_id, so that a completion finds its channel, or is seen to be of one that is gone.
enum class Request : uint8_t { kSend = 0, kReceive = 1, kSaid = 2, kHeard = 3 };
struct RequestId {
  uint16_t slot = 0, serial = 0;
  Request kind = Request::kSend;
  uint32_t low = 0;  // kSend: the operation's ordinal, its low 30 bits; else a buffer

  uint64_t pack() const {
    return uint64_t{slot} << 48 | uint64_t{serial} << 32 | uint64_t{static_cast<uint8_t>(kind)} << 30 | low;
  }
  static RequestId of(uint64_t id) {
    return {static_cast<uint16_t>(id >> 48), static_cast<uint16_t>(id >> 32), static_cast<Request>(id >> 30 & 3),
            static_cast<uint32_t>(id & kLowMask)};
  }
  static constexpr uint32_t kLowMask = (1u << 30) - 1;
};

struct Channel {
  enum class State : uint8_t { kNone, kFresh, kConnected, kUp, kRetiring };

  Channel(Nic *nic, Peer *peer, uint32_t number, uint32_t rail, bool messages, uint16_t slot);
  Channel(const Channel &) = delete;
  Channel &operator=(const Channel &) = delete;

  Nic *nic;
  Peer *peer;
  const uint32_t number;  // of the peer's channels
  const uint32_t rail;    // whose counters count it; of messages the first of the NIC
  const bool messages;    // carries SENDs, else WRITEs
  const uint16_t slot;
  uint16_t serial = 0;
  State state = State::kNone;
  Buffers heard;  // messages: the bytes of receives
  Qp qp;
  uint32_t generation = 0, wanted = 1;
  uint32_t psn = 0, heard_generation = 0;
  uint64_t consumed = 0, consumed_said = 0;
  bool resolved = false;  // `consumed` of the other side was heard, for this generation
  bool probing = false;   // a probe is under way
  uint64_t connect_due_ns = 0;
  uint64_t retired_ns = 0, up_ns = 0;
  uint32_t failures = 0;
  std::string reason;
  ChannelState theirs{};  // the last that was heard

  // Sending: operations [base, next) are in flight.
  uint64_t base = 0, next = 0;
  uint32_t depth = 0;
  std::vector<Operation> ring;
  // The requests of a batch that are not given to the NIC yet: scratch of the worker.
  ibv_send_wr *first = nullptr, *last = nullptr;
  // Receiving: receives that are posted, and that are to be posted.
  uint32_t out = 0, due = 0;

  Operation &at(uint64_t ordinal) { return ring[ordinal & (ring.size() - 1)]; }
  uint64_t in_flight() const { return next - base; }
  bool room() const { return next - base < depth; }
  // So that receives are given back in batches, and yet are never short (Plan).
  uint32_t return_at() const { return std::clamp(nic->plan.receives / 2, 1u, kReturn); }
  bool up() const { return state == State::kUp; }
  bool settled() const { return state == State::kUp && theirs.heard == generation && theirs.generation == generation; }
  ChannelState say() const { return {generation, qp ? qp->qp_num : 0, psn, heard_generation, consumed_said}; }
  uint64_t id(Request kind, uint32_t low) const { return RequestId{slot, serial, kind, low}.pack(); }

  // Each: EPT_OK, or an error with its sentence left for last_error.
  int32_t renew(uint32_t to_generation, const ept_host &host);
  int32_t connect(const ChannelState &other, const NicAddress &address, const Settings &settings);
  void retire(uint64_t now_ns, std::string why);
  bool drained() const { return out == 0; }
  void destroy();

  // Posts what is due, all of it or none below `at_least`.
  void return_receives(uint32_t at_least);
  void post_buffer(uint32_t buffer);
  const uint8_t *buffer(uint32_t number_of) const { return heard.bytes.get() + size_t{number_of} * kMaxSend; }
};

}  // namespace verbs
