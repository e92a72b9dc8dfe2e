// SPDX-License-Identifier: Apache-2.0
// What the three files of loops share: a clock, a deadline, and how a loop says what went wrong.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <ctime>

#include "ept_bench.h"

namespace ept::bench {

inline uint64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<uint64_t>(t.tv_sec) * 1'000'000'000u + static_cast<uint64_t>(t.tv_nsec);
}

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Looks at the clock once in 1,024 questions, so that a spinning loop may ask at every turn.
class Deadline {
 public:
  explicit Deadline(uint64_t timeout_ns) : end_(now_ns() + timeout_ns) {}
  bool passed() { return ++asked_ % 1024 == 0 && now_ns() > end_; }
  uint64_t left_ns() const {
    const uint64_t now = now_ns();
    return now < end_ ? end_ - now : 0;
  }

 private:
  uint64_t end_;
  uint64_t asked_ = 0;
};

// Keeps the sentence for eptb_last_error and gives back the code.
int32_t fail(int32_t code, const char *format, ...) __attribute__((format(printf, 2, 3)));
int32_t fail(const ept_error &error);

}  // namespace ept::bench
