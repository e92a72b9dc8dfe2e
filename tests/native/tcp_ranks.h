// SPDX-License-Identifier: Apache-2.0
//
// tcp_ranks.h: what the tests of the TCP plugin share. A TCP rank moves only while it is polled, acknowledgements
// included, so these poll all ranks in turn until something is so.
#pragma once

#include <functional>

#include "../../native/engine/sha256.h"
#include "plugin.h"

namespace tcp_ranks {

inline const ept_backend &backend() {
  plugin::hmac = [](void *, const void *key, size_t key_length, const void *data, size_t length, uint8_t *mac) {
    ept::hmac_sha256(key, key_length, data, length, mac);
  };
  static const ept_backend &table = plugin::built("tcp");
  return table;
}

// A rank and every event it has had.
struct Node {
  explicit Node(const plugin::Identity &identity, const plugin::Options &options = {})
      : rank(backend(), identity, options) {}
  plugin::Rank rank;
  std::vector<plugin::Event> events;

  void poll(size_t capacity = 64) {
    for (plugin::Event &event : rank.poll(capacity)) events.push_back(std::move(event));
  }
  size_t count(int32_t kind) const {
    size_t found = 0;
    for (const plugin::Event &event : events) found += event.kind == kind;
    return found;
  }
  const plugin::Event *find(int32_t kind) const {
    for (const plugin::Event &event : events)
      if (event.kind == kind) return &event;
    return nullptr;
  }
  const plugin::Event *with_cookie(uint64_t cookie) const {
    for (const plugin::Event &event : events)
      if (event.cookie == cookie && (event.kind == EPT_EVENT_LOCAL_DONE || event.kind == EPT_EVENT_ERROR))
        return &event;
    return nullptr;
  }
};

inline bool until(const std::vector<Node *> &nodes, const std::function<bool()> &holds, uint64_t limit_ms = 10'000) {
  const uint64_t end = plugin::now_ns() + limit_ms * 1'000'000;
  while (!holds()) {
    if (plugin::now_ns() > end) return false;
    for (Node *node : nodes) node->poll();
  }
  return true;
}
inline void poll_for(const std::vector<Node *> &nodes, uint64_t ms) {
  until(nodes, [] { return false; }, ms);
}

inline void open_each_other(const std::vector<Node *> &nodes) {
  for (Node *node : nodes)
    for (Node *other : nodes)
      if (node != other)
        CHECK_OK(backend(), node->rank.open_peer(other->rank.id.rank, other->rank.id.epoch, other->rank.address()));
}

inline bool all_up(const std::vector<Node *> &nodes) {
  for (Node *node : nodes)
    for (Node *other : nodes)
      if (node != other && backend().peer_state(node->rank.instance, other->rank.id.rank) != EPT_OK) return false;
  return true;
}

inline void meet(const std::vector<Node *> &nodes) {
  open_each_other(nodes);
  CHECK(until(nodes, [&] { return all_up(nodes); }));
  for (Node *node : nodes) node->poll();
  for (Node *node : nodes) {
    CHECK_EQ(node->count(EPT_EVENT_PEER), nodes.size() - 1);
    node->events.clear();
  }
}

// Two connected ranks of a job of their own.
struct Pair {
  explicit Pair(const plugin::Options &options = {}, plugin::Identity identity = {}) {
    identity.world = 2;
    identity.rank = 0;
    a = std::make_unique<Node>(identity, options);
    identity.rank = 1;
    b = std::make_unique<Node>(identity, options);
    nodes = {a.get(), b.get()};
    meet(nodes);
  }
  std::unique_ptr<Node> a, b;
  std::vector<Node *> nodes;
};

}  // namespace tcp_ranks
