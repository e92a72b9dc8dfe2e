// SPDX-License-Identifier: Apache-2.0
//
// Masks on GPU ranks: kernels as fibers (simt/) go on without a rank that is masked, and with it again when it is back,
// bit for bit what CPU ranks under the same mask give: where all map each other's memory, over an engine, and mixed.
#include <atomic>

#include "gpu_world.h"

using namespace gpu_test;

namespace {

// The log of a membership, and what it says done to the engines and arenas of both groups.
class Log {
 public:
  explicit Log(World &of) : world_(of), lives_(of.config.world) {}

  void mask(uint32_t victim) {
    begin_mask(victim);
    for (uint32_t r : world_.order()) carry_out_mask(r, victim);
  }
  void begin_mask(uint32_t victim) {
    epoch_++;
    world_.up[victim] = 0;
  }
  void carry_out_mask(uint32_t r, uint32_t victim) {
    for (const Group *group : groups()) {
      Error error;
      OK(ept_engine_mask(group->engines[r], victim, epoch_, "it is odd", &error), error);
      tell(*group, r);
    }
  }
  // In another life, with a reset of all.
  void back(uint32_t rank) {
    epoch_++;
    lives_[rank]++;
    const std::vector<uint32_t> others = world_.order();
    for (uint32_t r : others) {  // what readmit agrees on: all have made the same calls in lane 0
      Error error;
      OK(ept_arena_step(world_.net->arenas[r], &step_, &error), error);
      CHECK(step_ > 0);
    }
    world_.up[rank] = 1;
    for (const Group *group : groups()) {
      Error error;
      OK(ept_engine_rejoin(group->engines[rank], lives_[rank], &error), error);
      for (uint32_t r : others) {
        open(*group, rank, r);
        open(*group, r, rank);
        tell(*group, r);
      }
      tell(*group, rank);
      for (uint32_t r : others)
        OK(ept_engine_wait_peer(group->engines[rank], r, 60 * moe_test::kSecond, &error), error);
    }
  }
  // As back, and the rank of the group that is tried is a new process.
  void started_again(uint32_t rank) {
    epoch_++;
    lives_[rank]++;
    const std::vector<uint32_t> others = world_.order();
    Error error;
    for (uint32_t r : others) {
      OK(ept_arena_step(world_.net->arenas[r], &step_, &error), error);
      CHECK(step_ > 0);
    }
    size_t length = 0;
    OK(ept_arena_places(world_.net->arenas[others[0]], nullptr, &length, &error), error);
    std::string places(length, 0);
    OK(ept_arena_places(world_.net->arenas[others[0]], places.data(), &length, &error), error);
    world_.close_rank(rank);
    world_.net->start_again(rank, lives_[rank]);
    OK(ept_engine_rejoin(world_.cpu.engines[rank], lives_[rank], &error), error);
    world_.up[rank] = 1;
    for (uint32_t r = 0; r < world_.config.world; r++)
      if (!world_.up[r]) OK(ept_engine_mask(world_.net->engines[rank], r, epoch_, "it is odd", &error), error);
    for (const Group *group : groups()) {
      for (uint32_t r : others) {
        open(*group, rank, r);
        open(*group, r, rank);
        tell(*group, r);
      }
      tell(*group, rank);
      for (uint32_t r : others)
        OK(ept_engine_wait_peer(group->engines[rank], r, 60 * moe_test::kSecond, &error), error);
    }
    OK(ept_arena_expect(world_.net->arenas[rank], 1, places.data(), places.size() - 1, &error) == EPT_E_VERSION
           ? EPT_OK
           : EPT_E_INTERNAL,
       error);
    OK(ept_arena_expect(world_.net->arenas[rank], 1, places.data(), places.size(), &error), error);
    world_.make_again(rank, 7);
  }
  void reset() {
    world_.cpu.run([&](uint32_t r) {
      Error error;
      if (world_.up[r]) OK(ept_moe_reset(world_.cpu_objects[r], 60 * moe_test::kSecond, &error), error);
    });
    world_.reset();
  }

 private:
  std::vector<const Group *> groups() const { return {&world_.cpu, world_.net.get()}; }
  void tell(const Group &group, uint32_t r) const {
    Error error;
    OK(ept_arena_members(group.arenas[r], epoch_, world_.up.data(), step_, &error), error);
    OK(ept_engine_tell_membership(group.engines[r], epoch_, &error), error);
  }
  void open(const Group &group, uint32_t by, uint32_t rank) const {
    Error error;
    char blob[4096];
    size_t length = sizeof blob;
    OK(ept_engine_address(group.engines[rank], blob, &length, &error), error);
    OK(ept_engine_readmit(group.engines[by], rank, lives_[rank], blob, length, &error), error);
  }

  World &world_;
  uint32_t epoch_ = 0;
  uint64_t step_ = 0;
  std::vector<uint32_t> lives_;
};

moe_test::Options loopback() {
  moe_test::Options options;
  options.plugin = "loopback";
  return options;
}

ept_moe_config quantised() {
  ept_moe_config config = moe_test::config_of(4, 9, 4, 272, 40);
  config.dispatch_dtype = EPT_DTYPE_E4M3;
  config.alignment = 8;
  return config;
}

// Between two steps, so that none is lost; then another one; then both come back, one after the other.
void between_steps(const std::string &on, const ept_moe_config &config, uint64_t seed) {
  check::running("ranks that are masked between steps");
  World world(config, seed, on, loopback());
  Log log(world);
  world.good_steps(2);
  log.mask(2);
  world.good_steps(4);
  world.arenas(ept_arena_suspend);
  world.arenas(ept_arena_resume);
  world.good_steps(2);
  log.mask(0);
  world.good_steps(3);
  for (uint32_t rank : {0u, 2u}) {
    log.back(rank);
    for (uint32_t r : world.order()) {
      Error error;
      if (!world.on_gpu(r)) continue;
      CHECK_EQ(ept_gpu_moe_members(world.objects[r], 0, 0, nullptr, nullptr, &error), EPT_E_FAULT);
      CHECK_HAS(error.text, "is back since membership");
    }
    log.reset();
    world.good_steps(3);
  }
}

// A process that is started again makes its lanes alone, as the others' are, and takes part from a reset on.
void again(const std::string &on, const std::vector<uint32_t> &victims, uint64_t seed) {
  check::running("a process that is started again");
  World world(moe_test::config_of(uint32_t(on.size()), 9, 3, 32, 7), seed, on, loopback());
  Log log(world);
  world.good_steps(2);
  for (uint32_t victim : victims) {
    log.mask(victim);
    world.good_steps(2);
    log.started_again(victim);
    if (world.on_gpu(victim)) {
      Error error;
      CHECK_EQ(ept_gpu_moe_members(world.objects[victim], 0, 0, nullptr, nullptr, &error), EPT_E_FAULT);
    }
    log.reset();
    for (uint32_t r = 0; r < on.size(); r++)
      for (uint32_t other = 0; other < on.size() && world.on_gpu(r); other++)
        CHECK_EQ(world.lanes[r].lanes->maps(other), other == r || (on[r] == on[other] && on[r] != 'g'));
    world.good_steps(3);
  }
}

// While all sleep: the others wake up without it.
void asleep(const std::string &on, uint64_t seed) {
  check::running("a rank that is masked while the group sleeps");
  World world(moe_test::config_of(4, 6, 2, 32, 7), seed, on, loopback());
  Log log(world);
  world.good_steps(1);
  world.arenas(ept_arena_suspend);
  log.mask(0);
  world.arenas(ept_arena_resume);
  world.good_steps(3);
}

// It doesn't know that it is masked, and goes on: nothing of it is in what the others get, and its wait ends.
void stray(const std::string &on, uint64_t seed) {
  check::running("a masked rank that goes on");
  World world(moe_test::config_of(3, 6, 2, 32, 7), seed, on, loopback());
  Log log(world);
  world.good_steps(2);
  Step alone = world.draw();
  alone.lane = 0;
  for (RankStep &s : alone.ranks) s.layout = EPT_LAYOUT_BY_RANK;
  const std::vector<Got> whole = world.on_cpu(alone);
  log.mask(1);
  Bytes routing;
  Got got;
  got.arrival = whole[1].arrival;
  world.send(alone, 1, routing);
  world.have_patience(200'000'000);
  world.make(got, alone.ranks[1], 1, 0);
  world.receive(alone, 1, routing, got);
  world.have_patience(60 * moe_test::kSecond);
  world.good_steps(3);
  Error error;
  CHECK_EQ(ept_gpu_moe_check(world.objects[1], 0, &error), EPT_E_FAULT);
  CHECK_EQ(got.num_rows, 0);
  log.back(1);
  log.reset();
  world.good_steps(2);
}

// A step has its members from its begin to its end, but no sum is made of what a masked rank had.
void between_halves(const std::string &on, uint64_t seed) {
  check::running("a rank that is masked between the halves of a dispatch");
  World world(moe_test::config_of(3, 6, 2, 32, 7), seed, on, loopback());
  Log log(world);
  world.good_steps(1);
  for (int turn = 0; turn < 2; turn++) {
    Step step = world.draw();
    const std::vector<Got> expected = world.on_cpu(step);
    std::vector<Got> all(3);
    std::vector<Bytes> routings(3);
    for (uint32_t r : world.order()) world.send(step, r, routings[r]);
    std::vector<uint64_t> headers(4);
    for (uint32_t r : world.order()) {  // all that was sent has landed
      Error error;
      OK(ept_gpu_moe_dispatch_wait(world.objects[r], step.lane, headers.data(), world.stream(r, step.lane), &error),
         error);
    }
    world.gpu->machine.run();
    log.mask(1);
    for (uint32_t r : world.order()) {
      Error error;
      // Also where the lane has learned of it meanwhile.
      if (turn)
        OK(ept_gpu_moe_members(world.objects[r], step.lane, 0, nullptr, world.stream(r, step.lane), &error), error);
      world.receive(step, r, routings[r], all[r], expected[r]);
    }
    world.gpu->machine.run();
    for (uint32_t r : world.order()) {
      Error error;
      OK(ept_gpu_moe_check(world.objects[r], step.lane, &error), error);
      const ept_arrival &a = expected[r].arrival;
      const uint64_t arrival[] = {a.rows, a.max_rank_rows, a.contiguous_rows, a.max_expert_rows};
      world.same(step.ranks[r], expected[r], all[r], arrival, false);
      void *stream = world.stream(r, step.lane);
      if (turn) {  // as a captured graph does, which asks nobody
        world.sum(step, r, routings[r], all[r]);
        world.gpu->machine.run();
        CHECK_EQ(ept_gpu_moe_check(world.objects[r], step.lane, &error), EPT_E_FAULT);
        CHECK_HAS(error.text, "it sums a dispatch of membership");
        continue;
      }
      CHECK_EQ(ept_gpu_moe_refuse_old(world.objects[r], step.lane, 0, stream, &error), EPT_E_PEER_LOST);
      CHECK_HAS(error.text, "rank 1 was masked since the dispatch");
      world.gpu->machine.run();
      CHECK_EQ(ept_gpu_moe_check(world.objects[r], step.lane, &error), EPT_E_FAULT);
    }
    log.reset();
    world.good_steps(2);
    log.back(1);
    log.reset();
    world.good_steps(2);
  }
}

// A step of three ranks in lane 0, of which rank 2 stays away.
struct WithoutTwo {
  explicit WithoutTwo(World &of) : world(of), step(world.draw()), got(2), routings(2) {
    step.lane = 0;
    for (RankStep &s : step.ranks) s.layout = EPT_LAYOUT_ROWS;
    expected = world.on_cpu(step);
  }
  void send(uint32_t r) { world.send(step, r, routings[r]); }
  void receive(uint32_t r) { world.receive(step, r, routings[r], got[r], expected[r]); }
  void sum(uint32_t r) { world.sum(step, r, routings[r], got[r]); }

  World &world;
  Step step;
  std::vector<Got> expected, got;
  std::vector<Bytes> routings;
};

// A rank that began its step before the mask and one that began it after: each is told, and that calls were alike.
void across(const std::string &on, uint64_t seed) {
  check::running("a step under two memberships");
  World world(moe_test::config_of(3, 6, 2, 32, 7), seed, on, loopback());
  Log log(world);
  world.good_steps(1);
  WithoutTwo step(world);
  step.send(0);
  world.gpu->machine.run();
  log.mask(2);
  step.send(1);
  for (uint32_t r : {0u, 1u}) step.receive(r);
  world.gpu->machine.run();
  for (uint32_t r : {0u, 1u}) {
    Error error;
    CHECK_EQ(ept_gpu_moe_check(world.objects[r], 0, &error), EPT_E_FAULT);
    CHECK_HAS(error.text, "the first cause was EPT_E_FAULT");
    CHECK_HAS(error.text,
              r ? "rank 0 takes its step under another membership" : "under another membership than rank 0");
  }
  log.reset();
  world.good_steps(2);
  log.back(2);
  log.reset();
  world.good_steps(2);
}

// Kernels that wait for a rank learn that it is masked, and that another one has gone on to a reset, long before their
// deadline.
void amid_waits(const std::string &on, uint64_t seed) {
  check::running("a rank that is masked while others wait for it");
  World world(moe_test::config_of(3, 6, 2, 32, 7), seed, on, loopback());
  Log log(world);
  for (int turn = 0; turn < 2; turn++) {
    world.good_steps(1);
    WithoutTwo step(world);
    for (uint32_t r : {0u, 1u}) step.send(r);
    for (uint32_t r : {0u, 1u}) {
      step.receive(r);
      step.sum(r);
    }
    log.begin_mask(2);
    std::thread other([&] {
      log.carry_out_mask(0, 2);
      log.carry_out_mask(1, 2);
    });
    world.gpu->machine.run();
    other.join();
    for (uint32_t r : {0u, 1u}) {
      Error error;
      CHECK_EQ(ept_gpu_moe_check(world.objects[r], 0, &error), EPT_E_FAULT);
      CHECK_HAS(error.text, "PEER_LOST");
      CHECK_EQ(step.got[r].num_rows, 0);
    }
    log.reset();
    world.good_steps(2);

    // Rank 0 takes part in no step: it resets, and rank 1, which waits for it, is told.
    WithoutTwo next(world);
    next.send(1);
    next.receive(1);
    std::thread resets([&] {
      Error error;
      OK(ept_gpu_lanes_reset(&world.lanes[0], 60 * moe_test::kSecond, &error), error);
    });
    std::atomic<bool> told = false;
    std::thread watch([&] {
      while (!told) ept_gpu_lanes_watch(&world.lanes[1]), std::this_thread::yield();
    });
    world.gpu->machine.run();
    told = true;
    watch.join();
    Error error;
    CHECK_EQ(ept_gpu_moe_check(world.objects[1], 0, &error), EPT_E_FAULT);
    CHECK_HAS(error.text, "which has called reset");
    OK(ept_gpu_lanes_reset(&world.lanes[1], 60 * moe_test::kSecond, &error), error);
    resets.join();
    for (auto &lanes : world.open) std::fill(lanes.begin(), lanes.end(), 0);
    world.good_steps(2);
    log.back(2);
    log.reset();
  }
}

// Nobody masks a rank whose process is gone before somebody knows: the engine does, long before the deadline.
void gone(const std::string &on, uint64_t seed) {
  check::running("a rank that the engine has lost");
  World world(moe_test::config_of(3, 6, 2, 32, 7), seed, on, loopback());
  world.good_steps(1);
  WithoutTwo step(world);
  for (uint32_t r : {0u, 1u}) step.send(r);
  for (uint32_t r : {0u, 1u}) step.receive(r);
  std::atomic<bool> ended = false;
  std::thread watch([&] {
    Error error;
    for (uint32_t r : {0u, 1u}) OK(ept_engine_mask(world.net->engines[r], 2, 1, "its process is gone", &error), error);
    while (!ended) {
      for (uint32_t r : {0u, 1u}) ept_gpu_lanes_watch(&world.lanes[r]);
      std::this_thread::yield();
    }
  });
  world.gpu->machine.run();
  ended = true;
  watch.join();
  for (uint32_t r : {0u, 1u}) {
    Error error;
    CHECK_EQ(ept_gpu_moe_check(world.objects[r], 0, &error), EPT_E_FAULT);
    CHECK_HAS(error.text, "waited for rank 2, which is gone (EPT_E_PEER_LOST)");
    CHECK_EQ(error.peer, 2);
    CHECK_EQ(step.got[r].num_rows, 0);
  }
}

}  // namespace

int main() {
  between_steps("mmmm", quantised(), 1);
  between_steps("gggg", moe_test::config_of(4, 9, 4, 24, 40), 2);
  between_steps("mcgm", moe_test::config_of(4, 9, 4, 24, 40), 3);
  asleep("mgcm", 9);
  again("ggg", {1}, 40);
  again("mgcm", {0, 2}, 41);
  again("mmm", {0}, 43);
  stray("mmm", 10);
  stray("ggg", 11);
  between_halves("mmm", 20);
  between_halves("ggg", 21);
  across("mmm", 25);
  across("ggg", 26);
  amid_waits("mmm", 30);
  amid_waits("ggg", 31);
  gone("mmm", 40);
  return 0;
}
