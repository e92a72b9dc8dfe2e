// SPDX-License-Identifier: Apache-2.0
#include "settings.h"

#include "../values.h"

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
  plugin::Values given("verbs", {kSettings, kSettingCount}, values, count);
  settings->library = given.text("library");
  settings->devices = given.text("devices");
  settings->interface = given.text("interface");
  settings->nics = given.small("nics");
  settings->qps = given.small("qps");
  settings->gid_index = static_cast<int32_t>(given.number("gid_index"));
  settings->mtu = given.small("mtu");
  settings->depth = given.small("depth");
  settings->receives = given.small("receives");
  settings->inline_bytes = given.small("inline");
  settings->max_message = static_cast<uint64_t>(given.number("max_message"));
  settings->max_regions = given.small("max_regions");
  settings->timeout = given.small("timeout");
  settings->retries = given.small("retries");
  settings->rnr_retries = given.small("rnr_retries");
  settings->traffic_class = given.small("traffic_class");
  settings->service_level = given.small("service_level");
  settings->relaxed_ordering = given.flag("relaxed_ordering");
  settings->shuffle = given.small("shuffle");
  int32_t code = given.code();
  if (code == EPT_OK && settings->mtu != 0 && settings->mtu != 1024 && settings->mtu != 2048 && settings->mtu != 4096)
    code = fail(EPT_E_CONFIG, "open", -1, 0, "verbs: mtu is %u; it must be 0, 1024, 2048 or 4096", settings->mtu);
  return code;
}

}  // namespace verbs
