// SPDX-License-Identifier: Apache-2.0
#include "channel.h"

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>

namespace verbs {
namespace {

constexpr uint8_t kRnrTimer = 12;  // 0.64 ms: not met in a healthy run
constexpr uint32_t kPsnMask = (1u << 24) - 1;

}  // namespace

Channel::Channel(Nic *on, Peer *of, uint32_t index, uint32_t on_rail, bool carries_messages, uint16_t in_slot)
    : nic(on), peer(of), number(index), rail(on_rail), messages(carries_messages), slot(in_slot) {
  depth = messages ? nic->plan.message_depth : nic->plan.depth;
  ring.resize(std::bit_ceil(depth));
}

int32_t Channel::renew(uint32_t to_generation, const ept_host &host) {
  destroy();
  const Plan &plan = nic->plan;
  const uint32_t receives = messages ? plan.message_receives : plan.receives;
  Library *library = nic->library;
  auto refused = [&](const char *what, int status) {
    return fail(status == ENOMEM ? EPT_E_NOMEM : EPT_E_IO, "connect", -1, status, "verbs: %s on %s failed: %s", what,
                nic->port.device.c_str(), strerror(status));
  };
  if (messages && !heard.mr) {
    const size_t bytes = size_t{receives} * kMaxSend;
    heard.bytes.reset(new uint8_t[bytes]);
    heard.mr = {library, library->reg_mr(nic->pd.get(), heard.bytes.get(), bytes, IBV_ACCESS_LOCAL_WRITE)};
    if (!heard.mr) return refused("registering memory", errno);
  }
  ibv_qp_init_attr wanted_qp{};
  wanted_qp.send_cq = wanted_qp.recv_cq = nic->cq.get();
  wanted_qp.qp_type = IBV_QPT_RC;
  wanted_qp.cap = {depth, receives, 1, 1, messages ? 0 : plan.inline_bytes};
  Qp made(library, library->create_qp(nic->pd.get(), &wanted_qp));
  if (!made && wanted_qp.cap.max_inline_data > 0) {
    // The NIC takes less into a request than was asked for.
    wanted_qp.cap.max_inline_data = nic->plan.inline_bytes = 0;
    made = {library, library->create_qp(nic->pd.get(), &wanted_qp)};
  }
  if (!made) return refused("making a queue pair", errno);
  ibv_qp_attr attributes{};
  attributes.qp_state = IBV_QPS_INIT;
  attributes.port_num = nic->port.number;
  attributes.qp_access_flags = IBV_ACCESS_REMOTE_WRITE;
  const int status =
      library->modify_qp(made.get(), &attributes, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS);
  if (status != 0) return refused("readying a queue pair", status);
  qp = std::move(made);
  ++serial;
  generation = wanted = to_generation;
  host.random(host.context, &psn, sizeof psn);
  psn &= kPsnMask;
  heard_generation = 0;
  resolved = probing = false;
  consumed_said = consumed;
  state = State::kFresh;
  // Before the other side can send: its first operation finds them.
  due = out = 0;
  if (messages) {
    for (uint32_t i = 0; i < receives; ++i) post_buffer(i);
  } else {
    due = receives;
    return_receives(1);
  }
  return EPT_OK;
}

int32_t Channel::connect(const ChannelState &other, const NicAddress &address, const Settings &settings) {
  auto refused = [&](const char *to, int status) {
    return fail(EPT_E_IO, "connect", -1, status, "verbs: moving a queue pair of %s to %s failed: %s",
                nic->port.device.c_str(), to, strerror(status));
  };
  ibv_qp_attr attributes{};
  attributes.qp_state = IBV_QPS_RTR;
  attributes.path_mtu = static_cast<ibv_mtu>(std::min<int>(nic->port.mtu, address.mtu));
  attributes.dest_qp_num = other.qpn;
  attributes.rq_psn = other.psn;
  attributes.max_dest_rd_atomic = 1;
  attributes.min_rnr_timer = kRnrTimer;
  attributes.ah_attr = nic->way_to(address, settings);
  int status = nic->library->modify_qp(qp.get(), &attributes,
                                       IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
                                           IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER);
  if (status != 0) return refused("RTR", status);
  attributes.qp_state = IBV_QPS_RTS;
  attributes.sq_psn = psn;
  attributes.timeout = static_cast<uint8_t>(settings.timeout);
  attributes.retry_cnt = static_cast<uint8_t>(settings.retries);
  attributes.rnr_retry = static_cast<uint8_t>(settings.rnr_retries);
  attributes.max_rd_atomic = 1;
  status = nic->library->modify_qp(
      qp.get(), &attributes,
      IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN | IBV_QP_MAX_QP_RD_ATOMIC);
  if (status != 0) return refused("RTS", status);
  // More than the other side has receives for is never in flight, whatever was granted.
  if (!messages) depth = std::min(nic->plan.depth, address.receives);
  heard_generation = other.generation;
  state = State::kConnected;
  return EPT_OK;
}

void Channel::retire(uint64_t now_ns, std::string why) {
  ibv_qp_attr attributes{};
  attributes.qp_state = IBV_QPS_ERR;
  nic->library->modify_qp(qp.get(), &attributes, IBV_QP_STATE);
  state = State::kRetiring;
  retired_ns = now_ns;
  wanted = std::max(wanted, generation + 1);
  reason = std::move(why);
}

void Channel::destroy() {
  qp.reset();
  out = due = 0;
  state = State::kNone;
}

void Channel::return_receives(uint32_t at_least) {
  if (due < std::max(at_least, 1u)) return;
  // One receive looks like another: an immediate needs no buffer.
  ibv_recv_wr requests[kReturn];
  const uint64_t wr_id = id(Request::kReceive, 0);
  while (due > 0) {
    const uint32_t count = std::min(due, kReturn);
    for (uint32_t i = 0; i < count; ++i) requests[i] = {wr_id, i + 1 < count ? &requests[i + 1] : nullptr, nullptr, 0};
    ibv_recv_wr *bad = nullptr;
    if (ibv_post_recv(qp.get(), requests, &bad) != 0) {
      const auto taken = static_cast<uint32_t>(bad != nullptr ? bad - requests : 0);
      out += taken;
      due -= taken;
      return;  // with the next
    }
    out += count;
    due -= count;
  }
}

void Channel::post_buffer(uint32_t of) {
  ibv_sge range{reinterpret_cast<uint64_t>(buffer(of)), kMaxSend, heard.mr->lkey};
  ibv_recv_wr request{id(Request::kReceive, of), nullptr, &range, 1}, *bad = nullptr;
  if (ibv_post_recv(qp.get(), &request, &bad) == 0) ++out;
}

}  // namespace verbs
