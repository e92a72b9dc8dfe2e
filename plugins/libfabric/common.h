// SPDX-License-Identifier: Apache-2.0
// What every file of the plugin needs beside plugin.h: an owner for libfabric's objects.
#pragma once

#include <rdma/fabric.h>

#include "../plugin.h"

namespace libfabric {

using plugin::fail;
using plugin::Fd;
using plugin::format;
using plugin::last_error;
using plugin::same_bytes;

template <typename Call>
int32_t guarded(const char *operation, Call &&call) {
  return plugin::guarded("libfabric", operation, std::forward<Call>(call));
}

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

}  // namespace libfabric
