// SPDX-License-Identifier: Apache-2.0
// The hot half: post, poll, arm.
//
// INVARIANTS
//  - Every WRITE and SIGNAL is an RMA write with remote CQ data, payload or not: that is the one operation of which
//    every provider checks the key and tells the target. Its 32 bits are the immediate.
//  - All that is told goes through `events`, which keeps the order; so a peer's PEER event comes before what follows
//    from it.
#include <sys/epoll.h>
#include <sys/timerfd.h>

#include <algorithm>
#include <cstring>

#include "../checks.h"
#include "instance.h"

using namespace libfabric;

namespace {

constexpr size_t kReadAtOnce = 32;    // entries of a completion queue
constexpr uint32_t kClockEvery = 64;  // polls between two looks at clock and event queues
constexpr uint64_t kTick = 5000000;   // on_time at least so often while the caller spins

}  // namespace

// ---- post -----------------------------------------------------------------------------------------------------------

int32_t ept_instance::post(const ept_op *ops, size_t count, size_t *posted) {
  size_t done = 0;
  int32_t code = EPT_OK;
  for (; done < count; ++done) {
    const ept_op &op = ops[done];
    Peer *peer = nullptr;
    code = check(op, &peer);
    if (code == EPT_OK) code = op.kind == EPT_OP_SEND ? post_send(peer, op) : post_write(peer, op);
    if (code != EPT_OK) break;
  }
  *posted = done;
  return code;
}

int32_t ept_instance::check(const ept_op &op, Peer **result) {
  Peer *peer = op.peer < peers.size() ? peers[op.peer].get() : nullptr;
  const int32_t code = plugin::check_peer("libfabric", peer, op.peer, closed_epochs);
  if (code != EPT_OK) return code;
  *result = peer;
  return plugin::check_operation<ept_mem, ept_region>(this, op, peer->epoch, {rails.size(), kMaxSend, max_message});
}

int32_t ept_instance::post_write(Peer *peer, const ept_op &op) {
  const uint32_t number = op.rail < peer->rails ? op.rail : op.rail % peer->rails;
  Rail *rail = rails[number].get();
  const bool payload = op.kind == EPT_OP_WRITE && op.length > 0;
  const ept_region *region = op.region;
  if (number >= region->keys.size())
    return fail(EPT_E_INVALID, "post", op.peer, 0, "libfabric: the region has keys for %zu rails, not for rail %u",
                region->keys.size(), number);
  Operation *operation = rail->take(Operation::Kind::kWrite, peer);
  if (operation == nullptr) {
    ++rail->counters.later;
    return EPT_LATER;
  }
  operation->cookie = op.cookie;
  operation->length = payload ? op.length : 0;
  operation->serial = next_serial++;
  // An operation without payload has a source all the same: EFA wants a descriptor with every one.
  const void *source = payload ? op.source : rail->sent.bytes.get();
  void *descriptor = payload ? op.source_mem->rails[number].descriptor : rail->sent.descriptor;
  const uint64_t address = region->address + (payload ? op.offset : 0);
  const uint64_t level = payload ? rail->write_level : rail->empty_level;
  ssize_t status = 0;
  if (level == 0) {
    status = fi_writedata(rail->ep.get(), source, operation->length, descriptor, op.immediate, peer->addresses[number],
                          address, region->keys[number], &operation->context);
  } else {
    const iovec bytes{const_cast<void *>(source), operation->length};
    const fi_rma_iov target{address, operation->length, region->keys[number]};
    const fi_msg_rma message{&bytes, &descriptor,         1,           peer->addresses[number], &target,
                             1,      &operation->context, op.immediate};
    status = fi_writemsg(rail->ep.get(), &message, FI_COMPLETION | FI_REMOTE_CQ_DATA | level);
  }
  if (status != 0) return not_posted(rail, operation, op, "write", static_cast<int>(-status));
  if (payload) {
    operation->mem = op.source_mem;
    ++op.source_mem->in_flight;
  }
  ++peer->in_flight;
  ++rail->counters.tx_operations;
  rail->counters.tx_bytes += operation->length;
  return EPT_OK;
}

int32_t ept_instance::not_posted(Rail *rail, Operation *operation, const ept_op &op, const char *what, int status) {
  rail->give_back(operation);
  if (status == FI_EAGAIN) {
    ++rail->counters.later;
    return EPT_LATER;
  }
  return fail(EPT_E_IO, "post", op.peer, status,
              "libfabric: a %s of %llu bytes to rank %u was refused by provider %s: %s", what,
              static_cast<unsigned long long>(op.length), op.peer, traits.setting.c_str(), library->strerror(status));
}

int32_t ept_instance::post_send(Peer *peer, const ept_op &op) {
  Rail *rail = rails[op.rail % peer->rails].get();
  Operation *operation = rail->free_sends.empty() ? nullptr : rail->take(Operation::Kind::kSend, peer);
  if (operation == nullptr) {
    ++rail->counters.later;
    return EPT_LATER;
  }
  operation->buffer = rail->sent.bytes.get() + size_t{rail->free_sends.back()} * kMessageBytes;
  rail->free_sends.pop_back();
  operation->cookie = op.cookie;
  operation->length = op.length;
  operation->serial = next_serial++;
  MessageHead head{kMessageMagic,
                   kVersion,
                   static_cast<uint8_t>(MessageType::kSend),
                   static_cast<uint8_t>(rail->number),
                   params.rank,
                   params.epoch,
                   peer->rank,
                   peer->epoch,
                   static_cast<uint32_t>(op.length),
                   0,
                   {}};
  memcpy(head.token, peer->to_it.data(), sizeof head.token);
  memcpy(operation->buffer, &head, sizeof head);
  if (op.length > 0) memcpy(operation->buffer + sizeof head, op.source, op.length);
  ssize_t status = fi_send(rail->ep.get(), operation->buffer, sizeof head + op.length, rail->sent.descriptor,
                           peer->addresses[rail->number], &operation->context);
  if (status != 0) return not_posted(rail, operation, op, "message", static_cast<int>(-status));
  ++peer->in_flight;
  ++rail->counters.tx_sends;
  return EPT_OK;
}

// ---- poll -----------------------------------------------------------------------------------------------------------

int32_t ept_instance::poll(ept_event *shown, size_t capacity) {
  if (watched) unwatch_rails();
  events.begin(shown, capacity);
  if (++since_clock >= kClockEvery || time_due_ns == 0) {
    since_clock = 0;
    uint64_t time = now();
    if (time >= time_due_ns) {
      time_due_ns = time + kTick;
      on_time(time);
    }
    for (auto &rail : rails) read_events(rail.get());
  }
  // The first to be read changes, so that a busy rail does not starve the others where the caller has little room.
  const auto count = static_cast<uint32_t>(rails.size());
  for (uint32_t i = 0; i < count && !events.full(); ++i) {
    uint32_t number = next_rail + i;
    read_queue(rails[number < count ? number : number - count].get());
  }
  if (++next_rail >= count) next_rail = 0;
  if (!quiesces.empty()) give_quiesced();
  return events.end();
}

void ept_instance::read_queue(Rail *rail) {
  fi_cq_data_entry entries[kReadAtOnce];
  if (!rail->broken.empty() && !fences.empty()) found_empty(rail);  // nothing comes from there any more
  while (!events.full() && rail->broken.empty()) {
    const size_t room = std::min(kReadAtOnce, events.room());
    ssize_t count = fi_cq_read(rail->cq.get(), entries, room);
    if (count == -FI_EAGAIN) {
      if (!fences.empty()) found_empty(rail);
      break;
    }
    if (count == -FI_EAVAIL) {
      read_error(rail);
      continue;
    }
    if (count < 0) {
      queue_died(rail, static_cast<int>(-count), library->strerror(static_cast<int>(-count)));
      break;
    }
    for (ssize_t i = 0; i < count; ++i) {
      const fi_cq_data_entry &entry = entries[i];
      if ((entry.flags & FI_REMOTE_CQ_DATA) != 0) {
        immediate(rail, entry.data, entry.len);
        Operation *used = rail->imm_takes_receive ? rail->of_context(entry.op_context) : nullptr;
        if (used != nullptr) rail->to_post.push_back(used->index);
        continue;
      }
      Operation *operation = rail->of_context(entry.op_context);
      if (operation == nullptr) continue;
      if (operation->kind == Operation::Kind::kReceive)
        on_message(rail, operation, entry.len);
      else
        completed(rail, operation);
    }
    if (count < static_cast<ssize_t>(room)) {
      // Less than there was room for is as good as empty; but a fence counts reads that gave nothing.
      if (fences.empty()) break;
    }
  }
  if (!rail->to_post.empty()) rail->post_receives();
}

void ept_instance::immediate(Rail *rail, uint64_t data, uint64_t length) {
  if (data > UINT32_MAX) {
    ++rail->counters.errors;
    return stranger("remote CQ data of more than 32 bits");
  }
  ++rail->counters.rx_operations;
  rail->counters.rx_bytes += length;  // 0 where the provider does not say
  ept_event *event = events.add(EPT_EVENT_IMM, UINT32_MAX, 0);
  event->rail = rail->number;
  event->immediate = static_cast<uint32_t>(data);
  event->length = length;
}

void ept_instance::completed(Rail *rail, Operation *operation) {
  Peer *peer = operation->peer;
  --peer->in_flight;
  if (operation->mem != nullptr) --operation->mem->in_flight;
  if (operation->kind != Operation::Kind::kControl && !operation->told) {
    if (peer->state == Peer::State::kEnded) {
      // After the end of a peer there is nothing but ERRORs.
      tell_error(rail, *operation, peer->code, peer->number, peer->text);
    } else {
      ept_event *event = events.add(EPT_EVENT_LOCAL_DONE, peer->rank, peer->epoch);
      event->rail = rail->number;
      event->cookie = operation->cookie;
      event->length = operation->length;
    }
  }
  rail->give_back(operation);
  if (peer->in_flight == 0 && peer->state == Peer::State::kEnded) {
    peer->orphans_due_ns = 0;
    reap();
  }
}

// ---- arm ------------------------------------------------------------------------------------------------------------

// The queues' descriptors are in the epoll only while somebody may sleep on it. Each is an epoll of the provider's over
// its sockets: as long as one more watches it, every segment that comes in wakes its way up through all of them, in the
// sender's time (up to a tenth of the bandwidth over tcp, docs/decisions.md).
bool ept_instance::watch_rails() {
  watched = true;
  return std::all_of(rails.begin(), rails.end(), [&](const auto &rail) {
    epoll_event event{};
    event.events = EPOLLIN;
    return rail->wait_fd >= 0 && epoll_ctl(epoll.get(), EPOLL_CTL_ADD, rail->wait_fd, &event) == 0;
  });
}

void ept_instance::unwatch_rails() {
  watched = false;
  for (auto &rail : rails)
    if (rail->wait_fd >= 0) epoll_ctl(epoll.get(), EPOLL_CTL_DEL, rail->wait_fd, nullptr);
}

int32_t ept_instance::arm(int32_t *descriptor) {
  *descriptor = -1;
  const bool fencing = std::any_of(fences.begin(), fences.end(), [](const Fence &fence) { return fence.due_ns == 0; });
  if (events.waiting() || fencing || !quiesces.empty()) return EPT_LATER;
  for (auto &rail : rails) {
    read_events(rail.get());
    if (!rail->to_post.empty()) return EPT_LATER;
  }
  if (events.waiting()) return EPT_LATER;
  if (!has_wait) return EPT_OK;
  for (auto &rail : rails) {
    if (!rail->broken.empty()) continue;
    fid *queue = &rail->cq->fid;
    if (fi_trywait(rail->fabric.get(), &queue, 1) != 0) return EPT_LATER;
  }
  const uint64_t next = next_deadline();
  if (next != timer_set_ns) {
    if (next != 0) time_due_ns = 0;  // the poll that it wakes looks at the clock
    plugin::set_timer(timer, next, now());
    timer_set_ns = next;
  }
  // One that is readable by now wakes whoever sleeps: an epoll looks when a descriptor is added.
  if (watched) unwatch_rails();
  if (!watch_rails()) {
    unwatch_rails();
    return EPT_OK;
  }
  *descriptor = epoll.get();
  return EPT_OK;
}
