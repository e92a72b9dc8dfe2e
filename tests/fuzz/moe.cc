// SPDX-License-Identifier: Apache-2.0
//
// What a member writes into the memory that dispatch and combine gave it a key for: headers, counts, rows.
//
// Two real ranks take a step over a wire that alters what rank 1 writes to rank 0. An input: the shape of the step,
// then alterations, each the number of a write, an offset, and what is done there. INVARIANTS: rank 0's call returns a
// code (the lane's fault or OK), nothing is written outside its outputs, which have the exact size that the arrival
// said and guards behind, and both ranks take a right step after a reset.
#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include "eptransport/wire.h"

#include "wire.h"

namespace {

using namespace fuzz;
using namespace wire;

constexpr uint32_t kWorld = 2, kExperts = 6, kTopK = 3, kHidden = 64, kTokens = 8;
constexpr uint64_t kPatience = 15'000'000;  // of a wait for what an altered header promised, ns
constexpr uint64_t kLong = 30'000'000'000;

ept_tensor tensor(const void *data, int32_t dtype, const std::vector<int64_t> &shape) {
  ept_tensor t{};
  t.data = const_cast<void *>(data);
  t.dtype = dtype;
  t.ndim = static_cast<int32_t>(shape.size());
  t.device = -1;
  int64_t stride = 1;
  for (size_t d = shape.size(); d-- > 0;) {
    t.shape[d] = shape[d];
    t.strides[d] = stride;
    stride *= shape[d];
  }
  return t;
}

// Aligned, of exactly that size, with a guard that a sanitizer does not need.
class Exact {
 public:
  explicit Exact(size_t bytes) : bytes_(bytes), all_(bytes + 2 * kGuard, 0xA5) {}
  char *data() { return reinterpret_cast<char *>(all_.data()) + pad(); }
  bool whole() const {
    for (size_t i = pad() + bytes_; i < pad() + bytes_ + kGuard; ++i)
      if (all_[i] != 0xA5) return false;
    return true;
  }

 private:
  static constexpr size_t kGuard = 64;
  size_t pad() const { return -reinterpret_cast<uintptr_t>(all_.data()) % kGuard; }
  size_t bytes_;
  std::vector<uint8_t> all_;
};

struct Shape {
  int32_t layout;
  bool weights, late, row_weights;
  uint32_t tokens[kWorld];
};

class Group {
 public:
  explicit Group(bool quantised) {
    std::string blobs[kWorld];
    const void *pointers[kWorld];
    size_t lengths[kWorld];
    for (uint32_t rank = 0; rank < kWorld; ++rank) {
      engines_[rank] = wire::open(rank, kWorld, kPatience, quantised ? "quantised" : "plain");
      blobs[rank] = address_of(rank, 0);
      pointers[rank] = blobs[rank].data();
      lengths[rank] = blobs[rank].size();
    }
    both([&](uint32_t rank) {
      Error error;
      HOLDS(ept_engine_connect(engines_[rank], pointers, lengths, &error) == EPT_OK);
      HOLDS(ept_engine_wait_connected(engines_[rank], kLong, &error) == EPT_OK);
      HOLDS(ept_arena_create(engines_[rank], &arenas_[rank], &error) == EPT_OK);
    });
    ept_moe_config config{};
    config.size = sizeof config;
    config.world = kWorld;
    config.num_experts = kExperts;
    config.top_k = kTopK;
    config.hidden = kHidden;
    config.max_tokens = kTokens;
    config.lanes = 1;
    config.dtype = config.combine_dtype = EPT_DTYPE_F32;
    config.dispatch_dtype = quantised ? EPT_DTYPE_E4M3 : EPT_DTYPE_F32;
    config.scale_epsilon = 1e-4f;
    config.alignment = 4;
    config.threads = 1;
    quantised_ = quantised;
    ok_ = true;
    both([&](uint32_t rank) {
      ept_moe_config mine = config;
      mine.rank = rank;
      Error error;
      if (ept_moe_create(arenas_[rank], &mine, &moes_[rank], &error)) ok_ = false;
    });
  }
  ~Group() {
    both([&](uint32_t rank) {
      Error error;
      if (moes_[rank]) ept_moe_close(moes_[rank], &error);
      ept_arena_close(arenas_[rank], 0, &error);
    });
    for (ept_engine *engine : engines_) ept_engine_close(engine, 0, nullptr);
  }

  bool made() const { return ok_; }

  // The code of rank 0, which is the one that is lied to.
  int32_t step(const Shape &shape) {
    Error error;
    for (uint32_t rank : {1u, 0u})
      if (const int32_t code = send(rank, shape)) return code;
    ept_routing *routings[kWorld] = {};
    int32_t code = receive(0, shape, &routings[0]);
    const int32_t other = receive(1, shape, &routings[1]);
    for (uint32_t rank : {1u, 0u})
      if (!code && !other) code = give_back(rank, shape, routings[rank]);
    for (uint32_t rank : {0u, 1u})
      if (!code && !other) code = sum(rank, shape);
    for (ept_routing *routing : routings) ept_routing_release(routing);
    return code ? code : other;
  }

  bool reset() {
    std::atomic<bool> all = true;  // both ranks may fail
    both([&](uint32_t rank) {
      Error error;
      if (ept_moe_reset(moes_[rank], kLong, &error)) all = false;
    });
    return all;
  }

 private:
  void both(const std::function<void(uint32_t)> &body) {
    std::thread other([&] { body(1); });
    body(0);
    other.join();
  }

  int32_t send(uint32_t rank, const Shape &shape) {
    const uint32_t tokens = shape.tokens[rank];
    x_[rank].assign(tokens * kHidden, 1.5f);
    ids_[rank].clear();
    for (uint32_t i = 0; i < tokens * kTopK; ++i)
      ids_[rank].push_back(static_cast<int32_t>(i * 7 % (kExperts + 1)) - 1);
    weights_[rank].assign(tokens * kTopK, 0.25f);
    ept_dispatch_args args{};
    args.size = sizeof args;
    args.x = tensor(x_[rank].data(), EPT_DTYPE_F32, {tokens, kHidden});
    args.topk_ids = tensor(ids_[rank].data(), EPT_DTYPE_I32, {tokens, kTopK});
    if (shape.weights && !shape.late) args.topk_weights = tensor(weights_[rank].data(), EPT_DTYPE_F32, {tokens, kTopK});
    Error error;
    return ept_moe_dispatch_send(moes_[rank], &args, &error);
  }

  int32_t receive(uint32_t rank, const Shape &shape, ept_routing **routing) {
    Error error;
    ept_arrival arrival{};
    arrival.size = sizeof arrival;
    if (const int32_t code = ept_moe_dispatch_wait(moes_[rank], 0, &arrival, &error)) return code;
    // What the headers promise is bounded by the config, or nobody could allocate for it.
    HOLDS(arrival.rows <= kWorld * kTokens);
    HOLDS(arrival.max_expert_rows <= kWorld * kTokens * kTopK);
    HOLDS(arrival.contiguous_rows <= kWorld * kTokens * kTopK + 4 * kExperts);
    const bool two = shape.layout == EPT_LAYOUT_BY_RANK || shape.layout == EPT_LAYOUT_MASKED;
    const bool by_expert = shape.layout == EPT_LAYOUT_CONTIGUOUS || shape.layout == EPT_LAYOUT_MASKED;
    const uint64_t n = shape.layout == EPT_LAYOUT_ROWS         ? arrival.rows
                       : shape.layout == EPT_LAYOUT_BY_RANK    ? arrival.max_rank_rows
                       : shape.layout == EPT_LAYOUT_CONTIGUOUS ? arrival.contiguous_rows
                                                               : arrival.max_expert_rows;
    const int64_t local = kExperts / kWorld;
    const int64_t outer = shape.layout == EPT_LAYOUT_BY_RANK ? kWorld : local;
    const uint64_t rows = two ? static_cast<uint64_t>(outer) * n : n;
    rows_[rank] = n;
    auto dims = [&](int64_t last) {
      std::vector<int64_t> all;
      if (two) all.push_back(outer);
      all.push_back(static_cast<int64_t>(n));
      if (last) all.push_back(last);
      return all;
    };
    const uint64_t element = quantised_ ? 1 : 4;
    Exact x(rows * kHidden * element), ids(rows * kTopK * 4), weights(rows * kTopK * 4), source(rows * 8),
        counts(local * 4), offsets((local + 1) * 4), scales(rows * arrival.scale_bytes);
    ept_dispatch_outputs outputs{};
    outputs.size = sizeof outputs;
    outputs.layout = shape.layout;
    outputs.x = tensor(x.data(), quantised_ ? EPT_DTYPE_E4M3 : EPT_DTYPE_F32, dims(kHidden));
    if (arrival.scale_bytes && arrival.scale_bytes % 4 == 0 && quantised_)
      outputs.scales = tensor(scales.data(), EPT_DTYPE_F32, dims(arrival.scale_bytes / 4));
    if (!by_expert) outputs.topk_ids = tensor(ids.data(), EPT_DTYPE_I32, dims(kTopK));
    outputs.topk_weights = tensor(weights.data(), EPT_DTYPE_F32, dims(by_expert ? 0 : kTopK));
    outputs.source = tensor(source.data(), EPT_DTYPE_I32, dims(2));
    outputs.counts = tensor(counts.data(), EPT_DTYPE_I32, {local});
    outputs.offsets = tensor(offsets.data(), EPT_DTYPE_I32, {local + 1});
    const int32_t code = ept_moe_dispatch_recv(moes_[rank], 0, &outputs, routing, &error);
    for (const Exact *each : {&x, &ids, &weights, &source, &counts, &offsets, &scales}) HOLDS(each->whole());
    return code;
  }

  int32_t give_back(uint32_t rank, const Shape &shape, ept_routing *routing) {
    const bool two = shape.layout == EPT_LAYOUT_BY_RANK || shape.layout == EPT_LAYOUT_MASKED;
    const auto n = static_cast<int64_t>(rows_[rank]);
    const int64_t outer = shape.layout == EPT_LAYOUT_BY_RANK ? kWorld : kExperts / kWorld;
    out_[rank].assign(static_cast<size_t>((two ? outer : 1) * n * kHidden), 0.5f);
    beside_[rank].assign(static_cast<size_t>((two ? outer : 1) * n * kTopK), 0.5f);
    ept_combine_args args{};
    args.size = sizeof args;
    args.routing = routing;
    args.layout = shape.layout;
    args.expert_out = two ? tensor(out_[rank].data(), EPT_DTYPE_F32, {outer, n, kHidden})
                          : tensor(out_[rank].data(), EPT_DTYPE_F32, {n, kHidden});
    const bool beside = shape.row_weights && shape.layout <= EPT_LAYOUT_BY_RANK;
    if (beside)
      args.row_weights = two ? tensor(beside_[rank].data(), EPT_DTYPE_F32, {outer, n, kTopK})
                             : tensor(beside_[rank].data(), EPT_DTYPE_F32, {n, kTopK});
    Error error;
    return ept_moe_combine_send(moes_[rank], &args, &error);
  }

  int32_t sum(uint32_t rank, const Shape &shape) {
    Error error;
    Exact y(shape.tokens[rank] * kHidden * 4), beside(shape.tokens[rank] * kTopK * 4);
    const ept_tensor into = tensor(y.data(), EPT_DTYPE_F32, {shape.tokens[rank], kHidden});
    const ept_tensor weights = tensor(beside.data(), EPT_DTYPE_F32, {shape.tokens[rank], kTopK});
    const int32_t code = ept_moe_combine_recv(moes_[rank], 0, &into, shape.row_weights ? &weights : nullptr, &error);
    HOLDS(y.whole() && beside.whole());
    return code;
  }

  ept_engine *engines_[kWorld] = {};
  ept_arena *arenas_[kWorld] = {};
  ept_moe *moes_[kWorld] = {};
  bool quantised_ = false;
  std::atomic<bool> ok_ = false;
  std::vector<float> x_[kWorld], weights_[kWorld], out_[kWorld], beside_[kWorld];
  std::vector<int32_t> ids_[kWorld];
  uint64_t rows_[kWorld] = {};
};

struct Alteration {
  uint8_t write, how;
  uint16_t offset;
  uint32_t value;
};

void alter(const Alteration &what, char *bytes, size_t length) {
  const size_t width = size_t{1} << what.how % 3;
  if (length < width) return;
  const size_t at = (what.how & 0x80 ? what.offset : what.offset % 160) % (length - width + 1);
  uint32_t now = 0;
  memcpy(&now, bytes + at, width);
  now = what.how & 4 ? now ^ what.value : what.how & 8 ? now + what.value : what.value;
  memcpy(bytes + at, &now, width);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t length) {
  static std::unique_ptr<Group> groups[2];
  Input in(bytes, length);
  const uint8_t first = in.take<uint8_t>(), second = in.take<uint8_t>();
  Shape shape{};
  shape.layout = first % 4;
  shape.weights = first & 4;
  shape.row_weights = first & 8;
  shape.tokens[0] = second % (kTokens + 1);
  shape.tokens[1] = (second >> 4) % (kTokens + 1);
  std::unique_ptr<Group> &group = groups[first >> 4 & 1];
  // Making one has the short deadline of the steps too, which a busy machine may miss.
  for (int tries = 0; !group || !group->made(); ++tries) {
    HOLDS(tries < 1000);
    group.reset();
    group = std::make_unique<Group>(first >> 4 & 1);
  }

  std::vector<Alteration> alterations;
  while (!in.empty() && alterations.size() < 16) alterations.push_back(in.take<Alteration>());
  uint32_t writes = 0;
  wire::tamper([&](uint32_t from, uint32_t, char *what, size_t size) {
    if (from != 1 || size < EPT_MOE_HEADER_BYTES) return;  // grants and acks are the engine target's
    for (const Alteration &alteration : alterations)
      if (alteration.write % 4 == writes % 4) alter(alteration, what, size);
    writes++;
  });
  const int32_t code = group->step(shape);
  wire::tamper({});
  HOLDS(code > -100);
  if (code == EPT_OK) return 0;
  // The lie changed nothing that a reset doesn't mend. (A busy machine may miss the short deadline of a right step.)
  for (int tries = 0;; ++tries) {
    HOLDS(tries < 1000);
    HOLDS(group->reset());
    const int32_t again = group->step(shape);
    if (again == EPT_OK) break;
    HOLDS(again == EPT_E_TIMEOUT);
  }
  return 0;
}
