// SPDX-License-Identifier: Apache-2.0
//
// device_half.h: the device half of an engine's backend (backend.h), where it has one: memory of its symmetric heap,
// where kernels find a peer, and the kernels that are linked with its device library. Every rank makes the same calls
// in the same order. Ends before its engine does.
#pragma once

#include <memory>

#include "eptransport/eptransport.h"

namespace ept {

class DeviceHalf {
 public:
  // NULL, and OK: the backend has none, or none of it is to be used. UNAVAILABLE and others: why it can't be.
  static int32_t open(ept_engine *engine, int32_t cuda_device, std::shared_ptr<DeviceHalf> *half, ept_error *error);
  int32_t allocate(uint64_t bytes, void **memory, ept_error *error);
  void release(void *memory);
  int32_t peer(uint32_t rank, ept_device_entry *entry, ept_error *error);
  // The kernels, for the device that was opened; the library's own state in a module that was made of them.
  int32_t image(const void **image, size_t *length, ept_error *error);
  int32_t module(void *cuda_module, ept_error *error);
  ept_engine *engine() const { return engine_; }

 private:
  explicit DeviceHalf(ept_engine *engine) : engine_(engine) {}
  template <class Call>
  int32_t call(const char *operation, ept_error *error, Call &&call);
  ept_engine *const engine_;
};

}  // namespace ept
