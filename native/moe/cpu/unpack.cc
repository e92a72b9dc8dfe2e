// SPDX-License-Identifier: Apache-2.0
//
// unpack.cc: rows that came, into a layout. Two passes over the rows of each batch: `index` reads what each row says
// and gives it its places, in order, so that they are the same on every run; `copy` moves the bytes, on many threads.
#include <string.h>

#include <algorithm>
#include <numeric>

#include "moe/cpu/kernels.h"
#include "moe/cpu/rows.h"
#include "moe/fail.h"

namespace ept::moe {

namespace {
constexpr uint64_t kSlice = 8;  // rows that a thread copies at once
// From so many bytes of output on they are written past the caches: more than a core has to itself (0.5 to 2 MiB), and
// of the cache that cores share, whose size a virtual machine doesn't tell, more than what is left beside the rows
// that came. Figures: docs/decisions.md.
constexpr uint64_t kStreamFrom = uint64_t(4) << 20;

Rows if_present(const ept_tensor &tensor, int leading) { return tensor.data ? rows_of(tensor, leading) : Rows(); }
}  // namespace

UnpackRows::UnpackRows(const Object &object, Pool &pool, const ept_dispatch_outputs &outputs, ept_routing &routing,
                       const uint32_t *counts, uint64_t scale_bytes, bool has_weights)
    : object_(object),
      pool_(pool),
      routing_(routing),
      counts_(counts),
      payload_(object.payload()),
      scale_bytes_(scale_bytes),
      row_bytes_(ept_row_bytes(payload_, scale_bytes, object.config.top_k)),
      top_k_(object.config.top_k),
      local_(object.local()),
      has_weights_(has_weights),
      per_expert_(routing.layout == EPT_LAYOUT_CONTIGUOUS || routing.layout == EPT_LAYOUT_MASKED) {
  const uint32_t world = object.shape.world;
  const int dims = routing.layout == EPT_LAYOUT_BY_RANK || routing.layout == EPT_LAYOUT_MASKED ? 2 : 1;
  x_ = if_present(outputs.x, dims);
  scales_ = if_present(outputs.scales, dims);
  scale_size_ = element_bytes(outputs.scales.dtype);
  ids_ = if_present(outputs.topk_ids, dims);
  weights_ = if_present(outputs.topk_weights, dims);
  source_ = if_present(outputs.source, dims);
  counts_out_ = static_cast<int32_t *>(outputs.counts.data);
  counts_stride_ = outputs.counts.strides[0];
  offsets_out_ = static_cast<int32_t *>(outputs.offsets.data);
  offsets_stride_ = outputs.offsets.strides[0];

  // Groups by expert; in a group by source rank, then row.
  starts_.assign(local_ + 1, 0);
  cursor_.resize(size_t(world) * local_);
  limit_.resize(size_t(world) * local_);
  for (uint32_t e = 0; e < local_; e++) {
    uint64_t at = routing.layout == EPT_LAYOUT_MASKED ? e * routing.leading : starts_[e];
    const uint64_t begin = at;
    for (uint32_t s = 0; s < world; s++) {
      cursor_[size_t(s) * local_ + e] = at;
      at += counts[size_t(s) * local_ + e];
      limit_[size_t(s) * local_ + e] = at;
    }
    const uint64_t padding = routing.layout == EPT_LAYOUT_CONTIGUOUS ? object.config.alignment : 1;
    starts_[e + 1] = starts_[e] + align_up(at - begin, padding);
  }
  const uint64_t rows =
      per_expert_ ? std::accumulate(counts, counts + size_t(world) * local_, uint64_t(0)) : routing.begin[world];
  streams_ = rows * payload_ >= kStreamFrom;
  total_ = routing.layout == EPT_LAYOUT_MASKED    ? local_ * routing.leading
           : routing.layout == EPT_LAYOUT_BY_RANK ? world * routing.leading
                                                  : routing.leading;
}

void UnpackRows::take(const std::vector<Segment> &segments) {
  uint64_t rows = 0;
  for (const Segment &segment : segments) {
    index(segment);
    rows += segment.count;
  }
  std::vector<std::pair<uint32_t, uint64_t>> slices;  // (segment, first row of it)
  slices.reserve(rows / kSlice + segments.size());
  for (uint32_t i = 0; i < segments.size(); i++)
    for (uint64_t at = 0; at < segments[i].count; at += kSlice) slices.emplace_back(i, at);
  const uint64_t copies = per_expert_ ? std::min<uint64_t>(top_k_, 3) : 1;
  pool_.run(slices.size(), 1, object_.threads, rows * row_bytes_ * copies, [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; i++) {
      const Segment &segment = segments[slices[i].first];
      copy(segment, slices[i].second, std::min(slices[i].second + kSlice, segment.count));
    }
  });
}

void UnpackRows::index(const Segment &segment) {
  const uint32_t s = segment.source;
  const uint64_t experts_at = ept_row_experts(payload_, scale_bytes_), token_at = ept_row_token(payload_, scale_bytes_);
  const uint64_t ordinals_at = ept_row_ordinals(payload_, scale_bytes_, top_k_);
  for (uint64_t j = 0; j < segment.count; j++) {
    const char *row = segment.rows + j * row_bytes_;
    const uint64_t at = routing_.begin[s] + segment.first + j;
    memcpy(&routing_.token[at], row + token_at, sizeof(uint32_t));
    int32_t *experts = &routing_.experts[at * top_k_];
    memcpy(experts, row + experts_at, 4ull * top_k_);
    if (has_weights_)
      memcpy(&routing_.weights[at * top_k_], row + ept_row_weights(payload_, scale_bytes_, top_k_), 4ull * top_k_);
    if (routing_.token[at] >= object_.config.max_tokens)
      fail(EPT_E_MISMATCH, int32_t(s), "row %llu from rank %u is for token %u; max_tokens is %u",
           (unsigned long long)(segment.first + j), s, routing_.token[at], object_.config.max_tokens);
    if (!per_expert_) {
      routing_.place[at] =
          int64_t(routing_.layout == EPT_LAYOUT_BY_RANK ? s * routing_.leading + segment.first + j : at);
    }
    for (uint32_t k = 0; k < top_k_; k++) {
      const int32_t e = experts[k];
      if (e < -1 || e >= int32_t(local_))
        fail(EPT_E_MISMATCH, int32_t(s), "row %llu from rank %u is for local expert %d; this rank holds %u",
             (unsigned long long)(segment.first + j), s, e, local_);
      if (per_expert_) routing_.place[at * top_k_ + k] = -1;
      if (e < 0) continue;
      const size_t group = size_t(s) * local_ + uint32_t(e);
      uint64_t &cursor = cursor_[group];
      if (cursor >= limit_[group])
        fail(EPT_E_MISMATCH, int32_t(s), "rank %u sent more rows for local expert %d than the %u of its header", s, e,
             counts_[group]);
      uint32_t ordinal;
      memcpy(&ordinal, row + ordinals_at + 4ull * k, sizeof ordinal);
      const uint64_t before = cursor - (limit_[group] - counts_[group]);
      if (ordinal != before)
        fail(EPT_E_MISMATCH, int32_t(s),
             "row %llu from rank %u says that %u rows for local expert %d stand before it; %llu do",
             (unsigned long long)(segment.first + j), s, ordinal, e, (unsigned long long)before);
      if (per_expert_) routing_.place[at * top_k_ + k] = int64_t(cursor);
      cursor++;
    }
  }
}

void UnpackRows::copy(const Segment &segment, uint64_t begin, uint64_t end) const {
  for (uint64_t j = begin; j < end; j++) {
    const char *row = segment.rows + j * row_bytes_;
    const uint64_t at = routing_.begin[segment.source] + segment.first + j;
    const int32_t who[2] = {int32_t(segment.source), int32_t(routing_.token[at])};
    for (uint32_t k = 0; k < (per_expert_ ? top_k_ : 1); k++) {
      const int64_t signed_place = per_expert_ ? routing_.place[at * top_k_ + k] : routing_.place[at];
      if (signed_place < 0) continue;
      const auto place = uint64_t(signed_place);
      if (x_) copy_payload(x_.at(place), row);
      if (scales_) copy_scales(row + ept_row_scales(payload_), place);
      if (source_)
        for (int i = 0; i < 2; i++) memcpy(source_.at(place) + i * source_.column, &who[i], 4);
      if (per_expert_) {
        const float weight = has_weights_ ? routing_.weights[at * top_k_ + k] : 1.0f;
        if (weights_) memcpy(weights_.at(place), &weight, 4);
        continue;
      }
      for (uint32_t i = 0; i < top_k_; i++) {
        const int32_t expert = routing_.experts[at * top_k_ + i];
        const float weight = has_weights_ ? routing_.weights[at * top_k_ + i] : expert < 0 ? 0.0f : 1.0f;
        if (ids_) memcpy(ids_.at(place) + i * ids_.column, &expert, 4);
        if (weights_) memcpy(weights_.at(place) + i * weights_.column, &weight, 4);
      }
    }
  }
}

void UnpackRows::copy_payload(char *to, const char *row) const {
  if (streams_)
    kernels().stream(to, row, payload_);
  else
    memcpy(to, row, payload_);
}

void UnpackRows::copy_scales(const char *from, uint64_t row) const {
  char *to = scales_.at(row);
  if (scales_.column == int64_t(scale_size_)) {
    memcpy(to, from, scale_bytes_);
    return;
  }
  for (uint64_t at = 0; at < scale_bytes_; at += scale_size_, to += scales_.column) memcpy(to, from + at, scale_size_);
}

// Rows [begin, end) of the layout hold no token.
void UnpackRows::blank(uint64_t begin, uint64_t end) const {
  const int32_t none = -1;
  const float nothing = 0.0f;
  for (uint64_t row = begin; row < end; row++) {
    if (source_)
      for (int i = 0; i < 2; i++) memcpy(source_.at(row) + i * source_.column, &none, 4);
    if (weights_)
      for (uint32_t k = 0; k < (per_expert_ ? 1 : top_k_); k++)
        memcpy(weights_.at(row) + k * weights_.column, &nothing, 4);
    if (ids_ && !per_expert_)
      for (uint32_t k = 0; k < top_k_; k++) memcpy(ids_.at(row) + k * ids_.column, &none, 4);
  }
}

void UnpackRows::finish() {
  const uint32_t world = object_.shape.world;
  for (size_t i = 0; i < cursor_.size(); i++)
    if (cursor_[i] != limit_[i])
      fail(EPT_E_MISMATCH, int32_t(i / local_),
           "rank %zu sent %llu rows fewer for local expert %zu than the %u of its "
           "header",
           i / local_, (unsigned long long)(limit_[i] - cursor_[i]), i % local_, counts_[i]);
  std::vector<uint64_t> filled(local_, 0);
  for (uint32_t e = 0; e < local_; e++) {
    for (uint32_t s = 0; s < world; s++) filled[e] += counts_[size_t(s) * local_ + e];
    if (counts_out_) counts_out_[e * counts_stride_] = int32_t(filled[e]);
  }
  for (uint32_t e = 0; e <= local_ && offsets_out_; e++) offsets_out_[e * offsets_stride_] = int32_t(starts_[e]);

  routing_.needed = routing_.begin[world];
  for (uint32_t e = 0; e < local_ && routing_.layout == EPT_LAYOUT_CONTIGUOUS; e++)
    if (filled[e]) routing_.needed = starts_[e] + filled[e];
  switch (routing_.layout) {
    case EPT_LAYOUT_ROWS:
      return blank(routing_.begin[world], total_);
    case EPT_LAYOUT_BY_RANK:
      for (uint32_t s = 0; s < world; s++)
        blank(s * routing_.leading + routing_.begin[s + 1] - routing_.begin[s], (s + 1) * routing_.leading);
      return;
    case EPT_LAYOUT_CONTIGUOUS:
      for (uint32_t e = 0; e < local_; e++) blank(starts_[e] + filled[e], starts_[e + 1]);
      return blank(starts_[local_], total_);
    default:
      for (uint32_t e = 0; e < local_; e++) blank(e * routing_.leading + filled[e], (e + 1) * routing_.leading);
  }
}

}  // namespace ept::moe
