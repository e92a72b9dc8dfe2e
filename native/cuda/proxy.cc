// SPDX-License-Identifier: Apache-2.0
#include "cuda/proxy.h"

#include <sched.h>
#include <time.h>

#include <algorithm>
#include <cstring>

#include "engine/error.h"
#include "engine/host.h"
#include "engine/news.h"

namespace ept::cuda {

namespace {

// Commands taken before the network is looked at again; past it a long burst would keep arrivals waiting.
constexpr int kBatch = 64;
constexpr uint64_t kPeersEvery = 1'000'000;  // ns between two looks at who is lost
constexpr uint64_t kClosing = 1'000'000'000;
// A yield is a call of the kernel, microseconds on some machines, while a command may come at any time; never to yield
// would take a core from the engine's thread where there are few.
constexpr uint64_t kYieldEvery = 20'000;
// Idle turns between two looks at the clock and all that goes by it: a turn takes some 60 ns, reading the clock 20
// to 45.
constexpr uint32_t kLookTurns = 16;
constexpr uint64_t kComesBack = 6'000'000;  // more than the engine's thread takes to see that nobody drives

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

template <class Id>
void set(std::vector<Id> &table, uint32_t number, Id id) {
  if (table.size() <= number) table.resize(size_t(number) + 1);
  table[number] = id;
}

template <class Id>
Id get(const std::vector<Id> &table, uint32_t number) {
  return number < table.size() ? table[number] : 0;
}

}  // namespace

RingPlace RingPlace::in(void *pinned, uint64_t pinned_device, uint64_t ring_device, uint32_t capacity) {
  RingPlace place;
  auto *at = static_cast<char *>(pinned);
  const uint64_t slots = uint64_t(capacity) * sizeof(ept_command_slot);
  place.capacity = capacity;
  place.slots = reinterpret_cast<ept_command_slot *>(at);
  place.consumed = reinterpret_cast<uint64_t *>(at + slots);  // a cache line of its own
  place.progress = reinterpret_cast<ept_device_progress *>(at + slots + 64);
  place.slots_device = pinned_device;
  place.consumed_device = pinned_device + slots;
  place.progress_device = pinned_device + slots + 64;
  place.ring_device = ring_device;
  return place;
}

Proxy::Proxy(ept_engine *engine, const RingPlace &place, Options options)
    : engine_(engine), place_(place), options_(std::move(options)) {
  ept_engine_info info{};
  info.size = sizeof info;
  ept_engine_info_get(engine_, &info, nullptr);
  world_ = info.world;
  rank_ = info.rank;
  drives_ = info.proxy_threads == 0;
  header_.slots = place_.slots_device;
  header_.consumed = place_.consumed_device;
  header_.mask = place_.capacity - 1;
  end_ = device::begin_ring(header_, place_.slots, place_.consumed, options_.first);
  peers_.resize(world_);
  for (uint32_t r = 0; r < world_; r++) {
    place_.progress[r] = {};
    place_.progress[r].done = options_.first;
  }
  // As many as commands can be in hand, so a value never waits for a slot.
  values_.resize(place_.capacity);
  for (uint32_t i = place_.capacity; i-- > 0;) free_values_.push_back(i);
}

int32_t Proxy::start(ept_error *error) {
  ept_memory memory{};
  memory.size = sizeof memory;
  memory.kind = EPT_MEMORY_HOST;
  memory.address = values_.data();
  memory.length = values_.size() * sizeof(uint64_t);
  memory.fd = -1;
  memory.role = EPT_ROLE_DATA;
  memory.access = EPT_ACCESS_LOCAL;
  if (int32_t code = ept_memory_register(engine_, &memory, &values_id_, error)) return code;
  thread_ = std::thread(&Proxy::run, this);
  return EPT_OK;
}

Proxy::~Proxy() {
  stop_ = true;
  if (thread_.joinable()) thread_.join();
  if (values_id_) ept_memory_deregister(engine_, values_id_, nullptr);
}

void Proxy::set_memory(uint32_t number, ept_memory_id id) {
  std::lock_guard hold(mutex_);
  set(memories_, number, id);
}

void Proxy::set_region(uint32_t peer, uint32_t number, ept_region_id id) {
  std::lock_guard hold(mutex_);
  set(peers_[peer].regions, number, id);
}

void Proxy::set_signal(uint32_t peer, uint32_t number, ept_remote_signal_id id) {
  std::lock_guard hold(mutex_);
  set(peers_[peer].signals, number, id);
}

ept_path Proxy::path(uint32_t peer, uint32_t memory, uint64_t source, uint64_t source_bytes, uint32_t region,
                     uint64_t region_bytes, uint32_t first_signal, uint32_t signals) const {
  ept_path path{};
  path.kind = EPT_DEVICE_PROXY;
  path.peer = peer;
  path.memory = memory;
  path.region = region;
  path.source = source;
  path.source_bytes = source_bytes;
  path.window_bytes = region_bytes;
  path.signals = first_signal;
  path.signal_count = signals;
  path.ring = place_.ring_device;
  path.progress = place_.progress_device + peer * sizeof(ept_device_progress);
  return path;
}

void Proxy::end_waits(uint32_t peer, int32_t code) {
  std::lock_guard hold(mutex_);
  if (!peers_[peer].status)
    std::atomic_ref<int32_t>(place_.progress[peer].status).store(code, std::memory_order_release);
}

void Proxy::reopen(uint32_t peer) {
  std::lock_guard hold(mutex_);
  peers_[peer].status = 0;
  clear(&peers_[peer].why);
  std::atomic_ref<int32_t>(place_.progress[peer].status).store(0, std::memory_order_release);
}

int32_t Proxy::failure(uint32_t peer, ept_error *error) const {
  std::lock_guard hold(mutex_);
  const ept_error &why = peer < world_ ? peers_[peer].why : first_;
  if (why.code == EPT_OK) return EPT_LATER;
  if (error) *error = why;
  return EPT_OK;
}

Proxy::Counts Proxy::counts() const {
  std::lock_guard hold(mutex_);
  return counts_;
}

uint64_t Proxy::raised(uint32_t peer, uint32_t number) const {
  std::lock_guard hold(mutex_);
  return get(peers_[peer].raised, number);
}

bool Proxy::quiesce(uint64_t deadline_ns) const {
  while (true) {
    {
      std::lock_guard hold(mutex_);
      if (!in_hand_ && !device::ready(end_)) return true;
    }
    if (now_ns() > deadline_ns) return false;
    const timespec nap{0, 20'000};
    nanosleep(&nap, nullptr);
  }
}

void Proxy::fail_peer(uint32_t rank, const ept_error &why) {
  Peer &peer = peers_[rank];
  if (peer.status) return;
  peer.status = why.code;
  peer.why = why;
  if (first_.code == EPT_OK) first_ = why;
  std::atomic_ref<int32_t>(place_.progress[rank].status).store(why.code, std::memory_order_release);
}

// Off the ring, into the queue of its peer.
bool Proxy::take() {
  bool any = false;
  for (int i = 0; i < kBatch && in_hand_ < place_.capacity; i++) {
    Held held;
    if (!device::pop(end_, held.command)) break;
    any = true;
    counts_.commands++;
    if (held.command.peer >= world_) {
      // No path of ours says so; the kernel's table is broken, and nobody waits for its end by name.
      ept_error why{};
      fail(&why, EPT_E_INVALID, "proxy", -1, "a kernel pushed a command for rank %u of a world of %u",
           held.command.peer, world_);
      if (first_.code == EPT_OK) first_ = why;
      counts_.failed++;
      continue;
    }
    in_hand_++;
    peers_[held.command.peer].held.push_back(held);
  }
  return any;
}

int32_t Proxy::write(uint32_t rank, Held &held, ept_error *error) {
  const ept_command &c = held.command;
  const Peer &peer = peers_[rank];
  ept_write write{};
  write.size = sizeof write;
  write.peer = rank;
  write.length = c.bytes;
  if (c.kind == EPT_COMMAND_VALUE) {
    if (held.value == UINT32_MAX) {
      held.value = free_values_.back();
      free_values_.pop_back();
      values_[held.value] = c.source;
    }
    write.source = values_id_;
    write.source_offset = held.value * sizeof(uint64_t);
  } else if (c.kind == EPT_COMMAND_PUT) {
    write.source = get(memories_, c.memory);
    write.source_offset = c.source;
  } else {
    return fail(error, EPT_E_INVALID, "proxy", int32_t(rank), "a kernel pushed a command of the unknown kind %u",
                c.kind);
  }
  write.destination = get(peer.regions, c.region);
  write.destination_offset = c.destination;
  if (c.signal != EPT_NO_SIGNAL) {
    write.signal = get(peer.signals, c.signal);
    if (!write.signal) {
      return fail(error, EPT_E_INVALID, "proxy", int32_t(rank),
                  "a kernel raised signal %u of rank %u, which is not set", c.signal, rank);
    }
  }
  return ept_engine_write(engine_, &write, &held.transfer, error);
}

bool Proxy::post(uint32_t rank) {
  Peer &peer = peers_[rank];
  bool any = false;
  for (; peer.posted < peer.held.size(); peer.posted++) {
    Held &held = peer.held[peer.posted];
    if (!peer.status) {
      ept_error why;  // filled where it fails, and only there: a kilobyte of zeros for each command otherwise
      why.size = sizeof why;
      const int32_t code = write(rank, held, &why);
      if (code == EPT_LATER) {
        counts_.later++;
        return any;
      }
      if (code == EPT_OK) held.posted = true;
      if (code < 0) {
        why.code = code;
        fail_peer(rank, why);
      }
    }
    if (!held.posted) held.ended = true, counts_.failed++;
    any = true;
  }
  return any;
}

bool Proxy::end(uint32_t rank) {
  Peer &peer = peers_[rank];
  bool any = false;
  uint64_t done = 0;
  while (peer.posted) {
    Held &held = peer.held.front();
    if (!held.ended) {
      const int32_t code = ept_transfer_wait(engine_, held.transfer, 0, nullptr);
      if (code == EPT_E_TIMEOUT || code == EPT_LATER) break;
      if (code < 0) {
        counts_.failed++;
        ept_error why{};
        ept_peer_info info{};
        info.size = sizeof info;
        ept_engine_peer(engine_, rank, &info, nullptr);
        fail(&why, code, "proxy", int32_t(rank), "a put of %llu bytes from a GPU of rank %u to rank %u failed%s%s",
             static_cast<unsigned long long>(held.command.bytes), rank_, rank, info.why[0] ? ": " : "", info.why);
        fail_peer(rank, why);
      } else if (held.posted && held.command.signal != EPT_NO_SIGNAL) {
        set(peer.raised, held.command.signal, get(peer.raised, held.command.signal) + 1);
      }
    }
    if (held.value != UINT32_MAX) free_values_.push_back(held.value);
    done = held.command.ticket + 1;
    peer.held.pop_front();
    peer.posted--;
    in_hand_--;
    any = true;
  }
  // Release: who sees it may write where the network has read (device.cuh, 4).
  if (any) device::Hardware::release_system(&place_.progress[rank].done, done);
  return any;
}

void Proxy::look_at_peers() {
  for (uint32_t r = 0; r < world_; r++) {
    if (r == rank_ || peers_[r].status) continue;
    ept_peer_info info{};
    info.size = sizeof info;
    if (ept_engine_peer(engine_, r, &info, nullptr) != EPT_OK) continue;
    const bool left = info.status == EPT_PEER_LEFT && options_.left_ends;
    if (info.status != EPT_PEER_LOST && info.status != EPT_PEER_MASKED && !left) continue;
    ept_error why{};
    fail(&why, EPT_E_PEER_LOST, "proxy", int32_t(r), "rank %u %s: %s", r,
         info.status == EPT_PEER_LOST   ? "is lost"
         : info.status == EPT_PEER_LEFT ? "has left"
                                        : "is masked",
         info.why);
    fail_peer(r, why);
  }
}

void Proxy::run() {
  if (!options_.cpus.empty()) {
    cpu_set_t set;
    CPU_ZERO(&set);
    for (int32_t cpu : options_.cpus) CPU_SET(size_t(cpu), &set);
    (void)sched_setaffinity(0, sizeof set, &set);  // a wrong set costs speed, not work
  }
  uint64_t now = now_ns(), moved = now, yielded = now, looked = 0, closing = 0;
  uint32_t turn = 0;  // since something came, or since it slept
  while (true) {
    const bool looks = turn++ % kLookTurns == 0;
    if (looks) now = now_ns();
    bool any = false;
    if (looks || in_hand_ || device::ready(end_)) {
      std::lock_guard hold(mutex_);
      if (stop_ && !closing) {
        closing = now;
        ept_error why{};
        fail(&why, EPT_E_CLOSED, "proxy", -1, "the proxy of rank %u was closed", rank_);
        for (uint32_t r = 0; r < world_; r++) fail_peer(r, why);
      }
      any |= take();
      for (uint32_t r = 0; r < world_; r++) {
        if (peers_[r].held.empty()) continue;
        any |= post(r);
        any |= end(r);
      }
      if (now - looked > kPeersEvery) looked = now, look_at_peers();
    }
    if (looks && options_.each) options_.each();
    // While it spins it drives, and the engine's own thread stands aside: that one sleeps whenever nobody waits on the
    // host, and a kernel's wait it doesn't see. For a while after, until that thread has come back, it helps.
    if (now < moved + options_.spin_ns) {
      any |= drive(engine_, looks, nullptr) > 0;
    } else if (drives_ || now < moved + options_.spin_ns + kComesBack) {
      any |= ept_engine_progress(engine_, nullptr) > 0;
    }
    if (closing && (!in_hand_ || now - closing > kClosing)) return;
    if (any) {
      moved = yielded = now;
      turn = 0;
      continue;
    }
    if (!looks) {
      relax();
      continue;
    }
    moved = std::max(moved, last_arrival(engine_));
    if (!in_hand_ && now > moved + options_.spin_ns) {
      {
        std::lock_guard hold(mutex_);
        counts_.naps++;
      }
      timespec nap{0, long(options_.nap_ns)};
      nanosleep(&nap, nullptr);
      turn = 0;
    } else if (now > yielded + kYieldEvery) {
      sched_yield();
      yielded = now;
    }
  }
}

}  // namespace ept::cuda
