// SPDX-License-Identifier: Apache-2.0
//
// memory.cc: registered memory, and the keys under which peers may write into it.
#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>

#include "blob.h"
#include "land.h"
#include "route.h"
#include "table.h"

namespace loopback {

namespace {

struct Blob {
  uint32_t version, rank, slot;
  int32_t role;
  uint64_t length;
  Key key;
};

bool is_gpu(const ept_memory &memory) { return memory.kind == EPT_MEMORY_CUDA || memory.kind == EPT_MEMORY_DMABUF; }

}  // namespace

int32_t mem_register(ept_instance *instance, const ept_memory *memory, ept_mem **mem) {
  return guard("mem_register", [&] {
    const uint32_t kinds = capabilities(instance->settings).memory_kinds;
    if (memory->kind <= 0 || !(static_cast<uint32_t>(memory->kind) & kinds)) {
      return fail(
          EPT_E_UNSUPPORTED, "mem_register", -1,
          "loopback mem_register: memory of kind %d; HOST, PINNED and SHM can be copied to, and GPU memory where "
          "the setting `gpu` says so",
          memory->kind);
    }
    if (!memory->address && memory->length) {
      return fail(EPT_E_INVALID, "mem_register", -1, "loopback mem_register: %llu bytes without an address",
                  static_cast<unsigned long long>(memory->length));
    }
    if (is_gpu(*memory)) {
      if (const int32_t code = keep_gpu(instance->host, *memory); code != EPT_OK) return code;
    }
    *mem = new ept_mem{instance, *memory, {}};
    return static_cast<int32_t>(EPT_OK);
  });
}

int32_t region_export(ept_mem *mem, uint32_t rank, uint64_t offset, uint64_t length, void *bytes, size_t *bytes_length,
                      uint64_t *name) {
  return guard("region_export", [&] {
    ept_instance *const instance = mem->instance;
    const bool self = rank == instance->rank;
    if (const int32_t code = self ? EPT_OK : known(instance, rank, "region_export"); code != EPT_OK) return code;
    const ept_memory &memory = mem->memory;
    if (!(memory.access & EPT_ACCESS_REMOTE_WRITE)) {
      return fail(EPT_E_ACCESS, "region_export", rank,
                  "loopback region_export: the memory was registered with access %u, without REMOTE_WRITE",
                  memory.access);
    }
    if (offset > memory.length || length > memory.length - offset) {
      return fail(EPT_E_INVALID, "region_export", rank, "loopback region_export: [%llu, +%llu) of %llu bytes",
                  static_cast<unsigned long long>(offset), static_cast<unsigned long long>(length),
                  static_cast<unsigned long long>(memory.length));
    }
    Blob blob = {kBlobVersion, instance->rank, 0, memory.role, length, {}};
    instance->host->random(instance->host->context, &blob.key, sizeof blob.key);
    mem->keys.reserve(mem->keys.size() + 1);

    Port &own = *instance->port;
    std::lock_guard hold(own.lock);
    if (own.unused.empty()) {
      if (own.exports.size() >= instance->settings.max_regions) {
        return fail(EPT_E_LIMIT, "region_export", rank, "loopback region_export: max_regions is %zu, all are in use",
                    own.exports.size());
      }
      own.unused.reserve(own.exports.size() + 1);  // so that a revoke needs no memory
      own.exports.emplace_back();
      own.unused.push_back(static_cast<uint32_t>(own.exports.size() - 1));
    }
    blob.slot = own.unused.back();
    if (const int32_t code = write_blob(blob, "region_export", bytes, bytes_length); code != EPT_OK) return code;
    own.unused.pop_back();
    Export &entry = own.exports[blob.slot];
    entry.base = static_cast<uint8_t *>(memory.address) + offset;
    entry.length = length;
    entry.key = blob.key;
    entry.rank = rank;
    entry.epoch = self ? instance->epoch : instance->peers[rank].epoch;
    entry.valid = true;
    *name = uint64_t{++entry.generation} << 32 | blob.slot;
    mem->keys.push_back(*name);
    return static_cast<int32_t>(EPT_OK);
  });
}

namespace {

int32_t revoke(ept_mem *mem, uint32_t rank, uint64_t name) {
  return guard("region_revoke", [&] {
    Port &own = *mem->instance->port;
    const auto slot = static_cast<uint32_t>(name);
    const auto key = std::find(mem->keys.begin(), mem->keys.end(), name);
    std::unique_lock hold(own.lock);
    if (key == mem->keys.end() || own.exports[slot].rank != rank) {
      return fail(EPT_E_INVALID, "region_revoke", rank,
                  "loopback region_revoke: rank %u has no key %llx of this memory", rank,
                  static_cast<unsigned long long>(name));
    }
    own.exports[slot].valid = false;
    own.exports[slot].key = {};
    drain(own, hold, slot);
    std::erase_if(own.parcels, [&](const std::shared_ptr<Parcel> &parcel) {
      if (parcel->slot != slot) return false;
      if (parcel->link->state == LinkState::kUp) move(parcel->destination, parcel->bytes.get(), parcel->length);
      return parcel->landed = true;
    });
    own.unused.push_back(slot);
    mem->keys.erase(key);
    return static_cast<int32_t>(EPT_OK);
  });
}

}  // namespace

int32_t region_revoke(ept_mem *mem, uint32_t rank, uint64_t name) {
  if (mem->instance->settings.revocable) return revoke(mem, rank, name);
  return fail(EPT_E_UNSUPPORTED, "region_revoke", rank, "loopback region_revoke: the setting `revocable` is 0");
}

int32_t mem_deregister(ept_mem *mem) {
  return guard("mem_deregister", [&] {
    ept_instance *const instance = mem->instance;
    if (const size_t held = instance->worker ? instance->worker->route->reading(mem) : 0) {
      return fail(EPT_E_INVALID, "mem_deregister", -1, "loopback mem_deregister: %zu operations still read from it",
                  held);
    }
    while (!mem->keys.empty()) {
      const uint64_t name = mem->keys.back();
      revoke(mem, instance->port->exports[static_cast<uint32_t>(name)].rank, name);
    }
    if (is_gpu(mem->memory)) forget_gpu(mem->memory);
    delete mem;
    return static_cast<int32_t>(EPT_OK);
  });
}

int32_t region_import(ept_instance *instance, uint32_t rank, const void *bytes, size_t length, ept_region **region) {
  return guard("region_import", [&] {
    Blob blob;
    if (const int32_t code = read_blob(bytes, length, "region_import", &blob); code != EPT_OK) return code;
    if (blob.rank != rank || rank >= instance->world) {
      return fail(EPT_E_INVALID, "region_import", rank, "loopback region_import: the blob is of rank %u, not %u of %u",
                  blob.rank, rank, instance->world);
    }
    *region = new ept_region{instance, rank, blob.slot, blob.length, blob.key, blob.role};
    return static_cast<int32_t>(EPT_OK);
  });
}

void region_drop(ept_region *region) { delete region; }

// A pointer asks nobody: what was mapped stays writable after a revoke, so whoever maps must be trusted until it drops.
int32_t region_map(ept_region *region, void **address) {
  ept_instance *const instance = region->instance;
  if (!instance->settings.mapped) {
    return fail(EPT_E_UNSUPPORTED, "region_map", region->rank, "loopback region_map: the setting `mapped` is 0");
  }
  if (const int32_t code = known(instance, region->rank, "region_map"); code != EPT_OK) return code;
  const Peer &peer = instance->peers[region->rank];
  std::lock_guard hold(peer.port->lock);
  switch (check(*instance->port, peer, *region, 0, region->length)) {
    case Verdict::kLanded:
      *address = peer.port->exports[region->slot].base;
      return EPT_OK;
    case Verdict::kConnecting:
      return EPT_LATER;
    case Verdict::kLost:
      return fail(EPT_E_PEER_LOST, "region_map", region->rank, "loopback region_map: %s", peer.link->why.c_str());
    default:
      return fail(EPT_E_ACCESS, "region_map", region->rank,
                  "loopback region_map: rank %u revoked the key, or never gave it to this rank and epoch",
                  region->rank);
  }
}

}  // namespace loopback
