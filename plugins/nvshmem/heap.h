// SPDX-License-Identifier: Apache-2.0
//
// heap.h: this rank's part of the symmetric heap, given out in pieces. Which piece a call gets follows from the calls
// before it alone: so ranks that make the same calls in the same order get pieces at the same places, and none of them
// has to wait for another.
#pragma once

#include <cstdint>
#include <map>

namespace nvshmem {

class Heap {
 public:
  static constexpr uint64_t kAlign = 4096, kNone = ~0ull;

  explicit Heap(uint64_t bytes) : bytes_(bytes) {}

  // From the heap's begin: the first place that is large enough; kNone: there is none.
  uint64_t take(uint64_t length) {
    const uint64_t bytes = (length + kAlign - 1) / kAlign * kAlign;
    if (length == 0 || bytes < length) return kNone;
    uint64_t at = 0;
    for (const auto &[begin, size] : taken_) {
      if (begin - at >= bytes) break;
      at = begin + size;
    }
    if (bytes > bytes_ || at > bytes_ - bytes) return kNone;
    taken_[at] = bytes;
    return at;
  }
  bool give_back(uint64_t at) { return taken_.erase(at) == 1; }
  // Whether [at, at + length) is inside a piece.
  bool holds(uint64_t at, uint64_t length) const {
    auto next = taken_.upper_bound(at);
    if (next == taken_.begin()) return false;
    --next;
    return at - next->first <= next->second && length <= next->second - (at - next->first);
  }
  uint64_t bytes() const { return bytes_; }
  uint64_t used() const {
    uint64_t sum = 0;
    for (const auto &[begin, size] : taken_) sum += size;
    return sum;
  }

 private:
  const uint64_t bytes_;
  std::map<uint64_t, uint64_t> taken_;  // begin, bytes
};

}  // namespace nvshmem
