// SPDX-License-Identifier: Apache-2.0
#include "tcp_ledger.h"

#include <algorithm>
#include <cstring>

namespace tcp_ledger {
namespace {

using plugin::Rank;
using tcp_ranks::backend;
using tcp_ranks::Node;

constexpr uint8_t kWiped = 0xEE;

// Byte `i` of operation `number`: differs from its neighbours and from other operations at the same place.
uint8_t byte_of(uint64_t number, uint64_t i) { return static_cast<uint8_t>(number * 37 + i * 11 + (i >> 8) * 5 + 1); }

uint64_t time_ns = 0, tick_ns = 0;

}  // namespace

void clock_by_steps(uint64_t step_ns) {
  tick_ns = step_ns;
  time_ns = plugin::now_ns();
  plugin::clock = [] { return time_ns; };
}

void tick() { time_ns += tick_ns; }

Pair::Pair(const plugin::Options &options, plugin::Identity identity, uint64_t window_bytes,
           const plugin::Options &more_of_0) {
  for (int i : {0, 1}) {
    identity.rank = static_cast<uint32_t>(i);
    plugin::Options own = options;
    if (i == 0) own.insert(more_of_0.begin(), more_of_0.end());
    node[i] = std::make_unique<Node>(identity, own);
  }
  rails_ = static_cast<uint32_t>(options.contains("streams") ? std::stoul(options.at("streams")) : 2);
  std::string blob = node[1]->rank.address();
  tcp::Address address;
  CHECK_EQ(tcp::decode(blob.data(), blob.size(), &address), EPT_OK);
  relay = std::make_unique<tcp_relay::Relay>(address.endpoints.front().port);
  CHECK_OK(backend(), node[0]->rank.open_peer(1, identity.epoch, relay->instead_of(*node[1])));
  CHECK_OK(backend(), node[1]->rank.open_peer(0, identity.epoch, node[0]->rank.address()));
  CHECK(until([&] { return peer_events[0].size() == 1 && peer_events[1].size() == 1; }));
  for (int i : {0, 1}) {
    CHECK_EQ(peer_events[i].front().code, EPT_OK);
    peer_events[i].clear();
    way[i].window = std::make_unique<plugin::Window>(node[i]->rank, node[1 - i]->rank, window_bytes);
    std::fill(way[i].window->bytes.begin(), way[i].window->bytes.end(), kWiped);
    std::string forged = way[i].window->blob;
    forged.back() = static_cast<char>(forged.back() ^ 1);
    way[i].forged = node[i]->rank.import(static_cast<uint32_t>(1 - i), forged);
  }
}

bool Pair::post(int from, Kind kind, uint64_t length, uint32_t rail) {
  Way &mine = way[from];
  const uint32_t to = static_cast<uint32_t>(1 - from), number = static_cast<uint32_t>(mine.entries.size());
  plugin::Window &window = *mine.window;
  if (mine.next_offset + length > window.source.size()) return false;
  Entry entry{kind, mine.next_offset, length};
  ept_op op;
  std::string message;
  if (kind == Kind::kSend) {
    message.assign(reinterpret_cast<const char *>(&number), sizeof number);
    for (uint64_t i = 0; i < length; ++i) message.push_back(static_cast<char>(byte_of(number, i)));
    op = Rank::message(to, message, number);
  } else if (kind == Kind::kSignal) {
    op = Rank::signal(to, window.region, number, number);
  } else {
    for (uint64_t i = 0; i < length; ++i) window.source[entry.offset + i] = byte_of(number, i);
    op = Rank::write(to, window.source_mem, window.source.data() + entry.offset,
                     kind == Kind::kRefused ? mine.forged : window.region, entry.offset, length, number, number);
    mine.next_offset += length;
  }
  op.rail = rail;
  const int32_t code = node[from]->rank.post(op);
  if (code == EPT_LATER) {
    if (kind != Kind::kSend && kind != Kind::kSignal) mine.next_offset -= length;
    return false;
  }
  CHECK_EQ(code, EPT_OK);
  mine.entries.push_back(entry);
  return true;
}

void Pair::step() {
  tick();
  relay->move();
  for (int rank : {0, 1}) take(rank);
}

void Pair::step_without(int rank) {
  tick();
  relay->move();
  take(1 - rank);
}

// One poll of `rank`, every event of it against the ledger.
void Pair::take(int rank) {
  Way &mine = way[rank], &theirs = way[1 - rank];
  node[rank]->poll();
  for (plugin::Event &event : node[rank]->events) {
    if (event.kind == EPT_EVENT_PEER) {
      peer_events[rank].push_back(event);
    } else if (event.kind == EPT_EVENT_IMM || event.kind == EPT_EVENT_RECV) {
      uint32_t number = event.immediate;
      if (event.kind == EPT_EVENT_RECV) {
        CHECK(event.bytes.size() >= sizeof number);
        memcpy(&number, event.bytes.data(), sizeof number);
      }
      CHECK(number < theirs.entries.size());
      Entry &entry = theirs.entries[number];
      CHECK_EQ(entry.arrived, 0);
      ++entry.arrived;
      ++theirs.arrived;
      CHECK_EQ(event.kind == EPT_EVENT_RECV, entry.kind == Kind::kSend);
      CHECK(entry.kind != Kind::kRefused);
      const uint8_t *bytes = event.kind == EPT_EVENT_RECV
                                 ? reinterpret_cast<const uint8_t *>(event.bytes.data()) + sizeof number
                                 : theirs.window->bytes.data() + entry.offset;
      CHECK_EQ(event.length, entry.length + (event.kind == EPT_EVENT_RECV ? sizeof number : 0));
      bool whole = true;
      for (uint64_t i = 0; i < entry.length; ++i) whole = whole && bytes[i] == byte_of(number, i);
      CHECK(whole);
      if (event.kind == EPT_EVENT_IMM)
        std::fill_n(theirs.window->bytes.begin() + static_cast<long>(entry.offset), entry.length, kWiped);
    } else {
      CHECK(event.kind == EPT_EVENT_LOCAL_DONE || event.kind == EPT_EVENT_ERROR);
      CHECK(event.cookie < mine.entries.size());
      Entry &entry = mine.entries[event.cookie];
      CHECK_EQ(entry.ended, 0);
      ++entry.ended;
      ++mine.ended;
      if (event.kind == EPT_EVENT_ERROR && event.code != EPT_E_ACCESS) check::failed(__FILE__, __LINE__, event.words);
      CHECK_EQ(event.kind == EPT_EVENT_ERROR, entry.kind == Kind::kRefused);
      CHECK(entry.kind == Kind::kRefused || entry.arrived == 1);  // LOCAL_DONE comes with the acknowledgement
      if (entry.kind != Kind::kSend)
        std::fill_n(mine.window->source.begin() + static_cast<long>(entry.offset), entry.length, kWiped);
    }
  }
  node[rank]->events.clear();
}

bool Pair::until(const std::function<bool()> &holds, uint64_t limit_ms) {
  const uint64_t end = plugin::now_ns() + limit_ms * 1'000'000;
  while (!holds()) {
    if (plugin::now_ns() > end) return false;
    step();
  }
  return true;
}

void Pair::poll_for(uint64_t ms) {
  until([] { return false; }, ms);
}

bool Pair::settled() const {
  return std::all_of(way.begin(), way.end(), [](const Way &one) {
    const auto refused = static_cast<uint64_t>(std::count_if(
        one.entries.begin(), one.entries.end(), [](const Entry &entry) { return entry.kind == Kind::kRefused; }));
    return one.ended == one.entries.size() && one.arrived == one.entries.size() - refused;
  });
}

void Pair::check() {
  CHECK(until([&] { return settled(); }));
  for (int i = 0; i < 200; ++i) step();
  CHECK(settled());
  for (int i : {0, 1}) {
    for (const Entry &entry : way[i].entries) {
      CHECK_EQ(entry.ended, 1);
      CHECK_EQ(entry.arrived, entry.kind == Kind::kRefused ? 0 : 1);
    }
    const std::vector<uint8_t> &bytes = way[i].window->bytes;
    CHECK(std::all_of(bytes.begin(), bytes.end(), [](uint8_t byte) { return byte == kWiped; }));
    CHECK_EQ(backend().peer_state(node[i]->rank.instance, static_cast<uint32_t>(1 - i)), EPT_OK);
    uint64_t operations = 0, sends = 0;
    for (const Entry &entry : way[i].entries) ++(entry.kind == Kind::kSend ? sends : operations);
    const ept_rail_counters tx = counted(i), rx = counted(1 - i);
    CHECK_EQ(tx.tx_operations, operations);  // a replay is no operation more
    CHECK_EQ(tx.tx_sends, sends);
    CHECK_EQ(rx.rx_operations + rx.rx_sends, way[i].arrived);
  }
}

ept_rail_counters Pair::counted(int rank) const {
  ept_rail_counters sum{};
  for (uint32_t rail = 0; rail < rails_; ++rail) {
    const ept_rail_counters one = node[rank]->rank.count(rail);
    sum.tx_operations += one.tx_operations;
    sum.tx_sends += one.tx_sends;
    sum.rx_operations += one.rx_operations;
    sum.rx_sends += one.rx_sends;
    sum.errors += one.errors;
    sum.reconnects += one.reconnects;
    sum.replayed += one.replayed;
  }
  return sum;
}

}  // namespace tcp_ledger
