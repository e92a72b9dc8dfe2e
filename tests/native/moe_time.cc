// SPDX-License-Identifier: Apache-2.0
//
// moe_time.cc [PLUGIN [RANKS [TOKENS [fp8]]]]: not a test; where the time of a step goes. Ranks are threads of this
// process.
#include <algorithm>
#include <barrier>
#include <chrono>
#include <random>

#include "moe_group.h"
#include "moe_model.h"

using namespace moe_test;

namespace {

using Clock = std::chrono::steady_clock;
constexpr int kWarm = 5, kTimed = 30, kParts = 5;
const char *const kNames[kParts] = {"dispatch_send", "dispatch_wait", "dispatch_recv", "combine_send", "combine_recv"};

struct Aligned {
  std::vector<uint8_t> bytes;
  uint8_t *at;
  explicit Aligned(size_t n) : bytes(n + 64) {
    at = bytes.data() + (64 - reinterpret_cast<uintptr_t>(bytes.data()) % 64) % 64;
  }
};

void rank_loop(uint32_t rank, ept_moe *moe, const ept_moe_config &config, uint32_t tokens, std::barrier<> &together,
               std::vector<std::array<double, kParts + 1>> &times) {
  std::mt19937_64 random(rank);
  const int64_t hidden = config.hidden, k = config.top_k;
  Aligned x(tokens * size_t(hidden) * 2), y(tokens * size_t(hidden) * 2);
  for (size_t i = 0; i < tokens * size_t(hidden); i++)
    moe_model::put(x.at + 2 * i, float(int64_t(random() % 2000) - 1000) / 512.0f, EPT_DTYPE_BF16);
  std::vector<int32_t> ids(tokens * size_t(k));
  for (uint32_t t = 0; t < tokens; t++)
    for (uint32_t i = 0; i < k; i++) {
      int32_t &id = ids[t * size_t(k) + i];
      do id = int32_t(random() % config.num_experts);
      while (std::find(&ids[t * size_t(k)], &id, id) != &id);
    }
  std::vector<float> weights(tokens * size_t(k), 0.125f);
  const size_t wire = moe_model::size_of(config.dispatch_dtype);
  const auto rows = int64_t(config.world * tokens * uint32_t(k));
  Aligned out(size_t(rows * hidden) * wire), expert_out(size_t(rows * hidden) * 2);
  std::vector<float> scales(size_t(rows) * ((hidden + 127) / 128));
  for (int i = 0; i < kWarm + kTimed; i++) {
    Error error;
    ept_dispatch_args args{};
    args.size = sizeof args;
    args.x = tensor(x.at, EPT_DTYPE_BF16, {tokens, hidden});
    args.topk_ids = tensor(ids.data(), EPT_DTYPE_I32, {tokens, k});
    args.topk_weights = tensor(weights.data(), EPT_DTYPE_F32, {tokens, k});
    together.arrive_and_wait();
    std::array<Clock::time_point, kParts + 1> at;
    at[0] = Clock::now();
    OK(ept_moe_dispatch_send(moe, &args, &error), error);
    at[1] = Clock::now();
    ept_arrival arrival{};
    arrival.size = sizeof arrival;
    OK(ept_moe_dispatch_wait(moe, 0, &arrival, &error), error);
    at[2] = Clock::now();
    ept_dispatch_outputs to{};
    to.size = sizeof to;
    to.layout = EPT_LAYOUT_CONTIGUOUS;
    const auto n = int64_t(arrival.contiguous_rows);
    to.x = tensor(out.at, config.dispatch_dtype, {n, hidden});
    if (arrival.scale_bytes) to.scales = tensor(scales.data(), EPT_DTYPE_F32, {n, arrival.scale_bytes / 4});
    ept_routing *routing = nullptr;
    OK(ept_moe_dispatch_recv(moe, 0, &to, &routing, &error), error);
    at[3] = Clock::now();
    ept_combine_args back{};
    back.size = sizeof back;
    back.routing = routing;
    back.layout = EPT_LAYOUT_CONTIGUOUS;
    back.expert_out = tensor(wire == 2 ? out.at : expert_out.at, EPT_DTYPE_BF16, {n, hidden});
    OK(ept_moe_combine_send(moe, &back, &error), error);
    at[4] = Clock::now();
    const ept_tensor result = tensor(y.at, EPT_DTYPE_BF16, {tokens, hidden});
    OK(ept_moe_combine_recv(moe, 0, &result, nullptr, &error), error);
    at[5] = Clock::now();
    ept_routing_release(routing);
    if (i < kWarm) continue;
    std::array<double, kParts + 1> took{};
    for (int p = 0; p < kParts; p++)
      took[size_t(p)] = std::chrono::duration<double>(at[size_t(p) + 1] - at[size_t(p)]).count() * 1e3;
    took[kParts] = std::chrono::duration<double>(at[kParts] - at[0]).count() * 1e3;
    times.push_back(took);
  }
}

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + long(values.size() / 2), values.end());
  return values[values.size() / 2];
}

}  // namespace

int main(int argc, char **argv) {
  Options options;
  options.plugin = argc > 1 ? argv[1] : "loopback";
  const auto world = uint32_t(argc > 2 ? atoi(argv[2]) : 4), tokens = uint32_t(argc > 3 ? atoi(argv[3]) : 128);
  const Group group(world, options);
  ept_moe_config config = config_of(world, 256, 8, 7168, tokens);
  config.threads = 0;
  if (argc > 4) config.dispatch_dtype = EPT_DTYPE_E4M3;
  const auto objects = group.create(config);
  std::barrier<> together(world);
  std::vector<std::vector<std::array<double, kParts + 1>>> times(world);
  group.run([&](uint32_t rank) {
    ept_moe_config mine = config;
    mine.rank = rank;
    rank_loop(rank, objects[rank], mine, tokens, together, times[rank]);
  });
  printf("%s, %u ranks, %u tokens, 7168, top-8 of 256, %s: ms, slowest rank, median of %d\n", options.plugin.c_str(),
         world, tokens, argc > 4 ? "fp8 out" : "bf16", kTimed);
  for (int p = 0; p <= kParts; p++) {
    std::vector<double> slowest;
    for (int i = 0; i < kTimed; i++) {
      double most = 0;
      for (const auto &of_rank : times) most = std::max(most, of_rank[size_t(i)][size_t(p)]);
      slowest.push_back(most);
    }
    printf("  %-14s %8.3f\n", p < kParts ? kNames[p] : "all", median(slowest));
  }
  ept_moe_stats stats{};
  ept_moe_stats_get(objects[0], &stats);
  printf("  rank 0 sent %.2f MB a step\n", double(stats.bytes[0] + stats.bytes[1]) / (kWarm + kTimed) / 1e6);
  close_all(objects);
  return 0;
}
