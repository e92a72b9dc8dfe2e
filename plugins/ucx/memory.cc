// SPDX-License-Identifier: Apache-2.0
// Registered memory, and what peers may write into it. A key is 128 random bits, made for one export, so for one rank
// and one epoch; the target looks at it, at the bounds and at the rank before a byte of a message is put anywhere. A
// payload that UCX moves by rendezvous was looked at when it began, and is stopped with its link if the key is taken
// back. One by RDMA write is not looked at by anyone before it lands.
#include <cstring>

#include "../checks.h"
#include "instance.h"

using namespace ucx;

namespace {

// A link that is closed by force gives back what it holds at the next look of UCX's, or some looks later.
constexpr int kLooksAtEnd = 10000;

}  // namespace

int32_t ept_instance::mem_register(const ept_memory *memory, ept_mem **result) {
  *result = nullptr;
  if ((static_cast<uint32_t>(memory->kind) & memory_kinds) == 0)
    return fail(EPT_E_UNSUPPORTED, "mem_register", -1, 0, "ucx: memory of kind %d can't be registered with %s%s",
                memory->kind, library->path.c_str(),
                memory->kind == EPT_MEMORY_CUDA ? ", whose build has no cuda, or found no driver" : "");
  const int32_t sound = plugin::check_memory("ucx", *memory);
  if (sound != EPT_OK) return sound;
  auto mem = std::make_unique<ept_mem>();
  mem->owner = this;
  mem->memory = *memory;
  if (settings.write == Write::kPut) {
    ucp_mem_map_params_t wanted{};
    wanted.field_mask = UCP_MEM_MAP_PARAM_FIELD_ADDRESS | UCP_MEM_MAP_PARAM_FIELD_LENGTH;
    wanted.address = memory->address;
    wanted.length = memory->length;
    const ucs_status_t status = library->ucp_mem_map(context, &wanted, &mem->handle);
    if (status != UCS_OK)
      return fail(EPT_E_NOMEM, "mem_register", -1, status, "ucx: %llu bytes can't be registered: %s (%d)",
                  static_cast<unsigned long long>(memory->length), library->words(status).c_str(), status);
  }
  *result = mem.release();
  return EPT_OK;
}

int32_t ept_instance::mem_deregister(ept_mem *mem) {
  if (mem->in_flight > 0 || mem->receiving > 0)
    return fail(EPT_E_INVALID, "mem_deregister", -1, 0,
                "ucx: %llu operations have still to read from this memory, %llu payloads are on their way into it; "
                "quiesce first, or close their peers",
                static_cast<unsigned long long>(mem->in_flight), static_cast<unsigned long long>(mem->receiving));
  for (auto entry = exports.begin(); entry != exports.end();)
    entry = entry->second.mem == mem ? exports.erase(entry) : std::next(entry);
  for (auto *list : {&peers, &leaving})
    for (auto &peer : *list)
      if (peer != nullptr)
        for (Operation &operation : peer->operations)
          if (operation.mem == mem) operation.mem = nullptr;
  if (mem->handle != nullptr) library->ucp_mem_unmap(context, mem->handle);
  delete mem;
  return EPT_OK;
}

int32_t ept_instance::region_export(ept_mem *mem, uint32_t rank, uint64_t offset, uint64_t length, void *blob,
                                    size_t *blob_length, uint64_t *key) {
  const ept_memory &memory = mem->memory;
  const int32_t may = plugin::check_export("ucx", memory, rank, params.world, offset, length);
  if (may != EPT_OK) return may;
  if (exports.size() >= settings.max_regions)
    return fail(EPT_E_LIMIT, "region_export", rank, 0,
                "ucx: %u regions are exported, which is the limit (EPT_UCX_MAX_REGIONS); revoke some",
                settings.max_regions);
  void *packed = nullptr;
  size_t packed_length = 0;
  if (mem->handle != nullptr) {
    const ucs_status_t status = library->ucp_rkey_pack(context, mem->handle, &packed, &packed_length);
    if (status != UCS_OK)
      return fail(EPT_E_IO, "region_export", rank, status, "ucx: no rkey for this memory: %s (%d)",
                  library->words(status).c_str(), status);
  }
  const size_t size = sizeof(RegionBlob) + packed_length;
  if (*blob_length < size) {
    if (packed != nullptr) library->ucp_rkey_buffer_release(packed);
    return fail(EPT_E_INVALID, "region_export", rank, 0, "ucx: the blob needs %zu bytes, there is room for %zu", size,
                *blob_length);
  }
  Export made{plugin::holder_of(mem, rank, peers[rank].get())};
  made.offset = offset;
  made.length = length;
  host->random(host->context, made.key.data(), made.key.size());
  while (exports.count(next_export) != 0) ++next_export;
  RegionBlob head{};
  head.magic = kRegionMagic;
  head.version = kVersion;
  head.rkey_length = static_cast<uint16_t>(packed_length);
  head.exporter = params.rank;
  head.exporter_epoch = params.epoch;
  head.length = length;
  head.address = reinterpret_cast<uint64_t>(memory.address) + offset;
  head.name = next_export++;
  head.kind = static_cast<uint32_t>(memory.kind);
  memcpy(head.key, made.key.data(), made.key.size());
  memcpy(blob, &head, sizeof head);
  if (packed != nullptr) {
    memcpy(static_cast<uint8_t *>(blob) + sizeof head, packed, packed_length);
    library->ucp_rkey_buffer_release(packed);
  }
  *blob_length = size;
  *key = head.name;
  exports.emplace(head.name, made);
  return EPT_OK;
}

int32_t ept_instance::region_revoke(ept_mem *mem, uint32_t rank, uint64_t key) {
  const auto found = plugin::find_export("ucx", &exports, key, mem, rank);
  if (found == exports.end()) return EPT_E_INVALID;
  const bool amid = found->second.receiving > 0;
  exports.erase(found);
  if (!amid) return EPT_OK;
  // A payload that has begun to come by rendezvous can't be called back alone: it ends with the link that it comes by.
  Peer *peer = peers[rank].get();
  if (peer != nullptr)
    end_peer(peer, EPT_E_PEER_LOST,
             format("the link to rank %u was ended here: a key was taken back while a payload came in under it", rank),
             true);
  for (int i = 0; i < kLooksAtEnd && mem->receiving > 0; ++i) library->ucp_worker_progress(ucp);
  if (mem->receiving == 0) return EPT_OK;
  return fail(EPT_E_STUCK, "region_revoke", rank, 0,
              "ucx: a payload of rank %u goes on coming in after its link was closed; end this process", rank);
}

void ept_instance::close_exports_of(uint32_t rank, uint32_t epoch) { plugin::close_exports(&exports, rank, epoch); }

int32_t ept_instance::region_import(uint32_t rank, const void *blob, size_t length, ept_region **result) {
  *result = nullptr;
  RegionBlob head{};
  if (length >= sizeof head) memcpy(&head, blob, sizeof head);
  const int32_t sound = plugin::check_import("ucx", head, kRegionMagic, kVersion, rank, length);
  if (sound != EPT_OK) return sound;
  if (length != sizeof head + head.rkey_length)
    return fail(EPT_E_INVALID, "region_import", rank, 0, "ucx: a region of %zu bytes with an rkey of %u", length,
                head.rkey_length);
  auto region = std::make_unique<ept_region>();
  region->owner = this;
  region->rank = rank;
  region->epoch = head.exporter_epoch;
  region->name = head.name;
  region->kind = head.kind;
  region->address = head.address;
  region->length = head.length;
  memcpy(region->key.data(), head.key, sizeof head.key);
  const auto *bytes = static_cast<const uint8_t *>(blob);
  region->packed.assign(bytes + sizeof head, bytes + length);
  *result = region.release();
  return EPT_OK;
}

void ept_instance::region_drop(ept_region *region) {
  if (region->rkey != nullptr) library->ucp_rkey_destroy(region->rkey);
  delete region;
}
