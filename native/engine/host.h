/* SPDX-License-Identifier: Apache-2.0
 * What the engine offers a plugin (ept_host), and the queue of what both have to say: native code prints nothing. */
#pragma once

#include <cstdint>
#include <deque>
#include <mutex>
#include <string>
#include <utility>

#include "eptransport/backend.h"

namespace ept {

uint64_t now_ns();

/* Bounded: when nobody reads, the oldest lines make room, and how many is said. */
class Log {
 public:
  void say(int32_t level, std::string text);
  bool next(int32_t &level, std::string &text);

 private:
  static constexpr size_t kept = 1024;
  std::mutex mutex_;
  std::deque<std::pair<int32_t, std::string>> lines_;
  uint64_t dropped_ = 0;
};

class Host {
 public:
  Host();
  Host(const Host &) = delete;
  Host &operator=(const Host &) = delete;
  const ept_host *table() const { return &table_; }
  Log log;

 private:
  ept_host table_{};
};

}  // namespace ept
