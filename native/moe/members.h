// SPDX-License-Identifier: Apache-2.0
//
// members.h: who takes part. Agreed above (ept_arena_members); a step takes it once, at dispatch_send, and keeps it.
#pragma once

#include <stdint.h>

#include <vector>

namespace ept::moe {

struct Members {
  uint32_t epoch = 0;
  std::vector<uint8_t> active;  // [world]

  bool has(uint32_t rank) const { return active[rank] != 0; }
  uint32_t count() const {
    uint32_t n = 0;
    for (uint8_t one : active) n += one != 0;
    return n;
  }
};

}  // namespace ept::moe
