/* SPDX-License-Identifier: Apache-2.0
 * Objects by number. A handle is (generation << 32 | index + 1), so a stale one is answered, never followed, and 0 is
 * none. Addresses of living objects do not change, so what holds an object alive may keep a pointer to it. */
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

namespace ept {

template <class T>
class Slots {
 public:
  T *add(uint64_t *id) {
    uint32_t index;
    if (free_.empty()) {
      index = count_++;
      if (index >> chunk_bits == chunks_.size()) chunks_.push_back(std::make_unique<Chunk>());
    } else {
      index = free_.back();
      free_.pop_back();
    }
    Slot &slot = at(index);
    slot.used = true;
    *id = uint64_t{slot.generation} << 32 | (index + 1);
    return &slot.value;
  }

  T *find(uint64_t id) {
    const uint32_t index = static_cast<uint32_t>(id) - 1;
    if (index >= count_) return nullptr;
    Slot &slot = at(index);
    return slot.used && slot.generation == id >> 32 ? &slot.value : nullptr;
  }

  void remove(uint64_t id) {
    const uint32_t index = static_cast<uint32_t>(id) - 1;
    Slot &slot = at(index);
    slot.value = T{};
    slot.used = false;
    slot.generation++;
    free_.push_back(index);
  }

  size_t used() const { return count_ - free_.size(); }

  template <class Visit>
  void each(Visit &&visit) {
    for (uint32_t i = 0; i < count_; i++) {
      Slot &slot = at(i);
      if (slot.used) visit(uint64_t{slot.generation} << 32 | (i + 1), slot.value);
    }
  }

 private:
  struct Slot {
    T value{};
    uint32_t generation = 1;
    bool used = false;
  };
  static constexpr uint32_t chunk_bits = 8;
  using Chunk = std::array<Slot, 1u << chunk_bits>;

  Slot &at(uint32_t index) { return (*chunks_[index >> chunk_bits])[index & ((1u << chunk_bits) - 1)]; }

  std::vector<std::unique_ptr<Chunk>> chunks_;
  std::vector<uint32_t> free_;
  uint32_t count_ = 0;
};

}  // namespace ept
