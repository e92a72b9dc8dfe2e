// SPDX-License-Identifier: Apache-2.0
// When a stream is connected again, and when its peer is given up.
//
// A stream BREAKS when its connection ends without FINISH, or when the other side asks for another connection. It is
// down from then on: retired, its operations kept. Who dials tries at once, then with pauses (dial.cc); who accepts
// knocks after a moment, in case the other side has not noticed. It is IN DOUBT when its connection stands but the
// kernel over there has fallen silent, or nothing has moved for a quarter of dead_ns though operations are in flight:
// then another connection is tried beside it, which takes its place when the other process has answered and nothing has
// moved still.
//
// The peer is LOST when a stream has been down, or its connection silent, for dead_ns; or at once when all its streams
// are down and nobody listens at any of its addresses any more, which is what the death of a process looks like. A peer
// that stands still (stopped, compiling) answers no handshake and its kernel is not silent: it is waited for.
#include <algorithm>
#include <cerrno>

#include "instance.h"

using namespace tcp;

namespace {

constexpr uint64_t kKnockAfter = 50000000;  // most breaks are seen on both sides: who dials is given so long
// A listener is missing for a moment only where its process has ended; a few rounds, in case a machine in between lies.
constexpr uint32_t kRefusedRounds = 3;
constexpr uint64_t kSettled = 1000000000;  // a connection that lived so long was no part of the trouble before it

}  // namespace

void ept_instance::dial_again(Dial *dial, Dial::Why why, uint64_t due) {
  // A try that is under way goes on; one that only waits is overtaken.
  if (dial->step != Dial::Step::kIdle && dial->step != Dial::Step::kPause) {
    dial->why = why;
    return;
  }
  if (dial->peer->paths.list.empty()) return;  // nothing to knock at: wait for the other side, or the deadline
  if (dial->step == Dial::Step::kIdle || dial->why == Dial::Why::kHome) {
    dial->tries = dial->refused_in_round = dial->refused_rounds = 0;
    const bool settled = now() - dial->up_ns > kSettled;
    dial->pause_ns = settled ? 0 : std::min(kLongestPause, std::max(kFirstPause, 2 * dial->pause_ns));
    dial->due_ns = due + dial->pause_ns;
  } else {
    dial->due_ns = std::min(dial->due_ns, due);
  }
  dial->why = why;
  dial->step = Dial::Step::kPause;
}

// The connection of `stream` is retired, whatever state it is in.
void ept_instance::retire(Peer *peer, uint32_t number) {
  Stream *stream = peer->streams[number].get();
  if (stream->down()) return;
  Dial *dial = peer->dials[number].get();
  forget(stream);
  stream->retire();
  if (dial->reason.empty()) dial->reason = "its connection was given up for another";
  if (dial->deadline_ns == 0) dial->deadline_ns = now() + params.dead_ns;
  dial_again(dial, Dial::Why::kBroken, now() + (peer->rank < params.rank ? kKnockAfter : 0));
  if (stream->completing()) make_ready(stream);
}

void ept_instance::stream_broke(Peer *peer, uint32_t number, uint64_t since) {
  Stream *stream = peer->streams[number].get();
  Dial *dial = peer->dials[number].get();
  dial->reason = stream->end_text();
  dial->number = stream->end_errno();
  if (dial->deadline_ns == 0) dial->deadline_ns = since + params.dead_ns;
  retire(peer, number);
  log(EPT_LOG_DEBUG,
      format("tcp: rank %u: stream %u to rank %u broke: %s", params.rank, number, peer->rank, dial->reason.c_str()));
  if (!peer->suspect) {
    peer->suspect = true;
    events
        .add(EPT_EVENT_PEER, peer->rank, peer->epoch,
             format("stream %u to rank %u at %s broke and is connected again: %s", number, peer->rank,
                    peer->where.c_str(), dial->reason.c_str()))
        ->code = EPT_LATER;
  }
}

// `stream` has a new connection.
void ept_instance::stream_is_well(Peer *peer, uint32_t number) {
  Dial *dial = peer->dials[number].get();
  dial->fd.reset();  // a knock that has become needless
  dial->step = Dial::Step::kIdle;
  dial->deadline_ns = 0;
  dial->generation = dial->attempts;
  dial->up_ns = now();
  dial->reason.clear();
  const size_t home = number % peer->paths.stripe;
  if (peer->rank > params.rank && dial->path != home) {
    dial->path = home;
    dial->why = Dial::Why::kHome;
    dial->step = Dial::Step::kPause;
    dial->due_ns = dial->up_ns + params.dead_ns;
  }
  if (!peer->suspect || peer->state != Peer::State::kUp) return;
  for (const auto &stream : peer->streams)
    if (stream->down()) return;
  peer->suspect = false;
  events.add(EPT_EVENT_PEER, peer->rank, peer->epoch);
}

// The higher rank has lost its end of connection `generation` of `stream`.
void ept_instance::knocked(Peer *peer, uint32_t number, uint32_t generation) {
  if (peer->state != Peer::State::kUp) return;
  Stream *stream = peer->streams[number].get();
  Dial *dial = peer->dials[number].get();
  if (!stream->down()) {
    if (dial->generation > generation) return;  // it has another since
    stream->end(0, "the other side asked for another connection");
    return stream_broke(peer, number, now());
  }
  if (dial->step == Dial::Step::kPause) dial->due_ns = now();
}

// Nobody listens at any address of the peer. True: that was its end.
bool ept_instance::all_paths_refuse(Dial *dial) {
  Peer *peer = dial->peer;
  if (peer->state != Peer::State::kUp || dial->refused_rounds < kRefusedRounds) return false;
  for (const auto &stream : peer->streams)
    if (!stream->down()) return false;
  end_peer(peer, EPT_E_PEER_LOST, dial->number,
           format("rank %u at %s is lost (stream %u): %s; nobody listens at its addresses any more (%s)", peer->rank,
                  peer->where.c_str(), dial->stream, dial->reason.c_str(), peer->last_try.c_str()),
           true);
  return true;
}

// The Challenge for a stream in doubt has come. False: its connection moves after all, and stays.
bool ept_instance::still_in_doubt(Dial *dial) {
  Stream *stream = dial->peer->streams[dial->stream].get();
  if (stream->down()) return true;
  Pulse pulse = stream->pulse(now());
  if (pulse.silent_ns > 0 || pulse.stalled_ns > 0) return true;
  dial->fd.reset();
  dial->step = Dial::Step::kIdle;
  dial->deadline_ns = 0;
  return false;
}

// Every eighth of dead_ns while operations are in flight.
void ept_instance::check_liveness(uint64_t time) {
  const uint64_t doubt = params.dead_ns / 4;
  for (auto &entry : peers) {
    Peer *peer = entry.second.get();
    if (peer->state != Peer::State::kUp) continue;
    for (uint32_t i = 0; i < peer->streams.size(); ++i) {
      Stream *stream = peer->streams[i].get();
      if (stream->down()) continue;
      Dial *dial = peer->dials[i].get();
      const bool doubted = dial->step != Dial::Step::kIdle && dial->why == Dial::Why::kStalled;
      Pulse pulse = stream->pulse(time);
      if (pulse.silent_ns < doubt && pulse.stalled_ns < doubt) {
        if (!doubted) continue;
        dial->fd.reset();
        dial->step = Dial::Step::kIdle;
        dial->deadline_ns = 0;
        continue;
      }
      dial->reason = pulse.text;
      dial->number = ETIMEDOUT;
      // The silence is noticed late, by a retransmission and an eighth of dead_ns.
      if (pulse.silent_ns >= doubt && dial->deadline_ns == 0)
        dial->deadline_ns = time + params.dead_ns / 8 * 7 - std::min(pulse.silent_ns, params.dead_ns / 8 * 7);
      if (pulse.silent_ns < doubt) dial->deadline_ns = 0;
      if (doubted) continue;
      dial->path = (dial->path + 1) % std::max<size_t>(1, peer->paths.list.size());  // another way if there is one
      dial_again(dial, Dial::Why::kStalled, time);
    }
  }
}

void ept_instance::check_deadlines(uint64_t time) {
  for (auto &entry : peers) {
    Peer *peer = entry.second.get();
    if (peer->state != Peer::State::kUp) continue;
    for (auto &dial : peer->dials) {
      if (dial->deadline_ns == 0 || dial->deadline_ns > time) continue;
      Stream *stream = peer->streams[dial->stream].get();
      if (!stream->down() && stream->pulse(time).silent_ns == 0) {  // it spoke again just now
        dial->deadline_ns = 0;
        continue;
      }
      end_peer(peer, EPT_E_PEER_LOST, dial->number,
               format("rank %u at %s is lost (stream %u): %s; it could not be connected again within %.3g s (%s)",
                      peer->rank, peer->where.c_str(), dial->stream, dial->reason.c_str(),
                      static_cast<double>(params.dead_ns) * 1e-9, peer->last_try.c_str()),
               true);
      break;
    }
  }
}
