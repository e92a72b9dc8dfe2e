// SPDX-License-Identifier: Apache-2.0
//
// Calls that are streamed, on a GPU of fibers (simt/): batches of many times what a region holds, in chunks that are
// granted, against a group of CPU ranks, bit for bit. Ranks whose memory is mapped, ranks over an engine, and both with
// CPU ranks in one step; long and short batches, and none; calls that are dropped; a rank that never comes.
#include "gpu_world.h"

using namespace gpu_test;

namespace {

moe_test::Options over(const char *plugin) {
  moe_test::Options options;
  options.plugin = plugin;
  return options;
}

// At most `tokens` a call, of which a region holds about `chunk`.
ept_moe_config streamed(ept_moe_config config, uint32_t tokens, uint32_t chunk) {
  ept_moe_config fits = config;
  fits.max_tokens = chunk;
  config.buffer_bytes = ept::moe::plan_of(ept::moe::Object(fits)).lane_bytes;
  config.max_tokens = tokens;
  const uint32_t at_once = ept::moe::Object(config).shape.chunk_tokens;
  CHECK(at_once >= 1 && 2 * at_once < tokens);
  return config;
}

void steps(const char *what, const ept_moe_config &config, const std::string &on, const moe_test::Options &options,
           int count, uint64_t seed) {
  check::running(what);
  World world(config, seed, on, options);
  // Over an engine messages are cut as a CPU rank cuts them; what is mapped needs no staging, and has fewer chunks.
  world.counts_all = on.find('m') == std::string::npos;
  uint64_t grants = 0;
  world.good_steps(count);
  for (uint32_t r = 0; r < config.world; r++) {
    ept_moe_stats stats{};
    stats.size = sizeof stats;
    Error error;
    if (world.on_gpu(r)) OK(ept_gpu_moe_stats_get(world.objects[r], &stats, &error), error);
    grants += stats.grants;
  }
  CHECK(config.world == 1 || grants > 0);
}

// Dispatches that nobody receives: the next call sends what is left of them, and grants what comes.
void dropped(const std::string &on, const moe_test::Options &options, uint64_t seed) {
  check::running("streamed dispatches that are dropped");
  World world(streamed(moe_test::config_of(uint32_t(on.size()), 6, 2, 32, 7), 60, 6), seed, on, options);
  for (int i = 0; i < 2; i++) {
    Step step = world.draw();
    std::vector<Step> others;
    for (int n = 0; n <= i; n++) {
      others.push_back(world.draw());
      others[n].lane = step.lane;
    }
    std::vector<std::vector<Bytes>> routings(others.size(), std::vector<Bytes>(on.size()));
    for (uint32_t r : world.order())
      for (size_t n = 0; n < others.size(); n++) world.send(others[n], r, routings[n][r]);
    world.gpu->machine.run();
    const std::vector<Got> expected = world.on_cpu(step);
    world.compare(step, expected);
  }
}

// A rank that never comes, or is masked, while others wait for its chunks and its grants; then a reset, and on.
void cut_short(const std::string &on, bool masks, uint64_t seed) {
  check::running(masks ? "a streamed call that a mask cuts" : "a streamed call of which a rank stays away");
  World world(streamed(moe_test::config_of(uint32_t(on.size()), 6, 2, 32, 7), 60, 6), seed, on, over("loopback"));
  for (int round = 0; round < (masks ? 1 : 2); round++) {
    Step good = world.draw();
    good.lane = 0;
    std::vector<Got> expected = world.on_cpu(good);
    world.compare(good, expected);
    Step step = world.draw();
    step.lane = 0;
    for (uint32_t r = 0; r < on.size(); r++) {
      RankStep &s = step.ranks[r];
      while (s.tokens < 50) s = world.draw().ranks[r];
      s.layout = EPT_LAYOUT_ROWS;
    }
    expected = world.on_cpu(step);
    std::vector<Got> all(on.size());
    std::vector<Bytes> routings(on.size());
    const auto stays = uint32_t(on.size() - 1);
    for (uint32_t r = 0; r < stays; r++) world.send(step, r, routings[r]);
    world.gpu->machine.run();
    if (!masks) world.have_patience(200'000'000);
    for (uint32_t r = 0; r < stays; r++) world.receive(step, r, routings[r], all[r], expected[r]);
    std::thread other([&] {
      Error error;
      for (uint32_t r = 0; r < stays && masks; r++)
        OK(ept_engine_mask(world.net->engines[r], stays, 1, "a test", &error), error);
    });
    world.gpu->machine.run();
    other.join();
    world.have_patience(60 * moe_test::kSecond);
    for (uint32_t r = 0; r < stays; r++) {
      Error error;
      CHECK_EQ(ept_gpu_moe_check(world.objects[r], 0, &error), EPT_E_FAULT);
      CHECK_HAS(error.text, masks ? "which is gone" : "TIMEOUT");
      CHECK_EQ(all[r].num_rows, 0);
    }
    if (masks) return;
    world.reset();
  }
  world.good_steps(1);
}

// Halves take what needs no grant; a longer batch is refused before anything is sent, and the group goes on.
void halves() {
  check::running("halves of a long batch");
  World world(streamed(moe_test::config_of(2, 4, 2, 32, 6), 60, 6), 71, "mm", over("loopback"));
  Step step = world.draw();
  RankStep &s = step.ranks[0];
  while (s.tokens < 50) s = world.draw().ranks[0];
  Bytes routing;
  routing.make(ept_gpu_routing_bytes(world.objects[0], s.tokens), 0);
  ept_dispatch_args args = world.dispatch_args(step, s, 0);
  args.whole = 0;
  Error error;
  CHECK_EQ(ept_gpu_moe_dispatch_send(world.objects[0], &args, routing.data(), world.stream(0, step.lane), &error),
           EPT_E_CAPACITY);
  CHECK_HAS(error.text, "call dispatch and combine whole");
  const std::vector<Got> expected = world.on_cpu(step);
  world.compare(step, expected);
}

}  // namespace

int main() {
  using moe_test::config_of;
  const moe_test::Options polite = over("loopback");
  steps("3 ranks that map each other's memory", streamed(config_of(3, 8, 3, 64, 9), 100, 8), "mmm", polite, 4, 1);
  ept_moe_config padded = streamed(config_of(4, 9, 4, 24, 40), 90, 12);
  padded.alignment = 8;
  steps("4 of them, padded", padded, "mmmm", polite, 2, 2);
  steps("one rank", streamed(config_of(1, 4, 2, 32, 9), 80, 6), "m", polite, 2, 3);
  steps("2 GPU ranks over an engine", streamed(config_of(2, 6, 3, 64, 9), 80, 6), "gg", polite, 3, 4);
  steps("a GPU and a CPU rank", streamed(config_of(2, 6, 3, 64, 9), 80, 6), "gc", polite, 3, 5);
  steps("both ways, and a CPU rank, under the adversary", padded, "mgmc", moe_test::adversary(3), 3, 6);
  ept_moe_config quantised = config_of(3, 6, 3, 272, 9);
  quantised.dispatch_dtype = EPT_DTYPE_E4M3;
  steps("fp8 over tcp", streamed(quantised, 50, 6), "gcg", over("tcp"), 2, 7);
  dropped("mm", polite, 20);
  dropped("gg", moe_test::adversary(4), 21);
  dropped("mgm", polite, 22);
  cut_short("mmm", false, 30);
  cut_short("mgm", false, 32);
  cut_short("ggg", true, 33);
  halves();
  return 0;
}
