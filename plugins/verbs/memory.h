// SPDX-License-Identifier: Apache-2.0
// Registered memory, and what peers may write into it.
//
// A piece of memory is registered once on every NIC as a source, and once more on every NIC for each export, exactly as
// long as what is exported: so the NIC checks bounds and key, and closing that registration takes back that one key and
// no other, at once. A card's keys are 32 bits and serve every queue pair of this instance: protection REGION.
// What the NIC does not check is the key of an operation without bytes (InfiniBand C9-88): that writes nothing.
#pragma once

#include <memory>
#include <unordered_map>
#include <vector>

#include "../exports.h"
#include "channel.h"

namespace verbs {

constexpr uint32_t kRegionMagic = 0x52565045;  // "EPVR"

struct RegionBlob {
  uint32_t magic;
  uint16_t version, nics;
  uint32_t exporter, exporter_epoch;
  uint64_t length;
  uint64_t address;
  // and a key of each NIC, 32 bits
};

struct Export : plugin::Holder {
  std::vector<Mr> keys;
};

}  // namespace verbs

struct ept_mem {
  ept_instance *owner;
  ept_memory memory;
  uint64_t in_flight;  // operations that read from it
  bool inlines;        // the processor can read it
  std::vector<verbs::Mr> nics;
  std::vector<verbs::Mr> readable;  // of GPU memory: its first byte, for visible.h
};

struct ept_region {
  ept_instance *owner;
  uint32_t rank, epoch;  // of the exporter
  uint64_t address, length;
  std::vector<uint32_t> keys;  // a NIC
  uint32_t holders;            // the importer and operations; freed by the last
  // The card refused an operation inside what the exporter said it may: so its key is taken back, or never was one, and
  // no other need break a queue pair to find that out. What was outside says nothing of the key.
  bool dead;

  void refused(const verbs::Operation &operation);
};
