// SPDX-License-Identifier: Apache-2.0
// The libfabric backend: AWS EFA by a host proxy, and every other provider that libfabric has.
// docs/backends/libfabric.md says how to run it; instance.h says which file does what. This one holds the limits and,
// at the end, the table.
#include <sys/epoll.h>
#include <sys/timerfd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "../checks.h"
#include "../near.h"
#include "../table.h"
#include "burial.h"
#include "host.h"
#include "instance.h"
#include "placement.h"
#include "registration.h"

using namespace libfabric;

namespace {

constexpr const char *kPluginVersion = "1";
// For what was said last to leave before the endpoint is closed under it.
constexpr uint64_t kFarewellNs = 50000000;
// What an endpoint of provider shm takes of /dev/shm: 16 MiB in 1.17, 13 in 2.5.
constexpr uint64_t kShmEndpoint = 16 << 20;

void fill_caps(const Choice &choice, uint32_t version, uint64_t max_message, bool own_keys, bool wait, ept_caps *caps) {
  const uint32_t size = caps->size;
  *caps = ept_caps{};
  caps->size = size;
  caps->memory_kinds = memory_kinds(choice.gpu, version);
  caps->max_message = max_message;
  caps->max_send = kMaxSend;
  caps->max_iov = 1;
  caps->immediate_bits = 32;
  // A card's own keys are 32 bits and not drawn at random.
  caps->protection = own_keys ? EPT_PROTECTION_KEY : EPT_PROTECTION_REGION;
  caps->wait_descriptor = wait;
  caps->can_revoke = choice.traits.revokes;
  caps->operation_cost_ns = choice.traits.operation_cost_ns;
  caps->waived = waived_by(choice.traits, &caps->waived_why);
}

// EPT_LIBFABRIC_STRICT: strict.h between us and the library. `salt`: another schedule for each rank and epoch.
int32_t make_stricter(const ept_host *host, const Settings &settings, uint64_t salt, std::shared_ptr<Library> *library,
                      std::shared_ptr<StrictReport> *report) {
  if (settings.strict.empty()) return EPT_OK;
  StrictOptions options;
  const std::string wrong = parse_strict(settings.strict, &options);
  if (!wrong.empty()) return fail(EPT_E_CONFIG, "open", -1, 0, "libfabric: %s", wrong.c_str());
  options.salt = salt;
  options.say = [host](const std::string &text) {
    host->log(host->context, EPT_LOG_WARNING, ("libfabric: " + text).c_str());
  };
  // The last who holds the report writes it down: that is after the endpoints.
  *report = std::shared_ptr<StrictReport>(options.report.get(), [options, salt](const StrictReport *done) {
    const std::string words = done->words();
    const bool told = !options.report_to.empty() && words != "nothing";  // a probe does nothing
    FILE *file = told ? fopen(options.report_to.c_str(), "a") : nullptr;
    if (file == nullptr) return;
    fprintf(file, "rank %llu: %s\n", static_cast<unsigned long long>(salt >> 32), words.c_str());
    fclose(file);
  });
  *library = make_strict(std::move(*library), options);
  return EPT_OK;
}

// Settings, library and rails: all that probe and open have in common.
int32_t choose(const ept_host *host, const ept_value *values, size_t count, uint32_t world, uint64_t salt,
               Settings *settings, std::shared_ptr<Library> *library, std::shared_ptr<StrictReport> *report,
               Choice *choice) {
  int32_t code = read_settings(values, count, settings);
  if (code != EPT_OK) {
    choice->mend = "correct that setting";
    return code;
  }
  const bool gpu = wants_gpu(*host, *settings);
  prepare_environment(gpu, settings->provider, world);
  plugin::Refusal refusal;
  *library = open_library(settings->library, &refusal);
  if (*library == nullptr) {
    choice->mend = refusal.mend;
    return fail(EPT_E_UNAVAILABLE, "open", -1, 0, "libfabric: %s", refusal.why.c_str());
  }
  code = make_stricter(host, *settings, salt, library, report);
  if (code != EPT_OK) {
    choice->mend = "correct EPT_LIBFABRIC_STRICT";
    return code;
  }
  code = choose_rails(*library, *settings, gpu, {plugin::gpu_of(*host), "/sys"}, choice);
  if (code == EPT_OK && choice->setting == "shm") {
    choice->traits.loses_empty_delivery = FI_MAJOR((*library)->version()) < 2;
    const uint64_t room = shared_memory_room(), wanted = kShmEndpoint * choice->rails.size();
    if (room < wanted) {
      choice->mend = "docker run --shm-size=1g, or remove what dead processes left in /dev/shm";
      return fail(
          EPT_E_UNAVAILABLE, "open", -1, 0,
          "libfabric: %zu endpoints of provider shm take %llu MiB of /dev/shm, which has %llu MiB free; it would "
          "end the process when that is full",
          choice->rails.size(), static_cast<unsigned long long>(wanted >> 20),
          static_cast<unsigned long long>(room >> 20));
    }
  }
  return code;
}

std::string release_of(Library &library) {
  return format("libfabric %u.%u", FI_MAJOR(library.version()), FI_MINOR(library.version()));
}

// ---- opening --------------------------------------------------------------------------------------------------------

int32_t libfabric_probe(const ept_host *host, const ept_value *values, size_t value_count, ept_probe *report) {
  return guarded("probe", [&]() -> int32_t {
    report->summary[0] = report->mend[0] = 0;
    Settings settings;
    std::shared_ptr<Library> library;
    Choice choice;
    choice.traits = traits_of("tcp");
    std::shared_ptr<StrictReport> strict;
    int32_t code = choose(host, values, value_count, 0, 0, &settings, &library, &strict, &choice);
    fill_caps(choice, library != nullptr ? library->version() : 0, std::max<uint64_t>(settings.max_message, 4096), true,
              false, &report->caps);
    if (code != EPT_OK) {
      snprintf(report->summary, sizeof report->summary, "%.255s", last_error().text);
      snprintf(report->mend, sizeof report->mend, "%.255s", choice.mend.c_str());
      return code;
    }
    const fi_info *info = choice.rails.front().get();
    if ((info->domain_attr->mr_mode & FI_MR_PROV_KEY) != 0) report->caps.protection = EPT_PROTECTION_REGION;
    snprintf(report->summary, sizeof report->summary, "%s (%.100s): provider %.40s, %zu rail%s over %.60s",
             release_of(*library).c_str(), library->path().c_str(), info->fabric_attr->prov_name, choice.rails.size(),
             choice.rails.size() == 1 ? "" : "s", info->domain_attr->name);
    return EPT_OK;
  });
}

// One descriptor to sleep on for all rails and for what is due by the clock.
int32_t make_wait(ept_instance *instance) {
  instance->epoll.reset(epoll_create1(EPOLL_CLOEXEC));
  instance->timer.reset(timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC));
  if (!instance->epoll || !instance->timer)
    return fail(EPT_E_NOMEM, "open", -1, errno, "libfabric: the system refused a descriptor (errno %d)", errno);
  epoll_event event{};
  event.events = EPOLLIN;
  const bool timed = epoll_ctl(instance->epoll.get(), EPOLL_CTL_ADD, instance->timer.get(), &event) == 0;
  instance->has_wait = timed && instance->watch_rails();
  instance->unwatch_rails();
  return EPT_OK;
}

int32_t libfabric_open(const ept_host *host, const ept_open_params *params, ept_instance **result) {
  *result = nullptr;
  return guarded("open", [&]() -> int32_t {
    int32_t code = plugin::check_open("libfabric", *params);
    if (code != EPT_OK) return code;
    auto instance = std::make_unique<ept_instance>();
    instance->host = host;
    instance->params = *params;
    Choice choice;
    code =
        choose(host, params->values, params->value_count, params->world, uint64_t{params->rank} << 32 | params->epoch,
               &instance->settings, &instance->library, &instance->strict, &choice);
    if (code != EPT_OK) return code;
    instance->choice = std::move(choice);
    instance->traits = instance->choice.traits;
    if (instance->choice.setting == "shm") {
      instance->buried = true;
      shm_opened();
    }
    if (params->world > instance->traits.max_peers)
      return fail(EPT_E_LIMIT, "open", params->rank, 0,
                  "libfabric: provider %s takes %u ranks at most, the world is %u", instance->traits.setting.c_str(),
                  instance->traits.max_peers, params->world);
    const Room room{std::max(1u, params->world - 1), params->credits, params->send_credits};
    instance->credentials = plugin::make_credentials("libfabric", host, *params);
    instance->max_message = instance->settings.max_message;
    Address &own = instance->own;
    for (Info &info : instance->choice.rails) {
      instance->rails.push_back(std::make_unique<Rail>());
      Rail *rail = instance->rails.back().get();
      rail->number = static_cast<uint32_t>(instance->rails.size() - 1);
      code = open_rail(*instance->library, instance->settings, room, std::move(info), instance->traits, rail);
      if (code != EPT_OK) return code;
      instance->max_message = std::min(instance->max_message, rail->max_message);
      instance->traits.revokes = instance->traits.revokes && rail->traits.revokes;
      own.rails.push_back(rail->address);
    }
    instance->choice.traits = instance->traits;
    instance->peers.resize(params->world);
    instance->worker.instance = instance.get();
    own.rank = params->rank;
    own.epoch = params->epoch;
    own.nonce = instance->credentials.nonce;
    own.host = this_host(*host);
    own.provider = instance->rails.front()->info->fabric_attr->prov_name;
    instance->layered = own.provider.find(";ofi_rxm") != std::string::npos;
    code = make_wait(instance.get());
    if (code != EPT_OK) return code;
    instance->log(EPT_LOG_DEBUG,
                  format("libfabric: rank %u opened %zu rails of %s, %s", params->rank, instance->rails.size(),
                         own.provider.c_str(), release_of(*instance->library).c_str()));
    *result = instance.release();
    return EPT_OK;
  });
}

void libfabric_close(ept_instance *instance) {
  instance->farewell(kFarewellNs);
  instance->exports.clear();
  delete instance;
}

int32_t libfabric_caps(ept_instance *instance, ept_caps *caps) {
  const bool own_keys =
      std::all_of(instance->rails.begin(), instance->rails.end(), [](const auto &rail) { return rail->own_keys; });
  fill_caps(instance->choice, instance->library->version(), instance->max_message, own_keys, instance->has_wait, caps);
  return EPT_OK;
}

int32_t libfabric_rails(ept_instance *instance, ept_rail *rails, uint32_t capacity, uint32_t *count) {
  return guarded("rails", [&] {
    *count = static_cast<uint32_t>(instance->rails.size());
    for (uint32_t i = 0; i < std::min(capacity, *count); ++i) {
      const Rail &own = *instance->rails[i];
      const fi_info *info = own.info.get();
      ept_rail &rail = rails[i];
      const uint32_t size = rail.size;
      rail = ept_rail{};
      rail.size = size;
      rail.numa = -1;
      snprintf(rail.name, sizeof rail.name, "%.50s/%u", info->domain_attr->name, i);
      snprintf(rail.fabric, sizeof rail.fabric, "%.31s", info->fabric_attr->prov_name);
      if (info->nic != nullptr && info->nic->bus_attr != nullptr && info->nic->bus_attr->bus_type == FI_BUS_PCI) {
        const auto &pci = info->nic->bus_attr->attr.pci;
        snprintf(rail.pci, sizeof rail.pci, "%04x:%02x:%02x.%x", pci.domain_id, pci.bus_id, pci.device_id,
                 pci.function_id);
        rail.numa = numa_of(rail.pci);
      }
      if (info->nic != nullptr && info->nic->link_attr != nullptr) rail.bits_per_s = info->nic->link_attr->speed;
      rail.port = i;
      rail.max_regions = instance->settings.max_regions;
      rail.max_peers = instance->traits.max_peers;
      rail.cq_depth = own.cq_depth;
      rail.tx_depth = own.tx_depth;
    }
    return static_cast<int32_t>(EPT_OK);
  });
}

int32_t libfabric_local_address(ept_instance *instance, void *blob, size_t *length) {
  return guarded("local_address", [&]() -> int32_t {
    std::vector<uint8_t> bytes = encode(instance->own);
    return plugin::give_blob("libfabric", "local_address", bytes.data(), bytes.size(), blob, length);
  });
}

int32_t libfabric_reach(ept_instance *instance, const void *address, size_t length, ept_reach *reach) {
  return guarded("reach", [&] {
    const uint32_t size = reach->size;
    *reach = ept_reach{};
    reach->size = size;
    Address peer;
    int32_t code = decode(address, length, &peer);
    if (code == EPT_OK && peer.provider != instance->own.provider)
      code = fail(EPT_E_MISMATCH, "reach", peer.rank, 0, "libfabric: rank %u uses provider %s, this one %s", peer.rank,
                  peer.provider.c_str(), instance->own.provider.c_str());
    if (code == EPT_OK && instance->own.provider == "shm" && peer.host != instance->own.host)
      code =
          fail(EPT_E_UNAVAILABLE, "reach", peer.rank, 0,
               "libfabric: rank %u is on another machine or in another container, where shm does not reach", peer.rank);
    if (code != EPT_OK) {
      snprintf(reach->why_not, sizeof reach->why_not, "%.255s", last_error().text);
      return code;
    }
    reach->latency_ns = instance->traits.latency_ns;
    reach->bytes_per_s = instance->traits.bytes_per_s * instance->rails.size();
    reach->operation_cost_ns = instance->traits.operation_cost_ns;
    return code;
  });
}

// ---- the rest of the table: ../table.h, instance.h says where its methods are --------------------------------------

using Calls = plugin::Calls<ept_instance, ept_mem, ept_worker>;

void libfabric_region_drop(ept_region *region) { delete region; }

int32_t libfabric_counters(ept_worker *worker, uint32_t rail, ept_rail_counters *counters) {
  const auto &rails = worker->instance->rails;
  if (rail >= rails.size())
    return fail(EPT_E_INVALID, "counters", -1, 0, "libfabric: rail %u, there are %zu", rail, rails.size());
  return plugin::give_counters(rails[rail]->counters, counters);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const ept_backend ept_backend_v1 = {
    .size = sizeof(ept_backend),
    .abi = EPT_BACKEND_ABI,
    .name = "libfabric",
    .version = kPluginVersion,
    .settings = kSettings,
    .setting_count = kSettingCount,
    .probe = libfabric_probe,
    .open = libfabric_open,
    .close = libfabric_close,
    .caps = libfabric_caps,
    .rails = libfabric_rails,
    .local_address = libfabric_local_address,
    .reach = libfabric_reach,
    .join = nullptr,  // peers meet one by one
    .peer_open = Calls::peer_open,
    .peer_state = Calls::peer_state,
    .peer_close = Calls::peer_close,
    .peer_fence = Calls::peer_fence,
    .worker_open = Calls::worker_open,
    .worker_close = Calls::worker_close,
    .mem_alloc = nullptr,  // any memory that the provider can register will do
    .mem_free = nullptr,
    .mem_register = Calls::mem_register,
    .mem_deregister = Calls::mem_deregister,
    .region_export = Calls::region_export,
    .region_revoke = Calls::region_revoke,
    .region_import = Calls::region_import,
    .region_drop = libfabric_region_drop,
    .region_map = nullptr,  // a peer's memory is never in this address space
    .signal_export = nullptr,
    .signal_import = nullptr,
    .post = Calls::post,
    .poll = Calls::poll,
    .arm = Calls::arm,
    .visible = nullptr,  // a completion with remote data comes after the bytes
    .quiesce = Calls::quiesce,
    .device_open = nullptr,  // kernels reach these networks by the proxy
    .device_peer = nullptr,
    .device_region = nullptr,
    .device_signal = nullptr,
    .device_image = nullptr,
    .device_module = nullptr,
    .query = Calls::query,
    .counters = libfabric_counters,
    .last_error = Calls::last_error,
};
