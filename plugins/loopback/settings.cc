// SPDX-License-Identifier: Apache-2.0
//
// settings.cc: each setting with its default, range and sentence; how they are read; the limits.
#include "settings.h"

#include <cerrno>
#include <cstdlib>
#include <iterator>
#include <map>
#include <string>

namespace loopback {

namespace {

constexpr ept_setting integer(const char *name, const char *value, int64_t min, int64_t max, const char *doc) {
  return {sizeof(ept_setting), EPT_SETTING_INT, name, value, min, max, doc};
}

}  // namespace

constexpr ept_setting kSettings[] = {
    integer("rails", "0", 0, 64, "ways that operations are spread over; 0: 1, or 4 with the adversary"),
    integer("tx_depth", "1024", 1, 1 << 20, "operations in flight on a rail before post says LATER"),
    integer("cq_depth", "0", 0, 1 << 30, "arrivals that may wait unread on a rail; 0: all that the credits allow"),
    integer("max_message", "0", 0, INT64_MAX, "bytes of one write; 0: 1 MiB, or 64 KiB with the adversary"),
    integer("max_send", "8192", 256, 1 << 20, "bytes of one message"),
    integer("max_regions", "1048576", 1, INT32_MAX, "exports that may be valid at a time"),
    {sizeof(ept_setting), EPT_SETTING_BOOL, "mapped", "1", 0, 1, "hand out pointers into other ranks' memory"},
    {sizeof(ept_setting), EPT_SETTING_BOOL, "revocable", "1", 0, 1,
     "keys can be revoked and ranks fenced; 0: neither, as where memory is mapped into other processes"},
    integer("gpu", "0", 0, 2,
            "GPU memory that is taken, and copied through the host: 0: none, 1: by address, 2: as a dmabuf"),
    integer("adversary", "0", -1, INT64_MAX, "seed of a hostile schedule: reorders, splits, delays; 0 and -1: polite"),
    integer("delay", "16", 0, 254, "adversary: polls that one step is held, at most; one in 16 steps 16 times as long"),
    integer("chunks", "8", 1, 1024, "adversary: parts that the bytes of a write land in, at most"),
    integer("later_permille", "100", 0, 900, "adversary: posts of which a random tail is told LATER, per thousand"),
    integer("early_permille", "300", 0, 1000,
            "adversary: operations that are locally done before their bytes land, per thousand"),
    integer("fail_permille", "0", 0, 1000, "adversary: writes that fail, half landed, per thousand"),
    integer("lose_rank", "-1", -1, INT32_MAX, "adversary: this rank disappears; -1: none does"),
    integer("lose_after", "1000", 0, INT64_MAX, "adversary: operations that lose_rank posts before it disappears"),
    integer("silent_rank", "-1", -1, INT32_MAX,
            "adversary: this rank falls silent, its links staying up; -1: none does"),
    integer("silent_after", "1000", 0, INT64_MAX,
            "adversary: operations that silent_rank posts before it falls silent"),
};
static_assert(std::size(kSettings) == kSettingCount);

int32_t read_settings(const ept_value *values, size_t count, const char *operation, Settings *settings) {
  std::map<std::string, int64_t> found;
  for (const ept_setting &setting : kSettings) found[setting.name] = strtoll(setting.value, nullptr, 10);
  for (size_t i = 0; i < count; ++i) {
    const std::string name = values[i].name;
    if (!found.count(name)) {
      return fail(EPT_E_CONFIG, operation, -1, "loopback has no setting `%s`", name.c_str());
    }
    char *end = nullptr;
    errno = 0;
    const int64_t value = strtoll(values[i].text, &end, 10);
    const ept_setting &setting =
        *std::find_if(std::begin(kSettings), std::end(kSettings), [&](auto &each) { return name == each.name; });
    if (errno || end == values[i].text || *end || value < setting.min || value > setting.max) {
      return fail(EPT_E_CONFIG, operation, -1, "loopback's `%s` is \"%s\": a number from %lld to %lld is wanted",
                  setting.name, values[i].text, static_cast<long long>(setting.min),
                  static_cast<long long>(setting.max));
    }
    found[name] = value;
  }
  const auto number = [&](const char *name) { return static_cast<uint32_t>(found[name]); };
  settings->hostile = found["adversary"] > 0;
  settings->rails = found["rails"] ? number("rails") : settings->hostile ? 4 : 1;
  settings->tx_depth = number("tx_depth");
  settings->cq_depth = number("cq_depth");
  settings->max_send = number("max_send");
  settings->max_message = found["max_message"] ? static_cast<uint64_t>(found["max_message"])
                          : settings->hostile  ? 64 << 10
                                               : 1 << 20;
  settings->max_regions = static_cast<uint64_t>(found["max_regions"]);
  settings->mapped = found["mapped"] != 0;
  settings->revocable = found["revocable"] != 0;
  settings->gpu = number("gpu");
  settings->malice = {static_cast<uint64_t>(found["adversary"]),
                      number("delay"),
                      number("chunks"),
                      number("later_permille"),
                      number("early_permille"),
                      number("fail_permille"),
                      found["lose_rank"],
                      static_cast<uint64_t>(found["lose_after"]),
                      found["silent_rank"],
                      static_cast<uint64_t>(found["silent_after"])};
  return EPT_OK;
}

ept_caps capabilities(const Settings &settings) {
  ept_caps caps = {};
  caps.memory_kinds = EPT_MEMORY_HOST | EPT_MEMORY_PINNED | EPT_MEMORY_SHM;
  if (settings.gpu) caps.memory_kinds |= settings.gpu == 1 ? EPT_MEMORY_CUDA : EPT_MEMORY_DMABUF;
  caps.max_message = settings.max_message;
  caps.max_send = settings.max_send;
  caps.max_iov = 1;
  caps.immediate_bits = 32;
  caps.protection = EPT_PROTECTION_KEY;
  caps.passive_progress = 1;
  caps.wait_descriptor = 1;
  caps.can_revoke = settings.revocable;
  caps.mapped = settings.mapped;
  caps.operation_cost_ns = kOperationCostNs;
  return caps;
}

}  // namespace loopback
