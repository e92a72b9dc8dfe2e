// SPDX-License-Identifier: Apache-2.0
// Connections that go out, from a pause to a stream that is up. The lower rank of two dials for streams; the higher one
// dials only to knock. Nothing here waits. A try goes along one path of the peer; when it fails the next path is taken
// at once, and after the last of them there is a pause that grows.
#include <sys/epoll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "instance.h"
#include "message.h"

using namespace tcp;

namespace {

constexpr uint64_t kMillisecond = 1000000;
constexpr uint64_t kShortestTry = 100 * kMillisecond;
constexpr uint32_t kStreamEvents = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET;

// How long a step of a try may take. While a stream is down its peer has dead_ns: several tries must fit, so each gets
// a share of it.
uint64_t patience(const ept_instance &instance, const Dial &dial, uint64_t share) {
  const uint64_t whole = instance.settings.handshake_ns;
  if (dial.why == Dial::Why::kFirst) return whole;
  return std::min(whole, std::max(kShortestTry, instance.params.dead_ns / share));
}

bool knocks(const ept_instance &instance, const Peer &peer) { return peer.rank < instance.params.rank; }

}  // namespace

// The peer was opened: each stream has its Dial from now on, and those of who dials begin.
void ept_instance::start_dials(Peer *peer) {
  for (uint32_t i = 0; i < peer->agreed_streams; ++i) {
    peer->dials.push_back(std::make_unique<Dial>());
    peer->dials.back()->peer = peer;
    peer->dials.back()->stream = i;
    peer->dials.back()->path = i % peer->paths.stripe;
  }
  if (knocks(*this, *peer)) return;
  for (auto &dial : peer->dials) {
    if (peer->state != Peer::State::kConnecting) return;
    dial_now(dial.get());
  }
}

void ept_instance::stop_dials(Peer *peer) {
  for (auto &dial : peer->dials) {
    dial->step = Dial::Step::kIdle;
    dial->fd.reset();
    dead_sources.push_back(std::move(dial));
  }
  peer->dials.clear();
}

void ept_instance::dial_now(Dial *dial) {
  Peer *peer = dial->peer;
  const Path &path = peer->paths.list[dial->path];
  sockaddr_storage storage{};
  socklen_t length = to_sockaddr(path.to, &storage);
  ++dial->attempts;
  ++dial->tries;
  dial->have = 0;
  dial->fd.reset(socket(storage.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!dial->fd) return dial_failed(dial, errno_text(errno));
  if (!tune(dial->fd.get(), peer->address.host == own.host))
    log(EPT_LOG_WARNING, "tcp: congestion control '" + settings.congestion + "' is not to be had here");
  if (path.from.family != 0) {
    // Leave by the chosen interface, not by the one that the routing table prefers.
    sockaddr_storage local{};
    socklen_t local_length = to_sockaddr(path.from, &local);
    if (bind(dial->fd.get(), reinterpret_cast<sockaddr *>(&local), local_length) != 0)
      return dial_failed(dial, "the address " + to_text(path.from) + " is gone here: " + errno_text(errno));
  }
  dial->due_ns = now() + patience(*this, *dial, 8);
  dial->step = Dial::Step::kConnect;
  if (connect(dial->fd.get(), reinterpret_cast<sockaddr *>(&storage), length) != 0 && errno != EINPROGRESS)
    return dial_failed(dial, errno_text(errno), errno == ECONNREFUSED);
  watch(dial->fd.get(), dial, kStreamEvents, false);
}

void ept_instance::on_dial(Dial *dial) {
  if (!dial->fd) return;
  if (dial->step == Dial::Step::kConnect) {
    int error = 0;
    socklen_t length = sizeof error;
    if (getsockopt(dial->fd.get(), SOL_SOCKET, SO_ERROR, &error, &length) != 0) error = errno;
    if (error != 0) return dial_failed(dial, errno_text(error), error == ECONNREFUSED);
    sockaddr_storage peer{};
    length = sizeof peer;
    if (getpeername(dial->fd.get(), reinterpret_cast<sockaddr *>(&peer), &length) != 0) return;  // not yet
    dial_connected(dial);
  }
  std::string why;
  while (dial->step == Dial::Step::kChallenge || dial->step == Dial::Step::kAnswer) {
    bool challenged = dial->step == Dial::Step::kChallenge;
    int got =
        read_message(dial->fd.get(), dial->bytes, &dial->have, challenged ? sizeof(Challenge) : sizeof(Answer), &why);
    if (got == 0) return;
    if (got < 0) return dial_failed(dial, why);
    if (challenged)
      challenge_arrived(dial);
    else
      answer_arrived(dial);
  }
}

void ept_instance::dial_connected(Dial *dial) {
  Peer *peer = dial->peer;
  Hello hello{};
  hello.version_low = kVersionLow;
  hello.version_high = kVersionHigh;
  hello.world = params.world;
  hello.rank = params.rank;
  hello.epoch = params.epoch;
  hello.peer_rank = peer->rank;
  hello.peer_epoch = peer->epoch;
  hello.stream = dial->stream;
  hello.streams = peer->agreed_streams;
  hello.limits = limits;
  hello.purpose = knocks(*this, *peer) ? Purpose::kKnock : Purpose::kStream;
  // A knock names the connection that was lost, so that one that comes late breaks no later one.
  hello.generation = knocks(*this, *peer) ? peer->generations[dial->stream] : dial->attempts;
  dial->refused_rounds = dial->refused_in_round = 0;  // somebody listens there
  dial->dialer = std::make_unique<Dialer>(credentials, peer->address.nonce, hello);
  dial->step = Dial::Step::kChallenge;
  dial->due_ns = now() + patience(*this, *dial, 4);
  if (!say(dial->fd.get(), dial->dialer->hello())) dial_failed(dial, "it takes no bytes");
}

// The process over there is alive and reached. Now the old connection is given up, and not sooner.
void ept_instance::challenge_arrived(Dial *dial) {
  Peer *peer = dial->peer;
  Challenge challenge;
  memcpy(&challenge, dial->bytes, sizeof challenge);
  ResumePoint here;
  Stream *stream = peer->streams[dial->stream].get();
  if (stream != nullptr) {
    if (dial->why == Dial::Why::kStalled && !still_in_doubt(dial)) return;
    if (!knocks(*this, *peer)) {
      retire(peer, dial->stream);
      here = stream->resume_point();
    }
  }
  Proof proof;
  if (!dial->dialer->challenge(challenge, here, &proof))
    return dial_failed(dial, "whoever listens there speaks another protocol");
  dial->step = Dial::Step::kAnswer;
  if (!say(dial->fd.get(), proof)) dial_failed(dial, "it takes no bytes");
}

void ept_instance::answer_arrived(Dial *dial) {
  Peer *peer = dial->peer;
  Answer answer;
  memcpy(&answer, dial->bytes, sizeof answer);
  std::string where = to_text(peer->paths.list[dial->path].to);
  Trust trust = dial->dialer->answer(answer);
  if (trust == Trust::kStranger) return dial_failed(dial, "whoever listens there is not that rank of this job");
  if (trust == Trust::kMember) {
    std::string text =
        format("rank %u at %s holds another secret than rank %u; set EPT_SECRET to one value on all ranks", peer->rank,
               where.c_str(), params.rank);
    // A peer that was up has shown the secret: whoever this is, it is not that one.
    if (peer->state != Peer::State::kConnecting) return dial_failed(dial, text);
    return end_peer(peer, EPT_E_AUTH, 0, text, true);
  }
  if (answer.code == EPT_LATER) {
    peer->last_try = answer.text;
    dial->due_ns = 0;  // it is the right one and alive: wait for as long as the engine does
    return;
  }
  const bool knock = dial->dialer->hello().purpose == Purpose::kKnock;
  Stream *stream = knock ? nullptr : peer->streams[dial->stream].get();
  int32_t code = answer.code;
  std::string text = answer.text;
  if (code == EPT_OK && (answer.epoch != peer->epoch || answer.version != kVersionHigh)) code = EPT_E_VERSION;
  if (code == EPT_OK && stream != nullptr && !stream->plausible(answer.resume, &text)) code = EPT_E_MISMATCH;
  if (code == EPT_OK && stream == nullptr && (answer.resume.consumed != 0 || answer.resume.acknowledged != 0))
    code = EPT_E_MISMATCH;
  if (code != EPT_OK)
    return end_peer(peer, code < 0 ? code : static_cast<int32_t>(EPT_E_VERSION), 0,
                    format("rank %u at %s says no: %s", peer->rank, where.c_str(), text.c_str()), true);
  if (knock) {  // it will dial; if it does not, knock again
    dial->fd.reset();
    peer->last_try = "it was asked to dial again, and answered";
    dial->step = Dial::Step::kPause;
    dial->due_ns = now() + kLongestPause;
    return;
  }
  peer->where = where;
  dial->step = Dial::Step::kIdle;
  stream_up(peer, dial->stream, std::move(dial->fd), smaller(limits, answer.limits), answer.resume);
}

// The next path at once, and after the last of them a pause that grows.
void ept_instance::dial_failed(Dial *dial, const std::string &why, bool refused) {
  Peer *peer = dial->peer;
  const size_t paths = peer->paths.list.size();
  peer->last_try = format("try %u, %s: %s", dial->tries, to_text(peer->paths.list[dial->path].to).c_str(), why.c_str());
  dial->fd.reset();
  dial->step = Dial::Step::kPause;
  uint64_t time = now();
  dial->due_ns = time;
  if (dial->why == Dial::Why::kHome) {  // the stream is well as it is
    dial->due_ns = time + params.dead_ns;
    return;
  }
  if (refused) ++dial->refused_in_round;
  dial->path = (dial->path + 1) % paths;
  if (dial->tries % paths != 0) return;
  const bool all_refused = dial->refused_in_round == paths;
  dial->refused_rounds = all_refused ? dial->refused_rounds + 1 : 0;
  dial->refused_in_round = 0;
  if (all_refused && all_paths_refuse(dial)) return;
  dial->pause_ns = std::min(kLongestPause, std::max(kFirstPause, 2 * dial->pause_ns));
  // Ranks that failed together don't come back together.
  dial->due_ns = time + dial->pause_ns / 2 + time % (dial->pause_ns / 2);
}
