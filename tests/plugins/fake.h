// SPDX-License-Identifier: Apache-2.0
//
// fake.h: what the two fakes beside it share. Ranks of one process under one lock; operations land inside post. What
// makes each of them the network that it stands for is in its own file.
#pragma once

#include <eptransport/backend.h>

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

struct ept_mem {
  ept_instance *instance;
  ept_memory memory;
};

struct ept_region {
  ept_instance *instance;
  uint32_t rank;
  uint64_t offset, length;  // in the peer's memory, as the plugin numbers it
  bool signal;
};

namespace fake {
struct Arrival {
  ept_event event;
  std::shared_ptr<std::string> bytes;
};
}  // namespace fake

struct ept_worker {
  ept_instance *instance;
  std::vector<std::shared_ptr<std::string>> handed;
};

// A plugin adds its own fields by deriving from this and naming it ept_instance.
struct FakeInstance {
  const ept_host *host = nullptr;
  uint32_t rank = 0, world = 0, epoch = 0;
  std::string job;
  std::vector<int32_t> peers;  // EPT_E_CLOSED: not open; LATER, OK or PEER_LOST
  std::deque<fake::Arrival> events;
  ept_worker worker = {};
  ept_rail_counters counters = {};
};

namespace fake {

inline thread_local ept_error t_error;
inline std::mutex lock;  // guards every instance

[[gnu::format(printf, 3, 4)]] inline int32_t fail(int32_t code, const char *operation, const char *format, ...) {
  t_error = {};
  t_error.code = code;
  t_error.peer = -1;
  snprintf(t_error.operation, sizeof t_error.operation, "%s", operation);
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(t_error.text, sizeof t_error.text, format, arguments);
  va_end(arguments);
  return code;
}

template <class T>
void give(T *out, T value) {
  const uint32_t size = out->size;
  value.size = size;
  memset(out, 0, size);
  memcpy(out, &value, size < sizeof value ? size : sizeof value);
}

inline ept_event &push(FakeInstance &to, int32_t kind, uint32_t peer) {
  to.events.push_back({});
  ept_event &event = to.events.back().event;
  event.size = sizeof event;
  event.kind = kind;
  event.peer = peer;
  return event;
}

// ---- the entries that don't differ ----

inline int32_t rails(ept_rail *out, uint32_t capacity, uint32_t *count, const char *name, uint32_t world) {
  *count = 1;
  if (!capacity) return EPT_OK;
  *out = {};
  out->size = sizeof *out;
  snprintf(out->name, sizeof out->name, "%s", name);
  out->numa = -1;
  out->max_regions = 1 << 20;
  out->max_peers = world;
  out->cq_depth = 1 << 20;
  out->tx_depth = 1 << 10;
  return EPT_OK;
}

template <class Blob>
int32_t write_blob(const Blob &blob, const char *operation, void *out, size_t *length) {
  if (*length < sizeof blob) return fail(EPT_E_LIMIT, operation, "%zu bytes of room, not %zu", *length, sizeof blob);
  memcpy(out, &blob, *length = sizeof blob);
  return EPT_OK;
}

template <class Blob>
int32_t read_blob(const void *bytes, size_t length, const char *operation, Blob *blob) {
  if (length != sizeof *blob)
    return fail(EPT_E_INVALID, operation, "a blob of %zu bytes, not %zu", length, sizeof *blob);
  memcpy(blob, bytes, sizeof *blob);
  return blob->version == 1 ? EPT_OK : fail(EPT_E_VERSION, operation, "a blob of version %u", blob->version);
}

template <class Instance>
int32_t hand_out(Instance *instance, ept_event *events, size_t capacity) {
  std::lock_guard hold(lock);
  instance->worker.handed.clear();
  size_t n = 0;
  for (; n < capacity && !instance->events.empty(); ++n) {
    Arrival &arrival = instance->events.front();
    events[n] = arrival.event;
    if (arrival.bytes) instance->worker.handed.push_back(std::move(arrival.bytes));
    instance->events.pop_front();
    instance->counters.rx_sends += events[n].kind == EPT_EVENT_RECV;
    if (events[n].kind == EPT_EVENT_IMM) {
      ++instance->counters.rx_operations;
      instance->counters.rx_bytes += events[n].length;
    }
  }
  return static_cast<int32_t>(n);
}

inline int32_t never_sleep(ept_worker *, int32_t *descriptor) {
  *descriptor = -1;
  return EPT_OK;
}

inline void last_error(ept_error *error) { give(error, t_error); }

}  // namespace fake
