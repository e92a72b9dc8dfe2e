// SPDX-License-Identifier: Apache-2.0
//
// pool.h: a few threads that help with rows. The caller takes part, and does all by itself where the work is small (a
// wake-up costs some 10 us, about 100 KB of copying) or where another lane uses the pool at that moment.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace ept::moe {

class Pool {
 public:
  ~Pool();
  // Makes sure that `threads` threads, callers included, can work at once.
  void grow(unsigned threads);
  // body(begin, end) over slices of at most `grain` of [0, items); `bytes` is what all of it touches.
  void run(size_t items, size_t grain, unsigned threads, size_t bytes, const std::function<void(size_t, size_t)> &body);

 private:
  // Less than this is done by the caller alone; see above. Measured on two cores, docs/decisions.md.
  static constexpr size_t kWorthWaking = size_t(1) << 20;

  void work();
  void take_slices();

  // INVARIANTS. `busy_` is held by the one caller that uses the pool. `job_`, `items_`, `grain_` are written under
  // `mutex_` before `round_` moves on, and not again before `inside_` is zero; helpers read them after they have seen
  // the new round under `mutex_` and have counted themselves in. `next_` hands out slices. run() returns when every
  // slice is taken and nobody is inside, so no helper touches a body that is gone.
  std::mutex busy_;
  std::mutex mutex_;
  std::condition_variable start_, done_;
  std::vector<std::thread> helpers_;
  const std::function<void(size_t, size_t)> *job_ = nullptr;
  size_t items_ = 0, grain_ = 0;
  unsigned wanted_ = 0, inside_ = 0;
  uint64_t round_ = 0;
  bool stop_ = false;
  std::atomic<size_t> next_{0};
};

}  // namespace ept::moe
