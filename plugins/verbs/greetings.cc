// SPDX-License-Identifier: Apache-2.0
// What two ranks say to each other by datagrams (wire.h), outside of the queue pairs that they connect by it: the state
// of each channel, again and again until both are as they should be; and that a link has ended. A datagram may be lost,
// late or twice: none changes anything but by what it says, and what matters is said again.
#include <algorithm>
#include <cerrno>
#include <cstring>

#include "instance.h"

using namespace verbs;

namespace {

constexpr uint64_t kLongestPause = 500'000'000;

}  // namespace

bool ept_instance::say(Peer *peer, MessageType type) {
  Message message{};
  message.magic = kMessageMagic;
  message.version = kVersion;
  message.type = static_cast<uint8_t>(type);
  message.channels = static_cast<uint8_t>(peer->channels.size());
  message.from = params.rank;
  message.from_epoch = params.epoch;
  message.to = peer->rank;
  message.to_epoch = peer->epoch;
  message.world = params.world;
  message.qps = settings.qps;
  message.max_send = kMaxSend;
  message.opening = peer->opening;
  message.heard = peer->its_opening;
  for (size_t i = 0; i < peer->channels.size(); ++i) message.entries[i] = peer->channels[i]->say();
  seal(credentials, peer->address.nonce, &message);
  // Another NIC each time, so that one of them that is dead does not silence this rank.
  for (uint32_t i = 0; i < peer->nics; ++i) {
    const uint32_t number = peer->tries++ % peer->nics;
    Nic *nic = nics[number].get();
    if (!nic->up || !nic->broken.empty()) continue;
    Ah &way = peer->ways[number];
    if (!way) {
      ibv_ah_attr attributes = nic->way_to(peer->address.nics[number], settings);
      way = {library.get(), library->create_ah(nic->pd.get(), &attributes)};
      if (!way) {
        const int status = errno;
        peer->last_try =
            format("%s finds no way to it: %s (errno %d)", nic->port.device.c_str(), strerror(status), status);
        continue;
      }
    }
    if (nic->say(way.get(), peer->address.nics[number], message, RequestId{UINT16_MAX, 0, Request::kSaid, 0}.pack()))
      return true;
  }
  return false;
}

void ept_instance::greet(Peer *peer) {
  say(peer, MessageType::kHello);
  peer->hello_due_ns = now() + peer->hello_pause_ns;
  peer->hello_pause_ns = std::min(2 * peer->hello_pause_ns, kLongestPause);
  time_due_ns = std::min(time_due_ns, peer->hello_due_ns);
}

void ept_instance::stranger(const char *what) {
  if (strangers++ == 0)
    log(EPT_LOG_WARNING, format("verbs: rank %u: a message from a stranger: %s", params.rank, what));
}

void ept_instance::on_datagram(Nic *nic, uint32_t buffer, uint32_t length) {
  Message message;
  if (!parse(nic->datagram(buffer), length, &message)) return stranger("it is not of this protocol");
  if (message.from >= params.world || message.to != params.rank || message.to_epoch != params.epoch)
    return stranger("it is for another rank, or for another life of this one");
  Peer *peer = peers[message.from].get();
  if (peer == nullptr || peer->epoch != message.from_epoch) return;  // not opened yet: it will say it again
  switch (judge(credentials, peer->address.nonce, message)) {
    case Trust::kStranger:
      return stranger("it proves nothing");
    case Trust::kMember:
      if (peer->state == Peer::State::kEnded) return;
      say(peer, MessageType::kHello);  // so that it sees the same from over there
      return end_peer(
          peer, EPT_E_AUTH, 0,
          format("rank %u does not hold the same secret of the job (EPT_SECRET) as rank %u", peer->rank, params.rank),
          true);
    case Trust::kProven:
      break;
  }
  if (peer->state != Peer::State::kEnded)
    on_greeting(peer, message);
  else if (static_cast<MessageType>(message.type) == MessageType::kHello && message.opening == peer->its_opening)
    say(peer, MessageType::kGivenUp);  // it goes on with a link that has ended here: and that may have been lost
}

void ept_instance::on_greeting(Peer *peer, const Message &message) {
  if (!same_bytes(message.job, credentials.job.data(), sizeof message.job))
    return end_peer(peer, EPT_E_MISMATCH, 0,
                    format("rank %u belongs to another job than rank %u", peer->rank, params.rank), true);
  if (message.world != params.world)
    return end_peer(
        peer, EPT_E_MISMATCH, 0,
        format("world is %u at rank %u and %u at rank %u", message.world, peer->rank, params.world, params.rank), true);
  if (message.opening == 0 || (message.heard != 0 && message.heard != peer->opening)) return;  // of an opening before
  const auto type = static_cast<MessageType>(message.type);
  if (type == MessageType::kBye || type == MessageType::kGivenUp) {
    // Of a link that this rank has not heard of yet, or of this one.
    if (peer->its_opening != 0 && peer->its_opening != message.opening) return;
    if (type == MessageType::kBye) return end_peer(peer, EPT_E_CLOSED, 0, format("rank %u left", peer->rank), true);
    return end_peer(peer, EPT_E_PEER_LOST, 0,
                    format("rank %u has given this rank up: it was masked there, or taken for dead", peer->rank), true);
  }
  if (message.channels != peer->channels.size()) return stranger("it counts other queue pairs than its address");
  if (peer->its_opening != message.opening) {
    // It has closed and opened this rank since. A link that was up is not the one that it speaks of; one that was not
    // yet, is, and begins anew.
    if (peer->state == Peer::State::kUp)
      return end_peer(peer, EPT_E_PEER_LOST, 0, format("rank %u has closed this link and opened another", peer->rank),
                      true);
    if (peer->its_opening != 0) {
      for (auto &channel : peer->channels) {
        std::erase(retiring, channel.get());
        channel->base = channel->next = channel->consumed = 0;
        channel->theirs = {};
        if (channel->renew(1, *host) != EPT_OK)
          return end_peer(peer, last_error().code, last_error().provider_errno, last_error().text, true);
      }
    }
    peer->its_opening = message.opening;
  }
  bool changed = false;
  for (auto &channel : peer->channels) {
    changed = on_state(channel.get(), message.entries[channel->number]) || changed;
    if (peer->state == Peer::State::kEnded) return;
  }
  if (peer->state == Peer::State::kConnecting) peer->last_try = "it was heard, and its queue pairs are being connected";
  if (changed) peer->hello_pause_ns = kFirstHelloPause;
  if (type == MessageType::kHello)
    say(peer, MessageType::kAck);
  else if (changed)
    greet(peer);
  peer->hello_due_ns = peer->settled() ? 0 : std::max<uint64_t>(peer->hello_due_ns, 1);
  if (peer->hello_due_ns != 0) time_due_ns = std::min(time_due_ns, peer->hello_due_ns);
}
