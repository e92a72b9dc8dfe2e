// SPDX-License-Identifier: Apache-2.0
//
// simt_host.h: what simt.h (native/moe/cuda/) takes from CUDA, by machine.h's fibers.
#pragma once

#include <math.h>
#include <string.h>

#include "machine.h"

#define EPT_KERNEL static void
#define EPT_ARGUMENT(Type) const Type
#define EPT_SHARED(name) char *name = ::simt::here().state->memory
#define EPT_REST() ::simt::yield()
#define EPT_UNROLL
#define EPT_ROLLED
#define EPT_SELDOM static inline
#define threadIdx (::simt::here().thread)
#define blockIdx (::simt::here().block)
#define blockDim (::simt::here().threads)
#define gridDim (::simt::here().blocks)

namespace ept::moe::cuda {

struct alignas(16) Vector {
  uint32_t word[4];
};
// Both want an address that is a multiple of 16, as the GPU does.
inline Vector load16(const char *from) {
  if (reinterpret_cast<uintptr_t>(from) % 16) ::simt::misaligned(from);
  Vector v;
  memcpy(&v, from, sizeof v);
  return v;
}
inline void store16(char *to, const Vector &v) {
  if (reinterpret_cast<uintptr_t>(to) % 16) ::simt::misaligned(to);
  memcpy(to, &v, sizeof v);
}
// They come as late as they may: until then there is something else.
template <bool kNear>
void fetch16(char *to, const char *from) {
  if (reinterpret_cast<uintptr_t>(to) % 16) ::simt::misaligned(to);
  if (reinterpret_cast<uintptr_t>(from) % 16) ::simt::misaligned(from);
  ::simt::fetch(to, from);
}
inline void fence_block() { ::simt::announce(); }
inline void prefetch(const char *) {}
inline void prefetch_far(const char *) {}
inline void end_fetches() { ::simt::end_fetches(); }
template <int kLeft>
void await_fetches() {
  ::simt::await_fetches(kLeft);
}
inline bool has_copies() { return ::simt::here().state->has_copies; }
inline void make_barrier(uint64_t *barrier) { ::simt::make_barrier(barrier); }
inline void fence_copies() {}
inline void copy_in(char *to, const char *from, uint32_t bytes, uint64_t *barrier) {
  ::simt::copy_in(to, from, bytes, barrier);
}
inline void await_copy(uint64_t *barrier, uint32_t parity) { ::simt::await_copy(barrier, parity); }
inline void copy_out(char *to, const char *from, uint32_t bytes) { ::simt::copy_out(to, from, bytes); }
inline void end_copies() { ::simt::end_copies(); }
inline void await_copies_read() { ::simt::await_copies(); }
inline void await_copies() { ::simt::await_copies(); }
inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t larger_bf16(uint32_t a, uint32_t b) {
  const uint32_t x = a & 0x7fff7fff, y = b & 0x7fff7fff, signs = (a ^ b) & 0x80008000;
  const uint32_t low = (x & 0xffff) > (y & 0xffff) ? x & 0xffff : y & 0xffff;
  return signs | low | (x >> 16 > y >> 16 ? x & 0xffff0000 : y & 0xffff0000);
}
inline float fused(float a, float b, float c) { return fmaf(a, b, c); }
inline uint32_t bf16_pair(float low, float high) {
  const auto half = [](float value) {
    const uint32_t u = bits_of(value);
    return value != value ? 0x7fffu : (u + 0x7fff + (u >> 16 & 1)) >> 16;
  };
  return half(low) | half(high) << 16;
}
inline float divided(float a, float b) { return a / b; }
inline float about_inverse(float a) { return 1 / a; }

// Every mask in the kernels is all of the warp.
template <class T>
T __shfl_sync(uint32_t, T value, int lane) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  const uint64_t seen = ::simt::meet_warp("shfl", bits)[uint32_t(lane) % 32];
  memcpy(&value, &seen, sizeof value);
  return value;
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int step) {
  return __shfl_sync(mask, value, int(threadIdx.x % 32) ^ step);
}
inline uint32_t __reduce_add_sync(uint32_t, uint32_t value) {
  const uint64_t *values = ::simt::meet_warp("reduce_add", value);
  uint32_t sum = 0;
  for (uint32_t i = 0; i < 32; i++) sum += uint32_t(values[i]);
  return sum;
}
inline uint32_t __ballot_sync(uint32_t, int predicate) {
  const uint64_t *values = ::simt::meet_warp("ballot", predicate != 0);
  uint32_t ballot = 0;
  for (uint32_t i = 0; i < 32; i++) ballot |= uint32_t(values[i]) << i;
  return ballot;
}
inline uint32_t __match_any_sync(uint32_t, uint32_t value) {
  const uint64_t *values = ::simt::meet_warp("match", value);
  uint32_t same = 0;
  for (uint32_t i = 0; i < 32; i++) same |= uint32_t(values[i] == value) << i;
  return same;
}
inline void __syncwarp() { ::simt::meet_warp("syncwarp", 0); }
inline void __syncthreads() { ::simt::meet_block("syncthreads", 0); }
inline int __syncthreads_or(int predicate) {
  const uint64_t *values = ::simt::meet_block("syncthreads_or", predicate != 0);
  for (uint32_t i = 0; i < blockDim.x; i++)
    if (values[i]) return 1;
  return 0;
}
inline void __threadfence() {}
inline int __popc(uint32_t value) { return __builtin_popcount(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline uint32_t atomicAdd(uint32_t *at, uint32_t more) {
  const uint32_t before = *at;
  *at += more;
  return before;
}
inline unsigned long long atomicAdd(unsigned long long *at, unsigned long long more) {
  const unsigned long long before = *at;
  *at += more;
  return before;
}
inline unsigned long long atomicMax(unsigned long long *at, unsigned long long value) {
  const unsigned long long before = *at;
  if (before < value) *at = value;
  return before;
}
inline uint32_t atomicOr(uint32_t *at, uint32_t bits) {
  const uint32_t before = *at;
  *at |= bits;
  return before;
}
inline uint32_t atomicExch(uint32_t *at, uint32_t value) {
  const uint32_t before = *at;
  *at = value;
  return before;
}
inline uint32_t atomicSub(uint32_t *at, uint32_t less) { return atomicAdd(at, 0 - less); }
inline uint32_t atomicCAS(uint32_t *at, uint32_t expected, uint32_t desired) {
  const uint32_t before = *at;
  if (before == expected) *at = desired;
  return before;
}

}  // namespace ept::moe::cuda
