// SPDX-License-Identifier: Apache-2.0
//
// loopback.cc: any number of ranks in one process. A whole backend in one file, to be read from the top: settings, what
// ranks share, how an operation travels (straight, or by the adversary's schedule), then the table's entries in the
// order of backend.h, last the table itself.
//
// A rank is an ept_instance. Instances of one job find each other in a switch that the process has once. A write is a
// memcpy that the initiator does itself, after the target's key, bounds and link were checked under the target's lock.
//
// LOCKS. There are two kinds, always taken in this order; nobody holds the locks of two ports but `sever` and `greet`.
//   the switch's  who is there, and who has opened whom. Set-up, fences and farewells only.
//   a port's      what others may touch of a rank: arrivals, exports, the bell. A link's state is written under the
//   locks
//                 of both its ports and read under either.
// A post holds the target's lock from the check of the key until the arrival is queued. So whoever has held that lock
// after it revoked a key or severed a link knows that nothing lands any more. A long copy lets go of the lock and pins
// the export meanwhile; revoke and fence wait for its pins, a matter of one memcpy. All else belongs to one instance,
// whose calls the ABI keeps apart.
#include <eptransport/backend.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "schedule.h"

namespace {

using loopback::Malice;
using loopback::Schedule;

constexpr uint32_t kBlobVersion = 1;
// Copies up to here are shorter than what a second round trip to the lock costs other posters: 32 KiB take 0.6 us.
constexpr uint64_t kCopyUnderLock = 32 << 10;
// Post, IMM and LOCAL_DONE, batches of 4 to 64 on one EPYC core, 2026-11-24: 50 to 60 ns (tests/native/loopback_cost).
constexpr uint32_t kOperationCostNs = 50;

// ---- errors ---------------------------------------------------------------------------------------------------------

thread_local ept_error t_error;

[[gnu::format(printf, 4, 5)]] int32_t fail(int32_t code, const char *operation, int64_t peer, const char *format, ...) {
  t_error = {};
  t_error.size = sizeof t_error;
  t_error.code = code;
  t_error.peer = static_cast<int32_t>(peer);
  snprintf(t_error.operation, sizeof t_error.operation, "%s", operation);
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(t_error.text, sizeof t_error.text, format, arguments);
  va_end(arguments);
  return code;
}

// No exception crosses the table.
template <class Body>
int32_t guard(const char *operation, Body &&body) noexcept {
  try {
    return body();
  } catch (const std::bad_alloc &) {
    return fail(EPT_E_NOMEM, operation, -1, "loopback %s: the machine refused memory", operation);
  } catch (const std::exception &error) {
    return fail(EPT_E_INTERNAL, operation, -1, "loopback %s: %s", operation, error.what());
  }
}

// Fills a struct of the caller's, which may be older and shorter than ours, or newer and longer.
template <class T>
void give(T *out, T value) {
  const uint32_t size = out->size;
  value.size = size;
  memset(out, 0, size);
  memcpy(out, &value, std::min<size_t>(size, sizeof value));
}

// ---- settings -------------------------------------------------------------------------------------------------------

constexpr ept_setting integer(const char *name, const char *value, int64_t min, int64_t max, const char *doc) {
  return {sizeof(ept_setting), EPT_SETTING_INT, name, value, min, max, doc};
}

constexpr ept_setting kSettings[] = {
    integer("rails", "0", 0, 64, "ways that operations are spread over; 0: 1, or 4 with the adversary"),
    integer("tx_depth", "1024", 1, 1 << 20, "operations in flight on a rail before post says LATER"),
    integer("cq_depth", "0", 0, 1 << 30, "arrivals that may wait unread on a rail; 0: all that the credits allow"),
    integer("max_message", "0", 0, INT64_MAX, "bytes of one write; 0: 1 MiB, or 64 KiB with the adversary"),
    integer("max_send", "8192", 256, 1 << 20, "bytes of one message"),
    integer("max_regions", "1048576", 1, INT32_MAX, "exports that may be valid at a time"),
    {sizeof(ept_setting), EPT_SETTING_BOOL, "mapped", "1", 0, 1, "hand out pointers into other ranks' memory"},
    integer("adversary", "0", -1, INT64_MAX, "seed of a hostile schedule: reorders, splits, delays; 0 and -1: polite"),
    integer("delay", "16", 0, 254, "adversary: polls that one step is held, at most; one in 16 steps 16 times as long"),
    integer("chunks", "8", 1, 1024, "adversary: parts that the bytes of a write land in, at most"),
    integer("later_permille", "100", 0, 900, "adversary: posts of which a random tail is told LATER, per thousand"),
    integer("early_permille", "300", 0, 1000,
            "adversary: operations that are locally done before their bytes land, per thousand"),
    integer("fail_permille", "0", 0, 1000, "adversary: writes that fail, half landed, per thousand"),
    integer("lose_rank", "-1", -1, INT32_MAX, "adversary: this rank disappears; -1: none does"),
    integer("lose_after", "1000", 0, INT64_MAX, "adversary: operations that lose_rank posts before it disappears"),
};

struct Settings {
  uint32_t rails, tx_depth, cq_depth, max_send;
  uint64_t max_message, max_regions;
  bool mapped, hostile;
  Malice malice;
};

int32_t read_settings(const ept_value *values, size_t count, const char *operation, Settings *settings) {
  std::map<std::string, int64_t> found;
  for (const ept_setting &setting : kSettings) found[setting.name] = strtoll(setting.value, nullptr, 10);
  for (size_t i = 0; i < count; ++i) {
    const std::string name = values[i].name;
    if (!found.count(name)) {
      return fail(EPT_E_CONFIG, operation, -1, "loopback has no setting `%s`", name.c_str());
    }
    char *end = nullptr;
    errno = 0;
    const int64_t value = strtoll(values[i].text, &end, 10);
    const ept_setting &setting =
        *std::find_if(std::begin(kSettings), std::end(kSettings), [&](auto &each) { return name == each.name; });
    if (errno || end == values[i].text || *end || value < setting.min || value > setting.max) {
      return fail(EPT_E_CONFIG, operation, -1, "loopback's `%s` is \"%s\": a number from %lld to %lld is wanted",
                  setting.name, values[i].text, static_cast<long long>(setting.min),
                  static_cast<long long>(setting.max));
    }
    found[name] = value;
  }
  const auto number = [&](const char *name) { return static_cast<uint32_t>(found[name]); };
  settings->hostile = found["adversary"] > 0;
  settings->rails = found["rails"] ? number("rails") : settings->hostile ? 4 : 1;
  settings->tx_depth = number("tx_depth");
  settings->cq_depth = number("cq_depth");
  settings->max_send = number("max_send");
  settings->max_message = found["max_message"] ? static_cast<uint64_t>(found["max_message"])
                          : settings->hostile  ? 64 << 10
                                               : 1 << 20;
  settings->max_regions = static_cast<uint64_t>(found["max_regions"]);
  settings->mapped = found["mapped"] != 0;
  settings->malice = {static_cast<uint64_t>(found["adversary"]),
                      number("delay"),
                      number("chunks"),
                      number("later_permille"),
                      number("early_permille"),
                      number("fail_permille"),
                      found["lose_rank"],
                      static_cast<uint64_t>(found["lose_after"])};
  return EPT_OK;
}

ept_caps capabilities(const Settings &settings) {
  ept_caps caps = {};
  caps.memory_kinds = EPT_MEMORY_HOST | EPT_MEMORY_PINNED | EPT_MEMORY_SHM;
  caps.max_message = settings.max_message;
  caps.max_send = settings.max_send;
  caps.max_iov = 1;
  caps.immediate_bits = 32;
  caps.protection = EPT_PROTECTION_KEY;
  caps.passive_progress = 1;
  caps.wait_descriptor = 1;
  caps.can_revoke = 1;
  caps.mapped = settings.mapped;
  caps.operation_cost_ns = kOperationCostNs;
  return caps;
}

// ---- what ranks share -----------------------------------------------------------------------------------------------

// An event on its way to poll, with the bytes that it points to, if any.
struct Item {
  ept_event event;
  std::unique_ptr<char[]> owned;
};

// First in, first out, in one array that grows to the longest burst seen and then allocates no more.
class Queue {
 public:
  size_t size() const { return tail_ - head_; }
  bool empty() const { return tail_ == head_; }
  Item &front() { return items_[head_ & mask_]; }
  void pop() { ++head_; }
  Item &push() {
    if (size() == capacity_) grow();
    return items_[tail_++ & mask_];
  }
  void swap(Queue &other) {
    std::swap(items_, other.items_);
    std::swap(capacity_, other.capacity_);
    std::swap(mask_, other.mask_);
    std::swap(head_, other.head_);
    std::swap(tail_, other.tail_);
  }
  template <class Unwanted>
  void remove(Unwanted &&unwanted) {
    size_t kept = head_;
    for (size_t i = head_; i != tail_; ++i) {
      Item &item = items_[i & mask_];
      if (!unwanted(item.event)) {
        if (kept != i) items_[kept & mask_] = std::move(item);
        ++kept;
      }
    }
    tail_ = kept;
  }

 private:
  void grow() {
    const size_t larger = capacity_ ? 2 * capacity_ : 16;
    std::unique_ptr<Item[]> items(new Item[larger]);
    const size_t count = size();
    for (size_t i = 0; i < count; ++i) items[i] = std::move(items_[(head_ + i) & mask_]);
    items_ = std::move(items);
    capacity_ = larger;
    mask_ = larger - 1;
    head_ = 0;
    tail_ = count;
  }
  std::unique_ptr<Item[]> items_;
  size_t capacity_ = 0, mask_ = 0, head_ = 0, tail_ = 0;
};

struct Key {
  uint64_t words[2] = {0, 0};
  bool differs(const Key &other) const { return (words[0] ^ other.words[0]) | (words[1] ^ other.words[1]); }
};

// One region_export: who may write where. The slot's index stands in the blob, the key says whether it still holds.
struct Export {
  uint8_t *base = nullptr;
  uint64_t length = 0;
  Key key;
  uint32_t rank = 0, epoch = 0;  // whose key it is
  uint32_t generation = 0;       // how often the slot was used before
  uint32_t pins = 0;             // long copies under way
  bool valid = false;
};

struct Link;

// Bytes on their way whose sender was told LOCAL_DONE already, so that refusing them could be told to nobody any more.
// A revoke lands what is left of them before it returns.
struct Parcel {
  std::shared_ptr<Link> link;
  uint32_t slot;
  uint8_t *destination;
  std::unique_ptr<char[]> bytes;
  uint64_t length;
  bool landed;
};

// What others may touch of a rank. Lives until the last peer has dropped it.
struct Port {
  Port(uint64_t number, uint32_t own_rank, uint32_t own_epoch, std::string job_secret, uint32_t world,
       uint32_t own_rails)
      : id(number),
        rank(own_rank),
        epoch(own_epoch),
        rails(own_rails),
        secret(std::move(job_secret)),
        consumed(size_t{world} * own_rails) {}
  ~Port() {
    if (descriptor >= 0) ::close(descriptor);
  }

  const uint64_t id;
  const uint32_t rank, epoch, rails;
  const std::string secret;

  std::mutex lock;
  std::condition_variable unpinned;
  Queue arrived;                      // what poll has not taken yet
  size_t room = 0;                    // IMM and RECV wait in `arrived` up to here
  std::atomic<uint32_t> waiting = 0;  // the size of `arrived`, for a poll that finds nothing; a hint, so relaxed
  std::vector<Export> exports;
  std::vector<uint32_t> unused;                // free slots of `exports`
  std::vector<uint32_t> consumed;              // [rank * rails + rail] immediates of its present epoch
  std::vector<std::shared_ptr<Port>> starved;  // told LATER for want of room here
  std::vector<std::shared_ptr<Parcel>> parcels;
  int descriptor = -1;    // made by the first arm
  bool armed = false;     // the owner sleeps on the descriptor
  bool rung = false;      // it is readable
  bool relieved = false;  // a port that had no room for us has some again

  // With the lock held. No system call unless the owner sleeps.
  void ring() {
    if (!armed) return;
    const uint64_t one = 1;
    armed = false;
    rung = ::write(descriptor, &one, sizeof one) == sizeof one;
  }
  Item &arrive() {
    Item &item = arrived.push();
    waiting.store(static_cast<uint32_t>(arrived.size()), std::memory_order_relaxed);
    return item;
  }
  bool full() const { return arrived.size() >= room; }
};

enum class LinkState { kConnecting, kUp, kDown };

// Between two lives of two ranks.
struct Link {
  LinkState state = LinkState::kConnecting;
  std::string why;  // kDown; written once, before the state
};

struct Job {
  using Life = std::pair<uint32_t, uint32_t>;  // rank, epoch
  struct Call {
    std::shared_ptr<Link> link;
    std::shared_ptr<Port> caller;
  };
  uint32_t world;
  std::map<Life, std::shared_ptr<Port>> ports;
  std::map<std::pair<Life, Life>, Call> calls;  // opened by `caller`, the first life, and not by the second yet
};

struct Switch {
  std::mutex lock;
  std::map<std::string, std::weak_ptr<Job>> jobs;
  uint64_t next_port = 1;
};

Switch &the_switch() {
  static Switch *const only = new Switch;  // never destroyed: threads may outlive main
  return *only;
}

// A peer as one instance sees it.
struct Peer {
  std::shared_ptr<Port> port;
  std::shared_ptr<Link> link;
  uint32_t epoch = 0;
};

void tell(Port &port, const Port &peer, int32_t code, const std::string &text) {
  Item &item = port.arrive();
  item.event = {};
  item.event.size = sizeof(ept_event);
  item.event.kind = EPT_EVENT_PEER;
  item.event.peer = peer.rank;
  item.event.epoch = peer.epoch;
  item.event.code = code;
  if (!text.empty()) {
    item.owned.reset(new char[text.size() + 1]);
    memcpy(item.owned.get(), text.c_str(), text.size() + 1);
    item.event.text = item.owned.get();
  }
  port.ring();
}

// With the switch's lock held. Both have opened each other.
void greet(Port &one, Port &other, Link &link) {
  if (&one == &other) {
    std::lock_guard hold(one.lock);
    link.state = LinkState::kUp;
    tell(one, one, EPT_OK, "");
    return;
  }
  std::scoped_lock hold(one.lock, other.lock);
  link.state = LinkState::kUp;
  tell(one, other, EPT_OK, "");
  tell(other, one, EPT_OK, "");
}

// With the switch's lock held. After it nothing lands through the link, in either direction; a long copy may be under
// way.
void sever(Job &job, Port &own, Peer &peer, bool tell_own, const std::string &why) {
  if (!peer.link) return;
  std::unique_lock mine(own.lock, std::defer_lock), theirs(peer.port->lock, std::defer_lock);
  if (&own == peer.port.get()) {
    mine.lock();
  } else {
    std::lock(mine, theirs);
  }
  if (peer.link->state == LinkState::kDown) return;
  const bool was_up = peer.link->state == LinkState::kUp;
  peer.link->why = why;
  peer.link->state = LinkState::kDown;
  job.calls.erase({{own.rank, own.epoch}, {peer.port->rank, peer.port->epoch}});
  if (tell_own) tell(own, *peer.port, EPT_E_PEER_LOST, why);
  if (was_up && &own != peer.port.get()) tell(*peer.port, own, EPT_E_PEER_LOST, why);
}

}  // namespace

// ---- objects --------------------------------------------------------------------------------------------------------

struct ept_mem {
  ept_instance *instance;
  ept_memory memory;
  std::vector<uint64_t> keys;  // of its valid exports
};

struct ept_region {
  ept_instance *instance;
  uint32_t rank, slot;
  uint64_t length;
  Key key;
  int32_t role;
};

namespace {
class Route;
}

struct ept_worker {
  ept_instance *instance;
  std::unique_ptr<Route> route;
  Queue own;                                    // LOCAL_DONE, ERROR, QUIESCED
  Queue taken;                                  // arrivals that poll took and has not handed out yet
  std::vector<std::unique_ptr<char[]>> handed;  // bytes that the last poll's events point to
  std::vector<uint32_t> in_flight;              // by rail: posted, and its LOCAL_DONE or ERROR not handed out
  std::vector<ept_rail_counters> counters;      // by rail
  struct Quiesce {
    uint32_t rank;
    int32_t scope;
    uint64_t cookie;
  };
  std::vector<Quiesce> quiesces;  // not answered yet
  bool armed = false;
};

struct ept_instance {
  const ept_host *host;
  uint32_t rank, world, epoch;
  Settings settings;
  std::shared_ptr<Job> job;
  std::string job_name;
  std::shared_ptr<Port> port;
  std::vector<Peer> peers;
  std::vector<uint32_t> fenced;  // by rank: epochs below this are fenced
  ept_worker *worker = nullptr;
};

namespace {

// ---- how an operation reaches its target ----------------------------------------------------------------------------

enum class Verdict { kLanded, kFull, kConnecting, kLost, kKey, kBounds };

// Waits until no long copy by `rank` is under way; new ones don't begin, for the link is down or the key revoked.
void drain(Port &port, std::unique_lock<std::mutex> &hold, uint32_t slot) {
  port.unpinned.wait(hold, [&] { return port.exports[slot].pins == 0; });
}

Verdict check_link(const Link &link) {
  switch (link.state) {
    case LinkState::kUp:
      return Verdict::kLanded;
    case LinkState::kConnecting:
      return Verdict::kConnecting;
    case LinkState::kDown:
      break;
  }
  return Verdict::kLost;
}

// Rule 12. With the target's lock held.
Verdict check(const Port &own, const Peer &peer, const ept_region &region, uint64_t offset, uint64_t length) {
  if (const Verdict verdict = check_link(*peer.link); verdict != Verdict::kLanded) return verdict;
  if (region.slot >= peer.port->exports.size()) return Verdict::kKey;
  const Export &entry = peer.port->exports[region.slot];
  if (!entry.valid || entry.key.differs(region.key) || entry.rank != own.rank || entry.epoch != own.epoch) {
    return Verdict::kKey;
  }
  return offset > entry.length || length > entry.length - offset ? Verdict::kBounds : Verdict::kLanded;
}

// Checks, then copies. `hold` is the target's lock.
Verdict land(const Port &own, const Peer &peer, std::unique_lock<std::mutex> &hold, const ept_region &region,
             uint64_t offset, const void *source, uint64_t length) {
  const Verdict verdict = check(own, peer, region, offset, length);
  if (verdict != Verdict::kLanded || length == 0) return verdict;
  Port &target = *peer.port;
  uint8_t *const destination = target.exports[region.slot].base + offset;
  if (length <= kCopyUnderLock) {
    memcpy(destination, source, length);
    return verdict;
  }
  ++target.exports[region.slot].pins;
  hold.unlock();
  memcpy(destination, source, length);
  hold.lock();
  if (--target.exports[region.slot].pins == 0) target.unpinned.notify_all();
  return check_link(*peer.link);
}

// The event at the target, after all bytes of the operation. With its lock held, and room there.
void announce(const Port &own, Port &target, const ept_op &op, std::unique_ptr<char[]> message) {
  Item &item = target.arrive();
  ept_event &event = item.event;
  event.size = sizeof event;
  event.kind = op.kind == EPT_OP_SEND ? EPT_EVENT_RECV : EPT_EVENT_IMM;
  event.peer = own.rank;
  event.epoch = own.epoch;
  event.rail = op.rail < target.rails ? op.rail : op.rail % target.rails;
  event.immediate = op.immediate;
  event.cookie = 0;
  event.length = op.kind == EPT_OP_SIGNAL ? 0 : op.length;
  event.data = message.get();
  event.code = EPT_OK;
  event.provider_errno = 0;
  event.text = nullptr;
  item.owned = std::move(message);
  if (op.kind != EPT_OP_SEND) ++target.consumed[size_t{own.rank} * target.rails + event.rail];
  target.ring();
}

std::unique_ptr<char[]> copy_of(const void *source, uint64_t length) {
  std::unique_ptr<char[]> bytes(new char[length + 1]);
  if (length) memcpy(bytes.get(), source, length);
  return bytes;
}

// A whole operation at once. With the target's lock held.
Verdict carry(const std::shared_ptr<Port> &own, const Peer &peer, std::unique_lock<std::mutex> &hold,
              const ept_op &op) {
  Verdict verdict = check_link(*peer.link);
  if (verdict != Verdict::kLanded) return verdict;
  Port &target = *peer.port;
  if (target.full()) {
    if (std::find(target.starved.begin(), target.starved.end(), own) == target.starved.end()) {
      target.starved.push_back(own);
    }
    return Verdict::kFull;
  }
  if (op.kind == EPT_OP_SEND) {
    announce(*own, target, op, copy_of(op.source, op.length));
    return verdict;
  }
  verdict = land(*own, peer, hold, *op.region, op.offset, op.source, op.kind == EPT_OP_SIGNAL ? 0 : op.length);
  if (verdict == Verdict::kLanded) announce(*own, target, op, nullptr);
  return verdict;
}

const char *verb(int32_t kind) { return kind == EPT_OP_WRITE ? "write" : kind == EPT_OP_SIGNAL ? "signal" : "send"; }

int32_t code_of(Verdict verdict) {
  return verdict == Verdict::kKey || verdict == Verdict::kBounds ? EPT_E_ACCESS : EPT_E_PEER_LOST;
}

std::string sentence(Verdict verdict, const ept_op &op, const Peer &peer) {
  const std::string what = std::string(verb(op.kind)) + " of " + std::to_string(op.length) + " bytes at offset " +
                           std::to_string(op.offset) + " to rank " + std::to_string(op.peer);
  switch (verdict) {
    case Verdict::kKey:
      return what + ": the key is not one that this rank and epoch may write with, or was revoked";
    case Verdict::kBounds:
      return what + ": it ends outside the region";
    default:
      return what + ": " + peer.link->why;
  }
}

Item &done(ept_worker &worker, const ept_op &op, int32_t kind, uint32_t epoch) {
  Item &item = worker.own.push();
  item.event = {};
  item.event.size = sizeof(ept_event);
  item.event.kind = kind;
  item.event.peer = op.peer;
  item.event.epoch = epoch;
  item.event.rail = op.rail;
  item.event.cookie = op.cookie;
  item.event.length = op.length;
  return item;
}

void failed(ept_worker &worker, const ept_op &op, uint32_t epoch, int32_t code, const std::string &text) {
  Item &item = done(worker, op, EPT_EVENT_ERROR, epoch);
  item.event.code = code;
  item.owned = copy_of(text.c_str(), text.size() + 1);
  item.event.text = item.owned.get();
  ++worker.counters[op.rail].errors;
}

int32_t refuse(const ept_op &op, const char *why, uint64_t value) {
  return fail(EPT_E_INVALID, verb(op.kind), op.peer, "loopback %s to rank %u: %s %llu", verb(op.kind), op.peer, why,
              static_cast<unsigned long long>(value));
}

// What the initiator can see by itself; everything about the target's memory is checked there.
int32_t admit(ept_worker &worker, const ept_op &op) {
  ept_instance &instance = *worker.instance;
  if (op.size != sizeof op) return refuse(op, "the operation's size is not that of ABI 1:", op.size);
  if (op.peer >= instance.world || !instance.peers[op.peer].link) return refuse(op, "no such peer is open:", op.peer);
  if (op.rail >= instance.settings.rails) return refuse(op, "there is no rail", op.rail);
  if (op.kind == EPT_OP_SEND) {
    if (op.length > instance.settings.max_send) return refuse(op, "longer than max_send:", op.length);
  } else if (op.kind == EPT_OP_WRITE || op.kind == EPT_OP_SIGNAL) {
    if (!op.region || op.region->rank != op.peer) return refuse(op, "the region is not one of rank", op.peer);
    if (op.kind == EPT_OP_WRITE && op.length) {
      if (op.length > instance.settings.max_message) return refuse(op, "longer than max_message:", op.length);
      if (!op.source_mem) return refuse(op, "the source is not registered; bytes:", op.length);
      const ept_memory &memory = op.source_mem->memory;
      const uint64_t start = reinterpret_cast<uint64_t>(op.source) - reinterpret_cast<uint64_t>(memory.address);
      if (start > memory.length || op.length > memory.length - start) {
        return refuse(op, "the source is not all inside its registration; bytes:", op.length);
      }
      if (!(memory.access & EPT_ACCESS_LOCAL)) return refuse(op, "the source may not be read; access", memory.access);
    }
  } else {
    return refuse(op, "unknown kind", static_cast<uint64_t>(op.kind));
  }
  return worker.in_flight[op.rail] < instance.settings.tx_depth ? EPT_OK : EPT_LATER;
}

void accepted(ept_worker &worker, const ept_op &op) {
  ept_rail_counters &counters = worker.counters[op.rail];
  ++worker.in_flight[op.rail];
  if (op.kind == EPT_OP_SEND) {
    ++counters.tx_sends;
  } else {
    ++counters.tx_operations;
    counters.tx_bytes += op.kind == EPT_OP_WRITE ? op.length : 0;
  }
}

// What became of an operation that was carried at once.
void conclude(ept_worker &worker, const ept_op &op, const Peer &peer, Verdict verdict) {
  if (verdict == Verdict::kLanded) {
    done(worker, op, EPT_EVENT_LOCAL_DONE, peer.epoch);
  } else {
    failed(worker, op, peer.epoch, code_of(verdict), sentence(verdict, op, peer));
  }
}

// How operations get from post to their target.
class Route {
 public:
  explicit Route(ept_worker &worker) : worker_(worker), instance_(*worker.instance) {}
  virtual ~Route() = default;
  virtual int32_t post(const ept_op *ops, size_t count, size_t *posted) = 0;
  // Moves on what is held here, once a poll.
  virtual void tick() {}
  virtual bool idle() const { return true; }
  // Has all that was posted to `rank` (UINT32_MAX: all) come to its end?
  virtual bool settled(uint32_t /*rank*/, int32_t /*scope*/) const { return true; }
  // Ends what is held for a peer that is being closed.
  virtual void drop(uint32_t /*rank*/, const char * /*why*/) {}
  virtual size_t reading(const ept_mem * /*mem*/) const { return 0; }

 protected:
  ept_worker &worker_;
  ept_instance &instance_;
};

// Polite: everything lands inside post. One lock of the target a run of operations to it.
class Straight final : public Route {
 public:
  using Route::Route;

  int32_t post(const ept_op *ops, size_t count, size_t *posted) override {
    int32_t code = EPT_OK;
    while (*posted < count && (code = admit(worker_, ops[*posted])) == EPT_OK) {
      const uint32_t rank = ops[*posted].peer;
      const Peer &peer = instance_.peers[rank];
      std::unique_lock hold(peer.port->lock);
      do {
        const ept_op &op = ops[*posted];
        const Verdict verdict = carry(instance_.port, peer, hold, op);
        if (verdict == Verdict::kFull || verdict == Verdict::kConnecting) return EPT_LATER;
        accepted(worker_, op);
        conclude(worker_, op, peer, verdict);
      } while (++*posted < count && ops[*posted].peer == rank && (code = admit(worker_, ops[*posted])) == EPT_OK);
    }
    return code;
  }
};

// The adversary: an operation is held and lands in steps, each in a poll that the schedule drew, shuffled with what
// else falls on that poll: chunks of its bytes, then its event at the target and its LOCAL_DONE in either order (or
// that one first of all, from a copy of the source). An operation can be refused until its last byte has landed;
// LOCAL_DONE is given only when it no longer can. Writes into memory of role SIGNAL go straight, as their strict order
// demands.
class Adversary final : public Route {
 public:
  explicit Adversary(ept_worker &worker)
      : Route(worker), schedule_(instance_.settings.malice, instance_.rank, instance_.epoch), wheel_(256) {}

  ~Adversary() override {
    for (Flight &flight : flights_) take_back(flight);
  }

  int32_t post(const ept_op *ops, size_t count, size_t *posted) override {
    const size_t taken = schedule_.takes(count);
    while (*posted < taken) {
      const ept_op &op = ops[*posted];
      if (const int32_t code = admit(worker_, op); code != EPT_OK) return code;
      const Verdict verdict = embark(op);
      if (verdict == Verdict::kFull || verdict == Verdict::kConnecting) return EPT_LATER;
      accepted(worker_, op);
      ++*posted;
      if (instance_.settings.malice.lose_rank == instance_.rank && ++posted_ == instance_.settings.malice.lose_after) {
        vanish();
      }
    }
    return taken < count ? EPT_LATER : EPT_OK;
  }

  void tick() override {
    std::vector<Step> &bucket = wheel_[++now_ % wheel_.size()];
    std::vector<Step> due;
    due.swap(bucket);
    schedule_.shuffle(due);
    for (const Step &step : due) take(step);
    due.clear();
    if (bucket.empty()) bucket.swap(due);  // keeps its room
  }

  bool idle() const override { return flying_ == 0; }

  bool settled(uint32_t rank, int32_t scope) const override {
    return std::none_of(flights_.begin(), flights_.end(), [&](const Flight &flight) {
      return flight.steps && (rank == UINT32_MAX || flight.op.peer == rank) &&
             (!flight.told || (scope == EPT_SCOPE_REMOTE && !flight.over));
    });
  }

  void drop(uint32_t rank, const char *why) override {
    for (Flight &flight : flights_) {
      if (flight.steps && flight.op.peer == rank) end(flight, EPT_E_CLOSED, why);
    }
  }

  size_t reading(const ept_mem *mem) const override {
    return static_cast<size_t>(std::count_if(flights_.begin(), flights_.end(), [&](const Flight &flight) {
      return flight.steps && !flight.over && !flight.told && !flight.parcel && flight.op.source_mem == mem;
    }));
  }

 private:
  struct Flight {
    ept_op op = {};
    ept_region region = {};           // the caller may drop its own while we fly
    Peer peer;                        // as it was when the operation was posted
    std::unique_ptr<char[]> message;  // of a SEND
    std::shared_ptr<Parcel> parcel;   // the bytes, where LOCAL_DONE comes before them
    uint32_t steps = 0;               // in the wheel; 0: the slot is free
    uint32_t chunks = 0;              //   of these, chunks
    bool told = false;                // LOCAL_DONE or ERROR was given
    bool over = false;                // nothing of it will touch the target any more
    bool fails = false;
    bool sure = false;  // can't be refused any more: all landed, or LOCAL_DONE is on its way
  };
  enum class What { kChunk, kAnnounce, kLocalDone };
  struct Step {
    uint32_t flight;
    What what;
    uint64_t offset, length;
  };

  Verdict embark(const ept_op &op) {
    const Peer &peer = instance_.peers[op.peer];
    std::unique_lock hold(peer.port->lock);
    if (op.kind == EPT_OP_WRITE && op.region->role == EPT_ROLE_SIGNAL) {
      const Verdict verdict = carry(instance_.port, peer, hold, op);
      if (verdict != Verdict::kFull && verdict != Verdict::kConnecting) conclude(worker_, op, peer, verdict);
      return verdict;
    }
    const Verdict verdict = op.kind == EPT_OP_SEND ? check_link(*peer.link)
                                                   : check(*instance_.port, peer, *op.region, op.offset, op.length);
    if (verdict == Verdict::kConnecting) return verdict;

    const uint32_t slot = free_slot();
    Flight &flight = flights_[slot];
    flight.op = op;
    if (op.region) flight.region = *op.region;
    flight.op.region = nullptr;
    flight.peer = peer;
    flight.fails = schedule_.fails() && op.kind == EPT_OP_WRITE;  // a lost message or grant would cost the peer
    const bool early = schedule_.early() && !flight.fails && verdict == Verdict::kLanded;
    const uint64_t bytes = op.kind == EPT_OP_WRITE ? op.length : 0;
    if (op.kind == EPT_OP_SEND) flight.message = copy_of(op.source, op.length);
    if (early && bytes) {
      uint8_t *const destination = peer.port->exports[op.region->slot].base + op.offset;
      flight.parcel = std::make_shared<Parcel>(
          Parcel{peer.link, op.region->slot, destination, copy_of(op.source, bytes), bytes, false});
      flight.op.source = flight.parcel->bytes.get();
      peer.port->parcels.push_back(flight.parcel);
    }
    flight.sure = early;
    for (const auto &[offset, length] : schedule_.cut(bytes)) {
      ++flight.chunks;
      plan(slot, What::kChunk, offset, length);
    }
    if (!flight.chunks) plan(slot, What::kAnnounce);
    if (early) plan(slot, What::kLocalDone);
    ++flying_;
    return Verdict::kLanded;
  }

  uint32_t free_slot() {
    if (unused_.empty()) {
      flights_.emplace_back();
      return static_cast<uint32_t>(flights_.size() - 1);
    }
    const uint32_t slot = unused_.back();
    unused_.pop_back();
    return slot;
  }

  void plan(uint32_t slot, What what, uint64_t offset = 0, uint64_t length = 0) {
    ++flights_[slot].steps;
    wheel_[(now_ + 1 + schedule_.delay()) % wheel_.size()].push_back({slot, what, offset, length});
  }

  void take(const Step &step) {
    Flight &flight = flights_[step.flight];
    switch (step.what) {
      case What::kChunk:
        --flight.chunks;
        if (!flight.over) land_chunk(step);
        break;
      case What::kAnnounce:
        if (!flight.over) arrive(step.flight);
        break;
      case What::kLocalDone:
        if (!flight.told) {
          flight.told = true;
          done(worker_, flight.op, EPT_EVENT_LOCAL_DONE, flight.peer.epoch);
        }
        break;
    }
    if (--flight.steps == 0) {
      take_back(flight);
      flight = Flight();
      unused_.push_back(step.flight);
      --flying_;
    }
  }

  void land_chunk(const Step &step) {
    Flight &flight = flights_[step.flight];
    if (flight.fails && !flight.chunks) return end(flight, EPT_E_IO, "the adversary failed it");
    std::unique_lock hold(flight.peer.port->lock);
    const bool landed = flight.parcel && flight.parcel->landed;
    Verdict verdict = landed ? check_link(*flight.peer.link)  // all of it is checked before any part lands
                             : check(*instance_.port, flight.peer, flight.region, flight.op.offset, flight.op.length);
    if (!landed && verdict == Verdict::kLanded) {
      verdict = land(*instance_.port, flight.peer, hold, flight.region, flight.op.offset + step.offset,
                     static_cast<const char *>(flight.op.source) + step.offset, step.length);
    }
    const bool through = !flight.chunks || verdict != Verdict::kLanded;
    if (through && flight.parcel) std::erase(flight.peer.port->parcels, flight.parcel);
    hold.unlock();
    if (verdict != Verdict::kLanded) return refused(flight, verdict);
    if (flight.chunks) return;
    plan(step.flight, What::kAnnounce);
    if (!flight.sure) plan(step.flight, What::kLocalDone);
    flight.sure = true;
  }

  void arrive(uint32_t slot) {
    Flight &flight = flights_[slot];
    if (flight.fails) return end(flight, EPT_E_IO, "the adversary failed it");
    Port &target = *flight.peer.port;
    std::unique_lock hold(target.lock);
    const Verdict verdict = flight.sure || flight.op.kind == EPT_OP_SEND
                                ? check_link(*flight.peer.link)
                                : check(*instance_.port, flight.peer, flight.region, flight.op.offset, 0);
    if (verdict != Verdict::kLanded) {
      hold.unlock();
      return refused(flight, verdict);
    }
    if (target.full()) return plan(slot, What::kAnnounce);
    announce(*instance_.port, target, flight.op, std::move(flight.message));
    flight.over = true;
    if (!flight.sure) plan(slot, What::kLocalDone);
  }

  void take_back(Flight &flight) {
    if (!flight.parcel) return;
    std::lock_guard hold(flight.peer.port->lock);
    std::erase(flight.peer.port->parcels, flight.parcel);
  }

  void refused(Flight &flight, Verdict verdict) {
    end(flight, code_of(verdict), sentence(verdict, flight.op, flight.peer));
  }

  // The rest of its steps do nothing. Where LOCAL_DONE was given, only the peer's loss can bring us here, and its PEER
  // event tells of that.
  void end(Flight &flight, int32_t code, const std::string &why) {
    if (flight.over) return;
    flight.over = true;
    if (flight.told) return;
    flight.told = true;
    failed(worker_, flight.op, flight.peer.epoch, code, why);
  }

  // As if this rank's cable had been pulled: everybody loses it, and it loses everybody.
  void vanish() {
    std::lock_guard hold(the_switch().lock);
    const std::string why = "the adversary took rank " + std::to_string(instance_.rank) + " away after " +
                            std::to_string(posted_) + " operations";
    for (Peer &peer : instance_.peers) sever(*instance_.job, *instance_.port, peer, true, why);
  }

  Schedule schedule_;
  std::vector<std::vector<Step>> wheel_;
  std::vector<Flight> flights_;
  std::vector<uint32_t> unused_;
  uint64_t now_ = 0, flying_ = 0, posted_ = 0;
};

// ---- probe, open ----------------------------------------------------------------------------------------------------

int32_t probe(const ept_host *, const ept_value *values, size_t count, ept_probe *report) {
  return guard("probe", [&] {
    Settings settings;
    ept_probe found = {};
    if (const int32_t code = read_settings(values, count, "probe", &settings); code != EPT_OK) {
      snprintf(found.summary, sizeof found.summary, "%.255s", t_error.text);
      give(report, found);
      return code;
    }
    found.caps = capabilities(settings);
    found.caps.size = sizeof found.caps;
    const int used = snprintf(found.summary, sizeof found.summary, "ranks of this process, %u rail%s", settings.rails,
                              settings.rails == 1 ? "" : "s");
    if (settings.hostile) {
      snprintf(found.summary + used, sizeof found.summary - static_cast<size_t>(used), ", adversary with seed %llu",
               static_cast<unsigned long long>(settings.malice.seed));
    }
    give(report, found);
    return static_cast<int32_t>(EPT_OK);
  });
}

int32_t open(const ept_host *host, const ept_open_params *params, ept_instance **opened) {
  return guard("open", [&] {
    auto instance = std::make_unique<ept_instance>();
    Settings &settings = instance->settings;
    if (const int32_t code = read_settings(params->values, params->value_count, "open", &settings); code != EPT_OK) {
      return code;
    }
    if (params->rank >= params->world) {
      return fail(EPT_E_INVALID, "open", -1, "loopback open: rank %u of a world of %u", params->rank, params->world);
    }
    if (!settings.cq_depth) {
      // Twice what credits allow: they are counted in immediates and sends, and grants come on top.
      const uint64_t most = 2ull * params->world * (uint64_t{params->credits} + params->send_credits + 8);
      settings.cq_depth = static_cast<uint32_t>(std::min<uint64_t>(most, 1 << 30));
    }
    instance->host = host;
    instance->rank = params->rank;
    instance->world = params->world;
    instance->epoch = params->epoch;
    instance->job_name = params->job ? params->job : "";
    instance->peers.resize(params->world);
    instance->fenced.resize(params->world);

    std::lock_guard hold(the_switch().lock);
    std::weak_ptr<Job> &entry = the_switch().jobs[instance->job_name];
    instance->job = entry.lock();
    if (!instance->job) {
      instance->job = std::make_shared<Job>();
      instance->job->world = params->world;
      entry = instance->job;
    }
    if (instance->job->world != params->world) {
      return fail(EPT_E_MISMATCH, "open", -1, "loopback open: rank %u says that job `%s` has %u ranks, others say %u",
                  params->rank, instance->job_name.c_str(), params->world, instance->job->world);
    }
    std::shared_ptr<Port> &port = instance->job->ports[{params->rank, params->epoch}];
    if (port) {
      return fail(EPT_E_INVALID, "open", -1, "loopback open: rank %u, epoch %u of job `%s` is open in this process",
                  params->rank, params->epoch, instance->job_name.c_str());
    }
    std::string secret(reinterpret_cast<const char *>(params->secret), params->secret ? params->secret_length : 0);
    port = std::make_shared<Port>(the_switch().next_port++, params->rank, params->epoch, std::move(secret),
                                  params->world, settings.rails);
    port->room = size_t{settings.cq_depth} * settings.rails;
    instance->port = port;
    *opened = instance.release();
    return static_cast<int32_t>(EPT_OK);
  });
}

void close(ept_instance *instance) {
  std::unique_ptr<ept_instance> owner(instance);
  std::lock_guard hold(the_switch().lock);
  const std::string why = "rank " + std::to_string(instance->rank) + " is gone";
  for (Peer &peer : instance->peers) sever(*instance->job, *instance->port, peer, false, why);
  // Who has called this rank and was not called back.
  for (auto call = instance->job->calls.begin(); call != instance->job->calls.end();) {
    if (call->first.second != Job::Life{instance->rank, instance->epoch}) {
      ++call;
      continue;
    }
    Port &caller = *call->second.caller;
    std::scoped_lock both(caller.lock, instance->port->lock);
    call->second.link->why = why;
    call->second.link->state = LinkState::kDown;
    tell(caller, *instance->port, EPT_E_PEER_LOST, why);
    call = instance->job->calls.erase(call);
  }
  {
    std::lock_guard mine(instance->port->lock);
    instance->port->starved.clear();  // two ports may hold each other by these
    instance->port->parcels.clear();
  }
  instance->job->ports.erase({instance->rank, instance->epoch});
  if (instance->job->ports.empty()) the_switch().jobs.erase(instance->job_name);
}

int32_t caps(ept_instance *instance, ept_caps *caps) {
  give(caps, capabilities(instance->settings));
  return EPT_OK;
}

int32_t rails(ept_instance *instance, ept_rail *rails, uint32_t capacity, uint32_t *count) {
  const Settings &settings = instance->settings;
  for (uint32_t i = 0; i < std::min(capacity, settings.rails); ++i) {
    ept_rail &rail = rails[i];
    rail = {};
    rail.size = sizeof rail;
    snprintf(rail.name, sizeof rail.name, "loopback/%u", i);
    snprintf(rail.fabric, sizeof rail.fabric, "loopback");
    rail.numa = -1;
    rail.port = i;
    rail.max_regions = settings.max_regions;
    rail.max_peers = instance->world;
    rail.cq_depth = settings.cq_depth;
    rail.tx_depth = settings.tx_depth;
  }
  *count = settings.rails;
  return EPT_OK;
}

// ---- addresses and peers --------------------------------------------------------------------------------------------

struct Address {
  uint32_t version, rank, epoch, process;
  uint64_t port;
};

template <class Blob>
int32_t write_blob(const Blob &blob, const char *operation, void *out, size_t *length) {
  if (*length < sizeof blob) {
    return fail(EPT_E_LIMIT, operation, -1, "loopback %s: %zu bytes of room, %zu are needed", operation, *length,
                sizeof blob);
  }
  memcpy(out, &blob, sizeof blob);
  *length = sizeof blob;
  return EPT_OK;
}

template <class Blob>
int32_t read_blob(const void *bytes, size_t length, const char *operation, Blob *blob) {
  uint32_t version = 0;
  if (length >= sizeof version) memcpy(&version, bytes, sizeof version);
  if (version != kBlobVersion) {
    return fail(EPT_E_VERSION, operation, -1, "loopback %s: a blob of version %u, this is version %u", operation,
                version, kBlobVersion);
  }
  if (length != sizeof *blob) {
    return fail(EPT_E_INVALID, operation, -1, "loopback %s: a blob of %zu bytes, not %zu", operation, length,
                sizeof *blob);
  }
  memcpy(blob, bytes, sizeof *blob);
  return EPT_OK;
}

int32_t local_address(ept_instance *instance, void *blob, size_t *length) {
  const Address address = {kBlobVersion, instance->rank, instance->epoch, static_cast<uint32_t>(getpid()),
                           instance->port->id};
  return write_blob(address, "local_address", blob, length);
}

// With the switch's lock held. Finds who lives at `address`; *found stays empty if he has left.
int32_t look_up(ept_instance *instance, const Address &address, const char *operation, std::shared_ptr<Port> *found) {
  if (address.process != static_cast<uint32_t>(getpid())) {
    return fail(
        EPT_E_UNAVAILABLE, operation, address.rank,
        "loopback reaches ranks of one process; rank %u is in process %u, this is %u: use another backend, tcp for one",
        address.rank, address.process, static_cast<uint32_t>(getpid()));
  }
  const auto entry = instance->job->ports.find({address.rank, address.epoch});
  if (entry == instance->job->ports.end() || entry->second->id != address.port) return EPT_OK;
  if (entry->second->secret != instance->port->secret) {
    return fail(EPT_E_AUTH, operation, address.rank, "loopback %s: rank %u does not hold this job's secret", operation,
                address.rank);
  }
  *found = entry->second;
  return EPT_OK;
}

int32_t reach(ept_instance *instance, const void *bytes, size_t length, ept_reach *reach) {
  return guard("reach", [&] {
    ept_reach answer = {};
    Address address;
    std::shared_ptr<Port> port;
    int32_t code = read_blob(bytes, length, "reach", &address);
    if (code == EPT_OK) {
      std::lock_guard hold(the_switch().lock);
      code = look_up(instance, address, "reach", &port);
      if (code == EPT_OK && !port) {
        code = fail(EPT_E_PEER_LOST, "reach", address.rank, "loopback reach: rank %u, epoch %u of job `%s` has left",
                    address.rank, address.epoch, instance->job_name.c_str());
      }
    }
    if (code != EPT_OK) {
      snprintf(answer.why_not, sizeof answer.why_not, "%.255s", t_error.text);
    } else {
      answer.latency_ns = 300;
      answer.bytes_per_s = 10'000'000'000;
      answer.operation_cost_ns = kOperationCostNs;
      answer.mapped = instance->settings.mapped;
    }
    give(reach, answer);
    return code;
  });
}

// Nothing of this life is handed out any more but what is not its own doing.
void forget(ept_instance *instance, uint32_t rank, uint32_t epoch) {
  const auto of_it = [&](const ept_event &event) {
    return event.peer == rank && event.epoch == epoch && event.kind != EPT_EVENT_FENCED;
  };
  std::lock_guard hold(instance->port->lock);
  instance->port->arrived.remove(of_it);
  instance->port->waiting.store(static_cast<uint32_t>(instance->port->arrived.size()), std::memory_order_relaxed);
  if (instance->worker) instance->worker->taken.remove(of_it);
}

int32_t known(ept_instance *instance, uint32_t rank, const char *operation) {
  if (rank < instance->world && instance->peers[rank].link) return EPT_OK;
  return fail(EPT_E_INVALID, operation, rank, "loopback %s: rank %u of a world of %u is not open", operation, rank,
              instance->world);
}

int32_t peer_open(ept_instance *instance, uint32_t rank, uint32_t epoch, const void *bytes, size_t length) {
  return guard("peer_open", [&] {
    Address address;
    if (const int32_t code = read_blob(bytes, length, "peer_open", &address); code != EPT_OK) return code;
    if (rank >= instance->world || address.rank != rank || address.epoch != epoch) {
      return fail(EPT_E_INVALID, "peer_open", rank,
                  "loopback peer_open: rank %u, epoch %u in a world of %u; the address is of rank %u, epoch %u", rank,
                  epoch, instance->world, address.rank, address.epoch);
    }
    if (epoch < instance->fenced[rank]) {
      return fail(EPT_E_INVALID, "peer_open", rank, "loopback peer_open: epoch %u of rank %u was fenced", epoch, rank);
    }
    Job &job = *instance->job;
    Port &own = *instance->port;
    std::lock_guard hold(the_switch().lock);
    Peer &peer = instance->peers[rank];
    if (peer.link && peer.link->state != LinkState::kDown) {
      return fail(EPT_E_INVALID, "peer_open", rank, "loopback peer_open: rank %u is open already, with epoch %u", rank,
                  peer.epoch);
    }
    std::shared_ptr<Port> port;
    if (const int32_t code = look_up(instance, address, "peer_open", &port); code != EPT_OK) return code;
    if (peer.link) forget(instance, rank, peer.epoch);
    {
      std::lock_guard mine(own.lock);
      std::fill_n(own.consumed.begin() + static_cast<ptrdiff_t>(rank) * own.rails, own.rails, 0u);
    }
    if (!port) {  // he has left: the answer is a PEER event, as it would be had he left a moment later
      peer = {std::make_shared<Port>(0, rank, epoch, "", 0, 1), std::make_shared<Link>(), epoch};
      return sever(job, own, peer, true, "rank " + std::to_string(rank) + " is gone"), static_cast<int32_t>(EPT_OK);
    }
    const Job::Life here = {own.rank, own.epoch}, there = {rank, epoch};
    const auto call = job.calls.find({there, here});
    if (call != job.calls.end() || port == instance->port) {
      peer = {port, call != job.calls.end() ? call->second.link : std::make_shared<Link>(), epoch};
      greet(own, *port, *peer.link);
      if (call != job.calls.end()) job.calls.erase(call);
    } else {
      peer = {port, std::make_shared<Link>(), epoch};
      job.calls[{here, there}] = {peer.link, instance->port};
    }
    return static_cast<int32_t>(EPT_OK);
  });
}

int32_t peer_state(ept_instance *instance, uint32_t rank) {
  if (const int32_t code = known(instance, rank, "peer_state"); code != EPT_OK) return code;
  std::lock_guard hold(instance->port->lock);
  switch (const Link &link = *instance->peers[rank].link; link.state) {
    case LinkState::kUp:
      return EPT_OK;
    case LinkState::kConnecting:
      return EPT_LATER;
    default:
      return fail(EPT_E_PEER_LOST, "peer_state", rank, "rank %u: %s", rank, link.why.c_str());
  }
}

int32_t peer_close(ept_instance *instance, uint32_t rank) {
  return guard("peer_close", [&] {
    if (const int32_t code = known(instance, rank, "peer_close"); code != EPT_OK) return code;
    Peer &peer = instance->peers[rank];
    {
      std::lock_guard hold(the_switch().lock);
      sever(*instance->job, *instance->port, peer, false,
            "rank " + std::to_string(instance->rank) + " closed the peer");
    }
    forget(instance, rank, peer.epoch);
    if (instance->worker) instance->worker->route->drop(rank, "the peer was closed here");
    peer = {};
    return static_cast<int32_t>(EPT_OK);
  });
}

int32_t peer_fence(ept_instance *instance, uint32_t rank, uint32_t epoch, uint64_t cookie) {
  return guard("peer_fence", [&] {
    if (rank >= instance->world) {
      return fail(EPT_E_INVALID, "peer_fence", rank, "loopback peer_fence: rank %u of a world of %u", rank,
                  instance->world);
    }
    Port &own = *instance->port;
    Peer &peer = instance->peers[rank];
    instance->fenced[rank] = std::max(instance->fenced[rank], epoch + 1);
    if (peer.link && peer.epoch <= epoch) {
      std::lock_guard hold(the_switch().lock);
      sever(*instance->job, own, peer, false,
            "epoch " + std::to_string(peer.epoch) + " of rank " + std::to_string(rank) + " was fenced by rank " +
                std::to_string(instance->rank));
    }
    std::unique_lock hold(own.lock);
    for (uint32_t slot = 0; slot < own.exports.size(); ++slot) {
      if (own.exports[slot].rank == rank && own.exports[slot].epoch <= epoch) drain(own, hold, slot);
    }
    for (uint32_t rail = 0; rail < own.rails; ++rail) {
      Item &item = own.arrive();
      item.event = {};
      item.event.size = sizeof(ept_event);
      item.event.kind = EPT_EVENT_FENCED;
      item.event.peer = rank;
      item.event.epoch = epoch;
      item.event.rail = rail;
      item.event.immediate = own.consumed[size_t{rank} * own.rails + rail];
      item.event.cookie = cookie;
    }
    return static_cast<int32_t>(EPT_OK);
  });
}

// ---- memory and keys ------------------------------------------------------------------------------------------------

int32_t mem_register(ept_instance *instance, const ept_memory *memory, ept_mem **mem) {
  return guard("mem_register", [&] {
    const uint32_t kinds = EPT_MEMORY_HOST | EPT_MEMORY_PINNED | EPT_MEMORY_SHM;
    if (memory->kind <= 0 || !(static_cast<uint32_t>(memory->kind) & kinds)) {
      return fail(EPT_E_UNSUPPORTED, "mem_register", -1,
                  "loopback mem_register: memory of kind %d; HOST, PINNED and SHM can be copied to", memory->kind);
    }
    if (!memory->address && memory->length) {
      return fail(EPT_E_INVALID, "mem_register", -1, "loopback mem_register: %llu bytes without an address",
                  static_cast<unsigned long long>(memory->length));
    }
    *mem = new ept_mem{instance, *memory, {}};
    return static_cast<int32_t>(EPT_OK);
  });
}

struct Blob {
  uint32_t version, rank, slot;
  int32_t role;
  uint64_t length;
  Key key;
};

int32_t region_export(ept_mem *mem, uint32_t rank, uint64_t offset, uint64_t length, void *bytes, size_t *bytes_length,
                      uint64_t *name) {
  return guard("region_export", [&] {
    ept_instance *const instance = mem->instance;
    const bool self = rank == instance->rank;
    if (const int32_t code = self ? EPT_OK : known(instance, rank, "region_export"); code != EPT_OK) return code;
    const ept_memory &memory = mem->memory;
    if (!(memory.access & EPT_ACCESS_REMOTE_WRITE)) {
      return fail(EPT_E_ACCESS, "region_export", rank,
                  "loopback region_export: the memory was registered with access %u, without REMOTE_WRITE",
                  memory.access);
    }
    if (offset > memory.length || length > memory.length - offset) {
      return fail(EPT_E_INVALID, "region_export", rank, "loopback region_export: [%llu, +%llu) of %llu bytes",
                  static_cast<unsigned long long>(offset), static_cast<unsigned long long>(length),
                  static_cast<unsigned long long>(memory.length));
    }
    Blob blob = {kBlobVersion, instance->rank, 0, memory.role, length, {}};
    instance->host->random(instance->host->context, &blob.key, sizeof blob.key);
    mem->keys.reserve(mem->keys.size() + 1);

    Port &own = *instance->port;
    std::lock_guard hold(own.lock);
    if (own.unused.empty()) {
      if (own.exports.size() >= instance->settings.max_regions) {
        return fail(EPT_E_LIMIT, "region_export", rank, "loopback region_export: max_regions is %zu, all are in use",
                    own.exports.size());
      }
      own.unused.reserve(own.exports.size() + 1);  // so that a revoke needs no memory
      own.exports.emplace_back();
      own.unused.push_back(static_cast<uint32_t>(own.exports.size() - 1));
    }
    blob.slot = own.unused.back();
    if (const int32_t code = write_blob(blob, "region_export", bytes, bytes_length); code != EPT_OK) return code;
    own.unused.pop_back();
    Export &entry = own.exports[blob.slot];
    entry.base = static_cast<uint8_t *>(memory.address) + offset;
    entry.length = length;
    entry.key = blob.key;
    entry.rank = rank;
    entry.epoch = self ? instance->epoch : instance->peers[rank].epoch;
    entry.valid = true;
    *name = uint64_t{++entry.generation} << 32 | blob.slot;
    mem->keys.push_back(*name);
    return static_cast<int32_t>(EPT_OK);
  });
}

int32_t region_revoke(ept_mem *mem, uint32_t rank, uint64_t name) {
  return guard("region_revoke", [&] {
    Port &own = *mem->instance->port;
    const auto slot = static_cast<uint32_t>(name);
    const auto key = std::find(mem->keys.begin(), mem->keys.end(), name);
    std::unique_lock hold(own.lock);
    if (key == mem->keys.end() || own.exports[slot].rank != rank) {
      return fail(EPT_E_INVALID, "region_revoke", rank,
                  "loopback region_revoke: rank %u has no key %llx of this memory", rank,
                  static_cast<unsigned long long>(name));
    }
    own.exports[slot].valid = false;
    own.exports[slot].key = {};
    drain(own, hold, slot);
    std::erase_if(own.parcels, [&](const std::shared_ptr<Parcel> &parcel) {
      if (parcel->slot != slot) return false;
      if (parcel->link->state == LinkState::kUp) memcpy(parcel->destination, parcel->bytes.get(), parcel->length);
      return parcel->landed = true;
    });
    own.unused.push_back(slot);
    mem->keys.erase(key);
    return static_cast<int32_t>(EPT_OK);
  });
}

int32_t mem_deregister(ept_mem *mem) {
  return guard("mem_deregister", [&] {
    ept_instance *const instance = mem->instance;
    if (const size_t held = instance->worker ? instance->worker->route->reading(mem) : 0) {
      return fail(EPT_E_INVALID, "mem_deregister", -1, "loopback mem_deregister: %zu operations still read from it",
                  held);
    }
    while (!mem->keys.empty()) {
      const uint64_t name = mem->keys.back();
      region_revoke(mem, instance->port->exports[static_cast<uint32_t>(name)].rank, name);
    }
    delete mem;
    return static_cast<int32_t>(EPT_OK);
  });
}

int32_t region_import(ept_instance *instance, uint32_t rank, const void *bytes, size_t length, ept_region **region) {
  return guard("region_import", [&] {
    Blob blob;
    if (const int32_t code = read_blob(bytes, length, "region_import", &blob); code != EPT_OK) return code;
    if (blob.rank != rank || rank >= instance->world) {
      return fail(EPT_E_INVALID, "region_import", rank, "loopback region_import: the blob is of rank %u, not %u of %u",
                  blob.rank, rank, instance->world);
    }
    *region = new ept_region{instance, rank, blob.slot, blob.length, blob.key, blob.role};
    return static_cast<int32_t>(EPT_OK);
  });
}

void region_drop(ept_region *region) { delete region; }

// A pointer asks nobody: what was mapped stays writable after a revoke, so whoever maps must be trusted until it drops.
int32_t region_map(ept_region *region, void **address) {
  ept_instance *const instance = region->instance;
  if (!instance->settings.mapped) {
    return fail(EPT_E_UNSUPPORTED, "region_map", region->rank, "loopback region_map: the setting `mapped` is 0");
  }
  if (const int32_t code = known(instance, region->rank, "region_map"); code != EPT_OK) return code;
  const Peer &peer = instance->peers[region->rank];
  std::lock_guard hold(peer.port->lock);
  switch (check(*instance->port, peer, *region, 0, region->length)) {
    case Verdict::kLanded:
      *address = peer.port->exports[region->slot].base;
      return EPT_OK;
    case Verdict::kConnecting:
      return EPT_LATER;
    case Verdict::kLost:
      return fail(EPT_E_PEER_LOST, "region_map", region->rank, "loopback region_map: %s", peer.link->why.c_str());
    default:
      return fail(EPT_E_ACCESS, "region_map", region->rank,
                  "loopback region_map: rank %u revoked the key, or never gave it to this rank and epoch",
                  region->rank);
  }
}

// ---- operations -----------------------------------------------------------------------------------------------------

int32_t worker_open(ept_instance *instance, ept_worker **opened) {
  return guard("worker_open", [&] {
    if (instance->worker) {
      return fail(EPT_E_LIMIT, "worker_open", -1, "loopback worker_open: an instance has one worker in ABI %d",
                  EPT_BACKEND_ABI);
    }
    auto worker = std::make_unique<ept_worker>();
    worker->instance = instance;
    worker->in_flight.resize(instance->settings.rails);
    worker->counters.resize(instance->settings.rails);
    if (instance->settings.hostile) {
      worker->route = std::make_unique<Adversary>(*worker);
    } else {
      worker->route = std::make_unique<Straight>(*worker);
    }
    *opened = instance->worker = worker.release();
    return static_cast<int32_t>(EPT_OK);
  });
}

void worker_close(ept_worker *worker) {
  worker->instance->worker = nullptr;
  delete worker;
}

// Another thread may sleep on the descriptor: it has something to poll for now.
void wake_own(ept_worker &worker) {
  if (!worker.armed) return;
  Port &own = *worker.instance->port;
  std::lock_guard hold(own.lock);
  own.ring();
}

int32_t post(ept_worker *worker, const ept_op *ops, size_t count, size_t *posted) {
  *posted = 0;
  return guard("post", [&] {
    const int32_t code = worker->route->post(ops, count, posted);
    wake_own(*worker);
    if (code == EPT_LATER && ops[*posted].rail < worker->counters.size()) ++worker->counters[ops[*posted].rail].later;
    return code;
  });
}

// Hands out and counts.
size_t hand_out(ept_worker &worker, Queue &queue, ept_event *events, size_t capacity) {
  size_t n = 0;
  for (; n < capacity && !queue.empty(); queue.pop(), ++n) {
    Item &item = queue.front();
    events[n] = item.event;
    if (item.owned) worker.handed.push_back(std::move(item.owned));
    ept_rail_counters &counters = worker.counters[item.event.rail];
    switch (item.event.kind) {
      case EPT_EVENT_IMM:
        ++counters.rx_operations;
        counters.rx_bytes += item.event.length;
        break;
      case EPT_EVENT_RECV:
        ++counters.rx_sends;
        break;
      case EPT_EVENT_LOCAL_DONE:
      case EPT_EVENT_ERROR:
        --worker.in_flight[item.event.rail];
        break;
    }
  }
  return n;
}

void answer_quiesces(ept_worker &worker) {
  std::erase_if(worker.quiesces, [&](const ept_worker::Quiesce &quiesce) {
    if (!worker.route->settled(quiesce.rank, quiesce.scope)) return false;
    Item &item = worker.own.push();  // behind every LOCAL_DONE and ERROR that it waited for
    item.event = {};
    item.event.size = sizeof(ept_event);
    item.event.kind = EPT_EVENT_QUIESCED;
    item.event.peer = quiesce.rank;
    item.event.cookie = quiesce.cookie;
    return true;
  });
}

// Takes all arrivals at once, and tells those who found no room.
void take_arrivals(ept_worker &worker) {
  Port &own = *worker.instance->port;
  std::vector<std::shared_ptr<Port>> starved;
  {
    std::lock_guard hold(own.lock);
    own.arrived.swap(worker.taken);
    own.waiting.store(0, std::memory_order_relaxed);
    starved.swap(own.starved);
  }
  for (const std::shared_ptr<Port> &port : starved) {
    std::lock_guard hold(port->lock);
    port->relieved = true;
    port->ring();
  }
}

void disarm(ept_worker &worker) {
  Port &own = *worker.instance->port;
  std::lock_guard hold(own.lock);
  uint64_t count;
  if (own.rung && ::read(own.descriptor, &count, sizeof count) == sizeof count) own.rung = false;
  own.armed = worker.armed = false;
}

int32_t poll(ept_worker *worker, ept_event *events, size_t capacity) {
  return guard("poll", [&] {
    worker->handed.clear();
    if (worker->armed) disarm(*worker);
    worker->route->tick();
    if (!worker->quiesces.empty()) answer_quiesces(*worker);
    if (worker->taken.empty() && worker->instance->port->waiting.load(std::memory_order_relaxed))
      take_arrivals(*worker);
    // Neither side may starve the other: arrivals first, but half of the array at most while we have own events.
    const size_t own = worker->own.size();
    size_t n = hand_out(*worker, worker->taken, events, capacity - std::min(own, capacity / 2));
    n += hand_out(*worker, worker->own, events + n, capacity - n);
    return static_cast<int32_t>(n);
  });
}

int32_t arm(ept_worker *worker, int32_t *descriptor) {
  Port &own = *worker->instance->port;
  std::lock_guard hold(own.lock);
  if (own.descriptor < 0) {
    own.descriptor = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (own.descriptor < 0) {
      *descriptor = -1;
      const int32_t code = fail(EPT_E_NOMEM, "arm", -1, "loopback arm: eventfd: %s", strerror(errno));
      t_error.provider_errno = errno;
      return code;
    }
  }
  *descriptor = own.descriptor;
  const bool relieved = std::exchange(own.relieved, false);
  if (relieved || !own.arrived.empty() || !worker->taken.empty() || !worker->own.empty() || !worker->route->idle() ||
      !worker->quiesces.empty()) {
    return EPT_LATER;
  }
  own.armed = worker->armed = true;
  return EPT_OK;
}

int32_t quiesce(ept_worker *worker, uint32_t rank, int32_t scope, uint64_t cookie) {
  return guard("quiesce", [&] {
    if (rank != UINT32_MAX && rank >= worker->instance->world) {
      return fail(EPT_E_INVALID, "quiesce", rank, "loopback quiesce: rank %u of a world of %u", rank,
                  worker->instance->world);
    }
    worker->quiesces.push_back({rank, scope, cookie});
    wake_own(*worker);
    return static_cast<int32_t>(EPT_OK);
  });
}

int32_t counters(ept_worker *worker, uint32_t rail, ept_rail_counters *counters) {
  if (rail >= worker->counters.size()) {
    return fail(EPT_E_INVALID, "counters", -1, "loopback counters: rail %u of %zu", rail, worker->counters.size());
  }
  give(counters, worker->counters[rail]);
  return EPT_OK;
}

void last_error(ept_error *error) { give(error, t_error); }

}  // namespace

extern "C" {
extern const ept_backend ept_backend_v1;
const ept_backend ept_backend_v1 = {
    .size = sizeof(ept_backend),
    .abi = EPT_BACKEND_ABI,
    .name = "loopback",
    .version = "0.1.0",
    .settings = kSettings,
    .setting_count = std::size(kSettings),
    .probe = probe,
    .open = open,
    .close = close,
    .caps = caps,
    .rails = rails,
    .local_address = local_address,
    .reach = reach,
    .join = nullptr,  // nothing collective
    .peer_open = peer_open,
    .peer_state = peer_state,
    .peer_close = peer_close,
    .peer_fence = peer_fence,
    .worker_open = worker_open,
    .worker_close = worker_close,
    .mem_alloc = nullptr,  // any memory of the process will do
    .mem_free = nullptr,
    .mem_register = mem_register,
    .mem_deregister = mem_deregister,
    .region_export = region_export,
    .region_revoke = region_revoke,
    .region_import = region_import,
    .region_drop = region_drop,
    .region_map = region_map,
    .signal_export = nullptr,  // signals are made of immediates
    .signal_import = nullptr,
    .post = post,
    .poll = poll,
    .arm = arm,
    .visible = nullptr,  // host memory only
    .quiesce = quiesce,
    .device_open = nullptr,
    .device_peer = nullptr,
    .device_region = nullptr,
    .device_signal = nullptr,
    .device_image = nullptr,
    .device_module = nullptr,
    .query = nullptr,
    .counters = counters,
    .last_error = last_error,
};
}
