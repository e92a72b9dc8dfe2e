// SPDX-License-Identifier: Apache-2.0
//
// strict.cc: what is offered (as EFA offers it), and the fabric.
#include "strict.h"

#include <algorithm>
#include <cstring>

#include "strict_objects.h"

namespace libfabric {
namespace strict {
namespace {

constexpr int kMrMode = FI_MR_LOCAL | FI_MR_VIRT_ADDR | FI_MR_ALLOCATED | FI_MR_PROV_KEY;
constexpr uint64_t kNotOffered = FI_TAGGED | FI_ATOMIC | FI_DIRECTED_RECV | FI_MULTI_RECV | FI_RMA_EVENT | FI_FENCE;

std::string name_of(const fi_info *info) {
  const auto text = [](const char *word) { return std::string(word != nullptr ? word : ""); };
  return text(info->fabric_attr->prov_name) + "|" + text(info->fabric_attr->name) + "|" + text(info->domain_attr->name);
}

// Would EFA have anything for these hints?
bool acceptable(const fi_info *hints) {
  if (hints->caps & kNotOffered || !(hints->mode & FI_CONTEXT2)) return false;
  if (hints->tx_attr != nullptr && (hints->tx_attr->msg_order != 0 || hints->tx_attr->comp_order != 0)) return false;
  if (hints->domain_attr == nullptr) return false;
  const fi_domain_attr &domain = *hints->domain_attr;
  return (domain.mr_mode & kMrMode) == kMrMode && domain.cq_data_size <= 4 && domain.data_progress != FI_PROGRESS_AUTO;
}

void shape(const StrictOptions &options, fi_info *info) {
  info->caps &= ~kNotOffered;
  info->mode |= FI_CONTEXT2;
  info->tx_attr->mode |= FI_CONTEXT2;
  info->rx_attr->mode |= FI_CONTEXT2;
  info->tx_attr->msg_order = info->rx_attr->msg_order = 0;
  info->tx_attr->comp_order = info->rx_attr->comp_order = 0;
  info->tx_attr->size = std::min<size_t>(info->tx_attr->size, options.tx);
  info->tx_attr->inject_size = std::min<size_t>(info->tx_attr->inject_size, options.inject);
  info->tx_attr->iov_limit = std::min<size_t>(info->tx_attr->iov_limit, 2);
  info->tx_attr->rma_iov_limit = 1;
  info->ep_attr->max_msg_size = std::min<size_t>(info->ep_attr->max_msg_size, options.rma);
  info->ep_attr->max_order_raw_size = info->ep_attr->max_order_war_size = info->ep_attr->max_order_waw_size = 0;
  info->domain_attr->mr_mode |= kMrMode;
  info->domain_attr->cq_data_size = 4;
  info->domain_attr->control_progress = info->domain_attr->data_progress = FI_PROGRESS_MANUAL;
  info->domain_attr->resource_mgmt = FI_RM_DISABLED;  // nothing protects the queues
}

int close_fabric(fid *object) {
  Fabric *fabric = as<Fabric, fid_fabric>(object);
  const int code = fi_close(&fabric->real->fid);
  if (code == 0) delete fabric;
  return code;
}

int open_domain_of(fid_fabric *fabric, fi_info *info, fid_domain **out, void *context) {
  return open_domain(static_cast<Fabric *>(fabric), info, out, context);
}

int open_eq_of(fid_fabric *fabric, fi_eq_attr *attr, fid_eq **out, void *context) {
  return open_eq(static_cast<Fabric *>(fabric), attr, out, context);
}

// Who holds anything back may not sleep; else the provider decides.
int trywait(fid_fabric *object, fid **objects, int count) {
  std::vector<fid *> real;
  for (int i = 0; i < count; i++) {
    if (objects[i]->fclass == FI_CLASS_CQ) {
      Cq *cq = as<Cq, fid_cq>(objects[i]);
      std::lock_guard hold(cq->domain->lock);
      bool waits = !cq->held.empty() || !cq->ready.empty() || cq->error.has_value();
      for (const Ep *ep : cq->endpoints) waits = waits || !ep->window.empty();
      if (waits) return -FI_EAGAIN;
      real.push_back(&cq->real->fid);
    } else if (objects[i]->fclass == FI_CLASS_EQ) {
      Eq *eq = as<Eq, fid_eq>(objects[i]);
      std::lock_guard hold(eq->lock);
      if (!eq->errors.empty()) return -FI_EAGAIN;
      real.push_back(&eq->real->fid);
    } else {
      return -FI_EINVAL;
    }
  }
  const int code = fi_trywait(static_cast<Fabric *>(object)->real, real.data(), count);
  if (code != 0) return code;
  for (int i = 0; i < count; i++) {
    if (objects[i]->fclass != FI_CLASS_CQ) continue;
    Cq *cq = as<Cq, fid_cq>(objects[i]);
    std::lock_guard hold(cq->domain->lock);
    for (const Ep *ep : cq->endpoints) {
      if (ep->rx == cq && ep->presence) ep->presence->sleep();
    }
  }
  return 0;
}

class Strict final : public Library {
 public:
  Strict(std::shared_ptr<Library> inner, const StrictOptions &options) : shared_(std::make_shared<Shared>()) {
    shared_->inner = std::move(inner);
    shared_->options = options;
  }

  int getinfo(uint32_t api, const char *node, const char *service, uint64_t flags, const fi_info *hints,
              fi_info **infos) override {
    const bool only_asks = hints == nullptr || (flags & FI_PROV_ATTR_ONLY) != 0;
    if (!only_asks && !acceptable(hints)) return -FI_ENODATA;
    const int code = shared_->inner->getinfo(api, node, service, flags, hints, infos);
    if (code != 0 || only_asks) return code;
    for (fi_info *info = *infos; info != nullptr; info = info->next) {
      {
        std::lock_guard hold(shared_->lock);
        fi_info *&kept = shared_->infos[name_of(info)];
        if (kept != nullptr) shared_->inner->freeinfo(kept);
        kept = shared_->inner->dupinfo(info);
      }
      shape(shared_->options, info);
    }
    return 0;
  }
  void freeinfo(fi_info *infos) override { shared_->inner->freeinfo(infos); }
  fi_info *dupinfo(const fi_info *info) override { return shared_->inner->dupinfo(info); }
  int fabric(fi_fabric_attr *attributes, fid_fabric **out, void *context) override {
    static fi_ops ops = {sizeof ops, close_fabric, no_bind, no_control, no_ops, nullptr, nullptr};
    static fi_ops_fabric table = {sizeof table, open_domain_of, nullptr, open_eq_of, nullptr, trywait, nullptr};
    fid_fabric *real = nullptr;
    const int code = shared_->inner->fabric(attributes, &real, nullptr);
    if (code != 0) return code;
    Fabric *made = new Fabric{};
    made->fid = {FI_CLASS_FABRIC, context, &ops};
    made->ops = &table;
    made->api_version = real->api_version;
    made->shared = shared_;
    made->real = real;
    *out = made;
    return 0;
  }
  const char *strerror(int number) override { return shared_->inner->strerror(number); }
  uint32_t version() override { return shared_->inner->version(); }
  const std::string &path() override { return shared_->inner->path(); }

 private:
  const std::shared_ptr<Shared> shared_;
};

}  // namespace

Shared::~Shared() {
  for (auto &[name, info] : infos) inner->freeinfo(info);
}

int Shared::refuse(Deed deed, const std::string &what) const {
  did(deed);
  if (options.say) options.say("strict EFA: " + what);
  return -FI_EINVAL;
}

fi_info *Shared::restored(const fi_info *info) {
  std::lock_guard hold(lock);
  const auto found = infos.find(name_of(info));
  if (found == infos.end()) return nullptr;
  const fi_info *kept = found->second;
  fi_info *real = inner->dupinfo(info);
  if (real == nullptr) return nullptr;
  // Scalars only: what either info points to stays its own.
  real->caps = kept->caps, real->mode = kept->mode;
  const uint64_t flags = info->tx_attr->op_flags, receive_flags = info->rx_attr->op_flags;
  *real->tx_attr = *kept->tx_attr;
  *real->rx_attr = *kept->rx_attr;
  real->tx_attr->op_flags = flags;
  real->rx_attr->op_flags = receive_flags;
  real->ep_attr->max_msg_size = kept->ep_attr->max_msg_size;
  real->ep_attr->max_order_raw_size = kept->ep_attr->max_order_raw_size;
  real->ep_attr->max_order_war_size = kept->ep_attr->max_order_war_size;
  real->ep_attr->max_order_waw_size = kept->ep_attr->max_order_waw_size;
  real->domain_attr->mr_mode = kept->domain_attr->mr_mode;
  real->domain_attr->cq_data_size = kept->domain_attr->cq_data_size;
  real->domain_attr->control_progress = kept->domain_attr->control_progress;
  real->domain_attr->data_progress = kept->domain_attr->data_progress;
  real->domain_attr->resource_mgmt = kept->domain_attr->resource_mgmt;
  return real;
}

int no_bind(fid *, fid *, uint64_t) { return -FI_ENOSYS; }
int no_control(fid *, int, void *) { return -FI_ENOSYS; }
int no_ops(fid *, const char *, uint64_t, void **, void *) { return -FI_ENOSYS; }

}  // namespace strict

std::shared_ptr<Library> make_strict(std::shared_ptr<Library> inner, const StrictOptions &options) {
  return std::make_shared<strict::Strict>(std::move(inner), options);
}

}  // namespace libfabric
