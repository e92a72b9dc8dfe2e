// SPDX-License-Identifier: Apache-2.0
//
// library.h: a device library (device.cuh) for kernels on fibers, of one process: each rank's part of a symmetric heap,
// and puts that come as late as a seed wants them to. The bytes of a put are read, and land, piece by piece in any
// order and beside those of other puts, its signal comes after all of them; none of it waits for the kernel to go on,
// nor for its end. So a source that is used again too early, or a signal that is trusted for another put's bytes,
// shows. A part (device.cuh, 8) is stores on a machine whose stores are late: it lands at any time, but before a
// release of device scope by a thread of the warp that put it, or of its block if the block put it, or was told by that
// warp after a fence. So a part that is counted before it is put, or not ordered before the count, shows too.
#pragma once

#include <stdint.h>

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <vector>

#include "moe/cuda/gpu.h"

namespace simt {

class Library {
 public:
  Library(uint32_t ranks, uint64_t bytes, uint64_t seed);
  ~Library();
  Library(const Library &) = delete;
  Library &operator=(const Library &) = delete;

  std::shared_ptr<ept::moe::cuda::Heap> heap(uint32_t rank);
  // Numbers are not ranks: rank r's.
  uint32_t number(uint32_t rank) const { return (rank + 1) % uint32_t(parts_.size()); }

  void part(const void *to, const void *from, uint64_t bytes, uint32_t number);
  // By the thread that runs.
  void announce();
  void release();
  void put(const void *to, const void *from, uint64_t bytes, const uint64_t *signal, uint32_t number);
  // A piece of some put, now and then; none while it is held.
  void move();
  void hold(bool held) { held_ = held; }
  // Then quiet doesn't return, as where a card is stuck.
  void stick(bool stuck) { stuck_ = stuck; }
  bool stuck() const { return stuck_; }
  // What each put takes on the GPU's clock, ns.
  uint64_t costs = 0;
  void quiet();
  uint64_t puts() const { return puts_; }
  uint64_t parts() const { return parts_put_; }  // that warps put
  // Whether it has the memory of `to` mapped where `from` puts. By rank; all if not given.
  std::function<bool(uint32_t from, uint32_t to)> maps;
  uint64_t late() const { return late_; }  // that were under way when quiet was called

 private:
  friend class Part;
  struct Put {
    char *to;
    const char *from;
    uint64_t bytes;
    uint64_t *signal;
    std::vector<uint64_t> pieces;  // that are still to come: their places
    // Of a part: what they store, whose they are, and whether its block has been told.
    std::vector<char> stored;
    const struct BlockState *block = nullptr;
    uint32_t warp = 0;
    bool announced = false;
  };
  void move_one(size_t at);
  char *there(const void *here, uint32_t number) const;
  std::vector<char *> parts_;  // by number
  const uint64_t bytes_;
  std::mt19937_64 random_;
  std::vector<Put> under_way_;
  std::mutex mutex_;  // quiet comes from any rank's thread
  bool held_ = false;
  std::atomic<bool> stuck_{false};
  uint64_t puts_ = 0, late_ = 0, parts_put_ = 0;
};

// The one that kernels of this process put through.
extern Library *library;

}  // namespace simt
