// SPDX-License-Identifier: Apache-2.0
// What every file of the plugin needs: the calling thread's last error, an owner for libfabric's objects and for
// descriptors, bytes compared in constant time.
#pragma once

#include <eptransport/backend.h>
#include <rdma/fabric.h>
#include <unistd.h>

#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <new>
#include <string>
#include <utility>

namespace libfabric {

// Leaves a sentence for `last_error` on the calling thread and returns `code`, so that a caller can write
// `return fail(...)`. `peer` -1 and `number` 0: none.
int32_t fail(int32_t code, const char *operation, int64_t peer, int number, const char *format, ...)
    __attribute__((format(printf, 5, 6)));
const ept_error &last_error();

std::string format(const char *pattern, ...) __attribute__((format(printf, 1, 2)));

// No exception crosses the ABI. The only one that our code can meet is a refusal of memory.
template <typename Call>
int32_t guarded(const char *operation, Call &&call) {
  try {
    return call();
  } catch (const std::bad_alloc &) {
    return fail(EPT_E_NOMEM, operation, -1, 0, "libfabric: the machine refused memory in %s", operation);
  } catch (...) {
    return fail(EPT_E_INTERNAL, operation, -1, 0, "libfabric: an exception reached the edge of the plugin in %s",
                operation);
  }
}

class Fd {
 public:
  Fd() = default;
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

// Closes what it holds: any of libfabric's objects, all of which begin with a fid.
template <typename Object>
class Owned {
 public:
  Owned() = default;
  Owned(Owned &&other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Owned &operator=(Owned &&other) noexcept {
    if (this != &other) {
      close();
      object_ = std::exchange(other.object_, nullptr);
    }
    return *this;
  }
  ~Owned() { close(); }

  Object *get() const { return object_; }
  Object *operator->() const { return object_; }
  Object **out() { return &object_; }
  explicit operator bool() const { return object_ != nullptr; }
  int close() {
    Object *object = std::exchange(object_, nullptr);
    return object != nullptr ? fi_close(&object->fid) : 0;
  }

 private:
  Object *object_ = nullptr;
};

// The time that it takes says nothing about where two secrets differ.
inline bool same_bytes(const uint8_t *a, const uint8_t *b, size_t length) {
  uint8_t difference = 0;
  for (size_t i = 0; i < length; ++i) difference = static_cast<uint8_t>(difference | (a[i] ^ b[i]));
  return difference == 0;
}

}  // namespace libfabric
