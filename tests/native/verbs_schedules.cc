// SPDX-License-Identifier: Apache-2.0
//
// Ranks of the backend verbs over NICs that break, by random schedules (verbs_net.h): queue pairs fail before or after
// an operation was executed, datagrams are lost, late or come twice, ports and paths go down and up, keys are taken
// back, posts are refused, completions come shuffled. Whatever happens, each operation gives exactly one LOCAL_DONE or
// ERROR, and one immediate with all its bytes, or none if it gave ERROR; and memory whose immediate was read is the
// target's: nothing is written there again.
//
//     verbs_schedules [first seed [how many]]
#include <cstring>
#include <set>

#include "../../native/engine/sha256.h"
#include "verbs_net.h"

using plugin::Rank;
using verbs_net::Net;

extern "C" const ept_backend ept_backend_v1;

namespace {

constexpr uint32_t kSlot = 512;
uint64_t time_ns = 1'000'000'000;

struct Pair {
  std::vector<uint8_t> source, target, key_source, revoked;
  ept_mem *source_mem = nullptr;
  ept_region *region = nullptr, *dead_region = nullptr;
  uint32_t next = 0, unread = 0, in_flight = 0;
};

// immediate and cookie: from, and which of its operations to that rank.
uint32_t name(uint32_t from, uint32_t to, uint32_t number) { return from << 28 | to << 24 | number; }

enum class Fate { kWrite, kDead, kMessage };
struct Posted {
  Fate fate = Fate::kWrite;
  int done = 0, failed = 0, arrived = 0;
};

struct Totals {
  uint64_t operations = 0, breaks = 0, failed_datagrams = 0, replayed = 0, reconnects = 0, denied = 0;
};

uint8_t byte_of(uint32_t immediate, uint32_t at) { return static_cast<uint8_t>(immediate * 31 + at * 7 + 1); }

void run(uint64_t seed, Totals *totals) {
  std::mt19937_64 random(seed * 7919 + 1);
  auto draw = [&](uint32_t below) { return static_cast<uint32_t>(random() % below); };
  const uint32_t world = 2 + draw(2), nics = 1 + draw(2), count = 40 + draw(80);
  Net net(seed, nics);
  // One in four runs is healthy: then nothing may break.
  const bool healthy = seed % 4 == 0;
  if (!healthy) {
    net.faults.lost_request = draw(20);
    net.faults.lost_answer = draw(20);
    net.faults.lost_datagram = draw(400);
    net.faults.failed_datagram = draw(50);
    net.faults.twice = draw(200);
    net.faults.refused_post = draw(10);
  }
  net.faults.lazy = draw(900);
  net.max_inline = draw(2) == 0 ? 256 : 16;
  const plugin::Options options = {{"nics", std::to_string(nics)},
                                   {"qps", std::to_string(1 + draw(3))},
                                   {"depth", std::to_string(16 + draw(32))},
                                   {"inline", "64"},
                                   {"shuffle", draw(2) == 0 ? "0" : std::to_string(1 + draw(1000))}};
  const plugin::Identity identity{.world = world, .credits = 64, .send_credits = 16};
  std::vector<std::unique_ptr<Rank>> ranks;
  for (uint32_t rank = 0; rank < world; ++rank) {
    plugin::Identity own = identity;
    own.rank = rank;
    ranks.push_back(std::make_unique<Rank>(ept_backend_v1, own, options));
  }
  for (auto &rank : ranks)
    for (auto &other : ranks)
      if (rank != other) CHECK_OK(ept_backend_v1, rank->open_peer(other->id.rank, 0, other->address()));

  std::map<uint64_t, Posted> posted;
  std::vector<std::vector<Pair>> pairs(world);
  for (uint32_t from = 0; from < world; ++from) {
    pairs[from].resize(world);
    for (uint32_t to = 0; to < world; ++to) {
      if (from == to) continue;
      Pair &pair = pairs[from][to];
      pair.source.resize(size_t{count} * kSlot);
      pair.target.resize(size_t{count} * kSlot);
      pair.revoked.resize(kSlot);
      pair.source_mem = ranks[from]->enroll(pair.source.data(), pair.source.size(), EPT_ACCESS_LOCAL);
      ept_mem *mem = ranks[to]->enroll(pair.target.data(), pair.target.size(), EPT_ACCESS_REMOTE_WRITE);
      pair.region = ranks[from]->import(to, ranks[to]->grant(mem, from, 0, pair.target.size()).first);
      ept_mem *other = ranks[to]->enroll(pair.revoked.data(), kSlot, EPT_ACCESS_REMOTE_WRITE);
      const auto [blob, key] = ranks[to]->grant(other, from, 0, kSlot);
      pair.dead_region = ranks[from]->import(to, blob);
      CHECK_OK(ept_backend_v1, ept_backend_v1.region_revoke(other, from, key));
    }
  }

  std::vector<std::set<uint32_t>> up(world);
  uint32_t path_down = 0;
  auto take = [&](Rank &rank) {
    const uint32_t own = rank.id.rank;
    for (const plugin::Event &event : rank.poll(1 + draw(32))) {
      switch (event.kind) {
        case EPT_EVENT_PEER:
          if (event.code < 0) check::failed(__FILE__, __LINE__, "seed " + std::to_string(seed) + ": " + event.words);
          CHECK(!healthy || event.code == EPT_OK);
          up[own].insert(event.peer);
          break;
        case EPT_EVENT_LOCAL_DONE:
          CHECK_EQ(++posted.at(event.cookie).done, 1);
          --pairs[own][event.peer].in_flight;
          break;
        case EPT_EVENT_ERROR:
          CHECK_EQ(++posted.at(event.cookie).failed, 1);
          CHECK_EQ(event.code, EPT_E_ACCESS);
          CHECK(posted.at(event.cookie).fate == Fate::kDead);
          --pairs[own][event.peer].in_flight;
          --pairs[own][event.peer].unread;
          ++totals->denied;
          break;
        case EPT_EVENT_IMM: {
          CHECK_EQ(event.peer, event.immediate >> 28);
          CHECK_EQ(own, event.immediate >> 24 & 15);
          Posted &entry = posted.at(event.immediate);
          CHECK_EQ(++entry.arrived, 1);
          CHECK(entry.fate == Fate::kWrite);
          Pair &pair = pairs[event.peer][own];
          --pair.unread;
          uint8_t *slot = &pair.target[size_t{event.immediate & 0xffffff} * kSlot];
          for (uint32_t i = 0; i < event.length; ++i) CHECK_EQ(slot[i], byte_of(event.immediate, i));
          memset(slot, 0xee, kSlot);  // it is ours again
          break;
        }
        case EPT_EVENT_RECV: {
          uint32_t immediate = 0;
          CHECK(event.bytes.size() >= sizeof immediate);
          memcpy(&immediate, event.bytes.data(), sizeof immediate);
          CHECK_EQ(++posted.at(immediate).arrived, 1);
          --pairs[event.peer][own].unread;
          break;
        }
        default:
          CHECK(!"an event that nobody asked for");
      }
    }
  };

  auto write_some = [&](uint32_t from, uint32_t to) {
    Pair &pair = pairs[from][to];
    std::vector<ept_op> ops;
    std::vector<std::string> messages;
    messages.reserve(8);
    for (uint32_t i = draw(8); i > 0 && pair.next < count; --i) {
      const uint32_t immediate = name(from, to, pair.next);
      const uint32_t kind = draw(20);
      if (pair.unread + ops.size() >= (kind == 0 ? 8 : 32)) break;
      uint8_t *source = &pair.source[size_t{pair.next} * kSlot];
      const uint32_t length = draw(4) == 0 ? 0 : 1 + draw(kSlot);
      for (uint32_t at = 0; at < length; ++at) source[at] = byte_of(immediate, at);
      Posted entry;
      if (kind == 0) {
        messages.emplace_back(reinterpret_cast<const char *>(&immediate), sizeof immediate);
        messages.back().resize(sizeof immediate + draw(600), 'x');
        ops.push_back(Rank::message(to, messages.back(), immediate));
        entry.fate = Fate::kMessage;
      } else if (kind == 1 && !healthy) {
        ops.push_back(Rank::write(to, pair.source_mem, source, pair.dead_region, 0, 8, immediate, immediate));
        entry.fate = Fate::kDead;
      } else {
        ops.push_back(Rank::write(to, pair.source_mem, source, pair.region, uint64_t{pair.next} * kSlot, length,
                                  immediate, immediate));
      }
      ops.back().rail = draw(static_cast<uint32_t>(nics));
      posted[immediate] = entry;
      ++pair.next;
    }
    size_t taken = 0;
    const int32_t code =
        ops.empty() ? EPT_OK : ept_backend_v1.post(ranks[from]->worker, ops.data(), ops.size(), &taken);
    CHECK(code == EPT_OK || code == EPT_LATER || code == EPT_E_ACCESS);
    if (code == EPT_E_ACCESS) {
      // A key that was refused once is not tried again.
      Posted &entry = posted.at(ops[taken].cookie);
      CHECK(entry.fate == Fate::kDead);
      entry.failed = 1;
      ops.erase(ops.begin() + static_cast<ptrdiff_t>(taken));
    }
    pair.in_flight += static_cast<uint32_t>(taken);
    pair.unread += static_cast<uint32_t>(taken);
    for (size_t i = taken; i < ops.size(); ++i) posted.erase(ops[i].cookie);
    pair.next -= static_cast<uint32_t>(ops.size() - taken);
    totals->operations += taken;
  };

  bool ended = false;
  for (uint64_t turn = 0; !ended; ++turn) {
    time_ns += 50'000;
    if (turn > 2'000'000) check::failed(__FILE__, __LINE__, "seed " + std::to_string(seed) + " does not end");
    const uint32_t own = draw(world), other = draw(world);
    if (own != other && up[own].count(other) != 0) write_some(own, other);
    take(*ranks[own]);
    if (!healthy && draw(2000) == 0 && path_down == 0) {
      path_down = 1 + draw(3000);
      if (draw(2) == 0)
        net.set_port(draw(nics), false);
      else
        net.set_path(draw(nics), false);
    } else if (path_down > 0 && --path_down == 0) {
      for (uint32_t nic = 0; nic < nics; ++nic)
        net.down_ports.count(nic) != 0 ? net.set_port(nic, true) : net.set_path(nic, true);
    }
    if (turn % 64 != 0) continue;
    ended = true;
    for (uint32_t from = 0; from < world; ++from)
      for (uint32_t to = 0; to < world; ++to)
        if (from != to)
          ended =
              ended && pairs[from][to].next == count && pairs[from][to].in_flight == 0 && pairs[from][to].unread == 0;
  }
  for (int i = 0; i < 2000; ++i) {
    time_ns += 50'000;
    for (auto &rank : ranks) take(*rank);
  }
  for (const auto &[immediate, entry] : posted) {
    CHECK_EQ(entry.done + entry.failed, 1);
    CHECK_EQ(entry.arrived, entry.done);
  }
  for (uint32_t from = 0; from < world; ++from) {
    for (uint32_t to = 0; to < world; ++to) {
      if (from == to) continue;
      for (const uint8_t byte : pairs[from][to].revoked) CHECK_EQ(byte, 0);
      for (uint32_t number = 0; number < count; ++number)
        if (posted.at(name(from, to, number)).fate == Fate::kWrite)
          CHECK_EQ(pairs[from][to].target[size_t{number} * kSlot], 0xee);
    }
  }
  CHECK_EQ(net.rnr, 0);
  CHECK(net.most_unsignalled < 64);
  if (healthy) CHECK_EQ(net.breaks, 0);
  totals->breaks += net.breaks;
  totals->failed_datagrams += net.failed_datagrams;
  for (auto &rank : ranks) {
    for (uint32_t rail = 0; rail < nics; ++rail) {
      totals->replayed += rank->count(rail).replayed;
      totals->reconnects += rank->count(rail).reconnects;
    }
  }
}

}  // namespace

int main(int argc, char **argv) {
  plugin::hmac = [](void *, const void *key, size_t key_length, const void *data, size_t length, uint8_t *mac) {
    ept::hmac_sha256(key, key_length, data, length, mac);
  };
  plugin::log_level = EPT_LOG_ERROR;
  plugin::clock = [] { return time_ns; };
  const uint64_t first = argc > 1 ? strtoull(argv[1], nullptr, 10) : 1;
  const uint64_t count = argc > 2 ? strtoull(argv[2], nullptr, 10) : 40;
  Totals totals;
  for (uint64_t seed = first; seed < first + count; ++seed) run(seed, &totals);
  printf("%llu schedules: %llu operations, %llu breaks, %llu channels made anew, %llu operations again, %llu denied\n",
         static_cast<unsigned long long>(count), static_cast<unsigned long long>(totals.operations),
         static_cast<unsigned long long>(totals.breaks), static_cast<unsigned long long>(totals.reconnects),
         static_cast<unsigned long long>(totals.replayed), static_cast<unsigned long long>(totals.denied));
  // A test that never breaks anything proves nothing.
  CHECK(count < 40 ||
        (totals.breaks > 100 && totals.failed_datagrams > 10 && totals.replayed > 100 && totals.denied > 5));
  return 0;
}
