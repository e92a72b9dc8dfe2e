// SPDX-License-Identifier: Apache-2.0
//
// boot.h: which machine this is, for what processes of one machine alone may share.
#pragma once

#include <cstdio>
#include <string>

namespace ept {

// Drawn by the kernel when it began: 36 characters, the same in every container. Empty: this system doesn't tell.
inline std::string boot_id() {
  char line[64] = "";
  if (FILE *file = fopen("/proc/sys/kernel/random/boot_id", "re")) {
    if (!fgets(line, sizeof line, file)) line[0] = 0;
    fclose(file);
  }
  std::string id = line;
  while (!id.empty() && id.back() == '\n') id.pop_back();
  return id;
}

}  // namespace ept
