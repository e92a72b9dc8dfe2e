// SPDX-License-Identifier: Apache-2.0
//
// moe_chunks.cc: a chunk amid a streamed dispatch must say of its rows what the first one said, since what reads them
// goes by the first; and a row must say of itself what the rows before it leave. Two ranks over the network of the fuzz
// targets, which alters one chunk on its way.
#include <algorithm>
#include <functional>

#include "../fuzz/wire.h"
#include "eptransport/wire.h"
#include "moe_steps.h"

using namespace moe_test;

namespace {

constexpr uint32_t kTokens = 40;

struct Alteration {
  uint32_t chunk;
  const char *what;
  std::vector<const char *> words;
  std::function<void(ept_moe_header &, char *row)> make;  // `row`: the chunk's second
};

const Alteration kAlterations[] = {
    {1,
     "flags",
     {"chunk 1 of rank 1 has rows of", "flags 8); its message began with"},
     [](ept_moe_header &h, char *) { h.flags ^= EPT_MOE_NO_WEIGHTS; }},
    {1,
     "bytes of rows",
     {"chunk 1 of rank 1 has rows of", "(4 of scales"},
     [](ept_moe_header &h, char *) {
       h.scale_bytes = 4;
       h.row_bytes = uint32_t(ept_row_bytes(h.payload_bytes, h.scale_bytes, h.top_k));
     }},
    {0,
     "an ordinal",
     {"row 1 from rank 1 says that 0 rows for local expert 0 stand before it; 1 do"},
     [](ept_moe_header &h, char *row) {
       memset(row + ept_row_ordinals(h.payload_bytes, h.scale_bytes, h.top_k), 0, 4);
     }},
};

ept_moe_config streams() {
  ept_moe_config config = config_of(2, 4, 3, 64, kTokens);
  config.combine_dtype = EPT_DTYPE_F32;  // its rows are longer, so longer ones of a dispatch still have room
  ept_moe_plan plan{};
  Error error;
  OK(ept_moe_plan_get(&config, &plan, &error), error);
  config.buffer_bytes = plan.lane_bytes / 3;
  return config;
}

// All of rank 1's tokens go to rank 0, in more chunks than need no grant; rank 0 has none itself.
Step one_way(const ept_moe_config &config) {
  Step step = draw(1, config, {.max_tokens = kTokens, .whole = true});
  step.lane = 0;
  step.cached = false;
  step.weights = Weights::given;
  for (uint32_t r = 0; r < 2; r++) {
    moe_model::Input &input = step.inputs[r];
    input.tokens = r == 1 ? kTokens : 0;
    input.ids.clear();
    for (uint32_t i = 0; i < input.tokens; i++) input.ids.insert(input.ids.end(), {0, 1, -1});
    input.weights.assign(input.ids.size(), 1.0f);
    input.x.assign(size_t(input.tokens) * config.hidden * 2, 0);
  }
  return step;
}

void a_later_chunk_says_otherwise(const Alteration &alteration) {
  Options options;
  options.opened = wire::plugin();
  options.progress = EPT_PROGRESS_INLINE;
  const Group group(2, options);
  const ept_moe_config config = streams();
  const std::vector<ept_moe *> objects = group.create(config);
  std::vector<Runner> runners;
  for (uint32_t r = 0; r < 2; r++) {
    ept_moe_config mine = config;
    mine.rank = r;
    runners.emplace_back(objects[r], mine, nullptr);
  }
  const Step step = one_way(config);
  const auto right = [&] { group.run([&](uint32_t rank) { runners[rank].run(step); }); };
  right();

  uint32_t altered = 0;
  wire::tamper([&](uint32_t from, uint32_t, char *bytes, size_t length) {
    ept_moe_header header;
    if (from != 1 || length < sizeof header) return;
    memcpy(&header, bytes, sizeof header);
    if (header.magic != EPT_MOE_MAGIC || header.phase != EPT_PHASE_DISPATCH || header.chunk != alteration.chunk) return;
    alteration.make(header, bytes + ept_dispatch_header_bytes(2) + header.row_bytes);
    memcpy(bytes, &header, sizeof header);
    altered++;
  });
  for (Runner &runner : runners) runner.begin(step);
  for (Runner &runner : runners) runner.send(step, nullptr);
  wire::tamper(nullptr);
  CHECK_EQ(altered, 1);
  std::vector<uint8_t> rows(kTokens * 64 * 2 + 16);
  ept_dispatch_outputs out{};
  out.size = sizeof out;
  out.layout = EPT_LAYOUT_ROWS;
  out.x =
      tensor(rows.data() + (16 - reinterpret_cast<uintptr_t>(rows.data()) % 16) % 16, EPT_DTYPE_BF16, {kTokens, 64});
  ept_routing *routing = nullptr;
  Error error;
  CHECK_EQ(ept_moe_dispatch_recv(objects[0], 0, &out, &routing, &error), EPT_E_MISMATCH);
  for (const char *words : alteration.words) CHECK_HAS(error.text, words);
  CHECK_EQ(error.peer, 1);

  group.run([&](uint32_t rank) {
    Error mine;
    OK(ept_moe_reset(objects[rank], 60 * kSecond, &mine), mine);
  });
  right();
  close_all(objects);
}

}  // namespace

int main() {
  for (const Alteration &alteration : kAlterations) {
    check::running(alteration.what);
    a_later_chunk_says_otherwise(alteration);
  }
  return 0;
}
