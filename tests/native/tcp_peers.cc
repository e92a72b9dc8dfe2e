// SPDX-License-Identifier: Apache-2.0
//
// The life of a peer: killed, stopped, leaving in order, fenced, coming back under a new epoch. Each accepted operation
// ends exactly once whatever happens. And sleep: an idle rank uses no CPU, and no wake-up is ever lost.
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>

#include <random>
#include <set>

#include "tcp_ranks.h"

namespace {

using plugin::Identity;
using plugin::Options;
using plugin::Rank;
using plugin::Window;
using tcp_ranks::all_up;
using tcp_ranks::backend;
using tcp_ranks::meet;
using tcp_ranks::Node;
using tcp_ranks::Pair;
using tcp_ranks::poll_for;
using tcp_ranks::until;

void put(int fd, const std::string &text) {
  uint32_t length = static_cast<uint32_t>(text.size());
  CHECK_EQ(write(fd, &length, sizeof length), sizeof length);
  CHECK_EQ(write(fd, text.data(), length), length);
}
std::string take(int fd) {
  uint32_t length = 0;
  CHECK_EQ(read(fd, &length, sizeof length), sizeof length);
  std::string text(length, 0);
  for (size_t have = 0; have < length;) {
    ssize_t n = read(fd, text.data() + have, length - have);
    CHECK(n > 0);
    have += static_cast<size_t>(n);
  }
  return text;
}

// Rank 1 in a process of its own: exports 64 MiB to rank 0, polls for ever.
struct Process {
  explicit Process(const Options &options, const Identity &identity) {
    int pair[2];
    CHECK_EQ(socketpair(AF_UNIX, SOCK_STREAM, 0, pair), 0);
    pid = fork();
    if (pid == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      close(pair[0]);
      Identity own = identity;
      own.rank = 1;
      Node node(own, options);
      std::vector<uint8_t> memory(64 << 20);
      ept_mem *mem = node.rank.enroll(memory.data(), memory.size());
      put(pair[1], node.rank.address());
      CHECK_OK(backend(), node.rank.open_peer(0, own.epoch, take(pair[1])));
      put(pair[1], node.rank.grant(mem, 0, 0, memory.size()).first);
      for (;;) {
        node.poll();
        node.events.clear();
      }
    }
    close(pair[1]);
    control = pair[0];
  }
  ~Process() {
    kill(pid, SIGKILL);
    waitpid(pid, nullptr, 0);
    close(control);
  }
  pid_t pid;
  int control;
};

struct Killable {
  explicit Killable(const Options &options = {}, const Identity &identity = Identity{})
      : process(options, identity), node(identity, options), source(1 << 20, 3) {
    std::string theirs = take(process.control);
    put(process.control, node.rank.address());
    CHECK_OK(backend(), node.rank.open_peer(1, identity.epoch, theirs));
    region = node.rank.import(1, take(process.control));
    source_mem = node.rank.enroll(source.data(), source.size());
    CHECK(until({&node}, [&] { return node.find(EPT_EVENT_PEER) != nullptr; }));
    CHECK_EQ(node.find(EPT_EVENT_PEER)->code, EPT_OK);
    node.events.clear();
  }
  // Posts until the queue says LATER.
  void fill(uint64_t length) {
    for (;;) {
      ept_op op = Rank::write(1, source_mem, source.data(), region, 0, length, 1, ++cookies);
      op.rail = static_cast<uint32_t>(cookies % 2);
      if (node.rank.post(op) != EPT_OK) break;
    }
    --cookies;
  }
  Process process;
  Node node;
  std::vector<uint8_t> source;
  ept_mem *source_mem;
  ept_region *region;
  uint64_t cookies = 0;
};

// LOCAL_DONEs, then PEER, then ERRORs: each cookie once.
void check_end(const Node &node, uint64_t cookies, int32_t code) {
  std::multiset<uint64_t> seen;
  bool ended = false;
  for (const plugin::Event &event : node.events) {
    if (event.kind == EPT_EVENT_PEER && event.code == EPT_LATER) {
      CHECK(!ended);  // in doubt, before it is given up
      CHECK_HAS(event.words, "rank 1 at 127.0.0.1:");
    } else if (event.kind == EPT_EVENT_PEER) {
      CHECK(!ended);
      ended = true;
      CHECK_EQ(event.code, code);
      CHECK_HAS(event.words, "rank 1 at 127.0.0.1:");
    } else if (event.kind == EPT_EVENT_ERROR) {
      CHECK(ended);
      CHECK_EQ(event.code, code);
      CHECK(!event.words.empty());
      seen.insert(event.cookie);
    } else {
      CHECK_EQ(event.kind, EPT_EVENT_LOCAL_DONE);
      CHECK(!ended);
      seen.insert(event.cookie);
    }
  }
  CHECK(ended);
  CHECK_EQ(seen.size(), cookies);
  CHECK_EQ(std::set<uint64_t>(seen.begin(), seen.end()).size(), cookies);
}

void killed(uint64_t length) {
  Killable peer;
  for (int i = 0; i < 20; ++i) peer.node.poll();
  peer.fill(length);
  for (int i = 0; i < 5; ++i) peer.node.poll();
  const uint64_t start = plugin::now_ns();
  kill(peer.process.pid, SIGKILL);
  peer.fill(length);
  CHECK(until({&peer.node}, [&] {
    return peer.node.count(EPT_EVENT_LOCAL_DONE) + peer.node.count(EPT_EVENT_ERROR) == peer.cookies;
  }));
  CHECK(plugin::now_ns() - start < 3'000'000'000);
  check_end(peer.node, peer.cookies, EPT_E_PEER_LOST);
  CHECK(peer.node.count(EPT_EVENT_ERROR) > 0);
  CHECK_EQ(backend().peer_state(peer.node.rank.instance, 1), EPT_E_PEER_LOST);
  ept_op op = Rank::message(1, "x", 1);
  CHECK_EQ(peer.node.rank.post(op), EPT_E_PEER_LOST);
  CHECK_HAS(plugin::error_text(backend()), "rank 1");
  // Local quiesce is through; remote can't promise what became of them.
  CHECK_OK(backend(), backend().quiesce(peer.node.rank.worker, 1, EPT_SCOPE_LOCAL, 5));
  CHECK_EQ(peer.node.rank.expect(EPT_EVENT_QUIESCED).code, EPT_OK);
  CHECK_OK(backend(), backend().quiesce(peer.node.rank.worker, 1, EPT_SCOPE_REMOTE, 6));
  CHECK_EQ(peer.node.rank.expect(EPT_EVENT_QUIESCED).code, EPT_E_STUCK);
}

// Its machine answers, its process does not: slow, but alive, for longer than a dead one would be given.
void stopped() {
  Identity identity;
  identity.dead_ns = 1'000'000'000;
  Killable peer({{"rcvbuf", "65536"}, {"sndbuf", "65536"}, {"depth", "16"}}, identity);
  kill(peer.process.pid, SIGSTOP);
  for (int i = 0; i < 40; ++i) peer.fill(1 << 18);
  poll_for({&peer.node}, 3'500);
  CHECK_EQ(peer.node.count(EPT_EVENT_PEER), 0);
  CHECK(peer.node.count(EPT_EVENT_LOCAL_DONE) < peer.cookies);
  kill(peer.process.pid, SIGCONT);
  CHECK(until({&peer.node}, [&] { return peer.node.count(EPT_EVENT_LOCAL_DONE) == peer.cookies; }));
  CHECK_EQ(peer.node.count(EPT_EVENT_ERROR), 0);
}

// A rank that closes: its peer has everything that was sent before, learns that it left, and did not die.
void leaving() {
  Pair pair;
  Window forth(pair.a->rank, pair.b->rank, 4096), back(pair.b->rank, pair.a->rank, 4096);
  forth.source.assign(4096, 4);
  // Unread bytes at the one who closes must not reset what it said (its own socket has the acknowledgements unread).
  for (uint64_t i = 0; i < 100; ++i)
    CHECK_EQ(pair.b->rank.post(Rank::write(0, back.source_mem, back.source.data(), back.region, 0, 4096, 1, i)),
             EPT_OK);
  CHECK_EQ(pair.a->rank.post(Rank::write(1, forth.source_mem, forth.source.data(), forth.region, 0, 4096, 7, 1)),
           EPT_OK);
  CHECK_OK(backend(), backend().peer_close(pair.a->rank.instance, 1));
  CHECK_EQ(backend().peer_state(pair.a->rank.instance, 1), EPT_E_CLOSED);
  CHECK_EQ(backend().peer_close(pair.a->rank.instance, 1), EPT_E_INVALID);
  CHECK(until(pair.nodes, [&] {
    return pair.b->peer_ended() != nullptr && pair.b->count(EPT_EVENT_ERROR) == 100 &&
           pair.a->count(EPT_EVENT_ERROR) == 1;
  }));
  CHECK_EQ(pair.a->count(EPT_EVENT_PEER), 0);  // it asked for it
  CHECK_EQ(pair.a->find(EPT_EVENT_ERROR)->code, EPT_E_CLOSED);
  CHECK_EQ(pair.b->events.front().kind, EPT_EVENT_IMM);
  CHECK_EQ(pair.b->events.front().immediate, 7);
  CHECK(forth.bytes == forth.source);
  CHECK_EQ(pair.b->peer_ended()->code, EPT_E_CLOSED);
  CHECK_HAS(pair.b->peer_ended()->words, "left");
  CHECK_EQ(backend().peer_state(pair.b->rank.instance, 0), EPT_E_CLOSED);
  poll_for(pair.nodes, 20);
  CHECK_EQ(pair.b->count(EPT_EVENT_PEER), 1);
}

// In the midst of a long frame there is nothing orderly to say: the other side sees a loss, and no immediate.
void leaving_amid_a_frame() {
  Pair pair({{"sndbuf", "65536"}, {"rcvbuf", "65536"}});
  Window window(pair.a->rank, pair.b->rank, 32 << 20);
  CHECK_EQ(pair.a->rank.post(Rank::write(1, window.source_mem, window.source.data(), window.region, 0, 32 << 20, 1, 1)),
           EPT_OK);
  for (int i = 0; i < 10; ++i)
    for (Node *node : pair.nodes) node->poll();
  CHECK_OK(backend(), backend().peer_close(pair.a->rank.instance, 1));
  CHECK_EQ(pair.a->rank.release(window.source_mem), EPT_OK);  // nothing reads it any more
  CHECK(until(pair.nodes, [&] { return pair.b->peer_ended() != nullptr; }));
  CHECK_EQ(pair.b->peer_ended()->code, EPT_E_PEER_LOST);
  CHECK_HAS(pair.b->peer_ended()->words, "inside a frame");
  CHECK_EQ(pair.b->count(EPT_EVENT_IMM), 0);
}

// After FENCED nothing of that epoch lands, and the count is exact; a new epoch comes back, its old keys do not.
void fenced_and_back() {
  Node b(Identity{1, 2});
  auto first = std::make_unique<Node>(Identity{0, 2, 3});
  meet({first.get(), &b});
  Window window(first->rank, b.rank, 4096);
  window.source.assign(4096, 9);
  const std::string old_blob = window.blob;
  for (uint64_t i = 0; i < 30; ++i) {
    ept_op op = Rank::write(1, window.source_mem, window.source.data(), window.region, 0, 64, 1, i);
    op.rail = i % 3 == 0 ? 1 : 0;
    CHECK_EQ(first->rank.post(op), EPT_OK);
  }
  CHECK(until({first.get(), &b}, [&] { return b.count(EPT_EVENT_IMM) == 30; }));
  b.events.clear();
  // More is under way when the fence comes down: it is in the sockets, and stays there.
  for (uint64_t i = 0; i < 10; ++i)
    CHECK_EQ(first->rank.post(Rank::write(1, window.source_mem, window.source.data(), window.region, 1024, 64, 1, i)),
             EPT_OK);
  CHECK_OK(backend(), backend().peer_fence(b.rank.instance, 0, 3, 88));
  CHECK(until({&b}, [&] { return b.count(EPT_EVENT_FENCED) == 2; }));
  for (const plugin::Event &event : b.events) {
    if (event.kind != EPT_EVENT_FENCED) continue;
    CHECK_EQ(event.cookie, 88);
    CHECK_EQ(event.peer, 0);
    CHECK_EQ(event.immediate, event.rail == 0 ? 20 : 10);
  }
  poll_for({first.get(), &b}, 50);
  CHECK_EQ(window.bytes[1024], 0);
  CHECK_EQ(b.count(EPT_EVENT_IMM), 0);
  CHECK(until({first.get(), &b}, [&] { return first->peer_ended() != nullptr; }));
  CHECK_EQ(first->peer_ended()->code, EPT_E_PEER_LOST);
  CHECK_EQ(b.rank.open_peer(0, 3, first->rank.address()), EPT_E_PEER_LOST);
  // The process starts again.
  Node second(Identity{0, 2, 4});
  CHECK_OK(backend(), second.rank.open_peer(1, 0, b.rank.address()));
  poll_for({&second, &b}, 20);
  CHECK_OK(backend(), b.rank.open_peer(0, 4, second.rank.address()));
  CHECK(until({&second, &b}, [&] { return all_up({&second, &b}); }));
  std::vector<uint8_t> source(64, 5);
  ept_mem *mem = second.rank.enroll(source.data(), source.size());
  CHECK_EQ(second.rank.post(Rank::write(1, mem, source.data(), second.rank.import(1, old_blob), 0, 64, 1, 7)), EPT_OK);
  CHECK(until({&second, &b}, [&] { return second.with_cookie(7) != nullptr; }));
  CHECK_EQ(second.with_cookie(7)->code, EPT_E_ACCESS);
  auto [blob, key] = b.rank.grant(window.mem, 0, 0, 4096);
  CHECK_EQ(second.rank.post(Rank::write(1, mem, source.data(), second.rank.import(1, blob), 0, 64, 1, 8)), EPT_OK);
  CHECK(until({&second, &b}, [&] { return second.with_cookie(8) != nullptr; }));
  CHECK_EQ(second.with_cookie(8)->kind, EPT_EVENT_LOCAL_DONE);
  CHECK_EQ(window.bytes[0], 5);
  // The former life knocks again: it is told that its time is over.
  CHECK_OK(backend(), backend().peer_close(first->rank.instance, 1));
  CHECK_OK(backend(), first->rank.open_peer(1, 0, b.rank.address()));
  first->events.clear();
  CHECK(until({first.get(), &b}, [&] { return first->peer_ended() != nullptr; }));
  CHECK_EQ(first->peer_ended()->code, EPT_E_PEER_LOST);
  CHECK_HAS(first->peer_ended()->words, "epoch 3 of rank 0 is over");
}

double cpu_seconds() {
  timespec t;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_nsec) * 1e-9;
}

// Arms all; sleeps until one of them has something. -1: nothing within the limit.
int sleep_on(const std::vector<Node *> &nodes, int limit_ms) {
  std::vector<pollfd> fds;
  for (size_t i = 0; i < nodes.size(); ++i) {
    int fd = -1;
    const int32_t code = backend().arm(nodes[i]->rank.worker, &fd);
    CHECK(fd >= 0);
    if (code == EPT_LATER) return static_cast<int>(i);
    CHECK_EQ(code, EPT_OK);
    fds.push_back({fd, POLLIN, 0});
  }
  if (::poll(fds.data(), fds.size(), limit_ms) <= 0) return -1;
  for (size_t i = 0; i < fds.size(); ++i)
    if (fds[i].revents) return static_cast<int>(i);
  return -1;
}

void idle() {
  Pair pair;
  Window window(pair.a->rank, pair.b->rank, 4096);
  for (uint64_t i = 0; i < 100; ++i) {
    CHECK_EQ(pair.a->rank.post(Rank::signal(1, window.region, 1, i)), EPT_OK);
    for (Node *node : pair.nodes) node->poll();
  }
  CHECK(until(pair.nodes, [&] { return pair.a->count(EPT_EVENT_LOCAL_DONE) == 100; }));
  while (sleep_on(pair.nodes, 50) >= 0)
    for (Node *node : pair.nodes) node->poll();
  const double before = cpu_seconds();
  int wakes = 0;
  const uint64_t end = plugin::now_ns() + 1'500'000'000;
  while (plugin::now_ns() < end) {
    if (sleep_on(pair.nodes, 1'500) >= 0) ++wakes;
    for (Node *node : pair.nodes) node->poll();
  }
  CHECK(wakes <= 2);
  CHECK(cpu_seconds() - before < 0.02);
  // And it is still awake when it counts.
  CHECK_EQ(pair.a->rank.post(Rank::signal(1, window.region, 9, 500)), EPT_OK);
  CHECK(sleep_on({pair.b.get()}, 2'000) == 0);
  CHECK_EQ(pair.b->rank.expect(EPT_EVENT_IMM).immediate, 9);
}

// Everything is driven by sleeping alone: a wake-up that is lost would stop it.
void asleep(const Options &options, uint64_t longest) {
  Pair pair(options);
  Window forth(pair.a->rank, pair.b->rank, longest), back(pair.b->rank, pair.a->rank, longest);
  std::mt19937 random(5);
  uint64_t posted[2] = {0, 0};
  for (int round = 0; round < 400; ++round) {
    const int which = static_cast<int>(random() % 2);
    Node *from = pair.nodes[static_cast<size_t>(which)];
    Window &window = which == 0 ? forth : back;
    for (uint32_t i = random() % 4 + 1; i; --i) {
      ept_op op = Rank::write(static_cast<uint32_t>(1 - which), window.source_mem, window.source.data(), window.region,
                              0, random() % (longest + 1), 1, posted[which]);
      op.rail = random() % 2;
      if (from->rank.post(op) == EPT_OK) ++posted[which];
    }
    if (random() % 3 == 0) from->poll(1);  // some are only spun on, so that epoll's news grow stale
    if (random() % 4 && round != 399) continue;
    while (pair.b->count(EPT_EVENT_IMM) < posted[0] || pair.a->count(EPT_EVENT_IMM) < posted[1] ||
           pair.a->count(EPT_EVENT_LOCAL_DONE) < posted[0] || pair.b->count(EPT_EVENT_LOCAL_DONE) < posted[1]) {
      const int woken = sleep_on(pair.nodes, 5'000);
      CHECK(woken >= 0);
      pair.nodes[static_cast<size_t>(woken)]->poll(1 + random() % 8);
    }
  }
}

// Connecting too: from open to up without a single poll that was not asked for.
void asleep_while_connecting() {
  Node a(Identity{0, 2}), b(Identity{1, 2});
  CHECK_OK(backend(), a.rank.open_peer(1, 0, b.rank.address()));
  std::vector<Node *> nodes = {&a, &b};
  for (int i = 0; !all_up(nodes); ++i) {
    if (i == 3) CHECK_OK(backend(), b.rank.open_peer(0, 0, a.rank.address()));
    const int woken = sleep_on(nodes, i < 3 ? 20 : 5'000);
    CHECK(woken >= 0 || i < 3);
    if (woken >= 0) nodes[static_cast<size_t>(woken)]->poll();
  }
  // A port where nobody listens: tried again and again, without burning a core.
  Node lonely(Identity{0, 2});
  std::string address;
  {
    Node gone(Identity{1, 2});
    address = gone.rank.address();
  }
  CHECK_OK(backend(), lonely.rank.open_peer(1, 0, address));
  const double before = cpu_seconds();
  const uint64_t end = plugin::now_ns() + 700'000'000;
  while (plugin::now_ns() < end)
    if (sleep_on({&lonely}, 100) >= 0) lonely.poll();
  CHECK(cpu_seconds() - before < 0.1);
  CHECK_EQ(backend().peer_state(lonely.rank.instance, 1), EPT_LATER);
  CHECK_HAS(plugin::error_text(backend()), "refused");
}

}  // namespace

int main() {
  signal(SIGPIPE, SIG_DFL);  // a send to a dead peer must not raise it
  backend();
  RUN(killed(8));
  RUN(killed(1 << 20));
  RUN(stopped());
  RUN(leaving());
  RUN(leaving_amid_a_frame());
  RUN(fenced_and_back());
  RUN(idle());
  RUN(asleep({{"streams", "2"}}, 3'000));
  RUN(asleep({{"streams", "2"}, {"sndbuf", "32768"}, {"rcvbuf", "32768"}}, 300'000));
  RUN(asleep_while_connecting());
}
