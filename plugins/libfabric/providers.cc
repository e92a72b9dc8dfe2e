// SPDX-License-Identifier: Apache-2.0
#include "providers.h"

#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>

#include <algorithm>
#include <cstring>
#include <set>

#include "placement.h"

namespace libfabric {
namespace {

const Traits kTraits[] = {
    {"efa", "efa", "efa", true, true, true, true, true, 15000, 12500000000, 500, UINT32_MAX},
    {"efa-direct", "efa", "efa-direct", true, true, true, true, true, 14000, 12500000000, 400, UINT32_MAX},
    {"verbs", "verbs;ofi_rxm", nullptr, true, false, true, false, true, 2500, 12500000000, 300, UINT32_MAX},
    {"tcp", "tcp", nullptr, false, false, false, false, true, 5000, 4000000000, 1500, UINT32_MAX},
    {"net", "net", nullptr, false, false, false, false, true, 5000, 4000000000, 1500, UINT32_MAX},
    {"shm", "shm", nullptr, false, false, false, false, false, 400, 7000000000, 200, 255},  // SMR_MAX_PEERS is 256
    {"udp;ofi_rxd", "udp;ofi_rxd", nullptr, false, false, false, false, true, 10000, 500000000, 3000, UINT32_MAX},
    {"sockets", "sockets", nullptr, false, false, false, false, true, 20000, 2000000000, 5000, UINT32_MAX},
};

// Where conformance was seen to pass, but for what is waived. shm of 2.x ends the process now and then, when two
// endpoints get to know each other (it takes a command whose address the other one made of a mapping that was not there
// yet), and lets wrong keys through. The others were never tried.
bool is_proven(const std::string &setting, uint32_t version) {
  if (setting == "shm") return FI_MAJOR(version) < 2;
  for (const char *proven : {"efa", "efa-direct", "tcp"})
    if (setting == proven) return true;
  return false;
}

// In `auto`, in this order.
const char *const kAutomatic[] = {"efa", "tcp"};

constexpr uint64_t kModes = FI_CONTEXT | FI_CONTEXT2 | FI_RX_CQ_DATA;
constexpr int kMemoryModes =
    FI_MR_LOCAL | FI_MR_VIRT_ADDR | FI_MR_ALLOCATED | FI_MR_PROV_KEY | FI_MR_ENDPOINT | FI_MR_RAW;

std::vector<std::string> split(const std::string &list) {
  std::vector<std::string> parts;
  for (size_t at = 0; at <= list.size();) {
    size_t end = std::min(list.find(',', at), list.size());
    if (end > at) parts.push_back(list.substr(at, end - at));
    at = end + 1;
  }
  return parts;
}

// A single-character edit or two apart: "ofi_rdx" for "ofi_rxd".
size_t distance(const std::string &a, const std::string &b) {
  std::vector<size_t> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t corner = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      size_t change = corner + (a[i - 1] != b[j - 1]);
      corner = row[j];
      row[j] = std::min({change, row[j] + 1, row[j - 1] + 1});
    }
  }
  return row[b.size()];
}

std::set<std::string> providers_here(Library &library) {
  std::set<std::string> names;
  fi_info *infos = nullptr;
  if (library.getinfo(kApi, nullptr, nullptr, FI_PROV_ATTR_ONLY, nullptr, &infos) != 0) return names;
  for (fi_info *info = infos; info != nullptr; info = info->next)
    if (info->fabric_attr != nullptr && info->fabric_attr->prov_name != nullptr)
      names.insert(info->fabric_attr->prov_name);
  library.freeinfo(infos);
  return names;
}

bool is_known(const std::string &setting, const std::set<std::string> &here) {
  for (const Traits &traits : kTraits)
    if (setting == traits.setting) return true;
  size_t layer = setting.find(';');
  return here.count(setting) != 0 || (layer != std::string::npos && here.count(setting.substr(0, layer)) != 0 &&
                                      here.count(setting.substr(layer + 1)) != 0);
}

std::string listed(const std::set<std::string> &names) {
  std::string list;
  for (const std::string &name : names)
    if (name.compare(0, 9, "ofi_hook_") != 0) list += (list.empty() ? "" : ", ") + name;
  return list;
}

int32_t unknown_provider(const std::string &setting, const std::set<std::string> &here) {
  std::set<std::string> names = here;
  for (const Traits &traits : kTraits) names.insert(traits.setting);
  std::string nearest;
  for (const std::string &name : names)
    if (nearest.empty() || distance(setting, name) < distance(setting, nearest)) nearest = name;
  return fail(EPT_E_CONFIG, "open", -1, 0,
              "libfabric: there is no provider '%s'; did you mean %s? (this library has %s)", setting.c_str(),
              nearest.c_str(), listed(here).c_str());
}

Info make_hints(const std::shared_ptr<Library> &library, const Traits &traits, bool delivery, bool gpu) {
  Info hints(library, library->dupinfo(nullptr));
  fi_info *info = hints.get();
  if (info == nullptr) throw std::bad_alloc();
  // FI_RMA_EVENT is not asked for: remote CQ data comes without, and EFA does not know it.
  info->caps = FI_MSG | FI_RMA | (gpu ? FI_HMEM : 0);
  info->mode = kModes;
  info->ep_attr->type = FI_EP_RDM;
  info->domain_attr->mr_mode = kMemoryModes | (gpu ? FI_MR_HMEM : 0);
  info->domain_attr->threading = FI_THREAD_DOMAIN;  // the engine makes all calls of an instance one at a time
  info->domain_attr->control_progress = FI_PROGRESS_MANUAL;
  info->domain_attr->data_progress = FI_PROGRESS_MANUAL;
  info->domain_attr->av_type = FI_AV_TABLE;
  info->domain_attr->cq_data_size = 4;
  info->tx_attr->op_flags = FI_COMPLETION | (delivery ? FI_DELIVERY_COMPLETE : 0);
  info->fabric_attr->prov_name = strdup(traits.provider.c_str());
  return hints;
}

// "tcp;ofi_rxm" is what tcp is in 1.17, and what it is not in 2.x, where both are offered.
bool fits(const fi_info *info, const Traits &traits) {
  if (info->ep_attr->type != FI_EP_RDM || info->domain_attr->cq_data_size < 4) return false;
  if ((info->caps & (FI_MSG | FI_RMA)) != (FI_MSG | FI_RMA) || (info->mode & ~kModes) != 0) return false;
  // Releases that know no efa-direct name efa's fabric by its subnet: "EFA-fe80::".
  const char *fabric = info->fabric_attr->name;
  if (traits.setting == "efa" && strncmp(fabric, "EFA-", 4) == 0) return true;
  return traits.fabric == nullptr || strcmp(fabric, traits.fabric) == 0;
}

bool is_loopback(const fi_info *info) {
  return strcmp(info->domain_attr->name, "lo") == 0 || strncmp(info->fabric_attr->name, "127.", 4) == 0;
}

// 0: take it, if any.
int rank_of(const fi_info *info) { return (is_loopback(info) ? 2 : 0) + (info->addr_format == FI_SOCKADDR_IN6); }

}  // namespace

Traits traits_of(const std::string &text) {
  for (const Traits &traits : kTraits)
    if (text == traits.setting) return traits;
  return {text, text, nullptr, false, false, false, false, true, 20000, 1000000000, 3000, UINT32_MAX};
}

uint32_t waived_by(const Traits &traits, const char **why) {
  *why = nullptr;
  if (traits.revokes) return 0;
  *why = traits.setting == "shm"
             ? "provider shm never answers a write with a wrong key, which keeps its credits, or checks none (2.x); so "
               "keys can't be taken back and a refused write doesn't fail"
             : "this provider of libfabric writes on into memory whose key was closed amid a payload, and a write with "
               "a wrong key ends the connection that others use: keys can't be taken back at once, a refused write "
               "costs its neighbours";
  return 1u << 9 | 1u << 10 | 1u << 11 | 1u << 12;
}

int32_t choose_rails(const std::shared_ptr<Library> &library, const Settings &settings, bool gpu, const Place &place,
                     Choice *choice) {
  std::vector<std::string> wanted = {settings.provider};
  if (settings.provider == "auto") wanted.assign(std::begin(kAutomatic), std::end(kAutomatic));
  std::string refusals;
  for (const std::string &setting : wanted) {
    if (!settings.unproven && !is_proven(setting, library->version()) && is_known(setting, providers_here(*library))) {
      choice->mend = "EPT_LIBFABRIC_UNPROVEN=1, at your risk, or another EPT_LIBFABRIC_PROVIDER";
      return fail(EPT_E_UNAVAILABLE, "open", -1, 0,
                  "libfabric: the contract has not been seen to hold over provider %s of libfabric %u.%u; "
                  "EPT_LIBFABRIC_UNPROVEN=1 uses it all the same",
                  setting.c_str(), FI_MAJOR(library->version()), FI_MINOR(library->version()));
    }
    Traits traits = traits_of(setting);
    bool delivery = settings.completion == Completion::kDelivery ||
                    (settings.completion == Completion::kAuto && !traits.card_acknowledges);
    fi_info *infos = nullptr;
    int status = -FI_ENODATA;
    bool with_gpu = gpu;
    for (bool use_gpu : {gpu, false}) {
      Info hints = make_hints(library, traits, delivery, use_gpu);
      status = library->getinfo(kApi, nullptr, nullptr, 0, hints.get(), &infos);
      with_gpu = use_gpu;
      if (status == 0 || !gpu) break;
    }
    if (status != 0) {
      refusals += (refusals.empty() ? "" : "; ") + setting + ": " + library->strerror(-status);
      continue;
    }
    Info all(library, infos);
    std::vector<fi_info *> found;
    std::set<std::string> names;
    for (fi_info *info = infos; info != nullptr; info = info->next) {
      if (!fits(info, traits)) continue;
      // The first of a domain is the one that the provider prefers.
      std::string name = info->domain_attr->name;
      if (names.insert(name + (info->addr_format == FI_SOCKADDR_IN6 ? " 6" : "")).second) found.push_back(info);
    }
    std::vector<std::string> interfaces = split(settings.interface);
    if (!interfaces.empty()) {
      std::vector<fi_info *> named;
      for (const std::string &interface : interfaces) {
        size_t before = named.size();
        for (fi_info *info : found)
          if (interface == info->domain_attr->name && (named.size() == before)) named.push_back(info);
        if (named.size() == before) {
          std::string list;
          for (fi_info *info : found)
            if (list.find(info->domain_attr->name) == std::string::npos)
              list += (list.empty() ? "" : ", ") + std::string(info->domain_attr->name);
          choice->mend = "correct EPT_LIBFABRIC_INTERFACE";
          return fail(EPT_E_CONFIG, "open", -1, 0, "libfabric: provider %s has no domain '%s'; it has %s",
                      setting.c_str(), interface.c_str(), list.c_str());
        }
      }
      found = named;
    } else if (!traits.nic && !found.empty()) {
      std::stable_sort(found.begin(), found.end(),
                       [](const fi_info *a, const fi_info *b) { return rank_of(a) < rank_of(b); });
      found.erase(found.begin() + 1, found.end());
    } else {
      keep_near(&found, place.gpu, place.sysfs);
    }
    if (found.empty()) {
      refusals += (refusals.empty() ? "" : "; ") + setting + ": none of what it offers has RDM endpoints with writes" +
                  (traits.fabric != nullptr ? std::string(" on the fabric ") + traits.fabric : "");
      continue;
    }
    size_t rails = settings.rails != 0 ? settings.rails : std::min<size_t>(found.size(), kMaxRails);
    for (size_t i = 0; i < rails; ++i) {
      choice->rails.emplace_back(library, library->dupinfo(found[i % found.size()]));
      if (choice->rails.back().get() == nullptr) throw std::bad_alloc();
    }
    choice->setting = setting;
    choice->traits = traits;
    choice->delivery = delivery;
    choice->gpu = with_gpu;
    return EPT_OK;
  }
  std::set<std::string> here = providers_here(*library);
  if (settings.provider != "auto" && !is_known(settings.provider, here)) {
    choice->mend = "correct EPT_LIBFABRIC_PROVIDER";
    return unknown_provider(settings.provider, here);
  }
  choice->mend = "eptransport doctor says what each provider needs";
  return fail(EPT_E_UNAVAILABLE, "open", -1, 0, "libfabric: no provider can be used here (%s); this library has %s",
              refusals.c_str(), listed(here).c_str());
}

}  // namespace libfabric
