// SPDX-License-Identifier: Apache-2.0
//
// pack.cc: rows on their way out, of dispatch and of combine.
#include <string.h>

#include "moe/cpu/kernels.h"
#include "moe/cpu/rows.h"

namespace ept::moe {

namespace {
constexpr size_t kGrain = 8;  // rows that a thread takes at once: some 100 KB
}  // namespace

void PackRows::operator()(uint32_t peer, uint64_t first, uint64_t rows, char *to) {
  const uint64_t row_bytes = ept_row_bytes(payload, scale_bytes, source->top_k);
  const uint32_t *tokens = source->sent.data() + source->begin[peer] + first;
  pool->run(rows, kGrain, object->threads, rows * row_bytes, [&](size_t begin, size_t end) {
    for (size_t j = begin; j < end; j++) row(peer, tokens[j], to + j * row_bytes);
  });
}

void PackRows::row(uint32_t peer, uint32_t token, char *to) {
  const uint32_t top_k = source->top_k;
  char *scales_to = to + ept_row_scales(payload);
  char *tail = to + ept_row_token(payload, scale_bytes);
  const char *before = keeps ? packed[token] : nullptr;
  if (before) {
    memcpy(to, before, size_t(tail - to));
  } else {
    if (quantise)
      kernels().quantise(reinterpret_cast<uint8_t *>(to), scales_to, x.at(token), x_format, object->config.hidden,
                         object->config.scale_format == EPT_SCALES_UE8M0, object->config.scale_epsilon);
    else
      memcpy(to, x.at(token), payload);
    if (scales) {
      const char *from = scales.at(token);
      for (uint64_t at = 0; at < scale_bytes; at += scale_size, from += scales.column)
        memcpy(scales_to + at, from, scale_size);
    }
    memset(scales_to + scale_bytes, 0, size_t(tail - scales_to) - scale_bytes);
    if (keeps) packed[token] = to;
  }

  const uint32_t head[2] = {token, 0};
  memcpy(tail, head, sizeof head);
  const Placement &placement = object->placement;
  const int32_t *ids = source->ids.data() + size_t(token) * top_k;
  const uint32_t *ordinals = source->ordinals.data() + size_t(token) * top_k;
  const float *weights = source->weights.empty() ? nullptr : source->weights.data() + size_t(token) * top_k;
  auto *experts_to = reinterpret_cast<int32_t *>(tail + sizeof head);
  auto *ordinals_to = reinterpret_cast<uint32_t *>(experts_to + top_k);
  auto *weights_to = reinterpret_cast<float *>(ordinals_to + top_k);
  for (uint32_t k = 0; k < top_k; k++) {
    const bool here = ids[k] >= 0 && placement.rank[size_t(ids[k])] == peer;
    experts_to[k] = here ? int32_t(placement.local[size_t(ids[k])]) : -1;
    ordinals_to[k] = here ? ordinals[k] : 0;
    weights_to[k] = here && weights ? weights[k] : 0.0f;
  }
  char *end = to + ept_row_bytes(payload, scale_bytes, top_k);
  char *filled = reinterpret_cast<char *>(weights_to + top_k);
  memset(filled, 0, size_t(end - filled));
}

void PackSums::operator()(uint32_t peer, uint64_t first, uint64_t rows, char *to) const {
  const uint64_t begin = routing->begin[peer] + first;
  pool->run(rows, kGrain, object->threads, rows * row_bytes * 3, [&](size_t from, size_t end) {
    for (size_t j = from; j < end; j++) row(begin + j, to + j * row_bytes);
  });
}

void PackSums::row(uint64_t row, char *to) const {
  const uint32_t top_k = object->config.top_k, hidden = object->config.hidden;
  const int32_t format_to = object->config.combine_dtype;
  if (routing->layout == EPT_LAYOUT_ROWS || routing->layout == EPT_LAYOUT_BY_RANK) {
    const char *from = out.at(uint64_t(routing->place[row]));
    if (format == format_to)
      memcpy(to, from, format_bytes(format, hidden));
    else
      kernels().convert(to, format_to, from, format, hidden);
  } else {
    const void *rows[EPT_MOE_MAX_TOP_K];
    float used[EPT_MOE_MAX_TOP_K];
    size_t n = 0;
    for (uint32_t k = 0; k < top_k; k++) {
      const int64_t place = routing->place[row * top_k + k];
      if (place < 0) continue;
      rows[n] = out.at(uint64_t(place));
      used[n++] = weights ? weights[row * top_k + k] : 1.0f;
    }
    kernels().sum(to, format_to, rows, weights ? used : nullptr, n, format, hidden);
  }
  if (!row_weights) return;
  char *beside = to + ept_combine_row_bytes(object->returned(), top_k, 0);
  const char *from = row_weights.at(uint64_t(routing->place[row]));
  for (uint32_t k = 0; k < top_k; k++, from += row_weights.column) memcpy(beside + 4 * k, from, 4);
  memset(beside + 4 * top_k, 0, size_t(ept_align(4ull * top_k, 16)) - 4ull * top_k);
}

}  // namespace ept::moe
