// SPDX-License-Identifier: Apache-2.0
//
// Random schedules of faults on TCP: two ranks post whatever they like to each other while the machine between them
// resets, ends, cuts, holds up and refuses their connections. Nothing is lost, nothing told twice or early, nobody
// lost.
//
//     tcp_faults [SEEDS [FIRST]]
#include <signal.h>

#include <deque>
#include <iostream>
#include <random>

#include "tcp_ledger.h"

namespace {

using tcp_ledger::Kind;
using tcp_ledger::Pair;
using tcp_relay::kFar;
using tcp_relay::kNear;
using tcp_relay::Link;

using Random = std::mt19937_64;

uint64_t draw(Random &random, std::initializer_list<uint64_t> values) {
  return values.begin()[random() % values.size()];
}

// What is done to the network, now or a little later.
class Trouble {
 public:
  Trouble(Pair &pair, Random &random) : pair_(pair), random_(random) {}

  // One fault.
  void strike(uint32_t streams) {
    Link *link = pair_.relay->of(static_cast<uint32_t>(random_() % streams));
    const int side = static_cast<int>(random_() % 2);
    switch (random_() % 9) {
      case 0:  // both see it
        if (link) link->reset();
        break;
      case 1:  // one sees it, the other's words are kept
        if (link) link->reset(side), link->stall();
        break;
      case 2:
        if (link) link->finish(side);
        break;
      case 3:
        if (link) link->finish(kNear), link->finish(kFar);
        break;
      case 4:
      case 5:  // ends at a byte that may be anywhere in a frame
        if (!link) break;
        link->limit[side] = link->passed[side] + random_() % draw(random_, {70, 300, 6'000, 200'000});
        later(100 + random_() % 400,
              [link, both = random_() % 2 == 0, side] { both ? link->reset() : link->finish(1 - side); });
        break;
      case 6:  // stands still; what is held comes late, or never
        if (!link) break;
        random_() % 2 ? link->stall() : void(link->stalled[side] = true);
        if (random_() % 2) later(random_() % 60'000, [link] { link->stall(false); });
        break;
      case 7:  // connections are taken, and nothing comes of them
        pair_.relay->deaf = true;
        later(random_() % 3'000, [this] { pair_.relay->deaf = false; });
        break;
      default:  // refused, but for less than it takes to be given up
        pair_.relay->close_door();
        later(random_() % 100, [this] { pair_.relay->open_door(); });
    }
  }
  void pass_time() {
    ++now_;
    for (size_t i = 0; i < due_.size();) {
      if (due_[i].first > now_) {
        ++i;
        continue;
      }
      auto what = std::move(due_[i].second);
      due_.erase(due_.begin() + static_cast<long>(i));
      what();
    }
  }

 private:
  void later(uint64_t steps, std::function<void()> what) { due_.emplace_back(now_ + steps, std::move(what)); }

  Pair &pair_;
  Random &random_;
  uint64_t now_ = 0;
  std::vector<std::pair<uint64_t, std::function<void()>>> due_;
};

struct Totals {
  uint64_t operations = 0, faults = 0, reconnects = 0, replayed = 0;
};

void schedule(uint64_t seed, Totals *totals) {
  Random random(seed);
  const auto streams = static_cast<uint32_t>(1 + random() % 3);
  plugin::Options options = {{"streams", std::to_string(streams)},
                             {"depth", std::to_string(draw(random, {16, 64, 512}))}};
  if (random() % 3 == 0) options["sndbuf"] = options["rcvbuf"] = std::to_string(draw(random, {4096, 16384}));
  plugin::Identity identity;
  identity.dead_ns = 8'000'000'000;
  Pair pair(options, identity, 2 << 20);
  Trouble trouble(pair, random);
  const uint64_t wanted = 50 + random() % 250, strikes = 2 + random() % 8;
  std::deque<uint64_t> when;  // which operation each fault comes behind
  for (uint64_t i = 0; i < strikes; ++i) when.push_back(random() % wanted);
  std::sort(when.begin(), when.end());
  auto step = [&] {
    pair.step();
    trouble.pass_time();
  };
  uint64_t posted = 0;
  for (uint64_t tries = 0; posted < wanted; ++tries) {
    CHECK(tries < 3'000'000);  // a stream that is never made again
    if (random() % 4 == 0) {
      const auto kind = static_cast<Kind>(random() % 4);
      uint64_t length = draw(random, {0, 1, 8, 63, 64, 500, 1000, 1024, 4096, 20'000, 33'000, 70'000});
      if (kind == Kind::kSignal) length = 0;
      if (kind == Kind::kSend) length = std::min<uint64_t>(length, 16'000);
      if (pair.post(static_cast<int>(random() % 2), kind, length, static_cast<uint32_t>(random() % streams)))
        ++posted;
      else if (length > 1000 && random() % 64 == 0)
        ++posted;  // the window is used up: shorter ones will do
    }
    while (!when.empty() && when.front() <= posted) {
      when.pop_front();
      trouble.strike(streams);
      for (uint64_t i = random() % draw(random, {1, 50, 3'000}); i > 0; --i) step();
    }
    step();
  }
  for (int i = 0; i < 60'000 && !pair.settled(); ++i) step();  // what was to come later comes
  pair.relay->deaf = false;
  pair.check();
  totals->operations += pair.way[0].entries.size() + pair.way[1].entries.size();
  totals->faults += strikes;
  totals->reconnects += pair.counted(0).reconnects;
  totals->replayed += pair.counted(0).replayed + pair.counted(1).replayed;
}

}  // namespace

int main(int argc, char **argv) {
  signal(SIGPIPE, SIG_IGN);
  tcp_ledger::clock_by_steps(100'000);
  plugin::log_level = EPT_LOG_ERROR;
  tcp_ranks::backend();
  const uint64_t seeds = argc > 1 ? std::stoull(argv[1]) : 60, first = argc > 2 ? std::stoull(argv[2]) : 1;
  Totals totals;
  for (uint64_t seed = first; seed < first + seeds; ++seed) {
    check::running(("seed " + std::to_string(seed)).c_str());
    schedule(seed, &totals);
  }
  std::cout << seeds << " schedules, " << totals.operations << " operations, " << totals.faults << " faults, "
            << totals.reconnects << " connections more, " << totals.replayed << " operations sent again" << std::endl;
}
