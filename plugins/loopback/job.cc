// SPDX-License-Identifier: Apache-2.0
//
// job.cc: how two ranks come together and part.
#include "job.h"

#include <cstring>

namespace loopback {

Switch &the_switch() {
  static Switch *const only = new Switch;  // never destroyed: threads may outlive main
  return *only;
}

void tell(Port &port, const Port &peer, int32_t code, const std::string &text) {
  Item &item = port.arrive();
  item.event = {};
  item.event.size = sizeof(ept_event);
  item.event.kind = EPT_EVENT_PEER;
  item.event.peer = peer.rank;
  item.event.epoch = peer.epoch;
  item.event.code = code;
  if (!text.empty()) {
    item.owned.reset(new char[text.size() + 1]);
    memcpy(item.owned.get(), text.c_str(), text.size() + 1);
    item.event.text = item.owned.get();
  }
  port.ring();
}

void greet(Port &one, Port &other, Link &link) {
  if (&one == &other) {
    std::lock_guard hold(one.lock);
    link.state = LinkState::kUp;
    tell(one, one, EPT_OK, "");
    return;
  }
  std::scoped_lock hold(one.lock, other.lock);
  link.state = LinkState::kUp;
  tell(one, other, EPT_OK, "");
  tell(other, one, EPT_OK, "");
}

void sever(Job &job, Port &own, Peer &peer, bool tell_own, const std::string &why) {
  if (!peer.link) return;
  std::unique_lock mine(own.lock, std::defer_lock), theirs(peer.port->lock, std::defer_lock);
  if (&own == peer.port.get()) {
    mine.lock();
  } else {
    std::lock(mine, theirs);
  }
  if (peer.link->state == LinkState::kDown) return;
  const bool was_up = peer.link->state == LinkState::kUp;
  peer.link->why = why;
  peer.link->state = LinkState::kDown;
  job.calls.erase({{own.rank, own.epoch}, {peer.port->rank, peer.port->epoch}});
  if (tell_own) tell(own, *peer.port, EPT_E_PEER_LOST, why);
  if (was_up && &own != peer.port.get()) tell(*peer.port, own, EPT_E_PEER_LOST, why);
}

}  // namespace loopback
