// SPDX-License-Identifier: Apache-2.0
//
// moe_numbers.cc: the inner loops of every instruction set that this machine can run give the bits of moe_model.h.
#include <math.h>

#include <algorithm>
#include <iostream>
#include <random>

#include "check.h"
#include "moe/cpu/kernels.h"
#include "moe_model.h"

using ept::moe::Kernels;

namespace {

constexpr int32_t kFloats[] = {EPT_DTYPE_F32, EPT_DTYPE_F16, EPT_DTYPE_BF16};

// Bits of both; any NaN is as good as another.
void same(uint32_t got, uint32_t expected, int32_t dtype, const char *what, uint64_t at) {
  if (got == expected) return;
  const float a = moe_model::decode(&got, dtype), b = moe_model::decode(&expected, dtype);
  if (isnan(a) && isnan(b)) return;
  check::failed(__FILE__, __LINE__,
                std::string(what) + " " + std::to_string(at) + ": got " + std::to_string(got) + ", expected " +
                    std::to_string(expected));
}

uint32_t bits_at(const std::vector<uint8_t> &bytes, size_t i, int32_t dtype) {
  uint32_t bits = 0;
  memcpy(&bits, &bytes[i * moe_model::size_of(dtype)], moe_model::size_of(dtype));
  return bits;
}

// Floats that stand at the edges of every format: each exponent, with mantissas near ties.
std::vector<float> edges() {
  std::vector<float> values = {0.0f,   -0.0f,  INFINITY, -INFINITY, NAN,     448.0f,
                               464.0f, 465.0f, 65504.0f, 65519.99f, 65520.0f};
  for (uint32_t exponent = 0; exponent < 255; exponent++)
    for (uint32_t shift : {11, 12, 13, 15, 16, 17, 19, 20, 21})
      for (int32_t near = -1; near <= 1; near++)
        for (uint32_t odd = 0; odd < 2; odd++) {
          const uint32_t mantissa = ((1u << shift) >> 1) + (odd << shift) + uint32_t(near);
          const uint32_t bits = exponent << 23 | (mantissa & 0x7fffff);
          float value;
          memcpy(&value, &bits, 4);
          values.push_back(value);
          values.push_back(-value);
        }
  return values;
}

void converts(const Kernels &kernels) {
  const std::vector<float> values = edges();
  for (int32_t to : kFloats) {  // from fp32
    std::vector<uint8_t> out(values.size() * 4);
    kernels.convert(out.data(), to, values.data(), EPT_DTYPE_F32, values.size());
    for (size_t i = 0; i < values.size(); i++)
      same(bits_at(out, i, to), moe_model::encode(values[i], to), to, "convert from fp32", i);
  }
  std::vector<uint16_t> all(65536);  // every fp16 and bf16
  for (uint32_t i = 0; i < all.size(); i++) all[i] = uint16_t(i);
  for (int32_t from : {EPT_DTYPE_F16, EPT_DTYPE_BF16})
    for (int32_t to : kFloats) {
      std::vector<uint8_t> out(all.size() * 4);
      kernels.convert(out.data(), to, all.data(), from, all.size());
      for (size_t i = 0; i < all.size(); i++)
        same(bits_at(out, i, to), moe_model::encode(moe_model::decode(&all[i], from), to), to, "convert", i);
    }
}

// Every fp16 and bf16, and the edges of fp32, through the loops of `sum`: they load and round in vectors.
void sums_of_one(const Kernels &kernels) {
  const std::vector<float> values = edges();
  std::vector<uint16_t> all(65536);
  for (uint32_t i = 0; i < all.size(); i++) all[i] = uint16_t(i);
  for (int32_t in : kFloats) {
    const void *row = in == EPT_DTYPE_F32 ? static_cast<const void *>(values.data()) : all.data();
    const size_t n = in == EPT_DTYPE_F32 ? values.size() : all.size(), size = moe_model::size_of(in);
    for (int32_t out : kFloats)
      for (bool weighed : {false, true}) {
        const float weight = 0.75f;
        std::vector<uint8_t> got(n * 4);
        kernels.sum(got.data(), out, &row, weighed ? &weight : nullptr, 1, in, n);
        for (size_t i = 0; i < n; i++) {
          const float value = moe_model::decode(static_cast<const uint8_t *>(row) + i * size, in);
          const float sum = weighed ? fmaf(weight, value, 0.0f) : 0.0f + value;
          same(bits_at(got, i, out), moe_model::encode(sum, out), out, "sum of one", i);
        }
      }
  }
}

// Any place and length; nothing beside it is touched.
void streams(const Kernels &kernels) {
  std::vector<uint8_t> from(1000), to(from.size() + 200);
  for (size_t i = 0; i < from.size(); i++) from[i] = uint8_t(i * 7 + 1);
  for (size_t offset = 0; offset < 70; offset++)
    for (size_t n : {size_t(0), size_t(1), size_t(16), size_t(63), size_t(64), size_t(65), size_t(511), from.size()}) {
      std::fill(to.begin(), to.end(), uint8_t(0));
      kernels.stream(&to[offset + 1], from.data(), n);
      for (size_t i = 0; i < to.size(); i++) {
        const bool inside = i > offset && i <= offset + n;
        CHECK_EQ(int(to[i]), int(inside ? from[i - offset - 1] : 0));
      }
    }
}

void sums(const Kernels &kernels, uint64_t seed) {
  std::mt19937_64 random(seed);
  for (uint32_t round = 0; round < 60; round++) {
    const int32_t in = kFloats[random() % 3], out = kFloats[random() % 3];
    const size_t n = 1 + random() % 700, count = random() % 33;
    std::vector<std::vector<uint8_t>> rows(count, std::vector<uint8_t>(n * moe_model::size_of(in)));
    std::vector<const void *> pointers;
    std::vector<float> weights;
    for (auto &row : rows) {
      for (size_t i = 0; i < n; i++)
        moe_model::put(&row[i * moe_model::size_of(in)],
                       ldexpf(float(int64_t(random() % 2000001) - 1000000), int(random() % 20) - 25), in);
      pointers.push_back(row.data());
      weights.push_back(float(int64_t(random() % 20001) - 10000) / 3001.0f);
    }
    const bool weighed = random() % 2;
    std::vector<uint8_t> got(n * 4);
    kernels.sum(got.data(), out, pointers.data(), weighed ? weights.data() : nullptr, count, in, n);
    for (size_t i = 0; i < n; i++) {
      float acc = 0.0f;
      for (size_t r = 0; r < count; r++) {
        const float value = moe_model::decode(&rows[r][i * moe_model::size_of(in)], in);
        acc = weighed ? fmaf(weights[r], value, acc) : acc + value;
      }
      same(bits_at(got, i, out), moe_model::encode(acc, out), out, "sum", i);
    }
  }
}

void quantises(const Kernels &kernels, uint64_t seed) {
  std::mt19937_64 random(seed);
  for (uint32_t round = 0; round < 200; round++) {
    const int32_t in = kFloats[random() % 3];
    const size_t n = 1 + random() % 600, blocks = (n + 127) / 128;
    std::vector<uint8_t> row(n * moe_model::size_of(in));
    std::vector<float> values;
    const int spread = int(random() % 40), centre = int(random() % 30) - 25;
    for (size_t i = 0; i < n; i++) {
      float value = ldexpf(float(int64_t(random() % 2000001) - 1000000), centre - int(random() % uint64_t(spread + 1)));
      const uint64_t special = random() % 400;
      if (special == 0) value = 0.0f;
      if (special == 1) value = NAN;
      if (special == 2) value = -0.0f;
      if (special == 3 && round % 8 == 0) value = -INFINITY;
      moe_model::put(&row[i * moe_model::size_of(in)], value, in);
      values.push_back(moe_model::decode(&row[i * moe_model::size_of(in)], in));
    }
    if (round % 5 == 0) std::fill(values.begin(), values.end(), 0.0f), std::fill(row.begin(), row.end(), uint8_t(0));
    for (bool ue8m0 : {false, true}) {
      const float epsilon = round % 3 ? 1e-4f : 1e-38f;
      std::vector<uint8_t> got(n), scales(blocks * (ue8m0 ? 1 : 4)), codes, expected;
      kernels.quantise(got.data(), scales.data(), row.data(), in, n, ue8m0, epsilon);
      moe_model::quantise(values, ue8m0, epsilon, codes, expected);
      CHECK_EQ(scales.size(), expected.size());
      for (size_t i = 0; i < scales.size(); i++) same(scales[i], expected[i], EPT_DTYPE_U8, "scale byte", i);
      for (size_t i = 0; i < n; i++) same(got[i], codes[i], EPT_DTYPE_E4M3, "code", i);
    }
  }
}

// Every code, every tie between two codes and its neighbours, and saturation, with a scale of exactly 1.
void codes(const Kernels &kernels) {
  std::vector<float> values;
  for (uint32_t code = 0; code < 0x7e; code++) {
    const float low = float(moe_model::small_float(code, 4, 3)), high = float(moe_model::small_float(code + 1, 4, 3));
    const float tie = low + (high - low) / 2;
    for (float v : {low, nextafterf(tie, low), tie, nextafterf(tie, high), high}) {
      values.push_back(v);
      values.push_back(-v);
    }
  }
  std::vector<float> row;
  for (size_t i = 0; i < values.size(); i++) {
    if (row.size() % 128 == 0) row.push_back(448.0f);  // amax: the scale is 1
    row.push_back(values[i]);
  }
  while (row.size() % 128) row.push_back(0.0f);
  std::vector<uint8_t> got(row.size());
  std::vector<float> scales(row.size() / 128);
  kernels.quantise(got.data(), scales.data(), row.data(), EPT_DTYPE_F32, row.size(), false, 1e-4f);
  for (float scale : scales) CHECK_EQ(scale, 1.0f);
  for (size_t i = 0; i < row.size(); i++)
    same(got[i], moe_model::encode(row[i], EPT_DTYPE_E4M3), EPT_DTYPE_E4M3, "code", i);
}

}  // namespace

int main() {
  int tables = 0;
  for (const Kernels *const *table = ept::moe::all_kernels(); *table; table++, tables++) {
    std::cout << (*table)->name << std::endl;
    RUN(converts(**table));
    RUN(codes(**table));
    RUN(sums(**table, 1));
    RUN(sums_of_one(**table));
    RUN(streams(**table));
    RUN(quantises(**table, 2));
  }
  CHECK(tables >= 1);
  return 0;
}
