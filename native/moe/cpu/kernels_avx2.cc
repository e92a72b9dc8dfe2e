// SPDX-License-Identifier: Apache-2.0
#if defined(__x86_64__)
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
#include "moe/cpu/kernels.inc"
}  // namespace
}  // namespace avx2
extern const Kernels avx2_kernels;
const Kernels avx2_kernels = {"avx2", avx2::sum, avx2::convert, avx2::quantise};
}  // namespace ept::moe

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
