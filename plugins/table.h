// SPDX-License-Identifier: Apache-2.0
//
// table.h: the entries of a backend's table that are methods of its instance, each behind the edge that no exception
// crosses. A plugin writes `.peer_open = Calls::peer_open` where its ept_instance has a method of that name:
//
//     static constexpr const char *kNetwork      the plugin's name, for its sentences
//     bool worker_is_open; ept_worker worker;    its one worker, which has `instance`; abandon() ends what is under way
//     ept_mem::owner                             the instance that registered it
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>

#include "plugin.h"

namespace plugin {

// Templates, so that the plugin's structs need be whole only where its table is made.
template <class Instance, class Mem, class Worker>
struct Calls {
  template <typename Call>
  static int32_t guarded(const char *operation, Call &&call) {
    return plugin::guarded(Instance::kNetwork, operation, std::forward<Call>(call));
  }

  static int32_t peer_open(Instance *instance, uint32_t rank, uint32_t epoch, const void *address, size_t length) {
    return guarded("peer_open", [&] { return instance->peer_open(rank, epoch, address, length); });
  }
  static int32_t peer_state(Instance *instance, uint32_t rank) {
    return guarded("peer_state", [&] { return instance->peer_state(rank); });
  }
  static int32_t peer_close(Instance *instance, uint32_t rank) {
    return guarded("peer_close", [&] { return instance->peer_close(rank); });
  }
  static int32_t peer_fence(Instance *instance, uint32_t rank, uint32_t epoch, uint64_t cookie) {
    return guarded("peer_fence", [&] { return instance->peer_fence(rank, epoch, cookie); });
  }

  static int32_t worker_open(Instance *instance, Worker **worker) {
    if (instance->worker_is_open)
      return fail(EPT_E_LIMIT, "worker_open", -1, 0, "%s: an instance has one worker, and it is open",
                  Instance::kNetwork);
    instance->worker_is_open = true;
    *worker = &instance->worker;
    return EPT_OK;
  }
  // Nothing moves without a worker: what is under way ends here, and nobody will read from its sources again.
  static void worker_close(Worker *worker) {
    worker->instance->worker_is_open = false;
    worker->instance->abandon();
  }

  static int32_t mem_register(Instance *instance, const ept_memory *memory, Mem **result) {
    *result = nullptr;
    return guarded("mem_register", [&] { return instance->mem_register(memory, result); });
  }
  static int32_t mem_deregister(Mem *mem) {
    return guarded("mem_deregister", [&] { return mem->owner->mem_deregister(mem); });
  }
  static int32_t region_export(Mem *mem, uint32_t rank, uint64_t offset, uint64_t length, void *blob,
                               size_t *blob_length, uint64_t *key) {
    return guarded("region_export",
                   [&] { return mem->owner->region_export(mem, rank, offset, length, blob, blob_length, key); });
  }
  static int32_t region_revoke(Mem *mem, uint32_t rank, uint64_t key) {
    return guarded("region_revoke", [&] { return mem->owner->region_revoke(mem, rank, key); });
  }
  static int32_t region_import(Instance *instance, uint32_t rank, const void *blob, size_t length,
                               ept_region **result) {
    *result = nullptr;
    return guarded("region_import", [&] { return instance->region_import(rank, blob, length, result); });
  }

  static int32_t post(Worker *worker, const ept_op *ops, size_t count, size_t *posted) {
    *posted = 0;
    return guarded("post", [&] { return worker->instance->post(ops, count, posted); });
  }
  static int32_t poll(Worker *worker, ept_event *events, size_t capacity) {
    return guarded("poll", [&] { return worker->instance->poll(events, capacity); });
  }
  static int32_t arm(Worker *worker, int32_t *descriptor) {
    return guarded("arm", [&] { return worker->instance->arm(descriptor); });
  }
  // Of a plugin that has it.
  static int32_t visible(Worker *worker, uint32_t rank, uint64_t cookie) {
    return guarded("visible", [&] { return worker->instance->visible(rank, cookie); });
  }
  static int32_t quiesce(Worker *worker, uint32_t rank, int32_t scope, uint64_t cookie) {
    return guarded("quiesce", [&] { return worker->instance->quiesce(rank, scope, cookie); });
  }

  // Of a plugin that counts in `strangers` who came without the job's secret, and has no other feature.
  static int32_t query(Instance *instance, const char *feature, int64_t *value) {
    if (strcmp(feature, "strangers") != 0)
      return fail(EPT_E_UNSUPPORTED, "query", -1, 0, "%s: there is no feature '%s'", Instance::kNetwork, feature);
    *value = static_cast<int64_t>(instance->strangers.load(std::memory_order_relaxed));
    return EPT_OK;
  }

  static void last_error(ept_error *error) {
    const uint32_t size = error->size;
    *error = plugin::last_error();
    error->size = size;
  }
};

// The caller's struct may be older and shorter than ours, or newer and longer.
inline int32_t give_counters(const ept_rail_counters &own, ept_rail_counters *counters) {
  const uint32_t size = counters->size;
  memset(counters, 0, size);
  memcpy(counters, &own, std::min<size_t>(size, sizeof own));
  counters->size = size;
  return EPT_OK;
}

// `bytes` into the caller's blob, or the sentence that it has no room.
inline int32_t give_blob(const char *network, const char *operation, const void *bytes, size_t size, void *blob,
                         size_t *length) {
  if (*length < size)
    return fail(EPT_E_INVALID, operation, -1, 0, "%s: the blob needs %zu bytes, there is room for %zu", network, size,
                *length);
  memcpy(blob, bytes, size);
  *length = size;
  return EPT_OK;
}

}  // namespace plugin
