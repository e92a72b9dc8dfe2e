// SPDX-License-Identifier: Apache-2.0
//
// memory.h: memory that kernels and peers, or kernels and a network, both reach. Each piece has an owner that gives it
// back; which kind a network takes is asked of its caps (home_of).
//
//   DeviceMemory   on one GPU; other processes of the machine map it by a blob (Sharing: no way needs privileges)
//   MappedMemory   a blob's memory, here: another process's, or this process's as it stands
//   PinnedMemory   on the host, for networks that take no other, rings and signals; kernels store into it directly
//   PinnedRange    memory that is there already, pinned and shown to kernels
#pragma once

#include <string>

#include "cuda/driver.h"
#include "cuda/handover.h"
#include "cuda/virtual.h"

namespace ept::cuda {

// Where rows should lie for a network: EPT_MEMORY_CUDA where it reads and writes a GPU's memory (as a dmabuf or by its
// address), else EPT_MEMORY_PINNED.
int32_t home_of(const ept_caps &caps);

// What ept_memory_register takes, with the descriptor that a dmabuf brings; it may go once the memory is registered.
class Described {
 public:
  Described() = default;
  ~Described();
  Described(const Described &) = delete;
  Described &operator=(const Described &) = delete;

  ept_memory memory{};  // fd -1 but for a dmabuf
};

// How other processes get at it. What is allocated for one way can't be shown by the other.
enum class Sharing : uint32_t {
  automatic = 0,   // by IPC where that works for this process, else by descriptors
  ipc = 1,         // CUDA IPC
  descriptors = 2  // virtual memory, whose descriptors go over a Unix socket (handover.h)
};

class DeviceMemory {
 public:
  // Zeroed. Rounded up to 2 MiB, CUDA's own granule, so that a blob never shows a neighbour's memory.
  static int32_t allocate(std::shared_ptr<Primary> primary, uint64_t bytes, std::unique_ptr<DeviceMemory> *memory,
                          ept_error *error, Sharing sharing = Sharing::ipc);
  ~DeviceMemory();
  DeviceMemory(const DeviceMemory &) = delete;
  DeviceMemory &operator=(const DeviceMemory &) = delete;

  uint64_t address() const { return address_; }
  uint64_t bytes() const { return bytes_; }
  const Primary &primary() const { return *primary_; }
  // What MappedMemory opens on the same machine, in any process. Opaque; whoever holds it can read and write all of
  // the memory, so it goes to members of the group alone. It is good until the memory goes.
  int32_t blob(std::string *out, ept_error *error);
  Sharing sharing() const { return virtual_ ? Sharing::descriptors : Sharing::ipc; }
  // All of it for the networks with these caps: a dmabuf where both they and the driver have those, else the address,
  // for networks that take it (with nvidia-peermem). UNSUPPORTED: it can't be registered there.
  int32_t describe(const ept_caps &caps, Described *out, ept_error *error) const;

 private:
  DeviceMemory(std::shared_ptr<Primary> primary, Pointer address, uint64_t bytes)
      : primary_(std::move(primary)), address_(address), bytes_(bytes) {}
  int32_t zero(ept_error *error) const;
  std::shared_ptr<Primary> primary_;
  const Pointer address_;
  const uint64_t bytes_;
  std::unique_ptr<VirtualMemory> virtual_;  // NULL: cuMemAlloc's
  std::unique_ptr<Handover> handover_;      // since the first blob of such
};

class MappedMemory {
 public:
  // UNSUPPORTED: of another machine. INVALID: no blob of ours.
  static int32_t open(std::shared_ptr<Primary> primary, const std::string &blob, std::unique_ptr<MappedMemory> *memory,
                      ept_error *error);
  ~MappedMemory();
  MappedMemory(const MappedMemory &) = delete;
  MappedMemory &operator=(const MappedMemory &) = delete;

  uint64_t address() const { return address_; }
  uint64_t bytes() const { return bytes_; }
  bool same_process() const { return !opened_ && !virtual_; }

 private:
  MappedMemory() = default;
  std::shared_ptr<Primary> primary_;
  Pointer opened_ = 0;  // by IPC
  std::unique_ptr<VirtualMemory> virtual_;
  uint64_t address_ = 0, bytes_ = 0;
};

class PinnedMemory {
 public:
  // Zeroed, page-aligned, seen by every GPU of the process.
  static int32_t allocate(std::shared_ptr<Primary> primary, uint64_t bytes, std::unique_ptr<PinnedMemory> *memory,
                          ept_error *error);
  ~PinnedMemory();
  PinnedMemory(const PinnedMemory &) = delete;
  PinnedMemory &operator=(const PinnedMemory &) = delete;

  void *host() const { return host_; }
  uint64_t address() const { return address_; }  // for kernels
  uint64_t bytes() const { return bytes_; }

 private:
  PinnedMemory(std::shared_ptr<Primary> primary, void *host, Pointer address, uint64_t bytes)
      : primary_(std::move(primary)), host_(host), address_(address), bytes_(bytes) {}
  std::shared_ptr<Primary> primary_;
  void *const host_;
  const Pointer address_;
  const uint64_t bytes_;
};

class PinnedRange {
 public:
  // `host` stays the caller's, and is freed only after this.
  static int32_t pin(std::shared_ptr<Primary> primary, void *host, uint64_t bytes, std::unique_ptr<PinnedRange> *range,
                     ept_error *error);
  ~PinnedRange();
  PinnedRange(const PinnedRange &) = delete;
  PinnedRange &operator=(const PinnedRange &) = delete;

  uint64_t address() const { return address_; }

 private:
  PinnedRange(std::shared_ptr<Primary> primary, void *host, Pointer address)
      : primary_(std::move(primary)), host_(host), address_(address) {}
  std::shared_ptr<Primary> primary_;
  void *const host_;
  const Pointer address_;
};

}  // namespace ept::cuda
