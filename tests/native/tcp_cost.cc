// SPDX-License-Identifier: Apache-2.0
//
// What the TCP plugin costs beside bare sockets, two processes, one a core, both sides in turn in one call: an 8-byte
// write with immediate against a spinning ping-pong, 1 MiB writes against a blocking stream, and small writes a second.
// The loop that drives the plugin does what the engine does: it polls, spins a little, sleeps on `arm` amid bulk.
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sched.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include <algorithm>

#include "tcp_ranks.h"

namespace {

using plugin::Rank;

constexpr int kRounds = 5;
constexpr uint64_t kMebi = 1 << 20;

double seconds() { return static_cast<double>(plugin::now_ns()) * 1e-9; }
double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}
void pin(int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(static_cast<size_t>(cpu), &set);
  sched_setaffinity(0, sizeof set, &set);
}

void send_all(int fd, const void *bytes, size_t length) {
  for (size_t done = 0; done < length;) {
    ssize_t n = send(fd, static_cast<const char *>(bytes) + done, length - done, MSG_NOSIGNAL);
    if (n > 0) done += static_cast<size_t>(n);
  }
}
void receive_all(int fd, void *bytes, size_t length) {
  for (size_t done = 0; done < length;) {
    ssize_t n = recv(fd, static_cast<char *>(bytes) + done, length - done, 0);
    CHECK(n != 0);
    if (n > 0) done += static_cast<size_t>(n);
  }
}

struct Side {
  int me;
  int control;  // a socketpair to the other process
  int bare;     // a TCP connection to it
  std::unique_ptr<Rank> rank;
  std::vector<uint8_t> memory, source;
  ept_mem *mem, *source_mem;
  ept_region *region;
  uint64_t imms = 0, dones = 0;
  uint64_t idle_since = 0;
  uint64_t polls = 0, sleeps = 0;

  void meet() {
    char byte = 0;
    send_all(control, &byte, 1);
    receive_all(control, &byte, 1);
  }
  void swap_blobs(const std::string &mine, std::string *theirs) {
    uint32_t length = static_cast<uint32_t>(mine.size());
    send_all(control, &length, 4);
    send_all(control, mine.data(), length);
    receive_all(control, &length, 4);
    theirs->resize(length);
    receive_all(control, theirs->data(), length);
  }
  void step() {
    ept_event events[64];
    int32_t count = rank->backend.poll(rank->worker, events, 64);
    CHECK(count >= 0);
    ++polls;
    for (int32_t i = 0; i < count; ++i) {
      if (events[i].kind == EPT_EVENT_IMM) ++imms;
      if (events[i].kind == EPT_EVENT_LOCAL_DONE) ++dones;
      CHECK(events[i].kind != EPT_EVENT_ERROR);
      if (events[i].kind == EPT_EVENT_PEER) CHECK_EQ(events[i].code, EPT_OK);
    }
    if (count > 0) {
      idle_since = 0;
      return;
    }
    uint64_t now = plugin::now_ns();
    if (idle_since == 0) idle_since = now;
    int64_t bulk = 0;
    rank->backend.query(rank->instance, "bulk", &bulk);
    if (bulk == 0 && now - idle_since < 50'000) return;
    int fd = -1;
    if (rank->backend.arm(rank->worker, &fd) != EPT_OK) return;
    ++sleeps;
    pollfd waiting[2] = {{fd, POLLIN, 0}, {control, 0, 0}};
    ::poll(waiting, 2, 100);
  }
  void post(uint64_t length, uint32_t rail) {
    ept_op op = Rank::write(static_cast<uint32_t>(1 - me), source_mem, source.data(), region, 0, length, 7, 1);
    op.rail = rail;
    for (;;) {
      size_t posted = 0;
      int32_t code = rank->backend.post(rank->worker, &op, 1, &posted);
      if (code == EPT_OK) return;
      CHECK_EQ(code, EPT_LATER);
      step();
    }
  }

  double bare_pingpong(int iterations) {
    fcntl(bare, F_SETFL, O_NONBLOCK);
    uint64_t word = 0;
    meet();
    double start = seconds();
    for (int i = 0; i < iterations; ++i) {
      if (me == 0) send_all(bare, &word, 8);
      receive_all(bare, &word, 8);
      if (me == 1) send_all(bare, &word, 8);
    }
    return (seconds() - start) / iterations / 2 * 1e6;
  }
  double pingpong(int iterations) {
    meet();
    uint64_t before = imms;
    double start = seconds();
    for (int i = 1; i <= iterations; ++i) {
      if (me == 0) post(8, 0);
      while (imms < before + static_cast<uint64_t>(i)) step();
      if (me == 1) post(8, 0);
    }
    double took = (seconds() - start) / iterations / 2 * 1e6;
    settle();
    return took;
  }
  double bare_bandwidth(int count) {
    fcntl(bare, F_SETFL, 0);
    meet();
    double start = seconds();
    char byte = 0;
    for (int i = 0; i < count; ++i) {
      if (me == 0)
        send_all(bare, source.data(), kMebi);
      else
        receive_all(bare, memory.data(), kMebi);
    }
    if (me == 0)
      receive_all(bare, &byte, 1);
    else
      send_all(bare, &byte, 1);
    return count * static_cast<double>(kMebi) / (seconds() - start) * 1e-9;
  }
  // `window` writes in flight, over `rails` rails in turn.
  double bandwidth(int count, uint64_t length, uint32_t rails, uint64_t window) {
    meet();
    double start = seconds();
    uint64_t done_before = dones, imms_before = imms, n = static_cast<uint64_t>(count);
    if (me == 0) {
      for (uint64_t i = 0; i < n; ++i) {
        while (i - (dones - done_before) >= window) step();
        post(length, static_cast<uint32_t>(i) % rails);
      }
      while (dones < done_before + n) step();
    } else {
      while (imms < imms_before + n) step();
    }
    double took = seconds() - start;
    settle();
    return count * static_cast<double>(length) / took * 1e-9;
  }
  void settle() {  // the other side may still want an acknowledgement
    for (int turn = 0; turn < 2; ++turn) {
      for (int i = 0; i < 100; ++i) {
        idle_since = 0;  // no sleep
        step();
      }
      meet();
    }
  }
};

int tcp_pair(int side, int control) {
  int one = 1;
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t length = sizeof address;
  int fd = socket(AF_INET, SOCK_STREAM, 0);
  if (side == 0) {
    CHECK_EQ(bind(fd, reinterpret_cast<sockaddr *>(&address), sizeof address), 0);
    CHECK_EQ(listen(fd, 1), 0);
    getsockname(fd, reinterpret_cast<sockaddr *>(&address), &length);
    send_all(control, &address, sizeof address);
    int got = accept(fd, nullptr, nullptr);
    close(fd);
    fd = got;
  } else {
    receive_all(control, &address, sizeof address);
    CHECK_EQ(::connect(fd, reinterpret_cast<sockaddr *>(&address), sizeof address), 0);
  }
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  const char *congestion = getenv("EPT_BARE_CONGESTION");
  if (congestion) setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, congestion, static_cast<socklen_t>(strlen(congestion)));
  return fd;
}

}  // namespace

int main(int count, char **arguments) {
  const int scale = count > 1 ? atoi(arguments[1]) : 100;  // percent of the full length
  int control[2];
  CHECK_EQ(socketpair(AF_UNIX, SOCK_STREAM, 0, control), 0);
  pid_t child = fork();
  Side side{};
  side.me = child == 0 ? 1 : 0;
  side.control = control[side.me];
  close(control[1 - side.me]);
  pin(side.me);
  side.bare = tcp_pair(side.me, side.control);

  plugin::Options options;
  for (const ept_setting *s = tcp_ranks::backend().settings, *end = s + tcp_ranks::backend().setting_count; s != end;
       ++s)
    if (const char *value = getenv(("EPT_TCP_" + std::string(s->name)).c_str())) options[s->name] = value;
  plugin::Identity identity;
  identity.rank = static_cast<uint32_t>(side.me);
  side.rank = std::make_unique<Rank>(tcp_ranks::backend(), identity, options);
  std::string theirs;
  side.swap_blobs(side.rank->address(), &theirs);
  uint32_t other = static_cast<uint32_t>(1 - side.me);
  CHECK_OK(side.rank->backend, side.rank->open_peer(other, 0, theirs));
  while (side.rank->backend.peer_state(side.rank->instance, other) != EPT_OK) side.step();
  side.memory.assign(4 * kMebi, 1);
  side.source.assign(4 * kMebi, 2);
  side.mem = side.rank->enroll(side.memory.data(), side.memory.size());
  side.source_mem = side.rank->enroll(side.source.data(), side.source.size());
  side.swap_blobs(side.rank->grant(side.mem, other, 0, side.memory.size()).first, &theirs);
  side.region = side.rank->import(other, theirs);

  struct Line {
    const char *name;
    std::vector<double> bare, ours;
  };
  Line latency{"8 B one way, us", {}, {}}, wide{"1 MiB writes, 16 in flight, 1 rail, GB/s", {}, {}},
      two{"  2 rails in turn", {}, {}}, rate{"8 B writes, 64 in flight, million/s", {}, {}};
  for (int round = 0; round < kRounds; ++round) {
    latency.bare.push_back(side.bare_pingpong(200 * scale));
    latency.ours.push_back(side.pingpong(200 * scale));
    double floor = side.bare_bandwidth(5 * scale);
    wide.bare.push_back(floor);
    wide.ours.push_back(side.bandwidth(5 * scale, kMebi, 1, 16));
    two.bare.push_back(side.bare_bandwidth(5 * scale));
    two.ours.push_back(side.bandwidth(5 * scale, kMebi, 2, 16));
    rate.ours.push_back(side.bandwidth(2'000 * scale, 8, 1, 64) * 1e3 / 8);
  }
  if (side.me == 1) {
    side.rank->leave();
    _exit(0);
  }
  for (const Line *line : {&latency, &wide, &two, &rate}) {
    double ours = median(line->ours);
    if (line->bare.empty())
      printf("%-42s ours %6.2f\n", line->name, ours);
    else
      printf("%-42s bare %6.2f  ours %6.2f  ratio %.2f\n", line->name, median(line->bare), ours,
             ours / median(line->bare));
  }
  int status = 0;
  waitpid(child, &status, 0);
  return status;
}
