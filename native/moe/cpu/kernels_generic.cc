// SPDX-License-Identifier: Apache-2.0
//
// The kernels for any machine, and the choice among those that this one can run.
#include "eptransport/eptransport.h"
#include "eptransport/wire.h"
#include "moe/cpu/kernels.h"

namespace ept::moe {

namespace generic {
namespace {
constexpr size_t kLanes = 4;
using Floats = float __attribute__((vector_size(16)));
using Words = uint32_t __attribute__((vector_size(16)));
using Halves = uint16_t __attribute__((vector_size(8)));

inline Words widen(const uint16_t *from) {
  Halves v;
  __builtin_memcpy(&v, from, sizeof v);
  return __builtin_convertvector(v, Words);
}
inline void narrow(uint16_t *to, Words v) {
  const Halves low = __builtin_convertvector(v, Halves);
  __builtin_memcpy(to, &low, sizeof low);
}
inline Floats fma(Floats a, Floats b, Floats c) {
  for (size_t i = 0; i < kLanes; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
}
inline void past(char *to, const char *from) { __builtin_memcpy(to, from, sizeof(Words)); }
inline void past_seen() {}

#include "moe/cpu/kernels.inc"
}  // namespace
constexpr Kernels table = {"generic", sum, convert, quantise, stream};
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
