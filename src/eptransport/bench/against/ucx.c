// SPDX-License-Identifier: Apache-2.0
// UCX by its UCP interface, as its own ucx_perftest uses it. Variant 1: tagged messages, a receive posted for each.
// Variant 2: puts; the target looks at the last byte, which is written last over tcp, and a stream ends with a flush,
// for a put has no signal at the target. Both sides progress their worker all the time.
#include <ucp/api/ucp.h>

#include "loops.h"

enum { kTag = 1, kPut = 2 };
int side_variant = kTag;

static const uint64_t kOrders = 64;  // bytes after the buffers: flags that a put raises

typedef struct card {
  uint64_t landing, address_length, key_length;
  uint8_t bytes[8192];
} card;

struct side {
  ucp_context_h context;
  ucp_worker_h worker;
  ucp_ep_h ep;
  ucp_mem_h memory;
  ucp_rkey_h key;
  uint8_t *buffer, *landing, *source;
  uint64_t bytes, peer_landing;
  uint32_t rank;
  uint8_t turn;
};

static int bad(const char *what, ucs_status_t status) { return fail("%s: %s", what, ucs_status_string(status)); }

static int open_all(side *s) {
  ucp_config_t *config;
  ucs_status_t status = ucp_config_read(NULL, NULL, &config);
  if (status != UCS_OK) return bad("ucp_config_read", status);
  ucp_params_t params = {.field_mask = UCP_PARAM_FIELD_FEATURES, .features = UCP_FEATURE_TAG | UCP_FEATURE_RMA};
  status = ucp_init(&params, config, &s->context);
  ucp_config_release(config);
  if (status != UCS_OK) return bad("ucp_init", status);
  ucp_worker_params_t worker = {.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE,
                                .thread_mode = UCS_THREAD_MODE_SINGLE};
  if ((status = ucp_worker_create(s->context, &worker, &s->worker)) != UCS_OK) return bad("ucp_worker_create", status);
  ucp_mem_map_params_t map = {
      .field_mask = UCP_MEM_MAP_PARAM_FIELD_ADDRESS | UCP_MEM_MAP_PARAM_FIELD_LENGTH,
      .address = s->buffer,
      .length = 2 * (s->bytes + kOrders),
  };
  if ((status = ucp_mem_map(s->context, &map, &s->memory)) != UCS_OK) return bad("ucp_mem_map", status);
  return 0;
}

side *side_open(const char *library, uint64_t bytes) {
  (void)library;
  side *s = calloc(1, sizeof *s);
  if (!s || !(s->buffer = aligned_alloc(64, 2 * (bytes + kOrders)))) {
    fail("no memory for %llu bytes", (unsigned long long)bytes);
    return NULL;
  }
  s->landing = s->buffer;
  s->source = s->buffer + bytes + kOrders;
  s->bytes = bytes;
  memset(s->buffer, 0, 2 * (bytes + kOrders));
  fill(s->landing, s->source, bytes);
  if (!open_all(s)) return s;
  side_close(s);
  return NULL;
}

const char *side_detail(side *s) {
  (void)s;
  return ucp_get_version_string();
}

int side_address(side *s, uint8_t *blob, uint64_t *length) {
  card mine = {.landing = (uint64_t)(uintptr_t)s->landing};
  ucp_address_t *address;
  void *key;
  size_t address_length, key_length;
  ucs_status_t status = ucp_worker_get_address(s->worker, &address, &address_length);
  if (status != UCS_OK) return bad("ucp_worker_get_address", status);
  if ((status = ucp_rkey_pack(s->context, s->memory, &key, &key_length)) != UCS_OK) return bad("ucp_rkey_pack", status);
  if (address_length + key_length > sizeof mine.bytes || *length < sizeof mine) return fail("no room for an address");
  mine.address_length = address_length;
  mine.key_length = key_length;
  memcpy(mine.bytes, address, address_length);
  memcpy(mine.bytes + address_length, key, key_length);
  ucp_worker_release_address(s->worker, address);
  ucp_rkey_buffer_release(key);
  memcpy(blob, &mine, sizeof mine);
  *length = sizeof mine;
  return 0;
}

int side_connect(side *s, const uint8_t *blob, uint64_t length, uint32_t rank) {
  card theirs;
  if (length != sizeof theirs) return fail("an address of %llu bytes", (unsigned long long)length);
  memcpy(&theirs, blob, sizeof theirs);
  ucp_ep_params_t ep = {.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS,
                        .address = (const ucp_address_t *)theirs.bytes};
  ucs_status_t status = ucp_ep_create(s->worker, &ep, &s->ep);
  if (status != UCS_OK) return bad("ucp_ep_create", status);
  status = ucp_ep_rkey_unpack(s->ep, theirs.bytes + theirs.address_length, &s->key);
  if (status != UCS_OK) return bad("ucp_ep_rkey_unpack", status);
  s->peer_landing = theirs.landing;
  s->rank = rank;
  return 0;
}

// A request until it is complete; NULL is one that already is.
static int finish(side *s, ucs_status_ptr_t request, deadline *end, const char *what) {
  if (UCS_PTR_IS_ERR(request)) return bad(what, UCS_PTR_STATUS(request));
  if (request == NULL) return 0;
  ucs_status_t status;
  while ((status = ucp_request_check_status(request)) == UCS_INPROGRESS) {
    ucp_worker_progress(s->worker);
    if (passed(end)) return fail("%s: not complete in time", what);
  }
  ucp_request_free(request);
  return status == UCS_OK ? 0 : bad(what, status);
}

static const ucp_request_param_t kPlain = {0};

static ucs_status_ptr_t put(side *s, uint64_t from, uint64_t to, uint64_t bytes) {
  return ucp_put_nbx(s->ep, s->source + from, bytes, s->peer_landing + to, s->key, &kPlain);
}

static ucs_status_ptr_t give(side *s, uint64_t offset, uint64_t bytes) {
  return side_variant == kPut ? put(s, offset, offset, bytes)
                              : ucp_tag_send_nbx(s->ep, s->source + offset, bytes, 1, &kPlain);
}

static ucs_status_ptr_t take(side *s, uint64_t offset, uint64_t bytes) {
  return ucp_tag_recv_nbx(s->worker, s->landing + offset, bytes, 1, ~(ucp_tag_t)0, &kPlain);
}

static int until_byte(side *s, uint64_t offset, uint8_t value, deadline *end) {
  const volatile uint8_t *at = s->landing + offset;
  while (*at != value) {
    ucp_worker_progress(s->worker);
    if (passed(end)) return fail("the peer's put has not come in time");
  }
  return 0;
}

// One message from the peer into the start of the landing memory.
static int expect(side *s, uint64_t bytes, uint8_t mark, deadline *end) {
  if (side_variant == kPut) return until_byte(s, bytes - 1, mark, end);
  return finish(s, take(s, 0, bytes), end, "ucp_tag_recv_nbx");
}

int side_pingpong(side *s, uint64_t bytes, uint32_t count, double *one_way_ns, uint64_t timeout_ns) {
  deadline end = deadline_in(timeout_ns);
  const uint64_t last = bytes - 1;
  s->landing[last] = 0;  // no mark; nothing lands before this worker's first progress
  for (uint32_t i = 0; i < count; ++i) {
    const uint64_t before = now_ns();
    ucs_status_ptr_t sent = NULL;
    // Never 0, nor the mark of the turn before.
    const uint8_t mark = s->turn = (uint8_t)(s->turn % 100 + 1);
    s->source[last] = mark;
    if (s->rank == 0) sent = give(s, 0, bytes);
    if (expect(s, bytes, mark, &end)) return -1;
    if (s->landing[last] != mark) return fail("turn %u: the message came before its bytes", i);
    if (s->rank == 1) sent = give(s, 0, bytes);
    if (finish(s, sent, &end, "own message")) return -1;
    one_way_ns[i] = (double)(now_ns() - before) / 2;
  }
  s->source[last] = pattern(last);
  return 0;
}

// The ring of requests: slot i % depth is waited for before it is used again.
static int ring(side *s, uint64_t bytes, uint32_t count, uint32_t depth, int sends, deadline *end) {
  ucs_status_ptr_t *slots = calloc(depth, sizeof *slots);
  if (!slots) return fail("no memory for %u requests", depth);
  int code = 0;
  for (uint32_t i = 0; i < count && code == 0; ++i) {
    code = finish(s, slots[i % depth], end, "own messages");
    const uint64_t offset = i % depth * bytes;
    slots[i % depth] = NULL;
    if (code == 0) slots[i % depth] = sends ? give(s, offset, bytes) : take(s, offset, bytes);
    ucp_worker_progress(s->worker);
  }
  for (uint32_t i = 0; i < depth && code == 0; ++i) code = finish(s, slots[i], end, "own messages");
  free(slots);
  return code;
}

int side_stream(side *s, uint64_t bytes, uint32_t count, uint32_t depth, double *seconds, uint64_t timeout_ns) {
  deadline end = deadline_in(timeout_ns);
  const uint64_t before = now_ns();
  const uint8_t order = s->turn = (uint8_t)(s->turn % 100 + 1);
  s->source[s->bytes] = order;
  s->landing[s->bytes] = 0;
  int code = 0;
  if (s->rank == 0 || side_variant == kTag) code = ring(s, bytes, count, depth, s->rank == 0, &end);
  if (side_variant == kTag) {
    if (code == 0) code = finish(s, s->rank == 0 ? take(s, s->bytes, 1) : give(s, s->bytes, 1), &end, "answer");
  } else if (s->rank == 0) {
    if (code == 0) code = finish(s, ucp_ep_flush_nbx(s->ep, &kPlain), &end, "ucp_ep_flush_nbx");
    if (code == 0) code = finish(s, put(s, s->bytes, s->bytes, 1), &end, "last put");
    if (code == 0) code = until_byte(s, s->bytes, order, &end);
  } else {
    code = until_byte(s, s->bytes, order, &end);
    if (code == 0) code = finish(s, put(s, s->bytes, s->bytes, 1), &end, "answer");
  }
  *seconds = (double)(now_ns() - before) / 1e9;
  if (code == 0 && s->rank == 1) code = check(s->landing, 0, bytes * (count < depth ? count : depth));
  return code;
}

void side_close(side *s) {
  deadline end = deadline_in(2000000000u);
  const ucp_request_param_t force = {.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS, .flags = UCP_EP_CLOSE_FLAG_FORCE};
  if (s->key) ucp_rkey_destroy(s->key);
  if (s->ep) finish(s, ucp_ep_close_nbx(s->ep, &force), &end, "ucp_ep_close_nbx");
  if (s->memory) ucp_mem_unmap(s->context, s->memory);
  if (s->worker) ucp_worker_destroy(s->worker);
  if (s->context) ucp_cleanup(s->context);
  free(s->buffer);
  free(s);
}
