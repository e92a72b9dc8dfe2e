// SPDX-License-Identifier: Apache-2.0
//
// plugin.h: what a plugin over a network needs beside backend.h, whatever the network: the calling thread's last error,
// the edge that no exception crosses, an owner for descriptors, bytes compared in constant time. Header alone; each
// plugin has its own copy of the state, since it exports nothing but its table (plugin.map).
#pragma once

#include <eptransport/backend.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <new>
#include <string>
#include <utility>

namespace plugin {

inline thread_local ept_error threads_error{sizeof(ept_error), EPT_OK, -1, 0, 0, 0, 0, {}, {}};

inline const ept_error &last_error() { return threads_error; }

// Leaves a sentence for `last_error` on the calling thread and returns `code`, so that a caller can write
// `return fail(...)`. `peer` -1 and `number` 0: none.
[[gnu::format(printf, 5, 6)]] inline int32_t fail(int32_t code, const char *operation, int64_t peer, int number,
                                                  const char *pattern, ...) {
  ept_error &error = threads_error;
  error = ept_error{sizeof(ept_error), code, static_cast<int32_t>(peer), number, 0, 0, 0, {}, {}};
  snprintf(error.operation, sizeof error.operation, "%s", operation);
  va_list list;
  va_start(list, pattern);
  vsnprintf(error.text, sizeof error.text, pattern, list);
  va_end(list);
  return code;
}

[[gnu::format(printf, 1, 2)]] inline std::string format(const char *pattern, ...) {
  char text[1024];
  va_list list;
  va_start(list, pattern);
  vsnprintf(text, sizeof text, pattern, list);
  va_end(list);
  return text;
}

// No exception crosses the ABI. The only one that our code can meet is a refusal of memory. `name`: the plugin's.
template <typename Call>
int32_t guarded(const char *name, const char *operation, Call &&call) {
  try {
    return call();
  } catch (const std::bad_alloc &) {
    return fail(EPT_E_NOMEM, operation, -1, 0, "%s: the machine refused memory in %s", name, operation);
  } catch (...) {
    return fail(EPT_E_INTERNAL, operation, -1, 0, "%s: an exception reached the edge of the plugin in %s", name,
                operation);
  }
}

class Fd {
 public:
  Fd() = default;
  explicit Fd(int fd) : fd_(fd) {}
  Fd(Fd &&other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Fd &operator=(Fd &&other) noexcept {
    if (this != &other) reset(std::exchange(other.fd_, -1));
    return *this;
  }
  ~Fd() { reset(); }

  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }
  void reset(int fd = -1) {
    if (fd_ >= 0) ::close(fd_);
    fd_ = fd;
  }

 private:
  int fd_ = -1;
};

// Makes a timerfd readable at `due` by the host's clock, which says `now`; 0: never.
inline void set_timer(const Fd &timer, uint64_t due, uint64_t now) {
  constexpr uint64_t kSecond = 1000000000;
  itimerspec spec{};
  const uint64_t in = due > now ? due - now : 1;
  if (due != 0) spec.it_value = {static_cast<time_t>(in / kSecond), static_cast<long>(in % kSecond)};
  timerfd_settime(timer.get(), 0, &spec, nullptr);
}

// The time that it takes says nothing about where two secrets differ.
inline bool same_bytes(const uint8_t *a, const uint8_t *b, size_t length) {
  uint8_t difference = 0;
  for (size_t i = 0; i < length; ++i) difference = static_cast<uint8_t>(difference | (a[i] ^ b[i]));
  return difference == 0;
}

}  // namespace plugin
