// SPDX-License-Identifier: Apache-2.0
#include "moe/cuda/net.h"

#include <algorithm>
#include <atomic>

#include "moe/fail.h"

namespace ept::moe::cuda {

using ept::cuda::Proxy;
using ept::cuda::RingPlace;

namespace {

// A step pushes one command a peer and phase, or one a chunk and a grant, of which two are under way; the rest is room
// for ranks of which one is late.
uint32_t capacity_for(uint32_t lanes, uint32_t world) {
  uint32_t capacity = 64;
  while (capacity < 8 * lanes * world) capacity *= 2;
  return capacity;
}
constexpr uint64_t kAcksEvery = 20'000;  // ns: acks come seldom, and a look at the engine's inbox takes its lock

}  // namespace

Net::Net(std::shared_ptr<Gpu> gpu, Arena &arena, bool calls)
    : gpu_(std::move(gpu)),
      arena_(arena),
      world_(arena.world),
      pinned_(arena.lanes.size()),
      bases_(uint64_t(world_) * pinned_.size() * kSignals),
      mine_(world_),
      theirs_(world_) {
  for (uint32_t r = 0; r < world_; r++)
    mine_[r] = arena_.lanes[0]->links[r].mine, theirs_[r] = arena_.lanes[0]->links[r].theirs;
  try {
    for (uint32_t l = 0; l < pinned_.size(); l++) {
      const Words &words = arena_.lanes[l]->words;
      pin(l);
      pinned_[l].words = reinterpret_cast<uint64_t *>(gpu_->pin(words.all(), words.bytes()));
    }
    const uint32_t capacity = capacity_for(uint32_t(pinned_.size()), world_);
    pinned_ring_ = gpu_->allocate_pinned(RingPlace::bytes(capacity, world_));
    ring_ = gpu_->allocate(sizeof(ept_ring));
    if (calls)
      acks_ = static_cast<uint64_t *>(gpu_->allocate_pinned(sizeof(uint64_t) * pinned_.size() * world_ * EPT_PHASES));
    const auto number = [](const void *at) { return uint64_t(reinterpret_cast<uintptr_t>(at)); };
    Proxy::Options options;
    options.left_ends = false;
    if (calls) options.each = [this] { pass_acks(); };
    proxy_ = std::make_unique<Proxy>(
        arena_.engine, RingPlace::in(pinned_ring_, number(pinned_ring_), number(ring_), capacity), std::move(options));
    gpu_->copy_in(ring_, &proxy_->header(), sizeof(ept_ring));
    name_all();
    Error error;
    check(proxy_->start(&error), error);
  } catch (...) {
    give_back();
    throw;
  }
}

Net::~Net() { give_back(); }

void Net::pin(uint32_t l) {
  const Lane &lane = *arena_.lanes[l];
  pinned_[l].memory = lane.on_gpu ? lane.base : gpu_->pin(lane.base, arena_.map.bytes(page_bytes()));
  pinned_[l].host = lane.on_gpu ? nullptr : lane.base;
}

void Net::let_go() {
  for (Pinned &lane : pinned_) {
    if (lane.host) gpu_->unpin(lane.host);
    lane.memory = nullptr;
    lane.host = nullptr;
  }
}

void Net::take_again() {
  for (uint32_t l = 0; l < pinned_.size(); l++) pin(l);
  name_all();
}

void Net::give_back() {
  proxy_.reset();
  let_go();
  for (uint32_t l = 0; l < pinned_.size(); l++)
    if (pinned_[l].words) gpu_->unpin(arena_.lanes[l]->words.all());
  if (ring_) gpu_->release(ring_);
  if (pinned_ring_) gpu_->release_pinned(pinned_ring_);
  if (acks_) gpu_->release_pinned(acks_);
}

void Net::name_all() {
  for (uint32_t l = 0; l < pinned_.size(); l++) {
    const Lane &lane = *arena_.lanes[l];
    proxy_->set_memory(l, lane.memory_id);
    for (uint32_t r = 0; r < world_; r++) {
      if (r == arena_.rank) continue;
      proxy_->set_region(r, l, lane.links[r].region);
      for (uint32_t p = 0; p < EPT_PHASES; p++) {
        for (uint32_t i = 0; i < EPT_MOE_SLOTS * EPT_MOE_POSITIONS; i++)
          proxy_->set_signal(r, l * kSignals + signal_index(p, i / 2, i % 2), lane.links[r].raise[p][i / 2][i % 2]);
        proxy_->set_signal(r, l * kSignals + grant_index(p), lane.links[r].grant[p]);
      }
    }
  }
}

ept_path Net::path(uint32_t lane, uint32_t peer) const {
  return proxy_->path(peer, lane, uint64_t(reinterpret_cast<uintptr_t>(pinned_[lane].memory)),
                      arena_.map.bytes(page_bytes()), lane, arena_.map.exported(), lane * kSignals, kSignals);
}

// By the proxy thread. A reset takes what has come by itself.
void Net::pass_acks() {
  const uint64_t now = now_ns();
  if (now - looked_ < kAcksEvery) return;
  looked_ = now;
  const std::unique_lock<std::mutex> lock(taking_acks_, std::try_to_lock);
  if (!lock) return;
  for (uint32_t l = 0; l < pinned_.size(); l++) {
    try {
      arena_.lanes[l]->take_acks();
    } catch (const Failure &) {  // the engine is at its end: kernels are told by the peers' status
      return;
    }
    for (uint32_t r = 0; r < world_; r++)
      for (uint32_t p = 0; p < EPT_PHASES; p++)
        std::atomic_ref<uint64_t>(acks_[(uint64_t(l) * world_ + r) * EPT_PHASES + p])
            .store(arena_.lanes[l]->links[r].consumed[p], std::memory_order_release);
  }
}

void Net::rebase() {
  for (uint32_t r = 0; r < world_; r++) {
    const Link &link = arena_.lanes[0]->links[r];
    if (r == arena_.rank || (link.mine == mine_[r] && link.theirs == theirs_[r])) continue;
    mine_[r] = link.mine, theirs_[r] = link.theirs;
    for (uint32_t s = 0; s < pinned_.size() * kSignals; s++) base(r, s) = proxy_->raised(r, s);
  }
}

std::shared_ptr<void> Net::before_reset(const std::vector<std::array<uint64_t, EPT_PHASES>> &next,
                                        const Deadline &deadline) {
  if (!proxy_->quiesce(deadline.at))
    fail(EPT_E_TIMEOUT, -1, "reset: rank %u waited %.3f s for writes of its GPU to end", arena_.rank,
         deadline.waited_s());
  auto kept = std::make_shared<std::unique_lock<std::mutex>>(taking_acks_);
  rebase();
  for (uint32_t l = 0; l < pinned_.size(); l++) {
    Lane &lane = *arena_.lanes[l];
    for (uint32_t p = 0; p < EPT_PHASES; p++) {
      lane.next[p] = std::max<uint64_t>(lane.next[p], next[l][p]);
      for (uint32_t r = 0; r < world_; r++) {
        if (r == arena_.rank) continue;
        const auto raised = [&](uint32_t index) {
          const uint32_t signal = l * kSignals + index;
          return proxy_->raised(r, signal) - base(r, signal);
        };
        for (uint32_t i = 0; i < EPT_MOE_SLOTS * EPT_MOE_POSITIONS; i++)
          lane.links[r].posted[p][i / 2][i % 2] = raised(signal_index(p, i / 2, i % 2));
        lane.links[r].grants_given[p] = raised(grant_index(p));
      }
    }
  }
  return kept;
}

void Net::after_reset(std::vector<std::array<uint64_t, EPT_PHASES>> &next) {
  for (uint32_t l = 0; l < pinned_.size(); l++)
    for (uint32_t p = 0; p < EPT_PHASES; p++) {
      next[l][p] = arena_.lanes[l]->next[p];
      for (uint32_t r = 0; r < world_ && acks_; r++)
        acks_[(uint64_t(l) * world_ + r) * EPT_PHASES + p] = arena_.lanes[l]->links[r].consumed[p];
    }
  rebase();
  name_all();
  const std::shared_ptr<const Members> members = arena_.members();
  for (uint32_t r = 0; r < world_; r++)
    if (r != arena_.rank && members->has(r)) proxy_->reopen(r);
}

uint64_t Net::taken(uint32_t lane, uint32_t source, uint32_t phase, uint32_t slot, uint32_t position) const {
  return arena_.lanes[lane]->links[source].taken[phase][slot][position];
}

uint64_t Net::granted(uint32_t lane, uint32_t rank, uint32_t phase) const {
  return arena_.lanes[lane]->links[rank].grants_before[phase];
}

}  // namespace ept::moe::cuda
