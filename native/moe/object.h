// SPDX-License-Identifier: Apache-2.0
//
// object.h: what one AllToAll is: its config, the sizes that follow from it, where experts live, and its counters.
#pragma once

#include <atomic>
#include <memory>

#include "moe/layout.h"
#include "moe/routing.h"

namespace ept::moe {

// Bytes of `elements` of a format, as a payload; 0: not a format.
uint64_t format_bytes(int32_t dtype, uint64_t elements);
const char *format_name(int32_t dtype);
inline bool is_float(int32_t dtype) {
  return dtype == EPT_DTYPE_F32 || dtype == EPT_DTYPE_F16 || dtype == EPT_DTYPE_BF16;
}

uint64_t page_bytes();

constexpr uint32_t kMaxLanes = 64;  // a lane is a micro-batch under way; two are usual

struct Counters {
  std::atomic<uint64_t> generations[2]{}, messages[2]{}, bytes[2]{}, rows[2]{};
  std::atomic<uint64_t> grants{0}, acks{0}, ack_waits{0};
};

struct Object {
  ept_moe_config config;  // placement and defaults filled in; `placement` itself is NULL
  uint32_t number = 0;    // of the arena's objects; the same on every rank
  unsigned threads = 1;
  Shape shape;
  Placement placement;
  Counters counters;

  // Throws INVALID with the values for a config that can't be.
  explicit Object(const ept_moe_config &given);

  uint32_t local() const { return placement.local_experts(config.rank); }
  bool quantises() const { return config.dispatch_dtype == EPT_DTYPE_E4M3 && config.dtype != EPT_DTYPE_E4M3; }
  // Bytes of a row's payload: on the way out, and back.
  uint64_t payload() const { return format_bytes(config.dispatch_dtype, config.hidden); }
  uint64_t returned() const { return format_bytes(config.combine_dtype, config.hidden); }
  // Of our own quantisation.
  uint64_t own_blocks() const { return (config.hidden + EPT_FP8_BLOCK - 1) / EPT_FP8_BLOCK; }
  uint64_t own_scales() const {
    return !quantises() ? 0 : own_blocks() * (config.scale_format == EPT_SCALES_FP32 ? 4 : 1);
  }
  // Bytes of a message to one of the ranks, each of which has as many of max_tokens tokens' experts as any other.
  uint64_t message(uint32_t phase) const;
  // A row in the contiguous layout for each (row, k), and the padding of each group.
  uint64_t contiguous_rows(const uint32_t *counts) const;
  uint64_t max_contiguous_rows() const;
};

ept_moe_plan plan_of(const Object &object);

}  // namespace ept::moe
