/* SPDX-License-Identifier: Apache-2.0
 * Objects by number. A handle is (generation << 32 | index + 1), so a stale one is answered, never followed, and 0 is
 * none. Addresses of living objects do not change. */
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

namespace ept {

template <class T>
class Slots {
 public:
  uint64_t add() {
    uint32_t index;
    if (free_.empty()) {
      index = static_cast<uint32_t>(slots_.size());
      slots_.emplace_back();
    } else {
      index = free_.back();
      free_.pop_back();
    }
    slots_[index].used = true;
    used_++;
    return uint64_t{slots_[index].generation} << 32 | (index + 1);
  }

  T *find(uint64_t id) {
    uint32_t index = static_cast<uint32_t>(id) - 1;
    if (index >= slots_.size()) return nullptr;
    Slot &slot = slots_[index];
    return slot.used && slot.generation == id >> 32 ? &slot.value : nullptr;
  }

  void remove(uint64_t id) {
    Slot &slot = slots_[static_cast<uint32_t>(id) - 1];
    slot.value = T{};
    slot.used = false;
    slot.generation++;
    used_--;
    free_.push_back(static_cast<uint32_t>(id) - 1);
  }

  size_t used() const { return used_; }

  template <class Visit>
  void each(Visit &&visit) {
    for (uint32_t i = 0; i < slots_.size(); i++) {
      if (slots_[i].used) visit(uint64_t{slots_[i].generation} << 32 | (i + 1), slots_[i].value);
    }
  }

 private:
  struct Slot {
    T value{};
    uint32_t generation = 1;
    bool used = false;
  };
  std::deque<Slot> slots_;
  std::vector<uint32_t> free_;
  size_t used_ = 0;
};

}  // namespace ept
