/* SPDX-License-Identifier: Apache-2.0
 *
 * device.h: the tables that the host fills and that kernels read through device.cuh. Plain C, C++ and CUDA, NVRTC
 * included; layouts are those of EPT_DEVICE_ABI (backend.h) and the same for a GPU, a CPU and a test.
 *
 *   path      how this rank reaches one memory region of one peer, and that peer's signals: an array of them, by rank
 *   ring      commands from a GPU to the proxy thread of its rank, for paths that take one
 *   progress  what the proxy thread tells kernels of one peer
 *
 * Addresses are 64-bit numbers that hold in the kernel's address space; where host code follows one too, it says so.
 */
#ifndef EPTRANSPORT_DEVICE_H
#define EPTRANSPORT_DEVICE_H

#include "eptransport/backend.h"

#define EPT_NO_SIGNAL 0xffffffffu

/* ==== what the proxy thread tells of one peer ======================================================================
 * In pinned host memory; the proxy writes, kernels read. */
typedef struct ept_device_progress {
  uint64_t done;  /* every command to this peer with a ticket below it has ended: its source may be reused. Begins as
                     the ring's first ticket, which is 0 but in tests */
  int32_t status; /* 0, or the ept_code with which traffic to this peer ended: PEER_LOST, CLOSED, ... It stays. */
  uint32_t reserved;
} ept_device_progress;

/* ==== a path =======================================================================================================
 */
typedef struct ept_path {
  uint32_t kind;         /* ept_device_kind: NONE (self, masked), MAPPED, PROXY, GPU */
  uint32_t peer;         /* rank */
  uint32_t memory;       /* PROXY: the proxy's number of the memory that sources lie in; GPU: 1: the library copies,
                            since it has the peer's memory mapped; 0: a NIC does; MAPPED: 1: the peer is on this GPU */
  uint32_t region;       /* PROXY: the proxy's number of the peer's region */
  uint64_t source;       /* PROXY, GPU: where the memory of sources begins, in the kernel's address space */
  uint64_t source_bytes; /*   and how long it is; a source outside is refused with ACCESS */
  uint64_t window;       /* MAPPED: where the peer's region begins, in the kernel's address space; GPU: where the same
                            region of this rank begins, which names the peer's: the heap is symmetric */
  uint64_t window_bytes; /* length of the peer's region; a destination outside is refused with ACCESS */
  uint64_t signals;      /* MAPPED: address of the peer's words that this rank raises, uint64_t[signal_count];
                            PROXY: the proxy's number of the first one; GPU: as window, of this rank's words that
                            stand where the peer's do */
  uint32_t signal_count; /* a signal is named by its index below it */
  uint32_t number;       /* GPU: the peer's number in the device library (a PE) */
  uint64_t ring;         /* PROXY: address of an ept_ring */
  uint64_t progress;     /* address of an ept_device_progress; 0: nobody tells (MAPPED without a proxy) */
} ept_path;

/* ==== what a backend's entries say (ept_device_entry.words) ========================================================
 * Of kind GPU: a peer: [0] its number in the device library; [1] where this rank's part of the symmetric heap begins,
 * [2] its bytes, [3] where the peer's part is in this address space, 0 where it isn't. A region or a signal: [0] its
 * address in this rank's part, which names the peer's, [1] its bytes. */

/* ==== the command ring =============================================================================================
 */
typedef enum ept_command_kind {
  EPT_COMMAND_PUT = 1,  /* `bytes` from the memory at `source` to the region at `destination`; then the signal */
  EPT_COMMAND_VALUE = 2 /* the 8 bytes of `source` itself to the region at `destination`; then the signal */
} ept_command_kind;

typedef struct ept_command {
  uint32_t kind; /* ept_command_kind */
  uint32_t peer;
  uint32_t memory, region; /* the proxy's numbers, from the path; the region's below 2^31 */
  uint64_t source;         /* offset in the memory, or the value */
  uint64_t destination;    /* offset in the region */
  uint64_t bytes;          /* may be 0: the signal alone */
  uint32_t signal;         /* the proxy's number, or EPT_NO_SIGNAL */
  uint32_t reserved;
  uint64_t ticket; /* its consumer's; a producer leaves it */
} ept_command;

/* A command as it lies in the ring: a cache line, of which six words are used. Bit 63 of each says whose it is, so that
 * they may be stored in any order (device.cuh, the ring's invariants). */
#define EPT_SLOT_WORDS 6
typedef struct ept_command_slot {
  uint64_t words[EPT_SLOT_WORDS];
  uint64_t reserved[2];
} ept_command_slot;

/* In memory of the GPU that pushes (a CPU test: anywhere). The first line is set once, the second is the producers'. */
typedef struct ept_ring {
  uint64_t slots;    /* address of ept_command_slot[capacity] in pinned host memory */
  uint64_t consumed; /* address of a uint64_t in pinned host memory: the ticket that the proxy takes next, published
                        lazily: never ahead of the truth */
  uint32_t mask;     /* capacity - 1; capacity is a power of two, 4 or more */
  uint32_t reserved[11];
  uint64_t head; /* the next ticket */
  uint64_t seen; /* `consumed` as some producer saw it last: a look at it costs no way over PCIe */
  uint64_t reserved2[6];
} ept_ring;

#ifdef __cplusplus
static_assert(sizeof(ept_device_progress) == 16 && sizeof(ept_path) == 80, "device layout");
static_assert(sizeof(ept_command_slot) == 64 && sizeof(ept_ring) == 128, "device layout");
#endif

#endif
