// SPDX-License-Identifier: Apache-2.0
//
// The device library's side of device.cuh, for NVSHMEM: compiled by itself, since its headers are many, and linked with
// the kernels (link.py). One operation a message: on a card, one work request with its signal behind it; where the peer
// is mapped for NVSHMEM, a copy by the whole block.
#include <nvshmem.h>
#include <nvshmemx.h>
#include <stdint.h>

extern "C" {

__device__ void ept_library_put(void *to, const void *from, uint64_t bytes, uint64_t *signal, uint32_t number) {
  if (signal)
    nvshmem_putmem_signal_nbi(to, from, bytes, signal, 1, NVSHMEM_SIGNAL_ADD, int(number));
  else
    nvshmem_putmem_nbi(to, from, bytes, int(number));
}

__device__ void ept_library_put_block(void *to, const void *from, uint64_t bytes, uint64_t *signal, uint32_t number) {
  if (signal)
    nvshmemx_putmem_signal_nbi_block(to, from, bytes, signal, 1, NVSHMEM_SIGNAL_ADD, int(number));
  else
    nvshmemx_putmem_nbi_block(to, from, bytes, int(number));
}

// INVARIANT of both. When they return, the bytes are as if the team's threads had stored them at the peer. Where the
// peer is mapped a put is such stores (nvshmem_ptr answers by the same table as the put), and nothing is waited for:
// the caller releases them with what it does next. Where it is not, a put is ordered with nothing, a fence would order
// it with later puts of this thread alone and not with those of who counts the last part, and so it must have arrived:
// by quiet. Kernels ask for parts only of peers that are mapped (ept_path.memory).
__device__ void ept_library_part_block(void *to, const void *from, uint64_t bytes, uint32_t number) {
  nvshmemx_putmem_nbi_block(to, from, bytes, int(number));
  if (threadIdx.x == 0 && !nvshmem_ptr(to, int(number))) nvshmem_quiet();
  __syncthreads();
}
__device__ void ept_library_part_warp(void *to, const void *from, uint64_t bytes, uint32_t number) {
  nvshmemx_putmem_nbi_warp(to, from, bytes, int(number));
  if (threadIdx.x % 32 == 0 && !nvshmem_ptr(to, int(number))) nvshmem_quiet();
  __syncwarp();
}

__device__ void ept_library_value(uint64_t *to, uint64_t value, uint64_t *signal, uint32_t number) {
  nvshmem_uint64_p(to, value, int(number));
  if (!signal) return;
  nvshmem_fence();
  nvshmemx_signal_op(signal, 1, NVSHMEM_SIGNAL_ADD, int(number));
}

__device__ void ept_library_quiet() { nvshmem_quiet(); }
}
