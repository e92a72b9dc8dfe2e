// SPDX-License-Identifier: Apache-2.0
//
// tcp_ranks.h: what the tests of the TCP plugin share. A TCP rank moves only while it is polled, acknowledgements
// included, so these poll all ranks in turn until something is so.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "plugin.h"

namespace tcp_ranks {

// The plugin; the first call gives it an HMAC.
const ept_backend &backend();

// A rank and every event it has had.
struct Node {
  explicit Node(const plugin::Identity &identity, const plugin::Options &options = {});
  plugin::Rank rank;
  std::vector<plugin::Event> events;

  void poll(size_t capacity = 64);
  size_t count(int32_t kind) const;
  const plugin::Event *find(int32_t kind) const;
  const plugin::Event *with_cookie(uint64_t cookie) const;
  const plugin::Event *peer_ended() const;  // the PEER event that says so, not one of doubt or recovery
};

bool until(const std::vector<Node *> &nodes, const std::function<bool()> &holds, uint64_t limit_ms = 10'000);
void poll_for(const std::vector<Node *> &nodes, uint64_t ms);

void open_each_other(const std::vector<Node *> &nodes);
bool all_up(const std::vector<Node *> &nodes);
void meet(const std::vector<Node *> &nodes);

// Two connected ranks of a job of their own.
struct Pair {
  explicit Pair(const plugin::Options &options = {}, plugin::Identity identity = {});
  std::unique_ptr<Node> a, b;
  std::vector<Node *> nodes;
};

}  // namespace tcp_ranks
