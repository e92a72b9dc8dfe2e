// SPDX-License-Identifier: Apache-2.0
//
// strict_cq.cc: completions and arrivals. Each read is one tick: the endpoints move, the provider's entries are taken,
// each waits as the schedule says, and those that are due come out shuffled.
//
// INVARIANT. An entry that the provider gave is in exactly one of `held`, `ready` and `error`, moves only forward
// through them, and leaves by one read. All three together, and nothing else, count against the size of the queue: what
// waits here has come (the network might have been as quick), and nobody has read it.
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>

#include "strict_objects.h"

namespace libfabric::strict {
namespace {

constexpr size_t kBatch = 64;           // entries taken from the provider at once
constexpr size_t kMostBatches = 64;     // a read's work is bounded
constexpr size_t kDefaultSize = 12288;  // EFA's, where none is asked for

size_t entry_size(fi_cq_format format) {
  switch (format) {
    case FI_CQ_FORMAT_CONTEXT:
      return sizeof(fi_cq_entry);
    case FI_CQ_FORMAT_MSG:
      return sizeof(fi_cq_msg_entry);
    case FI_CQ_FORMAT_TAGGED:
      return sizeof(fi_cq_tagged_entry);
    default:
      return sizeof(fi_cq_data_entry);
  }
}

// Below 0, so that nobody takes it for a code of the device.
int of_provider(const fi_cq_err_entry &error) { return error.prov_errno > 0 ? -error.prov_errno : error.prov_errno; }

void tell(const Shared &shared, Cq *cq) {
  shared.refuse(Deed::kOverrun, "a completion queue of " + std::to_string(cq->size) + " entries was overrun by " +
                                    std::to_string(cq->held.size() + cq->ready.size()) + " unread ones");
}

ssize_t readfrom(fid_cq *object, void *buffer, size_t count, fi_addr_t *sources) {
  Cq *cq = static_cast<Cq *>(object);
  std::lock_guard hold(cq->domain->lock);
  if (cq->error) return -FI_EAVAIL;
  if (cq->dead) return -FI_EOVERRUN;
  cq->move();
  if (cq->overrun) {
    cq->held.clear();
    cq->ready.clear();
    cq->dead = true;
    Entry entry = {};
    entry.error = FI_EOVERRUN;
    cq->error = entry;
    return -FI_EAVAIL;
  }
  if (cq->ready.empty()) return -FI_EAGAIN;
  if (cq->storm > 0 || (cq->storm = cq->schedule.storm()) > 0) {
    cq->storm--;
    cq->domain->shared->did(Deed::kReadAgain);
    return -FI_EAGAIN;
  }
  char *at = static_cast<char *>(buffer);
  size_t read = 0;
  while (read < count && !cq->ready.empty()) {
    const Entry &entry = cq->ready.front();
    if (entry.error != 0) {
      if (read > 0) break;
      cq->error = entry;
      cq->ready.pop_front();
      return -FI_EAVAIL;
    }
    memcpy(at, &entry.entry, entry_size(cq->format));  // each format is the beginning of the next
    at += entry_size(cq->format);
    if (sources != nullptr) sources[read] = entry.source;
    cq->ready.pop_front();
    read++;
  }
  return static_cast<ssize_t>(read);
}

ssize_t read(fid_cq *object, void *buffer, size_t count) { return readfrom(object, buffer, count, nullptr); }

ssize_t readerr(fid_cq *object, fi_cq_err_entry *out, uint64_t) {
  Cq *cq = static_cast<Cq *>(object);
  std::lock_guard hold(cq->domain->lock);
  if (!cq->error) return -FI_EAGAIN;
  const Entry entry = *cq->error;
  cq->error.reset();
  cq->last_was_device = entry.device != nullptr;
  out->op_context = entry.entry.op_context;
  out->flags = entry.entry.flags;
  out->len = entry.entry.len;
  out->buf = entry.entry.buf;
  out->data = entry.entry.data;
  out->tag = 0;
  out->olen = 0;
  out->err = entry.error;
  out->prov_errno = entry.provider;
  out->err_data = nullptr;
  out->err_data_size = 0;
  return 1;
}

const char *cq_strerror(fid_cq *object, int number, const void *data, char *text, size_t length) {
  Cq *cq = static_cast<Cq *>(object);
  std::lock_guard hold(cq->domain->lock);
  const DeviceError *error = device_error(number);
  if (!cq->last_was_device || error == nullptr) return fi_cq_strerror(cq->real, -number, data, text, length);
  if (text != nullptr && length > 0) {
    strncpy(text, error->words, length - 1);
    text[length - 1] = '\0';
  }
  return error->words;
}

ssize_t no_sread(fid_cq *, void *, size_t, const void *, int) { return -FI_ENOSYS; }
ssize_t no_sreadfrom(fid_cq *, void *, size_t, fi_addr_t *, const void *, int) { return -FI_ENOSYS; }
int no_signal(fid_cq *) { return -FI_ENOSYS; }

int close_cq(fid *object) {
  Cq *cq = as<Cq, fid_cq>(object);
  Domain *domain = cq->domain;
  std::lock_guard hold(domain->lock);
  if (!cq->endpoints.empty()) return -FI_EBUSY;
  const int code = fi_close(&cq->real->fid);
  if (code != 0) return code;
  domain->open--;
  for (const int descriptor : {cq->waits, cq->wake}) {
    if (descriptor >= 0) close(descriptor);
  }
  delete cq;
  return 0;
}

int cq_control(fid *object, int command, void *argument) {
  Cq *cq = as<Cq, fid_cq>(object);
  if (command != FI_GETWAIT || cq->waits < 0) return fi_control(&cq->real->fid, command, argument);
  *static_cast<int *>(argument) = cq->waits;
  return 0;
}

// The provider's descriptor and ours as one; none where the provider has none.
void make_descriptor(Cq *cq) {
  int provider = -1;
  if (fi_control(&cq->real->fid, FI_GETWAIT, &provider) != 0) return;
  cq->waits = epoll_create1(EPOLL_CLOEXEC);
  cq->wake = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  for (const int descriptor : {provider, cq->wake}) {
    epoll_event event = {};
    event.events = EPOLLIN;
    epoll_ctl(cq->waits, EPOLL_CTL_ADD, descriptor, &event);
  }
}

}  // namespace

void Cq::complete(Op *op, uint64_t flags, size_t length, uint64_t data, fi_addr_t source, int error_number,
                  int provider, const DeviceError *device) {
  Ep *ep = op->ep;
  if (op->kind != Op::Kind::kReceive) ep->in_flight--;
  if (op->kind == Op::Kind::kReceive) ep->presence->complete_receive();
  if (device != nullptr) domain->shared->did(Deed::kDeviceError);
  if (op->context != nullptr || error_number != 0) {
    Entry entry = {};
    entry.entry.op_context = op->context;
    entry.entry.flags = flags;
    entry.entry.len = length;
    entry.entry.data = data;
    entry.source = source;
    entry.number = arrived++;
    entry.due = now + schedule.wait();
    entry.until_ns = hold_until(domain->shared->options);
    entry.error = error_number;
    entry.provider = provider;
    entry.device = device;
    held.push_back(entry);
  }
  ep->forget(op);
}

void Cq::take(const fi_cq_data_entry &real_entry, fi_addr_t source) {
  for (Ep *ep : endpoints) {
    Op *op = real_entry.flags & FI_REMOTE_WRITE ? nullptr : ep->find(real_entry.op_context);
    if (op == nullptr) continue;
    if (op->kind == Op::Kind::kReceive) {
      const uint64_t flags = FI_MSG | FI_RECV | (real_entry.flags & FI_REMOTE_CQ_DATA);
      return complete(op, flags, real_entry.len, real_entry.data & UINT32_MAX, source, 0, 0, nullptr);
    }
    const uint64_t flags = op->kind == Op::Kind::kWrite ? FI_RMA | FI_WRITE : FI_MSG | FI_SEND;
    // The device lost the answer: it landed, and is an error here.
    if (op->fails != nullptr)
      return complete(op, flags, 0, 0, FI_ADDR_NOTAVAIL, op->fails->number, op->fails->code, op->fails);
    return complete(op, flags, 0, 0, FI_ADDR_NOTAVAIL, 0, 0, nullptr);
  }
  if (!(real_entry.flags & FI_REMOTE_CQ_DATA)) return;  // the completion of an injection
  Entry entry = {};
  entry.entry.flags = FI_RMA | FI_REMOTE_WRITE | FI_REMOTE_CQ_DATA;
  entry.entry.len = real_entry.len;
  entry.entry.data = real_entry.data & UINT32_MAX;
  entry.source = source;
  entry.number = arrived++;
  entry.due = now + schedule.wait();
  entry.until_ns = hold_until(domain->shared->options);
  held.push_back(entry);
}

void Cq::take_error(const fi_cq_err_entry &real_error) {
  for (Ep *ep : endpoints) {
    Op *op = ep->find(real_error.op_context);
    if (op != nullptr)
      return complete(op, real_error.flags, real_error.len, 0, FI_ADDR_NOTAVAIL, real_error.err,
                      of_provider(real_error), nullptr);
  }
  Entry entry = {};
  entry.entry.flags = real_error.flags;
  entry.source = FI_ADDR_NOTAVAIL;
  entry.number = arrived++;
  entry.error = real_error.err;
  entry.provider = of_provider(real_error);
  held.push_back(entry);
}

uint64_t clock_ns() {
  return static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1));
}

uint64_t hold_until(const StrictOptions &options) {
  return options.hold_ms == 0 ? UINT64_MAX : clock_ns() + options.hold_ms * uint64_t{1000000};
}

void Cq::wake_up() {
  if (wake < 0 || woken) return;
  woken = true;
  eventfd_write(wake, 1);
}

void Cq::move() {
  now++;
  if (woken) {
    woken = false;
    eventfd_t value;
    eventfd_read(wake, &value);
  }
  for (Ep *ep : endpoints) {
    if (ep->tx == this) ep->advance();
    if (ep->rx == this && ep->presence) ep->presence->poll();
  }
  for (size_t batch = 0; batch < kMostBatches; batch++) {
    fi_cq_data_entry entries[kBatch];
    fi_addr_t sources[kBatch];
    std::fill(sources, sources + kBatch, FI_ADDR_NOTAVAIL);
    const ssize_t count = fi_cq_readfrom(real, entries, kBatch, sources);
    if (count == -FI_EAVAIL) {
      fi_cq_err_entry entry = {};
      if (fi_cq_readerr(real, &entry, 0) == 1) take_error(entry);
      continue;
    }
    if (count <= 0) break;
    for (ssize_t i = 0; i < count; i++) take(entries[i], sources[i]);
  }
  if (held.size() + ready.size() > size) {
    overrun = true;
    tell(*domain->shared, this);
    return;
  }
  std::vector<Entry> due;
  const uint64_t time = held.empty() ? 0 : clock_ns();
  std::erase_if(held, [&](const Entry &entry) {
    if (entry.due > now && entry.until_ns > time) return false;
    due.push_back(entry);
    return true;
  });
  schedule.shuffle(due);
  for (size_t i = 0; i < due.size(); i++) {
    const auto older = [&](const Entry &entry) { return entry.number < due[i].number; };
    if (std::any_of(held.begin(), held.end(), older) ||
        std::any_of(due.begin() + static_cast<ptrdiff_t>(i) + 1, due.end(), older))
      domain->shared->did(Deed::kShuffled);
    ready.push_back(due[i]);
  }
}

int open_cq(fid_domain *object, fi_cq_attr *attr, fid_cq **out, void *context) {
  static fi_ops ops = {sizeof ops, close_cq, no_bind, cq_control, no_ops, nullptr, nullptr};
  static fi_ops_cq table = {sizeof table, read, readfrom, readerr, no_sread, no_sreadfrom, no_signal, cq_strerror};
  Domain *domain = static_cast<Domain *>(object);
  const size_t asked = attr->size != 0 ? attr->size : kDefaultSize;
  fi_cq_attr real_attr = *attr;
  real_attr.format = FI_CQ_FORMAT_DATA;
  // The provider's never fills first: it would hold senders back, which EFA doesn't.
  real_attr.size = 2 * asked;
  std::lock_guard hold(domain->lock);
  fid_cq *real = nullptr;
  const int code = fi_cq_open(domain->real, &real_attr, &real, nullptr);
  if (code != 0) return code;
  Cq *cq = new Cq(domain, domain->shared->number());
  cq->fid = {FI_CLASS_CQ, context, &ops};
  cq->ops = &table;
  cq->real = real;
  cq->format = attr->format;
  cq->size = domain->shared->options.cq != 0 ? domain->shared->options.cq : asked;
  if (attr->wait_obj == FI_WAIT_FD) make_descriptor(cq);
  domain->open++;
  *out = cq;
  return 0;
}

}  // namespace libfabric::strict
