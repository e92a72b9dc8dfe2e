// SPDX-License-Identifier: Apache-2.0
// The hot half: post, poll, arm, quiesce.
//
// INVARIANTS
//  - Every WRITE and SIGNAL is an RDMA write with immediate, payload or not; every SEND a SEND. Each takes one receive
//  of
//    the other side's, of which there are as many as its credits and kReturn more; they are given back kReturn at a
//    time, so never fewer are posted than credits.
//  - Requests of one call of post to one queue pair are one chain, with one doorbell, and the last of a chain is
//    signalled: so at most kBatch - 1 requests stand unsignalled, and every one is covered by a completion to come. On
//    one queue pair completions come in order: one that came says the same of all before it.
//  - Events come out in the order in which they were found (../events.h): so a peer's PEER event comes before what
//    follows from it.
#include <arpa/inet.h>
#include <sys/epoll.h>
#include <sys/timerfd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "../checks.h"
#include "instance.h"

using namespace verbs;

namespace {

constexpr size_t kReadAtOnce = 32;    // entries of a completion queue
constexpr uint32_t kClockEvery = 64;  // polls between two looks at the clock

}  // namespace

// ---- post -----------------------------------------------------------------------------------------------------------

int32_t ept_instance::post(const ept_op *ops, size_t count, size_t *posted) {
  size_t done = 0;
  int32_t code = EPT_OK;
  for (; done < count; ++done) {
    const ept_op &op = ops[done];
    Peer *peer = nullptr;
    code = check(op, &peer);
    if (code == EPT_OK) code = op.kind == EPT_OP_SEND ? post_message(peer, op) : post_write(peer, op);
    if (code != EPT_OK) break;
  }
  flush();
  *posted = done;
  return code;
}

int32_t ept_instance::check(const ept_op &op, Peer **result) {
  Peer *peer = op.peer < peers.size() ? peers[op.peer].get() : nullptr;
  int32_t code = plugin::check_peer("verbs", peer, op.peer, closed_epochs);
  if (code != EPT_OK) return code;
  *result = peer;
  code = plugin::check_operation<ept_mem, ept_region>(this, op, peer->epoch,
                                                      {counters.size(), kMaxSend, settings.max_message});
  if (code != EPT_OK || op.kind == EPT_OP_SEND) return code;
  const ept_region *region = op.region;
  if (region->keys.size() < peer->nics)
    return fail(EPT_E_INVALID, "post", op.peer, 0, "verbs: the region has keys for %zu NICs, and %u are in use",
                region->keys.size(), peer->nics);
  if (op.kind == EPT_OP_WRITE && op.length > 0 && region->dead)
    return fail(EPT_E_ACCESS, "post", op.peer, IBV_WC_REM_ACCESS_ERR,
                "verbs: this key was refused by rank %u before: it was taken back, or never was one", op.peer);
  return EPT_OK;
}

// The rail's own channel, or where that is down any that is up. nullptr: none has room now.
Channel *ept_instance::choose(Peer *peer, bool messages, uint32_t rail) {
  const uint32_t data = peer->data_channels();
  const uint32_t first = messages ? data : 0, count = messages ? peer->nics : data;
  uint32_t at = messages ? 0 : peer->preferred[rail];
  for (uint32_t i = 0; i < count; ++i) {
    Channel *channel = peer->channels[first + at].get();
    if (channel->up()) return channel->room() ? channel : nullptr;
    if (++at == count) at = 0;
  }
  return nullptr;
}

int32_t ept_instance::post_write(Peer *peer, const ept_op &op) {
  Channel *channel = choose(peer, false, op.rail);
  if (channel == nullptr) {
    ++counters[op.rail].later;
    return EPT_LATER;
  }
  const bool payload = op.kind == EPT_OP_WRITE && op.length > 0;
  Operation &operation = fresh(channel);
  operation.immediate = op.immediate;
  operation.cookie = op.cookie;
  operation.serial = next_serial++;
  operation.region = op.region;
  operation.target = op.region->address;
  ++op.region->holders;
  if (payload) {
    operation.length = op.length;
    operation.target += op.offset;
    operation.source = op.source;
    operation.mem = op.source_mem;
    ++op.source_mem->in_flight;
  }
  ept_rail_counters &counted = counters[channel->rail];
  ++counted.tx_operations;
  counted.tx_bytes += operation.length;
  stage(channel);
  return EPT_OK;
}

int32_t ept_instance::post_message(Peer *peer, const ept_op &op) {
  Channel *channel = free_sends.empty() ? nullptr : choose(peer, true, op.rail);
  if (channel == nullptr) {
    ++counters[op.rail].later;
    return EPT_LATER;
  }
  Operation &operation = fresh(channel);
  operation.kind = Operation::Kind::kMessage;
  operation.cookie = op.cookie;
  operation.length = op.length;
  operation.serial = next_serial++;
  operation.buffer = free_sends.back();
  free_sends.pop_back();
  if (op.length > 0)
    memcpy(send_buffers.get() + static_cast<size_t>(operation.buffer) * kMaxSend, op.source, op.length);
  ++counters[channel->rail].tx_sends;
  stage(channel);
  return EPT_OK;
}

// The next place in the channel's ring, for the caller to fill; then stage() it.
Operation &ept_instance::fresh(Channel *channel) {
  if (batch.count == kBatch) flush();
  return channel->at(channel->next) = Operation{};
}

// Takes what stands in that place, and its request into the chain that flush() gives to the NIC.
void ept_instance::stage(Channel *channel) {
  const uint64_t ordinal = channel->next++;
  const Operation &operation = channel->at(ordinal);
  const uint32_t nic = channel->nic->number;
  ibv_send_wr &request = batch.requests[batch.count];
  ibv_sge &range = batch.ranges[batch.count++];
  request.wr_id = channel->id(Request::kSend, static_cast<uint32_t>(ordinal) & RequestId::kLowMask);
  request.next = nullptr;
  request.sg_list = &range;
  request.num_sge = operation.length > 0 ? 1 : 0;
  request.send_flags = 0;
  range.length = static_cast<uint32_t>(operation.length);
  switch (operation.kind) {
    case Operation::Kind::kWrite:
      request.opcode = IBV_WR_RDMA_WRITE_WITH_IMM;
      request.imm_data = htonl(operation.immediate);
      request.wr.rdma.remote_addr = operation.target;
      request.wr.rdma.rkey = operation.region->keys[nic];
      if (operation.length == 0) break;
      range.addr = reinterpret_cast<uint64_t>(operation.source);
      range.lkey = operation.mem->nics[nic]->lkey;
      if (operation.length <= channel->nic->plan.inline_bytes && operation.mem->inlines)
        request.send_flags = IBV_SEND_INLINE;
      break;
    case Operation::Kind::kMessage:
      request.opcode = IBV_WR_SEND;
      range.addr = reinterpret_cast<uint64_t>(send_buffers.get() + static_cast<size_t>(operation.buffer) * kMaxSend);
      range.lkey = channel->nic->messages->lkey;
      break;
    case Operation::Kind::kProbe:
      // Told from a message, of which there are some without bytes, by its immediate.
      request.opcode = IBV_WR_SEND_WITH_IMM;
      request.imm_data = 0;
      break;
  }
  if (channel->first == nullptr) {
    channel->first = &request;
    batch.touched[batch.channels++] = channel;
  } else {
    channel->last->next = &request;
  }
  channel->last = &request;
}

void ept_instance::flush() {
  for (uint32_t i = 0; i < batch.channels; ++i) flush(batch.touched[i]);
  batch.count = batch.channels = 0;
}

void ept_instance::flush(Channel *channel) {
  channel->last->send_flags |= IBV_SEND_SIGNALED;
  ibv_send_wr *bad = nullptr;
  const int status = ibv_post_send(channel->qp.get(), channel->first, &bad);
  channel->first = channel->last = nullptr;
  // What was not taken is in the ring all the same, and goes with the next queue pair.
  if (status != 0) broke(channel, format("posting was refused: %s (%d)", strerror(status), status), true);
}

void ept_instance::release(Operation *operation) {
  if (operation->mem != nullptr) --operation->mem->in_flight;
  if (operation->region != nullptr) let_go(operation->region);
  if (operation->buffer >= 0) free_sends.push_back(operation->buffer);
  operation->mem = nullptr;
  operation->region = nullptr;
  operation->buffer = -1;
}

// ---- poll -----------------------------------------------------------------------------------------------------------

int32_t ept_instance::poll(ept_event *into, size_t capacity) {
  events.begin(into, capacity);
  if (armed) {
    armed = false;
    since_clock = kClockEvery;
    for (auto &nic : nics) {
      if (!nic->armed) continue;
      nic->armed = !nic->take_notices();
      armed = armed || nic->armed;
    }
    for (auto &nic : nics) read_events(nic.get());
  }
  if (++since_clock >= kClockEvery || time_due_ns == 0) {
    since_clock = 0;
    const uint64_t time = now();
    if (time >= time_due_ns) {
      time_due_ns = time + kTick;
      on_time(time);
      for (auto &nic : nics) read_events(nic.get());  // a system call each
    }
  }
  // The first to be read changes, so that a busy NIC does not starve the others where the caller has little room.
  const auto count = static_cast<uint32_t>(nics.size());
  for (uint32_t i = 0; i < count && !events.full(); ++i) read_queue(nics[(next_nic + i) % count].get());
  if (++next_nic >= count) next_nic = 0;
  if (!retiring.empty() || !fences.empty()) mend();
  if (replaying > 0) replay();
  if (!leaving.empty()) reap();
  if (!quiesces.empty()) give_quiesced();
  return events.end();
}

void ept_instance::read_queue(Nic *nic) {
  if (!nic->stash.empty()) {
    const std::vector<ibv_wc> stash = std::move(nic->stash);
    nic->stash.clear();
    for (const ibv_wc &completion : stash) completed(nic, completion);
  }
  ibv_wc completions[kReadAtOnce];
  while (!events.full() && nic->broken.empty()) {
    const size_t room = std::min(kReadAtOnce, events.room());
    const int count = ibv_poll_cq(nic->cq.get(), static_cast<int>(room), completions);
    if (count < 0) return nic_failed(nic, "its completion queue can't be read any more");
    for (int i = 0; i < count; ++i) completed(nic, completions[i]);
    if (count < static_cast<int>(room)) break;
  }
}

// Without it no channel of the NIC could be made anew, and its peers would wait until they are given up as silent.
void ept_instance::unmute(Nic *nic) {
  if (!nic->unmute()) nic_failed(nic, "its queue pair for datagrams broke, and the NIC makes it ready no more");
}

void ept_instance::completed(Nic *nic, const ibv_wc &completion) {
  const RequestId id = RequestId::of(completion.wr_id);
  const bool datagram = id.kind == Request::kSaid || id.kind == Request::kHeard;
  if (datagram && completion.status != IBV_WC_SUCCESS && nic->mute())
    log(EPT_LOG_INFO, format("verbs: rank %u: datagrams broke on %s: %s (%d)", params.rank, nic->port.device.c_str(),
                             library->wc_status_str(completion.status), completion.status));
  if (id.kind == Request::kSaid) {
    nic->free_said.push_back(id.low);
    return unmute(nic);
  }
  if (id.kind == Request::kHeard) {
    constexpr uint32_t kGrh = 40;
    if (completion.status == IBV_WC_SUCCESS && completion.byte_len >= kGrh)
      on_datagram(nic, id.low, completion.byte_len - kGrh);
    if (!nic->muted) return nic->listen(id.low, completion.wr_id);
    nic->not_heard.emplace_back(id.low, completion.wr_id);
    return unmute(nic);
  }
  if (id.slot == UINT16_MAX) return read_completed(nic, id, completion);
  Channel *channel = id.slot < slots.size() ? slots[id.slot] : nullptr;
  if (channel == nullptr || channel->serial != id.serial || !channel->qp) return;  // of a queue pair that is gone
  if (id.kind == Request::kReceive) {
    --channel->out;
    if (completion.status == IBV_WC_SUCCESS) return received(channel, completion, id.low);
    return broke(channel,
                 format("a receive failed: %s (%d)", library->wc_status_str(completion.status), completion.status),
                 false);
  }
  const uint64_t ordinal = channel->base + ((id.low - static_cast<uint32_t>(channel->base)) & RequestId::kLowMask);
  if (ordinal >= channel->next) return;  // an unsignalled one before a signalled one that came already, flushed late
  if (completion.status == IBV_WC_SUCCESS) {
    acknowledge(channel, ordinal + 1);
    if (channel->state == Channel::State::kConnected) went_up(channel);
  } else if (completion.status == IBV_WC_WR_FLUSH_ERR) {
    broke(channel, "its queue pair was stopped by the NIC", false);
  } else {
    acknowledge(channel, ordinal);
    refused(channel, ordinal, completion);
  }
}

void ept_instance::received(Channel *channel, const ibv_wc &completion, uint32_t buffer) {
  Peer *peer = channel->peer;
  ++channel->consumed;
  const bool probe = completion.opcode == IBV_WC_RECV && (completion.wc_flags & IBV_WC_WITH_IMM) != 0;
  // It came by a queue pair that the other side has connected, so the way is whole.
  if (channel->state == Channel::State::kConnected) went_up(channel);
  const uint32_t rail = channel->rail;
  if (peer->state != Peer::State::kEnded && !probe) {
    if (!channel->messages) {
      ++counters[rail].rx_operations;
      counters[rail].rx_bytes += completion.byte_len;
      ept_event *event = events.add(EPT_EVENT_IMM, peer->rank, peer->epoch);
      event->rail = rail;
      event->immediate = ntohl(completion.imm_data);
      event->length = completion.byte_len;
    } else {
      ++counters[rail].rx_sends;
      const uint8_t *bytes = channel->buffer(buffer);
      ept_event *event = events.add(EPT_EVENT_RECV, peer->rank, peer->epoch, {}, {bytes, bytes + completion.byte_len});
      event->rail = rail;
      event->length = completion.byte_len;
    }
  }
  if (channel->state == Channel::State::kRetiring) return;
  if (channel->messages)
    channel->post_buffer(buffer);
  else if (++channel->due >= channel->return_at())
    channel->return_receives(1);
}

// Operations below `up_to` are done.
void ept_instance::acknowledge(Channel *channel, uint64_t up_to) {
  Peer *peer = channel->peer;
  const uint32_t rail = channel->rail;
  for (; channel->base < up_to; ++channel->base) {
    Operation &operation = channel->at(channel->base);
    if (operation.kind == Operation::Kind::kProbe) {
      channel->probing = false;
      continue;
    }
    if (peer->state == Peer::State::kEnded) {
      // After the end of a peer there is nothing but ERRORs.
      fail_operation(peer, rail, &operation, peer->code, peer->number, peer->text);
      continue;
    }
    release(&operation);
    ept_event *event = events.add(EPT_EVENT_LOCAL_DONE, peer->rank, peer->epoch);
    event->rail = rail;
    event->cookie = operation.cookie;
    event->length = operation.length;
  }
}

// ---- arm ------------------------------------------------------------------------------------------------------------

int32_t ept_instance::arm(int32_t *descriptor) {
  *descriptor = -1;
  if (events.waiting() > 0 || !fences.empty() || !quiesces.empty() || !retiring.empty()) return EPT_LATER;
  for (auto &nic : nics) {
    read_events(nic.get());
    if (!nic->stash.empty()) return EPT_LATER;
    if (!nic->broken.empty() || nic->armed) continue;
    if (ibv_req_notify_cq(nic->cq.get(), 0) != 0) return EPT_OK;
    nic->armed = armed = true;
    // What came before the notice was asked for gives none.
    ibv_wc completion;
    if (ibv_poll_cq(nic->cq.get(), 1, &completion) > 0) {
      nic->stash.push_back(completion);
      return EPT_LATER;
    }
  }
  if (events.waiting() > 0 || !retiring.empty()) return EPT_LATER;
  const uint64_t next = next_deadline();
  if (next != timer_set_ns) {
    if (next != 0) time_due_ns = 0;  // the poll that it wakes looks at the clock
    plugin::set_timer(timer, next, now());
    timer_set_ns = next;
  }
  *descriptor = epoll.get();
  return EPT_OK;
}

// ---- quiesce --------------------------------------------------------------------------------------------------------

// An operation that was acknowledged over a reliable connection has ended over there too: both scopes are one.
int32_t ept_instance::quiesce(uint32_t rank, int32_t scope, uint64_t cookie) {
  if (scope != EPT_SCOPE_LOCAL && scope != EPT_SCOPE_REMOTE)
    return fail(EPT_E_INVALID, "quiesce", rank, 0, "verbs: scope %d is neither local nor remote", scope);
  quiesces.push_back({cookie, rank, next_serial});
  give_quiesced();
  return EPT_OK;
}

void ept_instance::give_quiesced() {
  std::erase_if(quiesces, [&](const Quiesce &entry) {
    auto busy = [&](const Peer *peer) {
      if (peer == nullptr || (entry.rank != UINT32_MAX && peer->rank != entry.rank)) return false;
      for (const Operation &operation : peer->replay)
        if (operation.serial < entry.serial) return true;
      for (const auto &channel : peer->channels)
        for (uint64_t i = channel->base; i < channel->next; ++i)
          if (channel->at(i).serial < entry.serial && channel->at(i).kind != Operation::Kind::kProbe) return true;
      return false;
    };
    for (const auto &peer : peers)
      if (busy(peer.get())) return false;
    for (const auto &peer : leaving)
      if (busy(peer.get())) return false;
    events.add(EPT_EVENT_QUIESCED, entry.rank, 0)->cookie = entry.cookie;
    return true;
  });
}
