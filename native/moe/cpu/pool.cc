// SPDX-License-Identifier: Apache-2.0
#include "moe/cpu/pool.h"

#include <algorithm>

namespace ept::moe {

Pool::~Pool() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  start_.notify_all();
  for (auto &helper : helpers_) helper.join();
}

void Pool::grow(unsigned threads) {
  std::lock_guard<std::mutex> busy(busy_);
  while (helpers_.size() + 1 < threads) helpers_.emplace_back([this] { work(); });
}

void Pool::run(size_t items, size_t grain, unsigned threads, size_t bytes,
               const std::function<void(size_t, size_t)> &body) {
  if (items == 0) return;
  if (threads <= 1 || items <= grain || bytes < kWorthWaking || !busy_.try_lock()) return body(0, items);
  std::lock_guard<std::mutex> busy(busy_, std::adopt_lock);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    job_ = &body;
    items_ = items;
    grain_ = grain;
    next_.store(0, std::memory_order_relaxed);
    wanted_ = unsigned(std::min<size_t>({helpers_.size(), threads - 1, (items + grain - 1) / grain - 1}));
    round_++;
  }
  start_.notify_all();
  take_slices();
  std::unique_lock<std::mutex> lock(mutex_);
  wanted_ = 0;  // who has not come in by now need not
  done_.wait(lock, [this] { return inside_ == 0; });
}

void Pool::take_slices() {
  for (;;) {
    const size_t begin = next_.fetch_add(grain_, std::memory_order_relaxed);
    if (begin >= items_) return;
    (*job_)(begin, std::min(begin + grain_, items_));
  }
}

void Pool::work() {
  uint64_t seen = 0;
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    start_.wait(lock, [&] { return stop_ || (round_ != seen && wanted_ > 0); });
    if (stop_) return;
    seen = round_;
    wanted_--;
    inside_++;
    lock.unlock();
    take_slices();
    lock.lock();
    if (--inside_ == 0) done_.notify_one();
  }
}

}  // namespace ept::moe
