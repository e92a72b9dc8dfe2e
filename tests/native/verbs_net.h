// SPDX-License-Identifier: Apache-2.0
//
// verbs_net.h: RDMA NICs made of functions, in this process, for the backend verbs: no device, no library, its headers
// are enough. They keep the rules of the verbs as a strict NIC does, and any request that breaks one ends the test:
// states in order and with all they need, numbers of first packets that agree, queues that are never overrun (a send's
// place is free again when a signalled completion that covers it was read), inline data no longer than was asked for,
// receives enough, every key and bound. What a network may do to one is drawn by a seed.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "../../plugins/verbs/library.h"
#include "plugin.h"

namespace verbs_net {

struct Cq;
struct Net;

struct Send {
  ibv_send_wr request{};
  std::vector<uint8_t> bytes;  // taken at once where inline, else when it goes
  const void *source = nullptr;
  uint32_t length = 0;
  uint64_t index = 0;
  bool executed = false;
};

struct Receive {
  uint64_t wr_id = 0;
  void *bytes = nullptr;
  uint32_t length = 0;
};

struct Qp {
  ibv_qp base{};  // first: the plugin holds this
  ibv_qp_cap cap{};
  Cq *cq = nullptr;
  uint32_t nic = 0, qkey = 0, peer = 0, first_sent = 0, first_expected = 0;
  bool signal_all = false;
  std::deque<Send> sends;
  std::deque<Receive> receives;
  uint64_t posted = 0, freed = 0;  // sends
  uint32_t unsignalled = 0, most_unsignalled = 0, tries = 0;
  uint64_t doorbells = 0;
};

struct Completion {
  ibv_wc wc{};
  uint32_t qpn = 0;
  bool send = false;
  uint64_t index = 0;
};

struct Cq {
  ibv_cq base{};
  Net *net = nullptr;
  size_t room = 0;
  bool asked = false;  // for a notice
  ibv_comp_channel *channel = nullptr;
  std::deque<Completion> entries;
};

struct Region {
  ibv_mr base{};
  uint32_t nic = 0;
  unsigned access = 0;
};

// A write into a GPU, whose completion has passed it on the way.
struct Posted {
  uint32_t nic = 0;
  uint8_t *to = nullptr;
  std::vector<uint8_t> bytes;
};

// Chances in 1,000 that something happens to an operation, or to a datagram.
struct Faults {
  uint32_t lost_request = 0;  // its queue pair breaks, and it was not executed, or half of its bytes were
  uint32_t lost_answer = 0;   // its queue pair breaks, and it was executed
  uint32_t lost_datagram = 0, twice = 0;
  uint32_t failed_datagram = 0;  // its queue pair fails: the link is down, and no event has told
  uint32_t refused_post = 0;     // ibv_post_send says ENOMEM
  bool refused_reset = false;    // so does ibv_modify_qp for one of datagrams that shall be made ready again
  uint32_t lazy = 500;           // nothing moves in this step
  bool rnr = false;              // a missing receive is no fault of the plugin's
};

struct Net {
  explicit Net(uint64_t seed, uint32_t nics = 1);
  ~Net();

  std::shared_ptr<verbs::Library> library();
  void step();
  void set_path(uint32_t nic, bool whole);   // between all NICs of that number
  void set_port(uint32_t nic, bool active);  // and tell by an event, on every context
  void tell(uint32_t nic, ibv_event_type type);
  bool chance(uint32_t in_thousand) { return random() % 1000 < in_thousand; }

  std::mt19937_64 random;
  Faults faults;
  uint32_t nics;
  std::string folder;  // sysfs
  int max_cqe = 1 << 20, max_wr = 16384;
  uint32_t max_inline = 256;
  std::map<uint32_t, Qp *> qps;
  std::map<uint32_t, Region *> keys;
  std::set<ibv_context *> contexts;
  std::set<uint32_t> dead_paths, down_ports;
  std::map<ibv_context *, std::deque<ibv_async_event>> events;
  // Memory that stands for a GPU's: what a NIC writes there is seen when the same NIC has read there, and not before.
  std::set<std::pair<const uint8_t *, const uint8_t *>> gpus;
  std::deque<Posted> on_the_way;
  uint64_t reads = 0;
  uint32_t next_number = 100;
  uint64_t rnr = 0, inlined = 0, relaxed = 0, executed = 0, breaks = 0, failed_datagrams = 0, doorbells = 0,
           requests = 0;
  uint32_t most_unsignalled = 0;

  void complete(Qp *qp, uint64_t wr_id, ibv_wc_status status, ibv_wc_opcode opcode, bool send, uint64_t index);
  void fail(Qp *qp);
  void move(Qp *qp);
  void move_read(Qp *qp, Qp *target);
  bool in_gpu(const void *address) const;
  void move_datagram(Qp *qp);
};

// What open_library of the test gives out.
extern Net *current;

}  // namespace verbs_net
