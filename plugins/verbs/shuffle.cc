// SPDX-License-Identifier: Apache-2.0
#include "shuffle.h"

#include <algorithm>

#include "channel.h"

namespace verbs {
namespace {

constexpr size_t kWindow = 64;  // completions among which the order is drawn

// Completions with the same key stay in order.
uint64_t key_of(const ibv_wc &completion) {
  return uint64_t{completion.qp_num} << 2 | static_cast<uint64_t>(RequestId::of(completion.wr_id).kind);
}

}  // namespace

Shuffle::Shuffle(ibv_cq *cq, uint64_t seed) : original_(cq->context->ops.poll_cq), random_(seed) {
  cq->cq_context = this;
  cq->context->ops.poll_cq = &Shuffle::poll;
}

int Shuffle::poll(ibv_cq *cq, int most, ibv_wc *completions) {
  return static_cast<Shuffle *>(cq->cq_context)->take(cq, most, completions);
}

int Shuffle::take(ibv_cq *cq, int most, ibv_wc *completions) {
  const size_t before = held_.size();
  held_.resize(kWindow);
  const int read = before < kWindow ? original_(cq, static_cast<int>(kWindow - before), &held_[before]) : 0;
  held_.resize(before + static_cast<size_t>(std::max(read, 0)));
  if (read < 0 && held_.empty()) return read;
  int given = 0;
  for (; given < most && !held_.empty(); ++given) {
    const uint64_t key = key_of(held_[random_() % held_.size()]);
    const auto first = std::find_if(held_.begin(), held_.end(), [&](const ibv_wc &it) { return key_of(it) == key; });
    completions[given] = *first;
    held_.erase(first);
  }
  return given;
}

}  // namespace verbs
