// SPDX-License-Identifier: Apache-2.0
#include "tcp_ranks.h"

#include "../../native/engine/sha256.h"

namespace tcp_ranks {

const ept_backend &backend() {
  plugin::hmac = [](void *, const void *key, size_t key_length, const void *data, size_t length, uint8_t *mac) {
    ept::hmac_sha256(key, key_length, data, length, mac);
  };
  static const ept_backend &table = plugin::built("tcp");
  return table;
}

Node::Node(const plugin::Identity &identity, const plugin::Options &options) : rank(backend(), identity, options) {}

void Node::poll(size_t capacity) {
  for (plugin::Event &event : rank.poll(capacity)) events.push_back(std::move(event));
}

size_t Node::count(int32_t kind) const {
  size_t found = 0;
  for (const plugin::Event &event : events) found += event.kind == kind;
  return found;
}

const plugin::Event *Node::find(int32_t kind) const {
  for (const plugin::Event &event : events)
    if (event.kind == kind) return &event;
  return nullptr;
}

const plugin::Event *Node::with_cookie(uint64_t cookie) const {
  for (const plugin::Event &event : events)
    if (event.cookie == cookie && (event.kind == EPT_EVENT_LOCAL_DONE || event.kind == EPT_EVENT_ERROR)) return &event;
  return nullptr;
}

const plugin::Event *Node::peer_ended() const {
  for (const plugin::Event &event : events)
    if (event.kind == EPT_EVENT_PEER && event.code < 0) return &event;
  return nullptr;
}

bool until(const std::vector<Node *> &nodes, const std::function<bool()> &holds, uint64_t limit_ms) {
  const uint64_t end = plugin::now_ns() + limit_ms * 1'000'000;
  while (!holds()) {
    if (plugin::now_ns() > end) return false;
    for (Node *node : nodes) node->poll();
  }
  return true;
}

void poll_for(const std::vector<Node *> &nodes, uint64_t ms) {
  until(nodes, [] { return false; }, ms);
}

void open_each_other(const std::vector<Node *> &nodes) {
  for (Node *node : nodes)
    for (Node *other : nodes)
      if (node != other)
        CHECK_OK(backend(), node->rank.open_peer(other->rank.id.rank, other->rank.id.epoch, other->rank.address()));
}

bool all_up(const std::vector<Node *> &nodes) {
  for (Node *node : nodes)
    for (Node *other : nodes)
      if (node != other && backend().peer_state(node->rank.instance, other->rank.id.rank) != EPT_OK) return false;
  return true;
}

void meet(const std::vector<Node *> &nodes) {
  open_each_other(nodes);
  CHECK(until(nodes, [&] { return all_up(nodes); }));
  for (Node *node : nodes) node->poll();
  for (Node *node : nodes) {
    CHECK_EQ(node->count(EPT_EVENT_PEER), nodes.size() - 1);
    node->events.clear();
  }
}

Pair::Pair(const plugin::Options &options, plugin::Identity identity) {
  identity.world = 2;
  identity.rank = 0;
  a = std::make_unique<Node>(identity, options);
  identity.rank = 1;
  b = std::make_unique<Node>(identity, options);
  nodes = {a.get(), b.get()};
  meet(nodes);
}

}  // namespace tcp_ranks
