// SPDX-License-Identifier: Apache-2.0
//
// simt.h: the little of CUDA that the kernels are written in. A CPU has the same by fibers (tests/native/simt/), so
// that the kernels' logic runs, and is checked against the CPU executor, where there is no GPU.
//
// CODE IS READ FROM MEMORY TOO. Most of a kernel runs once: so each line of 128 bytes, eight instructions, is waited
// for when it is first reached, and where several processes share a GPU each has its own. What a step runs through is
// therefore kept short and together: EPT_SELDOM for what a good step doesn't run, and for what few threads do;
// EPT_ROLLED for loops of a few turns, which the compiler would write out four times.
// A function that is EPT_SELDOM is no member, and small: where kernels are linked with a device library, it must not
// need more registers than a kernel has.
#pragma once

#include "eptransport/device.cuh"

#ifdef __CUDACC__
// At most 1,024 threads a block, so at most 64 registers a thread; two blocks of 512 fit a multiprocessor.
#define EPT_KERNEL extern "C" __global__ void __launch_bounds__(1024, 1)
#define EPT_ARGUMENT(Type) const __grid_constant__ Type
#define EPT_SHARED(name) extern __shared__ __align__(16) char name[]
#define EPT_REST() ::ept::device::Hardware::rest()
#define EPT_UNROLL _Pragma("unroll")
#define EPT_ROLLED _Pragma("unroll 1")
#define EPT_SELDOM static __device__ __noinline__
namespace ept::moe::cuda {
struct alignas(16) Vector {
  uint32_t word[4];
};
EPT_DEVICE Vector load16(const char *from) {
  const uint4 v = *reinterpret_cast<const uint4 *>(from);
  return {{v.x, v.y, v.z, v.w}};
}
EPT_DEVICE void store16(char *to, const Vector &v) {
  *reinterpret_cast<uint4 *>(to) = make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]);
}
// Sixteen bytes that come into shared memory while the thread goes on. kNear: through the cache.
template <bool kNear>
EPT_DEVICE void fetch16(char *to, const char *from) {
  const auto shared = uint32_t(__cvta_generic_to_shared(to));
  if (kNear)
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" : : "r"(shared), "l"(from) : "memory");
  else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" : : "r"(shared), "l"(from) : "memory");
}
// Those since the last call are a group; await_fetches: all groups of this thread but its last kLeft are in.
EPT_DEVICE void end_fetches() { asm volatile("cp.async.commit_group;" : : : "memory"); }
template <int kLeft>
EPT_DEVICE void await_fetches() {
  asm volatile("cp.async.wait_group %0;" : : "n"(kLeft) : "memory");
}
// The copy engine, by which the kernels of sm_90 and later move runs of bytes (bulk.cuh).
#if __CUDA_ARCH__ >= 900
EPT_DEVICE constexpr bool has_copies() { return true; }
EPT_DEVICE uint32_t shared_at(const void *at) { return uint32_t(__cvta_generic_to_shared(at)); }
// A barrier that one arrival completes, with the bytes that it announces.
EPT_DEVICE void make_barrier(uint64_t *barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" : : "r"(shared_at(barrier)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" : : : "memory");
  asm volatile("fence.proxy.async.shared::cta;" : : : "memory");
}
// What this thread sees, its copies see.
EPT_DEVICE void fence_copies() { asm volatile("fence.proxy.async.global;" : : : "memory"); }
// Global to shared memory, and back; both addresses and the length are multiples of 16.
EPT_DEVICE void copy_in(char *to, const char *from, uint32_t bytes, uint64_t *barrier) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               :
               : "r"(shared_at(barrier)), "r"(bytes)
               : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               :
               : "r"(shared_at(to)), "l"(from), "r"(bytes), "r"(shared_at(barrier))
               : "memory");
}
EPT_DEVICE void copy_out(char *to, const char *from, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;"
               :
               : "l"(to), "r"(shared_at(from)), "r"(bytes)
               : "memory");
}
// The barrier's phases are counted from 0: returns when that of this parity is over.
EPT_DEVICE void await_copy(uint64_t *barrier, uint32_t parity) {
  uint32_t over = 0;
  while (!over)
    asm volatile(
        "{\n .reg .pred p;\n"
        " mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        " selp.u32 %0, 1, 0, p;\n}"
        : "=r"(over)
        : "r"(shared_at(barrier)), "r"(parity)
        : "memory");
}
// Copies out since the last call are a group of this thread. Then: of all groups what was to be copied is read; all is
// written.
EPT_DEVICE void end_copies() { asm volatile("cp.async.bulk.commit_group;" : : : "memory"); }
EPT_DEVICE void await_copies_read() { asm volatile("cp.async.bulk.wait_group.read 0;" : : : "memory"); }
EPT_DEVICE void await_copies() { asm volatile("cp.async.bulk.wait_group 0;" : : : "memory"); }
#else
// There is none, and nobody calls these.
EPT_DEVICE constexpr bool has_copies() { return false; }
EPT_DEVICE void make_barrier(uint64_t *) {}
EPT_DEVICE void fence_copies() {}
EPT_DEVICE void copy_in(char *, const char *, uint32_t, uint64_t *) {}
EPT_DEVICE void copy_out(char *, const char *, uint32_t) {}
EPT_DEVICE void await_copy(uint64_t *, uint32_t) {}
EPT_DEVICE void end_copies() {}
EPT_DEVICE void await_copies_read() {}
EPT_DEVICE void await_copies() {}
#endif
// Orders what a thread does for the other threads of its block. __threadfence_block() would be sequentially consistent,
// which nobody here needs.
EPT_DEVICE void fence_block() { asm volatile("fence.acq_rel.cta;" : : : "memory"); }
EPT_DEVICE void prefetch(const char *at) { asm volatile("prefetch.global.L1 [%0];" : : "l"(at)); }
EPT_DEVICE void prefetch_far(const char *at) { asm volatile("prefetch.global.L2 [%0];" : : "l"(at)); }
// Two elements of 2 bytes, to nearest even; a NaN is the canonical one, which sums are anyway.
EPT_DEVICE uint32_t bf16_pair(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
#if __CUDA_ARCH__ >= 890
#define EPT_HAS_E4M3
// Saturating, to nearest even; neither is a NaN.
EPT_DEVICE uint32_t e4m3_pair(float low, float high) {
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
}
#endif
// Of each two bf16 the larger size, a NaN where one is; its sign means nothing.
EPT_DEVICE uint32_t larger_bf16(uint32_t a, uint32_t b) {
#if __CUDA_ARCH__ >= 860
  uint32_t larger;
  asm("max.NaN.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  return larger;
#else
  return __vmaxu2(a & 0x7fff7fff, b & 0x7fff7fff);  // sizes compare as integers do
#endif
}
EPT_DEVICE uint32_t bits_of(float value) { return __float_as_uint(value); }
EPT_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }
EPT_DEVICE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
EPT_DEVICE float divided(float a, float b) { return __fdiv_rn(a, b); }
// 1 / a, wrong by one unit in its last place at most, where neither is subnormal.
EPT_DEVICE float about_inverse(float a) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(a));
  return inverse;
}
}  // namespace ept::moe::cuda
#else
#include "simt_host.h"
#endif

namespace ept::moe::cuda {

constexpr uint32_t kAll = 0xffffffffu;

EPT_DEVICE uint32_t lane_id() { return threadIdx.x % kWarp; }
EPT_DEVICE uint32_t warp_id() { return threadIdx.x / kWarp; }
EPT_DEVICE uint32_t warps() { return blockDim.x / kWarp; }
EPT_DEVICE uint32_t below() { return (1u << lane_id()) - 1; }

template <class T>
EPT_DEVICE T from_lane(T value, uint32_t lane) {
  return __shfl_sync(kAll, value, int(lane));
}
EPT_DEVICE char *from_lane(char *value, uint32_t lane) {
  return device::address<char>(__shfl_sync(kAll, uint64_t(reinterpret_cast<uintptr_t>(value)), int(lane)));
}
EPT_DEVICE const char *from_lane(const char *value, uint32_t lane) {
  return from_lane(const_cast<char *>(value), lane);
}
EPT_DEVICE uint32_t warp_sum(uint32_t value) { return __reduce_add_sync(kAll, value); }
// Of the lanes up to and with this one.
template <class T>
EPT_DEVICE T warp_prefix(T value) {
  for (uint32_t step = 1; step < kWarp; step *= 2) {
    const T before = __shfl_sync(kAll, value, int(lane_id() >= step ? lane_id() - step : 0));
    if (lane_id() >= step) value += before;
  }
  return value;
}

// Where what the lanes in `those` have moves to lanes side by side, from `first` on: whose this lane gets.
EPT_DEVICE uint32_t moves_from(uint32_t those, uint32_t first = 0) {
  uint32_t from = 0;
  for (uint32_t i = first; those; i++, those &= those - 1)
    if (i == lane_id()) from = uint32_t(__ffs(int(those)) - 1);
  return from;
}

// The next number, for the whole warp.
EPT_DEVICE uint32_t take_one(uint32_t *counter) {
  uint32_t number = 0;
  if (lane_id() == 0) number = atomicAdd(counter, 1u);
  return from_lane(number, 0);
}

// Words of shared memory that one warp of a block writes and others look at.
EPT_DEVICE uint32_t peek(const uint32_t *word) { return *const_cast<const volatile uint32_t *>(word); }
// What the warp wrote before is seen by who sees the word.
EPT_DEVICE void show(uint32_t *word, uint32_t value) {
  __syncwarp();
  fence_block();
  if (lane_id() == 0) *const_cast<volatile uint32_t *>(word) = value;
  __syncwarp();
}
// One thread looks for the warp, which must not part over what it sees. What was written before that was shown is seen.
EPT_DEVICE uint32_t look(const uint32_t *word) {
  const uint32_t value = from_lane(peek(word), 0);
  fence_block();
  return value;
}
EPT_DEVICE bool shown(const uint32_t *word, uint32_t value) {
  if (peek(word) != value) return false;
  fence_block();
  return true;
}

}  // namespace ept::moe::cuda
