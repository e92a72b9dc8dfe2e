// SPDX-License-Identifier: Apache-2.0
#include "libfabric_watch.h"

#include <cstring>
#include <deque>

#include "../../plugins/libfabric/null.h"
#include "check.h"

namespace watch {
namespace {

Card *card = nullptr;
bool enabled = false;
std::map<void *, iovec> regions;  // live registrations, by descriptor

// The null network's own tables, behind ours.
fi_ops_fabric null_fabric;
fi_ops_domain null_domain;
fi_ops_mr null_mr;
fi_ops_ep null_options;
fi_ops_msg null_messages;
fi_ops_rma null_writes;
fi_ops_cq null_queue;
fi_ops null_mr_object, null_ep_object;

// ---- registrations

// As later headers have it.
constexpr uint64_t kMrDmabuf = uint64_t{1} << 40;
struct Dmabuf {
  int fd;
  uint64_t offset;
  size_t length;
  void *base;
};

int close_mr(fid *object) {
  regions.erase(reinterpret_cast<fid_mr *>(object)->mem_desc);
  return null_mr_object.close(object);
}

int regattr(fid *object, const fi_mr_attr *asked, uint64_t flags, fid_mr **out) {
  const bool dmabuf = (flags & kMrDmabuf) != 0;
  iovec range{};
  Registration seen{flags, asked->access, asked->iface, asked->device.cuda, nullptr, 0, dmabuf, -1, 0, nullptr};
  if (dmabuf) {
    const auto *buffer = reinterpret_cast<const Dmabuf *>(asked->mr_iov);
    seen.fd = buffer->fd;
    seen.offset = buffer->offset;
    seen.base = buffer->base;
    range = {static_cast<char *>(buffer->base) + buffer->offset, buffer->length};
  } else {
    range = *asked->mr_iov;
  }
  seen.address = range.iov_base;
  seen.length = range.iov_len;
  card->registrations.push_back(seen);
  const int answer = dmabuf ? card->dmabuf_answer : asked->iface == FI_HMEM_CUDA ? card->address_answer : 0;
  if (answer != 0) return answer;
  fi_mr_attr plain = *asked;
  plain.mr_iov = &range;
  const int status = null_mr.regattr(object, &plain, 0, out);
  if (status != 0) return status;
  static fi_ops table;
  null_mr_object = *(*out)->fid.ops;
  table = null_mr_object;
  table.close = close_mr;
  (*out)->fid.ops = &table;
  (*out)->mem_desc = *out;
  regions[*out] = range;
  return 0;
}

// ---- posts

bool covers(void *descriptor, const void *buffer, size_t length) {
  const auto found = regions.find(descriptor);
  if (found == regions.end()) return false;
  const auto *from = static_cast<const char *>(buffer), *start = static_cast<const char *>(found->second.iov_base);
  return from >= start && from + length <= start + found->second.iov_len;
}

void note(std::vector<Posted> *list, const void *buffer, size_t length, void *descriptor, uint64_t flags) {
  list->push_back({buffer, length, covers(descriptor, buffer, length), flags});
}

ssize_t send(fid_ep *ep, const void *buffer, size_t length, void *descriptor, fi_addr_t to, void *context) {
  note(&card->sends, buffer, length, descriptor, 0);
  return null_messages.send(ep, buffer, length, descriptor, to, context);
}
ssize_t recv(fid_ep *ep, void *buffer, size_t length, void *descriptor, fi_addr_t from, void *context) {
  note(&card->receives, buffer, length, descriptor, 0);
  return null_messages.recv(ep, buffer, length, descriptor, from, context);
}
ssize_t writedata(fid_ep *ep, const void *buffer, size_t length, void *descriptor, uint64_t data, fi_addr_t to,
                  uint64_t address, uint64_t key, void *context) {
  note(&card->writes, buffer, length, descriptor, 0);
  return null_writes.writedata(ep, buffer, length, descriptor, data, to, address, key, context);
}
ssize_t writemsg(fid_ep *ep, const fi_msg_rma *message, uint64_t flags) {
  CHECK_EQ(message->iov_count, size_t{1});
  note(&card->writes, message->msg_iov->iov_base, message->msg_iov->iov_len, message->desc[0], flags);
  return null_writes.writemsg(ep, message, flags);
}

// Completions of writes that are held, in their order.
std::deque<fi_cq_data_entry> held;

ssize_t read(fid_cq *cq, void *buffer, size_t count) {
  auto *entries = static_cast<fi_cq_data_entry *>(buffer);
  if (!card->holds_writes && !held.empty() && count > 0) {
    entries[0] = held.front();
    held.pop_front();
    return 1;
  }
  const ssize_t read = null_queue.read(cq, buffer, count);
  ssize_t kept = 0;
  for (ssize_t i = 0; i < read; ++i) {
    const bool write = (entries[i].flags & FI_WRITE) != 0 && (entries[i].flags & FI_REMOTE_CQ_DATA) == 0;
    if (card->holds_writes && write)
      held.push_back(entries[i]);
    else
      entries[kept++] = entries[i];
  }
  return read > 0 && kept == 0 ? -FI_EAGAIN : read > 0 ? kept : read;
}

// ---- options

int getopt(fid_t, int, int name, void *value, size_t *length) {
  constexpr int kMaxRmaSize = 14, kEmulatedWrite = FI_OPT_EFA_RNR_RETRY + 2;
  if (name == kMaxRmaSize && card->most_rma != 0 && *length == sizeof(size_t)) {
    const size_t most = card->most_rma;
    memcpy(value, &most, sizeof most);
    return 0;
  }
  if (name == kEmulatedWrite && *length == sizeof(bool)) {
    memcpy(value, &card->emulates, sizeof(bool));
    return 0;
  }
  return -FI_ENOPROTOOPT;
}

int setopt(fid_t, int, int name, const void *value, size_t length) {
  uint64_t number = 0;
  memcpy(&number, value, length);
  card->options[name] = number;
  if (enabled) card->set_late = true;
  return 0;
}

int control(fid *object, int command, void *argument) {
  if (command == FI_ENABLE) enabled = true;
  return null_ep_object.control(object, command, argument);
}

// ---- opening

int endpoint(fid_domain *domain, fi_info *info, fid_ep **out, void *context) {
  const int status = null_domain.endpoint(domain, info, out, context);
  if (status != 0) return status;
  static fi_ops object;
  static fi_ops_ep options;
  static fi_ops_msg messages;
  static fi_ops_rma writes;
  null_ep_object = *(*out)->fid.ops;
  null_options = *(*out)->ops;
  null_messages = *(*out)->msg;
  null_writes = *(*out)->rma;
  object = null_ep_object;
  options = null_options;
  messages = null_messages;
  writes = null_writes;
  object.control = control;
  options.getopt = getopt;
  options.setopt = setopt;
  messages.send = send;
  messages.recv = recv;
  writes.writedata = writedata;
  writes.writemsg = writemsg;
  (*out)->fid.ops = &object;
  (*out)->ops = &options;
  (*out)->msg = &messages;
  (*out)->rma = &writes;
  enabled = false;
  return 0;
}

int cq_open(fid_domain *domain, fi_cq_attr *attributes, fid_cq **out, void *context) {
  const int status = null_domain.cq_open(domain, attributes, out, context);
  if (status != 0) return status;
  static fi_ops_cq table;
  null_queue = *(*out)->ops;
  table = null_queue;
  table.read = read;
  (*out)->ops = &table;
  return 0;
}

int domain(fid_fabric *fabric, fi_info *info, fid_domain **out, void *context) {
  const int status = null_fabric.domain(fabric, info, out, context);
  if (status != 0) return status;
  static fi_ops_domain table;
  static fi_ops_mr memory;
  null_domain = *(*out)->ops;
  null_mr = *(*out)->mr;
  table = null_domain;
  memory = null_mr;
  table.endpoint = endpoint;
  table.cq_open = cq_open;
  memory.regattr = regattr;
  (*out)->ops = &table;
  (*out)->mr = &memory;
  return 0;
}

class Watched final : public libfabric::Library {
 public:
  Watched() : null_(libfabric::make_null({.writes_land = true, .mr_mode = card->mr_mode})) {}

  int getinfo(uint32_t api, const char *node, const char *service, uint64_t flags, const fi_info *hints,
              fi_info **infos) override {
    const bool names_alone = flags == FI_PROV_ATTR_ONLY;
    if (!names_alone) {
      card->asked_caps.push_back(hints->caps);
      card->asked_modes.push_back(hints->mode);
      if ((hints->caps & FI_HMEM) != 0 && !card->gpu) return -FI_ENODATA;
      if (hints->fabric_attr->prov_name != card->provider) return -FI_ENODATA;
    }
    const int status = null_->getinfo(api, node, service, flags, nullptr, infos);
    if (status != 0) return status;
    fi_info *info = *infos;
    info->caps = card->caps | (hints != nullptr ? hints->caps & FI_HMEM : 0);
    info->mode = card->mode;
    free(info->fabric_attr->name);
    free(info->fabric_attr->prov_name);
    info->fabric_attr->name = strdup(card->fabric.c_str());
    info->fabric_attr->prov_name = strdup(card->provider.c_str());
    return 0;
  }
  void freeinfo(fi_info *infos) override { null_->freeinfo(infos); }
  fi_info *dupinfo(const fi_info *info) override { return null_->dupinfo(info); }
  int fabric(fi_fabric_attr *attributes, fid_fabric **out, void *context) override {
    const int status = null_->fabric(attributes, out, context);
    if (status != 0) return status;
    static fi_ops_fabric table;
    null_fabric = *(*out)->ops;
    table = null_fabric;
    table.domain = domain;
    (*out)->ops = &table;
    return 0;
  }
  const char *strerror(int number) override { return null_->strerror(number); }
  uint32_t version() override { return card->version; }
  const std::string &path() override { return null_->path(); }

 private:
  std::shared_ptr<libfabric::Library> null_;
};

}  // namespace

std::shared_ptr<libfabric::Library> make(Card *one) {
  card = one;
  return std::make_shared<Watched>();
}

}  // namespace watch
