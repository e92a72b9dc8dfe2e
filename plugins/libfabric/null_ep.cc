// SPDX-License-Identifier: Apache-2.0
//
// null_ep.cc: the queue and the endpoint of the null network.
#include <unistd.h>

#include "null_objects.h"

namespace libfabric::null_net {
namespace {

// ---- the queue

void look_at(Cq *cq, Ep *ep) {
  Port &port = *ep->port;
  if (port.waiting.load(std::memory_order_acquire) == 0) return;
  std::lock_guard hold(port.lock);
  port.waiting.store(0, std::memory_order_relaxed);
  const auto source = [&](uint64_t id) {
    if (ep->av == nullptr) return FI_ADDR_NOTAVAIL;
    const auto found = std::find(ep->av->ids.begin(), ep->av->ids.end(), id);
    return found == ep->av->ids.end() ? FI_ADDR_NOTAVAIL : static_cast<fi_addr_t>(found - ep->av->ids.begin());
  };
  for (const Arrival &arrival : port.writes)
    cq->push(nullptr, FI_RMA | FI_REMOTE_WRITE | FI_REMOTE_CQ_DATA, arrival.length, arrival.data, source(arrival.from));
  port.writes.clear();
  while (!port.messages.empty() && !ep->receives.empty()) {
    const Arrival &arrival = port.messages.front();
    const Receive receive = ep->receives.front();
    const size_t length = std::min(arrival.bytes.size(), receive.length);
    if (length > 0) memcpy(receive.buffer, arrival.bytes.data(), length);
    if (arrival.bytes.size() > receive.length) {
      fi_cq_err_entry error = {};
      error.op_context = receive.context;
      error.flags = FI_MSG | FI_RECV;
      error.err = FI_ETRUNC;
      cq->errors.push_back(error);
    } else {
      cq->push(receive.context, FI_MSG | FI_RECV | arrival.flags, length, arrival.data, source(arrival.from));
    }
    ep->receives.pop_front();
    port.messages.pop_front();
  }
}

ssize_t readfrom(fid_cq *object, void *buffer, size_t count, fi_addr_t *source) {
  Cq *cq = static_cast<Cq *>(object);
  for (Ep *ep : cq->endpoints) {
    if (ep->rx == cq) look_at(cq, ep);
  }
  if (!cq->errors.empty()) return -FI_EAVAIL;
  size_t read = 0;
  fi_cq_data_entry *entries = static_cast<fi_cq_data_entry *>(buffer);
  for (; read < count && cq->head != cq->tail; read++) {
    const size_t at = cq->head++ & (cq->ring.size() - 1);
    entries[read] = cq->ring[at];
    if (source != nullptr) source[read] = cq->from[at];
  }
  return read > 0 ? static_cast<ssize_t>(read) : -FI_EAGAIN;
}
ssize_t read(fid_cq *object, void *buffer, size_t count) { return readfrom(object, buffer, count, nullptr); }

ssize_t readerr(fid_cq *object, fi_cq_err_entry *entry, uint64_t) {
  Cq *cq = static_cast<Cq *>(object);
  if (cq->errors.empty()) return -FI_EAGAIN;
  *entry = cq->errors.front();
  cq->errors.pop_front();
  return 1;
}

const char *cq_strerror(fid_cq *, int, const void *, char *, size_t) { return "the null network refused"; }

int close_cq(fid *object) {
  Cq *cq = as<fid_cq, Cq>(object);
  if (!cq->endpoints.empty()) return -FI_EBUSY;
  if (cq->wake >= 0) close(cq->wake);
  delete cq;
  return 0;
}

int cq_control(fid *object, int command, void *argument) {
  Cq *cq = as<fid_cq, Cq>(object);
  if (command != FI_GETWAIT || cq->wake < 0) return -FI_ENOSYS;
  *static_cast<int *>(argument) = cq->wake;
  return 0;
}

}  // namespace

int cq_open(fid_domain *object, fi_cq_attr *attr, fid_cq **out, void *context) {
  static fi_ops ops = {sizeof ops, close_cq, no_bind, cq_control, no_ops, nullptr, nullptr};
  static fi_ops_cq table = {sizeof table, read, readfrom, readerr, nullptr, nullptr, nullptr, cq_strerror};
  if (attr->format != FI_CQ_FORMAT_DATA) return -FI_ENOSYS;
  Cq *cq = new Cq{};
  cq->fid = {FI_CLASS_CQ, context, &ops};
  cq->ops = &table;
  cq->ring.resize(static_cast<Domain *>(object)->options.tx_size);
  cq->from.resize(cq->ring.size());
  if (attr->wait_obj == FI_WAIT_FD || attr->wait_obj == FI_WAIT_UNSPEC) cq->wake = eventfd(0, EFD_NONBLOCK);
  *out = cq;
  return 0;
}

namespace {

// ---- the endpoint

void fail(Ep *ep, void *context, uint64_t flags, int error) {
  fi_cq_err_entry entry = {};
  entry.op_context = context;
  entry.flags = flags;
  entry.err = error;
  ep->tx->errors.push_back(entry);
}

// 0: it landed. Else the error that its completion has.
int land(Ep *ep, const iovec *iov, size_t count, fi_addr_t to, uint64_t address, uint64_t key, const uint64_t *data) {
  const std::shared_ptr<Port> port = to < ep->av->ids.size() ? find_port(ep->av->ids[to]) : nullptr;
  if (port == nullptr) return FI_ECONNABORTED;
  size_t length = 0;
  for (size_t i = 0; i < count; i++) length += iov[i].iov_len;
  std::lock_guard hold(port->lock);
  if (!port->open) return FI_ECONNABORTED;
  std::lock_guard keys(port->keys->lock);
  const auto found = port->keys->regions.find(key);
  if (found == port->keys->regions.end()) return FI_EACCES;
  const Keys::Region &region = found->second;
  const uint64_t offset = port->virtual_addresses ? address - reinterpret_cast<uint64_t>(region.base) : address;
  if (!(region.access & FI_REMOTE_WRITE) || offset > region.length || length > region.length - offset) return FI_EACCES;
  char *at = region.base + offset;
  for (size_t i = 0; i < count; at += iov[i].iov_len, i++) {
    if (iov[i].iov_len > 0) memcpy(at, iov[i].iov_base, iov[i].iov_len);
  }
  if (data != nullptr) port->arrive({false, *data, 0, length, ep->port->id, {}});
  return 0;
}

// `data`: nullptr for none.
ssize_t write(Ep *ep, const iovec *iov, size_t count, fi_addr_t to, uint64_t address, uint64_t key,
              const uint64_t *data, void *context, bool told) {
  if (ep->has_no_room()) return -FI_EAGAIN;
  const int error = ep->options.writes_land ? land(ep, iov, count, to, address, key, data) : 0;
  if (error != 0)
    fail(ep, context, FI_RMA | FI_WRITE, error);
  else if (told)
    ep->tx->push(context, FI_RMA | FI_WRITE, 0, 0, FI_ADDR_NOTAVAIL);
  return 0;
}

iovec part(const void *buffer, size_t length) { return {const_cast<void *>(buffer), length}; }

ssize_t writedata(fid_ep *object, const void *buffer, size_t length, void *, uint64_t data, fi_addr_t to,
                  uint64_t address, uint64_t key, void *context) {
  const iovec iov = part(buffer, length);
  return write(static_cast<Ep *>(object), &iov, 1, to, address, key, &data, context, true);
}
ssize_t writemsg(fid_ep *object, const fi_msg_rma *message, uint64_t flags) {
  if (message->rma_iov_count != 1) return -FI_EINVAL;
  return write(static_cast<Ep *>(object), message->msg_iov, message->iov_count, message->addr, message->rma_iov->addr,
               message->rma_iov->key, flags & FI_REMOTE_CQ_DATA ? &message->data : nullptr, message->context, true);
}
ssize_t writev(fid_ep *object, const iovec *iov, void **, size_t count, fi_addr_t to, uint64_t address, uint64_t key,
               void *context) {
  return write(static_cast<Ep *>(object), iov, count, to, address, key, nullptr, context, true);
}
ssize_t write(fid_ep *object, const void *buffer, size_t length, void *, fi_addr_t to, uint64_t address, uint64_t key,
              void *context) {
  const iovec iov = part(buffer, length);
  return write(static_cast<Ep *>(object), &iov, 1, to, address, key, nullptr, context, true);
}
ssize_t inject_write(fid_ep *object, const void *buffer, size_t length, fi_addr_t to, uint64_t address, uint64_t key) {
  const iovec iov = part(buffer, length);
  return write(static_cast<Ep *>(object), &iov, 1, to, address, key, nullptr, nullptr, false);
}
ssize_t inject_writedata(fid_ep *object, const void *buffer, size_t length, uint64_t data, fi_addr_t to,
                         uint64_t address, uint64_t key) {
  const iovec iov = part(buffer, length);
  return write(static_cast<Ep *>(object), &iov, 1, to, address, key, &data, nullptr, false);
}

ssize_t send(Ep *ep, const iovec *iov, size_t count, fi_addr_t to, uint64_t data, uint64_t flags, void *context,
             bool told) {
  if (ep->has_no_room()) return -FI_EAGAIN;
  const std::shared_ptr<Port> port = to < ep->av->ids.size() ? find_port(ep->av->ids[to]) : nullptr;
  if (port == nullptr) {
    fail(ep, context, FI_MSG | FI_SEND, FI_ECONNABORTED);
    return 0;
  }
  Arrival arrival = {true, data, flags, 0, ep->port->id, {}};
  for (size_t i = 0; i < count; i++) arrival.bytes.append(static_cast<char *>(iov[i].iov_base), iov[i].iov_len);
  {
    std::lock_guard hold(port->lock);
    if (port->open) port->arrive(std::move(arrival));
  }
  if (told) ep->tx->push(context, FI_MSG | FI_SEND, 0, 0, FI_ADDR_NOTAVAIL);
  return 0;
}

ssize_t sendv(fid_ep *object, const iovec *iov, void **, size_t count, fi_addr_t to, void *context) {
  return send(static_cast<Ep *>(object), iov, count, to, 0, 0, context, true);
}
ssize_t send(fid_ep *object, const void *buffer, size_t length, void *, fi_addr_t to, void *context) {
  const iovec iov = part(buffer, length);
  return send(static_cast<Ep *>(object), &iov, 1, to, 0, 0, context, true);
}
ssize_t senddata(fid_ep *object, const void *buffer, size_t length, void *, uint64_t data, fi_addr_t to,
                 void *context) {
  const iovec iov = part(buffer, length);
  return send(static_cast<Ep *>(object), &iov, 1, to, data, FI_REMOTE_CQ_DATA, context, true);
}
ssize_t sendmsg(fid_ep *object, const fi_msg *message, uint64_t flags) {
  return send(static_cast<Ep *>(object), message->msg_iov, message->iov_count, message->addr, message->data,
              flags & FI_REMOTE_CQ_DATA, message->context, true);
}
ssize_t inject(fid_ep *object, const void *buffer, size_t length, fi_addr_t to) {
  const iovec iov = part(buffer, length);
  return send(static_cast<Ep *>(object), &iov, 1, to, 0, 0, nullptr, false);
}
ssize_t injectdata(fid_ep *object, const void *buffer, size_t length, uint64_t data, fi_addr_t to) {
  const iovec iov = part(buffer, length);
  return send(static_cast<Ep *>(object), &iov, 1, to, data, FI_REMOTE_CQ_DATA, nullptr, false);
}

ssize_t recv(fid_ep *object, void *buffer, size_t length, void *, fi_addr_t, void *context) {
  Ep *ep = static_cast<Ep *>(object);
  ep->receives.push_back({buffer, length, context});
  ep->port->waiting.fetch_add(1, std::memory_order_release);
  return 0;
}
ssize_t recvmsg(fid_ep *object, const fi_msg *message, uint64_t) {
  if (message->iov_count != 1) return -FI_EINVAL;
  return recv(object, message->msg_iov->iov_base, message->msg_iov->iov_len, nullptr, 0, message->context);
}

int bind(fid *object, fid *other, uint64_t flags) {
  Ep *ep = as<fid_ep, Ep>(object);
  if (other->fclass == FI_CLASS_AV) ep->av = as<fid_av, Av>(other);
  if (other->fclass != FI_CLASS_CQ) return 0;
  Cq *cq = as<fid_cq, Cq>(other);
  if (flags & FI_TRANSMIT) ep->tx = cq;
  if (flags & FI_RECV) {
    ep->rx = cq;
    ep->port->wake = cq->wake;
  }
  if (std::find(cq->endpoints.begin(), cq->endpoints.end(), ep) == cq->endpoints.end()) cq->endpoints.push_back(ep);
  return 0;
}

int control(fid *object, int command, void *) {
  Ep *ep = as<fid_ep, Ep>(object);
  if (command != FI_ENABLE) return -FI_ENOSYS;
  if (ep->tx == nullptr || ep->rx == nullptr) return -FI_ENOCQ;
  if (ep->av == nullptr) return -FI_ENOAV;
  std::lock_guard hold(ports_lock);
  ports[ep->port->id] = ep->port;
  return 0;
}

int getname(fid_t object, void *address, size_t *length) {
  const bool fits = *length >= kAddressBytes;
  write_address(as<fid_ep, Ep>(object)->port->id, address, length);
  return fits ? 0 : -FI_ETOOSMALL;
}

int close_ep(fid *object) {
  Ep *ep = as<fid_ep, Ep>(object);
  {
    std::lock_guard hold(ports_lock);
    ports.erase(ep->port->id);
  }
  {
    std::lock_guard hold(ep->port->lock);
    ep->port->open = false;
    ep->port->wake = -1;
  }
  for (Cq *cq : {ep->tx, ep->rx}) {
    if (cq != nullptr) std::erase(cq->endpoints, ep);
  }
  delete ep;
  return 0;
}

ssize_t no_cancel(fid_t, void *) { return -FI_ENOSYS; }
int no_getopt(fid_t, int, int, void *, size_t *) { return -FI_ENOPROTOOPT; }
int no_setopt(fid_t, int, int, const void *, size_t) { return -FI_ENOPROTOOPT; }

}  // namespace

int endpoint(fid_domain *object, fi_info *, fid_ep **out, void *context) {
  static fi_ops ops = {sizeof ops, close_ep, bind, control, no_ops, nullptr, nullptr};
  static fi_ops_ep calls = {sizeof calls, no_cancel, no_getopt, no_setopt, nullptr, nullptr, nullptr, nullptr};
  static fi_ops_cm names = {sizeof names, nullptr, getname, nullptr, nullptr,
                            nullptr,      nullptr, nullptr, nullptr, nullptr};
  static fi_ops_msg messages = {sizeof messages, recv,    nullptr, recvmsg,  send,
                                sendv,           sendmsg, inject,  senddata, injectdata};
  static fi_ops_rma writes = {sizeof writes, nullptr,  nullptr,      nullptr,   write,
                              writev,        writemsg, inject_write, writedata, inject_writedata};
  Domain *domain = static_cast<Domain *>(object);
  Ep *ep = new Ep{};
  ep->fid = {FI_CLASS_EP, context, &ops};
  ep->ops = &calls;
  ep->cm = &names;
  ep->msg = &messages;
  ep->rma = &writes;
  ep->options = domain->options;
  ep->port = std::make_shared<Port>();
  ep->port->keys = domain->keys;
  ep->port->virtual_addresses = (domain->options.mr_mode & FI_MR_VIRT_ADDR) != 0;
  std::lock_guard hold(ports_lock);
  ep->port->id = ++ports_made;
  *out = ep;
  return 0;
}

}  // namespace libfabric::null_net
