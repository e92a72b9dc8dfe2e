// SPDX-License-Identifier: Apache-2.0
//
// litmus_proxy.cc: the parts of the litmus program that go through a ring and its proxy: one GPU's ring, ranks as
// streams that reach some peers mapped and others by their proxies, and what a way there and back takes.
#include <algorithm>
#include <atomic>
#include <thread>

#include "cuda/proxy.h"
#include "gpu.h"

namespace litmus {

namespace {

ept_memory_id registered(ept_engine *engine, const PinnedMemory &of, uint32_t access) {
  ept_memory memory{};
  memory.size = sizeof memory;
  memory.kind = EPT_MEMORY_PINNED;
  memory.address = of.host();
  memory.length = of.bytes();
  memory.cuda_device = -1;
  memory.fd = -1;
  memory.role = EPT_ROLE_DATA;
  memory.access = access;
  ept_memory_id id;
  OK(ept_memory_register(engine, &memory, &id, &error));
  return id;
}

// Rank `from` may write a part of `target`, memory of rank `to`.
ept_region_id open(const world::World &world, uint32_t from, uint32_t to, ept_memory_id target, uint64_t offset,
                   uint64_t bytes) {
  char blob[4096];
  size_t length = sizeof blob;
  OK(ept_region_export(world[to], target, from, offset, bytes, blob, &length, &error));
  ept_region_id region;
  OK(ept_region_import(world[from], to, blob, length, &region, &error));
  return region;
}

// Rank `from` may raise a signal of rank `to` that is made at `word`.
struct Word {
  ept_signal_id signal = 0;
  ept_remote_signal_id raise = 0;
};
Word open(const world::World &world, uint32_t from, uint32_t to, const char *name, void *word) {
  Word opened;
  ept_memory home{};
  home.size = sizeof home;
  home.kind = EPT_MEMORY_PINNED;
  home.address = word;
  home.length = 8;
  home.cuda_device = -1;
  home.fd = -1;
  OK(ept_signal_create(world[to], from, name, &home, &opened.signal, &error));
  char blob[4096];
  size_t length = sizeof blob;
  OK(ept_signal_export(world[to], opened.signal, blob, &length, &error));
  OK(ept_signal_import(world[from], to, blob, length, &opened.raise, &error));
  return opened;
}

world::Options driven(const char *adversary) {
  world::Options options;
  options.progress = EPT_PROGRESS_AUTO;
  if (adversary) options.values = {{"adversary", adversary}};
  return options;
}

constexpr uint32_t kCapacity = 256;

// A rank's ring and its proxy, which also drives its engine.
struct Commands {
  std::unique_ptr<PinnedMemory> place;
  std::unique_ptr<DeviceMemory> header;
  std::unique_ptr<Proxy> proxy;

  Commands(Gpu &gpu, ept_engine *engine, uint32_t world)
      : place(gpu.pinned(RingPlace::bytes(kCapacity, world))), header(gpu.device(sizeof(ept_ring))) {
    proxy =
        std::make_unique<Proxy>(engine, RingPlace::in(place->host(), place->address(), header->address(), kCapacity));
    gpu.upload(header->address(), &proxy->header(), 1);
    OK(proxy->start(&error));
  }
};

// Two ranks: puts of rank 0 through its ring, rank 1's memory and its signal in pinned memory.
struct Proxied {
  std::unique_ptr<PinnedMemory> source, target, word;
  world::World world;
  Commands commands, other;
  ept_region_id region;
  Word to;
  std::unique_ptr<DeviceMemory> path;

  Proxied(Gpu &gpu, uint64_t bytes, const char *adversary = nullptr)
      : source(gpu.pinned(bytes)),
        target(gpu.pinned(bytes)),
        word(gpu.pinned(64)),
        world(2, driven(adversary)),
        commands(gpu, (world.connect_all(), world[0]), 2),
        other(gpu, world[1], 2),
        region(open(world, 0, 1, registered(world[1], *target, EPT_ACCESS_REMOTE_WRITE), 0, bytes)),
        to(open(world, 0, 1, "litmus", word->host())),
        path(gpu.device(sizeof(ept_path))) {
    proxy().set_memory(0, registered(world[0], *source, EPT_ACCESS_LOCAL));
    proxy().set_region(1, 0, region);
    proxy().set_signal(1, 0, to.raise);
    const ept_path made = proxy().path(1, 0, source->address(), bytes, 0, bytes, 0, 1);
    gpu.upload(path->address(), &made, 1);
  }
  Proxy &proxy() { return *commands.proxy; }
};

void ring_of(Gpu &gpu, const char *adversary) {
  const uint32_t blocks = quick ? 2 : 16, threads = 64, each = quick ? 4 : 50, all = blocks * threads * each;
  Proxied p(gpu, uint64_t(all) * 4, adversary);
  gpu.launch(ring, blocks, threads, p.path->address(), p.source->address(), each, kTimeout, gpu.wrong->address());
  gpu.right();
  OK(ept_signal_wait(p.world[1], p.to.signal, all, kTimeout, &error));
  uint64_t count;
  OK(ept_signal_value(p.world[1], p.to.signal, &count, &error));
  CHECK_EQ(count, all);
  CHECK(std::memcmp(p.source->host(), p.target->host(), uint64_t(all) * 4) == 0);
  const auto *rows = static_cast<const uint32_t *>(p.target->host());
  for (uint32_t i = 0; i < all; i++) CHECK_EQ(rows[i], (1u * 0x9e3779b9u) ^ (i / each * 0x85ebca6bu) ^ (i % each));
  CHECK_EQ(p.proxy().counts().commands, all);
  CHECK_EQ(p.proxy().counts().failed, 0);
  std::printf("  %u threads through a ring of %u, %u puts%s: every count and byte\n", blocks * threads, kCapacity, all,
              adversary ? ", adversary" : "");
}

// Ranks of one process, a stream each: of two ranks those whose numbers are both even or both odd reach each other's
// memory on the GPU, the others through their proxies and pinned memory.
struct Ranks {
  static constexpr uint32_t kWorld = 6, kWords = 700;
  static constexpr uint64_t kSlice = 2 * kWords * 4;  // from one rank to one other, both halves
  Gpu &gpu;
  struct Rank {
    Stream stream;
    std::unique_ptr<PinnedMemory> source, inbox, words;  // words: a line for each rank, two in use
    std::unique_ptr<DeviceMemory> mapped_inbox, mapped_words, paths, arrived, windows;
  };
  std::vector<Rank> ranks;
  world::World world;
  std::vector<std::unique_ptr<Commands>> commands;

  static bool mapped(uint32_t a, uint32_t b) { return a % 2 == b % 2; }

  Ranks(Gpu &on, const char *adversary) : gpu(on), ranks(kWorld), world(kWorld, driven(adversary)) {
    world.connect_all();
    std::vector<ept_memory_id> inboxes;
    for (uint32_t r = 0; r < kWorld; r++) {
      Rank &rank = ranks[r];
      rank.stream = gpu.new_stream();
      rank.source = gpu.pinned(kWorld * kSlice);
      rank.inbox = gpu.pinned(kWorld * kSlice);
      rank.words = gpu.pinned(kWorld * 64);
      rank.mapped_inbox = gpu.device(kWorld * kSlice);
      rank.mapped_words = gpu.device(kWorld * 64);
      rank.paths = gpu.device(kWorld * sizeof(ept_path));
      rank.arrived = gpu.device(kWorld * 8);
      rank.windows = gpu.device(kWorld * 8);
      commands.push_back(std::make_unique<Commands>(gpu, world[r], kWorld));
      commands[r]->proxy->set_memory(0, registered(world[r], *rank.source, EPT_ACCESS_LOCAL));
      inboxes.push_back(registered(world[r], *rank.inbox, EPT_ACCESS_REMOTE_WRITE));
    }
    for (uint32_t r = 0; r < kWorld; r++) {
      const Rank &rank = ranks[r];
      std::vector<ept_path> paths(kWorld);
      std::vector<uint64_t> arrived(kWorld), windows(kWorld);
      for (uint32_t p = 0; p < kWorld; p++) {
        if (p == r) continue;
        if (mapped(r, p)) {
          paths[p] = mapped_path(ranks[p].mapped_inbox->address() + r * kSlice, kSlice,
                                 ranks[p].mapped_words->address() + r * 64, 2);
          arrived[p] = rank.mapped_words->address() + p * 64;
          windows[p] = rank.mapped_inbox->address() + p * kSlice;
        } else {
          Proxy &proxy = *commands[r]->proxy;
          proxy.set_region(p, 0, open(world, r, p, inboxes[p], r * kSlice, kSlice));
          auto *words = static_cast<char *>(ranks[p].words->host()) + r * 64;
          proxy.set_signal(p, 0, open(world, r, p, "even", words).raise);
          proxy.set_signal(p, 1, open(world, r, p, "odd", words + 8).raise);
          paths[p] = proxy.path(p, 0, rank.source->address(), rank.source->bytes(), 0, kSlice, 0, 2);
          arrived[p] = rank.words->address() + p * 64;
          windows[p] = rank.inbox->address() + p * kSlice;
        }
      }
      gpu.upload(rank.paths->address(), paths.data(), kWorld);
      gpu.upload(rank.arrived->address(), arrived.data(), kWorld);
      gpu.upload(rank.windows->address(), windows.data(), kWorld);
    }
  }
  void launch(uint32_t r, uint32_t first, uint32_t rounds, uint64_t timeout) {
    const Rank &rank = ranks[r];
    gpu.launch_on(rank.stream, exchange, kWorld, 256, rank.paths->address(), rank.arrived->address(),
                  rank.windows->address(), rank.source->address(), r, kWords, first, rounds, timeout,
                  gpu.wrong->address());
  }
};

double median(std::vector<double> of) {
  std::sort(of.begin(), of.end());
  return of[of.size() / 2];
}

}  // namespace

void through_the_ring(Gpu &gpu) { ring_of(gpu, nullptr); }
void through_the_ring_adversary(Gpu &gpu) { ring_of(gpu, "5"); }

// A peer that is masked amid a wait ends it, and its status stays on the way of later puts.
void peer_ends(Gpu &gpu) {
  Proxied p(gpu, 4096);
  auto never = gpu.device(8), times = gpu.device(8);
  p.world.mask(0, 1);
  gpu.launch(signalled, 1, 1, p.path->address(), never->address(), 1u, kTimeout, times->address(),
             gpu.wrong->address());
  gpu.finish();
  CHECK_EQ(gpu.found(), EPT_E_PEER_LOST);
  std::printf("  a masked peer ends its waits\n");
}

void ranks_exchange(Gpu &gpu) {
  for (const char *adversary : {static_cast<const char *>(nullptr), "7"}) {
    const uint32_t launches = quick ? 2 : 10, rounds = quick ? 4 : adversary ? 20 : 200;
    Ranks all(gpu, adversary);
    // Queued at once, in another order each time: a rank's next launch starts while others are in their last.
    for (uint32_t l = 0; l < launches; l++)
      for (uint32_t i = 0; i < Ranks::kWorld; i++)
        all.launch((i * 5 + l) % Ranks::kWorld, l * rounds, rounds, kTimeout);
    for (const auto &rank : all.ranks) gpu.finish(rank.stream);
    gpu.right();
    for (uint32_t r = 0; r < Ranks::kWorld; r++) {
      for (uint32_t p = 0; p < Ranks::kWorld; p++) {
        if (p == r) continue;
        const auto words = Ranks::mapped(r, p) ? all.ranks[r].mapped_words->address() : all.ranks[r].words->address();
        CHECK_EQ(gpu.download<uint64_t>(words + p * 64), launches * rounds / 2);
        CHECK_EQ(gpu.download<uint64_t>(words + p * 64 + 8), launches * rounds / 2);
      }
      CHECK_EQ(all.commands[r]->proxy->counts().failed, 0);
    }
    std::printf(
        "  %u ranks as streams, mapped and by proxy%s, %u launches of %u rounds of %u bytes: every count and "
        "byte\n",
        Ranks::kWorld, adversary ? ", adversary" : "", launches, rounds, Ranks::kWords * 4);
  }
}

// One rank is never launched: the others end at their deadline, and the context lives.
void rank_never_comes(Gpu &gpu) {
  Ranks all(gpu, nullptr);
  for (uint32_t r = 0; r + 1 < Ranks::kWorld; r++) all.launch(r, 0, 4, 200'000'000);
  for (const auto &rank : all.ranks) gpu.finish(rank.stream);
  CHECK_EQ(gpu.found(), EPT_E_TIMEOUT);
  Ranks others(gpu, nullptr);
  for (uint32_t r = 0; r < Ranks::kWorld; r++) others.launch(r, 0, 4, kTimeout);
  for (const auto &rank : others.ranks) gpu.finish(rank.stream);
  gpu.right();
  std::printf("  a rank that never comes: the others' waits expire, and the next group works\n");
}

// One way there and back, us: a bare flag through pinned memory that a CPU thread echoes, and a signal from a kernel
// through the ring, the proxy, loopback and another engine into pinned memory. In turn, five times each.
void ways(Gpu &gpu) {
  const uint32_t rounds = quick ? 10 : 5000;
  auto times = gpu.device(8);
  auto flags = gpu.pinned(256);
  auto *there = static_cast<uint64_t *>(flags->host());
  auto *back = there + 16;
  Proxied p(gpu, 4096);
  std::vector<double> bare, signals;
  for (int turn = 0; turn < 5; turn++) {
    *there = *back = 0;
    std::atomic<bool> over{false};  // where the kernel gives up
    std::thread echo([&] {
      uint64_t seen = 0;
      while (seen < rounds && !over) {
        const uint64_t now = std::atomic_ref<uint64_t>(*there).load(std::memory_order_acquire);
        if (now != seen) std::atomic_ref<uint64_t>(*back).store(seen = now, std::memory_order_release);
      }
    });
    gpu.launch(flag, 1, 1, flags->address(), flags->address() + 128, rounds, kTimeout, times->address(),
               gpu.wrong->address());
    gpu.finish();
    over = true;
    echo.join();
    CHECK_EQ(gpu.found(), EPT_OK);
    bare.push_back(double(gpu.download<uint64_t>(times->address())) * 1e-3 / rounds);
    gpu.launch(signalled, 1, 1, p.path->address(), p.word->address(), rounds, kTimeout, times->address(),
               gpu.wrong->address());
    gpu.right();
    signals.push_back(double(gpu.download<uint64_t>(times->address())) * 1e-3 / rounds);
  }
  std::printf("  us: flag there and back %.3f (best %.3f), signal GPU-proxy-GPU %.3f (best %.3f), ratio %.3f\n",
              median(bare), *std::min_element(bare.begin(), bare.end()), median(signals),
              *std::min_element(signals.begin(), signals.end()), median(signals) / median(bare));
}

}  // namespace litmus
