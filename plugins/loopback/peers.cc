// SPDX-License-Identifier: Apache-2.0
//
// peers.cc: addresses, and what a peer goes through: opened, up, lost, closed, fenced.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <string>

#include "blob.h"
#include "land.h"
#include "route.h"
#include "table.h"

namespace loopback {

namespace {

struct Address {
  uint32_t version, rank, epoch, process;
  uint64_t port;
};

// With the switch's lock held. Finds who lives at `address`; *found stays empty if he has left.
int32_t look_up(ept_instance *instance, const Address &address, const char *operation, std::shared_ptr<Port> *found) {
  if (address.process != static_cast<uint32_t>(getpid())) {
    return fail(
        EPT_E_UNAVAILABLE, operation, address.rank,
        "loopback reaches ranks of one process; rank %u is in process %u, this is %u: use another backend, tcp for one",
        address.rank, address.process, static_cast<uint32_t>(getpid()));
  }
  const auto entry = instance->job->ports.find({address.rank, address.epoch});
  if (entry == instance->job->ports.end() || entry->second->id != address.port) return EPT_OK;
  if (entry->second->secret != instance->port->secret) {
    return fail(EPT_E_AUTH, operation, address.rank, "loopback %s: rank %u does not hold this job's secret", operation,
                address.rank);
  }
  *found = entry->second;
  return EPT_OK;
}

// Nothing of this life is handed out any more but what is not its own doing.
void forget(ept_instance *instance, uint32_t rank, uint32_t epoch) {
  const auto of_it = [&](const ept_event &event) {
    return event.peer == rank && event.epoch == epoch && event.kind != EPT_EVENT_FENCED;
  };
  std::lock_guard hold(instance->port->lock);
  instance->port->arrived.remove(of_it);
  instance->port->waiting.store(static_cast<uint32_t>(instance->port->arrived.size()), std::memory_order_relaxed);
  if (instance->worker) instance->worker->taken.remove(of_it);
}

}  // namespace

int32_t local_address(ept_instance *instance, void *blob, size_t *length) {
  const Address address = {kBlobVersion, instance->rank, instance->epoch, static_cast<uint32_t>(getpid()),
                           instance->port->id};
  return write_blob(address, "local_address", blob, length);
}

int32_t reach(ept_instance *instance, const void *bytes, size_t length, ept_reach *reach) {
  return guard("reach", [&] {
    ept_reach answer = {};
    Address address;
    std::shared_ptr<Port> port;
    int32_t code = read_blob(bytes, length, "reach", &address);
    if (code == EPT_OK) {
      std::lock_guard hold(the_switch().lock);
      code = look_up(instance, address, "reach", &port);
      if (code == EPT_OK && !port) {
        code = fail(EPT_E_PEER_LOST, "reach", address.rank, "loopback reach: rank %u, epoch %u of job `%s` has left",
                    address.rank, address.epoch, instance->job_name.c_str());
      }
    }
    if (code != EPT_OK) {
      snprintf(answer.why_not, sizeof answer.why_not, "%.255s", threads_error().text);
    } else {
      answer.latency_ns = 300;
      answer.bytes_per_s = 10'000'000'000;
      answer.operation_cost_ns = kOperationCostNs;
      answer.mapped = instance->settings.mapped;
    }
    give(reach, answer);
    return code;
  });
}

int32_t known(ept_instance *instance, uint32_t rank, const char *operation) {
  if (rank < instance->world && instance->peers[rank].link) return EPT_OK;
  return fail(EPT_E_INVALID, operation, rank, "loopback %s: rank %u of a world of %u is not open", operation, rank,
              instance->world);
}

int32_t peer_open(ept_instance *instance, uint32_t rank, uint32_t epoch, const void *bytes, size_t length) {
  return guard("peer_open", [&] {
    Address address;
    if (const int32_t code = read_blob(bytes, length, "peer_open", &address); code != EPT_OK) return code;
    if (rank >= instance->world || address.rank != rank || address.epoch != epoch) {
      return fail(EPT_E_INVALID, "peer_open", rank,
                  "loopback peer_open: rank %u, epoch %u in a world of %u; the address is of rank %u, epoch %u", rank,
                  epoch, instance->world, address.rank, address.epoch);
    }
    if (epoch < instance->fenced[rank]) {
      return fail(EPT_E_INVALID, "peer_open", rank, "loopback peer_open: epoch %u of rank %u was fenced", epoch, rank);
    }
    Job &job = *instance->job;
    Port &own = *instance->port;
    std::lock_guard hold(the_switch().lock);
    Peer &peer = instance->peers[rank];
    if (peer.link && peer.link->state != LinkState::kDown) {
      return fail(EPT_E_INVALID, "peer_open", rank, "loopback peer_open: rank %u is open already, with epoch %u", rank,
                  peer.epoch);
    }
    std::shared_ptr<Port> port;
    if (const int32_t code = look_up(instance, address, "peer_open", &port); code != EPT_OK) return code;
    if (peer.link) forget(instance, rank, peer.epoch);
    {
      std::lock_guard mine(own.lock);
      std::fill_n(own.consumed.begin() + static_cast<ptrdiff_t>(rank) * own.rails, own.rails, 0u);
    }
    if (!port) {  // he has left: the answer is a PEER event, as it would be had he left a moment later
      peer = {std::make_shared<Port>(0, rank, epoch, "", 0, 1), std::make_shared<Link>(), epoch};
      return sever(job, own, peer, true, "rank " + std::to_string(rank) + " is gone"), static_cast<int32_t>(EPT_OK);
    }
    const Job::Life here = {own.rank, own.epoch}, there = {rank, epoch};
    const auto call = job.calls.find({there, here});
    if (call != job.calls.end() || port == instance->port) {
      peer = {port, call != job.calls.end() ? call->second.link : std::make_shared<Link>(), epoch};
      greet(own, *port, *peer.link);
      if (call != job.calls.end()) job.calls.erase(call);
    } else {
      peer = {port, std::make_shared<Link>(), epoch};
      job.calls[{here, there}] = {peer.link, instance->port};
    }
    return static_cast<int32_t>(EPT_OK);
  });
}

int32_t peer_state(ept_instance *instance, uint32_t rank) {
  if (const int32_t code = known(instance, rank, "peer_state"); code != EPT_OK) return code;
  std::lock_guard hold(instance->port->lock);
  switch (const Link &link = *instance->peers[rank].link; link.state) {
    case LinkState::kUp:
      return EPT_OK;
    case LinkState::kConnecting:
      return EPT_LATER;
    default:
      return fail(EPT_E_PEER_LOST, "peer_state", rank, "rank %u: %s", rank, link.why.c_str());
  }
}

int32_t peer_close(ept_instance *instance, uint32_t rank) {
  return guard("peer_close", [&] {
    if (const int32_t code = known(instance, rank, "peer_close"); code != EPT_OK) return code;
    Peer &peer = instance->peers[rank];
    {
      std::lock_guard hold(the_switch().lock);
      sever(*instance->job, *instance->port, peer, false,
            "rank " + std::to_string(instance->rank) + " closed the peer");
    }
    forget(instance, rank, peer.epoch);
    if (instance->worker) instance->worker->route->drop(rank, EPT_E_CLOSED, "the peer was closed here");
    peer = {};
    return static_cast<int32_t>(EPT_OK);
  });
}

int32_t peer_fence(ept_instance *instance, uint32_t rank, uint32_t epoch, uint64_t cookie) {
  return guard("peer_fence", [&] {
    if (rank >= instance->world) {
      return fail(EPT_E_INVALID, "peer_fence", rank, "loopback peer_fence: rank %u of a world of %u", rank,
                  instance->world);
    }
    if (!instance->settings.revocable) {
      return fail(EPT_E_STUCK, "peer_fence", rank,
                  "loopback peer_fence: the setting `revocable` is 0, so rank %u may write on: end its process", rank);
    }
    Port &own = *instance->port;
    Peer &peer = instance->peers[rank];
    instance->fenced[rank] = std::max(instance->fenced[rank], epoch + 1);
    if (peer.link && peer.epoch <= epoch) {
      std::lock_guard hold(the_switch().lock);
      sever(*instance->job, own, peer, false,
            "epoch " + std::to_string(peer.epoch) + " of rank " + std::to_string(rank) + " was fenced by rank " +
                std::to_string(instance->rank));
    }
    if (peer.link && peer.epoch <= epoch && instance->worker) {
      instance->worker->route->drop(rank, EPT_E_PEER_LOST, peer.link->why.c_str());
    }
    std::unique_lock hold(own.lock);
    for (uint32_t slot = 0; slot < own.exports.size(); ++slot) {
      if (own.exports[slot].rank == rank && own.exports[slot].epoch <= epoch) drain(own, hold, slot);
    }
    for (uint32_t rail = 0; rail < own.rails; ++rail) {
      Item &item = own.arrive();
      item.event = {};
      item.event.size = sizeof(ept_event);
      item.event.kind = EPT_EVENT_FENCED;
      item.event.peer = rank;
      item.event.epoch = epoch;
      item.event.rail = rail;
      item.event.immediate = own.consumed[size_t{rank} * own.rails + rail];
      item.event.cookie = cookie;
    }
    return static_cast<int32_t>(EPT_OK);
  });
}

}  // namespace loopback
