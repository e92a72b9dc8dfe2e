/* SPDX-License-Identifier: Apache-2.0
 * Who waits for what, for a report by another thread.
 *
 * Invariant: a Waiting stands in ept_engine::waiting from before its thread sleeps until it is through, and is changed
 * only under the engine's lock while it stands there. So a report, which holds that lock, reads whole ones; what was
 * seen it takes from the signals themselves, which go on counting. */
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "eptransport/metrics.h"

struct ept_engine;

namespace ept {

constexpr uint32_t any_peer = UINT32_MAX;

struct Awaited {
  uint32_t peer = any_peer;
  uint32_t phase = EPT_METRICS_TRANSFER;
  uint64_t signal = 0; /* its number; 0: `seen` says what was seen */
  uint64_t expected = 0, seen = 0;
};

struct Waiting {
  const char *operation = "";
  const char *what = "";
  const Awaited *awaited = nullptr;
  size_t count = 0;
  uint64_t since_ns = 0;
  int32_t thread = 0;
};

/* A wait that is made of many calls into the engine (moe/). */
class Published {
 public:
  explicit Published(ept_engine *engine) : engine_(engine) {}
  ~Published() { take_back(); }
  Published(const Published &) = delete;
  Published &operator=(const Published &) = delete;

  void say(const char *operation, std::string what, std::vector<Awaited> awaited, uint64_t since_ns);
  void take_back();
  /* Its deadline has passed: what it waited for is kept for this thread's next ept_engine_why_stuck. */
  void expired();

 private:
  void mark(bool waiting);

  ept_engine *engine_;
  bool standing_ = false;
  std::string what_;
  std::vector<Awaited> awaited_;
  Waiting waiting_;
};

}  // namespace ept
