// SPDX-License-Identifier: Apache-2.0
//
// moe_traffic.cc: messages, bytes and memory are what wire.h and the plan say, counted at the plugin.
#include <algorithm>

#include "moe_steps.h"

using namespace moe_test;

namespace {

struct Traffic {
  uint64_t operations = 0, bytes = 0, sends = 0;
};

Traffic counted(ept_engine *engine) {
  ept_engine_info info{};
  info.size = sizeof info;
  Error error;
  OK(ept_engine_info_get(engine, &info, &error), error);
  Traffic all;
  for (uint32_t i = 0; i < info.rails; i++) {
    ept_rail rail{};
    rail.size = sizeof rail;
    ept_rail_counters counters{};
    counters.size = sizeof counters;
    OK(ept_engine_rail(engine, i, &rail, &counters, &error), error);
    all.operations += counters.tx_operations;
    all.bytes += counters.tx_bytes;
    all.sends += counters.tx_sends;
  }
  return all;
}

// What a plain step writes: a message to every other rank in each phase, whatever the routing; a token goes to a rank
// once.
struct Predicted {
  uint64_t messages[2] = {}, bytes[2] = {}, rows[2] = {};
};

void predict(const Step &step, const ept_moe_config &config, Predicted &all) {
  const moe_model::Homes homes(config.world, config.num_experts, nullptr);
  const uint32_t me = config.rank, k = config.top_k;
  const uint64_t payload = config.hidden * moe_model::size_of(config.dispatch_dtype);
  const uint64_t row = (payload + 8 + 12ull * k + 15) / 16 * 16;  // wire.h
  for (uint32_t r = 0; r < config.world; r++) {
    if (r == me) continue;
    uint64_t out = 0, back = 0;
    for (const moe_model::Row &at : moe_model::rows_at(homes, r, k, step.inputs)) out += at.source == me;
    for (const moe_model::Row &at : moe_model::rows_at(homes, me, k, step.inputs)) back += at.source == r;
    all.messages[0]++;
    all.bytes[0] += 128 + (4ull * homes.held[r] + 63) / 64 * 64 + out * row;
    all.rows[0] += out;
    for (uint32_t i = 0; i < step.combines; i++) {
      const bool beside = step.row_weights && step.layouts[me] < EPT_LAYOUT_CONTIGUOUS;
      all.messages[1]++;
      all.bytes[1] += 128 + back * (config.hidden * moe_model::size_of(config.combine_dtype) +
                                    (beside ? (4 * k + 15) / 16 * 16 : 0));
      all.rows[1] += back;
    }
  }
}

void bytes_and_messages(uint32_t world) {
  const Group group(world);
  const ept_moe_config config = config_of(world, 3 * world + 1, 6, 64, 20);
  const auto objects = group.create(config);
  std::vector<Traffic> before(world), after(world);
  std::vector<Predicted> predicted(world);
  for (uint32_t r = 0; r < world; r++) before[r] = counted(group.engines[r]);
  group.run([&](uint32_t rank) {
    ept_moe_config mine = config;
    mine.rank = rank;
    Runner runner(objects[rank], mine, nullptr);
    for (uint32_t i = 0; i < 12; i++) {
      Step step = draw(40 + i, mine, {.max_tokens = 20});
      step.cached = false;
      step.combines = std::max(1u, step.combines);
      if (step.weights == Weights::late) step.weights = Weights::given;
      runner.run(step);
      predict(step, mine, predicted[rank]);
    }
  });
  for (uint32_t r = 0; r < world; r++) {
    after[r] = counted(group.engines[r]);
    ept_moe_stats stats{};
    CHECK_EQ(ept_moe_stats_get(objects[r], &stats), EPT_OK);
    for (int p = 0; p < 2; p++) {
      CHECK_EQ(stats.messages[p], predicted[r].messages[p]);
      CHECK_EQ(stats.bytes[p], predicted[r].bytes[p]);
      CHECK_EQ(stats.rows[p], predicted[r].rows[p]);
    }
    CHECK_EQ(stats.generations[0], 12);
    CHECK_EQ(stats.grants, 0);
    CHECK_EQ(stats.acks, 0);  // headers carry them all
    CHECK_EQ(stats.ack_waits, 0);
    CHECK_EQ(after[r].bytes - before[r].bytes, predicted[r].bytes[0] + predicted[r].bytes[1]);
    // Each message is one write. The engine's own grants of credits come on top: one for 64 immediates.
    const uint64_t messages = predicted[r].messages[0] + predicted[r].messages[1];
    const uint64_t operations = after[r].operations - before[r].operations;
    CHECK(operations >= messages);
    CHECK(operations - messages <= messages / 32 + world);
  }
  close_all(objects);
}

void memory_is_as_planned() {
  for (uint32_t world : {1u, 3u, 5u}) {
    ept_moe_config config = config_of(world, 7, 3, 128, 64);
    config.lanes = 3;
    ept_moe_plan plan{};
    Error error;
    for (bool half : {false, true}) {
      if (half) config.buffer_bytes = plan.lane_bytes / 2;
      OK(ept_moe_plan_get(&config, &plan, &error), error);
      CHECK_EQ(plan.arena_bytes, 3 * plan.lane_bytes);
      CHECK_EQ(plan.lane_bytes % uint64_t(sysconf(_SC_PAGESIZE)), 0);
      CHECK(plan.lane_bytes >= 2 * (plan.dispatch_recv + plan.dispatch_send + plan.combine_recv + plan.combine_send));
      if (half) CHECK(plan.lane_bytes <= config.buffer_bytes);
      CHECK_EQ(plan.chunk_tokens < 64, half);
      const Group group(world);
      const uint64_t before = group.registered(0);
      const auto objects = group.create(config);
      for (uint32_t r = 0; r < world; r++) CHECK_EQ(group.registered(r) - before, plan.arena_bytes);
      const auto again = group.create(config);  // shares the arena
      CHECK_EQ(group.registered(0) - before, plan.arena_bytes);
      close_all(objects);
      close_all(again);
    }
  }
}

// The figure of design.md: 64 ranks, 128 tokens of 7168, fp8 out and bf16 back, two slots.
void receive_memory_at_scale() {
  ept_moe_config config = config_of(64, 256, 8, 7168, 128);
  config.dispatch_dtype = EPT_DTYPE_E4M3;
  ept_moe_plan plan{};
  Error error;
  OK(ept_moe_plan_get(&config, &plan, &error), error);
  const double receive = 2.0 * double(plan.dispatch_recv + plan.combine_recv) / (1 << 20);
  const double send = 2.0 * double(plan.dispatch_send + plan.combine_send) / (1 << 20);
  printf("    receive %.1f MiB a lane, send staging %.1f MiB\n", receive, send);
  CHECK(receive < 400);
  CHECK_EQ(plan.max_rows, 64 * 128);
}

// Many ranks in one process: all placed right, and in the time that a test may take.
void many_ranks() {
  const uint32_t world = 48;
  const Group group(world);
  ept_moe_config config = config_of(world, 96, 8, 16, 4);
  config.lanes = 1;
  const auto objects = group.create(config);
  group.run([&](uint32_t rank) {
    ept_moe_config mine = config;
    mine.rank = rank;
    Runner runner(objects[rank], mine, nullptr);
    for (uint32_t i = 0; i < 3; i++) runner.run(draw(500 + i, mine, {.max_tokens = 4}));
  });
  close_all(objects);
}

}  // namespace

int main() {
  RUN(bytes_and_messages(2));
  RUN(bytes_and_messages(5));
  RUN(memory_is_as_planned());
  RUN(receive_memory_at_scale());
  RUN(many_ranks());
  return 0;
}
