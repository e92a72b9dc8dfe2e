// SPDX-License-Identifier: Apache-2.0
#include "moe/object.h"

#include <unistd.h>
#include <algorithm>
#include <cmath>

#include "moe/fail.h"

namespace ept::moe {

uint64_t format_bytes(int32_t dtype, uint64_t elements) {
  switch (dtype) {
    case EPT_DTYPE_F32:
    case EPT_DTYPE_I32:
      return elements * 4;
    case EPT_DTYPE_F16:
    case EPT_DTYPE_BF16:
      return elements * 2;
    case EPT_DTYPE_I64:
      return elements * 8;
    case EPT_DTYPE_E4M3:
    case EPT_DTYPE_E5M2:
    case EPT_DTYPE_E8M0:
    case EPT_DTYPE_U8:
    case EPT_DTYPE_I8:
      return elements;
    case EPT_DTYPE_F4X2:
      return elements / 2;
    default:
      return 0;
  }
}

const char *format_name(int32_t dtype) {
  static const char *const names[] = {"none",          "float32",     "float16",        "bfloat16",
                                      "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "uint8",
                                      "int8",          "int32",       "int64",          "float4_e2m1fn_x2"};
  return dtype >= 0 && dtype <= EPT_DTYPE_F4X2 ? names[dtype] : "unknown dtype";
}

uint64_t page_bytes() {
  static const auto page = uint64_t(sysconf(_SC_PAGESIZE));
  return page;
}

namespace {

void check_sizes(const ept_moe_config &c) {
  if (c.size != sizeof(ept_moe_config))
    fail(EPT_E_INVALID, -1, "ept_moe_config.size is %u; this library's is %zu", c.size, sizeof(ept_moe_config));
  if (c.world == 0 || c.rank >= c.world) fail(EPT_E_INVALID, -1, "rank %u of a world of %u", c.rank, c.world);
  if (c.num_experts == 0) fail(EPT_E_INVALID, -1, "num_experts is 0; at least one expert is needed");
  if (c.top_k == 0 || c.top_k > EPT_MOE_MAX_TOP_K)
    fail(EPT_E_INVALID, -1, "top_k is %u; 1 to %u are possible", c.top_k, EPT_MOE_MAX_TOP_K);
  if (c.max_tokens == 0 || c.max_tokens > 1u << 24)
    fail(EPT_E_INVALID, -1, "max_tokens is %u; 1 to %u are possible", c.max_tokens, 1u << 24);
  if (c.lanes == 0 || c.lanes > kMaxLanes)
    fail(EPT_E_INVALID, -1, "lanes is %u; 1 to %u are possible", c.lanes, kMaxLanes);
  if (c.alignment == 0 || c.alignment > 1u << 20)
    fail(EPT_E_INVALID, -1, "alignment is %u; 1 to %u are possible", c.alignment, 1u << 20);
  if (c.hidden == 0 || c.hidden > 1u << 24)
    fail(EPT_E_INVALID, -1, "hidden is %u; 1 to %u are possible", c.hidden, 1u << 24);
  if (c.caller_scale_bytes > 1u << 24)
    fail(EPT_E_INVALID, -1, "caller_scale_bytes is %u; at most %u are possible", c.caller_scale_bytes, 1u << 24);
  if (c.placement)
    for (uint32_t e = 0; e < c.num_experts; e++)
      if (c.placement[e] < 0 || uint32_t(c.placement[e]) >= c.world)
        fail(EPT_E_INVALID, -1, "placement[%u] is %d; ranks are 0 to %u", e, c.placement[e], c.world - 1);
}

void check_formats(const ept_moe_config &c) {
  if (!is_float(c.dtype))
    fail(EPT_E_INVALID, -1, "dtype is %s; float32, float16 and bfloat16 are possible", format_name(c.dtype));
  if (!is_float(c.combine_dtype))
    fail(EPT_E_INVALID, -1, "combine_dtype is %s; float32, float16 and bfloat16 are possible",
         format_name(c.combine_dtype));
  if (!format_bytes(c.dispatch_dtype, 2) || c.dispatch_dtype == EPT_DTYPE_I32 || c.dispatch_dtype == EPT_DTYPE_I64)
    fail(EPT_E_INVALID, -1, "dispatch_dtype is %s (%d), which is no format of a payload", format_name(c.dispatch_dtype),
         c.dispatch_dtype);
  for (int32_t dtype : {c.dtype, c.dispatch_dtype, c.combine_dtype})
    if (format_bytes(dtype, c.hidden) % 16 || format_bytes(dtype, c.hidden) == 0 ||
        (dtype == EPT_DTYPE_F4X2 && c.hidden % 2))
      fail(EPT_E_INVALID, -1, "hidden is %u, %llu bytes of %s; a row must be a multiple of 16 bytes", c.hidden,
           (unsigned long long)format_bytes(dtype, c.hidden), format_name(dtype));
  if (c.scale_format != EPT_SCALES_FP32 && c.scale_format != EPT_SCALES_UE8M0)
    fail(EPT_E_INVALID, -1, "scale_format is %d; 0 (fp32) and 1 (ue8m0) are possible", c.scale_format);
  if (!(c.scale_epsilon > 0) || !std::isfinite(c.scale_epsilon))
    fail(EPT_E_INVALID, -1, "scale_epsilon is %g; it must be above 0 and finite", double(c.scale_epsilon));
}

ept_moe_config checked(ept_moe_config c) {
  if (c.dispatch_dtype == EPT_DTYPE_NONE) c.dispatch_dtype = c.dtype;
  if (c.combine_dtype == EPT_DTYPE_NONE) c.combine_dtype = c.dtype;
  if (c.scale_epsilon == 0) c.scale_epsilon = 1e-4f;
  if (c.alignment == 0) c.alignment = 1;
  check_sizes(c);
  check_formats(c);
  return c;
}

// The longest batch whose lane fits the budget, and that can be cut up where it is shorter than max_tokens.
void fit(Shape &shape, uint64_t budget) {
  const auto bytes = [&](uint32_t tokens) {
    shape.chunk_tokens = tokens;
    return lane_map(shape).bytes(page_bytes());
  };
  if (budget == 0 || bytes(shape.max_tokens) <= budget) {
    shape.chunk_tokens = shape.max_tokens;
    return;
  }
  const uint64_t all = bytes(shape.max_tokens);
  uint32_t least = 1;
  for (shape.chunk_tokens = 1; !shape.can_stream() && least < shape.max_tokens;) shape.chunk_tokens = ++least;
  if (least == shape.max_tokens || bytes(least) > budget)
    fail(EPT_E_INVALID, -1,
         "buffer_bytes is %llu; a lane needs %llu bytes at least (calls of %u tokens at once), %llu for all %u tokens",
         (unsigned long long)budget, (unsigned long long)bytes(least), least, (unsigned long long)all,
         shape.max_tokens);
  uint32_t fits = least, too_many = shape.max_tokens;
  while (too_many - fits > 1) {
    const uint32_t middle = fits + (too_many - fits) / 2;
    (bytes(middle) <= budget ? fits : too_many) = middle;
  }
  shape.chunk_tokens = fits;
}

}  // namespace

Object::Object(const ept_moe_config &given)
    : config(checked(given)), shape(), placement(config.world, config.num_experts, config.placement) {
  config.placement = nullptr;
  shape.world = config.world;
  shape.top_k = config.top_k;
  for (uint32_t r = 0; r < config.world; r++) shape.max_local = std::max(shape.max_local, placement.local_experts(r));
  shape.max_tokens = config.max_tokens;
  shape.dispatch_row =
      ept_row_bytes(payload(), std::max<uint64_t>(own_scales(), config.caller_scale_bytes), config.top_k);
  shape.combine_row = ept_combine_row_bytes(returned(), config.top_k, 1);
  fit(shape, config.buffer_bytes);
}

uint64_t Object::contiguous_rows(const uint32_t *counts) const {
  uint64_t rows = 0;
  for (uint32_t e = 0; e < local(); e++) rows += align_up(counts[e], config.alignment);
  return rows;
}

uint64_t Object::message(uint32_t phase) const {
  const uint64_t rows = (config.max_tokens * shape.fan() + config.world - 1) / config.world;
  const uint64_t scales = quantises() ? own_scales() : config.caller_scale_bytes;
  return EPT_MOE_HEADER_BYTES + rows * (phase == EPT_PHASE_DISPATCH
                                            ? ept_row_bytes(payload(), uint32_t(scales), config.top_k)
                                            : ept_combine_row_bytes(returned(), config.top_k, 0));
}

uint64_t Object::max_contiguous_rows() const {
  const uint64_t filled = uint64_t(config.world) * config.max_tokens * config.top_k;
  return local() == 0
             ? 0
             : align_up(filled + std::min<uint64_t>(local(), filled) * (config.alignment - 1), config.alignment);
}

ept_moe_plan plan_of(const Object &object) {
  const Shape &shape = object.shape;
  ept_moe_plan plan{};
  plan.size = sizeof plan;
  plan.local_experts = object.local();
  plan.max_local_experts = shape.max_local;
  plan.chunk_tokens = shape.chunk_tokens;
  plan.dispatch_row = shape.dispatch_row;
  plan.combine_row = shape.combine_row;
  plan.dispatch_header = shape.dispatch_header();
  plan.combine_header = shape.combine_header();
  plan.dispatch_recv = shape.dispatch_recv();
  plan.dispatch_send = shape.dispatch_send();
  plan.combine_recv = shape.combine_recv();
  plan.combine_send = shape.combine_send();
  plan.lane_bytes = lane_map(shape).bytes(page_bytes());
  plan.arena_bytes = plan.lane_bytes * object.config.lanes;
  plan.max_rows = uint64_t(shape.world) * shape.max_tokens;
  plan.max_contiguous_rows = object.max_contiguous_rows();
  return plan;
}

}  // namespace ept::moe
