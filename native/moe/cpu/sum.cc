// SPDX-License-Identifier: Apache-2.0
//
// sum.cc: the source's end of combine: for each token the ranks' rows, in rank order.
#include <string.h>

#include "moe/cpu/kernels.h"
#include "moe/cpu/rows.h"

namespace ept::moe {

SumRows::SumRows(const Object &object, Pool &pool, const SourceSide &source, const ept_tensor &y,
                 const ept_tensor *row_weights)
    : object_(object),
      pool_(pool),
      source_(source),
      y_(rows_of(y, 1)),
      format_(y.dtype),
      stretches_(size_t(object.shape.world) * 2) {
  if (row_weights) row_weights_ = rows_of(*row_weights, 1);
}

void SumRows::show(uint32_t rank, uint64_t first, const char *rows, uint64_t row_bytes, bool row_weights, bool second) {
  Stretch *both = &stretches_[size_t(rank) * 2];
  both[second ? 1 : 0] = {first, rows, row_bytes, row_weights};
  if (!second) both[1] = Stretch();
}

void SumRows::sum(uint64_t begin, uint64_t end) {
  const size_t parts = source_.part_begin[end] - source_.part_begin[begin];
  const size_t bytes = parts * object_.returned() + (end - begin) * format_bytes(format_, object_.config.hidden);
  pool_.run(end - begin, 8, object_.threads, bytes, [&](size_t from, size_t to) {
    for (size_t t = from; t < to; t++) token(begin + t);
  });
}

void SumRows::token(uint64_t token) const {
  const uint32_t top_k = object_.config.top_k;
  const void *rows[EPT_MOE_MAX_TOP_K];
  float beside[EPT_MOE_MAX_TOP_K] = {};
  size_t n = 0;
  for (uint32_t i = source_.part_begin[token]; i < source_.part_begin[token + 1]; i++) {
    const Part part = source_.parts[i];
    const Stretch &from = stretch(part.rank, part.row);
    const char *row = from.rows + (part.row - from.first) * from.row_bytes;
    rows[n++] = row;
    if (!from.row_weights || !row_weights_) continue;
    const auto *values = reinterpret_cast<const float *>(row + ept_combine_row_bytes(object_.returned(), top_k, 0));
    for (uint32_t k = 0; k < top_k; k++) beside[k] = beside[k] + values[k];
  }
  kernels().sum(y_.at(token), format_, rows, nullptr, n, object_.config.combine_dtype, object_.config.hidden);
  if (!row_weights_) return;
  char *to = row_weights_.at(token);
  for (uint32_t k = 0; k < top_k; k++, to += row_weights_.column) memcpy(to, &beside[k], 4);
}

}  // namespace ept::moe
