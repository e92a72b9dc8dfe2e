// SPDX-License-Identifier: Apache-2.0
// The settings that this backend brings: EPT_UCX_<NAME>.
#pragma once

#include <string>

#include "../plugin.h"

namespace ucx {

using plugin::fail;
using plugin::format;
using plugin::last_error;
using plugin::same_bytes;

enum class Write {
  kMessage,     // the payload inside the active message, whatever its length
  kRendezvous,  // from `rendezvous` bytes on by UCX's rendezvous
  kPut,         // from `rendezvous` bytes on by ucp_put, a flush, and a message
};

struct Settings {
  std::string library, transports, interface;
  Write write = Write::kRendezvous;
  uint64_t rendezvous = 0, max_message = 0;
  uint32_t tx_depth = 0, max_regions = 0;
};

extern const ept_setting kSettings[];
extern const size_t kSettingCount;

int32_t read_settings(const ept_value *values, size_t count, Settings *settings);

}  // namespace ucx
