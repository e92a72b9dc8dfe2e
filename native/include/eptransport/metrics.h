/* SPDX-License-Identifier: Apache-2.0
 *
 * metrics.h: the page in which an engine counts what it does, for whoever looks on from outside (`eptransport top`).
 *
 * THE PAGE
 *   One file an engine, /dev/shm/eptransport-<uid>-<pid>-<random>, mode 0600:
 *     ept_metrics_page, then `rails` of ept_metrics_rail at rail_offset, then `world` of ept_metrics_peer at
 *     peer_offset (that of this rank itself stays zero). Offsets and sizes of entries stand in the head, so a reader of
 *     this version can read a page whose entries have grown at their end. Little endian, as the machine that wrote it.
 *
 * INVARIANTS
 *  - The file gets its name when the head is filled in and does not change any more: `magic` is there or the page is
 *    none. Layout fields are written once. What counts is a naturally aligned 64-bit word, written whole with a relaxed
 *    store or add, so a reader sees an older or a newer value, never half of one. Words are not read at one instant:
 *    sums over them may be off by what happened meanwhile, and no word depends on another.
 *  - A counter only goes up in the life of a page (a reader takes differences); a gauge is what it was when written.
 *    Gauges and the rails' counters are copied in when the engine is about to sleep and while it works, some hundred
 *    times a second at most; everything else is counted where it happens.
 *  - The owner holds an exclusive flock on the file as long as it lives, however it dies. Who can lock it may remove
 * it: nobody writes there any more. (A pid may have been given out again; a lock can't have been.)
 *  - Nothing here is ever read back by the engine: a page that somebody scribbles on misleads readers, not transfers.
 */
#ifndef EPT_METRICS_H
#define EPT_METRICS_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define EPT_METRICS_MAGIC 0x315352544d545045 /* "EPTMTRS1" */
#define EPT_METRICS_VERSION 1
/* A file's name starts with it, then the uid; see above. */
#define EPT_METRICS_PREFIX "eptransport-"

/* What a peer's messages are for. */
typedef enum ept_metrics_phase_id {
  EPT_METRICS_DISPATCH = 0,
  EPT_METRICS_COMBINE = 1,
  EPT_METRICS_WEIGHTS = 2, /* late weights, sent when combine is called */
  EPT_METRICS_TRANSFER = 3 /* waits of the point-to-point interface; its bytes are those of the peer less the phases' */
} ept_metrics_phase_id;
#define EPT_METRICS_PHASES 4

/* Bucket b of a histogram counts values v of nanoseconds with 2^(b-1) < v <= 2^b; bucket 0 those up to 1, the last one
 * all above 2^38 (275 s, near the default deadline). */
#define EPT_METRICS_BUCKETS 40

typedef struct ept_metrics_histogram {
  uint64_t count, sum_ns, max_ns;
  uint64_t buckets[EPT_METRICS_BUCKETS];
} ept_metrics_histogram;

/* One peer in one phase. TRANSFER has waits alone. */
typedef struct ept_metrics_phase {
  uint64_t tx_bytes, tx_messages, tx_rows; /* posted to it; headers count as bytes */
  uint64_t rx_bytes, rx_messages, rx_rows; /* taken from it */
  uint64_t tx_later;                       /* times the engine's queue to it was full */
  uint64_t tx_grants, tx_acks;             /* chunks granted to it; slots acknowledged by a message of their own */
  uint64_t waiting_since_ns;               /* gauge: a wait for it that goes on now; 0: none */
  uint64_t waiting_expected, waiting_seen; /* gauges of that wait: the count, or 0 where no count is waited for */
  ept_metrics_histogram waits;             /* the wait matrix: how long this rank's calls stood still for this peer */
  ept_metrics_histogram arrivals; /* from the begin of this rank's call until the peer's first chunk was here */
} ept_metrics_phase;

/* One peer, all its traffic, as the engine sees it. */
typedef struct ept_metrics_peer {
  uint64_t tx_bytes, tx_operations; /* payload of writes that the backend took; writes and signals, grants included */
  uint64_t rx_bytes, rx_operations; /* the same, landed here */
  uint64_t tx_sends, rx_sends;      /* small messages */
  uint64_t later;                   /* times the backend had no room for it */
  uint64_t retries;                 /* posts of operations that it had had no room for */
  uint64_t held;                    /* writes that were queued for want of credits or room */
  uint64_t refused;                 /* calls that were told LATER since that queue was full */
  uint64_t failed;                  /* operations that ended with an error */
  uint64_t credits_spent, credits_granted; /* by us; to us */
  uint64_t status, epoch;                  /* gauges from here: ept_peer_status */
  uint64_t credits, queued, in_flight;
  uint64_t last_sign_ns;             /* CLOCK_MONOTONIC */
  ept_metrics_histogram completions; /* from the post of an operation to its local completion */
  ept_metrics_phase phases[EPT_METRICS_PHASES];
} ept_metrics_peer;

/* As ept_rail_counters of backend.h; what a backend doesn't count is zero. */
typedef struct ept_metrics_rail {
  char name[64];
  uint64_t bits_per_s;
  uint64_t tx_bytes, tx_operations, rx_bytes, rx_operations, tx_sends, rx_sends;
  uint64_t later, errors;
  uint64_t reconnects, replayed;
} ept_metrics_rail;

typedef struct ept_metrics_page {
  uint64_t magic;
  uint32_t version, head_bytes;
  uint64_t bytes; /* of the whole page */
  uint32_t pid, uid;
  uint32_t rank, world;
  uint32_t epoch, rails;
  uint32_t rail_offset, rail_bytes;
  uint32_t peer_offset, peer_bytes;
  uint64_t opened_ns; /* CLOCK_MONOTONIC, which all processes of a machine share */
  char job[96], backend[16];
  /* gauges */
  uint64_t updated_ns;
  uint64_t registered_bytes, regions, signals, credits;
  uint64_t suspended;
  /* counters */
  uint64_t unknown_chans;
  uint64_t last_progress_ns; /* gauge: when the network last brought something */
  uint64_t stuck_reports;    /* deadlines that expired */
} ept_metrics_page;

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif
