// SPDX-License-Identifier: Apache-2.0
#include "moe_ranks.h"

#include <string.h>

#include <algorithm>
#include <chrono>
#include <thread>

namespace moe_test {

Ranks::Ranks(const ept_moe_config &given)
    : config(given),
      group(given.world),
      objects(group.create(given)),
      lives_(given.world, 0),
      carried_out_(given.world, 0) {
  for (uint32_t r = 0; r < config.world; r++) {
    ept_moe_config mine = config;
    mine.rank = r;
    runners.emplace_back(objects[r], mine, nullptr);
    addresses_.push_back(address_of(group.engines[r]));
  }
  states_.push_back({std::vector<uint8_t>(config.world, 1), 0, 0, false});
}

Ranks::~Ranks() { close_all(objects); }

std::vector<uint32_t> Ranks::all() const {
  std::vector<uint32_t> ranks;
  for (uint32_t r = 0; r < config.world; r++) ranks.push_back(r);
  return ranks;
}

std::vector<uint32_t> Ranks::active() const {
  std::vector<uint32_t> ranks;
  for (const uint32_t r : all())
    if (states_.back().active[r]) ranks.push_back(r);
  return ranks;
}

// ---- the log ----

void Ranks::log(uint32_t rank, bool back, uint64_t step) {
  State next = states_.back();
  next.active[rank] = back;
  next.step = std::max(next.step, step);
  next.rank = rank;
  next.back = back;
  states_.push_back(next);
}

void Ranks::log_mask(uint32_t rank) { log(rank, false, 0); }

void Ranks::log_return(uint32_t rank, uint64_t step) {
  lives_[rank]++;
  addresses_[rank] = address_of(group.engines[rank]);
  log(rank, true, step);
  // Its engine begins with no links: what was before is nothing to it, and its own return is not for it to carry out.
  carried_out_[rank] = membership();
}

void Ranks::carry_out(uint32_t by, uint32_t upto) {
  Error error;
  for (uint32_t n = carried_out_[by] + 1; n <= upto; n++) {
    const State &state = states_[n];
    if (state.back)
      open(by, state.rank);
    else
      OK(ept_engine_mask(group.engines[by], state.rank, n, "it is odd", &error), error);
  }
  carried_out_[by] = upto;
  OK(ept_arena_members(group.arenas[by], upto, states_[upto].active.data(), states_[upto].step, &error), error);
  OK(ept_engine_tell_membership(group.engines[by], upto, &error), error);
}

void Ranks::open(uint32_t by, uint32_t rank) const {
  Error error;
  const std::vector<char> &to = addresses_[rank];
  OK(ept_engine_readmit(group.engines[by], rank, lives_[rank], to.data(), to.size(), &error), error);
}

// ---- steps ----

Step Ranks::step(uint64_t seed) const {
  Step step = draw(seed, config, {.max_tokens = config.max_tokens, .whole = config.buffer_bytes > 0});
  for (const uint8_t active : states_.back().active) step.masked.push_back(!active);
  step.membership = membership();
  return step;
}

Step Ranks::mixed(uint64_t seed) const {
  const moe_model::Homes homes(config.world, config.num_experts, nullptr);
  for (;; seed++) {
    Step found = step(seed);
    uint32_t pairs = 0;
    for (const uint32_t r : all()) {
      std::vector<uint8_t> from(config.world, 0);
      for (const moe_model::Row &row : moe_model::rows_at(homes, r, config.top_k, found.inputs)) from[row.source] = 1;
      for (const uint8_t one : from) pairs += one;
    }
    if (pairs < config.world * config.world) continue;
    found.lane = 0;
    found.cached = false;
    found.combines = 1;
    found.weights = Weights::given;
    return found;
  }
}

void Ranks::good_steps(uint64_t seed) {
  std::vector<Step> steps = {mixed(seed)};
  for (uint32_t i = 1; i < 5; i++) {
    steps.push_back(step(seed + i));
    steps.back().lane = i % config.lanes;
  }
  on(active(), [&](uint32_t rank) {
    for (const Step &one : steps) runners[rank].run(one);
  });
}

void Ranks::reset() const {
  on(active(), [&](uint32_t rank) {
    Error error;
    OK(ept_moe_reset(objects[rank], 60 * kSecond, &error), error);
  });
}

uint64_t Ranks::generation(uint32_t rank) const {
  Error error;
  uint64_t step = 0;
  OK(ept_arena_step(group.arenas[rank], &step, &error), error);
  return step;
}

// ---- threads ----

void Ranks::on(const std::vector<uint32_t> &ranks, const std::function<void(uint32_t)> &body,
               const std::function<void()> &beside) const {
  std::vector<std::thread> threads;
  for (const uint32_t rank : ranks) threads.emplace_back([&, rank] { body(rank); });
  if (beside) threads.emplace_back(beside);
  for (auto &thread : threads) thread.join();
}

void Ranks::until_waiting(const std::vector<uint32_t> &ranks, const char *operation) const {
  const auto limit = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  for (const uint32_t rank : ranks)
    for (;;) {
      char text[16384];
      size_t length = sizeof text;
      Error error;
      OK(ept_engine_why_stuck(group.engines[rank], 0, text, &length, &error), error);
      if (strstr(text, operation)) break;
      if (std::chrono::steady_clock::now() > limit) CHECK_HAS(text, operation);
      std::this_thread::yield();
    }
}

}  // namespace moe_test
