// SPDX-License-Identifier: Apache-2.0
//
// rows.h: the CPU's work on rows: pack, unpack, sum. It knows wire.h's rows and the caller's tensors, and no lane.
#pragma once

#include <memory>
#include <vector>

#include "moe/check.h"
#include "moe/cpu/pool.h"
#include "moe/object.h"

namespace ept::moe {

// ---- dispatch, at the source: x to rows ----
struct PackRows {
  std::shared_ptr<Object> object;
  std::shared_ptr<const SourceSide> source;
  Pool *pool = nullptr;
  Rows x;
  int32_t x_format = EPT_DTYPE_NONE;
  bool quantise = false;
  Rows scales;              // the caller's
  uint64_t scale_size = 0;  //   bytes of an element
  uint64_t payload = 0, scale_bytes = 0;
  bool keeps = false;                // rows stay where they were packed while this lives, so a token is quantised once
  std::vector<const char *> packed;  // [tokens] where it was

  void operator()(uint32_t peer, uint64_t first, uint64_t rows, char *to);

 private:
  void row(uint32_t peer, uint32_t token, char *to);
};

// ---- dispatch, at the receiver: rows to a layout ----
struct Segment {  // rows [first, first + count) of `source`, as they lie in the region
  uint32_t source;
  uint64_t first, count;
  const char *rows;
};

class UnpackRows {
 public:
  // `counts`: [world, local experts]. `routing` has its layout, leading, begin and sizes; the rest is filled here.
  UnpackRows(const Object &object, Pool &pool, const ept_dispatch_outputs &outputs, ept_routing &routing,
             const uint32_t *counts, uint64_t scale_bytes, bool has_weights);
  // Throws MISMATCH where a row is not what the headers promised; nothing was written outside then.
  void take(const std::vector<Segment> &segments);
  // Counts, offsets, and what stands where no row does. Payload there is left as it is.
  void finish();

 private:
  void index(const Segment &segment);
  void copy(const Segment &segment, uint64_t begin, uint64_t end) const;
  void copy_payload(char *to, const char *row) const;
  void copy_scales(const char *from, uint64_t row) const;
  void blank(uint64_t begin, uint64_t end) const;

  const Object &object_;
  Pool &pool_;
  ept_routing &routing_;
  const uint32_t *counts_;
  const uint64_t payload_, scale_bytes_, row_bytes_;
  const uint32_t top_k_, local_;
  const bool has_weights_, per_expert_;
  bool streams_ = false;          // the payload is too much for the caches
  uint64_t total_ = 0;            // rows of the layout, padding included
  std::vector<uint64_t> starts_;  // [local + 1] of each expert's group
  std::vector<uint64_t> cursor_;  // [world, local] the next row of that source and expert
  std::vector<uint64_t> limit_;   // [world, local] where it must end
  Rows x_, scales_, ids_, weights_, source_;
  uint64_t scale_size_ = 0;
  int32_t *counts_out_ = nullptr, *offsets_out_ = nullptr;
  int64_t counts_stride_ = 0, offsets_stride_ = 0;
};

// ---- combine, at the expert's rank: a layout to rows ----
struct PackSums {
  std::shared_ptr<Object> object;
  ept_routing *routing = nullptr;  // held by the exchange
  Pool *pool = nullptr;
  Rows out;  // expert_out
  int32_t format = EPT_DTYPE_NONE;
  const float *weights = nullptr;  // [rows, top_k]; NULL: add only
  std::vector<float> late;         //   where they came late
  Rows row_weights;
  uint64_t row_bytes = 0;

  void operator()(uint32_t peer, uint64_t first, uint64_t rows, char *to) const;

 private:
  void row(uint64_t row, char *to) const;
};

// ---- combine, at the source: rows to y ----
class SumRows {
 public:
  SumRows(const Object &object, Pool &pool, const SourceSide &source, const ept_tensor &y,
          const ept_tensor *row_weights);
  // Where row `first` of a rank's message and those behind it lie; at most two stretches are known at once.
  void show(uint32_t rank, uint64_t first, const char *rows, uint64_t row_bytes, bool row_weights, bool second);
  // Tokens [begin, end), all of whose rows were shown.
  void sum(uint64_t begin, uint64_t end);

 private:
  struct Stretch {
    uint64_t first = 0;
    const char *rows = nullptr;
    uint64_t row_bytes = 0;
    bool row_weights = false;
  };
  const Stretch &stretch(uint32_t rank, uint64_t row) const {
    const Stretch *both = &stretches_[size_t(rank) * 2];
    return both[1].rows && row >= both[1].first ? both[1] : both[0];
  }
  void token(uint64_t token) const;

  const Object &object_;
  Pool &pool_;
  const SourceSide &source_;
  Rows y_, row_weights_;
  const int32_t format_;
  std::vector<Stretch> stretches_;  // [world, 2]
};

}  // namespace ept::moe
