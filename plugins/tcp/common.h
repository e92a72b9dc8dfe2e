// SPDX-License-Identifier: Apache-2.0
// What every file of the plugin needs beside plugin.h.
#pragma once

#include "../plugin.h"

namespace tcp {

using plugin::fail;
using plugin::Fd;
using plugin::format;
using plugin::last_error;
using plugin::same_bytes;

template <typename Call>
int32_t guarded(const char *operation, Call &&call) {
  return plugin::guarded("tcp", operation, std::forward<Call>(call));
}

std::string errno_text(int number);

// What a descriptor in the instance's epoll set belongs to.
struct Source {
  enum class Kind : uint8_t { kListener, kTimer, kAccepted, kDial, kStream, kLingering, kMovers };
  explicit Source(Kind which) : kind(which) {}
  virtual ~Source() = default;
  const Kind kind;
};

}  // namespace tcp
