// SPDX-License-Identifier: Apache-2.0
#if defined(__x86_64__)
#include <immintrin.h>

#include "eptransport/eptransport.h"
#include "eptransport/wire.h"
#include "moe/cpu/kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,bmi2")
#endif

namespace ept::moe {
namespace avx2 {
namespace {
constexpr size_t kLanes = 8;
using Floats = float __attribute__((vector_size(32)));
using Words = uint32_t __attribute__((vector_size(32)));

inline Words widen(const uint16_t *from) {
  return (Words)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from)));
}
inline void narrow(uint16_t *to, Words v) {
  const auto both = (__m256i)v;
  _mm_storeu_si128(reinterpret_cast<__m128i *>(to),
                   _mm_packus_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1)));
}
inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline void past(char *to, const char *from) {
  _mm256_stream_si256(reinterpret_cast<__m256i *>(to), _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)));
}
inline void past_seen() { _mm_sfence(); }

#include "moe/cpu/kernels.inc"
}  // namespace
}  // namespace avx2
extern const Kernels avx2_kernels;
const Kernels avx2_kernels = {"avx2", avx2::sum, avx2::convert, avx2::quantise, avx2::stream};
}  // namespace ept::moe

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
