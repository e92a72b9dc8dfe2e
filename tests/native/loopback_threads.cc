// SPDX-License-Identifier: Apache-2.0
//
// Loopback with a thread for each rank. Most of its worth is under TSan: what a thread reads after an IMM was written
// by another before it, with nothing between them but the plugin.
#include <poll.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <numeric>
#include <thread>

#include "plugin.h"

using plugin::Event;
using plugin::Group;
using plugin::Options;
using plugin::Rank;
using plugin::Window;

namespace {

const ept_backend &loopback = plugin::built("loopback");

struct Threads {
  explicit Threads(std::vector<std::function<void()>> bodies) {
    for (auto &body : bodies) threads.emplace_back(std::move(body));
  }
  ~Threads() {
    for (std::thread &thread : threads) thread.join();
  }
  std::vector<std::thread> threads;
};

// Sleeps until the worker's descriptor is readable. A wake-up that is lost ends the test.
void sleep_until_woken(Rank &rank) {
  int descriptor = -1;
  const int32_t code = loopback.arm(rank.worker, &descriptor);
  if (code == EPT_LATER) return;
  CHECK_EQ(code, EPT_OK);
  pollfd sleeper = {descriptor, POLLIN, 0};
  if (poll(&sleeper, 1, 20'000) != 1) check::failed(__FILE__, __LINE__, "a wake-up was lost");
}

// One poll. Who gets nothing gives way: there may be fewer cores than threads, and another has what it waits for.
std::vector<Event> look(Rank &rank) {
  std::vector<Event> events = rank.poll();
  if (events.empty()) std::this_thread::yield();
  return events;
}

// LOCAL_DONE says nothing of the target: what was posted may need this rank's polls still.
void settle(Rank &rank) {
  CHECK_OK(loopback, loopback.quiesce(rank.worker, UINT32_MAX, EPT_SCOPE_REMOTE, 1));
  for (bool quiet = false; !quiet;) {
    for (const Event &event : look(rank)) quiet |= event.kind == EPT_EVENT_QUIESCED;
  }
}

// One rank writes, the other reads each write after its IMM and gives the slot back by a signal. A slot is free when
// that has come and the write's LOCAL_DONE. `sleepy` ranks arm.
void stream(const Options &options, uint32_t writes, size_t length, bool sleepy) {
  Group group(loopback, 2, options);
  constexpr uint32_t kSlots = 16;
  Window window(group[0], group[1], kSlots * length), credit(group[1], group[0], 8);
  const auto value = [](uint32_t n) { return static_cast<uint8_t>(n * 7 + 1); };
  const auto write = [&] {
    uint32_t sent = 0, busy[kSlots] = {};
    const auto idle = [&] { return std::all_of(busy, busy + kSlots, [](uint32_t owed) { return owed == 0; }); };
    while (sent < writes || !idle()) {
      uint32_t *const free = std::find(busy, busy + kSlots, 0u);
      if (sent < writes && free != busy + kSlots) {
        const auto slot = static_cast<uint32_t>(free - busy);
        uint8_t *const source = &window.source[slot * length];
        std::fill_n(source, length, value(sent));
        const uint32_t immediate = sent * kSlots + slot;
        ept_op op = Rank::write(1, window.source_mem, source, window.region, slot * length, length, immediate, slot);
        if (group[0].post(op) == EPT_OK) ++sent, *free = 2;
      } else if (sleepy) {
        sleep_until_woken(group[0]);
      }
      for (const Event &event : look(group[0])) {
        --busy[event.kind == EPT_EVENT_IMM ? event.immediate : static_cast<uint32_t>(event.cookie)];
      }
    }
  };
  const auto read = [&] {
    uint32_t seen = 0, pending = 0;
    std::vector<uint32_t> owed;
    while (seen < writes || !owed.empty() || pending) {
      if (sleepy && owed.empty()) sleep_until_woken(group[1]);
      for (const Event &event : look(group[1])) {
        if (event.kind == EPT_EVENT_LOCAL_DONE) {
          --pending;
          continue;
        }
        CHECK_EQ(event.kind, EPT_EVENT_IMM);
        const uint32_t n = event.immediate / kSlots, slot = event.immediate % kSlots;
        uint8_t *const bytes = &window.bytes[slot * length];
        CHECK(std::all_of(bytes, bytes + length, [&](uint8_t byte) { return byte == value(n); }));
        std::fill_n(bytes, length, uint8_t{0});
        owed.push_back(slot);
        ++seen;
      }
      while (!owed.empty() && group[1].post(Rank::signal(0, credit.region, owed.back(), 0)) == EPT_OK) {
        owed.pop_back();
        ++pending;
      }
    }
    settle(group[1]);
  };
  Threads both({write, read});
}

// All ranks write to all others at the same time.
void mesh(uint32_t world, const Options &options, uint32_t writes) {
  Group group(loopback, world, options);
  std::vector<std::unique_ptr<Window>> windows(world * world);
  for (uint32_t from = 0; from < world; ++from) {
    for (uint32_t to = 0; to < world; ++to) {
      if (from != to) windows[from * world + to] = std::make_unique<Window>(group[from], group[to], 8 * writes);
    }
  }
  std::vector<std::function<void()>> bodies;
  std::atomic<uint32_t> through = 0;
  for (uint32_t self = 0; self < world; ++self) {
    bodies.push_back([&, self] {
      Rank &rank = group[self];
      std::vector<uint32_t> sent(world), seen(world);
      uint32_t imms = 0, dones = 0, target = (self + 1) % world;
      const uint32_t all = (world - 1) * writes;
      uint32_t posted = 0;
      bool asked = false;
      bool quiet = false;
      while (imms < all || dones < all || !quiet) {
        if (posted == all && !asked) {
          CHECK_OK(loopback, loopback.quiesce(rank.worker, UINT32_MAX, EPT_SCOPE_REMOTE, 1));
          asked = true;
        }
        for (int i = 0; i < 8 && posted < all; ++i) {
          do target = (target + 1) % world;
          while (target == self || sent[target] == writes);
          Window &window = *windows[self * world + target];
          const uint32_t n = sent[target];
          memset(&window.source[8 * n], static_cast<int>(n + 1), 8);
          const ept_op op =
              Rank::write(target, window.source_mem, &window.source[8 * n], window.region, 8 * n, 8, n, target);
          if (rank.post(op) != EPT_OK) break;
          ++sent[target], ++posted;
        }
        for (const Event &event : look(rank)) {
          if (event.kind == EPT_EVENT_IMM) {
            const uint8_t *bytes = &windows[event.peer * world + self]->bytes[8 * event.immediate];
            for (int i = 0; i < 8; ++i) CHECK_EQ(bytes[i], static_cast<uint8_t>(event.immediate + 1));
            ++imms, ++seen[event.peer];
          } else if (event.kind == EPT_EVENT_QUIESCED) {
            CHECK_EQ(dones, all);
            quiet = true;
          } else {
            CHECK_EQ(event.kind, EPT_EVENT_LOCAL_DONE);
            ++dones;
          }
        }
      }
      for (uint32_t peer = 0; peer < world; ++peer) CHECK_EQ(seen[peer], peer == self ? 0 : writes);
      ++through;
    });
  }
  { Threads run(std::move(bodies)); }
  CHECK_EQ(through.load(), world);
}

// Revokes while another thread writes: from the return of revoke on, the bytes stand still.
void revoke_is_exact(const Options &options, size_t length, int rounds) {
  Group group(loopback, 2, options);
  Window window(group[0], group[1], length);
  ept_mem *const mem = window.mem;
  std::atomic<ept_region *> region = nullptr;
  std::atomic<uint64_t> accepted = 0;
  std::atomic<bool> stop = false;
  std::vector<std::string> blobs;
  std::vector<uint64_t> keys;
  for (int i = 0; i < rounds; ++i) {
    auto [blob, key] = group[1].grant(mem, 0, 0, length);
    blobs.push_back(blob);
    keys.push_back(key);
  }
  std::vector<ept_region *> regions;
  for (const std::string &blob : blobs) regions.push_back(group[0].import(1, blob));
  region = regions[0];
  uint64_t done = 0, refused = 0;
  {
    Threads writer({[&] {
      // Two sources, so that every landing changes every byte; never rewritten while they may be read.
      std::vector<uint8_t> ones(length, 1), twos(length, 2);
      ept_mem *sources[2] = {group[0].enroll(ones.data(), length), group[0].enroll(twos.data(), length)};
      uint64_t n = 0;
      while (!stop || done + refused < n) {
        const uint8_t *source = n % 2 ? twos.data() : ones.data();
        if (!stop && group[0].post(Rank::write(1, sources[n % 2], source, region.load(), 0, length, 0, n)) == EPT_OK) {
          ++n;
          ++accepted;
        }
        for (const Event &event : look(group[0])) {
          if (event.kind == EPT_EVENT_ERROR) CHECK_EQ(event.code, EPT_E_ACCESS);
          ++(event.kind == EPT_EVENT_ERROR ? refused : done);
        }
      }
      settle(group[0]);
      CHECK_OK(loopback, group[0].release(sources[0]));
      CHECK_OK(loopback, group[0].release(sources[1]));
    }});
    for (int round = 0; round < rounds; ++round) {
      region = regions[static_cast<size_t>(round)];
      const uint64_t start = accepted;
      while (accepted < start + 20) look(group[1]);
      CHECK_OK(loopback, loopback.region_revoke(mem, 0, keys[static_cast<size_t>(round)]));
      const std::vector<uint8_t> before = window.bytes;  // TSan: no write may race with this
      const uint64_t then = accepted;
      while (accepted < then + 20) look(group[1]);
      CHECK(before == window.bytes);
    }
    stop = true;
    while (!group[1].poll().empty()) continue;
  }
  CHECK(done > 0 && refused > 0);
}

// Ranks come, are called, die and are fenced while others write to them: no crash, no race, and after FENCED stillness.
void fence_is_exact(const Options &options, size_t length, uint32_t lives) {
  plugin::Identity home;
  home.job = "fence";
  Rank zero(loopback, home, options);
  std::vector<uint8_t> bytes(length);
  ept_mem *mem = zero.enroll(bytes.data(), length);
  for (uint32_t life = 0; life < lives; ++life) {
    plugin::Identity away = home;
    away.rank = 1;
    away.epoch = life;
    Rank one(loopback, away, options);
    plugin::connect({&zero, &one});
    ept_region *region = one.import(0, zero.grant(mem, 1, 0, length).first);
    std::vector<uint8_t> source(length, static_cast<uint8_t>(life + 1));
    ept_mem *source_mem = one.enroll(source.data(), length);
    std::atomic<uint64_t> tries = 0;
    std::atomic<bool> stop = false;
    {
      Threads writer({[&] {
        while (!stop) {
          one.post(Rank::write(0, source_mem, source.data(), region, 0, length, 0, 1));
          one.poll();
          ++tries;
        }
        settle(one);  // every operation must have ended before the source may go
      }});
      while (tries < 300) look(zero);
      CHECK_OK(loopback, loopback.peer_fence(zero.instance, 1, life, 1));
      for (bool fenced = false; !fenced;) {
        for (const Event &event : look(zero)) {
          if (event.kind == EPT_EVENT_FENCED) fenced = true;
        }
      }
      const std::vector<uint8_t> before = bytes;
      const uint64_t then = tries;
      while (tries < then + 100) {
        for (const Event &event : look(zero)) CHECK_EQ(event.kind, EPT_EVENT_FENCED);  // one a rail
      }
      CHECK(before == bytes);
      stop = true;
    }
    CHECK_OK(loopback, loopback.peer_close(zero.instance, 1));
  }
}

// A rank is closed by its thread in the midst of traffic.
void close_in_traffic(const Options &options, int rounds) {
  for (int round = 0; round < rounds; ++round) {
    Group group(loopback, 3, options);
    Window there(group[0], group[1], 64), back(group[1], group[0], 64), aside(group[0], group[2], 64);
    Threads all({[&] {
                   bool lost = false;
                   for (uint64_t n = 0; !lost; ++n) {
                     group[0].post(Rank::write(1, there.source_mem, there.source.data(), there.region, 0, 64, 1, n));
                     group[0].post(Rank::write(2, aside.source_mem, aside.source.data(), aside.region, 0, 64, 1, n));
                     for (const Event &event : look(group[0])) {
                       if (event.peer == 2) CHECK_EQ(event.kind, EPT_EVENT_LOCAL_DONE);
                       if (event.kind == EPT_EVENT_PEER) lost = true;
                     }
                   }
                 },
                 [&] {
                   for (int n = 0; n < 200; ++n) {
                     group[1].post(Rank::write(0, back.source_mem, back.source.data(), back.region, 0, 64, 1, 1));
                     group[1].poll();
                   }
                   settle(group[1]);
                   group[1].leave();
                 },
                 [&] {
                   for (bool lost = false; !lost;) {
                     for (const Event &event : look(group[2])) lost |= event.kind == EPT_EVENT_PEER;
                   }
                 }});
  }
}

}  // namespace

int main() {
  const Options hostile = {{"adversary", "3"}};
  RUN(stream({}, 50'000, 64, false));
  RUN(stream({}, 20'000, 64, true));
  RUN(stream({}, 300, 100'000, true));
  RUN(stream({{"cq_depth", "3"}}, 5'000, 64, true));
  RUN(stream(hostile, 3'000, 256, false));
  RUN(stream(hostile, 3'000, 256, true));
  RUN(mesh(4, {}, 5'000));
  RUN(mesh(4, hostile, 500));
  RUN(mesh(4, {{"adversary", "3"}, {"cq_depth", "1"}}, 100));
  RUN(revoke_is_exact({}, 64, 200));
  RUN(revoke_is_exact({}, 100'000, 50));
  RUN(revoke_is_exact(hostile, 64, 50));
  RUN(revoke_is_exact(hostile, 50'000, 20));
  RUN(fence_is_exact({}, 64, 50));
  RUN(fence_is_exact({}, 100'000, 10));
  RUN(fence_is_exact(hostile, 1'000, 10));
  RUN(close_in_traffic({}, 50));
  RUN(close_in_traffic(hostile, 10));
  return 0;
}
