// SPDX-License-Identifier: Apache-2.0
// What a peer goes through: kConnecting -> kUp -> kEnded, or straight to the end. Of an ended peer comes first the
// PEER event, then an ERROR for each operation that was accepted and not complete: when the provider gives it back, or
// after kOrphansNs, since the provider may wait for a dead peer for ever. Its contexts stay with the provider even
// then, and so does the Peer that they name (`leaving`), until they come back or the endpoint is closed.
#include <algorithm>
#include <bit>
#include <cstring>

#include "../checks.h"
#include "burial.h"
#include "instance.h"

using namespace libfabric;

namespace {

constexpr uint64_t kFirstPause = 5000000;  // between two Hellos; doubled each time
constexpr uint64_t kLongestPause = 500000000;
// What reads from memory on behalf of a dead peer should end by itself within this; if not, it is told as failed. A
// card gives up after a second or so, a connection at once; shm never does.
constexpr uint64_t kOrphansNs = 500000000;

}  // namespace

int32_t ept_instance::peer_open(uint32_t rank, uint32_t epoch, const void *address, size_t length) {
  int32_t code = plugin::check_rank("libfabric", "peer_open", rank, params.world);
  if (code != EPT_OK) return code;
  Address parsed;
  code = decode(address, length, &parsed);
  if (code != EPT_OK) return code;
  code = plugin::check_life("libfabric", rank, epoch, parsed, fenced_epochs);
  if (code != EPT_OK) return code;
  if (parsed.provider != own.provider)
    return fail(
        EPT_E_MISMATCH, "peer_open", rank, 0,
        "libfabric: rank %u uses provider %s and rank %u uses %s; set EPT_LIBFABRIC_PROVIDER alike on all ranks", rank,
        parsed.provider.c_str(), params.rank, own.provider.c_str());
  if (peers[rank] != nullptr) {
    if (peers[rank]->state != Peer::State::kEnded)
      return fail(EPT_E_INVALID, "peer_open", rank, 0,
                  "libfabric: rank %u is open already, under epoch %u; close it first", rank, peers[rank]->epoch);
    peer_close(rank);
  }
  auto peer = std::make_unique<Peer>();
  peer->rank = rank;
  peer->epoch = epoch;
  peer->rails = static_cast<uint32_t>(std::min(rails.size(), parsed.rails.size()));
  for (uint32_t i = 0; i < peer->rails; ++i) {
    fi_addr_t inserted = FI_ADDR_NOTAVAIL;
    int count = fi_av_insert(rails[i]->av.get(), parsed.rails[i].data(), 1, &inserted, 0, nullptr);
    if (count != 1 || inserted == FI_ADDR_NOTAVAIL)
      return fail(EPT_E_LIMIT, "peer_open", rank, count < 0 ? -count : 0,
                  "libfabric: the address of rank %u does not go into the address vector of rail %u (provider %s takes "
                  "%u peers at most)",
                  rank, i, traits.setting.c_str(), traits.max_peers);
    peer->addresses.push_back(inserted);
  }
  peer->address = std::move(parsed);
  while (peer->opening == 0) host->random(host->context, &peer->opening, sizeof peer->opening);
  peer->hello_pause_ns = kFirstPause;
  if (epoch > 0) close_exports_of(rank, epoch - 1);
  plugin::bind_exports(&exports, rank, epoch);
  closed_epochs.erase(rank);
  peers[rank] = std::move(peer);
  greet(peers[rank].get(), now());
  return EPT_OK;
}

int32_t ept_instance::peer_state(uint32_t rank) {
  const Peer *peer = rank < peers.size() ? peers[rank].get() : nullptr;
  if (peer == nullptr) {
    bool closed = closed_epochs.count(rank) != 0;
    return fail(closed ? EPT_E_CLOSED : EPT_E_INVALID, "peer_state", rank, 0,
                closed ? "libfabric: rank %u was closed" : "libfabric: rank %u was never opened", rank);
  }
  if (peer->state == Peer::State::kUp) return EPT_OK;
  if (peer->state == Peer::State::kEnded)
    return fail(peer->code, "peer_state", rank, peer->number, "libfabric: %s", peer->text.c_str());
  return fail(EPT_LATER, "peer_state", rank, 0,
              "libfabric: rank %u is not connected yet: of %u rails, %u have heard it and %u were heard by it; %s",
              rank, peer->rails, static_cast<unsigned>(std::popcount(peer->heard)),
              static_cast<unsigned>(std::popcount(peer->acknowledged)), peer->last_try.c_str());
}

// ---- the handshake --------------------------------------------------------------------------------------------------

bool ept_instance::send_greeting(Peer *peer, uint32_t number, MessageType type) {
  Rail *rail = rails[number].get();
  if (!rail->broken.empty()) peer->last_try = rail->broken;
  if (rail->free_sends.empty() || !rail->broken.empty()) return false;
  Operation *operation = rail->take(Operation::Kind::kControl, peer);
  if (operation == nullptr) return false;
  operation->buffer = rail->sent.bytes.get() + size_t{rail->free_sends.back()} * kMessageBytes;
  rail->free_sends.pop_back();
  MessageHead head{};
  head.magic = kMessageMagic;
  head.version = kVersion;
  head.type = static_cast<uint8_t>(type);
  head.rail = static_cast<uint8_t>(number);
  head.from = params.rank;
  head.from_epoch = params.epoch;
  head.to = peer->rank;
  head.to_epoch = peer->epoch;
  size_t length = sizeof head;
  if (type == MessageType::kBye) {
    memcpy(head.token, peer->to_it.data(), sizeof head.token);
  } else {
    Greeting greeting{};
    head.length = sizeof greeting;
    greeting.world = params.world;
    greeting.rails = static_cast<uint32_t>(rails.size());
    greeting.max_send = kMaxSend;
    greeting.opening = peer->opening;
    greeting.heard = type == MessageType::kAck ? peer->its_opening : 0;
    seal(credentials, peer->address.nonce, head, &greeting);
    memcpy(operation->buffer + length, &greeting, sizeof greeting);
    length += sizeof greeting;
  }
  memcpy(operation->buffer, &head, sizeof head);
  operation->serial = next_serial++;
  ssize_t status = fi_send(rail->ep.get(), operation->buffer, length, rail->sent.descriptor, peer->addresses[number],
                           &operation->context);
  if (status != 0) {
    rail->give_back(operation);
    if (status != -FI_EAGAIN)
      peer->last_try = format("a greeting can't be sent: %s", library->strerror(static_cast<int>(-status)));
    return false;
  }
  ++peer->in_flight;
  return true;
}

void ept_instance::greet(Peer *peer, uint64_t now_ns) {
  for (uint32_t i = 0; i < peer->rails; ++i)
    if (((peer->acknowledged & peer->heard) >> i & 1) == 0) send_greeting(peer, i, MessageType::kHello);
  peer->hello_due_ns = now_ns + peer->hello_pause_ns;
  peer->hello_pause_ns = std::min(2 * peer->hello_pause_ns, kLongestPause);
}

// It says too that nothing of this rank is half there: see left_open. Who has a write under way goes without a word.
void ept_instance::send_bye(Peer *peer) {
  if (peer->state != Peer::State::kUp || peer->rank == params.rank) return;
  for (const auto &rail : rails)
    for (const Operation &operation : rail->operations)
      if (operation.kind == Operation::Kind::kWrite && operation.peer == peer) return;
  send_greeting(peer, 0, MessageType::kBye);
}

void ept_instance::stranger(const char *what) {
  if (strangers++ == 0)
    log(EPT_LOG_WARNING, format("libfabric: rank %u: a message from a stranger: %s", params.rank, what));
}

void ept_instance::on_message(Rail *rail, Operation *receive, size_t length) {
  const uint8_t *bytes = receive->buffer;
  MessageHead head;
  rail->to_post.push_back(receive->index);
  if (length < sizeof head) return stranger("it is too short");
  memcpy(&head, bytes, sizeof head);
  if (head.magic != kMessageMagic || head.version != kVersion || head.length != length - sizeof head)
    return stranger("it is not of this protocol");
  if (head.from >= params.world || head.to != params.rank || head.to_epoch != params.epoch)
    return stranger("it is for another rank, or for another life of this one");
  Peer *peer = peers[head.from].get();
  const auto type = static_cast<MessageType>(head.type);
  if (auto entry = unparted.find(head.from); entry != unparted.end() && type == MessageType::kBye &&
                                             same_bytes(head.token, entry->second.data(), sizeof head.token)) {
    unparted.erase(entry);
    return;
  }
  if (peer == nullptr || peer->epoch != head.from_epoch) return;  // not opened yet: it will say it again
  if (type == MessageType::kHello || type == MessageType::kAck) {
    Greeting greeting;
    if (head.length != sizeof greeting) return stranger("its greeting is cut");
    memcpy(&greeting, bytes + sizeof head, sizeof greeting);
    return on_greeting(rail, head, greeting);
  }
  if (peer->its_opening == 0 || !same_bytes(head.token, peer->from_it.data(), sizeof head.token))
    return stranger("it does not hold the token of the rank that it says it is from");
  if (type == MessageType::kBye) peer->parted = true;
  if (peer->state == Peer::State::kEnded) return;
  if (peer->state == Peer::State::kConnecting) {
    // Only who heard this rank on all rails says anything else: its Acks are on their way.
    peer->acknowledged = peer->heard = static_cast<uint32_t>((uint64_t{1} << peer->rails) - 1);
    maybe_up(peer);
  }
  if (type == MessageType::kBye) {
    send_bye(peer);  // it waits for ours before it closes its endpoint, and we write to it no more
    return end_peer(peer, EPT_E_CLOSED, 0, format("rank %u left", peer->rank), true);
  }
  if (type != MessageType::kSend) return stranger("it is of no known kind");
  ++rail->counters.rx_sends;
  ept_event *event = events.add(EPT_EVENT_RECV, peer->rank, peer->epoch, {},
                                std::vector<uint8_t>(bytes + sizeof head, bytes + length));
  event->rail = rail->number;
  event->length = head.length;
}

void ept_instance::on_greeting(Rail *rail, const MessageHead &head, const Greeting &greeting) {
  Peer *peer = peers[head.from].get();
  switch (judge(credentials, peer->address.nonce, head, greeting)) {
    case Trust::kStranger:
      return stranger("its greeting proves nothing");
    case Trust::kMember:
      if (peer->state == Peer::State::kEnded) return;
      send_greeting(peer, rail->number, MessageType::kHello);  // so that it sees the same from over there
      return end_peer(
          peer, EPT_E_AUTH, 0,
          format("rank %u does not hold the same secret of the job (EPT_SECRET) as rank %u", peer->rank, params.rank),
          true);
    case Trust::kProven:
      break;
  }
  if (peer->state == Peer::State::kEnded) return;
  if (!same_bytes(greeting.job, credentials.job.data(), sizeof greeting.job))
    return end_peer(peer, EPT_E_MISMATCH, 0,
                    format("rank %u belongs to another job than rank %u", peer->rank, params.rank), true);
  if (greeting.world != params.world)
    return end_peer(
        peer, EPT_E_MISMATCH, 0,
        format("world is %u at rank %u and %u at rank %u", greeting.world, peer->rank, params.world, params.rank),
        true);
  if (head.rail >= peer->rails || head.rail != rail->number || greeting.opening == 0) return;
  if (peer->its_opening != 0 && peer->its_opening != greeting.opening) {
    // It has closed and opened this rank since. A link that was up is not the one that it speaks of; one that was not
    // yet, is.
    if (peer->state == Peer::State::kUp)
      return end_peer(peer, EPT_E_PEER_LOST, 0, format("rank %u has closed this link and opened another", peer->rank),
                      true);
    peer->heard = peer->acknowledged = 0;
  }
  if (peer->its_opening != greeting.opening) {
    peer->its_opening = greeting.opening;
    peer->to_it = make_token(credentials, params.rank, peer->rank, peer->opening, peer->its_opening);
    peer->from_it = make_token(credentials, peer->rank, params.rank, peer->its_opening, peer->opening);
  }
  const uint32_t bit = 1u << rail->number;
  const bool hello = static_cast<MessageType>(head.type) == MessageType::kHello;
  if (!hello && greeting.heard != peer->opening) return;  // of an opening before this one
  peer->heard |= bit;
  if (!hello) peer->acknowledged |= bit;
  if (hello) send_greeting(peer, rail->number, MessageType::kAck);
  maybe_up(peer);
}

void ept_instance::maybe_up(Peer *peer) {
  const auto all = static_cast<uint32_t>((uint64_t{1} << peer->rails) - 1);
  if (peer->state != Peer::State::kConnecting || (peer->heard & peer->acknowledged) != all) return;
  peer->state = Peer::State::kUp;
  peer->was_up = true;
  peer->hello_due_ns = 0;
  events.add(EPT_EVENT_PEER, peer->rank, peer->epoch);
  log(EPT_LOG_DEBUG, format("libfabric: rank %u: rank %u is up, %u rails of %s", params.rank, peer->rank, peer->rails,
                            own.provider.c_str()));
}

// Hellos that are due, operations of ended peers that were waited for long enough, fences whose time has passed.
void ept_instance::on_time(uint64_t now_ns) {
  for (auto &peer : peers)
    if (peer != nullptr && peer->hello_due_ns != 0 && now_ns >= peer->hello_due_ns) greet(peer.get(), now_ns);
  auto give_up = [&](Peer *peer) {
    if (peer->orphans_due_ns == 0 || now_ns < peer->orphans_due_ns) return;
    peer->orphans_due_ns = 0;
    for (auto &rail : rails) {
      for (Operation &operation : rail->operations) {
        const bool counts = operation.kind == Operation::Kind::kWrite || operation.kind == Operation::Kind::kSend;
        if (!counts || operation.peer != peer || operation.told) continue;
        operation.told = true;
        if (operation.mem != nullptr) --operation.mem->in_flight;
        operation.mem = nullptr;
        tell_error(rail.get(), operation, peer->code, peer->number, peer->text);
      }
    }
  };
  for (auto &peer : peers)
    if (peer != nullptr) give_up(peer.get());
  for (auto &peer : leaving) give_up(peer.get());
  for (Fence &fence : fences)
    if (now_ns >= fence.due_ns) fence.due_ns = 0;
  reap();
}

uint64_t ept_instance::next_deadline() const {
  uint64_t next = 0;
  auto sooner = [&](uint64_t due) {
    if (due != 0 && (next == 0 || due < next)) next = due;
  };
  for (const auto &peer : peers)
    if (peer != nullptr) sooner(peer->hello_due_ns), sooner(peer->orphans_due_ns);
  for (const auto &peer : leaving) sooner(peer->orphans_due_ns);
  for (const Fence &fence : fences) sooner(fence.due_ns);
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
  if (peer->in_flight > 0) peer->orphans_due_ns = now() + kOrphansNs;
  if (!announce) return;
  ept_event *event = events.add(EPT_EVENT_PEER, peer->rank, peer->epoch, peer->text);
  event->code = code;
  event->provider_errno = number;
}

int32_t ept_instance::peer_close(uint32_t rank) {
  if (rank >= peers.size() || peers[rank] == nullptr)
    return fail(EPT_E_INVALID, "peer_close", rank, 0, "libfabric: rank %u is not open", rank);
  std::unique_ptr<Peer> peer = std::move(peers[rank]);
  uint32_t &closed = closed_epochs[rank];
  closed = std::max(closed, peer->epoch);
  send_bye(peer.get());
  if (peer->was_up && !peer->parted && rank != params.rank) unparted[rank] = peer->from_it;
  end_peer(peer.get(), EPT_E_CLOSED, 0, format("rank %u was closed here while this was under way", rank), false);
  leaving.push_back(std::move(peer));
  reap();
  return EPT_OK;
}

// Told or not, all that is under way ends here for the caller. The endpoint is closed next, and reads no more then.
void ept_instance::abandon() {
  for (auto &peer : peers)
    if (peer != nullptr) end_peer(peer.get(), EPT_E_CLOSED, 0, "the worker was closed here", false);
  for (auto &rail : rails) {
    for (Operation &operation : rail->operations) {
      if (operation.mem != nullptr) --operation.mem->in_flight;
      operation.mem = nullptr;
      operation.told = true;
    }
  }
}

ept_instance::~ept_instance() {
  exports.clear();  // before the domains that they are of
  if (buried) {
    shm_closed(std::move(rails));
  } else if (left_open()) {
    log(EPT_LOG_DEBUG, format("libfabric: rank %u: its endpoints stay open until the process ends: %zu ranks may be "
                              "amid a write to it",
                              params.rank, unparted.size()));
    for (auto &rail : rails) static_cast<void>(rail.release());
  }
  rails.clear();
}

// The layer ofi_rxm (tcp of 1.17 has it, and verbs) ends the process with SIGSEGV where an endpoint is closed into
// which a write with remote data is half received: that is flushed with an error that has no context, and rxm reads it.
// A target doesn't know what is half there. But who said Bye had nothing under way; so an endpoint is closed when all
// that were up have said it, and else stays open, unpolled, until the process ends. The others' links end as they do
// where a process hangs.
bool ept_instance::left_open() const { return layered && !unparted.empty(); }

void ept_instance::farewell(uint64_t most_ns) {
  auto speaking = [&] {
    for (const auto &rail : rails)
      for (const Operation &operation : rail->operations)
        if (operation.kind == Operation::Kind::kSend || operation.kind == Operation::Kind::kControl) return true;
    return false;
  };
  ept_event events[16];
  for (ept_event &event : events) event.size = sizeof event;
  for (const uint64_t end = now() + most_ns; (speaking() || left_open()) && now() < end;) poll(events, 16);
}

// Forgets closed peers that nothing names any more.
void ept_instance::reap() {
  for (size_t i = 0; i < leaving.size();) {
    Peer *peer = leaving[i].get();
    if (peer->in_flight > 0) {
      ++i;
      continue;
    }
    // The same address may be open again by now, and vectors give it one entry.
    const Peer *again = peers[peer->rank].get();
    for (uint32_t rail = 0; rail < peer->rails; ++rail)
      if (traits.forgets_addresses &&
          (again == nullptr || rail >= again->rails || again->addresses[rail] != peer->addresses[rail]))
        fi_av_remove(rails[rail]->av.get(), &peer->addresses[rail], 1, 0);
    leaving.erase(leaving.begin() + static_cast<ptrdiff_t>(i));
  }
}
