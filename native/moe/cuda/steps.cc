// SPDX-License-Identifier: Apache-2.0
#include "moe/cuda/steps.h"

#include "moe/check.h"
#include "moe/cuda/shared.h"
#include "moe/fail.h"
#include "moe/moe.h"

namespace ept::moe::cuda {

uint32_t lane_of(const GpuObject &moe, uint32_t lane) {
  if (lane >= moe.object.config.lanes)
    fail(EPT_E_INVALID, -1, "lane %u; this AllToAll has %u", lane, moe.object.config.lanes);
  return lane;
}

uint32_t lane_awake(const GpuObject &moe, uint32_t lane) {
  moe.lanes->refuse_suspended();
  return lane_of(moe, lane);
}

namespace {

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

// Each row's scales side by side, as the copy engine takes them (bulk.cuh).
bool stand_in_runs(const Strided &scales, const GpuObject::Carried &carried) {
  const auto start = uint64_t(reinterpret_cast<uintptr_t>(scales.data));
  return scales.data && scales.column == int64_t(carried.scale_size) &&
         (start | uint64_t(scales.outer) | uint64_t(scales.inner) | carried.scale_bytes) % 16 == 0;
}
bool per_expert(int32_t layout) { return layout == EPT_LAYOUT_CONTIGUOUS || layout == EPT_LAYOUT_MASKED; }

RoutingArrays arrays(const GpuObject &moe, void *memory, uint64_t tokens) {
  Carve carve(static_cast<char *>(memory));
  return routing_arrays(carve, moe.object.shape, tokens);
}

void launch(const GpuObject &moe, Kernel kernel, uint32_t blocks, uint32_t threads, uint64_t shared, void *stream,
            void *argument) {
  const Launch as = {blocks, threads, shared, moe.lanes->shared(threads)};
  if (moe.kernels)
    moe.kernels->launch(kernel, as, stream, argument);
  else
    moe.lanes->gpu().launch(kernel, as, stream, argument);
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
                             a.out.tokens);
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

}  // namespace

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
  const uint32_t threads = moe.lanes->threads();
  a.deal = deal_of(a.tokens, moe.lanes->blocks(), threads / kWarp, uint32_t(moe.table.payload / 16), config.top_k);
  if (moe.streams()) a.deal.parts = divisor(1), a.deal.units = 1;  // a warp has a token by itself
  if (!moe.streams()) {
    const uint64_t shared = shared_bytes(
        [&](Carve &carve) { send_shared(carve, threads, config.world, config.num_experts, uint32_t(tokens)); });
    launch(moe, kKernelDispatchSend, moe.lanes->blocks(), threads, shared, stream, &a);
    return;
  }
  moe.begun[args.lane].dispatch = a;
  streamed_dispatch(moe, args.lane, true, nullptr, stream);
}

static uint64_t shared_of_receive(const GpuObject &moe) {
  return shared_bytes(
      [&](Carve &carve) { recv_shared(carve, moe.lanes->threads(), moe.object.config.world, moe.object.local()); });
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
  a.scale_runs = stand_in_runs(a.scales, carried);
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
  const uint32_t blocks = moe.lanes->blocks(), threads = moe.lanes->threads();
  const bool claims = are_claimed(uint64_t(config.world) * config.max_tokens, threads / kWarp, blocks);
  launch(moe, claims ? kKernelDispatchClaims : kKernelDispatchRecv, blocks, threads, shared_of_receive(moe), stream,
         &a);
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
    a.parts = divisor(1);  // a warp has a token by itself
    streamed_combine(moe, lane, false, &a, stream);
    return;
  }
  const uint32_t threads = moe.lanes->combine_threads(a.tokens), blocks = moe.lanes->blocks();
  const uint32_t groups = moe.object.config.hidden / kGroup;
  a.parts = divisor(parts_of((a.tokens + blocks - 1) / blocks, threads / kWarp, groups, 4, kPair));
  const uint64_t shared = shared_bytes([&](Carve &carve) { combine_shared(carve, threads, moe.object.config.world); });
  launch(moe, kKernelCombineRecv, moe.lanes->blocks(), threads, shared, stream, &a);
}

void drain(GpuObject &moe, uint32_t lane, uint32_t phase, void *stream) {
  Drain a{moe.lanes->table(lane_awake(moe, lane)), phase};
  if (!moe.streams()) return launch(moe, kKernelDrain, 1, moe.lanes->threads(), 0, stream, &a);
  if (phase == EPT_PHASE_DISPATCH)
    streamed_dispatch(moe, lane, false, nullptr, stream);
  else
    streamed_combine(moe, lane, false, nullptr, stream);
}

// ---- what a routing takes ----

uint64_t routing_bytes(const GpuObject &moe, uint64_t tokens) {
  return shared_bytes([&](Carve &carve) { routing_arrays(carve, moe.object.shape, tokens); });
}

uint64_t routing_ids(const GpuObject &moe, uint64_t tokens) {
  return uint64_t(reinterpret_cast<uintptr_t>(arrays(moe, nullptr, tokens).ids));
}

uint64_t routing_weights(const GpuObject &moe, uint64_t tokens) {
  return uint64_t(reinterpret_cast<uintptr_t>(arrays(moe, nullptr, tokens).weights));
}

}  // namespace ept::moe::cuda
