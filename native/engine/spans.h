/* SPDX-License-Identifier: Apache-2.0
 * Where the time of a rank's calls goes, span by span, while a trace is being taken (EPT_TRACE). Off, a span costs one
 * look at a pointer.
 *
 * Invariant: a span is added when it ends, by the thread that holds the lane; a lane is held by one call at a time. So
 * spans of one lane lie inside one another or apart, whatever phase they are of. */
#pragma once

#include <deque>
#include <mutex>

#include "engine/host.h"
#include "eptransport/eptransport.h"

namespace ept {

class Spans {
 public:
  explicit Spans(size_t capacity) : capacity_(capacity) {}

  void add(const ept_span &span) {
    std::lock_guard hold(mutex_);
    if (spans_.size() == capacity_) {
      lost_++; /* the first ones stay: they tell how it began */
      return;
    }
    spans_.push_back(span);
  }

  size_t take(ept_span *to, size_t most, uint64_t &lost) {
    std::lock_guard hold(mutex_);
    size_t count = 0;
    for (; count < most && !spans_.empty(); count++) {
      to[count] = spans_.front();
      spans_.pop_front();
    }
    lost = lost_;
    return count;
  }

 private:
  const size_t capacity_;
  std::mutex mutex_;
  std::deque<ept_span> spans_;
  uint64_t lost_ = 0;
};

class Span {
 public:
  Span(Spans *to, const char *name, uint32_t phase, uint32_t lane, uint32_t peer = EPT_NO_PEER, uint64_t generation = 0)
      : to_(to) {
    if (!to) return;
    span_ = {name, now_ns(), 0, generation, phase, lane, peer, 0};
  }
  ~Span() {
    if (!to_) return;
    span_.end_ns = now_ns();
    to_->add(span_);
  }
  Span(const Span &) = delete;
  Span &operator=(const Span &) = delete;

 private:
  Spans *to_;
  ept_span span_;
};

/* NULL: no trace is taken. For moe/. */
Spans *spans_of(ept_engine *engine);

}  // namespace ept
