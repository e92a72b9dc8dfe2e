// SPDX-License-Identifier: Apache-2.0
//
// tcp_relay.h: a machine in the middle of two ranks, which can do to their connections what networks do: reset one side
// or both, end after so many bytes, pass nothing on, pass it on late. It moves when it is told to, so a test decides
// what is on the way.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "../../plugins/tcp/handshake.h"
#include "tcp_ranks.h"

namespace tcp_relay {

constexpr int kNear = 0, kFar = 1;  // who dialled, whom it wants; as a direction: what comes from that side

// A connection through the relay.
struct Link {
  int fd[2] = {-1, -1};
  std::string held[2];                           // came from that side, not passed on yet
  uint64_t passed[2] = {};                       // bytes passed on
  uint64_t limit[2] = {UINT64_MAX, UINT64_MAX};  // bytes that are passed on, and no more
  bool stalled[2] = {};                          // what comes from that side is kept
  bool ended[2] = {};                            // that side says no more
  std::string first;                             // what the near side said first: its Hello
  ~Link();

  tcp::Hello hello() const;  // zeros: not heard yet
  bool open() const { return fd[kNear] >= 0 && fd[kFar] >= 0; }
  bool at_limit(int side) const { return passed[side] >= limit[side]; }
  void stall(bool stop = true) { stalled[kNear] = stalled[kFar] = stop; }
  void reset(int side);  // that side sees a reset
  void reset() { reset(kNear), reset(kFar); }
  void finish(int side);  // that side sees the connection end behind what was passed on
};

class Relay {
 public:
  explicit Relay(uint16_t to);
  ~Relay();
  Relay(const Relay &) = delete;

  // The address of `node` with the relay's port for its own.
  std::string instead_of(tcp_ranks::Node &node) const;
  void move();
  // The youngest connection of a stream, or nullptr.
  Link *of(uint32_t stream);
  void close_door();  // connections are refused
  void open_door();

  bool deaf = false;                         // new connections are taken and nothing is passed on
  std::vector<std::unique_ptr<Link>> links;  // all there have been, oldest first

 private:
  void pass(Link &link, int side);
  uint16_t port_ = 0, to_;
  int listener_ = -1;
};

}  // namespace tcp_relay
