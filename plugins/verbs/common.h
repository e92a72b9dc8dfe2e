// SPDX-License-Identifier: Apache-2.0
// What every file of the plugin needs beside plugin.h.
#pragma once

#include <infiniband/verbs.h>

#include "../plugin.h"

namespace verbs {

using plugin::fail;
using plugin::Fd;
using plugin::format;
using plugin::last_error;
using plugin::same_bytes;

template <typename Call>
int32_t guarded(const char *operation, Call &&call) {
  return plugin::guarded("verbs", operation, std::forward<Call>(call));
}

}  // namespace verbs
