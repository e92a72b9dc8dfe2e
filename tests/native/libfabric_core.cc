// SPDX-License-Identifier: Apache-2.0
//
// What the backend libfabric asks of a card, and what it forgets when it should: GPU memory as a dmabuf and by its
// address, what efa-direct leaves to its users, levels of completion, memory that is deregistered while the provider
// still holds an operation. Over the null network with a watcher in front, so no libfabric is needed.
#include <sys/statvfs.h>

#include <algorithm>
#include <cstdlib>
#include <map>

#include "../../native/engine/sha256.h"
#include "../../plugins/libfabric/host.h"
#include "libfabric_watch.h"
#include "plugin.h"

extern "C" const ept_backend ept_backend_v1;

namespace {
watch::Card *the_card = nullptr;
}

namespace libfabric {
// In place of library.cc.
std::shared_ptr<Library> open_library(const std::string &, plugin::Refusal *) { return watch::make(the_card); }
std::string mapped_libraries() { return ""; }
}  // namespace libfabric

namespace {

using plugin::Options;
using plugin::Rank;
using plugin::Window;

const ept_backend &backend = ept_backend_v1;
constexpr uint64_t kLevels = FI_TRANSMIT_COMPLETE | FI_DELIVERY_COMPLETE | FI_INJECT_COMPLETE | FI_MATCH_COMPLETE;

// Two ranks over one card, connected.
struct Pair {
  explicit Pair(watch::Card *card, Options options = {}) {
    the_card = card;
    options.emplace("provider", "null");
    options["unproven"] = "1";
    from = std::make_unique<Rank>(backend, plugin::Identity{.rank = 0}, options);
    to = std::make_unique<Rank>(backend, plugin::Identity{.rank = 1}, options);
    CHECK_OK(backend, from->open_peer(1, 0, to->address()));
    CHECK_OK(backend, to->open_peer(0, 0, from->address()));
    for (bool up[] = {false, false}; !up[0] || !up[1];) {
      up[0] |= !from->poll().empty();
      up[1] |= !to->poll().empty();
    }
  }
  ept_caps caps() const {
    ept_caps caps{};
    caps.size = sizeof caps;
    CHECK_OK(backend, backend.caps(from->instance, &caps));
    return caps;
  }
  std::unique_ptr<Rank> from, to;
};

// ---- GPU memory

ept_memory gpu_memory(int32_t kind, void *address, uint64_t length) {
  ept_memory memory{};
  memory.size = sizeof memory;
  memory.kind = kind;
  memory.address = address;
  memory.length = length;
  memory.cuda_device = 3;
  memory.fd = kind == EPT_MEMORY_DMABUF ? 77 : -1;
  memory.fd_offset = kind == EPT_MEMORY_DMABUF ? 8192 : 0;
  memory.role = EPT_ROLE_DATA;
  memory.access = EPT_ACCESS_LOCAL | EPT_ACCESS_REMOTE_WRITE;
  return memory;
}

void a_dmabuf_is_registered_as_one() {
  check::running("dmabuf");
  watch::Card card;
  card.gpu = true;
  Pair pair(&card, {{"gpu", "1"}});
  CHECK_EQ(pair.caps().memory_kinds & (EPT_MEMORY_CUDA | EPT_MEMORY_DMABUF), EPT_MEMORY_CUDA | EPT_MEMORY_DMABUF);
  CHECK((card.asked_caps.front() & FI_HMEM) != 0);
  std::vector<uint8_t> bytes(65536);
  const ept_memory memory = gpu_memory(EPT_MEMORY_DMABUF, bytes.data(), bytes.size());
  card.registrations.clear();
  ept_mem *mem = nullptr;
  CHECK_OK(backend, backend.mem_register(pair.from->instance, &memory, &mem));
  pair.from->grant(mem, 1, 4096, 512);
  CHECK_EQ(card.registrations.size(), size_t{2});
  for (const watch::Registration &seen : card.registrations) {
    CHECK(seen.dmabuf && seen.flags == uint64_t{1} << 40);
    CHECK_EQ(seen.iface, FI_HMEM_CUDA);
    CHECK_EQ(seen.device, 3);
    CHECK_EQ(seen.fd, 77);
    CHECK(seen.base == bytes.data() - 8192);
  }
  // The whole, and what was exported of it: bounds are those of the registration.
  CHECK_EQ(card.registrations[0].offset, 8192u);
  CHECK_EQ(card.registrations[0].length, 65536u);
  CHECK_EQ(card.registrations[1].offset, 8192u + 4096u);
  CHECK_EQ(card.registrations[1].length, 512u);
  CHECK_EQ(card.registrations[1].access, uint64_t{FI_REMOTE_WRITE});
  CHECK_OK(backend, backend.mem_deregister(mem));
}

// What refuses dmabufs gets the address; what has no room, or fails both ways, is told so.
void an_address_comes_second() {
  check::running("dmabuf, then address");
  std::vector<uint8_t> bytes(4096);
  for (const int refusal : {-FI_EOPNOTSUPP, -FI_ENOSYS, -FI_EINVAL}) {
    watch::Card card;
    card.gpu = true;
    Pair pair(&card, {{"gpu", "1"}});
    card.dmabuf_answer = refusal;
    card.registrations.clear();
    ept_memory memory = gpu_memory(EPT_MEMORY_DMABUF, bytes.data(), bytes.size());
    ept_mem *mem = nullptr;
    CHECK_OK(backend, backend.mem_register(pair.from->instance, &memory, &mem));
    CHECK_EQ(card.registrations.size(), size_t{2});
    const watch::Registration &second = card.registrations[1];
    CHECK(!second.dmabuf && second.flags == 0 && second.address == bytes.data());
    CHECK_EQ(second.iface, FI_HMEM_CUDA);
    CHECK_EQ(second.device, 3);
    CHECK_OK(backend, backend.mem_deregister(mem));
    card.address_answer = -FI_EFAULT;
    CHECK_EQ(backend.mem_register(pair.from->instance, &memory, &mem), EPT_E_IO);
    card.dmabuf_answer = -FI_ENOMEM;
    card.registrations.clear();
    CHECK_EQ(backend.mem_register(pair.from->instance, &memory, &mem), EPT_E_NOMEM);
    CHECK_EQ(card.registrations.size(), size_t{1});
    memory.fd = -1;
    CHECK_EQ(backend.mem_register(pair.from->instance, &memory, &mem), EPT_E_INVALID);
  }
}

void an_old_library_knows_no_dmabuf() {
  check::running("1.17");
  watch::Card card;
  card.gpu = true;
  card.version = FI_VERSION(1, 17);
  Pair pair(&card, {{"gpu", "1"}});
  CHECK_EQ(pair.caps().memory_kinds & (EPT_MEMORY_CUDA | EPT_MEMORY_DMABUF), EPT_MEMORY_CUDA);
  std::vector<uint8_t> bytes(4096);
  ept_memory memory = gpu_memory(EPT_MEMORY_DMABUF, bytes.data(), bytes.size());
  ept_mem *mem = nullptr;
  CHECK_EQ(backend.mem_register(pair.from->instance, &memory, &mem), EPT_E_UNSUPPORTED);
  CHECK_HAS(plugin::error_text(backend), "dmabuf libfabric 1.20");
  memory = gpu_memory(EPT_MEMORY_CUDA, bytes.data(), bytes.size());
  card.registrations.clear();
  CHECK_OK(backend, backend.mem_register(pair.from->instance, &memory, &mem));
  CHECK_EQ(card.registrations[0].iface, FI_HMEM_CUDA);
  CHECK(!card.registrations[0].dmabuf);
  CHECK_OK(backend, backend.mem_deregister(mem));
}

// A process without a GPU never asks for FI_HMEM, and tells libfabric to leave GPUs alone.
void without_a_gpu_nothing_is_asked() {
  check::running("no GPU");
  unsetenv("FI_HMEM");
  watch::Card card;
  card.gpu = true;
  Pair pair(&card, {{"gpu", "0"}});
  for (const uint64_t caps : card.asked_caps) CHECK_EQ(caps & FI_HMEM, 0u);
  CHECK(getenv("FI_HMEM") != nullptr && std::string(getenv("FI_HMEM")) == "system");
  CHECK_EQ(pair.caps().memory_kinds & (EPT_MEMORY_CUDA | EPT_MEMORY_DMABUF), 0);
  std::vector<uint8_t> bytes(4096);
  const ept_memory memory = gpu_memory(EPT_MEMORY_CUDA, bytes.data(), bytes.size());
  ept_mem *mem = nullptr;
  CHECK_EQ(backend.mem_register(pair.from->instance, &memory, &mem), EPT_E_UNSUPPORTED);
  for (const watch::Registration &seen : card.registrations) CHECK_EQ(seen.iface, FI_HMEM_SYSTEM);
  unsetenv("FI_HMEM");
}

// ---- efa-direct

void efa_direct_gets_what_it_asks_of_its_users() {
  check::running("efa-direct");
  watch::Card card;
  card.provider = "efa";
  card.fabric = "efa-direct";
  card.mode = FI_CONTEXT2 | FI_RX_CQ_DATA;
  card.most_rma = 1 << 20;
  Pair pair(&card, {{"provider", "efa-direct"}});
  const ept_caps caps = pair.caps();
  CHECK_EQ(caps.max_message, uint64_t{1} << 20);  // segmentation is the engine's, below what the device takes
  CHECK(caps.max_send <= 8192);
  CHECK_EQ(caps.waived, 0u);
  CHECK((card.asked_modes.front() & FI_CONTEXT2) != 0 && (card.asked_modes.front() & FI_RX_CQ_DATA) != 0);
  // Shared memory and CUDA's API off, RNR not for ever; before the endpoint is enabled, or they don't count.
  CHECK(!card.set_late);
  constexpr int kCudaApi = 10, kSharedMemory = 11;
  CHECK(card.options.count(kCudaApi) == 1 && card.options[kCudaApi] == 0);
  CHECK(card.options.count(kSharedMemory) == 1 && card.options[kSharedMemory] == 0);
  CHECK(card.options.count(FI_OPT_EFA_RNR_RETRY) == 1 && card.options[FI_OPT_EFA_RNR_RETRY] < 7);

  Window window(*pair.from, *pair.to, 4096);
  const ept_op too_long =
      Rank::write(1, window.source_mem, window.source.data(), window.region, 0, (1 << 20) + 1, 1, 1);
  CHECK_EQ(pair.from->post(too_long), EPT_E_INVALID);
  for (const uint64_t length : {uint64_t{4096}, uint64_t{1}, uint64_t{0}})
    CHECK_EQ(pair.from->post(Rank::write(1, window.source_mem, window.source.data(), window.region, 0, length, 1, 1)),
             EPT_OK);
  CHECK_EQ(pair.from->post(Rank::signal(1, window.region, 1, 1)), EPT_OK);
  CHECK_EQ(pair.from->post(Rank::message(1, "hello", 1)), EPT_OK);
  CHECK_EQ(card.writes.size(), size_t{4});
  for (const auto *list : {&card.writes, &card.sends, &card.receives}) {
    CHECK(!list->empty());
    for (const watch::Posted &post : *list) CHECK(post.descriptor);
  }
  // The card acknowledges by itself: no level is asked for.
  for (const watch::Posted &write : card.writes) CHECK_EQ(write.flags, 0u);
  for (int i = 0; i < 5; ++i) pair.from->expect(EPT_EVENT_LOCAL_DONE);
  // The device has no receive for an immediate but those that are posted: with one peer, one for each credit and
  // message.
  CHECK(card.receives.size() >= 1024);
}

// The other fabric of the same provider is not taken for it, and a card that has no writes is not taken at all.
void efa_direct_is_told_from_efa() {
  check::running("fabric name");
  for (const bool writes : {true, false}) {
    watch::Card card;
    card.provider = "efa";
    card.fabric = writes ? "efa" : "efa-direct";
    card.caps = writes ? FI_MSG | FI_RMA : FI_MSG;
    the_card = &card;
    ept_instance *instance = nullptr;
    const plugin::Values values(backend, {{"provider", "efa-direct"}});
    CHECK_EQ(Rank::open(backend, {.rank = 0}, values, plugin::host(), &instance), EPT_E_UNAVAILABLE);
    CHECK_HAS(plugin::error_text(backend), "on the fabric efa-direct");
  }
}

// Where libfabric's software does the writes, only delivery tells of a refusal.
void emulated_writes_are_asked_for_delivery() {
  check::running("emulated writes");
  for (const char *completion : {"auto", "transmit"}) {
    watch::Card card;
    card.provider = card.fabric = "efa";
    card.mode = FI_CONTEXT2;
    card.emulates = true;
    Pair pair(&card, {{"provider", "efa"}, {"completion", completion}});
    CHECK(pair.caps().waived != 0);
    Window window(*pair.from, *pair.to, 64);
    CHECK_EQ(pair.from->post(Rank::write(1, window.source_mem, window.source.data(), window.region, 0, 64, 1, 1)),
             EPT_OK);
    CHECK_EQ(pair.from->post(Rank::signal(1, window.region, 1, 1)), EPT_OK);
    CHECK_EQ(card.writes.size(), size_t{2});
    const bool delivery = std::string(completion) == "auto";
    for (const watch::Posted &write : card.writes) {
      CHECK_EQ(write.flags & kLevels, delivery ? FI_DELIVERY_COMPLETE : 0);
      CHECK(write.descriptor);
    }
    for (int i = 0; i < 2; ++i) pair.from->expect(EPT_EVENT_LOCAL_DONE);
    CHECK_EQ(pair.to->expect(EPT_EVENT_IMM).immediate, 1u);
  }
}

// shm of 1.x never completes an empty write at that level (and no other release is asked for less).
void empty_writes_over_an_old_shm_ask_for_less() {
  check::running("empty writes");
  struct statvfs room{};  // without which shm is refused
  if (statvfs("/dev/shm", &room) != 0 || uint64_t{room.f_bavail} * room.f_frsize < (64 << 20)) return;
  for (const uint32_t version : {FI_VERSION(1, 17), FI_VERSION(2, 5)}) {
    watch::Card card;
    card.provider = card.fabric = "shm";
    card.version = version;
    Pair pair(&card, {{"provider", "shm"}});
    Window window(*pair.from, *pair.to, 64);
    CHECK_EQ(pair.from->post(Rank::write(1, window.source_mem, window.source.data(), window.region, 0, 64, 1, 1)),
             EPT_OK);
    CHECK_EQ(pair.from->post(Rank::signal(1, window.region, 1, 1)), EPT_OK);
    CHECK_EQ(card.writes[0].flags & kLevels, 0u);
    CHECK_EQ(card.writes[1].flags & kLevels, version < FI_VERSION(2, 0) ? uint64_t{FI_TRANSMIT_COMPLETE} : 0u);
    for (int i = 0; i < 2; ++i) pair.from->expect(EPT_EVENT_LOCAL_DONE);
  }
}

// ---- what was found by use

// Every event says its size, whatever the caller's array said.
void events_have_their_size() {
  check::running("event size");
  watch::Card card;
  Pair pair(&card);
  Window window(*pair.from, *pair.to, 64);
  CHECK_EQ(pair.from->post(Rank::write(1, window.source_mem, window.source.data(), window.region, 0, 64, 1, 1)),
           EPT_OK);
  CHECK_EQ(pair.from->post(Rank::message(1, "hello", 2)), EPT_OK);
  CHECK_OK(backend, backend.quiesce(pair.from->worker, UINT32_MAX, EPT_SCOPE_LOCAL, 3));
  int seen = 0;
  for (Rank *rank : {pair.from.get(), pair.to.get()}) {
    for (int turn = 0; turn < 100; ++turn) {
      ept_event events[4];
      memset(events, 0, sizeof events);
      const int32_t count = backend.poll(rank->worker, events, 4);
      for (int32_t i = 0; i < count; ++i) CHECK_EQ(events[i].size, sizeof(ept_event));
      seen += count;
    }
  }
  CHECK_EQ(seen, 5);  // two done, quiesced; an immediate, a message
}

// The memory of an operation that is over is nobody's: closing the worker does not count it down again.
void closing_counts_no_memory_twice() {
  check::running("stale memory");
  watch::Card card;
  Pair pair(&card);
  Window window(*pair.from, *pair.to, 64);
  for (int i = 0; i < 8; ++i) {
    CHECK_EQ(pair.from->post(Rank::write(1, window.source_mem, window.source.data(), window.region, 0, 64, 1, 1)),
             EPT_OK);
    pair.from->expect(EPT_EVENT_LOCAL_DONE);
  }
  pair.from->leave();  // which checks that all memory is given back
}

uint64_t a_second_later() { return plugin::now_ns() + 1'000'000'000; }

// A peer's operations are told when it has been gone for long, and their memory may go; the provider may complete them
// long after that.
void memory_goes_before_the_provider_is_done() {
  check::running("deregister, then complete");
  watch::Card card;
  card.holds_writes = true;
  Pair pair(&card);
  Window window(*pair.from, *pair.to, 64);
  std::vector<uint8_t> bytes(64);
  ept_mem *mem = pair.from->enroll(bytes.data(), bytes.size());
  (void)mem;
  ept_memory memory = gpu_memory(EPT_MEMORY_HOST, bytes.data(), bytes.size());
  ept_mem *gone = nullptr;
  CHECK_OK(backend, backend.mem_register(pair.from->instance, &memory, &gone));
  CHECK_EQ(pair.from->post(Rank::write(1, gone, bytes.data(), window.region, 0, 64, 1, 42)), EPT_OK);
  pair.from->expect_nothing();
  CHECK_EQ(backend.mem_deregister(gone), EPT_E_INVALID);
  CHECK_OK(backend, backend.peer_close(pair.from->instance, 1));
  plugin::clock = a_second_later;
  const plugin::Event told = pair.from->expect(EPT_EVENT_ERROR);
  CHECK_EQ(told.cookie, 42u);
  CHECK_OK(backend, backend.mem_deregister(gone));
  card.holds_writes = false;
  pair.from->expect_nothing();
  plugin::clock = plugin::now_ns;
}

// What libfabric reads from the environment: a card's keys die with their registration, and the completion queue that
// rxm makes of verbs fits the ranks. What is set stays.
void the_environment_is_prepared() {
  check::running("the environment");
  const char *const names[] = {"FI_UNIVERSE_SIZE", "FI_MR_CACHE_MAX_COUNT", "FI_EFA_MR_CACHE_ENABLE", "WORLD_SIZE"};
  using Said = std::map<std::string, std::string>;
  auto prepared = [&](const char *provider, uint32_t world, const Said &given) {
    for (const char *name : names) unsetenv(name);
    for (const auto &[name, value] : given) setenv(name.c_str(), value.c_str(), 1);
    libfabric::prepare_environment(false, provider, world);
    Said said;
    for (const char *name : names)
      if (const char *value = getenv(name); value != nullptr && given.count(name) == 0) said[name] = value;
    return said;
  };
  CHECK(prepared("tcp", 40, {}) == (Said{{"FI_EFA_MR_CACHE_ENABLE", "0"}}));
  Said verbs{{"FI_EFA_MR_CACHE_ENABLE", "0"}, {"FI_MR_CACHE_MAX_COUNT", "0"}, {"FI_UNIVERSE_SIZE", "80"}};
  CHECK(prepared("verbs", 40, {}) == verbs);
  CHECK(prepared("verbs;ofi_rxm", 0, {{"WORLD_SIZE", "40"}}) == verbs);  // a probe
  verbs["FI_UNIVERSE_SIZE"] = "16";
  CHECK(prepared("verbs", 2, {}) == verbs);
  verbs.erase("FI_UNIVERSE_SIZE");
  CHECK(prepared("verbs", 2, {{"FI_UNIVERSE_SIZE", "7"}}) == verbs);
  for (const char *name : names) unsetenv(name);
}

}  // namespace

int main() {
  plugin::hmac = [](void *, const void *key, size_t key_length, const void *data, size_t length, uint8_t *mac) {
    ept::hmac_sha256(key, key_length, data, length, mac);
  };
  a_dmabuf_is_registered_as_one();
  an_address_comes_second();
  an_old_library_knows_no_dmabuf();
  without_a_gpu_nothing_is_asked();
  efa_direct_gets_what_it_asks_of_its_users();
  efa_direct_is_told_from_efa();
  emulated_writes_are_asked_for_delivery();
  empty_writes_over_an_old_shm_ask_for_less();
  events_have_their_size();
  closing_counts_no_memory_twice();
  memory_goes_before_the_provider_is_done();
  the_environment_is_prepared();
  return 0;
}
