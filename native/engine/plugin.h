/* SPDX-License-Identifier: Apache-2.0
 * Plugins: found by path, checked, kept for the life of the process. */
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "eptransport/eptransport.h"

struct ept_plugin {
  std::string path;
  const ept_backend *table;
};

namespace ept {

/* The plugin's settings with `given` laid over the defaults, checked. Owns the text; `view` is what a plugin gets. */
class Values {
 public:
  int32_t check(const ept_plugin &plugin, const ept_value *given, size_t count, ept_error *error);
  const std::vector<ept_value> &view() const { return view_; }

 private:
  std::vector<std::pair<std::string, std::string>> text_;
  std::vector<ept_value> view_;
};

}  // namespace ept
