// SPDX-License-Identifier: Apache-2.0
//
// group_only.cc: what a network like NVSHMEM asks of the ABI, on host memory. All ranks join together, in rounds;
// memory comes from a heap which is laid out alike on every rank; kernels post by themselves. Nothing checks an
// address, nothing can be revoked, and a lost rank ends the job: rules 9 to 12 are waived.
#include "../fake.h"

namespace {
constexpr uint64_t kHeap = 1 << 20;
struct Team;
}  // namespace

struct ept_instance : FakeInstance {
  std::unique_ptr<char[]> heap;
  Team *team = nullptr;
  uint32_t rounds = 0;  // of join, done
  bool asked_again = false;
  uint64_t used = 0;  // of the heap
  size_t allocations = 0;
  int32_t device = -1;
  void *module = nullptr;
};

namespace {

using fake::fail;
using fake::lock;

// A job's ranks, and what they allocated: the n-th allocation is as long on every rank, so it begins at the same
// offset.
struct Team {
  std::map<uint32_t, ept_instance *> members;
  std::vector<uint64_t> lengths;
};

std::map<std::string, Team> teams;  // under the lock

ept_caps capabilities() {
  ept_caps caps = {};
  caps.memory_kinds = EPT_MEMORY_HOST;
  caps.max_message = kHeap;
  caps.max_send = 4096;
  caps.max_iov = 1;
  caps.immediate_bits = 32;
  caps.protection = EPT_PROTECTION_NONE;
  caps.passive_progress = 1;
  caps.group_only = 1;
  caps.gpu_initiated = 1;
  caps.operation_cost_ns = 1000;
  caps.waived = 1u << 9 | 1u << 10 | 1u << 11 | 1u << 12;
  caps.waived_why = "a fatal error ends the process, and nothing stands between a kernel and the symmetric heap";
  return caps;
}

int32_t probe(const ept_host *, const ept_value *, size_t, ept_probe *report) {
  ept_probe found = {};
  found.caps = capabilities();
  found.caps.size = sizeof found.caps;
  snprintf(found.summary, sizeof found.summary, "a heap of %llu KiB a rank",
           static_cast<unsigned long long>(kHeap >> 10));
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
  *opened = instance.release();
  return EPT_OK;
}

void close(ept_instance *instance) {
  std::lock_guard hold(lock);
  if (instance->team) {
    instance->team->members.erase(instance->rank);
    if (instance->team->members.empty()) teams.erase(instance->job);
  }
  delete instance;
}

int32_t caps(ept_instance *, ept_caps *out) {
  fake::give(out, capabilities());
  return EPT_OK;
}

int32_t rails(ept_instance *instance, ept_rail *out, uint32_t capacity, uint32_t *count) {
  return fake::rails(out, capacity, count, "group_only", instance->world);
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
  if (code == EPT_OK && address.rank >= instance->world) code = fail(EPT_E_INVALID, "reach", "rank %u", address.rank);
  if (code != EPT_OK) snprintf(reach.why_not, sizeof reach.why_not, "%.255s", fake::t_error.text);
  reach.latency_ns = 1500;
  reach.operation_cost_ns = 1000;
  fake::give(out, reach);
  return code;
}

// Round 0 says how large a heap each rank wants; round 1 makes it, once, and is asked again once, as a round that takes
// time would be; round 2 sees that all have theirs.
struct Ticket {
  uint32_t version, rank;
  uint64_t heap;
};

int32_t join(ept_instance *instance, ept_join *join) {
  if (join->round != instance->rounds) {
    return fail(EPT_E_INVALID, "join", "round %u after round %u", join->round, instance->rounds);
  }
  if ((join->round == 0) != (join->blobs == nullptr))
    return fail(EPT_E_INVALID, "join", "blobs in round %u", join->round);
  for (uint32_t rank = 0; join->round && rank < instance->world; ++rank) {
    Ticket ticket;
    const int32_t code = fake::read_blob(join->blobs[rank], join->lengths[rank], "join", &ticket);
    if (code != EPT_OK) return code;
    if (ticket.rank != rank) return fail(EPT_E_INVALID, "join", "the blob of rank %u says rank %u", rank, ticket.rank);
    if (ticket.heap != kHeap) {
      return fail(EPT_E_MISMATCH, "join", "rank %u has a heap of %llu bytes, rank %u of %llu", rank,
                  static_cast<unsigned long long>(ticket.heap), instance->rank, static_cast<unsigned long long>(kHeap));
    }
  }
  if (join->round == 1 && !instance->asked_again) {
    instance->asked_again = true;
    return EPT_LATER;
  }
  if (join->round == 1) {
    instance->heap.reset(new char[kHeap]());
    std::lock_guard hold(lock);
    instance->team = &teams[instance->job];
    instance->team->members[instance->rank] = instance;
  }
  ++instance->rounds;
  join->done = join->round == 2;
  join->out_length = 0;
  if (join->done) return EPT_OK;
  join->out_length = join->out_capacity;
  return fake::write_blob(Ticket{1, instance->rank, kHeap}, "join", join->out, &join->out_length);
}

bool joined(const ept_instance *instance) { return instance->rounds == 3; }

int32_t peer_open(ept_instance *instance, uint32_t rank, uint32_t, const void *, size_t) {
  if (!joined(instance)) return fail(EPT_E_INVALID, "peer_open", "join has not ended: round %u of 3", instance->rounds);
  if (rank >= instance->world) return fail(EPT_E_INVALID, "peer_open", "rank %u of %u", rank, instance->world);
  std::lock_guard hold(lock);
  instance->peers[rank] = EPT_OK;  // joined is connected
  fake::push(*instance, EPT_EVENT_PEER, rank);
  return EPT_OK;
}

int32_t peer_state(ept_instance *instance, uint32_t rank) { return instance->peers.at(rank); }

int32_t peer_close(ept_instance *instance, uint32_t rank) {
  instance->peers.at(rank) = EPT_E_CLOSED;
  return EPT_OK;
}

int32_t peer_fence(ept_instance *, uint32_t, uint32_t, uint64_t) {
  return fail(EPT_E_UNSUPPORTED, "peer_fence", "rule 11 is waived: nothing can keep a rank out of the heap");
}

int32_t worker_open(ept_instance *instance, ept_worker **worker) {
  *worker = &instance->worker;
  return EPT_OK;
}

void worker_close(ept_worker *) {}

// Collective in the order of the calls, so nobody waits for anybody.
int32_t mem_alloc(ept_instance *instance, uint64_t length, int32_t kind, void **address) {
  if (!joined(instance)) return fail(EPT_E_INVALID, "mem_alloc", "join has not ended");
  if (kind != EPT_MEMORY_HOST) return fail(EPT_E_UNSUPPORTED, "mem_alloc", "memory of kind %d", kind);
  if (length > kHeap - instance->used) return fail(EPT_E_NOMEM, "mem_alloc", "the heap is full");
  std::lock_guard hold(lock);
  std::vector<uint64_t> &lengths = instance->team->lengths;
  if (instance->allocations == lengths.size()) lengths.push_back(length);
  if (const uint64_t first = lengths[instance->allocations]; first != length) {
    return fail(EPT_E_MISMATCH, "mem_alloc", "allocation %zu is %llu bytes here, %llu on the rank that came first",
                instance->allocations, static_cast<unsigned long long>(length), static_cast<unsigned long long>(first));
  }
  ++instance->allocations;
  *address = instance->heap.get() + instance->used;
  instance->used += (length + 15) / 16 * 16;
  return EPT_OK;
}

int32_t mem_free(ept_instance *instance, void *address) {
  const auto offset = static_cast<uint64_t>(static_cast<char *>(address) - instance->heap.get());
  return offset < instance->used ? EPT_OK : fail(EPT_E_INVALID, "mem_free", "not of the heap");  // kept until close
}

int32_t mem_register(ept_instance *instance, const ept_memory *memory, ept_mem **mem) {
  const auto offset = static_cast<uint64_t>(static_cast<char *>(memory->address) - instance->heap.get());
  if (!instance->heap || offset > kHeap || memory->length > kHeap - offset) {
    return fail(EPT_E_UNSUPPORTED, "mem_register", "memory from outside the symmetric heap: use mem_alloc");
  }
  *mem = new ept_mem{instance, *memory};
  return EPT_OK;
}

int32_t mem_deregister(ept_mem *mem) {
  delete mem;
  return EPT_OK;
}

struct Blob {
  uint32_t version, rank;
  uint64_t offset, length;
  uint32_t signal, reserved;
};

int32_t export_any(ept_mem *mem, uint64_t offset, uint64_t length, bool signal, void *blob, size_t *blob_length) {
  const auto start = static_cast<uint64_t>(static_cast<char *>(mem->memory.address) - mem->instance->heap.get());
  return fake::write_blob(Blob{1, mem->instance->rank, start + offset, length, signal, 0}, "export", blob, blob_length);
}

int32_t region_export(ept_mem *mem, uint32_t, uint64_t offset, uint64_t length, void *blob, size_t *blob_length,
                      uint64_t *key) {
  *key = 0;
  return export_any(mem, offset, length, false, blob, blob_length);
}

int32_t region_revoke(ept_mem *, uint32_t, uint64_t) {
  return fail(EPT_E_UNSUPPORTED, "region_revoke", "rule 12 is waived: there are no keys");
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
  *region = new ept_region{instance, rank, blob.offset, blob.length, signal};
  return EPT_OK;
}

int32_t region_import(ept_instance *instance, uint32_t rank, const void *bytes, size_t length, ept_region **region) {
  return import_any(instance, rank, bytes, length, false, region);
}

int32_t signal_import(ept_instance *instance, uint32_t rank, const void *bytes, size_t length, ept_region **region) {
  return import_any(instance, rank, bytes, length, true, region);
}

void region_drop(ept_region *region) { delete region; }

// What the host posts; kernels have the device half.
int32_t post(ept_worker *worker, const ept_op *ops, size_t count, size_t *posted) {
  ept_instance *const self = worker->instance;
  std::lock_guard hold(lock);
  for (*posted = 0; *posted < count; ++*posted) {
    const ept_op &op = ops[*posted];
    if (op.peer >= self->world || self->peers[op.peer] != EPT_OK) return fail(EPT_E_INVALID, "post", "no such peer");
    ept_instance &target = *self->team->members.at(op.peer);
    char *const at = op.region ? target.heap.get() + op.region->offset + op.offset : nullptr;
    if (op.kind == EPT_OP_WRITE && op.length) memcpy(at, op.source, op.length);
    if (op.kind == EPT_OP_SIGNAL && op.region->signal) {
      __atomic_fetch_add(reinterpret_cast<uint64_t *>(at), 1, __ATOMIC_RELEASE);
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
    fake::push(*self, EPT_EVENT_LOCAL_DONE, op.peer).cookie = op.cookie;
  }
  return EPT_OK;
}

int32_t poll(ept_worker *worker, ept_event *events, size_t capacity) {
  return fake::hand_out(worker->instance, events, capacity);
}

int32_t quiesce(ept_worker *worker, uint32_t rank, int32_t, uint64_t cookie) {
  std::lock_guard hold(lock);
  ept_event &event = fake::push(*worker->instance, EPT_EVENT_QUIESCED, rank);
  event.cookie = cookie;
  event.code = EPT_E_STUCK;  // rule 10 is waived: a kernel may be writing
  event.text = "the whole job: kernels post by themselves";
  return EPT_OK;
}

int32_t device_open(ept_instance *instance, int32_t cuda_device) {
  instance->device = cuda_device;
  return joined(instance) ? EPT_OK : fail(EPT_E_INVALID, "device_open", "join has not ended");
}

// Layout of version 1, kind GPU, of this plugin: words[0] the rank; words[1] an offset in the heap; words[2] its
// length. The base of each heap is words[3] of a peer's entry: a real network would translate rank and offset by
// itself.
int32_t entry(ept_device_entry *out, uint32_t rank, uint64_t offset, uint64_t length, const char *base) {
  ept_device_entry entry = {};
  entry.kind = EPT_DEVICE_GPU;
  entry.version = EPT_DEVICE_ABI;
  entry.words[0] = rank;
  entry.words[1] = offset;
  entry.words[2] = length;
  entry.words[3] = reinterpret_cast<uint64_t>(base);
  fake::give(out, entry);
  return EPT_OK;
}

int32_t device_peer(ept_instance *instance, uint32_t rank, ept_device_entry *out) {
  if (instance->device < 0) return fail(EPT_E_INVALID, "device_peer", "device_open comes first");
  std::lock_guard hold(lock);
  return entry(out, rank, 0, kHeap, instance->team->members.at(rank)->heap.get());
}

int32_t device_region(ept_region *region, ept_device_entry *out) {
  return entry(out, region->rank, region->offset, region->length, nullptr);
}

int32_t device_signal(ept_region *signal, ept_device_entry *out) {
  if (!signal->signal) return fail(EPT_E_INVALID, "device_signal", "a region that is no signal");
  return entry(out, signal->rank, signal->offset, 8, nullptr);
}

int32_t device_image(ept_instance *, const void **image, size_t *length) {
  static const char bytes[] = "kernels, linked with this network's device library";
  *image = bytes;
  *length = sizeof bytes;
  return EPT_OK;
}

int32_t device_module(ept_instance *instance, void *cuda_module) {
  instance->module = cuda_module;
  return EPT_OK;
}

int32_t query(ept_instance *instance, const char *feature, int64_t *value) {
  if (strcmp(feature, "heap_used")) return fail(EPT_E_UNSUPPORTED, "query", "no feature `%s`", feature);
  *value = static_cast<int64_t>(instance->used);
  return EPT_OK;
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
    .name = "group_only",
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
    .join = join,
    .peer_open = peer_open,
    .peer_state = peer_state,
    .peer_close = peer_close,
    .peer_fence = peer_fence,
    .worker_open = worker_open,
    .worker_close = worker_close,
    .mem_alloc = mem_alloc,
    .mem_free = mem_free,
    .mem_register = mem_register,
    .mem_deregister = mem_deregister,
    .region_export = region_export,
    .region_revoke = region_revoke,
    .region_import = region_import,
    .region_drop = region_drop,
    .region_map = nullptr,
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
    .device_image = device_image,
    .device_module = device_module,
    .query = query,
    .counters = counters,
    .last_error = fake::last_error,
};
}
