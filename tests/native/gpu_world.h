// SPDX-License-Identifier: Apache-2.0
//
// gpu_world.h: the same step drawn from a seed, on CPU ranks and on ranks of a GPU of fibers (simt/), and compared bit
// for bit: layouts by rank, tokens, routing with -1 and repeats, formats, lanes, and the order in which threads, blocks
// and ranks go on.
#pragma once

#include <string.h>

#include <algorithm>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "moe/cuda/lanes.h"
#include "moe/moe.h"
#include "moe_group.h"
#include "moe_model.h"
#include "simt/host_gpu.h"
#include "simt/library.h"

namespace gpu_test {

using moe_test::Error;
using moe_test::Group;
using moe_test::tensor;
using Random = std::mt19937_64;

struct alignas(16) Unit {
  char bytes[16];
};
struct Bytes {  // as a GPU's memory, aligned
  std::vector<Unit> units;
  uint64_t size = 0;
  void make(uint64_t bytes, char value) {
    size = bytes;
    units.assign(bytes / 16 + 1, Unit{});
    memset(units.data(), value, units.size() * 16);
  }
  char *data() { return reinterpret_cast<char *>(units.data()); }
  const char *data() const { return reinterpret_cast<const char *>(units.data()); }
};

inline uint64_t below(Random &random, uint64_t n) { return random() % n; }

struct RankStep {
  uint32_t tokens = 0;
  Bytes x;
  std::vector<int64_t> ids;
  std::vector<float> weights;
  int32_t layout = 0, out_dtype = 0, y_dtype = 0;
  bool weights_applied = false, abandons = false;
  uint64_t slack = 0;
  Bytes out;                // expert_out
  std::vector<float> late;  // weights that come with combine
};
struct Step {
  uint32_t lane = 0;
  bool weighed = true;
  bool late = false;         // weights come with combine
  bool row_weights = false;  // rows carry some
  std::vector<RankStep> ranks;
};

// What a rank gets.
struct Got {
  uint64_t n = 0, slots = 0;
  ept_arrival arrival{};
  Bytes x, scales, y;
  std::vector<float> beside, sums;  // row weights, of the rows and of the tokens
  std::vector<int32_t> counts, offsets, ids, source;
  std::vector<float> weights;
  int32_t num_rows = -7;
  uint64_t ticket = 0;  // 0: its counts are not mirrored
  ept_dispatch_outputs tensors{};
};

inline bool is_two(int32_t layout) { return layout == EPT_LAYOUT_BY_RANK || layout == EPT_LAYOUT_MASKED; }
inline bool is_per_expert(int32_t layout) { return layout == EPT_LAYOUT_CONTIGUOUS || layout == EPT_LAYOUT_MASKED; }

// Of lanes over an engine: ept_gpu_config.memory of the worlds that are made next.
inline uint32_t home_wished = 0;
inline bool gpu_orders_network = true;
// Of the worlds that are made next: ept_gpu_config's.
inline uint32_t most_blocks = 3;
inline int32_t path = EPT_GPU_PATH_GPU;  // what a clock says chooses in no other test
inline uint64_t crossover_bytes = 0;
inline uint64_t library_costs = 0;  // what a put takes, on the GPU's clock

struct World {
  ept_moe_config config;
  Group cpu;
  std::vector<ept_moe *> cpu_objects;
  std::unique_ptr<simt::Library> library;
  std::shared_ptr<simt::HostGpu> gpu;
  std::string where;  // as `on`
  std::vector<ept_gpu_config> ways;
  std::unique_ptr<Group> net;
  std::vector<ept_moe *> net_objects;  // of its ranks that are on a CPU
  std::vector<ept_gpu_lanes> lanes;    // of those that are on the GPU
  std::vector<ept_gpu_moe *> objects;
  std::vector<uint32_t> local;
  std::vector<std::vector<uint8_t>> open;  // [rank][lane] a dispatch that was never received
  std::vector<uint8_t> up;                 // [rank] takes part
  bool edges = false;                      // what is sent is no usual number
  bool counts_all = false;                 // no step is made on one side alone
  Random random;

  // All ranks on one GPU, and in each other's address space.
  World(const ept_moe_config &given, uint64_t seed, uint64_t timeout_ns = 60 * moe_test::kSecond)
      : World(given, seed, std::string(given.world, 'm'), {}, timeout_ns) {}
  // Over an engine. on[rank]: 'c' on a CPU, 'g' on the GPU, 'm' likewise, and such ranks map each other's memory; a
  // digit likewise, among those of the same one: its node. 'i' on the GPU, its kernels put into the heap of others; a
  // capital likewise, and those of the same one map each other's memory: its node.
  World(const ept_moe_config &given, uint64_t seed, const std::string &on, const moe_test::Options &options,
        uint64_t timeout_ns = 60 * moe_test::kSecond)
      : World(given, seed, timeout_ns, std::make_unique<Group>(given.world, options), on) {
    std::vector<ept_gpu_config> hows;
    std::vector<uint32_t> numbers(config.world);
    for (uint32_t r = 0; r < config.world; r++) {
      const bool node = (on[r] >= '0' && on[r] <= '9') || puts(on[r], true);
      hows.push_back(how(timeout_ns, on[r] == 'm' || node));
      if (node) hows[r].node[0] = on[r];
    }
    where = on;
    ways = hows;
    if (std::any_of(on.begin(), on.end(), [](char c) { return puts(c, false); })) {
      library = std::make_unique<simt::Library>(config.world, 16 << 20, seed);
      library->costs = library_costs;
      // Ranks of a node map each other's heap; of the others some do, for the library alone.
      library->maps = [this, seed](uint32_t a, uint32_t b) {
        return (puts(where[a], true) && where[a] == where[b]) || (a + b + seed) % 2 != 0;
      };
      gpu->machine.beside([this] { library->move(); });
    }
    lanes.resize(config.world);
    net->run([&](uint32_t r) {
      Error error;
      const ept_moe_config mine = config_of(r);
      if (on[r] == 'c')
        OK(ept_moe_create(net->arenas[r], &mine, &net_objects[r], &error), error);
      else
        lanes[r].lanes = join(r, mine, hows[r], nullptr, &numbers[r]);
    });
    for (uint32_t r = 0; r < config.world; r++)
      if (on[r] != 'c') open_object(r, numbers[r]);
  }
  // That rank's process has ended, and one in its place makes the AllToAll alone, since the others have it.
  // `others`: are there since the engine was opened anew.
  void close_rank(uint32_t r) {
    if (objects[r]) ept_gpu_moe_close(objects[r]);
    if (net_objects[r]) moe_test::close_all({net_objects[r]});
    objects[r] = nullptr;
    net_objects[r] = nullptr;
    lanes[r].lanes.reset();
    std::fill(open[r].begin(), open[r].end(), 0);
    std::erase_if(mirrored, [&](const auto &each) { return each.first.first == r; });
  }
  void make_again(uint32_t r, uint64_t process) {
    Error error;
    const ept_moe_config mine = config_of(r);
    if (where[r] == 'c') {
      OK(ept_moe_create(net->arenas[r], &mine, &net_objects[r], &error), error);
      return;
    }
    uint32_t number = 0;
    ept_gpu_config how = ways[r];
    how.process = process;
    lanes[r].lanes = join(r, mine, how, nullptr, &number);
    open_object(r, number);
  }

  static bool puts(char on, bool node) { return (on >= 'A' && on <= 'Z') || (!node && on == 'i'); }
  ~World() {
    for (ept_gpu_moe *object : objects)
      if (object) ept_gpu_moe_close(object);
    moe_test::close_all(cpu_objects);
    for (ept_moe *object : net_objects)
      if (object) moe_test::close_all({object});
  }

  ept_moe_config config_of(uint32_t rank) const {
    ept_moe_config mine = config;
    mine.rank = rank;
    return mine;
  }
  ept_gpu_config how(uint64_t timeout_ns, bool mapped) {
    ept_gpu_config how{};
    how.size = sizeof how;
    how.blocks = 1 + uint32_t(below(random, most_blocks));
    how.threads = 64;
    how.timeout_ns = timeout_ns;
    how.process = 7;
    how.mapped = mapped;
    how.memory = home_wished;
    how.path = path;
    how.crossover_bytes = crossover_bytes;
    return how;
  }
  // As ept_gpu_lanes_join, on this GPU of fibers.
  std::shared_ptr<ept::moe::cuda::Lanes> join(uint32_t r, const ept_moe_config &mine, const ept_gpu_config &how,
                                              std::shared_ptr<ept::moe::cuda::Lanes> known, uint32_t *number) {
    const auto open = [&](int32_t) -> ept::moe::cuda::Opened {
      if (!library || !puts(where[r], false)) return gpu;
      return {gpu, library->heap(r)};
    };
    return ept::moe::cuda::join(net->arenas[r]->arena, how, mine, std::move(known), open, number);
  }

  // Drawn, and bit for bit as on a CPU.
  void good_steps(int count) {
    for (int i = 0; i < count; i++) {
      Step step = draw();
      const std::vector<Got> expected = on_cpu(step);
      compare(step, expected);
    }
  }
  Step draw() {
    Step step;
    step.lane = uint32_t(below(random, config.lanes));
    step.weighed = below(random, 4) != 0;
    step.late = below(random, 3) == 0;
    step.row_weights = below(random, 4) == 0;
    const int32_t floats[] = {EPT_DTYPE_F32, EPT_DTYPE_F16, EPT_DTYPE_BF16};
    for (uint32_t r = 0; r < config.world; r++) {
      RankStep s;
      s.tokens = below(random, 5) ? uint32_t(below(random, config.max_tokens + 1)) : 0;
      const size_t size = moe_model::size_of(config.dtype);
      s.x.make(s.tokens * config.hidden * size, 0);
      std::normal_distribution<float> normal(0, 3);
      for (uint64_t i = 0; i < uint64_t(s.tokens) * config.hidden; i++)
        moe_model::put(s.x.data() + i * size, edges ? edge(i) : normal(random), config.dtype);
      const uint64_t skew = below(random, 3) ? config.num_experts : 1 + below(random, config.num_experts);
      for (uint64_t i = 0; i < uint64_t(s.tokens) * config.top_k; i++) {
        s.ids.push_back(below(random, 8) ? int64_t(below(random, skew)) : -1);
        s.weights.push_back(float(below(random, 1000)) / 700.0f);
        s.late.push_back(float(below(random, 1000)) / 900.0f);
      }
      s.layout = int32_t(below(random, step.row_weights ? 2 : 4));  // rows and by_rank alone carry weights
      const uint64_t formats = config.hidden % 8 ? 1 : 3;           // rows start at multiples of 16 bytes
      s.out_dtype = floats[below(random, formats)];
      s.y_dtype = floats[below(random, formats)];
      s.weights_applied = is_per_expert(s.layout) && below(random, 3) == 0;
      s.abandons = below(random, 10) == 0;
      s.slack = below(random, 3) * 2;
      step.ranks.push_back(std::move(s));
    }
    return step;
  }

  // Block by block what quantisation may stumble over: numbers whose quotients are ties (of a scale of 3/64), zeros of
  // both signs, scales near and beyond those that have a normal inverse, and here and there a NaN or an infinity.
  float edge(uint64_t i) {
    const uint64_t kind = (i % config.hidden / EPT_FP8_BLOCK + i / config.hidden) % 5;
    if (below(random, 400) == 0) return below(random, 2) ? -NAN : NAN;
    if (kind == 4 && below(random, 100) == 0) return -INFINITY;
    const float sign = below(random, 2) ? -1.0f : 1.0f;
    if (kind == 0) return sign * 0.0f;
    if (kind == 1) return sign * (i % 8 ? float(2 * below(random, 8) + 17) * 3 / 64 : 21);
    const int large = config.dtype == EPT_DTYPE_F16 ? 7 : 65;
    return sign * ldexpf(float(below(random, 256)), kind == 2 ? -62 : kind == 3 ? large : -140);
  }

  uint32_t outer(uint32_t rank, int32_t layout) const {
    return layout == EPT_LAYOUT_MASKED ? local[rank] : layout == EPT_LAYOUT_BY_RANK ? config.world : 1;
  }

  // Outputs for what is to come; x is NULL-safe and all is filled with what nobody writes.
  void make(Got &got, const RankStep &s, uint32_t rank, int32_t device) const {
    const ept_arrival &a = got.arrival;
    const uint64_t needs[] = {a.rows, a.max_rank_rows, a.contiguous_rows, a.max_expert_rows};
    got.n = needs[s.layout] + s.slack;
    got.slots = got.n * outer(rank, s.layout);
    const auto k = int64_t(config.top_k);
    got.x.make(got.slots * config.hidden * moe_model::size_of(config.dispatch_dtype), char(0xee));
    got.scales.make(got.slots * a.scale_bytes, char(0xee));
    got.counts.assign(local[rank], -7);
    got.offsets.assign(local[rank] + 1, -7);
    got.ids.assign(got.slots * config.top_k, -7);
    got.weights.assign(got.slots * (is_per_expert(s.layout) ? 1 : config.top_k), -7);
    got.source.assign(got.slots * 2, -7);
    const auto shape = [&](std::vector<int64_t> rest) {
      std::vector<int64_t> dims;
      if (is_two(s.layout)) dims.push_back(outer(rank, s.layout));
      dims.push_back(int64_t(got.n));
      dims.insert(dims.end(), rest.begin(), rest.end());
      return dims;
    };
    ept_dispatch_outputs &to = got.tensors;
    to.size = sizeof to;
    to.layout = s.layout;
    to.x = tensor(got.x.data(), config.dispatch_dtype, shape({int64_t(config.hidden)}));
    if (a.scale_bytes) {
      const bool fp32 = a.scale_format == EPT_DTYPE_F32;
      to.scales = tensor(got.scales.data(), a.scale_format, shape({fp32 ? a.scale_bytes / 4 : a.scale_bytes}));
      if (!is_two(s.layout) && s.slack) {  // by column
        to.scales.strides[0] = 1;
        to.scales.strides[1] = int64_t(got.n);
      }
    }
    to.counts = tensor(got.counts.data(), EPT_DTYPE_I32, {local[rank]});
    to.offsets = tensor(got.offsets.data(), EPT_DTYPE_I32, {local[rank] + 1});
    if (!is_per_expert(s.layout)) to.topk_ids = tensor(got.ids.data(), EPT_DTYPE_I32, shape({k}));
    to.topk_weights = tensor(got.weights.data(), EPT_DTYPE_F32, is_per_expert(s.layout) ? shape({}) : shape({k}));
    to.source = tensor(got.source.data(), EPT_DTYPE_I32, shape({2}));
    got.y.make(s.tokens * config.hidden * moe_model::size_of(s.y_dtype), char(0xee));
    got.beside.clear();
    for (uint64_t i = 0; i < got.slots * config.top_k; i++) got.beside.push_back(float(i % 97 + rank) / 7.0f);
    got.sums.assign(s.tokens * config.top_k, -7);
    for (ept_tensor *t : {&to.x, &to.scales, &to.counts, &to.offsets, &to.topk_ids, &to.topk_weights, &to.source})
      t->device = device;
  }
  ept_dispatch_args dispatch_args(const Step &step, RankStep &s, int32_t device) const {
    ept_dispatch_args args{};
    args.size = sizeof args;
    args.lane = step.lane;
    args.whole = config.buffer_bytes != 0;  // such calls may be streamed
    const int64_t k = config.top_k;
    args.x = tensor(s.x.data(), config.dtype, {s.tokens, int64_t(config.hidden)});
    args.topk_ids = tensor(s.ids.data(), EPT_DTYPE_I64, {s.tokens, k});
    if (step.weighed) args.topk_weights = tensor(s.weights.data(), EPT_DTYPE_F32, {s.tokens, k});
    for (ept_tensor *t : {&args.x, &args.topk_ids, &args.topk_weights}) t->device = device;
    return args;
  }
  ept_combine_args combine_args(const Step &step, RankStep &s, const Got &got, int32_t device) const {
    ept_combine_args args{};
    args.size = sizeof args;
    args.lane = step.lane;
    args.layout = s.layout;
    args.weights_applied = s.weights_applied;
    args.whole = config.buffer_bytes != 0;
    args.expert_out = got.tensors.x;
    args.expert_out.data = s.out.data();
    args.expert_out.dtype = s.out_dtype;
    args.expert_out.device = device;
    if (step.row_weights) {
      args.row_weights = got.tensors.topk_ids;
      args.row_weights.data = const_cast<float *>(got.beside.data());
      args.row_weights.dtype = EPT_DTYPE_F32;
      args.row_weights.device = device;
    }
    return args;
  }
  ept_tensor sums(const RankStep &s, Got &got, int32_t device) const {
    ept_tensor y = tensor(got.y.data(), s.y_dtype, {s.tokens, int64_t(config.hidden)});
    y.device = device;
    return y;
  }

  ept_tensor late_weights(RankStep &s, int32_t device) const {
    ept_tensor late = tensor(s.late.data(), EPT_DTYPE_F32, {s.tokens, int64_t(config.top_k)});
    late.device = device;
    return late;
  }
  ept_tensor summed_weights(const Step &step, const RankStep &s, Got &got, int32_t device) const {
    if (!step.row_weights) return {};
    ept_tensor sums = tensor(got.sums.data(), EPT_DTYPE_F32, {s.tokens, int64_t(config.top_k)});
    sums.device = device;
    return sums;
  }

  std::vector<Got> on_cpu(Step &step) {
    std::vector<Got> all(config.world);
    std::vector<uint64_t> seeds;
    for (uint32_t r = 0; r < config.world; r++) seeds.push_back(random());
    cpu.run([&](uint32_t r) {
      if (up[r]) step_on_cpu(cpu_objects[r], step, r, all[r], &seeds[r]);
    });
    return all;
  }
  // `seed`: what the experts give back is drawn from it; NULL: the step has it.
  void step_on_cpu(ept_moe *object, Step &step, uint32_t r, Got &got, const uint64_t *seed) const {
    RankStep &s = step.ranks[r];
    Error error;
    const ept_dispatch_args sent = dispatch_args(step, s, -1);
    OK(ept_moe_dispatch_send(object, &sent, &error), error);
    got.arrival.size = sizeof got.arrival;
    OK(ept_moe_dispatch_wait(object, step.lane, &got.arrival, &error), error);
    make(got, s, r, -1);
    ept_routing *routing = nullptr;
    OK(ept_moe_dispatch_recv(object, step.lane, &got.tensors, &routing, &error), error);
    if (seed) {
      const size_t size = moe_model::size_of(s.out_dtype);
      s.out.make(got.slots * config.hidden * size, char(0xff));  // NaN where no row is
      Random mine(*seed);
      std::normal_distribution<float> normal(0, 3);
      for (uint64_t row = 0; row < got.slots; row++)
        for (uint32_t c = 0; c < config.hidden && got.source[2 * row] >= 0; c++)
          moe_model::put(s.out.data() + (row * config.hidden + c) * size, normal(mine), s.out_dtype);
    }
    ept_combine_args back = combine_args(step, s, got, -1);
    back.routing = routing;
    if (step.late) back.topk_weights = late_weights(s, -1);
    OK(ept_moe_combine_send(object, &back, &error), error);
    const ept_tensor y = sums(s, got, -1);
    const ept_tensor beside = summed_weights(step, s, got, -1);
    OK(ept_moe_combine_recv(object, step.lane, &y, step.row_weights ? &beside : nullptr, &error), error);
    ept_routing_release(routing);
  }

  // Collective over `ranks`.
  void reset(const std::vector<uint32_t> &ranks) {
    net->run([&](uint32_t r) {
      if (std::find(ranks.begin(), ranks.end(), r) == ranks.end()) return;
      Error error;
      if (on_gpu(r))
        OK(ept_gpu_lanes_reset(&lanes[r], 60 * moe_test::kSecond, &error), error);
      else
        OK(ept_moe_reset(net_objects[r], 60 * moe_test::kSecond, &error), error);
    });
    for (auto &of_rank : open) std::fill(of_rank.begin(), of_rank.end(), 0);
  }
  void reset() { reset(order()); }

  // Collective over those that are up: ept_arena_suspend, ept_arena_resume.
  void arenas(int32_t (*call)(ept_arena *, uint64_t, ept_error *)) {
    net->run([&](uint32_t r) {
      Error error;
      if (up[r]) OK(call(net->arenas[r], 60 * moe_test::kSecond, &error), error);
    });
  }

  // Of waits in kernels that are launched from now on.
  void have_patience(uint64_t ns) {
    for (ept_gpu_lanes &of_rank : lanes)
      for (uint32_t l = 0; of_rank.lanes && l < of_rank.lanes->lanes(); l++)
        const_cast<ept::moe::cuda::LaneTable &>(of_rank.lanes->table(l)).timeout_ns = ns;
  }

  std::vector<uint32_t> order() {
    std::vector<uint32_t> ranks;
    for (uint32_t r = 0; r < config.world; r++)
      if (up[r]) ranks.push_back(r);
    std::shuffle(ranks.begin(), ranks.end(), random);
    return ranks;
  }
  void *stream(uint32_t rank, uint32_t lane) { return &open[rank][lane]; }

  void send(Step &step, uint32_t r, Bytes &routing) {
    Error error;
    RankStep &s = step.ranks[r];
    routing.make(ept_gpu_routing_bytes(objects[r], s.tokens), char(0xee));
    const ept_dispatch_args args = dispatch_args(step, s, 0);
    OK(ept_gpu_moe_members(objects[r], step.lane, 0, nullptr, stream(r, step.lane), &error), error);
    if (open[r][step.lane]) OK(ept_gpu_moe_drain(objects[r], step.lane, 0, stream(r, step.lane), &error), error);
    OK(ept_gpu_moe_dispatch_send(objects[r], &args, routing.data(), stream(r, step.lane), &error), error);
    open[r][step.lane] = 1;
  }
  void receive(Step &step, uint32_t r, Bytes &routing, Got &got) {
    Error error;
    OK(ept_gpu_moe_dispatch_recv(objects[r], step.lane, &got.tensors, routing.data(), step.ranks[r].tokens,
                                 &got.num_rows, got.ticket, stream(r, step.lane), &error),
       error);
    open[r][step.lane] = 0;
  }
  // Into outputs that are made for what is to come.
  void receive(Step &step, uint32_t r, Bytes &routing, Got &got, const Got &expected) {
    got.arrival = expected.arrival;
    make(got, step.ranks[r], r, 0);
    receive(step, r, routing, got);
  }
  void send_sums(Step &step, uint32_t r, Bytes &routing, Got &got) {
    Error error;
    RankStep &s = step.ranks[r];
    const ept_combine_args args = combine_args(step, s, got, 0);
    void *on = stream(r, step.lane);
    float *late = nullptr;
    if (step.late) {
      lates.emplace_back();
      lates.back().make(ept_gpu_late_bytes(objects[r]), char(0xee));
      late = reinterpret_cast<float *>(lates.back().data());
      const ept_tensor weights = late_weights(s, 0);
      OK(ept_gpu_moe_late_weights(objects[r], step.lane, &weights, routing.data(), late, on, &error), error);
    }
    OK(ept_gpu_moe_combine_send(objects[r], &args, routing.data(), s.tokens, late, on, &error), error);
  }
  void receive_sums(Step &step, uint32_t r, Bytes &routing, Got &got) {
    Error error;
    const ept_tensor y = sums(step.ranks[r], got, 0), beside = summed_weights(step, step.ranks[r], got, 0);
    OK(ept_gpu_moe_combine_recv(objects[r], step.lane, &y, &beside, routing.data(), stream(r, step.lane), &error),
       error);
  }
  void sum(Step &step, uint32_t r, Bytes &routing, Got &got) {
    send_sums(step, r, routing, got);
    receive_sums(step, r, routing, got);
  }

  std::deque<Bytes> lates;

  bool on_gpu(uint32_t rank) const { return objects[rank] != nullptr; }

  void compare(const Step &step, const std::vector<Got> &expected) {
    std::vector<Got> all(config.world);
    std::vector<Bytes> routings(config.world);
    std::vector<uint64_t> arrivals(config.world * 4);
    const uint32_t before = gpu->allocations;
    Error error;
    Step mine = step;
    lates.clear();
    std::vector<std::thread> threads;
    for (uint32_t r = 0; r < config.world; r++)
      if (up[r] && !on_gpu(r)) threads.emplace_back([&, r] { step_on_cpu(net_objects[r], mine, r, all[r], nullptr); });
    for (uint32_t r : order()) {
      if (!on_gpu(r)) continue;
      send(mine, r, routings[r]);
      OK(ept_gpu_moe_dispatch_wait(objects[r], step.lane, &arrivals[r * 4], stream(r, step.lane), &error), error);
      all[r].arrival = expected[r].arrival;
      make(all[r], mine.ranks[r], r, 0);
      all[r].ticket = below(random, 4) ? ++tickets : 0;
      receive(mine, r, routings[r], all[r]);
    }
    // Before or after all have received: combine begins on a rank while others still receive.
    const bool apart = below(random, 2);
    if (apart) gpu->machine.run();
    for (uint32_t r : order())
      if (on_gpu(r)) sum(mine, r, routings[r], all[r]);
    gpu->machine.run();
    for (std::thread &thread : threads) thread.join();
    for (uint32_t r : order())
      if (on_gpu(r)) same_stats(cpu_objects[r], objects[r]);
    CHECK_EQ(gpu->allocations, before);  // nothing is allocated in a step
    for (uint32_t r = 0; r < config.world; r++) {
      if (!up[r]) continue;
      if (on_gpu(r)) {
        OK(ept_gpu_moe_check(objects[r], step.lane, &error), error);
        same_mirror(step.lane, r, all[r], EPT_OK);
        same_kept(step, r, routings[r]);
      } else {
        const ept_arrival &a = all[r].arrival;
        const uint64_t came[] = {a.rows, a.max_rank_rows, a.contiguous_rows, a.max_expert_rows};
        std::copy(came, came + 4, &arrivals[r * 4]);
        all[r].num_rows = int32_t(step.ranks[r].layout == EPT_LAYOUT_CONTIGUOUS ? a.contiguous_rows : a.rows);
      }
      same(step.ranks[r], expected[r], all[r], &arrivals[r * 4]);
    }
  }

  // What a dispatch by this routing would take from it.
  void same_kept(const Step &step, uint32_t r, const Bytes &routing) const {
    const RankStep &s = step.ranks[r];
    const char *ids = routing.data() + ept_gpu_routing_ids(objects[r], s.tokens);
    const char *weights = routing.data() + ept_gpu_routing_weights(objects[r], s.tokens);
    for (size_t i = 0; i < s.ids.size(); i++) {
      int32_t id;
      float weight;
      memcpy(&id, ids + 4 * i, 4);
      memcpy(&weight, weights + 4 * i, 4);
      CHECK_EQ(id, s.ids[i]);
      CHECK_EQ(weight, step.weighed ? s.weights[i] : 0.0f);
    }
  }

  // What the host is shown of the lane's last dispatch whose counts were asked for.
  void same_mirror(uint32_t lane, uint32_t r, const Got &got, int32_t fault) {
    Mirrored &last = mirrored[{r, lane}];
    if (got.ticket) last = {last.epoch + 1, got.ticket, got.num_rows, got.counts};
    ept_gpu_counts seen{};
    seen.size = sizeof seen;
    std::vector<int32_t> counts(local[r], -7);
    Error error;
    const int32_t code = ept_gpu_moe_counts(objects[r], lane, &seen, counts.data(), &error);
    CHECK_EQ(code, last.epoch ? EPT_OK : EPT_LATER);
    if (!last.epoch) return;
    CHECK_EQ(seen.epoch, last.epoch);
    CHECK_EQ(seen.ticket, last.ticket);
    CHECK_EQ(seen.rows, last.rows);
    CHECK(counts == last.counts);
    if (got.ticket) CHECK_EQ(seen.fault, fault);
  }
  struct Mirrored {
    uint64_t epoch = 0, ticket = 0;
    int32_t rows = 0;
    std::vector<int32_t> counts;
  };
  std::map<std::pair<uint32_t, uint32_t>, Mirrored> mirrored;  // by rank and lane
  uint64_t tickets = 0;

  // Where every step was made on both sides.
  void same_stats(ept_moe *cpu_object, ept_gpu_moe *object) const {
    if (!counts_all) return;
    ept_moe_stats expected{}, got{};
    expected.size = got.size = sizeof expected;
    Error error;
    OK(ept_moe_stats_get(cpu_object, &expected), error);
    OK(ept_gpu_moe_stats_get(object, &got, &error), error);
    for (uint32_t p = 0; p < EPT_PHASES; p++) {
      CHECK_EQ(got.generations[p], expected.generations[p]);
      CHECK_EQ(got.messages[p], expected.messages[p]);
      CHECK_EQ(got.bytes[p], expected.bytes[p]);
      CHECK_EQ(got.rows[p], expected.rows[p]);
    }
    CHECK_EQ(got.grants, expected.grants);
  }

  void same(const RankStep &s, const Got &expected, const Got &got, const uint64_t *arrival, bool summed = true) const {
    const ept_arrival &a = expected.arrival;
    CHECK_EQ(arrival[0], a.rows);
    CHECK_EQ(arrival[1], a.max_rank_rows);
    CHECK_EQ(arrival[2], a.contiguous_rows);
    CHECK_EQ(arrival[3], a.max_expert_rows);
    CHECK_EQ(uint64_t(got.num_rows), s.layout == EPT_LAYOUT_CONTIGUOUS ? a.contiguous_rows : a.rows);
    CHECK(got.source == expected.source);
    CHECK(got.counts == expected.counts);
    if (s.layout == EPT_LAYOUT_CONTIGUOUS) CHECK(got.offsets == expected.offsets);
    if (!is_per_expert(s.layout)) CHECK(got.ids == expected.ids);
    CHECK_EQ(got.weights.size(), expected.weights.size());
    const uint64_t row_bytes = got.slots ? got.x.size / got.slots : 0;
    const uint64_t weights = got.slots ? got.weights.size() / got.slots : 0;
    for (uint64_t row = 0; row < got.slots; row++) {
      const bool filled = got.source[2 * row] >= 0;
      for (uint64_t i = 0; i < weights && filled; i++)
        if (is_per_expert(s.layout) || got.ids[row * weights + i] >= 0)
          CHECK_EQ(got.weights[row * weights + i], expected.weights[row * weights + i]);
      if (filled) {
        CHECK_EQ(memcmp(got.x.data() + row * row_bytes, expected.x.data() + row * row_bytes, row_bytes), 0);
      } else {  // nobody writes there
        for (uint64_t i = 0; i < row_bytes; i++) CHECK(got.x.data()[row * row_bytes + i] == char(0xee));
      }
    }
    const auto &scales = got.tensors.scales;
    const uint64_t step = scales.dtype == EPT_DTYPE_F32 ? 4 : 1;
    for (uint64_t row = 0; row < got.slots && a.scale_bytes; row++)
      for (uint64_t b = 0; b < a.scale_bytes / step && got.source[2 * row] >= 0; b++) {
        const int d = is_two(s.layout) ? 2 : 1;
        const uint64_t at = d == 2 ? row * (a.scale_bytes / step) + b
                                   : row * uint64_t(scales.strides[0]) + b * uint64_t(scales.strides[1]);
        CHECK_EQ(memcmp(got.scales.data() + at * step, expected.scales.data() + at * step, step), 0);
      }
    if (summed) CHECK(got.sums == expected.sums);
    if (summed) CHECK_EQ(memcmp(got.y.data(), expected.y.data(), got.y.size), 0);
  }

 private:
  World(const ept_moe_config &given, uint64_t seed, uint64_t, std::unique_ptr<Group> over, const std::string &)
      : config(given),
        cpu(given.world),
        cpu_objects(cpu.create(given)),
        gpu(std::make_shared<simt::HostGpu>(seed, 1000)),
        net(std::move(over)),
        net_objects(given.world),
        objects(given.world),
        open(given.world, std::vector<uint8_t>(given.lanes)),
        up(given.world, 1),
        random(seed) {
    gpu->orders = gpu_orders_network;
    for (uint32_t r = 0; r < given.world; r++) local.push_back(ept::moe::Object(config_of(r)).local());
  }
  void open_object(uint32_t r, uint32_t number) {
    const ept_moe_config mine = config_of(r);
    Error error;
    OK(ept_gpu_moe_create(&lanes[r], &mine, number, nullptr, 0, &objects[r], &error), error);
  }
};

// A step of lane 0 that rank 0 has sent.
struct FirstSend {
  World &world;
  Step step;
  std::vector<Got> expected;
  Bytes routing;
  Got got;
  explicit FirstSend(World &of) : world(of), step(of.draw()) {
    step.lane = 0;
    expected = world.on_cpu(step);
    world.send(step, 0, routing);
  }
  void receive() { world.receive(step, 0, routing, got, expected[0]); }
};

}  // namespace gpu_test
