// SPDX-License-Identifier: Apache-2.0
#include "tcp_relay.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace tcp_relay {
namespace {

constexpr size_t kChunk = 65536, kHeld = 4 * kChunk;

sockaddr_in at(uint16_t port) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.sin_port = htons(port);
  return address;
}

void make_quick(int fd) {
  int on = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  fcntl(fd, F_SETFL, O_NONBLOCK);
}

}  // namespace

Link::~Link() {
  for (int &end : fd)
    if (end >= 0) close(end);
}

tcp::Hello Link::hello() const {
  tcp::Hello hello{};
  if (first.size() >= sizeof hello) memcpy(&hello, first.data(), sizeof hello);
  return hello;
}

void Link::reset(int side) {
  if (fd[side] < 0) return;
  linger at_once = {1, 0};
  setsockopt(fd[side], SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
  close(fd[side]);
  fd[side] = -1;
}

void Link::finish(int side) {
  if (fd[side] >= 0) shutdown(fd[side], SHUT_WR);
  stalled[1 - side] = true;
  held[1 - side].clear();
}

Relay::Relay(uint16_t to) : to_(to) { open_door(); }
Relay::~Relay() { close_door(); }

void Relay::open_door() {
  if (listener_ >= 0) return;
  listener_ = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
  int on = 1;
  setsockopt(listener_, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  sockaddr_in address = at(port_);
  socklen_t length = sizeof address;
  CHECK_EQ(bind(listener_, reinterpret_cast<sockaddr *>(&address), length), 0);
  CHECK_EQ(listen(listener_, 64), 0);
  CHECK_EQ(getsockname(listener_, reinterpret_cast<sockaddr *>(&address), &length), 0);
  port_ = ntohs(address.sin_port);
}

void Relay::close_door() {
  if (listener_ >= 0) close(listener_);
  listener_ = -1;
}

std::string Relay::instead_of(tcp_ranks::Node &node) const {
  std::string blob = node.rank.address();
  tcp::Address address;
  CHECK_EQ(tcp::decode(blob.data(), blob.size(), &address), EPT_OK);
  address.endpoints.resize(1);
  tcp::Endpoint &only = address.endpoints[0];
  only = {};
  only.family = 4;
  only.prefix = 8;
  only.port = port_;
  only.bytes = {127, 0, 0, 1};
  std::vector<uint8_t> bytes = tcp::encode(address);
  return {reinterpret_cast<char *>(bytes.data()), bytes.size()};
}

Link *Relay::of(uint32_t stream) {
  for (size_t i = links.size(); i-- > 0;) {
    const tcp::Hello hello = links[i]->hello();
    if (hello.head.magic != 0 && hello.stream == stream) return links[i].get();
  }
  return nullptr;
}

void Relay::move() {
  for (int near; listener_ >= 0 && (near = accept(listener_, nullptr, nullptr)) >= 0;) {
    auto link = std::make_unique<Link>();
    link->fd[kNear] = near;
    make_quick(near);
    int far = socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in address = at(to_);
    if (::connect(far, reinterpret_cast<sockaddr *>(&address), sizeof address) != 0) {
      close(far);
      link->reset(kNear);
      continue;
    }
    make_quick(far);
    link->fd[kFar] = far;
    link->stall(deaf);
    links.push_back(std::move(link));
  }
  for (auto &link : links)
    for (int side : {kNear, kFar}) pass(*link, side);
}

// What `side` says, to the other one.
void Relay::pass(Link &link, int side) {
  std::string &held = link.held[side];
  const int other = 1 - side;
  if (link.fd[side] >= 0 && !link.ended[side] && held.size() < kHeld) {
    char chunk[kChunk];
    ssize_t got = recv(link.fd[side], chunk, sizeof chunk, MSG_DONTWAIT);
    if (got > 0) {
      held.append(chunk, static_cast<size_t>(got));
      if (side == kNear && link.first.size() < sizeof(tcp::Hello))
        link.first.append(chunk, std::min<size_t>(static_cast<size_t>(got), sizeof(tcp::Hello) - link.first.size()));
    } else if (got == 0) {
      link.ended[side] = true;
    } else if (errno != EAGAIN && errno != EINTR) {
      link.reset(side);
      link.ended[side] = true;
      if (!link.stalled[side]) link.reset(other);  // a machine that keeps everything keeps this too
    }
  }
  if (link.stalled[side] || link.fd[other] < 0) return;
  const uint64_t room = link.limit[side] - std::min(link.limit[side], link.passed[side]);
  const size_t bytes = static_cast<size_t>(std::min<uint64_t>(room, held.size()));
  if (bytes > 0) {
    ssize_t sent = send(link.fd[other], held.data(), bytes, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent > 0) {
      held.erase(0, static_cast<size_t>(sent));
      link.passed[side] += static_cast<uint64_t>(sent);
    } else if (sent < 0 && errno != EAGAIN) {
      held.clear();
    }
  }
  if (link.ended[side] && held.empty()) {
    shutdown(link.fd[other], SHUT_WR);
    if (link.ended[other]) {
      for (int &fd : link.fd) {
        if (fd >= 0) close(fd);
        fd = -1;
      }
    }
  }
}

}  // namespace tcp_relay
