// SPDX-License-Identifier: Apache-2.0
// What a peer goes through: kConnecting -> kUp -> kEnded, or straight to the end. An ended peer first gives what is
// left to say: LOCAL_DONE of what was acknowledged, the PEER event, an ERROR for each other operation that was
// accepted; so after PEER there is nothing but ERRORs. It stays in `peers`, to answer peer_state, until it is closed or
// opened again.
#include <sys/epoll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <system_error>

#include "../checks.h"
#include "instance.h"

using namespace tcp;

namespace {

// Of dead_ns, what a connection that ended by keepalive had been silent for (tune).
constexpr uint64_t kKeepaliveShare = 2;

}  // namespace

bool Peer::drained() const {
  return std::all_of(streams.begin(), streams.end(),
                     [](const auto &stream) { return stream == nullptr || stream->drained(); });
}

int32_t ept_instance::peer_open(uint32_t rank, uint32_t epoch, const void *address, size_t length) {
  int32_t code = plugin::check_rank("tcp", "peer_open", rank, params.world);
  if (code != EPT_OK) return code;
  Address parsed;
  code = decode(address, length, &parsed);
  if (code != EPT_OK) return code;
  code = plugin::check_life("tcp", rank, epoch, parsed, fenced_epochs);
  if (code != EPT_OK) return code;
  auto found = peers.find(rank);
  if (found != peers.end()) {
    if (found->second->state != Peer::State::kEnded)
      return fail(EPT_E_INVALID, "peer_open", rank, 0, "tcp: rank %u is open already, under epoch %u; close it first",
                  rank, found->second->epoch);
    peer_close(rank);
  }
  auto peer = std::make_unique<Peer>();
  peer->exports = &exports;
  peer->poll_number = &poll_number;
  peer->sink = sink.get();
  peer->counters = counters.data();
  peer->rank = rank;
  peer->epoch = epoch;
  peer->depth = settings.depth;
  peer->limits = limits;
  peer->number = ++peers_opened;
  peer->self = rank == params.rank;
  peer->address = parsed;
  peer->agreed_streams = std::min<uint32_t>(settings.streams, parsed.streams);
  peer->where = to_text(parsed.endpoints.front());
  peer->last_try = "nothing was heard of it yet";
  if (!peer->self) {
    peer->paths = find_paths(parsed, own, !settings.interface.empty());
    if (rank > params.rank && peer->paths.list.empty())
      return fail(EPT_E_UNAVAILABLE, "peer_open", rank, 0,
                  "tcp: rank %u is on another machine and advertises only loopback addresses (%s); give it "
                  "EPT_TCP_INTERFACE",
                  rank, peer->where.c_str());
    peer->streams.resize(peer->agreed_streams);
    peer->generations.resize(peer->agreed_streams);
  }
  if (epoch > 0) exports.remove_all_of(rank, epoch - 1);
  exports.bind(rank, epoch);
  closed_epochs.erase(rank);
  Peer *opened = peer.get();
  peers[rank] = std::move(peer);
  if (opened->self) {
    opened->state = Peer::State::kUp;
    events.add(EPT_EVENT_PEER, rank, epoch);
    return EPT_OK;
  }
  auto refused = refused_members.find(rank);
  if (refused != refused_members.end()) {
    bool same = refused->second.epoch == epoch;
    std::string text = refused->second.text;
    int32_t why = refused->second.code;
    refused_members.erase(refused);
    if (same) {
      end_peer(opened, why, 0, text, true);
      return EPT_OK;
    }
  }
  start_dials(opened);
  if (rank < params.rank) adopt_parked(opened);
  return EPT_OK;
}

int32_t ept_instance::peer_state(uint32_t rank) {
  auto found = peers.find(rank);
  if (found == peers.end()) {
    bool closed = closed_epochs.count(rank) != 0;
    return fail(closed ? EPT_E_CLOSED : EPT_E_INVALID, "peer_state", rank, 0,
                closed ? "tcp: rank %u was closed" : "tcp: rank %u was never opened", rank);
  }
  const Peer &peer = *found->second;
  if (peer.state == Peer::State::kUp) return EPT_OK;
  if (peer.state == Peer::State::kEnded)
    return fail(peer.code, "peer_state", rank, peer.number_of_system, "tcp: %s", peer.text.c_str());
  return fail(EPT_LATER, "peer_state", rank, 0, "tcp: rank %u is not connected yet, %u of %u streams are up; %s", rank,
              peer.streams_up, peer.agreed_streams, peer.last_try.c_str());
}

void ept_instance::stream_up(Peer *peer, uint32_t number, Fd fd, const Limits &agreed, const ResumePoint &theirs) {
  int raw = fd.get();
  std::unique_ptr<Stream> &stream = peer->streams[number];
  const bool first = stream == nullptr;
  if (first) {
    start_movers();
    peer->movers = movers.get();
    peer->limits = agreed;
    stream = std::make_unique<Stream>(peer, number, std::move(fd));
    ++peer->streams_up;
  } else {
    stream->attach(std::move(fd), theirs);
  }
  watch(raw, stream.get(), EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, true);
  stream_is_well(peer, number);
  if (peer->state == Peer::State::kUp) {
    make_ready(stream.get());
    log(EPT_LOG_DEBUG,
        format("tcp: rank %u: stream %u to rank %u goes on over %s from operation %llu", params.rank, number,
               peer->rank, peer->where.c_str(), static_cast<unsigned long long>(theirs.consumed)));
    return;
  }
  if (peer->streams_up < peer->agreed_streams) return;
  peer->state = Peer::State::kUp;
  events.add(EPT_EVENT_PEER, peer->rank, peer->epoch);
  log(EPT_LOG_DEBUG, format("tcp: rank %u: rank %u at %s is up, %u streams", params.rank, peer->rank,
                            peer->where.c_str(), peer->agreed_streams));
  // What came in before all streams were up is looked at from now on.
  for (auto &up : peer->streams) {
    up->expect_input();
    make_ready(up.get());
  }
}

// Ends `peer` for good: nothing more is sent to it or read from it.
void ept_instance::end_peer(Peer *peer, int32_t code, int number, std::string text, bool announce) {
  if (peer->state == Peer::State::kEnded) return;
  note_consumed(*peer);
  peer->state = Peer::State::kEnded;
  peer->code = code;
  peer->number_of_system = number;
  peer->text = std::move(text);
  peer->announce = announce;
  stop_dials(peer);
  for (auto &stream : peer->streams) {
    if (stream == nullptr) continue;
    peer->unclear = peer->unclear || stream->in_flight();
    forget(stream.get());
    stream->retire();
    stream->drop_sources();
  }
  ended.push_back(peer);
}

// A connection of `peer` has ended. With FINISH on one of its streams the peer is leaving: it left when all have said
// so, and is lost where one can't any more. Without, the stream goes on over another connection.
void ept_instance::streams_may_have_ended(Peer *peer) {
  if (peer->state != Peer::State::kUp) return;
  bool all = true, leaving_now = false;
  for (auto &stream : peer->streams) {
    leaving_now = leaving_now || stream->orderly();
    all = all && stream->ended() && stream->orderly();
  }
  if (all) return end_peer(peer, EPT_E_CLOSED, 0, format("rank %u at %s left", peer->rank, peer->where.c_str()), true);
  for (auto &stream : peer->streams) {
    if (!stream->ended() || stream->orderly()) continue;
    if (stream->broke_protocol() || leaving_now)
      return end_peer(peer, EPT_E_PEER_LOST, stream->end_errno(),
                      format("rank %u at %s is lost (stream %u): %s", peer->rank, peer->where.c_str(), stream->rail(),
                             stream->end_text().c_str()),
                      true);
    if (stream->down()) continue;
    const uint64_t time = now();
    const uint64_t silent = stream->end_errno() == ETIMEDOUT ? params.dead_ns / kKeepaliveShare : 0;
    stream_broke(peer, stream->rail(), time - silent);
  }
}

int32_t ept_instance::peer_close(uint32_t rank) {
  auto found = peers.find(rank);
  if (found == peers.end()) return fail(EPT_E_INVALID, "peer_close", rank, 0, "tcp: rank %u is not open", rank);
  std::unique_ptr<Peer> peer = std::move(found->second);
  peers.erase(found);
  uint32_t &closed = closed_epochs[rank];
  closed = std::max(closed, peer->epoch);
  peer->announce = false;
  if (peer->state != Peer::State::kEnded) {
    note_consumed(*peer);
    bool was_up = peer->state == Peer::State::kUp;
    peer->state = Peer::State::kEnded;
    peer->code = EPT_E_CLOSED;
    peer->text = format("rank %u was closed here while this was under way", rank);
    stop_dials(peer.get());
    for (auto &stream : peer->streams) {
      if (stream == nullptr) continue;
      peer->unclear = peer->unclear || stream->in_flight();
      forget(stream.get());
      if (was_up && !stream->down()) {
        stream->finish();
        stream->end(0, "");
        linger(stream->take_fd());
      } else {
        stream->retire();
      }
      stream->drop_sources();
    }
    ended.push_back(peer.get());
  }
  leaving.push_back(std::move(peer));
  if (std::find(ended.begin(), ended.end(), leaving.back().get()) == ended.end()) leaving.pop_back();
  return EPT_OK;
}

int32_t ept_instance::peer_fence(uint32_t rank, uint32_t epoch, uint64_t cookie) {
  if (rank >= params.world)
    return fail(EPT_E_INVALID, "peer_fence", rank, 0, "tcp: rank %u is outside the world of %u", rank, params.world);
  auto found = peers.find(rank);
  if (found != peers.end() && found->second->epoch <= epoch)
    end_peer(found->second.get(), EPT_E_PEER_LOST, 0, format("epoch %u of rank %u was fenced here", epoch, rank),
             false);
  uint32_t &fence = fenced_epochs[rank];
  fence = std::max(fence, epoch);
  exports.remove_all_of(rank, epoch);
  std::vector<Accepted *> stale;
  for (auto &entry : accepted)
    if (entry->step == Accepted::Step::kParked && entry->acceptor.peer().rank == rank &&
        entry->acceptor.peer().epoch <= epoch)
      stale.push_back(entry.get());
  for (Accepted *entry : stale) drop(entry);
  auto counts = consumed.find(rank);
  for (uint32_t rail = 0; rail < settings.streams; ++rail) {
    ept_event *event = events.add(EPT_EVENT_FENCED, rank, epoch);
    event->rail = rail;
    event->cookie = cookie;
    if (counts != consumed.end() && counts->second.epoch == epoch && rail < counts->second.immediates.size())
      event->immediate = static_cast<uint32_t>(counts->second.immediates[rail]);
  }
  return EPT_OK;
}

// Payload that is half received into what was exported until now changes nothing any more.
void ept_instance::exports_removed() {
  for (auto &entry : peers)
    for (auto &stream : entry.second->streams) {
      if (stream == nullptr) continue;
      stream->revalidate();
      // What a mover was reading is its own thread's again.
      if (entry.second->state == Peer::State::kUp && stream->has_work()) make_ready(stream.get());
    }
}

// Once, when the first peer comes up: by then the others of this host are open too, which says how many ranks share its
// cores. A rank that others join later keeps what it has.
void ept_instance::start_movers() {
  if (movers_decided) return;
  movers_decided = true;
  uint32_t here = 1;
  for (const auto &entry : peers) here += !entry.second->self && entry.second->address.host == own.host;
  const uint32_t count = settings.threads == kAutoThreads ? threads_for(static_cast<uint32_t>(CPU_COUNT(&cores)), here)
                                                          : static_cast<uint32_t>(settings.threads);
  if (count == 0) return;
  try {
    movers = std::make_unique<Movers>(count, cores);
  } catch (const std::system_error &error) {
    log(EPT_LOG_WARNING,
        format("tcp: no threads to move bytes could be had, so the engine's own moves all of them: %s", error.what()));
    return;
  }
  watch(movers->descriptor(), &movers_source, EPOLLIN | EPOLLET, false);
}

void ept_instance::note_consumed(const Peer &peer) {
  Consumed &entry = consumed[peer.rank];
  entry.epoch = peer.epoch;
  entry.immediates.assign(peer.streams.size(), 0);
  for (size_t i = 0; i < peer.streams.size(); ++i)
    if (peer.streams[i] != nullptr) entry.immediates[i] = peer.streams[i]->immediates();
}

void ept_instance::give_ended() {
  for (size_t i = 0; i < ended.size() && !events.full();) {
    Peer *peer = ended[i];
    for (auto &stream : peer->streams)
      if (stream != nullptr) stream->complete(&events);
    if (events.full()) return;
    if (peer->announce) {
      ept_event *event = events.add(EPT_EVENT_PEER, peer->rank, peer->epoch, peer->text);
      event->code = peer->code;
      event->provider_errno = peer->number_of_system;
      peer->announce = false;
    }
    for (auto &stream : peer->streams)
      if (stream != nullptr) stream->abandon(&events, peer->code, peer->number_of_system, peer->text.c_str());
    if (!peer->drained()) return;  // the caller has no more room
    ended.erase(ended.begin() + static_cast<ptrdiff_t>(i));
    auto left = std::find_if(leaving.begin(), leaving.end(), [&](const auto &other) { return other.get() == peer; });
    if (left != leaving.end()) leaving.erase(left);
  }
}
