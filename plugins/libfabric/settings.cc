// SPDX-License-Identifier: Apache-2.0
#include "settings.h"

#include "../values.h"

namespace libfabric {

const ept_setting kSettings[] = {
    {sizeof(ept_setting), EPT_SETTING_STRING, "provider", "auto", 0, 0,
     "libfabric's provider: efa, efa-direct, verbs, tcp, net, shm, udp;ofi_rxd or another that fi_info lists; auto: "
     "efa "
     "where there is such a card, else tcp."},
    {sizeof(ept_setting), EPT_SETTING_STRING, "library", "", 0, 0,
     "The file of libfabric.so.1; empty: one that is mapped already, AWS's in /opt/amazon/efa, the system's."},
    {sizeof(ept_setting), EPT_SETTING_STRING, "interface", "", 0, 0,
     "Domains to use (fi_info prints them: eth0, rdmap0s6-rdm), with commas between; empty: NICs near this process, or "
     "the first interface that is not the loopback."},
    {sizeof(ept_setting), EPT_SETTING_INT, "rails", "0", 0, kMaxRails,
     "Endpoints, each a rail; 0: one for each NIC, one in all where the provider is no NIC."},
    {sizeof(ept_setting), EPT_SETTING_INT, "tx_depth", "0", 0, 65536,
     "Operations in flight on a rail before post says LATER; 0: what the provider offers."},
    {sizeof(ept_setting), EPT_SETTING_INT, "cq_depth", "0", 0, 1 << 22,
     "Entries of a rail's completion queue; 0: room for the credits of all ranks."},
    {sizeof(ept_setting), EPT_SETTING_INT, "max_message", "67108864", 4096, 1 << 30,
     "Bytes of one operation; longer writes are cut."},
    {sizeof(ept_setting), EPT_SETTING_INT, "max_regions", "1048576", 1, INT32_MAX,
     "Exports that may be valid at a time."},
    {sizeof(ept_setting), EPT_SETTING_STRING, "completion", "auto", 0, 0,
     "When an operation is complete: transmit (its source may be reused), delivery (its bytes are at the target), auto "
     "(delivery where only that tells of a refused write)."},
    {sizeof(ept_setting), EPT_SETTING_STRING, "gpu", "auto", 0, 0,
     "Whether libfabric may touch GPUs: 1, 0, or auto (if this process has a CUDA context when the backend opens)."},
    {sizeof(ept_setting), EPT_SETTING_STRING, "strict", "", 0, 0,
     "SEED or SEED:name=value,...: a network that is stricter than EFA, between this backend and libfabric; empty: "
     "off. "
     "For tests."},
    {sizeof(ept_setting), EPT_SETTING_BOOL, "unproven", "0", 0, 0,
     "1: providers may be used over which the contract was never seen to hold, or was seen to break "
     "(docs/backends/libfabric.md lists them)."},
};
const size_t kSettingCount = sizeof kSettings / sizeof *kSettings;

int32_t read_settings(const ept_value *values, size_t count, Settings *settings) {
  plugin::Values given("libfabric", {kSettings, kSettingCount}, values, count);
  settings->library = given.text("library");
  settings->provider = given.text("provider");
  settings->interface = given.text("interface");
  settings->rails = given.small("rails");
  settings->tx_depth = given.small("tx_depth");
  settings->cq_depth = given.small("cq_depth");
  settings->max_message = static_cast<uint64_t>(given.number("max_message"));
  settings->max_regions = given.small("max_regions");
  settings->gpu = given.text("gpu");
  settings->strict = given.text("strict");
  settings->unproven = given.flag("unproven");
  int32_t code = given.code();
  std::string completion = given.text("completion");
  if (completion == "auto")
    settings->completion = Completion::kAuto;
  else if (completion == "transmit")
    settings->completion = Completion::kTransmit;
  else if (completion == "delivery")
    settings->completion = Completion::kDelivery;
  else if (code == EPT_OK)
    code = fail(EPT_E_CONFIG, "open", -1, 0, "libfabric: completion is '%s'; it must be auto, transmit or delivery",
                completion.c_str());
  if (code == EPT_OK && settings->gpu != "auto" && settings->gpu != "0" && settings->gpu != "1")
    code = fail(EPT_E_CONFIG, "open", -1, 0, "libfabric: gpu is '%s'; it must be auto, 0 or 1", settings->gpu.c_str());
  return code;
}

}  // namespace libfabric
