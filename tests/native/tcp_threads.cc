// SPDX-License-Identifier: Apache-2.0
//
// The TCP plugin with threads that move long payloads (mover.h): what its other tests assert of one thread, where it
// could differ. Nothing is told before its bytes are there or its source is free, whatever breaks; what is revoked,
// fenced or closed amid a payload changes no more; a payload that stands still holds up no other; nobody sleeps through
// the end of one. ThreadSanitizer sees a mover that touches what is not its own.
//
//     tcp_threads [SEEDS [FIRST]]: that many random schedules of faults
#include <poll.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <random>
#include <thread>

#include "../../plugins/tcp/mover.h"
#include "tcp_ledger.h"

namespace {

using plugin::Event;
using plugin::Identity;
using plugin::Options;
using plugin::Rank;
using tcp_ledger::Kind;
using tcp_ledger::Pair;
using tcp_ranks::backend;
using tcp_ranks::Node;
using tcp_relay::kFar;
using tcp_relay::kNear;
using tcp_relay::Link;

constexpr uint64_t kPayload = 1'000'000;  // long enough to be a mover's from several places in it

Identity patient() {
  Identity identity;
  identity.dead_ns = 300'000'000'000;  // a loaded machine is no dead peer
  return identity;
}

// Whether this process comes to have so many movers. One that has been joined may be listed for a moment more.
bool movers_come_to(size_t wanted) {
  for (uint64_t end = plugin::now_ns() + 60'000'000'000; plugin::now_ns() < end;) {
    size_t found = 0;
    for (const auto &task : std::filesystem::directory_iterator("/proc/self/task")) {
      std::string name;
      std::getline(std::ifstream(task.path() / "comm"), name);
      found += name == "ept-tcp-mover";
    }
    if (found == wanted) return true;
  }
  return false;
}

// A payload from 0 to 1 on stream 0 of which `bytes` arrive, and no more until the limit is lifted.
Link &held_up(Pair &pair, uint64_t bytes) {
  Link &link = *pair.relay->of(0);
  link.limit[kNear] = link.passed[kNear] + bytes;
  CHECK(pair.post(0, Kind::kWrite, kPayload));
  CHECK(pair.until([&] { return link.at_limit(kNear); }));
  pair.poll_for(20);  // a mover takes what has come
  return link;
}

// ---- what ends a payload early
// ---------------------------------------------------------------------------------------

// The one whose memory it is takes the key back: not a byte changes from then on, and the writer is refused.
void revoked(bool by_deregistering) {
  Pair pair({{"streams", "1"}, {"threads", "2"}}, patient());
  Link &link = held_up(pair, 300'000);
  plugin::Window &window = *pair.way[0].window;
  if (by_deregistering)
    CHECK_EQ(pair.node[1]->rank.release(window.mem), EPT_OK);
  else
    CHECK_OK(backend(), backend().region_revoke(window.mem, 0, window.key));
  const std::vector<uint8_t> frozen = window.bytes;
  link.limit[kNear] = UINT64_MAX;
  pair.way[0].entries[0].kind = Kind::kRefused;
  CHECK(pair.until([&] { return pair.way[0].ended == 1; }));
  CHECK_EQ(pair.way[0].arrived, 0);
  CHECK(window.bytes == frozen);
}

// A fence: the epoch has sent its last byte, though more of them are under way.
void fenced() {
  Pair pair({{"streams", "1"}, {"threads", "2"}}, patient());
  Link &link = held_up(pair, 300'000);
  CHECK_OK(backend(), backend().peer_fence(pair.node[1]->rank.instance, 0, 0, 77));
  const std::vector<uint8_t> frozen = pair.way[0].window->bytes;
  link.limit[kNear] = UINT64_MAX;
  CHECK_EQ(pair.node[1]->rank.expect(EPT_EVENT_FENCED).cookie, 77);
  pair.node[1]->rank.expect_nothing(1'000);
  CHECK(pair.way[0].window->bytes == frozen);
}

// The writer closes its peer amid a payload: its memory is its own again at once.
void closed() {
  Pair pair({{"streams", "1"}, {"threads", "2"}}, patient());
  held_up(pair, 300'000);
  plugin::Window &window = *pair.way[0].window;
  CHECK_OK(backend(), backend().peer_close(pair.node[0]->rank.instance, 1));
  CHECK_EQ(pair.node[0]->rank.release(window.source_mem), EPT_OK);
  std::fill(window.source.begin(), window.source.end(), uint8_t{0});  // nobody reads it: a race if a mover does
  const Event error = pair.node[0]->rank.expect(EPT_EVENT_ERROR);
  CHECK_EQ(error.code, EPT_E_CLOSED);
}

// Who ends with payload under way leaves no thread behind, and there are threads only where they were asked for.
void threads_end() {
  CHECK(movers_come_to(0));
  {
    Pair pair({{"streams", "1"}, {"threads", "3"}}, patient());
    CHECK(movers_come_to(6));
    held_up(pair, 200'000);
    pair.node[0]->rank.leave();
    CHECK(movers_come_to(3));
  }
  CHECK(movers_come_to(0));
  Pair none({{"streams", "1"}, {"threads", "0"}}, patient());
  CHECK(movers_come_to(0));
}

void what_may_be_asked_for() {
  for (const char *threads : {"auto", "0", "64"}) Rank(backend(), Identity{}, {{"threads", threads}});
  for (const char *threads : {"", "65", "-1", "2x", "many"}) {
    const plugin::Values values(backend(), {{"threads", threads}});
    const ept_host host = plugin::host();
    ept_instance *instance = nullptr;
    CHECK_EQ(Rank::open(backend(), Identity{}, values, host, &instance), EPT_E_CONFIG);
    CHECK_HAS(plugin::error_text(backend()), "must be auto or a number from 0 to 64");
  }
}

// What `auto` takes: six where each rank of the host has four cores or more, or it would take those of the ranks' work.
void how_many() {
  for (uint32_t ranks : {0u, 1u}) CHECK_EQ(tcp::threads_for(4, ranks), 6);
  CHECK_EQ(tcp::threads_for(3, 1), 0);
  CHECK_EQ(tcp::threads_for(16, 4), 6);
  CHECK_EQ(tcp::threads_for(16, 5), 0);
  CHECK_EQ(tcp::threads_for(192, 8), 6);
  CHECK_EQ(tcp::threads_for(2, 8), 0);
}

// ---- what goes on beside it -----------------------------------------------------------------------------------------

// One thread for two streams, and one of those stands still amid a payload: the other goes on.
void one_stands_still() {
  Pair pair({{"streams", "2"}, {"threads", "1"}}, patient(), 16 << 20);
  Link &link = held_up(pair, 300'000);
  for (int i = 0; i < 5; ++i)
    for (int from : {0, 1}) CHECK(pair.post(from, Kind::kWrite, kPayload, 1));
  CHECK(pair.until([&] { return pair.way[0].ended == 5 && pair.way[1].ended == 5; }));
  CHECK_EQ(pair.way[0].entries[0].ended, 0);
  link.limit[kNear] = UINT64_MAX;
  pair.check();
}

// Both ranks sleep on the descriptor of `arm` whenever they may, and wake by themselves whenever something has ended.
void asleep() {
  Identity identity = patient();
  std::vector<std::unique_ptr<Node>> nodes;
  for (uint32_t rank : {0u, 1u}) {
    identity.rank = rank;
    nodes.push_back(std::make_unique<Node>(identity, Options{{"threads", "2"}}));
  }
  tcp_ranks::meet({nodes[0].get(), nodes[1].get()});
  plugin::Window forth(nodes[0]->rank, nodes[1]->rank, kPayload), back(nodes[1]->rank, nodes[0]->rank, kPayload);
  constexpr uint64_t kTimes = 100;
  auto rally = [&](Node &node, uint32_t peer, plugin::Window &window, bool begins) {
    uint64_t posted = 0, imms = 0, dones = 0;
    const auto post = [&] {
      ept_op op = Rank::write(peer, window.source_mem, window.source.data(), window.region, 0, kPayload, 1, posted);
      op.rail = posted++ % 2;
      CHECK_EQ(node.rank.post(op), EPT_OK);
    };
    if (begins) post();
    while (imms < kTimes || dones < kTimes) {
      for (const Event &event : node.rank.poll()) {
        CHECK(event.kind == EPT_EVENT_IMM || event.kind == EPT_EVENT_LOCAL_DONE);
        dones += event.kind == EPT_EVENT_LOCAL_DONE;
        imms += event.kind == EPT_EVENT_IMM;
        if (event.kind == EPT_EVENT_IMM && posted < kTimes) post();
      }
      int32_t descriptor = -1;
      if (node.rank.backend.arm(node.rank.worker, &descriptor) != EPT_OK) continue;
      pollfd slept{descriptor, POLLIN, 0};
      if (imms < kTimes || dones < kTimes) CHECK_EQ(poll(&slept, 1, 100'000), 1);
    }
  };
  std::thread other([&] { rally(*nodes[1], 0, back, false); });
  rally(*nodes[0], 1, forth, true);
  // The other waits for acknowledgements, which are this one's to send.
  std::atomic<bool> over = false;
  std::thread joins([&] { other.join(), over = true; });
  while (!over) nodes[0]->poll();
  joins.join();
}

// ---- connections that break -----------------------------------------------------------------------------------------

// Breaks, half frames and stalls at random moments of long and short operations both ways. The ledger checks each event
// as it comes, and wipes the target at an IMM and the source at a LOCAL_DONE.
void schedule(uint64_t seed) {
  std::mt19937_64 random(seed);
  auto draw = [&](std::initializer_list<uint64_t> values) { return values.begin()[random() % values.size()]; };
  const uint64_t streams = 1 + random() % 3;
  Options options = {{"streams", std::to_string(streams)}, {"threads", std::to_string(1 + random() % 3)}};
  options["depth"] = std::to_string(draw({16, 64}));
  if (random() % 3 == 0) options["sndbuf"] = options["rcvbuf"] = "16384";
  Pair pair(options, patient(), 24 << 20);
  uint64_t posted = 0;
  const uint64_t wanted = 60;
  for (uint64_t turn = 0; posted < wanted; ++turn) {
    CHECK(turn < 100'000'000);
    const int from = static_cast<int>(random() % 2);
    const auto kind = static_cast<Kind>(draw({0, 0, 0, 0, 0, 1, 2, 3}));
    uint64_t length = draw({8, 1000, 40'000, 65'535, 65'536, 65'600, 100'000, 300'000, 1'000'000});
    if (kind == Kind::kSignal) length = 0;
    if (kind == Kind::kSend) length = 1000;
    const bool taken = pair.post(from, kind, length, static_cast<uint32_t>(random() % streams));
    posted += taken || random() % 1024 == 0;  // a window that is used up takes shorter ones alone
    if (taken && random() % 8 == 0) {
      if (Link *link = pair.relay->of(static_cast<uint32_t>(random() % streams))) {
        const int side = static_cast<int>(random() % 2);
        switch (random() % 5) {
          case 0:
            link->reset();
            break;
          case 1:
            link->reset(side), link->stall();
            break;
          case 2:
            link->finish(kNear), link->finish(kFar);
            break;
          case 3:  // amid what is under way
            link->limit[side] = link->passed[side] + random() % 400'000;
            for (int i = 0; i < 2'000 && !link->at_limit(side); ++i) pair.step();
            link->reset();
            break;
          case 4:
            link->stall();
            pair.poll_for(1);
            link->stall(false);
            break;
        }
      }
    }
    for (uint64_t i = random() % draw({1, 10, 200}); i > 0; --i) pair.step();
  }
  pair.check();
}

}  // namespace

int main(int argc, char **argv) {
  signal(SIGPIPE, SIG_IGN);
  plugin::log_level = EPT_LOG_ERROR;
  backend();
  const uint64_t seeds = argc > 1 ? std::stoull(argv[1]) : 6, first = argc > 2 ? std::stoull(argv[2]) : 1;
  RUN(revoked(false));
  RUN(revoked(true));
  RUN(fenced());
  RUN(closed());
  RUN(threads_end());
  RUN(what_may_be_asked_for());
  RUN(how_many());
  RUN(one_stands_still());
  RUN(asleep());
  for (uint64_t seed = first; seed < first + seeds; ++seed) {
    check::running(("seed " + std::to_string(seed)).c_str());
    schedule(seed);
  }
}
