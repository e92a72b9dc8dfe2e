/* SPDX-License-Identifier: Apache-2.0
 *
 * The engine: what turns a backend's writes with immediates (backend.h) into transfers that raise signals (contract).
 *
 * INVARIANTS
 *  - One lock, `lock`, guards every field of an engine and every call into its plugin. It is held for one bounded step
 *    (a post, a poll and its events) and never while anything sleeps. So a plugin instance is never entered twice, and
 * no ordering between fields needs to be argued. The one thing read outside is a signal's count (atomic, release on
 *    raise, acquire on wait).
 *  - At most one thread drives: `driver` says which kind. A thread that waits drives if no caller does; others wait for
 *    `moved`, which is notified whenever a drive brought something or the driver leaves. A caller takes over from the
 *    proxy at once. Who sleeps on the plugin's descriptor is woken before anyone else polls, since a poll undoes the
 * arm: so no sleep lasts past an event. (A poll by a caller costs one wake-up then; while callers drive, the proxy only
 *    looks now and then, and sleeps on the descriptor again when they have stayed away for a while.)
 *  - For each peer, operations leave in the order in which they were taken: queue -> staged -> plugin. This is what the
 *    proof in wire.h needs.
 *  - credits of a peer: taken when an operation goes from queue to staged, given back by the peer's grants alone.
 *  - A peer's `link` counts the links to it that have ended. Whatever belongs to a link carries that number, and is
 *    stale, so without effect, once the peer's has moved on (membership.cc).
 *
 * The files: engine.cc life; progress.cc who drives and who sleeps; peers.cc HELLO, status, messages; membership.cc how
 * a link ends and another begins; heartbeat.cc signs of life; memory.cc memory and regions; transfers.cc the way out
 * (queue, credits, pieces); signals.cc the way in (immediates, prefix, grants); metrics.cc and refresh.cc what is
 * counted; why_stuck.cc the report.
 */
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "engine/error.h"
#include "engine/host.h"
#include "engine/metrics.h"
#include "engine/plugin.h"
#include "engine/slots.h"
#include "engine/spans.h"
#include "engine/why_stuck.h"
#include "eptransport/eptransport.h"
#include "eptransport/wire.h"

namespace ept {

/* A mutex whose holder can see that others want it: a spinning driver gives way instead of starving them. */
class EngineLock {
 public:
  void lock() {
    if (mutex_.try_lock()) return;
    wanted_.fetch_add(1, std::memory_order_relaxed);
    mutex_.lock();
    wanted_.fetch_sub(1, std::memory_order_relaxed);
  }
  void unlock() { mutex_.unlock(); }
  bool wanted() const { return wanted_.load(std::memory_order_relaxed) > 0; }

 private:
  std::mutex mutex_;
  std::atomic<int> wanted_{0};
};
using Hold = std::unique_lock<EngineLock>;

class Descriptor {
 public:
  Descriptor() = default;
  explicit Descriptor(int fd) : fd_(fd) {}
  Descriptor(const Descriptor &) = delete;
  Descriptor &operator=(const Descriptor &) = delete;
  ~Descriptor();
  int get() const { return fd_; }

 private:
  int fd_ = -1;
};

constexpr uint64_t forever = UINT64_MAX;
constexpr uint32_t nobody = UINT32_MAX;

/* ---- the way out ---- */

struct Failure {
  int32_t code = EPT_OK;
  int32_t provider_errno = 0;
  uint32_t peer = nobody;
  std::string text;
};

struct Transfer {
  uint64_t id = 0;
  uint64_t remaining = 0; /* operations not yet ended */
  uint32_t peer = nobody; /* the first one's */
  bool watched = false;   /* somebody holds the handle */
  bool notify = false;
  std::unique_ptr<Failure> failure; /* the first */
};

struct RemoteSignal {
  uint32_t peer = nobody;
  uint32_t link = 0;
  uint32_t chan = 0;
  uint64_t next = 0;    /* number of the next transfer */
  uint32_t pending = 0; /* operations that still name it */
};

struct Memory {
  struct Export {
    uint32_t rank;
    uint64_t key;
  };
  ept_memory desc{};
  ept_mem *mem = nullptr;
  uint32_t in_flight = 0; /* operations that still read from it */
  std::vector<Export> exports;
  struct Aside {
    uint32_t rank, epoch;
  };
  std::vector<Aside> aside; /* lives that may write it still, since no key of ours stops them (membership.cc) */
};

struct Region {
  uint32_t peer = nobody;
  uint32_t link = 0;
  ept_region *region = nullptr;
  uint64_t length = 0;
  uint64_t exporter_memory = 0; /* the exporter's number of the memory: QUIESCE names it */
  uint32_t in_flight = 0;
  bool revoked = false; /* the exporter took it back */
};

/* What an operation keeps alive: none of these is removed while its in_flight (pending, remaining) counts it. */
struct Uses {
  Transfer *transfer = nullptr;
  Memory *memory = nullptr;
  Region *region = nullptr;
  RemoteSignal *signal = nullptr;
};

/* One write, taken, not yet wholly cut into operations. */
struct Work {
  Uses uses;
  const uint8_t *source = nullptr;
  uint64_t offset = 0, length = 0;
  uint32_t chan = 0, seq = 0, code = 1;
  bool described = false; /* its DESCRIPTOR has gone */
  uint64_t pieces = 1, next_piece = 0, piece_bytes = 0;
  /* write_paged: ranges of whole pages, coalesced; empty for a plain write */
  struct Range {
    uint64_t source, destination, length;
  };
  std::vector<Range> ranges;
};

/* An operation that the plugin has, or gets next: what its end needs. */
struct InFlight {
  Uses uses; /* no transfer: it was told of the end already */
  uint32_t peer = nobody;
  uint32_t link = 0;
  uint32_t immediate = 0; /* 0: a message or a grant */
  uint64_t posted_ns = 0;
  std::unique_ptr<std::vector<uint8_t>> bytes; /* of a SEND */
};

struct Message {
  std::unique_ptr<std::vector<uint8_t>> bytes; /* with its ept_message */
  bool free_of_credit = false;                 /* HELLO, GOODBYE, HEARTBEAT: the plugin keeps room for them */
  bool user = false;
};

/* ---- the way in ---- */

struct Signal {
  uint32_t source = nobody;
  std::string label;
  uint64_t *word = nullptr;      /* its home */
  std::unique_ptr<uint64_t> own; /* the home where the caller gave none */
  uint32_t chan = 0;             /* 0: not exported */
  uint64_t notify_at = forever;
  uint32_t waiters = 0;
  uint32_t phase = EPT_METRICS_TRANSFER; /* whose waits count and report themselves here; moe/ does its own */
};

/* plain: transfers that raise no signal, counted for their credits. */
enum class ChanKind : uint8_t { free, signal, plain, credits, send_credits };

struct Chan {
  /* What one-piece transfers in order never need, so most chans never have it; of 10 KiB, so a chan whose signal is
   * destroyed, and which goes on counting, gives it back. `held`: numbers that have pieces or wait for the prefix; with
   * none all entries are zero, and a new window would be the same. */
  struct Window {
    uint32_t held = 0;
    uint32_t got[EPT_IMM_WINDOW] = {};  /* pieces that came, void ones included */
    uint32_t need[EPT_IMM_WINDOW] = {}; /* 0: not known yet (code 15 before its descriptor) */
    bool voided[EPT_IMM_WINDOW] = {};
    bool finished[EPT_IMM_WINDOW] = {}; /* past the prefix, waiting for it */
  };
  ChanKind kind = ChanKind::free;
  uint32_t source = nobody;
  uint32_t link = 0;
  uint64_t signal = 0;
  uint32_t prefix = 0; /* P mod window */
  std::unique_ptr<Window> window;
};

struct Received {
  uint32_t from, link;
  std::vector<uint8_t> data;
};

/* What begins and ends with a link to a peer. */
struct Link {
  bool opened = false;                                 /* the plugin has it */
  bool linked = false, greeted = false, heard = false; /* plugin says connected; our HELLO went; theirs came */
  bool goodbye = false;

  uint32_t credits = 0, send_credits = 0;           /* that we may spend */
  uint32_t most_credits = 0, most_send_credits = 0; /* that it announced */
  uint32_t credit_chan = 0, send_credit_chan = 0;   /* at the peer: where our grants go */
  ept_region *anchor = nullptr;                     /* the peer's region that zero-length signals name */
  std::deque<Work> queue;
  uint64_t queued = 0; /* operations of `queue` */
  std::deque<Message> messages;
  std::vector<ept_op> staged; /* [staged_head, size): what the plugin gets next */
  size_t staged_head = 0;
  uint64_t in_flight = 0;  /* staged or posted, not ended */
  uint32_t plain_chan = 0; /* at the peer */
  uint64_t plain_next = 0;
  uint32_t next_rail = 0;
  bool had_no_room = false; /* the plugin, when `staged` was posted last */

  uint32_t own_credit_chan = 0, own_send_credit_chan = 0; /* here: where the peer's grants come in */
  uint32_t own_plain_chan = 0;
  uint64_t anchor_key = 0;
  bool anchored = false;                     /* the anchor is exported to it, by anchor_key */
  uint32_t unread = 0;                       /* messages in the inbox */
  uint32_t consumed = 0, consumed_sends = 0; /* not yet granted back */
  uint64_t consumed_total = 0;

  /* heartbeat.cc */
  uint64_t promised_ns = 0; /* it gives a sign of life that often; 0: it promises none */
  uint64_t last_sent = 0;
  bool sent = false;       /* something since the last tick */
  uint32_t unanswered = 0; /* heartbeats sent since anything came */
  uint32_t told = 0;       /* the membership that it knows of */
};

struct Peer : Link {
  uint32_t rank = nobody;
  uint32_t link = 0; /* links to it that have ended */
  int32_t status = EPT_PEER_NEW;
  uint32_t epoch = 0; /* its life */
  bool lived = false; /* a link to that life was begun */
  int32_t why_code = EPT_OK, why_errno = 0;
  std::string why;
  uint32_t membership = 0;      /* MASKED: under which epoch */
  std::string last_end;         /* what was said of the link that ended last */
  std::vector<uint8_t> address; /* CONNECTING, not opened: where, as soon as the link before is fenced */
  uint64_t last_sign = 0;
  bool dirty = false; /* in Engine::dirty */

  bool ended() const { return status == EPT_PEER_LOST || status == EPT_PEER_LEFT || status == EPT_PEER_MASKED; }
};

/* A link that has ended, until nothing of it can come any more. */
struct EndedLink {
  uint32_t rank, link, epoch;
  uint64_t cookie;     /* of its fence */
  uint32_t fences;     /* FENCED events that must still come, one a rail */
  uint64_t operations; /* that the plugin has not ended yet */
  ept_region *anchor;
  bool refused = false; /* the plugin can't fence it: its process must end first (ept_engine_known_dead) */
};

struct PendingQuiesce {
  uint32_t plugin_waiting = 0; /* events of the plugin that must still come */
  std::vector<uint32_t> asked; /* peers that must still answer; one that dies leaves (lose) */
  int32_t code = EPT_OK;
  std::string text;
};

/* A QUIESCE of a peer that can be answered when this rank's operations into the region have ended. */
struct QuiesceAnswer {
  uint32_t peer, link;
  uint64_t memory, nonce;
  bool asked = false;
};

enum class Driver : uint8_t { none, caller, proxy };

}  // namespace ept

struct ept_engine {
  /* ---- set once ---- */
  ept::Host host;
  const ept_backend *plugin = nullptr;
  std::string plugin_name, job;
  ept::Values values;
  std::vector<uint8_t> secret;
  uint32_t rank = 0, world = 1, epoch = 0;
  int32_t progress_mode = EPT_PROGRESS_AUTO;
  uint32_t credits = 0, send_credits = 0;
  uint64_t spin_ns = 0, timeout_ns = 0, warn_ns = 0, dead_ns = 0, heartbeat_ns = 0, stripe_bytes = 0;
  uint32_t asked_credits = 0;
  uint32_t max_regions = 0, max_signals = 0;
  std::vector<int32_t> proxy_cpus;
  int32_t (*interrupted)(void *) = nullptr;
  void *interrupted_context = nullptr;
  ept_caps caps{};
  std::vector<ept_rail> rails;

  /* ---- guarded by lock ---- */
  ept::EngineLock lock;
  std::condition_variable_any moved;
  std::condition_variable_any proxy_turn;
  uint32_t moved_waiters = 0;
  bool caller_asleep = false, proxy_asleep = false;    /* in sleep(), the lock let go; only while they drive */
  std::atomic<ept::Driver> driver = ept::Driver::none; /* written under the lock; the proxy looks without */
  bool proxy_parked = false, stopping = false, closed = false;
  std::atomic<uint64_t> last_drive = 0; /* by a caller; as driver */
  std::atomic<uint64_t> last_post = 0;  /* a long one takes as long as a wait: as driver */
  uint64_t now = 0;                     /* when the last step looked at the clock */
  uint32_t sleepers = 0;                /* threads in sleep() with the lock let go */
  uint32_t spins = 0;                   /* turns of a spin since the clock was read */
  bool slept_short = false;             /* the network ended the last sleep before yield_ns were over */
  bool rejoining = false;               /* nobody sleeps: the descriptor that they would sleep on is about to go */
  bool asks_bulk = false; /* the plugin can say that much payload is under way: then sleep rather than spin */

  ept_instance *instance = nullptr;
  ept_worker *worker = nullptr;
  std::vector<ept::Peer> peers; /* by rank; sized once */
  std::vector<ept::EndedLink> ended_links;
  std::vector<uint32_t> dirty;
  ept::Slots<ept::Memory> memories;
  ept::Slots<ept::Region> regions;
  ept::Slots<ept::Signal> signals;
  ept::Slots<ept::RemoteSignal> remote_signals;
  ept::Slots<ept::Transfer> transfers;
  ept::Slots<ept::InFlight> in_flight;
  std::vector<ept::Uses> admitted; /* of the scatter under way */
  std::vector<uint32_t> turn;      /* of pump_dirty */
  std::deque<ept::Chan> chans;     /* by number; 0 is never given out */
  std::vector<uint32_t> free_chans;
  std::unordered_map<uint64_t, std::deque<ept::Received>> inbox; /* by tag */
  std::deque<ept_error> failures;
  uint64_t news = 1; /* counts what may make a wait of the layer above vain; see news.h */
  std::unordered_map<uint64_t, ept::PendingQuiesce> quiescing; /* by nonce, which is also the plugin's cookie */
  std::vector<ept::QuiesceAnswer> answers;
  std::unordered_map<uint64_t, ept::QuiesceAnswer> answering; /* by the plugin's cookie */
  uint64_t next_nonce = 1;
  uint64_t registered_bytes = 0, exported_regions = 0, unknown_chans = 0, stale = 0;
  std::vector<uint8_t> anchor; /* 64 bytes that every peer may name, and none has reason to write */
  ept_mem *anchor_mem = nullptr;
  uint32_t join_round = 0;
  ept::Metrics metrics;
  std::vector<const ept::Waiting *> waiting;
  std::unique_ptr<ept::Spans> spans;      /* set once, before what adds to it is made */
  uint64_t step_ns = 0, refreshed_ns = 0; /* clock of the last step that brought something; of the last refresh */
  bool joined = false;
  uint32_t membership = 0;               /* the highest epoch told or heard */
  uint64_t last_tick = 0, next_tick = 0; /* heartbeat.cc */
  uint64_t judged_from = 0;              /*   silence before this is nobody's fault */

  std::unique_ptr<ept::Descriptor> caller_wake, proxy_wake, notify;
  std::thread proxy;

  ~ept_engine();

  /* engine.cc, progress.cc */
  int32_t open(const ept_engine_config &config, ept_error *error);
  int32_t open_plugin(ept_error *error);
  void close_plugin();
  /* One poll, its events, and what they set free; events or an error. Without events `now` stays and no time is kept
   * unless it `looks` at the clock. */
  int32_t step(ept_error *error, bool looks = true);
  template <class Done>
  int32_t wait(ept::Hold &hold, uint64_t timeout, Done &&done, ept_error *error,
               ept::Waiting *about = nullptr); /* wait.h */
  int32_t drive_once(ept::Hold &hold, uint64_t &idle_since, uint64_t until, ept_error *error);
  void sleep(ept::Hold &hold, uint64_t until);
  void wake_sleepers();
  void wake_up(const ept::Descriptor &fd);
  bool callers_drive() const;
  bool watch_callers(ept::Hold &hold);
  void run_proxy();
  int32_t plugin_error(int32_t code, const char *operation, int32_t peer, ept_error *error);
  int32_t usable(const char *operation, ept_error *error);
  int32_t usable_peer(uint32_t peer, const char *operation, ept_error *error);
  void say(int32_t level, const std::string &text) { host.log.say(level, text); }

  /* refresh.cc, why_stuck.cc */
  void refresh_metrics(uint64_t now);
  std::string why_stuck(const std::string &first);
  void describe_wait(const ept::Waiting &wait, uint64_t now, std::string &to);
  void keep_expired(const ept::Waiting &wait);
  void begin_wait(ept::Waiting &wait, uint64_t now);
  void end_wait(const ept::Waiting &wait, int32_t code, uint64_t now);

  /* peers.cc */
  int32_t connect(const void *const *addresses, const size_t *lengths, ept_error *error);
  int32_t check_address(uint32_t of, const void *address, size_t length, uint32_t &its_epoch, ept_error *error);
  int32_t open_link(ept::Peer &peer, ept_error *error);
  void on_peer(const ept_event &event);
  void on_message(const ept_event &event);
  void on_hello(ept::Peer &peer, const uint8_t *body, size_t length);
  void greet(ept::Peer &peer);
  void post_message(ept::Peer &peer, uint16_t type, uint64_t tag, const void *body, size_t length);
  int32_t address(std::vector<uint8_t> &blob, ept_error *error);
  std::string describe(const ept::Peer &peer);

  /* membership.cc */
  void lose(ept::Peer &peer, int32_t status, int32_t code, int32_t provider_errno, const char *why,
            bool at_once = false);
  void end_link(ept::Peer &peer, int32_t status, bool at_once);
  void on_fenced(const ept_event &event);
  void fenced(size_t index);
  bool fencing(uint32_t of) const; /* nobody: anyone */
  void wind_up(size_t index);
  void mask(ept::Peer &peer, uint32_t under, const char *why);
  void drop_messages_of(uint32_t source);
  int32_t rejoin(ept::Hold &hold, uint32_t next_epoch, ept_error *error);
  void hear_membership(uint32_t heard);

  /* heartbeat.cc */
  void tick(bool all_read);
  void heard(ept::Peer &peer);
  void send_heartbeat(ept::Peer &peer);
  void tell(ept::Peer &peer);
  void on_heartbeat(ept::Peer &peer, const ept_heartbeat &heartbeat);

  /* memory.cc */
  void revoke_exports(ept::Memory &memory, uint32_t rank);
  void on_quiesce(ept::Peer &peer, const ept_quiesce_message &asked);
  void answer_quiesces();
  void on_quiesced(const ept_event &event);

  /* transfers.cc */
  int32_t admit(const ept_write &write, const char *operation, ept::Uses &uses, ept_error *error);
  int32_t check_range(uint32_t peer, const ept::Memory *memory, uint64_t source_offset, const ept::Region *region,
                      uint64_t offset, uint64_t length, const char *operation, ept_error *error);
  ept::Transfer *new_transfer(uint32_t peer, ept_transfer_id *watched);
  void take(const ept_write &write, const ept::Uses &uses);
  void take(ept::Work &work, ept::Peer &peer);
  void mark_dirty(ept::Peer &peer);
  void pump(ept::Peer &peer);
  void pump_dirty();
  void stage_grants(ept::Peer &peer);
  void stage_messages(ept::Peer &peer);
  bool stage_descriptor(ept::Peer &peer, ept::Work &work);
  void stage_pieces(ept::Peer &peer, ept::Work &work);
  ept_op &stage(ept::Peer &peer, int32_t kind, ept::InFlight **record);
  bool post_staged(ept::Peer &peer);
  void count_posted(const ept::Peer &peer, const ept_op *ops, size_t count);
  void operation_ended(uint64_t cookie, int32_t code, int32_t provider_errno, const char *text);
  void let_go(const ept::Uses &uses, uint64_t operations, uint32_t peer, int32_t code, int32_t provider_errno,
              const char *text);
  void end_transfer(ept::Transfer &transfer, uint64_t operations, uint32_t peer, int32_t code, int32_t provider_errno,
                    const char *text);
  void fail_peer_work(ept::Peer &peer, const char *why, bool at_once);

  /* signals.cc */
  uint32_t new_chan(ept::ChanKind kind, uint32_t source, uint64_t signal);
  void free_chans_of(uint32_t source, uint32_t link);
  void on_immediate(const ept_event &event);
  void on_descriptor(uint32_t source, const ept_descriptor &descriptor);
  void on_void(uint32_t source, const ept_void &voided);
  void piece(ept::Chan &chan, uint32_t seq, uint32_t code, bool is_void, uint64_t need);
  void finish(ept::Chan &chan, uint32_t seq, bool raise);
  void give_back(uint32_t source, uint32_t credits);
  void drop_window(ept::Chan &chan);
  void raise(ept::Chan &chan);
  void raise_signal(ept::Signal &signal);
  void notify_owner() { wake_up(*notify); }
};
