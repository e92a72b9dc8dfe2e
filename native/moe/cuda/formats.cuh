// SPDX-License-Identifier: Apache-2.0
//
// formats.cuh: wire.h's NUMBERS on a GPU: the same formulas as cpu/kernels.inc, so the same bits.
#pragma once

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
// The same of sixteen of bf16, two at a time.
EPT_DEVICE uint32_t most_of_bf16(const Vector &a, const Vector &b) {
  uint32_t most = 0;
  EPT_UNROLL
  for (uint32_t i = 0; i < 4; i++)
    most = most_halves(most, most_halves(a.word[i] & 0x7fff7fff, b.word[i] & 0x7fff7fff));
  const uint32_t low = most << 16, high = most & 0xffff0000;
  return low > high ? low : high;
}
EPT_SELDOM uint32_t most_of_numbers(Sixteen of) {
  uint32_t most = 0;
  EPT_ROLLED
  for (uint32_t i = 0; i < 16; i++) {
    const uint32_t size = bits_of(of.x[i]) & 0x7fffffff;
    if (size <= 0x7f800000 && size > most) most = size;
  }
  return most;
}

// x / by to nearest, with `inverse` = 1 / by to nearest, where 2^-64 <= by <= 2^64 and |x / by| <= 448: q is right to
// two units in its last place, the remainder that fma gives is exact or a unit of its 25th place from it, and after the
// second step nothing is left that could turn a rounding (Markstein). Where the quotient is below 2^-12 it may be
// wrong, and is a zero in e4m3 either way; its sign is x's.
EPT_DEVICE float divided_by_inverse(float x, float by, float inverse) {
  float q = x * inverse;
  q = fused(fused(-q, by, x), inverse, q);
  q = fused(fused(-q, by, x), inverse, q);
  return float_of((bits_of(q) & 0x7fffffff) | (bits_of(x) & 0x80000000));
}
#ifndef EPT_HAS_E4M3
EPT_DEVICE uint32_t e4m3_pair(float low, float high) { return e4m3(low) | e4m3(high) << 8; }
#endif
// Where there is a NaN, or the scale's inverse would not do.
EPT_SELDOM Vector e4m3_by_division(Sixteen of, float scale) {
  Vector q{};
  EPT_ROLLED
  for (uint32_t i = 0; i < 16; i++) {
    const uint32_t sign = bits_of(of.x[i]) & 0x80000000;  // which a GPU's NaN would lose
    q.word[i / 4] |= e4m3(float_of((bits_of(divided(of.x[i], scale)) & 0x7fffffff) | sign)) << (i % 4 * 8);
  }
  return q;
}
// Sixteen elements divided by their scale.
EPT_DEVICE Vector e4m3_of(const Sixteen &of, float scale, bool has_nan) {
  const float (&x)[16] = of.x;
  Vector q{};
  if (!has_nan && scale >= 0x1p-64f && scale <= 0x1p64f) {
    const float inverse = divided(1.0f, scale);
    EPT_UNROLL
    for (uint32_t i = 0; i < 16; i += 2)
      q.word[i / 4] |= e4m3_pair(divided_by_inverse(x[i], scale, inverse), divided_by_inverse(x[i + 1], scale, inverse))
                       << (i % 4 * 8);
    return q;
  }
  return e4m3_by_division(of, scale);
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

}  // namespace ept::moe::cuda
