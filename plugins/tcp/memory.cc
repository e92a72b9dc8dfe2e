// SPDX-License-Identifier: Apache-2.0
#include "memory.h"

#include <cstring>

namespace tcp {

int32_t Exports::add(const ept_host &host, const Export &wanted, uint64_t *name, uint32_t *slot, const uint8_t **key) {
  uint32_t index;
  if (!free_.empty()) {
    index = free_.back();
    free_.pop_back();
  } else if (slots_.size() < limit_) {
    index = static_cast<uint32_t>(slots_.size());
    slots_.emplace_back();
  } else {
    return fail(EPT_E_LIMIT, "region_export", wanted.rank, 0,
                "tcp: %u regions are exported, which is the limit (EPT_TCP_MAX_REGIONS); revoke some", limit_);
  }
  uint32_t generation = slots_[index].generation + 1;
  Export &entry = slots_[index];
  entry = wanted;
  entry.live = true;
  entry.generation = generation;
  host.random(host.context, entry.key, sizeof entry.key);
  *name = static_cast<uint64_t>(generation) << 32 | index;
  *slot = index;
  *key = entry.key;
  return EPT_OK;
}

Export *Exports::find(uint64_t name, const ept_mem *mem, uint32_t rank) {
  uint32_t index = static_cast<uint32_t>(name);
  if (index >= slots_.size()) return nullptr;
  Export &entry = slots_[index];
  bool same = entry.live && entry.generation == name >> 32 && entry.mem == mem && entry.rank == rank;
  return same ? &entry : nullptr;
}

void Exports::remove(Export *exported) {
  uint32_t generation = exported->generation;
  *exported = Export{};
  exported->generation = generation;
  free_.push_back(static_cast<uint32_t>(exported - slots_.data()));
}

void Exports::remove_all_of(const ept_mem *mem) {
  for (Export &entry : slots_)
    if (entry.live && entry.mem == mem) remove(&entry);
}

void Exports::remove_all_of(uint32_t rank, uint32_t epoch) {
  for (Export &entry : slots_)
    if (entry.live && entry.rank == rank && !entry.any_epoch && entry.epoch <= epoch) remove(&entry);
}

void Exports::bind(uint32_t rank, uint32_t epoch) {
  for (Export &entry : slots_) {
    if (!entry.live || entry.rank != rank || !entry.any_epoch) continue;
    entry.any_epoch = false;
    entry.epoch = epoch;
  }
}

}  // namespace tcp
