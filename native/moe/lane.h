// SPDX-License-Identifier: Apache-2.0
//
// lane.h: one lane's memory, signals, generations and flow control; how messages of a phase get out and in. What is in
// the messages is not its business (dispatch.cc, combine.cc).
//
// INVARIANTS
//  - Everything in a Lane is touched only by who holds it (Lane::Held). Peers write into its memory; a chunk there is
//    read only after its signal was seen (acquire), and not overwritten before it was taken: taking is what grants the
//    next chunk of a streamed message and, for the last one, what moves consumed() on.
//  - exchange(phase, g) lives at exchanges_[phase][g mod 2]. Generation g begins only when that of g - 2 is idle here,
//  so
//    at most two generations of a phase are open, and consumed() is the first open one.
//  - posted/taken of a Link count chunks for ever: signal value == what the peer posted, and the chunk that raises a
//    signal to taken + 1 is the next one, since a position is posted to again only after a grant (streamed) or an
//    acknowledgement (next generation) of the chunk before.
//
// NO DEADLOCK, given that every rank makes the same sequence of sends in a lane. send(g) does, in this order,
//   1 wait until generation g - 2 has been consumed here;
//   2 tell every peer that does not know it yet (by an ept_lane_ack; in plain pairs a header has told it before);
//   3 for each peer: wait until it has consumed g - 2, then post.
// Step 1 waits for messages of g - 2 (and grants of their chunks), posted in the peers' send(g - 2), before their
// send(g). An abandoned generation is consumed as its messages land, by whichever call of the lane comes next, and its
// own unsent chunks are cut short; so by induction step 1 ends. Step 3 waits for what the peer says at its step 2 of
// the same call at the latest, and step 2 waits for nobody but the engine's credit. While a call waits it takes acks,
// looks at headers that have landed, pays grants and drops what was abandoned, so nobody waits for a call that is not
// coming. Streaming adds waits for grants only: a receiver grants a chunk when it has copied it out, which waits for no
// sender of its own rank; combine consumes tokens in order, and the first token not yet summed waits only for chunks
// that are granted already, since every earlier row of each rank has been consumed.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "engine/why_stuck.h"
#include "eptransport/eptransport.h"
#include "moe/fail.h"
#include "moe/members.h"
#include "moe/object.h"

namespace ept::moe {

struct Arena;
class Wait;

enum class Kind : uint8_t { dispatch, late_weights, combine };
const char *kind_name(Kind kind);
// The ept_metrics_phase_id under which its messages are counted and traced.
constexpr uint32_t seen_phase(Kind kind) {
  return kind == Kind::dispatch  ? EPT_METRICS_DISPATCH
         : kind == Kind::combine ? EPT_METRICS_COMBINE
                                 : EPT_METRICS_WEIGHTS;
}

constexpr uint64_t kTagAck = EPT_TAG_OURS | 1ull << 48;  // + lane

// One peer as one lane sees it. Index order: [phase][slot][position].
struct Link {
  uint32_t mine = 0, theirs = 0;             // the lives that it is between; see engine.h
  ept_region_id region = 0;                  // the receive half of the peer's lane memory
  ept_remote_signal_id raise[2][2][2] = {};  // at the peer: our chunks
  ept_remote_signal_id grant[2] = {};        // at the peer: its chunks of this phase that we have consumed
  ept_signal_id arrived[2][2][2] = {};       // here: its chunks
  ept_signal_id granted[2] = {};             // here: our chunks that it has consumed
  ept_transfer_id in_flight[2][2][2] = {};   // reads our staging; 0: none
  uint64_t posted[2][2][2] = {};             // chunks
  uint64_t taken[2][2][2] = {};
  uint64_t grants_given[2] = {};
  uint64_t grants_owed[2] = {};    // of which not yet posted: the engine said LATER
  uint64_t grants_before[2] = {};  // that finished messages of ours were worth
  uint64_t consumed[2] = {};       // what the peer said last
  uint64_t told[2] = {};           // what we said last
};

struct Outgoing {  // one message to one rank
  uint64_t rows = 0, sent = 0;
  uint64_t total = 0;  // what the header says; more than `rows` where cut short
  uint64_t per_chunk = 0;
  uint32_t chunk = 0;  // next
  bool single = true, finished = false;
  uint64_t packed = 0;  // bytes of a chunk that is packed and not yet posted
  uint64_t packed_rows = 0;
  bool last = false;                 // that chunk is
  Region staging = {}, target = {};  // here, from the start of our memory; there, of the peer's
};

struct Incoming {  // one message from one rank
  bool begun = false, cut_short = false, finished = false;
  uint64_t rows = 0, got = 0;  // of the whole message; taken
  uint32_t chunk = 0;          // next
  uint64_t shown[2] = {};      // rows of the chunk that `look` saw last in each position
  ept_moe_header first = {};   // header of chunk 0
};

struct Chunk {
  ept_moe_header header;  // a copy: its source holds a key to where it lies, so what was checked may not be read again
  const char *rows;
  uint64_t first;  // row of the message
  uint64_t count;
  bool last;
};

// Writes rows [first, first + rows) of the message to `peer`.
using Pack = std::function<void(uint32_t peer, uint64_t first, uint64_t rows, char *to)>;

struct Exchange {
  enum State : uint8_t { idle, open, dropped } state = idle;
  Kind kind = Kind::dispatch;
  bool whole = false;
  uint32_t phase = 0, slot = 0;
  uint64_t generation = 0;
  std::thread::id owner;
  uint64_t since = 0;  // now_ns() when it began
  std::shared_ptr<Object> object;
  std::shared_ptr<const Members> members;    // of the step: nothing goes to another rank or is awaited from it
  std::shared_ptr<const SourceSide> source;  // dispatch: counts and combine regions for the headers
  ept_moe_header head = {};                  // what all its headers share
  Pack pack;
  std::vector<Outgoing> out;        // [world]
  std::vector<Incoming> in;         // [world]
  std::vector<uint32_t> counts;     // dispatch: [world, local experts]
  uint32_t unsent = 0, unread = 0;  // messages

  uint64_t header_bytes(uint32_t at) const {
    return kind == Kind::dispatch ? ept_dispatch_header_bytes(object->placement.local_experts(at))
                                  : EPT_MOE_HEADER_BYTES;
  }
};

// Where the counts of a lane's signals stand: pages of their own, since a GPU may look at them too; and of each peer a
// pair of cache lines of its own.
class Words {
 public:
  static constexpr uint32_t kEach = 16;  // of which 10 are used, in this order: [position][phase][slot], granted[phase]
  explicit Words(uint32_t world);
  ~Words();
  Words(const Words &) = delete;
  Words &operator=(const Words &) = delete;

  uint64_t *arrived(uint32_t peer, uint32_t phase, uint32_t slot, uint32_t position) const {
    return words_ + peer * kEach + position * 4 + phase * 2 + slot;
  }
  uint64_t *granted(uint32_t peer, uint32_t phase) const { return words_ + peer * kEach + 8 + phase; }
  uint64_t *all() const { return words_; }
  uint64_t bytes() const { return bytes_; }

 private:
  uint64_t *words_ = nullptr;
  const uint64_t bytes_;
};

class Lane {
 public:
  Lane(Arena &arena, uint32_t index);

  // Holds a lane; waits for whoever does, up to a deadline.
  class Held {
   public:
    Held(Lane &lane, const Deadline &deadline, const char *operation);
    // Without waiting; NULL where another call holds it.
    static std::unique_ptr<Held> attempt(Lane &lane);
    ~Held();
    Held(const Held &) = delete;
    Held &operator=(const Held &) = delete;

   private:
    explicit Held(Lane &lane) : lane_(lane) {}
    Lane &lane_;
  };

  // ---- generations ----
  // Begins the next generation of the kind's phase: steps 1 and 2 above. The caller fills `out` and then sends.
  Exchange &begin(Kind kind, const std::shared_ptr<Object> &object, const std::shared_ptr<const Members> &members,
                  Wait &wait);
  // Throws, and faults the lane, where a step was begun under `members` and the membership has moved since.
  void refuse_old(const Members &members);
  // The open exchange whose receiving half is still to come, or NULL.
  Exchange *pending(uint32_t phase);
  // Before a send: what is open in the phase will not be received any more, nor what a whole call, whose halves have no
  // other call between them, left open in the other one. It is consumed behind the scenes.
  void drop(uint32_t phase);
  uint64_t consumed(uint32_t phase) const;
  // No step is under way, nothing of ours is still being read.
  bool quiet();
  // A receiving half is through. Idle once all is sent and read.
  void finish(Exchange &exchange);

  // ---- out ----
  // Sets the geometry of the message to `peer`: staging and target from the start of this memory and the peer's.
  void plan(Exchange &exchange, uint32_t peer, uint64_t rows, Region staging, Region target);
  // Packs and posts all that can go now; true where something went.
  bool push(Exchange &exchange);
  // Until every message is out; or, where the exchange is `whole`, until only chunks are left that need a grant.
  void send(Exchange &exchange, Wait &wait);

  // ---- in ----
  // The chunk of `source` that comes next (ahead 0) or the one after it (1), if it has landed.
  bool look(Exchange &exchange, uint32_t source, uint32_t ahead, Chunk *chunk);
  // What `look(.., 0, ..)` showed has been copied out: grants it, or ends the message.
  void take(Exchange &exchange, uint32_t source, const Chunk &chunk);
  // Throws where a rank has cut its message short: it abandoned a streamed call.
  void refuse_cut(const Exchange &exchange) const;
  // Until the first chunks of all are here; sends meanwhile.
  void read_headers(Exchange &exchange, Wait &wait);

  // Whether our last write from this staging position is done. Throws its failure.
  bool settle(Link &link, uint32_t phase, uint32_t slot, uint32_t where, uint64_t timeout_ns);

  // ---- what any waiting call does for others ----
  bool serve();
  void take_acks();

  // A region of a slot, from the start of a lane's memory; the same here and at every peer.
  Region received(uint32_t phase, uint32_t slot, Region in_slot) const;
  Region staged(uint32_t phase, uint32_t slot, Region in_slot) const;

  Arena &arena;
  const uint32_t index;
  const Words words;
  std::vector<Link> links;  // [world]; that of this rank has the local signals
  ept_memory_id memory_id = 0;
  char *base = nullptr;
  bool on_gpu = false;              // base is of a GPU, and only its kernels read there
  std::atomic<uint64_t> next[2]{};  // generation; read without the lane by Arena::step
  Exchange exchanges[2][2];         // [phase][slot]
  bool committed = false;           // a call is past the point where its failure leaves the lane as it was
  bool faulted = false;
  ept_error fault;
  uint64_t news = 0, looked_at = 0;  // of the engine: seen by this lane's waits; and looked into

 private:
  friend class Wait;
  bool may_post(const Exchange &exchange, uint32_t peer);
  void pack(Exchange &exchange, uint32_t peer);
  bool post(Exchange &exchange, uint32_t peer);
  bool write(Exchange &exchange, uint32_t peer, uint32_t where);
  void drain(Exchange &exchange, Wait &wait);
  bool drop_more(Exchange &exchange);
  void tell(Exchange &exchange, Wait &wait);
  bool pay_grants(uint32_t peer, uint32_t phase);
  void peek();
  Region region_of(const Exchange &exchange, uint32_t source) const;
  void check_header(const Exchange &exchange, uint32_t source, const ept_moe_header &header, uint32_t chunk) const;
  void check_counts(const Exchange &exchange, uint32_t source) const;
  void check_extent(const Exchange &exchange, uint32_t source, const Chunk &chunk, uint32_t number) const;
  bool lacks_ack(const Exchange &exchange, uint32_t peer) const;
  uint64_t grants(uint32_t peer, uint32_t phase);

  std::mutex mutex_;
  std::condition_variable free_;
  bool busy_ = false;
};

// The deadline of one call, and all its waiting.
class Wait {
 public:
  Wait(Lane &lane, const char *operation);
  Wait(Lane &lane, const char *operation, uint64_t timeout_ns);
  ~Wait() { stood(Standing()); }
  // Nothing moved: sleeps until something may have, or throws TIMEOUT or PEER_LOST with who, what and since when.
  void for_chunk(Exchange &exchange);  // a chunk of any source that has none here
  void for_room(Exchange &exchange);   // an ack, a grant, or the engine's queue
  void for_transfer(uint32_t peer, uint32_t phase, uint32_t slot, uint32_t where);
  void moved() {
    slice_ = kFirstSlice;
    patient_ = false;
    published_.take_back();
  }
  uint64_t remaining() const { return deadline_.remaining(); }
  const Deadline &deadline() const { return deadline_; }
  const char *operation() const { return operation_; }

 private:
  // Busy with more than one thing, a wait looks at one of them for a short while, longer each time that nothing moves.
  // The longest is past the engine's own 100 ms of asking for interrupts.
  static constexpr uint64_t kFirstSlice = 50'000, kLastSlice = 120'000'000;
  // With one thing to do it waits for that, and looks now and then whether another peer that it needs has died.
  static constexpr uint64_t kLook = 1'000'000'000, kLongLook = 11'000'000'000;

  uint64_t slice();
  // Time that goes by for one peer: what the wait matrix, the trace and reports tell. Several looks in a row for the
  // same one are one wait.
  struct Standing {
    uint32_t peer = UINT32_MAX, phase = 0;
    uint64_t ns = 0;
  };
  template <class Sleep>
  void stand(Exchange &exchange, uint32_t peer, Sleep &&sleep);
  void stood(const Standing &next);
  void publish(const Exchange &exchange);
  void publish(const Exchange &exchange, uint32_t peer, uint64_t signal, uint64_t expected, uint64_t seen);

  void signal(uint32_t peer, ept_signal_id id, uint64_t target, uint64_t length, const std::string &what);
  [[noreturn]] void expired(uint32_t peer, const std::string &what, uint64_t expected, uint64_t seen);
  void look_around(Exchange &exchange, uint64_t slept);
  void find_lost(Exchange &exchange);
  bool needs(Exchange &exchange, uint32_t rank) const;

  Lane &lane_;
  const char *operation_;
  Deadline deadline_;
  uint64_t slice_ = kFirstSlice;
  uint32_t looks_ = 0;
  // A wait is published (two microseconds) when it has lasted so long: then that is a thousandth of it at most.
  static constexpr uint64_t kUnpublished = 2'000'000;
  bool patient_ = false;
  Standing standing_;
  Published published_;
};

}  // namespace ept::moe
