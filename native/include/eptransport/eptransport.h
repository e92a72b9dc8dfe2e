/* SPDX-License-Identifier: Apache-2.0
 *
 * eptransport.h: the C API that Python binds with cffi, and that a C or C++ program may use by itself.
 *
 *   backends    find a plugin, ask what it could do here
 *   engine      peers, membership, memory, regions, signals, transfers, messages
 *   moe         dispatch and combine
 *
 * Every call returns an ept_code (negative: error; see backend.h) and fills `error` (may be NULL) where it has one.
 * Every object may be used from any thread; calls on one engine are serialised inside. No call prints. No call waits
 * longer than its `timeout_ns`; a timeout of 0 means look once, UINT64_MAX means the engine's own timeout
 * (ept_engine_config.timeout_ns): nothing waits for ever. Strings and arrays passed in are copied unless said
 * otherwise.
 */
#ifndef EPTRANSPORT_H
#define EPTRANSPORT_H

#include "eptransport/backend.h"
#include "eptransport/metrics.h"

#ifdef __cplusplus
extern "C" {
#endif

const char *ept_version(void);
const char *ept_code_name(int32_t code); /* "EPT_E_TIMEOUT" */

/* ==== backends ==================================================================================================== */

/* Opens the plugin at `path` and keeps it for the life of the process (plugins are never unloaded). Fails with INVALID
 * (not a library: the loader's words), VERSION (no table of an ABI that this engine serves). Idempotent. */
typedef struct ept_plugin ept_plugin;
int32_t ept_plugin_open(const char *path, const ept_plugin **plugin, ept_error *error);
const char *ept_plugin_name(const ept_plugin *plugin);
const char *ept_plugin_version(const ept_plugin *plugin);
uint32_t ept_plugin_setting_count(const ept_plugin *plugin);
const ept_setting *ept_plugin_setting(const ept_plugin *plugin, uint32_t index);
/* `values` may name some of the settings; the others take their defaults. OK, or UNAVAILABLE with `probe` filled. */
int32_t ept_plugin_probe(const ept_plugin *plugin, const ept_value *values, size_t count, ept_probe *probe,
                         ept_error *error);

/* ==== engine ====================================================================================================== */

typedef enum ept_progress {
  EPT_PROGRESS_AUTO = 0,   /* a waiting thread drives the network; a proxy thread does while nobody waits */
  EPT_PROGRESS_THREAD = 1, /* a proxy thread does, always */
  EPT_PROGRESS_INLINE = 2  /* calls on the engine do; a rank that makes none stands still */
} ept_progress;

typedef struct ept_engine ept_engine;

typedef struct ept_engine_config {
  uint32_t size;
  uint32_t rank, world;
  uint32_t epoch;        /* of this process; 0 the first time a rank joins */
  const char *job;       /* names the group; the same on every rank */
  const uint8_t *secret; /* the job's secret, the same on every rank */
  size_t secret_length;
  const ept_plugin *plugin;
  const ept_value *values; /* the plugin's settings; unknown names are refused */
  size_t value_count;
  int32_t progress;          /* ept_progress */
  uint32_t credits;          /* immediates that one peer may have in flight to us; 128 to 1024; 0: 1024, less where
                                the backend's completion queue is short */
  uint64_t spin_ns;          /* how long a wait polls before it sleeps; UINT64_MAX: chosen from the cores */
  uint64_t timeout_ns;       /* a wait fails; 0: 300 s */
  uint64_t warn_ns;          /* a wait that lasts so long is logged, once; 0: 10 s */
  uint64_t dead_ns;          /* a peer that is silent so long though it owes an answer or a heartbeat is dead; 0: 5 s */
  uint64_t heartbeat_ns;     /* a peer that was sent nothing for so long is sent a sign of life; 0: dead_ns / 5 */
  const int32_t *proxy_cpus; /* where the proxy thread may run; NULL: near the rails, where their NUMA node is known */
  uint32_t proxy_cpu_count;
  uint32_t max_regions;  /* 0: 65,536 exported and as many imported */
  uint32_t max_signals;  /* 0: 262,143, what 18 bits of chan name */
  uint64_t stripe_bytes; /* a write longer than this is cut over the rails; 0: 896 KiB */
  /* NULL: none. A waiting thread asks it about every 100 ms, with no lock held; nonzero ends that wait with CLOSED. It
   * is how a language's own interrupts and a close by another thread get through. Lives until ept_engine_close. */
  int32_t (*interrupted)(void *context);
  void *interrupted_context;
} ept_engine_config;

int32_t ept_engine_create(const ept_engine_config *config, ept_engine **engine, ept_error *error);
/* Says GOODBYE, waits at most `timeout_ns` for what is in flight, frees all. Memory handles die with it. */
int32_t ept_engine_close(ept_engine *engine, uint64_t timeout_ns, ept_error *error);

/* The bootstrap ships each rank's address to the others. A call without buffer (NULL) gives the length. */
int32_t ept_engine_address(ept_engine *engine, void *blob, size_t *length, ept_error *error);
/* Starts connecting to all; `addresses[rank]` of this rank is ignored. Then wait. A backend with a collective join runs
 * its rounds through `ept_engine_join` first: while it returns LATER, gather `out` of all ranks and pass them back. */
int32_t ept_engine_join(ept_engine *engine, const void *const *blobs, const size_t *lengths, void *out,
                        size_t out_capacity, size_t *out_length, ept_error *error);
int32_t ept_engine_connect(ept_engine *engine, const void *const *addresses, const size_t *lengths, ept_error *error);
int32_t ept_engine_wait_connected(ept_engine *engine, uint64_t timeout_ns, ept_error *error);

typedef enum ept_peer_status {
  EPT_PEER_NEW = 0,
  EPT_PEER_CONNECTING = 1,
  EPT_PEER_UP = 2,
  EPT_PEER_LEFT = 3,
  EPT_PEER_LOST = 4,
  EPT_PEER_MASKED = 5 /* by ept_engine_mask, until ept_engine_readmit */
} ept_peer_status;
typedef struct ept_peer_info {
  uint32_t size;
  uint32_t rank;
  int32_t status; /* ept_peer_status */
  uint32_t epoch;
  uint32_t credits;   /* that we may still spend now */
  uint32_t queued;    /* operations held for want of credits or room */
  uint64_t in_flight; /* operations posted, not yet locally complete */
  uint64_t silent_ns; /* since the last sign of life */
  int32_t why_code;   /* LOST, LEFT, MASKED: why */
  int32_t why_errno;
  char why[256];
  uint32_t membership;   /* MASKED: under which epoch of the membership */
  uint32_t links_ended;  /* how often a link to this rank has ended; what was made for an ended one is stale */
  uint64_t heartbeat_ns; /* UP: what it promised; 0: no heartbeats, so its silence says nothing (EPT_PROGRESS_INLINE) */
  uint64_t set_aside;    /* bytes of memory here that it may still write, its process not being known dead */
} ept_peer_info;
int32_t ept_engine_peer(ept_engine *engine, uint32_t rank, ept_peer_info *info, ept_error *error);

typedef struct ept_engine_info {
  uint32_t size;
  uint32_t rails;
  ept_caps caps;
  uint32_t credits;
  uint32_t proxy_threads;
  uint64_t spin_ns;
  uint64_t registered_bytes;    /* of all memory registered now */
  uint64_t regions, signals;    /* exported now */
  uint64_t unknown_chans;       /* immediates for a chan that nobody holds: counted, dropped */
  uint64_t timeout_ns, dead_ns; /* as configured, defaults filled in */
  uint32_t rank, world, epoch;
  uint32_t membership;   /* the highest epoch of the membership that was told or heard */
  uint64_t heartbeat_ns; /* as configured, the default filled in */
  uint64_t stale;        /* immediates and messages of links that have ended: counted, dropped */
} ept_engine_info;
int32_t ept_engine_info_get(ept_engine *engine, ept_engine_info *info, ept_error *error);
int32_t ept_engine_rail(ept_engine *engine, uint32_t index, ept_rail *rail, ept_rail_counters *counters,
                        ept_error *error);

/* ---- membership ---------------------------------------------------------------------------------------------------
 * Who takes part is agreed above the engine (through the store, under an epoch of the membership); the engine carries
 * it out. Two kinds of epoch, not to be mixed up:
 *   the epoch of a rank        counts its lives: the processes that were this rank, and ept_engine_rejoin. A link is
 *                              between two lives, and between two lives there is never more than one. Whatever a rank
 *                              gave out for a link (regions, signals, keys, credits) ends with it.
 *   the epoch of a membership  counts the agreements on who takes part. The engine only carries and shows it.
 *
 * A restarted process comes back:    it makes an engine with a higher epoch; ept_engine_readmit here, and there for
 *                                    every rank (ept_engine_mask for those that are masked).
 * A rank that was falsely masked:    hears of it (its peers are LOST, ept_engine_membership moves), calls
 *                                    ept_engine_rejoin with a higher epoch, ships its new address, and goes on as a
 *                                    restarted process does.
 * Afterwards both sides export, import and exchange regions and signals anew. native/engine/membership.cc has the
 * invariants and why they hold. */

/* Stops all traffic with `rank`, at once and here alone: whatever it sends after this call returns changes nothing
 * here. Its keys are revoked first; then its queued and posted transfers fail with PEER_LOST ("rank 3 was masked under
 * epoch 7: WHY"), and so do all waits that look at it. Messages of it that were not read are dropped. Memory that a
 * failed transfer read from can't be deregistered until the backend has let go of it, which is soon.
 * For a rank in any state; of one that is masked already only `membership` and `why` are kept. Never waits.
 * `why` may be NULL. Where the backend can't revoke keys (caps.can_revoke 0), the memory that was exported to it is set
 * aside: ept_memory_deregister answers STUCK until ept_engine_known_dead. INVALID: `rank` is this rank, or none. */
int32_t ept_engine_mask(ept_engine *engine, uint32_t rank, uint32_t membership, const char *why, ept_error *error);
/* The process that was `rank` in its lives up to `epoch` has ended, or has closed its engine or rejoined: it writes no
 * more. Gives back the memory set aside for it. What makes the caller sure is the caller's business. */
int32_t ept_engine_known_dead(ept_engine *engine, uint32_t rank, uint32_t epoch, ept_error *error);
/* Opens `rank` again, in its life `epoch`, at the address that ept_engine_address gave there. For a rank that is NEW,
 * LEFT, LOST or MASKED; returns at once, the rank is CONNECTING and then UP, or LOST. The old link is fenced first.
 * INVALID: its state is another, or a link to this or a later life of it has been there before. */
int32_t ept_engine_readmit(ept_engine *engine, uint32_t rank, uint32_t epoch, const void *address, size_t length,
                           ept_error *error);
/* Until `rank` is UP. PEER_LOST with its reason if it is or gets LOST, LEFT or MASKED instead; TIMEOUT. */
int32_t ept_engine_wait_peer(ept_engine *engine, uint32_t rank, uint64_t timeout_ns, ept_error *error);
/* Begins another life of this rank in the same process: all links end, as by a mask, and all ranks are NEW. Memory,
 * signals (their ids and counts) and settings stay; every region, remote signal and export is stale. The address is
 * another one from here on. INVALID: `epoch` is not higher than the present one. UNSUPPORTED: the backend connects a
 * whole group. If the backend can't start again, its error is returned and the engine is closed. May wait for the
 * backend's threads to end, for nothing else. */
int32_t ept_engine_rejoin(ept_engine *engine, uint32_t epoch, ept_error *error);

/* "The membership has moved to `epoch`": to all that are UP, in a message that needs no credit; ranks pass it on with
 * their heartbeats. Says nothing of what has changed: who hears it looks into the store. Never waits. */
int32_t ept_engine_tell_membership(ept_engine *engine, uint32_t epoch, ept_error *error);
/* The highest epoch that was told here or heard; 0: none. When it rises, what waits for `notify` is woken. */
int32_t ept_engine_membership(ept_engine *engine, uint32_t *epoch, ept_error *error);

/* ---- progress, log, notification ----------------------------------------------------------------------------------*/
/* The page of metrics.h, its gauges fresh; lives until ept_engine_close. */
int32_t ept_engine_metrics(ept_engine *engine, const ept_metrics_page **page, ept_error *error);
/* Removes pages that dead processes of this user left; how many. Each engine does so when it opens. */
uint32_t ept_metrics_sweep(void);
/* A trace of what AllToAlls do: taken from the call on, at most `capacity` spans between two readings (more are lost,
 * and counted). Before the arena is made. Times are CLOCK_MONOTONIC. */
#define EPT_NO_PEER 4294967295
typedef struct ept_span {
  const char *name; /* a call ("dispatch_send") or a part of it: pack, post, wait, unpack, sum; lives for ever */
  uint64_t begin_ns, end_ns;
  uint64_t generation;
  uint32_t phase; /* ept_metrics_phase_id */
  uint32_t lane;
  uint32_t peer; /* EPT_NO_PEER: no one */
  uint32_t reserved;
} ept_span;
int32_t ept_engine_trace(ept_engine *engine, size_t capacity, ept_error *error);
/* *count: room on entry, spans on return, in the order in which they ended. */
int32_t ept_engine_spans(ept_engine *engine, ept_span *spans, size_t *count, uint64_t *lost, ept_error *error);

/* Why nothing goes on: every pending wait with peer, phase, count expected and seen, each peer's queues, the rails, and
 * when the network last moved. `expired`: begins with the wait of the calling thread that ran into its deadline last,
 * and tells it once; LATER where there is none. *length: capacity on entry, the text's with its 0 on return; LIMIT
 * where it does not fit (another call may need more). May be called from any thread, also while others wait. */
int32_t ept_engine_why_stuck(ept_engine *engine, int32_t expired, char *text, size_t *length, ept_error *error);

/* Signal `number` (SIGUSR1) then makes *fd readable: 8 bytes, blocking, for a thread that reads it and asks for
 * why_stuck. One for the process. OK; LATER: the program has a handler for it, or ignores it, and keeps it. Off gives
 * the default back unless another handler has come since. */
int32_t ept_stuck_signal(int32_t number, int32_t *fd, ept_error *error);
int32_t ept_stuck_signal_off(void);

/* Moves the network on once without waiting; returns the number of events, or an error. For EPT_PROGRESS_INLINE. */
int32_t ept_engine_progress(ept_engine *engine, ept_error *error);
/* The next line that the engine or its plugin has to say: OK with level and text, or LATER where there is none. */
int32_t ept_engine_log(ept_engine *engine, int32_t *level, char *text, size_t capacity);
/* A descriptor that becomes readable when something that was asked to `notify` has happened; read it with
 * ept_engine_notified, which clears it. For event loops. */
int32_t ept_engine_notify_fd(ept_engine *engine, int32_t *fd, ept_error *error);
int32_t ept_engine_notified(ept_engine *engine, ept_error *error);

/* ---- memory and regions ------------------------------------------------------------------------------------------
 * Handles are numbers; a stale one is answered with INVALID, never followed. */
typedef uint64_t ept_memory_id;
typedef uint64_t ept_region_id;
typedef uint64_t ept_signal_id;
typedef uint64_t ept_remote_signal_id;
typedef uint64_t ept_transfer_id;

int32_t ept_memory_register(ept_engine *engine, const ept_memory *memory, ept_memory_id *id, ept_error *error);
/* Refused (INVALID, says which) while a transfer still reads from it; revokes all its exports first. */
int32_t ept_memory_deregister(ept_engine *engine, ept_memory_id id, ept_error *error);
/* Lets `rank` write into [offset, offset + length). The blob goes to that rank, by ept_send or any other way. */
int32_t ept_region_export(ept_engine *engine, ept_memory_id memory, uint32_t rank, uint64_t offset, uint64_t length,
                          void *blob, size_t *blob_length, ept_error *error);
int32_t ept_region_revoke(ept_engine *engine, ept_memory_id memory, uint32_t rank, ept_error *error);
int32_t ept_region_import(ept_engine *engine, uint32_t rank, const void *blob, size_t length, ept_region_id *id,
                          ept_error *error);
int32_t ept_region_length(ept_engine *engine, ept_region_id id, uint64_t *length, ept_error *error);
int32_t ept_region_drop(ept_engine *engine, ept_region_id id, ept_error *error);

/* ---- signals ------------------------------------------------------------------------------------------------------
 * A 64-bit counter here that `source` raises by its transfers. `label` stands in errors ("dispatch of lane 0").
 * `home`: where the count lives. NULL: the engine's own memory. Otherwise 8 bytes, 8-aligned, zeroed, that the caller
 * keeps until ept_signal_destroy. (HOST and PINNED now; a device home gets a host mirror when a backend brings it.) */
int32_t ept_signal_create(ept_engine *engine, uint32_t source, const char *label, const ept_memory *home,
                          ept_signal_id *id, ept_error *error);
int32_t ept_signal_destroy(ept_engine *engine, ept_signal_id id, ept_error *error);
int32_t ept_signal_export(ept_engine *engine, ept_signal_id id, void *blob, size_t *length, ept_error *error);
int32_t ept_signal_import(ept_engine *engine, uint32_t rank, const void *blob, size_t length, ept_remote_signal_id *id,
                          ept_error *error);
int32_t ept_signal_drop(ept_engine *engine, ept_remote_signal_id id, ept_error *error);
int32_t ept_signal_value(ept_engine *engine, ept_signal_id id, uint64_t *value, ept_error *error);
/* Adds one locally, as the source's transfer would: for a source that is this rank. */
int32_t ept_signal_raise(ept_engine *engine, ept_signal_id id, ept_error *error);
/* Until the count is at least `target`. TIMEOUT and PEER_LOST say who waited for whom and what was seen. */
int32_t ept_signal_wait(ept_engine *engine, ept_signal_id id, uint64_t target, uint64_t timeout_ns, ept_error *error);
int32_t ept_signal_notify(ept_engine *engine, ept_signal_id id, uint64_t target, ept_error *error);
/* Waits for it belong to this ept_metrics_phase_id: others than TRANSFER are counted and reported by their caller. */
int32_t ept_signal_phase(ept_engine *engine, ept_signal_id id, uint32_t phase, ept_error *error);

/* ---- transfers ----------------------------------------------------------------------------------------------------
 */
typedef struct ept_write {
  uint32_t size;
  uint32_t peer;
  ept_memory_id source; /* 0 with length 0 */
  uint64_t source_offset;
  ept_region_id destination; /* 0 with length 0 */
  uint64_t destination_offset;
  uint64_t length;
  ept_remote_signal_id signal; /* 0: none raised */
} ept_write;

typedef struct ept_paged_write {
  uint32_t size;
  uint32_t peer;
  ept_memory_id source;
  ept_region_id destination;
  uint64_t page_bytes;
  uint64_t source_offset, destination_offset; /* of page 0 */
  uint64_t source_stride, destination_stride; /* between pages; 0: page_bytes */
  const uint32_t *source_pages;               /* [pages] */
  const uint32_t *destination_pages;          /* [pages] */
  size_t pages;
  ept_remote_signal_id signal; /* raised once, when all pages have landed */
} ept_paged_write;

/* `transfer` may be NULL: then nobody waits for local completion, and a failure shows in the peer's status and in
 * ept_engine_failure. LATER: past the credit limit and a bounded queue; nothing was taken, make progress and try again.
 */
int32_t ept_engine_write(ept_engine *engine, const ept_write *write, ept_transfer_id *transfer, ept_error *error);
/* Many writes, to any peers, as one transfer: one local completion. All or none is taken. */
int32_t ept_engine_scatter(ept_engine *engine, const ept_write *writes, size_t count, ept_transfer_id *transfer,
                           ept_error *error);
int32_t ept_engine_write_paged(ept_engine *engine, const ept_paged_write *write, ept_transfer_id *transfer,
                               ept_error *error);
/* Local completion. OK, the transfer's own error, or TIMEOUT; anything but TIMEOUT and LATER ends the handle. */
int32_t ept_transfer_wait(ept_engine *engine, ept_transfer_id transfer, uint64_t timeout_ns, ept_error *error);
int32_t ept_transfer_notify(ept_engine *engine, ept_transfer_id transfer, ept_error *error);
/* Failures of transfers that nobody holds a handle of: OK with the next one in `error`, LATER where there is none. */
int32_t ept_engine_failure(ept_engine *engine, ept_error *error);

/* Small control messages, copied. `tag` selects at the receiver. Order is not promised. */
int32_t ept_engine_send(ept_engine *engine, uint32_t peer, uint64_t tag, const void *data, size_t length,
                        uint64_t timeout_ns, ept_error *error);
/* From `peer` (UINT32_MAX: any) with `tag`. *length: capacity on entry; a message that is longer stays and gives LIMIT.
 */
int32_t ept_engine_recv(ept_engine *engine, uint32_t peer, uint64_t tag, void *data, size_t *length, uint32_t *from,
                        uint64_t timeout_ns, ept_error *error);
int32_t ept_engine_max_message(ept_engine *engine, size_t *bytes);

/* Rule 10. `memory` 0: all. LOCAL: what this rank posted is complete. REMOTE: exports of the memory are revoked and the
 * peers that hold them have answered or are fenced. OK, TIMEOUT, or STUCK with the smallest thing to tear down. */
int32_t ept_engine_quiesce(ept_engine *engine, ept_memory_id memory, int32_t scope, uint64_t timeout_ns,
                           ept_error *error);

/* ==== moe: dispatch and combine =================================================================================== */

typedef enum ept_dtype {
  EPT_DTYPE_NONE = 0,
  EPT_DTYPE_F32 = 1,
  EPT_DTYPE_F16 = 2,
  EPT_DTYPE_BF16 = 3,
  EPT_DTYPE_E4M3 = 4,
  EPT_DTYPE_E5M2 = 5,
  EPT_DTYPE_E8M0 = 6,
  EPT_DTYPE_U8 = 7,
  EPT_DTYPE_I8 = 8,
  EPT_DTYPE_I32 = 9,
  EPT_DTYPE_I64 = 10,
  EPT_DTYPE_F4X2 = 11
} ept_dtype;

/* A tensor by DLPack's terms: strides in elements. Memory stays the caller's. data NULL: absent. */
typedef struct ept_tensor {
  void *data;
  int32_t dtype; /* ept_dtype */
  int32_t ndim;
  int64_t shape[3];
  int64_t strides[3];
  int32_t device; /* -1: CPU, else CUDA ordinal */
  int32_t reserved;
} ept_tensor;

typedef enum ept_layout {
  EPT_LAYOUT_ROWS = 0,
  EPT_LAYOUT_BY_RANK = 1,
  EPT_LAYOUT_CONTIGUOUS = 2,
  EPT_LAYOUT_MASKED = 3
} ept_layout;
typedef enum ept_scale_format { EPT_SCALES_FP32 = 0, EPT_SCALES_UE8M0 = 1 } ept_scale_format;

typedef struct ept_moe_config {
  uint32_t size;
  uint32_t world; /* checked against the engine; used alone by ept_moe_plan_get */
  uint32_t rank;
  uint32_t num_experts;
  uint32_t top_k;      /* 1 to 32 */
  uint32_t hidden;     /* elements of x; a row's payload is a multiple of 16 bytes */
  uint32_t max_tokens; /* of one call on one rank */
  uint32_t lanes;
  int32_t dtype;               /* of x and y: F32, F16, BF16 */
  int32_t dispatch_dtype;      /* of the payload on the wire: dtype, E4M3, or the caller's own quantised format */
  int32_t combine_dtype;       /* F32, F16, BF16 */
  int32_t scale_format;        /* ept_scale_format, of our own quantisation */
  float scale_epsilon;         /* 1e-4 by default */
  uint32_t caller_scale_bytes; /* most bytes of scales a row that a caller brings; 0: as our own quantisation */
  uint32_t alignment;          /* contiguous: each expert's group is padded to it */
  uint32_t threads;            /* 0: the cores */
  uint64_t buffer_bytes;       /* budget of one lane's registered memory; 0: whatever max_tokens takes */
  const int32_t *placement;    /* [num_experts] rank of each expert; NULL: blocks in rank order */
} ept_moe_config;

/* Bytes of registered memory, before anything is allocated; to the byte what is allocated. */
typedef struct ept_moe_plan {
  uint32_t size;
  uint32_t local_experts, max_local_experts; /* of this rank, and the most of any rank */
  uint32_t chunk_tokens;              /* a call of at most so many tokens fits: real halves; a longer one is streamed */
  uint64_t dispatch_row, combine_row; /* bytes */
  uint64_t dispatch_header, combine_header;
  uint64_t dispatch_recv, dispatch_send, combine_recv, combine_send; /* one slot */
  uint64_t lane_bytes;                                               /* all four, two slots, padded to pages */
  uint64_t arena_bytes;                                              /* all lanes */
  uint64_t max_rows;            /* most rows that one dispatch can bring: world * max_tokens */
  uint64_t max_contiguous_rows; /* in the contiguous layout, padding included */
} ept_moe_plan;
int32_t ept_moe_plan_get(const ept_moe_config *config, ept_moe_plan *plan, ept_error *error);

/* The lanes' memory and signals, shared by all AllToAlls of a group; grows to the largest. */
typedef struct ept_arena ept_arena;
int32_t ept_arena_create(ept_engine *engine, ept_arena **arena, ept_error *error);
int32_t ept_arena_close(ept_arena *arena, uint64_t timeout_ns, ept_error *error);
/* Collective, between steps: all memory of the lanes is given back on every rank, and taken again. In between every
 * call on an AllToAll of the arena, and making one, answers SUSPENDED. What is open stays so: routings, generations,
 * faults (a faulted lane must be reset before). Suspending twice, and resuming what is not suspended, does nothing. A
 * resume that one rank has no memory for fails on every rank, which stay suspended. */
int32_t ept_arena_suspend(ept_arena *arena, uint64_t timeout_ns, ept_error *error);
int32_t ept_arena_resume(ept_arena *arena, uint64_t timeout_ns, ept_error *error);

/* Who takes part: the epoch of the membership that is agreed, and the ranks it names, by rank 1 or 0. Told after the
 * engine has carried it out (ept_engine_mask, ept_engine_readmit). From the next dispatch_send on nothing goes to a
 * rank that is masked or is awaited from it, and its experts' share of a token is left out (ept_routing_lost). A rank
 * that is back takes part from the next reset on, which all ranks go on from with a generation not below `step`; until
 * then steps are refused with FAULT. Epochs only rise; an older one changes nothing. Never waits. */
int32_t ept_arena_members(ept_arena *arena, uint32_t epoch, const uint8_t *active /* [world] */, uint64_t step,
                          ept_error *error);
/* This process is a later life of its rank, and the other ranks have made so many AllToAlls: the first ones are made
 * here without them, and ept_moe_reset, which all ranks call, joins these to theirs. places: what ept_arena_places
 * gave at one of them, or NULL where all compute on CPUs. */
int32_t ept_arena_expect(ept_arena *arena, uint32_t objects, const void *places, size_t length, ept_error *error);
/* Where each rank computes, of those that have made an AllToAll: for ept_arena_expect of a rank whose process is
 * started again. Bytes for the same version of this library. places NULL: *length alone. */
int32_t ept_arena_places(ept_arena *arena, void *places, size_t *length, ept_error *error);
/* The highest generation of any lane that has begun. */
int32_t ept_arena_step(ept_arena *arena, uint64_t *step, ept_error *error);

typedef struct ept_moe ept_moe;
/* Collective: every rank calls it, in the same order, with the same config (MISMATCH names the field and both values).
 * May grow the arena, which waits until no step is under way. */
int32_t ept_moe_create(ept_arena *arena, const ept_moe_config *config, ept_moe **moe, ept_error *error);
int32_t ept_moe_close(ept_moe *moe, ept_error *error);
int32_t ept_moe_local_experts(ept_moe *moe, int32_t *ids /* [plan.local_experts] */);

/* What a dispatch brought: each row's source, token, experts and weights, and where it went. Counted references. */
typedef struct ept_routing ept_routing;
void ept_routing_retain(ept_routing *routing);
void ept_routing_release(ept_routing *routing);
/* Under which membership the dispatch was; `ranks` [world]: 1 for each that was masked; `lost` [tokens, top_k]: 1 where
 * the expert of this rank's token was at one of those, so that its share is missing. Either array may be NULL. */
int32_t ept_routing_lost(const ept_routing *routing, uint32_t *membership, uint8_t *ranks, uint8_t *lost);

typedef struct ept_dispatch_args {
  uint32_t size;
  uint32_t lane;
  ept_tensor x;            /* [tokens, hidden], unit inner stride, rows 16-byte aligned; dtype or dispatch_dtype */
  ept_tensor topk_ids;     /* [tokens, top_k] I32 or I64, -1: none; absent with `routing` */
  ept_tensor topk_weights; /* [tokens, top_k] F32, or absent */
  ept_tensor scales;       /* [tokens, n] the caller's own, with an x that is quantised already; or absent */
  ept_routing *routing;    /* dispatch by the routing of an earlier call; or NULL */
  uint8_t whole;           /* dispatch, not dispatch_send: may be streamed. x and scales live until recv returns */
  uint8_t reserved[7];
} ept_dispatch_args;
int32_t ept_moe_dispatch_send(ept_moe *moe, const ept_dispatch_args *args, ept_error *error);

/* Until the headers of all ranks are in. */
typedef struct ept_arrival {
  uint32_t size;
  uint32_t scale_bytes;     /* of a row; 0: none */
  uint64_t rows;            /* of all ranks */
  uint64_t contiguous_rows; /* in the contiguous layout, padding included */
  uint64_t max_rank_rows;   /* most rows of one rank */
  uint64_t max_expert_rows; /* most rows of one local expert */
  int32_t payload_format, scale_format;
  uint8_t has_weights;
  uint8_t reserved[7];
} ept_arrival;
int32_t ept_moe_dispatch_wait(ept_moe *moe, uint32_t lane, ept_arrival *arrival, ept_error *error);

/* Where to unpack. Absent tensors are not written. N: rows of the layout's first dimensions. */
typedef struct ept_dispatch_outputs {
  uint32_t size;
  int32_t layout;          /* ept_layout */
  ept_tensor x;            /* rows [N, hidden]; by_rank [world, N, hidden]; contiguous [N, hidden];
                              masked [local experts, N, hidden]; in elements of the payload */
  ept_tensor scales;       /* the same without hidden, then [blocks]; any strides (row or column layout) */
  ept_tensor counts;       /* [local experts] I32 */
  ept_tensor offsets;      /* [local experts + 1] I32: padded starts in the contiguous layout */
  ept_tensor topk_ids;     /* rows, by_rank: [.., top_k] I32, local expert or -1 */
  ept_tensor topk_weights; /* rows, by_rank: [.., top_k] F32; contiguous, masked: [..] the weight of that row */
  ept_tensor source;       /* [.., 2] I32: rank and token of each row; -1 where there is none */
} ept_dispatch_outputs;
/* CAPACITY (which, how many rows, how many fit) faults the lane and writes nothing outside. */
int32_t ept_moe_dispatch_recv(ept_moe *moe, uint32_t lane, const ept_dispatch_outputs *outputs, ept_routing **routing,
                              ept_error *error);

typedef struct ept_combine_args {
  uint32_t size;
  uint32_t lane;
  ept_routing *routing;
  int32_t layout;          /* of expert_out: that of the dispatch */
  uint8_t weights_applied; /* contiguous, masked: add only */
  uint8_t whole;           /* combine, not combine_send: may be streamed */
  uint8_t reserved[2];
  ept_tensor expert_out;   /* as dispatch_outputs.x, last dimension hidden; F32, F16, BF16 */
  ept_tensor topk_weights; /* [tokens, top_k] F32 of this rank's own tokens: late weights; or absent */
  ept_tensor row_weights;  /* rows, by_rank: [.., top_k] F32 to be summed beside; or absent */
} ept_combine_args;
int32_t ept_moe_combine_send(ept_moe *moe, const ept_combine_args *args, ept_error *error);
/* y [tokens, hidden] F32, F16 or BF16; row_weights [tokens, top_k] F32, or absent. */
int32_t ept_moe_combine_recv(ept_moe *moe, uint32_t lane, const ept_tensor *y, const ept_tensor *row_weights,
                             ept_error *error);

/* A lane that met an expired deadline, a lost peer or a capacity is faulted: its calls return FAULT at once, with the
 * first cause, until reset. */
int32_t ept_moe_check(ept_moe *moe, uint32_t lane, ept_error *error);
/* Collective over the ranks that are up: brings every lane of the arena to a common generation, empty, and takes in the
 * ranks that are back. LATER: the membership has moved; tell it (ept_arena_members) and call again. */
int32_t ept_moe_reset(ept_moe *moe, uint64_t timeout_ns, ept_error *error);

typedef struct ept_moe_stats {
  uint32_t size;
  uint32_t reserved;
  uint64_t generations[2];                 /* by phase, all lanes */
  uint64_t messages[2], bytes[2], rows[2]; /* sent to other ranks; messages are writes */
  uint64_t grants, acks;
  uint64_t ack_waits; /* sends that had to wait for a free slot */
} ept_moe_stats;
int32_t ept_moe_stats_get(ept_moe *moe, ept_moe_stats *stats);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif
