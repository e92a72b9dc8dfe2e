// SPDX-License-Identifier: Apache-2.0
//
// settings.h: what a user may set, and the limits that follow from it.
#pragma once

#include "common.h"
#include "schedule.h"

namespace loopback {

// Post, IMM and LOCAL_DONE, batches of 4 to 64 on one EPYC core, 2026-11-24: 50 to 60 ns (tests/native/loopback_cost).
constexpr uint32_t kOperationCostNs = 50;

extern const ept_setting kSettings[];
constexpr size_t kSettingCount = 19;

struct Settings {
  uint32_t rails, tx_depth, cq_depth, max_send, gpu;
  uint64_t max_message, max_regions;
  bool mapped, revocable, hostile;
  Malice malice;
};

// CONFIG, with a sentence, for a name that is none of ours and for a value that is no number or out of range.
int32_t read_settings(const ept_value *values, size_t count, const char *operation, Settings *settings);
ept_caps capabilities(const Settings &settings);

}  // namespace loopback
