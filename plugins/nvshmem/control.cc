// SPDX-License-Identifier: Apache-2.0
#include "control.h"

#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>

namespace nvshmem {
namespace {

std::string own_folder() {
  Dl_info own{};
  if (dladdr(reinterpret_cast<void *>(&own_folder), &own) == 0 || own.dli_fname == nullptr) return ".";
  const std::string file = own.dli_fname;
  const size_t slash = file.rfind('/');
  return slash == std::string::npos ? "." : file.substr(0, slash);
}

}  // namespace

bool has_plugin(const std::string &name) { return access((own_folder() + "/ept_" + name + ".so").c_str(), F_OK) == 0; }

const ept_backend *open_control(const std::string &name, std::string *why) {
  if (name == "nvshmem" || name.empty()) {
    *why = "EPT_NVSHMEM_CONTROL is '" + name + "': it names another backend, such as tcp or verbs";
    return nullptr;
  }
  const std::string path = name.find('/') != std::string::npos ? name : own_folder() + "/ept_" + name + ".so";
  // Never closed, as the engine closes none: its threads may outlive an instance.
  void *handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
  if (handle == nullptr) {
    const char *text = dlerror();
    *why = "EPT_NVSHMEM_CONTROL is '" + name + "', whose plugin can't be opened: " + (text != nullptr ? text : path);
    return nullptr;
  }
  const auto *table = static_cast<const ept_backend *>(dlsym(handle, "ept_backend_v1"));
  if (table == nullptr || table->abi != EPT_BACKEND_ABI || table->size < sizeof(ept_backend)) {
    *why = path + " is no plugin of ABI " + std::to_string(EPT_BACKEND_ABI);
    return nullptr;
  }
  if (table->join != nullptr) {
    *why = path + " joins collectively itself, which can't be the network beneath another one that does";
    return nullptr;
  }
  return table;
}

std::string ControlValues::read(const ept_backend &table,
                                const std::vector<std::pair<std::string, std::string>> &general,
                                const std::string &options) {
  text_.clear();
  view_.clear();
  for (size_t i = 0; i < table.setting_count; ++i) text_.emplace_back(table.settings[i].name, table.settings[i].value);
  const auto set = [&](const std::string &name, const std::string &value) {
    for (auto &[known, text] : text_) {
      if (known != name) continue;
      text = value;
      return true;
    }
    return false;
  };
  for (const auto &[name, value] : general)
    if (!value.empty()) set(name, value);
  for (size_t at = 0; at < options.size();) {
    const size_t end = std::min(options.find(';', at), options.size());
    const std::string pair = options.substr(at, end - at);
    const size_t equals = pair.find('=');
    at = end + 1;
    if (pair.empty()) continue;
    if (equals == std::string::npos || !set(pair.substr(0, equals), pair.substr(equals + 1)))
      return "EPT_NVSHMEM_CONTROL_OPTIONS has '" + pair + "': name=value with names of " + table.name +
             "'s settings are wanted, with semicolons between them";
  }
  for (const auto &[name, value] : text_) view_.push_back({name.c_str(), value.c_str()});
  return "";
}

}  // namespace nvshmem
