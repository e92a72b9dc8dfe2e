// SPDX-License-Identifier: Apache-2.0
//
// null_objects.h: what the null network consists of.
//
// INVARIANTS. A port is an endpoint as the others see it; its lock guards its inbox, its receives and, through `keys`,
// the memory that others may write to. Bytes of a write are copied under the target's lock, before its arrival goes
// into the inbox under the same lock, so who has read the arrival may read the bytes. Everything else belongs to the
// thread that calls (FI_THREAD_DOMAIN). An operation is in exactly one place until its completion is read: the ring of
// its queue. A queue that holds `tx_size` of them takes no further operation.
#pragma once

#include <rdma/fi_cm.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_eq.h>
#include <rdma/fi_errno.h>
#include <rdma/fi_rma.h>
#include <sys/eventfd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "null.h"

namespace libfabric::null_net {

constexpr size_t kAddressBytes = 32;  // "null:", 20 digits, a zero

struct Arrival {
  bool message;
  uint64_t data;
  uint64_t flags;
  size_t length;
  uint64_t from;
  std::string bytes;
};

struct Receive {
  void *buffer;
  size_t length;
  void *context;
};

struct Keys {
  std::mutex lock;
  struct Region {
    char *base;
    size_t length;
    uint64_t access;
  };
  std::map<uint64_t, Region> regions;
  uint64_t next = 1;
};

struct Port {
  uint64_t id = 0;
  bool virtual_addresses = false;
  std::shared_ptr<Keys> keys;
  std::mutex lock;
  bool open = true;
  std::deque<Arrival> writes, messages;
  std::atomic<uint32_t> waiting{0};  // arrivals and receives that the queue has not looked at
  int wake = -1;                     // an eventfd of the queue, which closes it

  void arrive(Arrival arrival) {
    (arrival.message ? messages : writes).push_back(std::move(arrival));
    waiting.fetch_add(1, std::memory_order_release);
    if (wake >= 0) eventfd_write(wake, 1);
  }
};

inline std::mutex ports_lock;
inline std::map<uint64_t, std::shared_ptr<Port>> ports;
inline uint64_t ports_made = 0;

inline std::shared_ptr<Port> find_port(uint64_t id) {
  std::lock_guard hold(ports_lock);
  const auto found = ports.find(id);
  return found == ports.end() ? nullptr : found->second;
}

struct Fabric : fid_fabric {
  NullOptions options;
};
struct Domain : fid_domain {
  NullOptions options;
  std::shared_ptr<Keys> keys;
};
struct Mr : fid_mr {
  std::shared_ptr<Keys> keys;
};
struct Eq : fid_eq {};
struct Av : fid_av {
  std::vector<uint64_t> ids;  // by fi_addr; 0: removed
};
struct Ep;
struct Cq : fid_cq {
  std::vector<Ep *> endpoints;
  std::vector<fi_cq_data_entry> ring;
  std::vector<fi_addr_t> from;
  size_t head = 0, tail = 0;  // read at head, written at tail
  std::deque<fi_cq_err_entry> errors;
  int wake = -1;

  bool full(size_t most) const { return tail - head >= most; }
  void push(void *context, uint64_t flags, size_t length, uint64_t data, fi_addr_t source) {
    if (tail - head == ring.size()) grow();
    const size_t at = tail++ & (ring.size() - 1);
    ring[at] = {context, flags, length, nullptr, data};
    from[at] = source;
  }
  void grow() {
    std::vector<fi_cq_data_entry> entries;
    std::vector<fi_addr_t> sources;
    for (size_t i = head; i < tail; i++) {
      entries.push_back(ring[i & (ring.size() - 1)]);
      sources.push_back(from[i & (ring.size() - 1)]);
    }
    head = 0, tail = entries.size();
    entries.resize(ring.size() * 2);
    sources.resize(entries.size());
    ring.swap(entries);
    from.swap(sources);
  }
};
struct Ep : fid_ep {
  NullOptions options;
  std::shared_ptr<Port> port;
  Cq *tx = nullptr, *rx = nullptr;
  Av *av = nullptr;
  std::deque<Receive> receives;
  uint32_t posts = 0;

  bool has_no_room() { return tx->full(options.tx_size) || (options.busy != 0 && ++posts % options.busy == 0); }
};

inline int no_bind(fid *, fid *, uint64_t) { return 0; }
inline int no_control(fid *, int, void *) { return -FI_ENOSYS; }
inline int no_ops(fid *, const char *, uint64_t, void **, void *) { return -FI_ENOSYS; }

template <class Base, class Derived>
Derived *as(fid *object) {
  return static_cast<Derived *>(reinterpret_cast<Base *>(object));
}

inline void write_address(uint64_t id, void *address, size_t *length) {
  char text[kAddressBytes] = {};
  snprintf(text, sizeof text, "null:%llu", static_cast<unsigned long long>(id));
  if (*length > 0) memcpy(address, text, std::min(*length, sizeof text));  // 0: only the length is asked for
  *length = sizeof text;
}

// null_ep.cc
int cq_open(fid_domain *domain, fi_cq_attr *attr, fid_cq **out, void *context);
int endpoint(fid_domain *domain, fi_info *info, fid_ep **out, void *context);

}  // namespace libfabric::null_net
