// SPDX-License-Identifier: Apache-2.0
#include "settings.h"

#include <cstdlib>
#include <cstring>

namespace verbs {

const ept_setting kSettings[] = {
    {sizeof(ept_setting), EPT_SETTING_STRING, "library", "", 0, 0,
     "The file of libibverbs.so.1; empty: the system's own."},
    {sizeof(ept_setting), EPT_SETTING_STRING, "devices", "", 0, 0,
     "NICs to use, as ibv_devices names them, with a port if it is not the first (mlx5_0,mlx5_1:2); empty: those with "
     "an active port, nearest first."},
    {sizeof(ept_setting), EPT_SETTING_STRING, "interface", "", 0, 0,
     "Network interfaces (eth0) whose RoCE addresses may be used, with commas between; empty: any."},
    {sizeof(ept_setting), EPT_SETTING_INT, "nics", "1", 1, 8,
     "NICs that a rank uses, at most, where devices does not name them."},
    {sizeof(ept_setting), EPT_SETTING_INT, "qps", "1", 1, 8, "Data queue pairs of a NIC and a peer, each a rail."},
    {sizeof(ept_setting), EPT_SETTING_INT, "gid_index", "-1", -1, 255,
     "Index of the GID on every NIC; -1: RoCE v2 over IPv4 of the NIC's own interface, else over IPv6, else "
     "link-local; "
     "0 on InfiniBand."},
    {sizeof(ept_setting), EPT_SETTING_INT, "mtu", "0", 0, 4096,
     "Path MTU in bytes (1024, 2048, 4096), at most; 0: the port's. The smaller of two ranks' is used."},
    {sizeof(ept_setting), EPT_SETTING_INT, "depth", "256", 16, 8192,
     "Operations in flight on a queue pair before post says LATER."},
    {sizeof(ept_setting), EPT_SETTING_INT, "receives", "0", 0, 32768,
     "Immediates that a data queue pair can take before it must be polled; 0: all that a peer's credits allow. For "
     "tests of RNR."},
    {sizeof(ept_setting), EPT_SETTING_INT, "inline", "64", 0, 1024,
     "Writes of at most so many bytes from host memory travel inside the request; as many as the NIC takes."},
    {sizeof(ept_setting), EPT_SETTING_INT, "max_message", "67108864", 4096, 1 << 30,
     "Bytes of one operation; longer writes are cut."},
    {sizeof(ept_setting), EPT_SETTING_INT, "max_regions", "65536", 1, INT32_MAX,
     "Exports that may be valid at a time; each is a registration with the NIC."},
    {sizeof(ept_setting), EPT_SETTING_INT, "timeout", "14", 1, 31,
     "How long a NIC waits for an acknowledgement before it sends again: 4.096 us x 2^timeout (14: 67 ms)."},
    {sizeof(ept_setting), EPT_SETTING_INT, "retries", "6", 1, 7,
     "How often it sends again before the queue pair fails and is made anew."},
    {sizeof(ept_setting), EPT_SETTING_INT, "rnr_retries", "6", 0, 7,
     "The same where the peer had no receive posted, which does not happen in a healthy run; 7: for ever."},
    {sizeof(ept_setting), EPT_SETTING_INT, "traffic_class", "0", 0, 255,
     "Traffic class of RoCE and routed InfiniBand packets (DSCP x 4; 106 = 26 x 4 + ECT where PFC is set up so)."},
    {sizeof(ept_setting), EPT_SETTING_INT, "service_level", "0", 0, 15, "Service level."},
    {sizeof(ept_setting), EPT_SETTING_BOOL, "relaxed_ordering", "1", 0, 0,
     "1: data may be written over PCIe in relaxed order. Completions, and memory of role SIGNAL, are in strict order."},
    {sizeof(ept_setting), EPT_SETTING_INT, "shuffle", "0", 0, INT32_MAX,
     "A seed: completions of different queue pairs are handled in random order. For tests; 0: off."},
};
const size_t kSettingCount = sizeof kSettings / sizeof *kSettings;

int32_t read_settings(const ept_value *values, size_t count, Settings *settings) {
  auto text_of = [&](const char *name) {
    for (size_t i = 0; i < count; ++i)
      if (strcmp(values[i].name, name) == 0) return values[i].text;
    for (const ept_setting &setting : kSettings)
      if (strcmp(setting.name, name) == 0) return setting.value;
    return "";
  };
  int32_t code = EPT_OK;
  auto number_of = [&](const char *name) -> int64_t {
    const char *text = text_of(name);
    char *end = nullptr;
    const long long value = strtoll(text, &end, 10);
    for (const ept_setting &setting : kSettings) {
      if (strcmp(setting.name, name) != 0) continue;
      if (*text == 0 || *end != 0 || value < setting.min || value > setting.max)
        code = fail(EPT_E_CONFIG, "open", -1, 0, "verbs: %s is '%s'; it must be a number from %lld to %lld", name, text,
                    static_cast<long long>(setting.min), static_cast<long long>(setting.max));
    }
    return value;
  };
  auto small = [&](const char *name) { return static_cast<uint32_t>(number_of(name)); };
  settings->library = text_of("library");
  settings->devices = text_of("devices");
  settings->interface = text_of("interface");
  settings->nics = small("nics");
  settings->qps = small("qps");
  settings->gid_index = static_cast<int32_t>(number_of("gid_index"));
  settings->mtu = small("mtu");
  settings->depth = small("depth");
  settings->receives = small("receives");
  settings->inline_bytes = small("inline");
  settings->max_message = static_cast<uint64_t>(number_of("max_message"));
  settings->max_regions = small("max_regions");
  settings->timeout = small("timeout");
  settings->retries = small("retries");
  settings->rnr_retries = small("rnr_retries");
  settings->traffic_class = small("traffic_class");
  settings->service_level = small("service_level");
  settings->relaxed_ordering = strcmp(text_of("relaxed_ordering"), "1") == 0;
  settings->shuffle = small("shuffle");
  if (code == EPT_OK && settings->mtu != 0 && settings->mtu != 1024 && settings->mtu != 2048 && settings->mtu != 4096)
    code = fail(EPT_E_CONFIG, "open", -1, 0, "verbs: mtu is %u; it must be 0, 1024, 2048 or 4096", settings->mtu);
  return code;
}

}  // namespace verbs
