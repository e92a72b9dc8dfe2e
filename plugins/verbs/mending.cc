// SPDX-License-Identifier: Apache-2.0
// Channels that break and are made anew; channel.h says why this is right.
//
// A channel whose path is dead breaks again and again; each time it waits longer before it connects, and only a probe,
// never an operation, finds out whether the path is well. Meanwhile what was on it goes by the peer's other channels.
#include <algorithm>
#include <cstring>

#include "instance.h"

using namespace verbs;

namespace {

constexpr uint64_t kFirstPause = 5'000'000;
constexpr uint64_t kLongestPause = 1'000'000'000;
constexpr uint64_t kSettled = 1'000'000'000;  // a queue pair that lived so long was no part of the trouble before it
constexpr uint64_t kDrain = 5'000'000'000;    // flushing takes a NIC microseconds, an emulated one milliseconds
constexpr uint8_t kMostBlame = 8;

// What a completion says of the operation that it names; OK: it says nothing of it, only of the way.
int32_t verdict(ibv_wc_status status) {
  switch (status) {
    case IBV_WC_REM_ACCESS_ERR:
      return EPT_E_ACCESS;
    case IBV_WC_REM_INV_REQ_ERR:
    case IBV_WC_REM_OP_ERR:
    case IBV_WC_LOC_LEN_ERR:
    case IBV_WC_LOC_PROT_ERR:
    case IBV_WC_BAD_RESP_ERR:
      return EPT_E_IO;
    default:
      return EPT_OK;
  }
}

std::string dead_key(uint32_t rank) {
  return format("this key was refused by rank %u before: it was taken back, or never was one", rank);
}

}  // namespace

// ---- the other side's half ------------------------------------------------------------------------------------------

bool ept_instance::on_state(Channel *channel, const ChannelState &theirs) {
  bool changed = false;
  if (theirs.generation < channel->theirs.generation) return false;  // late
  channel->theirs = theirs;
  if (theirs.generation > channel->generation) {
    channel->wanted = std::max(channel->wanted, theirs.generation);
    if (channel->state != Channel::State::kFresh) {
      // From rule 1: ours is retired first; mend() comes back here.
      broke(channel, "the other side has made another queue pair", false);
      return true;
    }
    // Nothing can have come over a queue pair that was never connected.
    if (channel->renew(channel->wanted, *host) != EPT_OK) {
      end_peer(channel->peer, last_error().code, last_error().provider_errno, last_error().text, true);
      return false;
    }
    changed = true;
  }
  if (theirs.generation != channel->generation) return changed;
  if (channel->state == Channel::State::kFresh) {
    if (!channel->resolved) {
      if (!resolve(channel, theirs.consumed)) return false;
      channel->resolved = true;
    }
    if (channel->connect_due_ns > now() || !channel->nic->up) return changed;
    if (channel->connect(theirs, channel->peer->address.nics[channel->nic->number], settings) != EPT_OK) {
      channel->peer->last_try = last_error().text;
      channel->connect_due_ns = now() + kLongestPause;
      return changed;
    }
    changed = true;
  }
  if (channel->state == Channel::State::kConnected && theirs.heard == channel->generation) probe(channel);
  return changed;
}

// Rule 3. False: what it says can't be, and the peer is ended.
bool ept_instance::resolve(Channel *channel, uint64_t consumed) {
  Peer *peer = channel->peer;
  bool possible = consumed >= channel->base && consumed <= channel->next;
  for (uint64_t i = channel->base; possible && i < consumed; ++i) possible = channel->at(i).refused == EPT_OK;
  if (!possible) {
    end_peer(
        peer, EPT_E_PEER_LOST, 0,
        format("rank %u says that it has consumed %llu operations of channel %u, of which %llu to %llu are possible",
               peer->rank, static_cast<unsigned long long>(consumed), channel->number,
               static_cast<unsigned long long>(channel->base), static_cast<unsigned long long>(channel->next)),
        true);
    return false;
  }
  acknowledge(channel, consumed);
  ept_rail_counters &counted = counters[channel->rail];
  for (; channel->base < channel->next; ++channel->base) {
    Operation &operation = channel->at(channel->base);
    if (operation.kind == Operation::Kind::kProbe) continue;
    if (operation.refused == EPT_E_ACCESS && operation.region != nullptr) operation.region->refused(operation);
    if (operation.refused == EPT_OK && operation.dead()) {
      operation.refused = EPT_E_ACCESS;
      operation.number = IBV_WC_REM_ACCESS_ERR;
    }
    if (operation.refused != EPT_OK) {
      const char *what = operation.refused == EPT_E_ACCESS ? "the key, the bounds or the right to write was refused at "
                                                             "the target"
                                                           : "the request was refused";
      fail_operation(
          peer, channel->rail, &operation, operation.refused, static_cast<int>(operation.number),
          format("an operation of %llu bytes to rank %u failed on %s: %s (%s)",
                 static_cast<unsigned long long>(operation.length), peer->rank, channel->nic->port.device.c_str(), what,
                 library->wc_status_str(static_cast<ibv_wc_status>(operation.number))));
      continue;
    }
    peer->replay.push_back(operation);
    ++replaying;
    ++counted.replayed;
  }
  channel->base = channel->next = consumed;
  return true;
}

// An operation of no bytes that means nothing. When it is acknowledged, or anything came by the queue pair, the way is
// known to be whole.
void ept_instance::probe(Channel *channel) {
  if (channel->probing) return;
  channel->probing = true;
  Operation &operation = fresh(channel);
  operation.kind = Operation::Kind::kProbe;
  operation.serial = next_serial++;
  stage(channel);
  flush();
}

void ept_instance::went_up(Channel *channel) {
  Peer *peer = channel->peer;
  channel->state = Channel::State::kUp;
  channel->up_ns = now();
  if (channel->generation > 1) {
    ++counters[channel->rail].reconnects;
    log(EPT_LOG_INFO, format("verbs: rank %u: channel %u to rank %u is up again (generation %u)", params.rank,
                             channel->number, peer->rank, channel->generation));
  }
  if (peer->state == Peer::State::kEnded || !peer->usable()) return;
  if (peer->state == Peer::State::kConnecting) {
    peer->state = Peer::State::kUp;
    tell_peer(peer, EPT_OK);
  } else if (peer->suspect) {
    peer->suspect = false;
    peer->unusable_since_ns = 0;
    tell_peer(peer, EPT_OK);
  }
}

// ---- breaking -------------------------------------------------------------------------------------------------------

void ept_instance::broke(Channel *channel, const std::string &why, bool pause) {
  if (channel->state != Channel::State::kConnected && channel->state != Channel::State::kUp) return;
  Peer *peer = channel->peer;
  const uint64_t time = now();
  if (channel->up() && time - channel->up_ns > kSettled) channel->failures = 0;
  // Only who finds no way waits: a queue pair that the other side's requests have broken says nothing of the path.
  if (pause && channel->failures++ > 0)
    channel->connect_due_ns = time + std::min(kLongestPause, kFirstPause << std::min(channel->failures, 16u));
  channel->retire(time, why);
  retiring.push_back(channel);
  if (peer->state == Peer::State::kEnded) return;
  log(EPT_LOG_INFO, format("verbs: rank %u: channel %u to rank %u broke on %s: %s", params.rank, channel->number,
                           peer->rank, channel->nic->port.device.c_str(), why.c_str()));
  peer->last_try = format("%s: %s", channel->nic->port.device.c_str(), why.c_str());
  if (peer->state == Peer::State::kUp && !peer->suspect && !peer->usable()) {
    peer->suspect = true;
    peer->unusable_since_ns = time;
    tell_peer(peer, EPT_LATER,
              format("channel %u to rank %u broke and is made anew: %s", channel->number, peer->rank, why.c_str()));
  }
}

// A send completed badly; `ordinal` is the first that did. Those before it are done.
void ept_instance::refused(Channel *channel, uint64_t ordinal, const ibv_wc &completion) {
  Operation &operation = channel->at(ordinal);
  int32_t code = verdict(completion.status);
  if (code == EPT_OK && completion.status == IBV_WC_LOC_QP_OP_ERR && ++operation.blamed >= kMostBlame) code = EPT_E_IO;
  if (operation.kind == Operation::Kind::kProbe) code = EPT_OK;
  if (code != EPT_OK) {
    operation.refused = static_cast<int16_t>(code);
    operation.number = static_cast<uint32_t>(completion.status);
  }
  broke(channel, format("%s (%d)", library->wc_status_str(completion.status), completion.status), code == EPT_OK);
}

void ept_instance::mend() {
  const uint64_t time = now();
  for (size_t i = 0; i < retiring.size();) {
    Channel *channel = retiring[i];
    Peer *peer = channel->peer;
    const bool late = !channel->drained() && time - channel->retired_ns > kDrain;
    if (!channel->drained() && !late && channel->nic->broken.empty()) {
      ++i;
      continue;
    }
    retiring[i] = retiring.back();
    retiring.pop_back();
    if (!channel->drained() && peer->state != Peer::State::kEnded) {
      // Nobody can say what it consumed.
      bury(channel);
      end_peer(peer, EPT_E_PEER_LOST, 0,
               format("rank %u is lost: %s does not give back what was posted to it: %s", peer->rank,
                      channel->nic->port.device.c_str(), channel->reason.c_str()),
               true);
      continue;
    }
    if (peer->state == Peer::State::kEnded) {
      bury(channel);
      continue;
    }
    if (channel->renew(channel->wanted, *host) != EPT_OK) {
      bury(channel);
      end_peer(peer, last_error().code, last_error().provider_errno, last_error().text, true);
      continue;
    }
    if (channel->theirs.generation >= channel->generation) on_state(channel, channel->theirs);
    if (peer->state != Peer::State::kEnded) greet(peer);
  }
  if (!fences.empty()) give_fenced();
}

// Operations of broken channels, by any that is up and has room.
void ept_instance::replay() {
  auto of = [&](Peer *peer) {
    while (!peer->replay.empty()) {
      Operation &operation = peer->replay.front();
      if (operation.dead()) {
        fail_operation(peer, 0, &operation, EPT_E_ACCESS, 0, dead_key(peer->rank));
        peer->replay.pop_front();
        --replaying;
        continue;
      }
      Channel *found = nullptr;
      for (auto &channel : peer->channels)
        if (channel->up() && channel->room() && channel->messages == (operation.kind == Operation::Kind::kMessage))
          found = channel.get();
      if (found == nullptr) return;
      fresh(found) = operation;
      stage(found);
      peer->replay.pop_front();
      --replaying;
    }
  };
  for (auto &peer : peers)
    if (peer != nullptr && !peer->replay.empty()) of(peer.get());
  flush();
}

// ---- the end --------------------------------------------------------------------------------------------------------

void ept_instance::fail_operation(Peer *peer, uint32_t rail, Operation *operation, int32_t code, int number,
                                  const std::string &text) {
  const bool told = operation->kind != Operation::Kind::kProbe;
  release(operation);
  if (!told) return;
  ++counters[rail].errors;
  ept_event *event = events.add(EPT_EVENT_ERROR, peer->rank, peer->epoch, text);
  event->rail = rail;
  event->cookie = operation->cookie;
  event->code = code;
  event->provider_errno = number;
}

void ept_instance::bury(Channel *channel) {
  Peer *peer = channel->peer;
  channel->destroy();
  for (; channel->base < channel->next; ++channel->base)
    fail_operation(peer, channel->rail, &channel->at(channel->base), peer->code, peer->number, peer->text);
}
