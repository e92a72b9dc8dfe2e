// SPDX-License-Identifier: Apache-2.0
//
// kernels.h: the inner loops over one row, as wire.h NUMBERS says them. One body (kernels.inc) is compiled for several
// instruction sets; all give the same bits, because every operation is an exactly rounded one or an integer one.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace ept::moe {

// A format that rows are computed in: F32, F16, BF16 (ept_dtype).
struct Kernels {
  const char *name;
  // out = sum over rows in order, in fp32, of weights[i] * rows[i] (fused), or of rows[i] where weights is NULL;
  // rounded once. No rows: zeros.
  void (*sum)(void *out, int32_t out_dtype, const void *const *rows, const float *weights, size_t count,
              int32_t in_dtype, size_t n);
  // One row into another format, rounded once. -0 and NaN stay.
  void (*convert)(void *out, int32_t out_dtype, const void *in, int32_t in_dtype, size_t n);
  // Blocks of EPT_FP8_BLOCK elements to e4m3; scales: float[blocks], or uint8_t[blocks] for ue8m0.
  void (*quantise)(uint8_t *q, void *scales, const void *in, int32_t in_dtype, size_t n, bool ue8m0, float epsilon);
  // Copies `n` bytes past the caches, for what is too much to be found there again. Memory is not read to be written
  // then: half the time. Ordered like any other store for those who synchronise with the caller.
  void (*stream)(void *to, const void *from, size_t n);
};

// The best one that this machine can run.
const Kernels &kernels();
// All that it can run, ending with NULL, for the test that compares their bits.
const Kernels *const *all_kernels();

}  // namespace ept::moe
