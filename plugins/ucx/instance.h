// SPDX-License-Identifier: Apache-2.0
// One opened backend of one rank: what it holds, and which file does what.
//
//   library.cc   libucp.so.0, opened at run time
//   wire.h       what ranks send each other, and how an operation ends
//   peers.cc     what a peer goes through: opened, up, ended, closed, fenced
//   worker.cc    post, poll, arm, quiesce
//   arrivals.cc  what arrives, and how operations end
//   memory.cc    memory, exports, keys
//   ucx.cc       limits, and the table that wires all of it
//
// There is no thread and no lock here: the engine makes all calls of an instance one at a time, and UCX calls back only
// from our poll. UCX itself has a thread that makes connections.
#pragma once

#include <atomic>
#include <deque>
#include <memory>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "../events.h"
#include "../exports.h"
#include "library.h"
#include "settings.h"
#include "wire.h"

namespace ucx {

struct Peer;

// One operation to a peer. It ends for the caller when UCX has given its source back (`left`) and the peer has answered
// (or is lost); it is forgotten when both have happened and it was told.
struct Operation {
  Peer *peer = nullptr;
  uint32_t serial = 0;
  bool left = false, told = false;
  int32_t code = EPT_OK;  // else: the peer refused it
  uint64_t cookie = 0, length = 0;
  ept_mem *mem = nullptr;
  WriteHead head{};             // UCX reads it until the message has left
  std::vector<uint8_t> copied;  // SEND: head and bytes
};

struct Peer {
  enum class State { kConnecting, kUp, kEnded };
  State state = State::kConnecting;
  ept_instance *instance = nullptr;
  uint32_t rank = 0, epoch = 0;
  Address address;
  ucp_ep_h ep = nullptr;
  void *closing = nullptr;       // UCX's request that ends the endpoint
  bool force = false;            // what is under way there is given up
  ucs_status_t broken = UCS_OK;  // UCX has told that the endpoint failed

  uint64_t opening = 0, its_opening = 0;  // its: 0 until it was heard
  bool heard = false, acknowledged = false;
  Token to_it{}, from_it{};
  uint64_t hello_due_ns = 0, hello_pause_ns = 0;
  uint64_t arrivals = 0, arrivals_seen = 0, owes_since_ns = 0;  // to notice that it is silent: on_time

  std::deque<Operation> operations;  // in order of their serials, the oldest first
  uint32_t next_serial = 0;
  uint32_t answered = 0;        // all below have ended over there
  uint32_t done = 0;            // of its operations: all below have ended here
  std::set<uint32_t> finished;  // and these above, by rendezvous that were faster
  uint32_t said = 0;            // the `done` that it knows of
  std::vector<Refused> refused;
  bool fresh = false;                     // something ended here since the last poll: let an operation carry the word
  bool owing = false;                     // it is in the list of those
  uint64_t greetings = 0, receiving = 0;  // what was said and has not left; payloads that come by rendezvous

  int32_t code = EPT_OK;  // why it ended
  std::string text;
  uint64_t orphans_due_ns = 0;  // when what UCX has not given back is told as failed; 0: nothing is
};

struct Export : plugin::Holder {
  uint64_t offset = 0, length = 0;
  Key key{};
  uint64_t receiving = 0;  // payloads that come by rendezvous under this key
};

// A payload that UCX is moving into memory of this rank.
struct Receiving {
  Peer *peer;
  ept_mem *mem;
  uint32_t region, serial, immediate;
  uint64_t length;
};

struct Quiesce {
  uint64_t cookie;
  uint32_t rank;
  std::vector<uint32_t> until;  // a rank: the serial that the next operation would have had
};

struct Fence {
  uint64_t cookie;
  uint32_t rank, epoch;
};

}  // namespace ucx

struct ept_mem {
  ept_instance *owner;
  ept_memory memory;
  ucp_mem_h handle = nullptr;             // where writes go by RDMA
  uint64_t in_flight = 0, receiving = 0;  // operations that read from it, payloads that come into it
};

struct ept_region {
  ept_instance *owner;
  uint32_t rank, epoch, name, kind;
  uint64_t address, length;
  ucx::Key key;
  std::vector<uint8_t> packed;  // UCX's rkey, unpacked for the endpoint that it is first used with
  ucp_rkey_h rkey = nullptr;
};

struct ept_worker {
  ept_instance *instance;
};

struct ept_instance {
  static constexpr const char *kNetwork = "ucx";
  ~ept_instance();  // peers.cc
  const ept_host *host = nullptr;
  ept_open_params params{};
  ucx::Settings settings;
  std::shared_ptr<const ucx::Library> library;
  plugin::Credentials credentials;
  ucx::Address own;
  uint32_t memory_kinds = 0;

  ucp_context_h context = nullptr;
  ucp_worker_h ucp = nullptr;
  int ucp_fd = -1;  // UCX's
  plugin::Fd epoll, timer;
  uint64_t timer_set_ns = 0, time_due_ns = 0;
  uint32_t since_clock = 0;

  std::vector<std::unique_ptr<ucx::Peer>> peers;    // a rank; nullptr: not open
  std::vector<std::unique_ptr<ucx::Peer>> leaving;  // closed, with something that UCX holds
  std::unordered_map<uint32_t, uint32_t> closed_epochs, fenced_epochs;
  std::unordered_map<uint32_t, ucx::Export> exports;
  uint32_t next_export = 1;
  std::vector<ucx::Peer *> owing;  // who has to be told how far this rank has got
  uint64_t in_flight = 0;
  bool some_broke = false;              // an endpoint, since the last poll
  std::atomic<uint64_t> strangers = 0;  // atomic for `query` alone, which any thread may call

  ept_worker worker{};
  bool worker_is_open = false;
  plugin::Events events;
  std::vector<ucx::Quiesce> quiesces;
  std::vector<ucx::Fence> fences;
  ept_rail_counters counters{};

  uint64_t now() const { return host->clock_ns(host->context); }
  void log(int32_t level, const std::string &text) const { host->log(host->context, level, text.c_str()); }

  // peers.cc
  int32_t peer_open(uint32_t rank, uint32_t epoch, const void *address, size_t length);
  int32_t peer_state(uint32_t rank);
  int32_t peer_close(uint32_t rank);
  int32_t peer_fence(uint32_t rank, uint32_t epoch, uint64_t cookie);
  void end_peer(ucx::Peer *peer, int32_t code, std::string text, bool announce);
  void on_message(const uint8_t *bytes, size_t length);
  void take_for_up(ucx::Peer *peer);
  void stranger(const char *what);
  void on_time(uint64_t now_ns);
  uint64_t next_deadline() const;
  void end_broken();
  void reap();
  void give_fenced();
  void abandon();
  void farewell(uint64_t most_ns);

  // arrivals.cc
  int32_t set_handlers();
  void settle(ucx::Peer *peer);
  void on_send(ucx::Peer *peer, const plugin::MessageHead &head, const uint8_t *bytes);
  ucs_status_t on_write(const ucx::WriteHead &head, bool put, void *data, size_t length, bool rendezvous);
  void on_done(const uint8_t *bytes, size_t length, const uint8_t *more, size_t more_length);
  void finish(ucx::Peer *peer, uint32_t serial);
  void owe(ucx::Peer *peer);
  void received(ucx::Receiving *receiving, ucs_status_t status);

  // worker.cc
  int32_t post(const ept_op *ops, size_t count, size_t *posted);
  int32_t poll(ept_event *events, size_t capacity);
  int32_t arm(int32_t *descriptor);
  int32_t quiesce(uint32_t rank, int32_t scope, uint64_t cookie);
  void note(ucx::Peer *peer, ucx::Am am, std::vector<uint8_t> head, std::vector<uint8_t> data);
  void left(ucx::Operation *operation, ucs_status_t status);
  void flushed(ucx::Operation *operation, ucs_status_t status);

  // memory.cc
  int32_t mem_register(const ept_memory *memory, ept_mem **result);
  int32_t mem_deregister(ept_mem *mem);
  int32_t region_export(ept_mem *mem, uint32_t rank, uint64_t offset, uint64_t length, void *blob, size_t *blob_length,
                        uint64_t *key);
  int32_t region_revoke(ept_mem *mem, uint32_t rank, uint64_t key);
  int32_t region_import(uint32_t rank, const void *blob, size_t length, ept_region **result);
  void region_drop(ept_region *region);
  void close_exports_of(uint32_t rank, uint32_t epoch);  // of that epoch and earlier ones

 private:
  // arrivals.cc
  void accept_done(ucx::Peer *peer, uint32_t done);
  void refuse(ucx::Peer *peer, uint32_t serial, int32_t code);
  void answer(bool idle);
  void say_done(ucx::Peer *peer);
  // peers.cc
  int32_t make_endpoint(ucx::Peer *peer);
  void greet(ucx::Peer *peer, uint64_t now_ns);
  void say(ucx::Peer *peer, plugin::MessageType type);
  void on_greeting(ucx::Peer *peer, const plugin::MessageHead &head, const plugin::Greeting &greeting);
  void flush(ucx::Peer *peer);
  void close_endpoint(ucx::Peer *peer);
  void give_up(ucx::Peer *peer, uint64_t now_ns);
  // worker.cc
  int32_t check(const ept_op &op, ucx::Peer **peer);
  int32_t post_write(ucx::Peer *peer, const ept_op &op);
  int32_t post_send(ucx::Peer *peer, const ept_op &op);
  ucs_status_t start_put(ucx::Operation *operation, const ept_op &op);
  void give_quiesced();
};
