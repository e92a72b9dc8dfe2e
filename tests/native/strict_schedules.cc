// SPDX-License-Identifier: Apache-2.0
//
// The strict shim over the plainest network there is: whatever its schedule, each operation completes once, each write
// is seen once and after its bytes, and what it is there to do to a plugin does happen.
#include <algorithm>
#include <thread>

#include "../../plugins/libfabric/null.h"
#include "../../plugins/libfabric/strict.h"
#include "strict_net.h"

using libfabric::Deed;
using libfabric::NullOptions;
using libfabric::StrictOptions;

namespace {

constexpr size_t kSlot = 64;

std::shared_ptr<libfabric::Library> strict_over_null(const StrictOptions &options, NullOptions null = {}) {
  null.writes_land = true;
  return libfabric::make_strict(libfabric::make_null(null), options);
}

void check_clean(const libfabric::StrictReport &report) {
  for (size_t i = 0; i < static_cast<size_t>(Deed::kCount); i++) {
    const Deed deed = static_cast<Deed>(i);
    if (libfabric::is_violation(deed) && report[deed] != 0)
      check::failed(__FILE__, __LINE__, "the shim refused what is allowed: " + report.words());
  }
}

// The byte that stands all over slot `slot` of what `from` writes; another for each, and for none 0.
unsigned char stamp(size_t from, size_t slot) { return static_cast<unsigned char>(1 + (from * 101 + slot * 7) % 255); }

// One of several ranks that all write to and send to all others, `each` times. Runs until it has all that is its due.
class Rank {
 public:
  Rank(std::shared_ptr<libfabric::Library> library, size_t self, size_t ranks, size_t each)
      : net(std::move(library)), self_(self), each_(each), addresses_(ranks), seen_(ranks * each) {
    for (size_t slot = 0; slot < ranks * each; slot++)
      memset(net.source.data() + slot * kSlot, stamp(self, slot), kSlot);
    for (size_t to = 0; to < ranks; to++) {
      for (size_t i = 0; to != self && i < each; i++) todo_.push_back({to, i, false}), todo_.push_back({to, i, true});
    }
    messages_due_ = (ranks - 1) * each;
    for (size_t i = 0; i < messages_due_; i++) receives_.push_back(net.context());
  }
  void meet(const std::vector<std::unique_ptr<Rank>> &all) {
    for (size_t i = 0; i < all.size(); i++) {
      if (i != self_) addresses_[i] = net.learn(all[i]->net);
    }
    others_ = &all;
  }
  // One step: posts what goes, reads what has come.
  void step() {
    while (posted_receives_ < receives_.size()) {
      const size_t offset = StrictRank::kBytes / 2 + posted_receives_ * 8;
      if (net.receive(offset, 8, receives_[posted_receives_]) != 0) break;
      posted_receives_++;
    }
    while (next_ < todo_.size()) {
      const Todo &todo = todo_[next_];
      const size_t slot = self_ * each_ + todo.number;
      fi_context2 *context = net.context();
      const ssize_t code =
          todo.message ? net.send(addresses_[todo.to], slot * kSlot, 8, context)
                       : net.write((*others_)[todo.to]->net, addresses_[todo.to], slot * kSlot, kSlot, slot, context);
      if (code == -FI_EAGAIN) break;
      CHECK_EQ(code, 0);
      contexts_.push_back(context);
      next_++;
    }
    net.poll();
    CHECK_EQ(net.failures.size(), 0);
    for (const fi_cq_data_entry &entry : net.read) look_at(entry);
  }
  bool done() const {
    return next_ == todo_.size() && completed_ == todo_.size() && arrived_ == messages_due_ &&
           messages_ == messages_due_;
  }
  // After all are done and polled on: nothing came twice, nothing that nobody sent.
  void check_ledger() {
    CHECK(done());
    for (const fi_context2 *context : contexts_) CHECK_EQ(net.completed[const_cast<fi_context2 *>(context)], 1);
    for (fi_context2 *context : receives_) CHECK_EQ(net.completed[context], 1);
    for (size_t slot = 0; slot < seen_.size(); slot++) CHECK_EQ(seen_[slot], slot / each_ == self_ ? 0 : 1);
  }

  StrictRank net;

 private:
  struct Todo {
    size_t to, number;
    bool message;
  };
  void look_at(const fi_cq_data_entry &entry) {
    if (entry.flags & FI_REMOTE_CQ_DATA) {
      CHECK(entry.data < seen_.size());
      seen_[entry.data]++;
      arrived_++;
      const unsigned char byte = stamp(entry.data / each_, entry.data);
      const unsigned char *at = net.memory.data() + entry.data * kSlot;
      CHECK(std::all_of(at, at + kSlot, [&](unsigned char is) { return is == byte; }));
    } else if (entry.flags & FI_RECV) {
      const auto found = std::find(receives_.begin(), receives_.end(), entry.op_context);
      CHECK(found != receives_.end());
      const size_t number = static_cast<size_t>(found - receives_.begin());
      CHECK_EQ(entry.len, 8);
      CHECK(net.source[StrictRank::kBytes / 2 + number * 8] != 0);
      messages_++;
    } else {
      completed_++;
    }
  }

  const size_t self_, each_;
  const std::vector<std::unique_ptr<Rank>> *others_ = nullptr;
  std::vector<fi_addr_t> addresses_;
  std::vector<Todo> todo_;
  std::vector<fi_context2 *> contexts_, receives_;
  std::vector<int> seen_;
  size_t next_ = 0, completed_ = 0, arrived_ = 0, messages_ = 0, messages_due_ = 0, posted_receives_ = 0;
};

std::vector<std::unique_ptr<Rank>> make_ranks(const StrictOptions &base, size_t ranks, size_t each,
                                              const NullOptions &null) {
  std::vector<std::unique_ptr<Rank>> all;
  for (size_t i = 0; i < ranks; i++) {
    StrictOptions options = base;
    options.salt = i;
    all.push_back(std::make_unique<Rank>(strict_over_null(options, null), i, ranks, each));
  }
  for (auto &rank : all) rank->meet(all);
  return all;
}

void run(const StrictOptions &options, size_t ranks, size_t each, const NullOptions &null) {
  auto all = make_ranks(options, ranks, each, null);
  const auto finished = [&] { return std::all_of(all.begin(), all.end(), [](auto &rank) { return rank->done(); }); };
  // A step waits 16 windows at most, and each rank's posts some storms: far below this.
  for (int i = 0; i < 100000 && !finished(); i++) {
    for (auto &rank : all) rank->step();
  }
  for (int i = 0; i < 600; i++) {
    for (auto &rank : all) rank->step();
  }
  for (auto &rank : all) rank->check_ledger();
}

void every_schedule_keeps_the_promises(uint64_t seeds) {
  for (const int mr_mode : {0, FI_MR_PROV_KEY | FI_MR_VIRT_ADDR}) {
    StrictOptions options;
    for (uint64_t seed = 0; seed < seeds; seed++) {
      options.seed = seed;
      options.window = seed % 5 == 0 ? 0 : 1u << seed % 6;
      options.eagain = seed % 4 * 0.2;
      options.tx = seed % 3 == 0 ? 4 : 64;
      // The network below may say EAGAIN itself.
      run(options, 2 + seed % 2, 6, {.mr_mode = mr_mode, .busy = seed % 4 == 1 ? 3u : 0u});
    }
    const auto &report = *options.report;
    check_clean(report);
    for (const Deed deed :
         {Deed::kPutOff, Deed::kOvertook, Deed::kShuffled, Deed::kPostAgain, Deed::kReadAgain, Deed::kFull})
      CHECK(report[deed] > seeds);
  }
}

// Each rank in a thread of its own: what they share in here is the registry, and the sanitizers look on.
void ranks_may_have_threads_of_their_own() {
  for (uint64_t seed = 0; seed < 4; seed++) {
    StrictOptions options;
    options.seed = seed;
    auto all = make_ranks(options, 3, 10, {});
    std::atomic<size_t> done = 0;
    std::vector<std::thread> threads;
    for (auto &rank : all) {
      threads.emplace_back([&, one = rank.get()] {
        bool counted = false;
        while (done < all.size()) {
          one->step();
          if (!counted && one->done()) counted = true, done++;
          if (counted) std::this_thread::yield();
        }
      });
    }
    for (std::thread &thread : threads) thread.join();
    for (auto &rank : all) rank->check_ledger();
    check_clean(*options.report);
  }
}

// The order in which `b` sees 40 writes of `a` under a seed.
std::vector<uint64_t> order_of(uint64_t seed) {
  StrictOptions options;
  options.hold_ms = 0;
  options.seed = seed;
  StrictPair pair(strict_over_null(options));
  for (uint64_t i = 0; i < 40; i++) {
    while (pair.a.write(pair.b, pair.to_b, 0, 8, i, pair.a.context()) == -FI_EAGAIN) pair.a.poll();
  }
  pair.polls(2000);
  CHECK_EQ(pair.b.arrived.size(), 40);
  return pair.b.arrived;
}

void a_seed_is_a_schedule() {
  const std::vector<uint64_t> first = order_of(5);
  CHECK(first == order_of(5));
  CHECK(first != order_of(6));
  CHECK(!std::is_sorted(first.begin(), first.end()));
}

}  // namespace

int main(int count, char **arguments) {
  RUN(a_seed_is_a_schedule());
  RUN(ranks_may_have_threads_of_their_own());
  RUN(every_schedule_keeps_the_promises(count > 1 ? strtoull(arguments[1], nullptr, 10) : 60));
  return 0;
}
