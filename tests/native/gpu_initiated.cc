// SPDX-License-Identifier: Apache-2.0
//
// GPU ranks whose kernels put into each other's memory by themselves (paths of kind GPU): the kernels as fibers over a
// device library that is as late and as unordered as it may be (simt/library.h), alone, beside ranks that are mapped,
// and beside CPU ranks behind a proxy, in one step, against a group of CPU ranks, bit for bit.
#include "engine/plugin.h"
#include "gpu_world.h"
#include "moe/crossover.h"

using namespace gpu_test;

namespace {

moe_test::Options over(const char *plugin) {
  moe_test::Options options;
  options.plugin = plugin;
  return options;
}

// What the kernels told of themselves is what the library was asked.
uint64_t puts(World &world) {
  uint64_t sum = 0;
  for (uint32_t r = 0; r < world.config.world; r++) {
    if (!world.on_gpu(r)) continue;
    uint64_t its = 0;
    Error error;
    OK(ept_gpu_lanes_puts(&world.lanes[r], &its, &error), error);
    sum += its;
  }
  return sum;
}

uint64_t parts = 0;  // of messages, put by warps

void steps(const char *what, const ept_moe_config &config, const std::string &on, int count, uint64_t seed) {
  check::running(what);
  World world(config, seed, on, over("loopback"));
  uint64_t pairs = 0;
  for (uint32_t r = 0; r < config.world; r++)
    for (uint32_t other = 0; other < config.world; other++) {
      const bool both = World::puts(on[r], false) && World::puts(on[other], false);
      const bool near = r == other || (on[r] == on[other] && World::puts(on[r], true));
      if (world.on_gpu(r)) CHECK_EQ(world.lanes[r].lanes->initiates(other), both && !near);
      pairs += both && !near;
    }
  world.counts_all = true;
  for (int i = 0; i < count; i++) {
    Step step = world.draw();
    const uint64_t before = world.library->puts();
    const std::vector<Got> expected = world.on_cpu(step);
    world.compare(step, expected);
    // A message a phase and pair, each one put; weights that come late are one more.
    CHECK_EQ(world.library->puts() - before, pairs * (step.late ? 3 : 2));
    CHECK_EQ(puts(world), world.library->puts());
  }
  parts += world.library->parts();
}

ept_moe_config quantised(ept_moe_config config) {
  config.dispatch_dtype = EPT_DTYPE_E4M3;
  return config;
}

// The same ranks by puts or through the engine, as settings say.
void chosen() {
  check::running("which path when");
  const ept_moe_config config = moe_test::config_of(3, 6, 3, 64, 9);
  const uint64_t bytes = ept_gpu_message_bytes(&config);
  // A header, and of 9 tokens with 3 ranks each a third of the rows: 9 rows of 64 fp32 and what is beside them.
  CHECK(bytes > EPT_MOE_HEADER_BYTES + 9 * 64 * 2 && bytes < EPT_MOE_HEADER_BYTES + 9 * (64 * 4 + 64));
  const struct {
    int32_t path;
    uint64_t crossover;
    bool puts;
  } cases[] = {{EPT_GPU_PATH_AUTO, bytes, true},
               {EPT_GPU_PATH_AUTO, bytes - 1, false},
               {EPT_GPU_PATH_GPU, 1, true},
               {EPT_GPU_PATH_PROXY, 0, false}};
  for (const auto &each : cases) {
    path = each.path, crossover_bytes = each.crossover;
    World world(config, 81, "iii", over("loopback"));
    for (uint32_t r = 0; r < 3; r++) {
      CHECK_EQ(world.lanes[r].lanes->initiates((r + 1) % 3), each.puts);
      CHECK_EQ(world.lanes[r].lanes->over_engine(), !each.puts);
      CHECK_EQ(world.lanes[r].lanes->way, "");
    }
    world.good_steps(1);
    CHECK_EQ(world.library->puts() > 0, each.puts);
  }
  path = EPT_GPU_PATH_GPU, crossover_bytes = 0;
}

// The rule, by itself: of drawn figures.
void the_rule() {
  check::running("the rule");
  using ept::moe::choose;
  using ept::moe::Figures;
  using ept::moe::Way;
  Random random(5);
  uint32_t by_puts = 0;
  for (int round = 0; round < 2000; round++) {
    std::vector<Figures> ranks(1 + below(random, 6));
    for (Figures &its : ranks)
      for (auto &way : its.took)
        for (uint64_t &took : way) took = below(random, 5) ? 1 + below(random, 1000) : 0;
    const ept::moe::Choice choice = choose(ranks);
    uint64_t sums[2] = {};
    for (uint32_t w = 0; w < 2; w++)
      for (uint32_t i = 0; i < 3; i++) {
        uint64_t slowest = 0;
        for (const Figures &its : ranks) slowest = std::max(slowest, its.took[w][i]);
        CHECK_EQ(choice.slowest.took[w][i], slowest);
        if (i > 0) sums[w] += slowest;  // a header alone counts for nothing
      }
    CHECK(choice.way == (sums[0] <= sums[1] ? Way::puts : Way::proxy));
    by_puts += choice.way == Way::puts;
    // Who has the figures in another order, or those of a rank that measured nothing beside them, chooses alike.
    std::vector<Figures> others = ranks;
    std::shuffle(others.begin(), others.end(), random);
    others.emplace_back();
    CHECK(choose(others).way == choice.way);
    // A way that becomes slower is not chosen for that.
    for (Figures &its : others) its.took[uint32_t(choice.way) ^ 1][1 + below(random, 2)] += below(random, 100);
    CHECK(choose(others).way == choice.way);
  }
  CHECK(by_puts > 500 && by_puts < 1500);
}

// What a write of the engine takes on the GPU's clock, ns.
std::atomic<uint64_t> write_costs{0};
const ept_backend *plain;
int32_t costly_post(ept_worker *worker, const ept_op *ops, size_t count, size_t *posted) {
  const int32_t code = plain->post(worker, ops, count, posted);
  for (size_t i = 0; i < *posted; i++) simt::ahead += ops[i].kind == EPT_OP_SEND ? 0 : write_costs.load();
  return code;
}

// Both ways are measured, and the faster one is taken, by all ranks; which it is, the clock is told.
void measured(const char *what, const std::string &on) {
  check::running(what);
  plain = moe_test::open_plugin("loopback")->table;
  ept_backend table = *plain;
  table.post = costly_post;
  const ept_plugin costly{"a loopback whose writes cost something", &table};
  moe_test::Options options;
  options.opened = &costly;
  path = EPT_GPU_PATH_AUTO;
  const ept_moe_config config = moe_test::config_of(uint32_t(on.size()), 6, 3, 64, 9);
  for (const bool puts : {true, false}) {
    constexpr uint64_t kDear = 50'000'000;  // some ten times what fibers take for a round
    write_costs = puts ? kDear : 0;
    library_costs = puts ? 0 : kDear;
    World world(config, 91 + puts, on, options);
    write_costs = 0, world.library->costs = 0;
    const uint64_t tried = world.library->puts();
    CHECK(tried > 0);
    std::string way;
    for (uint32_t r = 0; r < config.world; r++) {
      if (!world.on_gpu(r)) continue;
      const ept::moe::cuda::Lanes &lanes = *world.lanes[r].lanes;
      if (way.empty()) way = lanes.way;
      CHECK_EQ(lanes.way, way);
      CHECK_HAS(way, puts ? "put by kernels, by what was measured" : "through the proxy, by what was measured");
      for (uint32_t other = 0; other < config.world; other++) {
        const bool could = r != other && World::puts(on[r], false) && World::puts(on[other], false) &&
                           !(on[r] == on[other] && World::puts(on[r], true));
        CHECK_EQ(lanes.initiates(other), puts && could);
      }
    }
    world.good_steps(3);
    CHECK_EQ(world.library->puts() > tried, puts);
    world.reset();
    world.good_steps(1);
  }
  library_costs = 0;
  path = EPT_GPU_PATH_GPU;
}

// A card that is stuck: a reset ends at its deadline, and one after it has come to itself ends well.
void a_card_is_stuck() {
  check::running("a card is stuck");
  World world(moe_test::config_of(2, 4, 2, 32, 6), 51, "ii", over("loopback"));
  world.good_steps(1);
  world.library->stick(true);
  for (uint32_t r = 0; r < 2; r++) {
    Error error;
    CHECK_EQ(ept_gpu_lanes_reset(&world.lanes[r], 300'000'000, &error), EPT_E_TIMEOUT);
  }
  world.library->stick(false);
  world.gpu->machine.run();
  world.reset();
  Step good = world.draw();
  const std::vector<Got> after = world.on_cpu(good);
  world.compare(good, after);
}

// Puts that are under way when a rank gives up: none of them lands after the reset, in a slot that begins anew.
void reset_with_puts_under_way() {
  check::running("a reset with puts under way");
  constexpr uint64_t kPatience = 200'000'000;
  World world(moe_test::config_of(3, 6, 2, 32, 7), 71, "iii", over("loopback"));
  for (int round = 0; round < 6; round++) {
    Step step = world.draw();
    step.lane = 0;
    const std::vector<Got> expected = world.on_cpu(step);
    std::vector<Bytes> routings(3);
    std::vector<Got> all(3);
    world.library->hold(true);
    for (uint32_t r = 0; r < 2; r++) world.send(step, r, routings[r]);  // rank 2 never does
    world.gpu->machine.run();
    world.have_patience(kPatience);
    world.receive(step, 0, routings[0], all[0], expected[0]);
    world.gpu->machine.run();
    world.have_patience(60 * moe_test::kSecond);
    Error error;
    CHECK_EQ(ept_gpu_moe_check(world.objects[0], 0, &error), EPT_E_FAULT);
    CHECK_HAS(error.text, "TIMEOUT in dispatch_recv");
    world.library->hold(round % 2);  // in every other round only the reset itself moves them
    world.reset();
    world.library->hold(false);
    Step good = world.draw();
    const std::vector<Got> after = world.on_cpu(good);
    world.compare(good, after);
  }
  CHECK(world.library->late() > 0);
}

// A peer that is gone ends the waits for it.
void lost() {
  check::running("a rank that is gone");
  World world(moe_test::config_of(2, 4, 2, 32, 6), 31, "ii", over("loopback"));
  FirstSend first(world);
  first.receive();
  const uint8_t active[] = {1, 0};
  Error error;
  OK(ept_arena_members(world.net->arenas[0], 1, active, 0, &error), error);
  world.gpu->machine.run();
  CHECK_EQ(ept_gpu_moe_check(world.objects[0], 0, &error), EPT_E_FAULT);
  CHECK_HAS(error.text, "rank 0 waited for rank 1, which is gone (EPT_E_PEER_LOST)");
}

}  // namespace

int main() {
  using moe_test::config_of;
  most_blocks = 8;  // more than messages
  steps("2 ranks", config_of(2, 6, 3, 64, 9), "ii", 8, 1);
  ept_moe_config padded = config_of(4, 9, 4, 24, 40);
  padded.alignment = 8;
  steps("4 ranks", padded, "iiii", 6, 2);
  most_blocks = 3;
  steps("two nodes of two ranks", padded, "BAAB", 6, 3);
  steps("two nodes, and a CPU rank", quantised(config_of(4, 6, 3, 272, 9)), "AABc", 6, 4);
  steps("a rank of a GPU without the library", padded, "iigi", 4, 5);
  steps("fp8, 8 ranks", quantised(config_of(8, 16, 4, 272, 6)), "iiiiiiii", 2, 6);
  // Each warp puts the part of a row that it sums, and no other.
  steps("rows of several steps", config_of(2, 5, 3, 2600, 5), "ii", 6, 8);
  CHECK(parts > 500);
  // Of what stands in the ring until it goes: sums of fp32, also of rows of 2 bytes, for which there is no room; scales
  // of a byte, and more of them than a warp has lanes.
  ept_moe_config summed = config_of(3, 4, 2, 2048, 60);
  summed.combine_dtype = EPT_DTYPE_F32;
  steps("sums in fp32", summed, "iii", 3, 9);
  ept_moe_config bytes = quantised(config_of(2, 4, 2, 4864, 6));
  bytes.scale_format = EPT_SCALES_UE8M0;
  steps("scales of a byte", bytes, "ii", 3, 10);
  chosen();
  the_rule();
  measured("measured: three ranks", "iii");
  measured("measured: two nodes and a CPU rank", "AABc");
  a_card_is_stuck();
  reset_with_puts_under_way();
  lost();
  return 0;
}
