// SPDX-License-Identifier: Apache-2.0
//
// instance.h: a rank, and the other objects that the table hands out. They belong to their instance, whose calls the
// ABI keeps apart; what others may touch is in the port (job.h).
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "job.h"
#include "settings.h"

namespace loopback {
class Route;
}  // namespace loopback

struct ept_mem {
  ept_instance *instance;
  ept_memory memory;
  std::vector<uint64_t> keys;  // of its valid exports
};

struct ept_region {
  ept_instance *instance;
  uint32_t rank, slot;
  uint64_t length;
  loopback::Key key;
  int32_t role;
};

struct ept_worker {
  ept_instance *instance;
  std::unique_ptr<loopback::Route> route;
  loopback::Queue own;                          // LOCAL_DONE, ERROR, QUIESCED
  loopback::Queue taken;                        // arrivals that poll took and has not handed out yet
  std::vector<std::unique_ptr<char[]>> handed;  // bytes that the last poll's events point to
  std::vector<uint32_t> in_flight;              // by rail: posted, and its LOCAL_DONE or ERROR not handed out
  std::vector<ept_rail_counters> counters;      // by rail
  struct Quiesce {
    uint32_t rank;
    int32_t scope;
    uint64_t cookie;
  };
  std::vector<Quiesce> quiesces;  // not answered yet
  bool armed = false;
};

struct ept_instance {
  const ept_host *host;
  uint32_t rank, world, epoch;
  loopback::Settings settings;
  std::shared_ptr<loopback::Job> job;
  std::string job_name;
  std::shared_ptr<loopback::Port> port;
  std::vector<loopback::Peer> peers;
  std::vector<uint32_t> fenced;  // by rank: epochs below this are fenced
  ept_worker *worker = nullptr;
};

namespace loopback {
// INVALID unless `rank` is open here. (peers.cc)
int32_t known(ept_instance *instance, uint32_t rank, const char *operation);
}  // namespace loopback
