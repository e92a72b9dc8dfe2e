// SPDX-License-Identifier: Apache-2.0
//
// verbs_lab.h: what the two files of the program verbs_lab share. verbs_lab.cc: ranks as threads, and networks that are
// not well; verbs_lab_processes.cc: ranks as processes, one of which is killed.
#pragma once

#include <string>
#include <vector>

#include "moe_steps.h"

using Devices = std::vector<std::string>;  // of each rank

// An emulated machine on a busy one stands still for seconds; who is alive must not be taken for dead by that.
inline moe_test::Options lab_options() {
  moe_test::Options options;
  options.plugin = "verbs";
  options.timeout_ns = options.dead_ns = 120 * moe_test::kSecond;
  return options;
}

constexpr uint32_t kHidden = 64;
inline ept_moe_config lab_config(uint32_t world, uint32_t hidden = kHidden) {
  return moe_test::config_of(world, 2 * world + 1, 4, hidden, 33);
}

inline moe_test::Step lab_step(uint32_t number, const ept_moe_config &config) {
  moe_test::Draw how;
  how.max_tokens = config.max_tokens;
  return moe_test::draw(1000 + number, config, how);
}

// One on each lane: then nothing is under way to a rank that closes.
inline void run_last(moe_test::Runner &runner, const ept_moe_config &config, moe_test::Step like = {}) {
  for (uint32_t lane = 0; lane < config.lanes; lane++) {
    moe_test::Step step = lab_step(5000 + lane, config);
    step.lane = lane;
    step.masked = like.masked;
    step.membership = like.membership;
    runner.run(step);
  }
}

// Steps of 2 or more ranks, a process each, bit for bit.
void ranks_as_processes(const Devices &devices);

// The last rank is killed amid a step. The others are told who it was, mask it, and go on bit for bit.
void a_killed_process(const Devices &devices);

// The process of one rank: `verbs_lab --rank ...` as verbs_lab_processes.cc starts it.
int run_rank(int argc, char **argv);
