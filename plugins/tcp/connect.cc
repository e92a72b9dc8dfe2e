// SPDX-License-Identifier: Apache-2.0
// What accepting and dialling share: listeners, epoll, socket options, and the clock that moves what waits.
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/timerfd.h>

#include <fcntl.h>

#include <algorithm>
#include <cerrno>

#include "instance.h"

using namespace tcp;

namespace {

constexpr uint64_t kLinger = 2000000000;

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
  // An idle connection whose other end vanished is found by keepalive, in half of dead_ns (kKeepalive of peers.cc), so
  // that the other half is left to make it again; one that owes an answer by Stream::pulse.
  int dead = std::max(4, static_cast<int>(std::min<uint64_t>(params.dead_ns / 1000000000, 3600)));
  int idle = std::max(1, dead / 4), interval = 1, probes = std::max(1, dead / 2 - idle);
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

// ---- time -----------------------------------------------------------------------------------------------------------

void ept_instance::on_time(uint64_t time) {
  while (!accepted.empty()) {
    auto oldest = std::find_if(accepted.begin(), accepted.end(),
                               [](const auto &entry) { return entry->step != Accepted::Step::kParked; });
    if (oldest == accepted.end() || (*oldest)->deadline_ns > time) break;
    stranger((*oldest)->where, "did not finish the handshake in time");
    drop(oldest->get());
  }
  std::vector<Dial *> due;
  for (auto &entry : peers)
    for (auto &dial : entry.second->dials)
      if (dial->step != Dial::Step::kIdle && dial->due_ns != 0 && dial->due_ns <= time) due.push_back(dial.get());
  for (Dial *dial : due) {  // one that ended meanwhile is idle
    if (dial->step == Dial::Step::kPause)
      dial_now(dial);
    else if (dial->step != Dial::Step::kIdle)
      dial_failed(dial,
                  dial->step == Dial::Step::kConnect ? "no answer to the connection" : "no answer to the handshake");
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
  check_deadlines(time);
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
  bool owed = false;
  for (const auto &entry : peers) {
    for (const auto &dial : entry.second->dials) {
      if (dial->step != Dial::Step::kIdle) consider(dial->due_ns);
      consider(dial->deadline_ns);
      owed = owed || (dial->step != Dial::Step::kIdle && dial->why == Dial::Why::kStalled);
    }
    for (const auto &stream : entry.second->streams) owed = owed || (stream != nullptr && stream->in_flight());
  }
  for (const auto &entry : lingering) consider(entry->deadline_ns);
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
