// SPDX-License-Identifier: Apache-2.0
//
// table.h: the table's entries that have files of their own. backend.h says what each does.
#pragma once

#include "instance.h"

namespace loopback {

// peers.cc
int32_t local_address(ept_instance *instance, void *blob, size_t *length);
int32_t reach(ept_instance *instance, const void *bytes, size_t length, ept_reach *reach);
int32_t peer_open(ept_instance *instance, uint32_t rank, uint32_t epoch, const void *bytes, size_t length);
int32_t peer_state(ept_instance *instance, uint32_t rank);
int32_t peer_close(ept_instance *instance, uint32_t rank);
int32_t peer_fence(ept_instance *instance, uint32_t rank, uint32_t epoch, uint64_t cookie);

// memory.cc
int32_t mem_register(ept_instance *instance, const ept_memory *memory, ept_mem **mem);
int32_t mem_deregister(ept_mem *mem);
int32_t region_export(ept_mem *mem, uint32_t rank, uint64_t offset, uint64_t length, void *bytes, size_t *bytes_length,
                      uint64_t *name);
int32_t region_revoke(ept_mem *mem, uint32_t rank, uint64_t name);
int32_t region_import(ept_instance *instance, uint32_t rank, const void *bytes, size_t length, ept_region **region);
void region_drop(ept_region *region);
int32_t region_map(ept_region *region, void **address);

// worker.cc
int32_t worker_open(ept_instance *instance, ept_worker **opened);
void worker_close(ept_worker *worker);
int32_t post(ept_worker *worker, const ept_op *ops, size_t count, size_t *posted);
int32_t poll(ept_worker *worker, ept_event *events, size_t capacity);
int32_t arm(ept_worker *worker, int32_t *descriptor);
int32_t quiesce(ept_worker *worker, uint32_t rank, int32_t scope, uint64_t cookie);
int32_t counters(ept_worker *worker, uint32_t rail, ept_rail_counters *counters);

}  // namespace loopback
