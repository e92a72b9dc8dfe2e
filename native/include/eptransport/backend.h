/* SPDX-License-Identifier: Apache-2.0
 *
 * backend.h: the plugin ABI, version 1. All that a backend sees of eptransport, and all that eptransport sees of a
 * network. Plain C: no C++ type, exception or allocator crosses it. Read it top to bottom and you can write a backend;
 * plugins/loopback/ is the shortest real one, docs/writing-a-backend.md walks through it.
 *
 * A backend is a shared library that exports exactly one data symbol, `ept_backend_v1`, of type `ept_backend`. A later
 * ABI adds a symbol; the engine serves the newest one that a plugin exports. Every struct starts with its own size: a
 * reader uses no field past the size it is given, a writer zeroes what it does not know. Named features are asked for
 * with `query`, never guessed from a version.
 *
 * THE CONTRACT. `eptransport conformance` has checks for each rule, by number, for any backend that can start.
 *
 *  1 One-sided.     A WRITE moves `length` bytes from registered memory here into a registered region of a peer. The
 *                   target's application takes no part; its engine may have to poll.
 *  2 Unordered.     Nothing is promised about order, between operations or inside one.
 *  3 A signal counts transfers. An operation with an immediate gives exactly one IMM event at the target, after every
 *                   byte of that operation can be read there. Not by shard, page or retry. The engine makes signals of
 *                   immediates (wire.h); a backend only has to get this one rule right.
 *  4 Early arrivals count. An IMM event is delivered whether or not anyone waits for it.
 *  5 Zero length    operations with an immediate give an IMM event too.
 *  6 Local completion (LOCAL_DONE) says that the source may be reused, and nothing about the target.
 *  7 Posting never blocks and never allocates without bound. A full queue is an answer: LATER. The engine holds,
 *                   retries, and keeps the immediates in flight to a peer within the credits that peer granted.
 *  8 No call waits for another machine. Waiting, with deadlines, is the engine's business.
 *  9 Errors are values: a code, a sentence, the provider's errno, the peer, the cookie. None is swallowed, none aborts
 *                   the process. An operation that was accepted gives exactly one of LOCAL_DONE and ERROR.
 * 10 Quiesce has a scope. After DONE no thread of the backend and no NIC touches the memory. The other answer is STUCK,
 *                   with the smallest thing to tear down.
 * 11 A dead peer costs only the operations that involve it. `peer_fence` makes sure that nothing of an old epoch lands.
 * 12 Memory is safe. A write outside a region, with a wrong or revoked key, or without the right to write, changes
 *                   nothing at the target and fails at the initiator. Caps say who checks: NONE, REGION or KEY.
 * 13 Any number of peers, regions and signals up to limits that caps and rails name; past one, an error names it.
 *
 * A backend may waive rules 9 to 12 in its caps, no others, and says so there.
 *
 * THREADS. Two classes; the engine keeps them, a backend may lean on them, so most backends need no lock at all:
 *   [I] instance calls: one at a time for an instance, and no [W] call of that instance runs meanwhile.
 *   [W] worker calls: one at a time for a worker; different workers of an instance may run side by side.
 *   [A] any thread, any time.
 * Not promised: that two calls come from the same thread. Instances are independent; what they share inside a plugin is
 * the plugin's to lock. No call may block on a peer, and none but `arm`'s descriptor is ever slept on.
 *
 * ARRAYS of structs (operations, events, rails) have the stride of ABI 1; such structs do not grow within it.
 *
 * MEMORY. Pointers passed in live until the call returns unless a comment says longer. Objects are opaque structs which
 * the backend defines; each has the call that frees it beside the call that makes it.
 */
#ifndef EPTRANSPORT_BACKEND_H
#define EPTRANSPORT_BACKEND_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define EPT_BACKEND_ABI 1

/* Status of a call or an event. Negative values are errors; `ept_code_name` gives the name of each. */
typedef enum ept_code {
  EPT_OK = 0,
  EPT_LATER = 1,          /* not now: call again. From post: the queue is full; from peer_state: still connecting */
  EPT_E_INVALID = -1,     /* an argument is wrong; the sentence names it and its value */
  EPT_E_CONFIG = -2,      /* a setting is unknown, or its value is */
  EPT_E_UNAVAILABLE = -3, /* this backend can't run here; the sentence names the missing piece and its mend */
  EPT_E_UNSUPPORTED = -4, /* this backend can't do this at all */
  EPT_E_LIMIT = -5,       /* past a limit; the sentence names it */
  EPT_E_NOMEM = -6,       /* the machine refused memory, descriptors or pages to lock */
  EPT_E_IO = -7,          /* the network or the system said no; provider_errno has its number */
  EPT_E_TIMEOUT = -8,     /* a deadline passed */
  EPT_E_PEER_LOST = -9,   /* the peer is dead, closed, or was never reached */
  EPT_E_ACCESS = -10,     /* a key, a bound or a right was refused at the target (rule 12) */
  EPT_E_AUTH = -11,       /* the peer does not hold the job's secret */
  EPT_E_VERSION = -12,    /* the peer, a blob or a plugin speaks another version */
  EPT_E_MISMATCH = -13,   /* ranks disagree on a setting; the sentence has both values */
  EPT_E_CLOSED = -14,     /* the object was closed */
  EPT_E_STUCK = -15,      /* quiesce: can't be shown quiet; the sentence names the smallest thing to tear down */
  EPT_E_FAULT = -16,      /* a lane is faulted; reset it */
  EPT_E_CAPACITY = -17,   /* more rows or tokens than a buffer holds */
  EPT_E_INTERNAL = -18,   /* a bug of ours; the sentence says where */
  EPT_E_SUSPENDED = -19   /* the group gave its memory back; resume it */
} ept_code;

/* An error as a value. The caller owns it; `text` is always terminated. */
typedef struct ept_error {
  uint32_t size;          /* sizeof(ept_error), set by the caller */
  int32_t code;           /* ept_code */
  int32_t peer;           /* rank concerned, -1: none */
  int32_t provider_errno; /* the network's or the system's own number, 0: none */
  uint64_t expected;      /* an expired wait: the count it waited for */
  uint64_t seen;          /*   and the count it saw */
  uint64_t silent_ns;     /*   and how long ago the peer last made progress */
  char operation[64];     /* "dispatch_recv", "write", ... */
  char text[1024];        /* what, where, what it saw, what to do */
} ept_error;

/* ---- what the engine offers a backend --------------------------------------------------------------------------- */

typedef enum ept_log_level {
  EPT_LOG_DEBUG = 10,
  EPT_LOG_INFO = 20,
  EPT_LOG_WARNING = 30,
  EPT_LOG_ERROR = 40
} ept_log_level;

typedef struct ept_host {
  uint32_t size;
  void *context;                                               /* first argument of each function below */
  void (*log)(void *context, int32_t level, const char *text); /* [A] the only way to say anything */
  uint64_t (*clock_ns)(void *context);                         /* [A] monotonic */
  void (*random)(void *context, void *bytes, size_t length);   /* [A] from the system's generator */
  void (*hmac_sha256)(void *context, const void *key, size_t key_length, const void *data, size_t length,
                      uint8_t mac[32]);             /* [A] so that no plugin brings its own */
  void *(*cuda)(void *context, const char *symbol); /* [A] a driver entry point, NULL where there is no
                                                       driver; makes no call and no CUDA context */
} ept_host;

typedef enum ept_setting_type {
  EPT_SETTING_BOOL = 1, /* "0" or "1" */
  EPT_SETTING_INT = 2,  /* decimal, between min and max */
  EPT_SETTING_STRING = 3
} ept_setting_type;

/* A setting that a backend brings. The user writes EPT_<BACKEND>_<NAME>; the engine checks type and bounds. */
typedef struct ept_setting {
  uint32_t size;
  int32_t type;      /* ept_setting_type */
  const char *name;  /* lower case: "streams" */
  const char *value; /* the default, as text */
  int64_t min, max;  /* INT only */
  const char *doc;   /* one sentence; what it is for, unit included */
} ept_setting;

typedef struct ept_value {
  const char *name; /* of a setting */
  const char *text; /* checked; every setting of the backend is present, defaults included */
} ept_value;

/* ---- what a backend says of itself ------------------------------------------------------------------------------ */

typedef enum ept_memory_kind {
  EPT_MEMORY_HOST = 1,
  EPT_MEMORY_PINNED = 2,
  EPT_MEMORY_CUDA = 4,
  EPT_MEMORY_DMABUF = 8,
  EPT_MEMORY_SHM = 16
} ept_memory_kind;

typedef enum ept_protection {
  EPT_PROTECTION_NONE = 0,   /* nothing stops a wrong address (rule 12 waived) */
  EPT_PROTECTION_REGION = 1, /* bounds of registered memory are checked, keys are not secret */
  EPT_PROTECTION_KEY = 2     /* a long random key a region, peer and epoch, checked before a byte is written */
} ept_protection;

typedef struct ept_caps {
  uint32_t size;
  uint32_t memory_kinds;    /* OR of ept_memory_kind */
  uint64_t max_message;     /* bytes of one WRITE; the engine cuts longer ones */
  uint32_t max_send;        /* bytes of one SEND */
  uint32_t max_iov;         /* 1: one source range an operation */
  uint32_t immediate_bits;  /* 32 at least */
  int32_t protection;       /* ept_protection */
  uint8_t ordered_channel;  /* a rail to a peer keeps order (TCP stream, RC queue pair) */
  uint8_t passive_progress; /* writes land though the target never polls */
  uint8_t wait_descriptor;  /* arm gives a descriptor to sleep on */
  uint8_t can_revoke;       /* region_revoke takes effect at once */
  uint8_t can_replay;       /* a broken rail tells what was consumed, so that the sender may replay */
  uint8_t group_only;       /* no peer can be opened before join has ended on all ranks */
  uint8_t mapped;           /* region_map works for peers that reach says are mapped */
  uint8_t gpu_initiated;    /* kernels post by themselves (device half) */
  uint8_t needs_visible;    /* an IMM event says arrived, `visible` must complete before a GPU may read */
  uint8_t reserved[7];
  uint32_t operation_cost_ns; /* what one more operation costs the poster; the engine weighs coalescing by it */
  uint32_t waived;            /* bit n: rule n of the contract is waived (only 9 to 12) */
  const char *waived_why;     /* a sentence, NULL where nothing is waived */
} ept_caps;

/* One way out of this machine: a NIC port, an interface, or one of several streams over it. */
typedef struct ept_rail {
  uint32_t size;
  char name[64]; /* "eth0/1" */
  char pci[16];  /* "" : none */
  int32_t numa;  /* -1: unknown */
  uint32_t port;
  uint64_t bits_per_s; /* 0: unknown */
  char fabric[32];
  uint64_t max_regions, max_peers;
  uint32_t cq_depth; /* immediates that may wait unread here, of all peers together */
  uint32_t tx_depth; /* operations in flight before post says LATER */
} ept_rail;

/* What would happen here, or why not. Filled by probe, which starts nothing. */
typedef struct ept_probe {
  uint32_t size;
  ept_caps caps;
  char summary[256]; /* usable: what it would use ("3 interfaces, 2 streams a peer"); else what is missing */
  char mend[256];    /* not usable: how to get the missing piece */
} ept_probe;

/* What it costs to talk to one peer, or why it can't be reached. */
typedef struct ept_reach {
  uint32_t size;
  uint32_t latency_ns; /* one way, small message; an estimate */
  uint64_t bytes_per_s;
  uint32_t operation_cost_ns;
  uint8_t mapped; /* region_map will work for this peer */
  uint8_t reserved[3];
  char why_not[256]; /* where the call returned an error */
} ept_reach;

/* ---- objects ---------------------------------------------------------------------------------------------------- */

typedef struct ept_instance ept_instance; /* one opened backend of one rank          open / close */
typedef struct ept_worker ept_worker;     /* its queues; one owner at a time         worker_open / worker_close */
typedef struct ept_mem ept_mem;           /* registered local memory                 mem_register / mem_deregister */
typedef struct ept_region ept_region;     /* a peer's memory as this rank sees it    region_import / region_drop */

typedef struct ept_open_params {
  uint32_t size;
  uint32_t rank, world;
  uint32_t epoch;        /* of this rank: goes up each time its process starts again */
  const char *job;       /* names the group; two groups never meet */
  const uint8_t *secret; /* the job's secret */
  size_t secret_length;
  const ept_value *values; /* settings */
  size_t value_count;
  uint64_t dead_ns;      /* a peer that is silent so long while it owes an answer is dead */
  uint32_t credits;      /* immediates that one peer may have in flight to us, all rails together */
  uint32_t send_credits; /* SENDs that one peer may have in flight to us */
} ept_open_params;

typedef enum ept_memory_role {
  EPT_ROLE_DATA = 1,
  EPT_ROLE_SIGNAL = 2 /* polled words: writes to it must land in strict order */
} ept_memory_role;

typedef enum ept_access {
  EPT_ACCESS_LOCAL = 1,       /* may be a source */
  EPT_ACCESS_REMOTE_WRITE = 2 /* may be exported for writing */
} ept_access;

typedef struct ept_memory {
  uint32_t size;
  int32_t kind; /* one ept_memory_kind */
  void *address;
  uint64_t length;
  int32_t cuda_device; /* CUDA, DMABUF */
  int32_t fd;          /* DMABUF, SHM: stays the caller's; -1: none */
  uint64_t fd_offset;
  int32_t role;    /* ept_memory_role */
  uint32_t access; /* OR of ept_access */
} ept_memory;

/* ---- operations and events -------------------------------------------------------------------------------------- */

typedef enum ept_op_kind {
  EPT_OP_WRITE = 1,  /* bytes into a region, then the immediate */
  EPT_OP_SIGNAL = 2, /* the immediate alone; region names memory that the peer exported (EFA wants a key) */
  EPT_OP_SEND = 3,   /* a message of at most max_send bytes; copied before post returns; gives RECV there */
  EPT_OP_READ = 4    /* reserved */
} ept_op_kind;

typedef struct ept_op {
  uint32_t size;
  int32_t kind;        /* ept_op_kind */
  uint32_t peer;       /* rank */
  uint32_t rail;       /* index; below rail count of this instance */
  ept_mem *source_mem; /* WRITE with length > 0: the registration that holds `source` */
  const void *source;  /* stays untouched until LOCAL_DONE or ERROR (SEND: until post returns) */
  ept_region *region;  /* WRITE, SIGNAL */
  uint64_t offset;     /* from the start of the region */
  uint64_t length;     /* bytes, at most max_message */
  uint32_t immediate;  /* WRITE, SIGNAL */
  uint32_t flags;      /* 0; reserved */
  uint64_t cookie;     /* comes back in LOCAL_DONE or ERROR */
} ept_op;

typedef enum ept_event_kind {
  EPT_EVENT_LOCAL_DONE = 1, /* cookie: the source may be reused */
  EPT_EVENT_IMM = 2,        /* immediate, length, peer: a WRITE or SIGNAL is whole here */
  EPT_EVENT_RECV = 3,       /* data, length, peer: a SEND arrived; data lives until the next poll of this worker */
  EPT_EVENT_PEER = 4,       /* code OK: connected, LATER: suspect, error: lost. After lost: nothing more of that
                               epoch but ERROR events of operations that were accepted */
  EPT_EVENT_VISIBLE = 5,    /* cookie of `visible` */
  EPT_EVENT_QUIESCED = 6,   /* cookie of `quiesce`; code OK or STUCK */
  EPT_EVENT_FENCED = 7,     /* cookie of `peer_fence`; immediate: how many immediates were consumed on `rail` */
  EPT_EVENT_ERROR = 8       /* cookie of a failed operation (0: none can be named), code, provider_errno, text. While
                               the peer is not lost, an operation that gives ERROR gives no IMM at the target */
} ept_event_kind;

typedef struct ept_event {
  uint32_t size;
  int32_t kind;   /* ept_event_kind */
  uint32_t peer;  /* rank; UINT32_MAX: unknown (an IMM of a NIC that names no source) */
  uint32_t epoch; /* of that peer */
  uint32_t rail;
  uint32_t immediate;
  uint64_t cookie;
  uint64_t length;
  const void *data;
  int32_t code; /* ept_code */
  int32_t provider_errno;
  const char *text; /* a sentence, or NULL; lives until the next poll of this worker */
} ept_event;

/* One exchange of a collective join. The engine gathers what every rank wrote in round n and hands it to all in round
 * n + 1, through the bootstrap, so that no call has to wait. */
typedef struct ept_join {
  uint32_t size;
  uint32_t round;           /* 0, 1, ... */
  const void *const *blobs; /* [world] what each rank wrote in the round before; NULL in round 0 */
  const size_t *lengths;
  void *out; /* what this rank wants all to see after this round */
  size_t out_capacity;
  size_t out_length; /* set by the backend */
  uint8_t done;      /* set by the backend: joined, no further round */
  uint8_t reserved[7];
} ept_join;

typedef enum ept_scope { EPT_SCOPE_LOCAL = 1, EPT_SCOPE_REMOTE = 2 } ept_scope;

/* Monotonic counters of one rail, for metrics. */
typedef struct ept_rail_counters {
  uint32_t size;
  uint32_t reserved;
  uint64_t tx_bytes, tx_operations, rx_bytes, rx_operations; /* payload bytes of WRITE; WRITEs and SIGNALs; no SENDs */
  uint64_t tx_sends, rx_sends;
  uint64_t later, errors;
  uint64_t reconnects; /* times that a broken rail to a peer was made again, where rails keep order and can be */
  uint64_t replayed;   /* operations that were sent again over it; counted once in tx_operations and tx_sends */
} ept_rail_counters;

/* An entry of the device table: what a kernel needs to reach a peer, a region or a signal. `device.cuh` understands
 * `kind`; the layout behind each kind is versioned apart from this ABI (EPT_DEVICE_ABI). */
typedef enum ept_device_kind {
  EPT_DEVICE_NONE = 0,
  EPT_DEVICE_MAPPED = 1,
  EPT_DEVICE_PROXY = 2,
  EPT_DEVICE_GPU = 3
} ept_device_kind;

typedef struct ept_device_entry {
  uint32_t size;
  int32_t kind;     /* ept_device_kind */
  uint32_t version; /* EPT_DEVICE_ABI that the words below follow */
  uint32_t reserved;
  uint64_t words[8];
} ept_device_entry;

#define EPT_DEVICE_ABI 1

/* ---- the table ---------------------------------------------------------------------------------------------------
 * Every function returns an ept_code unless said otherwise, and on an error leaves a sentence for `last_error`.
 * NULL: unsupported; which may be NULL is marked (optional). Blob calls: `*length` holds the capacity on entry and the
 * length on return; a blob is opaque, starts with the backend's own version, and is at most 4 KiB. */
typedef struct ept_backend {
  uint32_t size;       /* sizeof(ept_backend) */
  uint32_t abi;        /* EPT_BACKEND_ABI */
  const char *name;    /* lower case, as in EPT_BACKEND: "tcp" */
  const char *version; /* of the plugin, free text */
  const ept_setting *settings;
  size_t setting_count;

  /* [A] Fills `report`. OK: can run here. UNAVAILABLE: what is missing, in report. Starts nothing, connects nothing. */
  int32_t (*probe)(const ept_host *host, const ept_value *values, size_t value_count, ept_probe *report);

  /* [A] `host` and the strings of `params` live until close. */
  int32_t (*open)(const ept_host *host, const ept_open_params *params, ept_instance **instance);
  /* [I] All workers, memory and peers are closed before. Returns when no thread of the backend is left. */
  void (*close)(ept_instance *instance);
  /* [I] What this instance really does; the engine compares it with what settings require. */
  int32_t (*caps)(ept_instance *instance, ept_caps *caps);
  /* [I] Fills at most `capacity` rails, returns their number in *count. The number never changes. */
  int32_t (*rails)(ept_instance *instance, ept_rail *rails, uint32_t capacity, uint32_t *count);
  /* [I] How peers find this instance. The engine ships it through the bootstrap. */
  int32_t (*local_address)(ept_instance *instance, void *blob, size_t *length);
  /* [I] Can the peer at this address be reached, and at what cost? Asked on both sides before a path is agreed. */
  int32_t (*reach)(ept_instance *instance, const void *address, size_t length, ept_reach *reach);
  /* [I] (optional) Collective. LATER: call the same round again. OK: gather `out` and call the next round, or `done`.
   */
  int32_t (*join)(ept_instance *instance, ept_join *join);

  /* [I] Starts connecting to `rank` under its `epoch`; returns at once. A PEER event tells the outcome. */
  int32_t (*peer_open)(ept_instance *instance, uint32_t rank, uint32_t epoch, const void *address, size_t length);
  /* [I] OK: connected. LATER: under way. Else the error that ended it. */
  int32_t (*peer_state)(ept_instance *instance, uint32_t rank);
  /* [I] Drops the peer. Operations under way give ERROR CLOSED. An orderly end, not a fence. */
  int32_t (*peer_close)(ept_instance *instance, uint32_t rank);
  /* [I] After its FENCED event (one a rail) nothing of that epoch can land here any more (rule 11). */
  int32_t (*peer_fence)(ept_instance *instance, uint32_t rank, uint32_t epoch, uint64_t cookie);

  /* [I] One worker drives all rails of an instance in ABI 1. */
  int32_t (*worker_open)(ept_instance *instance, ept_worker **worker);
  void (*worker_close)(ept_worker *worker);

  /* [I] (optional, both or none) The backend owns allocation, perhaps collectively: then every rank makes the same
   * calls in the same order, and a heap made in join lets each answer without waiting (NVSHMEM's symmetric heap). */
  int32_t (*mem_alloc)(ept_instance *instance, uint64_t length, int32_t kind, void **address);
  int32_t (*mem_free)(ept_instance *instance, void *address);
  /* [I] The memory stays the caller's and outlives the registration. */
  int32_t (*mem_register)(ept_instance *instance, const ept_memory *memory, ept_mem **mem);
  int32_t (*mem_deregister)(ept_mem *mem);

  /* [I] A blob that lets `rank` (and no other, where protection is KEY) write into [offset, offset + length) of `mem`
   * under its current epoch. Each call makes a key of its own, named by *key for revoke. */
  int32_t (*region_export)(ept_mem *mem, uint32_t rank, uint64_t offset, uint64_t length, void *blob,
                           size_t *blob_length, uint64_t *key);
  /* [I] From its return on nothing that carries the key changes memory, payload that is half received included. */
  int32_t (*region_revoke)(ept_mem *mem, uint32_t rank, uint64_t key);
  /* [I] The peer's blob as an object to write to. */
  int32_t (*region_import)(ept_instance *instance, uint32_t rank, const void *blob, size_t length, ept_region **region);
  void (*region_drop)(ept_region *region);
  /* [I] (optional) The peer's memory in this address space, where reach said mapped. Valid until region_drop. */
  int32_t (*region_map)(ept_region *region, void **address);

  /* [I] (optional, both or none) Signals that the network raises by itself, without IMM events at the target. */
  int32_t (*signal_export)(ept_mem *mem, uint32_t rank, uint64_t offset, void *blob, size_t *blob_length);
  int32_t (*signal_import)(ept_instance *instance, uint32_t rank, const void *blob, size_t length, ept_region **region);

  /* [W] Takes ops[0 .. *posted) and says in *posted how many. OK: all. LATER: the rest did not fit, post them again
   * after a poll. An error: ops[*posted] was refused (and gives no event); the ones behind it were not looked at. */
  int32_t (*post)(ept_worker *worker, const ept_op *ops, size_t count, size_t *posted);
  /* [W] Moves the network on and fills at most `capacity` events; returns their number, or an error of the worker
   * itself. Does a bounded amount of work. */
  int32_t (*poll)(ept_worker *worker, ept_event *events, size_t capacity);
  /* [W] OK: nothing is pending, and *descriptor (owned by the worker, always the same) becomes readable when poll would
   * find something or could send more, also for what is posted by another thread while the caller sleeps. LATER: poll
   * again, do not sleep. OK with -1: nothing is pending, and there is nothing to sleep on; the engine looks again soon.
   */
  int32_t (*arm)(ept_worker *worker, int32_t *descriptor);
  /* [W] (optional) A VISIBLE event when all that arrived from `rank` so far can be read by a GPU. */
  int32_t (*visible)(ept_worker *worker, uint32_t rank, uint64_t cookie);
  /* [W] A QUIESCED event when everything posted to `rank` (UINT32_MAX: all) has come to its LOCAL_DONE or ERROR and,
   * for scope REMOTE, can no longer change the target. */
  int32_t (*quiesce)(ept_worker *worker, uint32_t rank, int32_t scope, uint64_t cookie);

  /* [I] (optional, all or none) Device half: entries for the table that kernels read. */
  int32_t (*device_open)(ept_instance *instance, int32_t cuda_device);
  int32_t (*device_peer)(ept_instance *instance, uint32_t rank, ept_device_entry *entry);
  int32_t (*device_region)(ept_region *region, ept_device_entry *entry);
  int32_t (*device_signal)(ept_region *signal, ept_device_entry *entry);
  /* [I] (optional, both or none) Kernels linked with the backend's device library. */
  int32_t (*device_image)(ept_instance *instance, const void **image, size_t *length);
  int32_t (*device_module)(ept_instance *instance, void *cuda_module);

  /* [A] (optional) Value of a named feature; UNSUPPORTED: unknown. The engine asks for:
   *   "bulk"  1 while much payload is half received or unsent: the engine then sleeps on `arm` instead of spinning */
  int32_t (*query)(ept_instance *instance, const char *feature, int64_t *value);
  /* [W] */
  int32_t (*counters)(ept_worker *worker, uint32_t rail, ept_rail_counters *counters);
  /* [A] The calling thread's last error of this plugin: code, sentence, errno. */
  void (*last_error)(ept_error *error);
} ept_backend;

/* The one symbol: `extern const ept_backend ept_backend_v1;`, in C++ inside extern "C". Compiled with
 * -fvisibility=hidden, that first declaration needs __attribute__((visibility("default"))). */

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif
