// SPDX-License-Identifier: Apache-2.0
//
// The GPU executor of dispatch and combine against the CPU's, bit for bit, where there is no GPU: its kernels run as
// fibers (simt/), its ranks share one "GPU", and every step is drawn from a seed: layouts by rank, tokens, routing with
// -1 and repeats, formats, lanes, and the order in which threads, blocks and ranks go on.
#include <atomic>

#include "gpu_world.h"

using namespace gpu_test;

namespace {

ept_moe_config quantised(ept_moe_config config, int32_t scales) {
  config.dispatch_dtype = EPT_DTYPE_E4M3;
  config.scale_format = scales;
  return config;
}

void steps(const char *what, const ept_moe_config &config, int count, uint64_t seed, bool edges = false) {
  check::running(what);
  World world(config, seed);
  world.edges = edges;
  world.counts_all = true;
  world.good_steps(count);
}

// By whatever a launch may deal out by, of the numbers where a quotient could be one too small.
void divided() {
  check::running("division by a multiplication");
  using ept::moe::cuda::divisor;
  for (uint32_t by = 1; by <= 700; by++) {
    for (uint32_t q : {0u, 1u, 2u, 99u, 65'535u, 1'000'003u, 0xffffffffu / by - 1, 0xffffffffu / by}) {
      for (uint32_t more : {0u, 1u, by / 2, by - 1}) {
        const uint64_t number = uint64_t(q) * by + more;
        if (number <= UINT32_MAX) CHECK_EQ(divisor(by).of(uint32_t(number)), uint32_t(number) / by);
      }
    }
  }
  for (uint32_t by : {0x10001u, 0x7fffffffu, 0x80000000u, 0xfffffffeu, 0xffffffffu})
    for (uint32_t number : {0u, by - 1, by, 0xfffffffeu, 0xffffffffu}) CHECK_EQ(divisor(by).of(number), number / by);
}

// A thread that looks at the mirror all the time sees nothing but what some step left there, whole.
void watched() {
  check::running("counts that are read while kernels write them");
  World world(moe_test::config_of(1, 40, 4, 16, 30), 14);
  world.config.lanes = 1;
  using Seen = std::pair<int32_t, std::vector<int32_t>>;
  std::map<uint64_t, Seen> seen, expected;
  std::atomic<bool> over = false;
  std::thread reader([&] {
    std::vector<int32_t> counts(40);
    while (!over) {
      ept_gpu_counts at{};
      at.size = sizeof at;
      Error error;
      const int32_t code = ept_gpu_moe_counts(world.objects[0], 0, &at, counts.data(), &error);
      CHECK(code == EPT_OK || code == EPT_LATER);
      if (code != EPT_OK) continue;
      CHECK_EQ(at.ticket, at.epoch);
      const auto [known, fresh] = seen.try_emplace(at.epoch, at.rows, counts);
      CHECK(fresh || known->second == Seen(at.rows, counts));
    }
  });
  for (uint64_t i = 1; i <= 40; i++) {
    Step step = world.draw();
    step.lane = 0;
    Bytes routing;
    Got got;
    got.arrival = world.on_cpu(step)[0].arrival;
    world.send(step, 0, routing);
    world.make(got, step.ranks[0], 0, 0);
    got.ticket = i;
    world.receive(step, 0, routing, got);
    world.gpu->machine.run();
    expected[i] = {got.num_rows, got.counts};
  }
  over = true;
  reader.join();
  for (const auto &[epoch, what] : seen) CHECK(expected.at(epoch) == what);
}

// Some ranks never receive what was sent to them: the next send of the lane takes it away.
void abandoned() {
  check::running("dispatches that are never received");
  World world(moe_test::config_of(3, 6, 2, 32, 7), 11);
  for (int i = 0; i < 5; i++) {
    Step step = world.draw(), other = world.draw();
    other.lane = step.lane;
    std::vector<Bytes> routings(3);
    for (uint32_t r : world.order()) world.send(other, r, routings[r]);
    if (i % 2) world.gpu->machine.run();
    const std::vector<Got> expected = world.on_cpu(step);
    world.compare(step, expected);
  }
}

// A rank that never sends: the others' waits end, their outputs are blank, they say why, and a reset mends it.
void late() {
  check::running("a rank that never sends");
  constexpr uint64_t kPatience = 20'000'000;
  World world(moe_test::config_of(3, 6, 2, 32, 7), 12);
  for (int32_t layout = 0; layout < 4; layout++) {
    Step step = world.draw();
    step.row_weights = false;  // of two layouts alone
    for (RankStep &s : step.ranks) s.layout = layout;
    const std::vector<Got> expected = world.on_cpu(step);
    std::vector<Got> all(3);
    std::vector<Bytes> routings(3);
    for (uint32_t r : {0u, 2u}) world.send(step, r, routings[r]);
    world.gpu->machine.run();  // so that only one is late, however slow this machine is
    world.have_patience(kPatience);
    for (uint32_t r : {0u, 2u}) {
      all[r].arrival = expected[r].arrival;
      world.make(all[r], step.ranks[r], r, 0);
      all[r].ticket = 1000 + r;
      world.receive(step, r, routings[r], all[r]);
      world.sum(step, r, routings[r], all[r]);
    }
    world.gpu->machine.run();
    for (uint32_t r : {0u, 2u}) {
      Error error;
      CHECK_EQ(ept_gpu_moe_check(world.objects[r], step.lane, &error), EPT_E_FAULT);
      CHECK_HAS(error.text, "TIMEOUT in dispatch_recv");
      CHECK_HAS(error.text, "for rank 1, whose signal stands at");
      CHECK_EQ(error.peer, 1);
      CHECK_EQ(all[r].num_rows, 0);
      for (int32_t n : all[r].counts) CHECK_EQ(n, 0);
      world.same_mirror(step.lane, r, all[r], EPT_E_TIMEOUT);
      for (int32_t n : all[r].source) CHECK_EQ(n, -1);
      for (uint64_t i = 0; i < all[r].x.size; i++) CHECK(all[r].x.data()[i] == 0);
      for (uint64_t i = 0; i < all[r].y.size; i++) CHECK(all[r].y.data()[i] == 0);
      // Who blanks has asked whether all blocks have ended, and so stands in that count once more.
      const ept::moe::cuda::Lanes &lanes = *world.lanes[r].lanes;
      const ept::moe::cuda::LaneState &state = *lanes.table(step.lane).state;
      const auto asked = [&](uint32_t p) { return state.ended[p][(state.received[p] - 1) & 1] > lanes.blocks(); };
      CHECK(step.late || asked(EPT_PHASE_DISPATCH));  // late weights were read since, by nobody who asks
      CHECK(asked(EPT_PHASE_COMBINE));
    }
    world.have_patience(60 * moe_test::kSecond);
    world.reset();
  }
}

// Where no number of blocks is asked for, a rank has one on each multiprocessor of its share, and two less where the
// share is large (lanes.cc); without shares one on each of the GPU.
void shares() {
  check::running("blocks of ranks that have a share of the GPU");
  using namespace ept::moe::cuda;
  struct Case {
    uint32_t room, shares, blocks;
  };
  for (const Case &c : {Case{16, 8, 16}, {31, 4, 31}, {32, 4, 30}, {66, 2, 64}, {66, 1, 66}, {132, 1, 132}}) {
    Group group(1);
    const auto gpu = std::make_shared<simt::HostGpu>(1, c.room);
    gpu->shared_by = c.shares;
    ept_gpu_config how{};
    how.size = sizeof how;
    how.timeout_ns = moe_test::kSecond;
    how.mapped = true;
    uint32_t number = 0;
    ept_moe_config config = moe_test::config_of(1, 4, 2, 32, 6);
    config.lanes = 1;
    const auto lanes =
        join(group.arenas[0]->arena, how, config, nullptr, [&](int32_t) { return Opened{gpu, nullptr}; }, &number);
    CHECK_EQ(lanes->blocks(), c.blocks);
  }
}

// Tokens of two experts each, of zeros.
void routed(RankStep &s, int32_t layout, uint32_t hidden, const std::vector<int64_t> &ids) {
  s.layout = layout;
  s.tokens = uint32_t(ids.size() / 2);
  s.x.make(uint64_t(s.tokens) * hidden * 2, 0);
  s.ids = ids;
  s.weights.assign(ids.size(), 1);
  s.late.assign(ids.size(), 1);
}

// The rows that the CPU's outputs have, in ours.
void same_rows(const World &world, const Got &got, const Got &expected) {
  const uint64_t bytes = uint64_t(world.config.hidden) * moe_model::size_of(world.config.dispatch_dtype);
  for (uint64_t row = 0; row < expected.slots; row++)
    if (expected.source[2 * row] >= 0)
      CHECK(memcmp(got.x.data() + row * bytes, expected.x.data() + row * bytes, bytes) == 0);
}

// A block begins when all others of its launch have ended: they have moved all rows of a dispatch by then, where those
// are claimed, and done all of a combine's work.
void late_block() {
  check::running("a dispatch and a combine of which a block begins late");
  using namespace ept::moe::cuda;
  uint32_t waited = 0;
  for (uint64_t seed = 1; seed <= 4; seed++) {
    World world(moe_test::config_of(3, 6, 2, 64, 40), seed);
    for (int32_t layout = 0; layout < 4; layout++) {
      Step step = world.draw();
      step.row_weights = step.late = false;
      std::vector<int64_t> ids(80);
      for (size_t i = 0; i < ids.size(); i++) ids[i] = int64_t(i % 6);
      for (RankStep &s : step.ranks) {
        routed(s, layout, 64, ids);
        for (uint64_t i = 0; i < s.x.size / 2; i++)
          moe_model::put(s.x.data() + 2 * i, float((i + uint64_t(&s - step.ranks.data())) % 251), EPT_DTYPE_BF16);
      }
      const std::vector<Got> expected = world.on_cpu(step);
      std::vector<Got> all(3);
      std::vector<Bytes> routings(3);
      for (uint32_t r = 0; r < 3; r++) world.send(step, r, routings[r]);
      world.gpu->machine.run();
      const auto each = [&](auto launch, auto check) {
        for (uint32_t r = 0; r < 3; r++) {
          world.gpu->machine.hold([&] { check(r), waited++; });
          launch(r);
          world.gpu->machine.run();
          world.gpu->machine.hold({});
        }
      };
      world.gpu->machine.copies(true);  // else rows are dealt
      each([&](uint32_t r) { world.receive(step, r, routings[r], all[r], expected[r]); },
           [&](uint32_t r) { same_rows(world, all[r], expected[r]); });
      each([&](uint32_t r) { world.send_sums(step, r, routings[r], all[r]); },
           [&](uint32_t r) {
             for (uint32_t peer = 0; peer < 3; peer++) {
               const LaneTable &t = world.lanes[peer].lanes->table(step.lane);
               const uint64_t generation = t.state->received[EPT_PHASE_COMBINE];
               const uint32_t signal = signal_index(EPT_PHASE_COMBINE, uint32_t(generation & 1));
               CHECK_EQ(t.words[r][signal], generation / 2 + 1 + t.offsets[r * kSignals + signal]);
             }
           });
      each([&](uint32_t r) { world.receive_sums(step, r, routings[r], all[r]); },
           [&](uint32_t r) { CHECK(memcmp(all[r].y.data(), expected[r].y.data(), all[r].y.size) == 0); });
      for (uint32_t r = 0; r < 3; r++) CHECK(memcmp(all[r].y.data(), expected[r].y.data(), all[r].y.size) == 0);
    }
  }
  CHECK(waited > 0);
}

// An output that is too small, and an id that is none: the lane is faulted, and says which.
void refused() {
  check::running("outputs too small and ids out of range");
  World world(moe_test::config_of(2, 4, 2, 32, 6), 13);
  for (int32_t layout = 0; layout < 5; layout++) {
    world.have_patience(moe_test::kSecond);
    Step step = world.draw();
    step.row_weights = false;
    for (RankStep &s : step.ranks) {
      routed(s, layout % 4, 32, std::vector<int64_t>(12, 3));  // of rank 1
      s.slack = 0;
    }
    const std::vector<Got> expected = world.on_cpu(step);
    if (layout == 4) step.ranks[0].ids[5] = 4;
    std::vector<Got> all(2);
    std::vector<Bytes> routings(2);
    // Of a rank that finds an id that is none, all blocks send: one that begins late, too.
    world.gpu->machine.hold([] {});
    for (uint32_t r = 0; r < 2; r++) world.send(step, r, routings[r]);
    world.gpu->machine.run();
    world.gpu->machine.hold({});
    for (uint32_t r = 0; r < 2; r++) {
      all[r].arrival = expected[r].arrival;
      if (layout < 4 && r == 1) {
        ept_arrival &a = all[r].arrival;
        a.rows--, a.max_rank_rows--, a.contiguous_rows--, a.max_expert_rows--;
      }
      world.make(all[r], step.ranks[r], r, 0);
      world.receive(step, r, routings[r], all[r]);
    }
    world.gpu->machine.run();
    Error error;
    CHECK_EQ(ept_gpu_moe_check(world.objects[layout < 4], step.lane, &error), EPT_E_FAULT);
    CHECK_HAS(error.text, layout < 4 ? "the outputs hold" : "topk_ids has 4; an id is -1 (none) or 0 to 3");
    // And the other one has all that it waits for.
    OK(ept_gpu_moe_check(world.objects[layout == 4], step.lane, &error), error);
    world.reset();
  }
}

// A dispatch of two ranks that both have sent and nobody has received, and what each rank should get.
struct Sent {
  Sent(World &of, Step &its) : world(of), step(its), expected(of.on_cpu(its)), all(2), routings(2) {
    for (uint32_t r = 0; r < 2; r++) world.send(step, r, routings[r]);
    world.gpu->machine.run();
  }
  // Where rank 0's message of that phase is in the lane of `at`.
  char *message(uint32_t phase, uint32_t at = 1) const {
    const ept::moe::cuda::LaneTable &lane = world.lanes[at].lanes->table(step.lane);
    const uint64_t offset = phase == EPT_PHASE_COMBINE
                                ? reinterpret_cast<const uint64_t *>(routings[at].data())[0]  // combine_at
                                : world.objects[at]->object->object.shape.dispatch_region(0).offset;
    return const_cast<char *>(lane.in[0]) + lane.map.recv(phase, uint32_t(lane.state->received[phase] & 1)) + offset;
  }
  void receive() {
    for (uint32_t r = 0; r < 2; r++) world.receive(step, r, routings[r], all[r], expected[r]);
    world.gpu->machine.run();
  }

  World &world;
  Step &step;
  const std::vector<Got> expected;
  std::vector<Got> all;
  std::vector<Bytes> routings;
};

// A row that says of itself what its message's header doesn't: it is written nowhere, the lane is faulted, and a reset
// mends it.
void lies() {
  check::running("rows that are not what their header promised");
  World world(moe_test::config_of(2, 4, 2, 32, 6), 14);
  const ept::moe::Shape &shape = world.objects[1]->object->object.shape;
  for (int32_t layout : {EPT_LAYOUT_CONTIGUOUS, EPT_LAYOUT_MASKED}) {
    for (int lie = 0; lie < 5; lie++) {
      Step step = world.draw();
      step.row_weights = false;
      // Of rank 1, which has two experts.
      for (RankStep &s : step.ranks) routed(s, layout, 32, std::vector<int64_t>(12, 3));
      Sent sent(world, step);
      // Rank 0's message to rank 1 is there, and the rows that it lists are at rank 0.
      char *message = sent.message(EPT_PHASE_DISPATCH);
      ept_moe_header header;
      memcpy(&header, message, sizeof header);
      CHECK_EQ(header.magic, EPT_MOE_MAGIC);
      CHECK_EQ(header.rows, 6);
      CHECK(header.flags & EPT_MOE_LISTED);
      auto *list = reinterpret_cast<uint32_t *>(message + ept_dispatch_header_bytes(2));
      CHECK_EQ(list[4], 4);
      char *row = sent.message(EPT_PHASE_DISPATCH, 0) + shape.dispatch_header() + 4 * header.row_bytes;
      auto *experts = reinterpret_cast<int32_t *>(row + ept_row_experts(header.payload_bytes, header.scale_bytes));
      auto *ordinals =
          reinterpret_cast<uint32_t *>(row + ept_row_ordinals(header.payload_bytes, header.scale_bytes, 2));
      CHECK_EQ(experts[1], 1 << 16 | 1);  // of rank 1, the second
      CHECK_EQ(ordinals[1], 9);
      if (lie == 0) ordinals[1] = 12;  // of the 12 that the header counts
      if (lie == 1) experts[1] = 1 << 16 | 2;
      if (lie == 2) experts[1] = 1 << 16 | 0;  // of whom the header counts none
      if (lie == 3) list[4] = 6;               // of the 6 that a rank has
      if (lie == 4) *reinterpret_cast<uint32_t *>(row + ept_row_token(header.payload_bytes, header.scale_bytes)) = 5;

      sent.receive();
      Error error;
      CHECK_EQ(ept_gpu_moe_check(world.objects[1], step.lane, &error), EPT_E_FAULT);
      CHECK_HAS(error.text, "a row of rank 0 is not what its header promised");
      const char *const says[] = {"(12 of 12)", "(2 of 2)", "(9 of 0)", "(6 of 6)", "(5 of 4)"};
      CHECK_HAS(error.text, says[lie]);
      for (uint64_t i = 0; i < sent.all[1].x.size; i++) CHECK(sent.all[1].x.data()[i] == 0);
      world.reset();
    }
  }
}

// A header of which one field is not what it must be, in either phase: the lane is faulted, and says which. What a
// reader has no use for may be anything.
void other_headers() {
  check::running("headers of which a field is not of this step");
  struct Change {
    size_t at;
    uint32_t bits;
    const char *dispatch, *combine;  // what is wrong; NULL: nothing
  };
#define FIELD(name) offsetof(ept_moe_header, name)
  const char *const region = "combine region", *const rows = "rows", *const row = "row bytes or top_k";
  const Change changes[] = {
      {FIELD(magic), 1, "magic or version", "magic or version"},
      {FIELD(version), 1, "magic or version", "magic or version"},
      {FIELD(version), 1 << 16, "phase, source or lane", "phase, source or lane"},
      {FIELD(source), 1, "phase, source or lane", "phase, source or lane"},
      {FIELD(lane), 1u << 31, "phase, source or lane", "phase, source or lane"},
      {FIELD(chunk), 1, "phase, source or lane", "phase, source or lane"},
      {FIELD(generation), 1, "generation", "generation"},
      {FIELD(generation) + 4, 1, "generation", "generation"},
      {FIELD(object), 1, "AllToAll", "AllToAll"},
      {FIELD(membership), 1, "another membership", "another membership"},
      {FIELD(flags), EPT_MOE_LATE_WEIGHTS, "kind of message", "kind of message"},
      {FIELD(flags), EPT_MOE_ROW_WEIGHTS, "kind of message", row},
      {FIELD(flags), EPT_MOE_LAST, rows, rows},
      {FIELD(rows), 1, rows, rows},
      {FIELD(total_rows), 1, rows, rows},
      {FIELD(total_rows), 1u << 31, rows, rows},
      {FIELD(row_bytes), 16, row, row},
      {FIELD(top_k), 1, row, row},
      {FIELD(scale_bytes), 4, "format", nullptr},
      {FIELD(payload_format), 1, "format", nullptr},
      {FIELD(scale_format), 1, "format", nullptr},
      {FIELD(combine_offset), 1, region, nullptr},
      {FIELD(combine_offset) + 4, 1, region, nullptr},
      {FIELD(combine_capacity) + 4, 1, region, nullptr},
      {FIELD(combine_capacity) + 4, 1u << 31, region, nullptr},
      {sizeof(ept_moe_header) + 4, 1 << 6, "counts", nullptr},
      {FIELD(epoch), 1, nullptr, nullptr},
      {FIELD(consumed), 1, nullptr, nullptr},
      {FIELD(reserved) + 16, 1, nullptr, nullptr},
  };
#undef FIELD
  World world(quantised(moe_test::config_of(2, 4, 2, 256, 6), EPT_SCALES_FP32), 17);
  for (const Change &change : changes) {
    for (const bool combine : {false, true}) {
      if (combine && change.at >= sizeof(ept_moe_header)) continue;  // a sum
      Step step = world.draw();
      step.row_weights = step.late = false;
      for (RankStep &s : step.ranks) {
        std::vector<int64_t> ids;
        for (uint32_t i = 0; i < 12; i++) ids.push_back(i % 2 ? 3 : 1);  // each token to both ranks
        routed(s, EPT_LAYOUT_MASKED, 256, ids);
      }
      Sent sent(world, step);
      const auto alter = [&](uint32_t phase) {
        char *header = sent.message(phase);
        CHECK_EQ(*reinterpret_cast<uint32_t *>(header), EPT_MOE_MAGIC);
        *reinterpret_cast<uint32_t *>(header + change.at) ^= change.bits;
      };
      if (!combine) alter(EPT_PHASE_DISPATCH);
      sent.receive();
      if (combine) {
        for (uint32_t r = 0; r < 2; r++) world.send_sums(step, r, sent.routings[r], sent.all[r]);
        world.gpu->machine.run();
        alter(EPT_PHASE_COMBINE);
        for (uint32_t r = 0; r < 2; r++) world.receive_sums(step, r, sent.routings[r], sent.all[r]);
        world.gpu->machine.run();
      }
      Error error;
      const char *wrong = combine ? change.combine : change.dispatch;
      const int32_t code = ept_gpu_moe_check(world.objects[1], step.lane, &error);
      CHECK_EQ(code, wrong ? EPT_E_FAULT : EPT_OK);
      if (wrong) CHECK_HAS(error.text, wrong);
      if (wrong) CHECK_HAS(error.text, combine ? "combine_recv" : "dispatch_recv");
      world.reset();
    }
  }
}

// A multiprocessor whose memory is divided for a kernel that waits has no room for one that takes more (shared.h).
void same_memory() {
  check::running("launches that take the same shared memory");
  const uint64_t least = ept::moe::cuda::least_shared(64);
  for (const uint32_t experts : {6u, 2400u}) {
    const ept_moe_config config = moe_test::config_of(2, experts, 2, 32, 7);
    World world(config, 15);
    world.good_steps(3);
    const std::set<uint64_t> &took = world.gpu->took.at(64);
    CHECK_EQ(took.size(), 1);
    CHECK_EQ(*took.begin() > least, experts > 6);

    // Blocks of that much, for 800 of the others.
    moe_test::Group net(2);
    const auto gpu = std::make_shared<simt::HostGpu>(1, 1000);
    net.run([&](uint32_t r) {
      ept_moe_config mine = config;
      mine.rank = r;
      mine.hidden = 8192;  // so that one of many experts and short rows fits its memory
      ept_gpu_config how{};
      how.size = sizeof how;
      how.threads = 64;
      how.process = 7;
      how.mapped = true;
      how.blocks = 400 / config.lanes;
      uint32_t number = 0;
      int32_t code = EPT_OK;
      std::string text;
      try {
        const auto lanes =
            ept::moe::cuda::join(net.arenas[r]->arena, how, mine, nullptr, [&](int32_t) { return gpu; }, &number);
        ept_moe_config more = mine;
        more.num_experts = 3000;
        more.hidden = 32;
        lanes->fit(ept::moe::Object(more));
      } catch (const ept::moe::Failure &failure) {
        code = failure.error.code;
        text = failure.error.text;
      }
      CHECK_EQ(code, experts > 6 ? EPT_E_CONFIG : EPT_E_INVALID);
      CHECK_HAS(text.c_str(), experts > 6 ? "set fewer blocks" : "bytes of a block's shared memory doesn't fit lanes");
    });
  }
}

}  // namespace

int main() {
  using moe_test::config_of;
  divided();
  steps("bf16, 2 ranks", config_of(2, 6, 3, 64, 9), 6, 1);
  ept_moe_config padded = config_of(4, 9, 4, 24, 40);
  padded.alignment = 8;
  steps("4 ranks, 9 experts, padded groups, more than one tile", padded, 4, 2);
  steps("1 rank", config_of(1, 5, 2, 40, 12), 3, 3);
  steps("more ranks than a warp has lanes", config_of(33, 35, 9, 16, 3), 1, 15);
  steps("more tokens than a block has lanes, and more experts", config_of(2, 70, 9, 16, 400), 3, 7);
  ept_moe_config f32 = config_of(3, 2, 2, 12, 5);
  f32.dtype = f32.dispatch_dtype = f32.combine_dtype = EPT_DTYPE_F32;
  steps("fp32, fewer experts than ranks, hidden of no 8", f32, 4, 4);
  steps("fp8 with fp32 scales", quantised(config_of(2, 6, 3, 272, 9), EPT_SCALES_FP32), 4, 5);
  steps("fp8 with UE8M0 scales", quantised(config_of(3, 6, 3, 144, 9), EPT_SCALES_UE8M0), 4, 6);
  for (int32_t dtype : {EPT_DTYPE_BF16, EPT_DTYPE_F16, EPT_DTYPE_F32})
    for (int32_t scales : {EPT_SCALES_FP32, EPT_SCALES_UE8M0}) {
      ept_moe_config config = quantised(config_of(2, 6, 3, 1680, 9), scales);
      config.dtype = dtype;
      config.scale_epsilon = 1e-38f;
      steps("fp8 of what is no usual number", config, 2, 12, true);
    }
  // Rows are moved by 64 vectors of 16 bytes a step, and cut between steps; a warp keeps the scales of 32 blocks.
  steps("rows of several steps", config_of(2, 5, 3, 1176, 5), 3, 8);
  ept_moe_config wide = config_of(3, 4, 2, 532, 4);
  wide.dtype = wide.dispatch_dtype = wide.combine_dtype = EPT_DTYPE_F32;
  steps("rows of several steps in fp32", wide, 2, 9);
  steps("more scales than a warp has lanes", quantised(config_of(2, 4, 2, 4736, 24), EPT_SCALES_FP32), 2, 10);
  steps("more bytes of scales than a warp has lanes", quantised(config_of(2, 4, 2, 4864, 24), EPT_SCALES_UE8M0), 2, 11);
  // The copy engine moves runs of 4 KiB, and with the last of a row its scales, where they are whole vectors.
  for (uint32_t hidden : {512u, 4096u, 4608u})
    steps("scales that move with their rows", quantised(config_of(2, 4, 2, hidden, 9), EPT_SCALES_FP32), 3, 13);
  steps("the same of rows in parts", quantised(config_of(2, 4, 2, 4608, 1), EPT_SCALES_FP32), 12, 13);
  watched();
  same_memory();
  abandoned();
  late();
  late_block();
  shares();
  refused();
  lies();
  other_headers();
  return 0;
}
