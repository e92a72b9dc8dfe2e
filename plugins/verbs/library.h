// SPDX-License-Identifier: Apache-2.0
//
// library.h: libibverbs.so.1, opened at run time, so that the plugin loads on any machine and says what is missing.
//
// These are the calls that are symbols. Those of the data path (post, poll, ask for a notice) go through the table that
// a context carries, by inline functions of <infiniband/verbs.h>. So a network made of functions, for tests, implements
// `Library` and hands out contexts with a table of its own, and the plugin can't tell.
#pragma once

#include <memory>
#include <string>

#include "../opening.h"
#include "common.h"

namespace verbs {

class Library {
 public:
  virtual ~Library() = default;

  // As ibv_ and the same name. Pointers: nullptr and errno on an error; int: 0, or the errno.
  virtual ibv_device **get_device_list(int *count) = 0;
  virtual void free_device_list(ibv_device **list) = 0;
  virtual const char *get_device_name(ibv_device *device) = 0;
  virtual ibv_context *open_device(ibv_device *device) = 0;
  virtual int close_device(ibv_context *context) = 0;
  virtual int query_device(ibv_context *context, ibv_device_attr *attributes) = 0;
  virtual int query_port(ibv_context *context, uint8_t port, ibv_port_attr *attributes) = 0;
  virtual ibv_pd *alloc_pd(ibv_context *context) = 0;
  virtual int dealloc_pd(ibv_pd *pd) = 0;
  virtual ibv_mr *reg_mr(ibv_pd *pd, void *address, size_t length, unsigned access) = 0;
  virtual ibv_mr *reg_dmabuf_mr(ibv_pd *pd, uint64_t offset, size_t length, uint64_t iova, int fd, unsigned access) = 0;
  virtual int dereg_mr(ibv_mr *mr) = 0;
  virtual ibv_comp_channel *create_comp_channel(ibv_context *context) = 0;
  virtual int destroy_comp_channel(ibv_comp_channel *channel) = 0;
  virtual ibv_cq *create_cq(ibv_context *context, int entries, ibv_comp_channel *channel) = 0;
  virtual int destroy_cq(ibv_cq *cq) = 0;
  virtual int get_cq_event(ibv_comp_channel *channel, ibv_cq **cq) = 0;
  virtual void ack_cq_events(ibv_cq *cq, unsigned count) = 0;
  virtual ibv_qp *create_qp(ibv_pd *pd, ibv_qp_init_attr *attributes) = 0;
  virtual int modify_qp(ibv_qp *qp, ibv_qp_attr *attributes, int mask) = 0;
  virtual int destroy_qp(ibv_qp *qp) = 0;
  virtual ibv_ah *create_ah(ibv_pd *pd, ibv_ah_attr *attributes) = 0;
  virtual int destroy_ah(ibv_ah *ah) = 0;
  virtual int get_async_event(ibv_context *context, ibv_async_event *event) = 0;
  virtual void ack_async_event(ibv_async_event *event) = 0;
  virtual const char *wc_status_str(ibv_wc_status status) = 0;

  virtual bool has_dmabuf() = 0;            // ibv_reg_dmabuf_mr is there (rdma-core 34 and later)
  virtual bool has_relaxed_ordering() = 0;  // ibv_reg_mr_iova2 is there (28 and later)
  virtual const std::string &path() = 0;    // the file that the dynamic linker mapped
  virtual const std::string &sysfs() = 0;   // "/sys", or a test's: GID tables are read from its files
};

// nullptr: `refusal` says why. `wanted`: a file, or empty for the dynamic linker's own search.
std::shared_ptr<Library> open_library(const std::string &wanted, plugin::Refusal *refusal);

}  // namespace verbs
