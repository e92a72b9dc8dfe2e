// SPDX-License-Identifier: Apache-2.0
//
// virtual.h: GPU memory by the driver's virtual memory management: an allocation that a file descriptor can name, and
// where it is mapped in this process. It lives as long as any process has it mapped, or holds a descriptor of it.
#pragma once

#include <memory>

#include "cuda/driver.h"

namespace ept::cuda {

class VirtualMemory {
 public:
  // Rounded up to what the driver gives. UNSUPPORTED where this driver or GPU has no such memory.
  static int32_t create(std::shared_ptr<Primary> primary, uint64_t bytes, std::unique_ptr<VirtualMemory> *memory,
                        ept_error *error);
  // Another process's, all of it. The descriptor stays the caller's.
  static int32_t import(std::shared_ptr<Primary> primary, int descriptor, uint64_t bytes,
                        std::unique_ptr<VirtualMemory> *memory, ept_error *error);
  ~VirtualMemory();
  VirtualMemory(const VirtualMemory &) = delete;
  VirtualMemory &operator=(const VirtualMemory &) = delete;

  Pointer address() const { return address_; }
  uint64_t bytes() const { return bytes_; }
  // A new descriptor, the caller's.
  int32_t descriptor(int *out, ept_error *error) const;

 private:
  VirtualMemory(std::shared_ptr<Primary> primary, uint64_t bytes) : primary_(std::move(primary)), bytes_(bytes) {}
  int32_t map(ept_error *error);
  const std::shared_ptr<Primary> primary_;
  const uint64_t bytes_;
  Allocation allocation_ = 0;
  bool has_ = false, mapped_ = false;
  Pointer address_ = 0;
};

}  // namespace ept::cuda
