// SPDX-License-Identifier: Apache-2.0
//
// plugin.h: drives a plugin through its table alone, as the engine does. Includes nothing of ours but backend.h, so
// that the out-of-tree plugins of tests/plugins can be driven by it too.
#pragma once

#include <dlfcn.h>
#include <eptransport/backend.h>
#include <sys/random.h>
#include <time.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "check.h"

namespace plugin {

inline uint64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<uint64_t>(t.tv_sec) * 1'000'000'000 + static_cast<uint64_t>(t.tv_nsec);
}

// A plugin that authenticates its peers needs a real one: its test sets it.
inline decltype(ept_host::hmac_sha256) hmac = [](void *, const void *, size_t, const void *, size_t, uint8_t *) {
  CHECK(!"no HMAC here");
};

// What the engine offers, without its log.
inline ept_host host() {
  ept_host host = {};
  host.size = sizeof host;
  host.log = [](void *, int32_t, const char *text) { std::cout << "    log: " << text << std::endl; };
  host.clock_ns = [](void *) { return now_ns(); };
  host.random = [](void *, void *bytes, size_t length) {
    CHECK_EQ(getrandom(bytes, length, 0), static_cast<ssize_t>(length));
  };
  host.hmac_sha256 = hmac;
  host.cuda = [](void *, const char *) -> void * { return nullptr; };
  return host;
}

inline const ept_backend &load(const std::string &path) {
  void *library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) check::failed(__FILE__, __LINE__, dlerror());
  const void *table = dlsym(library, "ept_backend_v1");
  if (!table) check::failed(__FILE__, __LINE__, path + " exports no ept_backend_v1");
  const auto &backend = *static_cast<const ept_backend *>(table);
  CHECK_EQ(backend.size, sizeof(ept_backend));
  CHECK_EQ(backend.abi, EPT_BACKEND_ABI);
  return backend;
}

// A plugin that the build made: EPT_TEST_PLUGINS is its folder.
inline const ept_backend &built(const std::string &name) {
  const char *folder = getenv("EPT_TEST_PLUGINS");
  if (!folder) check::failed(__FILE__, __LINE__, "EPT_TEST_PLUGINS is not set; run this by `meson test`");
  return load(std::string(folder) + "/ept_" + name + ".so");
}

using Options = std::map<std::string, std::string>;

// Every setting of the backend with its default, but for those in `options`.
struct Values {
  Values(const ept_backend &backend, const Options &options) {
    for (size_t i = 0; i < backend.setting_count; ++i) {
      const ept_setting &setting = backend.settings[i];
      texts[setting.name] = setting.value;
    }
    for (const auto &[name, text] : options) texts[name] = text;
    for (const auto &[name, text] : texts) list.push_back({name.c_str(), text.c_str()});
  }
  Options texts;
  std::vector<ept_value> list;
};

struct Event : ept_event {
  std::string words, bytes;  // copies of what `text` and `data` pointed to
};

inline std::string error_text(const ept_backend &backend) {
  ept_error error = {};
  error.size = sizeof error;
  backend.last_error(&error);
  return error.text;
}

#define CHECK_OK(backend, call)                                                                        \
  do {                                                                                                 \
    const int32_t check_code = (call);                                                                 \
    if (check_code != EPT_OK) {                                                                        \
      check::failed(__FILE__, __LINE__,                                                                \
                    #call " gave " + std::to_string(check_code) + ": " + plugin::error_text(backend)); \
    }                                                                                                  \
  } while (0)

struct Identity {
  uint32_t rank = 0, world = 2, epoch = 0;
  std::string job = "test", secret = "secret";
  uint32_t credits = 1024, send_credits = 64;
  uint64_t dead_ns = 5'000'000'000;
};

// One rank: an instance and its worker.
class Rank {
 public:
  Rank(const ept_backend &backend, const Identity &identity, const Options &options = {})
      : backend(backend), id(identity), values_(backend, options), host_(host()) {
    CHECK_OK(backend, open(backend, id, values_, host_, &instance));
    CHECK_OK(backend, backend.worker_open(instance, &worker));
  }
  ~Rank() { leave(); }
  Rank(const Rank &) = delete;

  static int32_t open(const ept_backend &backend, const Identity &id, const Values &values, const ept_host &host,
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

  // Ends without a word to the peers, as a process that exits.
  void leave() {
    if (!instance) return;
    for (ept_region *region : regions_) backend.region_drop(region);
    backend.worker_close(worker);
    for (ept_mem *mem : mems_) CHECK_OK(backend, backend.mem_deregister(mem));
    backend.close(instance);
    instance = nullptr;
  }

  std::string address() {
    char blob[4096];
    size_t length = sizeof blob;
    CHECK_OK(backend, backend.local_address(instance, blob, &length));
    return {blob, length};
  }
  int32_t open_peer(uint32_t rank, uint32_t epoch, const std::string &address) {
    return backend.peer_open(instance, rank, epoch, address.data(), address.size());
  }

  ept_mem *enroll(void *bytes, size_t length, uint32_t access = EPT_ACCESS_LOCAL | EPT_ACCESS_REMOTE_WRITE,
                  int32_t role = EPT_ROLE_DATA) {
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
  int32_t release(ept_mem *mem) {
    const int32_t code = backend.mem_deregister(mem);
    if (code == EPT_OK) std::erase(mems_, mem);
    return code;
  }
  // A key and the blob that carries it.
  std::pair<std::string, uint64_t> grant(ept_mem *mem, uint32_t rank, uint64_t offset, uint64_t length) {
    char blob[4096];
    size_t blob_length = sizeof blob;
    uint64_t key = 0;
    CHECK_OK(backend, backend.region_export(mem, rank, offset, length, blob, &blob_length, &key));
    return {{blob, blob_length}, key};
  }
  ept_region *import(uint32_t rank, const std::string &blob) {
    ept_region *region = nullptr;
    CHECK_OK(backend, backend.region_import(instance, rank, blob.data(), blob.size(), &region));
    regions_.push_back(region);
    return region;
  }
  void drop(ept_region *region) {
    std::erase(regions_, region);
    backend.region_drop(region);
  }

  static ept_op write(uint32_t peer, ept_mem *mem, const void *source, ept_region *region, uint64_t offset,
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
  static ept_op signal(uint32_t peer, ept_region *region, uint32_t immediate, uint64_t cookie) {
    ept_op op = write(peer, nullptr, nullptr, region, 0, 0, immediate, cookie);
    op.kind = EPT_OP_SIGNAL;
    return op;
  }
  static ept_op message(uint32_t peer, const std::string &bytes, uint64_t cookie) {
    ept_op op = write(peer, nullptr, bytes.data(), nullptr, 0, bytes.size(), 0, cookie);
    op.kind = EPT_OP_SEND;
    return op;
  }
  int32_t post(const ept_op &op) {
    size_t posted = 0;
    const int32_t code = backend.post(worker, &op, 1, &posted);
    CHECK_EQ(posted, code == EPT_OK ? 1 : 0);
    return code;
  }

  // One poll; what it gave, its texts and bytes copied.
  std::vector<Event> poll(size_t capacity = 64) {
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
  // Polls until it gave something of `kind`; everything else that came is an error.
  Event expect(int32_t kind, uint64_t polls = 100'000) {
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
  // Nothing comes, however often it polls.
  void expect_nothing(int polls = 100) {
    CHECK(pending_.empty());
    for (; polls; --polls) {
      const std::vector<Event> events = poll();
      if (!events.empty()) {
        check::failed(__FILE__, __LINE__,
                      "an event of kind " + std::to_string(events[0].kind) + ": " + events[0].words);
      }
    }
  }
  ept_rail_counters count(uint32_t rail = 0) {
    ept_rail_counters counters = {};
    counters.size = sizeof counters;
    CHECK_OK(backend, backend.counters(worker, rail, &counters));
    return counters;
  }

  const ept_backend &backend;
  const Identity id;
  ept_instance *instance = nullptr;
  ept_worker *worker = nullptr;

 private:
  Values values_;
  ept_host host_;
  std::vector<Event> pending_;
  std::vector<ept_mem *> mems_;
  std::vector<ept_region *> regions_;
};

// All open all, and every PEER event has come.
inline void connect(const std::vector<Rank *> &ranks) {
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

// Ranks 0 to `world` - 1 of a job, connected.
class Group {
 public:
  Group(const ept_backend &backend, uint32_t world, const Options &options = {}, Identity identity = {}) {
    identity.world = world;
    std::vector<Rank *> all;
    for (identity.rank = 0; identity.rank < world; ++identity.rank) {
      ranks_.push_back(std::make_unique<Rank>(backend, identity, options));
      all.push_back(ranks_.back().get());
    }
    connect(all);
  }
  Rank &operator[](size_t rank) { return *ranks_[rank]; }
  size_t size() const { return ranks_.size(); }

 private:
  std::vector<std::unique_ptr<Rank>> ranks_;
};

// `from` may write into `bytes` of `to`.
struct Window {
  Window(Rank &from, Rank &to, size_t length, int32_t role = EPT_ROLE_DATA)
      : source(length),
        bytes(length),
        source_mem(from.enroll(source.data(), length, EPT_ACCESS_LOCAL)),
        mem(to.enroll(bytes.data(), length, EPT_ACCESS_REMOTE_WRITE, role)) {
    std::tie(blob, key) = to.grant(mem, from.id.rank, 0, length);
    region = from.import(to.id.rank, blob);
  }
  std::vector<uint8_t> source, bytes;
  ept_mem *source_mem, *mem;
  std::string blob;
  uint64_t key;
  ept_region *region;
};

}  // namespace plugin
