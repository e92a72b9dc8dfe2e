// SPDX-License-Identifier: Apache-2.0
//
// Which rails a rank opens, of what a library offers that has the cards of a p5 and both of EFA's fabrics for each.
#include <algorithm>
#include <map>
#include <set>

#include "../../plugins/libfabric/null_info.h"
#include "../../plugins/libfabric/providers.h"
#include "pci_machine.h"

namespace {

using namespace pci;
using libfabric::Choice;
using libfabric::Settings;

class Cards final : public libfabric::Library {
 public:
  explicit Cards(const std::vector<std::string> &cards) {
    for (const std::string &card : cards) {
      Nic &nic = nics_[card];
      unsigned domain = 0, bus = 0, device = 0, function = 0;
      CHECK_EQ(sscanf(card.c_str(), "%x:%x:%x.%x", &domain, &bus, &device, &function), 4);
      nic.bus.bus_type = FI_BUS_PCI;
      nic.bus.attr.pci.domain_id = static_cast<uint16_t>(domain);
      nic.bus.attr.pci.bus_id = static_cast<uint8_t>(bus);
      nic.nic.bus_attr = &nic.bus;
    }
  }
  void as_before_efa_direct() { old_ = true; }
  ~Cards() override { CHECK_EQ(infos_, 0); }

  int getinfo(uint32_t, const char *, const char *, uint64_t, const fi_info *hints, fi_info **infos) override {
    *infos = nullptr;
    if (hints == nullptr || strcmp(hints->fabric_attr->prov_name, "efa") != 0) return -FI_ENODATA;
    for (auto &[card, nic] : nics_) {
      if (!old_) add(infos, &nic.nic, "efa-direct", "rdmap" + card + "-direct");
      add(infos, &nic.nic, old_ ? "EFA-fe80::" : "efa", "rdmap" + card + "-rdm");
    }
    return *infos != nullptr ? 0 : -FI_ENODATA;
  }
  void freeinfo(fi_info *info) override {
    while (info != nullptr) {
      fi_info *next = info->next;
      libfabric::null_info::free_one(info);
      --infos_;
      info = next;
    }
  }
  fi_info *dupinfo(const fi_info *from) override {
    ++infos_;
    fi_info *to = libfabric::null_info::duplicate(from);
    if (from != nullptr) to->nic = from->nic;
    return to;
  }
  int fabric(fi_fabric_attr *, fid_fabric **, void *) override { return -FI_ENOSYS; }
  const char *strerror(int) override { return "none"; }
  uint32_t version() override { return FI_VERSION(2, 5); }
  const std::string &path() override { return path_; }

 private:
  struct Nic {
    fid_nic nic{};
    fi_bus_attr bus{};
  };
  void add(fi_info **infos, fid_nic *nic, const char *fabric, const std::string &domain) {
    fi_info *info = dupinfo(nullptr);
    info->caps = FI_MSG | FI_RMA;
    info->mode = FI_CONTEXT2;
    info->nic = nic;
    info->ep_attr->type = FI_EP_RDM;
    info->domain_attr->cq_data_size = 4;
    info->domain_attr->name = strdup(domain.c_str());
    info->fabric_attr->name = strdup(fabric);
    info->fabric_attr->prov_name = strdup("efa");
    while (*infos != nullptr) infos = &(*infos)->next;
    *infos = info;
  }
  std::map<std::string, Nic> nics_;
  std::string path_ = "libfabric.so.1";
  int infos_ = 0;
  bool old_ = false;
};

Settings of_provider(const char *provider) {
  Settings settings;
  settings.provider = provider;
  return settings;
}

// The domains of the rails.
std::vector<std::string> rails(const Machine &machine, const Settings &settings, const std::string &gpu,
                               bool before_efa_direct = false) {
  Choice choice;
  auto library = std::make_shared<Cards>(machine.nics);
  if (before_efa_direct) library->as_before_efa_direct();
  CHECK_EQ(libfabric::choose_rails(library, settings, false, {gpu, machine.sysfs()}, &choice), EPT_OK);
  std::vector<std::string> domains;
  for (const libfabric::Info &info : choice.rails) domains.push_back(info->domain_attr->name);
  return domains;
}

void a_rank_has_a_rail_on_each_near_nic() {
  check::running("near the GPU");
  Machine machine;
  switches(&machine, 8, 4, 1);
  std::set<std::string> taken;
  for (const std::string &gpu : machine.gpus) {
    const auto mine = rails(machine, of_provider("efa"), gpu);
    CHECK_EQ(mine.size(), size_t{4});
    for (size_t nic : machine.near(gpu)) {
      const std::string domain = "rdmap" + machine.nics[nic] + "-rdm";
      CHECK(std::find(mine.begin(), mine.end(), domain) != mine.end());
    }
    taken.insert(mine.begin(), mine.end());
  }
  CHECK_EQ(taken.size(), size_t{32});
  CHECK(rails(machine, of_provider("auto"), machine.gpus[5]) == rails(machine, of_provider("efa"), machine.gpus[5]));
}

void without_a_gpu_all_are_taken() {
  check::running("no GPU");
  Machine machine;
  switches(&machine, 8, 4, 1);
  CHECK_EQ(rails(machine, of_provider("efa"), "").size(), size_t{32});
}

void settings_come_first() {
  check::running("settings");
  Machine machine;
  switches(&machine, 8, 4, 1);
  const std::string far = "rdmap" + machine.nics[31] + "-rdm";
  Settings named = of_provider("efa");
  named.interface = far;
  CHECK(rails(machine, named, machine.gpus[0]) == (std::vector<std::string>{far}));
  Settings fewer = of_provider("efa");
  fewer.rails = 2;
  CHECK_EQ(rails(machine, fewer, machine.gpus[0]).size(), size_t{2});
}

void efa_direct_is_a_fabric_of_its_own() {
  check::running("efa-direct");
  Machine machine;
  switches(&machine, 8, 2, 1);
  const auto mine = rails(machine, of_provider("efa-direct"), machine.gpus[3]);
  CHECK_EQ(mine.size(), size_t{2});
  for (const std::string &domain : mine) CHECK_HAS(domain, "-direct");
}

void old_releases_name_the_fabric_by_its_subnet() {
  check::running("EFA-fe80::");
  Machine machine;
  switches(&machine, 8, 4, 1);
  CHECK_EQ(rails(machine, of_provider("efa"), machine.gpus[3], true).size(), size_t{4});
}

}  // namespace

int main() {
  a_rank_has_a_rail_on_each_near_nic();
  without_a_gpu_all_are_taken();
  settings_come_first();
  efa_direct_is_a_fabric_of_its_own();
  old_releases_name_the_fabric_by_its_subnet();
  return 0;
}
