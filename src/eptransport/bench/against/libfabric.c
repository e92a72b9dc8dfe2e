// SPDX-License-Identifier: Apache-2.0
// A provider of libfabric, reliable datagrams, as its manual pages would have it used: fi_writedata with remote CQ
// data, both sides spinning on their completion queue (no provider makes passive progress).
//
// Completions are counted absolutely, `done` here and `come` from the peer, since either may turn up while one waits
// for the other.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <rdma/fabric.h>
#include <rdma/fi_cm.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_errno.h>
#include <rdma/fi_rma.h>

#include "loops.h"

const char *side_option = "tcp";  // the provider, as FI_PROVIDER would have it; set before side_open
// kTransmit: a write is complete when its source may be reused, as the provider sees it. kDelivery: when its bytes are
// at the target, for which software providers send an answer. kSleeps: as kTransmit, with a queue that one may sleep
// on, as a library must have it that doesn't spin for ever; this loop spins all the same.
enum { kTransmit = 0, kDelivery = 1, kSleeps = 2 };
int side_variant = kTransmit;

typedef struct card {
  uint64_t address, key, name_length;
  uint8_t name[256];
} card;

struct side {
  struct fi_info *info;
  struct fid_fabric *fabric;
  struct fid_domain *domain;
  struct fid_av *av;
  struct fid_cq *cq;
  struct fid_ep *ep;
  struct fid_mr *mr;
  uint8_t *buffer, *landing, *source;
  uint64_t bytes, done, come, posted;
  fi_addr_t peer;
  uint64_t peer_address, peer_key;
  uint32_t rank;
  void (*freeinfo)(struct fi_info *);
  char detail[64];
};

#include "writes.h"

// The functions of the library that are symbols are asked for by dlsym: a reference that the linker resolves would
// name no version, and get the oldest. fi_fabric of 1.0 forgets which version of the interface it was asked for, and
// then providers refuse their own fi_info, or say nothing and never connect.
//
// Three of them take structs whose layout has grown: the newest version of the symbol is not the one of the headers of
// 1.17 and before. compiled.py has seen to it that newer headers come with their own library.
static void *versioned(void *library, const char *name) {
  if (FI_MAJOR_VERSION == 1 && FI_MINOR_VERSION <= 17) return dlvsym(library, name, "FABRIC_1.3");
  return dlsym(library, name);
}

static int bad(const char *what, long code) { return fail("%s: %s", what, fi_strerror((int)-code)); }

static int open_all(side *s, void *library) {
  int (*getinfo)(uint32_t, const char *, const char *, uint64_t, const struct fi_info *, struct fi_info **);
  struct fi_info *(*dupinfo)(const struct fi_info *);
  *(void **)&getinfo = versioned(library, "fi_getinfo");
  *(void **)&dupinfo = versioned(library, "fi_dupinfo");
  *(void **)&s->freeinfo = versioned(library, "fi_freeinfo");
  int (*open_fabric)(struct fi_fabric_attr *, struct fid_fabric **, void *);
  *(void **)&open_fabric = dlsym(library, "fi_fabric");
  if (!getinfo || !dupinfo || !s->freeinfo || !open_fabric)
    return fail("this libfabric lacks fi_getinfo as the headers have it");

  struct fi_info *hints = dupinfo(NULL);  // what fi_allocinfo is
  if (!hints) return fail("no memory for hints");
  hints->caps = FI_MSG | FI_RMA;
  hints->ep_attr->type = FI_EP_RDM;
  hints->domain_attr->threading = FI_THREAD_DOMAIN;
  hints->domain_attr->mr_mode = FI_MR_LOCAL | FI_MR_VIRT_ADDR | FI_MR_ALLOCATED | FI_MR_PROV_KEY;
  hints->domain_attr->data_progress = FI_PROGRESS_MANUAL;
  if (side_variant == kDelivery) hints->tx_attr->op_flags = FI_DELIVERY_COMPLETE;
  hints->fabric_attr->prov_name = strdup(side_option);
  const uint32_t api = FI_VERSION(FI_MAJOR_VERSION, FI_MINOR_VERSION);
  // Where endpoints have an address of IP it is that of this machine alone; the others name themselves.
  const int sockets = strncmp(side_option, "tcp", 3) == 0 || strncmp(side_option, "udp", 3) == 0 ||
                      strncmp(side_option, "net", 3) == 0 || strncmp(side_option, "sockets", 7) == 0;
  int code = getinfo(api, sockets ? "127.0.0.1" : NULL, NULL, sockets ? FI_SOURCE : 0, hints, &s->info);
  s->freeinfo(hints);
  if (code) return fail("fi_getinfo(%s, FI_EP_RDM): %s", side_option, fi_strerror((int)-code));
  snprintf(s->detail, sizeof s->detail, "provider %s", s->info->fabric_attr->prov_name);

  const enum fi_wait_obj wait = side_variant == kSleeps ? FI_WAIT_FD : FI_WAIT_NONE;
  struct fi_cq_attr cq = {.size = 1024, .format = FI_CQ_FORMAT_DATA, .wait_obj = wait};
  struct fi_av_attr av = {.type = FI_AV_UNSPEC, .count = 1};
  if ((code = open_fabric(s->info->fabric_attr, &s->fabric, NULL))) return bad("fi_fabric", code);
  if ((code = fi_domain(s->fabric, s->info, &s->domain, NULL))) return bad("fi_domain", code);
  if ((code = fi_av_open(s->domain, &av, &s->av, NULL))) return bad("fi_av_open", code);
  if ((code = fi_cq_open(s->domain, &cq, &s->cq, NULL))) return bad("fi_cq_open", code);
  if ((code = fi_endpoint(s->domain, s->info, &s->ep, NULL))) return bad("fi_endpoint", code);
  if ((code = fi_ep_bind(s->ep, &s->av->fid, 0))) return bad("fi_ep_bind av", code);
  if ((code = fi_ep_bind(s->ep, &s->cq->fid, FI_TRANSMIT | FI_RECV))) return bad("fi_ep_bind cq", code);
  if ((code = fi_enable(s->ep))) return bad("fi_enable", code);
  code = fi_mr_reg(s->domain, s->buffer, 2 * s->bytes, FI_WRITE | FI_REMOTE_WRITE, 0, 1, 0, &s->mr, NULL);
  if (code) return bad("fi_mr_reg", code);
  return 0;
}

side *side_open(const char *path, uint64_t bytes) {
  void *library = dlopen(path, RTLD_NOW);
  side *s = calloc(1, sizeof *s);
  if (!library || !s || !(s->buffer = aligned_alloc(4096, 2 * bytes))) {
    fail("%s: %s", path, library ? "no memory" : dlerror());
    return NULL;
  }
  s->landing = s->buffer;
  s->source = s->buffer + bytes;
  s->bytes = bytes;
  fill(s->landing, s->source, bytes);
  if (!open_all(s, library)) return s;
  side_close(s);
  return NULL;
}

const char *side_detail(side *s) { return s->detail; }

int side_address(side *s, uint8_t *blob, uint64_t *length) {
  card mine = {.name_length = sizeof mine.name};
  if (*length < sizeof mine) return fail("no room for an address");
  size_t used = sizeof mine.name;
  const int code = fi_getname(&s->ep->fid, mine.name, &used);
  if (code) return bad("fi_getname", code);
  mine.name_length = used;
  mine.key = fi_mr_key(s->mr);
  mine.address = s->info->domain_attr->mr_mode & FI_MR_VIRT_ADDR ? (uint64_t)(uintptr_t)s->landing : 0;
  memcpy(blob, &mine, sizeof mine);
  *length = sizeof mine;
  return 0;
}

int side_connect(side *s, const uint8_t *blob, uint64_t length, uint32_t rank) {
  card theirs;
  if (length != sizeof theirs) return fail("an address of %llu bytes", (unsigned long long)length);
  memcpy(&theirs, blob, sizeof theirs);
  if (fi_av_insert(s->av, theirs.name, 1, &s->peer, 0, NULL) != 1) return fail("fi_av_insert refused the address");
  s->peer_address = theirs.address;
  s->peer_key = theirs.key;
  s->rank = rank;
  return 0;
}

static int poll_cq(side *s) {
  struct fi_cq_data_entry entries[16];
  const ssize_t count = fi_cq_read(s->cq, entries, 16);
  if (count == -FI_EAGAIN) return 0;
  if (count < 0) {
    struct fi_cq_err_entry error = {0};
    if (count == -FI_EAVAIL && fi_cq_readerr(s->cq, &error, 0) == 1) return bad("completion", -(long)error.err);
    return bad("fi_cq_read", count);
  }
  for (ssize_t i = 0; i < count; ++i) *(entries[i].flags & FI_REMOTE_CQ_DATA ? &s->come : &s->done) += 1;
  return 0;
}

static int post(side *s, uint64_t offset, uint64_t bytes, deadline *end) {
  for (;;) {
    const ssize_t code = fi_writedata(s->ep, s->source + offset, bytes, fi_mr_desc(s->mr), ++s->posted & 0xffffffffu,
                                      s->peer, s->peer_address + offset, s->peer_key, NULL);
    if (code == 0) return 0;
    --s->posted;
    if (code != -FI_EAGAIN) return bad("fi_writedata", code);
    if (poll_cq(s)) return -1;
    if (passed(end)) return fail("fi_writedata: only \"again\" until the deadline");
  }
}

void side_close(side *s) {
  if (s->ep) fi_close(&s->ep->fid);
  if (s->mr) fi_close(&s->mr->fid);
  if (s->cq) fi_close(&s->cq->fid);
  if (s->av) fi_close(&s->av->fid);
  if (s->domain) fi_close(&s->domain->fid);
  if (s->fabric) fi_close(&s->fabric->fid);
  if (s->info) s->freeinfo(s->info);
  free(s->buffer);
  free(s);
}
