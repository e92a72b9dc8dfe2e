// SPDX-License-Identifier: Apache-2.0
#include "memory.h"

#include <cstring>

#include "../checks.h"
#include "instance.h"
#include "registration.h"

using namespace libfabric;

namespace {

uint64_t random_key(const ept_host &host) {
  uint64_t key = 0;
  host.random(host.context, &key, sizeof key);
  return key;
}

}  // namespace

int32_t ept_instance::mem_register(const ept_memory *memory, ept_mem **result) {
  *result = nullptr;
  const int32_t kinds = memory_kinds(choice.gpu, library->version());
  if ((memory->kind & kinds) == 0)
    return fail(EPT_E_UNSUPPORTED, "mem_register", -1, 0,
                "libfabric: memory of kind %d can't be registered with provider %s of libfabric %u.%u here%s",
                memory->kind, traits.setting.c_str(), FI_MAJOR(library->version()), FI_MINOR(library->version()),
                (memory->kind & (EPT_MEMORY_CUDA | EPT_MEMORY_DMABUF)) != 0
                    ? "; GPU memory needs EPT_LIBFABRIC_GPU=1 and a card that reaches it, a dmabuf libfabric 1.20 too"
                    : "");
  if (memory->kind == EPT_MEMORY_DMABUF && memory->fd < 0)
    return fail(EPT_E_INVALID, "mem_register", -1, 0, "libfabric: memory of kind DMABUF without a file descriptor");
  const int32_t sound = plugin::check_memory("libfabric", *memory);
  if (sound != EPT_OK) return sound;
  auto mem = std::make_unique<ept_mem>();
  mem->owner = this;
  mem->memory = *memory;
  mem->in_flight = 0;
  mem->rails.resize(rails.size());
  for (size_t i = 0; i < rails.size(); ++i) {
    int32_t code = register_range(*library, rails[i].get(), *memory, static_cast<uint8_t *>(memory->address),
                                  memory->length, FI_WRITE | FI_SEND, random_key(*host), mem->rails[i].mr.out());
    if (code != EPT_OK) return code;
    mem->rails[i].descriptor = fi_mr_desc(mem->rails[i].mr.get());
  }
  *result = mem.release();
  return EPT_OK;
}

int32_t ept_instance::mem_deregister(ept_mem *mem) {
  if (mem->in_flight > 0)
    return fail(EPT_E_INVALID, "mem_deregister", -1, 0,
                "libfabric: %llu operations have still to read from this memory; quiesce first, or close their peers",
                static_cast<unsigned long long>(mem->in_flight));
  for (auto entry = exports.begin(); entry != exports.end();)
    entry = entry->second.mem == mem ? exports.erase(entry) : std::next(entry);
  for (auto &rail : rails)
    for (Operation &operation : rail->operations)
      if (operation.mem == mem) operation.mem = nullptr;
  delete mem;
  return EPT_OK;
}

int32_t ept_instance::region_export(ept_mem *mem, uint32_t rank, uint64_t offset, uint64_t length, void *blob,
                                    size_t *blob_length, uint64_t *key) {
  const ept_memory &memory = mem->memory;
  const int32_t may = plugin::check_export("libfabric", memory, rank, params.world, offset, length);
  if (may != EPT_OK) return may;
  const size_t size = sizeof(RegionBlob) + rails.size() * sizeof(uint64_t);
  if (*blob_length < size)
    return fail(EPT_E_INVALID, "region_export", rank, 0, "libfabric: the blob needs %zu bytes, there is room for %zu",
                size, *blob_length);
  if (exports.size() >= settings.max_regions)
    return fail(EPT_E_LIMIT, "region_export", rank, 0,
                "libfabric: %u regions are exported, which is the limit (EPT_LIBFABRIC_MAX_REGIONS); revoke some",
                settings.max_regions);
  Export made{plugin::holder_of(mem, rank, peers[rank].get()), {}};
  RegionBlob head{kRegionMagic, kVersion, static_cast<uint16_t>(rails.size()), params.rank, params.epoch, length, 0};
  uint8_t *base = static_cast<uint8_t *>(memory.address) + offset;
  if (rails.front()->virtual_address) head.address = reinterpret_cast<uint64_t>(base);
  auto *out = static_cast<uint8_t *>(blob);
  memcpy(out, &head, sizeof head);
  out += sizeof head;
  for (auto &rail : rails) {
    made.rails.emplace_back();
    // No provider registers nothing. An empty region gets a byte that lies in the memory; its length says none.
    uint8_t *first = length == 0 && offset == memory.length ? base - 1 : base;
    int32_t code = register_range(*library, rail.get(), memory, first, length != 0 ? length : 1, FI_REMOTE_WRITE,
                                  random_key(*host), made.rails.back().out());
    if (code != EPT_OK) return code;
    const uint64_t rail_key = fi_mr_key(made.rails.back().get());
    memcpy(out, &rail_key, sizeof rail_key);
    out += sizeof rail_key;
  }
  *blob_length = size;
  *key = next_export++;
  exports.emplace(*key, std::move(made));
  return EPT_OK;
}

int32_t ept_instance::region_revoke(ept_mem *mem, uint32_t rank, uint64_t key) {
  const auto found = plugin::find_export("libfabric", &exports, key, mem, rank);
  if (found == exports.end()) return EPT_E_INVALID;
  exports.erase(found);
  return EPT_OK;
}

void ept_instance::close_exports_of(uint32_t rank, uint32_t epoch) { plugin::close_exports(&exports, rank, epoch); }

int32_t ept_instance::region_import(uint32_t rank, const void *blob, size_t length, ept_region **result) {
  *result = nullptr;
  RegionBlob head{};
  if (length >= sizeof head) memcpy(&head, blob, sizeof head);
  const int32_t sound = plugin::check_import("libfabric", head, kRegionMagic, kVersion, rank, length);
  if (sound != EPT_OK) return sound;
  if (head.rails == 0 || head.rails > kMaxRails || length != sizeof head + head.rails * sizeof(uint64_t))
    return fail(EPT_E_INVALID, "region_import", rank, 0, "libfabric: a region of %u rails in %zu bytes", head.rails,
                length);
  auto region = std::make_unique<ept_region>();
  region->owner = this;
  region->rank = rank;
  region->epoch = head.exporter_epoch;
  region->address = head.address;
  region->length = head.length;
  region->keys.resize(head.rails);
  memcpy(region->keys.data(), static_cast<const uint8_t *>(blob) + sizeof head, head.rails * sizeof(uint64_t));
  *result = region.release();
  return EPT_OK;
}
