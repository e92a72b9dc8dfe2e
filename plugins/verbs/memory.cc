// SPDX-License-Identifier: Apache-2.0
#include "memory.h"

#include <cerrno>
#include <cstring>

#include "../checks.h"
#include "instance.h"

using namespace verbs;

namespace {

constexpr int32_t kHostKinds = EPT_MEMORY_HOST | EPT_MEMORY_PINNED | EPT_MEMORY_SHM;

// What for: as a source of ours, as a target of peers that reaches from address to address + length and no further, or
// for reads of our own NIC.
enum class Use { kSource, kTarget, kReadBack };

int32_t register_range(ept_instance *instance, Nic *nic, const ept_memory &memory, uint8_t *address, uint64_t length,
                       Use use, Mr *mr) {
  Library *library = nic->library;
  unsigned access = 0;
  if (use == Use::kTarget) access |= IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE;
  if (use == Use::kReadBack) access |= IBV_ACCESS_REMOTE_READ;
  const bool relaxed = use == Use::kTarget && memory.role == EPT_ROLE_DATA && instance->settings.relaxed_ordering &&
                       library->has_relaxed_ordering();
  ibv_mr *made = nullptr;
  // A provider that knows no relaxed ordering ignores the flag; an old kernel may refuse it.
  for (const unsigned flags : {relaxed ? access | IBV_ACCESS_RELAXED_ORDERING : access, access}) {
    if (memory.kind == EPT_MEMORY_DMABUF) {
      const auto *begin = static_cast<const uint8_t *>(memory.address);
      made = library->reg_dmabuf_mr(nic->pd.get(), memory.fd_offset + static_cast<uint64_t>(address - begin), length,
                                    reinterpret_cast<uint64_t>(address), memory.fd, flags);
    } else {
      // GPU memory by its address: where the driver offers that (nvidia-peermem).
      made = library->reg_mr(nic->pd.get(), address, length, flags);
    }
    if (made != nullptr || flags == access) break;
  }
  if (made == nullptr) {
    const int number = errno;
    const char *mend = number == ENOMEM ? "; raise the limit of locked memory (ulimit -l unlimited)" : "";
    if (memory.kind == EPT_MEMORY_CUDA) mend = "; by address, GPU memory needs nvidia-peermem; register it as a dmabuf";
    return fail(number == ENOMEM || number == ENOSPC ? EPT_E_NOMEM : EPT_E_IO, "mem_register", -1, number,
                "verbs: registering %llu bytes at %p with %s failed: %s (errno %d)%s",
                static_cast<unsigned long long>(length), static_cast<void *>(address), nic->port.device.c_str(),
                strerror(number), number, mend);
  }
  *mr = {library, made};
  return EPT_OK;
}

}  // namespace

int32_t ept_instance::memory_kinds() const {
  return kHostKinds | EPT_MEMORY_CUDA | (library->has_dmabuf() ? EPT_MEMORY_DMABUF : 0);
}

int32_t ept_instance::mem_register(const ept_memory *memory, ept_mem **result) {
  *result = nullptr;
  if ((memory->kind & memory_kinds()) == 0)
    return fail(EPT_E_UNSUPPORTED, "mem_register", -1, 0, "verbs: memory of kind %d can't be registered here%s",
                memory->kind,
                memory->kind == EPT_MEMORY_DMABUF ? "; a dmabuf needs rdma-core 34 or later (ibv_reg_dmabuf_mr)" : "");
  if (memory->kind == EPT_MEMORY_DMABUF && memory->fd < 0)
    return fail(EPT_E_INVALID, "mem_register", -1, 0, "verbs: memory of kind DMABUF without a file descriptor");
  const int32_t sound = plugin::check_memory("verbs", *memory);
  if (sound != EPT_OK) return sound;
  auto mem = std::make_unique<ept_mem>();
  mem->owner = this;
  mem->memory = *memory;
  mem->in_flight = 0;
  mem->inlines = (memory->kind & kHostKinds) != 0;
  mem->nics.resize(nics.size());
  for (size_t i = 0; i < nics.size(); ++i) {
    const int32_t code = register_range(this, nics[i].get(), *memory, static_cast<uint8_t *>(memory->address),
                                        memory->length, Use::kSource, &mem->nics[i]);
    if (code != EPT_OK) return code;
  }
  if (!mem->inlines && memory->length > 0) {
    mem->readable.resize(nics.size());
    for (size_t i = 0; i < nics.size(); ++i) {
      const int32_t code = register_range(this, nics[i].get(), *memory, static_cast<uint8_t *>(memory->address), 1,
                                          Use::kReadBack, &mem->readable[i]);
      if (code != EPT_OK) return code;
    }
    gpu_memory.push_back(mem.get());
  }
  *result = mem.release();
  return EPT_OK;
}

int32_t ept_instance::mem_deregister(ept_mem *mem) {
  cut_short(mem);  // closed peers may still be sending from it
  if (mem->in_flight > 0)
    return fail(EPT_E_INVALID, "mem_deregister", -1, 0,
                "verbs: %llu operations have still to read from this memory; quiesce first, or close their peers",
                static_cast<unsigned long long>(mem->in_flight));
  for (auto entry = exports.begin(); entry != exports.end();)
    entry = entry->second.mem == mem ? exports.erase(entry) : std::next(entry);
  std::erase(gpu_memory, mem);
  delete mem;
  return EPT_OK;
}

int32_t ept_instance::region_export(ept_mem *mem, uint32_t rank, uint64_t offset, uint64_t length, void *blob,
                                    size_t *blob_length, uint64_t *key) {
  const ept_memory &memory = mem->memory;
  const int32_t may = plugin::check_export("verbs", memory, rank, params.world, offset, length);
  if (may != EPT_OK) return may;
  const size_t size = sizeof(RegionBlob) + nics.size() * sizeof(uint32_t);
  if (*blob_length < size)
    return fail(EPT_E_INVALID, "region_export", rank, 0, "verbs: the blob needs %zu bytes, there is room for %zu", size,
                *blob_length);
  if (exports.size() >= settings.max_regions)
    return fail(EPT_E_LIMIT, "region_export", rank, 0,
                "verbs: %u regions are exported, which is the limit (EPT_VERBS_MAX_REGIONS); revoke some",
                settings.max_regions);
  Export made{plugin::holder_of(mem, rank, peers[rank].get()), {}};
  auto *base = static_cast<uint8_t *>(memory.address) + offset;
  const RegionBlob head{kRegionMagic, kVersion, static_cast<uint16_t>(nics.size()), params.rank,
                        params.epoch, length,   reinterpret_cast<uint64_t>(base)};
  auto *out = static_cast<uint8_t *>(blob);
  memcpy(out, &head, sizeof head);
  out += sizeof head;
  for (auto &nic : nics) {
    // No NIC registers nothing. An empty region gets a byte that lies in the memory; its length says none.
    uint8_t *first = length == 0 && offset == memory.length ? base - 1 : base;
    made.keys.emplace_back();
    const int32_t code =
        register_range(this, nic.get(), memory, first, length != 0 ? length : 1, Use::kTarget, &made.keys.back());
    if (code != EPT_OK) return code;
    memcpy(out, &made.keys.back()->rkey, sizeof(uint32_t));
    out += sizeof(uint32_t);
  }
  *blob_length = size;
  *key = next_export++;
  exports.emplace(*key, std::move(made));
  return EPT_OK;
}

int32_t ept_instance::region_revoke(ept_mem *mem, uint32_t rank, uint64_t key) {
  const auto found = plugin::find_export("verbs", &exports, key, mem, rank);
  if (found == exports.end()) return EPT_E_INVALID;
  exports.erase(found);
  return EPT_OK;
}

void ept_instance::close_exports_of(uint32_t rank, uint32_t epoch) { plugin::close_exports(&exports, rank, epoch); }

int32_t ept_instance::region_import(uint32_t rank, const void *blob, size_t length, ept_region **result) {
  *result = nullptr;
  RegionBlob head{};
  if (length >= sizeof head) memcpy(&head, blob, sizeof head);
  const int32_t sound = plugin::check_import("verbs", head, kRegionMagic, kVersion, rank, length);
  if (sound != EPT_OK) return sound;
  if (head.nics == 0 || head.nics > kMostNics || length != sizeof head + head.nics * sizeof(uint32_t))
    return fail(EPT_E_INVALID, "region_import", rank, 0, "verbs: a region of %u NICs in %zu bytes", head.nics, length);
  auto region = std::make_unique<ept_region>();
  region->owner = this;
  region->rank = rank;
  region->epoch = head.exporter_epoch;
  region->address = head.address;
  region->length = head.length;
  region->holders = 1;
  region->dead = false;
  region->keys.resize(head.nics);
  memcpy(region->keys.data(), static_cast<const uint8_t *>(blob) + sizeof head, head.nics * sizeof(uint32_t));
  *result = region.release();
  return EPT_OK;
}

void ept_region::refused(const Operation &operation) {
  const uint64_t offset = operation.target - address;
  dead = dead || (offset <= length && operation.length <= length - offset);
}

bool Operation::dead() const { return region != nullptr && region->dead && length > 0; }

void ept_instance::let_go(ept_region *region) {
  if (--region->holders == 0) delete region;
}
