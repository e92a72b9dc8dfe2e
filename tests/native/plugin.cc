// SPDX-License-Identifier: Apache-2.0
#include "plugin.h"

#include <dlfcn.h>
#include <sys/random.h>
#include <time.h>

#include <tuple>

namespace plugin {

uint64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<uint64_t>(t.tv_sec) * 1'000'000'000 + static_cast<uint64_t>(t.tv_nsec);
}

constinit decltype(ept_host::hmac_sha256) hmac = [](void *, const void *, size_t, const void *, size_t, uint8_t *) {
  CHECK(!"no HMAC here");
};

uint64_t (*clock)() = now_ns;
int32_t log_level = EPT_LOG_DEBUG;

ept_host host() {
  ept_host host = {};
  host.size = sizeof host;
  host.log = [](void *, int32_t level, const char *text) {
    if (level < log_level) return;
    printf("    log: %s\n", text);
    fflush(stdout);
  };
  host.clock_ns = [](void *) { return clock(); };
  host.random = [](void *, void *bytes, size_t length) {
    CHECK_EQ(getrandom(bytes, length, 0), static_cast<ssize_t>(length));
  };
  host.hmac_sha256 = hmac;
  host.cuda = [](void *, const char *) -> void * { return nullptr; };
  return host;
}

const ept_backend &load(const std::string &path) {
  void *library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) check::failed(__FILE__, __LINE__, dlerror());
  const void *table = dlsym(library, "ept_backend_v1");
  if (!table) check::failed(__FILE__, __LINE__, path + " exports no ept_backend_v1");
  const auto &backend = *static_cast<const ept_backend *>(table);
  CHECK_EQ(backend.size, sizeof(ept_backend));
  CHECK_EQ(backend.abi, EPT_BACKEND_ABI);
  return backend;
}

const ept_backend &built(const std::string &name) {
  const char *folder = getenv("EPT_TEST_PLUGINS");
  if (!folder) check::failed(__FILE__, __LINE__, "EPT_TEST_PLUGINS is not set; run this by `meson test`");
  return load(std::string(folder) + "/ept_" + name + ".so");
}

Values::Values(const ept_backend &backend, const Options &options) {
  for (size_t i = 0; i < backend.setting_count; ++i) {
    const ept_setting &setting = backend.settings[i];
    texts[setting.name] = setting.value;
  }
  for (const auto &[name, text] : options) texts[name] = text;
  for (const auto &[name, text] : texts) list.push_back({name.c_str(), text.c_str()});
}

std::string error_text(const ept_backend &backend) {
  ept_error error = {};
  error.size = sizeof error;
  backend.last_error(&error);
  return error.text;
}

void not_ok(const char *file, int line, const char *call, int32_t code, const ept_backend &backend) {
  check::failed(file, line, std::string(call) + " gave " + std::to_string(code) + ": " + error_text(backend));
}

Rank::Rank(const ept_backend &backend, const Identity &identity, const Options &options)
    : backend(backend), id(identity), values_(backend, options), host_(host()) {
  CHECK_OK(backend, open(backend, id, values_, host_, &instance));
  CHECK_OK(backend, backend.worker_open(instance, &worker));
}

int32_t Rank::open(const ept_backend &backend, const Identity &id, const Values &values, const ept_host &host,
                   ept_instance **instance) {
  ept_open_params params = {};
  params.size = sizeof params;
  params.rank = id.rank;
  params.world = id.world;
  params.epoch = id.epoch;
  params.job = id.job.c_str();
  params.secret = reinterpret_cast<const uint8_t *>(id.secret.data());
  params.secret_length = id.secret.size();
  params.values = values.list.data();
  params.value_count = values.list.size();
  params.dead_ns = id.dead_ns;
  params.credits = id.credits;
  params.send_credits = id.send_credits;
  return backend.open(&host, &params, instance);
}

void Rank::leave() {
  if (!instance) return;
  for (ept_region *region : regions_) backend.region_drop(region);
  backend.worker_close(worker);
  for (ept_mem *mem : mems_) CHECK_OK(backend, backend.mem_deregister(mem));
  backend.close(instance);
  instance = nullptr;
}

std::string Rank::address() {
  char blob[4096];
  size_t length = sizeof blob;
  CHECK_OK(backend, backend.local_address(instance, blob, &length));
  return {blob, length};
}

int32_t Rank::open_peer(uint32_t rank, uint32_t epoch, const std::string &address) {
  return backend.peer_open(instance, rank, epoch, address.data(), address.size());
}

ept_mem *Rank::enroll(void *bytes, size_t length, uint32_t access, int32_t role) {
  ept_memory memory = {};
  memory.size = sizeof memory;
  memory.kind = EPT_MEMORY_HOST;
  memory.address = bytes;
  memory.length = length;
  memory.cuda_device = -1;
  memory.fd = -1;
  memory.role = role;
  memory.access = access;
  ept_mem *mem = nullptr;
  CHECK_OK(backend, backend.mem_register(instance, &memory, &mem));
  mems_.push_back(mem);
  return mem;
}

int32_t Rank::release(ept_mem *mem) {
  const int32_t code = backend.mem_deregister(mem);
  if (code == EPT_OK) std::erase(mems_, mem);
  return code;
}

std::pair<std::string, uint64_t> Rank::grant(ept_mem *mem, uint32_t rank, uint64_t offset, uint64_t length) {
  char blob[4096];
  size_t blob_length = sizeof blob;
  uint64_t key = 0;
  CHECK_OK(backend, backend.region_export(mem, rank, offset, length, blob, &blob_length, &key));
  return {{blob, blob_length}, key};
}

ept_region *Rank::import(uint32_t rank, const std::string &blob) {
  ept_region *region = nullptr;
  CHECK_OK(backend, backend.region_import(instance, rank, blob.data(), blob.size(), &region));
  regions_.push_back(region);
  return region;
}

void Rank::drop(ept_region *region) {
  std::erase(regions_, region);
  backend.region_drop(region);
}

ept_op Rank::write(uint32_t peer, ept_mem *mem, const void *source, ept_region *region, uint64_t offset,
                   uint64_t length, uint32_t immediate, uint64_t cookie) {
  ept_op op = {};
  op.size = sizeof op;
  op.kind = EPT_OP_WRITE;
  op.peer = peer;
  op.source_mem = mem;
  op.source = source;
  op.region = region;
  op.offset = offset;
  op.length = length;
  op.immediate = immediate;
  op.cookie = cookie;
  return op;
}

ept_op Rank::signal(uint32_t peer, ept_region *region, uint32_t immediate, uint64_t cookie) {
  ept_op op = write(peer, nullptr, nullptr, region, 0, 0, immediate, cookie);
  op.kind = EPT_OP_SIGNAL;
  return op;
}

ept_op Rank::message(uint32_t peer, const std::string &bytes, uint64_t cookie) {
  ept_op op = write(peer, nullptr, bytes.data(), nullptr, 0, bytes.size(), 0, cookie);
  op.kind = EPT_OP_SEND;
  return op;
}

int32_t Rank::post(const ept_op &op) {
  size_t posted = 0;
  const int32_t code = backend.post(worker, &op, 1, &posted);
  CHECK_EQ(posted, code == EPT_OK ? 1 : 0);
  return code;
}

std::vector<Event> Rank::poll(size_t capacity) {
  std::vector<ept_event> raw(capacity);
  const int32_t count = backend.poll(worker, raw.data(), capacity);
  if (count < 0) check::failed(__FILE__, __LINE__, "poll: " + error_text(backend));
  std::vector<Event> events;
  for (int32_t i = 0; i < count; ++i) {
    const ept_event &event = raw[static_cast<size_t>(i)];
    CHECK_EQ(event.size, sizeof event);
    events.push_back({event, event.text ? event.text : "", {}});
    if (event.data) events.back().bytes.assign(static_cast<const char *>(event.data), event.length);
  }
  return events;
}

Event Rank::expect(int32_t kind, uint64_t polls) {
  for (; polls; --polls) {
    if (pending_.empty()) pending_ = poll();
    if (pending_.empty()) continue;
    const Event event = pending_.front();
    pending_.erase(pending_.begin());
    if (event.kind != kind) {
      check::failed(__FILE__, __LINE__,
                    "rank " + std::to_string(id.rank) + " waits for an event of kind " + std::to_string(kind) +
                        ", one of kind " + std::to_string(event.kind) + " came: " + event.words);
    }
    return event;
  }
  check::failed(__FILE__, __LINE__, "rank " + std::to_string(id.rank) + ": no event of kind " + std::to_string(kind));
}

void Rank::expect_nothing(int polls) {
  CHECK(pending_.empty());
  for (; polls; --polls) {
    const std::vector<Event> events = poll();
    if (!events.empty()) {
      check::failed(__FILE__, __LINE__, "an event of kind " + std::to_string(events[0].kind) + ": " + events[0].words);
    }
  }
}

ept_rail_counters Rank::count(uint32_t rail) {
  ept_rail_counters counters = {};
  counters.size = sizeof counters;
  CHECK_OK(backend, backend.counters(worker, rail, &counters));
  return counters;
}

void connect(const std::vector<Rank *> &ranks) {
  for (Rank *rank : ranks) {
    for (Rank *other : ranks) {
      if (rank == other) continue;
      CHECK_OK(rank->backend, rank->open_peer(other->id.rank, other->id.epoch, other->address()));
    }
  }
  for (Rank *rank : ranks) {
    for (size_t i = 1; i < ranks.size(); ++i) CHECK_EQ(rank->expect(EPT_EVENT_PEER).code, EPT_OK);
  }
}

Group::Group(const ept_backend &backend, uint32_t world, const Options &options, Identity identity) {
  identity.world = world;
  std::vector<Rank *> all;
  for (identity.rank = 0; identity.rank < world; ++identity.rank) {
    ranks_.push_back(std::make_unique<Rank>(backend, identity, options));
    all.push_back(ranks_.back().get());
  }
  connect(all);
}

Window::Window(Rank &from, Rank &to, size_t length, int32_t role)
    : source(length),
      bytes(length),
      source_mem(from.enroll(source.data(), length, EPT_ACCESS_LOCAL)),
      mem(to.enroll(bytes.data(), length, EPT_ACCESS_REMOTE_WRITE, role)) {
  std::tie(blob, key) = to.grant(mem, from.id.rank, 0, length);
  region = from.import(to.id.rank, blob);
}

}  // namespace plugin
