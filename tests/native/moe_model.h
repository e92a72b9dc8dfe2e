// SPDX-License-Identifier: Apache-2.0
//
// moe_model.h: what dispatch and combine must give, said once more, plainly: scalar, by searching and by counting, with
// nothing of the library's. Numbers come from the NUMBERS paragraph of wire.h.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <vector>

#include "eptransport/eptransport.h"
#include "eptransport/wire.h"

namespace moe_model {

// ---- numbers ----

inline size_t size_of(int32_t dtype) {
  return dtype == EPT_DTYPE_F32 ? 4 : dtype == EPT_DTYPE_F16 || dtype == EPT_DTYPE_BF16 ? 2 : 1;
}

// Value of a small float: sign, `e` bits of exponent, `m` of mantissa. No specials.
double small_float(uint32_t bits, int e, int m);

float decode(const void *at, int32_t dtype);
uint32_t encode(float value, int32_t dtype);
void put(void *to, float value, int32_t dtype);

// One row, in fp32, to e4m3 and scales.
void quantise(const std::vector<float> &row, bool ue8m0, float epsilon, std::vector<uint8_t> &codes,
              std::vector<uint8_t> &scales);

// ---- who gets what ----

struct Input {  // of one rank
  uint32_t tokens = 0;
  std::vector<uint8_t> x;      // [tokens, row bytes]
  std::vector<int32_t> ids;    // [tokens, top_k]
  std::vector<float> weights;  // [tokens, top_k]
};

struct Row {
  uint32_t source, token;
  std::vector<int32_t> experts;  // local, by k
};

struct Homes {
  std::vector<uint32_t> rank, local, held;  // [experts], [experts], [world]
  Homes(uint32_t world, uint32_t experts, const int32_t *placement);
};

std::vector<Row> rows_at(const Homes &homes, uint32_t rank, uint32_t top_k, const std::vector<Input> &inputs);

// Where each (row, k) stands; for layouts of whole rows k is 0.
struct Places {
  std::vector<std::vector<int64_t>> of;  // [rows][top_k or 1]
  std::vector<int32_t> counts, offsets;
  uint64_t needed = 0;  // N that the output must have
};

Places places_of(const std::vector<Row> &rows, int32_t layout, uint32_t world, uint32_t local, uint32_t alignment,
                 uint64_t n);

// What expert `e` (global) computes for place k of a token: another function for each, exact in every format here.
inline float expert_value(uint32_t source, uint32_t token, uint32_t k, uint32_t e, uint32_t column) {
  const uint32_t mixed = (source * 31 + token * 7 + k * 131 + e * 17 + column * 3) * 2654435761u >> 20;
  return float(int32_t(mixed % 255) - 127) / 16.0f * (e % 2 ? 1.0f : -0.5f);
}

}  // namespace moe_model
