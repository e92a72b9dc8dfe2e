// SPDX-License-Identifier: Apache-2.0
#include "moe/cuda/trial.h"

#include <string.h>

#include <algorithm>
#include <atomic>

#include "moe/cuda/args.h"
#include "moe/cuda/shared.h"
#include "moe/fail.h"

namespace ept::moe::cuda {

namespace {

constexpr uint32_t kWarm = 2, kRounds = 6;
constexpr uint64_t kMore = 5'000'000'000;  // after its deadline a kernel takes so long to end, at most

}  // namespace

// What a way's kernels keep, and its tables, in device memory.
struct GpuTrial::Tables {
  LaneState *state;
  uint64_t *tickets, *offsets;
  uint32_t *done, *claimed;
  ept_path *paths;
  uint64_t **words;
};

GpuTrial::GpuTrial(Opened opened, const ept_gpu_config &config, Arena &tried, const std::vector<Place> &places,
                   const uint64_t (&lengths)[kLengths], const Deadline &deadline)
    : opened_(std::move(opened)), config_(config), arena_(tried), places_(places), deadline_(deadline) {
  std::copy(lengths, lengths + kLengths, lengths_);
  uint32_t sharers = 0;
  for (uint32_t r = 0; r < arena_.world; r++) {
    sharers += places_[r].known && same_gpu(places_[r], places_[arena_.rank]);
    if (r != arena_.rank && places_[r].known && initiates(places_[r], places_[arena_.rank])) peers_.push_back(r);
  }
  if (peers_.empty()) return;
  threads_ = config_.threads ? config_.threads : kBlockThreads;
  const uint32_t room = opened_.gpu->room(threads_, least_shared(threads_));
  blocks_ = config_.blocks ? config_.blocks : std::clamp(room / sharers, 1u, kEnoughBlocks);
  try {
    stream_ = opened_.gpu->make_stream();
    const uint64_t lane = arena_.map.bytes(page_bytes()), signals = uint64_t(arena_.world) * kSignals * 8;
    heap_ = opened_.heap->allocate(lane + signals);
    opened_.gpu->clear(heap_, lane + signals);
    net_ = std::make_unique<Net>(opened_.gpu, arena_, false);
    told_ = static_cast<Told *>(opened_.gpu->allocate_pinned(sizeof(Told) * kWays));
    progress_ =
        static_cast<ept_device_progress *>(opened_.gpu->allocate_pinned(sizeof(ept_device_progress) * arena_.world));
    took_ = static_cast<uint64_t *>(opened_.gpu->allocate_pinned(sizeof(uint64_t)));
    Tables tables[kWays];
    Carve size(nullptr);
    const auto carve = [&](Carve &from) {
      for (Tables &each : tables) {
        each.state = from.take<LaneState>(1);
        each.tickets = from.take<uint64_t>(uint64_t(arena_.world) * kSignals);
        each.offsets = from.take<uint64_t>(uint64_t(arena_.world) * kSignals);
        each.done = from.take<uint32_t>(arena_.world);
        each.claimed = from.take<uint32_t>(uint64_t(arena_.world) * 2);
        each.paths = from.take<ept_path>(arena_.world);
        each.words = from.take<uint64_t *>(arena_.world);
      }
    };
    carve(size);
    own_ = static_cast<char *>(opened_.gpu->allocate(size.bytes()));
    Carve at(own_);
    carve(at);
    for (Way way : {Way::puts, Way::proxy}) fill(way, tables[uint32_t(way)]);
  } catch (...) {
    give_back();
    throw;
  }
}

void GpuTrial::fill(Way way, const Tables &at) {
  const uint64_t lane = arena_.map.bytes(page_bytes());
  const auto number = [](const void *address) { return uint64_t(reinterpret_cast<uintptr_t>(address)); };
  // Of what that source raises here: the same place on every rank.
  const auto words = [&](uint32_t source) {
    return reinterpret_cast<uint64_t *>(heap_ + lane) + uint64_t(source) * kSignals;
  };
  std::vector<ept_path> paths(arena_.world);
  std::vector<uint64_t *> heard(arena_.world);
  for (uint32_t r : peers_) {
    ept_path &path = paths[r];
    if (way == Way::proxy) {
      path = net_->path(0, r);
      heard[r] = net_->words(0, r);
      continue;
    }
    path.kind = EPT_DEVICE_GPU;
    path.peer = r;
    path.number = opened_.heap->number(r);
    path.memory = opened_.heap->mapped(r) != nullptr;
    path.source = path.window = number(heap_);
    path.source_bytes = lane;
    path.window_bytes = arena_.map.exported();
    path.signals = number(words(arena_.rank));
    path.signal_count = kSignals;
    path.progress = number(progress_ + r);
    heard[r] = words(r);
  }
  Gpu &gpu = *opened_.gpu;
  gpu.copy_in(at.paths, paths.data(), paths.size() * sizeof(ept_path));
  gpu.copy_in(at.words, heard.data(), heard.size() * sizeof(uint64_t *));
  LaneTable &t = tables_[uint32_t(way)];
  t.world = arena_.world;
  t.rank = arena_.rank;
  t.map = arena_.map;
  for (uint32_t r : peers_)
    if (way == Way::puts) t.initiates |= opened_.heap->mapped(r) ? kNear : kFar;
  t.paths = at.paths;
  t.words = at.words;
  t.done = at.done;
  t.claimed = at.claimed;
  t.tickets = at.tickets;
  t.offsets = at.offsets;
  t.state = at.state;
  t.told = told_ + uint32_t(way);
}

GpuTrial::~GpuTrial() {
  if (under_way_) {
    end_waits(EPT_E_CLOSED);
    try {
      under_way_ = !opened_.gpu->ends(stream_, now_ns() + kMore);
    } catch (const Failure &) {}
  }
  give_back();
}

void GpuTrial::give_back() {
  if (under_way_) return;  // a kernel still uses it all
  Gpu &gpu = *opened_.gpu;
  net_.reset();
  if (stream_) gpu.end_stream(stream_);
  if (own_) gpu.release(own_);
  if (heap_) opened_.heap->release(heap_);
  if (told_) gpu.release_pinned(told_);
  if (progress_) gpu.release_pinned(progress_);
  if (took_) gpu.release_pinned(took_);
}

void GpuTrial::launch(Way way, uint32_t length) {
  if (peers_.empty()) return;
  TrialArgs a{};
  a.lane = tables_[uint32_t(way)];
  a.lane.timeout_ns = std::max<uint64_t>(deadline_.remaining(), 1);
  a.first = next_[uint32_t(way)];
  a.bytes = lengths_[length];
  a.room = *std::max_element(lengths_, lengths_ + kLengths);
  a.warm = kWarm, a.rounds = kRounds;
  a.took = took_;
  *took_ = 0;
  opened_.gpu->launch(kKernelTrial, {blocks_, threads_, 0, least_shared(threads_)}, stream_, &a);
  under_way_ = true;
  next_[uint32_t(way)] += kWarm + kRounds;
}

void GpuTrial::await(Way way, uint32_t length) {
  if (peers_.empty()) return;
  constexpr uint64_t kLook = 20'000'000;  // so late it learns that a peer is gone
  while (!opened_.gpu->ends(stream_, std::min(now_ns() + kLook, deadline_.at + kMore))) {
    look_at_peers();
    if (now_ns() > deadline_.at + kMore)
      fail(EPT_E_TIMEOUT, -1, "rank %u's GPU didn't end what it measures of its peers: it is stuck", arena_.rank);
  }
  under_way_ = false;
  const Told &told = told_[uint32_t(way)];
  if (const uint64_t code = std::atomic_ref(const_cast<uint64_t &>(told.code)).load(std::memory_order_acquire))
    fail(-int32_t(code), told.peer, "rank %u measured messages of %llu bytes %s, and rank %d's did not come",
         arena_.rank, (unsigned long long)lengths_[length], way == Way::puts ? "put by kernels" : "through the proxy",
         told.peer);
  const uint64_t took = std::max<uint64_t>(std::atomic_ref(*took_).load(std::memory_order_acquire), 1);
  uint64_t &least = figures_.took[uint32_t(way)][length];
  least = least ? std::min(least, took) : took;
}

void GpuTrial::end_waits(int32_t code) {
  for (uint32_t r : peers_) {
    std::atomic_ref<int32_t>(progress_[r].status).store(code, std::memory_order_release);
    net_->end_waits(r, code);
  }
}

void GpuTrial::look_at_peers() {
  for (uint32_t r : peers_) {
    if (!ended(info_of(arena_.engine, r).status)) continue;
    std::atomic_ref<int32_t>(progress_[r].status).store(EPT_E_PEER_LOST, std::memory_order_release);
    net_->end_waits(r, EPT_E_PEER_LOST);
  }
}

}  // namespace ept::moe::cuda
