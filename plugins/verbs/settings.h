// SPDX-License-Identifier: Apache-2.0
// The settings that this backend brings: EPT_VERBS_<NAME>.
#pragma once

#include <string>

#include "common.h"

namespace verbs {

struct Settings {
  std::string library;
  std::string devices;    // "mlx5_0,mlx5_1:2"; empty: by rule
  std::string interface;  // "eth0,eth1"; empty: any
  uint32_t nics = 0;      // at most so many, when chosen by rule
  uint32_t qps = 0;       // data queue pairs a NIC and peer, each a rail
  int32_t gid_index = -1;
  uint32_t mtu = 0;  // bytes; 0: what the port has
  uint32_t depth = 0;
  uint32_t receives = 0;  // of a data queue pair; 0: by credits
  uint32_t inline_bytes = 0;
  uint64_t max_message = 0;
  uint32_t max_regions = 0;
  uint32_t timeout = 0, retries = 0, rnr_retries = 0;
  uint32_t traffic_class = 0, service_level = 0;
  bool relaxed_ordering = true;
  uint64_t shuffle = 0;  // seed; 0: off
};

extern const ept_setting kSettings[];
extern const size_t kSettingCount;

int32_t read_settings(const ept_value *values, size_t count, Settings *settings);

}  // namespace verbs
