// SPDX-License-Identifier: Apache-2.0
// The UCX backend: whatever transports UCX has, from shared memory to InfiniBand, by active messages.
// docs/backends/ucx.md says when to take it; instance.h says which file does what. This one holds the limits and, at
// the end, the table.
#include <sys/epoll.h>
#include <sys/timerfd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <system_error>

#include "../checks.h"
#include "../table.h"
#include "instance.h"

using namespace ucx;

namespace {

constexpr const char *kPluginVersion = "1";
constexpr uint64_t kFarewellNs = 50000000;  // for what was said last to leave before the worker is destroyed
// Immediates wait in a queue of ours, which grows: the credits bound it.
constexpr uint32_t kUnread = 1 << 22;
// Estimates of a message over UCX's tcp between two machines; over shared memory it is far less.
constexpr uint32_t kLatencyNs = 10000, kOperationCostNs = 300;
constexpr uint64_t kBytesPerSecond = 3000000000;
constexpr uint64_t kProbeDeadNs = 1000000000;

template <typename Call>
int32_t guarded(const char *operation, Call &&call) {
  return plugin::guarded("ucx", operation, std::forward<Call>(call));
}

void fill_caps(const Settings &settings, uint32_t memory_kinds, bool wait, ept_caps *caps) {
  const uint32_t size = caps->size;
  *caps = ept_caps{};
  caps->size = size;
  caps->memory_kinds = memory_kinds;
  caps->max_message = settings.max_message;
  caps->max_send = kMaxSend;
  caps->max_iov = 1;
  caps->immediate_bits = 32;
  caps->protection = settings.write == Write::kPut ? EPT_PROTECTION_NONE : EPT_PROTECTION_KEY;
  caps->wait_descriptor = wait;
  caps->can_revoke = settings.write != Write::kPut;
  caps->operation_cost_ns = kOperationCostNs;
  if (settings.write == Write::kRendezvous) {
    caps->waived = 1u << 12;
    caps->waived_why =
        "a key that is taken back while a payload comes in under it by rendezvous ends the link to that peer; "
        "EPT_UCX_WRITE=message keeps all clauses";
  } else if (settings.write == Write::kPut) {
    caps->waived = 1u << 9 | 1u << 10 | 1u << 11 | 1u << 12;
    caps->waived_why =
        "RDMA writes land before anyone looks at a key, and as long as their writer lives; EPT_UCX_WRITE=message keeps "
        "all clauses";
  }
}

// Owners of what UCX hands out, so that every way out of here gives it back.
struct Config {
  const Library *library;
  ucp_config_t *config = nullptr;
  ~Config() {
    if (config != nullptr) library->ucp_config_release(config);
  }
};

// What UCX reads from its own environment, unless it is set already; and only for transports that may be used, since
// UCX warns of a variable that nothing has read. By the environment, for ucp_config_modify of 1.13 knows no settings of
// transports.
void prepare_environment(const std::string &transports) {
  const char *chosen = getenv("UCX_TLS");
  const std::string list =
      "," + (!transports.empty() ? transports : std::string(chosen != nullptr ? chosen : "all")) + ",";
  auto named = [&](const char *name) { return list.find(format(",%s,", name)) != std::string::npos; };
  const bool all = named("all") || list[1] == '^', shared = all || named("sm") || named("shm") || named("mm");
  // Shared memory looks whether a peer is there, but says so only when asked; and an endpoint that is to outlive its
  // peer takes no transport that doesn't.
  if (shared || named("posix")) setenv("UCX_POSIX_ERROR_HANDLING", "y", 0);
  if (shared || named("sysv")) setenv("UCX_SYSV_ERROR_HANDLING", "y", 0);
  if (!all && !named("tcp")) return;
  // Such an endpoint has no zero-copy over tcp: a payload goes in pieces of this length, each copied in and out. With
  // UCX's own 8 KiB to send and 64 KiB to receive 1 MiB takes 1.7 times as long (docs/decisions.md).
  setenv("UCX_TCP_TX_SEG_SIZE", "512k", 0);
  setenv("UCX_TCP_RX_SEG_SIZE", "512k", 0);
}

int32_t make_context(const Library &library, const Settings &settings, uint64_t dead_ns, ucp_context_h *context) {
  prepare_environment(settings.transports);
  Config owner{&library};
  ucs_status_t status = library.ucp_config_read(nullptr, nullptr, &owner.config);
  if (status != UCS_OK)
    return fail(EPT_E_CONFIG, "open", -1, status, "ucx: its settings (UCX_*) can't be read: %s (%d)",
                library.words(status).c_str(), status);
  auto set = [&](const char *name, const std::string &value) {
    if (status == UCS_OK && !value.empty()) status = library.ucp_config_modify(owner.config, name, value.c_str());
  };
  set("TLS", settings.transports);
  set("NET_DEVICES", settings.interface);
  // Over shared memory a peer that died is found by looking alone; twice within the time that the settings promise.
  set("KEEPALIVE_INTERVAL",
      format("%llums", static_cast<unsigned long long>(std::max<uint64_t>(dead_ns / 2000000, 1))));
  if (status != UCS_OK)
    return fail(EPT_E_CONFIG, "open", -1, status, "ucx: a setting is refused: %s (%d)", library.words(status).c_str(),
                status);
  ucp_params_t wanted{};
  wanted.field_mask = UCP_PARAM_FIELD_FEATURES;
  wanted.features = UCP_FEATURE_AM | UCP_FEATURE_WAKEUP;
  if (settings.write == Write::kPut) wanted.features |= UCP_FEATURE_RMA;
  status = library.ucp_init_version(kApiMajor, kApiMinor, &wanted, owner.config, context);
  if (status != UCS_OK)
    return fail(EPT_E_UNAVAILABLE, "open", -1, status,
                "ucx: no context with transports '%s' and devices '%s': %s (%d); `ucx_info -d` lists what this machine "
                "has",
                settings.transports.empty() ? "all" : settings.transports.c_str(),
                settings.interface.empty() ? "all" : settings.interface.c_str(), library.words(status).c_str(), status);
  return EPT_OK;
}

uint32_t kinds_of(const Library &library, ucp_context_h context) {
  ucp_context_attr_t attributes{};
  attributes.field_mask = UCP_ATTR_FIELD_MEMORY_TYPES;
  const bool known = library.ucp_context_query(context, &attributes) == UCS_OK;
  const bool cuda = known && (attributes.memory_types >> UCS_MEMORY_TYPE_CUDA & 1) != 0;
  return EPT_MEMORY_HOST | EPT_MEMORY_PINNED | (cuda ? uint32_t{EPT_MEMORY_CUDA} : 0u);
}

// What this context may use, "tcp/eth0, posix/memory, cma/memory": UCX tells it in no other way than by printing.
std::string resources_of(const Library &library, ucp_context_h context) {
  char *text = nullptr;
  size_t length = 0;
  FILE *memory = open_memstream(&text, &length);
  if (memory == nullptr) return "";
  library.ucp_context_print_info(context, memory);
  fclose(memory);
  std::string list;
  for (const char *line = text; line != nullptr && *line != 0;) {
    const char *end = strchr(line, '\n');
    const std::string row(line, end != nullptr ? end : line + strlen(line));
    // "#      resource 3  :  md 2  dev 3  flags -- posix/memory"
    const size_t name = row.rfind(' ');
    if (row.find(" resource ") != std::string::npos && name != std::string::npos &&
        row.compare(name + 1, 4, "self") != 0)
      list += (list.empty() ? "" : ", ") + row.substr(name + 1);
    line = end != nullptr ? end + 1 : nullptr;
  }
  free(text);
  return list;
}

// Why a card that is here goes unused; empty: it does not, or there is none.
std::string unused_cards(const Library &library, const std::string &resources) {
  std::error_code none;
  if (resources.find("mlx") != std::string::npos || std::filesystem::is_empty("/sys/class/infiniband", none) || none)
    return "";
  const std::filesystem::path modules = std::filesystem::path(library.path).parent_path() / "ucx";
  const bool built = std::filesystem::exists(modules / "libuct_ib.so.0", none) ||
                     std::filesystem::exists(modules / "libuct_ib_mlx5.so.0", none);
  return built ? "; RDMA cards are here and unused: see `ucx_info -d`"
               : "; RDMA cards are here and unused: this build has no libuct_ib (the wheels have none; Debian's has)";
}

std::string release_of(const Library &library) {
  return format("UCX %u.%u.%u", library.major, library.minor, library.release);
}

// ---- opening --------------------------------------------------------------------------------------------------------

int32_t ucx_probe(const ept_host *, const ept_value *values, size_t value_count, ept_probe *report) {
  return guarded("probe", [&]() -> int32_t {
    report->summary[0] = report->mend[0] = 0;
    Settings settings;
    plugin::Refusal refusal;
    std::shared_ptr<const Library> library;
    int32_t code = read_settings(values, value_count, &settings);
    refusal.mend = "correct that setting";
    if (code == EPT_OK) {
      library = open_library(settings.library, &refusal);
      if (library == nullptr) code = fail(EPT_E_UNAVAILABLE, "probe", -1, 0, "ucx: %s", refusal.why.c_str());
    }
    fill_caps(settings, EPT_MEMORY_HOST | EPT_MEMORY_PINNED, true, &report->caps);
    if (code != EPT_OK) {
      snprintf(report->summary, sizeof report->summary, "%.255s", last_error().text);
      snprintf(report->mend, sizeof report->mend, "%.255s", refusal.mend.c_str());
      return code;
    }
    ucp_context_h context = nullptr;
    code = make_context(*library, settings, kProbeDeadNs, &context);
    if (code != EPT_OK) {
      snprintf(report->summary, sizeof report->summary, "%.255s", last_error().text);
      snprintf(report->mend, sizeof report->mend, "correct EPT_UCX_TRANSPORTS, EPT_UCX_INTERFACE, UCX_TLS");
      return code;
    }
    report->caps.memory_kinds = kinds_of(*library, context);
    const std::string resources = resources_of(*library, context);
    library->ucp_cleanup(context);
    snprintf(report->summary, sizeof report->summary, "%s (%.80s): %.90s%.60s", release_of(*library).c_str(),
             library->path.c_str(), resources.c_str(), unused_cards(*library, resources).c_str());
    return EPT_OK;
  });
}

int32_t make_worker(ept_instance *instance) {
  const Library &library = *instance->library;
  ucp_worker_params_t wanted{};
  wanted.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
  wanted.thread_mode = UCS_THREAD_MODE_SERIALIZED;  // one call at a time, from whatever thread
  ucs_status_t status = library.ucp_worker_create(instance->context, &wanted, &instance->ucp);
  if (status != UCS_OK)
    return fail(EPT_E_NOMEM, "open", -1, status, "ucx: no worker: %s (%d)", library.words(status).c_str(), status);
  const int32_t code = instance->set_handlers();
  if (code != EPT_OK) return code;
  ucp_address_t *address = nullptr;
  size_t length = 0;
  status = library.ucp_worker_get_address(instance->ucp, &address, &length);
  if (status == UCS_OK) {
    const auto *bytes = reinterpret_cast<const uint8_t *>(address);
    instance->own.worker.assign(bytes, bytes + length);
    library.ucp_worker_release_address(instance->ucp, address);
    status = library.ucp_worker_get_efd(instance->ucp, &instance->ucp_fd);
  }
  if (status != UCS_OK)
    return fail(EPT_E_UNAVAILABLE, "open", -1, status, "ucx: a worker without address or descriptor: %s (%d)",
                library.words(status).c_str(), status);
  instance->epoll.reset(epoll_create1(EPOLL_CLOEXEC));
  instance->timer.reset(timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC));
  epoll_event event{};
  event.events = EPOLLIN;
  if (!instance->epoll || !instance->timer ||
      epoll_ctl(instance->epoll.get(), EPOLL_CTL_ADD, instance->ucp_fd, &event) != 0 ||
      epoll_ctl(instance->epoll.get(), EPOLL_CTL_ADD, instance->timer.get(), &event) != 0)
    return fail(EPT_E_NOMEM, "open", -1, errno, "ucx: the system refused a descriptor (errno %d)", errno);
  return EPT_OK;
}

int32_t ucx_open(const ept_host *host, const ept_open_params *params, ept_instance **result) {
  *result = nullptr;
  return guarded("open", [&]() -> int32_t {
    int32_t code = plugin::check_open("ucx", *params);
    if (code != EPT_OK) return code;
    auto instance = std::make_unique<ept_instance>();
    instance->host = host;
    instance->params = *params;
    code = read_settings(params->values, params->value_count, &instance->settings);
    if (code != EPT_OK) return code;
    plugin::Refusal refusal;
    instance->library = open_library(instance->settings.library, &refusal);
    if (instance->library == nullptr)
      return fail(EPT_E_UNAVAILABLE, "open", params->rank, 0, "ucx: %s; %s", refusal.why.c_str(), refusal.mend.c_str());
    code = make_context(*instance->library, instance->settings, params->dead_ns, &instance->context);
    if (code != EPT_OK) return code;
    instance->memory_kinds = kinds_of(*instance->library, instance->context);
    instance->credentials = plugin::make_credentials("ucx", host, *params);
    instance->own.rank = params->rank;
    instance->own.epoch = params->epoch;
    instance->own.nonce = instance->credentials.nonce;
    code = make_worker(instance.get());
    if (code != EPT_OK) return code;
    instance->peers.resize(params->world);
    instance->worker.instance = instance.get();
    instance->counters.size = sizeof instance->counters;
    instance->log(EPT_LOG_DEBUG,
                  format("ucx: rank %u opened %s", params->rank, release_of(*instance->library).c_str()));
    *result = instance.release();
    return EPT_OK;
  });
}

void ucx_close(ept_instance *instance) {
  instance->farewell(kFarewellNs);
  delete instance;
}

int32_t ucx_caps(ept_instance *instance, ept_caps *caps) {
  fill_caps(instance->settings, instance->memory_kinds, true, caps);
  return EPT_OK;
}

int32_t ucx_rails(ept_instance *instance, ept_rail *rails, uint32_t capacity, uint32_t *count) {
  *count = 1;  // UCX spreads over devices by itself
  if (capacity == 0) return EPT_OK;
  ept_rail &rail = rails[0];
  const uint32_t size = rail.size;
  rail = ept_rail{};
  rail.size = size;
  rail.numa = -1;
  snprintf(rail.name, sizeof rail.name, "ucx");
  snprintf(rail.fabric, sizeof rail.fabric, "%.31s",
           instance->settings.transports.empty() ? "ucx" : instance->settings.transports.c_str());
  rail.max_regions = instance->settings.max_regions;
  rail.max_peers = UINT32_MAX;
  rail.cq_depth = kUnread;
  rail.tx_depth = instance->settings.tx_depth;
  return EPT_OK;
}

int32_t ucx_local_address(ept_instance *instance, void *blob, size_t *length) {
  return guarded("local_address", [&]() -> int32_t {
    const std::vector<uint8_t> bytes = encode(instance->own);
    if (*length < bytes.size())
      return fail(EPT_E_LIMIT, "local_address", -1, 0,
                  "ucx: this worker's address takes %zu bytes, there is room for %zu; name fewer transports or devices "
                  "(EPT_UCX_TRANSPORTS, EPT_UCX_INTERFACE)",
                  bytes.size(), *length);
    memcpy(blob, bytes.data(), bytes.size());
    *length = bytes.size();
    return EPT_OK;
  });
}

int32_t ucx_reach(ept_instance *, const void *address, size_t length, ept_reach *reach) {
  return guarded("reach", [&] {
    const uint32_t size = reach->size;
    *reach = ept_reach{};
    reach->size = size;
    Address peer;
    const int32_t code = decode(address, length, &peer);
    if (code != EPT_OK) {
      snprintf(reach->why_not, sizeof reach->why_not, "%.255s", last_error().text);
      return code;
    }
    reach->latency_ns = kLatencyNs;
    reach->bytes_per_s = kBytesPerSecond;
    reach->operation_cost_ns = kOperationCostNs;
    return code;
  });
}

// ---- the rest of the table: ../table.h, instance.h says where its methods are --------------------------------------

using Calls = plugin::Calls<ept_instance, ept_mem, ept_worker>;

void ucx_region_drop(ept_region *region) { region->owner->region_drop(region); }

int32_t ucx_counters(ept_worker *worker, uint32_t rail, ept_rail_counters *counters) {
  if (rail != 0) return fail(EPT_E_INVALID, "counters", -1, 0, "ucx: rail %u, there is one", rail);
  return plugin::give_counters(worker->instance->counters, counters);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const ept_backend ept_backend_v1 = {
    .size = sizeof(ept_backend),
    .abi = EPT_BACKEND_ABI,
    .name = "ucx",
    .version = kPluginVersion,
    .settings = kSettings,
    .setting_count = kSettingCount,
    .probe = ucx_probe,
    .open = ucx_open,
    .close = ucx_close,
    .caps = ucx_caps,
    .rails = ucx_rails,
    .local_address = ucx_local_address,
    .reach = ucx_reach,
    .join = nullptr,  // peers meet one by one
    .peer_open = Calls::peer_open,
    .peer_state = Calls::peer_state,
    .peer_close = Calls::peer_close,
    .peer_fence = Calls::peer_fence,
    .worker_open = Calls::worker_open,
    .worker_close = Calls::worker_close,
    .mem_alloc = nullptr,  // any memory will do
    .mem_free = nullptr,
    .mem_register = Calls::mem_register,
    .mem_deregister = Calls::mem_deregister,
    .region_export = Calls::region_export,
    .region_revoke = Calls::region_revoke,
    .region_import = Calls::region_import,
    .region_drop = ucx_region_drop,
    .region_map = nullptr,  // a peer's memory is never in this address space
    .signal_export = nullptr,
    .signal_import = nullptr,
    .post = Calls::post,
    .poll = Calls::poll,
    .arm = Calls::arm,
    .visible = nullptr,  // an event comes after the bytes
    .quiesce = Calls::quiesce,
    .device_open = nullptr,  // kernels reach these networks by the proxy
    .device_peer = nullptr,
    .device_region = nullptr,
    .device_signal = nullptr,
    .device_image = nullptr,
    .device_module = nullptr,
    .query = Calls::query,
    .counters = ucx_counters,
    .last_error = Calls::last_error,
};
