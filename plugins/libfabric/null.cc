// SPDX-License-Identifier: Apache-2.0
//
// null.cc: what the null network offers; memory, addresses and events.
#include "null.h"

#include "null_info.h"
#include "null_objects.h"

namespace libfabric::null_net {
namespace {

// ---- memory

int close_mr(fid *object) {
  Mr *mr = as<fid_mr, Mr>(object);
  {
    std::lock_guard hold(mr->keys->lock);
    mr->keys->regions.erase(mr->key);
  }
  delete mr;
  return 0;
}

int reg(fid *object, const void *buffer, size_t length, uint64_t access, uint64_t, uint64_t requested, uint64_t,
        fid_mr **out, void *context) {
  static fi_ops ops = {sizeof ops, close_mr, no_bind, no_control, no_ops, nullptr, nullptr};
  Domain *domain = as<fid_domain, Domain>(object);
  std::lock_guard hold(domain->keys->lock);
  const uint64_t key = domain->options.mr_mode & FI_MR_PROV_KEY ? domain->keys->next++ : requested;
  const auto [at, fresh] = domain->keys->regions.try_emplace(
      key, Keys::Region{const_cast<char *>(static_cast<const char *>(buffer)), length, access});
  if (!fresh) return -FI_ENOKEY;
  Mr *mr = new Mr{};
  mr->fid = {FI_CLASS_MR, context, &ops};
  mr->mem_desc = nullptr;
  mr->key = key;
  mr->keys = domain->keys;
  *out = mr;
  return 0;
}

int regv(fid *object, const iovec *iov, size_t count, uint64_t access, uint64_t offset, uint64_t requested,
         uint64_t flags, fid_mr **out, void *context) {
  if (count != 1) return -FI_EINVAL;
  return reg(object, iov->iov_base, iov->iov_len, access, offset, requested, flags, out, context);
}

int regattr(fid *object, const fi_mr_attr *attr, uint64_t flags, fid_mr **out) {
  return regv(object, attr->mr_iov, attr->iov_count, attr->access, attr->offset, attr->requested_key, flags, out,
              attr->context);
}

// ---- addresses

int close_av(fid *object) {
  delete as<fid_av, Av>(object);
  return 0;
}

int insert(fid_av *object, const void *addresses, size_t count, fi_addr_t *out, uint64_t, void *) {
  Av *av = static_cast<Av *>(object);
  for (size_t i = 0; i < count; i++) {
    unsigned long long id = 0;
    sscanf(static_cast<const char *>(addresses) + i * kAddressBytes, "null:%llu", &id);
    av->ids.push_back(id);
    if (out != nullptr) out[i] = av->ids.size() - 1;
  }
  return static_cast<int>(count);
}

int remove(fid_av *object, fi_addr_t *addresses, size_t count, uint64_t) {
  Av *av = static_cast<Av *>(object);
  for (size_t i = 0; i < count; i++) {
    if (addresses[i] < av->ids.size()) av->ids[addresses[i]] = 0;
  }
  return 0;
}

int lookup(fid_av *object, fi_addr_t address, void *out, size_t *length) {
  Av *av = static_cast<Av *>(object);
  if (address >= av->ids.size() || av->ids[address] == 0) return -FI_EINVAL;
  write_address(av->ids[address], out, length);
  return 0;
}

int av_open(fid_domain *, fi_av_attr *, fid_av **out, void *context) {
  static fi_ops ops = {sizeof ops, close_av, no_bind, no_control, no_ops, nullptr, nullptr};
  static fi_ops_av table = {sizeof table, insert, nullptr, nullptr, remove, lookup, nullptr, nullptr};
  Av *av = new Av{};
  av->fid = {FI_CLASS_AV, context, &ops};
  av->ops = &table;
  *out = av;
  return 0;
}

// ---- fabric, domain, events

int close_domain(fid *object) {
  delete as<fid_domain, Domain>(object);
  return 0;
}
int close_fabric(fid *object) {
  delete as<fid_fabric, Fabric>(object);
  return 0;
}
int close_eq(fid *object) {
  delete as<fid_eq, Eq>(object);
  return 0;
}

int domain(fid_fabric *object, fi_info *, fid_domain **out, void *context) {
  static fi_ops ops = {sizeof ops, close_domain, no_bind, no_control, no_ops, nullptr, nullptr};
  static fi_ops_domain table = {sizeof table, av_open, cq_open, endpoint, nullptr, nullptr,
                                nullptr,      nullptr, nullptr, nullptr,  nullptr, nullptr};
  static fi_ops_mr memory = {sizeof memory, reg, regv, regattr};
  Domain *made = new Domain{};
  made->fid = {FI_CLASS_DOMAIN, context, &ops};
  made->ops = &table;
  made->mr = &memory;
  made->options = static_cast<Fabric *>(object)->options;
  made->keys = std::make_shared<Keys>();
  *out = made;
  return 0;
}

ssize_t eq_read(fid_eq *, uint32_t *, void *, size_t, uint64_t) { return -FI_EAGAIN; }
ssize_t eq_readerr(fid_eq *, fi_eq_err_entry *, uint64_t) { return -FI_EAGAIN; }
const char *eq_strerror(fid_eq *, int, const void *, char *, size_t) { return "the null network refused"; }

int eq_open(fid_fabric *, fi_eq_attr *, fid_eq **out, void *context) {
  static fi_ops ops = {sizeof ops, close_eq, no_bind, no_control, no_ops, nullptr, nullptr};
  static fi_ops_eq table = {sizeof table, eq_read, eq_readerr, nullptr, nullptr, eq_strerror};
  Eq *eq = new Eq{};
  eq->fid = {FI_CLASS_EQ, context, &ops};
  eq->ops = &table;
  *out = eq;
  return 0;
}

int trywait(fid_fabric *, fid **objects, int count) {
  for (int i = 0; i < count; i++) {
    if (objects[i]->fclass != FI_CLASS_CQ) continue;
    Cq *cq = as<fid_cq, Cq>(objects[i]);
    eventfd_t value;
    if (cq->wake >= 0) eventfd_read(cq->wake, &value);
    if (cq->head != cq->tail || !cq->errors.empty()) return -FI_EAGAIN;
    for (Ep *ep : cq->endpoints) {
      if (ep->port->waiting.load(std::memory_order_acquire) != 0) return -FI_EAGAIN;
    }
  }
  return 0;
}

class Null final : public Library {
 public:
  explicit Null(const NullOptions &options) : options_(options) {}

  int getinfo(uint32_t api, const char *, const char *, uint64_t, const fi_info *hints, fi_info **infos) override {
    const char *asked = hints && hints->fabric_attr ? hints->fabric_attr->prov_name : nullptr;
    if (asked != nullptr && strcmp(asked, options_.provider) != 0) return -FI_ENODATA;
    fi_info *info = null_info::duplicate(nullptr);
    info->caps = FI_MSG | FI_RMA | FI_SEND | FI_RECV | FI_WRITE | FI_REMOTE_WRITE | FI_SOURCE;
    info->addr_format = FI_ADDR_STR;
    info->tx_attr->caps = FI_MSG | FI_RMA | FI_SEND | FI_WRITE;
    info->tx_attr->inject_size = 4096;
    info->tx_attr->size = options_.tx_size;
    info->tx_attr->iov_limit = 4;
    info->tx_attr->rma_iov_limit = 1;
    info->rx_attr->caps = FI_MSG | FI_RMA | FI_RECV | FI_REMOTE_WRITE | FI_SOURCE;
    info->rx_attr->size = options_.tx_size;
    info->rx_attr->iov_limit = 1;
    info->ep_attr->type = FI_EP_RDM;
    info->ep_attr->max_msg_size = size_t{1} << 32;
    info->ep_attr->tx_ctx_cnt = info->ep_attr->rx_ctx_cnt = 1;
    info->domain_attr->name = strdup("null");
    info->domain_attr->threading = FI_THREAD_DOMAIN;
    info->domain_attr->control_progress = info->domain_attr->data_progress = FI_PROGRESS_MANUAL;
    info->domain_attr->resource_mgmt = FI_RM_ENABLED;
    info->domain_attr->av_type = FI_AV_TABLE;
    info->domain_attr->mr_mode = options_.mr_mode;
    info->domain_attr->mr_key_size = 8;
    info->domain_attr->cq_data_size = 8;
    info->domain_attr->mr_iov_limit = 1;
    info->domain_attr->cq_cnt = info->domain_attr->ep_cnt = info->domain_attr->mr_cnt = 65536;
    info->fabric_attr->name = strdup(options_.provider);  // as efa's fabric is called efa
    info->fabric_attr->prov_name = strdup(options_.provider);
    info->fabric_attr->api_version = api;
    *infos = info;
    return 0;
  }
  void freeinfo(fi_info *infos) override {
    while (infos != nullptr) {
      fi_info *next = infos->next;
      null_info::free_one(infos);
      infos = next;
    }
  }
  fi_info *dupinfo(const fi_info *info) override { return null_info::duplicate(info); }
  int fabric(fi_fabric_attr *attributes, fid_fabric **out, void *context) override {
    static fi_ops ops = {sizeof ops, close_fabric, no_bind, no_control, no_ops, nullptr, nullptr};
    static fi_ops_fabric table = {sizeof table, domain, nullptr, eq_open, nullptr, trywait, nullptr};
    Fabric *made = new Fabric{};
    made->fid = {FI_CLASS_FABRIC, context, &ops};
    made->ops = &table;
    made->api_version = attributes->api_version;
    made->options = options_;
    *out = made;
    return 0;
  }
  const char *strerror(int number) override { return ::strerror(number); }
  uint32_t version() override { return kApi; }
  const std::string &path() override { return path_; }

 private:
  const NullOptions options_;
  const std::string path_ = "(null)";
};

}  // namespace
}  // namespace libfabric::null_net

namespace libfabric {

std::shared_ptr<Library> make_null(const NullOptions &options) { return std::make_shared<null_net::Null>(options); }

}  // namespace libfabric
