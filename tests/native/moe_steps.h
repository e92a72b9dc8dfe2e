// SPDX-License-Identifier: Apache-2.0
//
// moe_steps.h: one step of a group, drawn from a seed, and checked bit for bit on every rank against moe_model.h.
#pragma once

#include <stdint.h>

#include <vector>

#include "moe_group.h"
#include "moe_model.h"

namespace moe_test {

enum class Weights { none, given, late };

// The same on every rank, since every rank draws it from the same seed.
struct Step {
  uint32_t lane = 0;
  bool whole = false;
  Weights weights = Weights::given;
  bool quantised = false;  // the caller brings e4m3 and scales
  bool cached = false;     // dispatch again by the routing
  uint32_t combines = 1;
  bool row_weights = false;
  std::vector<uint8_t> abandon;  // [world] 1: no dispatch_recv; 2: no combine_recv of the last combine
  std::vector<int32_t> layouts, out_dtypes, y_dtypes;  // [world]
  std::vector<uint8_t> applied;                        // [world]
  std::vector<uint32_t> slack;                         // [world] rows that outputs hold beyond what is needed
  std::vector<moe_model::Input> inputs;                // [world]
  std::vector<std::vector<uint8_t>> scales;            // [world] [tokens, caller_scale_bytes] where quantised

  std::vector<uint8_t> masked;  // [world] 1: takes no part, so its tokens and its experts are left out; empty: all do
  uint32_t membership = 0;      // under which the dispatch is
};

struct Draw {
  uint32_t max_tokens = 0;
  bool may_abandon = false, whole = false;
  uint32_t most_combines = 2;
};

Step draw(uint64_t seed, const ept_moe_config &config, const Draw &how);

class Runner {
 public:
  Runner(ept_moe *moe, const ept_moe_config &config, const int32_t *placement);
  void run(const Step &step);
  // One call at a time: first begin, then as the halves go.
  void begin(const Step &step);
  void send(const Step &step, ept_routing *routing);
  // nullptr where another rank has abandoned the stream.
  ept_routing *receive(const Step &step);
  void combine(const Step &step, ept_routing *routing, bool receive);

 private:
  struct Outputs {
    int32_t layout;
    uint64_t n = 0, slots = 0;
    bool two = false, per_expert = false;
    std::vector<uint8_t> x, scales;
    std::vector<int32_t> counts, offsets, ids, source;
    std::vector<float> weights;
  };
  std::vector<int64_t> shape(const Outputs &out, std::vector<int64_t> rest) const;
  void payload(const Step &step, const moe_model::Row &row, std::vector<uint8_t> &x,
               std::vector<uint8_t> &scales) const;
  void verify(const Step &step, const Outputs &out, const moe_model::Places &places) const;
  void verify_lost(const Step &step, const ept_routing *routing) const;
  // Where another rank abandons a stream in this half, ours ends with CLOSED, names it, and leaves the lane usable.
  bool cut_short(const Step &step, uint8_t half, int32_t code, const Error &error) const;
  std::vector<float> sums(const Step &step, uint32_t token, std::vector<float> &beside) const;
  float weight(const Step &step, const moe_model::Row &row, uint32_t k) const;
  // What a caller that weighs by itself hands back for a whole row.
  static float row_value(const moe_model::Row &row, uint32_t rank, uint32_t column);

  ept_moe *moe_;
  const ept_moe_config config_;
  const moe_model::Homes homes_;
  std::vector<std::vector<moe_model::Row>> rows_;  // [world] of this step
  uint64_t n_ = 0;
  std::vector<uint8_t> keep_;
};

}  // namespace moe_test
