// SPDX-License-Identifier: Apache-2.0
// One opened backend of one rank: what it holds, and which file does what.
//
//   library.cc    libibverbs.so.1, opened at run time
//   ports.cc      which NICs, which of their addresses
//   nic.cc        a NIC's port: queues, datagrams
//   wire.cc       what two ranks say to connect their queue pairs
//   channel.cc    a queue pair and the next; channel.h says why nothing is lost or counted twice
//   peers.cc      what a peer goes through: opened, up, lost, closed, fenced
//   greetings.cc  the datagrams by which two ranks connect their queue pairs, or hear of an end
//   mending.cc    channels that break and are made anew
//   nic_events.cc what a NIC says of itself: ports, failures
//   visible.cc    when a GPU can read what has arrived
//   worker.cc     post, poll, arm, quiesce
//   memory.cc     memory, exports, keys
//   shuffle.cc    completions in another order, by a setting, for tests
//   verbs.cc      limits, and the table that wires all of it
//
// There is no thread and no lock here: the engine makes all calls of an instance one at a time. One worker serves all
// rails. A rail is a data queue pair a peer: rail r is pair r % qps of NIC r / qps.
#pragma once

#include <atomic>
#include <deque>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "../events.h"
#include "channel.h"
#include "memory.h"

namespace verbs {

struct Peer {
  enum class State { kConnecting, kUp, kEnded };
  State state = State::kConnecting;
  uint32_t rank = 0, epoch = 0;
  Address address;
  uint32_t nics = 0, qps = 0;  // that both have
  std::vector<Ah> ways;        // to the datagrams of each of its NICs
  // Data channels (NIC by NIC), then one for messages on each NIC.
  std::vector<std::unique_ptr<Channel>> channels;
  std::vector<uint32_t> preferred;        // by rail: the data channel that it takes while that is up
  std::deque<Operation> replay;           // of channels that broke: for any that is up
  uint64_t opening = 0, its_opening = 0;  // its: 0 until it was heard
  uint64_t hello_due_ns = 0, hello_pause_ns = 0;
  uint32_t tries = 0;
  bool suspect = false;  // up, but nothing can be sent or said just now
  uint64_t unusable_since_ns = 0;
  std::string last_try = "nothing was heard of it yet";

  bool closed = false;        // by peer_close: it is in `leaving`
  uint64_t grace_due_ns = 0;  // until then, what is under way may end well
  int32_t code = EPT_OK;      // why it ended
  int number = 0;
  std::string text;

  uint32_t data_channels() const { return nics * qps; }
  bool usable() const;
  bool settled() const;
  bool gone() const;  // no queue pair is left
};

struct Quiesce {
  uint64_t cookie;
  uint32_t rank;
  uint64_t serial;  // of the last operation that it waits for
};

struct Fence {
  uint64_t cookie;
  uint32_t rank, epoch;
};

// Between two Hellos, at first; doubled each time.
constexpr uint64_t kFirstHelloPause = 5'000'000;
// Between two looks at what is due, and at the events of NICs.
constexpr uint64_t kTick = 5'000'000;

// Requests of a call of post that are not given to NICs yet.
constexpr uint32_t kBatch = 64;
struct Batch {
  ibv_send_wr requests[kBatch];
  ibv_sge ranges[kBatch];
  Channel *touched[kBatch];
  uint32_t count = 0, channels = 0;
};

}  // namespace verbs

struct ept_worker {
  ept_instance *instance;
};

struct ept_instance {
  static constexpr const char *kNetwork = "verbs";
  ~ept_instance();
  const ept_host *host = nullptr;
  ept_open_params params{};
  verbs::Settings settings;
  std::shared_ptr<verbs::Library> library;
  verbs::Credentials credentials;
  verbs::Address own;
  std::unique_ptr<uint8_t[]> send_buffers;
  std::vector<int32_t> free_sends;

  // NICs outlive what is on them.
  std::vector<std::unique_ptr<verbs::Nic>> nics;
  std::unordered_map<uint64_t, verbs::Export> exports;  // by the name that region_export gave
  std::vector<std::unique_ptr<verbs::Peer>> peers;      // a rank; nullptr: not open
  std::vector<std::unique_ptr<verbs::Peer>> leaving;    // closed, with queue pairs that still stand
  std::vector<verbs::Channel *> slots;                  // by RequestId::slot; nullptr: free
  std::vector<verbs::Channel *> retiring;               // their receives have still to come back
  std::unordered_map<uint32_t, uint32_t> closed_epochs, fenced_epochs;
  uint64_t next_export = 1, next_serial = 1;
  std::atomic<uint64_t> strangers = 0;  // atomic for `query` alone, which any thread may call

  ept_worker worker{};
  bool worker_is_open = false;
  verbs::Batch batch;
  std::vector<ept_rail_counters> counters;  // a rail
  plugin::Events events;
  std::vector<verbs::Quiesce> quiesces;
  std::vector<verbs::Fence> fences;
  verbs::Fd epoll, timer;
  uint64_t timer_set_ns = 0, time_due_ns = 0;
  uint32_t since_clock = 0, next_nic = 0;
  std::vector<const ept_mem *> gpu_memory;
  verbs::Visibility visibility;
  uint32_t replaying = 0;  // operations in the replay of any peer
  bool armed = false;

  uint64_t now() const { return host->clock_ns(host->context); }
  void log(int32_t level, const std::string &text) const { host->log(host->context, level, text.c_str()); }

  // peers.cc
  int32_t peer_open(uint32_t rank, uint32_t epoch, const void *address, size_t length);
  int32_t peer_state(uint32_t rank);
  int32_t peer_close(uint32_t rank);
  int32_t peer_fence(uint32_t rank, uint32_t epoch, uint64_t cookie);
  void end_peer(verbs::Peer *peer, int32_t code, int number, std::string text, bool announce);
  void stop(verbs::Peer *peer);
  void on_time(uint64_t now_ns);
  uint64_t next_deadline() const;
  // The PEER event of what became of a link.
  ept_event *tell_peer(const verbs::Peer *peer, int32_t code, std::string text = {});
  void farewell(uint64_t most_ns);  // lets what was said last leave
  void abandon();                   // the worker is closed: what is in flight is nobody's any more
  void cut_short(ept_mem *mem);     // closed peers that still send from it
  void give_fenced();

  // greetings.cc
  void greet(verbs::Peer *peer);
  bool say(verbs::Peer *peer, verbs::MessageType type);  // false: by no NIC, just now
  void on_datagram(verbs::Nic *nic, uint32_t buffer, uint32_t length);

  // mending.cc
  bool on_state(verbs::Channel *channel, const verbs::ChannelState &theirs);  // true: ours is another now
  void broke(verbs::Channel *channel, const std::string &why, bool pause);
  void went_up(verbs::Channel *channel);
  void refused(verbs::Channel *channel, uint64_t ordinal, const ibv_wc &completion);
  void mend();  // retiring channels whose receives have come back
  void replay();
  void fail_operation(verbs::Peer *peer, uint32_t rail, verbs::Operation *operation, int32_t code, int number,
                      const std::string &text);
  void bury(verbs::Channel *channel);  // destroys its queue pair; what was in flight is an error

  // nic_events.cc
  void read_events(verbs::Nic *nic);
  void nic_failed(verbs::Nic *nic, const std::string &why);
  void unmute(verbs::Nic *nic);

  // visible.cc
  int32_t visible(uint32_t rank, uint64_t cookie);
  void look_into_gpus();

  // worker.cc
  int32_t post(const ept_op *ops, size_t count, size_t *posted);
  int32_t poll(ept_event *into, size_t capacity);
  int32_t arm(int32_t *descriptor);
  int32_t quiesce(uint32_t rank, int32_t scope, uint64_t cookie);
  verbs::Operation &fresh(verbs::Channel *channel);
  void stage(verbs::Channel *channel);
  void flush();
  void release(verbs::Operation *operation);
  void acknowledge(verbs::Channel *channel, uint64_t up_to);

  // memory.cc
  int32_t memory_kinds() const;
  int32_t mem_register(const ept_memory *memory, ept_mem **result);
  int32_t mem_deregister(ept_mem *mem);
  int32_t region_export(ept_mem *mem, uint32_t rank, uint64_t offset, uint64_t length, void *blob, size_t *blob_length,
                        uint64_t *key);
  int32_t region_revoke(ept_mem *mem, uint32_t rank, uint64_t key);
  int32_t region_import(uint32_t rank, const void *blob, size_t length, ept_region **result);
  void close_exports_of(uint32_t rank, uint32_t epoch);  // of that epoch and earlier ones
  static void let_go(ept_region *region);

 private:
  // visible.cc
  void look_again(verbs::Nic *nic);
  void read_completed(verbs::Nic *nic, const verbs::RequestId &id, const ibv_wc &completion);
  void all_visible();
  // peers.cc
  int32_t make_channels(verbs::Peer *peer);
  void reap();
  // greetings.cc
  void on_greeting(verbs::Peer *peer, const verbs::Message &message);
  void stranger(const char *what);
  // mending.cc
  bool resolve(verbs::Channel *channel, uint64_t consumed);
  void probe(verbs::Channel *channel);
  // worker.cc
  int32_t check(const ept_op &op, verbs::Peer **peer);
  verbs::Channel *choose(verbs::Peer *peer, bool messages, uint32_t rail);
  int32_t post_write(verbs::Peer *peer, const ept_op &op);
  int32_t post_message(verbs::Peer *peer, const ept_op &op);
  void flush(verbs::Channel *channel);
  void read_queue(verbs::Nic *nic);
  void completed(verbs::Nic *nic, const ibv_wc &completion);
  void received(verbs::Channel *channel, const ibv_wc &completion, uint32_t buffer);
  void give_quiesced();
};
