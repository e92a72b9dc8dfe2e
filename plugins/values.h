// SPDX-License-Identifier: Apache-2.0
//
// values.h: a plugin's settings as the engine gives them to probe and open. The engine has checked types and bounds; a
// program that calls a plugin without it is told of what it got wrong. What isn't given has its default.
#pragma once

#include <cstdlib>
#include <cstring>
#include <span>

#include "plugin.h"

namespace plugin {

class Values {
 public:
  Values(const char *network, std::span<const ept_setting> settings, const ept_value *values, size_t count)
      : network_(network), settings_(settings), values_(values, count) {}

  const char *text(const char *name) const {
    for (const ept_value &value : values_)
      if (strcmp(value.name, name) == 0) return value.text;
    const ept_setting *setting = find(name);
    return setting != nullptr ? setting->value : "";
  }
  bool flag(const char *name) const { return strcmp(text(name), "1") == 0; }
  int64_t number(const char *name) {
    const char *word = text(name);
    char *end = nullptr;
    const long long value = strtoll(word, &end, 10);
    const ept_setting *setting = find(name);
    if (*word == 0 || *end != 0 || setting == nullptr || value < setting->min || value > setting->max)
      code_ = fail(EPT_E_CONFIG, "open", -1, 0, "%s: %s is '%s'; it must be a number from %lld to %lld", network_, name,
                   word, static_cast<long long>(setting != nullptr ? setting->min : 0),
                   static_cast<long long>(setting != nullptr ? setting->max : 0));
    return value;
  }
  uint32_t small(const char *name) { return static_cast<uint32_t>(number(name)); }

  // EPT_OK, or that of a number which was wrong; its sentence is the thread's last error.
  int32_t code() const { return code_; }

 private:
  const ept_setting *find(const char *name) const {
    for (const ept_setting &setting : settings_)
      if (strcmp(setting.name, name) == 0) return &setting;
    return nullptr;
  }

  const char *network_;
  std::span<const ept_setting> settings_;
  std::span<const ept_value> values_;
  int32_t code_ = EPT_OK;
};

}  // namespace plugin
