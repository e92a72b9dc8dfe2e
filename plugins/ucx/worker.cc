// SPDX-License-Identifier: Apache-2.0
// The hot half: post, poll, arm, quiesce. wire.h has the invariant of how an operation ends.
//
// UCX has no write with an immediate, and its messages are seen by the target's software, which looks at the key before
// it puts a byte anywhere. A payload inside a message is copied to its place; a long one comes by rendezvous, straight
// into its place once the key was looked at, with whatever the network has for that.
//
// UCX takes any number of operations and never says that it is full: tx_depth bounds what is under way here.
#include <sys/epoll.h>
#include <sys/timerfd.h>

#include <algorithm>
#include <cstring>

#include "../checks.h"
#include "instance.h"

using namespace ucx;
using plugin::MessageHead;
using plugin::MessageType;

namespace {

constexpr int kProgressAtMost = 64;   // calls of ucp_worker_progress in a poll
constexpr uint32_t kClockEvery = 64;  // polls between two looks at the clock
constexpr uint64_t kTick = 5000000;   // on_time at least so often while the caller spins

// A message that is no operation: a greeting, or how far this rank has got.
struct Note {
  Peer *peer;
  std::vector<uint8_t> head, data;
};

// How UCX says that it has sent what an operation says.
ucp_request_param_t when_sent(Operation *operation, uint32_t flags) {
  ucp_request_param_t how{};
  how.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_FLAGS;
  how.flags = flags;
  how.user_data = operation;
  how.cb.send = [](void *pending, ucs_status_t status, void *user) {
    auto *sent = static_cast<Operation *>(user);
    ept_instance *instance = sent->peer->instance;
    instance->library->ucp_request_free(pending);
    instance->left(sent, status);
  };
  return how;
}

}  // namespace

// ---- post -----------------------------------------------------------------------------------------------------------

int32_t ept_instance::post(const ept_op *ops, size_t count, size_t *posted) {
  size_t done = 0;
  int32_t code = EPT_OK;
  for (; done < count; ++done) {
    const ept_op &op = ops[done];
    Peer *peer = nullptr;
    code = check(op, &peer);
    if (code == EPT_OK && in_flight >= settings.tx_depth) {
      ++counters.later;
      code = EPT_LATER;
    }
    if (code == EPT_OK) code = op.kind == EPT_OP_SEND ? post_send(peer, op) : post_write(peer, op);
    if (code != EPT_OK) break;
  }
  *posted = done;
  return code;
}

int32_t ept_instance::check(const ept_op &op, Peer **result) {
  Peer *peer = op.peer < peers.size() ? peers[op.peer].get() : nullptr;
  if (peer == nullptr)
    return fail(closed_epochs.count(op.peer) != 0 ? EPT_E_CLOSED : EPT_E_INVALID, "post", op.peer, 0,
                "ucx: rank %u is not open", op.peer);
  if (peer->state == Peer::State::kEnded) return fail(peer->code, "post", op.peer, 0, "ucx: %s", peer->text.c_str());
  if (peer->state != Peer::State::kUp)
    return fail(EPT_E_INVALID, "post", op.peer, 0, "ucx: rank %u is not connected yet", op.peer);
  *result = peer;
  return plugin::check_operation<ept_mem, ept_region>(this, op, peer->epoch, {1, kMaxSend, settings.max_message});
}

// UCX has read head and payload of this operation, or never will.
void ept_instance::left(Operation *operation, ucs_status_t status) {
  operation->left = true;
  Peer *peer = operation->peer;
  if (status != UCS_OK && peer->broken == UCS_OK && peer->state != Peer::State::kEnded) {
    peer->broken = status;
    some_broke = true;
  }
  if (peer->operations.front().serial == operation->serial) settle(peer);
}

int32_t ept_instance::post_write(Peer *peer, const ept_op &op) {
  const bool payload = op.kind == EPT_OP_WRITE && op.length > 0;
  const ept_region *region = op.region;
  const bool gpu = payload && (region->kind == EPT_MEMORY_CUDA || op.source_mem->memory.kind == EPT_MEMORY_CUDA);
  const bool apart = payload && settings.write != Write::kMessage && (gpu || op.length >= settings.rendezvous);
  Operation &operation = peer->operations.emplace_back();
  operation.peer = peer;
  operation.serial = peer->next_serial;
  operation.cookie = op.cookie;
  operation.length = payload ? op.length : 0;
  WriteHead &head = operation.head;
  head.from = params.rank;
  head.opening = static_cast<uint32_t>(peer->opening);
  head.serial = operation.serial;
  head.done = peer->done;  // what it refused was said by the poll that met it
  head.immediate = op.immediate;
  head.region = region->name;
  head.offset = payload ? op.offset : 0;
  head.length = operation.length;
  memcpy(head.key, region->key.data(), sizeof head.key);
  void *request = nullptr;
  if (apart && settings.write == Write::kPut) {
    const ucs_status_t status = start_put(&operation, op);
    if (status != UCS_OK) request = reinterpret_cast<void *>(static_cast<intptr_t>(status));
  } else {
    ucp_request_param_t how = when_sent(&operation, apart ? UCP_AM_SEND_FLAG_RNDV : UCP_AM_SEND_FLAG_EAGER);
    if (!gpu) {  // else UCX looks it up each time
      how.op_attr_mask |= UCP_OP_ATTR_FIELD_MEMORY_TYPE;
      how.memory_type = UCS_MEMORY_TYPE_HOST;
    }
    request = library->ucp_am_send_nbx(peer->ep, static_cast<unsigned>(Am::kWrite), &head, kWriteBytes,
                                       payload ? op.source : nullptr, operation.length, &how);
    if (request == nullptr) operation.left = true;
  }
  if (UCS_PTR_IS_ERR(request)) {
    const ucs_status_t status = UCS_PTR_STATUS(request);
    peer->operations.pop_back();
    end_peer(peer, EPT_E_PEER_LOST,
             format("rank %u is lost: a write to it can't be sent: %s (%d)", peer->rank, library->words(status).c_str(),
                    status),
             true);
    return fail(EPT_E_PEER_LOST, "post", op.peer, status, "ucx: %s", peer->text.c_str());
  }
  if (payload) {
    operation.mem = op.source_mem;
    ++op.source_mem->in_flight;
  }
  ++in_flight;
  ++peer->next_serial;
  peer->said = head.done;
  ++counters.tx_operations;
  counters.tx_bytes += operation.length;
  return EPT_OK;
}

// An RDMA write, and a flush behind it: when that has ended, the bytes are at the target, and the message may go. Never
// a fence instead: a weak one orders within an interface alone, and a strong one blocks.
ucs_status_t ept_instance::start_put(Operation *operation, const ept_op &op) {
  ept_region *region = op.region;
  Peer *peer = operation->peer;
  if (region->rkey == nullptr) {
    const ucs_status_t status = library->ucp_ep_rkey_unpack(peer->ep, region->packed.data(), &region->rkey);
    if (status != UCS_OK) return status;
  }
  ucp_request_param_t how{};
  how.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
  how.user_data = const_cast<Library *>(library.get());
  how.cb.send = [](void *pending, ucs_status_t, void *user) {
    static_cast<const Library *>(user)->ucp_request_free(pending);  // an error shows in the flush
  };
  void *request = library->ucp_put_nbx(peer->ep, op.source, op.length, region->address + op.offset, region->rkey, &how);
  if (UCS_PTR_IS_ERR(request)) return UCS_PTR_STATUS(request);
  how.user_data = operation;
  how.cb.send = [](void *pending, ucs_status_t status, void *user) {
    auto *put = static_cast<Operation *>(user);
    put->peer->instance->library->ucp_request_free(pending);
    put->peer->instance->flushed(put, status);
  };
  request = library->ucp_ep_flush_nbx(peer->ep, &how);
  if (!UCS_PTR_IS_PTR(request)) flushed(operation, UCS_PTR_STATUS(request));
  return UCS_OK;
}

void ept_instance::flushed(Operation *operation, ucs_status_t status) {
  Peer *peer = operation->peer;
  if (status != UCS_OK || peer->state == Peer::State::kEnded) return left(operation, status);
  ucp_request_param_t how = when_sent(operation, UCP_AM_SEND_FLAG_EAGER);
  void *request = library->ucp_am_send_nbx(peer->ep, static_cast<unsigned>(Am::kArrived), &operation->head,
                                           sizeof operation->head, nullptr, 0, &how);
  if (!UCS_PTR_IS_PTR(request)) left(operation, UCS_PTR_STATUS(request));
}

int32_t ept_instance::post_send(Peer *peer, const ept_op &op) {
  Operation &operation = peer->operations.emplace_back();
  operation.peer = peer;
  operation.serial = peer->next_serial;
  operation.cookie = op.cookie;
  operation.length = op.length;
  MessageHead head{};
  head.magic = kMessageMagic;
  head.version = kVersion;
  head.type = static_cast<uint8_t>(MessageType::kSend);
  head.from = params.rank;
  head.from_epoch = params.epoch;
  head.to = peer->rank;
  head.to_epoch = peer->epoch;
  head.length = static_cast<uint32_t>(op.length);
  head.serial = operation.serial;
  memcpy(head.token, peer->to_it.data(), sizeof head.token);
  operation.copied.resize(sizeof head + op.length);
  memcpy(operation.copied.data(), &head, sizeof head);
  if (op.length > 0) memcpy(operation.copied.data() + sizeof head, op.source, op.length);
  ucp_request_param_t how = when_sent(&operation, UCP_AM_SEND_FLAG_EAGER);
  void *request = library->ucp_am_send_nbx(peer->ep, static_cast<unsigned>(Am::kMessage), operation.copied.data(),
                                           sizeof head, operation.copied.data() + sizeof head, op.length, &how);
  if (UCS_PTR_IS_ERR(request)) {
    const ucs_status_t status = UCS_PTR_STATUS(request);
    peer->operations.pop_back();
    end_peer(peer, EPT_E_PEER_LOST,
             format("rank %u is lost: a message to it can't be sent: %s (%d)", peer->rank,
                    library->words(status).c_str(), status),
             true);
    return fail(EPT_E_PEER_LOST, "post", op.peer, status, "ucx: %s", peer->text.c_str());
  }
  if (request == nullptr) operation.left = true;
  ++in_flight;
  ++peer->next_serial;
  ++counters.tx_sends;
  return EPT_OK;
}

void ept_instance::note(Peer *peer, Am am, std::vector<uint8_t> head, std::vector<uint8_t> data) {
  if (peer->ep == nullptr || peer->closing != nullptr || peer->broken != UCS_OK) return;
  auto note = std::make_unique<Note>(Note{peer, std::move(head), std::move(data)});
  ucp_request_param_t how{};
  how.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_FLAGS;
  how.flags = UCP_AM_SEND_FLAG_EAGER;
  how.user_data = note.get();
  how.cb.send = [](void *pending, ucs_status_t, void *user) {
    const std::unique_ptr<Note> sent(static_cast<Note *>(user));
    sent->peer->instance->library->ucp_request_free(pending);
    --sent->peer->greetings;
  };
  void *request = library->ucp_am_send_nbx(peer->ep, static_cast<unsigned>(am), note->head.data(), note->head.size(),
                                           note->data.data(), note->data.size(), &how);
  if (UCS_PTR_IS_PTR(request)) {
    ++peer->greetings;
    static_cast<void>(note.release());
  } else if (UCS_PTR_IS_ERR(request)) {
    peer->broken = UCS_PTR_STATUS(request);
    some_broke = true;
  }
}

// ---- poll -----------------------------------------------------------------------------------------------------------

int32_t ept_instance::poll(ept_event *shown, size_t capacity) {
  events.begin(shown, capacity);
  bool idle = true;
  for (int i = 0; i < kProgressAtMost && !events.full() && library->ucp_worker_progress(ucp) != 0; ++i) idle = false;
  if (some_broke) end_broken();
  if (!owing.empty()) answer(idle);
  if (++since_clock >= kClockEvery || time_due_ns == 0) {
    since_clock = 0;
    const uint64_t time = now();
    if (time >= time_due_ns) {
      time_due_ns = time + kTick;
      on_time(time);
      reap();
    }
  }
  if (!leaving.empty()) reap();
  if (!fences.empty()) {
    reap();
    give_fenced();
  }
  if (!quiesces.empty()) give_quiesced();
  return events.end();
}

int32_t ept_instance::arm(int32_t *descriptor) {
  *descriptor = -1;
  if (events.waiting() || !fences.empty() || !quiesces.empty() || some_broke) return EPT_LATER;
  for (Peer *peer : owing) {
    if (peer->done != peer->said || !peer->refused.empty()) say_done(peer);
    peer->owing = false;
  }
  owing.clear();
  if (library->ucp_worker_arm(ucp) != UCS_OK) return EPT_LATER;
  const uint64_t next = next_deadline();
  if (next != timer_set_ns) {
    if (next != 0) time_due_ns = 0;  // the poll that it wakes looks at the clock
    plugin::set_timer(timer, next, now());
    timer_set_ns = next;
  }
  *descriptor = epoll.get();
  return EPT_OK;
}

int32_t ept_instance::quiesce(uint32_t rank, int32_t scope, uint64_t cookie) {
  if (scope != EPT_SCOPE_LOCAL && scope != EPT_SCOPE_REMOTE)
    return fail(EPT_E_INVALID, "quiesce", rank, 0, "ucx: scope %d is neither local nor remote", scope);
  Quiesce entry{cookie, rank, std::vector<uint32_t>(params.world)};
  for (uint32_t i = 0; i < params.world; ++i) entry.until[i] = peers[i] != nullptr ? peers[i]->next_serial : 0;
  quiesces.push_back(std::move(entry));
  give_quiesced();
  return EPT_OK;
}

// An operation is told when it has ended at the target, so both scopes wait for the same.
void ept_instance::give_quiesced() {
  for (size_t i = 0; i < quiesces.size();) {
    const Quiesce &entry = quiesces[i];
    bool busy = false;
    const Peer *stuck = nullptr;
    auto look = [&](const Peer *peer, bool open) {
      if (peer == nullptr || (entry.rank != UINT32_MAX && entry.rank != peer->rank)) return;
      for (const Operation &operation : peer->operations) {
        if (open && !before(operation.serial, entry.until[peer->rank])) break;
        if (!operation.told)
          busy = true;
        else if (!operation.left)
          stuck = peer;  // told, and UCX holds it still
      }
    };
    for (const auto &peer : peers) look(peer.get(), true);
    for (const auto &peer : leaving) look(peer.get(), false);
    if (busy) {
      ++i;
      continue;
    }
    ept_event *event =
        events.add(EPT_EVENT_QUIESCED, entry.rank, stuck != nullptr ? stuck->epoch : 0,
                   stuck != nullptr
                       ? format("the worker of rank %u, which still holds operations to rank %u, epoch %u: UCX has not "
                                "given them back",
                                params.rank, stuck->rank, stuck->epoch)
                       : std::string());
    event->cookie = entry.cookie;
    event->code = stuck != nullptr ? EPT_E_STUCK : EPT_OK;
    quiesces.erase(quiesces.begin() + static_cast<ptrdiff_t>(i));
  }
}
