// SPDX-License-Identifier: Apache-2.0
//
// moe_faults.cc: what bad input gets, and what a fault does: it names its cause, the lane answers at once, a reset
// brings every rank back.
#include <chrono>
#include <thread>

#include "moe_steps.h"

using namespace moe_test;

namespace {

void expect(int32_t code, int32_t expected, const Error &error, std::initializer_list<const char *> parts) {
  if (code != expected)
    check::failed(
        __FILE__, __LINE__,
        std::string(ept_code_name(code)) + " where " + ept_code_name(expected) + " was expected: " + error.text);
  for (const char *part : parts) CHECK_HAS(error.text, part);
}

std::vector<Runner> runners(const std::vector<ept_moe *> &objects, const ept_moe_config &config) {
  std::vector<Runner> all;
  for (uint32_t r = 0; r < objects.size(); r++) {
    ept_moe_config mine = config;
    mine.rank = r;
    all.emplace_back(objects[r], mine, nullptr);
  }
  return all;
}

void good_steps(const Group &group, const std::vector<ept_moe *> &objects, const ept_moe_config &config,
                uint64_t seed) {
  auto all = runners(objects, config);
  group.run([&](uint32_t rank) {
    for (uint32_t i = 0; i < 4; i++) {
      Step step = draw(seed + i, config, {.max_tokens = config.max_tokens});
      step.lane = i % config.lanes;
      all[rank].run(step);
    }
  });
}

// ---- set-up ----

void configs() {
  const auto refused = [](auto change, std::initializer_list<const char *> parts) {
    ept_moe_config config = config_of(4, 8, 2, 64, 16);
    change(config);
    ept_moe_plan plan{};
    Error error;
    expect(ept_moe_plan_get(&config, &plan, &error), EPT_E_INVALID, error, parts);
  };
  refused([](auto &c) { c.top_k = 0; }, {"top_k is 0"});
  refused([](auto &c) { c.top_k = 33; }, {"top_k is 33", "32"});
  refused([](auto &c) { c.hidden = 60; }, {"hidden is 60", "120 bytes", "16 bytes"});
  refused([](auto &c) { c.num_experts = 0; }, {"num_experts is 0"});
  refused([](auto &c) { c.max_tokens = 0; }, {"max_tokens is 0"});
  refused([](auto &c) { c.lanes = 65; }, {"lanes is 65"});
  refused([](auto &c) { c.rank = 4; }, {"rank 4 of a world of 4"});
  refused([](auto &c) { c.dtype = EPT_DTYPE_I8; }, {"dtype is int8"});
  refused([](auto &c) { c.combine_dtype = EPT_DTYPE_E4M3; }, {"combine_dtype is float8_e4m3fn"});
  refused([](auto &c) { c.scale_epsilon = -1; }, {"scale_epsilon is -1"});
  refused([](auto &c) { c.buffer_bytes = 1000; }, {"buffer_bytes is 1000", "needs"});
  refused([](auto &c) { c.size = 8; }, {"size is 8"});
  static const int32_t placement[8] = {0, 1, 2, 4, 0, 1, 2, 3};
  refused([](auto &c) { c.placement = placement; }, {"placement[3] is 4"});
}

void mismatches() {
  const Group group(3);
  const int32_t here[6] = {0, 0, 1, 1, 2, 2}, there[6] = {0, 0, 1, 2, 1, 2};
  for (int round = 0; round < 4; round++) {
    group.run([&](uint32_t rank) {
      ept_moe_config config = config_of(3, 6, 2, 64, 8);
      config.rank = rank;
      if (round == 0 && rank == 2) config.hidden = 128;
      if (round == 1 && rank == 0) config.dispatch_dtype = EPT_DTYPE_E4M3;
      if (round == 2) config.placement = rank == 1 ? there : here;
      if (round == 3 && rank == 1) config.top_k = 0;
      ept_moe *moe = nullptr;
      Error error;
      const int32_t code = ept_moe_create(group.arenas[rank], &config, &moe, &error);
      if (round == 0) expect(code, EPT_E_MISMATCH, error, {"hidden is", "64", "128", "rank 2"});
      if (round == 1) expect(code, EPT_E_MISMATCH, error, {"dispatch_dtype is", "bfloat16", "float8_e4m3fn", "rank 0"});
      if (round == 2) expect(code, EPT_E_MISMATCH, error, {"placement[3] is", "1", "2", "rank 1"});
      if (round == 3 && rank == 1) expect(code, EPT_E_INVALID, error, {"top_k is 0"});
      if (round == 3 && rank != 1) expect(code, EPT_E_MISMATCH, error, {"rank 1 refuses its config", "top_k is 0"});
      CHECK(moe == nullptr);
    });
  }
  const ept_moe_config config = config_of(3, 6, 2, 64, 8);  // and the group is still usable
  const auto objects = group.create(config);
  good_steps(group, objects, config, 1);
  close_all(objects);
}

// ---- arguments: nothing is sent, nothing is hurt ----

struct Batch {
  alignas(16) uint16_t x[8 * 64 + 8] = {};
  int32_t ids[8 * 2] = {};
  float weights[8 * 2] = {};
  ept_dispatch_args args{};
  explicit Batch(int64_t tokens = 8) {
    args.size = sizeof args;
    args.x = tensor(x, EPT_DTYPE_BF16, {tokens, 64});
    args.topk_ids = tensor(ids, EPT_DTYPE_I32, {tokens, 2});
    args.topk_weights = tensor(weights, EPT_DTYPE_F32, {tokens, 2});
  }
};

void arguments() {
  const Group group(2);
  ept_moe_config config = config_of(2, 6, 2, 64, 8);
  const auto objects = group.create(config);
  ept_moe *moe = objects[0];
  const auto refused = [&](int32_t code, auto change, std::initializer_list<const char *> parts) {
    Batch batch;
    change(batch);
    Error error;
    expect(ept_moe_dispatch_send(moe, &batch.args, &error), code, error, parts);
    CHECK_HAS(error.operation, "dispatch_send");
  };
  refused(EPT_E_INVALID, [](Batch &b) { b.args.x.shape[1] = 32; }, {"x is bfloat16 [8, 32]", "[any, 64]"});
  refused(EPT_E_INVALID, [](Batch &b) { b.args.x.dtype = EPT_DTYPE_F32; }, {"x is float32 [8, 64]", "bfloat16"});
  refused(EPT_E_INVALID, [](Batch &b) { b.args.x.data = b.x + 1; }, {"16 bytes"});
  refused(EPT_E_INVALID, [](Batch &b) { b.args.x.strides[1] = 2; }, {"inner stride of 2"});
  refused(EPT_E_INVALID, [](Batch &b) { b.args.x.strides[0] = 65; }, {"16 bytes", "65"});
  refused(EPT_E_UNSUPPORTED, [](Batch &b) { b.args.x.device = 0; }, {"CUDA device 0"});
  refused(EPT_E_INVALID, [](Batch &b) { b.ids[5] = 6; }, {"topk_ids[2][1] is 6", "0 to 5"});
  refused(EPT_E_INVALID, [](Batch &b) { b.ids[4] = -2; }, {"topk_ids[2][0] is -2"});
  refused(EPT_E_INVALID, [](Batch &b) { b.args.topk_ids.dtype = EPT_DTYPE_F32; }, {"topk_ids is float32"});
  refused(EPT_E_INVALID, [](Batch &b) { b.args.topk_ids.shape[0] = 7; }, {"topk_ids is int32 [7, 2]", "[8, 2]"});
  refused(EPT_E_INVALID, [](Batch &b) { b.args.topk_ids = {}; }, {"topk_ids is missing"});
  refused(EPT_E_INVALID, [](Batch &b) { b.args.topk_weights.shape[1] = 3; }, {"topk_weights is float32 [8, 3]"});
  refused(EPT_E_INVALID, [](Batch &b) { b.args.scales = b.args.topk_weights; }, {"scales", "caller_scale_bytes"});
  refused(EPT_E_CAPACITY, [](Batch &b) { b.args.x.shape[0] = 9; }, {"9 tokens", "max_tokens is 8"});
  refused(EPT_E_INVALID, [](Batch &b) { b.args.lane = 2; }, {"lane 2"});
  refused(EPT_E_INVALID, [](Batch &b) { b.args.size = 4; }, {"size is 4"});
  Error error;
  ept_arrival arrival{};
  arrival.size = sizeof arrival;
  expect(ept_moe_dispatch_wait(moe, 0, &arrival, &error), EPT_E_INVALID, error, {"no dispatch is under way in lane 0"});
  good_steps(group, objects, config, 20);
  close_all(objects);
}

// Wrong outputs leave the dispatch where it is, so that the call can be made again.
void outputs() {
  const Group group(2);
  const ept_moe_config config = config_of(2, 6, 2, 64, 8);
  const auto objects = group.create(config);
  group.run([&](uint32_t rank) {
    Batch batch;
    for (int i = 0; i < 16; i++) batch.ids[i] = i % 6;
    Error error;
    OK(ept_moe_dispatch_send(objects[rank], &batch.args, &error), error);
    std::vector<uint16_t> x(64 * 64 + 8);
    ept_dispatch_outputs out{};
    out.size = sizeof out;
    out.layout = EPT_LAYOUT_CONTIGUOUS;
    uint16_t *aligned = x.data() + (16 - reinterpret_cast<uintptr_t>(x.data()) % 16) % 16 / 2;
    out.x = tensor(aligned, EPT_DTYPE_BF16, {64, 32});
    ept_routing *routing = nullptr;
    expect(ept_moe_dispatch_recv(objects[rank], 0, &out, &routing, &error), EPT_E_INVALID, error, {"[64, 32]"});
    out.x = tensor(aligned, EPT_DTYPE_BF16, {64, 64});
    out.layout = 4;
    expect(ept_moe_dispatch_recv(objects[rank], 0, &out, &routing, &error), EPT_E_INVALID, error, {"layout is 4"});
    out.layout = EPT_LAYOUT_MASKED;
    expect(ept_moe_dispatch_recv(objects[rank], 0, &out, &routing, &error), EPT_E_INVALID, error, {"x of the outputs"});
    out.layout = EPT_LAYOUT_CONTIGUOUS;
    OK(ept_moe_dispatch_recv(objects[rank], 0, &out, &routing, &error), error);
    ept_combine_args back{};
    back.size = sizeof back;
    back.routing = routing;
    back.layout = EPT_LAYOUT_ROWS;
    back.expert_out = out.x;
    expect(ept_moe_combine_send(objects[rank], &back, &error), EPT_E_INVALID, error, {"layout 0", "layout 2"});
    back.layout = EPT_LAYOUT_CONTIGUOUS;
    back.expert_out.shape[0] = 3;
    expect(ept_moe_combine_send(objects[rank], &back, &error), EPT_E_INVALID, error, {"[3, 64]"});
    back.expert_out.shape[0] = 64;
    OK(ept_moe_combine_send(objects[rank], &back, &error), error);
    ept_tensor y = tensor(aligned, EPT_DTYPE_BF16, {7, 64});
    expect(ept_moe_combine_recv(objects[rank], 0, &y, nullptr, &error), EPT_E_INVALID, error,
           {"y is bfloat16 [7, 64]", "[8, 64]"});
    y.shape[0] = 8;
    OK(ept_moe_combine_recv(objects[rank], 0, &y, nullptr, &error), error);
    ept_routing_release(routing);
  });
  good_steps(group, objects, config, 30);
  close_all(objects);
}

// ---- faults ----

void reset_all(const Group &group, const std::vector<ept_moe *> &objects) {
  group.run([&](uint32_t rank) {
    Error error;
    OK(ept_moe_reset(objects[rank], 20 * kSecond, &error), error);
  });
}

// Too many rows for one rank: it says how many and writes nothing; the others are through; all reset.
void capacity(uint32_t world) {
  const Group group(world);
  const ept_moe_config config = config_of(world, 2 * world, 2, 64, 8);
  const auto objects = group.create(config);
  for (int32_t layout = 0; layout < 4; layout++) {
    group.run([&](uint32_t rank) {
      Batch batch;  // all ids are 0: all rows go to rank 0
      Error error;
      OK(ept_moe_dispatch_send(objects[rank], &batch.args, &error), error);
      const int64_t rows = rank ? 8 * world * 2 : layout == EPT_LAYOUT_BY_RANK ? 7 : 8 * world - 1;
      const int64_t outer = layout == EPT_LAYOUT_BY_RANK ? world : layout == EPT_LAYOUT_MASKED ? 2 : 1;
      std::vector<uint8_t> bytes(size_t(rows * outer * 128) + 32, 0xee);
      uint8_t *aligned = bytes.data() + (16 - reinterpret_cast<uintptr_t>(bytes.data()) % 16) % 16;
      ept_dispatch_outputs out{};
      out.size = sizeof out;
      out.layout = layout;
      out.x = tensor(aligned, EPT_DTYPE_BF16,
                     outer > 1 || layout % 2 ? std::vector<int64_t>{outer, rows, 64} : std::vector<int64_t>{rows, 64});
      ept_routing *routing = nullptr;
      const int32_t code = ept_moe_dispatch_recv(objects[rank], 0, &out, &routing, &error);
      if (rank) {
        OK(code, error);
        ept_routing_release(routing);
        return;
      }
      const uint64_t came = layout == EPT_LAYOUT_BY_RANK ? 8 : layout < EPT_LAYOUT_CONTIGUOUS ? 8 * world : 16 * world;
      expect(code, EPT_E_CAPACITY, error, {std::to_string(came).c_str(), std::to_string(rows).c_str()});
      for (uint8_t byte : bytes) CHECK_EQ(int(byte), 0xee);
      CHECK(routing == nullptr);
      expect(ept_moe_check(objects[rank], 0, &error), EPT_E_FAULT, error, {"EPT_E_CAPACITY", "dispatch_recv"});
      expect(ept_moe_dispatch_send(objects[rank], &batch.args, &error), EPT_E_FAULT, error, {"EPT_E_CAPACITY"});
      OK(ept_moe_check(objects[rank], 1, &error), error);  // the other lane is well
    });
    reset_all(group, objects);
    good_steps(group, objects, config, 100 * uint64_t(layout));
  }
  close_all(objects);
}

// One rank does not come: the others say who, in what, since when; FAULT at once after that; a reset brings all back.
void timeouts(uint32_t world, const Options &base) {
  Options options = base;
  options.timeout_ns = kSecond / 2;
  const Group group(world, options);
  const ept_moe_config config = config_of(world, 2 * world, 2, 64, 8);
  const auto objects = group.create(config);
  for (uint32_t phase = 0; phase < 2; phase++) {
    const uint32_t late = world - 1;
    group.run([&](uint32_t rank) {
      Batch batch;
      for (int i = 0; i < 16; i++) batch.ids[i] = int32_t(uint32_t(i) % (2 * world));
      Error error;
      if (rank == late && phase == 0) return;
      OK(ept_moe_dispatch_send(objects[rank], &batch.args, &error), error);
      ept_dispatch_outputs out{};
      out.size = sizeof out;
      out.layout = EPT_LAYOUT_ROWS;
      ept_routing *routing = nullptr;
      int32_t code = ept_moe_dispatch_recv(objects[rank], 0, &out, &routing, &error);
      if (phase == 1 && code == EPT_OK && rank != late) {
        std::vector<uint8_t> bytes(64 * 64 * 2 * world + 16);
        uint8_t *aligned = bytes.data() + (16 - reinterpret_cast<uintptr_t>(bytes.data()) % 16) % 16;
        ept_combine_args back{};
        back.size = sizeof back;
        back.routing = routing;
        back.layout = EPT_LAYOUT_ROWS;
        back.expert_out = tensor(aligned, EPT_DTYPE_BF16, {int64_t(16 * world), 64});
        OK(ept_moe_combine_send(objects[rank], &back, &error), error);
        const ept_tensor y = tensor(aligned, EPT_DTYPE_BF16, {8, 64});
        code = ept_moe_combine_recv(objects[rank], 0, &y, nullptr, &error);
      }
      ept_routing_release(routing);
      if (rank == late) return;
      const std::string who = "rank " + std::to_string(rank) + " waited", whom = "rank " + std::to_string(late);
      expect(code, EPT_E_TIMEOUT, error, {who.c_str(), whom.c_str(), phase ? "combine" : "dispatch", "lane 0"});
      CHECK_EQ(error.peer, late);
      CHECK_EQ(error.expected, error.seen + 1);
      const auto begin = std::chrono::steady_clock::now();
      expect(ept_moe_dispatch_send(objects[rank], &batch.args, &error), EPT_E_FAULT, error,
             {"EPT_E_TIMEOUT", whom.c_str()});
      CHECK(std::chrono::steady_clock::now() - begin < std::chrono::milliseconds(200));
    });
    reset_all(group, objects);
    good_steps(group, objects, config, 1000 + phase);
  }
  close_all(objects);
}

// A reset that one rank is late for is made again; steps under way are forgotten; streams stop midway.
void resets() {
  Options options;
  options.timeout_ns = 10 * kSecond;
  const Group group(3, options);
  ept_moe_config config = config_of(3, 6, 3, 64, 40);
  ept_moe_plan plan{};
  Error problem;
  OK(ept_moe_plan_get(&config, &plan, &problem), problem);
  config.buffer_bytes = plan.lane_bytes / 3;  // streams
  const auto objects = group.create(config);
  for (uint32_t round = 0; round < 6; round++) {
    group.run([&](uint32_t rank) {
      std::vector<uint16_t> x(40 * 64 + 8);
      uint16_t *aligned = x.data() + (16 - reinterpret_cast<uintptr_t>(x.data()) % 16) % 16 / 2;
      std::vector<int32_t> ids(40 * 3);
      for (size_t i = 0; i < ids.size(); i++) ids[i] = int32_t(i % 6);
      ept_dispatch_args args{};
      args.size = sizeof args;
      args.whole = 1;
      args.x = tensor(aligned, EPT_DTYPE_BF16, {40, 64});
      args.topk_ids = tensor(ids.data(), EPT_DTYPE_I32, {40, 3});
      Error error;
      // The streams have begun on two or three ranks and go no further.
      if (round % 3 != rank) OK(ept_moe_dispatch_send(objects[rank], &args, &error), error);
      if (rank == 1 && round % 2) {
        expect(ept_moe_reset(objects[rank], kSecond / 5, &error), EPT_E_TIMEOUT, error, {"reset", "every rank"});
        expect(ept_moe_check(objects[rank], 0, &error), EPT_E_FAULT, error, {"reset has begun"});
      } else {
        std::this_thread::sleep_for(std::chrono::milliseconds(round % 2 ? 400 : 0));
      }
      OK(ept_moe_reset(objects[rank], 20 * kSecond, &error), error);
    });
    auto all = runners(objects, config);
    group.run([&](uint32_t rank) {
      for (uint32_t i = 0; i < 3; i++) {
        Step step = draw(2000 + round * 10 + i, config, {.max_tokens = 40, .whole = true});
        step.lane = i % 2;
        all[rank].run(step);
      }
    });
  }
  close_all(objects);
}

// Ranks that call different things are told so.
void out_of_step() {
  Options options;
  options.timeout_ns = 2 * kSecond;
  const Group group(2, options);
  const ept_moe_config config = config_of(2, 4, 2, 64, 8);
  const auto a = group.create(config), b = group.create(config);
  group.run([&](uint32_t rank) {
    Batch batch;
    Error error;
    ept_moe *moe = rank ? a[rank] : b[rank];
    OK(ept_moe_dispatch_send(moe, &batch.args, &error), error);
    ept_arrival arrival{};
    arrival.size = sizeof arrival;
    expect(ept_moe_dispatch_wait(moe, 0, &arrival, &error), EPT_E_MISMATCH, error,
           {"out of step", "AllToAll 1", "AllToAll 2"});
  });
  reset_all(group, a);
  good_steps(group, b, config, 70);
  close_all(a);
  close_all(b);
}

// A rank's engine goes away: the others name it, well within the deadline.
void lost_peer() {
  Options options;
  options.timeout_ns = 30 * kSecond;
  const Group group(3, options);
  const ept_moe_config config = config_of(3, 6, 2, 64, 8);
  const auto objects = group.create(config);
  good_steps(group, objects, config, 80);
  group.run([&](uint32_t rank) {
    Error error;
    if (rank == 2) {
      ept_engine_close(group.engines[2], 0, &error);
      return;
    }
    Batch batch;
    const auto begin = std::chrono::steady_clock::now();
    int32_t code = ept_moe_dispatch_send(objects[rank], &batch.args, &error);
    ept_arrival arrival{};
    arrival.size = sizeof arrival;
    if (code == EPT_OK) code = ept_moe_dispatch_wait(objects[rank], 0, &arrival, &error);
    expect(code, EPT_E_PEER_LOST, error, {"rank 2"});
    CHECK_EQ(error.peer, 2);
    CHECK(std::chrono::steady_clock::now() - begin < std::chrono::seconds(15));
    expect(ept_moe_check(objects[rank], 0, &error), EPT_E_FAULT, error, {"EPT_E_PEER_LOST", "rank 2"});
  });
  _exit(0);  // the engine of rank 2 is gone, and its arena with it
}

}  // namespace

int main() {
  RUN(configs());
  RUN(mismatches());
  RUN(arguments());
  RUN(outputs());
  RUN(capacity(1));
  RUN(capacity(3));
  RUN(timeouts(2, {}));
  RUN(timeouts(4, {}));
  RUN(timeouts(3, adversary(11)));
  RUN(resets());
  RUN(out_of_step());
  RUN(lost_peer());
  return 1;
}
