// SPDX-License-Identifier: Apache-2.0
//
// routing.h: who sends which token where, from both ends. Kept apart from any buffer, so that it outlives the step.
//
//   SourceSide   a rank's own tokens: for each rank the tokens that go there, in order; for each token its (rank, row)
//   ept_routing  SourceSide, and each row that came: source, token, experts, weights, and its place in the output
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "eptransport/eptransport.h"
#include "moe/layout.h"
#include "moe/members.h"

namespace ept::moe {

// Where each expert lives. The same on every rank.
struct Placement {
  std::vector<uint32_t> rank, local;       // [experts]
  std::vector<std::vector<int32_t>> held;  // [world] ids in order
  std::vector<uint32_t> first;             // [world + 1] where a rank's counts start in a table of all experts

  Placement(uint32_t world, uint32_t experts, const int32_t *given);
  uint32_t local_experts(uint32_t of) const { return uint32_t(held[of].size()); }
};

struct Object;

struct Part {
  uint32_t rank, row;
};

struct SourceSide {
  uint32_t tokens = 0, top_k = 0;
  std::shared_ptr<const Members> members;  // who took part when it was scanned: none else has a row
  std::vector<int32_t> ids;                // [tokens, top_k] as given, those of ranks that are masked too
  std::vector<uint32_t> ordinals;          // [tokens, top_k] as rows say them (wire.h)
  std::vector<float> weights;              // [tokens, top_k], or empty
  std::vector<uint64_t> begin;             // [world + 1] into `sent`
  std::vector<uint32_t> sent;              // tokens that go to a rank, ascending
  std::vector<uint32_t> part_begin;        // [tokens + 1] into `parts`
  std::vector<Part> parts;                 // of a token, by rank ascending
  std::vector<uint32_t> counts;            // [experts], placed as Placement.first says
  std::vector<Region> combine;             // [world] where in this rank's combine slot each rank's sums go
  bool shares = false;                     // `combine` are even shares, since packed they don't fit

  uint64_t rows(uint32_t rank) const { return begin[rank + 1] - begin[rank]; }
};

// Reads the ids (I32 or I64; strides as they are) and sorts out who gets what. Throws INVALID for an id out of range,
// before anything is changed. A rank that is not a member gets nothing: its experts are left out.
std::shared_ptr<SourceSide> scan(const Placement &placement, std::shared_ptr<const Members> members,
                                 const ept_tensor &ids);
// Places the combine messages in a slot of `slot_bytes`.
void place_combine(SourceSide &source, const Shape &shape, uint64_t slot_bytes);

}  // namespace ept::moe

struct ept_routing {
  std::atomic<uint32_t> references{1};
  uint64_t object = 0;  // number of the AllToAll
  std::shared_ptr<const ept::moe::SourceSide> source;
  std::shared_ptr<const ept::moe::Object> made_by;

  // Rows that came, by source rank and then row.
  std::vector<uint64_t> begin;            // [world + 1]
  std::vector<uint32_t> token;            // [rows]
  std::vector<int32_t> experts;           // [rows, top_k] local, -1: not here
  std::vector<float> weights;             // [rows, top_k]; empty: all 1
  std::vector<int64_t> place;             // [rows, top_k] row in the output; -1: none. ROWS, BY_RANK: [rows]
  std::vector<ept::moe::Region> combine;  // [world] where in each source's combine slot our sums go

  int32_t layout = EPT_LAYOUT_ROWS;
  uint64_t leading = 0;  // rows of an expert (MASKED), of a rank (BY_RANK), of the whole output
  uint64_t needed = 0;   // ROWS, CONTIGUOUS: rows that expert_out must have at least
};
