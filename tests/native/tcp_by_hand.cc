// SPDX-License-Identifier: Apache-2.0
#include "tcp_by_hand.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>

#include <cerrno>

#include "../../plugins/tcp/memory.h"

namespace tcp_by_hand {
namespace {

sockaddr_in loopback(uint16_t port) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.sin_port = htons(port);
  return address;
}

// Gives the other side's thread or process a chance where there is one.
void rest(int fd) {
  pollfd wanted{fd, POLLIN, 0};
  poll(&wanted, 1, 1);
}

}  // namespace

tcp::Address address_of(plugin::Rank &rank) {
  const std::string blob = rank.address();
  tcp::Address address;
  CHECK_EQ(tcp::decode(blob.data(), blob.size(), &address), EPT_OK);
  return address;
}

std::string played(uint32_t rank, uint32_t epoch, uint16_t streams, uint16_t port) {
  tcp::Address address;
  address.rank = rank;
  address.epoch = epoch;
  address.streams = streams;
  address.endpoints.resize(1);
  address.endpoints[0].family = 4;
  address.endpoints[0].prefix = 8;
  address.endpoints[0].port = port;
  address.endpoints[0].bytes = {127, 0, 0, 1};
  const std::vector<uint8_t> blob = tcp::encode(address);
  return {reinterpret_cast<const char *>(blob.data()), blob.size()};
}

Socket::Socket(int connected) : fd_(connected) {
  int on = 1;
  setsockopt(fd_, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  fcntl(fd_, F_SETFL, O_NONBLOCK);
}

Socket &Socket::operator=(Socket &&other) noexcept {
  if (this != &other) {
    end();
    fd_ = std::exchange(other.fd_, -1);
  }
  return *this;
}

Socket Socket::dial(uint16_t port) {
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  CHECK(fd >= 0);
  const sockaddr_in to = loopback(port);
  CHECK_EQ(connect(fd, reinterpret_cast<const sockaddr *>(&to), sizeof to), 0);
  return Socket(fd);
}

void Socket::end() {
  if (fd_ >= 0) close(fd_);
  fd_ = -1;
}

void Socket::reset() {
  const linger at_once{1, 0};
  setsockopt(fd_, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
  end();
}

size_t Socket::say(const void *bytes, size_t length) {
  const ssize_t said = send(fd_, bytes, length, MSG_NOSIGNAL);
  return said < 0 ? 0 : static_cast<size_t>(said);
}

bool Socket::hear(void *bytes, size_t length, const Turn &turn, size_t turns) {
  size_t have = 0;
  for (size_t i = 0; i < turns && have < length; ++i) {
    turn();
    const ssize_t got = recv(fd_, static_cast<char *>(bytes) + have, length - have, 0);
    if (got > 0) {
      have += static_cast<size_t>(got);
    } else if (got == 0 || (errno != EAGAIN && errno != EINTR)) {
      return false;
    } else if (i > 100) {
      rest(fd_);
    }
  }
  return have == length;
}

bool Socket::drain() {
  char bytes[16384];
  for (;;) {
    const ssize_t got = recv(fd_, bytes, sizeof bytes, 0);
    if (got > 0) continue;
    return got < 0 && (errno == EAGAIN || errno == EINTR);
  }
}

bool Socket::ends(const Turn &turn, size_t turns) {
  for (size_t i = 0; i < turns; ++i) {
    turn();
    if (!drain()) return true;
    if (i > 100) rest(fd_);
  }
  return false;
}

Listener::Listener() {
  fd_ = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  CHECK(fd_ >= 0);
  sockaddr_in here = loopback(0);
  socklen_t length = sizeof here;
  CHECK_EQ(bind(fd_, reinterpret_cast<sockaddr *>(&here), sizeof here), 0);
  CHECK_EQ(listen(fd_, 64), 0);
  CHECK_EQ(getsockname(fd_, reinterpret_cast<sockaddr *>(&here), &length), 0);
  port_ = ntohs(here.sin_port);
}

Listener::~Listener() { close(fd_); }

Socket Listener::accept(const Turn &turn, size_t turns) {
  for (size_t i = 0; i < turns; ++i) {
    turn();
    const int fd = accept4(fd_, nullptr, nullptr, SOCK_CLOEXEC);
    if (fd >= 0) return Socket(fd);
    if (i > 100) rest(fd_);
  }
  return Socket();
}

Membership::Membership(std::string its_secret, std::string its_job)
    : secret(std::move(its_secret)), job(std::move(its_job)) {
  ept_open_params params{};
  params.job = job.c_str();
  params.secret = reinterpret_cast<const uint8_t *>(secret.data());
  params.secret_length = secret.size();
  credentials = tcp::make_credentials(&host, params);
}

tcp::Hello hello_of(uint32_t rank, const plugin::Identity &to) {
  tcp::Hello hello{};
  hello.version_low = tcp::kVersionLow;
  hello.version_high = tcp::kVersionHigh;
  hello.world = to.world;
  hello.rank = rank;
  hello.peer_rank = to.rank;
  hello.peer_epoch = to.epoch;
  hello.streams = 1;
  hello.generation = 1;
  hello.limits = tcp::Limits{1, 1 << 20, 16384, 64, 1024, 64};
  return hello;
}

bool Caller::prove(Socket &socket, const Turn &turn, tcp::Proof *proof, size_t turns) {
  tcp::Challenge challenge;
  return socket.say_message(dialer.hello()) && socket.hear_message(&challenge, turn, turns) &&
         dialer.challenge(challenge, resume, proof);
}

bool Caller::enter(Socket &socket, const Turn &turn, tcp::Answer *answer, size_t turns) {
  tcp::Proof proof;
  return prove(socket, turn, &proof, turns) && socket.say_message(proof) && socket.hear_message(answer, turn, turns) &&
         dialer.answer(*answer) == tcp::Trust::kProven;
}

tcp::FrameHeader frame(tcp::FrameType type, uint64_t number, uint32_t length) {
  tcp::FrameHeader header{};
  header.magic = tcp::kFrameMagic;
  header.type = type;
  header.number = number;
  header.length = length;
  return header;
}

tcp::FrameHeader write_frame(const std::string &region, uint64_t number, uint64_t offset, uint32_t length,
                             uint32_t immediate) {
  tcp::RegionBlob blob;
  CHECK_EQ(region.size(), sizeof blob);
  memcpy(&blob, region.data(), sizeof blob);
  tcp::FrameHeader header = frame(tcp::FrameType::kWrite, number, length);
  header.offset = offset;
  header.immediate = immediate;
  header.slot = blob.slot;
  memcpy(header.key, blob.key, sizeof header.key);
  return header;
}

}  // namespace tcp_by_hand
