// SPDX-License-Identifier: Apache-2.0
//
// Groups of GPU ranks that sleep: kernels as fibers (simt/), whose memory is given back and comes again at another
// address, while launches that were recorded before, as a captured graph has them, are made again after it, bit for
// bit. Where all map each other's memory, over an engine, pinned and in GPU memory, and mixed with CPU ranks.
#include "gpu_world.h"
#include "moe/arena.h"

using namespace gpu_test;

namespace {

moe_test::Options over(const char *plugin, const char *gpu = "0") {
  moe_test::Options options;
  options.plugin = plugin;
  if (gpu[0] != '0') options.values.emplace_back("gpu", gpu);
  return options;
}

// Every rank gets that code from the call, and these words.
void all_get(World &world, int32_t (*call)(ept_arena *, uint64_t, ept_error *), uint64_t timeout_ns, int32_t code,
             const char *says) {
  world.net->run([&](uint32_t r) {
    Error error;
    CHECK_EQ(call(world.net->arenas[r], timeout_ns, &error), code);
    CHECK_HAS(error.text, says);
  });
}

// One step of all ranks whose launches are recorded, and made again. Its tensors stay where they are. With `late` its
// weights come with combine, and before it the same dispatch is dropped, which a launch of one block sees to.
class Graph {
 public:
  Graph(World &of, bool late) : world_(of), step_(of.draw()), all_(of.config.world), routings_(of.config.world) {
    step_.late = late;
    expected_ = world_.on_cpu(step_);
    world_.lates.clear();
    world_.gpu->records = &launches_;
    for (uint32_t r = 0; r < world_.config.world; r++) {
      all_[r].arrival = expected_[r].arrival;
      world_.make(all_[r], step_.ranks[r], r, 0);
      world_.send(step_, r, routings_[r]);
    }
    // Into the same routing: one that was made anew would stand elsewhere than the first launch has it.
    for (uint32_t r = 0; r < world_.config.world && late; r++) again(r);
    for (uint32_t r = 0; r < world_.config.world; r++) world_.receive(step_, r, routings_[r], all_[r]);
    for (uint32_t r = 0; r < world_.config.world; r++) world_.sum(step_, r, routings_[r], all_[r]);
    world_.gpu->records = nullptr;
    lates_.swap(world_.lates);
    world_.gpu->machine.run();
    same();
  }
  void replay() {
    for (Got &got : all_) poison(got);
    world_.gpu->replay(launches_);
    world_.gpu->machine.run();
  }
  void same() const {
    for (uint32_t r = 0; r < world_.config.world; r++) {
      const ept_arrival &a = expected_[r].arrival;
      const uint64_t arrival[] = {a.rows, a.max_rank_rows, a.contiguous_rows, a.max_expert_rows};
      world_.same(step_.ranks[r], expected_[r], all_[r], arrival);
    }
  }
  // As a faulted lane has it.
  void blank() const {
    for (const Got &got : all_) {
      CHECK_EQ(got.num_rows, 0);
      for (uint64_t i = 0; i < got.y.size; i++) CHECK(got.y.data()[i] == 0);
      for (uint64_t i = 0; i < got.x.size; i++) CHECK(got.x.data()[i] == 0);
    }
  }

 private:
  void again(uint32_t r) {
    Error error;
    void *const on = world_.stream(r, step_.lane);
    const ept_dispatch_args args = world_.dispatch_args(step_, step_.ranks[r], 0);
    OK(ept_gpu_moe_drain(world_.objects[r], step_.lane, EPT_PHASE_DISPATCH, on, &error), error);
    OK(ept_gpu_moe_dispatch_send(world_.objects[r], &args, routings_[r].data(), on, &error), error);
  }
  static void poison(Got &got) {
    for (Bytes *bytes : {&got.x, &got.scales, &got.y}) memset(bytes->data(), 0xee, bytes->size);
    for (auto *words : {&got.counts, &got.offsets, &got.ids, &got.source}) std::fill(words->begin(), words->end(), -7);
    std::fill(got.weights.begin(), got.weights.end(), -7.0f);
    std::fill(got.sums.begin(), got.sums.end(), -7.0f);
    got.num_rows = -7;
  }

  World &world_;
  Step step_;
  std::vector<Got> all_, expected_;
  std::vector<Bytes> routings_;
  std::deque<Bytes> lates_;
  std::vector<simt::HostGpu::Launched> launches_;
};

// Bytes of lanes that a rank has registered: they go, and nothing else does.
uint64_t lanes_of(const World &world, uint32_t r) {
  const ept::moe::Arena &arena = *world.net->arenas[r]->arena;
  return arena.lanes.size() * arena.map.bytes(ept::moe::page_bytes());
}

void sleep_once(World &world, const std::vector<Graph *> &graphs, bool replayed) {
  const size_t shown = world.gpu->shown();
  const int32_t pinned = world.gpu->pinned;
  std::vector<uint64_t> registered;
  for (uint32_t r = 0; r < world.config.world; r++) registered.push_back(world.net->registered(r));
  world.arenas(ept_arena_suspend);
  world.arenas(ept_arena_suspend);  // nothing more to give back
  CHECK(shown > 0);
  CHECK_EQ(world.gpu->shown(), size_t(0));
  int32_t lanes = 0;
  for (uint32_t r = 0; r < world.config.world; r++) {
    CHECK_EQ(world.net->registered(r), registered[r] - lanes_of(world, r));
    if (world.on_gpu(r) && world.lanes[r].lanes->over_engine()) lanes += int32_t(world.lanes[r].lanes->lanes());
  }
  CHECK_EQ(world.gpu->pinned, lanes);  // the words of their signals
  Error error;
  for (uint32_t r = 0; r < world.config.world; r++) {
    if (!world.on_gpu(r)) continue;
    CHECK_EQ(ept_gpu_moe_check(world.objects[r], 0, &error), EPT_E_SUSPENDED);
    CHECK_EQ(ept_gpu_moe_members(world.objects[r], 0, 0, nullptr, world.stream(r, 0), &error), EPT_E_SUSPENDED);
    CHECK_EQ(ept_gpu_moe_drain(world.objects[r], 0, 0, world.stream(r, 0), &error), EPT_E_SUSPENDED);
    CHECK_HAS(error.text, "group is suspended");
  }
  for (Graph *graph : graphs) {
    if (!replayed) continue;
    graph->replay();
    graph->blank();
  }
  world.arenas(ept_arena_resume);
  world.arenas(ept_arena_resume);
  CHECK_EQ(world.gpu->shown(), shown);
  CHECK_EQ(world.gpu->pinned, pinned);
  for (uint32_t r = 0; r < world.config.world; r++) CHECK_EQ(world.net->registered(r), registered[r]);
}

void sleeps(const char *what, const ept_moe_config &config, const std::string &on, const moe_test::Options &options,
            uint64_t seed, uint32_t home = 0) {
  check::running(what);
  home_wished = home;
  World world(config, seed, on, options);
  home_wished = 0;
  const bool graphs = on.find('c') == std::string::npos;
  std::vector<std::unique_ptr<Graph>> owned;
  std::vector<Graph *> all;
  world.good_steps(2);
  for (bool late : {false, true}) {
    if (!graphs) break;
    owned.push_back(std::make_unique<Graph>(world, late));
    all.push_back(owned.back().get());
  }
  for (int round = 0; round < 1; round++) {
    sleep_once(world, all, round != 0);
    for (Graph *graph : all) {
      graph->replay();
      graph->same();
    }
    world.good_steps(2);
  }
  world.reset();
  world.good_steps(1);
  sleep_once(world, all, true);
  for (Graph *graph : all) {
    graph->replay();
    graph->same();
  }
  world.good_steps(1);
}

// A step under way, a fault, and no memory: told to every rank, and the group goes on.
void in_the_way(const std::string &on, uint64_t seed) {
  check::running("what a suspend or a resume can't do now");
  World world(moe_test::config_of(uint32_t(on.size()), 6, 2, 32, 7), seed, on, over("loopback"));
  world.good_steps(1);
  {
    Step step = world.draw();
    const std::vector<Got> expected = world.on_cpu(step);
    std::vector<Got> all(on.size());
    std::vector<Bytes> routings(on.size());
    for (uint32_t r = 0; r < on.size(); r++) world.send(step, r, routings[r]);
    world.gpu->machine.run();
    all_get(world, ept_arena_suspend, 300'000'000, EPT_E_TIMEOUT, "to suspend the group");
    for (uint32_t r = 0; r < on.size(); r++) {
      world.receive(step, r, routings[r], all[r], expected[r]);
      world.sum(step, r, routings[r], all[r]);
    }
    world.gpu->machine.run();
    for (uint32_t r = 0; r < on.size(); r++) {
      const ept_arrival &a = expected[r].arrival;
      const uint64_t arrival[] = {a.rows, a.max_rank_rows, a.contiguous_rows, a.max_expert_rows};
      world.same(step.ranks[r], expected[r], all[r], arrival);
    }
  }
  world.arenas(ept_arena_suspend);
  world.gpu->is_full = true;
  for (int again = 0; again < 2; again++) {
    all_get(world, ept_arena_resume, 60 * moe_test::kSecond, EPT_E_NOMEM, "has no memory left");
    CHECK_EQ(world.gpu->shown(), size_t(0));
    Error error;
    CHECK_EQ(ept_gpu_moe_check(world.objects[0], 0, &error), EPT_E_SUSPENDED);
  }
  world.gpu->is_full = false;
  world.arenas(ept_arena_resume);
  world.good_steps(2);
  {
    Step step = world.draw();
    Bytes routing;
    Got got;
    step.lane = 0;
    step.ranks[0].layout = EPT_LAYOUT_ROWS;
    world.have_patience(100'000'000);
    world.send(step, 0, routing);
    world.make(got, step.ranks[0], 0, 0);
    world.receive(step, 0, routing, got);
    world.gpu->machine.run();
    world.have_patience(60 * moe_test::kSecond);
    all_get(world, ept_arena_suspend, 60 * moe_test::kSecond, EPT_E_FAULT, "reset first");
  }
  world.reset();
  world.arenas(ept_arena_suspend);  // and is closed asleep
}

// A symmetric heap keeps what it has: said on every rank, and nothing has changed.
void of_a_heap() {
  check::running("lanes in a symmetric heap");
  World world(moe_test::config_of(2, 6, 2, 32, 7), 80, "ii", over("loopback"));
  world.good_steps(1);
  all_get(world, ept_arena_suspend, 60 * moe_test::kSecond, EPT_E_UNSUPPORTED, "symmetric heap");
  world.good_steps(1);
}

ept_moe_config streamed(ept_moe_config config, uint32_t tokens, uint32_t chunk) {
  ept_moe_config fits = config;
  fits.max_tokens = chunk;
  config.buffer_bytes = ept::moe::plan_of(ept::moe::Object(fits)).lane_bytes;
  config.max_tokens = tokens;
  return config;
}

}  // namespace

int main() {
  using moe_test::config_of;
  ept_moe_config fp8 = config_of(3, 6, 3, 272, 9);
  fp8.dispatch_dtype = EPT_DTYPE_E4M3;
  sleeps("ranks that map each other's memory", fp8, "mmm", over("loopback"), 1);
  sleeps("ranks over an engine, pinned", config_of(2, 6, 3, 64, 9), "gg", over("loopback"), 2);
  sleeps("ranks over an engine in GPU memory by address", config_of(2, 6, 3, 64, 9), "gg", over("loopback", "1"), 3, 1);
  sleeps("the same as a dmabuf, and a CPU rank", config_of(3, 6, 3, 64, 9), "gcg", over("loopback", "2"), 4, 1);
  sleeps("ranks of both ways and a CPU rank, under the adversary", config_of(4, 9, 4, 24, 20), "mgmc",
         moe_test::adversary(3), 5);
  sleeps("over tcp, with a CPU rank", fp8, "gcg", over("tcp"), 6);
  sleeps("streamed calls, mapped", streamed(config_of(2, 6, 2, 32, 7), 60, 6), "mm", over("loopback"), 7);
  sleeps("streamed calls over an engine", streamed(config_of(2, 6, 2, 32, 7), 60, 6), "gg", over("loopback"), 8);
  in_the_way("mm", 70);
  in_the_way("gg", 71);
  of_a_heap();
  return 0;
}
