// SPDX-License-Identifier: Apache-2.0
//
// steps.cc: the C API of gpu.h: checks of the arguments, and launches.
#include <algorithm>
#include <cstring>
#include <exception>
#include <new>

#include "cuda/image.h"
#include "engine/boot.h"
#include "eptransport/gpu.h"
#include "moe/check.h"
#include "moe/cuda/home.h"
#include "moe/cuda/lanes.h"
#include "moe/cuda/shared.h"
#include "moe/cuda/trial.h"
#include "moe/fail.h"
#include "moe/moe.h"

using namespace ept::moe;
using namespace ept::moe::cuda;

namespace {

template <class Body>
int32_t guarded(const char *operation, ept_error *error, Body &&body) {
  Failure failure{Error()};
  try {
    body();
    return EPT_OK;
  } catch (const Failure &thrown) {
    failure = thrown;
  } catch (const std::bad_alloc &) {
    failure.error.code = EPT_E_NOMEM;
    snprintf(failure.error.text, sizeof failure.error.text, "the machine has no memory left for this call");
  } catch (const std::exception &thrown) {
    failure.error.code = EPT_E_INTERNAL;
    snprintf(failure.error.text, sizeof failure.error.text, "a bug of eptransport's: %s", thrown.what());
  }
  if (error) {
    const uint32_t size = error->size;
    *error = failure.error;
    error->size = size;
    snprintf(error->operation, sizeof error->operation, "%s", operation);
  }
  return failure.error.code;
}

// As check.h's, for a tensor of this GPU.
void want_here(const GpuObject &moe, const char *name, ept_tensor tensor, std::initializer_list<int32_t> dtypes,
               std::initializer_list<int64_t> shape) {
  if (tensor.device != moe.lanes->gpu().ordinal())
    fail(EPT_E_INVALID, -1, "%s is on device %d; this AllToAll is on CUDA device %d", name, tensor.device,
         moe.lanes->gpu().ordinal());
  tensor.device = -1;
  want(name, tensor, dtypes, shape);
}

Strided strided(const ept_tensor &tensor, int dims) {
  if (!tensor.data) return {};
  const Rows rows = rows_of(tensor, dims);
  return {rows.data, rows.outer, rows.inner, rows.column, divisor(uint32_t(rows.leading))};
}

uint32_t lane_of(const GpuObject &moe, uint32_t lane) {
  if (lane >= moe.object.config.lanes)
    fail(EPT_E_INVALID, -1, "lane %u; this AllToAll has %u", lane, moe.object.config.lanes);
  return lane;
}

// For a call that launches, or asks what launches did.
uint32_t lane_awake(const GpuObject &moe, uint32_t lane) {
  moe.lanes->refuse_suspended();
  return lane_of(moe, lane);
}

bool per_expert(int32_t layout) { return layout == EPT_LAYOUT_CONTIGUOUS || layout == EPT_LAYOUT_MASKED; }

RoutingArrays arrays(const GpuObject &moe, void *memory, uint64_t tokens) {
  Carve carve(static_cast<char *>(memory));
  return routing_arrays(carve, moe.object.shape, tokens);
}

void launch(const GpuObject &moe, Kernel kernel, uint32_t blocks, uint32_t threads, uint64_t shared, void *stream,
            void *argument) {
  if (moe.kernels)
    moe.kernels->launch(kernel, blocks, threads, shared, stream, argument);
  else
    moe.lanes->gpu().launch(kernel, blocks, threads, shared, stream, argument);
}

template <class Make>
uint64_t shared_bytes(Make &&make) {
  Carve carve(nullptr);
  make(carve);
  return carve.bytes();
}

// ---- of an AllToAll whose calls may be streamed: each half is one of two launches (chunks.cuh) ----

Streamed how(const GpuObject &moe, uint32_t lane, uint32_t phase, bool first, bool discards) {
  Streamed how{};
  how.state = moe.chunk_state(lane, phase);
  how.first = first;
  how.discards = discards;
  return how;
}

// in: NULL for the first launch, and where what comes is dropped.
void streamed_dispatch(GpuObject &moe, uint32_t lane, bool first, const DispatchRecv *in, void *stream) {
  StreamedDispatch a{};
  a.how = how(moe, lane, EPT_PHASE_DISPATCH, first, !first && !in);
  a.out = moe.begun[lane].dispatch;
  a.out.lane = moe.lanes->table(lane);
  if (in) a.in = *in;
  a.in.lane = a.out.lane;
  a.in.object = moe.table;
  a.in.scale_bytes = moe.carried[lane].scale_bytes;
  a.in.scale_format = moe.carried[lane].scale_format;
  a.in.payload_format = moe.object.config.dispatch_dtype;
  const uint64_t shared = shared_bytes([&](Carve &carve) {
    const ept_moe_config &config = moe.object.config;
    streamed_dispatch_shared(carve, moe.lanes->threads(), config.world, config.num_experts, moe.object.local(),
                             a.out.tokens, config.top_k, uint32_t(moe.object.shape.fan()));
  });
  launch(moe, kKernelStreamedDispatch, moe.lanes->blocks(), moe.lanes->threads(), shared, stream, &a);
}

void streamed_combine(GpuObject &moe, uint32_t lane, bool first, const CombineRecv *in, void *stream) {
  StreamedCombine a{};
  a.how = how(moe, lane, EPT_PHASE_COMBINE, first, !first && !in);
  a.out = moe.begun[lane].combine;
  a.out.lane = moe.lanes->table(lane);
  if (in) a.in = *in;
  a.in.lane = a.out.lane;
  a.in.object = moe.table;
  a.in.routing = a.out.routing;
  const uint64_t shared = shared_bytes(
      [&](Carve &carve) { streamed_combine_shared(carve, moe.lanes->threads(), moe.object.config.world); });
  launch(moe, kKernelStreamedCombine, moe.lanes->blocks(), moe.lanes->threads(), shared, stream, &a);
}

void streamed_late(GpuObject &moe, uint32_t lane, const LateSend &out, const LateRecv &in, void *stream) {
  const uint64_t shared =
      shared_bytes([&](Carve &carve) { streamed_late_shared(carve, moe.lanes->threads(), moe.object.config.world); });
  for (bool first : {true, false}) {
    StreamedLate a{how(moe, lane, EPT_PHASE_DISPATCH, first, false), out, in};
    launch(moe, kKernelStreamedLate, moe.lanes->blocks(), moe.lanes->threads(), shared, stream, &a);
  }
}

// ---- steps ----

void dispatch_send(GpuObject &moe, const ept_dispatch_args &args, void *routing, void *stream) {
  const Object &object = moe.object;
  const ept_moe_config &config = object.config;
  DispatchSend a{};
  a.lane = moe.lanes->table(lane_awake(moe, args.lane));
  a.object = moe.table;
  const bool quantise = object.quantises() && args.x.dtype == config.dtype;
  const int32_t sent = quantise ? config.dtype : config.dispatch_dtype;
  const int64_t columns = sent == EPT_DTYPE_F4X2 ? config.hidden / 2 : config.hidden;
  const int64_t top_k = config.top_k;
  want_here(moe, "x", args.x, {sent}, {kAny, columns});
  want_rows("x", args.x);
  const int64_t tokens = args.x.shape[0];
  if (tokens > int64_t(config.max_tokens))
    fail(EPT_E_CAPACITY, -1, "x has %lld tokens; max_tokens is %u", (long long)tokens, config.max_tokens);
  if (!args.whole && tokens > int64_t(object.shape.chunk_tokens))
    fail(EPT_E_CAPACITY, -1,
         "x has %lld tokens; with a buffer_bytes of %llu the halves take %u at once: call dispatch and combine whole, "
         "which stream longer batches, or allow more bytes",
         (long long)tokens, (unsigned long long)config.buffer_bytes, object.shape.chunk_tokens);
  want_here(moe, "topk_ids", args.topk_ids, {EPT_DTYPE_I32, EPT_DTYPE_I64}, {tokens, top_k});
  GpuObject::Carried carried;
  if (present(args.scales)) {
    want_here(moe, "scales", args.scales, {}, {tokens, kAny});
    carried.scale_size = uint32_t(element_bytes(args.scales.dtype));
    carried.scale_bytes = carried.scale_size * uint32_t(args.scales.shape[1]);
    carried.scale_format = args.scales.dtype;
    const uint64_t room = at_least(object.own_scales(), config.caller_scale_bytes);
    if (quantise || carried.scale_size == 0 || carried.scale_bytes > room)
      fail(EPT_E_INVALID, -1, "scales are %s, %u bytes a row; %llu bytes were planned for: set caller_scale_bytes",
           shown(args.scales).c_str(), carried.scale_bytes, (unsigned long long)room);
    a.scales = strided(args.scales, 1);
  } else if (quantise) {
    carried.scale_size = config.scale_format == EPT_SCALES_FP32 ? 4 : 1;
    carried.scale_bytes = uint32_t(object.own_scales());
    carried.scale_format = config.scale_format == EPT_SCALES_FP32 ? EPT_DTYPE_F32 : EPT_DTYPE_E8M0;
  }
  a.routing = arrays(moe, routing, uint64_t(tokens));
  a.x = static_cast<const char *>(args.x.data);
  a.x_stride = args.x.strides[0] * int64_t(element_bytes(args.x.dtype));
  a.tokens = uint32_t(tokens);
  a.x_format = args.x.dtype;
  a.ids = args.topk_ids.data;
  a.ids_64 = args.topk_ids.dtype == EPT_DTYPE_I64;
  for (int i = 0; i < 2; i++) a.ids_strides[i] = args.topk_ids.strides[i];
  if (present(args.topk_weights)) {
    want_here(moe, "topk_weights", args.topk_weights, {EPT_DTYPE_F32}, {tokens, top_k});
    a.weights = static_cast<const float *>(args.topk_weights.data);
    for (int i = 0; i < 2; i++) a.weights_strides[i] = args.topk_weights.strides[i];
  }
  a.scale_size = carried.scale_size;
  a.scale_bytes = carried.scale_bytes;
  a.scale_format = carried.scale_format;
  a.payload_format = config.dispatch_dtype;
  a.epsilon = config.scale_epsilon;
  a.quantise = quantise;
  a.ue8m0 = config.scale_format == EPT_SCALES_UE8M0;
  moe.carried[args.lane] = carried;
  const uint32_t warps = moe.lanes->threads() / kWarp;
  a.deal = deal_of(a.tokens, moe.lanes->blocks(), warps, uint32_t(moe.table.payload / 16));
  if (moe.streams()) a.deal.parts = divisor(1), a.deal.units = 1;  // a warp has a token by itself
  if (!moe.streams()) {
    const auto shared = [&](uint32_t threads) {
      return shared_bytes([&](Carve &carve) {
        send_shared(carve, threads, config.world, config.num_experts, uint32_t(tokens), uint32_t(object.shape.fan()));
      });
    };
    const uint32_t threads = moe.lanes->send_threads(shared);
    launch(moe, kKernelDispatchSend, moe.lanes->blocks(), threads, shared(threads), stream, &a);
    return;
  }
  moe.begun[args.lane].dispatch = a;
  streamed_dispatch(moe, args.lane, true, nullptr, stream);
}

uint64_t shared_of_receive(const GpuObject &moe) {
  return shared_bytes([&](Carve &carve) {
    recv_shared(carve, moe.lanes->threads(), moe.object.config.world, moe.object.local(), moe.object.config.top_k);
  });
}

void dispatch_wait(GpuObject &moe, uint32_t lane, uint64_t *arrival, void *stream) {
  DispatchWait a{};
  a.lane = moe.lanes->table(lane_awake(moe, lane));
  a.object = moe.table;
  a.scale_bytes = moe.carried[lane].scale_bytes;
  a.scale_format = moe.carried[lane].scale_format;
  a.payload_format = moe.object.config.dispatch_dtype;
  a.arrival = arrival;
  launch(moe, kKernelDispatchWait, 1, moe.lanes->threads(), shared_of_receive(moe), stream, &a);
}

void dispatch_recv(GpuObject &moe, uint32_t lane, const ept_dispatch_outputs &o, void *routing, uint64_t tokens,
                   int32_t *num_rows, uint64_t ticket, void *stream) {
  const Object &object = moe.object;
  const ept_moe_config &config = object.config;
  DispatchRecv a{};
  a.lane = moe.lanes->table(lane_awake(moe, lane));
  if (o.layout < EPT_LAYOUT_ROWS || o.layout > EPT_LAYOUT_MASKED)
    fail(EPT_E_INVALID, -1, "layout is %d; 0 (rows) to 3 (masked) are possible", o.layout);
  const bool masked = o.layout == EPT_LAYOUT_MASKED, two = masked || o.layout == EPT_LAYOUT_BY_RANK;
  const int64_t outer = masked ? object.local() : config.world, top_k = config.top_k;
  const int64_t columns = config.dispatch_dtype == EPT_DTYPE_F4X2 ? config.hidden / 2 : config.hidden;
  if (!present(o.x)) fail(EPT_E_INVALID, -1, "the outputs have no x, whose rows say how many fit");
  const int64_t n = o.x.shape[two ? 1 : 0];
  const auto wanted = [&](const char *name, const ept_tensor &t, std::initializer_list<int32_t> types, int64_t last) {
    if (!present(t)) return;
    if (last < 0)
      two ? want_here(moe, name, t, types, {outer, n}) : want_here(moe, name, t, types, {n});
    else
      two ? want_here(moe, name, t, types, {outer, n, last}) : want_here(moe, name, t, types, {n, last});
  };
  const GpuObject::Carried &carried = moe.carried[lane];
  wanted("x of the outputs", o.x, {config.dispatch_dtype}, columns);
  want_rows("x of the outputs", o.x);
  if (carried.scale_bytes)
    wanted("scales of the outputs", o.scales, {carried.scale_format}, carried.scale_bytes / carried.scale_size);
  wanted("topk_ids of the outputs", o.topk_ids, {EPT_DTYPE_I32}, top_k);
  wanted("topk_weights of the outputs", o.topk_weights, {EPT_DTYPE_F32}, per_expert(o.layout) ? -1 : top_k);
  wanted("source of the outputs", o.source, {EPT_DTYPE_I32}, 2);
  if (present(o.counts)) want_here(moe, "counts", o.counts, {EPT_DTYPE_I32}, {int64_t(object.local())});
  if (present(o.offsets)) want_here(moe, "offsets", o.offsets, {EPT_DTYPE_I32}, {int64_t(object.local()) + 1});
  if ((present(o.counts) && o.counts.strides[0] != 1) || (present(o.offsets) && o.offsets.strides[0] != 1))
    fail(EPT_E_INVALID, -1, "counts and offsets of the outputs must have unit strides");
  if (uint64_t(n) * uint64_t(two ? outer : 1) > INT32_MAX)
    fail(EPT_E_UNSUPPORTED, -1, "outputs of %lld rows; the GPU executor numbers at most %d", (long long)n, INT32_MAX);
  a.object = moe.table;
  a.routing = arrays(moe, routing, tokens);
  a.layout = o.layout;
  a.payload_format = config.dispatch_dtype;
  a.scale_format = carried.scale_format;
  a.scale_size = carried.scale_size;
  a.scale_bytes = carried.scale_bytes;
  a.outer = two ? uint32_t(outer) : 1;
  a.leading = divisor(uint32_t(n));
  a.blocks = divisor(moe.lanes->blocks());
  a.turn = moe.lanes->blocks() / config.world + 1;
  const int dims = two ? 2 : 1;
  a.x = strided(o.x, dims);
  if (carried.scale_bytes) a.scales = strided(o.scales, dims);
  a.ids = strided(o.topk_ids, dims);
  a.weights = strided(o.topk_weights, dims);
  a.source = strided(o.source, dims);
  a.counts = static_cast<int32_t *>(o.counts.data);
  a.offsets = static_cast<int32_t *>(o.offsets.data);
  a.num_rows = num_rows;
  a.ticket = ticket;
  a.mirror = ticket ? moe.page(lane) : nullptr;
  if (moe.streams()) {
    streamed_dispatch(moe, lane, false, &a, stream);
    return;
  }
  launch(moe, kKernelDispatchRecv, moe.lanes->blocks(), moe.lanes->threads(), shared_of_receive(moe), stream, &a);
}

void late_weights(GpuObject &moe, uint32_t lane, const ept_tensor &weights, void *routing, float *late, void *stream) {
  const uint32_t world = moe.object.config.world;
  want_here(moe, "topk_weights", weights, {EPT_DTYPE_F32}, {kAny, int64_t(moe.object.config.top_k)});
  LateSend out{};
  out.lane = moe.lanes->table(lane_awake(moe, lane));
  out.object = moe.table;
  out.routing = arrays(moe, routing, uint64_t(weights.shape[0]));
  out.tokens = uint32_t(weights.shape[0]);
  out.weights = static_cast<const float *>(weights.data);
  for (int i = 0; i < 2; i++) out.strides[i] = weights.strides[i];
  const uint64_t shared = shared_bytes([&](Carve &carve) {
    carve.take<char *>(world);
    carve.take<uint32_t>(2);
  });
  LateRecv in{};
  in.lane = out.lane;
  in.object = moe.table;
  in.routing = out.routing;
  in.late = late;
  if (moe.streams()) {
    streamed_late(moe, lane, out, in, stream);
    return;
  }
  launch(moe, kKernelLateSend, moe.lanes->blocks(), moe.lanes->threads(), shared, stream, &out);
  launch(moe, kKernelLateRecv, moe.lanes->blocks(), moe.lanes->threads(), shared, stream, &in);
}

void combine_send(GpuObject &moe, const ept_combine_args &args, void *routing, uint64_t tokens, float *late,
                  void *stream) {
  const Object &object = moe.object;
  const int64_t hidden = object.config.hidden, top_k = object.config.top_k;
  const bool masked = args.layout == EPT_LAYOUT_MASKED, two = masked || args.layout == EPT_LAYOUT_BY_RANK;
  const int64_t outer = masked ? object.local() : object.shape.world;
  const std::initializer_list<int32_t> floats = {EPT_DTYPE_F32, EPT_DTYPE_F16, EPT_DTYPE_BF16};
  if (two)
    want_here(moe, "expert_out", args.expert_out, floats, {outer, kAny, hidden});
  else
    want_here(moe, "expert_out", args.expert_out, floats, {kAny, hidden});
  want_rows("expert_out", args.expert_out);
  CombineSend a{};
  a.lane = moe.lanes->table(lane_awake(moe, args.lane));
  a.object = moe.table;
  a.routing = arrays(moe, routing, tokens);
  a.layout = args.layout;
  a.format = args.expert_out.dtype;
  a.out = strided(args.expert_out, two ? 2 : 1);
  a.leading = uint64_t(args.expert_out.shape[two ? 1 : 0]);
  a.weights_applied = args.weights_applied;
  if (late) a.routing.row_weights = late;
  if (present(args.row_weights)) {
    if (per_expert(args.layout))
      fail(EPT_E_INVALID, -1, "row_weights were given; only the layouts rows and by_rank have them");
    const int64_t n = args.expert_out.shape[two ? 1 : 0];
    if (two)
      want_here(moe, "row_weights", args.row_weights, {EPT_DTYPE_F32}, {outer, n, top_k});
    else
      want_here(moe, "row_weights", args.row_weights, {EPT_DTYPE_F32}, {n, top_k});
    a.row_weights = strided(args.row_weights, two ? 2 : 1);
  }
  if (!args.whole && tokens > object.shape.chunk_tokens)
    fail(EPT_E_CAPACITY, -1,
         "the routing has %llu tokens; with a buffer_bytes of %llu the halves take %u at once: call combine whole",
         (unsigned long long)tokens, (unsigned long long)object.config.buffer_bytes, object.shape.chunk_tokens);
  if (moe.streams()) {
    moe.begun[args.lane].combine = a;
    streamed_combine(moe, args.lane, true, nullptr, stream);
    return;
  }
  const uint32_t threads = moe.lanes->combine_threads(tokens);
  const uint64_t shared = shared_bytes([&](Carve &carve) { combine_shared(carve, threads, object.config.world); });
  launch(moe, kKernelCombineSend, moe.lanes->blocks(), threads, shared, stream, &a);
}

void combine_recv(GpuObject &moe, uint32_t lane, const ept_tensor &y, const ept_tensor *row_weights, void *routing,
                  void *stream) {
  want_here(moe, "y", y, {EPT_DTYPE_F32, EPT_DTYPE_F16, EPT_DTYPE_BF16}, {kAny, int64_t(moe.object.config.hidden)});
  want_rows("y", y);
  CombineRecv a{};
  a.lane = moe.lanes->table(lane_awake(moe, lane));
  a.object = moe.table;
  a.routing = arrays(moe, routing, uint64_t(y.shape[0]));
  a.y = static_cast<char *>(y.data);
  a.y_stride = y.strides[0] * int64_t(element_bytes(y.dtype));
  a.tokens = uint32_t(y.shape[0]);
  a.format = y.dtype;
  if (row_weights && present(*row_weights)) {
    want_here(moe, "row_weights", *row_weights, {EPT_DTYPE_F32}, {y.shape[0], int64_t(moe.object.config.top_k)});
    a.row_weights = strided(*row_weights, 1);
  }
  if (moe.streams()) {
    streamed_combine(moe, lane, false, &a, stream);
    return;
  }
  const uint32_t threads = moe.lanes->combine_threads(a.tokens);
  const uint64_t shared = shared_bytes([&](Carve &carve) { combine_shared(carve, threads, moe.object.config.world); });
  launch(moe, kKernelCombineRecv, moe.lanes->blocks(), threads, shared, stream, &a);
}

}  // namespace

int32_t ept_gpu_lanes_fit(const ept_gpu_lanes *lanes, const ept_moe_config *moe, ept_error *error) {
  return guarded("gpu_lanes_fit", error, [&] { lanes->lanes->fit(Object(*moe)); });
}

int32_t ept_gpu_lanes_reset(ept_gpu_lanes *lanes, uint64_t timeout_ns, ept_error *error) {
  int32_t code = EPT_OK;
  const int32_t failed = guarded("moe_reset", error, [&] { code = lanes->lanes->reset(timeout_ns); });
  return failed ? failed : code;
}

namespace {

// What this rank brings to Arena::create.
class GpuSide final : public Side {
 public:
  GpuSide(std::shared_ptr<Arena> arena, const ept_gpu_config &config, const ept_moe_config &moe,
          std::shared_ptr<Lanes> known, Open open)
      : lanes(std::move(known)), arena_(std::move(arena)), config_(config), moe_(moe), open_(std::move(open)) {}

  Place place() override {
    opened_ = lanes ? lanes->opened() : open_(config_.device);
    const std::string identity = opened_.gpu->identity();
    Lanes::refuse(Object(moe_));
    Place place;
    place.on_gpu = 1;
    place.process = config_.process;
    identity.copy(place.gpu, sizeof place.gpu);
    // Who can't be told from another machine is reached through the engine.
    if (config_.mapped) ept::boot_id().copy(place.machine, sizeof place.machine - 1);
    memcpy(place.node, config_.node, sizeof place.node);
    place.initiates = opened_.heap && puts();
    if (measures()) place.weighs |= Place::kMeasures;
    if (lanes && lanes->over_engine() && !lanes->initiates()) place.weighs |= Place::kKeepsProxy;
    return place;
  }
  std::unique_ptr<Trial> trial(Arena &tried, const std::vector<Place> &places, const uint64_t (&lengths)[kLengths],
                               const Deadline &deadline) override {
    return std::make_unique<GpuTrial>(opened_, config_, tried, places, lengths, deadline);
  }
  void chose(const std::string &how) override { how_ = how; }
  std::unique_ptr<LaneMemory> lane_memory(Arena &arena, uint64_t bytes) override {
    return device_home(opened_.gpu, arena.engine, Home(config_.memory), bytes, &home_);
  }
  std::string offer(Arena &, const std::vector<Place> &places) override {
    places_ = places;
    if (lanes && lanes->over_engine() == all_direct(places)) lanes = nullptr;
    if (lanes) return {};
    lanes = std::make_shared<Lanes>(opened_, config_, moe_, arena_, places);
    if (lanes->over_engine()) lanes->home = home_;  // else it is of lanes that were tried
    fresh_ = true;
    return lanes->exported();
  }
  void accept(const std::vector<std::string> &offers) override {
    if (!fresh_) return;
    for (uint32_t r = 0; r < offers.size(); r++)
      if (places_[r].known == 1 && (r == arena_->rank || direct(places_[r], places_[arena_->rank])))
        lanes->connect(r, offers[r]);  // others are met in the reset that takes this rank in
    lanes->start();
  }
  const std::string &how() const { return how_; }

  std::shared_ptr<Lanes> lanes;

 private:
  // Alike on every rank, as config and settings are.
  bool measures() const { return config_.path == EPT_GPU_PATH_AUTO && !config_.crossover_bytes; }
  bool puts() const {
    if (config_.path != EPT_GPU_PATH_AUTO) return config_.path == EPT_GPU_PATH_GPU;
    return measures() || Object(moe_).message(EPT_PHASE_DISPATCH) <= config_.crossover_bytes;
  }
  const std::shared_ptr<Arena> arena_;
  const ept_gpu_config config_;
  const ept_moe_config moe_;
  const Open open_;
  Opened opened_;
  std::vector<Place> places_;
  std::string home_, how_;
  bool fresh_ = false;
};

}  // namespace

std::shared_ptr<Lanes> ept::moe::cuda::join(std::shared_ptr<Arena> arena, const ept_gpu_config &config,
                                            const ept_moe_config &moe, std::shared_ptr<Lanes> known, Open open,
                                            uint32_t *number) {
  GpuSide side(arena, config, moe, std::move(known), std::move(open));
  std::vector<Lane *> its;
  const std::shared_ptr<Object> object = arena->create(moe, its, &side);
  *number = object->number;
  side.lanes->way = side.how();
  return side.lanes;
}

int32_t ept_gpu_lanes_join(ept_arena *arena, const ept_gpu_config *config, const ept_moe_config *moe,
                           const ept_gpu_lanes *known, ept_gpu_lanes **lanes, uint32_t *number, ept_error *error) {
  return guarded("moe_create", error, [&] {
    if (!config || config->size != sizeof *config || !moe) fail(EPT_E_INVALID, -1, "ept_gpu_config is of another size");
    if (config->memory > 2 || config->share > 2)
      fail(EPT_E_INVALID, -1, "ept_gpu_config has memory %u and share %u; each is 0, 1 or 2", config->memory,
           config->share);
    const std::shared_ptr<Lanes> joined = join(
        arena->arena, *config, *moe, known ? known->lanes : nullptr,
        [&](int32_t ordinal) { return driver_gpu(ordinal, arena->arena->engine); }, number);
    *lanes = known && joined == known->lanes ? const_cast<ept_gpu_lanes *>(known) : new ept_gpu_lanes{joined};
  });
}

int32_t ept_gpu_lanes_share_process(const ept_gpu_lanes *lanes) { return lanes->lanes->shares_process(); }

int32_t ept_gpu_lanes_maps(const ept_gpu_lanes *lanes, uint32_t rank) {
  return rank < lanes->lanes->world() && lanes->lanes->maps(rank);
}

uint64_t ept_gpu_message_bytes(const ept_moe_config *moe) {
  uint64_t bytes = 0;
  (void)guarded("moe_create", nullptr, [&] { bytes = Object(*moe).message(EPT_PHASE_DISPATCH); });
  return bytes;
}

int32_t ept_gpu_lanes_initiates(const ept_gpu_lanes *lanes, uint32_t rank) {
  return rank < lanes->lanes->world() && lanes->lanes->initiates(rank);
}

int32_t ept_gpu_lanes_puts(const ept_gpu_lanes *lanes, uint64_t *puts, ept_error *error) {
  return guarded("gpu_lanes_puts", error, [&] { *puts = lanes->lanes->puts(); });
}

int32_t ept_gpu_lanes_over_engine(const ept_gpu_lanes *lanes) { return lanes->lanes->over_engine(); }

void ept_gpu_lanes_watch(ept_gpu_lanes *lanes) {
  (void)guarded("watch", nullptr, [&] { lanes->lanes->watch(); });
}

void ept_gpu_lanes_home(const ept_gpu_lanes *lanes, char *text, size_t capacity) {
  snprintf(text, capacity, "%s", lanes->lanes->home.c_str());
}

void ept_gpu_lanes_way(const ept_gpu_lanes *lanes, char *text, size_t capacity) {
  snprintf(text, capacity, "%s", lanes->lanes->way.c_str());
}

uint32_t ept_gpu_lanes_blocks(const ept_gpu_lanes *lanes) { return lanes->lanes->blocks(); }

uint64_t ept_gpu_lanes_times(ept_gpu_lanes *lanes, uint64_t *times) {
  lanes->lanes->write_times(times);
  return lanes->lanes->lanes() * times_of(lanes->lanes->blocks(), lanes->lanes->world());
}

void ept_gpu_lanes_close(ept_gpu_lanes *lanes) { delete lanes; }

int32_t ept_gpu_image_add(uint32_t arch, const void *image, uint64_t bytes, ept_error *error) {
  return guarded("image_add", error, [&] { ept::cuda::add_image("moe", int(arch), image, bytes); });
}

int32_t ept_gpu_has_code(uint32_t capability) {
  const ept::cuda::Image *const image = ept::cuda::image_for("moe", int(capability), nullptr);
  return image && !image->ptx;
}

int32_t ept_gpu_moe_create(ept_gpu_lanes *lanes, const ept_moe_config *config, uint32_t number, const void *image,
                           uint64_t image_bytes, ept_gpu_moe **moe, ept_error *error) {
  return guarded("moe_create", error, [&] {
    const std::string held(static_cast<const char *>(image), image ? image_bytes : 0);
    *moe = new ept_gpu_moe{std::make_unique<GpuObject>(lanes->lanes, *config, number, held)};
  });
}

void ept_gpu_moe_close(ept_gpu_moe *moe) { delete moe; }

void ept_gpu_moe_local_experts(const ept_gpu_moe *moe, int32_t *ids) {
  const Object &object = moe->object->object;
  const auto &held = object.placement.held[object.config.rank];
  std::copy(held.begin(), held.end(), ids);
}

uint64_t ept_gpu_routing_bytes(const ept_gpu_moe *moe, uint64_t tokens) {
  return shared_bytes([&](Carve &carve) { routing_arrays(carve, moe->object->object.shape, tokens); });
}

uint64_t ept_gpu_routing_ids(const ept_gpu_moe *moe, uint64_t tokens) {
  return uint64_t(reinterpret_cast<uintptr_t>(arrays(*moe->object, nullptr, tokens).ids));
}

int32_t ept_gpu_moe_members(ept_gpu_moe *moe, uint32_t lane, int32_t captures, uint32_t *membership, void *stream,
                            ept_error *error) {
  return guarded("dispatch_send", error, [&] {
    Lanes &lanes = *moe->object->lanes;
    lanes.take_members(lane_awake(*moe->object, lane), captures != 0, stream);
    if (membership) *membership = lanes.members()->epoch;
  });
}

int32_t ept_gpu_moe_refuse_old(ept_gpu_moe *moe, uint32_t lane, uint32_t membership, void *stream, ept_error *error) {
  return guarded("combine_send", error,
                 [&] { moe->object->lanes->refuse_old(lane_awake(*moe->object, lane), membership, stream); });
}

int32_t ept_gpu_moe_dispatch_send(ept_gpu_moe *moe, const ept_dispatch_args *args, void *routing, void *stream,
                                  ept_error *error) {
  return guarded("dispatch_send", error, [&] { dispatch_send(*moe->object, *args, routing, stream); });
}

int32_t ept_gpu_moe_dispatch_wait(ept_gpu_moe *moe, uint32_t lane, uint64_t *arrival, void *stream, ept_error *error) {
  return guarded("dispatch_wait", error, [&] { dispatch_wait(*moe->object, lane, arrival, stream); });
}

int32_t ept_gpu_moe_dispatch_recv(ept_gpu_moe *moe, uint32_t lane, const ept_dispatch_outputs *outputs, void *routing,
                                  uint64_t tokens, int32_t *num_rows, uint64_t ticket, void *stream, ept_error *error) {
  return guarded("dispatch_recv", error,
                 [&] { dispatch_recv(*moe->object, lane, *outputs, routing, tokens, num_rows, ticket, stream); });
}

int32_t ept_gpu_moe_counts(ept_gpu_moe *moe, uint32_t lane, ept_gpu_counts *counts, int32_t *per_expert,
                           ept_error *error) {
  bool there = false;
  const int32_t failed = guarded("counts", error, [&] {
    if (counts->size != sizeof *counts) fail(EPT_E_INVALID, -1, "ept_gpu_counts is of another size");
    there = moe->object->counts(lane_of(*moe->object, lane), counts, per_expert);
  });
  return failed ? failed : there ? EPT_OK : EPT_LATER;
}

uint64_t ept_gpu_late_bytes(const ept_gpu_moe *moe) {
  const ept_moe_config &config = moe->object->object.config;
  return 4ull * config.world * config.max_tokens * config.top_k;
}

int32_t ept_gpu_moe_late_weights(ept_gpu_moe *moe, uint32_t lane, const ept_tensor *weights, void *routing, float *late,
                                 void *stream, ept_error *error) {
  return guarded("combine_send", error, [&] { late_weights(*moe->object, lane, *weights, routing, late, stream); });
}

int32_t ept_gpu_moe_combine_send(ept_gpu_moe *moe, const ept_combine_args *args, void *routing, uint64_t tokens,
                                 float *late, void *stream, ept_error *error) {
  return guarded("combine_send", error, [&] { combine_send(*moe->object, *args, routing, tokens, late, stream); });
}

int32_t ept_gpu_moe_combine_recv(ept_gpu_moe *moe, uint32_t lane, const ept_tensor *y, const ept_tensor *row_weights,
                                 void *routing, void *stream, ept_error *error) {
  return guarded("combine_recv", error, [&] { combine_recv(*moe->object, lane, *y, row_weights, routing, stream); });
}

int32_t ept_gpu_moe_drain(ept_gpu_moe *moe, uint32_t lane, uint32_t phase, void *stream, ept_error *error) {
  return guarded("drain", error, [&] {
    lane_awake(*moe->object, lane);
    if (moe->object->streams()) {
      if (phase == EPT_PHASE_DISPATCH)
        streamed_dispatch(*moe->object, lane, false, nullptr, stream);
      else
        streamed_combine(*moe->object, lane, false, nullptr, stream);
      return;
    }
    Drain a{moe->object->lanes->table(lane_of(*moe->object, lane)), phase};
    launch(*moe->object, kKernelDrain, 1, moe->object->lanes->threads(), 0, stream, &a);
  });
}

int32_t ept_gpu_moe_stats_get(ept_gpu_moe *moe, ept_moe_stats *stats, ept_error *error) {
  return guarded("stats", error, [&] { moe->object->stats(stats); });
}

int32_t ept_gpu_moe_check(ept_gpu_moe *moe, uint32_t lane, ept_error *error) {
  return guarded("moe_check", error, [&] { moe->object->lanes->check(lane_awake(*moe->object, lane)); });
}
