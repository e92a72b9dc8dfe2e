// SPDX-License-Identifier: Apache-2.0
//
// strict_objects.h: the shim's own fabric, domain, queues and endpoint: each is the struct that the plugin holds, with
// what we keep beside it. The lock of a domain guards all that belongs to it; the real provider is called under it.
#pragma once

#include <rdma/fabric.h>
#include <rdma/fi_cm.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_eq.h>
#include <rdma/fi_errno.h>
#include <rdma/fi_rma.h>

#include <deque>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "device_errors.h"
#include "strict.h"
#include "strict_presence.h"
#include "strict_schedule.h"

namespace libfabric::strict {

// What every object of one Library shares.
struct Shared {
  std::shared_ptr<Library> inner;
  StrictOptions options;
  std::mutex lock;                         // guards the two below
  std::map<std::string, fi_info *> infos;  // as the provider gave them, by fabric, provider and domain
  uint64_t objects = 0;                    // endpoints and queues so far
  ~Shared();

  void did(Deed deed) const { options.report->add(deed); }
  // A rule of EFA was broken: counted, told, and refused with -FI_EINVAL.
  int refuse(Deed deed, const std::string &what) const;
  uint64_t number() {
    std::lock_guard hold(lock);
    return objects++;
  }
  // The info that the provider gave for what the plugin hands back; the caller frees it. nullptr: not one of ours.
  fi_info *restored(const fi_info *info);
};

struct Fabric : fid_fabric {
  std::shared_ptr<Shared> shared;
  fid_fabric *real;
};

struct Eq : fid_eq {
  std::shared_ptr<Shared> shared;
  fid_eq *real;
  std::mutex lock;  // endpoints of several domains may be bound to it
  std::deque<fi_eq_err_entry> errors;
};

struct Domain : fid_domain {
  std::shared_ptr<Shared> shared;
  fid_domain *real;
  int real_mr_mode;
  uint32_t address_format;
  std::mutex lock;
  size_t open = 0;                       // objects of it
  std::unordered_set<const void *> mrs;  // live descriptors
  std::vector<struct Ep *> endpoints;
  uint64_t keys = 0;  // given out so far
};

struct Mr : fid_mr {
  Domain *domain;
  fid_mr *real;
  const char *base;
  size_t length;
};

struct Av : fid_av {
  Domain *domain;
  fid_av *real;
  std::shared_ptr<Known> known;
  std::unordered_map<fi_addr_t, std::string> addresses;
};

// An operation between its post and its completion.
struct Op {
  enum class Kind { kWrite, kSend, kReceive };
  fi_context2 room;  // the provider's; its address is how we know the operation again
  Kind kind;
  struct Ep *ep;
  void *context;  // the plugin's; nullptr: injected, no completion
  std::vector<iovec> iov;
  std::vector<Mr *> mrs;
  fi_addr_t peer;
  uint64_t address, key, data, flags;
  std::string copy;  // of what was injected
  bool by_message;   // posted with flags of its own
  uint64_t number, due;
  uint64_t until_ns;     // it goes by then, whatever `due` says
  uint64_t polls;        // of its target when it was posted
  uint64_t stalled = 0;  // since which read it waits for a receive; 0: it doesn't
  bool unpolled = false;
  const DeviceError *fails = nullptr;
  bool lands = false;  // though it fails: only the answer is lost
};

struct Entry {
  fi_cq_tagged_entry entry;
  fi_addr_t source;
  uint64_t number, due;
  uint64_t until_ns = 0;
  int error, provider;        // 0: no error
  const DeviceError *device;  // one of ours
};

struct Cq : fid_cq {
  Cq(Domain *domain, uint64_t number) : domain(domain), schedule(domain->shared->options, number) {}
  Domain *domain;
  fid_cq *real;
  fi_cq_format format;
  size_t size;
  // What a sleeper of FI_WAIT_FD waits on: `waits` is readable when the provider's descriptor is or when `wake` is,
  // which a post sets, since it needs a read to move. -1: it has none.
  int waits = -1, wake = -1;
  bool woken = false;
  Schedule schedule;
  std::vector<struct Ep *> endpoints;
  uint64_t now = 0, arrived = 0;
  uint32_t storm = 0;
  std::vector<Entry> held;     // waiting
  std::deque<Entry> ready;     // what a read gives next
  std::optional<Entry> error;  // what readerr gives
  bool last_was_device = false;
  bool overrun = false, dead = false;

  void take(const fi_cq_data_entry &real_entry, fi_addr_t source);
  void take_error(const fi_cq_err_entry &real_error);
  void complete(Op *op, uint64_t flags, size_t length, uint64_t data, fi_addr_t source, int error, int provider,
                const DeviceError *device);
  void move();  // one read's worth of progress
  void wake_up();
};

struct Ep : fid_ep {
  Ep(Domain *domain, uint64_t number) : domain(domain), schedule(domain->shared->options, number) {}
  Domain *domain;
  fid_ep *real;
  Schedule schedule;
  Cq *tx = nullptr, *rx = nullptr;
  Av *av = nullptr;
  Eq *eq = nullptr;
  bool enabled = false;
  std::string address;
  std::shared_ptr<Presence> presence;
  size_t tx_size;
  uint64_t now = 0, posted = 0, writes = 0, sends = 0;
  uint32_t storm = 0;
  std::vector<Op *> window;                    // taken, not yet with the provider, oldest first
  std::unordered_map<const void *, Op *> ops;  // all that have no completion yet, by `room`
  std::unordered_set<const void *> contexts;   // theirs
  size_t in_flight = 0;                        // writes and sends among them

  bool leave(Op *op);  // to the provider; false: it waits on
  void advance();      // one read's worth of progress
  void forget(Op *op);
  void drop();  // all of them
  // The provider's completion of one of ours; nullptr: it isn't.
  Op *find(const void *room) {
    const auto found = ops.find(room);
    return found == ops.end() ? nullptr : found->second;
  }
};

template <class Derived, class Base>
Derived *as(fid *object) {  // a fid is the first member of each base
  return static_cast<Derived *>(reinterpret_cast<Base *>(object));
}
inline Domain *as_domain(fid *object) { return as<Domain, fid_domain>(object); }

std::string address_key(uint32_t format, const void *address, size_t length);
uint64_t hold_until(const StrictOptions &options);
uint64_t clock_ns();
uint64_t base_of_key(uint64_t key);
bool is_marked(const Op *op);  // does its context hold what the post left there?

// Each opens a thing of the shim on top of a real one.
int open_domain(Fabric *fabric, fi_info *info, fid_domain **out, void *context);
int open_eq(Fabric *fabric, fi_eq_attr *attr, fid_eq **out, void *context);
int open_av(fid_domain *domain, fi_av_attr *attr, fid_av **out, void *context);
int open_cq(fid_domain *domain, fi_cq_attr *attr, fid_cq **out, void *context);
int open_ep(fid_domain *domain, fi_info *info, fid_ep **out, void *context);
extern fi_ops_mr memory_table;
extern fi_ops_msg message_table;
extern fi_ops_rma write_table;

// What has nothing to say.
int no_bind(fid *, fid *, uint64_t);
int no_control(fid *, int, void *);
int no_ops(fid *, const char *, uint64_t, void **, void *);

}  // namespace libfabric::strict
