// SPDX-License-Identifier: Apache-2.0
//
// mask.cc: who takes part in a lane, and whose kernels wait no longer: ranks that are masked or lost.
#include "moe/cuda/lanes.h"
#include "moe/fail.h"

namespace ept::moe::cuda {

void Lanes::launch_members(uint32_t lane, const Members &members, uint32_t code, int32_t peer, void *stream) {
  TakeMembers a{};
  if (world_ > TakeMembers::kMost)
    fail(EPT_E_UNSUPPORTED, -1, "masks in a group of %u ranks; kernels know them of at most %u", world_,
         TakeMembers::kMost);
  a.lane = tables_[lane];
  a.membership = members.epoch;
  a.code = code;
  a.peer = peer;
  for (uint32_t r = 0; r < world_; r++)
    if (!members.has(r)) a.out[r / 64] |= 1ull << r % 64;
  gpu_->launch(kKernelTakeMembers, {1, threads_, 0, shared(threads_)}, stream, &a);
  taken_[lane] = members.epoch;
}

void Lanes::take_members(uint32_t lane, bool captures, void *stream) {
  refuse_suspended();
  const std::shared_ptr<const Members> now = arena_->members_of_step();
  if (!whole_) fail(EPT_E_FAULT, -1, "lane %u is faulted: a reset has begun and not ended well", lane);
  if (taken_[lane] == now->epoch) return;
  if (captures)
    fail(EPT_E_FAULT, -1,
         "a graph is captured, and lane %u has not heard of membership %u yet: call check() on the lane's stream "
         "before the capture",
         lane, now->epoch);
  launch_members(lane, *now, 0, -1, stream);
}

void Lanes::refuse_old(uint32_t lane, uint32_t membership, void *stream) {
  const std::shared_ptr<const Members> now = arena_->members();
  if (now->epoch == membership) return;
  // Other ranks may learn of it in another call: only a reset brings all to one place.
  int32_t lost = -1;
  for (uint32_t r = 0; r < world_ && lost < 0; r++)
    if (!now->has(r)) lost = int32_t(r);
  launch_members(lane, *now, uint32_t(lost < 0 ? -EPT_E_FAULT : -EPT_E_PEER_LOST), lost, stream);
  if (lost >= 0)
    fail(EPT_E_PEER_LOST, lost,
         "rank %d was masked since the dispatch (membership %u, now %u): what it had of these tokens is lost; reset, "
         "and dispatch again",
         lost, membership, now->epoch);
  fail(EPT_E_FAULT, -1,
       "the dispatch was under membership %u, which is %u now: reset on every rank, and dispatch again", membership,
       now->epoch);
}

void Lanes::follow() {
  const std::lock_guard<std::mutex> lock(following_);
  const std::shared_ptr<const Members> now = arena_->members();
  for (uint32_t r = 0; r < world_; r++) {
    if (r == rank_) continue;
    const int32_t code = !now->has(r) ? EPT_E_PEER_LOST : arena_->resets(r) ? EPT_E_FAULT : EPT_OK;
    if (code == EPT_OK) continue;
    if (maps(r) || initiates(r))
      std::atomic_ref<int32_t>(progress_[r].status).store(code, std::memory_order_release);
    else if (net_)
      net_->end_waits(r, code);
  }
}

void Lanes::watch() {
  arena_->watch();
  // Held while the engine is asked: a rank that was taken back, and is told so by after_reset, is not lost after it.
  const std::lock_guard<std::mutex> lock(following_);
  for (uint32_t r = 0; r < world_; r++) {
    if (r == rank_ || !(maps(r) || initiates(r))) continue;
    if (ended(info_of(arena_->engine, r).status))
      std::atomic_ref<int32_t>(progress_[r].status).store(EPT_E_PEER_LOST, std::memory_order_release);
  }
}

}  // namespace ept::moe::cuda
