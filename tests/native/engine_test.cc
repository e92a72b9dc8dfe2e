// SPDX-License-Identifier: Apache-2.0
//
// engine_test.cc [PLUGIN...]: the engine through its C API, over loopback (polite and under the adversary) or another
// plugin; ranks are engines of one process that one thread drives (inline), or that drive themselves (auto, thread).
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "engine_world.h"

using namespace world;

namespace {

using Values = std::vector<std::pair<std::string, std::string>>;

constexpr uint64_t kPatience = 60 * second;  // for what comes at once

// Engines of one backend, connected to each other.
struct Group : World {
  Group(const std::string &backend, uint32_t size, int32_t progress, Values values = {})
      : World(size, {.backend = backend,
                     .progress = progress,
                     .spin_ns = progress == EPT_PROGRESS_INLINE ? 0 : UINT64_MAX,
                     .values = std::move(values)}) {
    connect_all();
  }
};

// Writes of mixed sizes, striped and not, more than a window of them: bytes and counts are exact.
void mixed_sizes(const std::string &backend, const Values &values, uint32_t seed) {
  Group group(backend, 3, EPT_PROGRESS_INLINE, values);
  constexpr uint64_t size = 4 << 20, most = 4096;  // `most`: of one that others may be under way with
  struct Way {
    Route route;
    std::vector<uint8_t> model;
  };
  Way ways[] = {{Route(group, 0, 1, size), std::vector<uint8_t>(size)},
                {Route(group, 2, 1, size), std::vector<uint8_t>(size)}};
  std::mt19937 random(seed);
  uint64_t written = 0;
  auto all_arrived = [&] {
    for (const Way &way : ways) way.route.until_count(written);
  };
  for (uint64_t i = 0; i < 3000; i++) {
    const uint64_t length = i % 200 == 7 ? 2'500'000 : random() % (1u << random() % 15);
    // Unordered, so what may overlap an earlier write waits for it. Sixteen at a time have places of their own.
    if (i % 16 == 0 || length > most) all_arrived();
    const uint64_t place = (random() % (size - length) & ~0xffffull) % (3 << 19) + i % 16 * most;
    const uint64_t from = random() % (size - length), to = std::min(place, size - length);
    written++;
    for (Way &way : ways) {
      const Route &route = way.route;
      OK(route.post({sizeof(ept_write), 1, route.source_memory, from, route.region, to, length, route.remote}));
      std::memcpy(way.model.data() + to, route.source.data() + from, length);
    }
    if (length > most) all_arrived();
  }
  all_arrived();
  for (const Way &way : ways) CHECK(way.route.target == way.model);
}

// Each transfer has a place of its own: what arrived is compared byte for byte, under any order.
void own_places(const std::string &backend, const Values &values) {
  Group group(backend, 2, EPT_PROGRESS_INLINE, values);
  constexpr size_t places = 4000, bytes = 512;
  Route route(group, 0, 1, places * bytes);
  for (size_t i = 0; i < places; i++) {
    ept_write write = route.write(i * bytes, i % (bytes + 1));
    if (i % 5 == 0) write.signal = 0;
    OK(route.post(write));
  }
  route.until_count(places - places / 5);
  group.until("all have ended",
              [&] { return ept_engine_quiesce(group[0], 0, EPT_SCOPE_LOCAL, 0, &error) != EPT_E_TIMEOUT; });
  group.turns(1000);
  for (size_t i = 0; i < places; i++) {
    const size_t length = i % (bytes + 1);
    CHECK(!std::memcmp(&route.target[i * bytes], &route.source[i * bytes], length));
    for (size_t k = length; k < bytes; k++) CHECK_EQ(route.target[i * bytes + k], 0);  // past the place
  }
}

void paged(const std::string &backend, const Values &values) {
  Group group(backend, 2, EPT_PROGRESS_INLINE, values);
  constexpr uint32_t pages = 3000, page = 256;
  Route route(group, 0, 1, pages * page);
  std::vector<uint32_t> from(pages), to(pages);
  std::mt19937 random(5);
  for (uint32_t i = 0; i < pages; i++) from[i] = to[i] = i;
  std::shuffle(from.begin(), from.end(), random);
  std::shuffle(to.begin(), to.end(), random);
  uint64_t written = 0;
  for (const uint32_t count : {1u, 2u, 14u, 15u, 1100u, pages, 0u}) {
    std::fill(route.target.begin(), route.target.end(), 0);
    const ept_paged_write write{sizeof write, 1,     route.source_memory, route.region, page, 0, 0, 0, 0, from.data(),
                                to.data(),    count, route.remote};
    ept_transfer_id transfer = 0;
    OK(ept_engine_write_paged(group[0], &write, &transfer, &error));
    route.until_count(++written);  // not before the last page
    for (uint32_t i = 0; i < count; i++)
      CHECK(!std::memcmp(&route.target[to[i] * page], &route.source[from[i] * page], page));
    group.turns(3000);
    CHECK_EQ(route.count(), written);  // a paged write counts once
    OK(ept_transfer_wait(group[0], transfer, kPatience, &error));
  }
}

// The target makes no progress: a bounded number is taken, then LATER.
void credits_hold(const std::string &backend) {
  Group group(backend, 2, EPT_PROGRESS_INLINE);
  Route route(group, 0, 1, 4096);
  const ept_write write = route.write(0, 8);
  uint64_t taken = 0;
  while (ept_engine_write(group[0], &write, nullptr, &error) == EPT_OK) {
    CHECK(++taken < 10'000);  // the queue has a bound
    CHECK(ept_engine_progress(group[0], &error) >= 0);
  }
  CHECK(taken > 256);  // the queue runs ahead
  const ept_peer_info peer = group.info(0, 1);
  CHECK(peer.queued > 0);
  if (std::strcmp(ept_plugin_name(plugin_of(backend)), "loopback") == 0) CHECK_EQ(peer.credits, 0);
  route.until_count(taken);
}

void waits_say_who(const std::string &backend) {
  Group group(backend, 2, EPT_PROGRESS_AUTO);
  Route route(group, 0, 1, 4096);
  CHECK_EQ(ept_signal_wait(group[1], route.signal, 3, second / 20, &error), EPT_E_TIMEOUT);
  CHECK_EQ(error.peer, 0);
  CHECK_EQ(error.expected, 3);
  CHECK_EQ(error.seen, 0);
  CHECK_HAS(error.text, "'route'");
  CHECK_HAS(error.text, "rank 0");
}

// Two threads a rank, in each progress mode: ping-pong, and both lanes' waits at once.
void threads(const std::string &backend, int32_t progress) {
  Group group(backend, 2, progress);
  Route ab(group, 0, 1, 4096), ba(group, 1, 0, 4096), ab2(group, 0, 1, 4096), ba2(group, 1, 0, 4096);
  auto play = [&](const Route &out, const Route &in, bool first) {
    ept_error mine{};
    mine.size = sizeof mine;
    auto ok = [&](int32_t code) { check::ok(__FILE__, __LINE__, "a turn", code, mine); };
    ept_engine *engine = group[out.from];
    const ept_write write = out.write(0, 64);
    for (uint64_t i = 1; i <= 2000; i++) {
      if (!first) ok(ept_signal_wait(engine, in.signal, i, kPatience, &mine));
      ok(ept_engine_write(engine, &write, nullptr, &mine));
      if (first) ok(ept_signal_wait(engine, in.signal, i, kPatience, &mine));
    }
  };
  std::vector<std::thread> players;
  players.emplace_back([&] { play(ab, ba, true); });
  players.emplace_back([&] { play(ba, ab, false); });
  players.emplace_back([&] { play(ab2, ba2, true); });
  players.emplace_back([&] { play(ba2, ab2, false); });
  for (std::thread &player : players) player.join();
}

void messages(const std::string &backend, const Values &values) {
  Group group(backend, 2, EPT_PROGRESS_AUTO, values);
  std::thread reader([&] {
    ept_error mine{};
    mine.size = sizeof mine;
    std::vector<bool> seen(500);
    for (int i = 0; i < 500; i++) {
      uint32_t number = 0, from = 9;
      size_t length = sizeof number;
      const int32_t code = ept_engine_recv(group[1], 0, 7, &number, &length, &from, kPatience, &mine);
      check::ok(__FILE__, __LINE__, "ept_engine_recv", code, mine);
      CHECK(from == 0 && length == 4 && number < 500 && !seen[number]);
      seen[number] = true;
    }
  });
  for (uint32_t i = 0; i < 500; i++) OK(ept_engine_send(group[0], 1, 7, &i, sizeof i, kPatience, &error));
  reader.join();
}

void revoked(const std::string &backend) {
  Group group(backend, 2, EPT_PROGRESS_AUTO);
  Route route(group, 0, 1, 4096);
  OK(ept_region_revoke(group[1], route.target_memory, 0, &error));
  ept_transfer_id transfer = 0;
  OK(route.post(0, 64, &transfer));
  CHECK_EQ(ept_transfer_wait(group[0], transfer, kPatience, &error), EPT_E_ACCESS);
  for (const uint8_t byte : route.target) CHECK_EQ(byte, 0);  // refused: memory and signal are as they were
  CHECK_EQ(route.count(), 0);
  // The chan goes on: more than a window of transfers after a void one.
  uint8_t blob[4200];
  size_t length = sizeof blob;
  OK(ept_region_export(group[1], route.target_memory, 0, 0, 4096, blob, &length, &error));
  OK(ept_region_import(group[0], 1, blob, length, &route.region, &error));
  for (int i = 0; i < 3000; i++) OK(route.post(0, 64));
  OK(ept_signal_wait(group[1], route.signal, 3000, kPatience, &error));
  CHECK_EQ(route.count(), 3000);
}

void quiesce(const std::string &backend) {
  Group group(backend, 3, EPT_PROGRESS_AUTO);
  Route ab(group, 0, 1, 4096), cb(group, 2, 1, 4096);
  OK(ab.post(0, 4096));
  OK(ept_signal_wait(group[1], ab.signal, 1, kPatience, &error));
  OK(ept_engine_quiesce(group[1], ab.target_memory, EPT_SCOPE_REMOTE, kPatience, &error));
  CHECK_EQ(ab.post(0, 4096), EPT_E_ACCESS);  // after quiescence the region is gone
  OK(ept_memory_deregister(group[1], ab.target_memory, &error));
}

void a_rank_leaves(const std::string &backend) {
  Group group(backend, 3, EPT_PROGRESS_AUTO);
  Route ab(group, 0, 1, 4096), cb(group, 2, 1, 4096);
  group.stop(0, kPatience);
  CHECK_EQ(ept_signal_wait(group[1], ab.signal, 1, kPatience, &error), EPT_E_PEER_LOST);
  CHECK_EQ(error.peer, 0);
  OK(cb.post(0, 64));  // the others go on
  OK(ept_signal_wait(group[1], cb.signal, 1, kPatience, &error));
}

void test(const std::string &backend) {
  const std::string name = ept_plugin_name(plugin_of(backend));
  const bool loopback = name == "loopback";
  std::printf("%s\n", name.c_str());
  RUN(own_places(backend, {}));
  RUN(mixed_sizes(backend, {}, 1));
  RUN(mixed_sizes(backend, {{loopback ? "rails" : "streams", "4"}}, 2));
  RUN(paged(backend, {}));
  RUN(credits_hold(backend));
  RUN(waits_say_who(backend));
  RUN(threads(backend, EPT_PROGRESS_AUTO));
  RUN(threads(backend, EPT_PROGRESS_THREAD));
  RUN(threads(backend, EPT_PROGRESS_INLINE));
  RUN(messages(backend, {}));
  RUN(revoked(backend));
  RUN(quiesce(backend));
  RUN(a_rank_leaves(backend));
  for (int seed = 1; loopback && seed <= 5; seed++) {
    const Values values = {{"adversary", std::to_string(seed)}};
    RUN(own_places(backend, values));
    RUN(mixed_sizes(backend, values, 3));
    RUN(paged(backend, values));
    RUN(messages(backend, values));
  }
}

}  // namespace

int main(int argc, char **argv) {
  for (int i = 1; i < argc; i++) test(argv[i]);
  if (argc > 1) return 0;
  test("loopback");
  test("tcp");
  return 0;
}
