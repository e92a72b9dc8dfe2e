// SPDX-License-Identifier: Apache-2.0
#include "moe/routing.h"

#include <algorithm>

#include "moe/fail.h"

namespace ept::moe {

Placement::Placement(uint32_t world, uint32_t experts, const int32_t *given)
    : rank(experts), local(experts), held(world), first(world + 1) {
  const uint32_t each = experts / world, more = experts % world;
  for (uint32_t id = 0; id < experts; id++) {
    const uint32_t in_larger = (each + 1) * more;
    const uint32_t block = id < in_larger ? id / (each + 1) : more + (id - in_larger) / (each ? each : 1);
    rank[id] = given ? uint32_t(given[id]) : block;
    local[id] = uint32_t(held[rank[id]].size());
    held[rank[id]].push_back(int32_t(id));
  }
  for (uint32_t r = 0; r < world; r++) first[r + 1] = first[r] + local_experts(r);
}

namespace {

// Copies the ids and checks them all, so that a wrong one is found before anything has been sent.
template <class T>
void copy_ids(std::vector<int32_t> &to, const ept_tensor &ids, size_t experts) {
  const auto *from = static_cast<const T *>(ids.data);
  const int64_t tokens = ids.shape[0], top_k = ids.shape[1];
  to.resize(size_t(tokens * top_k));
  for (int64_t t = 0; t < tokens; t++) {
    const T *row = from + t * ids.strides[0];
    for (int64_t k = 0; k < top_k; k++) {
      const T id = row[k * ids.strides[1]];
      if (id < -1 || id >= T(experts))
        fail(EPT_E_INVALID, -1, "topk_ids[%lld][%lld] is %lld; an id is -1 (none) or 0 to %zu", (long long)t,
             (long long)k, (long long)id, experts - 1);
      to[size_t(t * top_k + k)] = int32_t(id);
    }
  }
}

// The ranks of one token that take part, ascending, each once. At most top_k, so insertion is quickest.
uint32_t ranks_of(const Placement &placement, const Members &members, const int32_t *ids, uint32_t top_k,
                  uint32_t ranks[EPT_MOE_MAX_TOP_K]) {
  uint32_t n = 0;
  for (uint32_t k = 0; k < top_k; k++) {
    if (ids[k] < 0) continue;
    const uint32_t rank = placement.rank[size_t(ids[k])];
    if (!members.has(rank)) continue;
    uint32_t at = n;
    while (at > 0 && ranks[at - 1] > rank) at--;
    if (at > 0 && ranks[at - 1] == rank) continue;
    for (uint32_t i = n; i > at; i--) ranks[i] = ranks[i - 1];
    ranks[at] = rank;
    n++;
  }
  return n;
}

}  // namespace

std::shared_ptr<SourceSide> scan(const Placement &placement, std::shared_ptr<const Members> members,
                                 const ept_tensor &ids) {
  const auto world = uint32_t(members->active.size());
  auto source = std::make_shared<SourceSide>();
  source->members = members;
  source->tokens = uint32_t(ids.shape[0]);
  source->top_k = uint32_t(ids.shape[1]);
  if (ids.dtype == EPT_DTYPE_I64)
    copy_ids<int64_t>(source->ids, ids, placement.rank.size());
  else
    copy_ids<int32_t>(source->ids, ids, placement.rank.size());

  std::vector<uint32_t> rows(world, 0);
  source->counts.assign(placement.rank.size(), 0);
  source->ordinals.assign(source->ids.size(), 0);
  source->part_begin.assign(source->tokens + 1, 0);
  source->parts.reserve(size_t(source->tokens) * std::min(world, source->top_k));
  for (uint32_t t = 0; t < source->tokens; t++) {
    const int32_t *of_token = source->ids.data() + size_t(t) * source->top_k;
    for (uint32_t k = 0; k < source->top_k; k++)
      if (of_token[k] >= 0) {
        const size_t id = size_t(of_token[k]);
        if (!members->has(placement.rank[id])) continue;
        uint32_t &count = source->counts[placement.first[placement.rank[id]] + placement.local[id]];
        source->ordinals[size_t(t) * source->top_k + k] = count++;
      }
    uint32_t ranks[EPT_MOE_MAX_TOP_K];
    const uint32_t n = ranks_of(placement, *members, of_token, source->top_k, ranks);
    for (uint32_t i = 0; i < n; i++) source->parts.push_back({ranks[i], rows[ranks[i]]++});
    source->part_begin[t + 1] = uint32_t(source->parts.size());
  }

  source->begin.assign(world + 1, 0);
  for (uint32_t r = 0; r < world; r++) source->begin[r + 1] = source->begin[r] + rows[r];
  source->sent.resize(source->begin[world]);
  for (uint32_t t = 0; t < source->tokens; t++)
    for (uint32_t i = source->part_begin[t]; i < source->part_begin[t + 1]; i++)
      source->sent[source->begin[source->parts[i].rank] + source->parts[i].row] = t;
  return source;
}

void place_combine(SourceSide &source, const Shape &shape, uint64_t slot_bytes) {
  source.combine.resize(shape.world);
  uint64_t at = 0;
  for (uint32_t r = 0; r < shape.world; r++) {
    const uint64_t bytes = shape.combine_header() + source.rows(r) * shape.combine_row;
    source.combine[r] = {at, bytes};
    at += align_up(bytes, kAlign);
  }
  source.shares = at > slot_bytes;
  if (!source.shares) return;
  for (uint32_t r = 0; r < shape.world; r++) source.combine[r] = share(slot_bytes, shape.world, r);
}

}  // namespace ept::moe

void ept_routing_retain(ept_routing *routing) { routing->references.fetch_add(1, std::memory_order_relaxed); }

void ept_routing_release(ept_routing *routing) {
  if (routing && routing->references.fetch_sub(1, std::memory_order_acq_rel) == 1) delete routing;
}
