// SPDX-License-Identifier: Apache-2.0
//
// The whole backend libfabric under the strict shim, as provider efa, over the network inside the process: no
// libfabric.so is needed, and its clock counts the calls, so that a seed is one schedule. Whatever the schedule, each
// operation ends once, each write is counted once and after its bytes, each message comes once and whole, and none of
// EFA's rules is broken. What EFA does to those who keep its rules (each error of the device, errors that name no
// operation, a target without receives, a queue that is overrun) ends operations and peers with the device's own code.
//
//     strict_backend 10000    so many schedules in place of those of a test run
#include <algorithm>
#include <functional>
#include <random>

#include "../../native/engine/sha256.h"
#include "../../plugins/libfabric/device_errors.h"
#include "../../plugins/libfabric/instance.h"
#include "../../plugins/libfabric/null.h"
#include "plugin.h"

using libfabric::Deed;
using plugin::Event;
using plugin::Identity;
using plugin::Options;
using plugin::Rank;
using plugin::Window;

extern "C" const ept_backend ept_backend_v1;

namespace libfabric {
// In place of library.cc: whatever library is asked for, a card's network that gives out its own keys.
std::shared_ptr<Library> open_library(const std::string &, plugin::Refusal *) {
  return make_null({.writes_land = true, .mr_mode = FI_MR_VIRT_ADDR | FI_MR_PROV_KEY, .provider = "efa"});
}
std::string mapped_libraries() { return ""; }
}  // namespace libfabric

namespace {

constexpr int kLong = 700;  // polls: more than anything is held back with windows up to 32 and its storms

// Five milliseconds a call, of which there is one in 64 polls: what is due by the clock comes at the same call in each
// run.
uint64_t counted_time = 0;
uint64_t counted_clock() { return counted_time += 5000000; }

Options strict(const std::string &text) { return {{"provider", "efa"}, {"strict", text + ",hold_ms=0"}}; }
// Nothing but what a test is about.
Options calm(const std::string &text) { return strict("1:window=4,eagain=0," + text); }

const libfabric::StrictReport &report(const Rank &rank) { return *rank.instance->strict; }

void keeps_the_rules(const Rank &rank) {
  for (size_t i = 0; i < static_cast<size_t>(Deed::kCount); i++) {
    const Deed deed = static_cast<Deed>(i);
    if (report(rank)[deed] != 0 && (libfabric::is_violation(deed) || deed == Deed::kTruncated))
      check::failed(__FILE__, __LINE__, "a rule of EFA is broken: " + report(rank).words());
  }
}

// ---- schedules

// Of one rank to another: what it posts, what of it has ended, and what the other has seen.
struct Lane {
  static constexpr size_t kSlots = 12, kSlot = 1500;
  enum class Kind { kWrite, kSignal, kMessage };
  struct Deal {
    Kind kind;
    size_t length;
    std::string bytes;  // as they were when it was posted
    int ended = 0, seen = 0;
  };

  Lane(Rank &from, Rank &to, std::mt19937_64 *random) : from(from), to(to), window(from, to, kSlots * kSlot) {
    for (uint8_t &byte : window.source) byte = static_cast<uint8_t>(1 + (*random)() % 255);
    for (size_t i = 0; i < kSlots; i++) {
      const Kind kind = static_cast<Kind>((*random)() % 3);
      const size_t length = kind == Kind::kSignal ? 0 : 1 + (*random)() % kSlot;
      deals.push_back({kind, length, std::string(text_at(window.source, i), length)});
    }
  }
  static const char *text_at(const std::vector<uint8_t> &bytes, size_t slot) {
    return reinterpret_cast<const char *>(bytes.data()) + slot * kSlot;
  }
  bool post_next() {
    const Deal &deal = deals[next];
    const uint32_t immediate = from.id.rank << 16 | static_cast<uint32_t>(next);
    const uint64_t cookie = uint64_t{to.id.rank} << 16 | next;
    ept_op op = Rank::signal(to.id.rank, window.region, immediate, cookie);
    if (deal.kind == Kind::kWrite)
      op = Rank::write(to.id.rank, window.source_mem, &window.source[next * kSlot], window.region, next * kSlot,
                       deal.length, immediate, cookie);
    if (deal.kind == Kind::kMessage) op = Rank::message(to.id.rank, deal.bytes, cookie);
    const int32_t code = from.post(op);
    if (code == EPT_LATER) return false;
    CHECK_OK(ept_backend_v1, code);
    next++;
    return true;
  }
  // Its source is the caller's again from then on.
  void done(size_t slot) {
    CHECK_EQ(++deals.at(slot).ended, 1);
    memset(&window.source[slot * kSlot], 0, kSlot);
  }
  void immediate(size_t slot) {
    Deal &deal = deals.at(slot);
    CHECK(deal.kind != Kind::kMessage);
    CHECK_EQ(++deal.seen, 1);
    CHECK(std::string(text_at(window.bytes, slot), deal.length) == deal.bytes);
  }
  // Messages come in any order; those of a lane differ.
  void message(const std::string &bytes) {
    const auto found = std::find_if(deals.begin(), deals.end(), [&](const Deal &deal) {
      return deal.kind == Kind::kMessage && deal.seen == 0 && deal.bytes == bytes;
    });
    CHECK(found != deals.end());
    found->seen = 1;
  }
  bool over() const {
    return std::all_of(deals.begin(), deals.end(), [](const Deal &deal) { return deal.ended == 1 && deal.seen == 1; });
  }
  void look() const {
    for (size_t slot = 0; slot < kSlots; slot++) {
      const size_t length = deals[slot].kind == Kind::kWrite ? deals[slot].length : 0;
      const char *at = text_at(window.bytes, slot);
      CHECK(std::string(at, length) == deals[slot].bytes.substr(0, length));
      CHECK(std::all_of(at + length, at + kSlot, [](char byte) { return byte == 0; }));
    }
  }

  Rank &from, &to;
  Window window;
  std::vector<Deal> deals;
  size_t next = 0;
};

class Schedule {
 public:
  explicit Schedule(uint64_t seed) : random_(seed) {
    const uint32_t world = 2 + below(2);
    const char *const storms[] = {"0", "0.1", "0.3", "0.6"};
    const std::string text = std::to_string(seed) + ":window=" + std::to_string(below(2) ? 1u << below(6) : 0) +
                             ",eagain=" + storms[below(4)] + ",tx=" + (below(3) ? "64" : "3") +
                             ",rma=2000,manual=" + std::to_string(below(4) != 0);
    for (uint32_t rank = 0; rank < world; rank++) {
      ranks_.push_back(std::make_unique<Rank>(ept_backend_v1, Identity{.rank = rank, .world = world}, strict(text)));
      up_.emplace_back(world);
    }
    for (auto &from : ranks_) {
      for (auto &to : ranks_) {
        if (from != to) lanes_.push_back(std::make_unique<Lane>(*from, *to, &random_));
      }
    }
    for (size_t i = 0; i < lanes_.size(); i++) to_open_.push_back(i);
    std::shuffle(to_open_.begin(), to_open_.end(), random_);
  }
  void run() {
    const auto over = [&] {
      return std::all_of(lanes_.begin(), lanes_.end(), [](const auto &lane) { return lane->over(); });
    };
    for (int turns = 0; !over(); turns++) {
      CHECK(turns < 300000);  // lost: some hundreds are enough
      turn();
    }
    for (int i = 0; i < kLong; i++) {
      for (auto &rank : ranks_) look_at(*rank, rank->poll());
    }
    for (const auto &lane : lanes_) lane->look();
    for (const auto &rank : ranks_) {
      keeps_the_rules(*rank);
      for (size_t i = 0; i < sum.size(); i++) sum[i] += report(*rank)[static_cast<Deed>(i)];
    }
  }
  static std::array<uint64_t, static_cast<size_t>(Deed::kCount)> sum;

 private:
  uint32_t below(uint32_t bound) { return static_cast<uint32_t>(random_() % bound); }
  // Who opens whom when is part of the schedule: a write may go only when both sides have.
  void turn() {
    if (!to_open_.empty() && below(8) == 0) {
      const Lane &lane = *lanes_[to_open_.back()];
      CHECK_OK(ept_backend_v1, lane.from.open_peer(lane.to.id.rank, 0, lane.to.address()));
      to_open_.pop_back();
    }
    Lane &lane = *lanes_[below(static_cast<uint32_t>(lanes_.size()))];
    if (below(3) == 0) {
      while (up_[lane.from.id.rank][lane.to.id.rank] && lane.next < Lane::kSlots && below(4) != 0 && lane.post_next())
        continue;
      return;
    }
    look_at(lane.from, lane.from.poll(1 + below(8)));
  }
  Lane &lane_of(uint32_t from, uint32_t to) {
    for (auto &lane : lanes_) {
      if (lane->from.id.rank == from && lane->to.id.rank == to) return *lane;
    }
    check::failed(__FILE__, __LINE__, "there is no such lane");
  }
  void look_at(Rank &rank, const std::vector<Event> &events) {
    for (const Event &event : events) {
      switch (event.kind) {
        case EPT_EVENT_PEER:
          CHECK_EQ(event.code, EPT_OK);
          up_[rank.id.rank][event.peer] = true;
          break;
        case EPT_EVENT_LOCAL_DONE:
          lane_of(rank.id.rank, static_cast<uint32_t>(event.cookie >> 16)).done(event.cookie & 0xffff);
          break;
        case EPT_EVENT_IMM:
          lane_of(event.immediate >> 16, rank.id.rank).immediate(event.immediate & 0xffff);
          break;
        case EPT_EVENT_RECV:
          lane_of(event.peer, rank.id.rank).message(event.bytes);
          break;
        default:
          check::failed(__FILE__, __LINE__, "an event of kind " + std::to_string(event.kind) + ": " + event.words);
      }
    }
  }

  std::mt19937_64 random_;
  std::vector<std::unique_ptr<Rank>> ranks_;
  std::vector<std::vector<bool>> up_;
  std::vector<std::unique_ptr<Lane>> lanes_;
  std::vector<size_t> to_open_;
};
std::array<uint64_t, static_cast<size_t>(Deed::kCount)> Schedule::sum;

void nothing_is_lost_early_or_twice(uint64_t seeds) {
  for (uint64_t seed = 1; seed <= seeds; seed++) {
    Schedule(seed).run();
    if (seed % 1000 == 0) printf("    %llu schedules\n", static_cast<unsigned long long>(seed));
  }
  for (const Deed deed :
       {Deed::kPutOff, Deed::kOvertook, Deed::kShuffled, Deed::kPostAgain, Deed::kReadAgain, Deed::kUnpolled}) {
    const uint64_t times = Schedule::sum[static_cast<size_t>(deed)];
    if (seeds > 60) printf("    %llu %s\n", static_cast<unsigned long long>(times), deed_name(deed));
    CHECK(times > seeds / 2);
  }
}

// ---- what EFA does to those who keep its rules

// Two ranks and one that nothing happens to; what ends is counted by cookie.
struct Trio {
  explicit Trio(const Options &options, const Options &of_b = {})
      : a(0, options), b(1, of_b.empty() ? options : of_b), c(2, options) {
    for (One *from : {&a, &b, &c}) {
      for (One *to : {&a, &b, &c}) {
        if (from != to) CHECK_OK(ept_backend_v1, from->rank.open_peer(to->rank.id.rank, 0, to->rank.address()));
      }
    }
    for (One *one : {&a, &b, &c}) {
      for (int i = 0; i < 100 * kLong && one->peers.size() < 2; i++) polls(1);
      CHECK_EQ(one->peers.size(), 2);
      for (const Event &event : one->peers) CHECK_EQ(event.code, EPT_OK);
    }
    for (One *one : {&a, &b, &c}) one->peers.clear();
  }
  struct One {
    One(uint32_t number, const Options &options)
        : rank(ept_backend_v1, {.rank = number, .world = 3, .send_credits = 16}, options) {}
    void poll() {
      for (const Event &event : rank.poll()) {
        if (event.kind == EPT_EVENT_LOCAL_DONE) done.push_back(event.cookie);
        if (event.kind == EPT_EVENT_ERROR) errors.push_back(event);
        if (event.kind == EPT_EVENT_PEER) peers.push_back(event);
        if (event.kind == EPT_EVENT_IMM) immediates.push_back(event.immediate);
        if (event.kind == EPT_EVENT_RECV) messages++;
        if (event.kind == EPT_EVENT_FENCED) fenced.push_back(event.cookie);
      }
    }
    Rank rank;
    std::vector<uint64_t> done, fenced;
    std::vector<Event> errors, peers;
    std::vector<uint32_t> immediates;
    size_t messages = 0;
  };
  void polls(int count) {
    for (int i = 0; i < count; i++) a.poll(), b.poll(), c.poll();
  }
  // The bystander has lost nobody, and is written to.
  void look_at_c() {
    CHECK(c.peers.empty());
    Window window(a.rank, c.rank, 8);
    CHECK_OK(ept_backend_v1, a.rank.post(Rank::signal(2, window.region, 77, 77)));
    polls(kLong);
    CHECK_EQ(c.immediates.back(), 77);
    CHECK_EQ(a.done.back(), 77);
  }
  // Each of cookies 0 to `count` - 1 has ended once.
  void all_ended(size_t count) {
    std::vector<int> ends(count);
    for (const uint64_t cookie : a.done) ends.at(cookie)++;
    for (const Event &event : a.errors) ends.at(event.cookie)++;
    for (const int times : ends) CHECK_EQ(times, 1);
  }
  One a, b, c;
};

// Of writes that the target refused, or that never left, one is lost; any other error may hide anything, so the peer
// is.
void check_fault(Trio *trio, const libfabric::DeviceError &error, size_t count) {
  const bool one = error.code == 5 || error.code == 6 || error.code == 7 || error.code == 11;
  trio->all_ended(count);
  CHECK_EQ(trio->a.peers.size(), one ? 0 : 1);
  const Event &told = one ? trio->a.errors.at(0) : trio->a.peers.at(0);
  if (one) CHECK_EQ(trio->a.errors.size(), 1);
  CHECK_EQ(told.peer, 1);
  CHECK_EQ(told.provider_errno, error.code);
  CHECK_HAS(told.words, error.words);
  CHECK_EQ(told.code, !one ? EPT_E_PEER_LOST : error.code == 7 ? EPT_E_ACCESS : EPT_E_IO);
  trio->look_at_c();
}

void each_error_of_the_device() {
  for (const libfabric::DeviceError &error : libfabric::kDeviceErrors) {
    Trio writes(calm("error=" + std::string(error.name) + "@3"));
    Window window(writes.a.rank, writes.b.rank, 64);
    for (uint32_t i = 0; i < 6; i++)
      CHECK_OK(ept_backend_v1,
               writes.a.rank.post(Rank::write(1, window.source_mem, window.source.data(), window.region, 0, 8, i, i)));
    writes.polls(kLong);
    check_fault(&writes, error, 6);
    auto &seen = writes.b.immediates;
    for (const uint64_t cookie : writes.a.done)
      CHECK(cookie == 77 || std::count(seen.begin(), seen.end(), cookie) == 1);
    if (!error.may_have_landed) CHECK(std::count(seen.begin(), seen.end(), 2) == 0);

    // The 20th message: the handshake's are before it.
    Trio messages(calm("send_error=" + std::to_string(error.code) + "@20"));
    for (uint32_t i = 0; i < 24; i++) CHECK_OK(ept_backend_v1, messages.a.rank.post(Rank::message(1, "hello", i)));
    messages.polls(kLong);
    check_fault(&messages, error, 24);
    CHECK(messages.b.messages == 23 || (messages.b.messages == 24 && error.may_have_landed));
  }
}

// Nobody can say whose it is: peers with an operation under way on that rail are lost, and nothing else.
void an_error_that_names_no_operation() {
  Trio trio(calm("eq_error=@2"));
  Window window(trio.a.rank, trio.b.rank, 8);
  for (uint32_t i = 0; i < 2; i++) CHECK_OK(ept_backend_v1, trio.a.rank.post(Rank::signal(1, window.region, i, i)));
  for (int i = 0; i < kLong; i++) trio.a.poll();  // b doesn't, so the two stay under way
  CHECK_EQ(trio.a.peers.size(), 1);
  CHECK_EQ(trio.a.peers[0].peer, 1);
  CHECK_EQ(trio.a.peers[0].code, EPT_E_PEER_LOST);
  CHECK_EQ(trio.a.peers[0].provider_errno, 2);
  CHECK_HAS(trio.a.peers[0].words, "event queue");
  CHECK_EQ(report(trio.a.rank)[Deed::kEventError], 1);
  trio.polls(kLong);
  trio.all_ended(2);
  trio.look_at_c();
}

// Nothing lands where nobody polls, and nothing is lost by that.
void a_target_that_does_not_poll() {
  Trio trio(calm("manual=1"));
  Window window(trio.a.rank, trio.b.rank, 8);
  for (uint32_t i = 0; i < 100; i++) CHECK_OK(ept_backend_v1, trio.a.rank.post(Rank::signal(1, window.region, i, i)));
  for (int i = 0; i < kLong; i++) trio.a.poll();
  CHECK(trio.a.done.empty());
  CHECK(report(trio.a.rank)[Deed::kUnpolled] >= 100);
  trio.polls(kLong);
  CHECK_EQ(trio.b.immediates.size(), 100);
  trio.all_ended(100);
}

// More messages than it has receives: they wait for it; where the card gives up, the peer is lost with the card's code.
void a_target_without_receives() {
  for (const bool gives_up : {false, true}) {
    Trio trio(calm(gives_up ? "manual=0,rnr=100" : "manual=0"));
    const size_t receives = trio.b.rank.instance->rails[0]->receives.size(), count = receives + 20;
    for (uint32_t i = 0; i < count; i++) {
      while (trio.a.rank.post(Rank::message(1, "hello", i)) == EPT_LATER) trio.a.poll();
    }
    for (int i = 0; i < kLong; i++) trio.a.poll();
    CHECK(report(trio.a.rank)[Deed::kStalled] >= 20);
    CHECK_EQ(trio.a.peers.size(), gives_up ? 1 : 0);
    if (gives_up) {
      CHECK_EQ(trio.a.peers[0].code, EPT_E_PEER_LOST);
      CHECK_EQ(trio.a.peers[0].provider_errno, 10);
    } else {
      CHECK(trio.a.done.size() <= receives);
    }
    trio.polls(kLong);
    trio.all_ended(count);
    if (!gives_up) CHECK_EQ(trio.b.messages, count);
    trio.look_at_c();
  }
}

// What the rail says of its queue holds: with every context and every receive in use, as many immediates fit as it told
// of. The target doesn't look at its queue before all are there.
void the_queue_holds_what_was_granted() {
  Trio trio(calm("manual=0,tx=4096,window=0"));
  Window there(trio.a.rank, trio.b.rank, 8), back(trio.b.rank, trio.c.rank, 8);
  libfabric::Rail &rail = *trio.b.rank.instance->rails[0];
  CHECK(rail.cq_depth >= 2 * trio.b.rank.id.credits);
  uint32_t next = 0;
  for (; next < rail.tx_depth; next++)
    CHECK_OK(ept_backend_v1, trio.b.rank.post(Rank::signal(2, back.region, 0, next)));
  CHECK_EQ(trio.b.rank.post(Rank::signal(2, back.region, 0, next)), EPT_LATER);
  for (uint32_t i = 0; i < rail.cq_depth; i++) {
    while (trio.a.rank.post(Rank::signal(1, there.region, i, i)) == EPT_LATER) trio.a.poll();
  }
  for (size_t i = 0; i < rail.receives.size(); i++) {
    while (trio.a.rank.post(Rank::message(1, "hello", rail.cq_depth + i)) == EPT_LATER) trio.a.poll();
  }
  for (int i = 0; i < kLong; i++) trio.a.poll();
  trio.polls(3 * kLong);
  keeps_the_rules(trio.b.rank);
  CHECK(trio.b.peers.empty());
  CHECK_EQ(trio.b.immediates.size(), rail.cq_depth);
  CHECK_EQ(trio.b.done.size(), rail.tx_depth);
}

// Nobody knows what an overrun lost, so every peer on that queue is lost, at once and each once.
void an_overrun_ends_every_peer_of_its_queue() {
  Trio trio(calm("manual=0"), calm("manual=0,cq=40"));
  Window window(trio.a.rank, trio.b.rank, 8), out(trio.b.rank, trio.c.rank, 8);
  for (uint32_t i = 0; i < 60; i++) CHECK_OK(ept_backend_v1, trio.a.rank.post(Rank::signal(1, window.region, i, i)));
  for (int i = 0; i < kLong; i++) trio.a.poll();
  trio.polls(kLong);
  CHECK_EQ(report(trio.b.rank)[Deed::kOverrun], 1);
  CHECK(trio.b.immediates.empty());
  CHECK_EQ(trio.b.peers.size(), 2);
  for (const Event &event : trio.b.peers) {
    CHECK_EQ(event.code, EPT_E_PEER_LOST);
    CHECK_EQ(event.provider_errno, FI_EOVERRUN);
    CHECK_HAS(event.words, "completion queue");
  }
  CHECK_EQ(trio.b.rank.post(Rank::signal(2, out.region, 0, 0)), EPT_E_PEER_LOST);
}

// After FENCED no arrival of that rank comes any more, though its queue gave nothing while some were still held back:
// the engine gives the names of its signals to others by then. What the fenced rank posts meanwhile fails over there.
void nothing_of_a_fenced_rank_comes_after_fenced() {
  size_t before = 0, refused = 0;
  for (uint64_t seed = 1; seed <= 40; seed++) {
    // Every other time the fence's time passes without a read, and what is held back is so for fewer reads.
    const bool passes = seed % 4 < 2;
    const std::string text =
        std::to_string(seed) + (passes ? ":window=2" : ":window=32") + ",eagain=0.3,manual=" + std::to_string(seed % 2);
    Trio trio(strict(text));
    Window window(trio.a.rank, trio.b.rank, 8), bystander(trio.c.rank, trio.b.rank, 8);
    for (uint32_t i = 0; i < 20; i++) {
      while (trio.a.rank.post(Rank::signal(1, window.region, i, i)) == EPT_LATER) trio.polls(1);
      if (i % 4 == 3) trio.polls(static_cast<int>(seed % 8));
    }
    CHECK_OK(ept_backend_v1, ept_backend_v1.peer_fence(trio.b.rank.instance, 0, 0, 5));
    if (passes) {
      counted_time += 1'000'000'000;
      trio.b.rank.instance->time_due_ns = 0;  // as `arm` does: the poll after a sleep looks at the clock
    }
    for (uint32_t i = 0; i < 20 * kLong && trio.b.fenced.empty(); i++) {
      trio.polls(1);
      // Others' arrivals between them must not hide that the queue was found empty, nor pass for it.
      if (i % 64 == 0) trio.c.rank.post(Rank::signal(1, bystander.region, 99, i));
    }
    CHECK_EQ(trio.b.fenced.size(), 1);
    CHECK_EQ(trio.b.fenced[0], 5);
    const auto of_a = [&] {
      return std::count_if(trio.b.immediates.begin(), trio.b.immediates.end(), [](uint32_t i) { return i != 99; });
    };
    const auto count = of_a();
    trio.polls(kLong);
    if (of_a() != count)
      check::failed(__FILE__, __LINE__, std::to_string(of_a() - count) + " arrivals after FENCED, schedule " + text);
    trio.all_ended(20);
    before += static_cast<size_t>(count), refused += trio.a.errors.size();
    keeps_the_rules(trio.b.rank);
  }
  CHECK(before > 40);
  CHECK(refused > 40);
}

// Who closes a link waits for the other's goodbye before it closes an endpoint of ofi_rxm; the other answers at once,
// not when it closes too.
void a_goodbye_is_answered() {
  Trio trio(calm("manual=1"));
  CHECK_OK(ept_backend_v1, ept_backend_v1.peer_close(trio.b.rank.instance, 0));
  CHECK_EQ(trio.b.rank.instance->unparted.size(), 1);
  trio.polls(kLong);
  CHECK_EQ(trio.a.peers.size(), 1);
  CHECK_EQ(trio.a.peers[0].code, EPT_E_CLOSED);
  CHECK(trio.b.rank.instance->unparted.empty());
  keeps_the_rules(trio.a.rank);
}

// Memory is the caller's again when no operation reads from it any more, and not before.
void memory_stays_while_it_is_read() {
  Trio trio(calm("manual=1"));
  Window window(trio.a.rank, trio.b.rank, 64);
  CHECK_OK(ept_backend_v1,
           trio.a.rank.post(Rank::write(1, window.source_mem, window.source.data(), window.region, 0, 64, 0, 0)));
  for (int i = 0; i < kLong; i++) trio.a.poll();
  CHECK_EQ(trio.a.rank.release(window.source_mem), EPT_E_INVALID);
  trio.polls(kLong);
  trio.all_ended(1);
  CHECK_OK(ept_backend_v1, trio.a.rank.release(window.source_mem));
  keeps_the_rules(trio.a.rank);
}

// A write longer than the card takes is refused here, and its limit is told.
void the_limit_is_told() {
  Trio trio(calm("rma=5000"));
  ept_caps caps = {};
  caps.size = sizeof caps;
  CHECK_OK(ept_backend_v1, ept_backend_v1.caps(trio.a.rank.instance, &caps));
  CHECK_EQ(caps.max_message, 5000);
  Window window(trio.a.rank, trio.b.rank, 6000);
  for (const uint64_t length : {5000, 5001}) {
    const ept_op op = Rank::write(1, window.source_mem, window.source.data(), window.region, 0, length, 0, 0);
    CHECK_EQ(trio.a.rank.post(op), length == 5000 ? EPT_OK : EPT_E_INVALID);
  }
  trio.polls(kLong);
  trio.all_ended(1);
  keeps_the_rules(trio.a.rank);
}

}  // namespace

int main(int count, char **arguments) {
  plugin::hmac = [](void *, const void *key, size_t key_length, const void *data, size_t length, uint8_t *mac) {
    ept::hmac_sha256(key, key_length, data, length, mac);
  };
  plugin::clock = counted_clock;
  plugin::log_level = EPT_LOG_ERROR;
  RUN(nothing_is_lost_early_or_twice(count > 1 ? strtoull(arguments[1], nullptr, 10) : 60));
  RUN(each_error_of_the_device());
  RUN(an_error_that_names_no_operation());
  RUN(a_target_that_does_not_poll());
  RUN(a_target_without_receives());
  RUN(the_queue_holds_what_was_granted());
  RUN(an_overrun_ends_every_peer_of_its_queue());
  RUN(nothing_of_a_fenced_rank_comes_after_fenced());
  RUN(a_goodbye_is_answered());
  RUN(memory_stays_while_it_is_read());
  RUN(the_limit_is_told());
  return 0;
}
