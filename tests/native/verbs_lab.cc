// SPDX-License-Identifier: Apache-2.0
//
// Dispatch and combine over the backend verbs on soft-RoCE, bit for bit against moe_model.h, while the network is well
// and while it is not. What broke is read from the engines' own logs: a stage whose fault was never met has failed.
// Runs in tests/lab alone, with four NICs (rdma-lab --nics 4), as root there: it does to the links what it needs.
//
//     EPT_TEST_PLUGINS=build/test/plugins verbs_lab [stage ...]
#include "verbs_lab.h"

#include <atomic>
#include <chrono>
#include <functional>
#include <thread>

#include "moe_steps.h"

using namespace moe_test;

namespace {

using Values = std::vector<std::pair<std::string, std::string>>;

void shell(const std::string &command) {
  const int status = std::system(command.c_str());
  if (status != 0) check::failed(__FILE__, __LINE__, command + " ended with " + std::to_string(status));
}

void sleep_ms(int length) { std::this_thread::sleep_for(std::chrono::milliseconds(length)); }

// What a stage saw.
struct Seen {
  uint64_t anew = 0, again = 0;  // queue pairs that were made anew, operations that were posted again
  std::string log;               // all that the engines said
};

void look(ept_engine *engine, Seen *seen) {
  ept_engine_info info{};
  info.size = sizeof info;
  Error error;
  OK(ept_engine_info_get(engine, &info, &error), error);
  for (uint32_t i = 0; i < info.rails; i++) {
    ept_rail rail{};
    rail.size = sizeof rail;
    ept_rail_counters counters{};
    counters.size = sizeof counters;
    OK(ept_engine_rail(engine, i, &rail, &counters, &error), error);
    seen->anew += counters.reconnects;
    seen->again += counters.replayed;
  }
  char line[512];
  for (int32_t level = 0; ept_engine_log(engine, &level, line, sizeof line) == EPT_OK;)
    seen->log += line + std::string("\n");
}

// How many steps a group makes: `least`, and on until `trouble` is over. All ranks make the same number of them. A rank
// says which step it begins before it asks whether the trouble is over; who ends it asks which were begun after. So the
// last is one that no rank has gone past.
class Length {
 public:
  explicit Length(uint32_t least) : least_(least) {}
  bool begins(uint32_t step) {
    uint32_t most = begun_.load();
    while (most < step && !begun_.compare_exchange_weak(most, step)) {}
    if (step < least_ || !over_.load()) return true;
    while (!last_known_.load()) std::this_thread::yield();
    return step <= last_.load();
  }
  void over() {
    over_ = true;
    last_ = begun_.load();
    last_known_ = true;
  }

 private:
  const uint32_t least_;
  std::atomic<uint32_t> begun_{0}, last_{0};
  std::atomic<bool> over_{false}, last_known_{false};
};

// Steps of ranks on these NICs, `least` at least, while `trouble` runs.
Seen steps(const char *what, const Devices &devices, uint32_t least, const std::function<void()> &trouble = {},
           const Values &values = {}, uint32_t hidden = kHidden) {
  check::running(what);
  Options options = lab_options();
  options.values = values;
  for (const std::string &own : devices) options.of_rank.push_back({{"devices", own}});
  const auto world = static_cast<uint32_t>(devices.size());
  const auto start = std::chrono::steady_clock::now();
  const Group group(world, options);
  const ept_moe_config config = lab_config(world, hidden);
  const std::vector<ept_moe *> objects = group.create(config);
  Length length(least);
  std::thread beside([&] {
    if (trouble) trouble();
    length.over();
  });
  std::atomic<uint32_t> made{0};
  group.run([&](uint32_t rank) {
    ept_moe_config mine = config;
    mine.rank = rank;
    Runner runner(objects[rank], mine, nullptr);
    uint32_t step = 0;
    for (; length.begins(step); step++) runner.run(lab_step(step, mine));
    made = step;
    run_last(runner, mine);
  });
  beside.join();
  Seen seen;
  for (ept_engine *engine : group.engines) look(engine, &seen);
  close_all(objects);
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  printf("%s: %u ranks, %u steps, %llu queue pairs made anew, %llu operations posted again, %.1f s\n", what, world,
         made.load(), static_cast<unsigned long long>(seen.anew), static_cast<unsigned long long>(seen.again),
         took.count());
  fflush(stdout);
  return seen;
}

const Devices kTwo = {"rxe0", "rxe1"}, kFour = {"rxe0", "rxe1", "rxe2", "rxe3"};
const Devices kTwoNics = {"rxe0,rxe2", "rxe1,rxe3"};

// On both ways between the first two NICs.
void netem(const char *what) {
  for (const char *link : {"eth0", "eth1"}) shell(std::string("tc qdisc add dev ") + link + " root netem " + what);
}
void no_netem() {
  for (const char *link : {"eth0", "eth1"}) shell(std::string("tc qdisc del dev ") + link + " root");
}

void down_and_up() {
  sleep_ms(500);
  shell("ip link set eth1 down");
  sleep_ms(2000);
  shell("ip link set eth1 up");
  sleep_ms(1000);
}

// ---- stages ---------------------------------------------------------------------------------------------------------

void two() { CHECK_EQ(steps("two", kTwo, 20).anew, 0); }

void four() { CHECK_EQ(steps("four", kFour, 10).anew, 0); }

// Soft-RoCE places data in order, so that the order in which completions are handled is drawn instead.
void shuffled() { CHECK_EQ(steps("shuffled", kTwoNics, 20, {}, {{"shuffle", "5"}, {"qps", "2"}}).anew, 0); }

// The NICs mend it by themselves.
void loss() {
  netem("loss 1%");
  steps("loss", kTwo, 20);
  no_netem();
}

// The path is silent for longer than a NIC goes on trying, and well again before the peer is given up.
void retry() {
  const Seen seen = steps("retry", kTwo, 20,
                          [] {
                            sleep_ms(500);
                            netem("loss 100%");
                            sleep_ms(3000);
                            no_netem();
                            sleep_ms(500);
                          },
                          {{"timeout", "12"}, {"retries", "2"}});
  CHECK(seen.anew > 0);
  CHECK_HAS(seen.log, "transport retry counter exceeded");
}

// Rows are cut into many writes, and a target has two receives for them: a write finds none, and is not tried again.
void rnr() {
  const Seen seen =
      steps("rnr", kTwo, 2, {}, {{"receives", "2"}, {"rnr_retries", "0"}, {"max_message", "4096"}}, 8 * kHidden);
  CHECK(seen.anew > 0);
  CHECK_HAS(seen.log, "RNR retry counter exceeded");
}

void port_events(const Seen &seen) {
  CHECK_HAS(seen.log, "port 1 of rxe1 is down");
  CHECK_HAS(seen.log, "port 1 of rxe1 is up again");
}

// One of two NICs: all goes by the other meanwhile.
void nic() {
  const Seen seen = steps("nic", kTwoNics, 20, down_and_up);
  CHECK(seen.anew > 0);
  port_events(seen);
}

// The only one: all stands still meanwhile.
void link() {
  const Seen seen = steps("link", kTwo, 20, down_and_up);
  CHECK(seen.anew > 0);
  port_events(seen);
}

void processes() {
  check::running("processes");
  for (const Devices &devices : {kTwo, kFour}) ranks_as_processes(devices);
}

void killed() {
  check::running("killed");
  a_killed_process({"rxe0", "rxe1", "rxe2"});
}

}  // namespace

int main(int argc, char **argv) {
  if (argc > 1 && strcmp(argv[1], "--rank") == 0) return run_rank(argc, argv);
  const std::vector<std::pair<const char *, void (*)()>> stages = {
      {"two", two},     {"four", four}, {"processes", processes}, {"killed", killed}, {"loss", loss},
      {"retry", retry}, {"rnr", rnr},   {"link", link},           {"nic", nic},       {"shuffled", shuffled}};
  for (const auto &[name, stage] : stages) {
    bool asked = argc == 1;
    for (int i = 1; i < argc; i++) asked = asked || strcmp(argv[i], name) == 0;
    if (asked) stage();
  }
  return 0;
}
