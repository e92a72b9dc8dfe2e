// SPDX-License-Identifier: Apache-2.0
#include "wire.h"

#include "eptransport/wire.h"

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

namespace {

struct Arrival {
  ept_event event{};
  std::shared_ptr<std::string> bytes;
};

std::mutex lock;
std::map<std::pair<std::string, uint32_t>, ept_instance *> instances;
wire::Tamper how_to_tamper;
thread_local ept_error last;

}  // namespace

struct ept_worker {
  ept_instance *instance;
};
struct ept_mem {
  ept_instance *instance;
  ept_memory memory;
};
struct Export {
  bool live;
  ept_mem *mem;
  uint32_t rank;
  uint64_t offset, length;
};
struct ept_instance {
  std::string job;
  uint32_t rank, world;
  std::vector<bool> open;
  std::deque<Arrival> events;
  std::vector<std::shared_ptr<std::string>> shown;
  std::vector<Export> exports;
  ept_worker worker;
};
struct ept_region {
  uint32_t rank, slot;
  uint64_t length;
};

namespace {

struct Blob {
  uint32_t magic, rank, slot, reserved;
  uint64_t length;
};
constexpr uint32_t kMagic = 0x45524957;    // "WIRE"
constexpr uint32_t kNowhere = UINT32_MAX;  // a slot of a played rank: what is written there is gone

int32_t fail(int32_t code, const char *what) {
  last = {};
  last.size = sizeof last;
  last.code = code;
  last.peer = -1;
  snprintf(last.text, sizeof last.text, "wire: %s", what);
  return code;
}

void push(ept_instance *to, int32_t kind, uint32_t peer, const std::function<void(Arrival &)> &fill = {}) {
  to->events.emplace_back();
  Arrival &arrival = to->events.back();
  arrival.event.size = sizeof(ept_event);
  arrival.event.kind = kind;
  arrival.event.peer = peer;
  if (fill) fill(arrival);
}

ept_instance *find(const std::string &job, uint32_t rank) {
  auto found = instances.find({job, rank});
  return found == instances.end() ? nullptr : found->second;
}

void deliver(ept_instance *to, uint32_t from, std::string bytes) {
  push(to, EPT_EVENT_RECV, from, [&](Arrival &arrival) {
    arrival.bytes = std::make_shared<std::string>(std::move(bytes));
    arrival.event.data = arrival.bytes->data();
    arrival.event.length = arrival.bytes->size();
  });
}

// EPT_OK: it landed (or its target is played). ACCESS: refused.
int32_t land(ept_instance *from, const ept_op &op) {
  ept_instance *to = find(from->job, op.peer);
  if (op.kind == EPT_OP_SEND) {
    std::string bytes(static_cast<const char *>(op.source), op.length);
    if (how_to_tamper) how_to_tamper(from->rank, op.peer, bytes.data(), bytes.size());
    if (to) deliver(to, from->rank, std::move(bytes));
    return EPT_OK;
  }
  if (!to || op.region->slot == kNowhere) return EPT_OK;
  if (op.region->slot >= to->exports.size()) return EPT_E_ACCESS;
  const Export &exported = to->exports[op.region->slot];
  const uint64_t length = op.kind == EPT_OP_WRITE ? op.length : 0;
  if (!exported.live || exported.rank != from->rank || op.offset > exported.length ||
      length > exported.length - op.offset)
    return EPT_E_ACCESS;
  if (length) {
    char *at = static_cast<char *>(exported.mem->memory.address) + exported.offset + op.offset;
    std::string bytes(static_cast<const char *>(op.source), length);
    if (how_to_tamper) how_to_tamper(from->rank, op.peer, bytes.data(), bytes.size());
    memcpy(at, bytes.data(), length);
  }
  push(to, EPT_EVENT_IMM, from->rank, [&](Arrival &arrival) {
    arrival.event.immediate = op.immediate;
    arrival.event.length = length;
  });
  return EPT_OK;
}

void fill_caps(ept_caps *caps) {
  const uint32_t size = caps->size;
  *caps = ept_caps{};
  caps->size = size;
  caps->memory_kinds = EPT_MEMORY_HOST;
  caps->max_message = 1 << 20;
  caps->max_send = 16384;
  caps->max_iov = 1;
  caps->immediate_bits = 32;
  caps->protection = EPT_PROTECTION_KEY;
  caps->can_revoke = 1;
}

const ept_backend kTable = [] {
  ept_backend table{};
  table.size = sizeof table;
  table.abi = EPT_BACKEND_ABI;
  table.name = "wire";
  table.version = "1";
  table.probe = [](const ept_host *, const ept_value *, size_t, ept_probe *report) -> int32_t {
    fill_caps(&report->caps);
    return EPT_OK;
  };
  table.open = [](const ept_host *, const ept_open_params *params, ept_instance **instance) -> int32_t {
    std::lock_guard hold(lock);
    auto *made =
        new ept_instance{params->job, params->rank, params->world, std::vector<bool>(params->world), {}, {}, {}, {}};
    made->worker.instance = made;
    instances[{made->job, made->rank}] = *instance = made;
    return EPT_OK;
  };
  table.close = [](ept_instance *instance) {
    std::lock_guard hold(lock);
    instances.erase({instance->job, instance->rank});
    delete instance;
  };
  table.caps = [](ept_instance *, ept_caps *caps) -> int32_t {
    fill_caps(caps);
    return EPT_OK;
  };
  table.rails = [](ept_instance *instance, ept_rail *rails, uint32_t capacity, uint32_t *count) -> int32_t {
    *count = 1;
    if (!capacity) return EPT_OK;
    const uint32_t size = rails->size;
    *rails = ept_rail{};
    rails->size = size;
    snprintf(rails->name, sizeof rails->name, "wire");
    rails->numa = -1;
    rails->max_regions = 1 << 20;
    rails->max_peers = instance->world;
    rails->cq_depth = 1 << 20;
    rails->tx_depth = 1 << 10;
    return EPT_OK;
  };
  table.local_address = [](ept_instance *instance, void *blob, size_t *length) -> int32_t {
    const Blob address{kMagic, instance->rank, 0, 0, 0};
    if (*length < sizeof address) return fail(EPT_E_LIMIT, "no room for an address");
    memcpy(blob, &address, *length = sizeof address);
    return EPT_OK;
  };
  table.reach = [](ept_instance *, const void *, size_t length, ept_reach *) -> int32_t {
    return length == sizeof(Blob) ? EPT_OK : fail(EPT_E_INVALID, "no address");
  };
  table.peer_open = [](ept_instance *instance, uint32_t rank, uint32_t, const void *, size_t) -> int32_t {
    std::lock_guard hold(lock);
    instance->open[rank] = true;
    ept_instance *other = find(instance->job, rank);
    if (other && other->open[instance->rank]) {
      push(instance, EPT_EVENT_PEER, rank);
      push(other, EPT_EVENT_PEER, instance->rank);
    }
    return EPT_OK;
  };
  table.peer_state = [](ept_instance *instance, uint32_t rank) -> int32_t {
    std::lock_guard hold(lock);
    return instance->open[rank] ? EPT_OK : EPT_LATER;
  };
  table.peer_close = [](ept_instance *instance, uint32_t rank) -> int32_t {
    std::lock_guard hold(lock);
    instance->open[rank] = false;
    return EPT_OK;
  };
  table.peer_fence = [](ept_instance *instance, uint32_t rank, uint32_t epoch, uint64_t cookie) -> int32_t {
    std::lock_guard hold(lock);
    instance->open[rank] = false;
    push(instance, EPT_EVENT_FENCED, rank, [&](Arrival &arrival) {
      arrival.event.epoch = epoch;
      arrival.event.cookie = cookie;
    });
    return EPT_OK;
  };
  table.worker_open = [](ept_instance *instance, ept_worker **worker) -> int32_t {
    *worker = &instance->worker;
    return EPT_OK;
  };
  table.worker_close = [](ept_worker *) {};
  table.mem_register = [](ept_instance *instance, const ept_memory *memory, ept_mem **mem) -> int32_t {
    *mem = new ept_mem{instance, *memory};
    return EPT_OK;
  };
  table.mem_deregister = [](ept_mem *mem) -> int32_t {
    std::lock_guard hold(lock);
    for (Export &exported : mem->instance->exports)
      if (exported.mem == mem) exported.live = false;
    delete mem;
    return EPT_OK;
  };
  table.region_export = [](ept_mem *mem, uint32_t rank, uint64_t offset, uint64_t length, void *blob, size_t *size,
                           uint64_t *key) -> int32_t {
    std::lock_guard hold(lock);
    auto &exports = mem->instance->exports;
    const Blob out{kMagic, mem->instance->rank, static_cast<uint32_t>(exports.size()), 0, length};
    if (*size < sizeof out) return fail(EPT_E_LIMIT, "no room for a region");
    memcpy(blob, &out, *size = sizeof out);
    *key = exports.size();
    exports.push_back({true, mem, rank, offset, length});
    return EPT_OK;
  };
  table.region_revoke = [](ept_mem *mem, uint32_t, uint64_t key) -> int32_t {
    std::lock_guard hold(lock);
    if (key >= mem->instance->exports.size()) return fail(EPT_E_INVALID, "no such key");
    mem->instance->exports[key].live = false;
    return EPT_OK;
  };
  table.region_import = [](ept_instance *, uint32_t rank, const void *bytes, size_t length,
                           ept_region **region) -> int32_t {
    Blob blob;
    if (length != sizeof blob) return fail(EPT_E_INVALID, "no region");
    memcpy(&blob, bytes, sizeof blob);
    if (blob.magic != kMagic || blob.rank != rank) return fail(EPT_E_INVALID, "no region of that rank");
    *region = new ept_region{rank, blob.slot, blob.length};
    return EPT_OK;
  };
  table.region_drop = [](ept_region *region) { delete region; };
  table.post = [](ept_worker *worker, const ept_op *ops, size_t count, size_t *posted) -> int32_t {
    std::lock_guard hold(lock);
    for (size_t i = 0; i < count; ++i) {
      const int32_t code = land(worker->instance, ops[i]);
      push(worker->instance, code ? EPT_EVENT_ERROR : EPT_EVENT_LOCAL_DONE, ops[i].peer, [&](Arrival &arrival) {
        arrival.event.cookie = ops[i].cookie;
        arrival.event.code = code;
        arrival.event.text = code ? "wire: refused" : nullptr;
      });
    }
    *posted = count;
    return EPT_OK;
  };
  table.poll = [](ept_worker *worker, ept_event *events, size_t capacity) -> int32_t {
    std::lock_guard hold(lock);
    ept_instance &instance = *worker->instance;
    instance.shown.clear();
    size_t count = 0;
    for (; count < capacity && !instance.events.empty(); ++count) {
      events[count] = instance.events.front().event;
      if (instance.events.front().bytes) instance.shown.push_back(std::move(instance.events.front().bytes));
      instance.events.pop_front();
    }
    return static_cast<int32_t>(count);
  };
  table.arm = [](ept_worker *, int32_t *descriptor) -> int32_t {
    *descriptor = -1;
    return EPT_OK;
  };
  table.quiesce = [](ept_worker *worker, uint32_t rank, int32_t, uint64_t cookie) -> int32_t {
    std::lock_guard hold(lock);
    push(worker->instance, EPT_EVENT_QUIESCED, rank, [&](Arrival &arrival) { arrival.event.cookie = cookie; });
    return EPT_OK;
  };
  table.counters = [](ept_worker *, uint32_t, ept_rail_counters *counters) -> int32_t {
    const uint32_t size = counters->size;
    *counters = ept_rail_counters{};
    counters->size = size;
    return EPT_OK;
  };
  table.last_error = [](ept_error *error) {
    const uint32_t size = error->size;
    *error = last;
    error->size = size;
  };
  return table;
}();

const ept_plugin kPlugin{"wire", &kTable};

template <class T>
std::string as_text(const T &value) {
  return {reinterpret_cast<const char *>(&value), sizeof value};
}

}  // namespace

namespace wire {

const ept_plugin *plugin() { return &kPlugin; }

void say_immediate(uint32_t to, uint32_t from, uint32_t immediate) {
  std::lock_guard hold(lock);
  push(find("", to), EPT_EVENT_IMM, from, [&](Arrival &arrival) { arrival.event.immediate = immediate; });
}

void say_message(uint32_t to, uint32_t from, const std::string &bytes) {
  std::lock_guard hold(lock);
  deliver(find("", to), from, bytes);
}

void say_peer(uint32_t to, uint32_t from, int32_t code) {
  std::lock_guard hold(lock);
  push(find("", to), EPT_EVENT_PEER, from, [&](Arrival &arrival) { arrival.event.code = code; });
}

void tamper(Tamper how) {
  std::lock_guard hold(lock);
  how_to_tamper = std::move(how);
}

std::string address_of(uint32_t rank, uint32_t epoch) {
  struct {  // peers.cc: AddressBlob
    uint32_t magic, version, rank, epoch;
    char backend[16];
  } head{0x41545045, EPT_WIRE_VERSION, rank, epoch, "wire"};
  return as_text(head) + as_text(Blob{kMagic, rank, 0, 0, 0});
}

std::string region_of(uint32_t rank, uint64_t length) { return as_text(Blob{kMagic, rank, kNowhere, 0, length}); }

ept_engine *open(uint32_t rank, uint32_t world, uint64_t timeout_ns, const std::string &job) {
  ept_engine_config config{};
  config.size = sizeof config;
  config.rank = rank;
  config.world = world;
  config.job = job.c_str();
  config.secret = reinterpret_cast<const uint8_t *>("0123456789abcdef");
  config.secret_length = 16;
  config.plugin = &kPlugin;
  config.progress = EPT_PROGRESS_INLINE;
  config.timeout_ns = timeout_ns;
  config.warn_ns = 1'000'000'000'000;
  Error error;
  ept_engine *engine = nullptr;
  if (ept_engine_create(&config, &engine, &error)) {
    fprintf(stderr, "no engine: %s\n", error.text);
    abort();
  }
  return engine;
}

}  // namespace wire
