// SPDX-License-Identifier: Apache-2.0
//
// combine.cc: both halves of a combine, and the message of weights that are known only then.
#include <string.h>

#include <algorithm>

#include "moe/check.h"
#include "moe/cpu/rows.h"
#include "moe/moe.h"

namespace ept::moe {

namespace {

void check_out(const Object &object, const ept_combine_args &args) {
  const ept_routing &routing = *args.routing;
  const int64_t hidden = object.config.hidden, top_k = object.config.top_k;
  const bool two = routing.layout == EPT_LAYOUT_BY_RANK || routing.layout == EPT_LAYOUT_MASKED;
  const int64_t outer = routing.layout == EPT_LAYOUT_MASKED ? object.local() : object.shape.world;
  const auto n = int64_t(routing.leading);
  const std::initializer_list<int32_t> floats = {EPT_DTYPE_F32, EPT_DTYPE_F16, EPT_DTYPE_BF16};
  if (two)
    want("expert_out", args.expert_out, floats, {outer, n, hidden});
  else
    want("expert_out", args.expert_out, floats, {kAny, hidden});
  if (!two && uint64_t(args.expert_out.shape[0]) < routing.needed)
    fail(EPT_E_INVALID, -1, "expert_out is %s; the dispatch brought rows up to %llu", shown(args.expert_out).c_str(),
         (unsigned long long)routing.needed);
  want_rows("expert_out", args.expert_out);
  if (!present(args.row_weights)) return;
  if (routing.layout != EPT_LAYOUT_ROWS && routing.layout != EPT_LAYOUT_BY_RANK)
    fail(EPT_E_INVALID, -1, "row_weights were given; only the layouts rows and by_rank have them");
  if (two)
    want("row_weights", args.row_weights, {EPT_DTYPE_F32}, {outer, n, top_k});
  else
    want("row_weights", args.row_weights, {EPT_DTYPE_F32}, {args.expert_out.shape[0], top_k});
}

void check_args(const Moe &moe, const ept_combine_args &args) {
  const Object &object = *moe.object;
  if (!args.routing) fail(EPT_E_INVALID, -1, "combine needs the routing of a dispatch");
  if (args.routing->object != object.number)
    fail(EPT_E_INVALID, -1, "the routing is of AllToAll %llu; this is %u", (unsigned long long)args.routing->object,
         object.number);
  if (args.layout != args.routing->layout)
    fail(EPT_E_INVALID, -1, "expert_out is in layout %d; the dispatch brought layout %d", args.layout,
         args.routing->layout);
  check_out(object, args);
  const uint32_t tokens = args.routing->source->tokens;
  if (present(args.topk_weights))
    want("topk_weights", args.topk_weights, {EPT_DTYPE_F32}, {int64_t(tokens), int64_t(object.config.top_k)});
  if (!args.whole && tokens > object.shape.chunk_tokens)
    fail(EPT_E_CAPACITY, -1,
         "the routing has %u tokens; with a buffer_bytes of %llu the halves take %u at once: call combine whole",
         tokens, (unsigned long long)object.config.buffer_bytes, object.shape.chunk_tokens);
}

// Sends each of our tokens' weights to the ranks that have its row, and reads theirs: [rows, top_k].
class LateWeights {
 public:
  LateWeights(Moe &moe, Lane &lane, const ept_combine_args &args, Wait &wait)
      : moe_(moe),
        lane_(lane),
        wait_(wait),
        routing_(*args.routing),
        source_(*routing_.source),
        given_(args.topk_weights),
        top_k_(moe.object->config.top_k),
        row_bytes_(ept_late_weights_row_bytes(top_k_)) {}

  std::vector<float> run() {
    weights_.resize(routing_.begin.back() * top_k_);
    Exchange &exchange = lane_.begin(Kind::late_weights, moe_.object, source_.members, wait_);
    exchange.whole = true;
    exchange.source = routing_.source;
    exchange.head.flags = EPT_MOE_LATE_WEIGHTS;
    exchange.head.row_bytes = uint32_t(row_bytes_);
    plan(exchange);
    exchange.pack = [this](uint32_t peer, uint64_t first, uint64_t rows, char *to) { pack(peer, first, rows, to); };
    lane_.send(exchange, wait_);
    while (exchange.unread || exchange.unsent) {
      bool moved = exchange.unsent && lane_.push(exchange);
      moved |= read(exchange);
      moved |= lane_.serve();
      if (moved)
        wait_.moved();
      else if (exchange.unread || exchange.unsent)
        wait_.for_chunk(exchange);
    }
    exchange.pack = nullptr;
    lane_.finish(exchange);
    return std::move(weights_);
  }

 private:
  void plan(Exchange &exchange) {
    const uint32_t world = lane_.arena.world, rank = lane_.arena.rank;
    const Shape &shape = moe_.object->shape;
    const Region target = lane_.received(exchange.phase, exchange.slot, shape.dispatch_region(rank));
    const auto bytes = [&](uint32_t r) {
      return r == rank ? 0 : align_up(EPT_MOE_HEADER_BYTES + source_.rows(r) * row_bytes_, kAlign);
    };
    uint64_t all = 0;
    for (uint32_t r = 0; r < world; r++) all += bytes(r);
    // Packed, so that a message is one chunk, as a rank on a GPU reads it; what doesn't fit is streamed by even shares.
    const bool packed = all <= shape.dispatch_send();
    uint64_t at = 0;
    for (uint32_t r = 0, index = 0; r < world; r++) {
      Region staging = target;
      if (r != rank) {
        staging = packed ? Region{at, bytes(r)} : share(shape.dispatch_send(), world - 1, index++);
        staging = lane_.staged(exchange.phase, exchange.slot, staging);
      }
      at += bytes(r);
      lane_.plan(exchange, r, source_.rows(r), staging, target);
    }
  }

  void pack(uint32_t peer, uint64_t first, uint64_t rows, char *to) const {
    const auto *from = static_cast<const float *>(given_.data);
    for (uint64_t j = 0; j < rows; j++, to += row_bytes_) {
      const uint32_t token = source_.sent[source_.begin[peer] + first + j];
      for (uint32_t k = 0; k < top_k_; k++)
        memcpy(to + 4 * k, &from[token * given_.strides[0] + k * given_.strides[1]], 4);
      memset(to + 4 * top_k_, 0, row_bytes_ - 4ull * top_k_);
    }
  }

  bool read(Exchange &exchange) {
    bool moved = false;
    Chunk chunk;
    for (uint32_t s = 0; s < lane_.arena.world; s++) {
      if (!lane_.look(exchange, s, 0, &chunk)) continue;
      if (exchange.in[s].rows != routing_.begin[s + 1] - routing_.begin[s])
        fail(EPT_E_MISMATCH, int32_t(s),
             "rank %u sent late weights of %llu rows; its dispatch had %llu: ranks must "
             "combine the same routing",
             s, (unsigned long long)exchange.in[s].rows,
             (unsigned long long)(routing_.begin[s + 1] - routing_.begin[s]));
      for (uint64_t j = 0; j < chunk.count; j++)
        memcpy(&weights_[(routing_.begin[s] + chunk.first + j) * top_k_], chunk.rows + j * row_bytes_, 4ull * top_k_);
      lane_.take(exchange, s, chunk);
      moved = true;
    }
    return moved;
  }

  Moe &moe_;
  Lane &lane_;
  Wait &wait_;
  const ept_routing &routing_;
  const SourceSide &source_;
  const ept_tensor given_;
  const uint32_t top_k_;
  const uint64_t row_bytes_;
  std::vector<float> weights_;
};

std::shared_ptr<PackSums> plan_pack(Moe &moe, const ept_combine_args &args, std::vector<float> late) {
  auto pack = std::make_shared<PackSums>();
  pack->object = moe.object;
  pack->routing = args.routing;
  pack->pool = &moe.arena->pool;
  pack->out = rows_of(args.expert_out, args.expert_out.ndim - 1);
  pack->format = args.expert_out.dtype;
  pack->late = std::move(late);
  if (!args.weights_applied)
    pack->weights = !pack->late.empty()             ? pack->late.data()
                    : args.routing->weights.empty() ? nullptr
                                                    : args.routing->weights.data();
  if (args.row_weights.data) pack->row_weights = rows_of(args.row_weights, args.row_weights.ndim - 1);
  pack->row_bytes = ept_combine_row_bytes(moe.object->returned(), moe.object->config.top_k, present(args.row_weights));
  return pack;
}

}  // namespace

void combine_send(Moe &moe, Lane &lane, const ept_combine_args &args, Wait &wait) {
  check_args(moe, args);
  const ept_routing &routing = *args.routing;
  lane.drop(EPT_PHASE_COMBINE);
  lane.refuse_old(*routing.source->members);
  std::vector<float> late;
  if (present(args.topk_weights)) late = LateWeights(moe, lane, args, wait).run();

  Exchange &exchange = lane.begin(Kind::combine, moe.object, routing.source->members, wait);
  exchange.whole = args.whole;
  exchange.source = routing.source;
  auto pack = plan_pack(moe, args, std::move(late));
  ept_moe_header &head = exchange.head;
  head.row_bytes = uint32_t(pack->row_bytes);
  head.payload_bytes = uint32_t(moe.object->returned());
  head.payload_format = uint32_t(moe.object->config.combine_dtype);
  if (present(args.row_weights)) head.flags |= EPT_MOE_ROW_WEIGHTS;
  const uint32_t world = lane.arena.world, rank = lane.arena.rank;
  for (uint32_t s = 0, index = 0; s < world; s++) {
    const Region target = lane.received(exchange.phase, exchange.slot, routing.combine[s]);
    const Region staging =
        s == rank ? target : lane.staged(exchange.phase, exchange.slot, moe.object->shape.combine_staging(index++));
    lane.plan(exchange, s, routing.begin[s + 1] - routing.begin[s], staging, target);
  }
  ept_routing_retain(args.routing);
  const std::shared_ptr<ept_routing> held(args.routing, ept_routing_release);
  exchange.pack = [held, pack](uint32_t peer, uint64_t first, uint64_t rows, char *to) {
    (*pack)(peer, first, rows, to);
  };
  lane.send(exchange, wait);
}

namespace {

// Chunks of one rank that have landed and are not all summed yet: at most one a ring position.
struct Landed {
  Chunk chunks[2];
  uint32_t count = 0;
  uint64_t until(const Incoming &in) const {
    return count ? chunks[count - 1].first + chunks[count - 1].count : in.got;
  }
};

class CombineRecv {
 public:
  CombineRecv(Lane &lane, Exchange &exchange, SumRows &sums)
      : lane_(lane), exchange_(exchange), source_(*exchange.source), sums_(sums), landed_(lane.arena.world) {}

  void run(Wait &wait) {
    while (exchange_.unread || exchange_.unsent) {
      bool moved = exchange_.unsent && lane_.push(exchange_);
      moved |= find();
      harmless(lane_, [&] { lane_.refuse_cut(exchange_); });
      moved |= sum();
      moved |= release();
      moved |= lane_.serve();
      if (moved)
        wait.moved();
      else if (exchange_.unread || exchange_.unsent)
        wait.for_chunk(exchange_);
    }
  }

 private:
  bool find() {
    bool moved = false;
    for (uint32_t s = 0; s < landed_.size(); s++) {
      Landed &landed = landed_[s];
      while (landed.count < 2 && !(landed.count && landed.chunks[0].last) &&
             lane_.look(exchange_, s, landed.count, &landed.chunks[landed.count])) {
        if (exchange_.in[s].rows != source_.rows(s))
          fail(EPT_E_MISMATCH, int32_t(s), "rank %u sends back %llu rows of %llu: ranks must combine the same routing",
               s, (unsigned long long)exchange_.in[s].rows, (unsigned long long)source_.rows(s));
        show(s, landed.count++);
        moved = true;
      }
    }
    return moved;
  }

  void show(uint32_t rank, uint32_t which) {
    const Chunk &chunk = landed_[rank].chunks[which];
    sums_.show(rank, chunk.first, chunk.rows, chunk.header.row_bytes, chunk.header.flags & EPT_MOE_ROW_WEIGHTS,
               which == 1);
  }

  // Tokens up to the first one that misses a row.
  bool sum() {
    uint64_t until = source_.tokens;
    for (uint32_t s = 0; s < landed_.size(); s++) {
      const uint64_t rows = landed_[s].until(exchange_.in[s]);
      if (rows < source_.rows(s)) until = std::min<uint64_t>(until, source_.sent[source_.begin[s] + rows]);
    }
    if (until <= summed_) return false;
    const Span span(lane_.arena.spans, "sum", EPT_METRICS_COMBINE, lane_.index, EPT_NO_PEER, exchange_.generation);
    sums_.sum(summed_, until);
    summed_ = until;
    return true;
  }

  bool release() {
    bool moved = false;
    for (uint32_t s = 0; s < landed_.size(); s++) {
      Landed &landed = landed_[s];
      while (landed.count) {
        const Chunk &chunk = landed.chunks[0];
        const uint64_t end = chunk.first + chunk.count;
        if (chunk.count && source_.sent[source_.begin[s] + end - 1] >= summed_) break;
        lane_.take(exchange_, s, chunk);
        landed.chunks[0] = landed.chunks[1];
        if (--landed.count) show(s, 0);
        moved = true;
      }
    }
    return moved;
  }

  Lane &lane_;
  Exchange &exchange_;
  const SourceSide &source_;
  SumRows &sums_;
  std::vector<Landed> landed_;
  uint64_t summed_ = 0;  // tokens
};

}  // namespace

void combine_recv(Moe &moe, Lane &lane, const ept_tensor &y, const ept_tensor *row_weights, Wait &wait) {
  Exchange &exchange = open_exchange(moe, lane, EPT_PHASE_COMBINE, wait.operation());
  const std::shared_ptr<const SourceSide> source = exchange.source;  // outlives the exchange
  const int64_t tokens = source->tokens, top_k = moe.object->config.top_k;
  want("y", y, {EPT_DTYPE_F32, EPT_DTYPE_F16, EPT_DTYPE_BF16}, {tokens, int64_t(moe.object->config.hidden)});
  want_rows("y", y);
  const bool beside = row_weights && present(*row_weights);
  if (beside) want("row_weights", *row_weights, {EPT_DTYPE_F32}, {tokens, top_k});
  lane.committed = true;
  SumRows sums(*moe.object, moe.arena->pool, *source, y, beside && row_weights->data ? row_weights : nullptr);
  CombineRecv(lane, exchange, sums).run(wait);
  lane.finish(exchange);
}

}  // namespace ept::moe
