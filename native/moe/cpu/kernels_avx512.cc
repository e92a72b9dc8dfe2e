// SPDX-License-Identifier: Apache-2.0
#if defined(__x86_64__)
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
#include "moe/cpu/kernels.inc"
}  // namespace
}  // namespace avx512
extern const Kernels avx512_kernels;
const Kernels avx512_kernels = {"avx512", avx512::sum, avx512::convert, avx512::quantise};
}  // namespace ept::moe

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
