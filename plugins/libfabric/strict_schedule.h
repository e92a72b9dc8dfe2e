// SPDX-License-Identifier: Apache-2.0
//
// strict_schedule.h: what the shim decides, and nothing of how it is carried out. One generator an endpoint and one a
// queue, drawn from only inside calls on it: the same seed and the same sequence of calls give the same schedule.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "strict.h"

namespace libfabric::strict {

class Schedule {
 public:
  // `number`: which endpoint or queue of this Library it is.
  Schedule(const StrictOptions &options, uint64_t number)
      : window_(options.window),
        storm_(options.storm),
        eagain_(static_cast<uint32_t>(options.eagain * kWhole)),
        state_(mix(mix(options.seed ^ mix(options.salt)) + number)) {}

  // Reads that a step waits. Most wait a few, a quarter none, one in sixteen so long that whole later steps pass it.
  uint32_t wait() {
    if (window_ == 0 || below(4) == 0) return 0;
    return static_cast<uint32_t>(below(window_ + uint64_t{1}) * (below(16) == 0 ? 16 : 1));
  }
  // Reads that a storm lasts from now on; 0: none begins.
  uint32_t storm() { return below(kWhole) < eagain_ ? 1 + static_cast<uint32_t>(below(storm_)) : 0; }
  bool coin() { return below(2) == 0; }
  template <class T>
  void shuffle(std::vector<T> &items) {
    for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[below(i)]);
  }
  uint64_t next() { return mix(state_ += kGolden); }

 private:
  static constexpr uint64_t kGolden = 0x9e3779b97f4a7c15ull;
  static constexpr uint32_t kWhole = 1 << 20;  // a share of 1

  size_t below(uint64_t bound) { return static_cast<size_t>(static_cast<unsigned __int128>(next()) * bound >> 64); }
  static uint64_t mix(uint64_t z) {  // splitmix64's
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
  }

  const uint32_t window_, storm_, eagain_;
  uint64_t state_;
};

}  // namespace libfabric::strict
