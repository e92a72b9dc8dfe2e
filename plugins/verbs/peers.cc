// SPDX-License-Identifier: Apache-2.0
// What a peer goes through: kConnecting -> kUp -> kEnded, or straight to the end. It is up when a data channel and one
// for messages are. Of an ended peer comes first the PEER event, then an ERROR for each operation that was accepted and
// not complete, when the queue pair that held it is destroyed.
#include <algorithm>
#include <cerrno>
#include <cstring>

#include "../checks.h"
#include "instance.h"

using namespace verbs;

namespace {

// Within kFarewellNs of verbs.cc, so that a process that ends at once says goodbye all the same.
constexpr uint64_t kGrace = 200'000'000;  // what is under way to a peer that is closed may take so long to end well

}  // namespace

bool Peer::usable() const {
  bool data = false, messages = false;
  for (const auto &channel : channels)
    if (channel->up()) (channel->messages ? messages : data) = true;
  return data && messages;
}

bool Peer::settled() const {
  return std::all_of(channels.begin(), channels.end(), [](const auto &channel) { return channel->settled(); });
}

bool Peer::gone() const {
  return std::none_of(channels.begin(), channels.end(), [](const auto &channel) { return bool{channel->qp}; });
}

// ---- opening --------------------------------------------------------------------------------------------------------

int32_t ept_instance::make_channels(Peer *peer) {
  const uint32_t data = peer->data_channels();
  for (uint32_t rail = 0; rail < counters.size(); ++rail)
    peer->preferred.push_back((rail / settings.qps * peer->qps + rail % settings.qps) % data);
  for (uint32_t i = 0; i < data + peer->nics; ++i) {
    const bool messages = i >= data;
    const size_t slot = static_cast<size_t>(std::find(slots.begin(), slots.end(), nullptr) - slots.begin());
    if (slot == slots.size()) {
      if (slot >= UINT16_MAX)
        return fail(EPT_E_LIMIT, "peer_open", peer->rank, 0, "verbs: %zu queue pairs are open, which is the limit",
                    slot);
      slots.push_back(nullptr);
    }
    Nic *nic = nics[messages ? i - data : i / peer->qps].get();
    const uint32_t rail = nic->number * settings.qps + (messages ? 0 : i % peer->qps);
    peer->channels.push_back(std::make_unique<Channel>(nic, peer, i, rail, messages, static_cast<uint16_t>(slot)));
    // Completions of who had the slot before must not be taken for its.
    host->random(host->context, &peer->channels.back()->serial, sizeof(uint16_t));
    slots[slot] = peer->channels.back().get();
    const int32_t code = peer->channels.back()->renew(1, *host);
    if (code != EPT_OK) return code;
  }
  return EPT_OK;
}

int32_t ept_instance::peer_open(uint32_t rank, uint32_t epoch, const void *address, size_t length) {
  int32_t code = plugin::check_rank("verbs", "peer_open", rank, params.world);
  if (code != EPT_OK) return code;
  Address parsed;
  code = decode(address, length, &parsed);
  if (code != EPT_OK) return code;
  code = plugin::check_life("verbs", rank, epoch, parsed, fenced_epochs);
  if (code != EPT_OK) return code;
  if (peers[rank] != nullptr) {
    if (peers[rank]->state != Peer::State::kEnded)
      return fail(EPT_E_INVALID, "peer_open", rank, 0, "verbs: rank %u is open already, under epoch %u; close it first",
                  rank, peers[rank]->epoch);
    peer_close(rank);
  }
  auto peer = std::make_unique<Peer>();
  peer->rank = rank;
  peer->epoch = epoch;
  peer->nics = static_cast<uint32_t>(std::min(nics.size(), parsed.nics.size()));
  peer->qps = std::min(settings.qps, parsed.qps);
  peer->address = std::move(parsed);
  for (uint32_t i = 0; i < peer->nics; ++i) {
    if (peer->address.nics[i].ethernet != static_cast<uint8_t>(nics[i]->port.ethernet))
      return fail(
          EPT_E_MISMATCH, "peer_open", rank, 0,
          "verbs: NIC %u of rank %u is on %s, NIC %u here (%s) is not; name NICs of one fabric in the same order "
          "on all ranks (EPT_VERBS_DEVICES)",
          i, rank, peer->address.nics[i].ethernet ? "Ethernet" : "InfiniBand", i, nics[i]->port.device.c_str());
    peer->ways.emplace_back();
  }
  code = make_channels(peer.get());
  if (code != EPT_OK) {
    for (auto &channel : peer->channels) slots[channel->slot] = nullptr;
    return code;
  }
  while (peer->opening == 0) host->random(host->context, &peer->opening, sizeof peer->opening);
  peer->hello_pause_ns = kFirstHelloPause;
  if (epoch > 0) close_exports_of(rank, epoch - 1);
  plugin::bind_exports(&exports, rank, epoch);
  closed_epochs.erase(rank);
  peers[rank] = std::move(peer);
  greet(peers[rank].get());
  return EPT_OK;
}

int32_t ept_instance::peer_state(uint32_t rank) {
  const Peer *peer = rank < peers.size() ? peers[rank].get() : nullptr;
  if (peer == nullptr) {
    const bool closed = closed_epochs.count(rank) != 0;
    return fail(closed ? EPT_E_CLOSED : EPT_E_INVALID, "peer_state", rank, 0,
                closed ? "verbs: rank %u was closed" : "verbs: rank %u was never opened", rank);
  }
  if (peer->state == Peer::State::kUp) return EPT_OK;
  if (peer->state == Peer::State::kEnded)
    return fail(peer->code, "peer_state", rank, peer->number, "verbs: %s", peer->text.c_str());
  const auto up = std::count_if(peer->channels.begin(), peer->channels.end(), [](const auto &it) { return it->up(); });
  return fail(EPT_LATER, "peer_state", rank, 0,
              "verbs: rank %u is not connected yet: %td of %zu queue pairs are up; %s", rank, up, peer->channels.size(),
              peer->last_try.c_str());
}

// ---- by the clock ---------------------------------------------------------------------------------------------------

void ept_instance::on_time(uint64_t time) {
  for (auto &entry : peers) {
    Peer *peer = entry.get();
    if (peer == nullptr || peer->state == Peer::State::kEnded) continue;
    for (auto &channel : peer->channels) {
      const bool due = channel->connect_due_ns != 0 && time >= channel->connect_due_ns;
      if (!due || !channel->nic->up) continue;
      channel->connect_due_ns = 0;
      if (channel->state == Channel::State::kFresh && channel->theirs.generation == channel->generation &&
          on_state(channel.get(), channel->theirs))
        greet(peer);
      if (peer->state == Peer::State::kEnded) break;
    }
    if (peer->state == Peer::State::kEnded) continue;
    if (peer->suspect && time - peer->unusable_since_ns >= params.dead_ns) {
      end_peer(peer, EPT_E_PEER_LOST, 0,
               format("rank %u is lost: it could not be connected again within %.3g s (%s)", peer->rank,
                      static_cast<double>(params.dead_ns) * 1e-9, peer->last_try.c_str()),
               true);
      continue;
    }
    if (!peer->settled() && time >= peer->hello_due_ns) greet(peer);
  }
  if (visibility.due_ns != 0 && time >= visibility.due_ns) look_into_gpus();
  for (auto &peer : leaving) {
    if (peer->grace_due_ns == 0) continue;
    const bool quiet = std::all_of(peer->channels.begin(), peer->channels.end(), [](const auto &channel) {
      return channel->in_flight() == 0 || channel->state == Channel::State::kRetiring;
    });
    if (!quiet && time < peer->grace_due_ns) continue;
    peer->grace_due_ns = 0;
    say(peer.get(), MessageType::kBye);
    stop(peer.get());
  }
  reap();
}

uint64_t ept_instance::next_deadline() const {
  uint64_t next = 0;
  auto sooner = [&](uint64_t due) {
    if (due != 0 && (next == 0 || due < next)) next = due;
  };
  for (const auto &peer : peers) {
    if (peer == nullptr || peer->state == Peer::State::kEnded) continue;
    if (!peer->settled()) sooner(std::max<uint64_t>(peer->hello_due_ns, 1));
    if (peer->suspect) sooner(peer->unusable_since_ns + params.dead_ns);
    for (const auto &channel : peer->channels)
      if (channel->nic->up) sooner(channel->connect_due_ns);
  }
  for (const auto &peer : leaving) sooner(peer->grace_due_ns);
  sooner(visibility.due_ns);
  return next;
}

// ---- the end --------------------------------------------------------------------------------------------------------

void ept_instance::end_peer(Peer *peer, int32_t code, int number, std::string text, bool announce) {
  if (peer->state == Peer::State::kEnded) return;
  peer->state = Peer::State::kEnded;
  peer->code = code;
  peer->number = number;
  peer->text = std::move(text);
  peer->hello_due_ns = 0;
  peer->suspect = false;
  if (announce) tell_peer(peer, code, peer->text)->provider_errno = number;
  stop(peer);
}

// Its queue pairs take no packet from here on, and what is under way ends.
void ept_instance::stop(Peer *peer) {
  for (Operation &operation : peer->replay) fail_operation(peer, 0, &operation, peer->code, peer->number, peer->text);
  replaying -= static_cast<uint32_t>(peer->replay.size());
  peer->replay.clear();
  for (auto &channel : peer->channels) {
    if (channel->state == Channel::State::kFresh)
      bury(channel.get());  // what waited for its `consumed` is an error too
    else
      broke(channel.get(), peer->text, false);
  }
}

int32_t ept_instance::peer_close(uint32_t rank) {
  if (rank >= peers.size() || peers[rank] == nullptr)
    return fail(EPT_E_INVALID, "peer_close", rank, 0, "verbs: rank %u is not open", rank);
  std::unique_ptr<Peer> peer = std::move(peers[rank]);
  uint32_t &closed = closed_epochs[rank];
  closed = std::max(closed, peer->epoch);
  peer->closed = true;
  if (peer->state == Peer::State::kUp && !peer->suspect && peer->replay.empty()) {
    // What is under way still arrives, and the other side hears of the end behind it.
    peer->state = Peer::State::kEnded;
    peer->code = EPT_E_CLOSED;
    peer->text = format("rank %u was closed here while this was under way", rank);
    peer->grace_due_ns = now() + kGrace;
    time_due_ns = 0;
  } else {
    if (peer->state != Peer::State::kEnded) say(peer.get(), MessageType::kBye);
    end_peer(peer.get(), EPT_E_CLOSED, 0, format("rank %u was closed here while this was under way", rank), false);
  }
  leaving.push_back(std::move(peer));
  mend();
  reap();
  return EPT_OK;
}

void ept_instance::cut_short(ept_mem *mem) {
  for (auto &peer : leaving) {
    for (auto &channel : peer->channels) {
      bool reads = false;
      for (uint64_t i = channel->base; i < channel->next; ++i) reads = reads || channel->at(i).mem == mem;
      if (!reads) continue;
      std::erase(retiring, channel.get());
      bury(channel.get());
    }
  }
}

// Told or not, all that is under way ends here for the caller, and reads from its memory no more.
void ept_instance::abandon() {
  auto forget = [&](Peer *peer) {
    for (auto &channel : peer->channels) {
      bool reads = false;
      for (uint64_t i = channel->base; i < channel->next; ++i) reads = reads || channel->at(i).mem != nullptr;
      if (!reads) continue;
      std::erase(retiring, channel.get());
      bury(channel.get());
    }
  };
  for (auto &peer : peers)
    if (peer != nullptr) end_peer(peer.get(), EPT_E_CLOSED, 0, "the worker was closed here", false), forget(peer.get());
  for (auto &peer : leaving) forget(peer.get());
  visibility.asked.clear();
  visibility.covered = visibility.reads = 0;
  ++visibility.round;
  visibility.due_ns = 0;
  for (auto &nic : nics) nic->reader.reset();
}

void ept_instance::farewell(uint64_t most_ns) {
  ept_event last[16];
  for (ept_event &event : last) event.size = sizeof event;
  auto speaking = [&] {
    for (const auto &nic : nics)
      if (nic->broken.empty() && nic->free_said.size() < kSaid) return true;
    return !leaving.empty();
  };
  for (const uint64_t end = now() + most_ns; speaking() && now() < end;) {
    time_due_ns = 0;
    poll(last, 16);
  }
}

ept_instance::~ept_instance() {
  // What is still under way holds regions; what read from memory was given up before (abandon).
  auto let_all_go = [&](Peer *peer) {
    for (Operation &operation : peer->replay) release(&operation);
    for (auto &channel : peer->channels) {
      channel->destroy();
      for (; channel->base < channel->next; ++channel->base) release(&channel->at(channel->base));
    }
  };
  for (auto &peer : peers)
    if (peer != nullptr) let_all_go(peer.get());
  for (auto &peer : leaving) let_all_go(peer.get());
  exports.clear();
  leaving.clear();
  peers.clear();
  nics.clear();
}

// Forgets closed peers that no queue pair names any more.
void ept_instance::reap() {
  std::erase_if(leaving, [&](const auto &peer) {
    if (peer->grace_due_ns != 0 || !peer->gone()) return false;
    for (auto &channel : peer->channels) {
      std::erase(retiring, channel.get());
      slots[channel->slot] = nullptr;
    }
    return true;
  });
}

int32_t ept_instance::peer_fence(uint32_t rank, uint32_t epoch, uint64_t cookie) {
  if (rank >= params.world)
    return fail(EPT_E_INVALID, "peer_fence", rank, 0, "verbs: rank %u is outside the world of %u", rank, params.world);
  Peer *peer = peers[rank].get();
  // Told by the way that needs no queue pair of its own: else a rank that was only stopped, and comes back, would wait
  // for its peers as long as for dead ones.
  if (peer != nullptr && peer->epoch <= epoch && peer->state != Peer::State::kEnded) say(peer, MessageType::kGivenUp);
  if (peer != nullptr && peer->epoch <= epoch)
    end_peer(peer, EPT_E_PEER_LOST, 0, format("epoch %u of rank %u was fenced here", epoch, rank), false);
  for (auto &gone : leaving) {
    if (gone->rank != rank || gone->epoch > epoch || gone->grace_due_ns == 0) continue;
    gone->grace_due_ns = 0;
    stop(gone.get());
  }
  uint32_t &fence = fenced_epochs[rank];
  fence = std::max(fence, epoch);
  close_exports_of(rank, epoch);
  fences.push_back({cookie, rank, epoch});
  return EPT_OK;
}

// FENCED, one a rail, once no queue pair of that epoch is left: so nothing can land, and what came is counted.
void ept_instance::give_fenced() {
  std::erase_if(fences, [&](const Fence &fence) {
    auto stands = [&](const Peer *peer) {
      return peer != nullptr && peer->rank == fence.rank && peer->epoch <= fence.epoch && !peer->gone();
    };
    if (stands(peers[fence.rank].get())) return false;
    for (const auto &peer : leaving)
      if (stands(peer.get())) return false;
    const Peer *peer = peers[fence.rank].get();
    const auto rails = static_cast<uint32_t>(counters.size());
    for (uint32_t rail = 0; rail < rails; ++rail) {
      ept_event *event = events.add(EPT_EVENT_FENCED, fence.rank, fence.epoch);
      event->rail = rail;
      event->cookie = fence.cookie;
      if (peer == nullptr || peer->epoch > fence.epoch) continue;
      for (const auto &channel : peer->channels)
        if (!channel->messages && channel->rail == rail) event->immediate = static_cast<uint32_t>(channel->consumed);
    }
    return true;
  });
}

ept_event *ept_instance::tell_peer(const Peer *peer, int32_t code, std::string text) {
  ept_event *event = events.add(EPT_EVENT_PEER, peer->rank, peer->epoch, std::move(text));
  event->code = code;
  return event;
}
