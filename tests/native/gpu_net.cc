// SPDX-License-Identifier: Apache-2.0
//
// GPU ranks over an engine: kernels as fibers (simt/) pack into lanes, their proxy threads write, and what comes is
// read where it landed. Groups of GPU ranks, of GPU and CPU ranks, and of GPU ranks of which some map each other's
// memory, in one step, against a group of CPU ranks, bit for bit; over loopback, polite and under the adversary, and
// over tcp.
//
//   gpu_net COUNT [FIRST]     so many seeds, and nothing else: what a group, its shape and its steps are, is drawn
#include "gpu_world.h"

using namespace gpu_test;

namespace {

moe_test::Options over(const char *plugin) {
  moe_test::Options options;
  options.plugin = plugin;
  return options;
}

void steps(const char *what, const ept_moe_config &config, const std::string &on, const moe_test::Options &options,
           int count, uint64_t seed) {
  check::running(what);
  World world(config, seed, on, options);
  for (uint32_t r = 0; r < config.world; r++)
    if (world.on_gpu(r)) CHECK(world.lanes[r].lanes->over_engine());
  world.counts_all = true;
  world.good_steps(count);
}

// Those of one node map each other's memory, and nobody else's; what one of them sends takes both ways in one step.
void nodes() {
  const char on[] = "2112";
  ept_moe_config config = moe_test::config_of(4, 9, 4, 24, 40);
  config.alignment = 8;
  steps("two nodes of two GPU ranks", config, on, over("loopback"), 5, 5);
  World world(config, 6, on, over("loopback"));
  for (uint32_t r = 0; r < 4; r++)
    for (uint32_t other = 0; other < 4; other++) CHECK_EQ(world.lanes[r].lanes->maps(other), on[r] == on[other]);
}

uint64_t copied() {
  return reinterpret_cast<uint64_t (*)()>(ept::cuda::symbol("stand_in_copied"))();  // stand_in_driver.cc
}

// Lanes stand where the backend's caps, the GPU and the caller have it; wherever, the bits are the CPU's.
void homes(const std::string &on, moe_test::Options options, const char *gpu, uint32_t wish, bool orders,
           const char *says, uint64_t seed) {
  check::running((std::string("lanes ") + says).c_str());
  options.values.emplace_back("gpu", gpu);
  const bool on_gpu = strstr(says, "on the GPU") != nullptr;
  const uint64_t before = copied();
  home_wished = wish;
  gpu_orders_network = orders;
  {
    World world(moe_test::config_of(uint32_t(on.size()), 9, 3, 32, 20), seed, on, options);
    const auto ranks = uint32_t(on.size() - size_t(std::count(on.begin(), on.end(), 'c')));
    const uint32_t lanes = ranks * world.config.lanes;
    CHECK_EQ(world.gpu->pins, on_gpu ? lanes : 2 * lanes);  // the words of signals are pinned, wherever rows are
    CHECK_EQ(world.gpu->described, !on_gpu ? 0 : gpu[0] == '1' ? EPT_MEMORY_CUDA : EPT_MEMORY_DMABUF);
    for (uint32_t r = 0; r < on.size(); r++) {
      if (on[r] == 'c') continue;
      char text[300];
      ept_gpu_lanes_home(&world.lanes[r], text, sizeof text);
      CHECK_HAS(text, says);
    }
    world.good_steps(3);
    world.reset();
    world.good_steps(1);
  }
  CHECK_EQ(copied() > before, on_gpu);
  home_wished = 0;
  gpu_orders_network = true;
}

// Told to every rank, and the group goes on.
void no_home() {
  check::running("GPU memory that is insisted on where there is none");
  Group net(2);
  const auto gpu = std::make_shared<simt::HostGpu>(1, 1000);
  net.run([&](uint32_t r) {
    ept_moe_config config = moe_test::config_of(2, 6, 2, 32, 7);
    config.rank = r;
    ept_gpu_config how{};
    how.size = sizeof how;
    how.threads = 64;
    how.process = 7;
    how.memory = r == 0;
    for (int again = 0; again < 2; again++) {
      uint32_t number = 0;
      int32_t code = EPT_OK;
      std::string text;
      try {
        (void)ept::moe::cuda::join(net.arenas[r]->arena, how, config, nullptr, [&](int32_t) { return gpu; }, &number);
      } catch (const ept::moe::Failure &failure) {
        code = failure.error.code;
        text = failure.error.text;
      }
      CHECK_EQ(code, again ? EPT_OK : EPT_E_UNSUPPORTED);
      if (!again) CHECK_HAS(text.c_str(), "EPT_GPU_MEMORY=device: the backend takes no GPU memory");
      how.memory = 0;
    }
  });
}

ept_moe_config quantised(ept_moe_config config) {
  config.dispatch_dtype = EPT_DTYPE_E4M3;
  return config;
}

// Dispatches, and their sums, that are never received: neither side waits for a slot that the other has read already.
// Without acks, or without a look at headers that nobody receives, these end at their deadline.
void abandoned(const std::string &on, const moe_test::Options &options, uint64_t seed) {
  check::running("dispatches that are never received");
  World world(moe_test::config_of(uint32_t(on.size()), 6, 2, 32, 7), seed, on, options);
  for (int i = 0; i < 4; i++) {
    Step step = world.draw();
    const int before = 1 + i;
    std::vector<Step> others;
    for (int n = 0; n < before; n++) {
      others.push_back(world.draw());
      others[n].lane = step.lane;
    }
    std::vector<std::vector<Bytes>> routings(before, std::vector<Bytes>(on.size()));
    std::vector<std::thread> threads;
    for (uint32_t r = 0; r < on.size(); r++) {
      if (world.on_gpu(r)) {
        for (int n = 0; n < before; n++) world.send(others[n], r, routings[n][r]);
        continue;
      }
      threads.emplace_back([&, r] {
        for (Step &other : others) {
          Error error;
          const ept_dispatch_args args = world.dispatch_args(other, other.ranks[r], -1);
          OK(ept_moe_dispatch_send(world.net_objects[r], &args, &error), error);
        }
      });
    }
    world.gpu->machine.run();
    for (std::thread &thread : threads) thread.join();
    const std::vector<Got> expected = world.on_cpu(step);
    world.compare(step, expected);
  }
}

// A rank that never sends, on either side; a reset brings all to one generation, whatever each has posted and read.
void late(const std::string &on, uint32_t who, uint64_t seed) {
  check::running("a rank that never sends");
  constexpr uint64_t kPatience = 300'000'000;
  World world(moe_test::config_of(uint32_t(on.size()), 6, 2, 32, 7), seed, on, over("loopback"));
  for (int round = 0; round < 3; round++) {
    for (int i = 0; i < round; i++) {
      Step good = world.draw();
      good.lane = 0;
      const std::vector<Got> expected = world.on_cpu(good);
      world.compare(good, expected);
    }
    Step step = world.draw();
    step.lane = 0;
    for (RankStep &s : step.ranks) s.layout = EPT_LAYOUT_ROWS;
    const std::vector<Got> expected = world.on_cpu(step);
    std::vector<Got> all(on.size());
    std::vector<Bytes> routings(on.size());
    for (uint32_t r = 0; r < on.size(); r++) {
      if (r == who) continue;
      if (!world.on_gpu(r)) {  // sends, and never receives
        Error error;
        const ept_dispatch_args args = world.dispatch_args(step, step.ranks[r], -1);
        OK(ept_moe_dispatch_send(world.net_objects[r], &args, &error), error);
        continue;
      }
      world.send(step, r, routings[r]);
    }
    world.gpu->machine.run();
    world.have_patience(kPatience);  // of the receiving half alone
    for (uint32_t r = 0; r < on.size(); r++) {
      if (r == who || !world.on_gpu(r)) continue;
      world.receive(step, r, routings[r], all[r], expected[r]);
    }
    world.gpu->machine.run();
    world.have_patience(60 * moe_test::kSecond);
    for (uint32_t r = 0; r < on.size(); r++) {
      if (r == who || !world.on_gpu(r)) continue;
      Error error;
      CHECK_EQ(ept_gpu_moe_check(world.objects[r], step.lane, &error), EPT_E_FAULT);
      CHECK_HAS(error.text, "TIMEOUT in dispatch_recv");
      CHECK_EQ(all[r].num_rows, 0);
    }
    world.reset();
  }
}

// A list (wire.h) from a rank whose memory isn't mapped here names nothing that could be read.
void listed() {
  check::running("a list where rows should be");
  World world(moe_test::config_of(2, 4, 2, 32, 6), 63, "gc", over("loopback"));
  FirstSend first(world);
  Error error;
  const ept_dispatch_args args = world.dispatch_args(first.step, first.step.ranks[1], -1);
  OK(ept_moe_dispatch_send(world.net_objects[1], &args, &error), error);
  world.gpu->machine.run();

  const ept::moe::cuda::LaneTable &lane = world.lanes[0].lanes->table(0);
  const ept::moe::Shape &shape = world.objects[0]->object->object.shape;
  auto *header = reinterpret_cast<ept_moe_header *>(lane.in[1] + lane.map.recv(EPT_PHASE_DISPATCH, 0) +
                                                    shape.dispatch_region(1).offset);
  while (!ept::device::reached(ept::device::Hardware::acquire_system(lane.words[1]), 1)) std::this_thread::yield();
  CHECK_EQ(header->magic, EPT_MOE_MAGIC);
  header->flags |= EPT_MOE_LISTED;

  first.receive();
  world.gpu->machine.run();
  CHECK_EQ(ept_gpu_moe_check(world.objects[0], 0, &error), EPT_E_FAULT);
  CHECK_HAS(error.text, "the message of rank 1 is not of this step (its list of rows in memory that isn't mapped)");
  CHECK_EQ(first.got.num_rows, 0);
  world.reset();
  world.good_steps(1);
}

// A peer that is gone ends the waits for it long before their deadline.
void lost() {
  check::running("a rank that is gone");
  World world(moe_test::config_of(2, 4, 2, 32, 6), 31, "gg", over("loopback"));
  FirstSend first(world);
  first.receive();
  std::thread other([&] {
    Error error;
    OK(ept_engine_mask(world.net->engines[0], 1, 1, "a test", &error), error);
  });
  world.gpu->machine.run();
  other.join();
  Error error;
  CHECK_EQ(ept_gpu_moe_check(world.objects[0], 0, &error), EPT_E_FAULT);
  CHECK_HAS(error.text, "rank 0 waited for rank 1, which is gone (EPT_E_PEER_LOST)");
  CHECK_EQ(first.got.num_rows, 0);
}

// What can't be is refused on every rank alike, and the group goes on.
void refused() {
  check::running("what GPU ranks over an engine refuse");
  World world(moe_test::config_of(2, 4, 2, 32, 6), 41, "gc", over("loopback"));
  const auto both = [&](const ept_moe_config &config, bool swapped, int32_t code, const char *says) {
    world.net->run([&](uint32_t r) {
      Error error;
      ept_moe_config mine = config;
      mine.rank = r;
      int32_t got = EPT_OK;
      if (world.on_gpu(r) != swapped) {
        try {
          uint32_t number = 0;
          ept_gpu_config how{};
          how.size = sizeof how;
          how.threads = 64;
          how.process = 8;
          (void)world.join(r, mine, how, world.lanes[r].lanes, &number);
        } catch (const ept::moe::Failure &failure) {
          got = failure.error.code;
          snprintf(error.text, sizeof error.text, "%s", failure.error.text);
        }
      } else {
        ept_moe *object = nullptr;
        got = ept_moe_create(world.net->arenas[r], &mine, &object, &error);
        if (object) ept_moe_close(object, nullptr);
      }
      CHECK_HAS(error.text, says);
      CHECK(got == code || got == EPT_E_MISMATCH);  // the other rank's refusal
    });
  };
  ept_moe_config larger = world.config;
  larger.max_tokens = 60;
  both(larger, false, EPT_E_UNSUPPORTED, "make the largest AllToAll of the group first");
  both(world.config, true, EPT_E_UNSUPPORTED, "make a group for each");
  world.good_steps(2);
}

// Ranks of one process whose streams may share a connection: told before any of their kernels waits for another.
void few_connections() {
  check::running("ranks of one process with few connections");
  Group net(3);
  const auto gpu = std::make_shared<simt::HostGpu>(1, 1000);
  gpu->streams = 31;
  net.run([&](uint32_t r) {
    ept_moe_config config = moe_test::config_of(3, 6, 2, 32, 7);
    config.rank = r;
    Error error;
    int32_t code = EPT_OK;
    if (r == 2) {
      ept_moe *object = nullptr;
      code = ept_moe_create(net.arenas[r], &config, &object, &error);
    } else {
      ept_gpu_config how{};
      how.size = sizeof how;
      how.threads = 64;
      how.process = 7;
      uint32_t number = 0;
      try {
        (void)ept::moe::cuda::join(net.arenas[r]->arena, how, config, nullptr, [&](int32_t) { return gpu; }, &number);
      } catch (const ept::moe::Failure &failure) {
        code = failure.error.code;
        snprintf(error.text, sizeof error.text, "%s", failure.error.text);
      }
    }
    CHECK_EQ(code, EPT_E_CONFIG);
    CHECK_HAS(error.text, "CUDA_DEVICE_MAX_CONNECTIONS is 31 here: set it to 32");
  });
}

void drawn(uint64_t seed) {
  check::running(("seed " + std::to_string(seed)).c_str());
  Random random(seed);
  const auto ranks = uint32_t(1 + below(random, 5)), experts = uint32_t(1 + below(random, 20));
  // Ranks that all map each other, ranks of two nodes, and those behind the engine.
  const std::string kinds = below(random, 2) ? "mmgc" : "1122c";
  std::string on;
  for (uint32_t r = 0; r < ranks; r++) on += kinds[below(random, kinds.size())];
  if (on.find_first_not_of('c') == std::string::npos) on[below(random, ranks)] = kinds[0];
  const auto top_k = uint32_t(1 + below(random, std::min(experts, 6u)));
  const auto hidden = uint32_t(16 * (1 + below(random, 30)));
  ept_moe_config config = moe_test::config_of(ranks, experts, top_k, hidden, uint32_t(1 + below(random, 90)));
  config.lanes = uint32_t(1 + below(random, 2));
  config.alignment = 1u << below(random, 4);
  if (below(random, 3) == 0) config = quantised(config);
  World world(config, seed, on, below(random, 2) ? moe_test::adversary(seed) : over("loopback"));
  // As if some of those that are mapped were on other GPUs, where rows are stored; or as a launch that was captured
  // when nobody was mapped.
  for (uint32_t r = 0; r < ranks && below(random, 2); r++)
    for (uint32_t l = 0; world.on_gpu(r) && l < config.lanes; l++) {
      auto &table = const_cast<ept::moe::cuda::LaneTable &>(world.lanes[r].lanes->table(l));
      if (below(random, 4) == 0) table.lists = 0;
      for (uint32_t other = 0; other < ranks; other++) {
        auto &path = const_cast<ept_path &>(table.paths[other]);
        if (path.kind == EPT_DEVICE_MAPPED) path.memory = uint32_t(below(random, 2));
      }
    }
  world.good_steps(3);
  world.reset();
  world.good_steps(2);
}

}  // namespace

int main(int argc, char **argv) {
  using moe_test::config_of;
  const uint64_t count = argc > 1 ? std::stoull(argv[1]) : 10, first = argc > 2 ? std::stoull(argv[2]) : 1;
  for (uint64_t seed = first; seed < first + count; seed++) drawn(seed);
  if (argc > 1) return 0;
  const moe_test::Options polite = over("loopback");
  steps("2 GPU ranks", config_of(2, 6, 3, 64, 9), "gg", polite, 6, 1);
  steps("a GPU and a CPU rank", config_of(2, 6, 3, 64, 9), "gc", polite, 8, 2);
  ept_moe_config padded = config_of(4, 9, 4, 24, 40);
  padded.alignment = 8;
  steps("GPU ranks of which two map each other's memory, and a CPU rank", padded, "mgmc", polite, 5, 3);
  nodes();
  for (uint64_t seed = 1; seed <= 3; seed++)
    steps("the same under the adversary", padded, "mgmc", moe_test::adversary(seed), 4, 10 + seed);
  steps("fp8, 3 ranks, adversary", quantised(config_of(3, 6, 3, 272, 9)), "gcg", moe_test::adversary(7), 4, 20);
  steps("over tcp", quantised(config_of(3, 6, 3, 272, 9)), "gcg", over("tcp"), 4, 21);
  homes("gg", polite, "1", 0, true, "on the GPU, shown to the backend by address", 30);
  homes("gcg", moe_test::adversary(5), "2", 1, true, "on the GPU, shown to the backend as a dmabuf", 31);
  homes("mgmc", moe_test::adversary(6), "1", 0, true, "on the GPU, shown to the backend by address", 32);
  homes("gg", polite, "1", 2, true, "pinned on the host: EPT_GPU_MEMORY=pinned", 33);
  homes("gg", polite, "0", 0, true, "pinned on the host: the backend takes no GPU memory", 34);
  homes("gg", polite, "2", 0, false, "pinned on the host: this GPU doesn't order", 35);
  no_home();
  abandoned("gg", polite, 50);
  abandoned("gc", polite, 51);
  abandoned("gcg", moe_test::adversary(9), 52);
  late("gg", 1, 60);
  late("gcm", 1, 61);
  late("mcm", 2, 62);
  listed();
  lost();
  refused();
  few_connections();
  return 0;
}
