// SPDX-License-Identifier: Apache-2.0
//
// proxy.cc: commands of a ring become writes of an engine, with CPU threads in the place of kernels: the same put, wait
// and flush. Over loopback, polite and under the adversary; also for TSan.
#include "cuda/proxy.h"

#include <array>
#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include "engine_world.h"

using namespace world;
using namespace ept::device;
using ept::cuda::Proxy;
using ept::cuda::RingPlace;

namespace {

uint64_t generous() { return deadline_in(120 * second); }

// Rank 0 with a ring and its proxy, and a route to each other rank.
struct Rig {
  static constexpr uint32_t kCapacity = 16;
  static constexpr size_t kBytes = 64 << 10;
  World world;
  std::vector<std::unique_ptr<Route>> routes;  // by rank; none to itself
  std::vector<uint64_t> pinned = std::vector<uint64_t>(RingPlace::bytes(kCapacity, 3) / 8);
  ept_ring ring{};
  RingPlace place;
  std::unique_ptr<Proxy> proxy;
  std::vector<ept_path> paths;

  Rig(const Rig &) = delete;
  Rig &operator=(const Rig &) = delete;
  explicit Rig(std::vector<std::pair<std::string, std::string>> values = {}, uint64_t first = 0)
      : world(3, options(std::move(values))) {
    world.connect_all();
    routes.resize(3);
    for (uint32_t r = 1; r < 3; r++) routes[r] = std::make_unique<Route>(world, 0, r, kBytes);
    place = RingPlace::in(pinned.data(), reinterpret_cast<uintptr_t>(pinned.data()), reinterpret_cast<uintptr_t>(&ring),
                          kCapacity);
    Proxy::Options how;
    how.first = first;
    proxy = std::make_unique<Proxy>(world[0], place, how);
    ring = proxy->header();
    OK(proxy->start(&error));
    paths.resize(3);
    for (uint32_t r = 1; r < 3; r++) {
      open(r);
      paths[r] = proxy->path(r, r, reinterpret_cast<uintptr_t>(routes[r]->source.data()), kBytes, 0, kBytes, 0, 1);
    }
  }
  static Options options(std::vector<std::pair<std::string, std::string>> values) {
    Options options;
    options.progress = EPT_PROGRESS_AUTO;
    options.values = std::move(values);
    return options;
  }
  void open(uint32_t r) {
    proxy->set_memory(r, routes[r]->source_memory);
    proxy->set_region(r, 0, routes[r]->region);
    proxy->set_signal(r, 0, routes[r]->remote);
  }
  uint64_t count(uint32_t r, uint64_t until) {
    OK(ept_signal_wait(world[r], routes[r]->signal, until, 100 * second, &error));
    return routes[r]->count();
  }
};

// Counts are exact, every byte is in its place, whoever pushes and whatever the network does.
void exact(std::vector<std::pair<std::string, std::string>> values, uint64_t first) {
  constexpr uint32_t kThreads = 4, kEach = 200, kRow = 40;
  Rig rig(std::move(values), first);
  std::vector<std::thread> threads;
  for (uint32_t t = 0; t < kThreads; t++)
    threads.emplace_back([&, t] {
      for (uint32_t i = 0; i < kEach; i++)
        for (uint32_t r = 1; r < 3; r++) {
          const uint64_t at = (uint64_t(t) * kEach + i) * kRow;
          std::memset(rig.routes[r]->source.data() + at, int(1 + (t * 7 + i * 3 + r) % 250), kRow);
          const Put put =
              ept::device::put(Thread(), rig.paths[r], rig.routes[r]->source.data() + at, at, kRow, 0, generous());
          CHECK_EQ(put.code, EPT_OK);
        }
    });
  for (auto &thread : threads) thread.join();
  for (uint32_t r = 1; r < 3; r++) {
    CHECK_EQ(rig.count(r, kThreads * kEach), kThreads * kEach);
    for (uint32_t t = 0; t < kThreads; t++)
      for (uint32_t i = 0; i < kEach; i++)
        for (uint32_t b = 0; b < kRow; b++)
          CHECK_EQ(rig.routes[r]->target[(t * kEach + i) * kRow + b], 1 + (t * 7 + i * 3 + r) % 250);
  }
  CHECK_EQ(rig.proxy->counts().commands, 2 * kThreads * kEach);
  CHECK_EQ(rig.proxy->counts().failed, 0);
}

// One source again and again: flush is what makes that right. And values, which have no source.
void reuse() {
  Rig rig(std::vector<std::pair<std::string, std::string>>{{"adversary", "11"}});
  uint8_t *row = rig.routes[1]->source.data();
  for (uint32_t i = 0; i < 100; i++) {
    std::memset(row, int(i + 1), 512);
    const Put put = ept::device::put(Thread(), rig.paths[1], row, i * 512, 512, 0, generous());
    CHECK_EQ(put.code, EPT_OK);
    CHECK(flush(rig.paths[1], put.ticket, generous()).came());
    CHECK_EQ(put_value(rig.paths[2], 1000 + i, i * 8, 0, generous()).code, EPT_OK);
  }
  CHECK_EQ(rig.count(1, 100), 100);
  for (uint32_t i = 0; i < 100 * 512; i++) CHECK_EQ(rig.routes[1]->target[i], i / 512 + 1);
  CHECK_EQ(rig.count(2, 100), 100);
  for (uint32_t i = 0; i < 100; i++) {
    uint64_t value;
    std::memcpy(&value, rig.routes[2]->target.data() + i * 8, 8);
    CHECK_EQ(value, 1000 + i);
  }
}

// An error is told in the peer's status, costs that peer alone, ends every command, and stays until reopen.
void errors() {
  Rig rig;
  rig.proxy->set_signal(2, 0, 0);
  const Put bad = ept::device::put(Thread(), rig.paths[2], nullptr, 0, 0, 0, generous());
  CHECK_EQ(bad.code, EPT_OK);
  CHECK(flush(rig.paths[2], bad.ticket, generous()).came());
  CHECK_EQ(*status(rig.paths[2]), EPT_E_INVALID);
  OK(rig.proxy->failure(2, &error));
  CHECK_HAS(error.text, "raised signal 0 of rank 2, which is not set");
  CHECK_EQ(rig.proxy->failure(1, nullptr), EPT_LATER);
  uint64_t never = 0;
  CHECK_EQ(wait(&never, 1, generous(), status(rig.paths[2])).code, EPT_E_INVALID);
  rig.open(2);
  const Put later = ept::device::put(Thread(), rig.paths[2], nullptr, 0, 0, 0, generous());
  CHECK(flush(rig.paths[2], later.ticket, generous()).came());
  CHECK_EQ(rig.routes[2]->count(), 0);  // refused: its status stands
  CHECK_EQ(ept::device::put(Thread(), rig.paths[1], nullptr, 0, 0, 0, generous()).code, EPT_OK);
  CHECK_EQ(rig.count(1, 1), 1);
  rig.proxy->reopen(2);
  CHECK_EQ(*status(rig.paths[2]), 0);
  CHECK_EQ(ept::device::put(Thread(), rig.paths[2], nullptr, 0, 0, 0, generous()).code, EPT_OK);
  CHECK_EQ(rig.count(2, 1), 1);
  CHECK_EQ(rig.proxy->counts().failed, 2);

  // A table of the kernel's that is broken: said, and nothing else comes of it.
  ept_path broken = rig.paths[1];
  broken.peer = 77;
  CHECK_EQ(ept::device::put(Thread(), broken, nullptr, 0, 0, 0, generous()).code, EPT_OK);
  CHECK_EQ(ept::device::put(Thread(), rig.paths[1], nullptr, 0, 0, 0, generous()).code, EPT_OK);
  CHECK_EQ(rig.count(1, 2), 2);
}

// A rank that is masked: waits for it end, puts to it end, others go on.
void lost() {
  Rig rig;
  rig.world.mask(0, 2);
  uint64_t never = 0;
  CHECK_EQ(wait(&never, 1, generous(), status(rig.paths[2])).code, EPT_E_PEER_LOST);
  OK(rig.proxy->failure(UINT32_MAX, &error));
  CHECK_HAS(error.text, "rank 2 is masked");
  for (uint32_t i = 0; i < 3 * Rig::kCapacity; i++) {
    const Put put = ept::device::put(Thread(), rig.paths[2], nullptr, 0, 0, 0, generous());
    CHECK_EQ(put.code, EPT_OK);
    CHECK(flush(rig.paths[2], put.ticket, generous()).came());
    CHECK_EQ(ept::device::put(Thread(), rig.paths[1], nullptr, 0, 0, 0, generous()).code, EPT_OK);
  }
  CHECK_EQ(rig.count(1, 3 * Rig::kCapacity), 3 * Rig::kCapacity);
}

// A kernel's wait ends when the proxy closes.
void closes() {
  Rig rig;
  uint64_t never = 0;
  std::atomic<int32_t> answer{0};
  std::thread kernel([&] { answer = wait(&never, 1, generous(), status(rig.paths[1])).code; });
  rig.proxy.reset();
  kernel.join();
  CHECK_EQ(answer.load(), EPT_E_CLOSED);
}

}  // namespace

int main() {
  RUN(exact({}, 0));
  RUN(exact({{"adversary", "3"}}, UINT64_MAX - 100));
  RUN(exact({{"adversary", "4"}}, 0xffffffffull - 100));
  RUN(reuse());
  RUN(errors());
  RUN(lost());
  RUN(closes());
  return 0;
}
