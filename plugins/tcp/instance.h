// SPDX-License-Identifier: Apache-2.0
// One opened backend of one rank: what it holds, and which file moves what.
//
//   connect.cc   what accepting and dialling share, and the clock
//   accept.cc    connections that come in: strangers, members, their streams and knocks
//   dial.cc      connections that go out: which address, the handshake, the next try
//   reconnect.cc streams that broke, stall, or are not on the way they should be: when to dial again, when to give up
//   peers.cc     what a peer goes through: opened, up, lost, closed, fenced
//   worker.cc    post, poll, arm, quiesce
//   tcp.cc       settings, limits, memory, and the table that wires all of it
//
//   mover.h      threads that move long payloads, where there are cores for them
//
// There is no lock here: the engine makes all calls of an instance one at a time, and streams are moved only inside
// post, poll and arm. Movers know of bytes alone, not of anything that stands here.
//
// READINESS. epoll is edge-triggered: it says once that a socket has something, and the stream remembers until a recv
// finds it empty. `ready` holds the streams which have something to do that needs no further word from epoll; arm may
// only say that sleep is safe when it is empty. While the caller spins, the one or two streams that were last active
// (`hot`) are read without asking epoll, which is asked every kEpollEvery polls for the others; a stream in the midst
// of a long payload is never hot, since recv on a socket whose packets are just arriving fights with the kernel for it
// and halves its speed. When more streams than that are active, epoll is asked in every poll and nobody is hot.
#pragma once

#include <atomic>
#include <deque>
#include <list>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "address.h"
#include "handshake.h"
#include "memory.h"
#include "mover.h"
#include "stream.h"

namespace tcp {

struct Settings {
  uint32_t streams = 0;
  std::string interface;
  PortRange ports;
  int sndbuf = 0, rcvbuf = 0;
  bool nodelay = true;
  std::string congestion;  // "auto", "" or a name
  uint32_t depth = 0;
  uint64_t handshake_ns = 0;
  uint32_t half_open = 0;
  uint32_t max_regions = 0;
  int threads = 0;  // kAutoThreads: as the cores allow
};
constexpr int kAutoThreads = -1;
constexpr int kMaxThreads = 64;

struct Peer;

struct Listener : Source {
  explicit Listener(int socket) : Source(Kind::kListener), fd(socket) {}
  const int fd;
};

// A connection that came in and has not shown the secret yet, or has but waits for its peer to be opened (`parked`).
struct Accepted : Source {
  Accepted(Fd socket, std::string from, uint64_t deadline, const Credentials &credentials,
           const std::array<uint8_t, kNonceBytes> &nonce)
      : Source(Kind::kAccepted),
        fd(std::move(socket)),
        where(std::move(from)),
        deadline_ns(deadline),
        acceptor(credentials, nonce) {}
  Fd fd;
  std::string where;
  uint64_t deadline_ns;
  Acceptor acceptor;
  enum class Step { kHello, kProof, kParked } step = Step::kHello;
  size_t have = 0;
  uint8_t bytes[sizeof(Hello)];
};

// One stream's way to its peer: to a higher rank its connection is dialled, to a lower one there is a knock now and
// then while the stream is broken here, so that it dials.
struct Dial : Source {
  Dial() : Source(Kind::kDial) {}
  Peer *peer = nullptr;
  uint32_t stream = 0;
  Fd fd;
  enum class Step { kIdle, kPause, kConnect, kChallenge, kAnswer } step = Step::kIdle;
  enum class Why {
    kFirst,  // the peer is not up yet; who opened it has the deadline
    kBroken,
    kStalled,  // the old connection is still there, in doubt
    kHome      // it is well, but not on the way it should take
  } why = Why::kFirst;
  uint64_t due_ns = 0;       // kPause: next try; else the deadline of this one, 0: none
  uint64_t deadline_ns = 0;  // the peer is lost if the stream is not well by then, 0: none
  uint64_t up_ns = 0;        // since when the stream has its connection
  uint64_t pause_ns = 0;     // the last one between two rounds of the peer's paths
  uint32_t attempts = 0;     // so far: numbers the connections of the stream
  uint32_t generation = 0;   // of the one that it has, or had last
  uint32_t tries = 0;        // since `why`
  uint32_t refused_in_round = 0, refused_rounds = 0;
  size_t path = 0;     // the next one, of the peer's
  std::string reason;  // why it is dialled again
  int number = 0;      // and the system's number for that
  std::unique_ptr<Dialer> dialer;
  size_t have = 0;
  uint8_t bytes[kLargestMessage];
};

// A stream that said FINISH: its socket is read dry until the other side ends too, since closing it with unread bytes
// would reset it, and a reset can destroy what the other side has not read.
struct Lingering : Source {
  Lingering() : Source(Kind::kLingering) {}
  Fd fd;
  uint64_t deadline_ns = 0;
};

struct Peer : Link {
  enum class State { kConnecting, kUp, kEnded };
  State state = State::kConnecting;
  uint64_t number = 0;  // of this opening, for quiesce
  bool self = false;    // this rank itself: memory only
  uint32_t agreed_streams = 0;
  Address address;
  Paths paths;                               // to dial
  std::vector<std::unique_ptr<Dial>> dials;  // a stream
  std::vector<std::unique_ptr<Stream>> streams;
  std::vector<uint32_t> generations;  // of a stream's connection, as its dialer counts; kept by who accepts
  uint32_t streams_up = 0;            // that have had a connection
  bool suspect = false;               // a PEER event has said LATER since the last that said OK
  std::string last_try;               // why it is not up yet

  int32_t code = EPT_OK;  // why it ended
  int number_of_system = 0;
  std::string text;
  bool announce = false;  // a PEER event tells of the end
  bool unclear = false;   // ended with operations whose fate over there is unknown

  bool drained() const;  // every accepted operation has had its event
};

struct Quiesce {
  uint64_t cookie;
  uint32_t rank;
  int32_t scope;
  struct Until {
    uint64_t peer;  // Peer::number
    uint32_t stream;
    uint64_t operations;
  };
  std::vector<Until> untils;
};

constexpr uint64_t kFirstPause = 10000000;  // between two rounds of a peer's paths; doubled each time, with jitter
constexpr uint64_t kLongestPause = 500000000;
constexpr uint32_t kHot = 2;
constexpr uint32_t kEpollEvery = 16;
constexpr uint32_t kMaxStreams = 16;

}  // namespace tcp

struct ept_worker {
  ept_instance *instance;
};

struct ept_instance {
  static constexpr const char *kNetwork = "tcp";
  const ept_host *host = nullptr;
  ept_open_params params{};
  tcp::Settings settings;
  tcp::Credentials credentials;
  tcp::Limits limits{};
  tcp::Address own;
  std::vector<tcp::Interface> interfaces;
  tcp::Listening listening;
  std::vector<std::unique_ptr<tcp::Listener>> listeners;
  tcp::Source timer_source{tcp::Source::Kind::kTimer};
  tcp::Fd epoll, timer, spare;
  uint64_t timer_set_ns = 0;  // what the timer is set to, 0: off

  tcp::Exports exports;
  uint64_t memories = 0;
  std::unique_ptr<uint8_t[]> sink;
  std::unique_ptr<tcp::Movers> movers;  // outlives every stream
  tcp::Source movers_source{tcp::Source::Kind::kMovers};
  bool movers_decided = false;
  cpu_set_t cores{};  // of the thread that opened this

  std::unordered_map<uint32_t, std::unique_ptr<tcp::Peer>> peers;
  std::vector<std::unique_ptr<tcp::Peer>> leaving;  // not in `peers` any more, with events still to give
  std::vector<tcp::Peer *> ended;                   // of both, with events still to give
  std::unordered_map<uint32_t, uint32_t> closed_epochs, fenced_epochs;
  struct Consumed {
    uint32_t epoch;
    std::vector<uint64_t> immediates;  // a rail
  };
  std::unordered_map<uint32_t, Consumed> consumed;  // of the last epoch that ended, for peer_fence
  struct Refused {
    uint32_t epoch;
    int32_t code;
    std::string text;
  };
  std::unordered_map<uint32_t, Refused> refused_members;  // members that were told no before they were opened here
  uint64_t peers_opened = 0;

  std::list<std::unique_ptr<tcp::Accepted>> accepted;  // oldest first; at most settings.half_open that are not parked
  std::atomic<uint32_t> half_open = 0;                 // atomic for `query` alone, which any thread may call
  std::vector<std::unique_ptr<tcp::Lingering>> lingering;
  std::atomic<uint64_t> strangers = 0;
  uint64_t stranger_logged_ns = 0;

  ept_worker worker{};
  bool worker_is_open = false;
  uint64_t poll_number = 1;
  std::vector<tcp::Stream *> ready, serving, owing, hot, touched;
  std::atomic<uint32_t> bulk_streams = 0;  // for `query`
  uint32_t since_epoll = 0, since_clock = 0, crowded = 0;
  uint64_t tick_due_ns = 0, liveness_due_ns = 0;
  plugin::Events events;
  std::vector<ept_rail_counters> counters;                 // a rail
  std::vector<std::unique_ptr<tcp::Source>> dead_sources;  // epoll may still name them within this poll
  std::vector<tcp::Quiesce> quiesces;

  uint64_t now() const { return host->clock_ns(host->context); }
  void log(int32_t level, const std::string &text) const { host->log(host->context, level, text.c_str()); }

  // connect.cc
  int32_t start_listening();
  void watch(int fd, tcp::Source *source, uint32_t epoll_events, bool known);
  bool tune(int fd, bool same_host);
  void on_time(uint64_t now_ns);
  uint64_t next_deadline(uint64_t now_ns);
  void linger(tcp::Fd fd);
  void on_lingering(tcp::Lingering *lingering);

  // accept.cc
  void on_listener(tcp::Listener *listener);
  void on_accepted(tcp::Accepted *accepted);
  void adopt_parked(tcp::Peer *peer);

  // dial.cc
  void start_dials(tcp::Peer *peer);
  void stop_dials(tcp::Peer *peer);
  void dial_now(tcp::Dial *dial);
  void on_dial(tcp::Dial *dial);
  void dial_failed(tcp::Dial *dial, const std::string &why, bool refused = false);

  // reconnect.cc
  void stream_broke(tcp::Peer *peer, uint32_t stream, uint64_t since_ns);
  void retire(tcp::Peer *peer, uint32_t stream);
  void stream_is_well(tcp::Peer *peer, uint32_t stream);
  void knocked(tcp::Peer *peer, uint32_t stream, uint32_t generation);
  bool all_paths_refuse(tcp::Dial *dial);
  bool still_in_doubt(tcp::Dial *dial);
  void check_liveness(uint64_t now_ns);
  void check_deadlines(uint64_t now_ns);

  // peers.cc
  int32_t peer_open(uint32_t rank, uint32_t epoch, const void *address, size_t length);
  int32_t peer_state(uint32_t rank);
  int32_t peer_close(uint32_t rank);
  int32_t peer_fence(uint32_t rank, uint32_t epoch, uint64_t cookie);
  void exports_removed();
  void start_movers();
  void stream_up(tcp::Peer *peer, uint32_t stream, tcp::Fd fd, const tcp::Limits &limits,
                 const tcp::ResumePoint &theirs);
  void end_peer(tcp::Peer *peer, int32_t code, int number, std::string text, bool announce);
  void streams_may_have_ended(tcp::Peer *peer);
  void give_ended();

  // worker.cc
  int32_t post(const ept_op *ops, size_t count, size_t *posted);
  int32_t poll(ept_event *shown, size_t capacity);
  int32_t arm(int32_t *descriptor);
  int32_t quiesce(uint32_t rank, int32_t scope, uint64_t cookie);
  void make_ready(tcp::Stream *stream);
  void make_owing(tcp::Stream *stream);
  void forget(tcp::Stream *stream);  // in all lists

 private:
  // accept.cc
  void hello_arrived(tcp::Accepted *accepted);
  void proof_arrived(tcp::Accepted *accepted);
  void settle(tcp::Accepted *accepted);
  void settle_stream(tcp::Accepted *accepted, tcp::Peer *peer);
  void drop(tcp::Accepted *accepted);
  void stranger(const std::string &where, const char *what);
  bool answer(tcp::Accepted *accepted, int32_t code, const std::string &text, const tcp::ResumePoint &resume = {});
  // dial.cc
  void dial_connected(tcp::Dial *dial);
  void challenge_arrived(tcp::Dial *dial);
  void answer_arrived(tcp::Dial *dial);
  // reconnect.cc
  void dial_again(tcp::Dial *dial, tcp::Dial::Why why, uint64_t due_ns);
  // worker.cc
  int32_t check(const ept_op &op, tcp::Peer **peer);
  int32_t post_to_self(tcp::Peer *peer, const ept_op &op);
  void serve(tcp::Stream *stream);
  void serve_ready();
  bool spin();
  int32_t ask_epoll();
  void after_receive(tcp::Stream *stream);
  bool heat(tcp::Stream *stream);
  void flush_touched();
  void note_bulk(tcp::Stream *stream);
  void take_moved();
  void pay_owing(bool now);
  void give_quiesced();
  void note_consumed(const tcp::Peer &peer);
};
