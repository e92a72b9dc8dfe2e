// SPDX-License-Identifier: Apache-2.0
//
// The kernels for any machine, and the choice among those that this one can run.
#include "eptransport/eptransport.h"
#include "eptransport/wire.h"
#include "moe/cpu/kernels.h"

namespace ept::moe {

namespace generic {
namespace {
#include "moe/cpu/kernels.inc"
}  // namespace
constexpr Kernels table = {"generic", sum, convert, quantise};
}  // namespace generic

#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif

const Kernels *const *all_kernels() {
  static const auto list = [] {
    struct {
      const Kernels *entry[4] = {};
    } found;
    size_t n = 0;
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
      found.entry[n++] = &avx512_kernels;
    if (avx2) found.entry[n++] = &avx2_kernels;
#endif
    found.entry[n] = &generic::table;
    return found;
  }();
  return list.entry;
}

const Kernels &kernels() {
  static const Kernels *const best = all_kernels()[0];
  return *best;
}

}  // namespace ept::moe
