// SPDX-License-Identifier: Apache-2.0
//
// control.h: the network that this plugin's host half runs over: another plugin, to which it passes on every call that
// isn't about the device. So set-up, resets, masks, heartbeats, and ranks on CPUs, go over a network that keeps the
// whole contract, and only what kernels post goes through NVSHMEM. It is one for the process: tables of functions have
// no instance to ask which.
#pragma once

#include <eptransport/backend.h>

#include <string>
#include <utility>
#include <vector>

namespace nvshmem {

// The table of the plugin NAME in this plugin's own folder, or at a path. NULL: *why.
const ept_backend *open_control(const std::string &name, std::string *why);

// Whether there is a plugin of that name in this plugin's own folder.
bool has_plugin(const std::string &name);

// Its settings: the defaults, under them `general` (name, value; those that it has and that aren't empty), under them
// `options`, "name=value;name=value". Owns the texts.
class ControlValues {
 public:
  // Empty: OK. Else what is wrong.
  std::string read(const ept_backend &table, const std::vector<std::pair<std::string, std::string>> &general,
                   const std::string &options);
  const std::vector<ept_value> &view() const { return view_; }

 private:
  std::vector<std::pair<std::string, std::string>> text_;
  std::vector<ept_value> view_;
};

}  // namespace nvshmem
