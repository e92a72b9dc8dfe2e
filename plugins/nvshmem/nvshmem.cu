// SPDX-License-Identifier: Apache-2.0
//
// The device library's side of device.cuh, for NVSHMEM: compiled before the kernels, in one unit with them (link.py).
// One operation a message: on a card, one work request with its signal behind it; where the peer is mapped for NVSHMEM,
// a copy by the whole block, and of what rows are packed in, by the warp.
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

// INVARIANT. When it returns, the bytes are as if the warp's threads had stored them at the peer: where the peer is
// mapped a put is such stores, and nothing is waited for: the caller releases them with what it does next. (Where it is
// not, a put is ordered with nothing. Kernels have parts only for peers that are, ept_path.memory: the host asks
// nvshmem_ptr, which answers by the same table as the put.) It is a part of the kernel's own code: called as a
// function, amid a row with all registers in use, it took some 6 us (docs/decisions.md).
__device__ __forceinline__ void ept_library_part_warp(void *to, const void *from, uint64_t bytes, uint32_t number) {
  nvshmemx_putmem_nbi_warp(to, from, bytes, int(number));
}

__device__ void ept_library_value(uint64_t *to, uint64_t value, uint64_t *signal, uint32_t number) {
  nvshmem_uint64_p(to, value, int(number));
  if (!signal) return;
  nvshmem_fence();
  nvshmemx_signal_op(signal, 1, NVSHMEM_SIGNAL_ADD, int(number));
}

__device__ void ept_library_quiet() { nvshmem_quiet(); }
}
