// SPDX-License-Identifier: Apache-2.0
//
// moe_streaming.cc: calls longer than a lane's buffers: the same bits as with room for all, long ranks beside short
// ones, halves that refuse, abandoned streams, the adversary.
#include "moe_steps.h"

using namespace moe_test;

namespace {

// The least budget, so that positions hold a row or a few.
uint64_t least_budget(ept_moe_config config) {
  config.buffer_bytes = 1;
  ept_moe_plan plan{};
  Error error;
  CHECK_EQ(ept_moe_plan_get(&config, &plan, &error), EPT_E_INVALID);
  const char *says = strstr(error.text, "a lane needs ");
  CHECK(says != nullptr);
  return strtoull(says + strlen("a lane needs "), nullptr, 10);
}

void long_steps(const Group &group, ept_moe_config config, uint64_t seed, uint32_t count, const Draw &how) {
  const auto objects = group.create(config);
  group.run([&](uint32_t rank) {
    ept_moe_config mine = config;
    mine.rank = rank;
    Runner runner(objects[rank], mine, nullptr);
    for (uint32_t i = 0; i < count; i++) {
      Draw now = how;
      if (i + 1 == count) now.may_abandon = false;
      runner.run(draw(seed * 1000 + i, mine, now));
    }
    ept_moe_stats stats{};
    CHECK_EQ(ept_moe_stats_get(objects[rank], &stats), EPT_OK);
    if (config.world > 1 && !how.may_abandon) CHECK(stats.grants > 0);
  });
  close_all(objects);
}

void streams(uint32_t world, const Options &options, uint64_t seed, uint32_t count, uint32_t tokens, bool abandons) {
  const Group group(world, options);
  const Draw how = {.max_tokens = tokens, .may_abandon = abandons, .whole = true};
  ept_moe_config config = config_of(world, 2 * world + 1, 4, 64, tokens);
  config.buffer_bytes = least_budget(config);
  long_steps(group, config, seed, count, how);
  config.buffer_bytes = config.buffer_bytes * 2;  // positions of a few rows, short ranks packed in one chunk
  config.dispatch_dtype = EPT_DTYPE_E4M3;
  config.hidden = 144;
  config.buffer_bytes = least_budget(config) * 2;
  long_steps(group, config, seed + 1, count, how);
}

// Short ranks call the halves while one long rank calls whole.
void short_beside_long() {
  const Group group(3);
  ept_moe_config config = config_of(3, 6, 3, 64, 64);
  config.buffer_bytes = least_budget(config) * 2;
  ept_moe_plan plan{};
  Error error;
  OK(ept_moe_plan_get(&config, &plan, &error), error);
  CHECK(plan.chunk_tokens >= 2);
  CHECK(plan.chunk_tokens < 20);
  const auto objects = group.create(config);
  group.run([&](uint32_t rank) {
    ept_moe_config mine = config;
    mine.rank = rank;
    Runner runner(objects[rank], mine, nullptr);
    for (uint32_t i = 0; i < 30; i++) {
      Step step = draw(300 + i, mine, {.max_tokens = 64, .whole = true});
      for (uint32_t r = 1; r < 3; r++) {  // the others have few tokens
        moe_model::Input &input = step.inputs[r];
        input.tokens = std::min(input.tokens, plan.chunk_tokens);
        input.ids.resize(input.tokens * config.top_k);
        input.weights.resize(input.tokens * config.top_k);
        input.x.resize(input.tokens * config.hidden * 2);
      }
      step.whole = rank == 0;
      runner.run(step);
    }
  });
  close_all(objects);
}

// The halves say how to send a longer batch, and the group stays usable.
void halves_refuse() {
  const Group group(2);
  ept_moe_config config = config_of(2, 4, 2, 64, 64);
  config.buffer_bytes = least_budget(config) * 2;
  const auto objects = group.create(config);
  group.run([&](uint32_t rank) {
    ept_moe_config mine = config;
    mine.rank = rank;
    Step step = draw(1, mine, {.max_tokens = 64});
    std::vector<uint16_t> x(64 * 64 + 8);
    uint16_t *aligned = x.data() + (16 - reinterpret_cast<uintptr_t>(x.data()) % 16) % 16 / 2;
    std::vector<int32_t> ids(64 * 2, 1);
    ept_dispatch_args args{};
    args.size = sizeof args;
    args.x = tensor(aligned, EPT_DTYPE_BF16, {64, 64});
    args.topk_ids = tensor(ids.data(), EPT_DTYPE_I32, {64, 2});
    Error error;
    CHECK_EQ(ept_moe_dispatch_send(objects[rank], &args, &error), EPT_E_CAPACITY);
    CHECK_HAS(error.text, "64 tokens");
    CHECK_HAS(error.text, "call dispatch and combine whole");
    Runner runner(objects[rank], mine, nullptr);
    runner.run(draw(2, mine, {.max_tokens = 64, .whole = true}));
  });
  close_all(objects);
}

}  // namespace

int main(int argc, char **argv) {
  if (argc == 3) {
    for (uint64_t seed = strtoull(argv[1], nullptr, 10); seed < strtoull(argv[2], nullptr, 10); seed++)
      streams(2 + seed % 3, adversary(seed), seed, 4, 30, seed % 2);
    return 0;
  }
  RUN(streams(1, {}, 1, 10, 40, false));
  RUN(streams(2, {}, 2, 15, 40, false));
  RUN(streams(4, {}, 3, 15, 60, false));
  RUN(streams(7, {}, 4, 6, 60, false));
  RUN(short_beside_long());
  RUN(halves_refuse());
  RUN(streams(2, {}, 5, 25, 40, true));
  RUN(streams(3, {}, 6, 25, 40, true));
  RUN(streams(2, adversary(3), 7, 6, 30, false));
  RUN(streams(4, adversary(5), 8, 6, 30, true));
  return 0;
}
