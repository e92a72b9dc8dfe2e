// SPDX-License-Identifier: Apache-2.0
//
// object.cc: the tables of one AllToAll on its GPU, and what its kernels count.
#include <atomic>

#include "moe/cuda/lanes.h"
#include "moe/cuda/shared.h"

namespace ept::moe::cuda {

GpuObject::GpuObject(std::shared_ptr<Lanes> of, const ept_moe_config &config, uint32_t number, const std::string &image)
    : lanes(std::move(of)), object(config), carried(config.lanes), begun(config.lanes) {
  lanes->fit(object);
  // Kernels of a shape are linked with no device library.
  if (!image.empty() && !lanes->opened().heap) {
    kernels = lanes->gpu().load(image.data(), image.size());
    lanes->refuse_wider(*kernels);
  }
  object.number = number;
  std::vector<uint32_t> tables;
  for (uint32_t e = 0; e < config.num_experts; e++)
    tables.push_back(object.placement.rank[e] << 16 | object.placement.local[e]);
  tables.insert(tables.end(), object.placement.first.begin(), object.placement.first.end());
  memory_ = static_cast<uint32_t *>(lanes->gpu().allocate(4 * tables.size()));
  lanes->gpu().copy_in(memory_, tables.data(), 4 * tables.size());
  table.number = number;
  table.experts = config.num_experts;
  table.local = object.local();
  table.top_k = config.top_k;
  table.hidden = config.hidden;
  table.max_tokens = config.max_tokens;
  table.alignment = object.config.alignment;
  table.returned_format = uint32_t(object.config.combine_dtype);
  table.payload = object.payload();
  table.returned = object.returned();
  table.where = memory_;
  table.first = memory_ + config.num_experts;
  sent_.resize(uint64_t(config.lanes) * EPT_PHASES * kTallies);
  table.sent = static_cast<uint64_t *>(lanes->gpu().allocate(sent_.size() * sizeof(uint64_t)));
  table.mirrored = static_cast<uint64_t *>(lanes->gpu().allocate(config.lanes * sizeof(uint64_t)));
  pages_ = static_cast<char *>(lanes->gpu().allocate_pinned(config.lanes * CountsPage::bytes(table.local)));
  table.shape = object.shape;
  if (!streams()) return;
  Carve carve(nullptr);
  cuda::chunk_state(carve, config.world, config.num_experts, object.local());
  chunk_bytes_ = align_up(carve.bytes(), kAlign);
  const uint64_t all = chunk_bytes_ * config.lanes * EPT_PHASES;
  chunks_ = static_cast<char *>(lanes->gpu().allocate(all));
  lanes->keep_clear(chunks_, all);
}

bool GpuObject::counts(uint32_t lane, ept_gpu_counts *to, int32_t *per_expert) const {
  CountsPage &at = *page(lane);
  const auto plain = [](auto &word) { return std::atomic_ref(word).load(std::memory_order_relaxed); };
  for (;;) {  // again where kernels wrote meanwhile: they take longer for two dispatches than this for a copy
    to->epoch = std::atomic_ref(at.epoch).load(std::memory_order_acquire);
    if (to->epoch == 0) return false;
    Counts &from = *at.slot(to->epoch, table.local);
    to->ticket = plain(from.ticket);
    to->rows = plain(from.rows);
    to->fault = -plain(from.fault);
    auto *counts = reinterpret_cast<int32_t *>(&from + 1);
    for (uint32_t e = 0; e < table.local; e++) per_expert[e] = plain(counts[e]);
    std::atomic_thread_fence(std::memory_order_acquire);
    if (plain(at.epoch) == to->epoch) return true;
  }
}

void GpuObject::stats(ept_moe_stats *stats) {
  const std::lock_guard<std::mutex> lock(reading_);
  lanes->gpu().copy_out(sent_.data(), table.sent, sent_.size() * sizeof(uint64_t));
  uint64_t grants = 0;
  for (uint32_t p = 0; p < EPT_PHASES; p++) {
    uint64_t sums[kTallies] = {};
    for (uint32_t i = 0; i < object.config.lanes * kTallies; i++)
      sums[i % kTallies] += sent_[(uint64_t(i / kTallies) * EPT_PHASES + p) * kTallies + i % kTallies];
    stats->generations[p] = sums[kGenerations];
    stats->messages[p] = sums[kMessages];
    stats->bytes[p] = sums[kBytes];
    stats->rows[p] = sums[kRowsSent];
    grants += sums[kGrants];
  }
  stats->grants = grants;
  stats->acks = stats->ack_waits = 0;  // headers tell
}

GpuObject::~GpuObject() {
  if (pages_) lanes->gpu().release_pinned(pages_);
  if (table.mirrored) lanes->gpu().release(table.mirrored);
  if (chunks_) {
    lanes->keep_no_more(chunks_);
    lanes->gpu().release(chunks_);
  }
  if (table.sent) lanes->gpu().release(table.sent);
  if (memory_) lanes->gpu().release(memory_);
}

}  // namespace ept::moe::cuda
