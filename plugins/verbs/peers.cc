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

constexpr uint64_t kFirstPause = 5'000'000;  // between two Hellos; doubled each time
constexpr uint64_t kLongestPause = 500'000'000;
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

uint32_t ept_instance::rail_of(const Channel &channel) const {
  const Peer *peer = channel.peer;
  if (channel.messages) return channel.nic->number * settings.qps;
  return channel.number / peer->qps * settings.qps + channel.number % peer->qps;
}

// ---- opening --------------------------------------------------------------------------------------------------------

int32_t ept_instance::make_channels(Peer *peer) {
  const uint32_t data = peer->data_channels();
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
    peer->channels.push_back(std::make_unique<Channel>(nic, peer, i, messages, static_cast<uint16_t>(slot)));
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
  peer->hello_pause_ns = kFirstPause;
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

// ---- what is said ---------------------------------------------------------------------------------------------------

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
  if (changed) peer->hello_pause_ns = kFirstPause;
  if (type == MessageType::kHello)
    say(peer, MessageType::kAck);
  else if (changed)
    greet(peer);
  peer->hello_due_ns = peer->settled() ? 0 : std::max<uint64_t>(peer->hello_due_ns, 1);
  if (peer->hello_due_ns != 0) time_due_ns = std::min(time_due_ns, peer->hello_due_ns);
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
  if (announce) {
    add_pending(EPT_EVENT_PEER, peer->rank, peer->epoch, 0, 0, code, peer->text);
    pending.back().event.provider_errno = number;
  }
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
}

void ept_instance::farewell(uint64_t most_ns) {
  ept_event events[16];
  for (ept_event &event : events) event.size = sizeof event;
  auto speaking = [&] {
    for (const auto &nic : nics)
      if (nic->broken.empty() && nic->free_said.size() < kSaid) return true;
    return !leaving.empty();
  };
  for (const uint64_t end = now() + most_ns; speaking() && now() < end;) {
    time_due_ns = 0;
    poll(events, 16);
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
      add_pending(EPT_EVENT_FENCED, fence.rank, fence.epoch, rail, fence.cookie, EPT_OK, "");
      if (peer == nullptr || peer->epoch > fence.epoch) continue;
      for (const auto &channel : peer->channels)
        if (!channel->messages && rail_of(*channel) == rail)
          pending.back().event.immediate = static_cast<uint32_t>(channel->consumed);
    }
    return true;
  });
}

void ept_instance::add_pending(int32_t kind, uint32_t peer, uint32_t epoch, uint32_t rail, uint64_t cookie,
                               int32_t code, std::string text) {
  Pending entry{};
  entry.event.size = sizeof entry.event;
  entry.event.kind = kind;
  entry.event.peer = peer;
  entry.event.epoch = epoch;
  entry.event.rail = rail;
  entry.event.cookie = cookie;
  entry.event.code = code;
  entry.has_text = !text.empty();
  entry.text = std::move(text);
  pending.push_back(std::move(entry));
}
