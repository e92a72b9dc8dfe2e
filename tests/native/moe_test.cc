// SPDX-License-Identifier: Apache-2.0
//
// moe_test.cc: dispatch and combine over loopback, bit for bit against moe_model.h: worlds, formats, layouts, weights,
// several combines, cached routings, placement, abandoned steps, lanes on threads of their own, the adversary.
#include <algorithm>
#include <random>
#include <thread>

#include "moe_steps.h"

using namespace moe_test;

namespace {

std::vector<int32_t> shuffled_placement(uint32_t world, uint32_t experts, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<int32_t> placement(experts);
  for (int32_t &rank : placement) rank = int32_t(random() % world);  // uneven; a rank may hold none
  return placement;
}

void steps(const Group &group, ept_moe_config config, const std::vector<int32_t> &placement, uint64_t seed,
           uint32_t count, const Draw &how) {
  config.placement = placement.empty() ? nullptr : placement.data();
  const std::vector<ept_moe *> objects = group.create(config);
  group.run([&](uint32_t rank) {
    ept_moe_config mine = config;
    mine.rank = rank;
    Runner runner(objects[rank], mine, config.placement);
    for (uint32_t i = 0; i < count; i++) {
      Draw now = how;
      // The last step of each lane is whole, or the next AllToAll would wait for it; abandoned_and_grown has that.
      const uint32_t left = count - i;
      now.may_abandon = how.may_abandon && left > mine.lanes;
      Step step = draw(seed * 1000 + i, mine, now);
      if (left <= mine.lanes) step.lane = left - 1;
      runner.run(step);
    }
  });
  close_all(objects);
}

void formats(const Group &group, uint64_t seed, uint32_t count, const Draw &how) {
  const uint32_t world = group.world();
  ept_moe_config config = config_of(world, 2 * world + 1, 4, 64, how.max_tokens);
  steps(group, config, {}, seed, count, how);

  config = config_of(world, 3 * world, 3, 264, how.max_tokens);  // fp8: two blocks and a short one
  config.hidden = 272;
  config.dispatch_dtype = EPT_DTYPE_E4M3;
  config.caller_scale_bytes = 24;
  config.alignment = 8;
  steps(group, config, shuffled_placement(world, config.num_experts, seed), seed + 1, count, how);

  config = config_of(world, world, 2, 16, how.max_tokens);
  config.dtype = EPT_DTYPE_F32;
  config.dispatch_dtype = EPT_DTYPE_E4M3;
  config.combine_dtype = EPT_DTYPE_F16;
  config.scale_format = EPT_SCALES_UE8M0;
  config.alignment = 3;
  steps(group, config, {}, seed + 2, count, how);

  config = config_of(world, std::max(1u, world - 1), 32, 8, how.max_tokens);  // fewer experts than ranks, top-32
  config.dtype = config.dispatch_dtype = EPT_DTYPE_F16;
  config.combine_dtype = EPT_DTYPE_F32;
  steps(group, config, {}, seed + 3, count, how);
}

void polite(uint32_t world) {
  const Group group(world);
  formats(group, 10 + world, 12, {.max_tokens = 17});
}

void adversaries(uint32_t world, uint64_t first, uint64_t last) {
  for (uint64_t seed = first; seed < last; seed++) {
    const Group group(world, adversary(seed));
    formats(group, 100 + seed, 5, {.max_tokens = 9, .may_abandon = true});
  }
}

void abandoned(uint32_t world) {
  const Group group(world);
  formats(group, 50 + world, 25, {.max_tokens = 6, .may_abandon = true});
}

// Each lane by a thread of its own, and steps of two objects of different sizes in one arena.
void lanes_on_threads() {
  const Group group(3);
  const ept_moe_config small = config_of(3, 6, 2, 32, 5), large = config_of(3, 9, 4, 64, 21);
  const auto a = group.create(small);
  const auto b = group.create(large);  // the arena grows
  group.run([&](uint32_t rank) {
    std::vector<std::thread> threads;
    for (uint32_t lane = 0; lane < 2; lane++)
      threads.emplace_back([&, lane, rank] {
        ept_moe_config of_a = small, of_b = large;
        of_a.rank = of_b.rank = rank;
        Runner first(a[rank], of_a, nullptr), second(b[rank], of_b, nullptr);
        for (uint32_t i = 0; i < 20; i++) {
          Step step = draw(7000 + lane * 100 + i, of_a, {.max_tokens = 5, .may_abandon = true});
          step.lane = lane;
          first.run(step);
          step = draw(8000 + lane * 100 + i, of_b, {.max_tokens = 21});
          step.lane = lane;
          second.run(step);
        }
      });
    for (auto &thread : threads) thread.join();
  });
  close_all(a);
  close_all(b);
}

// An AllToAll is made while the lanes of another are in use by other threads.
void grows_while_in_use() {
  const Group group(2);
  const ept_moe_config small = config_of(2, 4, 2, 32, 8);
  const auto objects = group.create(small);
  group.run([&](uint32_t rank) {
    std::thread steps([&] {
      ept_moe_config mine = small;
      mine.rank = rank;
      Runner runner(objects[rank], mine, nullptr);
      for (uint32_t i = 0; i < 150; i++) runner.run(draw(9000 + i, mine, {.max_tokens = 8}));
    });
    for (uint32_t i = 1; i <= 4; i++) {
      ept_moe_config larger = config_of(2, 4, 2, 32, 8 << i);
      larger.rank = rank;
      larger.lanes = 2 + i / 2;
      ept_moe *moe = nullptr;
      Error error;
      OK(ept_moe_create(group.arenas[rank], &larger, &moe, &error), error);
      OK(ept_moe_close(moe, &error), error);
    }
    steps.join();
  });
  close_all(objects);
}

// The arena grows after a step whose second half never came.
void abandoned_and_grown() {
  const Group group(2);
  ept_moe_config config = config_of(2, 4, 2, 32, 8);
  for (uint32_t round = 0; round < 2; round++) {
    const auto objects = group.create(config);
    group.run([&](uint32_t rank) {
      ept_moe_config mine = config;
      mine.rank = rank;
      Runner runner(objects[rank], mine, nullptr);
      Step step = draw(60 + round, mine, {.max_tokens = 8});
      step.abandon = {1, 0};  // rank 0 sends and stops, rank 1 receives
      runner.run(step);
    });
    close_all(objects);
    config.max_tokens *= 2;
  }
}

}  // namespace

int main(int argc, char **argv) {
  if (argc == 3) {  // more seeds: moe_test FIRST LAST
    adversaries(3, strtoull(argv[1], nullptr, 10), strtoull(argv[2], nullptr, 10));
    return 0;
  }
  RUN(polite(1));
  RUN(polite(2));
  RUN(polite(4));
  RUN(polite(7));
  RUN(abandoned(2));
  RUN(abandoned(4));
  RUN(abandoned_and_grown());
  RUN(lanes_on_threads());
  RUN(grows_while_in_use());
  RUN(adversaries(1, 1, 2));
  RUN(adversaries(2, 1, 4));
  RUN(adversaries(4, 4, 6));
  return 0;
}
