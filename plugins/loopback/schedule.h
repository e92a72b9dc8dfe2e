// SPDX-License-Identifier: Apache-2.0
//
// schedule.h: what the adversary decides, and nothing of how it is carried out. One generator an instance, drawn from
// only inside calls of that instance: the same seed and the same sequence of calls give the same schedule.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace loopback {

// The knobs, each a setting of the same name.
struct Malice {
  uint64_t seed = 0;
  uint32_t delay = 16;  // polls that a step is held, at most; a straggler sixteen times as many
  uint32_t chunks = 8;  // parts that the bytes of one write are cut into, at most
  uint32_t later_permille = 100;
  uint32_t early_permille = 300;
  uint32_t fail_permille = 0;
  int64_t lose_rank = -1;
  uint64_t lose_after = 1000;
  int64_t silent_rank = -1;
  uint64_t silent_after = 1000;
};

class Schedule {
 public:
  static constexpr uint32_t kLongest = 254;  // polls; the wheel has two buckets more
  static constexpr uint32_t kStragglers = 16;

  Schedule(const Malice &malice, uint32_t rank, uint32_t epoch)
      : malice_(malice), state_(malice.seed ^ (uint64_t{rank} << 32 | epoch) * 0x9e3779b97f4a7c15ull) {}

  // How many of `count` operations post takes; the others are told LATER.
  size_t takes(size_t count) { return chance(malice_.later_permille) ? below(count) : count; }
  bool fails() { return chance(malice_.fail_permille); }
  // LOCAL_DONE comes at once, the bytes whenever they like: local completion says nothing of the target (rule 6).
  bool early() { return chance(malice_.early_permille); }
  // Most steps are held for some polls, one in sixteen for so long that whole later steps pass it.
  uint32_t delay() {
    const uint64_t most = below(kStragglers) ? malice_.delay : uint64_t{malice_.delay} * kStragglers;
    return static_cast<uint32_t>(below((most < kLongest ? most : kLongest) + 1));
  }
  // Cuts [0, length) at random bytes: pairs of offset and length, none empty.
  std::vector<std::pair<uint64_t, uint64_t>> cut(uint64_t length) {
    std::vector<std::pair<uint64_t, uint64_t>> parts;
    uint64_t at = 0;
    for (uint64_t left = below(malice_.chunks) + 1; left && at < length; --left) {
      const uint64_t bytes = left == 1 ? length - at : 1 + below(length - at);
      parts.emplace_back(at, bytes);
      at += bytes;
    }
    return parts;
  }
  template <class T>
  void shuffle(std::vector<T> &items) {
    for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[below(i)]);
  }
  size_t below(uint64_t bound) { return static_cast<size_t>(static_cast<unsigned __int128>(next()) * bound >> 64); }

 private:
  bool chance(uint32_t permille) { return below(1000) < permille; }
  uint64_t next() {  // splitmix64
    uint64_t z = state_ += 0x9e3779b97f4a7c15ull;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
  }

  const Malice malice_;
  uint64_t state_;
};

}  // namespace loopback
