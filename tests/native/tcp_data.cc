// SPDX-License-Identifier: Apache-2.0
//
// The TCP plugin moves bytes: random writes against a model of bytes and immediates, refusals of every kind, a key that
// is revoked while its payload is half received, full queues, messages, counters, quiesce, a rank that writes to
// itself.
#include <iostream>
#include <random>

#include "tcp_ranks.h"

namespace {

using plugin::Rank;
using plugin::Window;
using tcp_ranks::meet;
using tcp_ranks::Node;
using tcp_ranks::Pair;
using tcp_ranks::poll_for;
using tcp_ranks::until;

bool done(const Node &node, uint64_t cookie) { return node.with_cookie(cookie) != nullptr; }

// Lengths around every boundary of the plugin: the short frame, the direct receive, the read buffer, the batch.
uint64_t draw_length(std::mt19937_64 &random) {
  static const uint64_t edges[] = {0,    1,     8,          63,         64,    65,    1023,  1024,  1025,  4095,   4096,
                                   4097, 16384, 32768 - 64, 32768 - 63, 32768, 32769, 65535, 65536, 65537, 1 << 20};
  uint64_t length = edges[random() % std::size(edges)];
  if (length == 1 << 20 && random() % 8 != 0) length = random() % 4096;
  switch (random() % 4) {
    case 0:
      return length;
    case 1:
      return length + random() % 3;
    case 2:
      return length > 3 ? length - random() % 3 : length;
    default:
      return random() % 2048;
  }
}

// 10,000 writes both ways over `streams` rails, each source with bytes of its own, each place written once at a time.
void random_writes(const std::string &streams, const plugin::Options &extra, int writes, uint64_t seed) {
  plugin::Options options = extra;
  options["streams"] = streams;
  Pair pair(options);
  const uint64_t size = 8 << 20;
  Window forth(pair.a->rank, pair.b->rank, size), back(pair.b->rank, pair.a->rank, size);
  struct Way {
    Node *from, *to;
    Window *window;
    std::vector<uint8_t> expected;
    std::map<uint32_t, uint64_t> lengths;  // by immediate
    std::map<uint32_t, int> rails;
    uint64_t posted = 0, bytes = 0;
  };
  Way ways[2] = {{pair.a.get(), pair.b.get(), &forth, {}, {}, {}}, {pair.b.get(), pair.a.get(), &back, {}, {}, {}}};
  std::mt19937_64 random(seed);
  for (Way &way : ways) {
    way.expected.assign(size, 0);
    for (uint8_t &byte : way.window->source) byte = static_cast<uint8_t>(random());
  }
  const uint32_t rail_count = static_cast<uint32_t>(std::stoul(streams));
  uint64_t next_offset[2] = {0, 0}, later = 0;
  for (int i = 0; i < writes; ++i) {
    const int which = static_cast<int>(random() % 2);
    Way &way = ways[which];
    const uint64_t length = draw_length(random);
    if (next_offset[which] + length > size) {  // all that was written must be there before it is written again
      CHECK(until(pair.nodes, [&] {
        return way.to->count(EPT_EVENT_IMM) == way.posted && way.from->count(EPT_EVENT_LOCAL_DONE) == way.posted;
      }));
      CHECK(way.window->bytes == way.expected);
      next_offset[which] = 0;
    }
    const uint64_t from = random() % (size - length + 1), to = next_offset[which];
    next_offset[which] += length + random() % 3;
    if (next_offset[which] > size) next_offset[which] = size;
    const uint32_t immediate = static_cast<uint32_t>(way.posted);
    ept_op op = Rank::write(way.to->rank.id.rank, way.window->source_mem, way.window->source.data() + from,
                            way.window->region, to, length, immediate, 1000 + way.posted);
    if (length == 0 && random() % 2) op.kind = EPT_OP_SIGNAL;
    op.rail = static_cast<uint32_t>(random()) % rail_count;
    int32_t code;
    while ((code = way.from->rank.post(op)) == EPT_LATER) {
      ++later;
      for (Node *node : pair.nodes) node->poll(1 + random() % 64);
    }
    CHECK_EQ(code, EPT_OK);
    std::copy_n(way.window->source.begin() + static_cast<long>(from), length,
                way.expected.begin() + static_cast<long>(to));
    way.lengths[immediate] = length;
    ++way.rails[op.rail % rail_count];
    ++way.posted;
    way.bytes += length;
    if (random() % 4 == 0) pair.nodes[random() % 2]->poll(random() % 2 ? 1 : 64);
  }
  for (Way &way : ways) {
    CHECK(until(pair.nodes, [&] {
      return way.to->count(EPT_EVENT_IMM) == way.posted && way.from->count(EPT_EVENT_LOCAL_DONE) == way.posted;
    }));
    CHECK(way.window->bytes == way.expected);
  }
  poll_for(pair.nodes, 20);
  for (Way &way : ways) {
    std::map<uint32_t, int> imms;
    std::map<uint64_t, int> dones;
    for (const plugin::Event &event : way.to->events) {
      if (event.kind != EPT_EVENT_IMM) continue;
      ++imms[event.immediate];
      CHECK_EQ(event.length, way.lengths[event.immediate]);
      CHECK_EQ(event.peer, way.from->rank.id.rank);
    }
    for (const plugin::Event &event : way.from->events)
      if (event.kind == EPT_EVENT_LOCAL_DONE) ++dones[event.cookie];
    CHECK_EQ(imms.size(), way.posted);
    CHECK_EQ(dones.size(), way.posted);
    for (const auto &[immediate, times] : imms) CHECK_EQ(times, 1);
    for (const auto &[cookie, times] : dones) CHECK_EQ(times, 1);
    uint64_t tx = 0, rx = 0, tx_bytes = 0, rx_bytes = 0;
    for (uint32_t rail = 0; rail < rail_count; ++rail) {
      CHECK_EQ(way.from->rank.count(rail).tx_operations, way.rails[rail]);
      CHECK_EQ(way.to->rank.count(rail).rx_operations, way.rails[rail]);
      tx += way.from->rank.count(rail).tx_operations;
      rx += way.to->rank.count(rail).rx_operations;
      tx_bytes += way.from->rank.count(rail).tx_bytes;
      rx_bytes += way.to->rank.count(rail).rx_bytes;
    }
    CHECK_EQ(tx, way.posted);
    CHECK_EQ(rx, way.posted);
    CHECK_EQ(tx_bytes, way.bytes);
    CHECK_EQ(rx_bytes, way.bytes);
    CHECK_EQ(way.from->count(EPT_EVENT_ERROR), 0);
  }
  std::cout << "    " << ways[0].bytes + ways[1].bytes << " bytes, " << later << " LATERs" << std::endl;
}

// Several ranks, every pair writes to every other, so that more streams are active than are spun on.
void mesh() {
  constexpr uint32_t kRanks = 6;
  constexpr uint64_t kEach = 200;
  std::vector<std::unique_ptr<Node>> owners;
  std::vector<Node *> nodes;
  for (uint32_t rank = 0; rank < kRanks; ++rank) {
    owners.push_back(std::make_unique<Node>(plugin::Identity{rank, kRanks}));
    nodes.push_back(owners.back().get());
  }
  meet(nodes);
  std::vector<std::unique_ptr<Window>> windows(kRanks * kRanks);
  for (uint32_t from = 0; from < kRanks; ++from)
    for (uint32_t to = 0; to < kRanks; ++to)
      if (from != to)
        windows[from * kRanks + to] = std::make_unique<Window>(nodes[from]->rank, nodes[to]->rank, 64 * kEach);
  for (uint64_t i = 0; i < kEach; ++i) {
    for (uint32_t from = 0; from < kRanks; ++from) {
      for (uint32_t to = 0; to < kRanks; ++to) {
        if (from == to) continue;
        Window &window = *windows[from * kRanks + to];
        std::fill_n(window.source.begin() + static_cast<long>(64 * i), 64,
                    static_cast<uint8_t>(1 + from * 31 + to * 7 + i));
        ept_op op = Rank::write(to, window.source_mem, window.source.data() + 64 * i, window.region, 64 * i, 64,
                                static_cast<uint32_t>(i), i);
        op.rail = static_cast<uint32_t>(i % 2);
        while (nodes[from]->rank.post(op) == EPT_LATER) nodes[to]->poll();
      }
    }
    nodes[i % kRanks]->poll();
  }
  CHECK(until(nodes, [&] {
    for (Node *node : nodes)
      if (node->count(EPT_EVENT_IMM) != kEach * (kRanks - 1) ||
          node->count(EPT_EVENT_LOCAL_DONE) != kEach * (kRanks - 1))
        return false;
    return true;
  }));
  for (auto &window : windows)
    if (window) CHECK(window->bytes == window->source);
}

void refused(Pair &pair, const ept_op &op, const std::vector<uint8_t> &bytes) {
  const std::vector<uint8_t> before = bytes;
  pair.a->events.clear();
  pair.b->events.clear();
  CHECK_EQ(pair.a->rank.post(op), EPT_OK);
  CHECK(until(pair.nodes, [&] { return done(*pair.a, op.cookie); }));
  const plugin::Event *event = pair.a->with_cookie(op.cookie);
  CHECK_EQ(event->kind, EPT_EVENT_ERROR);
  CHECK_EQ(event->code, EPT_E_ACCESS);
  CHECK_EQ(event->peer, 1);
  CHECK_HAS(event->words, "rank 1");
  CHECK_EQ(pair.b->count(EPT_EVENT_IMM), 0);
  CHECK(bytes == before);
  CHECK_EQ(pair.a->rank.backend.peer_state(pair.a->rank.instance, 1), EPT_OK);
}

void refusals() {
  Pair pair;
  std::vector<uint8_t> outside(4096, 9);
  Window window(pair.a->rank, pair.b->rank, 1 << 20);
  std::fill(window.source.begin(), window.source.end(), uint8_t{5});
  uint64_t cookie = 1;
  auto write = [&](ept_region *region, uint64_t offset, uint64_t length) {
    return Rank::write(1, window.source_mem, window.source.data(), region, offset, length, 3, cookie++);
  };
  // Bounds: one past the end, far past it, so far that the sum wraps; short and long, which are refused on other paths.
  for (uint64_t length : {uint64_t{1}, uint64_t{8}, uint64_t{5000}, uint64_t{600000}}) {
    refused(pair, write(window.region, (1 << 20) - length + 1, length), window.bytes);
    refused(pair, write(window.region, uint64_t{1} << 40, length), window.bytes);
    refused(pair, write(window.region, UINT64_MAX - length / 2, length), window.bytes);
  }
  // Every bit of the key counts, and the slot is no key.
  for (size_t at = window.blob.size() - 16; at < window.blob.size(); at += 5) {
    std::string forged = window.blob;
    forged[at] = static_cast<char>(forged[at] ^ 1);
    refused(pair, write(pair.a->rank.import(1, forged), 0, 8), window.bytes);
  }
  {
    std::string forged = window.blob;
    forged[16] = static_cast<char>(forged[16] + 77);  // a slot that nobody was given
    refused(pair, write(pair.a->rank.import(1, forged), 0, 8), window.bytes);
    forged.replace(16, 4, "\xff\xff\xff\xff");
    refused(pair, write(pair.a->rank.import(1, forged), 0, 8), window.bytes);
    ept_op signal = Rank::signal(1, pair.a->rank.import(1, forged), 3, cookie++);
    refused(pair, signal, window.bytes);
  }
  // A key of another rank.
  refused(pair, write(pair.a->rank.import(1, pair.b->rank.grant(window.mem, 1, 0, 4096).first), 0, 8), window.bytes);
  // Revoked.
  auto [blob, key] = pair.b->rank.grant(window.mem, 0, 0, 4096);
  ept_region *region = pair.a->rank.import(1, blob);
  CHECK_EQ(pair.a->rank.post(write(region, 0, 8)), EPT_OK);
  CHECK(until(pair.nodes, [&] { return pair.b->count(EPT_EVENT_IMM) == 1; }));
  CHECK_OK(pair.b->rank.backend, pair.b->rank.backend.region_revoke(window.mem, 0, key));
  refused(pair, write(region, 0, 8), window.bytes);
  CHECK_EQ(pair.b->rank.backend.region_revoke(window.mem, 0, key), EPT_E_INVALID);
  // Memory that may not be written is not exported at all.
  ept_mem *readonly = pair.b->rank.enroll(outside.data(), outside.size(), EPT_ACCESS_LOCAL);
  char out[4096];
  size_t length = sizeof out;
  uint64_t none;
  CHECK_EQ(pair.b->rank.backend.region_export(readonly, 0, 0, 8, out, &length, &none), EPT_E_ACCESS);
  // Refused at home, before anything is sent.
  ept_op op = write(window.region, 0, 8);
  op.source = outside.data();
  CHECK_EQ(pair.a->rank.post(op), EPT_E_INVALID);
  op = write(window.region, 0, 8);
  op.rail = 2;
  CHECK_EQ(pair.a->rank.post(op), EPT_E_INVALID);
  // Refusals and successes mixed, more than one batch of them, in one stream: each ends as it must.
  pair.a->events.clear();
  pair.b->events.clear();
  constexpr uint64_t kMany = 400;
  for (uint64_t i = 0; i < kMany; ++i) {
    ept_op mixed = write(window.region, i % 3 == 0 ? 1 << 20 : 0, i % 5 == 0 ? 40'000 : 16);
    mixed.cookie = 10'000 + i;
    while (pair.a->rank.post(mixed) == EPT_LATER) pair.b->poll();
  }
  CHECK(
      until(pair.nodes, [&] { return pair.a->count(EPT_EVENT_LOCAL_DONE) + pair.a->count(EPT_EVENT_ERROR) == kMany; }));
  for (uint64_t i = 0; i < kMany; ++i)
    CHECK_EQ(pair.a->with_cookie(10'000 + i)->kind, i % 3 == 0 ? EPT_EVENT_ERROR : EPT_EVENT_LOCAL_DONE);
  CHECK_EQ(pair.b->count(EPT_EVENT_IMM), pair.a->count(EPT_EVENT_LOCAL_DONE));
}

// Small socket buffers leave a long payload half received; what is revoked then must not change any more.
void revoked_in_the_middle(bool by_deregistering) {
  Pair pair({{"streams", "1"}, {"sndbuf", "65536"}, {"rcvbuf", "65536"}});
  const uint64_t size = 16 << 20;
  Window window(pair.a->rank, pair.b->rank, size);
  std::fill(window.source.begin(), window.source.end(), uint8_t{7});
  CHECK_EQ(pair.a->rank.post(Rank::write(1, window.source_mem, window.source.data(), window.region, 0, size, 1, 50)),
           EPT_OK);
  CHECK(until(pair.nodes, [&] { return window.bytes[size / 8] == 7; }));
  CHECK(window.bytes[size - 1] == 0);
  const uint64_t others = 20;
  if (by_deregistering)
    CHECK_EQ(pair.b->rank.release(window.mem), EPT_OK);
  else
    CHECK_OK(pair.b->rank.backend, pair.b->rank.backend.region_revoke(window.mem, 0, window.key));
  const std::vector<uint8_t> frozen = window.bytes;
  // The stream goes on: what follows under another key arrives.
  Window next(pair.a->rank, pair.b->rank, 4096);
  next.source.assign(4096, 3);
  for (uint64_t i = 0; i < others; ++i)
    CHECK_EQ(pair.a->rank.post(Rank::write(1, next.source_mem, next.source.data(), next.region, 0, 4096, 2, 100 + i)),
             EPT_OK);
  CHECK(until(pair.nodes, [&] { return pair.a->events.size() == others + 1; }));
  CHECK_EQ(pair.a->with_cookie(50)->kind, EPT_EVENT_ERROR);
  CHECK_EQ(pair.a->with_cookie(50)->code, EPT_E_ACCESS);
  CHECK(window.bytes == frozen);
  CHECK(next.bytes == next.source);
  CHECK_EQ(pair.b->count(EPT_EVENT_IMM), others);
  for (const plugin::Event &event : pair.b->events) CHECK_EQ(event.immediate, 2);
}

void full_queue() {
  Pair pair({{"streams", "1"}, {"depth", "64"}});
  Window window(pair.a->rank, pair.b->rank, 4096);
  ept_op op = Rank::write(1, window.source_mem, window.source.data(), window.region, 0, 8, 1, 0);
  std::vector<ept_op> ops(100, op);
  for (size_t i = 0; i < ops.size(); ++i) ops[i].cookie = i;
  size_t posted = 0;
  CHECK_EQ(pair.a->rank.backend.post(pair.a->rank.worker, ops.data(), ops.size(), &posted), EPT_LATER);
  CHECK_EQ(posted, 64);
  CHECK_EQ(pair.a->rank.post(op), EPT_LATER);
  CHECK_EQ(pair.a->rank.count(0).later, 2);
  // The peer's progress makes room, and nothing was lost or doubled.
  while (posted < ops.size()) {
    for (Node *node : pair.nodes) node->poll();
    size_t more = 0;
    CHECK(pair.a->rank.backend.post(pair.a->rank.worker, ops.data() + posted, ops.size() - posted, &more) >= 0);
    posted += more;
  }
  CHECK(until(pair.nodes, [&] { return pair.a->count(EPT_EVENT_LOCAL_DONE) == 100; }));
  CHECK_EQ(pair.b->count(EPT_EVENT_IMM), 100);
  // A refused operation stops the batch: those before it are taken, those behind it not looked at.
  ops[3].flags = 1;
  CHECK_EQ(pair.a->rank.backend.post(pair.a->rank.worker, ops.data(), 10, &posted), EPT_E_INVALID);
  CHECK_EQ(posted, 3);
}

void messages() {
  Pair pair({}, plugin::Identity{0, 2, 0, "test", "secret", 1024, 8});
  ept_caps caps{};
  caps.size = sizeof caps;
  CHECK_OK(pair.a->rank.backend, pair.a->rank.backend.caps(pair.a->rank.instance, &caps));
  std::mt19937_64 random(3);
  std::vector<std::string> sent;
  for (uint64_t i = 0; i < 300; ++i) {
    std::string text(i < 3 ? caps.max_send - i : random() % 3000, 0);
    if (i % 50 == 7) text.clear();
    for (char &c : text) c = static_cast<char>(random());
    ept_op op = Rank::message(1, text, i);
    op.rail = static_cast<uint32_t>(i % 2);
    int32_t code;
    while ((code = pair.a->rank.post(op)) == EPT_LATER)
      for (Node *node : pair.nodes) node->poll(1 + random() % 8);
    CHECK_EQ(code, EPT_OK);
    sent.push_back(text);  // and `text`, the source, is gone: it was copied
  }
  CHECK(until(pair.nodes, [&] { return pair.a->count(EPT_EVENT_LOCAL_DONE) == sent.size(); }));
  std::vector<std::string> came;
  for (const plugin::Event &event : pair.b->events)
    if (event.kind == EPT_EVENT_RECV) came.push_back(event.bytes);
  std::sort(sent.begin(), sent.end());
  std::sort(came.begin(), came.end());
  CHECK(came == sent);
  CHECK_EQ(pair.a->rank.post(Rank::message(1, std::string(caps.max_send + 1, 'x'), 1)), EPT_E_INVALID);
  // Unread messages are bounded: the sender's count of them, not the receiver's memory.
  int taken = 0;
  while (pair.a->rank.post(Rank::message(1, "hello", 1)) == EPT_OK) CHECK(++taken < 100);
  CHECK(taken >= 8);
}

void quiesce() {
  Pair pair;
  const uint64_t size = 32 << 20;
  Window window(pair.a->rank, pair.b->rank, size);
  const auto &backend = pair.a->rank.backend;
  CHECK_OK(backend, backend.quiesce(pair.a->rank.worker, 1, EPT_SCOPE_LOCAL, 70));
  CHECK_EQ(pair.a->rank.expect(EPT_EVENT_QUIESCED).cookie, 70);
  for (uint32_t rail = 0; rail < 2; ++rail) {
    ept_op op = Rank::write(1, window.source_mem, window.source.data(), window.region, 0, size, 1, rail);
    op.rail = rail;
    CHECK_EQ(pair.a->rank.post(op), EPT_OK);
  }
  CHECK_OK(backend, backend.quiesce(pair.a->rank.worker, UINT32_MAX, EPT_SCOPE_REMOTE, 71));
  for (int i = 0; i < 50; ++i) pair.a->poll();
  CHECK_EQ(pair.a->count(EPT_EVENT_QUIESCED), 0);  // the peer has not moved
  CHECK(until(pair.nodes, [&] { return pair.a->count(EPT_EVENT_QUIESCED) == 1; }));
  CHECK_EQ(pair.a->find(EPT_EVENT_QUIESCED)->code, EPT_OK);
  CHECK_EQ(pair.a->events.back().kind, EPT_EVENT_QUIESCED);  // after both LOCAL_DONE
  CHECK_EQ(pair.a->count(EPT_EVENT_LOCAL_DONE), 2);
  CHECK_EQ(pair.b->count(EPT_EVENT_IMM), 2);
  // Memory that unsent operations still read from can't be taken away.
  CHECK_EQ(pair.a->rank.post(Rank::write(1, window.source_mem, window.source.data(), window.region, 0, size, 1, 9)),
           EPT_OK);
  CHECK_EQ(pair.a->rank.release(window.source_mem), EPT_E_INVALID);
  CHECK(until(pair.nodes, [&] { return done(*pair.a, 9); }));
  CHECK_EQ(pair.a->rank.release(window.source_mem), EPT_OK);
}

void own_rank() {
  Node node(plugin::Identity{0, 1});
  CHECK_OK(node.rank.backend, node.rank.open_peer(0, 0, node.rank.address()));
  CHECK_EQ(node.rank.expect(EPT_EVENT_PEER).code, EPT_OK);
  Window window(node.rank, node.rank, 4096);
  window.source.assign(4096, 6);
  CHECK_EQ(node.rank.post(Rank::write(0, window.source_mem, window.source.data(), window.region, 96, 4000, 5, 1)),
           EPT_OK);
  CHECK_EQ(node.rank.post(Rank::write(0, window.source_mem, window.source.data(), window.region, 97, 4000, 5, 2)),
           EPT_OK);
  CHECK_EQ(node.rank.post(Rank::message(0, "to myself", 3)), EPT_OK);
  CHECK(until({&node}, [&] { return done(node, 3); }));
  CHECK_EQ(node.with_cookie(1)->kind, EPT_EVENT_LOCAL_DONE);
  CHECK_EQ(node.with_cookie(2)->code, EPT_E_ACCESS);
  CHECK_EQ(node.find(EPT_EVENT_IMM)->immediate, 5);
  CHECK_EQ(node.find(EPT_EVENT_RECV)->bytes, "to myself");
  CHECK_EQ(window.bytes[95], 0);
  CHECK_EQ(window.bytes[96], 6);
  CHECK_EQ(window.bytes[4095], 6);
  size_t accepted = 0;
  while (node.rank.post(Rank::signal(0, window.region, 1, 4)) == EPT_OK) CHECK(++accepted < 100'000);
  node.poll();
  CHECK_EQ(node.rank.post(Rank::signal(0, window.region, 1, 4)), EPT_OK);
}

}  // namespace

int main() {
  RUN(random_writes("1", {}, 3'000, 1));
  RUN(random_writes("2", {}, 10'000, 2));
  RUN(random_writes("3", {{"sndbuf", "8192"}, {"rcvbuf", "8192"}, {"depth", "16"}}, 1'000, 3));
  RUN(mesh());
  RUN(refusals());
  RUN(revoked_in_the_middle(false));
  RUN(revoked_in_the_middle(true));
  RUN(full_queue());
  RUN(messages());
  RUN(quiesce());
  RUN(own_rank());
}
