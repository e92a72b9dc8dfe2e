// SPDX-License-Identifier: Apache-2.0
#include "library.h"

#include <dlfcn.h>

#include <cerrno>
#include <cstring>

// Macros of the header that would hide the names below; what they add is done here by hand.
#undef ibv_get_device_list
#undef ibv_query_port
#undef ibv_reg_mr

namespace verbs {
namespace {

class Opened final : public Library {
 public:
  // Empty: all symbols are there. Else which is not.
  std::string bind(void *handle) {
    handle_ = handle;
    take("ibv_get_device_list", &get_device_list_);
    take("ibv_free_device_list", &free_device_list_);
    take("ibv_get_device_name", &get_device_name_);
    take("ibv_open_device", &open_device_);
    take("ibv_close_device", &close_device_);
    take("ibv_query_device", &query_device_);
    take("ibv_query_port", &query_port_);
    take("ibv_alloc_pd", &alloc_pd_);
    take("ibv_dealloc_pd", &dealloc_pd_);
    take("ibv_reg_mr", &reg_mr_);
    take("ibv_dereg_mr", &dereg_mr_);
    take("ibv_create_comp_channel", &create_comp_channel_);
    take("ibv_destroy_comp_channel", &destroy_comp_channel_);
    take("ibv_create_cq", &create_cq_);
    take("ibv_destroy_cq", &destroy_cq_);
    take("ibv_get_cq_event", &get_cq_event_);
    take("ibv_ack_cq_events", &ack_cq_events_);
    take("ibv_create_qp", &create_qp_);
    take("ibv_modify_qp", &modify_qp_);
    take("ibv_destroy_qp", &destroy_qp_);
    take("ibv_create_ah", &create_ah_);
    take("ibv_destroy_ah", &destroy_ah_);
    take("ibv_get_async_event", &get_async_event_);
    take("ibv_ack_async_event", &ack_async_event_);
    take("ibv_wc_status_str", &wc_status_str_);
    const std::string missing = missing_;
    take("ibv_reg_mr_iova2", &reg_mr_iova2_);
    take("ibv_reg_dmabuf_mr", &reg_dmabuf_mr_);
    if (!missing.empty()) return missing;
    path_ = plugin::file_of(handle);
    return "";
  }

  ibv_device **get_device_list(int *count) override { return get_device_list_(count); }
  void free_device_list(ibv_device **list) override { free_device_list_(list); }
  const char *get_device_name(ibv_device *device) override { return get_device_name_(device); }
  ibv_context *open_device(ibv_device *device) override { return open_device_(device); }
  int close_device(ibv_context *context) override { return close_device_(context); }
  int query_device(ibv_context *context, ibv_device_attr *attributes) override {
    return query_device_(context, attributes);
  }
  int query_port(ibv_context *context, uint8_t port, ibv_port_attr *attributes) override {
    // The symbol fills what the struct had at first, which is all that we read but the flags, which stay 0.
    memset(attributes, 0, sizeof *attributes);
    return query_port_(context, port, attributes);
  }
  ibv_pd *alloc_pd(ibv_context *context) override { return alloc_pd_(context); }
  int dealloc_pd(ibv_pd *pd) override { return dealloc_pd_(pd); }
  ibv_mr *reg_mr(ibv_pd *pd, void *address, size_t length, unsigned access) override {
    if ((access & IBV_ACCESS_OPTIONAL_RANGE) != 0)
      return reg_mr_iova2_(pd, address, length, reinterpret_cast<uint64_t>(address), access);
    return reg_mr_(pd, address, length, static_cast<int>(access));
  }
  ibv_mr *reg_dmabuf_mr(ibv_pd *pd, uint64_t offset, size_t length, uint64_t iova, int fd, unsigned access) override {
    return reg_dmabuf_mr_(pd, offset, length, iova, fd, static_cast<int>(access));
  }
  int dereg_mr(ibv_mr *mr) override { return dereg_mr_(mr); }
  ibv_comp_channel *create_comp_channel(ibv_context *context) override { return create_comp_channel_(context); }
  int destroy_comp_channel(ibv_comp_channel *channel) override { return destroy_comp_channel_(channel); }
  ibv_cq *create_cq(ibv_context *context, int entries, ibv_comp_channel *channel) override {
    return create_cq_(context, entries, nullptr, channel, 0);
  }
  int destroy_cq(ibv_cq *cq) override { return destroy_cq_(cq); }
  int get_cq_event(ibv_comp_channel *channel, ibv_cq **cq) override {
    void *context = nullptr;
    return get_cq_event_(channel, cq, &context);
  }
  void ack_cq_events(ibv_cq *cq, unsigned count) override { ack_cq_events_(cq, count); }
  ibv_qp *create_qp(ibv_pd *pd, ibv_qp_init_attr *attributes) override { return create_qp_(pd, attributes); }
  int modify_qp(ibv_qp *qp, ibv_qp_attr *attributes, int mask) override { return modify_qp_(qp, attributes, mask); }
  int destroy_qp(ibv_qp *qp) override { return destroy_qp_(qp); }
  ibv_ah *create_ah(ibv_pd *pd, ibv_ah_attr *attributes) override { return create_ah_(pd, attributes); }
  int destroy_ah(ibv_ah *ah) override { return destroy_ah_(ah); }
  int get_async_event(ibv_context *context, ibv_async_event *event) override {
    return get_async_event_(context, event);
  }
  void ack_async_event(ibv_async_event *event) override { ack_async_event_(event); }
  const char *wc_status_str(ibv_wc_status status) override { return wc_status_str_(status); }

  bool has_dmabuf() override { return reg_dmabuf_mr_ != nullptr; }
  bool has_relaxed_ordering() override { return reg_mr_iova2_ != nullptr; }
  const std::string &path() override { return path_; }
  const std::string &sysfs() override { return sysfs_; }

 private:
  template <typename Function>
  void take(const char *name, Function *function) {
    // The default version of a name: rdma-core keeps the structs of those as they are.
    void *symbol = dlsym(handle_, name);
    if (symbol == nullptr && missing_.empty()) missing_ = std::string("has no ") + name;
    memcpy(function, &symbol, sizeof symbol);
  }

  void *handle_ = nullptr;
  std::string missing_, path_, sysfs_ = "/sys";
  ibv_device **(*get_device_list_)(int *) = nullptr;
  void (*free_device_list_)(ibv_device **) = nullptr;
  const char *(*get_device_name_)(ibv_device *) = nullptr;
  ibv_context *(*open_device_)(ibv_device *) = nullptr;
  int (*close_device_)(ibv_context *) = nullptr;
  int (*query_device_)(ibv_context *, ibv_device_attr *) = nullptr;
  int (*query_port_)(ibv_context *, uint8_t, ibv_port_attr *) = nullptr;
  ibv_pd *(*alloc_pd_)(ibv_context *) = nullptr;
  int (*dealloc_pd_)(ibv_pd *) = nullptr;
  ibv_mr *(*reg_mr_)(ibv_pd *, void *, size_t, int) = nullptr;
  ibv_mr *(*reg_mr_iova2_)(ibv_pd *, void *, size_t, uint64_t, unsigned) = nullptr;
  ibv_mr *(*reg_dmabuf_mr_)(ibv_pd *, uint64_t, size_t, uint64_t, int, int) = nullptr;
  int (*dereg_mr_)(ibv_mr *) = nullptr;
  ibv_comp_channel *(*create_comp_channel_)(ibv_context *) = nullptr;
  int (*destroy_comp_channel_)(ibv_comp_channel *) = nullptr;
  ibv_cq *(*create_cq_)(ibv_context *, int, void *, ibv_comp_channel *, int) = nullptr;
  int (*destroy_cq_)(ibv_cq *) = nullptr;
  int (*get_cq_event_)(ibv_comp_channel *, ibv_cq **, void **) = nullptr;
  void (*ack_cq_events_)(ibv_cq *, unsigned) = nullptr;
  ibv_qp *(*create_qp_)(ibv_pd *, ibv_qp_init_attr *) = nullptr;
  int (*modify_qp_)(ibv_qp *, ibv_qp_attr *, int) = nullptr;
  int (*destroy_qp_)(ibv_qp *) = nullptr;
  ibv_ah *(*create_ah_)(ibv_pd *, ibv_ah_attr *) = nullptr;
  int (*destroy_ah_)(ibv_ah *) = nullptr;
  int (*get_async_event_)(ibv_context *, ibv_async_event *) = nullptr;
  void (*ack_async_event_)(ibv_async_event *) = nullptr;
  const char *(*wc_status_str_)(ibv_wc_status) = nullptr;
};

}  // namespace

std::shared_ptr<Library> open_library(const std::string &wanted, plugin::Refusal *refusal) {
  auto opened = std::make_shared<Opened>();
  if (plugin::open_first({wanted.empty() ? "libibverbs.so.1" : wanted}, &refusal->why,
                         [&](void *handle) { return opened->bind(handle); }))
    return opened;
  refusal->mend =
      "install libibverbs and its providers (apt-get install libibverbs1 ibverbs-providers, dnf install libibverbs), "
      "or give EPT_VERBS_LIBRARY=/path/to/libibverbs.so.1";
  return nullptr;
}

}  // namespace verbs
