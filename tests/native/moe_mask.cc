// SPDX-License-Identifier: Apache-2.0
//
// moe_mask.cc: steps go on without a rank that is masked and with it again when it is back, bit for bit what the model
// says, and every token knows what it has lost. When a mask comes is decided by what has happened (a call that has
// returned, a wait that was seen), never by time.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>

#include "moe_ranks.h"

using namespace moe_test;

namespace {

constexpr uint32_t kWorld = 4;
constexpr uint32_t kTokens = 24;

void expect(int32_t code, int32_t expected, const Error &error, std::initializer_list<const char *> parts) {
  if (code != expected)
    check::failed(
        __FILE__, __LINE__,
        std::string(ept_code_name(code)) + " where " + ept_code_name(expected) + " was expected: " + error.text);
  for (const char *part : parts) CHECK_HAS(error.text, part);
}

ept_moe_config halves() { return config_of(kWorld, 2 * kWorld, 3, 64, kTokens); }

// A call is longer than a lane's buffers, so chunks wait for grants.
ept_moe_config streams() {
  ept_moe_config config = halves();
  ept_moe_plan plan{};
  Error error;
  OK(ept_moe_plan_get(&config, &plan, &error), error);
  config.buffer_bytes = plan.lane_bytes / 3;
  return config;
}

// Rows for whatever comes, and a y: for calls that must end otherwise than well.
struct Room {
  static constexpr int64_t kRows = int64_t(kWorld) * kTokens;
  std::vector<uint8_t> bytes = std::vector<uint8_t>(kRows * 64 * 2 + 16);
  uint8_t *aligned() { return bytes.data() + (16 - reinterpret_cast<uintptr_t>(bytes.data()) % 16) % 16; }
};

int32_t dispatch_recv(ept_moe *moe, Error &error) {
  Room room;
  ept_dispatch_outputs out{};
  out.size = sizeof out;
  out.layout = EPT_LAYOUT_ROWS;
  out.x = tensor(room.aligned(), EPT_DTYPE_BF16, {Room::kRows, 64});
  ept_routing *routing = nullptr;
  return ept_moe_dispatch_recv(moe, 0, &out, &routing, &error);
}

int32_t combine_recv(ept_moe *moe, const Step &step, uint32_t rank, Error &error) {
  Room room;
  const ept_tensor y = tensor(room.aligned(), EPT_DTYPE_BF16, {int64_t(step.inputs[rank].tokens), 64});
  return ept_moe_combine_recv(moe, 0, &y, nullptr, &error);
}

int32_t dispatch_wait(ept_moe *moe, Error &error) {
  ept_arrival arrival{};
  arrival.size = sizeof arrival;
  return ept_moe_dispatch_wait(moe, 0, &arrival, &error);
}

// A dispatch of one token of zeros, begun only.
int32_t dispatch_send(ept_moe *moe, uint32_t lane, Error &error) {
  alignas(16) static const uint16_t x[64] = {};
  static const int32_t ids[3] = {0, 2, 4};
  ept_dispatch_args args{};
  args.size = sizeof args;
  args.lane = lane;
  args.x = tensor(x, EPT_DTYPE_BF16, {1, 64});
  args.topk_ids = tensor(ids, EPT_DTYPE_I32, {1, 3});
  return ept_moe_dispatch_send(moe, &args, &error);
}

// Between two steps: no step is lost and none needs a reset. The masked rank knows of nothing and goes on; nothing of
// it is in the others' results, and it is told.
void between_steps(uint32_t victim) {
  Ranks ranks(halves());
  ranks.good_steps(10);
  ranks.log_mask(victim);
  for (const uint32_t r : ranks.active()) ranks.carry_out(r);
  Error error;
  std::thread stray([&] {
    ept_moe *moe = ranks.objects[victim];
    int32_t code = dispatch_send(moe, 0, error);
    if (code == EPT_OK) code = dispatch_wait(moe, error);
    expect(code, EPT_E_PEER_LOST, error, {});
    expect(ept_moe_check(moe, 0, &error), EPT_E_FAULT, error, {"EPT_E_PEER_LOST"});
  });
  for (uint64_t turn = 0; turn < 3; turn++) ranks.good_steps(20 + 10 * turn);
  stray.join();
  std::vector<uint8_t> active(kWorld, 1);
  active[victim] = 0;
  OK(ept_arena_members(ranks.group.arenas[victim], 1, active.data(), 0, &error), error);
  expect(dispatch_send(ranks.objects[victim], 1, error), EPT_E_PEER_LOST, error, {"is masked itself"});
  CHECK_EQ(error.peer, victim);
  expect(ept_moe_reset(ranks.objects[victim], 60 * kSecond, &error), EPT_E_PEER_LOST, error, {"is masked itself"});
}

enum class Phase { dispatch, combine };

// What all that wait for `victims` get: PEER_LOST, and a lane that is faulted while the other one is well.
void expect_lost(const Ranks &ranks, uint32_t rank, int32_t code, const Error &error, const std::string &operation,
                 const std::vector<uint32_t> &victims) {
  expect(code, EPT_E_PEER_LOST, error, {operation.c_str()});
  bool named = false;
  for (const uint32_t victim : victims) named = named || error.peer == int32_t(victim);
  CHECK(named);
  const std::string whom = "rank " + std::to_string(error.peer);
  CHECK_HAS(error.text, whom);
  Error again;
  expect(ept_moe_check(ranks.objects[rank], 0, &again), EPT_E_FAULT, again, {"EPT_E_PEER_LOST", operation.c_str()});
  CHECK_EQ(again.peer, error.peer);
  expect(dispatch_send(ranks.objects[rank], 0, again), EPT_E_FAULT, again, {whom.c_str()});
  OK(ept_moe_check(ranks.objects[rank], 1, &again), again);
}

// The victims come no further than to the phase. All others are seen to wait for them before anybody masks.
void while_waited_for(Phase phase, const std::vector<uint32_t> &victims, const ept_moe_config &config) {
  Ranks ranks(config);
  ranks.good_steps(100);
  const Step step = ranks.mixed(110);
  const std::string operation = phase == Phase::combine ? "combine_recv"
                                : step.whole            ? "dispatch_wait"
                                                        : "dispatch_recv";
  for (const uint32_t victim : victims) ranks.log_mask(victim);
  const std::vector<uint32_t> survivors = ranks.active();
  ept_moe_stats before{};
  OK(ept_moe_stats_get(ranks.objects[survivors[0]], &before), Error());

  const auto comes = [&](uint32_t rank) {
    const bool survives = std::find(survivors.begin(), survivors.end(), rank) != survivors.end();
    Runner &runner = ranks.runners[rank];
    ept_moe *moe = ranks.objects[rank];
    if (!survives && phase == Phase::dispatch) return;
    Error error;
    runner.begin(step);
    runner.send(step, nullptr);
    if (phase == Phase::dispatch) {
      const int32_t code = step.whole ? dispatch_wait(moe, error) : dispatch_recv(moe, error);
      return expect_lost(ranks, rank, code, error, operation, victims);
    }
    ept_routing *routing = runner.receive(step);
    if (survives) {
      runner.combine(step, routing, false);
      expect_lost(ranks, rank, combine_recv(moe, step, rank, error), error, operation, victims);
    }
    ept_routing_release(routing);
  };
  ranks.on(ranks.all(), comes, [&] {
    ranks.until_waiting(survivors, operation.c_str());
    if (step.whole) {  // some chunks of it have gone
      ept_moe_stats now{};
      OK(ept_moe_stats_get(ranks.objects[survivors[0]], &now), Error());
      CHECK(now.rows[0] > before.rows[0]);
    }
    for (const uint32_t r : survivors) ranks.carry_out(r);
  });
  ranks.reset();
  ranks.good_steps(120);
  ept_moe_stats after{};
  OK(ept_moe_stats_get(ranks.objects[survivors[0]], &after), Error());
  CHECK_EQ(after.grants > 0, step.whole);
}

// Rank 0 has all that others sent it, and chunks left for ranks 1 and 3, neither of which makes room. It waits for rank
// 1, which is alive and late. That rank 3 is masked ends the wait all the same: who is late may be stuck because of it.
void beside_one_that_is_late() {
  const ept_moe_config config = streams();
  Ranks ranks(config);
  ranks.good_steps(300);
  Step step = ranks.mixed(310);
  for (uint32_t r = 0; r < kWorld; r++) {
    moe_model::Input &input = step.inputs[r];
    input.tokens = r == 0 ? config.max_tokens : 0;
    input.ids.clear();
    for (uint32_t i = 0; i < input.tokens; i++) input.ids.insert(input.ids.end(), {2, 6, -1});  // ranks 1 and 3
    input.weights.assign(input.ids.size(), 1.0f);
    input.x.assign(size_t(input.tokens) * config.hidden * 2, 0);
  }
  ranks.log_mask(3);
  std::atomic<uint32_t> sent{0};  // a rank that is masked in the midst of its send would be told so there
  ranks.on(
      ranks.all(),
      [&](uint32_t rank) {
        ranks.runners[rank].begin(step);
        ranks.runners[rank].send(step, nullptr);
        sent++;
        if (rank != 0) return;
        Error error;
        const int32_t code = dispatch_recv(ranks.objects[rank], error);
        expect_lost(ranks, rank, code, error, "dispatch_recv", {3});
      },
      [&] {
        while (sent != kWorld) std::this_thread::sleep_for(std::chrono::milliseconds(1));
        ranks.until_waiting({0}, "dispatch_recv");
        ranks.carry_out(0);
      });
  for (const uint32_t r : ranks.active()) ranks.carry_out(r);
  ranks.reset();
  ranks.good_steps(320);
}

// What a step began with it keeps: the rows, the counts and what is lost are of one membership, though a rank is masked
// between its calls. Its combine says so, and a dispatch by the kept routing takes the mask anew.
void taken_once() {
  Ranks ranks(halves());
  ranks.good_steps(200);
  Step step = ranks.mixed(210);
  step.layouts.assign(kWorld, EPT_LAYOUT_ROWS);
  ranks.on(ranks.all(), [&](uint32_t rank) {
    Error error;
    ranks.runners[rank].begin(step);
    ranks.runners[rank].send(step, nullptr);
    OK(dispatch_wait(ranks.objects[rank], error), error);  // all rows are here
  });
  ranks.log_mask(2);
  for (const uint32_t r : ranks.active()) ranks.carry_out(r);
  std::vector<ept_routing *> routings(kWorld, nullptr);
  ranks.on(ranks.active(), [&](uint32_t rank) {
    routings[rank] = ranks.runners[rank].receive(step);
    Room room;
    ept_combine_args back{};
    back.size = sizeof back;
    back.routing = routings[rank];
    back.layout = EPT_LAYOUT_ROWS;
    back.expert_out = tensor(room.aligned(), EPT_DTYPE_BF16, {Room::kRows, 64});
    Error error;
    expect(ept_moe_combine_send(ranks.objects[rank], &back, &error), EPT_E_PEER_LOST, error,
           {"rank 2 was masked since the dispatch", "membership 0, now 1"});
    expect(ept_moe_check(ranks.objects[rank], 0, &error), EPT_E_FAULT, error, {"EPT_E_PEER_LOST"});
  });
  ranks.reset();
  Step again = step;
  again.masked = {0, 0, 1, 0};
  again.membership = 1;
  ranks.on(ranks.active(), [&](uint32_t rank) {
    Runner &runner = ranks.runners[rank];
    runner.begin(again);
    runner.send(again, routings[rank]);
    ept_routing_release(routings[rank]);
    ept_routing *routing = runner.receive(again);
    runner.combine(again, routing, true);
    ept_routing_release(routing);
  });
  ranks.good_steps(220);
}

// Two masks in a row, of which one rank has learned one: its reset ends with LATER, and well when it knows the other.
// Both go on from the larger generation.
void learned_in_a_reset() {
  Ranks ranks(halves());
  ranks.good_steps(300);
  Error began;
  OK(dispatch_send(ranks.objects[0], 0, began), began);  // a generation further than rank 2
  ranks.log_mask(1);
  ranks.log_mask(3);
  ranks.carry_out(0, 2);
  ranks.carry_out(2, 1);
  ranks.on(ranks.active(), [&](uint32_t rank) {
    Error error;
    if (rank == 2) {
      CHECK_EQ(ept_moe_reset(ranks.objects[2], 60 * kSecond, &error), EPT_LATER);
      expect(ept_moe_check(ranks.objects[2], 1, &error), EPT_E_FAULT, error, {"a reset has begun"});
      ranks.carry_out(2, 2);
    }
    OK(ept_moe_reset(ranks.objects[rank], 60 * kSecond, &error), error);
  });
  CHECK_EQ(ranks.generation(0), ranks.generation(2));
  ranks.good_steps(310);
}

// Masked by mistake, and back in another life, twice: right steps without it, none before the reset that takes it in,
// and full results after.
void comes_back(uint32_t victim, const ept_moe_config &config) {
  Ranks ranks(config);
  ranks.good_steps(400);
  for (uint32_t turn = 1; turn <= 2; turn++) {
    ranks.log_mask(victim);
    const std::vector<uint32_t> survivors = ranks.active();
    for (const uint32_t r : survivors) ranks.carry_out(r);
    ranks.good_steps(400 + 50 * turn);

    Error error;
    ept_engine *engine = ranks.group.engines[victim];
    OK(ept_engine_rejoin(engine, turn, &error), error);
    // What is agreed with the return is a floor of all generations: higher here than any rank has come to.
    const uint64_t floor = ranks.generation(survivors[0]) + 100;
    ranks.log_return(victim, floor);
    for (const uint32_t r : survivors) ranks.open(victim, r);
    for (const uint32_t r : ranks.active()) ranks.carry_out(r);
    ranks.on(ranks.active(), [&](uint32_t rank) {
      Error mine;
      for (const uint32_t r : ranks.active())
        if (r != rank && (rank == victim || r == victim))
          OK(ept_engine_wait_peer(ranks.group.engines[rank], r, 60 * kSecond, &mine), mine);
      expect(dispatch_send(ranks.objects[rank], 0, mine), EPT_E_FAULT, mine, {"is back since membership", "reset"});
    });
    ranks.reset();
    for (const uint32_t r : ranks.active()) CHECK_EQ(ranks.generation(r), floor);
    ranks.good_steps(420 + 50 * turn);
  }
}

}  // namespace

int main() {
  RUN(between_steps(2));
  RUN(between_steps(0));
  RUN(while_waited_for(Phase::dispatch, {1}, halves()));
  RUN(while_waited_for(Phase::combine, {1}, halves()));
  RUN(while_waited_for(Phase::dispatch, {2, 3}, halves()));
  RUN(while_waited_for(Phase::combine, {0, 3}, halves()));
  RUN(while_waited_for(Phase::dispatch, {2}, streams()));
  RUN(beside_one_that_is_late());
  RUN(taken_once());
  RUN(learned_in_a_reset());
  RUN(comes_back(1, halves()));
  RUN(comes_back(0, streams()));
  return 0;
}
