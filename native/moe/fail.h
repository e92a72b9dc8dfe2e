// SPDX-License-Identifier: Apache-2.0
//
// fail.h: errors inside moe/. A Failure carries a whole ept_error up to the C boundary (moe.cc, cuda/api.cc), where it
// becomes the return code and the caller's `error`.
#pragma once

#include <time.h>

#include "eptransport/eptransport.h"

namespace ept::moe {

// An ept_error that costs no memset of its kilobyte of text.
struct Error : ept_error {
  Error();
};

struct Failure {
  ept_error error;
};

[[noreturn]] __attribute__((format(printf, 3, 4))) void fail(int32_t code, int32_t peer, const char *format, ...);
// Throws what an engine call answered, where it is an error.
void check(int32_t code, const ept_error &error);

// The failure that is being handled, whatever was thrown.
Failure current();
// NULL: nobody asks.
void hand_over(const Failure &failure, const char *operation, ept_error *to);
// Runs a body of the C API.
template <class Body>
int32_t guarded(const char *operation, ept_error *error, Body &&body) {
  try {
    body();
    return EPT_OK;
  } catch (...) {
    const Failure failure = current();
    hand_over(failure, operation, error);
    return failure.error.code;
  }
}

// What an engine knows of a peer. Throws Failure.
ept_peer_info info_of(ept_engine *engine, uint32_t rank);
// Of an ept_peer_status: nothing more will come over this link.
inline bool ended(int32_t status) {
  return status == EPT_PEER_LOST || status == EPT_PEER_LEFT || status == EPT_PEER_MASKED;
}

inline uint64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return uint64_t(t.tv_sec) * 1000000000ull + uint64_t(t.tv_nsec);
}

struct Deadline {
  uint64_t start, at;
  explicit Deadline(uint64_t timeout_ns)
      : start(now_ns()), at(timeout_ns > UINT64_MAX - start ? UINT64_MAX : start + timeout_ns) {}
  uint64_t remaining() const {
    const uint64_t now = now_ns();
    return now < at ? at - now : 0;
  }
  double waited_s() const { return double(now_ns() - start) * 1e-9; }
};

}  // namespace ept::moe
