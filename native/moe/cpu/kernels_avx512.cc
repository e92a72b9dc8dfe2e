// SPDX-License-Identifier: Apache-2.0
#if defined(__x86_64__)
#include <immintrin.h>

#include "eptransport/eptransport.h"
#include "eptransport/wire.h"
#include "moe/cpu/kernels.h"

#if defined(__clang__)
#pragma clang attribute push(                                                                            \
    __attribute__((target("avx2,fma,bmi2,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512"))), \
    apply_to = function)
#else
#pragma GCC target("avx2,fma,bmi2,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
#endif

namespace ept::moe {
namespace avx512 {
namespace {
constexpr size_t kLanes = 16;
using Floats = float __attribute__((vector_size(64)));
using Words = uint32_t __attribute__((vector_size(64)));

// All lanes: the forms without a mask start from a register that gcc 12 thinks uninitialised.
constexpr __mmask16 kAll = 0xffff;

inline Words widen(const uint16_t *from) {
  return (Words)_mm512_maskz_cvtepu16_epi32(kAll, _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)));
}
inline void narrow(uint16_t *to, Words v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), _mm512_maskz_cvtepi32_epi16(kAll, (__m512i)v));
}
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline void past(char *to, const char *from) {
  _mm512_stream_si512(reinterpret_cast<__m512i *>(to), _mm512_loadu_si512(from));
}
inline void past_seen() { _mm_sfence(); }

#include "moe/cpu/kernels.inc"
}  // namespace
}  // namespace avx512
extern const Kernels avx512_kernels;
const Kernels avx512_kernels = {"avx512", avx512::sum, avx512::convert, avx512::quantise, avx512::stream};
}  // namespace ept::moe

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
