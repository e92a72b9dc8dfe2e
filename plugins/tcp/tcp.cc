// SPDX-License-Identifier: Apache-2.0
// The TCP backend: any machines that can open a connection to each other. docs/tcp.md has the picture of it; instance.h
// says which file does what. This one holds the settings, the limits, memory and, at the end, the table.
#include <algorithm>
#include <charconv>
#include <cstring>
#include <system_error>

#include "../checks.h"
#include "../table.h"
#include "../values.h"
#include "instance.h"

using namespace tcp;

namespace {

constexpr const char *kVersion = "1";

const ept_setting kSettings[] = {
    {sizeof(ept_setting), EPT_SETTING_INT, "streams", "2", 1, kMaxStreams,
     "Connections to each peer; each is a rail, and long writes are spread over them."},
    {sizeof(ept_setting), EPT_SETTING_STRING, "interface", "", 0, 0,
     "Interfaces to use: names, addresses or CIDR ranges with commas between; empty: all that are up."},
    {sizeof(ept_setting), EPT_SETTING_STRING, "port_range", "", 0, 0,
     "Ports to listen on, such as 20000-20100, the first that is free; empty: the system chooses."},
    {sizeof(ept_setting), EPT_SETTING_INT, "sndbuf", "0", 0, 1 << 30,
     "Bytes of a connection's send buffer; 0: the system sizes it."},
    {sizeof(ept_setting), EPT_SETTING_INT, "rcvbuf", "0", 0, 1 << 30,
     "Bytes of a connection's receive buffer; 0: the system sizes it."},
    {sizeof(ept_setting), EPT_SETTING_BOOL, "nodelay", "1", 0, 0, "Send small frames at once (TCP_NODELAY)."},
    {sizeof(ept_setting), EPT_SETTING_STRING, "congestion", "auto", 0, 0,
     "TCP congestion control; auto: reno between processes of one machine, else the system's; empty: the system's."},
    {sizeof(ept_setting), EPT_SETTING_INT, "depth", "512", 16, kMostDepth,
     "Operations in flight on a connection before post says LATER; a power of two."},
    {sizeof(ept_setting), EPT_SETTING_INT, "handshake_ms", "5000", 10, 600000,
     "Milliseconds that a connection may take to be made and to show the job's secret."},
    {sizeof(ept_setting), EPT_SETTING_INT, "half_open", "256", 4, 65536,
     "Connections that may be waiting to show the secret; past it the oldest is dropped."},
    {sizeof(ept_setting), EPT_SETTING_INT, "max_regions", "1048576", 1, INT32_MAX,
     "Exports that may be valid at a time."},
    {sizeof(ept_setting), EPT_SETTING_STRING, "threads", "0", 0, 0,
     "Threads beside the engine's that move long payloads, 0 to 64; auto: 6 with 4 cores a rank or more, else 0."},
};
constexpr size_t kSettingCount = sizeof kSettings / sizeof *kSettings;

int32_t parse_threads(const std::string &text, int *threads) {
  if (text == "auto") {
    *threads = kAutoThreads;
    return EPT_OK;
  }
  const char *end = text.data() + text.size();
  const auto read = std::from_chars(text.data(), end, *threads);
  if (read.ec == std::errc() && read.ptr == end && *threads >= 0 && *threads <= kMaxThreads) return EPT_OK;
  return fail(EPT_E_CONFIG, "open", -1, 0, "tcp: threads is '%s'; it must be auto or a number from 0 to %d",
              text.c_str(), kMaxThreads);
}

int32_t read_settings(const ept_value *values, size_t count, Settings *settings) {
  plugin::Values given("tcp", kSettings, values, count);
  settings->streams = given.small("streams");
  settings->interface = given.text("interface");
  settings->sndbuf = static_cast<int>(given.number("sndbuf"));
  settings->rcvbuf = static_cast<int>(given.number("rcvbuf"));
  settings->nodelay = given.flag("nodelay");
  settings->congestion = given.text("congestion");
  settings->depth = given.small("depth");
  settings->handshake_ns = static_cast<uint64_t>(given.number("handshake_ms")) * 1000000;
  settings->half_open = given.small("half_open");
  settings->max_regions = given.small("max_regions");
  if (given.code() != EPT_OK) return given.code();
  if (int32_t code = parse_threads(given.text("threads"), &settings->threads); code != EPT_OK) return code;
  if ((settings->depth & (settings->depth - 1)) != 0)
    return fail(EPT_E_CONFIG, "open", -1, 0, "tcp: depth is %u; it must be a power of two", settings->depth);
  return parse_port_range(given.text("port_range"), &settings->ports);
}

void fill_caps(ept_caps *caps) {
  uint32_t size = caps->size;
  *caps = ept_caps{};
  caps->size = size;
  caps->memory_kinds = EPT_MEMORY_HOST | EPT_MEMORY_PINNED | EPT_MEMORY_SHM;
  caps->max_message = kMaxMessage;
  caps->max_send = kMaxSend;
  caps->max_iov = 1;
  caps->immediate_bits = 32;
  caps->protection = EPT_PROTECTION_KEY;
  caps->ordered_channel = 1;
  caps->wait_descriptor = 1;
  caps->can_revoke = 1;
  caps->can_replay = 1;
  caps->operation_cost_ns = 2500;  // a send on loopback, half of a one-way trip (machines.md)
}

std::string address_list(const std::vector<Interface> &interfaces) {
  std::string list;
  for (const Interface &interface : interfaces) {
    std::string text = to_text(interface.address);
    list += (list.empty() ? "" : ", ") + interface.name + " " + text.substr(0, text.rfind(':'));
  }
  return list;
}

// ---- opening --------------------------------------------------------------------------------------------------------

int32_t tcp_probe(const ept_host *, const ept_value *values, size_t value_count, ept_probe *report) {
  return guarded("probe", [&] {
    fill_caps(&report->caps);
    report->summary[0] = report->mend[0] = 0;
    Settings settings;
    std::vector<Interface> interfaces;
    int32_t code = read_settings(values, value_count, &settings);
    if (code == EPT_OK) code = choose_interfaces(settings.interface, &interfaces);
    if (code != EPT_OK) {
      snprintf(report->summary, sizeof report->summary, "%.255s", last_error().text);
      snprintf(report->mend, sizeof report->mend, "%s",
               code == EPT_E_CONFIG ? "correct that setting" : "bring a network interface up");
      return code;
    }
    snprintf(report->summary, sizeof report->summary, "%u streams a peer over %.200s", settings.streams,
             address_list(interfaces).c_str());
    return static_cast<int32_t>(EPT_OK);
  });
}

int32_t tcp_open(const ept_host *host, const ept_open_params *params, ept_instance **result) {
  *result = nullptr;
  return guarded("open", [&]() -> int32_t {
    int32_t code = plugin::check_open("tcp", *params);
    if (code != EPT_OK) return code;
    auto instance = std::make_unique<ept_instance>();
    instance->host = host;
    instance->params = *params;
    if (instance->params.dead_ns == 0) instance->params.dead_ns = 5000000000;
    code = read_settings(params->values, params->value_count, &instance->settings);
    if (code == EPT_OK) code = choose_interfaces(instance->settings.interface, &instance->interfaces);
    if (code != EPT_OK) return code;
    const Settings &settings = instance->settings;
    instance->credentials = make_credentials(host, *params);
    instance->limits =
        Limits{settings.streams, kMaxMessage, kMaxSend, settings.depth, params->credits, params->send_credits};
    instance->sink.reset(new uint8_t[kSinkBytes]);
    sched_getaffinity(0, sizeof instance->cores, &instance->cores);
    instance->counters.assign(settings.streams, ept_rail_counters{});
    instance->exports.limit(settings.max_regions);
    instance->worker.instance = instance.get();
    code = instance->start_listening();
    if (code != EPT_OK) return code;
    Address &own = instance->own;
    own.rank = params->rank;
    own.epoch = params->epoch;
    own.streams = static_cast<uint16_t>(settings.streams);
    own.host = this_host(*host);
    host->random(host->context, own.nonce.data(), own.nonce.size());
    own.endpoints = instance->listening.endpoints;
    instance->log(EPT_LOG_DEBUG, format("tcp: rank %u listens on %s, port %u", params->rank,
                                        address_list(instance->interfaces).c_str(), own.endpoints.front().port));
    *result = instance.release();
    return EPT_OK;
  });
}

void tcp_close(ept_instance *instance) {
  // What lingering sockets said is with the kernel; read dry once more, they end without a reset.
  for (size_t i = instance->lingering.size(); i-- > 0;) instance->on_lingering(instance->lingering[i].get());
  delete instance;
}

int32_t tcp_caps(ept_instance *, ept_caps *caps) {
  fill_caps(caps);
  return EPT_OK;
}

int32_t tcp_rails(ept_instance *instance, ept_rail *rails, uint32_t capacity, uint32_t *count) {
  return guarded("rails", [&] {
    const Settings &settings = instance->settings;
    const std::string &name = instance->interfaces.front().name;
    Device device = device_of(name);
    for (uint32_t i = 0; i < std::min(capacity, settings.streams); ++i) {
      ept_rail &rail = rails[i];
      uint32_t size = rail.size;
      rail = ept_rail{};
      rail.size = size;
      snprintf(rail.name, sizeof rail.name, "%s/%u", name.c_str(), i);
      snprintf(rail.pci, sizeof rail.pci, "%s", device.pci.c_str());
      snprintf(rail.fabric, sizeof rail.fabric, "tcp");
      rail.numa = device.numa;
      rail.port = i;
      rail.bits_per_s = device.bits_per_s;
      rail.max_regions = settings.max_regions;
      rail.max_peers = UINT32_MAX;
      rail.cq_depth = 1u << 20;  // nothing waits here: unread immediates stay in the sockets
      rail.tx_depth = settings.depth;
    }
    *count = settings.streams;
    return static_cast<int32_t>(EPT_OK);
  });
}

int32_t tcp_local_address(ept_instance *instance, void *blob, size_t *length) {
  return guarded("local_address", [&] {
    std::vector<uint8_t> bytes = encode(instance->own);
    return plugin::give_blob("tcp", "local_address", bytes.data(), bytes.size(), blob, length);
  });
}

int32_t tcp_reach(ept_instance *instance, const void *address, size_t length, ept_reach *reach) {
  return guarded("reach", [&] {
    uint32_t size = reach->size;
    *reach = ept_reach{};
    reach->size = size;
    Address peer;
    int32_t code = decode(address, length, &peer);
    bool same_host = code == EPT_OK && peer.host == instance->own.host;
    if (code == EPT_OK && peer.rank != instance->params.rank && dial_order(peer, instance->own).empty())
      code =
          fail(EPT_E_UNAVAILABLE, "reach", peer.rank, 0,
               "tcp: rank %u is on another machine and advertises only loopback addresses; give it EPT_TCP_INTERFACE",
               peer.rank);
    if (code != EPT_OK) {
      snprintf(reach->why_not, sizeof reach->why_not, "%.255s", last_error().text);
      return code;
    }
    uint64_t bits = device_of(instance->interfaces.front().name).bits_per_s;
    reach->latency_ns = same_host ? 5000 : 25000;
    reach->bytes_per_s = same_host ? 4000000000ull : bits != 0 ? bits / 8 : 1250000000ull;
    reach->operation_cost_ns = 2500;
    return code;
  });
}

// ---- peers ----------------------------------------------------------------------------------------------------------

using Calls = plugin::Calls<ept_instance, ept_mem, ept_worker>;

// Nothing moves without a worker: what is under way ends here, and nobody will read from its sources again.
void tcp_worker_close(ept_worker *worker) {
  ept_instance *instance = worker->instance;
  instance->worker_is_open = false;
  for (auto &peer : instance->peers)
    instance->end_peer(peer.second.get(), EPT_E_CLOSED, 0, "the worker was closed here", false);
}

// ---- memory ---------------------------------------------------------------------------------------------------------

int32_t tcp_mem_register(ept_instance *instance, const ept_memory *memory, ept_mem **result) {
  *result = nullptr;
  return guarded("mem_register", [&]() -> int32_t {
    if (memory->kind != EPT_MEMORY_HOST && memory->kind != EPT_MEMORY_PINNED && memory->kind != EPT_MEMORY_SHM)
      return fail(EPT_E_UNSUPPORTED, "mem_register", -1, 0,
                  "tcp: memory of kind %d can't be read by the CPU as it is; tcp takes host, pinned and shm",
                  memory->kind);
    uint64_t start = reinterpret_cast<uint64_t>(memory->address);
    if (memory->address == nullptr || memory->length == 0 || start + memory->length < start)
      return fail(EPT_E_INVALID, "mem_register", -1, 0, "tcp: %llu bytes at %p are no memory",
                  static_cast<unsigned long long>(memory->length), memory->address);
    *result = new ept_mem{instance, static_cast<uint8_t *>(memory->address), memory->length, memory->access, 0};
    ++instance->memories;
    return EPT_OK;
  });
}

int32_t tcp_mem_deregister(ept_mem *mem) {
  ept_instance *instance = mem->owner;
  if (mem->in_flight > 0)
    return fail(EPT_E_INVALID, "mem_deregister", -1, 0,
                "tcp: %llu operations have still to read from this memory; quiesce first, or close their peers",
                static_cast<unsigned long long>(mem->in_flight));
  instance->exports.remove_all_of(mem);
  instance->exports_removed();
  --instance->memories;
  delete mem;
  return EPT_OK;
}

int32_t tcp_region_export(ept_mem *mem, uint32_t rank, uint64_t offset, uint64_t length, void *blob,
                          size_t *blob_length, uint64_t *key) {
  return guarded("region_export", [&]() -> int32_t {
    ept_instance *instance = mem->owner;
    if ((mem->access & EPT_ACCESS_REMOTE_WRITE) == 0)
      return fail(EPT_E_ACCESS, "region_export", rank, 0,
                  "tcp: this memory was registered without the right to be written");
    if (rank >= instance->params.world || offset > mem->length || length > mem->length - offset)
      return fail(EPT_E_INVALID, "region_export", rank, 0, "tcp: %llu bytes at offset %llu of %llu for rank %u of %u",
                  static_cast<unsigned long long>(length), static_cast<unsigned long long>(offset),
                  static_cast<unsigned long long>(mem->length), rank, instance->params.world);
    if (*blob_length < sizeof(RegionBlob))
      return fail(EPT_E_INVALID, "region_export", rank, 0, "tcp: the blob needs %zu bytes, there is room for %zu",
                  sizeof(RegionBlob), *blob_length);
    Export wanted;
    auto peer = instance->peers.find(rank);
    wanted.any_epoch = peer == instance->peers.end();
    wanted.rank = rank;
    wanted.epoch = wanted.any_epoch ? 0 : peer->second->epoch;
    wanted.mem = mem;
    wanted.base = mem->address + offset;
    wanted.length = length;
    RegionBlob region{};
    const uint8_t *secret = nullptr;
    int32_t code = instance->exports.add(*instance->host, wanted, key, &region.slot, &secret);
    if (code != EPT_OK) return code;
    region.magic = kRegionMagic;
    region.version = kRegionVersion;
    region.exporter = instance->params.rank;
    region.exporter_epoch = instance->params.epoch;
    region.length = length;
    memcpy(region.key, secret, sizeof region.key);
    return plugin::give_blob("tcp", "region_export", &region, sizeof region, blob, blob_length);
  });
}

int32_t tcp_region_revoke(ept_mem *mem, uint32_t rank, uint64_t key) {
  ept_instance *instance = mem->owner;
  Export *exported = instance->exports.find(key, mem, rank);
  if (exported == nullptr)
    return fail(EPT_E_INVALID, "region_revoke", rank, 0, "tcp: key %llx is none of this memory for rank %u",
                static_cast<unsigned long long>(key), rank);
  return guarded("region_revoke", [&]() -> int32_t {
    instance->exports.remove(exported);
    instance->exports_removed();
    return EPT_OK;
  });
}

int32_t tcp_region_import(ept_instance *instance, uint32_t rank, const void *blob, size_t length, ept_region **result) {
  *result = nullptr;
  return guarded("region_import", [&]() -> int32_t {
    RegionBlob region{};
    if (length == sizeof region) memcpy(&region, blob, sizeof region);
    if (region.magic != kRegionMagic)
      return fail(EPT_E_INVALID, "region_import", rank, 0, "tcp: %zu bytes that are no region of tcp", length);
    if (region.version != kRegionVersion)
      return fail(EPT_E_VERSION, "region_import", rank, 0,
                  "tcp: the region of rank %u is of version %u, this plugin reads %u", rank, region.version,
                  kRegionVersion);
    if (region.exporter != rank)
      return fail(EPT_E_INVALID, "region_import", rank, 0, "tcp: this is a region of rank %u, not of rank %u",
                  region.exporter, rank);
    auto *imported = new ept_region{instance, rank, region.exporter_epoch, region.slot, {}, region.length};
    memcpy(imported->key, region.key, sizeof imported->key);
    *result = imported;
    return EPT_OK;
  });
}

void tcp_region_drop(ept_region *region) { delete region; }

// ---- moving ---------------------------------------------------------------------------------------------------------

int32_t tcp_query(ept_instance *instance, const char *feature, int64_t *value) {
  if (strcmp(feature, "bulk") == 0)  // streams amid a long payload: sleep on arm's descriptor rather than spin
    *value = instance->bulk_streams.load(std::memory_order_relaxed);
  else if (strcmp(feature, "half_open") == 0)
    *value = instance->half_open.load();
  else if (strcmp(feature, "strangers") == 0)
    *value = static_cast<int64_t>(instance->strangers.load());
  else
    return fail(EPT_E_UNSUPPORTED, "query", -1, 0, "tcp: there is no feature '%s'", feature);
  return EPT_OK;
}

int32_t tcp_counters(ept_worker *worker, uint32_t rail, ept_rail_counters *counters) {
  const auto &all = worker->instance->counters;
  if (rail >= all.size())
    return fail(EPT_E_INVALID, "counters", -1, 0, "tcp: rail %u, there are %zu", rail, all.size());
  return plugin::give_counters(all[rail], counters);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const ept_backend ept_backend_v1 = {
    .size = sizeof(ept_backend),
    .abi = EPT_BACKEND_ABI,
    .name = "tcp",
    .version = kVersion,
    .settings = kSettings,
    .setting_count = kSettingCount,
    .probe = tcp_probe,
    .open = tcp_open,
    .close = tcp_close,
    .caps = tcp_caps,
    .rails = tcp_rails,
    .local_address = tcp_local_address,
    .reach = tcp_reach,
    .join = nullptr,  // peers meet one by one
    .peer_open = Calls::peer_open,
    .peer_state = Calls::peer_state,
    .peer_close = Calls::peer_close,
    .peer_fence = Calls::peer_fence,
    .worker_open = Calls::worker_open,
    .worker_close = tcp_worker_close,
    .mem_alloc = nullptr,  // any memory of the process will do
    .mem_free = nullptr,
    .mem_register = tcp_mem_register,
    .mem_deregister = tcp_mem_deregister,
    .region_export = tcp_region_export,
    .region_revoke = tcp_region_revoke,
    .region_import = tcp_region_import,
    .region_drop = tcp_region_drop,
    .region_map = nullptr,  // a peer's memory is never in this address space
    .signal_export = nullptr,
    .signal_import = nullptr,
    .post = Calls::post,
    .poll = Calls::poll,
    .arm = Calls::arm,
    .visible = nullptr,  // an IMM event is only given when the bytes are there
    .quiesce = Calls::quiesce,
    .device_open = nullptr,  // no kernel posts to a socket
    .device_peer = nullptr,
    .device_region = nullptr,
    .device_signal = nullptr,
    .device_image = nullptr,
    .device_module = nullptr,
    .query = tcp_query,
    .counters = tcp_counters,
    .last_error = Calls::last_error,
};
