// SPDX-License-Identifier: Apache-2.0
//
// tcp_by_hand.h: one side of a TCP connection that a test plays itself, with the plugin's own layouts: a socket that is
// read and written by hand, a dialer and an acceptor that follow the handshake but for what a test changes, and frames.
// The rank on the other side moves only while it is polled, so whatever waits here takes a `turn` that polls it.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "../../plugins/tcp/frame.h"
#include "../../plugins/tcp/handshake.h"
#include "plugin.h"

namespace tcp_by_hand {

using Turn = std::function<void()>;

tcp::Address address_of(plugin::Rank &rank);
// An address blob for a rank that a test plays: at `port` of this machine's loopback.
std::string played(uint32_t rank, uint32_t epoch = 0, uint16_t streams = 1, uint16_t port = 9);

class Socket {
 public:
  Socket() = default;
  explicit Socket(int connected);
  Socket(Socket &&other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Socket &operator=(Socket &&other) noexcept;
  ~Socket() { end(); }

  static Socket dial(uint16_t port);
  int fd() const { return fd_; }
  void end();    // with FIN
  void reset();  // with RST
  // Bytes that the kernel took: all, unless the connection has ended or its buffer is full.
  size_t say(const void *bytes, size_t length);
  size_t say(const std::string &bytes) { return say(bytes.data(), bytes.size()); }
  template <class Message>
  bool say_message(const Message &message) {
    return say(&message, sizeof message) == sizeof message;
  }
  // Whether they all came before the connection ended and before `turns` turns.
  bool hear(void *bytes, size_t length, const Turn &turn, size_t turns = kPatience);
  template <class Message>
  bool hear_message(Message *message, const Turn &turn, size_t turns = kPatience) {
    return hear(message, sizeof *message, turn, turns);
  }
  // Throws away what has come. False: the connection has ended.
  bool drain();
  bool ends(const Turn &turn, size_t turns = kPatience);

  // Turns end early where something comes; each that finds nothing takes up to a millisecond.
  static constexpr size_t kPatience = 60'000;

 private:
  int fd_ = -1;
};

// Listens on loopback.
class Listener {
 public:
  Listener();
  ~Listener();
  Listener(const Listener &) = delete;
  uint16_t port() const { return port_; }
  Socket accept(const Turn &turn, size_t turns = Socket::kPatience);

 private:
  int fd_ = -1;
  uint16_t port_ = 0;
};

// A job's secret and name, as a rank holds them.
struct Membership {
  explicit Membership(std::string secret = "secret", std::string job = "test");
  ept_host host = plugin::host();
  std::string secret, job;
  tcp::Credentials credentials;
};

// What a dialer of `rank` says to `to` where nothing is wrong.
tcp::Hello hello_of(uint32_t rank, const plugin::Identity &to);

// The dialer's side of a handshake.
struct Caller {
  Caller(const Membership &membership, const tcp::Address &to, const tcp::Hello &hello)
      : dialer(membership.credentials, to.nonce, hello) {}
  // Hello and Challenge; what would prove it. False: the connection ended.
  bool prove(Socket &socket, const Turn &turn, tcp::Proof *proof, size_t turns = Socket::kPatience);
  // All of it. False: no answer that can be believed.
  bool enter(Socket &socket, const Turn &turn, tcp::Answer *answer, size_t turns = Socket::kPatience);
  tcp::Dialer dialer;
  tcp::ResumePoint resume{};  // where it says that its stream stands
};

// Frames of a member that says nothing wrong. `number` is that of the operation.
tcp::FrameHeader frame(tcp::FrameType type, uint64_t number = 0, uint32_t length = 0);
// With the key of a region blob.
tcp::FrameHeader write_frame(const std::string &region, uint64_t number, uint64_t offset, uint32_t length,
                             uint32_t immediate);

}  // namespace tcp_by_hand
