// SPDX-License-Identifier: Apache-2.0
// The verbs backend: ConnectX and any other RDMA NIC, by a host proxy. docs/backends/verbs.md says how to run it;
// instance.h says which file does what. This one holds the limits and, at the end, the table.
#include <sys/epoll.h>
#include <sys/timerfd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "../checks.h"
#include "../near.h"
#include "../table.h"
#include "instance.h"

using namespace verbs;

namespace {

constexpr const char *kPluginVersion = "1";
constexpr uint64_t kFarewellNs = 300'000'000;  // what was said last may take so long to leave; see kGrace in peers.cc
constexpr uint32_t kOperationCostNs = 150;     // of a posted write, as published for ConnectX-7
constexpr uint32_t kLatencyNs = 2500;
constexpr uint32_t kMostPeers = 16384;

void fill_caps(const Settings &settings, bool dmabuf, ept_caps *caps) {
  const uint32_t size = caps->size;
  *caps = ept_caps{};
  caps->size = size;
  caps->memory_kinds = EPT_MEMORY_HOST | EPT_MEMORY_PINNED | EPT_MEMORY_SHM | EPT_MEMORY_CUDA;
  if (dmabuf) caps->memory_kinds |= EPT_MEMORY_DMABUF;
  caps->max_message = std::max<uint64_t>(settings.max_message, 4096);
  caps->max_send = kMaxSend;
  caps->max_iov = 1;
  caps->immediate_bits = 32;
  caps->protection = EPT_PROTECTION_REGION;  // a card's keys are 32 bits and not drawn at random
  caps->ordered_channel = 1;
  caps->passive_progress = 1;
  caps->wait_descriptor = 1;
  caps->can_revoke = 1;
  caps->can_replay = 1;
  // needs_visible stays 0: whether a completion is enough is a matter of the GPU (some order a NIC's writes before what
  // their kernels read behind its completion), which who places memory there has to ask. For others `visible` is here.
  caps->operation_cost_ns = kOperationCostNs;
}

// Settings, library and ports: all that probe and open have in common.
int32_t choose(const ept_host &host, const ept_value *values, size_t count, Settings *settings,
               std::shared_ptr<Library> *library, std::vector<Port> *ports, std::string *mend) {
  *mend = "correct that setting";
  const int32_t code = read_settings(values, count, settings);
  if (code != EPT_OK) return code;
  plugin::Refusal refusal;
  *library = open_library(settings->library, &refusal);
  *mend = refusal.mend;
  if (*library == nullptr) return fail(EPT_E_UNAVAILABLE, "open", -1, 0, "verbs: %s", refusal.why.c_str());
  return find_ports(**library, *settings, plugin::gpu_of(host), ports, mend);
}

std::string words_of(const Port &port) {
  return format("%s:%u (%s, GID %u %s, MTU %u)", port.device.c_str(), port.number,
                port.ethernet ? "RoCE" : "InfiniBand", port.gid.index, gid_text(port.gid.bytes).c_str(),
                bytes_of(port.mtu));
}

// ---- opening --------------------------------------------------------------------------------------------------------

int32_t verbs_probe(const ept_host *host, const ept_value *values, size_t value_count, ept_probe *report) {
  return guarded("probe", [&]() -> int32_t {
    report->summary[0] = report->mend[0] = 0;
    Settings settings;
    std::shared_ptr<Library> library;
    std::vector<Port> ports;
    std::string mend;
    const int32_t code = choose(*host, values, value_count, &settings, &library, &ports, &mend);
    fill_caps(settings, library != nullptr && library->has_dmabuf(), &report->caps);
    if (code != EPT_OK) {
      snprintf(report->summary, sizeof report->summary, "%.255s", last_error().text);
      snprintf(report->mend, sizeof report->mend, "%.255s", mend.c_str());
      return code;
    }
    std::string list;
    for (const Port &port : ports) list += (list.empty() ? "" : ", ") + words_of(port);
    snprintf(report->summary, sizeof report->summary, "%zu NIC%s, %u queue pair%s a peer: %.200s", ports.size(),
             ports.size() == 1 ? "" : "s", settings.qps, settings.qps == 1 ? "" : "s", list.c_str());
    return EPT_OK;
  });
}

// One descriptor to sleep on for all NICs and for what is due by the clock.
int32_t make_wait(ept_instance *instance) {
  instance->epoll.reset(epoll_create1(EPOLL_CLOEXEC));
  instance->timer.reset(timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC));
  std::vector<int> watched = {instance->timer.get()};
  for (const auto &nic : instance->nics) {
    watched.push_back(nic->notices->fd);
    watched.push_back(nic->context->async_fd);
  }
  bool all = instance->epoll && instance->timer;
  for (const int fd : watched) {
    epoll_event event{};
    event.events = EPOLLIN;
    all = all && epoll_ctl(instance->epoll.get(), EPOLL_CTL_ADD, fd, &event) == 0;
  }
  if (!all) return fail(EPT_E_NOMEM, "open", -1, errno, "verbs: the system refused a descriptor (errno %d)", errno);
  return EPT_OK;
}

int32_t verbs_open(const ept_host *host, const ept_open_params *params, ept_instance **result) {
  *result = nullptr;
  return guarded("open", [&]() -> int32_t {
    int32_t code = plugin::check_open("verbs", *params);
    if (code != EPT_OK) return code;
    if (params->world > kMostPeers)
      return fail(EPT_E_LIMIT, "open", params->rank, 0, "verbs: %u ranks at most, the world is %u", kMostPeers,
                  params->world);
    auto instance = std::make_unique<ept_instance>();
    instance->host = host;
    instance->params = *params;
    std::vector<Port> ports;
    std::string mend;
    code = choose(*host, params->values, params->value_count, &instance->settings, &instance->library, &ports, &mend);
    if (code != EPT_OK) return code;
    Settings &settings = instance->settings;
    if (ports.size() * (settings.qps + 1) > kMostChannels)
      return fail(EPT_E_CONFIG, "open", params->rank, 0,
                  "verbs: %zu NICs with %u queue pairs each and one for messages are more than the %u that a peer can "
                  "have; lower EPT_VERBS_QPS",
                  ports.size(), settings.qps, kMostChannels);
    instance->credentials = plugin::make_credentials("verbs", host, *params);
    instance->send_buffers.reset(new uint8_t[size_t{kSendBuffers} * kMaxSend]);
    for (int32_t i = kSendBuffers; i-- > 0;) instance->free_sends.push_back(i);
    const Room room{params->world, params->credits, params->send_credits};
    Address &own = instance->own;
    for (const Port &port : ports) {
      instance->nics.push_back(std::make_unique<Nic>());
      Nic *nic = instance->nics.back().get();
      code = open_nic(instance->library.get(), settings, room, port, static_cast<uint32_t>(own.nics.size()),
                      instance->send_buffers.get(), *host, RequestId{UINT16_MAX, 0, Request::kHeard, 0}.pack(), nic);
      if (code != EPT_OK) return code;
      own.nics.push_back(nic->address());
      if (settings.shuffle != 0)
        nic->shuffle = std::make_unique<Shuffle>(nic->cq.get(), settings.shuffle + 1000 * params->rank + nic->number);
    }
    own.rank = params->rank;
    own.epoch = params->epoch;
    own.qps = settings.qps;
    own.nonce = instance->credentials.nonce;
    instance->peers.resize(params->world);
    instance->counters.resize(ports.size() * settings.qps);
    instance->worker.instance = instance.get();
    code = make_wait(instance.get());
    if (code != EPT_OK) return code;
    for (const Port &port : ports)
      instance->log(EPT_LOG_DEBUG, format("verbs: rank %u uses %s", params->rank, words_of(port).c_str()));
    *result = instance.release();
    return EPT_OK;
  });
}

void verbs_close(ept_instance *instance) {
  instance->farewell(kFarewellNs);
  delete instance;
}

int32_t verbs_caps(ept_instance *instance, ept_caps *caps) {
  fill_caps(instance->settings, instance->library->has_dmabuf(), caps);
  return EPT_OK;
}

int32_t verbs_rails(ept_instance *instance, ept_rail *rails, uint32_t capacity, uint32_t *count) {
  return guarded("rails", [&] {
    const uint32_t qps = instance->settings.qps;
    *count = static_cast<uint32_t>(instance->nics.size()) * qps;
    for (uint32_t i = 0; i < std::min(capacity, *count); ++i) {
      const Nic &nic = *instance->nics[i / qps];
      ept_rail &rail = rails[i];
      const uint32_t size = rail.size;
      rail = ept_rail{};
      rail.size = size;
      snprintf(rail.name, sizeof rail.name, "%.40s:%u/%u", nic.port.device.c_str(), nic.port.number, i % qps);
      snprintf(rail.fabric, sizeof rail.fabric, "%s", nic.port.ethernet ? "roce" : "infiniband");
      snprintf(rail.pci, sizeof rail.pci, "%.15s", nic.port.pci.c_str());
      rail.numa = nic.port.numa;
      rail.port = nic.port.number;
      rail.bits_per_s = nic.port.bits_per_s / qps;
      rail.max_regions = instance->settings.max_regions;
      rail.max_peers = kMostPeers;
      // Each peer has a receive ring of its own on each rail. The margin of kReturn is ours.
      const uint32_t peers = std::max(1u, instance->params.world - 1);
      const uint32_t ring = instance->settings.receives != 0
                                ? instance->params.credits + instance->params.credits / 16 + 1
                                : nic.plan.receives - kReturn;
      rail.cq_depth = ring * peers;
      rail.tx_depth = nic.plan.depth;
    }
    return static_cast<int32_t>(EPT_OK);
  });
}

int32_t verbs_local_address(ept_instance *instance, void *blob, size_t *length) {
  return guarded("local_address", [&]() -> int32_t {
    const std::vector<uint8_t> bytes = encode(instance->own);
    return plugin::give_blob("verbs", "local_address", bytes.data(), bytes.size(), blob, length);
  });
}

int32_t verbs_reach(ept_instance *instance, const void *address, size_t length, ept_reach *reach) {
  return guarded("reach", [&] {
    const uint32_t size = reach->size;
    *reach = ept_reach{};
    reach->size = size;
    Address peer;
    int32_t code = decode(address, length, &peer);
    const auto &nics = instance->nics;
    const size_t both = std::min(nics.size(), peer.nics.size());
    for (size_t i = 0; code == EPT_OK && i < both; ++i) {
      reach->bytes_per_s += nics[i]->port.bits_per_s / 8;
      if (peer.nics[i].ethernet != static_cast<uint8_t>(nics[i]->port.ethernet))
        code = fail(EPT_E_MISMATCH, "reach", peer.rank, 0, "verbs: NIC %zu is on %s here and on %s at rank %u", i,
                    nics[i]->port.ethernet ? "Ethernet" : "InfiniBand",
                    peer.nics[i].ethernet ? "Ethernet" : "InfiniBand", peer.rank);
    }
    if (code != EPT_OK) {
      snprintf(reach->why_not, sizeof reach->why_not, "%.255s", last_error().text);
      return code;
    }
    reach->latency_ns = kLatencyNs;
    reach->operation_cost_ns = kOperationCostNs;
    return code;
  });
}

// ---- the rest of the table: ../table.h, instance.h says where its methods are --------------------------------------

using Calls = plugin::Calls<ept_instance, ept_mem, ept_worker>;

void verbs_region_drop(ept_region *region) { ept_instance::let_go(region); }

int32_t verbs_counters(ept_worker *worker, uint32_t rail, ept_rail_counters *counters) {
  const auto &own = worker->instance->counters;
  if (rail >= own.size())
    return fail(EPT_E_INVALID, "counters", -1, 0, "verbs: rail %u, there are %zu", rail, own.size());
  return plugin::give_counters(own[rail], counters);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const ept_backend ept_backend_v1 = {
    .size = sizeof(ept_backend),
    .abi = EPT_BACKEND_ABI,
    .name = "verbs",
    .version = kPluginVersion,
    .settings = kSettings,
    .setting_count = kSettingCount,
    .probe = verbs_probe,
    .open = verbs_open,
    .close = verbs_close,
    .caps = verbs_caps,
    .rails = verbs_rails,
    .local_address = verbs_local_address,
    .reach = verbs_reach,
    .join = nullptr,  // peers meet one by one
    .peer_open = Calls::peer_open,
    .peer_state = Calls::peer_state,
    .peer_close = Calls::peer_close,
    .peer_fence = Calls::peer_fence,
    .worker_open = Calls::worker_open,
    .worker_close = Calls::worker_close,
    .mem_alloc = nullptr,  // any memory that the NIC can register will do
    .mem_free = nullptr,
    .mem_register = Calls::mem_register,
    .mem_deregister = Calls::mem_deregister,
    .region_export = Calls::region_export,
    .region_revoke = Calls::region_revoke,
    .region_import = Calls::region_import,
    .region_drop = verbs_region_drop,
    .region_map = nullptr,  // a peer's memory is never in this address space
    .signal_export = nullptr,
    .signal_import = nullptr,
    .post = Calls::post,
    .poll = Calls::poll,
    .arm = Calls::arm,
    .visible = Calls::visible,
    .quiesce = Calls::quiesce,
    .device_open = nullptr,  // kernels reach this network by the proxy
    .device_peer = nullptr,
    .device_region = nullptr,
    .device_signal = nullptr,
    .device_image = nullptr,
    .device_module = nullptr,
    .query = Calls::query,
    .counters = verbs_counters,
    .last_error = Calls::last_error,
};
