// SPDX-License-Identifier: Apache-2.0
// The hot half: post, poll, arm, quiesce, and what arrives. wire.h has the invariant of how an operation ends.
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

#include "instance.h"

using namespace ucx;
using plugin::MessageHead;
using plugin::MessageType;

namespace {

constexpr int kProgressAtMost = 64;   // calls of ucp_worker_progress in a poll
constexpr uint32_t kClockEvery = 64;  // polls between two looks at the clock
constexpr uint64_t kTick = 5000000;   // on_time at least so often while the caller spins
// Ended here and not told: more than this and the peer's source memory waits longer than the word costs.
constexpr uint32_t kUnsaidMost = 32;
// A peer that numbers its operations honestly is never this far ahead: tx_depth has that bound.
constexpr uint32_t kWindow = 1 << 17;

bool before(uint32_t a, uint32_t b) { return static_cast<int32_t>(a - b) < 0; }

// A message that is no operation: a greeting, or how far this rank has got.
struct Note {
  Peer *peer;
  std::vector<uint8_t> head, data;
};

}  // namespace

// ---- what arrives ---------------------------------------------------------------------------------------------------

int32_t ept_instance::set_handlers() {
  struct Handler {
    Am am;
    ucp_am_recv_callback_t call;
  };
  const Handler handlers[] = {
      {Am::kMessage,
       [](void *self, const void *head, size_t head_length, void *data, size_t length,
          const ucp_am_recv_param_t *param) -> ucs_status_t {
         auto *instance = static_cast<ept_instance *>(self);
         std::vector<uint8_t> bytes(static_cast<const uint8_t *>(head),
                                    static_cast<const uint8_t *>(head) + head_length);
         if ((param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) == 0 && length <= kMaxSend)
           bytes.insert(bytes.end(), static_cast<uint8_t *>(data), static_cast<uint8_t *>(data) + length);
         instance->on_message(bytes.data(), bytes.size());
         return UCS_OK;
       }},
      {Am::kWrite,
       [](void *self, const void *head, size_t head_length, void *data, size_t length,
          const ucp_am_recv_param_t *param) -> ucs_status_t {
         auto *instance = static_cast<ept_instance *>(self);
         WriteHead write{};
         if (head_length != kWriteBytes) return instance->stranger("its write has no head of one"), UCS_OK;
         memcpy(&write, head, kWriteBytes);
         return instance->on_write(write, false, data, length, (param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) != 0);
       }},
      {Am::kArrived,
       [](void *self, const void *head, size_t head_length, void *data, size_t,
          const ucp_am_recv_param_t *param) -> ucs_status_t {
         auto *instance = static_cast<ept_instance *>(self);
         WriteHead write{};
         if (head_length != sizeof write || (param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) != 0)
           return instance->stranger("its write has no head of one"), UCS_OK;
         memcpy(&write, head, sizeof write);
         return instance->on_write(write, true, data, write.length, false);
       }},
      {Am::kDone,
       [](void *self, const void *head, size_t head_length, void *data, size_t length,
          const ucp_am_recv_param_t *param) -> ucs_status_t {
         auto *instance = static_cast<ept_instance *>(self);
         if ((param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) == 0)
           instance->on_done(static_cast<const uint8_t *>(head), head_length, static_cast<const uint8_t *>(data),
                             length);
         return UCS_OK;
       }},
  };
  for (const Handler &handler : handlers) {
    ucp_am_handler_param_t wanted{};
    wanted.field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_FLAGS |
                        UCP_AM_HANDLER_PARAM_FIELD_CB | UCP_AM_HANDLER_PARAM_FIELD_ARG;
    wanted.id = static_cast<unsigned>(handler.am);
    wanted.flags = UCP_AM_FLAG_WHOLE_MSG;
    wanted.cb = handler.call;
    wanted.arg = this;
    const ucs_status_t status = library->ucp_worker_set_am_recv_handler(ucp, &wanted);
    if (status != UCS_OK)
      return fail(EPT_E_UNAVAILABLE, "open", -1, status,
                  "ucx: no active messages over the transports that were asked for: %s (%d)",
                  library->words(status).c_str(), status);
  }
  return EPT_OK;
}

ucs_status_t ept_instance::on_write(const WriteHead &head, bool put, void *data, size_t length, bool rendezvous) {
  Peer *peer = head.from < params.world ? peers[head.from].get() : nullptr;
  // Of a link that is no more, or was never opened: who sent it learns so from its endpoint.
  if (peer == nullptr || peer->its_opening == 0 || static_cast<uint32_t>(peer->its_opening) != head.opening ||
      peer->state == Peer::State::kEnded)
    return UCS_OK;
  if (head.serial - peer->done >= kWindow) return stranger("its write has a number that can't be"), UCS_OK;
  ++peer->arrivals;
  const auto found = exports.find(head.region);
  Export *given = found != exports.end() ? &found->second : nullptr;
  const bool known = given != nullptr && given->rank == peer->rank &&
                     (given->any_epoch || given->epoch == peer->epoch) &&
                     same_bytes(head.key, given->key.data(), given->key.size());
  if (!known || head.offset > given->length || length > given->length - head.offset) {
    // Without the key nothing shows that this is of that peer; and if it is, it only hears that it was refused.
    refuse(peer, head.serial, EPT_E_ACCESS);
    return UCS_OK;
  }
  take_for_up(peer);
  accept_done(peer, head.done);
  ept_mem *mem = given->mem;
  uint8_t *place = static_cast<uint8_t *>(mem->memory.address) + given->offset + head.offset;
  if (!rendezvous) {
    if (!put && length > 0) memcpy(place, data, length);
    ept_event *event = events.add(EPT_EVENT_IMM, peer->rank, peer->epoch);
    event->immediate = head.immediate;
    event->length = length;
    ++counters.rx_operations;
    counters.rx_bytes += length;
    finish(peer, head.serial);
    return UCS_OK;
  }
  auto *receiving = new Receiving{peer, mem, head.region, head.serial, head.immediate, length};
  ucp_request_param_t how{};
  how.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FLAG_NO_IMM_CMPL;
  how.user_data = receiving;
  how.cb.recv_am = [](void *request, ucs_status_t status, size_t, void *user) {
    auto *ended = static_cast<Receiving *>(user);
    ept_instance *instance = ended->peer->instance;
    instance->library->ucp_request_free(request);
    instance->received(ended, status);
  };
  if (mem->memory.kind == EPT_MEMORY_CUDA) {
    how.op_attr_mask |= UCP_OP_ATTR_FIELD_MEMORY_TYPE;
    how.memory_type = UCS_MEMORY_TYPE_CUDA;
  }
  ++peer->receiving;
  ++mem->receiving;
  ++given->receiving;
  void *request = library->ucp_am_recv_data_nbx(ucp, data, place, length, &how);
  if (!UCS_PTR_IS_PTR(request)) received(receiving, UCS_PTR_STATUS(request));
  return UCS_OK;
}

void ept_instance::received(Receiving *ended, ucs_status_t status) {
  const std::unique_ptr<Receiving> receiving(ended);
  Peer *peer = receiving->peer;
  --peer->receiving;
  --receiving->mem->receiving;
  if (const auto given = exports.find(receiving->region); given != exports.end()) --given->second.receiving;
  if (peer->state == Peer::State::kEnded) return;
  if (status != UCS_OK)
    return end_peer(peer, EPT_E_PEER_LOST,
                    format("rank %u is lost: a payload of %llu bytes from it broke off: %s (%d)", peer->rank,
                           static_cast<unsigned long long>(receiving->length), library->words(status).c_str(), status),
                    true);
  ++peer->arrivals;
  ept_event *event = events.add(EPT_EVENT_IMM, peer->rank, peer->epoch);
  event->immediate = receiving->immediate;
  event->length = receiving->length;
  ++counters.rx_operations;
  counters.rx_bytes += receiving->length;
  finish(peer, receiving->serial);
}

void ept_instance::on_send(Peer *peer, const MessageHead &head, const uint8_t *bytes) {
  const uint32_t serial = head.serial;
  if (serial - peer->done >= kWindow) return stranger("its message has a number that can't be");
  ++peer->arrivals;
  ++counters.rx_sends;
  ept_event *event = events.add(EPT_EVENT_RECV, peer->rank, peer->epoch, {}, {bytes, bytes + head.length});
  event->length = head.length;
  finish(peer, serial);
}

// An operation of the peer has ended here.
void ept_instance::finish(Peer *peer, uint32_t serial) {
  if (serial != peer->done) {
    peer->finished.insert(serial);
  } else {
    ++peer->done;
    while (!peer->finished.empty() && peer->finished.erase(peer->done) == 1) ++peer->done;
  }
  peer->fresh = true;
  if (peer->owing) return;
  peer->owing = true;
  owing.push_back(peer);
}

void ept_instance::refuse(Peer *peer, uint32_t serial, int32_t code) {
  ++counters.errors;
  peer->refused.push_back({serial, code});
  finish(peer, serial);
}

// Tells whom it is owed. `idle`: nothing arrived in this poll, so that no operation is likely to carry the word.
void ept_instance::answer(bool idle) {
  for (size_t i = 0; i < owing.size();) {
    Peer *peer = owing[i];
    const bool unsaid = peer->done != peer->said || !peer->refused.empty();
    const bool now_or_never = !peer->refused.empty() || peer->done - peer->said >= kUnsaidMost;
    if (unsaid && !now_or_never && (peer->fresh || !idle)) {
      peer->fresh = false;
      ++i;
      continue;
    }
    if (unsaid) say_done(peer);
    peer->owing = false;
    owing[i] = owing.back();
    owing.pop_back();
  }
}

void ept_instance::say_done(Peer *peer) {
  if (peer->state != Peer::State::kUp) return;
  DoneHead head{};
  head.from = params.rank;
  head.opening = static_cast<uint32_t>(peer->opening);
  memcpy(head.token, peer->to_it.data(), sizeof head.token);
  head.done = peer->said = peer->done;
  head.refused = static_cast<uint32_t>(peer->refused.size());
  std::vector<uint8_t> bytes(sizeof head), list(peer->refused.size() * sizeof(Refused));
  memcpy(bytes.data(), &head, sizeof head);
  if (!list.empty()) memcpy(list.data(), peer->refused.data(), list.size());
  peer->refused.clear();
  note(peer, Am::kDone, std::move(bytes), std::move(list));
}

void ept_instance::on_done(const uint8_t *bytes, size_t length, const uint8_t *more, size_t more_length) {
  DoneHead head;
  if (length != sizeof head) return stranger("its answer is cut");
  memcpy(&head, bytes, sizeof head);
  Peer *peer = head.from < params.world ? peers[head.from].get() : nullptr;
  if (peer == nullptr || peer->its_opening == 0 || static_cast<uint32_t>(peer->its_opening) != head.opening) return;
  if (!same_bytes(head.token, peer->from_it.data(), sizeof head.token) || more_length != head.refused * sizeof(Refused))
    return stranger("its answer does not hold the token of the rank that it says it is from");
  if (peer->state == Peer::State::kEnded) return;
  for (uint32_t i = 0; i < head.refused; ++i) {
    Refused refused;
    memcpy(&refused, more + i * sizeof refused, sizeof refused);
    const uint32_t first = peer->operations.empty() ? peer->next_serial : peer->operations.front().serial;
    const uint32_t at = refused.serial - first;
    if (at >= peer->operations.size() || refused.code >= 0)
      return end_peer(peer, EPT_E_INTERNAL, format("rank %u refused an operation that was not under way", peer->rank),
                      true);
    peer->operations[at].code = refused.code;
  }
  accept_done(peer, head.done);
}

void ept_instance::accept_done(Peer *peer, uint32_t done) {
  ++peer->arrivals;
  if (!before(peer->answered, done) || before(peer->next_serial, done)) return;
  peer->answered = done;
  settle(peer);
}

// Tells what has ended, in order.
void ept_instance::settle(Peer *peer) {
  const bool ended = peer->state == Peer::State::kEnded;
  while (!peer->operations.empty()) {
    Operation &operation = peer->operations.front();
    const bool answered = before(operation.serial, peer->answered);
    if (!operation.left || !(answered || ended)) break;
    if (!operation.told) {
      if (operation.mem != nullptr) --operation.mem->in_flight;
      const int32_t code = operation.code != EPT_OK ? operation.code : ended ? peer->code : EPT_OK;
      if (code == EPT_OK) {
        ept_event *event = events.add(EPT_EVENT_LOCAL_DONE, peer->rank, peer->epoch);
        event->cookie = operation.cookie;
        event->length = operation.length;
      } else {
        ++counters.errors;
        ept_event *event = events.add(
            EPT_EVENT_ERROR, peer->rank, peer->epoch,
            ended ? peer->text
                  : format("rank %u refused a write of %llu bytes: its key, its bounds or its right is not good there",
                           peer->rank, static_cast<unsigned long long>(operation.length)));
        event->cookie = operation.cookie;
        event->code = code;
      }
    }
    --in_flight;
    peer->operations.pop_front();
  }
}

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
  if (op.rail != 0) return fail(EPT_E_INVALID, "post", op.peer, 0, "ucx: rail %u, there is one", op.rail);
  if (op.flags != 0) return fail(EPT_E_INVALID, "post", op.peer, 0, "ucx: flags are %u, must be 0", op.flags);
  if (op.kind == EPT_OP_SEND) {
    if (op.length > kMaxSend || (op.length > 0 && op.source == nullptr))
      return fail(EPT_E_INVALID, "post", op.peer, 0, "ucx: a SEND of %llu bytes from %p; max_send is %u",
                  static_cast<unsigned long long>(op.length), op.source, kMaxSend);
    return EPT_OK;
  }
  if (op.kind != EPT_OP_WRITE && op.kind != EPT_OP_SIGNAL)
    return fail(op.kind == EPT_OP_READ ? EPT_E_UNSUPPORTED : EPT_E_INVALID, "post", op.peer, 0,
                "ucx: operations of kind %d are not done here", op.kind);
  const ept_region *region = op.region;
  if (region == nullptr || region->owner != this || region->rank != op.peer)
    return fail(EPT_E_INVALID, "post", op.peer, 0, "ucx: the region of an operation to rank %u is %s", op.peer,
                region == nullptr ? "missing" : "that of another rank");
  if (region->epoch != peer->epoch)
    return fail(EPT_E_CLOSED, "post", op.peer, 0, "ucx: the region is of epoch %u of rank %u, which is in epoch %u now",
                region->epoch, op.peer, peer->epoch);
  if (op.kind == EPT_OP_WRITE && op.length > 0) {
    const ept_mem *mem = op.source_mem;
    const uint64_t from = reinterpret_cast<uint64_t>(op.source);
    const uint64_t start = mem == nullptr ? 0 : reinterpret_cast<uint64_t>(mem->memory.address);
    if (op.length > settings.max_message)
      return fail(EPT_E_INVALID, "post", op.peer, 0, "ucx: a WRITE of %llu bytes is past max_message, %llu",
                  static_cast<unsigned long long>(op.length), static_cast<unsigned long long>(settings.max_message));
    if (mem == nullptr || mem->owner != this || from < start || from - start > mem->memory.length ||
        op.length > mem->memory.length - (from - start))
      return fail(EPT_E_INVALID, "post", op.peer, 0,
                  "ucx: the source of a WRITE of %llu bytes is not inside source_mem",
                  static_cast<unsigned long long>(op.length));
  }
  return EPT_OK;
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
  head.done = peer->done;
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
    ucp_request_param_t how{};
    how.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_FLAGS;
    how.flags = apart ? UCP_AM_SEND_FLAG_RNDV : UCP_AM_SEND_FLAG_EAGER;
    how.user_data = &operation;
    how.cb.send = [](void *pending, ucs_status_t status, void *user) {
      auto *sent = static_cast<Operation *>(user);
      sent->peer->instance->library->ucp_request_free(pending);
      sent->peer->instance->left(sent, status);
    };
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
  ucp_request_param_t how{};
  how.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_FLAGS;
  how.flags = UCP_AM_SEND_FLAG_EAGER;
  how.user_data = operation;
  how.cb.send = [](void *pending, ucs_status_t sent, void *user) {
    auto *told = static_cast<Operation *>(user);
    told->peer->instance->library->ucp_request_free(pending);
    told->peer->instance->left(told, sent);
  };
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
  ucp_request_param_t how{};
  how.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_FLAGS;
  how.flags = UCP_AM_SEND_FLAG_EAGER;
  how.user_data = &operation;
  how.cb.send = [](void *pending, ucs_status_t status, void *user) {
    auto *sent = static_cast<Operation *>(user);
    sent->peer->instance->library->ucp_request_free(pending);
    sent->peer->instance->left(sent, status);
  };
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
    itimerspec spec{};
    if (next != 0) {
      const uint64_t time = now(), in = next > time ? next - time : 1;
      spec.it_value.tv_sec = static_cast<time_t>(in / 1000000000);
      spec.it_value.tv_nsec = static_cast<long>(in % 1000000000);
      time_due_ns = 0;  // the poll that it wakes looks at the clock
    }
    timerfd_settime(timer.get(), 0, &spec, nullptr);
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
