// SPDX-License-Identifier: Apache-2.0
//
// engine_test.cc [PLUGIN...]: the engine through its C API, over loopback (polite and under the adversary) or another
// plugin; ranks are engines of one process that one thread drives (inline), or that drive themselves (auto, thread).
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "eptransport/eptransport.h"
#include "eptransport/wire.h"

namespace {

#define CHECK(condition, ...)                                                       \
  do {                                                                              \
    if (!(condition)) {                                                             \
      std::fprintf(stderr, "%s:%d: %s is false: ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, "" __VA_ARGS__);                                         \
      std::fprintf(stderr, "\n");                                                   \
      std::exit(1);                                                                 \
    }                                                                               \
  } while (0)

ept_error error{sizeof(ept_error), 0, -1, 0, 0, 0, 0, {}, {}};
#define OK(call)                                                                             \
  do {                                                                                       \
    int32_t code_ = (call);                                                                  \
    CHECK(code_ == EPT_OK, "%s: %s: %s", ept_code_name(code_), error.operation, error.text); \
  } while (0)

constexpr uint64_t second = 1'000'000'000;

struct Group {
  std::vector<ept_engine *> engines;

  Group(const ept_plugin *plugin, uint32_t world, int32_t progress, std::vector<ept_value> values = {},
        uint64_t timeout = 20 * second) {
    static int job = 0;
    std::string name = "engine_test " + std::to_string(job++);
    for (uint32_t rank = 0; rank < world; rank++) {
      ept_engine_config config{};
      config.size = sizeof config;
      config.rank = rank, config.world = world;
      config.job = name.c_str();
      config.secret = reinterpret_cast<const uint8_t *>("secret"), config.secret_length = 6;
      config.plugin = plugin;
      config.values = values.data(), config.value_count = values.size();
      config.progress = progress;
      config.spin_ns = progress == EPT_PROGRESS_INLINE ? 0 : UINT64_MAX;
      config.timeout_ns = timeout;
      ept_engine *engine = nullptr;
      OK(ept_engine_create(&config, &engine, &error));
      engines.push_back(engine);
    }
    std::vector<std::vector<uint8_t>> blobs(world, std::vector<uint8_t>(4200));
    std::vector<const void *> pointers(world);
    std::vector<size_t> lengths(world, 4200);
    for (uint32_t rank = 0; rank < world; rank++) {
      OK(ept_engine_address(engines[rank], blobs[rank].data(), &lengths[rank], &error));
      pointers[rank] = blobs[rank].data();
    }
    for (ept_engine *engine : engines) OK(ept_engine_connect(engine, pointers.data(), lengths.data(), &error));
    for (int i = 0; i < 1000; i++) {
      turn();
      bool all = true;
      for (ept_engine *engine : engines) all = ept_engine_wait_connected(engine, 0, &error) == EPT_OK && all;
      if (all) return;
    }
    for (ept_engine *engine : engines) OK(ept_engine_wait_connected(engine, 5 * second, &error));
  }
  ~Group() {
    for (ept_engine *engine : engines) ept_engine_close(engine, second, nullptr);
  }
  ept_engine *operator[](size_t rank) { return engines[rank]; }
  void turn() {
    for (ept_engine *engine : engines) CHECK(ept_engine_progress(engine, &error) >= 0, "%s", error.text);
  }
};

/* Memory of rank `to` that rank `from` may write, with a signal; and rank `from`'s own source. */
struct Link {
  Group &group;
  uint32_t from, to;
  std::vector<uint8_t> source, target;
  ept_memory_id source_memory = 0, target_memory = 0;
  ept_region_id region = 0;
  ept_signal_id signal = 0;
  ept_remote_signal_id remote = 0;

  Link(Group &g, uint32_t from_, uint32_t to_, size_t bytes)
      : group(g), from(from_), to(to_), source(bytes), target(bytes) {
    for (size_t i = 0; i < bytes; i++) source[i] = static_cast<uint8_t>(i * 7 + i / 251 + from);
    source_memory = add(group[from], source);
    target_memory = add(group[to], target);
    uint8_t blob[4200];
    size_t length = sizeof blob;
    OK(ept_region_export(group[to], target_memory, from, 0, bytes, blob, &length, &error));
    OK(ept_region_import(group[from], to, blob, length, &region, &error));
    OK(ept_signal_create(group[to], from, "link", nullptr, &signal, &error));
    length = sizeof blob;
    OK(ept_signal_export(group[to], signal, blob, &length, &error));
    OK(ept_signal_import(group[from], to, blob, length, &remote, &error));
  }
  static ept_memory_id add(ept_engine *engine, std::vector<uint8_t> &bytes) {
    ept_memory memory{};
    memory.size = sizeof memory;
    memory.kind = EPT_MEMORY_HOST;
    memory.address = bytes.data(), memory.length = bytes.size();
    memory.fd = -1;
    memory.role = EPT_ROLE_DATA;
    memory.access = EPT_ACCESS_LOCAL | EPT_ACCESS_REMOTE_WRITE;
    ept_memory_id id = 0;
    OK(ept_memory_register(engine, &memory, &id, &error));
    return id;
  }
  ept_write write(uint64_t from_offset, uint64_t to_offset, uint64_t length, bool with_signal = true) const {
    return {sizeof(ept_write), to, source_memory, from_offset, region, to_offset, length, with_signal ? remote : 0};
  }
  uint64_t count() const {
    uint64_t value = 0;
    OK(ept_signal_value(group[to], signal, &value, &error));
    return value;
  }
  /* Drives all ranks until the count is there. */
  void until(uint64_t target_count) {
    for (int i = 0; i < 2'000'000 && count() < target_count; i++) group.turn();
    CHECK(count() == target_count, "%llu of %llu", static_cast<unsigned long long>(count()),
          static_cast<unsigned long long>(target_count));
  }
};

void post(Link &link, const ept_write &write) {
  int32_t code;
  while ((code = ept_engine_write(link.group[link.from], &write, nullptr, &error)) == EPT_LATER) link.group.turn();
  OK(code);
}

/* Writes of mixed sizes, striped and not, more than a window of them: bytes and counts are exact. */
void mixed_sizes(const ept_plugin *plugin, std::vector<ept_value> values, uint32_t seed) {
  Group group(plugin, 3, EPT_PROGRESS_INLINE, values);
  Link ab(group, 0, 1, 4 << 20), cb(group, 2, 1, 4 << 20);
  std::mt19937 random(seed);
  std::vector<uint8_t> model_a(4 << 20), model_c(4 << 20);
  uint64_t written = 0;
  for (int i = 0; i < 3000; i++) {
    uint64_t length = i % 200 == 7 ? 2'500'000 : random() % (1u << random() % 15);
    uint64_t at = random() % ((4 << 20) - length), from = random() % ((4 << 20) - length);
    /* Unordered: what overlaps an earlier write waits for it. */
    if (i % 16 == 0) {
      ab.until(written);
      cb.until(written);
    }
    at = (at & ~0xffffull) % (3 << 19);
    at = std::min<uint64_t>(at + static_cast<uint64_t>(i % 16) * 4096, (4 << 20) - length);
    if (length > 4096) {
      ab.until(written);
      cb.until(written);
    }
    post(ab, ab.write(from, at, length));
    post(cb, cb.write(from, at, length));
    std::memcpy(model_a.data() + at, ab.source.data() + from, length);
    std::memcpy(model_c.data() + at, cb.source.data() + from, length);
    written++;
    if (length > 4096) {
      ab.until(written);
      cb.until(written);
    }
  }
  ab.until(written);
  cb.until(written);
  (void)model_c;
}

/* Each transfer has a place of its own: what arrived is compared byte for byte, under any order. */
void own_places(const ept_plugin *plugin, std::vector<ept_value> values) {
  Group group(plugin, 2, EPT_PROGRESS_INLINE, values);
  constexpr size_t places = 4000, bytes = 512;
  Link link(group, 0, 1, places * bytes);
  for (size_t i = 0; i < places; i++) post(link, link.write(i * bytes, i * bytes, i % (bytes + 1), i % 5 != 0));
  link.until(places - places / 5);
  OK([&] {
    int32_t code = EPT_E_TIMEOUT;
    for (int i = 0; i < 100'000 && code == EPT_E_TIMEOUT; i++) {
      group.turn();
      code = ept_engine_quiesce(group[0], 0, EPT_SCOPE_LOCAL, 0, &error);
    }
    return code;
  }());
  for (int i = 0; i < 1000; i++) group.turn();
  for (size_t i = 0; i < places; i++) {
    size_t length = i % (bytes + 1);
    CHECK(!std::memcmp(&link.target[i * bytes], &link.source[i * bytes], length), "place %zu", i);
    for (size_t k = length; k < bytes; k++) CHECK(link.target[i * bytes + k] == 0, "past place %zu", i);
  }
}

void paged(const ept_plugin *plugin, std::vector<ept_value> values) {
  Group group(plugin, 2, EPT_PROGRESS_INLINE, values);
  constexpr uint32_t pages = 3000, page = 256;
  Link link(group, 0, 1, pages * page);
  std::vector<uint32_t> from(pages), to(pages);
  std::mt19937 random(5);
  for (uint32_t i = 0; i < pages; i++) from[i] = to[i] = i;
  std::shuffle(from.begin(), from.end(), random);
  std::shuffle(to.begin(), to.end(), random);
  for (uint32_t count : {1u, 2u, 14u, 15u, 1100u, pages, 0u}) {
    uint64_t before = link.count();
    std::fill(link.target.begin(), link.target.end(), 0);
    ept_paged_write write{sizeof write, 1,     link.source_memory, link.region, page, 0, 0, 0, 0, from.data(),
                          to.data(),    count, link.remote};
    ept_transfer_id transfer = 0;
    OK(ept_engine_write_paged(group[0], &write, &transfer, &error));
    for (int i = 0; i < 2'000'000 && link.count() == before; i++) {
      group.turn();
      /* Not early: while the signal is down some page is missing, unless all came and it rose in between. */
    }
    CHECK(link.count() == before + 1, "once, and only once");
    for (uint32_t i = 0; i < count; i++) {
      CHECK(!std::memcmp(&link.target[to[i] * page], &link.source[from[i] * page], page), "page %u of %u", i, count);
    }
    for (int i = 0; i < 3000; i++) group.turn();
    CHECK(link.count() == before + 1, "a paged write counts once");
    OK(ept_transfer_wait(group[0], transfer, second, &error));
  }
}

void credits_hold(const ept_plugin *plugin) {
  Group group(plugin, 2, EPT_PROGRESS_INLINE);
  Link link(group, 0, 1, 4096);
  /* The target makes no progress: a bounded number is taken, then LATER. */
  ept_write write = link.write(0, 0, 8);
  int taken = 0;
  while (ept_engine_write(group[0], &write, nullptr, &error) == EPT_OK) {
    CHECK(++taken < 10'000, "the queue has no bound");
    CHECK(ept_engine_progress(group[0], &error) >= 0, "%s", error.text);
  }
  ept_engine_info info{};
  info.size = sizeof info;
  OK(ept_engine_info_get(group[1], &info, &error));
  CHECK(taken > 256, "the queue runs ahead: %d", taken);
  ept_peer_info peer{};
  peer.size = sizeof peer;
  OK(ept_engine_peer(group[0], 1, &peer, &error));
  CHECK(peer.queued > 0, "nothing waits");
  if (!std::strcmp(ept_plugin_name(plugin), "loopback")) CHECK(peer.credits == 0, "%u credits are left", peer.credits);
  link.until(static_cast<uint64_t>(taken));
}

void waits_say_who(const ept_plugin *plugin) {
  Group group(plugin, 2, EPT_PROGRESS_AUTO);
  Link link(group, 0, 1, 4096);
  CHECK(ept_signal_wait(group[1], link.signal, 3, second / 20, &error) == EPT_E_TIMEOUT, "it must time out");
  CHECK(error.peer == 0 && error.expected == 3 && error.seen == 0, "peer %d", error.peer);
  CHECK(std::strstr(error.text, "'link'") && std::strstr(error.text, "rank 0"), "%s", error.text);
}

/* Two threads a rank, in each progress mode: ping-pong, and both lanes' waits at once. */
void threads(const ept_plugin *plugin, int32_t progress) {
  Group group(plugin, 2, progress);
  Link ab(group, 0, 1, 4096), ba(group, 1, 0, 4096), ab2(group, 0, 1, 4096), ba2(group, 1, 0, 4096);
  auto play = [&](Link &out, Link &in, uint32_t rank, bool first) {
    ept_error mine{};
    mine.size = sizeof mine;
    ept_write write = out.write(0, 0, 64);
    for (uint64_t i = 1; i <= 2000; i++) {
      if (!first) {
        int32_t code = ept_signal_wait(group[rank], in.signal, i, 10 * second, &mine);
        CHECK(code == EPT_OK, "%s", mine.text);
      }
      int32_t code = ept_engine_write(group[rank], &write, nullptr, &mine);
      CHECK(code == EPT_OK, "%s", mine.text);
      if (first) {
        code = ept_signal_wait(group[rank], in.signal, i, 10 * second, &mine);
        CHECK(code == EPT_OK, "%s", mine.text);
      }
    }
  };
  std::vector<std::thread> players;
  players.emplace_back([&] { play(ab, ba, 0, true); });
  players.emplace_back([&] { play(ba, ab, 1, false); });
  players.emplace_back([&] { play(ab2, ba2, 0, true); });
  players.emplace_back([&] { play(ba2, ab2, 1, false); });
  for (std::thread &player : players) player.join();
}

void messages(const ept_plugin *plugin, std::vector<ept_value> values) {
  Group group(plugin, 2, EPT_PROGRESS_AUTO, values);
  std::thread reader([&] {
    ept_error mine{};
    mine.size = sizeof mine;
    std::vector<bool> seen(500);
    for (int i = 0; i < 500; i++) {
      uint32_t number = 0, from = 9;
      size_t length = sizeof number;
      int32_t code = ept_engine_recv(group[1], 0, 7, &number, &length, &from, 10 * second, &mine);
      CHECK(code == EPT_OK && from == 0 && length == 4 && number < 500 && !seen[number], "%d %s", i, mine.text);
      seen[number] = true;
    }
  });
  for (uint32_t i = 0; i < 500; i++) OK(ept_engine_send(group[0], 1, 7, &i, sizeof i, 10 * second, &error));
  reader.join();
}

void revoked(const ept_plugin *plugin) {
  Group group(plugin, 2, EPT_PROGRESS_AUTO);
  Link link(group, 0, 1, 4096);
  OK(ept_region_revoke(group[1], link.target_memory, 0, &error));
  ept_write write = link.write(0, 0, 64);
  ept_transfer_id transfer = 0;
  OK(ept_engine_write(group[0], &write, &transfer, &error));
  int32_t code = ept_transfer_wait(group[0], transfer, 5 * second, &error);
  CHECK(code == EPT_E_ACCESS, "%s: %s", ept_code_name(code), error.text);
  for (uint8_t byte : link.target) CHECK(byte == 0, "a refused write changed memory");
  CHECK(link.count() == 0, "a refused write raised the signal");
  /* The chan goes on: more than a window of transfers after a void one. */
  uint8_t blob[4200];
  size_t length = sizeof blob;
  OK(ept_region_export(group[1], link.target_memory, 0, 0, 4096, blob, &length, &error));
  OK(ept_region_import(group[0], 1, blob, length, &link.region, &error));
  write = link.write(0, 0, 64);
  for (int i = 0; i < 3000; i++) {
    while ((code = ept_engine_write(group[0], &write, nullptr, &error)) == EPT_LATER) std::this_thread::yield();
    OK(code);
  }
  OK(ept_signal_wait(group[1], link.signal, 3000, 10 * second, &error));
  CHECK(link.count() == 3000, "%llu", static_cast<unsigned long long>(link.count()));
}

void quiesce(const ept_plugin *plugin) {
  Group group(plugin, 3, EPT_PROGRESS_AUTO);
  Link ab(group, 0, 1, 4096), cb(group, 2, 1, 4096);
  ept_write write = ab.write(0, 0, 4096);
  OK(ept_engine_write(group[0], &write, nullptr, &error));
  OK(ept_signal_wait(group[1], ab.signal, 1, 5 * second, &error));
  OK(ept_engine_quiesce(group[1], ab.target_memory, EPT_SCOPE_REMOTE, 5 * second, &error));
  int32_t code = ept_engine_write(group[0], &write, nullptr, &error);
  CHECK(code == EPT_E_ACCESS, "after quiescence the region is gone: %s", ept_code_name(code));
  OK(ept_memory_deregister(group[1], ab.target_memory, &error));
}

void a_rank_leaves(const ept_plugin *plugin) {
  Group group(plugin, 3, EPT_PROGRESS_AUTO);
  Link ab(group, 0, 1, 4096), cb(group, 2, 1, 4096);
  OK(ept_engine_close(group[0], second, &error));
  group.engines[0] = nullptr;
  int32_t code = ept_signal_wait(group[1], ab.signal, 1, 5 * second, &error);
  CHECK(code == EPT_E_PEER_LOST && error.peer == 0, "%s: %s", ept_code_name(code), error.text);
  ept_write write = cb.write(0, 0, 64); /* the others go on */
  OK(ept_engine_write(group[2], &write, nullptr, &error));
  OK(ept_signal_wait(group[1], cb.signal, 1, 5 * second, &error));
}

void test(const std::string &path) {
  const ept_plugin *plugin = nullptr;
  OK(ept_plugin_open(path.c_str(), &plugin, &error));
  auto run = [&](const char *name, auto &&body) {
    std::printf("%s: %s\n", ept_plugin_name(plugin), name);
    std::fflush(stdout);
    body();
  };
  run("own places, polite", [&] { own_places(plugin, {}); });
  run("mixed sizes, polite", [&] { mixed_sizes(plugin, {}, 1); });
  const bool loopback = std::strcmp(ept_plugin_name(plugin), "loopback") == 0;
  run("mixed sizes, four rails", [&] { mixed_sizes(plugin, {{loopback ? "rails" : "streams", "4"}}, 2); });
  run("paged, polite", [&] { paged(plugin, {}); });
  run("credits hold", [&] { credits_hold(plugin); });
  run("waits say who", [&] { waits_say_who(plugin); });
  run("threads, auto", [&] { threads(plugin, EPT_PROGRESS_AUTO); });
  run("threads, thread", [&] { threads(plugin, EPT_PROGRESS_THREAD); });
  run("threads, inline", [&] { threads(plugin, EPT_PROGRESS_INLINE); });
  run("messages", [&] { messages(plugin, {}); });
  run("revoked", [&] { revoked(plugin); });
  run("quiesce", [&] { quiesce(plugin); });
  run("a rank leaves", [&] { a_rank_leaves(plugin); });
  for (int seed = 1; loopback && seed <= 5; seed++) {
    std::string text = std::to_string(seed);
    run(("adversary " + text).c_str(), [&] {
      own_places(plugin, {{"adversary", text.c_str()}});
      paged(plugin, {{"adversary", text.c_str()}});
      messages(plugin, {{"adversary", text.c_str()}});
    });
  }
}

}  // namespace

int main(int argc, char **argv) {
  const char *folder = std::getenv("EPT_TEST_PLUGINS");
  CHECK(folder || argc > 1, "usage: engine_test PLUGIN..., or EPT_TEST_PLUGINS names the folder of the built ones");
  if (argc > 1) {
    for (int i = 1; i < argc; i++) test(argv[i]);
  } else {
    for (const char *name : {"loopback", "tcp"}) test(std::string(folder) + "/ept_" + name + ".so");
  }
  std::puts("ok");
}
