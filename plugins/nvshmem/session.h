// SPDX-License-Identifier: Apache-2.0
//
// session.h: this process's NVSHMEM. A process is one PE, of one set of processes, for good: leaving NVSHMEM takes all
// of them together, and there is no waiting for a peer that has died. So it is started by the first group that joins,
// serves later groups of the same processes, one at a time, and ends with the process.
//
// Starting it, and allocating its heap, wait for all PEs. They run on a thread of their own, so that no call of the
// backend waits: `start` begins, `poll` says how far it is. A start that others never come to leaves that thread
// behind.
#pragma once

#include <eptransport/backend.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <string>

#include "heap.h"
#include "library.h"

namespace nvshmem {

// The driver's entry points that are used, by way of the host.
struct Cuda {
  int (*init)(unsigned);
  int (*device_count)(int *);
  int (*context_device)(int *);
  int (*attribute)(int *, int, int device);
  int (*retain)(void **context, int device);
  int (*push)(void *context);
  int (*pop)(void **context);
  // False: there is no driver.
  bool find(const ept_host *host);
};

class Session {
 public:
  static Session &of_process();

  struct Plan {
    std::shared_ptr<const Library> library;
    Cuda cuda;
    uint32_t rank, ranks;
    int device;
    uint64_t heap_bytes;
    UniqueId id;
  };
  // Names the set of processes; 0: not started.
  uint64_t token() const { return token_; }
  void start(const Plan &plan);
  // OK: up. LATER: under way. Else it failed, and *why.
  int32_t poll(std::string *why);

  // Set once it is up.
  const Plan &plan() const { return plan_; }
  char *base() const { return base_; }
  // Pieces of it, of one group at a time.
  Heap *heap() const { return heap_.get(); }
  // One instance has it; false: another one does.
  bool claim(const void *instance);
  void let_go(const void *instance);

 private:
  enum State { kNone, kStarting, kUp, kFailed };
  void run();
  mutable std::mutex mutex_;
  State state_ = kNone;
  uint64_t token_ = 0;
  Plan plan_{};
  char *base_ = nullptr;
  std::unique_ptr<Heap> heap_;
  std::string why_;
  const void *owner_ = nullptr;
};

}  // namespace nvshmem
