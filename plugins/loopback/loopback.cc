// SPDX-License-Identifier: Apache-2.0
//
// loopback.cc: any number of ranks in one process: open and close, the limits, and at the end the table, which is the
// contents of this folder. To be read in this order:
//
//   common.h, blob.h           errors, and bytes that travel
//   settings.h, settings.cc    what a user may set
//   queue.h, job.h, job.cc     what ranks share, and the paragraph on locks
//   instance.h                 the objects that the table hands out
//   land.h, operation.h        an operation at its target and at its initiator (operation.cc: what is said of failures)
//   route.h                    how operations travel: straight.cc, or adversary.cc by schedule.h
//   this file, then peers.cc, memory.cc, worker.cc, by way of table.h: the entries, in the order of backend.h
//
// A rank is an ept_instance. A write is a memcpy that the initiator does itself, after the target's key, bounds and
// link were checked under the target's lock.
#include <cstdio>
#include <memory>
#include <string>

#include "instance.h"
#include "table.h"

namespace loopback {

namespace {

int32_t probe(const ept_host *, const ept_value *values, size_t count, ept_probe *report) {
  return guard("probe", [&] {
    Settings settings;
    ept_probe found = {};
    if (const int32_t code = read_settings(values, count, "probe", &settings); code != EPT_OK) {
      snprintf(found.summary, sizeof found.summary, "%.255s", threads_error().text);
      give(report, found);
      return code;
    }
    found.caps = capabilities(settings);
    found.caps.size = sizeof found.caps;
    const int used = snprintf(found.summary, sizeof found.summary, "ranks of this process, %u rail%s", settings.rails,
                              settings.rails == 1 ? "" : "s");
    if (settings.hostile) {
      snprintf(found.summary + used, sizeof found.summary - static_cast<size_t>(used), ", adversary with seed %llu",
               static_cast<unsigned long long>(settings.malice.seed));
    }
    give(report, found);
    return static_cast<int32_t>(EPT_OK);
  });
}

int32_t open(const ept_host *host, const ept_open_params *params, ept_instance **opened) {
  return guard("open", [&] {
    auto instance = std::make_unique<ept_instance>();
    Settings &settings = instance->settings;
    if (const int32_t code = read_settings(params->values, params->value_count, "open", &settings); code != EPT_OK) {
      return code;
    }
    if (params->rank >= params->world) {
      return fail(EPT_E_INVALID, "open", -1, "loopback open: rank %u of a world of %u", params->rank, params->world);
    }
    if (!settings.cq_depth) {
      // Twice what credits allow: they are counted in immediates and sends, and grants come on top.
      const uint64_t most = 2ull * params->world * (uint64_t{params->credits} + params->send_credits + 8);
      settings.cq_depth = static_cast<uint32_t>(std::min<uint64_t>(most, 1 << 30));
    }
    instance->host = host;
    instance->rank = params->rank;
    instance->world = params->world;
    instance->epoch = params->epoch;
    instance->job_name = params->job ? params->job : "";
    instance->peers.resize(params->world);
    instance->fenced.resize(params->world);

    std::lock_guard hold(the_switch().lock);
    std::weak_ptr<Job> &entry = the_switch().jobs[instance->job_name];
    instance->job = entry.lock();
    if (!instance->job) {
      instance->job = std::make_shared<Job>();
      instance->job->world = params->world;
      entry = instance->job;
    }
    if (instance->job->world != params->world) {
      return fail(EPT_E_MISMATCH, "open", -1, "loopback open: rank %u says that job `%s` has %u ranks, others say %u",
                  params->rank, instance->job_name.c_str(), params->world, instance->job->world);
    }
    std::shared_ptr<Port> &port = instance->job->ports[{params->rank, params->epoch}];
    if (port) {
      return fail(EPT_E_INVALID, "open", -1, "loopback open: rank %u, epoch %u of job `%s` is open in this process",
                  params->rank, params->epoch, instance->job_name.c_str());
    }
    std::string secret(reinterpret_cast<const char *>(params->secret), params->secret ? params->secret_length : 0);
    port = std::make_shared<Port>(the_switch().next_port++, params->rank, params->epoch, std::move(secret),
                                  params->world, settings.rails);
    port->room = size_t{settings.cq_depth} * settings.rails;
    instance->port = port;
    *opened = instance.release();
    return static_cast<int32_t>(EPT_OK);
  });
}

void close(ept_instance *instance) {
  std::unique_ptr<ept_instance> owner(instance);
  std::lock_guard hold(the_switch().lock);
  const std::string why = "rank " + std::to_string(instance->rank) + " is gone";
  for (Peer &peer : instance->peers) sever(*instance->job, *instance->port, peer, false, why);
  // Who has called this rank and was not called back.
  for (auto call = instance->job->calls.begin(); call != instance->job->calls.end();) {
    if (call->first.second != Job::Life{instance->rank, instance->epoch}) {
      ++call;
      continue;
    }
    Port &caller = *call->second.caller;
    std::scoped_lock both(caller.lock, instance->port->lock);
    call->second.link->why = why;
    call->second.link->state = LinkState::kDown;
    tell(caller, *instance->port, EPT_E_PEER_LOST, why);
    call = instance->job->calls.erase(call);
  }
  {
    std::lock_guard mine(instance->port->lock);
    instance->port->starved.clear();  // two ports may hold each other by these
    instance->port->parcels.clear();
  }
  instance->job->ports.erase({instance->rank, instance->epoch});
  if (instance->job->ports.empty()) the_switch().jobs.erase(instance->job_name);
}

int32_t caps(ept_instance *instance, ept_caps *caps) {
  give(caps, capabilities(instance->settings));
  return EPT_OK;
}

int32_t rails(ept_instance *instance, ept_rail *rails, uint32_t capacity, uint32_t *count) {
  const Settings &settings = instance->settings;
  for (uint32_t i = 0; i < std::min(capacity, settings.rails); ++i) {
    ept_rail &rail = rails[i];
    rail = {};
    rail.size = sizeof rail;
    snprintf(rail.name, sizeof rail.name, "loopback/%u", i);
    snprintf(rail.fabric, sizeof rail.fabric, "loopback");
    rail.numa = -1;
    rail.port = i;
    rail.max_regions = settings.max_regions;
    rail.max_peers = instance->world;
    rail.cq_depth = settings.cq_depth;
    rail.tx_depth = settings.tx_depth;
  }
  *count = settings.rails;
  return EPT_OK;
}

void last_error(ept_error *error) { give(error, threads_error()); }

}  // namespace

extern "C" {
extern const ept_backend ept_backend_v1;
const ept_backend ept_backend_v1 = {
    .size = sizeof(ept_backend),
    .abi = EPT_BACKEND_ABI,
    .name = "loopback",
    .version = "0.1.0",
    .settings = kSettings,
    .setting_count = kSettingCount,
    .probe = probe,
    .open = open,
    .close = close,
    .caps = caps,
    .rails = rails,
    .local_address = local_address,
    .reach = reach,
    .join = nullptr,  // nothing collective
    .peer_open = peer_open,
    .peer_state = peer_state,
    .peer_close = peer_close,
    .peer_fence = peer_fence,
    .worker_open = worker_open,
    .worker_close = worker_close,
    .mem_alloc = nullptr,  // any memory of the process will do
    .mem_free = nullptr,
    .mem_register = mem_register,
    .mem_deregister = mem_deregister,
    .region_export = region_export,
    .region_revoke = region_revoke,
    .region_import = region_import,
    .region_drop = region_drop,
    .region_map = region_map,
    .signal_export = nullptr,  // signals are made of immediates
    .signal_import = nullptr,
    .post = post,
    .poll = poll,
    .arm = arm,
    .visible = nullptr,  // an arrival is told when its bytes are there, on a GPU too
    .quiesce = quiesce,
    .device_open = nullptr,
    .device_peer = nullptr,
    .device_region = nullptr,
    .device_signal = nullptr,
    .device_image = nullptr,
    .device_module = nullptr,
    .query = nullptr,
    .counters = counters,
    .last_error = last_error,
};
}

}  // namespace loopback
