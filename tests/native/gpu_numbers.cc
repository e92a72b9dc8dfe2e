// SPDX-License-Identifier: Apache-2.0
//
// gpu_numbers.cc: what the GPU's kernels take instead of wire.h's divisions (native/moe/cuda/formats.cuh) gives the
// bits of the divisions: all that could come out another way, every bf16 by scales of every kind, and all that is
// divided by 448.
#include <math.h>

#include <algorithm>
#include <random>
#include <vector>

#include "check.h"
#include "moe_model.h"

#define ept ept_on_fibers  // as kernels.cc
#include "moe/cuda/formats.cuh"

using namespace ept::moe::cuda;

namespace {

float moved(float value, int32_t units) { return float_of(bits_of(value) + uint32_t(units)); }
uint32_t plain(float x, float scale) { return e4m3(x / scale); }

// Halfway between each two codes of one sign; the first is half of the smallest.
const std::vector<float> &ties() {
  static const std::vector<float> all = [] {
    std::vector<float> between;
    for (uint32_t code = 0; code < 0x7e; code++)
      between.push_back(float((moe_model::small_float(code, 4, 3) + moe_model::small_float(code + 1, 4, 3)) / 2));
    return between;
  }();
  return all;
}

struct Tally {
  uint64_t numbers = 0, by_one_product = 0;  // of which that many have another code by x * (1 / scale)
};

void same(float x, float scale, const Inverse &inverse, Tally *tally) {
  const uint32_t expected = plain(x, scale);
  tally->numbers++;
  tally->by_one_product += e4m3(x * (1 / scale)) != expected;
  if (e4m3(quotient(x, inverse)) == expected) return;
  check::failed(__FILE__, __LINE__, std::to_string(x) + " by " + std::to_string(scale));
}

// Of an inverse that is known by approximations of two units' error at most, all the same.
Inverse in_parts(float scale) {
  const Inverse inverse = inverse_of(scale, 1 / scale);
  const double high = double(inverse.high) * scale;  // exact
  CHECK(high <= 1 && double(moved(inverse.high, 1)) * scale > 1 && inverse.low >= 0);
  CHECK((inverse.low == 0) == (high == 1));
  for (int32_t off = -2; off <= 2; off++) {
    const Inverse other = inverse_of(scale, moved(1 / scale, off));
    CHECK_EQ(bits_of(other.high), bits_of(inverse.high));
    CHECK(fabs(double(other.low) - inverse.low) <= double(inverse.low) * 0x1p-23);
  }
  return inverse;
}

class Scales {
 public:
  explicit Scales(uint64_t seed) : random_(seed) {}
  // Of any size that is divided by its inverse.
  float any() { return ldexpf(1 + float(random_() >> 41) * 0x1p-23f, int(random_() % 127) - 63); }
  float bf16() { return float_of(uint32_t(random_() % 0x8000) << 16 & 0x7fff0000); }
  uint64_t below(uint64_t n) { return random_() % n; }

 private:
  std::mt19937_64 random_;
};

void every_bf16() {
  check::running("every bf16 by scales of every kind");
  Scales draw(1);
  const std::vector<float> midway = ties();
  std::vector<float> scales;
  for (int exponent : {-64, -63, -20, -1, 0, 17, 63, 64}) {
    const float power = ldexpf(1, exponent);
    for (int32_t off : {-2, -1, 0, 1, 2})
      if (moved(power, off) >= 0x1p-64f && moved(power, off) <= 0x1p64f) scales.push_back(moved(power, off));
  }
  for (int exponent : {-50, -9, 0, 40}) scales.push_back(part_of_448(ldexpf(7, exponent)));
  for (uint32_t i = 0; i < 128; i++)
    scales.push_back(part_of_448(ldexpf(1 + float(i) / 128, int(draw.below(100)) - 50)));
  for (uint32_t i = 0; i < 60; i++) scales.push_back(draw.any());
  while (scales.size() < 400) {  // by which some bf16 comes within two units of a tie
    const float scale = moved(draw.bf16() / midway[draw.below(midway.size())], int32_t(draw.below(5)) - 2);
    if (scale >= 0x1p-64f && scale <= 0x1p64f) scales.push_back(scale);
  }
  Tally all;
  for (float scale : scales) {
    const Inverse inverse = in_parts(scale);
    for (uint32_t i = 0; i < 65536; i++) {
      const float x = float_of(i << 16);
      if (fabsf(x) <= 512 * scale) same(x, scale, inverse, &all);
    }
  }
  CHECK(all.by_one_product > 0);  // else the scales would show nothing
}

// All that could be wrong (formats.cuh says why), and as much around it: significands of scales near multiples of 2^20,
// by all numbers that they bring within three units of a tie.
void every_narrow() {
  check::running("quotients that come as close to ties as they can");
  Tally all;
  for (uint32_t eighth = 8; eighth <= 16; eighth++)
    for (int32_t near = -64; near <= 64; near++) {
      const float scale = moved(float(eighth) / 8, near);
      const Inverse inverse = in_parts(scale);
      for (float tie : ties())
        for (int32_t off = -3; off <= 3; off++) {
          const float x = moved(tie * scale, off);
          same(x, scale, inverse, &all);
          same(-x, scale, inverse, &all);
          for (int32_t about : {-2, -1, 1, 2}) same(x, scale, inverse_of(scale, moved(1 / scale, about)), &all);
        }
    }
  CHECK(all.by_one_product > 0);
}

void aimed() {
  check::running("any scale, and fp32 within three units of each tie");
  Scales draw(2);
  Tally all;
  for (uint32_t round = 0; round < 20'000; round++) {
    const float scale = draw.any();
    const Inverse inverse = in_parts(scale);
    for (float tie : ties())
      for (int32_t off = -3; off <= 3; off++) same(moved(tie * scale, off), scale, inverse, &all);
  }
  CHECK(all.by_one_product > 0);
}

void zeros() {
  check::running("zeros and what becomes one keep their signs");
  for (float scale : {1.0f, 3.0f, 0x1p-64f, 0x1.fffffep+63f})
    for (float x : {0.0f, 0x1p-149f, 0x1p-126f})
      for (float sign : {1.0f, -1.0f}) CHECK_EQ(e4m3(quotient(sign * x, in_parts(scale))), plain(sign * x, scale));
}

void scales() {
  check::running("every significand by 448");
  for (uint32_t mantissa = 0; mantissa < 1u << 23; mantissa++) {
    const float value = float_of(127u << 23 | mantissa);
    if (part_of_448(value) != value / 448) check::failed(__FILE__, __LINE__, std::to_string(mantissa));
  }
  check::running("scales of all sizes");
  Scales draw(4);
  for (uint32_t bits = 0; bits <= 0x7f800000; bits += 0x10000 - uint32_t(draw.below(50)))
    for (float epsilon : {1e-38f, 1e-4f, 3.0f})
      for (bool ue8m0 : {false, true}) {
        const float most = float_of(bits), value = most > epsilon ? most : epsilon;
        const Scaling by = scaling_of(most, epsilon, ue8m0);
        const bool good = value >= 0x1p-55f && value < 0x1p72f;
        CHECK_EQ(by.good, good);
        if (!good) continue;
        const Scale scale = rounded(value / 448, ue8m0);
        CHECK(by.said == scale.said);
        CHECK(scale.value >= 0x1p-64f && scale.value <= 0x1p64f);
        const Inverse inverse = in_parts(scale.value);
        CHECK(by.inverse.low == inverse.low && by.inverse.high == inverse.high);
      }
  CHECK(!scaling_of(NAN, 1e-4f, false).good);
}

void e4m3_itself() {
  check::running("e4m3 as the model has it");
  for (float tie : ties())
    for (int32_t off = -1; off <= 1; off++)
      for (float sign : {1.0f, -1.0f})
        CHECK_EQ(e4m3(sign * moved(tie, off)), moe_model::encode(sign * moved(tie, off), EPT_DTYPE_E4M3));
}

}  // namespace

int main() {
  e4m3_itself();
  scales();
  every_bf16();
  every_narrow();
  aimed();
  zeros();
  return 0;
}
