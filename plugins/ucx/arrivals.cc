// SPDX-License-Identifier: Apache-2.0
// What arrives, and how an operation ends at the target and then here: wire.h has the invariant.
#include <cstring>

#include "instance.h"

using namespace ucx;
using plugin::MessageHead;

namespace {

// Ended here and not told: more than this and the peer's source memory waits longer than the word costs.
constexpr uint32_t kUnsaidMost = 32;
// A peer that numbers its operations honestly is never this far ahead: tx_depth has that bound.
constexpr uint32_t kWindow = 1 << 17;

}  // namespace

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
  const bool known = given != nullptr && given->is(peer->rank, peer->epoch) &&
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
  owe(peer);
}

// Has the peer told at some later poll how far this rank has got.
void ept_instance::owe(Peer *peer) {
  if (peer->owing || (peer->done == peer->said && peer->refused.empty())) return;
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
