// SPDX-License-Identifier: Apache-2.0
//
// Who holds nothing but a rank's address, and says what it likes: an endpoint of its own that sends and writes to that
// address. Arguments: library, provider, address in hex. Standard input: requests, each a kind and a length, then that
// many bytes. 'm': a message of these bytes. 'w': key, address and data (8 bytes each) of a write of 64 bytes.
// Prints a line for each: "ok", or libfabric's number of the error.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <rdma/fabric.h>
#include <rdma/fi_cm.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_errno.h>
#include <rdma/fi_rma.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define MOST (2u << 20)
#define PATIENCE_S 5

static void need(int status, const char *what) {
  if (status == 0) return;
  fprintf(stderr, "stranger: %s: %d\n", what, status);
  exit(2);
}

static struct fid_cq *cq;
static struct fid_ep *ep;
static uint8_t bytes[MOST];

// The end of the one operation that is under way, or of the patience with it: a peer may rightly never answer.
static int end_of(void) {
  const time_t end = time(NULL) + PATIENCE_S;
  while (time(NULL) < end) {
    struct fi_cq_data_entry entry;
    const ssize_t count = fi_cq_read(cq, &entry, 1);
    if (count == 1) return 0;
    if (count == -FI_EAVAIL) {
      struct fi_cq_err_entry error = {0};
      fi_cq_readerr(cq, &error, 0);
      return error.err;
    }
  }
  return FI_ETIMEDOUT;
}

int main(int count, char **arguments) {
  if (count != 4) return 2;
  void *library = dlopen(arguments[1], RTLD_NOW);
  need(library == NULL, "dlopen");
  // The layout of headers up to 1.17, whatever the library is.
  int (*getinfo)(uint32_t, const char *, const char *, uint64_t, const struct fi_info *, struct fi_info **) =
      (int (*)(uint32_t, const char *, const char *, uint64_t, const struct fi_info *, struct fi_info **))dlvsym(
          library, "fi_getinfo", "FABRIC_1.3");
  struct fi_info *(*dupinfo)(const struct fi_info *) =
      (struct fi_info * (*)(const struct fi_info *)) dlvsym(library, "fi_dupinfo", "FABRIC_1.3");
  int (*open_fabric)(struct fi_fabric_attr *, struct fid_fabric **, void *) =
      (int (*)(struct fi_fabric_attr *, struct fid_fabric **, void *))dlsym(library, "fi_fabric");
  need(getinfo == NULL || dupinfo == NULL || open_fabric == NULL, "symbols");

  struct fi_info *hints = dupinfo(NULL), *info = NULL;
  hints->caps = FI_MSG | FI_RMA;
  hints->mode = FI_CONTEXT | FI_CONTEXT2;
  hints->ep_attr->type = FI_EP_RDM;
  hints->domain_attr->mr_mode = FI_MR_LOCAL | FI_MR_VIRT_ADDR | FI_MR_ALLOCATED | FI_MR_PROV_KEY;
  hints->tx_attr->op_flags = FI_COMPLETION | FI_DELIVERY_COMPLETE;  // "ok": it was there
  hints->fabric_attr->prov_name = strdup(arguments[2]);
  need(getinfo(FI_VERSION(1, 17), NULL, NULL, 0, hints, &info), "fi_getinfo");
  struct fid_fabric *fabric;
  struct fid_domain *domain;
  struct fid_av *av;
  struct fid_mr *mr;
  need(open_fabric(info->fabric_attr, &fabric, NULL), "fi_fabric");
  need(fi_domain(fabric, info, &domain, NULL), "fi_domain");
  struct fi_cq_attr queue = {.size = 256, .format = FI_CQ_FORMAT_DATA, .wait_obj = FI_WAIT_NONE};
  need(fi_cq_open(domain, &queue, &cq, NULL), "fi_cq_open");
  struct fi_av_attr vector = {.type = FI_AV_TABLE, .count = 1};
  need(fi_av_open(domain, &vector, &av, NULL), "fi_av_open");
  need(fi_endpoint(domain, info, &ep, NULL), "fi_endpoint");
  need(fi_ep_bind(ep, &cq->fid, FI_TRANSMIT | FI_RECV), "binding the queue");
  need(fi_ep_bind(ep, &av->fid, 0), "binding the vector");
  need(fi_enable(ep), "fi_enable");
  need(fi_mr_reg(domain, bytes, sizeof bytes, FI_SEND | FI_WRITE, 0, 77, 0, &mr, NULL), "fi_mr_reg");

  uint8_t address[256];
  const size_t length = strlen(arguments[3]) / 2;
  need(length > sizeof address, "the address");
  for (size_t i = 0; i < length; i++) sscanf(arguments[3] + 2 * i, "%2hhx", &address[i]);
  fi_addr_t target;
  need(fi_av_insert(av, address, 1, &target, 0, NULL) != 1, "fi_av_insert");

  struct {
    uint8_t kind;
    uint32_t length;
  } __attribute__((packed)) request;
  while (fread(&request, sizeof request, 1, stdin) == 1) {
    need(request.length > sizeof bytes || fread(bytes, 1, request.length, stdin) != request.length, "a request");
    uint64_t write[3];
    memcpy(write, bytes, sizeof write);
    static struct fi_context2 context;
    ssize_t status;
    const time_t end = time(NULL) + PATIENCE_S;
    do {
      if (request.kind == 'm')
        status = fi_send(ep, bytes, request.length, fi_mr_desc(mr), target, &context);
      else
        status = fi_writedata(ep, bytes, 64, fi_mr_desc(mr), write[2], target, write[1], write[0], &context);
      struct fi_cq_data_entry none;
      if (status == -FI_EAGAIN) fi_cq_read(cq, &none, 0);
    } while (status == -FI_EAGAIN && time(NULL) < end);
    const int error = status == 0 ? end_of() : (int)-status;
    if (error == 0)
      puts("ok");
    else
      printf("%d\n", error);
    fflush(stdout);
  }
  return 0;
}
