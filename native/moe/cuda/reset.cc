// SPDX-License-Identifier: Apache-2.0
//
// reset.cc: a GPU's part in a reset: its lanes begin anew, and take ranks in that have come back.
#include <string.h>

#include <algorithm>

#include "moe/cuda/lanes.h"
#include "moe/cuda/shared.h"
#include "moe/fail.h"

namespace ept::moe::cuda {

uint64_t Lanes::step() {
  uint64_t most = 0;
  for (const Kept &kept : kept_) {
    LaneState state;
    gpu_->copy_out(&state, kept.state, sizeof state);
    for (uint64_t sent : state.sent) most = std::max(most, sent);
  }
  return most;
}

std::shared_ptr<void> Lanes::before_reset(const Deadline &deadline) {
  whole_ = false;
  // What kernels have put and that hasn't landed would, later, in slots that begin anew.
  if (heap_) {
    Drain a{tables_[0], 0};
    gpu_->launch(kKernelQuiet, {1, kWarp, 0, least_shared(kWarp)}, nullptr, &a);
    stuck_ = !gpu_->ends(nullptr, deadline.at);
    if (stuck_)
      fail(EPT_E_TIMEOUT, -1,
           "reset: rank %u waited %.3f s for what its kernels have put to arrive, and it hasn't: a card or a peer is "
           "stuck. Reset again; where it stays, end this process, since one rank can't leave the device library",
           rank_, deadline.waited_s());
  }
  if (!net_) return nullptr;
  std::vector<std::array<uint64_t, EPT_PHASES>> next(count_);
  for (uint32_t l = 0; l < count_; l++) {
    LaneState state;
    gpu_->copy_out(&state, kept_[l].state, sizeof state);
    for (uint32_t p = 0; p < EPT_PHASES; p++) next[l][p] = state.sent[p];
  }
  return net_->before_reset(next, deadline);
}

// Since all that are up have come, none of their kernels run: nobody raises a mapped signal before all have met.
void Lanes::after_reset(uint64_t number, uint32_t index, const Deadline &deadline) {
  const uint64_t tag = kTagSideMeet | (number & 0xffffffff) << 16 | (index & 0x7fff) << 1;
  std::vector<std::array<uint64_t, EPT_PHASES>> next(count_, {number, number});
  if (net_) net_->after_reset(next);
  meet(tag, true, deadline);
  begin_at(next);
  {
    const std::lock_guard<std::mutex> lock(following_);
    for (uint32_t r = 0; r < world_; r++)
      if (arena_->members()->has(r))
        std::atomic_ref<int32_t>(progress_[r].status).store(EPT_OK, std::memory_order_release);
  }
  meet(tag | 1, false, deadline);
  whole_ = true;
}

// All that kernels keep, empty and at those generations. Nobody raises a mapped signal meanwhile.
void Lanes::begin_at(const std::vector<std::array<uint64_t, EPT_PHASES>> &next) {
  gpu_->clear(memory_ + signals_at(), bytes() - signals_at());
  gpu_->clear(own_, kept_bytes_);
  memset(told_, 0, sizeof(Told) * count_);
  for (const auto &[memory, bytes] : cleared_) gpu_->clear(memory, bytes);
  const std::shared_ptr<const Members> members = arena_->members();
  for (uint32_t l = 0; l < count_; l++) {
    LaneState state{};
    std::vector<uint64_t> offsets(uint64_t(world_) * kSignals), heard(uint64_t(world_) * EPT_PHASES);
    std::vector<uint8_t> out(uint64_t(world_) * kSets);
    for (uint32_t p = 0; p < EPT_PHASES; p++) {
      state.sent[p] = state.received[p] = next[l][p];
      for (uint32_t r = 0; r < world_; r++) {
        heard[r * EPT_PHASES + p] = next[l][p];
        for (uint32_t slot = 0; slot < EPT_MOE_SLOTS; slot++) {
          const uint64_t first = next[l][p] + ((next[l][p] ^ slot) & 1);  // generation of that slot
          const bool far = !maps(r) && !initiates(r) && net_;
          offsets[r * kSignals + signal_index(p, slot)] = (far ? net_->taken(l, r, p, slot, 0) : 0) - first / 2;
          offsets[r * kSignals + signal_index(p, slot, 1)] = far ? net_->taken(l, r, p, slot, 1) : 0;
        }
        offsets[r * kSignals + grant_index(p)] = !maps(r) && !initiates(r) && net_ ? net_->granted(l, r, p) : 0;
      }
    }
    for (uint32_t set = 0; set < kSets; set++) {
      state.membership[set] = members->epoch;
      for (uint32_t r = 0; r < world_; r++) out[set * world_ + r] = !members->has(r);
    }
    taken_[l] = members->epoch;
    gpu_->copy_in(kept_[l].state, &state, sizeof state);
    gpu_->copy_in(kept_[l].offsets, offsets.data(), offsets.size() * sizeof(uint64_t));
    gpu_->copy_in(kept_[l].heard, heard.data(), heard.size() * sizeof(uint64_t));
    gpu_->copy_in(kept_[l].out, out.data(), out.size());
  }
}

// GPU ranks that are up say where their memory is, which is another one where a rank's process is; and none goes on
// before all are here.
void Lanes::meet(uint64_t tag, bool tell, const Deadline &deadline) {
  Members with = *arena_->members();
  for (uint32_t r = 0; r < world_; r++)
    if (places_[r].known && !places_[r].on_gpu) with.active[r] = 0;
  Bytes mine;
  const std::string blob = exported();
  mine.put(places_[rank_]).put_text(blob.data(), blob.size());
  const auto said = exchange(
      arena_->engine, rank_, with, tag, [&](uint32_t) { return mine.all(); }, deadline, "to reset its GPU's signals");
  if (!tell) return;
  for (uint32_t r = 0; r < world_; r++) {
    if (r == rank_ || !with.has(r)) continue;
    Bytes theirs(said[r]);
    places_[r] = theirs.get<Place>();
    arena_->learn_place(r, places_[r]);
    if (direct(places_[r], places_[rank_]))
      connect(r, theirs.get_text());
    else if (!net_)
      fail(EPT_E_UNSUPPORTED, int32_t(r),
           "rank %u has come back where rank %u can't map its memory, as all ranks of this group do: start it on this "
           "machine, or make a group anew",
           r, rank_);
    for (uint32_t l = 0; l < count_; l++) fill_peer(l, r);
  }
  gpu_->copy_in(own_ + kept_bytes_, image_.data() + kept_bytes_, own_bytes_ - kept_bytes_);
}

}  // namespace ept::moe::cuda
