// SPDX-License-Identifier: Apache-2.0
// libibverbs as its manual pages would have it used: a reliable connection over the NIC's first port, RDMA write with
// immediate, both sides spinning on their completion queue. (perftest has no immediate.)
//
// Completions are counted absolutely, `done` here and `come` from the peer, since either may turn up while one waits
// for the other. Each write is signalled, as a loop that has no use for batches would have it; receives, which an
// immediate needs and which have no bytes, are given back 64 at a time.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <infiniband/verbs.h>

#include "loops.h"

// Macros of the header, for inline functions that call symbols: here they are asked for by dlsym, which gives the
// newest version of each, and those structs are the header's.
#undef ibv_get_device_list
#undef ibv_query_port
#undef ibv_reg_mr

const char *side_option = "";  // NIC:GID index; set before side_open
int side_variant = 0;

enum { kDepth = 256, kReceives = 4096, kReturn = 64, kInline = 64 };

typedef struct card {
  union ibv_gid gid;
  uint64_t address;
  uint32_t key, qpn, lid, mtu;
} card;

struct side {
  struct ibv_context *context;
  struct ibv_pd *pd;
  struct ibv_cq *cq;
  struct ibv_mr *mr;
  struct ibv_qp *qp;
  struct ibv_port_attr port;
  union ibv_gid gid;
  int gid_index;
  uint8_t *buffer, *landing, *source;
  uint64_t bytes, done, come, posted;
  uint32_t due, most_inline, rank;
  card peer;
  char detail[96];
};

#include "writes.h"

static struct {
  struct ibv_device **(*get_device_list)(int *);
  void (*free_device_list)(struct ibv_device **);
  const char *(*get_device_name)(struct ibv_device *);
  struct ibv_context *(*open_device)(struct ibv_device *);
  int (*close_device)(struct ibv_context *);
  int (*query_port)(struct ibv_context *, uint8_t, struct ibv_port_attr *);
  int (*query_gid)(struct ibv_context *, uint8_t, int, union ibv_gid *);
  struct ibv_pd *(*alloc_pd)(struct ibv_context *);
  int (*dealloc_pd)(struct ibv_pd *);
  struct ibv_mr *(*reg_mr)(struct ibv_pd *, void *, size_t, int);
  int (*dereg_mr)(struct ibv_mr *);
  struct ibv_cq *(*create_cq)(struct ibv_context *, int, void *, struct ibv_comp_channel *, int);
  int (*destroy_cq)(struct ibv_cq *);
  struct ibv_qp *(*create_qp)(struct ibv_pd *, struct ibv_qp_init_attr *);
  int (*modify_qp)(struct ibv_qp *, struct ibv_qp_attr *, int);
  int (*destroy_qp)(struct ibv_qp *);
  const char *(*wc_status_str)(enum ibv_wc_status);
} verbs;

static int bad(const char *what, int number) { return fail("%s: %s", what, strerror(number)); }

static int bind_all(void *library) {
#define TAKE(name) \
  if (!(*(void **)&verbs.name = dlsym(library, "ibv_" #name))) return fail("this libibverbs lacks ibv_" #name)
  TAKE(get_device_list);
  TAKE(free_device_list);
  TAKE(get_device_name);
  TAKE(open_device);
  TAKE(close_device);
  TAKE(query_port);
  TAKE(query_gid);
  TAKE(alloc_pd);
  TAKE(dealloc_pd);
  TAKE(reg_mr);
  TAKE(dereg_mr);
  TAKE(create_cq);
  TAKE(destroy_cq);
  TAKE(create_qp);
  TAKE(modify_qp);
  TAKE(destroy_qp);
  TAKE(wc_status_str);
#undef TAKE
  return 0;
}

static int open_nic(side *s, const char *name) {
  int count = 0;
  struct ibv_device **list = verbs.get_device_list(&count);
  for (int i = 0; list && i < count && !s->context; ++i)
    if (strcmp(verbs.get_device_name(list[i]), name) == 0) s->context = verbs.open_device(list[i]);
  const int number = errno;
  if (list) verbs.free_device_list(list);
  return s->context ? 0 : fail("NIC %s can't be opened: %s", name, strerror(number));
}

static int open_all(side *s, const char *name) {
  if (open_nic(s, name)) return -1;
  int code = verbs.query_port(s->context, 1, &s->port);
  if (code) return bad("ibv_query_port", code);
  if (verbs.query_gid(s->context, 1, s->gid_index, &s->gid)) return bad("ibv_query_gid", errno);
  if (!(s->pd = verbs.alloc_pd(s->context))) return bad("ibv_alloc_pd", errno);
  if (!(s->cq = verbs.create_cq(s->context, kDepth + kReceives, NULL, NULL, 0))) return bad("ibv_create_cq", errno);
  s->mr = verbs.reg_mr(s->pd, s->buffer, 2 * s->bytes, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE);
  if (!s->mr) return bad("ibv_reg_mr", errno);
  struct ibv_qp_init_attr init = {
      .send_cq = s->cq, .recv_cq = s->cq, .qp_type = IBV_QPT_RC, .cap = {kDepth, kReceives, 1, 1, kInline}};
  if (!(s->qp = verbs.create_qp(s->pd, &init))) return bad("ibv_create_qp", errno);
  s->most_inline = init.cap.max_inline_data < kInline ? init.cap.max_inline_data : kInline;
  struct ibv_qp_attr attributes = {.qp_state = IBV_QPS_INIT, .port_num = 1, .qp_access_flags = IBV_ACCESS_REMOTE_WRITE};
  code = verbs.modify_qp(s->qp, &attributes, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS);
  if (code) return bad("ibv_modify_qp to INIT", code);
  s->due = kReceives;
  snprintf(s->detail, sizeof s->detail, "%s, GID %d", name, s->gid_index);
  return 0;
}

static int give_receives(side *s) {
  struct ibv_recv_wr requests[kReturn], *refused = NULL;
  while (s->due >= kReturn) {
    for (int i = 0; i < kReturn; ++i)
      requests[i] = (struct ibv_recv_wr){.next = i + 1 < kReturn ? &requests[i + 1] : NULL};
    const int code = ibv_post_recv(s->qp, requests, &refused);
    if (code) return bad("ibv_post_recv", code);
    s->due -= kReturn;
  }
  return 0;
}

side *side_open(const char *path, uint64_t bytes) {
  void *library = dlopen(path, RTLD_NOW);
  side *s = calloc(1, sizeof *s);
  if (!library || !s || !(s->buffer = aligned_alloc(4096, 2 * bytes))) {
    fail("%s: %s", path, library ? "no memory" : dlerror());
    return NULL;
  }
  char name[64] = "";
  if (sscanf(side_option, "%63[^:]:%d", name, &s->gid_index) != 2) {
    fail("'%s' is not NIC:GID", side_option);
    return NULL;
  }
  s->landing = s->buffer;
  s->source = s->buffer + bytes;
  s->bytes = bytes;
  fill(s->landing, s->source, bytes);
  if (!bind_all(library) && !open_all(s, name) && !give_receives(s)) return s;
  side_close(s);
  return NULL;
}

const char *side_detail(side *s) { return s->detail; }

int side_address(side *s, uint8_t *blob, uint64_t *length) {
  const card mine = {.gid = s->gid,
                     .address = (uint64_t)(uintptr_t)s->landing,
                     .key = s->mr->rkey,
                     .qpn = s->qp->qp_num,
                     .lid = s->port.lid,
                     .mtu = s->port.active_mtu};
  if (*length < sizeof mine) return fail("no room for an address");
  memcpy(blob, &mine, sizeof mine);
  *length = sizeof mine;
  return 0;
}

int side_connect(side *s, const uint8_t *blob, uint64_t length, uint32_t rank) {
  if (length != sizeof s->peer) return fail("an address of %llu bytes", (unsigned long long)length);
  memcpy(&s->peer, blob, sizeof s->peer);
  s->rank = rank;
  struct ibv_qp_attr attributes = {
      .qp_state = IBV_QPS_RTR,
      .path_mtu = s->peer.mtu < s->port.active_mtu ? s->peer.mtu : s->port.active_mtu,
      .dest_qp_num = s->peer.qpn,
      .max_dest_rd_atomic = 1,
      .min_rnr_timer = 12,
      .ah_attr = {.is_global = s->port.link_layer == IBV_LINK_LAYER_ETHERNET,
                  .dlid = (uint16_t)s->peer.lid,
                  .port_num = 1,
                  .grh = {.dgid = s->peer.gid, .sgid_index = (uint8_t)s->gid_index, .hop_limit = 64}}};
  int code = verbs.modify_qp(s->qp, &attributes,
                             IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
                                 IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER);
  if (code) return bad("ibv_modify_qp to RTR", code);
  attributes.qp_state = IBV_QPS_RTS;
  attributes.timeout = 14;
  attributes.retry_cnt = attributes.rnr_retry = 6;
  attributes.max_rd_atomic = 1;
  code = verbs.modify_qp(
      s->qp, &attributes,
      IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN | IBV_QP_MAX_QP_RD_ATOMIC);
  return code ? bad("ibv_modify_qp to RTS", code) : 0;
}

static int poll_cq(side *s) {
  struct ibv_wc completions[32];
  const int count = ibv_poll_cq(s->cq, 32, completions);
  if (count < 0) return fail("ibv_poll_cq: %d", count);
  for (int i = 0; i < count; ++i) {
    if (completions[i].status != IBV_WC_SUCCESS)
      return fail("completion: %s", verbs.wc_status_str(completions[i].status));
    if (completions[i].opcode & IBV_WC_RECV) {
      ++s->come;
      ++s->due;
    } else {
      ++s->done;
    }
  }
  return s->due >= kReturn ? give_receives(s) : 0;
}

static int post(side *s, uint64_t offset, uint64_t bytes, deadline *end) {
  if (s->posted - s->done >= kDepth && until(s, &s->done, s->posted - kDepth + 1, end, "own writes")) return -1;
  struct ibv_sge range = {(uint64_t)(uintptr_t)(s->source + offset), (uint32_t)bytes, s->mr->lkey};
  struct ibv_send_wr request = {.sg_list = &range,
                                .num_sge = 1,
                                .opcode = IBV_WR_RDMA_WRITE_WITH_IMM,
                                .send_flags = IBV_SEND_SIGNALED | (bytes <= s->most_inline ? IBV_SEND_INLINE : 0),
                                .imm_data = (uint32_t)++s->posted,
                                .wr.rdma = {s->peer.address + offset, s->peer.key}};
  struct ibv_send_wr *refused = NULL;
  const int code = ibv_post_send(s->qp, &request, &refused);
  return code ? bad("ibv_post_send", code) : 0;
}

void side_close(side *s) {
  if (s->qp) verbs.destroy_qp(s->qp);
  if (s->mr) verbs.dereg_mr(s->mr);
  if (s->cq) verbs.destroy_cq(s->cq);
  if (s->pd) verbs.dealloc_pd(s->pd);
  if (s->context) verbs.close_device(s->context);
  free(s->buffer);
  free(s);
}
