// SPDX-License-Identifier: Apache-2.0
// Registered memory, and what peers may write into it.
//
// A piece of memory is registered once on every rail as a source, and once more on every rail for each export, exactly
// as long as what is exported: so the provider, or the card, checks bounds and key, and closing that registration takes
// back that one key and no other. Where keys are ours to draw they are 64 random bits; a card's own are shorter.
#pragma once

#include <memory>
#include <unordered_map>
#include <vector>

#include "../exports.h"
#include "endpoint.h"

namespace libfabric {

constexpr uint32_t kRegionMagic = 0x52465045;  // "EPFR"

struct RegionBlob {
  uint32_t magic;
  uint16_t version, rails;
  uint32_t exporter, exporter_epoch;
  uint64_t length;
  uint64_t address;  // to be added to an offset
  // and a key of each rail, 64 bits
};

struct Export : plugin::Holder {
  std::vector<Owned<fid_mr>> rails;
};

}  // namespace libfabric

struct ept_mem {
  ept_instance *owner;
  ept_memory memory;
  uint64_t in_flight;  // operations that read from it
  struct Local {
    libfabric::Owned<fid_mr> mr;
    void *descriptor = nullptr;
  };
  std::vector<Local> rails;
};

struct ept_region {
  ept_instance *owner;
  uint32_t rank, epoch;  // of the exporter
  uint64_t address, length;
  std::vector<uint64_t> keys;  // a rail
};
