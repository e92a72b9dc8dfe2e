// SPDX-License-Identifier: Apache-2.0
//
// sleep.cc: lanes on a GPU that give their memory back for a while (suspend.cc has the order and the invariants). What
// kernels keep of a lane from step to step, and all tables, stay: they are some KB, and captured graphs hold where they
// stand.
#include "moe/cuda/home.h"
#include "moe/cuda/lanes.h"
#include "moe/fail.h"

namespace ept::moe::cuda {

void Lanes::refuse_sleep() const {
  if (heap_)
    fail(
        EPT_E_UNSUPPORTED, -1,
        "rank %u's lanes are in the symmetric heap of a device library, which keeps its memory until the process ends: "
        "with EPT_GPU_PATH=proxy they could be suspended",
        rank_);
}

Rest Lanes::rest() {
  bool busy = net_ && !net_->idle(), faulted = !whole_;
  for (uint32_t l = 0; l < count_; l++) {
    LaneState state;
    gpu_->copy_out(&state, kept_[l].state, sizeof state);
    faulted = faulted || state.fault;
    for (uint32_t p = 0; p < EPT_PHASES; p++) {
      busy = busy || state.sent[p] != state.received[p];
      if (net_) arena_->lanes[l]->next[p] = state.sent[p];
    }
  }
  return faulted ? Rest::faulted : busy ? Rest::busy : Rest::idle;
}

void Lanes::fall_asleep() {
  asleep_.resize(kept_bytes_);
  gpu_->copy_out(asleep_.data(), own_, kept_bytes_);
  counted_.resize(bytes() - signals_at());
  gpu_->copy_out(counted_.data(), memory_ + signals_at(), counted_.size());
  for (uint32_t l = 0; l < count_; l++) {
    LaneState state;
    gpu_->copy_out(&state, kept_[l].state, sizeof state);
    state.fault = uint32_t(-EPT_E_SUSPENDED);
    gpu_->copy_in(kept_[l].state, &state, sizeof state);
    // A launch of a faulted lane may look whether a message has come before it looks at the fault: none has.
    for (uint32_t r = 0; r < world_; r++) {
      in_image(paths_[l])[r] = ept_path{};
      in_image(words_[l])[r] = no_words_;
      in_image(in_[l])[r] = nullptr;
    }
  }
  gpu_->copy_in(own_ + kept_bytes_, image_.data() + kept_bytes_, own_bytes_ - kept_bytes_);
  let_go_of_peers();
  if (net_) net_->let_go();
}

void Lanes::let_go_of_peers() {
  for (Peer &peer : peers_) {
    if (peer.opened) gpu_->close(peer.opened);
    peer.opened = nullptr;
    peer.blob.clear();
  }
}

void Lanes::let_go() {
  let_go_of_peers();
  if (net_) net_->let_go();
  if (memory_) gpu_->release(memory_);
  memory_ = nullptr;
}

std::unique_ptr<LaneMemory> Lanes::lane_memory(uint64_t bytes) {
  return net_ ? device_home(gpu_, arena_->engine, Home(config_.memory), bytes, &home) : nullptr;
}

std::string Lanes::wake() {
  if (!memory_) allocate();
  gpu_->copy_in(memory_ + signals_at(), counted_.data(), counted_.size());
  peers_[rank_].base = memory_;
  return exported();
}

void Lanes::meet_again(const std::vector<std::string> &offers, const Members &with) {
  for (uint32_t r = 0; r < world_; r++) {
    if (r == rank_) continue;
    // Who is masked is mapped again by the reset that takes it in.
    if (with.has(r) && direct(places_[r], places_[rank_]))
      connect(r, offers[r]);
    else
      peers_[r].base = nullptr;
  }
  if (net_) net_->take_again();
  for (uint32_t l = 0; l < count_; l++)
    for (uint32_t r = 0; r < world_; r++) fill_peer(l, r);
  gpu_->copy_in(own_ + kept_bytes_, image_.data() + kept_bytes_, own_bytes_ - kept_bytes_);
}

void Lanes::awake() { gpu_->copy_in(own_, asleep_.data(), kept_bytes_); }

}  // namespace ept::moe::cuda
