// SPDX-License-Identifier: Apache-2.0
// Registered memory, and the keys under which peers may write into it. A key is 128 random bits, made for one
// (range, rank, epoch); the slot beside it is only where to look. Revoking clears the slot, so from then on nothing
// that carries the key is let in; payload that is half received is the streams' business (instance.cc revokes there
// too).
#pragma once

#include <vector>

#include "common.h"

struct ept_mem {
  ept_instance *owner;
  uint8_t *address;
  uint64_t length;
  uint32_t access;
  uint64_t in_flight;  // operations that read from it, or would again if their stream broke
};

struct ept_region {
  ept_instance *owner;
  uint32_t rank, epoch;  // of the exporter
  uint32_t slot;
  uint8_t key[16];
  uint64_t length;
};

namespace tcp {

struct Export {
  bool live = false;
  bool any_epoch = false;  // made before the peer was opened: the first epoch that is opened takes it
  uint32_t rank = 0, epoch = 0;
  uint32_t generation = 0;
  ept_mem *mem = nullptr;
  uint8_t *base = nullptr;
  uint64_t length = 0;
  uint8_t key[16] = {};
};

class Exports {
 public:
  void limit(uint32_t exports) { limit_ = exports; }
  // LIMIT past that many.
  int32_t add(const ept_host &host, const Export &wanted, uint64_t *name, uint32_t *slot, const uint8_t **key);
  // The slot that `name` gave, or nullptr where it is not (or no longer) one of `mem` for `rank`.
  Export *find(uint64_t name, const ept_mem *mem, uint32_t rank);
  void remove(Export *exported);
  void remove_all_of(const ept_mem *mem);
  void remove_all_of(uint32_t rank, uint32_t epoch);  // of that epoch and earlier ones
  void bind(uint32_t rank, uint32_t epoch);           // `any_epoch` ones of `rank`

  // Where `length` bytes at `offset` may be written by `rank` under `epoch` with this key; else why not (ACCESS).
  enum class Verdict { kAllowed, kKey, kBounds };
  Verdict check(uint32_t slot, const uint8_t key[16], uint32_t rank, uint32_t epoch, uint64_t offset, uint64_t length,
                uint8_t **destination) const {
    static const uint8_t none[16] = {};
    const Export *exported = slot < slots_.size() ? &slots_[slot] : nullptr;
    bool same = same_bytes(exported != nullptr ? exported->key : none, key, 16);
    if (exported == nullptr || !exported->live || !same || exported->rank != rank || exported->any_epoch ||
        exported->epoch != epoch)
      return Verdict::kKey;
    if (offset > exported->length || length > exported->length - offset) return Verdict::kBounds;
    *destination = exported->base + offset;
    return Verdict::kAllowed;
  }

 private:
  std::vector<Export> slots_;
  std::vector<uint32_t> free_;
  uint32_t limit_ = 0;
};

struct RegionBlob {
  uint32_t magic;
  uint16_t version;
  uint16_t reserved;
  uint32_t exporter, exporter_epoch;
  uint32_t slot;
  uint32_t reserved2;
  uint64_t length;
  uint8_t key[16];
};
constexpr uint32_t kRegionMagic = 0x52545045;  // "EPTR"
constexpr uint16_t kRegionVersion = 1;
static_assert(sizeof(RegionBlob) == 48, "region blob layout");

}  // namespace tcp
