/* SPDX-License-Identifier: Apache-2.0
 *
 * minimal.c: the smallest backend that works, in plain C. Ranks of one process, one lock for all of them, arrays of
 * fixed length for everything. Read it with backend.h open, from the bottom up: the table says what there is, and what
 * isn't.
 *
 * Rule by rule: a WRITE is a memcpy inside post (1); its event is queued behind it, under the lock (3, 4, 5); post
 * takes what fits into the queues of both sides and says LATER to the rest (7); a key is 128 random bits, asked for
 * before a byte is written (12); who closes a peer or leaves is told to the others (11).
 */
#include <eptransport/backend.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_RANKS = 64, MAX_EXPORTS = 1024, DEPTH = 512, INBOX = 8192, MAX_SEND = 4096, VERSION = 1 };

typedef struct key {
  uint64_t words[2];
} key;

typedef struct export {
  ept_mem *mem; /* NULL: free */
  uint64_t offset, length;
  uint32_t rank, epoch; /* who may write */
  key key;
} export;

typedef enum { CLOSED, CALLING, UP, LOST } state;

typedef struct peer {
  state state;
  uint32_t epoch;
  ept_instance *instance; /* while UP */
} peer;

typedef struct queue {
  ept_event *events; /* a ring; `data` of a RECV is the queue's to free */
  uint32_t capacity, head, count;
} queue;

struct ept_worker {
  ept_instance *instance;
};

struct ept_instance {
  const ept_host *host;
  uint32_t rank, world, epoch;
  char job[64], secret[64];
  peer peers[MAX_RANKS];
  uint32_t consumed[MAX_RANKS]; /* immediates of each peer's present epoch */
  export exports[MAX_EXPORTS];
  queue inbox, own; /* what others sent; what became of what we sent */
  void *handed;     /* bytes that the last poll's RECV events point to: a list */
  ept_worker worker;
  ept_rail_counters counters;
  ept_instance *next; /* all that are open */
};

struct ept_mem {
  ept_instance *instance;
  ept_memory memory;
};

typedef struct blob {
  uint32_t version, rank, slot, reserved;
  uint64_t length;
  key key;
} blob;

struct ept_region {
  ept_instance *instance;
  blob blob;
};

typedef struct address {
  uint32_t version, rank, epoch, reserved;
  uint64_t self;
} address;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* guards all that follows, and every instance */
static ept_instance *everyone;
static _Thread_local ept_error last;

/* ---- small things ---- */

static int32_t fail(int32_t code, const char *operation, int64_t rank, const char *format, ...) {
  memset(&last, 0, sizeof last);
  last.code = code;
  last.peer = (int32_t)rank;
  snprintf(last.operation, sizeof last.operation, "%s", operation);
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(last.text, sizeof last.text, format, arguments);
  va_end(arguments);
  return code;
}

/* Into a struct of the caller's, which may be shorter than ours. */
static void give(void *out, const void *value, size_t size) {
  const uint32_t room = *(uint32_t *)out;
  memset(out, 0, room);
  memcpy(out, value, size < room ? size : room);
  *(uint32_t *)out = room;
}

static ept_event *push(queue *queue) {
  ept_event *event = &queue->events[(queue->head + queue->count++) % queue->capacity];
  memset(event, 0, sizeof *event);
  event->size = sizeof *event;
  return event;
}

static void tell(ept_instance *to, const ept_instance *about, int32_t code, const char *text) {
  ept_event *event = push(&to->inbox);
  event->kind = EPT_EVENT_PEER;
  event->peer = about->rank;
  event->epoch = about->epoch;
  event->code = code;
  event->text = text;
}

/* ---- open ---- */

static ept_caps capabilities(void) {
  ept_caps caps;
  memset(&caps, 0, sizeof caps);
  caps.memory_kinds = EPT_MEMORY_HOST;
  caps.max_message = 1 << 20;
  caps.max_send = MAX_SEND;
  caps.max_iov = 1;
  caps.immediate_bits = 32;
  caps.protection = EPT_PROTECTION_KEY;
  caps.passive_progress = 1;
  caps.can_revoke = 1;
  caps.operation_cost_ns = 100;
  return caps;
}

static int32_t probe(const ept_host *host, const ept_value *values, size_t count, ept_probe *report) {
  (void)host, (void)values, (void)count;
  ept_probe probe;
  memset(&probe, 0, sizeof probe);
  probe.caps = capabilities();
  probe.caps.size = sizeof probe.caps;
  snprintf(probe.summary, sizeof probe.summary, "up to %d ranks of this process", MAX_RANKS);
  give(report, &probe, sizeof probe);
  return EPT_OK;
}

static void close_instance(ept_instance *instance);

static int32_t open_instance(const ept_host *host, const ept_open_params *params, ept_instance **opened) {
  if (params->world > MAX_RANKS) {
    return fail(EPT_E_LIMIT, "open", -1, "minimal: %u ranks, at most %d", params->world, MAX_RANKS);
  }
  ept_instance *instance = calloc(1, sizeof *instance);
  if (!instance) return fail(EPT_E_NOMEM, "open", -1, "minimal: no memory for an instance");
  instance->host = host;
  instance->rank = params->rank;
  instance->world = params->world;
  instance->epoch = params->epoch;
  instance->worker.instance = instance;
  snprintf(instance->job, sizeof instance->job, "%s", params->job);
  snprintf(instance->secret, sizeof instance->secret, "%.*s", (int)params->secret_length, (const char *)params->secret);
  instance->inbox.capacity = INBOX;
  instance->own.capacity = 2 * DEPTH;
  instance->inbox.events = calloc(INBOX, sizeof(ept_event));
  instance->own.events = calloc(2 * DEPTH, sizeof(ept_event));
  if (!instance->inbox.events || !instance->own.events) {
    close_instance(instance);
    return fail(EPT_E_NOMEM, "open", -1, "minimal: no memory for %d events", INBOX);
  }
  pthread_mutex_lock(&lock);
  instance->next = everyone;
  everyone = instance;
  pthread_mutex_unlock(&lock);
  *opened = instance;
  return EPT_OK;
}

/* With the lock held: ends what is between two ranks, and tells the other. */
static void part(ept_instance *instance, uint32_t rank, const char *why) {
  peer *mine = &instance->peers[rank];
  if (mine->state == UP) {
    peer *theirs = &mine->instance->peers[instance->rank];
    theirs->state = LOST;
    tell(mine->instance, instance, EPT_E_PEER_LOST, why);
  }
  mine->state = LOST;
}

static void free_handed(ept_instance *instance) {
  while (instance->handed) {
    void *next = *(void **)instance->handed;
    free(instance->handed);
    instance->handed = next;
  }
}

static void close_instance(ept_instance *instance) {
  pthread_mutex_lock(&lock);
  for (ept_instance **each = &everyone; *each; each = &(*each)->next) {
    if (*each == instance) {
      *each = instance->next;
      break;
    }
  }
  for (uint32_t rank = 0; rank < instance->world; ++rank) part(instance, rank, "the rank is gone");
  for (ept_instance *each = everyone; each; each = each->next) { /* who called and was not answered */
    peer *caller = &each->peers[instance->rank];
    if (caller->state == CALLING && caller->epoch == instance->epoch && !strcmp(each->job, instance->job)) {
      caller->state = LOST;
      tell(each, instance, EPT_E_PEER_LOST, "the rank is gone");
    }
  }
  pthread_mutex_unlock(&lock);
  for (uint32_t i = 0; i < instance->inbox.count; ++i) {
    const ept_event *event = &instance->inbox.events[(instance->inbox.head + i) % INBOX];
    if (event->kind == EPT_EVENT_RECV) free((char *)event->data - sizeof(void *));
  }
  free_handed(instance);
  free(instance->inbox.events);
  free(instance->own.events);
  free(instance);
}

static int32_t caps(ept_instance *instance, ept_caps *out) {
  (void)instance;
  const ept_caps caps = capabilities();
  give(out, &caps, sizeof caps);
  return EPT_OK;
}

static int32_t rails(ept_instance *instance, ept_rail *out, uint32_t capacity, uint32_t *count) {
  *count = 1;
  if (!capacity) return EPT_OK;
  memset(out, 0, sizeof *out);
  out->size = sizeof *out;
  snprintf(out->name, sizeof out->name, "minimal");
  out->numa = -1;
  out->max_regions = MAX_EXPORTS;
  out->max_peers = instance->world;
  out->cq_depth = INBOX - 4 * MAX_RANKS; /* room for PEER and FENCED events is kept */
  out->tx_depth = DEPTH;
  return EPT_OK;
}

/* ---- peers ---- */

static int32_t local_address(ept_instance *instance, void *out, size_t *length) {
  const address mine = {VERSION, instance->rank, instance->epoch, 0, (uint64_t)(uintptr_t)instance};
  if (*length < sizeof mine) return fail(EPT_E_LIMIT, "local_address", -1, "minimal: %zu bytes of room", *length);
  memcpy(out, &mine, *length = sizeof mine);
  return EPT_OK;
}

/* With the lock held. NULL: not here. */
static ept_instance *find(const ept_instance *instance, const address *to) {
  for (ept_instance *each = everyone; each; each = each->next) {
    if ((uint64_t)(uintptr_t)each == to->self && each->rank == to->rank && each->epoch == to->epoch &&
        !strcmp(each->job, instance->job) && !strcmp(each->secret, instance->secret)) {
      return each;
    }
  }
  return NULL;
}

static int32_t read_address(const void *bytes, size_t length, const char *operation, address *out) {
  if (length != sizeof *out) return fail(EPT_E_INVALID, operation, -1, "minimal: an address of %zu bytes", length);
  memcpy(out, bytes, sizeof *out);
  if (out->version == VERSION) return EPT_OK;
  return fail(EPT_E_VERSION, operation, -1, "minimal: an address of version %u", out->version);
}

static int32_t reach(ept_instance *instance, const void *bytes, size_t length, ept_reach *out) {
  ept_reach reach;
  memset(&reach, 0, sizeof reach);
  address to;
  int32_t code = read_address(bytes, length, "reach", &to);
  pthread_mutex_lock(&lock);
  if (code == EPT_OK && !find(instance, &to))
    code = fail(EPT_E_PEER_LOST, "reach", to.rank, "minimal: not in this process");
  pthread_mutex_unlock(&lock);
  if (code != EPT_OK) snprintf(reach.why_not, sizeof reach.why_not, "%.255s", last.text);
  reach.latency_ns = reach.operation_cost_ns = 100;
  reach.bytes_per_s = 10000000000u;
  give(out, &reach, sizeof reach);
  return code;
}

static int32_t peer_open(ept_instance *instance, uint32_t rank, uint32_t epoch, const void *bytes, size_t length) {
  address to;
  const int32_t code = read_address(bytes, length, "peer_open", &to);
  if (code != EPT_OK) return code;
  if (rank >= instance->world || to.rank != rank || to.epoch != epoch) {
    return fail(EPT_E_INVALID, "peer_open", rank, "minimal: rank %u, epoch %u; the address says %u, %u", rank, epoch,
                to.rank, to.epoch);
  }
  pthread_mutex_lock(&lock);
  ept_instance *other = find(instance, &to);
  peer *mine = &instance->peers[rank];
  if (mine->state == UP || mine->state == CALLING) {
    pthread_mutex_unlock(&lock);
    return fail(EPT_E_INVALID, "peer_open", rank, "minimal: rank %u is open already", rank);
  }
  mine->state = CALLING;
  mine->epoch = epoch;
  instance->consumed[rank] = 0;
  if (!other) {
    mine->state = LOST;
    ept_event *event = push(&instance->inbox);
    event->kind = EPT_EVENT_PEER;
    event->peer = rank;
    event->epoch = epoch;
    event->code = EPT_E_PEER_LOST;
    event->text = "nobody of this job lives at that address";
  } else if (other == instance ||
             (other->peers[instance->rank].state == CALLING && other->peers[instance->rank].epoch == instance->epoch)) {
    peer *theirs = &other->peers[instance->rank];
    mine->state = theirs->state = UP;
    mine->instance = other;
    theirs->instance = instance;
    tell(instance, other, EPT_OK, NULL);
    if (other != instance) tell(other, instance, EPT_OK, NULL);
  }
  pthread_mutex_unlock(&lock);
  return EPT_OK;
}

static int32_t peer_state(ept_instance *instance, uint32_t rank) {
  pthread_mutex_lock(&lock);
  const state state = rank < instance->world ? instance->peers[rank].state : CLOSED;
  pthread_mutex_unlock(&lock);
  if (state == UP) return EPT_OK;
  if (state == CALLING) return EPT_LATER;
  if (state == LOST) return fail(EPT_E_PEER_LOST, "peer_state", rank, "minimal: rank %u is lost", rank);
  return fail(EPT_E_INVALID, "peer_state", rank, "minimal: rank %u is not open", rank);
}

static int32_t peer_close(ept_instance *instance, uint32_t rank) {
  if (rank >= instance->world) return fail(EPT_E_INVALID, "peer_close", rank, "minimal: no rank %u", rank);
  pthread_mutex_lock(&lock);
  part(instance, rank, "the peer closed us");
  instance->peers[rank].state = CLOSED;
  pthread_mutex_unlock(&lock);
  return EPT_OK;
}

/* Every write is over when its post returns, and asks for UP under the lock: so a fence is done at once. */
static int32_t peer_fence(ept_instance *instance, uint32_t rank, uint32_t epoch, uint64_t cookie) {
  if (rank >= instance->world) return fail(EPT_E_INVALID, "peer_fence", rank, "minimal: no rank %u", rank);
  pthread_mutex_lock(&lock);
  if (instance->inbox.count >= INBOX - MAX_RANKS) {
    pthread_mutex_unlock(&lock);
    return EPT_LATER;
  }
  if (instance->peers[rank].epoch <= epoch) part(instance, rank, "fenced");
  ept_event *event = push(&instance->inbox);
  event->kind = EPT_EVENT_FENCED;
  event->peer = rank;
  event->epoch = epoch;
  event->immediate = instance->consumed[rank];
  event->cookie = cookie;
  pthread_mutex_unlock(&lock);
  return EPT_OK;
}

static int32_t worker_open(ept_instance *instance, ept_worker **worker) {
  *worker = &instance->worker;
  return EPT_OK;
}

static void worker_close(ept_worker *worker) { (void)worker; }

/* ---- memory ---- */

static int32_t mem_register(ept_instance *instance, const ept_memory *memory, ept_mem **mem) {
  if (memory->kind != EPT_MEMORY_HOST) {
    return fail(EPT_E_UNSUPPORTED, "mem_register", -1, "minimal: memory of kind %d; HOST alone", memory->kind);
  }
  if (!(*mem = malloc(sizeof **mem))) return fail(EPT_E_NOMEM, "mem_register", -1, "minimal: no memory");
  (*mem)->instance = instance;
  (*mem)->memory = *memory;
  return EPT_OK;
}

static int32_t mem_deregister(ept_mem *mem) {
  pthread_mutex_lock(&lock);
  for (int slot = 0; slot < MAX_EXPORTS; ++slot) {
    export *each = &mem->instance->exports[slot];
    if (each->mem == mem) memset(each, 0, sizeof *each);
  }
  pthread_mutex_unlock(&lock);
  free(mem);
  return EPT_OK;
}

static int32_t region_export(ept_mem *mem, uint32_t rank, uint64_t offset, uint64_t length, void *bytes,
                             size_t *bytes_length, uint64_t *name) {
  ept_instance *instance = mem->instance;
  if (!(mem->memory.access & EPT_ACCESS_REMOTE_WRITE))
    return fail(EPT_E_ACCESS, "region_export", rank, "minimal: no right to write");
  if (offset > mem->memory.length || length > mem->memory.length - offset || rank >= instance->world ||
      *bytes_length < sizeof(blob)) {
    return fail(EPT_E_INVALID, "region_export", rank, "minimal: no such range, rank or room");
  }
  pthread_mutex_lock(&lock);
  uint32_t slot = 0;
  while (slot < MAX_EXPORTS && instance->exports[slot].mem) ++slot;
  if (slot < MAX_EXPORTS) {
    export *entry = &instance->exports[slot];
    entry->mem = mem;
    entry->offset = offset;
    entry->length = length;
    entry->rank = rank;
    entry->epoch = rank == instance->rank ? instance->epoch : instance->peers[rank].epoch;
    instance->host->random(instance->host->context, &entry->key, sizeof entry->key);
    const blob out = {VERSION, instance->rank, slot, 0, length, entry->key};
    memcpy(bytes, &out, *bytes_length = sizeof out);
    *name = entry->key.words[0];
  }
  pthread_mutex_unlock(&lock);
  return slot < MAX_EXPORTS ? EPT_OK
                            : fail(EPT_E_LIMIT, "region_export", rank, "minimal: %d exports at most", MAX_EXPORTS);
}

static int32_t region_revoke(ept_mem *mem, uint32_t rank, uint64_t name) {
  int32_t code = EPT_E_INVALID;
  pthread_mutex_lock(&lock);
  for (int slot = 0; slot < MAX_EXPORTS; ++slot) {
    export *each = &mem->instance->exports[slot];
    if (each->mem != mem || each->rank != rank || each->key.words[0] != name) continue;
    memset(each, 0, sizeof *each);
    code = EPT_OK;
  }
  pthread_mutex_unlock(&lock);
  return code == EPT_OK ? code : fail(code, "region_revoke", rank, "minimal: no such key");
}

static int32_t region_import(ept_instance *instance, uint32_t rank, const void *bytes, size_t length,
                             ept_region **region) {
  blob in;
  if (length != sizeof in) return fail(EPT_E_INVALID, "region_import", rank, "minimal: a blob of %zu bytes", length);
  memcpy(&in, bytes, sizeof in);
  if (in.version != VERSION)
    return fail(EPT_E_VERSION, "region_import", rank, "minimal: a blob of version %u", in.version);
  if (in.rank != rank) return fail(EPT_E_INVALID, "region_import", rank, "minimal: the blob is of rank %u", in.rank);
  if (!(*region = malloc(sizeof **region))) return fail(EPT_E_NOMEM, "region_import", rank, "minimal: no memory");
  (*region)->instance = instance;
  (*region)->blob = in;
  return EPT_OK;
}

static void region_drop(ept_region *region) { free(region); }

/* ---- operations ---- */

/* Rule 12, with the lock held. NULL: refused. */
static export *allowed(const ept_instance *self, ept_instance *target, const ept_op *op) {
  const blob *blob = &op->region->blob;
  if (blob->slot >= MAX_EXPORTS) return NULL;
  export *entry = &target->exports[blob->slot];
  const uint64_t length = op->kind == EPT_OP_WRITE ? op->length : 0;
  const int good = entry->mem && entry->key.words[0] == blob->key.words[0] &&
                   entry->key.words[1] == blob->key.words[1] && entry->rank == self->rank &&
                   entry->epoch == self->epoch && op->offset <= entry->length && length <= entry->length - op->offset;
  return good ? entry : NULL;
}

static int32_t check(ept_instance *self, const ept_op *op) {
  if (op->size != sizeof *op || op->rail || op->peer >= self->world || self->peers[op->peer].state == CLOSED ||
      op->kind < EPT_OP_WRITE || op->kind > EPT_OP_SEND) {
    return fail(EPT_E_INVALID, "post", op->peer, "minimal: no such operation, rail or peer");
  }
  if (op->kind == EPT_OP_SEND) {
    return op->length <= MAX_SEND ? EPT_OK
                                  : fail(EPT_E_INVALID, "post", op->peer, "minimal: a SEND of over %d bytes", MAX_SEND);
  }
  if (!op->region || op->region->blob.rank != op->peer) {
    return fail(EPT_E_INVALID, "post", op->peer, "minimal: the region is not that peer's");
  }
  if (op->kind == EPT_OP_SIGNAL || !op->length) return EPT_OK;
  const ept_memory *memory = op->source_mem ? &op->source_mem->memory : NULL;
  const uint64_t start = memory ? (uint64_t)((uintptr_t)op->source - (uintptr_t)memory->address) : 0;
  if (!memory || !(memory->access & EPT_ACCESS_LOCAL) || start > memory->length ||
      op->length > memory->length - start) {
    return fail(EPT_E_INVALID, "post", op->peer, "minimal: the source is not registered for reading");
  }
  return op->length <= 1 << 20 ? EPT_OK : fail(EPT_E_INVALID, "post", op->peer, "minimal: a WRITE of over 1 MiB");
}

/* With the lock held. LATER, or EPT_OK: taken, whatever became of it. */
static int32_t carry(ept_instance *self, const ept_op *op) {
  ept_instance *target = self->peers[op->peer].instance;
  int32_t code = self->peers[op->peer].state == UP ? EPT_OK : EPT_E_PEER_LOST;
  if (self->peers[op->peer].state == CALLING || self->own.count >= DEPTH) return EPT_LATER;
  if (code == EPT_OK && target->inbox.count >= INBOX - 4 * MAX_RANKS) return EPT_LATER;

  const int message = op->kind == EPT_OP_SEND;
  export *entry = code == EPT_OK && !message ? allowed(self, target, op) : NULL;
  if (code == EPT_OK && !message && !entry) code = EPT_E_ACCESS;
  void *copy = NULL;
  if (code == EPT_OK && message) {
    if (!(copy = malloc(sizeof(void *) + op->length))) return EPT_LATER;
    if (op->length) memcpy((char *)copy + sizeof(void *), op->source, op->length);
  }
  if (code == EPT_OK) {
    const uint64_t length = op->kind == EPT_OP_SIGNAL ? 0 : op->length;
    if (entry && length) memcpy((char *)entry->mem->memory.address + entry->offset + op->offset, op->source, length);
    ept_event *event = push(&target->inbox);
    event->kind = message ? EPT_EVENT_RECV : EPT_EVENT_IMM;
    event->peer = self->rank;
    event->epoch = self->epoch;
    event->immediate = op->immediate;
    event->length = length;
    event->data = message ? (char *)copy + sizeof(void *) : NULL;
    if (message) {
      ++self->counters.tx_sends;
    } else {
      ++target->consumed[self->rank];
      ++self->counters.tx_operations;
      self->counters.tx_bytes += length;
    }
  }
  ept_event *end = push(&self->own);
  end->kind = code == EPT_OK ? EPT_EVENT_LOCAL_DONE : EPT_EVENT_ERROR;
  end->peer = op->peer;
  end->epoch = self->peers[op->peer].epoch;
  end->cookie = op->cookie;
  end->length = op->length;
  end->code = code;
  if (code == EPT_E_ACCESS) end->text = "minimal: the key, the bounds or the right were refused";
  if (code == EPT_E_PEER_LOST) end->text = "minimal: the peer is lost";
  self->counters.errors += code != EPT_OK;
  return EPT_OK;
}

static int32_t post(ept_worker *worker, const ept_op *ops, size_t count, size_t *posted) {
  ept_instance *self = worker->instance;
  int32_t code = EPT_OK;
  *posted = 0;
  pthread_mutex_lock(&lock);
  while (*posted < count && (code = check(self, &ops[*posted])) == EPT_OK &&
         (code = carry(self, &ops[*posted])) == EPT_OK) {
    ++*posted;
  }
  self->counters.later += code == EPT_LATER;
  pthread_mutex_unlock(&lock);
  return code;
}

static int32_t poll(ept_worker *worker, ept_event *events, size_t capacity) {
  ept_instance *self = worker->instance;
  queue *const queues[2] = {&self->inbox, &self->own};
  size_t n = 0;
  free_handed(self);
  pthread_mutex_lock(&lock);
  for (int which = 0; which < 2; ++which) {
    queue *queue = queues[which];
    /* The inbox takes half of the array at most while we have events of our own. */
    const size_t limit = which == 0 && self->own.count ? (capacity + 1) / 2 : capacity;
    for (; n < limit && queue->count; --queue->count) {
      const ept_event *event = &queue->events[queue->head];
      queue->head = (queue->head + 1) % queue->capacity;
      if (event->kind == EPT_EVENT_RECV) { /* its bytes stand behind a pointer's room for this list */
        void *bytes = (char *)event->data - sizeof(void *);
        *(void **)bytes = self->handed;
        self->handed = bytes;
        ++self->counters.rx_sends;
      } else if (event->kind == EPT_EVENT_IMM) {
        ++self->counters.rx_operations;
        self->counters.rx_bytes += event->length;
      }
      events[n++] = *event;
    }
  }
  pthread_mutex_unlock(&lock);
  return (int32_t)n;
}

static int32_t arm(ept_worker *worker, int32_t *descriptor) {
  (void)worker;
  *descriptor = -1; /* nothing to sleep on: the engine looks again by its clock */
  return EPT_OK;
}

static int32_t quiesce(ept_worker *worker, uint32_t rank, int32_t scope, uint64_t cookie) {
  (void)scope;
  ept_instance *self = worker->instance;
  pthread_mutex_lock(&lock);
  const int room = self->own.count < self->own.capacity;
  if (room) {
    ept_event *event = push(&self->own);
    event->kind = EPT_EVENT_QUIESCED;
    event->peer = rank;
    event->cookie = cookie;
  }
  pthread_mutex_unlock(&lock);
  return room ? EPT_OK : EPT_LATER;
}

static int32_t counters(ept_worker *worker, uint32_t rail, ept_rail_counters *out) {
  if (rail) return fail(EPT_E_INVALID, "counters", -1, "minimal: rail %u of 1", rail);
  give(out, &worker->instance->counters, sizeof *out);
  return EPT_OK;
}

static void last_error(ept_error *error) { give(error, &last, sizeof last); }

extern __attribute__((visibility("default"))) const ept_backend ept_backend_v1;
const ept_backend ept_backend_v1 = {
    .size = sizeof(ept_backend),
    .abi = EPT_BACKEND_ABI,
    .name = "minimal",
    .version = "1",
    .probe = probe,
    .open = open_instance,
    .close = close_instance,
    .caps = caps,
    .rails = rails,
    .local_address = local_address,
    .reach = reach,
    .peer_open = peer_open,
    .peer_state = peer_state,
    .peer_close = peer_close,
    .peer_fence = peer_fence,
    .worker_open = worker_open,
    .worker_close = worker_close,
    .mem_register = mem_register,
    .mem_deregister = mem_deregister,
    .region_export = region_export,
    .region_revoke = region_revoke,
    .region_import = region_import,
    .region_drop = region_drop,
    .post = post,
    .poll = poll,
    .arm = arm,
    .quiesce = quiesce,
    .counters = counters,
    .last_error = last_error,
};
