// SPDX-License-Identifier: Apache-2.0
//
// mapped.cc: what CUDA IPC asks of the ABI, on host memory. Each rank finds its peers' memory in its own address space,
// and whoever writes raises the signal by itself, with an atomic add behind its stores: there is nothing to poll at the
// target. What is posted all the same (a host's small writes) gives an IMM event as anywhere. A pointer can't be taken
// back: rule 11 is waived, and region_revoke says that the mapping lives on.
#include "../fake.h"

struct ept_instance : FakeInstance {};

namespace {

using fake::fail;
using fake::lock;

std::map<std::pair<std::string, uint32_t>, ept_instance *> everyone;  // job and rank; under the lock

ept_caps capabilities() {
  ept_caps caps = {};
  caps.memory_kinds = EPT_MEMORY_HOST;
  caps.max_message = UINT64_MAX;
  caps.max_send = 4096;
  caps.max_iov = 1;
  caps.immediate_bits = 32;
  caps.protection = EPT_PROTECTION_REGION;
  caps.passive_progress = 1;
  caps.mapped = 1;
  caps.operation_cost_ns = 50;
  caps.waived = 1u << 11 | 1u << 12;
  caps.waived_why = "a peer that mapped memory can write to it until its process ends";
  return caps;
}

int32_t probe(const ept_host *, const ept_value *, size_t, ept_probe *report) {
  ept_probe found = {};
  found.caps = capabilities();
  found.caps.size = sizeof found.caps;
  snprintf(found.summary, sizeof found.summary, "peers of this process, mapped");
  fake::give(report, found);
  return EPT_OK;
}

int32_t open(const ept_host *host, const ept_open_params *params, ept_instance **opened) {
  auto instance = std::make_unique<ept_instance>();
  instance->host = host;
  instance->rank = params->rank;
  instance->world = params->world;
  instance->epoch = params->epoch;
  instance->job = params->job;
  instance->peers.assign(params->world, EPT_E_CLOSED);
  instance->worker.instance = instance.get();
  std::lock_guard hold(lock);
  everyone[{instance->job, instance->rank}] = instance.get();
  *opened = instance.release();
  return EPT_OK;
}

void close(ept_instance *instance) {
  std::lock_guard hold(lock);
  everyone.erase({instance->job, instance->rank});
  for (const auto &[name, other] : everyone) {
    if (name.first != instance->job || other->peers.at(instance->rank) == EPT_E_CLOSED) continue;
    other->peers[instance->rank] = EPT_E_PEER_LOST;
    fake::push(*other, EPT_EVENT_PEER, instance->rank).code = EPT_E_PEER_LOST;
  }
  delete instance;
}

int32_t caps(ept_instance *, ept_caps *out) {
  fake::give(out, capabilities());
  return EPT_OK;
}

int32_t rails(ept_instance *instance, ept_rail *out, uint32_t capacity, uint32_t *count) {
  return fake::rails(out, capacity, count, "mapped", instance->world);
}

struct Address {
  uint32_t version, rank;
};

int32_t local_address(ept_instance *instance, void *blob, size_t *length) {
  return fake::write_blob(Address{1, instance->rank}, "local_address", blob, length);
}

int32_t reach(ept_instance *instance, const void *bytes, size_t length, ept_reach *out) {
  ept_reach reach = {};
  Address address;
  int32_t code = fake::read_blob(bytes, length, "reach", &address);
  std::lock_guard hold(lock);
  if (code == EPT_OK && !everyone.count({instance->job, address.rank})) {
    code = fail(EPT_E_PEER_LOST, "reach", "rank %u is not in this process", address.rank);
  }
  if (code != EPT_OK) snprintf(reach.why_not, sizeof reach.why_not, "%.255s", fake::t_error.text);
  reach.latency_ns = 100;
  reach.mapped = code == EPT_OK;
  fake::give(out, reach);
  return code;
}

int32_t peer_open(ept_instance *instance, uint32_t rank, uint32_t, const void *, size_t) {
  if (rank >= instance->world) return fail(EPT_E_INVALID, "peer_open", "rank %u of %u", rank, instance->world);
  std::lock_guard hold(lock);
  const bool here = everyone.count({instance->job, rank});
  instance->peers[rank] = here ? EPT_OK : EPT_E_PEER_LOST;
  fake::push(*instance, EPT_EVENT_PEER, rank).code = instance->peers[rank];
  return EPT_OK;
}

int32_t peer_state(ept_instance *instance, uint32_t rank) {
  std::lock_guard hold(lock);
  return instance->peers.at(rank);
}

int32_t peer_close(ept_instance *instance, uint32_t rank) {
  std::lock_guard hold(lock);
  instance->peers.at(rank) = EPT_E_CLOSED;
  return EPT_OK;
}

int32_t peer_fence(ept_instance *, uint32_t rank, uint32_t, uint64_t) {
  return fail(EPT_E_STUCK, "peer_fence", "rank %u has our memory mapped: end its process", rank);
}

int32_t worker_open(ept_instance *instance, ept_worker **worker) {
  *worker = &instance->worker;
  return EPT_OK;
}

void worker_close(ept_worker *) {}

int32_t mem_register(ept_instance *instance, const ept_memory *memory, ept_mem **mem) {
  *mem = new ept_mem{instance, *memory};
  return EPT_OK;
}

int32_t mem_deregister(ept_mem *mem) {
  delete mem;
  return EPT_OK;
}

// A handle: with CUDA, cudaIpcMemHandle_t and an offset; here the address does.
struct Blob {
  uint32_t version, rank;
  uint64_t address, length;
  uint32_t signal, reserved;
};

int32_t export_any(ept_mem *mem, uint64_t offset, uint64_t length, bool signal, void *blob, size_t *blob_length) {
  if (!(mem->memory.access & EPT_ACCESS_REMOTE_WRITE)) return fail(EPT_E_ACCESS, "export", "no right to write");
  if (offset > mem->memory.length || length > mem->memory.length - offset || (signal && offset % 8)) {
    return fail(EPT_E_INVALID, "export", "no such range");
  }
  const uint64_t address = reinterpret_cast<uint64_t>(mem->memory.address) + offset;
  return fake::write_blob(Blob{1, mem->instance->rank, address, length, signal, 0}, "export", blob, blob_length);
}

int32_t region_export(ept_mem *mem, uint32_t, uint64_t offset, uint64_t length, void *blob, size_t *blob_length,
                      uint64_t *key) {
  *key = 0;
  return export_any(mem, offset, length, false, blob, blob_length);
}

int32_t region_revoke(ept_mem *, uint32_t rank, uint64_t) {
  return fail(EPT_E_UNSUPPORTED, "region_revoke", "rank %u keeps its mapping until its process ends", rank);
}

int32_t signal_export(ept_mem *mem, uint32_t, uint64_t offset, void *blob, size_t *blob_length) {
  return export_any(mem, offset, 8, true, blob, blob_length);
}

int32_t import_any(ept_instance *instance, uint32_t rank, const void *bytes, size_t length, bool signal,
                   ept_region **region) {
  Blob blob;
  const int32_t code = fake::read_blob(bytes, length, "import", &blob);
  if (code != EPT_OK) return code;
  if (blob.rank != rank || (blob.signal != 0) != signal)
    return fail(EPT_E_INVALID, "import", "a blob of another thing");
  *region = new ept_region{instance, rank, blob.address, blob.length, signal};
  return EPT_OK;
}

int32_t region_import(ept_instance *instance, uint32_t rank, const void *bytes, size_t length, ept_region **region) {
  return import_any(instance, rank, bytes, length, false, region);
}

int32_t signal_import(ept_instance *instance, uint32_t rank, const void *bytes, size_t length, ept_region **region) {
  return import_any(instance, rank, bytes, length, true, region);
}

void region_drop(ept_region *region) { delete region; }

int32_t region_map(ept_region *region, void **address) {
  *address = reinterpret_cast<void *>(region->offset);
  return EPT_OK;
}

int32_t post(ept_worker *worker, const ept_op *ops, size_t count, size_t *posted) {
  ept_instance *const self = worker->instance;
  std::lock_guard hold(lock);
  for (*posted = 0; *posted < count; ++*posted) {
    const ept_op &op = ops[*posted];
    if (op.peer >= self->world || self->peers[op.peer] == EPT_E_CLOSED)
      return fail(EPT_E_INVALID, "post", "no such peer");
    int32_t code = self->peers[op.peer];
    const uint64_t length = op.kind == EPT_OP_WRITE ? op.length : op.kind == EPT_OP_SIGNAL && op.region->signal ? 8 : 0;
    if (code == EPT_OK && op.region && (op.offset > op.region->length || length > op.region->length - op.offset)) {
      code = EPT_E_ACCESS;
    }
    if (code == EPT_OK) {
      ept_instance &target = *everyone.at({self->job, op.peer});
      void *const at = op.region ? reinterpret_cast<char *>(op.region->offset) + op.offset : nullptr;
      if (op.kind == EPT_OP_WRITE && op.length) memcpy(at, op.source, op.length);
      if (op.kind == EPT_OP_SIGNAL && op.region->signal) {
        __atomic_fetch_add(static_cast<uint64_t *>(at), 1, __ATOMIC_RELEASE);
      } else {
        ept_event &event = fake::push(target, op.kind == EPT_OP_SEND ? EPT_EVENT_RECV : EPT_EVENT_IMM, self->rank);
        event.immediate = op.immediate;
        event.length = op.kind == EPT_OP_SIGNAL ? 0 : op.length;
        if (op.kind == EPT_OP_SEND) {
          auto bytes = std::make_shared<std::string>(static_cast<const char *>(op.source), op.length);
          event.data = bytes->data();
          target.events.back().bytes = std::move(bytes);
        }
      }
    }
    ept_event &end = fake::push(*self, code == EPT_OK ? EPT_EVENT_LOCAL_DONE : EPT_EVENT_ERROR, op.peer);
    end.cookie = op.cookie;
    end.code = code;
    if (code != EPT_OK) end.text = code == EPT_E_ACCESS ? "it ends outside the region" : "the peer is lost";
  }
  return EPT_OK;
}

int32_t poll(ept_worker *worker, ept_event *events, size_t capacity) {
  return fake::hand_out(worker->instance, events, capacity);
}

int32_t quiesce(ept_worker *worker, uint32_t rank, int32_t, uint64_t cookie) {
  std::lock_guard hold(lock);
  fake::push(*worker->instance, EPT_EVENT_QUIESCED, rank).cookie = cookie;
  return EPT_OK;
}

// Layout of version 1, kind MAPPED: words[0] the address, words[1] the bytes behind it. A peer as such needs no words.
int32_t entry(ept_device_entry *out, uint64_t address, uint64_t length) {
  ept_device_entry entry = {};
  entry.kind = EPT_DEVICE_MAPPED;
  entry.version = EPT_DEVICE_ABI;
  entry.words[0] = address;
  entry.words[1] = length;
  fake::give(out, entry);
  return EPT_OK;
}

int32_t device_open(ept_instance *, int32_t) { return EPT_OK; }

int32_t device_peer(ept_instance *instance, uint32_t rank, ept_device_entry *out) {
  return rank < instance->world ? entry(out, 0, 0) : fail(EPT_E_INVALID, "device_peer", "rank %u", rank);
}

int32_t device_region(ept_region *region, ept_device_entry *out) { return entry(out, region->offset, region->length); }

int32_t device_signal(ept_region *signal, ept_device_entry *out) {
  return signal->signal ? entry(out, signal->offset, 8) : fail(EPT_E_INVALID, "device_signal", "no signal");
}

int32_t counters(ept_worker *worker, uint32_t, ept_rail_counters *out) {
  fake::give(out, worker->instance->counters);
  return EPT_OK;
}

}  // namespace

extern "C" {
extern __attribute__((visibility("default"))) const ept_backend ept_backend_v1;
const ept_backend ept_backend_v1 = {
    .size = sizeof(ept_backend),
    .abi = EPT_BACKEND_ABI,
    .name = "mapped",
    .version = "1",
    .settings = nullptr,
    .setting_count = 0,
    .probe = probe,
    .open = open,
    .close = close,
    .caps = caps,
    .rails = rails,
    .local_address = local_address,
    .reach = reach,
    .join = nullptr,
    .peer_open = peer_open,
    .peer_state = peer_state,
    .peer_close = peer_close,
    .peer_fence = peer_fence,
    .worker_open = worker_open,
    .worker_close = worker_close,
    .mem_alloc = nullptr,
    .mem_free = nullptr,
    .mem_register = mem_register,
    .mem_deregister = mem_deregister,
    .region_export = region_export,
    .region_revoke = region_revoke,
    .region_import = region_import,
    .region_drop = region_drop,
    .region_map = region_map,
    .signal_export = signal_export,
    .signal_import = signal_import,
    .post = post,
    .poll = poll,
    .arm = fake::never_sleep,
    .visible = nullptr,
    .quiesce = quiesce,
    .device_open = device_open,
    .device_peer = device_peer,
    .device_region = device_region,
    .device_signal = device_signal,
    .device_image = nullptr,
    .device_module = nullptr,
    .query = nullptr,
    .counters = counters,
    .last_error = fake::last_error,
};
}
