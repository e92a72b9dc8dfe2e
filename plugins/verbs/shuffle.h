// SPDX-License-Identifier: Apache-2.0
// A completion queue whose completions come in another order, by a seed: any order that keeps those of one queue pair's
// sends, and those of its receives. Software NICs deliver in the order of the wire; real ones, and several at once, do
// not, and nothing above may lean on it. Set in by a setting; the rest of the plugin can't tell.
#pragma once

#include <random>
#include <vector>

#include "common.h"

namespace verbs {

class Shuffle {
 public:
  // From here on `cq` is polled through this object, which must live as long.
  Shuffle(ibv_cq *cq, uint64_t seed);
  Shuffle(const Shuffle &) = delete;
  Shuffle &operator=(const Shuffle &) = delete;

 private:
  static int poll(ibv_cq *cq, int most, ibv_wc *completions);
  int take(ibv_cq *cq, int most, ibv_wc *completions);

  decltype(ibv_context_ops::poll_cq) original_;
  std::mt19937_64 random_;
  std::vector<ibv_wc> held_;
};

}  // namespace verbs
