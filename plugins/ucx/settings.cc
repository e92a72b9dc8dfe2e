// SPDX-License-Identifier: Apache-2.0
#include "settings.h"

#include "../values.h"

namespace ucx {

const ept_setting kSettings[] = {
    {sizeof(ept_setting), EPT_SETTING_STRING, "library", "", 0, 0,
     "The file of libucp.so.0; empty: one that is mapped already, the wheel's beside this package, the system's."},
    {sizeof(ept_setting), EPT_SETTING_STRING, "transports", "", 0, 0,
     "UCX's transports with commas between (tcp, posix, sysv, cma, rc, ...), as UCX_TLS; empty: that, or all."},
    {sizeof(ept_setting), EPT_SETTING_STRING, "interface", "", 0, 0,
     "Devices with commas between (eth0, mlx5_0:1), as UCX_NET_DEVICES; empty: that, or all."},
    {sizeof(ept_setting), EPT_SETTING_STRING, "write", "rendezvous", 0, 0,
     "How a long payload goes: rendezvous (UCX moves it once the target has checked the key), put (an RDMA write, a "
     "flush, a message), message (inside the message)."},
    {sizeof(ept_setting), EPT_SETTING_INT, "rendezvous", "32768", 1, 1 << 30,
     "Bytes from which on a payload is long; shorter ones go inside the message."},
    {sizeof(ept_setting), EPT_SETTING_INT, "tx_depth", "1024", 1, 65536,
     "Operations in flight before post says LATER."},
    {sizeof(ept_setting), EPT_SETTING_INT, "max_message", "67108864", 4096, 1 << 30,
     "Bytes of one operation; longer writes are cut."},
    {sizeof(ept_setting), EPT_SETTING_INT, "max_regions", "1048576", 1, INT32_MAX,
     "Exports that may be valid at a time."},
};
const size_t kSettingCount = sizeof kSettings / sizeof *kSettings;

namespace {

// Where a payload goes inside the message UCX puts it together in a buffer first: pieces of this keep that in the
// cache.
constexpr uint64_t kMostMessage = 1 << 18;

}  // namespace

int32_t read_settings(const ept_value *values, size_t count, Settings *settings) {
  plugin::Values given("ucx", {kSettings, kSettingCount}, values, count);
  settings->library = given.text("library");
  settings->transports = given.text("transports");
  settings->interface = given.text("interface");
  settings->rendezvous = static_cast<uint64_t>(given.number("rendezvous"));
  settings->tx_depth = given.small("tx_depth");
  settings->max_message = static_cast<uint64_t>(given.number("max_message"));
  settings->max_regions = given.small("max_regions");
  int32_t code = given.code();
  const std::string write = given.text("write");
  if (write == "rendezvous")
    settings->write = Write::kRendezvous;
  else if (write == "put")
    settings->write = Write::kPut;
  else if (write == "message")
    settings->write = Write::kMessage;
  else if (code == EPT_OK)
    code =
        fail(EPT_E_CONFIG, "open", -1, 0, "ucx: write is '%s'; it must be rendezvous, put or message", write.c_str());
  if (settings->write == Write::kMessage && settings->max_message > kMostMessage) settings->max_message = kMostMessage;
  return code;
}

}  // namespace ucx
