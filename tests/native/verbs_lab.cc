// SPDX-License-Identifier: Apache-2.0
//
// Dispatch and combine over the backend verbs on soft-RoCE, bit for bit against moe_model.h: 2 and 4 ranks, packets
// lost, a link that goes down and comes back, one NIC of two that fails, completions shuffled. Runs in tests/lab alone,
// with four NICs (rdma-lab --nics 4), as root there: it sets the links down itself.
//
//     EPT_TEST_PLUGINS=build/native/plugins verbs_lab [stage ...]
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>

#include "moe_steps.h"

using namespace moe_test;

namespace {

using Devices = std::vector<std::string>;  // of each rank

void shell(const std::string &command) {
  const int status = std::system(command.c_str());
  if (status != 0) check::failed(__FILE__, __LINE__, command + " ended with " + std::to_string(status));
}

uint64_t reconnects(const Group &group) {
  uint64_t all = 0;
  for (ept_engine *engine : group.engines) {
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
      all += counters.reconnects;
    }
  }
  return all;
}

// `count` steps of ranks on these devices, while `trouble` runs. What was made anew meanwhile.
uint64_t steps(const char *what, const Devices &devices, uint32_t count, const std::function<void()> &trouble = {},
               const std::vector<std::pair<std::string, std::string>> &values = {}) {
  Options options;
  options.plugin = "verbs";
  options.values = values;
  // An emulated machine on a busy one stands still for seconds; who is alive must not be taken for dead by that.
  options.timeout_ns = options.dead_ns = 120 * kSecond;
  for (const std::string &own : devices) options.of_rank.push_back({{"devices", own}});
  const auto world = static_cast<uint32_t>(devices.size());
  const auto start = std::chrono::steady_clock::now();
  const Group group(world, options);
  const ept_moe_config config = config_of(world, 2 * world + 1, 4, 64, 33);
  const std::vector<ept_moe *> objects = group.create(config);
  std::thread beside([&] {
    if (trouble) trouble();
  });
  group.run([&](uint32_t rank) {
    ept_moe_config mine = config;
    mine.rank = rank;
    Runner runner(objects[rank], mine, nullptr);
    Draw how;
    how.max_tokens = 33;
    for (uint32_t i = 0; i < count; i++) {
      Step step = draw(1000 + i, mine, how);
      if (count - i <= mine.lanes) step.lane = count - i - 1;
      runner.run(step);
    }
  });
  beside.join();
  const uint64_t anew = reconnects(group);
  close_all(objects);
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  printf("%s: %u ranks, %u steps, %llu queue pairs made anew, %.1f s\n", what, world, count,
         static_cast<unsigned long long>(anew), took.count());
  fflush(stdout);
  return anew;
}

const Devices kTwo = {"rxe0", "rxe1"}, kFour = {"rxe0", "rxe1", "rxe2", "rxe3"};
const Devices kTwoNics = {"rxe0,rxe2", "rxe1,rxe3"};

void down_and_up() {
  std::this_thread::sleep_for(std::chrono::milliseconds(500));
  shell("ip link set eth1 down");
  std::this_thread::sleep_for(std::chrono::milliseconds(2000));
  shell("ip link set eth1 up");
  std::this_thread::sleep_for(std::chrono::milliseconds(2000));
}

}  // namespace

int main(int argc, char **argv) {
  auto asked = [&](const char *name) {
    for (int i = 1; i < argc; i++)
      if (strcmp(argv[i], name) == 0) return true;
    return argc == 1;
  };
  if (asked("two")) CHECK_EQ(steps("two", kTwo, 20), 0);
  if (asked("four")) CHECK_EQ(steps("four", kFour, 10), 0);
  if (asked("shuffled")) CHECK_EQ(steps("shuffled", kTwoNics, 20, {}, {{"shuffle", "5"}, {"qps", "2"}}), 0);
  if (asked("loss")) {
    for (const char *link : {"eth0", "eth1"}) shell(std::string("tc qdisc add dev ") + link + " root netem loss 1%");
    steps("loss", kTwo, 20);
    for (const char *link : {"eth0", "eth1"}) shell(std::string("tc qdisc del dev ") + link + " root");
  }
  if (asked("nic")) CHECK(steps("nic", kTwoNics, 200, down_and_up) > 0);
  if (asked("link")) CHECK(steps("link", kTwo, 200, down_and_up) > 0);
  return 0;
}
