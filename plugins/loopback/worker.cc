// SPDX-License-Identifier: Apache-2.0
//
// worker.cc: post, poll, arm, quiesce.
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "route.h"
#include "table.h"

namespace loopback {

namespace {

// Another thread may sleep on the descriptor: it has something to poll for now.
void wake_own(ept_worker &worker) {
  if (!worker.armed) return;
  Port &own = *worker.instance->port;
  std::lock_guard hold(own.lock);
  own.ring();
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

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// `waiting` is seen while who posted still holds the lock, and that for a fraction of a microsecond. To sleep on it and
// be woken would take ten.
constexpr int kLooks = 64;

// Takes all arrivals at once, and tells those who found no room.
void take_arrivals(ept_worker &worker) {
  Port &own = *worker.instance->port;
  std::vector<std::shared_ptr<Port>> starved;
  __builtin_prefetch(&own.room, 1);
  {
    std::unique_lock hold(own.lock, std::try_to_lock);
    for (int look = 0; look < kLooks && !hold; look++) relax(), (void)hold.try_lock();
    if (!hold) hold.lock();
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

}  // namespace

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
    worker->route = instance->settings.hostile ? make_adversary(*worker) : make_straight(*worker);
    *opened = instance->worker = worker.release();
    return static_cast<int32_t>(EPT_OK);
  });
}

void worker_close(ept_worker *worker) {
  worker->instance->worker = nullptr;
  delete worker;
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
      threads_error().provider_errno = errno;
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

}  // namespace loopback
