// SPDX-License-Identifier: Apache-2.0
//
// exports.h: to whom memory was exported, where each export is an entry of a map by the name that region_export gave.
// An export belongs to one life of a rank. One that is made before that rank is opened belongs to the first life that
// is.
#pragma once

#include "plugin.h"

namespace plugin {

struct Holder {
  ept_mem *mem = nullptr;
  uint32_t rank = 0, epoch = 0;
  bool any_epoch = false;  // made before the peer was opened: the first epoch that is opened takes it

  bool is(uint32_t of_rank, uint32_t of_epoch) const { return rank == of_rank && (any_epoch || epoch == of_epoch); }
};

// `peer`: nullptr where that rank isn't open.
template <class Peer>
Holder holder_of(ept_mem *mem, uint32_t rank, const Peer *peer) {
  return {mem, rank, peer != nullptr ? peer->epoch : 0, peer == nullptr};
}

// The export of that key; where it isn't one of this memory for this rank, its end and the sentence.
template <class Map>
typename Map::iterator find_export(const char *network, Map *exports, uint64_t key, const ept_mem *mem, uint32_t rank) {
  const auto found = exports->find(static_cast<typename Map::key_type>(key));
  if (found != exports->end() && found->second.mem == mem && found->second.rank == rank) return found;
  fail(EPT_E_INVALID, "region_revoke", rank, 0, "%s: key %llx is none of this memory for rank %u", network,
       static_cast<unsigned long long>(key), rank);
  return exports->end();
}

// A life of `rank` is opened: what was exported to it before is for this one.
template <class Map>
void bind_exports(Map *exports, uint32_t rank, uint32_t epoch) {
  for (auto &entry : *exports) {
    if (entry.second.rank != rank || !entry.second.any_epoch) continue;
    entry.second.any_epoch = false;
    entry.second.epoch = epoch;
  }
}

// Of that epoch and earlier ones.
template <class Map>
void close_exports(Map *exports, uint32_t rank, uint32_t epoch) {
  std::erase_if(*exports, [&](const auto &entry) {
    return entry.second.rank == rank && !entry.second.any_epoch && entry.second.epoch <= epoch;
  });
}

}  // namespace plugin
