// SPDX-License-Identifier: Apache-2.0
// From peer_open to streams that are up. The lower rank dials, the higher accepts; nothing here waits.
//
// What a stranger can cost: one of `half_open` small records for at most `handshake_ms`, and the record of the oldest
// such connection goes to the newest when all are taken, so a flood can slow the handshake of a member (which tries
// again) but neither grow nor stop anything. Until its proof is checked a connection has had one nonce from us, and
// nothing that it said has been kept but its Hello.
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/timerfd.h>

#include <fcntl.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "instance.h"

using namespace tcp;

namespace {

constexpr uint64_t kMillisecond = 1000000;
constexpr uint64_t kFirstPause = 2 * kMillisecond;  // before a second round of an address list
constexpr uint64_t kLongestPause = 500 * kMillisecond;
constexpr uint64_t kLinger = 2000 * kMillisecond;
constexpr uint64_t kStrangerLog = 10000 * kMillisecond;
constexpr int kAcceptsAPoll = 16;
constexpr uint32_t kStreamEvents = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET;

// Reads until `*have` is `want`. 1: there; 0: not yet; -1: ended, with the reason.
int read_message(int fd, uint8_t *bytes, size_t *have, size_t want, std::string *why) {
  while (*have < want) {
    ssize_t got = recv(fd, bytes + *have, want - *have, MSG_DONTWAIT);
    if (got > 0) {
      *have += static_cast<size_t>(got);
    } else if (got < 0 && errno == EINTR) {
      continue;
    } else if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
      return 0;
    } else {
      *why = got == 0 ? "it closed the connection during the handshake" : errno_text(errno);
      return -1;
    }
  }
  *have = 0;
  return 1;
}

// A handshake message always fits an empty socket buffer; one that doesn't is not worth waiting for.
template <typename Message>
bool say(int fd, const Message &message) {
  return send(fd, &message, sizeof message, MSG_NOSIGNAL | MSG_DONTWAIT) == static_cast<ssize_t>(sizeof message);
}

}  // namespace

int32_t ept_instance::start_listening() {
  epoll.reset(epoll_create1(EPOLL_CLOEXEC));
  timer.reset(timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC));
  spare.reset(open("/dev/null", O_RDONLY | O_CLOEXEC));
  if (!epoll || !timer || !spare)
    return fail(EPT_E_NOMEM, "open", -1, errno, "tcp: no descriptor to be had: %s (see `ulimit -n`)",
                errno_text(errno).c_str());
  int32_t code = listen_on(interfaces, settings.interface.empty(), settings.ports, &listening);
  if (code != EPT_OK) return code;
  watch(timer.get(), &timer_source, EPOLLIN | EPOLLET, false);
  for (const Fd &socket : listening.sockets) {
    // Windows are settled when a connection is made, so its listener must have the buffer size already.
    if (settings.rcvbuf > 0) setsockopt(socket.get(), SOL_SOCKET, SO_RCVBUF, &settings.rcvbuf, sizeof settings.rcvbuf);
    listeners.push_back(std::make_unique<Listener>(socket.get()));
    watch(socket.get(), listeners.back().get(), EPOLLIN, false);
  }
  return EPT_OK;
}

void ept_instance::watch(int fd, Source *source, uint32_t epoll_events, bool known) {
  epoll_event event{};
  event.events = epoll_events;
  event.data.ptr = source;
  if (epoll_ctl(epoll.get(), known ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, fd, &event) != 0)
    log(EPT_LOG_ERROR, "tcp: epoll refused a descriptor: " + errno_text(errno));
}

bool ept_instance::tune(int fd, bool same_host) {
  int on = 1;
  if (settings.nodelay) setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  if (settings.sndbuf > 0) setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &settings.sndbuf, sizeof settings.sndbuf);
  if (settings.rcvbuf > 0) setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &settings.rcvbuf, sizeof settings.rcvbuf);
  // An idle peer whose machine vanished is found by keepalive; one that owes an answer by Stream::unanswered.
  int dead = std::max(2, static_cast<int>(std::min<uint64_t>(params.dead_ns / 1000000000, 3600)));
  int idle = std::max(1, dead / 2), interval = 1, probes = std::max(1, dead - idle);
  setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
  setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof idle);
  setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval, sizeof interval);
  setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &probes, sizeof probes);
  std::string congestion = settings.congestion;
  // Between processes of one machine there is no congestion to control: bbr's pacing costs half the bandwidth there.
  if (congestion == "auto") congestion = same_host ? "reno" : "";
  if (congestion.empty()) return true;
  bool taken =
      setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, congestion.c_str(), static_cast<socklen_t>(congestion.size())) == 0;
  return taken || settings.congestion == "auto";
}

// ---- accepting ------------------------------------------------------------------------------------------------------

void ept_instance::on_listener(Listener *listener) {
  for (int i = 0; i < kAcceptsAPoll; ++i) {
    sockaddr_storage from{};
    socklen_t length = sizeof from;
    Fd fd(accept4(listener->fd, reinterpret_cast<sockaddr *>(&from), &length, SOCK_NONBLOCK | SOCK_CLOEXEC));
    if (!fd && (errno == EMFILE || errno == ENFILE)) {
      // Take the connection with the spare descriptor and let it go, else it would wake us for ever.
      log(EPT_LOG_ERROR, "tcp: no descriptor left for a connection: " + errno_text(errno) + " (see `ulimit -n`)");
      spare.reset();
      Fd refused(accept4(listener->fd, nullptr, nullptr, SOCK_CLOEXEC));
      refused.reset();
      spare.reset(open("/dev/null", O_RDONLY | O_CLOEXEC));
      continue;
    }
    if (!fd && (errno == EINTR || errno == ECONNABORTED)) continue;
    if (!fd) return;
    if (half_open >= settings.half_open) {
      auto oldest = std::find_if(accepted.begin(), accepted.end(),
                                 [](const auto &entry) { return entry->step != Accepted::Step::kParked; });
      if (oldest != accepted.end()) {
        stranger((*oldest)->where, "was dropped for a newer connection: too many are half open");
        drop(oldest->get());
      }
    }
    int on = 1;
    setsockopt(fd.get(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    int raw = fd.get();
    accepted.push_back(std::make_unique<Accepted>(std::move(fd), peer_text(from), now() + settings.handshake_ns,
                                                  credentials, own.nonce));
    ++half_open;
    watch(raw, accepted.back().get(), EPOLLIN | EPOLLRDHUP | EPOLLET, false);
  }
}

void ept_instance::on_accepted(Accepted *entry) {
  std::string why;
  for (;;) {
    if (!entry->fd) return;  // dropped, or a stream now
    size_t want = entry->step == Accepted::Step::kHello   ? sizeof(Hello)
                  : entry->step == Accepted::Step::kProof ? sizeof(Proof)
                                                          : 1;  // parked: it has nothing to say
    int got = read_message(entry->fd.get(), entry->bytes, &entry->have, want, &why);
    if (got == 0) return;
    if (got < 0 || entry->step == Accepted::Step::kParked) return drop(entry);
    if (entry->step == Accepted::Step::kHello)
      hello_arrived(entry);
    else
      proof_arrived(entry);
  }
}

void ept_instance::hello_arrived(Accepted *entry) {
  Hello hello;
  memcpy(&hello, entry->bytes, sizeof hello);
  Challenge challenge;
  if (!entry->acceptor.hello(hello, &challenge)) {
    stranger(entry->where, "does not speak this protocol, or another layout of its handshake");
    return drop(entry);
  }
  entry->step = Accepted::Step::kProof;
  if (!say(entry->fd.get(), challenge)) drop(entry);
}

void ept_instance::proof_arrived(Accepted *entry) {
  Proof proof;
  memcpy(&proof, entry->bytes, sizeof proof);
  const Hello &hello = entry->acceptor.peer();
  Trust trust = entry->acceptor.proof(proof);
  if (trust == Trust::kStranger) {
    stranger(entry->where, "does not belong to this job, or dialled an address of a process that is gone");
    return drop(entry);
  }
  bool possible = hello.rank < params.rank && hello.peer_rank == params.rank;
  if (trust == Trust::kMember) {
    std::string text =
        format("rank %u at %s holds another secret than rank %u; set EPT_SECRET to one value on all ranks", hello.rank,
               entry->where.c_str(), params.rank);
    answer(entry, EPT_E_AUTH, text);
    if (possible) {
      auto found = peers.find(hello.rank);
      if (found == peers.end())
        refused_members[hello.rank] = {hello.epoch, EPT_E_AUTH, text};
      else if (found->second->epoch == hello.epoch && found->second->state == Peer::State::kConnecting)
        end_peer(found->second.get(), EPT_E_AUTH, 0, text, true);
    }
    return drop(entry);
  }
  if (!possible) {
    answer(entry, EPT_E_MISMATCH, format("rank %u may not dial rank %u", hello.rank, params.rank));
    return drop(entry);
  }
  settle(entry);
}

// A proven dialer: it gets its stream, is parked until peer_open asks for it, or is told why not.
void ept_instance::settle(Accepted *entry) {
  const Hello &hello = entry->acceptor.peer();
  auto found = peers.find(hello.rank);
  Peer *peer = found == peers.end() ? nullptr : found->second.get();
  auto gone = [&](const std::unordered_map<uint32_t, uint32_t> &epochs) {
    auto entry_of = epochs.find(hello.rank);
    return entry_of != epochs.end() && hello.epoch <= entry_of->second;
  };
  auto refuse = [&](int32_t code, const std::string &text) {
    answer(entry, code, text);
    drop(entry);
  };
  std::string why;
  int32_t code = entry->acceptor.compatible(params.world, &why);
  if (code != EPT_OK) {
    // Both sides learn it: what the dialer said is proven.
    if (peer != nullptr && peer->epoch == hello.epoch && peer->state == Peer::State::kConnecting)
      end_peer(peer, code, 0, why, true);
    else if (peer == nullptr)
      refused_members[hello.rank] = {hello.epoch, code, why};
    return refuse(code, why);
  }
  if (hello.peer_epoch != params.epoch)
    return refuse(EPT_E_PEER_LOST, format("epoch %u of rank %u is not that of this process (%u)", hello.peer_epoch,
                                          params.rank, params.epoch));
  if (gone(fenced_epochs) || (peer != nullptr && hello.epoch < peer->epoch))
    return refuse(EPT_E_PEER_LOST,
                  format("epoch %u of rank %u is over at rank %u", hello.epoch, hello.rank, params.rank));
  if (peer == nullptr && gone(closed_epochs))
    return refuse(EPT_E_CLOSED, format("rank %u has closed rank %u", params.rank, hello.rank));
  if (peer == nullptr || hello.epoch > peer->epoch) {
    for (auto &other : accepted) {  // a dialer that tried again: its former connection is forgotten
      const Hello &said = other->acceptor.peer();
      if (other.get() == entry || other->step != Accepted::Step::kParked || said.rank != hello.rank ||
          said.stream != hello.stream)
        continue;
      drop(other.get());
      break;
    }
    if (!answer(entry, EPT_LATER, format("rank %u has not opened rank %u yet", params.rank, hello.rank)))
      return drop(entry);
    entry->step = Accepted::Step::kParked;
    --half_open;
    return;
  }
  if (peer->state == Peer::State::kEnded) return refuse(peer->code, peer->text);
  if (hello.streams != peer->agreed_streams || hello.stream >= hello.streams || hello.consumed != 0)
    return refuse(
        EPT_E_MISMATCH,
        format("rank %u wants stream %u of %u from %llu on, rank %u has %u streams and 0", hello.rank, hello.stream,
               hello.streams, static_cast<unsigned long long>(hello.consumed), params.rank, peer->agreed_streams));
  if (peer->streams[hello.stream] != nullptr)
    return refuse(EPT_E_INVALID, format("stream %u of rank %u is up already", hello.stream, hello.rank));
  if (!answer(entry, EPT_OK, "")) return drop(entry);
  peer->where = entry->where;
  int fd = entry->fd.get();
  Limits agreed = smaller(limits, hello.limits);
  uint32_t stream = hello.stream;
  // The socket leaves `entry` before its epoll entry is given to the stream.
  Fd socket(std::move(entry->fd));
  drop(entry);
  if (!tune(fd, peer->address.host == own.host))
    log(EPT_LOG_WARNING, "tcp: congestion control '" + settings.congestion + "' is not to be had here");
  stream_up(peer, stream, std::move(socket), agreed);
}

bool ept_instance::answer(Accepted *entry, int32_t code, const std::string &text) {
  Answer message{};
  message.code = code;
  message.rank = params.rank;
  message.epoch = params.epoch;
  message.version = common_version(entry->acceptor.peer());
  message.limits = limits;
  snprintf(message.text, sizeof message.text, "%s", text.c_str());
  entry->acceptor.seal(&message);
  return say(entry->fd.get(), message);
}

void ept_instance::drop(Accepted *entry) {
  if (entry->step != Accepted::Step::kParked) --half_open;
  entry->fd.reset();
  auto found = std::find_if(accepted.begin(), accepted.end(), [&](const auto &other) { return other.get() == entry; });
  dead_sources.push_back(std::move(*found));
  accepted.erase(found);
}

void ept_instance::stranger(const std::string &where, const char *what) {
  ++strangers;
  uint64_t time = now();
  if (stranger_logged_ns != 0 && time - stranger_logged_ns < kStrangerLog) return;
  stranger_logged_ns = time;
  log(EPT_LOG_WARNING, format("tcp: rank %u: a connection from %s %s (%llu such so far)", params.rank, where.c_str(),
                              what, static_cast<unsigned long long>(strangers.load())));
}

void ept_instance::adopt_parked(Peer *peer) {
  std::vector<Accepted *> waiting;
  for (auto &entry : accepted)
    if (entry->step == Accepted::Step::kParked && entry->acceptor.peer().rank == peer->rank &&
        entry->acceptor.peer().epoch <= peer->epoch)
      waiting.push_back(entry.get());
  for (Accepted *entry : waiting) {
    entry->step = Accepted::Step::kProof;
    ++half_open;
    settle(entry);
  }
}

// ---- dialling -------------------------------------------------------------------------------------------------------

void ept_instance::start_dials(Peer *peer) {
  for (uint32_t i = 0; i < peer->agreed_streams; ++i) {
    auto dial = std::make_unique<Dial>();
    dial->peer = peer;
    dial->stream = i;
    peer->dials.push_back(std::move(dial));
    ++dialing;
  }
  for (auto &dial : peer->dials) {
    if (peer->state != Peer::State::kConnecting) return;
    dial_now(dial.get());
  }
}

void ept_instance::stop_dials(Peer *peer) {
  for (auto &dial : peer->dials) {
    if (dial->step != Dial::Step::kDone) --dialing;
    dial->step = Dial::Step::kDone;
    dial->fd.reset();
    dead_sources.push_back(std::move(dial));
  }
  peer->dials.clear();
}

void ept_instance::dial_now(Dial *dial) {
  Peer *peer = dial->peer;
  const Endpoint &to = peer->order[dial->endpoint];
  sockaddr_storage storage{};
  socklen_t length = to_sockaddr(to, &storage);
  ++dial->attempts;
  dial->fd.reset(socket(storage.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!dial->fd) return dial_failed(dial, errno_text(errno));
  if (!tune(dial->fd.get(), peer->address.host == own.host))
    log(EPT_LOG_WARNING, "tcp: congestion control '" + settings.congestion + "' is not to be had here");
  if (!settings.interface.empty()) {
    // Leave by the chosen interface, not by the one that the routing table prefers.
    for (const Endpoint &from : own.endpoints) {
      if (from.family != to.family || from.loopback() != to.loopback()) continue;
      Endpoint any_port = from;
      any_port.port = 0;
      sockaddr_storage local{};
      socklen_t local_length = to_sockaddr(any_port, &local);
      if (bind(dial->fd.get(), reinterpret_cast<sockaddr *>(&local), local_length) == 0) break;
    }
  }
  dial->due_ns = now() + settings.handshake_ns;
  dial->step = Dial::Step::kConnect;
  if (connect(dial->fd.get(), reinterpret_cast<sockaddr *>(&storage), length) != 0 && errno != EINPROGRESS)
    return dial_failed(dial, errno_text(errno));
  watch(dial->fd.get(), dial, kStreamEvents, false);
}

void ept_instance::on_dial(Dial *dial) {
  if (!dial->fd) return;
  if (dial->step == Dial::Step::kConnect) {
    int error = 0;
    socklen_t length = sizeof error;
    if (getsockopt(dial->fd.get(), SOL_SOCKET, SO_ERROR, &error, &length) != 0) error = errno;
    if (error != 0) return dial_failed(dial, errno_text(error));
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
    if (!challenged) {
      answer_arrived(dial);
      continue;
    }
    Challenge challenge;
    memcpy(&challenge, dial->bytes, sizeof challenge);
    Proof proof;
    if (!dial->dialer->challenge(challenge, &proof))
      return dial_failed(dial, "whoever listens there speaks another protocol");
    dial->step = Dial::Step::kAnswer;
    if (!say(dial->fd.get(), proof)) return dial_failed(dial, "it takes no bytes");
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
  dial->dialer = std::make_unique<Dialer>(credentials, peer->address.nonce, hello);
  dial->have = 0;
  dial->step = Dial::Step::kChallenge;
  if (!say(dial->fd.get(), dial->dialer->hello())) dial_failed(dial, "it takes no bytes");
}

void ept_instance::answer_arrived(Dial *dial) {
  Peer *peer = dial->peer;
  Answer answer;
  memcpy(&answer, dial->bytes, sizeof answer);
  std::string where = to_text(peer->order[dial->endpoint]);
  Trust trust = dial->dialer->answer(answer);
  if (trust == Trust::kStranger) return dial_failed(dial, "whoever listens there is not that rank of this job");
  if (trust == Trust::kMember)
    return end_peer(peer, EPT_E_AUTH, 0,
                    format("rank %u at %s holds another secret than rank %u; set EPT_SECRET to one value on all ranks",
                           peer->rank, where.c_str(), params.rank),
                    true);
  if (answer.code == EPT_LATER) {
    peer->last_try = answer.text;
    dial->due_ns = 0;  // it is the right one and alive: wait for as long as the engine does
    return;
  }
  if (answer.code != EPT_OK || answer.epoch != peer->epoch || answer.version != kVersionHigh || answer.consumed != 0) {
    int32_t code = answer.code < 0 ? answer.code : static_cast<int32_t>(EPT_E_VERSION);
    return end_peer(peer, code, 0, format("rank %u at %s says no: %s", peer->rank, where.c_str(), answer.text), true);
  }
  peer->where = where;
  dial->step = Dial::Step::kDone;
  --dialing;
  stream_up(peer, dial->stream, std::move(dial->fd), smaller(limits, answer.limits));
}

// The next address at once, and after the last of them a pause that grows.
void ept_instance::dial_failed(Dial *dial, const std::string &why) {
  Peer *peer = dial->peer;
  peer->last_try = format("try %u, %s: %s", dial->attempts, to_text(peer->order[dial->endpoint]).c_str(), why.c_str());
  dial->fd.reset();
  dial->have = 0;
  dial->step = Dial::Step::kPause;
  dial->endpoint = (dial->endpoint + 1) % peer->order.size();
  uint64_t time = now();
  dial->due_ns = time;
  if (dial->endpoint != 0) return;
  size_t rounds = dial->attempts / peer->order.size();
  uint64_t pause = std::min(kLongestPause, kFirstPause << std::min<size_t>(rounds, 10));
  dial->due_ns = time + pause / 2 + time % (pause / 2);  // ranks that failed together don't come back together
}

// ---- time -----------------------------------------------------------------------------------------------------------

void ept_instance::on_time(uint64_t time) {
  while (!accepted.empty()) {
    auto oldest = std::find_if(accepted.begin(), accepted.end(),
                               [](const auto &entry) { return entry->step != Accepted::Step::kParked; });
    if (oldest == accepted.end() || (*oldest)->deadline_ns > time) break;
    stranger((*oldest)->where, "did not finish the handshake in time");
    drop(oldest->get());
  }
  if (dialing > 0) {
    std::vector<Dial *> due;
    for (auto &entry : peers)
      for (auto &dial : entry.second->dials)
        if (dial->step != Dial::Step::kDone && dial->due_ns != 0 && dial->due_ns <= time) due.push_back(dial.get());
    for (Dial *dial : due) {
      if (dial->step == Dial::Step::kPause)
        dial_now(dial);
      else if (dial->step != Dial::Step::kDone)
        dial_failed(dial,
                    dial->step == Dial::Step::kConnect ? "no answer to the connection" : "no answer to the handshake");
    }
  }
  for (size_t i = 0; i < lingering.size();) {
    if (lingering[i]->deadline_ns > time) {
      ++i;
      continue;
    }
    lingering[i]->fd.reset();
    dead_sources.push_back(std::move(lingering[i]));
    lingering.erase(lingering.begin() + static_cast<ptrdiff_t>(i));
  }
  if (liveness_due_ns != 0 && liveness_due_ns <= time) {
    check_liveness(time);
    liveness_due_ns = time + params.dead_ns / 8;
  }
}

// When on_time has something to do next; 0: never.
uint64_t ept_instance::next_deadline(uint64_t time) {
  uint64_t next = 0;
  auto consider = [&](uint64_t due) {
    if (due != 0 && (next == 0 || due < next)) next = due;
  };
  for (const auto &entry : accepted) {
    if (entry->step == Accepted::Step::kParked) continue;
    consider(entry->deadline_ns);
    break;
  }
  if (dialing > 0)
    for (const auto &entry : peers)
      for (const auto &dial : entry.second->dials)
        if (dial->step != Dial::Step::kDone) consider(dial->due_ns);
  for (const auto &entry : lingering) consider(entry->deadline_ns);
  bool owed = false;
  for (const auto &entry : peers)
    for (const auto &stream : entry.second->streams) owed = owed || (stream != nullptr && stream->in_flight());
  if (!owed) {
    liveness_due_ns = 0;
  } else if (liveness_due_ns == 0) {
    liveness_due_ns = time + params.dead_ns / 8;
  }
  consider(liveness_due_ns);
  return next;
}

void ept_instance::linger(Fd fd) {
  auto entry = std::make_unique<Lingering>();
  entry->fd = std::move(fd);
  entry->deadline_ns = now() + kLinger;
  watch(entry->fd.get(), entry.get(), EPOLLIN, true);
  lingering.push_back(std::move(entry));
}

void ept_instance::on_lingering(Lingering *entry) {
  if (!entry->fd) return;
  for (int i = 0;; ++i) {
    if (i == 4) return;  // level-triggered: the rest comes with the next poll
    ssize_t got = recv(entry->fd.get(), sink.get(), kSinkBytes, MSG_DONTWAIT);
    if (got > 0) continue;
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) return;
    break;
  }
  entry->fd.reset();
  auto found =
      std::find_if(lingering.begin(), lingering.end(), [&](const auto &other) { return other.get() == entry; });
  dead_sources.push_back(std::move(*found));
  lingering.erase(found);
}
