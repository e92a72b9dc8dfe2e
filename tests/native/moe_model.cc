// SPDX-License-Identifier: Apache-2.0
#include "moe_model.h"

#include <math.h>
#include <string.h>

#include <algorithm>

namespace moe_model {

// ---- numbers ----

double small_float(uint32_t bits, int e, int m) {
  const uint32_t mantissa = bits & ((1u << m) - 1), exponent = bits >> m & ((1u << e) - 1);
  const int bias = (1 << (e - 1)) - 1;
  const double size = exponent ? ldexp(1.0 + mantissa / double(1 << m), int(exponent) - bias)
                               : ldexp(mantissa / double(1 << m), 1 - bias);
  return bits >> (e + m) & 1 ? -size : size;
}

namespace {

// The code whose value is nearest: by halving the ordered codes, then comparing both neighbours; a tie goes to the
// even.
uint32_t nearest(double size, uint32_t last, int e, int m) {
  uint32_t low = 0, high = last;
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    (small_float(middle, e, m) <= size ? low : high) = middle;
  }
  const double below = size - small_float(low, e, m), above = small_float(high, e, m) - size;
  if (below == above) return low % 2 ? high : low;
  return below < above ? low : high;
}

}  // namespace

float decode(const void *at, int32_t dtype) {
  if (dtype == EPT_DTYPE_F32) {
    float value;
    memcpy(&value, at, 4);
    return value;
  }
  uint16_t bits = 0;
  memcpy(&bits, at, size_of(dtype));
  if (dtype == EPT_DTYPE_E4M3) return (bits & 0x7f) == 0x7f ? NAN : float(small_float(bits, 4, 3));
  const int e = dtype == EPT_DTYPE_F16 ? 5 : 8, m = dtype == EPT_DTYPE_F16 ? 10 : 7;
  const uint32_t top = ((1u << e) - 1) << m;
  if ((bits & top) == top) return bits & ((1u << m) - 1) ? NAN : copysignf(INFINITY, bits & 0x8000 ? -1.0f : 1.0f);
  return float(small_float(bits, e, m));
}

uint32_t encode(float value, int32_t dtype) {
  uint32_t bits = 0;
  if (dtype == EPT_DTYPE_F32) {
    memcpy(&bits, &value, 4);
    return bits;
  }
  const uint32_t sign = signbit(value) ? 1 : 0;
  const double size = fabs(double(value));
  if (dtype == EPT_DTYPE_E4M3)
    return sign << 7 | (isnan(value) ? 0x7f : size >= 448 ? 0x7e : nearest(size, 0x7e, 4, 3));
  const int e = dtype == EPT_DTYPE_F16 ? 5 : 8, m = dtype == EPT_DTYPE_F16 ? 10 : 7;
  const uint32_t infinity = ((1u << e) - 1) << m;
  const double most = small_float(infinity - 1, e, m), over = most + ldexp(1.0, (1 << (e - 1)) - 1 - m - 1);
  const uint32_t code = isnan(value)   ? infinity | 1u << (m - 1)
                        : size >= over ? infinity
                        : size >= most ? infinity - 1
                                       : nearest(size, infinity - 1, e, m);
  return sign << 15 | code;
}

void put(void *to, float value, int32_t dtype) {
  const uint32_t bits = encode(value, dtype);
  memcpy(to, &bits, size_of(dtype));
}

void quantise(const std::vector<float> &row, bool ue8m0, float epsilon, std::vector<uint8_t> &codes,
              std::vector<uint8_t> &scales) {
  for (size_t start = 0; start < row.size(); start += 128) {
    const size_t end = std::min(row.size(), start + 128);
    float amax = 0;
    for (size_t i = start; i < end; i++)
      if (fabsf(row[i]) > amax) amax = fabsf(row[i]);
    float scale = (amax > epsilon ? amax : epsilon) / 448.0f;
    uint8_t bytes[4];
    memcpy(bytes, &scale, 4);
    if (ue8m0) {
      int exponent = -127;  // the smallest power of two that is not below
      while (exponent < 128 && ldexp(1.0, exponent) < double(scale)) exponent++;
      scale = float(ldexp(1.0, exponent));
      bytes[0] = uint8_t(exponent + 127);
    }
    scales.insert(scales.end(), bytes, bytes + (ue8m0 ? 1 : 4));
    for (size_t i = start; i < end; i++) codes.push_back(uint8_t(encode(row[i] / scale, EPT_DTYPE_E4M3)));
  }
}

// ---- who gets what ----

Homes::Homes(uint32_t world, uint32_t experts, const int32_t *placement) : held(world, 0) {
  for (uint32_t e = 0; e < experts; e++) {
    uint32_t home = 0;
    if (placement) {
      home = uint32_t(placement[e]);
    } else {  // blocks in rank order, the first ones hold one more
      uint32_t end = 0;
      for (home = 0; home < world; home++) {
        end += experts / world + (home < experts % world ? 1 : 0);
        if (e < end) break;
      }
    }
    rank.push_back(home);
    local.push_back(held[home]++);
  }
}

std::vector<Row> rows_at(const Homes &homes, uint32_t rank, uint32_t top_k, const std::vector<Input> &inputs) {
  std::vector<Row> rows;
  for (uint32_t s = 0; s < inputs.size(); s++)
    for (uint32_t t = 0; t < inputs[s].tokens; t++) {
      Row row{s, t, std::vector<int32_t>(top_k, -1)};
      bool any = false;
      for (uint32_t k = 0; k < top_k; k++) {
        const int32_t id = inputs[s].ids[t * top_k + k];
        if (id < 0 || homes.rank[size_t(id)] != rank) continue;
        row.experts[k] = int32_t(homes.local[size_t(id)]);
        any = true;
      }
      if (any) rows.push_back(row);
    }
  return rows;
}

Places places_of(const std::vector<Row> &rows, int32_t layout, uint32_t world, uint32_t local, uint32_t alignment,
                 uint64_t n) {
  Places places;
  places.counts.assign(local, 0);
  std::vector<uint64_t> by_rank(world, 0);
  for (const Row &row : rows) {
    by_rank[row.source]++;
    for (int32_t e : row.experts)
      if (e >= 0) places.counts[size_t(e)]++;
  }
  places.offsets.push_back(0);
  for (uint32_t e = 0; e < local; e++) {
    int32_t group = places.counts[e];
    while (layout == EPT_LAYOUT_CONTIGUOUS && group % int32_t(alignment)) group++;
    places.offsets.push_back(places.offsets.back() + group);
  }
  std::vector<uint64_t> used(std::max(local, world), 0);
  for (size_t j = 0; j < rows.size(); j++) {
    if (layout == EPT_LAYOUT_ROWS) {
      places.of.push_back({int64_t(j)});
    } else if (layout == EPT_LAYOUT_BY_RANK) {
      places.of.push_back({int64_t(rows[j].source * n + used[rows[j].source]++)});
    } else {
      std::vector<int64_t> of;
      for (int32_t e : rows[j].experts) {
        const uint64_t start = e < 0                         ? 0
                               : layout == EPT_LAYOUT_MASKED ? uint64_t(e) * n
                                                             : uint64_t(places.offsets[size_t(e)]);
        of.push_back(e < 0 ? -1 : int64_t(start + used[size_t(e)]++));
      }
      places.of.push_back(of);
    }
  }
  places.needed = rows.size();
  if (layout == EPT_LAYOUT_BY_RANK) places.needed = *std::max_element(by_rank.begin(), by_rank.end());
  if (layout == EPT_LAYOUT_CONTIGUOUS) places.needed = uint64_t(places.offsets.back());
  if (layout == EPT_LAYOUT_MASKED)
    places.needed = local ? uint64_t(*std::max_element(places.counts.begin(), places.counts.end())) : 0;
  return places;
}

}  // namespace moe_model
