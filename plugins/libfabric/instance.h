// SPDX-License-Identifier: Apache-2.0
// One opened backend of one rank: what it holds, and which file does what.
//
//   library.cc    libfabric.so.1, opened at run time
//   providers.cc  what is known of each provider; which fi_info a rail opens
//   endpoint.cc   a rail: endpoint, queues, address vector, contexts, buffers
//   handshake.cc  what two ranks say before the first write
//   peers.cc      what a peer goes through: opened, up, lost, closed
//   worker.cc     post, poll, arm
//   quiet.cc      fences, quiesce
//   faults.cc     what fails: an operation, a rail, a queue
//   memory.cc     memory, exports, keys
//   registration.cc  one registration on one rail: host, dmabuf, GPU by address
//   errors.cc     what a completion that went wrong says
//   strict.h      a stricter network, by a setting
//   libfabric.cc  limits, and the table that wires all of it
//
// There is no thread and no lock here: the engine makes all calls of an instance one at a time, and every provider is
// moved by our poll alone (FI_PROGRESS_MANUAL), since none makes passive progress. One worker serves all rails.
#pragma once

#include <array>
#include <atomic>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "../events.h"
#include "endpoint.h"
#include "errors.h"
#include "handshake.h"
#include "memory.h"
#include "strict.h"

namespace libfabric {

struct Peer {
  enum class State { kConnecting, kUp, kEnded };
  State state = State::kConnecting;
  uint32_t rank = 0, epoch = 0;
  Address address;
  uint32_t rails = 0;  // that both have; operations of a higher one go by a lower one
  std::vector<fi_addr_t> addresses;
  uint64_t opening = 0, its_opening = 0;  // its: 0 until it was heard
  uint32_t heard = 0, acknowledged = 0;   // rails, a bit each
  Token to_it{}, from_it{};
  uint64_t hello_due_ns = 0, hello_pause_ns = 0;
  uint64_t in_flight = 0;  // contexts that the provider holds, or that wait to be told
  std::string last_try = "nothing was heard of it yet";
  bool was_up = false;
  bool parted = false;  // it has said Bye

  int32_t code = EPT_OK;  // why it ended
  int number = 0;
  std::string text;
  uint64_t orphans_due_ns = 0;  // when what is still in flight is told as failed; 0: nothing is
};

struct Quiesce {
  uint64_t cookie;
  uint32_t rank;
  int32_t scope;
  uint64_t serial;  // of the last operation that it waits for
};

// FENCED is told on a rail when no arrival of that epoch can come out of its queue any more; see `found_empty`.
struct Fence {
  uint64_t cookie;
  uint32_t rank, epoch;
  uint32_t rails;   // still to be told, a bit each
  uint64_t due_ns;  // 0: that has passed
  std::array<uint8_t, kMaxRails> empty_reads{};
};

}  // namespace libfabric

struct ept_worker {
  ept_instance *instance;
};

struct ept_instance {
  static constexpr const char *kNetwork = "libfabric";
  ~ept_instance();  // peers.cc
  const ept_host *host = nullptr;
  ept_open_params params{};
  libfabric::Settings settings;
  std::shared_ptr<libfabric::Library> library;
  std::shared_ptr<libfabric::StrictReport> strict;  // nullptr: that setting is empty
  libfabric::Traits traits{};                       // of all rails together
  libfabric::Credentials credentials;
  libfabric::Address own;
  libfabric::Choice choice;
  bool buried = false;   // its rails go by burial.h
  bool layered = false;  // its provider is a layer over another: ...;ofi_rxm
  // Ranks whose link is closed here and that were up and may still write: what their Bye must hold. See left_open.
  std::unordered_map<uint32_t, libfabric::Token> unparted;
  uint64_t max_message = 0;

  // Before the rails: what is in flight on them names peers and memory.
  std::vector<std::unique_ptr<libfabric::Peer>> peers;    // a rank; nullptr: not open
  std::vector<std::unique_ptr<libfabric::Peer>> leaving;  // closed, with contexts that the provider holds
  std::unordered_map<uint32_t, uint32_t> closed_epochs, fenced_epochs;
  std::unordered_map<uint64_t, libfabric::Export> exports;  // by the name that region_export gave
  std::vector<std::unique_ptr<libfabric::Rail>> rails;
  uint64_t next_export = 1, next_serial = 1;
  std::atomic<uint64_t> strangers = 0;  // atomic for `query` alone, which any thread may call

  ept_worker worker{};
  bool worker_is_open = false;
  plugin::Events events;
  std::vector<libfabric::Quiesce> quiesces;
  std::vector<libfabric::Fence> fences;
  libfabric::Fd epoll, timer;
  uint64_t timer_set_ns = 0, time_due_ns = 0;
  uint32_t since_clock = 0, next_rail = 0;
  bool has_wait = false;  // every rail has a descriptor to sleep on
  bool watched = false;   // they are in `epoll`, from arm to the next poll

  uint64_t now() const { return host->clock_ns(host->context); }
  void log(int32_t level, const std::string &text) const { host->log(host->context, level, text.c_str()); }
  uint32_t all_rails() const { return static_cast<uint32_t>((uint64_t{1} << rails.size()) - 1); }

  // peers.cc
  int32_t peer_open(uint32_t rank, uint32_t epoch, const void *address, size_t length);
  int32_t peer_state(uint32_t rank);
  int32_t peer_close(uint32_t rank);
  void end_peer(libfabric::Peer *peer, int32_t code, int number, std::string text, bool announce);
  void on_message(libfabric::Rail *rail, libfabric::Operation *receive, size_t length);
  void on_time(uint64_t now_ns);
  uint64_t next_deadline() const;
  void reap();
  void abandon();                   // the worker is closed: what is in flight is nobody's any more
  void farewell(uint64_t most_ns);  // lets what was said last leave
  bool left_open() const;           // the rails can't be closed without harm

  // worker.cc
  int32_t post(const ept_op *ops, size_t count, size_t *posted);
  int32_t poll(ept_event *shown, size_t capacity);
  int32_t arm(int32_t *descriptor);
  bool watch_rails();
  void unwatch_rails();

  // quiet.cc
  int32_t peer_fence(uint32_t rank, uint32_t epoch, uint64_t cookie);
  int32_t quiesce(uint32_t rank, int32_t scope, uint64_t cookie);

  // faults.cc
  void rail_broke(libfabric::Rail *rail, int number, const std::string &why);
  void tell_error(libfabric::Rail *rail, const libfabric::Operation &operation, int32_t code, int number,
                  std::string text);

  // memory.cc
  int32_t mem_register(const ept_memory *memory, ept_mem **result);
  int32_t mem_deregister(ept_mem *mem);
  int32_t region_export(ept_mem *mem, uint32_t rank, uint64_t offset, uint64_t length, void *blob, size_t *blob_length,
                        uint64_t *key);
  int32_t region_revoke(ept_mem *mem, uint32_t rank, uint64_t key);
  int32_t region_import(uint32_t rank, const void *blob, size_t length, ept_region **result);
  void close_exports_of(uint32_t rank, uint32_t epoch);  // of that epoch and earlier ones

 private:
  // peers.cc
  bool send_greeting(libfabric::Peer *peer, uint32_t rail, libfabric::MessageType type);
  void send_bye(libfabric::Peer *peer);
  void greet(libfabric::Peer *peer, uint64_t now_ns);
  void on_greeting(libfabric::Rail *rail, const libfabric::MessageHead &head, const libfabric::Greeting &greeting);
  void maybe_up(libfabric::Peer *peer);
  void stranger(const char *what);
  // worker.cc
  int32_t check(const ept_op &op, libfabric::Peer **peer);
  int32_t post_write(libfabric::Peer *peer, const ept_op &op);
  int32_t post_send(libfabric::Peer *peer, const ept_op &op);
  // The provider's no, as a positive number: LATER if it is full, else an error. What was taken goes back.
  int32_t not_posted(libfabric::Rail *rail, libfabric::Operation *operation, const ept_op &op, const char *what,
                     int status);
  void read_queue(libfabric::Rail *rail);
  void completed(libfabric::Rail *rail, libfabric::Operation *operation);
  void immediate(libfabric::Rail *rail, uint64_t data, uint64_t length);
  // quiet.cc
  void give_quiesced();
  void found_empty(libfabric::Rail *rail);
  // faults.cc
  void failed(libfabric::Rail *rail, libfabric::Operation *operation, const libfabric::Fault &fault);
  void read_error(libfabric::Rail *rail);
  void read_events(libfabric::Rail *rail);
  void queue_died(libfabric::Rail *rail, int number, const std::string &why);
};
