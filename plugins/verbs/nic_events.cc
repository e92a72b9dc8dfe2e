// SPDX-License-Identifier: Apache-2.0
// What a NIC says of itself: that a port went down or came up, that a queue pair or a completion queue failed, or that
// it is gone as a whole.
#include <algorithm>

#include "instance.h"

using namespace verbs;

void ept_instance::read_events(Nic *nic) {
  ibv_async_event event{};
  while (nic->broken.empty() && library->get_async_event(nic->context.get(), &event) == 0) {
    Channel *channel = nullptr;
    std::string fatal;
    const uint8_t port = static_cast<uint8_t>(event.element.port_num);
    switch (event.event_type) {
      case IBV_EVENT_QP_FATAL:
      case IBV_EVENT_QP_REQ_ERR:
      case IBV_EVENT_QP_ACCESS_ERR:
        for (Channel *candidate : slots)
          if (candidate != nullptr && candidate->qp.get() == event.element.qp) channel = candidate;
        break;
      case IBV_EVENT_CQ_ERR:
        fatal = "its completion queue was overrun or failed";
        break;
      case IBV_EVENT_DEVICE_FATAL:
        fatal = "the NIC failed (or was reset or removed)";
        break;
      case IBV_EVENT_PORT_ERR:
      case IBV_EVENT_PORT_ACTIVE:
        if (port != nic->port.number) break;
        nic->up = event.event_type == IBV_EVENT_PORT_ACTIVE;
        log(EPT_LOG_WARNING, format("verbs: rank %u: port %u of %s is %s", params.rank, port, nic->port.device.c_str(),
                                    nic->up ? "up again" : "down"));
        break;
      default:
        break;
    }
    const auto type = event.event_type;
    library->ack_async_event(&event);  // before a queue pair that it names may be destroyed
    if (channel != nullptr) broke(channel, format("the NIC reported event %d", static_cast<int>(type)), false);
    if (!fatal.empty()) return nic_failed(nic, fatal);
    for (auto &peer : peers) {
      if (peer == nullptr || (type != IBV_EVENT_PORT_ERR && type != IBV_EVENT_PORT_ACTIVE)) continue;
      for (auto &each : peer->channels) {
        if (each->nic != nic || port != nic->port.number) continue;
        each->failures = 0;
        if (!nic->up) broke(each.get(), "the port went down", false);
        if (nic->up) each->connect_due_ns = std::max<uint64_t>(1, std::min<uint64_t>(each->connect_due_ns, now()));
      }
      peer->hello_pause_ns = kTick;
      peer->hello_due_ns = std::min<uint64_t>(peer->hello_due_ns, 1);
      time_due_ns = 0;
    }
  }
}

// A completion queue or a whole NIC is gone: nobody can say what was consumed on it.
void ept_instance::nic_failed(Nic *nic, const std::string &why) {
  if (!nic->broken.empty()) return;
  nic->broken = format("%s: %s", nic->port.device.c_str(), why.c_str());
  log(EPT_LOG_ERROR, format("verbs: rank %u: %s", params.rank, nic->broken.c_str()));
  for (auto &peer : peers)
    if (peer != nullptr && nic->number < peer->nics)
      end_peer(peer.get(), EPT_E_PEER_LOST, 0, format("rank %u is lost: %s", peer->rank, nic->broken.c_str()), true);
}
