// SPDX-License-Identifier: Apache-2.0
// The settings that this backend brings: EPT_LIBFABRIC_<NAME>.
#pragma once

#include <string>

#include "common.h"

namespace libfabric {

constexpr uint32_t kMaxRails = 32;  // a p5 has 32 NICs; the engine takes 64 rails

enum class Completion {
  kAuto,      // by provider: providers.h
  kTransmit,  // a completion says that the source may be reused
  kDelivery,  // and that the bytes are at the target
};

struct Settings {
  std::string library;
  std::string provider;
  std::string interface;
  uint32_t rails = 0;  // 0: by provider
  uint32_t tx_depth = 0;
  uint32_t cq_depth = 0;  // 0: from credits and ranks
  uint64_t max_message = 0;
  uint32_t max_regions = 0;
  Completion completion = Completion::kAuto;
  std::string gpu;  // "auto", "0", "1"
  std::string strict;
  bool unproven = false;
};

extern const ept_setting kSettings[];
extern const size_t kSettingCount;

int32_t read_settings(const ept_value *values, size_t count, Settings *settings);

}  // namespace libfabric
