// SPDX-License-Identifier: Apache-2.0
//
// dispatch.cc: both halves of a dispatch.
#include <algorithm>

#include "moe/check.h"
#include "moe/cpu/rows.h"
#include "moe/moe.h"

namespace ept::moe {

namespace {

// What the arguments mean; nothing is changed until all of them are right.
struct DispatchPlan {
  std::shared_ptr<const Members> members;  // the mask of the step, taken here and nowhere else
  std::shared_ptr<SourceSide> fresh;       // where the ids are new
  std::shared_ptr<const SourceSide> source;
  std::shared_ptr<PackRows> pack;
  int32_t scale_format = EPT_DTYPE_NONE;
};

int64_t payload_elements(const Object &object, int32_t dtype) {
  return dtype == EPT_DTYPE_F4X2 ? object.config.hidden / 2 : object.config.hidden;
}

void check_tokens(const Moe &moe, int64_t tokens, bool whole) {
  const Shape &shape = moe.object->shape;
  if (tokens > shape.max_tokens)
    fail(EPT_E_CAPACITY, -1, "x has %lld tokens; max_tokens is %u", (long long)tokens, shape.max_tokens);
  if (!whole && tokens > shape.chunk_tokens)
    fail(EPT_E_CAPACITY, -1,
         "x has %lld tokens; with a buffer_bytes of %llu the halves take %u at once: call dispatch and combine whole, "
         "which stream longer batches, or allow more bytes",
         (long long)tokens, (unsigned long long)moe.object->config.buffer_bytes, shape.chunk_tokens);
}

std::vector<float> read_weights(const ept_tensor &weights) {
  const int64_t tokens = weights.shape[0], top_k = weights.shape[1];
  std::vector<float> values(size_t(tokens * top_k));
  const auto *from = static_cast<const float *>(weights.data);
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t k = 0; k < top_k; k++)
      values[size_t(t * top_k + k)] = from[t * weights.strides[0] + k * weights.strides[1]];
  return values;
}

// A routing that is kept knows all its ids; under another membership other ranks get rows of it.
std::shared_ptr<SourceSide> scan_again(const Object &object, const SourceSide &old,
                                       std::shared_ptr<const Members> members) {
  ept_tensor ids{};
  ids.data = const_cast<int32_t *>(old.ids.data());
  ids.dtype = EPT_DTYPE_I32;
  ids.ndim = 2;
  ids.shape[0] = old.tokens, ids.shape[1] = old.top_k;
  ids.strides[0] = old.top_k, ids.strides[1] = 1;
  std::shared_ptr<SourceSide> source = scan(object.placement, std::move(members), ids);
  source->weights = old.weights;
  return source;
}

void plan_source(const Moe &moe, const ept_dispatch_args &args, DispatchPlan &plan) {
  const Object &object = *moe.object;
  const int64_t tokens = args.x.shape[0], top_k = object.config.top_k;
  if (args.routing) {
    if (args.routing->object != object.number)
      fail(EPT_E_INVALID, -1, "the routing is of AllToAll %llu; this is %u", (unsigned long long)args.routing->object,
           object.number);
    if (present(args.topk_ids)) fail(EPT_E_INVALID, -1, "topk_ids and a routing were given; the routing has the ids");
    if (args.routing->source->tokens != tokens)
      fail(EPT_E_INVALID, -1, "x has %lld tokens; the routing has %u", (long long)tokens, args.routing->source->tokens);
    plan.source = args.routing->source;
  } else {
    want("topk_ids", args.topk_ids, {EPT_DTYPE_I32, EPT_DTYPE_I64}, {tokens, top_k});
  }
  const bool weights = present(args.topk_weights);
  if (weights) want("topk_weights", args.topk_weights, {EPT_DTYPE_F32}, {tokens, top_k});
  if (!args.routing) {
    plan.fresh = scan(object.placement, plan.members, args.topk_ids);
    place_combine(*plan.fresh, object.shape, object.shape.combine_recv());
  } else if (plan.source->members->epoch != plan.members->epoch) {
    plan.fresh = scan_again(object, *plan.source, plan.members);
    place_combine(*plan.fresh, object.shape, object.shape.combine_recv());
  } else if (weights) {
    plan.fresh = std::make_shared<SourceSide>(*plan.source);
  }
  if (plan.fresh) {
    if (weights) plan.fresh->weights = read_weights(args.topk_weights);
    plan.source = plan.fresh;
  }
}

DispatchPlan plan_dispatch(const Moe &moe, const ept_dispatch_args &args) {
  const Object &object = *moe.object;
  const ept_moe_config &config = object.config;
  DispatchPlan plan;
  plan.members = moe.arena->members_of_step();
  const bool quantise = object.quantises() && args.x.dtype == config.dtype;
  const int32_t sent = quantise ? config.dtype : config.dispatch_dtype;
  if (object.quantises())
    want("x", args.x, {config.dtype, config.dispatch_dtype}, {kAny, payload_elements(object, sent)});
  else
    want("x", args.x, {sent}, {kAny, payload_elements(object, sent)});
  want_rows("x", args.x);
  check_tokens(moe, args.x.shape[0], args.whole);

  plan.pack = std::make_shared<PackRows>();
  PackRows &pack = *plan.pack;
  if (present(args.scales)) {
    if (quantise)
      fail(EPT_E_INVALID, -1,
           "scales were given with an x of %s, which is quantised here: give one or the "
           "other",
           format_name(args.x.dtype));
    want("scales", args.scales, {}, {args.x.shape[0], kAny});
    pack.scales = args.scales.data ? rows_of(args.scales, 1) : Rows();
    pack.scale_size = element_bytes(args.scales.dtype);
    pack.scale_bytes = pack.scale_size * uint64_t(args.scales.shape[1]);
    plan.scale_format = args.scales.dtype;
    const uint64_t room = std::max<uint64_t>(object.own_scales(), config.caller_scale_bytes);
    if (pack.scale_size == 0 || pack.scale_bytes > room)
      fail(EPT_E_INVALID, -1, "scales are %s, %llu bytes a row; %llu bytes were planned for: set caller_scale_bytes",
           shown(args.scales).c_str(), (unsigned long long)pack.scale_bytes, (unsigned long long)room);
  } else if (quantise) {
    pack.scale_bytes = object.own_scales();
    plan.scale_format = config.scale_format == EPT_SCALES_FP32 ? EPT_DTYPE_F32 : EPT_DTYPE_E8M0;
  }
  plan_source(moe, args, plan);
  pack.object = moe.object;
  pack.source = plan.source;
  pack.pool = &moe.arena->pool;
  pack.x = rows_of(args.x, 1);
  pack.x_format = args.x.dtype;
  pack.quantise = quantise;
  pack.payload = object.payload();
  return plan;
}

// Where each peer's message is packed: one behind the other where all fit, else in even shares.
void plan_messages(Lane &lane, Exchange &exchange, const SourceSide &source, uint64_t slot_bytes) {
  const uint32_t world = lane.arena.world, rank = lane.arena.rank;
  const uint64_t row = exchange.head.row_bytes;
  uint64_t all = 0;
  for (uint32_t r = 0; r < world; r++)
    if (r != rank) all += align_up(exchange.header_bytes(r) + source.rows(r) * row, kAlign);
  uint64_t at = 0;
  for (uint32_t r = 0, index = 0; r < world; r++) {
    const Region target = lane.received(exchange.phase, exchange.slot, exchange.object->shape.dispatch_region(rank));
    Region staging = target;  // our own rows are packed where they are read
    if (r != rank) {
      const uint64_t bytes = exchange.header_bytes(r) + source.rows(r) * row;
      const Region in_slot = all <= slot_bytes ? Region{at, bytes} : share(slot_bytes, world - 1, index);
      staging = lane.staged(exchange.phase, exchange.slot, in_slot);
      at += align_up(bytes, kAlign);
      index++;
    }
    lane.plan(exchange, r, source.rows(r), staging, target);
  }
}

}  // namespace

Exchange &open_exchange(Moe &moe, Lane &lane, uint32_t phase, const char *operation) {
  Exchange *exchange = lane.pending(phase);
  const char *name = phase == EPT_PHASE_DISPATCH ? "dispatch" : "combine";
  if (!exchange)
    fail(EPT_E_INVALID, -1,
         "%s: no %s is under way in lane %u: call %s_send first (one that was under way is dropped by "
         "the next send, by reset, and when the arena grows)",
         operation, name, lane.index, name);
  if (exchange->object != moe.object)
    fail(EPT_E_INVALID, -1, "%s: the %s under way in lane %u is of AllToAll %u; this is %u", operation, name,
         lane.index, exchange->object->number, moe.object->number);
  return *exchange;
}

void dispatch_send(Moe &moe, Lane &lane, const ept_dispatch_args &args, Wait &wait) {
  DispatchPlan plan = plan_dispatch(moe, args);
  lane.drop(EPT_PHASE_DISPATCH);
  Exchange &exchange = lane.begin(Kind::dispatch, moe.object, plan.members, wait);
  exchange.whole = args.whole;
  exchange.source = plan.source;
  ept_moe_header &head = exchange.head;
  head.payload_bytes = uint32_t(plan.pack->payload);
  head.scale_bytes = uint32_t(plan.pack->scale_bytes);
  head.row_bytes = uint32_t(ept_row_bytes(plan.pack->payload, plan.pack->scale_bytes, head.top_k));
  head.payload_format = uint32_t(moe.object->config.dispatch_dtype);
  head.scale_format = uint32_t(plan.scale_format);
  if (plan.source->weights.empty() && plan.source->tokens) head.flags |= EPT_MOE_NO_WEIGHTS;
  plan_messages(lane, exchange, *plan.source, moe.object->shape.dispatch_send());

  PackRows &pack = *plan.pack;
  pack.keeps = pack.quantise;
  for (const Outgoing &out : exchange.out) pack.keeps = pack.keeps && out.single;
  if (pack.keeps) pack.packed.assign(plan.source->tokens, nullptr);
  exchange.pack = [held = plan.pack](uint32_t peer, uint64_t first, uint64_t rows, char *to) {
    (*held)(peer, first, rows, to);
  };
  lane.send(exchange, wait);
}

namespace {

// What the headers of all sources say together. Sources without rows have no say.
ept_arrival arrival_of(const Lane &lane, const Exchange &exchange) {
  const Object &object = *exchange.object;
  const uint32_t world = object.shape.world, local = object.local();
  const ept_moe_header *speaker = nullptr;
  ept_arrival arrival{};
  arrival.size = sizeof arrival;
  for (uint32_t s = 0; s < world; s++) {
    const Incoming &in = exchange.in[s];
    arrival.rows += in.rows;
    arrival.max_rank_rows = std::max(arrival.max_rank_rows, in.rows);
    if (!in.rows) continue;
    const ept_moe_header &h = in.first;
    if (h.payload_format != uint32_t(object.config.dispatch_dtype))
      fail(EPT_E_MISMATCH, int32_t(s), "rank %u sent rows of %s; rank %u expects %s", s,
           format_name(int32_t(h.payload_format)), lane.arena.rank, format_name(object.config.dispatch_dtype));
    if (!speaker) speaker = &h;
    if (h.scale_bytes != speaker->scale_bytes || h.scale_format != speaker->scale_format ||
        (h.flags ^ speaker->flags) & EPT_MOE_NO_WEIGHTS)
      fail(EPT_E_MISMATCH, int32_t(s),
           "rank %u sent rows with %u bytes of scales of %s and %s weights, rank %u with %u of %s and %s", s,
           h.scale_bytes, format_name(int32_t(h.scale_format)), h.flags & EPT_MOE_NO_WEIGHTS ? "no" : "its",
           speaker->source, speaker->scale_bytes, format_name(int32_t(speaker->scale_format)),
           speaker->flags & EPT_MOE_NO_WEIGHTS ? "no" : "its");
  }
  if (!speaker) speaker = &exchange.in[lane.arena.rank].first;
  arrival.scale_bytes = speaker->scale_bytes;
  arrival.scale_format = int32_t(speaker->scale_format);
  arrival.payload_format = object.config.dispatch_dtype;
  arrival.has_weights = !(speaker->flags & EPT_MOE_NO_WEIGHTS);
  std::vector<uint32_t> sums(local, 0);
  for (uint32_t s = 0; s < world; s++)
    for (uint32_t e = 0; e < local; e++) sums[e] += exchange.counts[size_t(s) * local + e];
  for (uint32_t e = 0; e < local; e++) arrival.max_expert_rows = std::max<uint64_t>(arrival.max_expert_rows, sums[e]);
  arrival.contiguous_rows = object.contiguous_rows(sums.data());
  return arrival;
}

// N of the layout: rows of a rank or an expert where there are two leading dimensions, else of all.
struct Leading {
  const char *from = nullptr;
  int64_t rows = -1;
};

void want_output(const char *name, const ept_tensor &tensor, std::initializer_list<int32_t> dtypes, bool two_dims,
                 int64_t outer, int64_t last, Leading &leading) {
  if (!present(tensor)) return;
  const int64_t n = leading.rows;
  if (two_dims && last == kAny - 1)
    want(name, tensor, dtypes, {outer, n});
  else if (two_dims)
    want(name, tensor, dtypes, {outer, n, last});
  else if (last == kAny - 1)
    want(name, tensor, dtypes, {n});
  else
    want(name, tensor, dtypes, {n, last});
  if (n < 0) leading = {name, tensor.shape[two_dims ? 1 : 0]};
}
constexpr int64_t kNoColumn = kAny - 1;

// Checks the shapes of the outputs and returns N; -1 where no output says.
int64_t check_outputs(const Object &object, const ept_dispatch_outputs &outputs, const ept_arrival &arrival) {
  if (outputs.layout < EPT_LAYOUT_ROWS || outputs.layout > EPT_LAYOUT_MASKED)
    fail(EPT_E_INVALID, -1, "layout is %d; 0 (rows) to 3 (masked) are possible", outputs.layout);
  const bool masked = outputs.layout == EPT_LAYOUT_MASKED, by_rank = outputs.layout == EPT_LAYOUT_BY_RANK;
  const bool two = masked || by_rank, per_expert = masked || outputs.layout == EPT_LAYOUT_CONTIGUOUS;
  const int64_t outer = masked ? object.local() : object.shape.world, top_k = object.config.top_k;
  const int32_t payload = object.config.dispatch_dtype;
  Leading leading;
  want_output("x of the outputs", outputs.x, {payload}, two, outer, payload_elements(object, payload), leading);
  if (present(outputs.x)) want_rows("x of the outputs", outputs.x);
  if (present(outputs.scales)) {
    const uint64_t size = element_bytes(outputs.scales.dtype);
    if (arrival.scale_bytes == 0 && arrival.rows > 0)
      fail(EPT_E_INVALID, -1, "scales of the outputs are %s; no scales came", shown(outputs.scales).c_str());
    const int32_t last = outputs.scales.ndim - 1;
    if (last < 0 || size == 0 ||
        (arrival.rows > 0 && size * uint64_t(outputs.scales.shape[last]) != arrival.scale_bytes))
      fail(EPT_E_INVALID, -1, "scales of the outputs are %s; %u bytes of %s a row came", shown(outputs.scales).c_str(),
           arrival.scale_bytes, format_name(arrival.scale_format));
    want_output("scales of the outputs", outputs.scales, {}, two, outer, kAny, leading);
  }
  if (per_expert && present(outputs.topk_ids))
    fail(EPT_E_INVALID, -1, "topk_ids of the outputs were given; only the layouts rows and by_rank have them");
  want_output("topk_ids of the outputs", outputs.topk_ids, {EPT_DTYPE_I32}, two, outer, top_k, leading);
  want_output("topk_weights of the outputs", outputs.topk_weights, {EPT_DTYPE_F32}, two, outer,
              per_expert ? kNoColumn : top_k, leading);
  want_output("source of the outputs", outputs.source, {EPT_DTYPE_I32}, two, outer, 2, leading);
  if (present(outputs.counts)) want("counts", outputs.counts, {EPT_DTYPE_I32}, {int64_t(object.local())});
  if (present(outputs.offsets)) want("offsets", outputs.offsets, {EPT_DTYPE_I32}, {int64_t(object.local()) + 1});
  return leading.rows;
}

void check_capacity(const Object &object, int32_t layout, uint64_t room, const ept_arrival &arrival) {
  uint64_t needed = arrival.rows;
  const char *what = "rows in all";
  if (layout == EPT_LAYOUT_BY_RANK) needed = arrival.max_rank_rows, what = "rows of one rank";
  if (layout == EPT_LAYOUT_CONTIGUOUS) needed = arrival.contiguous_rows, what = "rows, padding included";
  if (layout == EPT_LAYOUT_MASKED) needed = arrival.max_expert_rows, what = "rows of one expert";
  if (needed > room)
    fail(EPT_E_CAPACITY, -1,
         "rank %u received %llu %s; the outputs hold %llu. Nothing was written; give larger outputs (max_rows) and "
         "reset",
         object.config.rank, (unsigned long long)needed, what, (unsigned long long)room);
}

struct Release {
  void operator()(ept_routing *routing) const { ept_routing_release(routing); }
};
using RoutingRef = std::unique_ptr<ept_routing, Release>;

RoutingRef new_routing(const Exchange &exchange, int32_t layout, uint64_t leading, bool has_weights) {
  const Object &object = *exchange.object;
  const uint32_t world = object.shape.world, top_k = object.config.top_k;
  RoutingRef routing(new ept_routing);
  routing->object = object.number;
  routing->source = exchange.source;
  routing->made_by = exchange.object;
  routing->begin.assign(world + 1, 0);
  routing->combine.resize(world);
  for (uint32_t s = 0; s < world; s++) {
    const Incoming &in = exchange.in[s];
    routing->begin[s + 1] = routing->begin[s] + in.rows;
    if (!exchange.members->has(s)) continue;
    const Region combine = {in.first.combine_offset, in.first.combine_capacity};
    if (combine.offset % kAlign || combine.bytes < EPT_MOE_HEADER_BYTES ||
        combine.offset > object.shape.combine_recv() || combine.bytes > object.shape.combine_recv() - combine.offset)
      fail(EPT_E_MISMATCH, int32_t(s), "rank %u offers [%llu, + %llu) of its combine slot of %llu bytes", s,
           (unsigned long long)combine.offset, (unsigned long long)combine.bytes,
           (unsigned long long)object.shape.combine_recv());
    routing->combine[s] = combine;
  }
  const size_t rows = routing->begin[world];
  routing->token.resize(rows);
  routing->experts.resize(rows * top_k);
  if (has_weights) routing->weights.resize(rows * top_k);
  routing->layout = layout;
  routing->leading = leading;
  routing->place.resize(layout == EPT_LAYOUT_CONTIGUOUS || layout == EPT_LAYOUT_MASKED ? rows * top_k : rows);
  return routing;
}

// Copies chunks out as they come, and sends our own that still wait for grants.
void unpack_all(Lane &lane, Exchange &exchange, UnpackRows &unpack, Wait &wait) {
  std::vector<Segment> batch;
  std::vector<Chunk> chunks;
  while (exchange.unread || exchange.unsent) {
    bool moved = exchange.unsent && lane.push(exchange);
    batch.clear();
    chunks.clear();
    Chunk chunk;
    for (uint32_t s = 0; s < lane.arena.world; s++) {
      if (!lane.look(exchange, s, 0, &chunk)) continue;
      batch.push_back({s, chunk.first, chunk.count, chunk.rows});
      chunks.push_back(chunk);
    }
    harmless(lane, [&] { lane.refuse_cut(exchange); });
    if (!batch.empty()) {
      const Span span(lane.arena.spans, "unpack", EPT_METRICS_DISPATCH, lane.index, EPT_NO_PEER, exchange.generation);
      unpack.take(batch);
    }
    for (size_t i = 0; i < batch.size(); i++) lane.take(exchange, batch[i].source, chunks[i]);
    moved |= !batch.empty();
    moved |= lane.serve();
    if (moved)
      wait.moved();
    else if (exchange.unread || exchange.unsent)
      wait.for_chunk(exchange);
  }
}

}  // namespace

void dispatch_wait(Moe &moe, Lane &lane, ept_arrival *arrival, Wait &wait) {
  Exchange &exchange = open_exchange(moe, lane, EPT_PHASE_DISPATCH, wait.operation());
  lane.committed = true;
  lane.read_headers(exchange, wait);
  harmless(lane, [&] { lane.refuse_cut(exchange); });
  *arrival = arrival_of(lane, exchange);
}

void dispatch_recv(Moe &moe, Lane &lane, const ept_dispatch_outputs &outputs, ept_routing **routing, Wait &wait) {
  Exchange &exchange = open_exchange(moe, lane, EPT_PHASE_DISPATCH, wait.operation());
  ept_arrival arrival{};
  dispatch_wait(moe, lane, &arrival, wait);
  int64_t leading = -1;
  harmless(lane, [&] { leading = check_outputs(*moe.object, outputs, arrival); });
  if (leading < 0)
    leading = int64_t(outputs.layout == EPT_LAYOUT_BY_RANK      ? arrival.max_rank_rows
                      : outputs.layout == EPT_LAYOUT_CONTIGUOUS ? arrival.contiguous_rows
                      : outputs.layout == EPT_LAYOUT_MASKED     ? arrival.max_expert_rows
                                                                : arrival.rows);
  check_capacity(*moe.object, outputs.layout, uint64_t(leading), arrival);
  RoutingRef made = new_routing(exchange, outputs.layout, uint64_t(leading), arrival.has_weights);
  UnpackRows unpack(*moe.object, moe.arena->pool, outputs, *made, exchange.counts.data(), arrival.scale_bytes,
                    arrival.has_weights);
  unpack_all(lane, exchange, unpack, wait);
  {
    const Span span(lane.arena.spans, "unpack", EPT_METRICS_DISPATCH, lane.index, EPT_NO_PEER, exchange.generation);
    unpack.finish();
  }
  lane.finish(exchange);
  if (routing) *routing = made.release();
}

}  // namespace ept::moe
