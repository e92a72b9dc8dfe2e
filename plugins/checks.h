// SPDX-License-Identifier: Apache-2.0
//
// checks.h: what every network with registered memory asks of a caller alike, and says alike.
#pragma once

#include "plugin.h"

namespace plugin {

inline int32_t check_open(const char *network, const ept_open_params &params) {
  if (params.world == 0 || params.rank >= params.world)
    return fail(EPT_E_INVALID, "open", params.rank, 0, "%s: rank %u is outside the world of %u", network, params.rank,
                params.world);
  if (params.secret == nullptr || params.secret_length == 0 || params.job == nullptr)
    return fail(EPT_E_INVALID, "open", params.rank, 0,
                "%s: a job's name and secret are needed to tell peers from strangers", network);
  return EPT_OK;
}

inline int32_t check_rank(const char *network, const char *operation, uint32_t rank, uint32_t world) {
  if (rank < world) return EPT_OK;
  return fail(EPT_E_INVALID, operation, rank, 0, "%s: rank %u is outside the world of %u", network, rank, world);
}

// The address is that of this life of this rank, which wasn't fenced. `fenced`: a rank's latest epoch that was.
template <class Address, class Epochs>
int32_t check_life(const char *network, uint32_t rank, uint32_t epoch, const Address &address, const Epochs &fenced) {
  if (address.rank != rank || address.epoch != epoch)
    return fail(EPT_E_INVALID, "peer_open", rank, 0,
                "%s: asked to open rank %u of epoch %u with the address of rank %u of epoch %u", network, rank, epoch,
                address.rank, address.epoch);
  const auto fence = fenced.find(rank);
  if (fence != fenced.end() && epoch <= fence->second)
    return fail(EPT_E_PEER_LOST, "peer_open", rank, 0,
                "%s: epoch %u of rank %u was fenced; it may come back with a higher one", network, epoch, rank);
  return EPT_OK;
}

inline int32_t check_memory(const char *network, const ept_memory &memory) {
  const auto start = reinterpret_cast<uint64_t>(memory.address);
  if (memory.address == nullptr || memory.length == 0 || start + memory.length < start)
    return fail(EPT_E_INVALID, "mem_register", -1, 0, "%s: %llu bytes at %p are no memory", network,
                static_cast<unsigned long long>(memory.length), memory.address);
  return EPT_OK;
}

inline int32_t check_export(const char *network, const ept_memory &memory, uint32_t rank, uint32_t world,
                            uint64_t offset, uint64_t length) {
  if ((memory.access & EPT_ACCESS_REMOTE_WRITE) == 0)
    return fail(EPT_E_ACCESS, "region_export", rank, 0,
                "%s: this memory was registered without the right to be written", network);
  if (rank >= world || offset > memory.length || length > memory.length - offset)
    return fail(EPT_E_INVALID, "region_export", rank, 0, "%s: %llu bytes at offset %llu of %llu for rank %u of %u",
                network, static_cast<unsigned long long>(length), static_cast<unsigned long long>(offset),
                static_cast<unsigned long long>(memory.length), rank, world);
  return EPT_OK;
}

// The head of a region's blob: magic, version, exporter.
template <class Blob>
int32_t check_import(const char *network, const Blob &head, uint32_t magic, uint32_t version, uint32_t rank,
                     size_t length) {
  if (head.magic != magic)
    return fail(EPT_E_INVALID, "region_import", rank, 0, "%s: %zu bytes that are no region of this backend", network,
                length);
  if (head.version != version)
    return fail(EPT_E_VERSION, "region_import", rank, 0,
                "%s: the region of rank %u is of version %u, this plugin reads %u", network, rank, head.version,
                version);
  if (head.exporter != rank)
    return fail(EPT_E_INVALID, "region_import", rank, 0, "%s: this is a region of rank %u, not of rank %u", network,
                head.exporter, rank);
  return EPT_OK;
}

// Operations may be posted to `peer`, nullptr where it is not open. `closed`: a rank's latest epoch that was closed.
template <class Peer, class Epochs>
int32_t check_peer(const char *network, const Peer *peer, uint32_t rank, const Epochs &closed) {
  if (peer == nullptr)
    return fail(closed.count(rank) != 0 ? EPT_E_CLOSED : EPT_E_INVALID, "post", rank, 0, "%s: rank %u is not open",
                network, rank);
  if (peer->state == Peer::State::kEnded)
    return fail(peer->code, "post", rank, peer->number, "%s: %s", network, peer->text.c_str());
  if (peer->state != Peer::State::kUp)
    return fail(EPT_E_INVALID, "post", rank, 0, "%s: rank %u is not connected yet", network, rank);
  return EPT_OK;
}

struct OperationLimits {
  size_t rails;
  uint32_t max_send;
  uint64_t max_message;
};

// An operation to a peer that is up, in its `epoch`. Mem and Region are ept_mem and ept_region as the plugin defines
// them: named here, so that they need be whole only where this is called.
template <class Mem, class Region, class Instance>
int32_t check_operation(const Instance *instance, const ept_op &op, uint32_t epoch, const OperationLimits &limits) {
  const char *network = Instance::kNetwork;
  if (op.rail >= limits.rails)
    return fail(EPT_E_INVALID, "post", op.peer, 0, "%s: rail %u, there are %zu", network, op.rail, limits.rails);
  if (op.flags != 0) return fail(EPT_E_INVALID, "post", op.peer, 0, "%s: flags are %u, must be 0", network, op.flags);
  if (op.kind == EPT_OP_SEND) {
    if (op.length > limits.max_send || (op.length > 0 && op.source == nullptr))
      return fail(EPT_E_INVALID, "post", op.peer, 0, "%s: a SEND of %llu bytes from %p; max_send is %u", network,
                  static_cast<unsigned long long>(op.length), op.source, limits.max_send);
    return EPT_OK;
  }
  if (op.kind != EPT_OP_WRITE && op.kind != EPT_OP_SIGNAL)
    return fail(op.kind == EPT_OP_READ ? EPT_E_UNSUPPORTED : EPT_E_INVALID, "post", op.peer, 0,
                "%s: operations of kind %d are not done here", network, op.kind);
  const Region *region = op.region;
  if (region == nullptr || region->owner != instance || region->rank != op.peer)
    return fail(EPT_E_INVALID, "post", op.peer, 0, "%s: the region of an operation to rank %u is %s", network, op.peer,
                region == nullptr ? "missing" : "that of another rank");
  if (region->epoch != epoch)
    return fail(EPT_E_CLOSED, "post", op.peer, 0, "%s: the region is of epoch %u of rank %u, which is in epoch %u now",
                network, region->epoch, op.peer, epoch);
  if (op.kind != EPT_OP_WRITE || op.length == 0) return EPT_OK;
  const Mem *mem = op.source_mem;
  const auto from = reinterpret_cast<uint64_t>(op.source);
  const uint64_t start = mem == nullptr ? 0 : reinterpret_cast<uint64_t>(mem->memory.address);
  if (op.length > limits.max_message)
    return fail(EPT_E_INVALID, "post", op.peer, 0, "%s: a WRITE of %llu bytes is past max_message, %llu", network,
                static_cast<unsigned long long>(op.length), static_cast<unsigned long long>(limits.max_message));
  if (mem == nullptr || mem->owner != instance || from < start || from - start > mem->memory.length ||
      op.length > mem->memory.length - (from - start))
    return fail(EPT_E_INVALID, "post", op.peer, 0, "%s: the source of a WRITE of %llu bytes is not inside source_mem",
                network, static_cast<unsigned long long>(op.length));
  return EPT_OK;
}

}  // namespace plugin
