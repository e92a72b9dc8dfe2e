// SPDX-License-Identifier: Apache-2.0
#include "moe_steps.h"

#include <math.h>
#include <string.h>

#include <random>

namespace moe_test {

Step draw(uint64_t seed, const ept_moe_config &config, const Draw &how) {
  std::mt19937_64 random(seed);
  const auto below = [&](uint64_t n) { return uint32_t(random() % n); };
  Step step;
  const uint32_t world = config.world;
  step.lane = below(config.lanes);
  // A rank that abandons a stream tells so in its next call of that lane, so ranks that wait for it must get there.
  if (how.whole && how.may_abandon) step.lane = 0;
  step.whole = how.whole;
  step.weights = Weights(below(3));
  step.quantised = config.caller_scale_bytes > 0 && below(2);
  step.cached = below(4) == 0;
  step.combines = below(how.most_combines + 1);
  step.row_weights = below(3) == 0;
  const int32_t floats[] = {EPT_DTYPE_F32, EPT_DTYPE_F16, EPT_DTYPE_BF16};
  const int32_t wire = config.dispatch_dtype;
  for (uint32_t r = 0; r < world; r++) {
    step.abandon.push_back(how.may_abandon && below(5) == 0 ? uint8_t(1 + below(2)) : 0);
    step.layouts.push_back(int32_t(below(4)));
    step.out_dtypes.push_back(floats[below(3)]);
    step.y_dtypes.push_back(floats[below(3)]);
    step.applied.push_back(below(3) == 0);
    step.slack.push_back(below(2) * below(9));
    moe_model::Input input;
    const uint32_t shape = below(8);
    input.tokens = shape == 0 ? 0 : shape == 1 ? how.max_tokens : below(how.max_tokens + 1);
    const bool skewed = below(3) == 0;
    for (uint32_t i = 0; i < input.tokens * config.top_k; i++) {
      const uint32_t draw = below(16);
      input.ids.push_back(draw == 0                      ? -1
                          : draw < 3 && i % config.top_k ? input.ids.back()  // a repeated id
                          : skewed                       ? int32_t(below(1 + config.num_experts / 4))
                                                         : int32_t(below(config.num_experts)));
      input.weights.push_back(float(int32_t(below(2001)) - 1000) / 700.0f);
    }
    const int32_t format = step.quantised ? wire : config.dtype;
    const size_t size = moe_model::size_of(format);
    input.x.resize(size_t(input.tokens) * config.hidden * size);
    for (size_t i = 0; i < size_t(input.tokens) * config.hidden; i++) {
      const float value = ldexpf(float(int32_t(below(65536)) - 32768), int(below(24)) - 22);
      moe_model::put(&input.x[i * size], format == EPT_DTYPE_F16 ? value / 1024 : value, format);
    }
    std::vector<uint8_t> scales(step.quantised ? size_t(input.tokens) * config.caller_scale_bytes : 0);
    for (uint8_t &byte : scales) byte = uint8_t(random());
    step.inputs.push_back(std::move(input));
    step.scales.push_back(std::move(scales));
  }
  return step;
}

Runner::Runner(ept_moe *moe, const ept_moe_config &config, const int32_t *placement)
    : moe_(moe), config_(config), homes_(config.world, config.num_experts, placement) {}

std::vector<int64_t> Runner::shape(const Outputs &out, std::vector<int64_t> rest) const {
  std::vector<int64_t> dims;
  if (out.two) dims.push_back(out.layout == EPT_LAYOUT_MASKED ? homes_.held[config_.rank] : config_.world);
  dims.push_back(int64_t(out.n));
  dims.insert(dims.end(), rest.begin(), rest.end());
  return dims;
}

bool Runner::cut_short(const Step &step, uint8_t half, int32_t code, const Error &error) const {
  if (code != EPT_E_CLOSED) return false;
  // The peer that is named may have ended for the same reason, and passed it on.
  bool one_did = false;
  for (uint8_t a : step.abandon) one_did = one_did || a == half;
  CHECK(step.whole && one_did && error.peer >= 0);
  CHECK_HAS(error.text, "abandoned");
  Error after;
  OK(ept_moe_check(moe_, step.lane, &after), after);
  return true;
}

float Runner::weight(const Step &step, const moe_model::Row &row, uint32_t k) const {
  return step.weights == Weights::none ? 1.0f : step.inputs[row.source].weights[row.token * config_.top_k + k];
}

float Runner::row_value(const moe_model::Row &row, uint32_t rank, uint32_t column) {
  return moe_model::expert_value(row.source, row.token, rank, rank + 3, column);
}

void Runner::send(const Step &step, ept_routing *routing) {
  const moe_model::Input &input = step.inputs[config_.rank];
  const int64_t tokens = input.tokens, k = config_.top_k, hidden = config_.hidden;
  ept_dispatch_args args{};
  args.size = sizeof args;
  args.lane = step.lane;
  args.whole = step.whole;
  args.routing = routing;
  std::vector<uint8_t> aligned(input.x.size() + 16);
  uint8_t *x = aligned.data() + (16 - reinterpret_cast<uintptr_t>(aligned.data()) % 16) % 16;
  if (!input.x.empty()) memcpy(x, input.x.data(), input.x.size());
  args.x = tensor(x, step.quantised ? config_.dispatch_dtype : config_.dtype, {tokens, hidden});
  // Ids come as int64 in every other column, to see that strides are heeded.
  std::vector<int64_t> wide(size_t(tokens * k * 2), 1'000'000);
  for (size_t i = 0; i < input.ids.size(); i++) wide[2 * i] = input.ids[i];
  if (!routing) {
    args.topk_ids = tensor(wide.data(), EPT_DTYPE_I64, {tokens, k});
    args.topk_ids.strides[0] = 2 * k;
    args.topk_ids.strides[1] = 2;
  }
  if (step.weights == Weights::given && !routing)
    args.topk_weights = tensor(input.weights.data(), EPT_DTYPE_F32, {tokens, k});
  if (step.quantised)
    args.scales = tensor(step.scales[config_.rank].data(), EPT_DTYPE_U8, {tokens, int64_t(config_.caller_scale_bytes)});
  Error error;
  OK(ept_moe_dispatch_send(moe_, &args, &error), error);
  if (step.whole) keep_ = std::move(aligned);  // x lives until recv returns
}

void Runner::payload(const Step &step, const moe_model::Row &row, std::vector<uint8_t> &x,
                     std::vector<uint8_t> &scales) const {
  const moe_model::Input &input = step.inputs[row.source];
  const int32_t format = step.quantised ? config_.dispatch_dtype : config_.dtype;
  const size_t bytes = config_.hidden * moe_model::size_of(format);
  const uint8_t *from = &input.x[row.token * bytes];
  x.clear();
  scales.clear();
  if (config_.dispatch_dtype == config_.dtype || step.quantised) {
    x.assign(from, from + bytes);
    if (step.quantised)
      scales.assign(&step.scales[row.source][row.token * config_.caller_scale_bytes],
                    &step.scales[row.source][row.token * config_.caller_scale_bytes] + config_.caller_scale_bytes);
    return;
  }
  std::vector<float> values;
  for (uint32_t i = 0; i < config_.hidden; i++)
    values.push_back(moe_model::decode(from + i * moe_model::size_of(format), format));
  moe_model::quantise(values, config_.scale_format == EPT_SCALES_UE8M0, config_.scale_epsilon, x, scales);
}

ept_routing *Runner::receive(const Step &step) {
  const uint32_t rank = config_.rank, local = homes_.held[rank];
  const std::vector<moe_model::Row> &rows = rows_[rank];
  Error error;
  ept_arrival arrival{};
  arrival.size = sizeof arrival;
  int32_t code = ept_moe_dispatch_wait(moe_, step.lane, &arrival, &error);
  if (cut_short(step, 1, code, error)) return nullptr;
  OK(code, error);
  Outputs out;
  out.layout = step.layouts[rank];
  out.two = out.layout == EPT_LAYOUT_BY_RANK || out.layout == EPT_LAYOUT_MASKED;
  out.per_expert = out.layout == EPT_LAYOUT_CONTIGUOUS || out.layout == EPT_LAYOUT_MASKED;
  using moe_model::places_of;
  const auto needs = [&](int32_t layout) {
    return places_of(rows, layout, config_.world, local, config_.alignment, 0).needed;
  };
  CHECK_EQ(arrival.rows, rows.size());
  CHECK_EQ(arrival.contiguous_rows, needs(EPT_LAYOUT_CONTIGUOUS));
  CHECK_EQ(arrival.max_rank_rows, needs(EPT_LAYOUT_BY_RANK));
  CHECK_EQ(arrival.max_expert_rows, needs(EPT_LAYOUT_MASKED));
  if (!rows.empty()) CHECK_EQ(arrival.has_weights != 0, step.weights == Weights::given);
  out.n = n_ = needs(out.layout) + step.slack[rank];
  const moe_model::Places places = places_of(rows, out.layout, config_.world, local, config_.alignment, out.n);
  out.slots = out.n * (out.layout == EPT_LAYOUT_MASKED ? local : out.two ? config_.world : 1);

  const int64_t k = config_.top_k;
  const size_t wire = moe_model::size_of(config_.dispatch_dtype);
  out.x.assign(out.slots * config_.hidden * wire + 16, 0xee);
  uint8_t *x = out.x.data() + (16 - reinterpret_cast<uintptr_t>(out.x.data()) % 16) % 16;
  out.scales.assign(out.slots * arrival.scale_bytes, 0xee);
  out.counts.assign(local, -7);
  out.offsets.assign(local + 1, -7);
  out.ids.assign(out.slots * size_t(k), -7);
  out.weights.assign(out.slots * size_t(out.per_expert ? 1 : k), -7);
  out.source.assign(out.slots * 2, -7);
  ept_dispatch_outputs to{};
  to.size = sizeof to;
  to.layout = out.layout;
  to.x = tensor(x, config_.dispatch_dtype, shape(out, {int64_t(config_.hidden)}));
  if (arrival.scale_bytes) {
    const bool fp32 = arrival.scale_format == EPT_DTYPE_F32;
    const int64_t blocks = fp32 ? arrival.scale_bytes / 4 : arrival.scale_bytes;
    to.scales = tensor(out.scales.data(), fp32 ? EPT_DTYPE_F32 : EPT_DTYPE_U8, shape(out, {blocks}));
    if (!out.two && out.slots) {  // the column layout
      to.scales.strides[0] = 1;
      to.scales.strides[1] = int64_t(out.slots);
    }
  }
  to.counts = tensor(out.counts.data(), EPT_DTYPE_I32, {local});
  to.offsets = tensor(out.offsets.data(), EPT_DTYPE_I32, {local + 1});
  if (!out.per_expert) to.topk_ids = tensor(out.ids.data(), EPT_DTYPE_I32, shape(out, {k}));
  to.topk_weights = tensor(out.weights.data(), EPT_DTYPE_F32,
                           shape(out, out.per_expert ? std::vector<int64_t>{} : std::vector<int64_t>{k}));
  to.source = tensor(out.source.data(), EPT_DTYPE_I32, shape(out, {2}));
  ept_routing *routing = nullptr;
  code = ept_moe_dispatch_recv(moe_, step.lane, &to, &routing, &error);
  if (cut_short(step, 1, code, error)) return nullptr;
  OK(code, error);
  memmove(out.x.data(), x, out.slots * config_.hidden * wire);
  verify(step, out, places);
  verify_lost(step, routing);
  return routing;
}

void Runner::verify_lost(const Step &step, const ept_routing *routing) const {
  const std::vector<int32_t> &ids = step.inputs[config_.rank].ids;
  const auto masked = [&](uint32_t rank) { return !step.masked.empty() && step.masked[rank]; };
  uint32_t membership = UINT32_MAX;
  std::vector<uint8_t> ranks(config_.world, 7), lost(ids.size(), 7);
  CHECK_EQ(ept_routing_lost(routing, &membership, ranks.data(), lost.data()), EPT_OK);
  CHECK_EQ(membership, step.membership);
  for (uint32_t r = 0; r < config_.world; r++) CHECK_EQ(ranks[r] == 1, masked(r));
  for (size_t i = 0; i < ids.size(); i++)
    CHECK_EQ(int(lost[i]), ids[i] >= 0 && masked(homes_.rank[size_t(ids[i])]) ? 1 : 0);
}

void Runner::verify(const Step &step, const Outputs &out, const moe_model::Places &places) const {
  const std::vector<moe_model::Row> &rows = rows_[config_.rank];
  CHECK(out.counts == places.counts);
  CHECK(out.offsets == places.offsets);
  const uint32_t top_k = config_.top_k;
  const bool weighed = step.weights == Weights::given;
  std::vector<uint8_t> filled(out.slots, 0), x, scales, got;
  for (size_t j = 0; j < rows.size(); j++) {
    payload(step, rows[j], x, scales);
    for (uint32_t k = 0; k < places.of[j].size(); k++) {
      if (places.of[j][k] < 0) continue;
      const auto at = size_t(places.of[j][k]);
      filled[at]++;
      CHECK_EQ(out.source[2 * at], rows[j].source);
      CHECK_EQ(out.source[2 * at + 1], rows[j].token);
      CHECK(memcmp(&out.x[at * x.size()], x.data(), x.size()) == 0);
      got.assign(scales.size(), 0);
      const size_t size = config_.scale_format == EPT_SCALES_FP32 && !step.quantised ? 4 : 1;
      for (size_t b = 0; b < scales.size() / size; b++)
        memcpy(&got[b * size], &out.scales[size * (out.two ? at * (scales.size() / size) + b : b * out.slots + at)],
               size);
      CHECK(got == scales);
      if (out.per_expert) {
        CHECK_EQ(out.weights[at], weighed ? weight(step, rows[j], k) : 1.0f);
        continue;
      }
      for (uint32_t i = 0; i < top_k; i++) {
        const int32_t e = rows[j].experts[i];
        CHECK_EQ(out.ids[at * top_k + i], e);
        CHECK_EQ(out.weights[at * top_k + i], e < 0 ? 0.0f : weighed ? weight(step, rows[j], i) : 1.0f);
      }
    }
  }
  for (size_t at = 0; at < out.slots; at++) {
    CHECK(filled[at] <= 1);
    if (filled[at]) continue;
    CHECK_EQ(out.source[2 * at], -1);
    CHECK_EQ(out.source[2 * at + 1], -1);
    for (uint32_t i = 0; i < (out.per_expert ? 1 : top_k); i++) {
      CHECK_EQ(out.weights[at * (out.per_expert ? 1 : top_k) + i], 0.0f);
      if (!out.per_expert) CHECK_EQ(out.ids[at * top_k + i], -1);
    }
  }
}

// What this rank's token gets, rounded as the wire and the ranks round.
std::vector<float> Runner::sums(const Step &step, uint32_t token, std::vector<float> &beside) const {
  std::vector<float> total(config_.hidden, 0.0f);
  beside.assign(config_.top_k, 0.0f);
  for (uint32_t rank = 0; rank < config_.world; rank++)
    for (const moe_model::Row &row : rows_[rank]) {
      if (row.source != config_.rank || row.token != token) continue;
      const int32_t format = step.out_dtypes[rank];
      const bool per_expert = step.layouts[rank] >= EPT_LAYOUT_CONTIGUOUS;
      for (uint32_t c = 0; c < config_.hidden; c++) {
        uint8_t bits[4];
        float acc = 0.0f;
        if (!per_expert) {
          moe_model::put(bits, row_value(row, rank, c), format);
          acc = moe_model::decode(bits, format);
        }
        for (uint32_t k = 0; per_expert && k < config_.top_k; k++) {
          if (row.experts[k] < 0) continue;
          const auto id = uint32_t(step.inputs[row.source].ids[token * config_.top_k + k]);
          moe_model::put(bits, moe_model::expert_value(row.source, token, k, id, c), format);
          acc = fmaf(step.applied[rank] ? 1.0f : weight(step, row, k), moe_model::decode(bits, format), acc);
        }
        moe_model::put(bits, acc, config_.combine_dtype);
        total[c] = total[c] + moe_model::decode(bits, config_.combine_dtype);
      }
      for (uint32_t k = 0; step.row_weights && !per_expert && k < config_.top_k; k++)
        beside[k] = beside[k] + row_value(row, rank, k + 1000);
    }
  return total;
}

void Runner::combine(const Step &step, ept_routing *routing, bool receive) {
  const uint32_t rank = config_.rank, local = homes_.held[rank];
  const std::vector<moe_model::Row> &rows = rows_[rank];
  const int64_t k = config_.top_k, hidden = config_.hidden, tokens = step.inputs[rank].tokens;
  Outputs out;
  out.layout = step.layouts[rank];
  out.two = out.layout == EPT_LAYOUT_BY_RANK || out.layout == EPT_LAYOUT_MASKED;
  out.per_expert = out.layout >= EPT_LAYOUT_CONTIGUOUS;
  out.n = n_;
  out.slots = out.n * (out.layout == EPT_LAYOUT_MASKED ? local : out.two ? config_.world : 1);
  const moe_model::Places places =
      moe_model::places_of(rows, out.layout, config_.world, local, config_.alignment, out.n);
  const int32_t format = step.out_dtypes[rank];
  const size_t size = moe_model::size_of(format);
  out.x.assign(out.slots * size_t(hidden) * size + 16, 0xff);  // what no row fills is NaN, and must not be read
  uint8_t *x = out.x.data() + (16 - reinterpret_cast<uintptr_t>(out.x.data()) % 16) % 16;
  std::vector<float> row_weights(out.slots * size_t(k), NAN);
  for (size_t j = 0; j < rows.size(); j++)
    for (uint32_t i = 0; i < places.of[j].size(); i++) {
      if (places.of[j][i] < 0) continue;
      const auto at = size_t(places.of[j][i]);
      for (uint32_t c = 0; c < uint32_t(hidden); c++) {
        const uint32_t id = uint32_t(step.inputs[rows[j].source].ids[rows[j].token * size_t(k) + i]);
        moe_model::put(x + (at * size_t(hidden) + c) * size,
                       out.per_expert ? moe_model::expert_value(rows[j].source, rows[j].token, i, id, c)
                                      : row_value(rows[j], rank, c),
                       format);
      }
      for (uint32_t c = 0; c < uint32_t(k); c++) row_weights[at * size_t(k) + c] = row_value(rows[j], rank, c + 1000);
    }
  ept_combine_args args{};
  args.size = sizeof args;
  args.lane = step.lane;
  args.routing = routing;
  args.layout = out.layout;
  args.weights_applied = step.applied[rank];
  args.whole = step.whole;
  args.expert_out = tensor(x, format, shape(out, {hidden}));
  if (step.weights == Weights::late)
    args.topk_weights = tensor(step.inputs[rank].weights.data(), EPT_DTYPE_F32, {tokens, k});
  if (step.row_weights && !out.per_expert)
    args.row_weights = tensor(row_weights.data(), EPT_DTYPE_F32, shape(out, {k}));
  Error error;
  OK(ept_moe_combine_send(moe_, &args, &error), error);
  if (!receive) return;

  const int32_t y_format = step.y_dtypes[rank];
  const size_t y_size = moe_model::size_of(y_format);
  std::vector<uint8_t> y_bytes(size_t(tokens * hidden) * y_size + 16, 0xee);
  uint8_t *y = y_bytes.data() + (16 - reinterpret_cast<uintptr_t>(y_bytes.data()) % 16) % 16;
  std::vector<float> y_weights(size_t(tokens * k), -7);
  const ept_tensor to = tensor(y, y_format, {tokens, hidden});
  const ept_tensor weights_to = tensor(y_weights.data(), EPT_DTYPE_F32, {tokens, k});
  const int32_t code = ept_moe_combine_recv(moe_, step.lane, &to, step.row_weights ? &weights_to : nullptr, &error);
  if (cut_short(step, 2, code, error)) return;
  OK(code, error);
  std::vector<float> beside;
  for (uint32_t t = 0; t < tokens; t++) {
    const std::vector<float> expected = sums(step, t, beside);
    for (uint32_t c = 0; c < uint32_t(hidden); c++) {
      uint32_t got = 0;
      memcpy(&got, y + (t * size_t(hidden) + c) * y_size, y_size);
      CHECK_EQ(got, moe_model::encode(expected[c], y_format));
    }
    for (uint32_t c = 0; step.row_weights && c < uint32_t(k); c++) CHECK_EQ(y_weights[t * size_t(k) + c], beside[c]);
  }
}

void Runner::begin(const Step &step) {
  std::vector<moe_model::Input> inputs = step.inputs;  // as they are without the ranks that take no part
  for (uint32_t r = 0; r < step.masked.size(); r++)
    if (step.masked[r]) inputs[r] = {};
  for (moe_model::Input &input : inputs)
    for (int32_t &id : input.ids)
      if (id >= 0 && !step.masked.empty() && step.masked[homes_.rank[size_t(id)]]) id = -1;
  rows_.clear();
  for (uint32_t r = 0; r < config_.world; r++) rows_.push_back(moe_model::rows_at(homes_, r, config_.top_k, inputs));
}

void Runner::run(const Step &step) {
  begin(step);
  const uint8_t abandon = step.abandon[config_.rank];
  // Whoever abandons, all ranks make the same sends: so an abandoned dispatch has no combine anywhere.
  bool combines = true;
  for (uint8_t a : step.abandon) combines = combines && a != 1;
  send(step, nullptr);
  if (abandon == 1) return;
  ept_routing *routing = receive(step);
  if (!routing) return;
  if (step.cached && combines) {
    send(step, routing);
    ept_routing *again = receive(step);
    ept_routing_release(routing);
    routing = again;
  }
  for (uint32_t i = 0; combines && i < step.combines; i++)
    combine(step, routing, !(abandon == 2 && i + 1 == step.combines));
  ept_routing_release(routing);
}

}  // namespace moe_test
