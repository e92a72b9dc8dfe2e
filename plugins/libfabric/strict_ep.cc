// SPDX-License-Identifier: Apache-2.0
//
// strict_ep.cc: the endpoint: what it is bound to, and how what was posted (strict_post.cc) leaves for the provider.
//
// INVARIANT. An operation that a post took is in `ops` until its one completion, and in `window` until it has left or
// has failed here; it leaves at most once, and only inside `advance`, which only a read of the endpoint's queue calls.
// What fails here never leaves, so nobody over there can see it; `lands` is set for those alone whose answer gets lost
// on the way back. The provider is given `room` and never the plugin's context, which holds a mark of ours meanwhile,
// as a provider would write to it: whoever reuses or writes to it destroys the mark.
#include <algorithm>
#include <cstring>

#include "strict_objects.h"

namespace libfabric::strict {
namespace {

constexpr size_t kLongestAddress = 256;
constexpr int kRnr = 10, kBadQpn = 9;  // device_errors.h

uint64_t flags_of(const Op *op) { return op->kind == Op::Kind::kWrite ? FI_RMA | FI_WRITE : FI_MSG | FI_SEND; }

// ---- how an operation leaves

// The provider's own address of what a key of ours opens (strict_domain.cc says how).
uint64_t real_address(const Op *op) {
  return op->ep->domain->real_mr_mode & FI_MR_VIRT_ADDR ? op->address : op->address - base_of_key(op->key);
}

ssize_t give_injected(Op *op) {
  fid_ep *real = op->ep->real;
  const char *from = op->copy.data();
  const bool data = (op->flags & FI_REMOTE_CQ_DATA) != 0;
  if (op->kind == Op::Kind::kWrite) {
    return data ? fi_inject_writedata(real, from, op->copy.size(), op->data, op->peer, real_address(op), op->key)
                : fi_inject_write(real, from, op->copy.size(), op->peer, real_address(op), op->key);
  }
  return data ? fi_injectdata(real, from, op->copy.size(), op->data, op->peer)
              : fi_inject(real, from, op->copy.size(), op->peer);
}

ssize_t give_message(Op *op, void **descriptors) {
  fi_msg message = {};
  message.msg_iov = op->iov.data();
  message.desc = descriptors;
  message.iov_count = op->iov.size();
  message.addr = op->peer;
  message.context = &op->room;
  message.data = op->data;
  return fi_sendmsg(op->ep->real, &message, op->flags);
}

ssize_t give_write_message(Op *op, void **descriptors) {
  size_t length = 0;
  for (const iovec &part : op->iov) length += part.iov_len;
  const fi_rma_iov target = {real_address(op), length, op->key};
  fi_msg_rma message = {};
  message.msg_iov = op->iov.data();
  message.desc = descriptors;
  message.iov_count = op->iov.size();
  message.addr = op->peer;
  message.rma_iov = &target;
  message.rma_iov_count = 1;
  message.context = &op->room;
  message.data = op->data;
  return fi_writemsg(op->ep->real, &message, op->flags);
}

// By the call that the plugin made, so that what the provider does of itself (its default flags) stays as it is.
ssize_t give(Op *op) {
  if (op->context == nullptr) return give_injected(op);
  fid_ep *real = op->ep->real;
  std::vector<void *> descriptors;
  for (const Mr *mr : op->mrs) descriptors.push_back(fi_mr_desc(mr->real));
  const bool data = (op->flags & FI_REMOTE_CQ_DATA) != 0;
  const iovec &first = op->iov.front();
  if (op->kind == Op::Kind::kSend) {
    if (op->by_message || (data && op->iov.size() > 1)) return give_message(op, descriptors.data());
    if (data) return fi_senddata(real, first.iov_base, first.iov_len, descriptors[0], op->data, op->peer, &op->room);
    if (op->iov.size() == 1) return fi_send(real, first.iov_base, first.iov_len, descriptors[0], op->peer, &op->room);
    return fi_sendv(real, op->iov.data(), descriptors.data(), op->iov.size(), op->peer, &op->room);
  }
  if (op->by_message) return give_write_message(op, descriptors.data());
  if (data)
    return fi_writedata(real, first.iov_base, first.iov_len, descriptors[0], op->data, op->peer, real_address(op),
                        op->key, &op->room);
  if (op->iov.size() == 1)
    return fi_write(real, first.iov_base, first.iov_len, descriptors[0], op->peer, real_address(op), op->key,
                    &op->room);
  return fi_writev(real, op->iov.data(), descriptors.data(), op->iov.size(), op->peer, real_address(op), op->key,
                   &op->room);
}

void fail(Op *op, const DeviceError *error) {
  op->ep->tx->complete(op, flags_of(op), 0, 0, FI_ADDR_NOTAVAIL, error->number, error->code, error);
}

// ---- the object

int bind(fid *object, fid *other, uint64_t flags) {
  Ep *ep = as<Ep, fid_ep>(object);
  Domain *domain = ep->domain;
  std::lock_guard hold(domain->lock);
  if (other->fclass == FI_CLASS_EQ) {
    ep->eq = as<Eq, fid_eq>(other);
    // A provider that has nothing to say there may refuse it; ours have.
    fi_ep_bind(ep->real, &ep->eq->real->fid, flags);
    return 0;
  }
  if (other->fclass == FI_CLASS_AV) {
    Av *av = as<Av, fid_av>(other);
    const int code = fi_ep_bind(ep->real, &av->real->fid, flags);
    if (code == 0) ep->av = av;
    return code;
  }
  if (other->fclass != FI_CLASS_CQ || (flags & ~(FI_TRANSMIT | FI_RECV)) != 0) return -FI_ENOSYS;
  Cq *cq = as<Cq, fid_cq>(other);
  const int code = fi_ep_bind(ep->real, &cq->real->fid, flags);
  if (code != 0) return code;
  if (flags & FI_TRANSMIT) ep->tx = cq;
  if (flags & FI_RECV) ep->rx = cq;
  if (std::find(cq->endpoints.begin(), cq->endpoints.end(), ep) == cq->endpoints.end()) cq->endpoints.push_back(ep);
  return 0;
}

int enable(Ep *ep) {
  const Shared &shared = *ep->domain->shared;
  if (ep->eq == nullptr)
    return shared.refuse(Deed::kNoEventQueue,
                         "an endpoint without an event queue was enabled: EFA ends the process "
                         "when it has an error that names no operation");
  if (ep->tx == nullptr || ep->rx == nullptr) return -FI_ENOCQ;
  if (ep->av == nullptr) return -FI_ENOAV;
  int code = fi_enable(ep->real);
  if (code != 0) return code;
  char bytes[kLongestAddress];
  size_t length = sizeof bytes;
  code = fi_getname(&ep->real->fid, bytes, &length);
  if (code != 0) return code;
  ep->address = address_key(ep->domain->address_format, bytes, length);
  ep->presence = std::make_shared<Presence>(ep->av->known);
  ep->enabled = true;
  Registry::get().enter(ep->address, ep->presence);
  return 0;
}

int control(fid *object, int command, void *argument) {
  Ep *ep = as<Ep, fid_ep>(object);
  std::lock_guard hold(ep->domain->lock);
  return command == FI_ENABLE ? enable(ep) : fi_control(&ep->real->fid, command, argument);
}

int close_ep(fid *object) {
  Ep *ep = as<Ep, fid_ep>(object);
  Domain *domain = ep->domain;
  std::lock_guard hold(domain->lock);
  if (ep->enabled) Registry::get().leave(ep->address);
  const int code = fi_close(&ep->real->fid);
  if (code != 0) return code;
  ep->drop();
  for (Cq *cq : {ep->tx, ep->rx}) {
    if (cq != nullptr) std::erase(cq->endpoints, ep);
  }
  std::erase(domain->endpoints, ep);
  domain->open--;
  delete ep;
  return 0;
}

int getname(fid *object, void *address, size_t *length) {
  return fi_getname(&as<Ep, fid_ep>(object)->real->fid, address, length);
}

ssize_t no_cancel(fid *, void *) { return -FI_ENOSYS; }
int getopt(fid *object, int level, int name, void *value, size_t *length) {
  return fi_getopt(&as<Ep, fid_ep>(object)->real->fid, level, name, value, length);
}
int setopt(fid *object, int level, int name, const void *value, size_t length) {
  return fi_setopt(&as<Ep, fid_ep>(object)->real->fid, level, name, value, length);
}

}  // namespace

bool Ep::leave(Op *op) {
  const Shared &shared = *domain->shared;
  if (op->fails != nullptr && !op->lands) {
    fail(op, op->fails);
    return true;
  }
  const auto there = av->addresses.find(op->peer);
  if (there == av->addresses.end()) {  // taken out of the vector meanwhile
    fail(op, device_error(4));
    return true;
  }
  bool gone = false;
  const std::shared_ptr<Presence> target = Registry::get().find(there->second, &gone);
  if (gone) {
    fail(op, device_error(kBadQpn));
    return true;
  }
  if (target != nullptr && shared.options.manual && !target->moves(op->polls)) {
    if (!op->unpolled) shared.did(Deed::kUnpolled);
    op->unpolled = true;
    return false;
  }
  const bool takes_receive = target != nullptr && op->kind == Op::Kind::kSend;
  if (takes_receive && !target->take_receive()) {
    if (op->stalled == 0) {
      op->stalled = now;
      shared.did(Deed::kStalled);
    }
    if (shared.options.rnr == 0 || now - op->stalled < shared.options.rnr) return false;
    fail(op, device_error(kRnr));
    return true;
  }
  const ssize_t code = give(op);
  if (code != 0 && takes_receive) target->give_receive_back();
  if (code == -FI_EAGAIN) return false;
  if (code != 0)
    tx->complete(op, flags_of(op), 0, 0, FI_ADDR_NOTAVAIL, static_cast<int>(-code), 0, nullptr);
  else if (op->context == nullptr)
    tx->complete(op, flags_of(op), 0, 0, FI_ADDR_NOTAVAIL, op->fails ? op->fails->number : 0,
                 op->fails ? op->fails->code : 0, op->fails);
  return true;
}

void Ep::advance() {
  now++;
  if (storm > 0) storm--;
  if (window.empty()) return;
  std::vector<Op *> due, stay;
  const uint64_t time = clock_ns();
  for (Op *op : window) (op->due <= now || op->until_ns <= time ? due : stay).push_back(op);
  schedule.shuffle(due);
  std::vector<uint64_t> left;
  for (Op *op : due) {
    const uint64_t number = op->number;
    if (leave(op))
      left.push_back(number);
    else
      stay.push_back(op);
  }
  std::sort(stay.begin(), stay.end(), [](const Op *a, const Op *b) { return a->number < b->number; });
  window.swap(stay);
  // Who left earlier with a higher number overtook, and so did who left while a lower one stays.
  uint64_t lowest = window.empty() ? UINT64_MAX : window.front()->number;
  for (size_t i = left.size(); i-- > 0;) {
    if (left[i] > lowest) domain->shared->did(Deed::kOvertook);
    lowest = std::min(lowest, left[i]);
  }
}

void Ep::forget(Op *op) {
  if (op->context != nullptr) {
    if (!is_marked(op)) {
      domain->shared->refuse(Deed::kContextWritten,
                             "the fi_context2 of an operation was written to, or used for "
                             "another one, before its completion");
    }
    contexts.erase(op->context);
  }
  ops.erase(&op->room);
  delete op;
}

void Ep::drop() {
  for (const auto &[room, op] : ops) delete op;
  ops.clear();
  window.clear();
  contexts.clear();
}

int open_ep(fid_domain *object, fi_info *info, fid_ep **out, void *context) {
  static fi_ops ops = {sizeof ops, close_ep, bind, control, no_ops, nullptr, nullptr};
  static fi_ops_ep calls = {sizeof calls, no_cancel, getopt, setopt, nullptr, nullptr, nullptr, nullptr};
  static fi_ops_cm names = {sizeof names, nullptr, getname, nullptr, nullptr,
                            nullptr,      nullptr, nullptr, nullptr, nullptr};
  Domain *domain = static_cast<Domain *>(object);
  fi_info *real_info = domain->shared->restored(info);
  if (real_info == nullptr) return -FI_EINVAL;
  fid_ep *real = nullptr;
  std::lock_guard hold(domain->lock);
  const int code = fi_endpoint(domain->real, real_info, &real, nullptr);
  domain->shared->inner->freeinfo(real_info);
  if (code != 0) return code;
  Ep *ep = new Ep(domain, domain->shared->number());
  ep->fid = {FI_CLASS_EP, context, &ops};
  ep->fid_ep::ops = &calls;
  ep->cm = &names;
  ep->msg = &message_table;
  ep->rma = &write_table;
  ep->real = real;
  ep->tx_size = info->tx_attr->size;
  domain->endpoints.push_back(ep);
  domain->open++;
  *out = ep;
  return 0;
}

}  // namespace libfabric::strict
