/* SPDX-License-Identifier: Apache-2.0
 *
 * ept_bench.h: the loops behind `eptransport bench`. Two families, so that a figure always stands beside its floor:
 *
 *   bare      what the machine itself can do: shared memory, a TCP socket, a mesh of sockets; no eptransport in them
 *   engine    the same exchange through eptransport.h
 *
 * Python makes the processes, the sockets and the groups, and calls these from each side. All take plain numbers and
 * pointers, return an ept_code, and leave a sentence for eptb_last_error. None waits longer than its timeout.
 * A private interface: installed with the package, promised to nobody.
 */
#ifndef EPT_BENCH_H
#define EPT_BENCH_H

#include "eptransport/eptransport.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Of the calling thread; never NULL. */
const char *eptb_last_error(void);

/* ---- bare: memory (memory.cc) -------------------------------------------------------------------------------------
 * A barrier over threads or processes that share `words` (three uint32, zeroed once). Who waits, sleeps. */
int32_t eptb_barrier(uint32_t *words, uint32_t parties, uint64_t timeout_ns);
/* Ends every wait there, now and later, with CLOSED: a rank has failed. */
int32_t eptb_barrier_break(uint32_t *words);
/* Two processes (side 0 and 1) hand a counter to each other through 128 shared, zeroed bytes: how fast the cores reach
 * each other now. `samples[iterations]`: one-way nanoseconds, written by side 0. */
int32_t eptb_atomics_pingpong(uint64_t *shared, uint32_t side, uint32_t iterations, double *samples,
                              uint64_t timeout_ns);
/* The floor of loopback: `count` messages of `bytes`, each a copy from one of `ring` buffers into another and an atomic
 * count, on one core. */
int32_t eptb_copy_rate(uint64_t bytes, uint64_t count, uint32_t ring, double *seconds);
/* Copies as a rank of a mesh would: lengths[i] bytes of each range, one after the other, into its own place. */
int32_t eptb_copy_ranges(uint8_t *destination, const uint8_t *source, const uint64_t *lengths, uint32_t count);

/* ---- bare: sockets (sockets.cc) -----------------------------------------------------------------------------------
 * `fd` is a connected TCP socket; each call sets what it needs (non-blocking, NODELAY) and sets blocking back. */
int32_t eptb_tcp_pingpong(int32_t fd, uint32_t side, uint64_t bytes, uint32_t iterations, double *samples,
                          uint64_t timeout_ns);
/* Side 0 writes `count` messages of `bytes`, blocking, from `ring` buffers in turn; side 1 reads them into `ring`
 * buffers in turn and answers one byte at the end. `buffers`: ring times bytes, the caller's, so that making them is
 * no part of what is measured. *seconds: side 0's, first write to the answer. */
int32_t eptb_tcp_stream(int32_t fd, uint32_t side, uint8_t *buffers, uint64_t bytes, uint32_t count, uint32_t ring,
                        double *seconds, uint64_t timeout_ns);
/* One phase of an all-to-all: to each peer send_bytes[peer] from `send` (packed in rank order, each range aligned to
 * 64), from each peer recv_bytes[peer] into `recv` (the same). fds[rank] is not looked at. Sleeps in poll when no
 * socket can move. */
int32_t eptb_mesh_exchange(const int32_t *fds, uint32_t world, uint32_t rank, const uint64_t *send_bytes,
                           const uint64_t *recv_bytes, const uint8_t *send, uint8_t *recv, uint64_t timeout_ns);

/* ---- engine (engine.cc) -------------------------------------------------------------------------------------------
 * A pair: `bytes` to write from and as many to land in, a signal, and the peer's counterpart of both. Opened once for
 * many runs, as every other side of the tables is, so that set-up is no part of what is measured. Both sides make the
 * same calls. `tag` keeps the set-up messages of one pair apart from those of another; both sides pass the same. */
typedef struct eptb_pair eptb_pair;
int32_t eptb_pair_open(ept_engine *engine, uint32_t peer, uint32_t side, uint64_t bytes, uint64_t tag,
                       uint64_t timeout_ns, eptb_pair **pair);
int32_t eptb_pair_pingpong(eptb_pair *pair, uint64_t bytes, uint32_t iterations, double *samples, uint64_t timeout_ns);
/* As eptb_tcp_stream: at most `ring` writes in flight, each from and into its own buffer. */
int32_t eptb_pair_stream(eptb_pair *pair, uint64_t bytes, uint32_t count, uint32_t ring, double *seconds,
                         uint64_t timeout_ns);
/* When the peer closes too; frees in any case. */
int32_t eptb_pair_close(eptb_pair *pair, uint64_t timeout_ns);
/* Two engines of one process driven by this one thread: `count` writes of `bytes` with a signal from `from` to `to`,
 * `batch` at a time by one ept_engine_scatter (batch 1: by ept_engine_write). */
int32_t eptb_engine_rate(ept_engine *from, uint32_t from_rank, ept_engine *to, uint32_t to_rank, uint64_t bytes,
                         uint64_t count, uint32_t batch, double *seconds, uint64_t timeout_ns);

/* ---- counting (records.cc) ----------------------------------------------------------------------------------------
 * ns[6]: nanoseconds of one record of each kind: an operation posted, completed, received; a message of a phase; its
 * arrival; a wait. */
int32_t eptb_record_costs(uint64_t count, double *ns);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif
