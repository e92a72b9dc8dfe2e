// SPDX-License-Identifier: Apache-2.0
// What a peer goes through: kConnecting -> kUp -> kEnded, or straight to the end. Of an ended peer comes first the PEER
// event, then an ERROR for each operation that was accepted and not answered: when UCX has given its source back, or
// after kOrphansNs. Its endpoint is closed, and the Peer is kept (`leaving`) as long as UCX holds anything that names
// it.
#include <algorithm>
#include <cstring>

#include "../checks.h"
#include "instance.h"

using namespace ucx;
using plugin::Greeting;
using plugin::MessageHead;
using plugin::MessageType;
using plugin::Trust;

namespace {

constexpr uint64_t kFirstPause = 5000000;  // between two Hellos; doubled each time
constexpr uint64_t kLongestPause = 500000000;
// An endpoint that is closed by force gives back what it holds at once; an orderly end waits for what was said to
// leave.
constexpr uint64_t kOrphansNs = 500000000;
constexpr uint64_t kLeavingPause =
    10000000;  // between two looks at endpoints that are closing, while the caller sleeps
constexpr int kLastLooks = 1000;

std::vector<uint8_t> bytes_of(const MessageHead &head, const Greeting *greeting) {
  std::vector<uint8_t> bytes(sizeof head + (greeting != nullptr ? sizeof *greeting : 0));
  memcpy(bytes.data(), &head, sizeof head);
  if (greeting != nullptr) memcpy(bytes.data() + sizeof head, greeting, sizeof *greeting);
  return bytes;
}

}  // namespace

int32_t ept_instance::peer_open(uint32_t rank, uint32_t epoch, const void *address, size_t length) {
  int32_t code = plugin::check_rank("ucx", "peer_open", rank, params.world);
  if (code != EPT_OK) return code;
  Address parsed;
  code = decode(address, length, &parsed);
  if (code != EPT_OK) return code;
  code = plugin::check_life("ucx", rank, epoch, parsed, fenced_epochs);
  if (code != EPT_OK) return code;
  if (peers[rank] != nullptr) {
    if (peers[rank]->state != Peer::State::kEnded)
      return fail(EPT_E_INVALID, "peer_open", rank, 0, "ucx: rank %u is open already, under epoch %u; close it first",
                  rank, peers[rank]->epoch);
    peer_close(rank);
  }
  auto peer = std::make_unique<Peer>();
  peer->instance = this;
  peer->rank = rank;
  peer->epoch = epoch;
  peer->address = std::move(parsed);
  const int32_t made = make_endpoint(peer.get());
  if (made != EPT_OK) return made;
  while (peer->opening == 0) host->random(host->context, &peer->opening, sizeof peer->opening);
  peer->hello_pause_ns = kFirstPause;
  if (epoch > 0) close_exports_of(rank, epoch - 1);
  plugin::bind_exports(&exports, rank, epoch);
  closed_epochs.erase(rank);
  peers[rank] = std::move(peer);
  greet(peers[rank].get(), now());
  return EPT_OK;
}

int32_t ept_instance::make_endpoint(Peer *peer) {
  ucp_ep_params_t wanted{};
  wanted.field_mask =
      UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE | UCP_EP_PARAM_FIELD_ERR_HANDLER;
  wanted.address = reinterpret_cast<const ucp_address_t *>(peer->address.worker.data());
  // Else a peer that dies ends this process too.
  wanted.err_mode = UCP_ERR_HANDLING_MODE_PEER;
  wanted.err_handler.cb = [](void *argument, ucp_ep_h, ucs_status_t status) {
    auto *failed = static_cast<Peer *>(argument);
    failed->broken = status;
    failed->instance->some_broke = true;
  };
  wanted.err_handler.arg = peer;
  const ucs_status_t status = library->ucp_ep_create(ucp, &wanted, &peer->ep);
  if (status == UCS_OK) return EPT_OK;
  peer->ep = nullptr;
  return fail(EPT_E_UNAVAILABLE, "peer_open", peer->rank, status,
              "ucx: no way from rank %u to rank %u: %s (%d); both must have a transport of EPT_UCX_TRANSPORTS or "
              "UCX_TLS that reaches the other and tells of its death",
              params.rank, peer->rank, library->words(status).c_str(), status);
}

int32_t ept_instance::peer_state(uint32_t rank) {
  const Peer *peer = rank < peers.size() ? peers[rank].get() : nullptr;
  if (peer == nullptr) {
    const bool closed = closed_epochs.count(rank) != 0;
    return fail(closed ? EPT_E_CLOSED : EPT_E_INVALID, "peer_state", rank, 0,
                closed ? "ucx: rank %u was closed" : "ucx: rank %u was never opened", rank);
  }
  if (peer->state == Peer::State::kUp) return EPT_OK;
  if (peer->state == Peer::State::kEnded) return fail(peer->code, "peer_state", rank, 0, "ucx: %s", peer->text.c_str());
  return fail(EPT_LATER, "peer_state", rank, 0, "ucx: rank %u is not connected yet: it was %s, and %s", rank,
              peer->heard ? "heard" : "not heard", peer->acknowledged ? "has heard this one" : "has not answered");
}

// ---- the greeting: ../greeting.h ------------------------------------------------------------------------------------

void ept_instance::say(Peer *peer, MessageType type) {
  MessageHead head{};
  head.magic = kMessageMagic;
  head.version = kVersion;
  head.type = static_cast<uint8_t>(type);
  head.from = params.rank;
  head.from_epoch = params.epoch;
  head.to = peer->rank;
  head.to_epoch = peer->epoch;
  if (type == MessageType::kBye) {
    memcpy(head.token, peer->to_it.data(), sizeof head.token);
    return note(peer, Am::kMessage, bytes_of(head, nullptr), {});
  }
  Greeting greeting{};
  head.length = sizeof greeting;
  greeting.world = params.world;
  greeting.rails = 1;
  greeting.max_send = kMaxSend;
  greeting.opening = peer->opening;
  greeting.heard = type == MessageType::kAck ? peer->its_opening : 0;
  seal(credentials, peer->address.nonce, head, &greeting);
  note(peer, Am::kMessage, bytes_of(head, &greeting), {});
}

void ept_instance::greet(Peer *peer, uint64_t now_ns) {
  // One that has not left yet is as good as another.
  if (peer->greetings == 0) say(peer, MessageType::kHello);
  peer->hello_due_ns = now_ns + peer->hello_pause_ns;
  peer->hello_pause_ns = std::min(2 * peer->hello_pause_ns, kLongestPause);
}

void ept_instance::stranger(const char *what) {
  if (strangers++ == 0) log(EPT_LOG_WARNING, format("ucx: rank %u: a message from a stranger: %s", params.rank, what));
}

void ept_instance::on_message(const uint8_t *bytes, size_t length) {
  MessageHead head;
  if (length < sizeof head) return stranger("it is too short");
  memcpy(&head, bytes, sizeof head);
  if (head.magic != kMessageMagic || head.version != kVersion || head.length != length - sizeof head)
    return stranger("it is not of this protocol");
  if (head.from >= params.world || head.to != params.rank || head.to_epoch != params.epoch)
    return stranger("it is for another rank, or for another life of this one");
  Peer *peer = peers[head.from].get();
  if (peer == nullptr || peer->epoch != head.from_epoch) return;  // not opened yet: it will say it again
  const auto type = static_cast<MessageType>(head.type);
  if (type == MessageType::kHello || type == MessageType::kAck) {
    Greeting greeting;
    if (head.length != sizeof greeting) return stranger("its greeting is cut");
    memcpy(&greeting, bytes + sizeof head, sizeof greeting);
    return on_greeting(peer, head, greeting);
  }
  if (peer->its_opening == 0 || !same_bytes(head.token, peer->from_it.data(), sizeof head.token))
    return stranger("it does not hold the token of the rank that it says it is from");
  if (peer->state == Peer::State::kEnded) return;
  take_for_up(peer);
  if (type == MessageType::kBye) return end_peer(peer, EPT_E_CLOSED, format("rank %u left", peer->rank), true);
  if (type != MessageType::kSend) return stranger("it is of no known kind");
  on_send(peer, head, bytes + sizeof head);
}

void ept_instance::on_greeting(Peer *peer, const MessageHead &head, const Greeting &greeting) {
  const Trust trust = judge(credentials, peer->address.nonce, head, greeting);
  if (trust == Trust::kStranger) return stranger("its greeting proves nothing");
  if (peer->state == Peer::State::kEnded) return;
  if (trust == Trust::kMember) {
    say(peer, MessageType::kHello);  // so that it sees the same from over there
    return end_peer(
        peer, EPT_E_AUTH,
        format("rank %u does not hold the same secret of the job (EPT_SECRET) as rank %u", peer->rank, params.rank),
        true);
  }
  if (!same_bytes(greeting.job, credentials.job.data(), sizeof greeting.job))
    return end_peer(peer, EPT_E_MISMATCH,
                    format("rank %u belongs to another job than rank %u", peer->rank, params.rank), true);
  if (greeting.world != params.world)
    return end_peer(
        peer, EPT_E_MISMATCH,
        format("world is %u at rank %u and %u at rank %u", greeting.world, peer->rank, params.world, params.rank),
        true);
  if (greeting.opening == 0) return;
  if (peer->its_opening != 0 && peer->its_opening != greeting.opening) {
    // It has closed and opened this rank since. A link that was up is not the one that it speaks of; one that was not
    // yet, is.
    if (peer->state == Peer::State::kUp)
      return end_peer(peer, EPT_E_PEER_LOST, format("rank %u has closed this link and opened another", peer->rank),
                      true);
    peer->heard = peer->acknowledged = false;
  }
  if (peer->its_opening != greeting.opening) {
    peer->its_opening = greeting.opening;
    peer->to_it = make_token(credentials, params.rank, peer->rank, peer->opening, peer->its_opening);
    peer->from_it = make_token(credentials, peer->rank, params.rank, peer->its_opening, peer->opening);
  }
  const bool hello = static_cast<MessageType>(head.type) == MessageType::kHello;
  if (!hello && greeting.heard != peer->opening) return;  // of an opening before this one
  peer->heard = true;
  if (hello)
    say(peer, MessageType::kAck);
  else
    peer->acknowledged = true;
  if (peer->acknowledged) take_for_up(peer);
}

// It has proven itself, and has heard this rank: it says so, or says what only who has heard can say.
void ept_instance::take_for_up(Peer *peer) {
  if (peer->state != Peer::State::kConnecting) return;
  peer->heard = peer->acknowledged = true;
  peer->state = Peer::State::kUp;
  peer->hello_due_ns = 0;
  owe(peer);  // a write of its that came before this was refused
  events.add(EPT_EVENT_PEER, peer->rank, peer->epoch);
  log(EPT_LOG_DEBUG, format("ucx: rank %u: rank %u is up", params.rank, peer->rank));
}

// ---- time -----------------------------------------------------------------------------------------------------------

void ept_instance::on_time(uint64_t now_ns) {
  for (auto &peer : peers) {
    if (peer == nullptr) continue;
    if (peer->hello_due_ns != 0 && now_ns >= peer->hello_due_ns) greet(peer.get(), now_ns);
    give_up(peer.get(), now_ns);
    if (peer->state != Peer::State::kUp) continue;
    // It owes an answer as long as it has not ended what was sent to it. UCX looks whether a peer is there too, but
    // every 20 s, and takes a process that is stopped for a live one.
    if (peer->operations.empty() || peer->arrivals != peer->arrivals_seen || peer->owes_since_ns == 0) {
      peer->arrivals_seen = peer->arrivals;
      peer->owes_since_ns = peer->operations.empty() ? 0 : now_ns;
    } else if (now_ns - peer->owes_since_ns > params.dead_ns) {
      end_peer(peer.get(), EPT_E_PEER_LOST,
               format("rank %u is lost: it owes an answer to %zu operations and was silent for %.1f s (EPT_DEAD_S)",
                      peer->rank, peer->operations.size(), static_cast<double>(now_ns - peer->owes_since_ns) / 1e9),
               true);
    }
  }
  for (auto &peer : leaving) give_up(peer.get(), now_ns);
}

void ept_instance::give_up(Peer *peer, uint64_t now_ns) {
  if (peer->orphans_due_ns == 0 || now_ns < peer->orphans_due_ns) return;
  peer->orphans_due_ns = 0;
  if (peer->ep != nullptr && !peer->force) {  // the orderly end takes too long
    peer->force = true;
    close_endpoint(peer);
  }
  for (Operation &operation : peer->operations) {
    if (operation.told) continue;
    operation.told = true;
    if (operation.mem != nullptr) --operation.mem->in_flight;
    operation.mem = nullptr;
    ++counters.errors;
    ept_event *event = events.add(EPT_EVENT_ERROR, peer->rank, peer->epoch, peer->text);
    event->cookie = operation.cookie;
    event->code = peer->code;
  }
}

uint64_t ept_instance::next_deadline() const {
  uint64_t next = leaving.empty() ? 0 : now() + kLeavingPause;
  auto sooner = [&](uint64_t due) {
    if (due != 0 && (next == 0 || due < next)) next = due;
  };
  for (const auto &peer : peers) {
    if (peer == nullptr) continue;
    sooner(peer->hello_due_ns);
    sooner(peer->orphans_due_ns);
    if (!peer->operations.empty())
      sooner(peer->owes_since_ns != 0 ? peer->owes_since_ns + params.dead_ns + 1 : now() + params.dead_ns / 2);
  }
  return next;
}

// ---- the end --------------------------------------------------------------------------------------------------------

void ept_instance::end_broken() {
  some_broke = false;
  for (auto &peer : peers)
    if (peer != nullptr && peer->broken != UCS_OK && peer->state != Peer::State::kEnded)
      end_peer(peer.get(), EPT_E_PEER_LOST,
               format("rank %u is lost: its endpoint failed: %s (%d)", peer->rank, library->words(peer->broken).c_str(),
                      peer->broken),
               true);
}

void ept_instance::end_peer(Peer *peer, int32_t code, std::string text, bool announce) {
  if (peer->state == Peer::State::kEnded) return;
  peer->state = Peer::State::kEnded;
  peer->code = code;
  peer->text = std::move(text);
  peer->hello_due_ns = 0;
  if (peer->owing) std::erase(owing, peer);
  peer->owing = false;
  peer->orphans_due_ns = now() + kOrphansNs;
  // By force, but for an orderly end here: what was said last is to leave.
  peer->force = code != EPT_E_CLOSED || announce;
  if (announce) {
    ept_event *event = events.add(EPT_EVENT_PEER, peer->rank, peer->epoch, peer->text);
    event->code = code;
    event->provider_errno = peer->broken;
  }
  if (code == EPT_E_AUTH) peer->force = false;  // its greeting is on its way
  if (!peer->force) flush(peer);
  close_endpoint(peer);
  settle(peer);
}

// What was said before has left when this has ended, which counts as something said.
void ept_instance::flush(Peer *peer) {
  if (peer->ep == nullptr || peer->closing != nullptr || peer->broken != UCS_OK) return;
  ucp_request_param_t how{};
  how.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
  how.user_data = peer;
  how.cb.send = [](void *pending, ucs_status_t, void *user) {
    auto *flushed = static_cast<Peer *>(user);
    flushed->instance->library->ucp_request_free(pending);
    --flushed->greetings;
  };
  if (UCS_PTR_IS_PTR(library->ucp_ep_flush_nbx(peer->ep, &how))) ++peer->greetings;
}

// Ends the endpoint, by force or once all that was said has left; reap sees how it ends. UCX gives back all that is
// under way there. Never its own orderly close: that can't be hurried, should the peer be gone.
void ept_instance::close_endpoint(Peer *peer) {
  if (peer->ep == nullptr || peer->closing != nullptr || (!peer->force && peer->greetings > 0)) return;
  ucp_request_param_t how{};
  how.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS;
  how.flags = UCP_EP_CLOSE_FLAG_FORCE;
  void *request = library->ucp_ep_close_nbx(peer->ep, &how);
  if (UCS_PTR_IS_PTR(request))
    peer->closing = request;
  else
    peer->ep = nullptr;  // at once, or it can't be closed any more
}

// Endpoints that have ended, and closed peers that nothing names any more.
void ept_instance::reap() {
  auto look = [&](Peer *peer) {
    close_endpoint(peer);
    if (peer->closing != nullptr && library->ucp_request_check_status(peer->closing) != UCS_INPROGRESS) {
      library->ucp_request_free(peer->closing);
      peer->closing = nullptr;
      peer->ep = nullptr;
    }
  };
  for (auto &peer : peers)
    if (peer != nullptr && peer->state == Peer::State::kEnded) look(peer.get());
  for (size_t i = 0; i < leaving.size();) {
    Peer *peer = leaving[i].get();
    look(peer);
    settle(peer);
    if (peer->ep != nullptr || peer->greetings > 0 || peer->receiving > 0 || !peer->operations.empty())
      ++i;
    else
      leaving.erase(leaving.begin() + static_cast<ptrdiff_t>(i));
  }
}

int32_t ept_instance::peer_close(uint32_t rank) {
  if (rank >= peers.size() || peers[rank] == nullptr)
    return fail(EPT_E_INVALID, "peer_close", rank, 0, "ucx: rank %u is not open", rank);
  std::unique_ptr<Peer> peer = std::move(peers[rank]);
  uint32_t &closed = closed_epochs[rank];
  closed = std::max(closed, peer->epoch);
  if (peer->state == Peer::State::kUp) say(peer.get(), MessageType::kBye);
  end_peer(peer.get(), EPT_E_CLOSED, format("rank %u was closed here while this was under way", rank), false);
  leaving.push_back(std::move(peer));
  reap();
  return EPT_OK;
}

int32_t ept_instance::peer_fence(uint32_t rank, uint32_t epoch, uint64_t cookie) {
  if (rank >= params.world)
    return fail(EPT_E_INVALID, "peer_fence", rank, 0, "ucx: rank %u is outside the world of %u", rank, params.world);
  if (settings.write == Write::kPut)
    return fail(EPT_E_STUCK, "peer_fence", rank, 0,
                "ucx: RDMA writes of rank %u, epoch %u, may land as long as it lives; end that process", rank, epoch);
  Peer *peer = peers[rank].get();
  if (peer != nullptr && peer->epoch <= epoch)
    end_peer(peer, EPT_E_PEER_LOST, format("epoch %u of rank %u was fenced here", epoch, rank), false);
  uint32_t &fence = fenced_epochs[rank];
  fence = std::max(fence, epoch);
  close_exports_of(rank, epoch);
  fences.push_back({cookie, rank, epoch});
  return EPT_OK;
}

// FENCED once no endpoint of that life is left here and no payload of it is under way: nobody reads what it sends.
void ept_instance::give_fenced() {
  for (size_t i = 0; i < fences.size();) {
    const Fence &fence = fences[i];
    auto holds = [&](const std::unique_ptr<Peer> &peer) {
      return peer != nullptr && peer->rank == fence.rank && peer->epoch <= fence.epoch &&
             (peer->ep != nullptr || peer->receiving > 0);
    };
    if (std::any_of(peers.begin(), peers.end(), holds) || std::any_of(leaving.begin(), leaving.end(), holds)) {
      ++i;
      continue;
    }
    ept_event *event = events.add(EPT_EVENT_FENCED, fence.rank, fence.epoch);
    event->cookie = fence.cookie;
    fences.erase(fences.begin() + static_cast<ptrdiff_t>(i));
  }
}

// Told or not, all that is under way ends here for the caller.
void ept_instance::abandon() {
  auto forget = [](Peer *peer) {
    for (Operation &operation : peer->operations) {
      if (operation.mem != nullptr) --operation.mem->in_flight;
      operation.mem = nullptr;
      operation.told = true;
    }
  };
  for (auto &peer : peers) {
    if (peer == nullptr) continue;
    end_peer(peer.get(), EPT_E_CLOSED, "the worker was closed here", false);
    forget(peer.get());
  }
  for (auto &peer : leaving) forget(peer.get());
}

void ept_instance::farewell(uint64_t most_ns) {
  ept_event shown[16];
  for (ept_event &event : shown) event.size = sizeof event;
  for (const uint64_t end = now() + most_ns; !leaving.empty() && now() < end;) poll(shown, 16);
}

ept_instance::~ept_instance() {
  if (ucp != nullptr) {
    // What UCX still holds names peers and memory: it must be gone before they are.
    for (auto &peer : peers) {
      if (peer == nullptr) continue;
      end_peer(peer.get(), EPT_E_CLOSED, "closed", false);
      leaving.push_back(std::move(peer));
    }
    for (auto &peer : leaving) {
      peer->force = true;
      close_endpoint(peer.get());
    }
    for (int i = 0; i < kLastLooks && !leaving.empty(); ++i) {
      library->ucp_worker_progress(ucp);
      reap();
    }
    library->ucp_worker_destroy(ucp);
  }
  exports.clear();
  if (context != nullptr) library->ucp_cleanup(context);
}
