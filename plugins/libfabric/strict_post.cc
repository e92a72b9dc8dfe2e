// SPDX-License-Identifier: Apache-2.0
//
// strict_post.cc: what a post is held to. A broken rule is refused before anything else is looked at, EAGAIN comes
// next, and what is taken goes into the window of its endpoint (strict_ep.cc) with its failure decided.
#include <algorithm>
#include <cstring>

#include "strict_objects.h"

namespace libfabric::strict {
namespace {

// What EFA knows of the flags of one operation.
constexpr uint64_t kFlags =
    FI_REMOTE_CQ_DATA | FI_COMPLETION | FI_INJECT | FI_INJECT_COMPLETE | FI_TRANSMIT_COMPLETE | FI_DELIVERY_COMPLETE;
constexpr size_t kMostParts = 2;  // scatter entries of a work request
constexpr int kUnknownPeer = 14;  // device_errors.h

uint64_t mark_of(const Op *op, size_t word) { return (op->number + 1) * 0x9e3779b97f4a7c15ull + word; }

void mark(const Op *op) {
  for (size_t i = 0; i < sizeof(fi_context2) / sizeof(uint64_t); i++) {
    const uint64_t word = mark_of(op, i);
    memcpy(static_cast<char *>(op->context) + i * sizeof word, &word, sizeof word);
  }
}

// What a call brings.
struct Post {
  Op::Kind kind;
  const iovec *iov;
  size_t count;
  void **descriptors;  // nullptr: none
  fi_addr_t peer;
  uint64_t address = 0, key = 0, data = 0, flags = 0;
  void *context = nullptr;
  bool injected = false;    // its buffer is free again at once; no completion
  bool by_message = false;  // with flags of its own
};

const char *name_of(Op::Kind kind) {
  if (kind == Op::Kind::kReceive) return "a receive";
  return kind == Op::Kind::kWrite ? "a write" : "a message";
}

// Rules that need nobody else: 0, or what the call returns.
int check_form(const Ep *ep, const Post &post, size_t length) {
  const Shared &shared = *ep->domain->shared;
  const StrictOptions &options = shared.options;
  const std::string what = name_of(post.kind);
  if (!ep->enabled) return -FI_EOPBADSTATE;
  if ((post.flags & ~kFlags) != 0)
    return shared.refuse(Deed::kFlags, what + " has flags that EFA has not, or that lose operations there (FI_MORE)");
  if (post.count == 0 || post.count > kMostParts) return shared.refuse(Deed::kTooLong, what + " has too many parts");
  if (post.kind == Op::Kind::kWrite && !(post.flags & FI_REMOTE_CQ_DATA) && !options.plain)
    return shared.refuse(Deed::kPlainWrite,
                         "a write without data: no provider has to check its key, nobody hears of it");
  const uint64_t most = post.injected ? options.inject : post.kind == Op::Kind::kWrite ? options.rma : options.msg;
  if (post.kind != Op::Kind::kReceive && length > most)
    return shared.refuse(Deed::kTooLong,
                         what + " of " + std::to_string(length) + " bytes, the longest is " + std::to_string(most));
  return 0;
}

int check_context(const Ep *ep, const Post &post) {
  const Shared &shared = *ep->domain->shared;
  if (post.injected) return 0;
  if (post.context == nullptr)
    return shared.refuse(Deed::kNoContext, std::string(name_of(post.kind)) + " without a context (FI_CONTEXT2)");
  if (ep->contexts.count(post.context) != 0)
    return shared.refuse(Deed::kContextInUse, std::string(name_of(post.kind)) + " with the context of one under way");
  return 0;
}

int check_memory(const Ep *ep, const Post &post, std::vector<Mr *> *mrs) {
  const Shared &shared = *ep->domain->shared;
  if (post.injected) return 0;
  const std::string what = name_of(post.kind);
  for (size_t i = 0; i < post.count; i++) {
    Mr *mr = post.descriptors == nullptr ? nullptr : static_cast<Mr *>(post.descriptors[i]);
    if (mr == nullptr) return shared.refuse(Deed::kNoDescriptor, what + " without a descriptor (FI_MR_LOCAL)");
    if (ep->domain->mrs.count(mr) == 0)
      return shared.refuse(Deed::kWrongDescriptor, what + " with a descriptor that no registration here has");
    const uint64_t from = reinterpret_cast<uint64_t>(post.iov[i].iov_base), base = reinterpret_cast<uint64_t>(mr->base);
    if (from < base || from - base > mr->length || post.iov[i].iov_len > mr->length - (from - base))
      return shared.refuse(Deed::kWrongDescriptor, what + " with the descriptor of other memory");
    mrs->push_back(mr);
  }
  return 0;
}

// `error`: what the device says of it later. A write over there needs us in its address vector before it is posted; a
// message carries its sender's address, but a fabric without that service (efa-direct) refuses it, so one in two is.
int check_peer(Ep *ep, const Post &post, const DeviceError **error, uint64_t *polls) {
  const Shared &shared = *ep->domain->shared;
  const auto here = ep->av->addresses.find(post.peer);
  if (here == ep->av->addresses.end())
    return shared.refuse(Deed::kUnknownHere, std::string(name_of(post.kind)) + " to a peer outside the address vector");
  bool gone = false;
  const std::shared_ptr<Presence> there = Registry::get().find(here->second, &gone);
  if (there == nullptr) return 0;
  *polls = there->polls();
  if (there->knows(ep->address)) return 0;
  const bool write = post.kind == Op::Kind::kWrite;
  if (write && !there->knew(ep->address))
    return shared.refuse(Deed::kUnknownThere, "a write to a peer whose address vector has never had us");
  if (write || ep->schedule.coin()) *error = device_error(kUnknownPeer);
  return 0;
}

// EAGAIN: too many under way, or a storm, which only reads of the queue end.
bool has_no_room(Ep *ep) {
  const Shared &shared = *ep->domain->shared;
  if (ep->in_flight >= ep->tx_size) {
    shared.did(Deed::kFull);
    return true;
  }
  if (ep->storm == 0) ep->storm = ep->schedule.storm();
  if (ep->storm == 0) return false;
  shared.did(Deed::kPostAgain);
  return true;
}

void inject_errors(Ep *ep, Op *op) {
  const StrictOptions &options = ep->domain->shared->options;
  const bool write = op->kind == Op::Kind::kWrite;
  const uint64_t number = write ? ++ep->writes : ++ep->sends;
  for (const Injection &injection : write ? options.errors : options.send_errors) {
    if (!injection.when(number) || op->fails != nullptr) continue;
    op->fails = device_error(injection.code);
    op->lands = op->fails->may_have_landed && ep->schedule.coin();
  }
  for (const When &when : options.event_errors) {
    if (!write || !when(number)) continue;
    ep->domain->shared->did(Deed::kEventError);
    fi_eq_err_entry entry = {};
    entry.fid = &ep->fid;
    entry.err = FI_EIO;
    entry.prov_errno = device_error("internal")->code;
    std::lock_guard hold(ep->eq->lock);
    ep->eq->errors.push_back(entry);
  }
}

ssize_t take(Ep *ep, const Post &post) {
  std::lock_guard hold(ep->domain->lock);
  const Shared &shared = *ep->domain->shared;
  size_t length = 0;
  for (size_t i = 0; i < post.count; i++) length += post.iov[i].iov_len;
  std::vector<Mr *> mrs;
  const DeviceError *error = nullptr;
  uint64_t polls = 0;
  int code = check_form(ep, post, length);
  if (code == 0) code = check_context(ep, post);
  if (code == 0) code = check_memory(ep, post, &mrs);
  if (code == 0) code = check_peer(ep, post, &error, &polls);
  if (code != 0) return code;
  if (has_no_room(ep)) return -FI_EAGAIN;
  Op *op = new Op{};
  op->kind = post.kind;
  op->ep = ep;
  op->context = post.injected ? nullptr : post.context;
  op->iov.assign(post.iov, post.iov + post.count);
  op->mrs = std::move(mrs);
  op->peer = post.peer;
  op->address = post.address, op->key = post.key, op->flags = post.flags;
  op->data = post.data & UINT32_MAX;
  if (op->data != post.data) shared.did(Deed::kTruncated);
  if (post.injected) {
    for (const iovec &part : op->iov) op->copy.append(static_cast<const char *>(part.iov_base), part.iov_len);
    op->iov.clear();
  }
  op->by_message = post.by_message;
  op->number = ep->posted++;
  const uint32_t wait = ep->schedule.wait();
  if (wait > 0) shared.did(Deed::kPutOff);
  op->due = ep->now + 1 + wait;  // never in the post itself
  op->until_ns = hold_until(shared.options);
  op->polls = polls;
  op->fails = error;
  inject_errors(ep, op);
  ep->ops[&op->room] = op;
  if (op->context != nullptr) {
    ep->contexts.insert(op->context);
    mark(op);
  }
  ep->window.push_back(op);
  ep->in_flight++;
  ep->tx->wake_up();
  return 0;
}

// Receives are the provider's at once: nothing moves by them alone.
ssize_t receive(fid_ep *object, const iovec *iov, void **descriptors, size_t count, fi_addr_t from, void *context,
                uint64_t flags) {
  Ep *ep = static_cast<Ep *>(object);
  std::lock_guard hold(ep->domain->lock);
  const Post post = {.kind = Op::Kind::kReceive,
                     .iov = iov,
                     .count = count,
                     .descriptors = descriptors,
                     .peer = from,
                     .flags = flags,
                     .context = context};
  std::vector<Mr *> mrs;
  int code = check_form(ep, post, 0);
  if (code == 0) code = check_context(ep, post);
  if (code == 0) code = check_memory(ep, post, &mrs);
  if (code != 0) return code;
  Op *op = new Op{};
  op->kind = post.kind;
  op->ep = ep;
  op->context = context;
  op->mrs = std::move(mrs);
  op->number = ep->posted++;
  std::vector<void *> real;
  for (const Mr *mr : op->mrs) real.push_back(fi_mr_desc(mr->real));
  ep->ops[&op->room] = op;
  const ssize_t result = count == 1 ? fi_recv(ep->real, iov->iov_base, iov->iov_len, real[0], from, &op->room)
                                    : fi_recvv(ep->real, iov, real.data(), count, from, &op->room);
  if (result != 0) {
    ep->ops.erase(&op->room);
    delete op;
    return result;
  }
  ep->contexts.insert(context);
  mark(op);
  ep->presence->post_receive();
  return 0;
}

// ---- the tables: each call as a Post

iovec part(const void *buffer, size_t length) { return {const_cast<void *>(buffer), length}; }

ssize_t recv(fid_ep *ep, void *buffer, size_t length, void *descriptor, fi_addr_t from, void *context) {
  const iovec iov = part(buffer, length);
  return receive(ep, &iov, &descriptor, 1, from, context, 0);
}
ssize_t recvv(fid_ep *ep, const iovec *iov, void **descriptors, size_t count, fi_addr_t from, void *context) {
  return receive(ep, iov, descriptors, count, from, context, 0);
}
ssize_t recvmsg(fid_ep *ep, const fi_msg *message, uint64_t flags) {
  return receive(ep, message->msg_iov, message->desc, message->iov_count, message->addr, message->context, flags);
}

ssize_t sendv(fid_ep *ep, const iovec *iov, void **descriptors, size_t count, fi_addr_t to, void *context) {
  return take(static_cast<Ep *>(ep), {.kind = Op::Kind::kSend,
                                      .iov = iov,
                                      .count = count,
                                      .descriptors = descriptors,
                                      .peer = to,
                                      .context = context});
}
ssize_t send(fid_ep *ep, const void *buffer, size_t length, void *descriptor, fi_addr_t to, void *context) {
  const iovec iov = part(buffer, length);
  return sendv(ep, &iov, &descriptor, 1, to, context);
}
ssize_t sendmsg(fid_ep *ep, const fi_msg *message, uint64_t flags) {
  return take(static_cast<Ep *>(ep), {.kind = Op::Kind::kSend,
                                      .iov = message->msg_iov,
                                      .count = message->iov_count,
                                      .descriptors = message->desc,
                                      .peer = message->addr,
                                      .data = message->data,
                                      .flags = flags,
                                      .context = message->context,
                                      .by_message = true});
}
ssize_t senddata(fid_ep *ep, const void *buffer, size_t length, void *descriptor, uint64_t data, fi_addr_t to,
                 void *context) {
  const iovec iov = part(buffer, length);
  return take(static_cast<Ep *>(ep), {.kind = Op::Kind::kSend,
                                      .iov = &iov,
                                      .count = 1,
                                      .descriptors = &descriptor,
                                      .peer = to,
                                      .data = data,
                                      .flags = FI_REMOTE_CQ_DATA,
                                      .context = context});
}
ssize_t inject(fid_ep *ep, const void *buffer, size_t length, fi_addr_t to) {
  const iovec iov = part(buffer, length);
  return take(static_cast<Ep *>(ep),
              {.kind = Op::Kind::kSend, .iov = &iov, .count = 1, .descriptors = nullptr, .peer = to, .injected = true});
}
ssize_t injectdata(fid_ep *ep, const void *buffer, size_t length, uint64_t data, fi_addr_t to) {
  const iovec iov = part(buffer, length);
  return take(static_cast<Ep *>(ep), {.kind = Op::Kind::kSend,
                                      .iov = &iov,
                                      .count = 1,
                                      .descriptors = nullptr,
                                      .peer = to,
                                      .data = data,
                                      .flags = FI_REMOTE_CQ_DATA,
                                      .injected = true});
}

ssize_t no_read(fid_ep *, void *, size_t, void *, fi_addr_t, uint64_t, uint64_t, void *) { return -FI_ENOSYS; }
ssize_t no_readv(fid_ep *, const iovec *, void **, size_t, fi_addr_t, uint64_t, uint64_t, void *) { return -FI_ENOSYS; }
ssize_t no_readmsg(fid_ep *, const fi_msg_rma *, uint64_t) { return -FI_ENOSYS; }

ssize_t writev(fid_ep *ep, const iovec *iov, void **descriptors, size_t count, fi_addr_t to, uint64_t address,
               uint64_t key, void *context) {
  return take(static_cast<Ep *>(ep), {.kind = Op::Kind::kWrite,
                                      .iov = iov,
                                      .count = count,
                                      .descriptors = descriptors,
                                      .peer = to,
                                      .address = address,
                                      .key = key,
                                      .context = context});
}
ssize_t write(fid_ep *ep, const void *buffer, size_t length, void *descriptor, fi_addr_t to, uint64_t address,
              uint64_t key, void *context) {
  const iovec iov = part(buffer, length);
  return writev(ep, &iov, &descriptor, 1, to, address, key, context);
}
ssize_t writemsg(fid_ep *ep, const fi_msg_rma *message, uint64_t flags) {
  if (message->rma_iov_count != 1) return -FI_EINVAL;
  return take(static_cast<Ep *>(ep), {.kind = Op::Kind::kWrite,
                                      .iov = message->msg_iov,
                                      .count = message->iov_count,
                                      .descriptors = message->desc,
                                      .peer = message->addr,
                                      .address = message->rma_iov->addr,
                                      .key = message->rma_iov->key,
                                      .data = message->data,
                                      .flags = flags,
                                      .context = message->context,
                                      .by_message = true});
}
ssize_t writedata(fid_ep *ep, const void *buffer, size_t length, void *descriptor, uint64_t data, fi_addr_t to,
                  uint64_t address, uint64_t key, void *context) {
  const iovec iov = part(buffer, length);
  return take(static_cast<Ep *>(ep), {.kind = Op::Kind::kWrite,
                                      .iov = &iov,
                                      .count = 1,
                                      .descriptors = &descriptor,
                                      .peer = to,
                                      .address = address,
                                      .key = key,
                                      .data = data,
                                      .flags = FI_REMOTE_CQ_DATA,
                                      .context = context});
}
ssize_t inject_write(fid_ep *ep, const void *buffer, size_t length, fi_addr_t to, uint64_t address, uint64_t key) {
  const iovec iov = part(buffer, length);
  return take(static_cast<Ep *>(ep), {.kind = Op::Kind::kWrite,
                                      .iov = &iov,
                                      .count = 1,
                                      .descriptors = nullptr,
                                      .peer = to,
                                      .address = address,
                                      .key = key,
                                      .injected = true});
}
ssize_t inject_writedata(fid_ep *ep, const void *buffer, size_t length, uint64_t data, fi_addr_t to, uint64_t address,
                         uint64_t key) {
  const iovec iov = part(buffer, length);
  return take(static_cast<Ep *>(ep), {.kind = Op::Kind::kWrite,
                                      .iov = &iov,
                                      .count = 1,
                                      .descriptors = nullptr,
                                      .peer = to,
                                      .address = address,
                                      .key = key,
                                      .data = data,
                                      .flags = FI_REMOTE_CQ_DATA,
                                      .injected = true});
}

}  // namespace

bool is_marked(const Op *op) {
  for (size_t i = 0; i < sizeof(fi_context2) / sizeof(uint64_t); i++) {
    uint64_t word;
    memcpy(&word, static_cast<const char *>(op->context) + i * sizeof word, sizeof word);
    if (word != mark_of(op, i)) return false;
  }
  return true;
}

fi_ops_msg message_table = {
    sizeof message_table, recv, recvv, recvmsg, send, sendv, sendmsg, inject, senddata, injectdata};
fi_ops_rma write_table = {sizeof write_table, no_read,      no_readv,  no_readmsg,      write, writev,
                          writemsg,           inject_write, writedata, inject_writedata};

}  // namespace libfabric::strict
