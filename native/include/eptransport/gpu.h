/* SPDX-License-Identifier: Apache-2.0
 *
 * gpu.h: dispatch and combine on CUDA tensors, launched on the caller's stream. Nothing here waits for a peer or for
 * the GPU but ept_gpu_lanes_join, _reset and _close; what goes wrong in a kernel is told by
 * ept_gpu_moe_check.
 *
 * Set-up, on every rank: lanes_join, in the place of ept_moe_create, which ranks on a CPU call. Then an ept_gpu_moe.
 *
 * A step in a lane: dispatch_send, dispatch_recv, combine_send, combine_recv, each on the same stream. A send whose
 * phase has a message still to be received needs ept_gpu_moe_drain before: the caller keeps count.
 */
#ifndef EPTRANSPORT_GPU_H
#define EPTRANSPORT_GPU_H

#include "eptransport/eptransport.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct ept_gpu_lanes ept_gpu_lanes;
typedef struct ept_gpu_moe ept_gpu_moe;

/* How messages leave for GPU ranks whose memory isn't mapped, where this rank's kernels could put them by themselves.
 */
typedef enum ept_gpu_path {
  EPT_GPU_PATH_AUTO = 0, /* as is faster: both are measured, at the lengths of messages of balanced routing, when the
                            AllToAll is made; or by crossover_bytes */
  EPT_GPU_PATH_GPU = 1,  /* put by the kernel */
  EPT_GPU_PATH_PROXY = 2 /* posted by the proxy thread */
} ept_gpu_path;

typedef struct ept_gpu_config {
  uint32_t size;
  int32_t device;       /* CUDA ordinal */
  uint32_t blocks;      /* of each launch; 0: an equal share of what the GPU holds at once */
  uint32_t threads;     /* of a block, a multiple of 32; 0: 512, or 1,024 where the library finds it faster */
  uint64_t timeout_ns;  /* of a wait inside a kernel */
  uint64_t process;     /* a number of this process, different in every other */
  int32_t *group_fault; /* on the device: set to the ept_code of a fault; or NULL */
  uint32_t mapped;      /* 0: peers go through the engine that could map this rank's memory (EPT_INTRA=off) */
  uint32_t memory;      /* of lanes over the engine. 0: GPU memory where backend and GPU take it, else pinned host
                           memory; 1: GPU memory; 2: pinned (EPT_GPU_MEMORY) */
  char node[32];        /* EPT_NODE; ranks map each other's memory only where it is the same. Ends in 0 */
  uint32_t share;       /* of memory that peers map. 0: by CUDA IPC where that works, else 2; 1: by CUDA IPC; 2: by file
                           descriptors over a Unix socket (EPT_GPU_SHARE) */
  int32_t path;         /* ept_gpu_path */
  uint64_t crossover_bytes; /* EPT_GPU_PATH_AUTO: 0: measured; else longer ones go by the proxy thread */
} ept_gpu_config;

/* Collective with ept_moe_create: an AllToAll of ranks on GPUs and CPUs. `known`: what an earlier call with this arena
 * has given, and what `moe` fits, or NULL; it comes back in *lanes, or new ones do. Lanes are closed before their arena
 * is. *number: of the AllToAll. CONFIG where the blocks of all ranks of this GPU don't fit side by side. */
int32_t ept_gpu_lanes_join(ept_arena *arena, const ept_gpu_config *config, const ept_moe_config *moe,
                           const ept_gpu_lanes *known, ept_gpu_lanes **lanes, uint32_t *number, ept_error *error);
/* Whether other ranks are threads of this process. */
int32_t ept_gpu_lanes_share_process(const ept_gpu_lanes *lanes);
/* Whether that rank's memory is in this GPU's address space: else what goes there goes through the engine. */
int32_t ept_gpu_lanes_maps(const ept_gpu_lanes *lanes, uint32_t rank);
/* Bytes of a dispatch's message to one rank where routing is balanced: what crossover_bytes is compared with. */
uint64_t ept_gpu_message_bytes(const ept_moe_config *moe);
/* Whether this rank's kernels put into that rank's memory through a device library (NVSHMEM). */
int32_t ept_gpu_lanes_initiates(const ept_gpu_lanes *lanes, uint32_t rank);
/* Such puts so far, by kernels that have ended, since the start or the last reset. Copies from the device. */
int32_t ept_gpu_lanes_puts(const ept_gpu_lanes *lanes, uint64_t *puts, ept_error *error);
/* Whether some ranks are reached through the engine; else kernels reach all by themselves. */
int32_t ept_gpu_lanes_over_engine(const ept_gpu_lanes *lanes);
/* By a thread that nothing waits for, every few ms: waits of kernels for ranks that have gone on to a reset end. */
void ept_gpu_lanes_watch(ept_gpu_lanes *lanes);
int32_t ept_gpu_lanes_fit(const ept_gpu_lanes *lanes, const ept_moe_config *moe, ept_error *error);
/* With no kernel under way of any lanes of the arena: ept_moe_reset, for its AllToAlls on CPU and GPU alike. */
int32_t ept_gpu_lanes_reset(ept_gpu_lanes *lanes, uint64_t timeout_ns, ept_error *error);
/* Where the lanes over the engine stand, and why, in a sentence; empty where there are none. */
void ept_gpu_lanes_home(const ept_gpu_lanes *lanes, char *text, size_t capacity);
/* Of the last AllToAll that joined with these lanes: what was measured of both ways to ranks that kernels could put to,
 * and what was chosen by it, in a sentence; empty where nothing was measured. */
void ept_gpu_lanes_way(const ept_gpu_lanes *lanes, char *text, size_t capacity);
uint32_t ept_gpu_lanes_blocks(const ept_gpu_lanes *lanes);
/* Device timestamps (ns of the GPU's clock) of the kernels that are launched, or captured, from now on, into `times` on
 * the device; NULL: no more. Words in all; for each lane, one after another:
 *   [4 halves: dispatch send, recv, combine send, recv][blocks][8 points: 0 begins, 1 knows its tables, 2 has planned
 *     (send) or knows who is here (recv), 3 its rows are done, 4 what is beside rows is, 5 ends, 6 and 7 nothing]
 *   [2 phases][world] when block 0 saw that source's signal, and when the last of its rows was done (combine: 0) */
uint64_t ept_gpu_lanes_times(ept_gpu_lanes *lanes, uint64_t *times);
/* No kernel of any rank may use them any more. */
void ept_gpu_lanes_close(ept_gpu_lanes *lanes);

/* Kernels that were compiled at run time for GPUs of that architecture (90: sm_90), and are taken by GPUs that are
 * first used after this. Copied; they stay until the process ends. */
int32_t ept_gpu_image_add(uint32_t arch, const void *image, uint64_t bytes, ept_error *error);
/* Whether there is machine code for GPUs of that capability (90: 9.0); else the driver compiles PTX, or there is none.
 */
int32_t ept_gpu_has_code(uint32_t capability);

/* image: kernels that were compiled for this shape and GPU, or NULL: those of the library. UNSUPPORTED where their
 * blocks would not all be on the GPU at once. */
int32_t ept_gpu_moe_create(ept_gpu_lanes *lanes, const ept_moe_config *config, uint32_t number, const void *image,
                           uint64_t image_bytes, ept_gpu_moe **moe, ept_error *error);
void ept_gpu_moe_close(ept_gpu_moe *moe);
void ept_gpu_moe_local_experts(const ept_gpu_moe *moe, int32_t *ids /* [plan.local_experts] */);

/* Bytes of device memory, 16-byte aligned, that keep the routing of a dispatch of so many tokens, in any layout. */
uint64_t ept_gpu_routing_bytes(const ept_gpu_moe *moe, uint64_t tokens);
/* Where in it int32_t ids[tokens, top_k] and float weights[tokens, top_k] stand, in bytes, as they were given. */
uint64_t ept_gpu_routing_ids(const ept_gpu_moe *moe, uint64_t tokens);
uint64_t ept_gpu_routing_weights(const ept_gpu_moe *moe, uint64_t tokens);

/* Before dispatch_send, and whenever the lane shall take the present membership: launches what brings it to the lane,
 * if it has another; *membership (or NULL): its number. Nothing else may run on the lane but what is on `stream`. FAULT
 * where a rank is back and no reset has taken it in, and where a stream that `captures` would have to launch. */
int32_t ept_gpu_moe_members(ept_gpu_moe *moe, uint32_t lane, int32_t captures, uint32_t *membership, void *stream,
                            ept_error *error);
/* Before combine_send: PEER_LOST or FAULT, and a lane that is faulted, where the dispatch was under another membership
 * than the present one. */
int32_t ept_gpu_moe_refuse_old(ept_gpu_moe *moe, uint32_t lane, uint32_t membership, void *stream, ept_error *error);
/* `args` as ept_moe_dispatch_send's, on the device; `routing` in it is NULL. Where calls may be streamed
 * (buffer_bytes), what they point to stays there until the dispatch_recv, or the drain, that sends the rest. */
int32_t ept_gpu_moe_dispatch_send(ept_gpu_moe *moe, const ept_dispatch_args *args, void *routing, void *stream,
                                  ept_error *error);
/* arrival: uint64_t[4] on the device: rows, of one rank at most, of the contiguous layout, of one expert at most. */
int32_t ept_gpu_moe_dispatch_wait(ept_gpu_moe *moe, uint32_t lane, uint64_t *arrival, void *stream, ept_error *error);
/* num_rows: on the device: rows that came, or of the contiguous layout with padding. ticket: any number but 0 has the
 * counts mirrored to the host (ept_gpu_moe_counts) under it, at the end; 0: nobody asks for them. */
int32_t ept_gpu_moe_dispatch_recv(ept_gpu_moe *moe, uint32_t lane, const ept_dispatch_outputs *outputs, void *routing,
                                  uint64_t tokens, int32_t *num_rows, uint64_t ticket, void *stream, ept_error *error);
/* What the last dispatch_recv of the lane that had a ticket, and has ended, has mirrored. Asks no GPU; any thread, also
 * while kernels run and while a stream captures. LATER: none has ended yet. */
typedef struct ept_gpu_counts {
  uint32_t size;
  int32_t fault;   /* the lane's ept_code when it ended; then rows and counts are 0 */
  uint64_t epoch;  /* how many have ended, from 1; never goes down, also over a reset */
  uint64_t ticket; /* of that launch; a captured one has the same in every replay */
  int32_t rows;    /* as num_rows */
  int32_t reserved;
} ept_gpu_counts;
int32_t ept_gpu_moe_counts(ept_gpu_moe *moe, uint32_t lane, ept_gpu_counts *counts,
                           int32_t *per_expert /* [plan.local_experts] */, ept_error *error);
/* Weights that are known only now, [tokens, top_k] of the dispatch that `routing` is of, for the combine_send that
 * follows: they go to the ranks that have the rows, and `late` (ept_gpu_late_bytes of device memory) gets those of the
 * rows that are here. All ranks call it or none does, with no dispatch of the lane still to be received. */
uint64_t ept_gpu_late_bytes(const ept_gpu_moe *moe);
int32_t ept_gpu_moe_late_weights(ept_gpu_moe *moe, uint32_t lane, const ept_tensor *weights, void *routing, float *late,
                                 void *stream, ept_error *error);
/* `args` as ept_moe_combine_send's, without topk_weights, and kept as those of a dispatch_send; routing of a dispatch
 * of `tokens`. late: of late_weights, or NULL: by the weights of the dispatch. */
int32_t ept_gpu_moe_combine_send(ept_gpu_moe *moe, const ept_combine_args *args, void *routing, uint64_t tokens,
                                 float *late, void *stream, ept_error *error);
/* row_weights: as ept_moe_combine_recv's, or NULL. */
int32_t ept_gpu_moe_combine_recv(ept_gpu_moe *moe, uint32_t lane, const ept_tensor *y, const ept_tensor *row_weights,
                                 void *routing, void *stream, ept_error *error);
int32_t ept_gpu_moe_drain(ept_gpu_moe *moe, uint32_t lane, uint32_t phase, void *stream, ept_error *error);
/* What kernels that have ended did, captured ones too. Copies from the device. */
int32_t ept_gpu_moe_stats_get(ept_gpu_moe *moe, ept_moe_stats *stats, ept_error *error);
/* FAULT with the first cause where a kernel that has ended, or is under way, has met one. Asks no GPU. */
int32_t ept_gpu_moe_check(ept_gpu_moe *moe, uint32_t lane, ept_error *error);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif
