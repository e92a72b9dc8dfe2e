// SPDX-License-Identifier: Apache-2.0
// Connections that come in. The higher rank of two accepts the streams; the lower one hears the other's knocks.
//
// What a stranger can cost: one of `half_open` small records for at most `handshake_ms`, and the record of the oldest
// such connection goes to the newest when all are taken, so a flood can slow the handshake of a member (which tries
// again) but neither grow nor stop anything. Until its proof is checked a connection has had one nonce from us, and
// nothing that it said has been kept but its Hello.
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include <fcntl.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "instance.h"
#include "message.h"

using namespace tcp;

namespace {

constexpr uint64_t kStrangerLog = 10000000000;  // a line in the log so often
constexpr int kAcceptsAPoll = 16;

}  // namespace

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
  // The lower rank dials, the higher one knocks.
  bool possible = hello.peer_rank == params.rank &&
                  (hello.purpose == Purpose::kStream
                       ? hello.rank < params.rank
                       : hello.purpose == Purpose::kKnock && hello.rank > params.rank && hello.rank < params.world);
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
    answer(entry, EPT_E_MISMATCH, format("rank %u may not dial rank %u for that", hello.rank, params.rank));
    return drop(entry);
  }
  settle(entry);
}

// A proven dialer: it gets its stream, is heard, is parked until peer_open asks for it, or is told why not.
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
  if ((peer == nullptr || hello.epoch > peer->epoch) && hello.purpose == Purpose::kKnock)
    return refuse(EPT_LATER, format("rank %u has not opened rank %u yet", params.rank, hello.rank));
  // What is parked is one connection a rank and stream, so no more streams than there may be.
  if (hello.streams > kMaxStreams || hello.stream >= hello.streams)
    return refuse(EPT_E_MISMATCH, format("rank %u wants stream %u of %u; a peer has at most %u", hello.rank,
                                         hello.stream, hello.streams, kMaxStreams));
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
  if (hello.streams != peer->agreed_streams || hello.stream >= hello.streams)
    return refuse(EPT_E_MISMATCH, format("rank %u wants stream %u of %u, rank %u has %u", hello.rank, hello.stream,
                                         hello.streams, params.rank, peer->agreed_streams));
  if (hello.purpose == Purpose::kStream) return settle_stream(entry, peer);
  answer(entry, EPT_OK, "");
  const uint32_t stream = hello.stream, generation = hello.generation;
  drop(entry);
  knocked(peer, stream, generation);
}

// A connection for a stream that had none, or had another, which is retired before it is said what was consumed on it.
void ept_instance::settle_stream(Accepted *entry, Peer *peer) {
  const Hello hello = entry->acceptor.peer();
  const ResumePoint theirs = entry->acceptor.resume();
  Stream *stream = peer->streams[hello.stream].get();
  uint32_t &generation = peer->generations[hello.stream];
  if (hello.generation <= generation) {
    answer(entry, EPT_E_INVALID,
           format("connection %u of stream %u of rank %u comes after connection %u", hello.generation, hello.stream,
                  hello.rank, generation));
    return drop(entry);
  }
  std::string why;
  if (stream == nullptr && (theirs.consumed != 0 || theirs.acknowledged != 0))
    why = format("rank %u wants stream %u from operation %llu on, but it is new here", hello.rank, hello.stream,
                 static_cast<unsigned long long>(theirs.consumed));
  if (!why.empty() || (stream != nullptr && !stream->plausible(theirs, &why))) {
    answer(entry, EPT_E_MISMATCH, why);
    drop(entry);
    if (stream != nullptr)
      end_peer(peer, EPT_E_PEER_LOST, 0,
               format("rank %u at %s broke the protocol: %s", peer->rank, peer->where.c_str(), why.c_str()), true);
    return;
  }
  generation = hello.generation;
  ResumePoint here;
  if (stream != nullptr) {
    retire(peer, hello.stream);
    here = stream->resume_point();
  }
  if (!answer(entry, EPT_OK, "", here)) return drop(entry);
  peer->where = entry->where;
  int fd = entry->fd.get();
  // The socket leaves `entry` before its epoll entry is given to the stream.
  Fd socket(std::move(entry->fd));
  drop(entry);
  if (!tune(fd, peer->address.host == own.host))
    log(EPT_LOG_WARNING, "tcp: congestion control '" + settings.congestion + "' is not to be had here");
  stream_up(peer, hello.stream, std::move(socket), smaller(limits, hello.limits), theirs);
}

bool ept_instance::answer(Accepted *entry, int32_t code, const std::string &text, const ResumePoint &resume) {
  Answer message{};
  message.code = code;
  message.rank = params.rank;
  message.epoch = params.epoch;
  message.version = common_version(entry->acceptor.peer());
  message.limits = limits;
  message.resume = resume;
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
