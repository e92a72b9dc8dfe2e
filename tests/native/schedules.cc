// SPDX-License-Identifier: Apache-2.0
//
// schedules.cc [COUNT [FIRST_SEED [BACKEND]]]: random fault schedules on whole engines.
//
// A schedule is two to four ranks that write to each other (with signals: small, empty, paged), send messages, mask
// each other, leave, vanish as if their cable had been pulled, and come back in another life, over loopback under the
// adversary (or over another backend, which then does its own reordering). What must hold, looked at after every turn:
//   nothing early     a count is never higher than the number of transfers whose bytes are all there
//   nothing twice     nor than the number of transfers that were taken; a message comes once
//   nothing stale     from the mask on (or the loss that a rank has noticed) nothing of that life changes a byte or a
//                     count, and no message of it is handed out
//   nothing lost      on a link that never ended the count comes to the number of transfers that ended well, exactly,
//                     and every message comes
//   no hang           every transfer ends, every link that is opened comes up, every engine is quiet in the end
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "engine_world.h"

using namespace world;

namespace {

constexpr uint32_t kPlaces = 400, kPlaceBytes = 64;
constexpr uint64_t kTag = 11;

struct Sent {
  ept_transfer_id transfer;
  uint32_t place, bytes;
  uint32_t link;  // number of the lane's link that it went over
  int32_t code;   // TIMEOUT: not ended
};

struct Letter {
  uint32_t from, link, number, from_life, to_life;
};

// All that goes from one rank to another. A place is written once, so what has landed can be seen.
struct Lane {
  std::unique_ptr<Route> route;
  uint32_t link = 0;                         // goes up each time it is opened
  bool open = false;                         // neither side has seen its link end
  bool accepting = true;                     // the receiver has not seen it end
  uint32_t next_place = 0, first_place = 0;  // of this link
  uint32_t from_process = 0, to_process = 0;
  uint32_t sender_ended = 0, receiver_ended = 0;
  uint64_t counted_before = 0;  // the count when this link began
  std::vector<Sent> sent;
  std::vector<uint8_t> frozen;  // once the receiver has seen the end
  uint64_t frozen_count = 0;
  uint32_t letters = 0;  // sent on this link
  std::set<uint32_t> received;
};

class Schedule {
 public:
  Schedule(uint64_t seed, const std::string &backend)
      : random_(seed), options_(choose(backend)), world_(ranks(), options_) {}

  void run() {
    const uint32_t size = world_.size();
    const bool loopback = options_.backend == "loopback";
    const uint32_t vanishes = below(3) == 0 ? below(size) : size;
    for (uint32_t rank = 0; rank < size; rank++) start(rank, 0, loopback && rank == vanishes);
    world_.connect_all();
    for (uint32_t a = 0; a < size; a++) {
      for (uint32_t b = 0; b < size; b++) {
        if (a != b) begin(a, b);
      }
    }
    const uint32_t steps = 20 + below(100);
    for (uint32_t i = 0; i < steps; i++) step();
    settle();
  }

 private:
  static constexpr uint32_t kMost = 4;

  uint32_t below(uint64_t bound) { return static_cast<uint32_t>(random_() % bound); }
  uint32_t ranks() { return 2 + below(kMost - 1); }

  Options choose(const std::string &backend) {
    Options options;
    options.backend = backend;
    if (backend != "loopback") return options;
    options.values = {{"adversary", std::to_string(1 + below(1u << 30))},
                      {"delay", std::to_string(below(2) ? below(8) : below(60))},
                      {"rails", std::to_string(1 + below(4))},
                      {"early_permille", std::to_string(below(2) ? 300 : below(1000))},
                      {"fail_permille", std::to_string(below(3) ? 0 : below(100))}};
    return options;
  }

  void start(uint32_t rank, uint32_t epoch, bool vanishes) {
    processes_[rank]++;
    if (vanishes) {
      world_.start(rank, epoch, {{"lose_rank", std::to_string(rank)}, {"lose_after", std::to_string(8 + below(120))}});
    } else {
      world_.start(rank, epoch);
    }
  }

  // The pair has a new link.
  void begin(uint32_t from, uint32_t to) {
    Lane &lane = lanes_[{from, to}];
    if (!lane.route) {
      lane.route = std::make_unique<Route>(world_, from, to, kPlaces * kPlaceBytes);
    } else {
      const bool same = lane.to_process == processes_[to];
      if (lane.from_process != processes_[from]) lane.route->register_source();
      if (!same) lane.route->register_target();
      lane.route->open();
      if (same) check_frozen(lane);
    }
    lane.from_process = processes_[from], lane.to_process = processes_[to];
    lane.link++;
    lane.open = lane.accepting = true;
    lane.first_place = lane.next_place;
    lane.counted_before = lane.route->count();
    lane.sender_ended = world_.info(from, to).links_ended;
    lane.receiver_ended = world_.info(to, from).links_ended;
    lane.letters = 0;
    lane.received.clear();
  }

  void step() {
    const uint32_t what = below(100);
    const uint32_t a = below(world_.size());
    uint32_t b = below(world_.size() - 1);
    if (b >= a) b++;
    if (what < 55) {
      write(a, b);
    } else if (what < 65) {
      paged(a, b);
    } else if (what < 75) {
      send(a, b);
    } else if (what < 92) {
      for (uint32_t i = below(12); i-- > 0;) turn();
    } else if (what < 95) {
      mask(a, b);
    } else if (what < 97) {
      stop(a);
    } else {
      come_back(a);
    }
  }

  Lane *usable(uint32_t from, uint32_t to, uint32_t places) {
    Lane &lane = lanes_[{from, to}];
    if (!world_.lives(from) || !lane.route || lane.next_place + places > kPlaces) return nullptr;
    if (lane.from_process != processes_[from] || world_.info(from, to).links_ended != lane.sender_ended) return nullptr;
    return &lane;
  }

  void taken(Lane &lane, int32_t code, ept_transfer_id transfer, uint32_t places, uint32_t bytes) {
    if (code == EPT_LATER || code == EPT_E_PEER_LOST) return;
    check::ok(__FILE__, __LINE__, "write", code, error);
    lane.sent.push_back({transfer, lane.next_place, bytes, lane.link, EPT_E_TIMEOUT});
    lane.next_place += places;
  }

  void write(uint32_t from, uint32_t to) {
    Lane *lane = usable(from, to, 1);
    if (!lane) return;
    const uint32_t bytes = below(4) ? 1 + below(kPlaceBytes) : 0;
    const ept_write what = lane->route->write(uint64_t{lane->next_place} * kPlaceBytes, bytes);
    ept_transfer_id transfer = 0;
    const int32_t code = ept_engine_write(world_[from], &what, &transfer, &error);
    taken(*lane, code, transfer, 1, bytes);
  }

  void paged(uint32_t from, uint32_t to) {
    const uint32_t pages = 1 + below(20);
    Lane *lane = usable(from, to, pages);
    if (!lane) return;
    std::vector<uint32_t> numbers(pages);
    for (uint32_t i = 0; i < pages; i++) numbers[i] = i;
    std::shuffle(numbers.begin(), numbers.end(), random_);
    ept_paged_write what{};
    what.size = sizeof what;
    what.peer = to;
    what.source = lane->route->source_memory, what.destination = lane->route->region;
    what.page_bytes = kPlaceBytes;
    what.source_offset = what.destination_offset = uint64_t{lane->next_place} * kPlaceBytes;
    what.source_pages = what.destination_pages = numbers.data();
    what.pages = pages;
    what.signal = lane->route->remote;
    ept_transfer_id transfer = 0;
    const int32_t code = ept_engine_write_paged(world_[from], &what, &transfer, &error);
    taken(*lane, code, transfer, pages, pages * kPlaceBytes);
  }

  void send(uint32_t from, uint32_t to) {
    Lane *lane = usable(from, to, 0);
    if (!lane) return;
    const Letter letter{from, lane->link, lane->letters, world_.epoch(from), world_.epoch(to)};
    const int32_t code = ept_engine_send(world_[from], to, kTag, &letter, sizeof letter, 0, &error);
    if (code == EPT_OK) lane->letters++;
    if (code != EPT_OK && code != EPT_E_PEER_LOST && code != EPT_E_TIMEOUT)
      check::failed(__FILE__, __LINE__, error.text);
  }

  void mask(uint32_t by, uint32_t rank) {
    if (!world_.lives(by)) return;
    world_.mask(by, rank, 1 + below(9));
    notice();
  }

  void stop(uint32_t rank) {
    if (!world_.lives(rank)) return;
    world_.stop(rank);
    for (auto &[pair, lane] : lanes_) {
      if (pair.first != rank && pair.second != rank) continue;
      lane.open = false;
      if (pair.second == rank) lane.accepting = false;
      if (pair.first == rank) forget(lane);  // nobody is there to ask how they ended
    }
    notice();
  }

  static void forget(Lane &lane) {
    for (Sent &sent : lane.sent) {
      if (sent.code == EPT_E_TIMEOUT) sent.code = EPT_E_CLOSED;
    }
  }

  // All that live mask it, whatever they thought of it; then it is there in another life and all take it in.
  void come_back(uint32_t rank) {
    const bool lived = world_.lives(rank);
    for (uint32_t other = 0; other < world_.size(); other++) {
      if (other != rank && world_.lives(other)) world_.mask(other, rank);
    }
    notice();
    if (lived) {
      world_.rejoin(rank, world_.epoch(rank) + 1 + below(2));
    } else {
      start(rank, world_.epoch(rank) + 1 + below(2), false);
    }
    notice();
    for (uint32_t other = 0; other < world_.size(); other++) {
      if (other == rank || !world_.lives(other)) continue;
      OK(world_.readmit(rank, other));
      if (below(2)) turn();
      OK(world_.readmit(other, rank));
      bool up = false;
      world_.until("a rank that is back is up, or lost again", [&] {
        const int32_t one = world_.info(rank, other).status, two = world_.info(other, rank).status;
        up = one == EPT_PEER_UP && two == EPT_PEER_UP;
        return up || one == EPT_PEER_LOST || two == EPT_PEER_LOST;
      });
      if (!up) continue;
      begin(rank, other);
      begin(other, rank);
    }
  }

  void turn() {
    world_.turn();
    notice();
    for (auto &[pair, lane] : lanes_) look(lane);
  }

  // Who has seen which link end?
  void notice() {
    for (auto &[pair, lane] : lanes_) {
      const auto [from, to] = pair;
      if (lane.from_process != processes_[from] || lane.to_process != processes_[to]) continue;  // stop() saw to it
      if (world_.lives(from) && world_.info(from, to).links_ended != lane.sender_ended) lane.open = false;
      if (!lane.accepting || !world_.lives(to) || world_.info(to, from).links_ended == lane.receiver_ended) continue;
      lane.open = lane.accepting = false;
      lane.frozen = lane.route->target;
      lane.frozen_count = lane.route->count();
    }
  }

  void check_frozen(const Lane &lane) {
    CHECK_EQ(lane.route->count(), lane.frozen_count);
    CHECK(lane.route->target == lane.frozen);
  }

  bool landed(const Lane &lane, const Sent &sent) const {
    const size_t at = size_t{sent.place} * kPlaceBytes;
    return std::equal(lane.route->source.begin() + static_cast<ptrdiff_t>(at),
                      lane.route->source.begin() + static_cast<ptrdiff_t>(at + sent.bytes),
                      lane.route->target.begin() + static_cast<ptrdiff_t>(at));
  }

  void look(Lane &lane) {
    if (!world_.lives(lane.route->to) || lane.to_process != processes_[lane.route->to]) return;
    if (!lane.accepting) return check_frozen(lane);
    uint64_t all_there = 0, took = 0;
    for (const Sent &sent : lane.sent) {
      if (sent.link != lane.link) continue;
      took++;
      all_there += landed(lane, sent);
    }
    const uint64_t count = lane.route->count() - lane.counted_before;
    CHECK(count <= took);
    CHECK(count <= all_there);
    read(lane.route->to);
  }

  void read(uint32_t rank) {
    Letter letter;
    size_t length = sizeof letter;
    uint32_t from = 0;
    while (ept_engine_recv(world_[rank], UINT32_MAX, kTag, &letter, &length, &from, 0, &error) == EPT_OK) {
      Lane &lane = lanes_[{from, rank}];
      CHECK_EQ(length, sizeof letter);
      CHECK_EQ(letter.from, from);
      CHECK_EQ(letter.link, lane.link);
      CHECK(world_.info(rank, from).status != EPT_PEER_MASKED);
      CHECK(letter.number < lane.letters);
      CHECK(lane.received.insert(letter.number).second);
    }
  }

  bool ended(Lane &lane) {
    bool all = true;
    for (Sent &sent : lane.sent) {
      if (sent.code == EPT_E_TIMEOUT && world_.lives(lane.route->from)) {
        sent.code = ept_transfer_wait(world_[lane.route->from], sent.transfer, 0, &error);
      }
      all = all && sent.code != EPT_E_TIMEOUT;
    }
    return all;
  }

  void settle() {
    world_.until("all transfers end", [&] {
      turn();
      bool all = true;
      for (auto &[pair, lane] : lanes_) all = ended(lane) && all;
      return all;
    });
    for (auto &[pair, lane] : lanes_) {
      if (!lane.open) continue;
      world_.until("all that went well is counted, and all letters came", [&] {
        turn();
        if (!lane.open) return true;
        uint64_t well = 0;
        for (const Sent &sent : lane.sent) well += sent.link == lane.link && sent.code == EPT_OK;
        return lane.route->count() - lane.counted_before >= well && lane.received.size() == lane.letters;
      });
    }
    for (uint32_t i = 0; i < 300; i++) turn();  // what comes once too often comes late
    for (auto &[pair, lane] : lanes_) {
      if (!lane.open) continue;
      uint64_t well = 0;
      for (const Sent &sent : lane.sent) well += sent.link == lane.link && sent.code == EPT_OK;
      CHECK_EQ(lane.route->count() - lane.counted_before, well);
    }
    for (uint32_t rank = 0; rank < world_.size(); rank++) {
      if (!world_.lives(rank)) continue;
      world_.until("a rank is quiet",
                   [&] { return ept_engine_quiesce(world_[rank], 0, EPT_SCOPE_LOCAL, 1'000'000, &error) == EPT_OK; });
    }
  }

  std::mt19937_64 random_;
  Options options_;
  World world_;
  uint32_t processes_[kMost] = {};  // that have been each rank
  std::map<std::pair<uint32_t, uint32_t>, Lane> lanes_;
};

}  // namespace

int main(int argc, char **argv) {
  const uint64_t count = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 100;
  const uint64_t first = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  const std::string backend = argc > 3 ? argv[3] : "loopback";
  for (uint64_t seed = first; seed < first + count; seed++) {
    check::running(("seed " + std::to_string(seed)).c_str());
    Schedule(seed, backend).run();
  }
  std::printf("%llu schedules over %s, seeds from %llu\n", static_cast<unsigned long long>(count), backend.c_str(),
              static_cast<unsigned long long>(first));
}
