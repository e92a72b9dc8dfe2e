// SPDX-License-Identifier: Apache-2.0
//
// formats.cuh: wire.h's NUMBERS on a GPU: the same formulas as cpu/kernels.inc, so the same bits.
#pragma once

#include "moe/cuda/args.h"
#include "moe/cuda/simt.h"

namespace ept::moe::cuda {

constexpr int32_t kF32 = 1, kF16 = 2, kBF16 = 3;  // ept_dtype
// Beside them, where the compiler is told the usual formats: some format of 2 bytes.
constexpr int32_t kAny2 = 0;
// A format that the compiler knows, where kFormat is bf16; else `format`.
template <int32_t kFormat>
EPT_DEVICE int32_t known(int32_t format) {
  return kFormat == kBF16 ? kBF16 : format;
}

EPT_SELDOM uint32_t f16_to_f32(uint32_t v) {
  const uint32_t sign = (v & 0x8000) << 16, size = v & 0x7fff;
  if (size >= 0x7c00) return sign | ((size << 13) + ((255u - 31u) << 23));
  if (size >= 0x400) return sign | ((size << 13) + ((127u - 15u) << 23));
  return sign | bits_of(float(int32_t(size)) * 0x1p-24f);  // exact: at most 10 bits
}
EPT_DEVICE uint32_t f32_to_f16(uint32_t u) {
  const uint32_t size = u & 0x7fffffff, sign = u >> 16 & 0x8000;
  if (size > 0x7f800000) return sign | 0x7e00 | (size >> 13 & 0x3ff);
  if (size >= 0x477ff000) return sign | 0x7c00;
  if (size >= 0x38800000) return sign | (((size + 0xfff + (size >> 13 & 1)) >> 13) - ((127u - 15u) << 10));
  // The last place of 0.5 is 2^-24, that of a subnormal: the addition rounds to nearest even at the right place.
  return sign | (bits_of(float_of(size) + 0.5f) - bits_of(0.5f));
}
EPT_DEVICE uint32_t f32_to_bf16(uint32_t u) {  // to nearest, ties to even; a NaN stays one
  const float value = float_of(u);
  return value != value ? u >> 16 | 0x40 : (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
// Saturating at 448 (0x7e); NaN is 0x7f; the sign stays.
EPT_DEVICE uint32_t e4m3(float v) {
  const uint32_t u = bits_of(v), size = u & 0x7fffffff, sign = u >> 24 & 0x80;
  if (size > 0x7f800000) return sign | 0x7f;
  if (size >= 0x43e00000) return sign | 0x7e;
  if (size >= 0x3c800000) return sign | (((size + 0x7ffff + (size >> 20 & 1)) >> 20) - ((127u - 7u) << 3));
  // The last place of 2^14 is 2^-9, that of a subnormal.
  return sign | (bits_of(float_of(size) + 16384.0f) - bits_of(16384.0f));
}
// 2^ceil(log2(value)) as its exponent byte (bias 127): value > 0. Infinity gives 255.
EPT_DEVICE uint32_t exponent_above(float value) {
  const uint32_t u = bits_of(value), exponent = u >> 23, mantissa = u & 0x7fffff;
  if (exponent == 0) return mantissa > 0x400000 ? 1 : 0;  // subnormal: above 2^-127 the next is 2^-126
  return exponent + (mantissa != 0);
}

EPT_HD constexpr uint32_t element_size(int32_t format) { return format == kF32 ? 4 : 2; }

// Eight elements of 2 bytes, as fp32.
EPT_DEVICE void widen8(float out[8], const Vector &v, int32_t format) {
  if (format == kBF16) {
    EPT_UNROLL
    for (int i = 0; i < 4; i++)
      out[2 * i] = float_of(v.word[i] << 16), out[2 * i + 1] = float_of(v.word[i] & 0xffff0000);
    return;
  }
  EPT_UNROLL
  for (int i = 0; i < 4; i++) {
    out[2 * i] = float_of(f16_to_f32(v.word[i] & 0xffff));
    out[2 * i + 1] = float_of(f16_to_f32(v.word[i] >> 16));
  }
}
// Eight elements in a row, as fp32 and back. `from` and `to` are 16-byte aligned.
EPT_DEVICE void load8(float out[8], const char *from, int32_t format) {
  if (format == kF32) {
    const Vector a = load16(from), b = load16(from + 16);
    for (int i = 0; i < 4; i++) out[i] = float_of(a.word[i]), out[4 + i] = float_of(b.word[i]);
    return;
  }
  widen8(out, load16(from), format);
}
// kSums: the results of additions, whose NaNs are all one; else every bit of a NaN stays.
template <bool kSums = false>
EPT_DEVICE void store8(char *to, const float in[8], int32_t format) {
  if (format == kF32) {
    Vector a, b;
    for (int i = 0; i < 4; i++) a.word[i] = bits_of(in[i]), b.word[i] = bits_of(in[4 + i]);
    store16(to, a);
    store16(to + 16, b);
    return;
  }
  Vector v;
  for (int i = 0; i < 4; i++) {
    if (kSums && format == kBF16) {
      v.word[i] = bf16_pair(in[2 * i], in[2 * i + 1]);
      continue;
    }
    const uint32_t low = bits_of(in[2 * i]), high = bits_of(in[2 * i + 1]);
    v.word[i] = format == kBF16 ? f32_to_bf16(low) | f32_to_bf16(high) << 16 : f32_to_f16(low) | f32_to_f16(high) << 16;
  }
  store16(to, v);
}
// Sixteen elements of kSize bytes.
template <uint32_t kSize>
EPT_DEVICE void widen16(float out[16], const Vector (&v)[kSize], int32_t format) {
  if constexpr (kSize == 2) {
    widen8(out, v[0], format);
    widen8(out + 8, v[1], format);
  } else {
    EPT_UNROLL
    for (uint32_t i = 0; i < 16; i++) out[i] = float_of(v[i / 4].word[i % 4]);
  }
}

struct Sixteen {
  float x[16];
};
// The largest size of sixteen elements: its bits, which compare as integers do; a NaN's are above infinity's.
EPT_DEVICE uint32_t most_of(const Sixteen &of) {
  uint32_t most = 0;
  EPT_UNROLL
  for (uint32_t i = 0; i < 16; i++) {
    const uint32_t size = bits_of(of.x[i]) & 0x7fffffff;
    most = size > most ? size : most;
  }
  return most;
}
// The same of sixteen of bf16, two at a time: of those that stand in even places and of the others; their signs mean
// nothing.
EPT_DEVICE uint32_t most_of_bf16(const Vector &a, const Vector &b) {
  const auto four = [](const Vector &v) {
    return larger_bf16(larger_bf16(v.word[0], v.word[1]), larger_bf16(v.word[2], v.word[3]));
  };
  return larger_bf16(four(a), four(b));
}

#ifndef EPT_HAS_E4M3
EPT_DEVICE uint32_t e4m3_pair(float low, float high) { return e4m3(low) | e4m3(high) << 8; }
#endif

// QUOTIENTS WITHOUT DIVISIONS. wire.h wants e4m3(x / scale), the quotient rounded to fp32 first. Here it is x times the
// inverse of the scale in two parts, by one product and one fma: wrong by 2^-46 of itself at most before it is rounded.
// A code can only be another if the quotient is that close to where a rounding turns beside a tie of e4m3: to
// B = m * 2^20 +- 1, m < 32, in units of its 25th place. In whole numbers, x * 2^k is then within 8 of B times the
// scale's significand, without being that, and k >= 20: so the significand is within 8 of a multiple of 2^20. There are
// few such, and tests/native/gpu_numbers.cc goes through them all: no code is another.
// (Bounds of the quotient by two products, up and down, would not do: one block of bf16 in thirty has ties.)
//
// high <= 1 / by, its neighbour or it; so low >= 0, and a zero keeps its sign.
struct Inverse {
  float high, low;
};
// Of a normal number, of whose inverse `about` is wrong by two units in its last place at most. One step makes it right
// to half a unit and some 2^-18 of one; the sign of what is left, which fma gives exactly, says which side it is on.
// What is left of high, over by, is low.
EPT_DEVICE Inverse inverse_of(float by, float about) {
  const float near = fused(about, fused(-by, about, 1.0f), about);
  const float high = float_of(bits_of(near) - (fused(-by, near, 1.0f) < 0));
  const float left = fused(-by, high, 1.0f);
  return {high, left * fused(left, float_of(bits_of(high) + 1), high)};
}
EPT_DEVICE float quotient(float x, const Inverse &by) { return fused(x, by.high, x * by.low); }
// Sixteen elements' codes.
EPT_DEVICE Vector e4m3_of(const float x[16], const Inverse &by) {
  Vector q{};
  EPT_UNROLL
  for (uint32_t i = 0; i < 16; i += 2)
    q.word[i / 4] |= e4m3_pair(quotient(x[i], by), quotient(x[i + 1], by)) << (i % 4 * 8);
  return q;
}

// value / 448 to nearest, where neither it nor what is left is subnormal: a product with the rounded inverse, and one
// step by what is left, which fma gives exactly (Markstein). True of every significand (tests/native/gpu_numbers.cc).
EPT_DEVICE float part_of_448(float value) {
  constexpr float kInverse = 1 / EPT_E4M3_MAX;
  const float q = value * kInverse;
  return fused(fused(-q, EPT_E4M3_MAX, value), kInverse, q);
}

EPT_DEVICE float load1(const char *from, int32_t format) {
  if (format == kF32) return float_of(*reinterpret_cast<const uint32_t *>(from));
  const uint32_t v = *reinterpret_cast<const uint16_t *>(from);
  return float_of(format == kBF16 ? v << 16 : f16_to_f32(v));
}
EPT_DEVICE void store1(char *to, float value, int32_t format) {
  if (format == kF32)
    *reinterpret_cast<uint32_t *>(to) = bits_of(value);
  else
    *reinterpret_cast<uint16_t *>(to) =
        uint16_t(format == kBF16 ? f32_to_bf16(bits_of(value)) : f32_to_f16(bits_of(value)));
}

// What stands for a block's scale, and its inverse: `good` where `most`, the largest size, and epsilon make a scale
// that is far from subnormal and overflow, as its inverse and all remainders are then. Not for another, or a NaN's.
constexpr uint32_t kLeastScaled = 0x24000000, kScaled = 127u << 23;  // 2^-55, and until 2^72
struct Scale {
  float value;
  uint32_t said;
};
EPT_DEVICE Scale rounded(float scale, bool ue8m0) {
  if (!ue8m0) return {scale, bits_of(scale)};
  const uint32_t exponent = exponent_above(scale);
  return {float_of(exponent == 0 ? 0x400000 : exponent << 23), exponent};
}
struct Scaling {
  uint32_t said;
  Inverse inverse;
  bool good;
};
EPT_DEVICE Scaling scaling_of(float most, float epsilon, bool ue8m0) {
  const float value = most <= epsilon ? epsilon : most;  // a NaN stays
  const Scale scale = rounded(part_of_448(value), ue8m0);
  return {scale.said, inverse_of(scale.value, about_inverse(scale.value)), bits_of(value) - kLeastScaled < kScaled};
}

// The largest of the eight lanes of a block.
EPT_DEVICE uint32_t most_of_block(uint32_t most) {
  EPT_UNROLL
  for (uint32_t step = 1; step < 8; step *= 2) {
    const uint32_t other = __shfl_xor_sync(kAll, most, int(step));
    most = other > most ? other : most;
  }
  return most;
}
// wire.h's words as they stand, where there is a NaN, or no good inverse; a whole warp, of which each lane has sixteen
// elements, or none, in vectors that stand a warp's width apart.
struct Quantised {
  Vector q;
  uint32_t said;
};
EPT_SELDOM Quantised quantise_exactly(const char *from, bool here, int32_t format, float epsilon, bool ue8m0) {
  const uint32_t size = element_size(format);
  const auto element = [&](uint32_t i) {
    const uint32_t at = i * size;
    return load1(from + at / 16 * (kWarp * 16) + at % 16, format);
  };
  uint32_t most = 0;
  EPT_ROLLED
  for (uint32_t i = 0; here && i < 16; i++) {
    const uint32_t bits = bits_of(element(i)) & 0x7fffffff;
    if (bits <= 0x7f800000 && bits > most) most = bits;  // amax takes no notice of a NaN
  }
  const float amax = float_of(most_of_block(most));
  const Scale scale = rounded(divided(amax > epsilon ? amax : epsilon, EPT_E4M3_MAX), ue8m0);
  Quantised to{{}, scale.said};
  EPT_ROLLED
  for (uint32_t i = 0; here && i < 16; i++) {
    const float x = element(i);
    const uint32_t sign = bits_of(x) & 0x80000000;  // which a GPU's NaN would lose
    const uint32_t code = e4m3(float_of((bits_of(divided(x, scale.value)) & 0x7fffffff) | sign));
    EPT_UNROLL
    for (uint32_t w = 0; w < 4; w++)
      if (i / 4 == w) to.q.word[w] |= code << (i % 4 * 8);
  }
  return to;
}

}  // namespace ept::moe::cuda
