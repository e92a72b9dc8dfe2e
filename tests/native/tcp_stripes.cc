// SPDX-License-Identifier: Apache-2.0
//
// Streams over several interfaces: which ways there are, that each stream takes its own, that the loss of one moves its
// stream to another without anything lost, and that it goes home when its own comes back. In a network namespace of its
// own, where addresses come and go; skipped where the system refuses one.
#include <arpa/inet.h>
#include <net/if.h>
#include <netinet/in.h>
#include <sched.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#include <cerrno>
#include <fstream>
#include <iostream>

#include "tcp_ledger.h"

namespace {

using plugin::Rank;
using plugin::Window;
using tcp_ranks::backend;
using tcp_ranks::Node;

constexpr int kSkipped = 77;  // what meson takes for a skip

tcp::Endpoint endpoint(const char *text, uint16_t port = 7, uint8_t prefix = 24) {
  tcp::Endpoint made;
  made.family = 4;
  made.prefix = prefix;
  made.port = port;
  CHECK_EQ(inet_pton(AF_INET, text, made.bytes.data()), 1);
  return made;
}

std::string path_text(const tcp::Path &path) {
  std::string from = path.from.family == 0 ? "any" : to_text(path.from);
  return from.substr(0, from.rfind(':')) + ">" + to_text(path.to);
}

std::vector<std::string> paths_of(const std::vector<const char *> &own, const std::vector<const char *> &theirs,
                                  bool named, size_t stripe) {
  tcp::Address here, there;
  there.host[0] = 1;  // another machine
  for (const char *text : own) here.endpoints.push_back(endpoint(text, 1));
  for (const char *text : theirs) there.endpoints.push_back(endpoint(text));
  const tcp::Paths paths = tcp::find_paths(there, here, named);
  CHECK_EQ(paths.stripe, stripe);
  std::vector<std::string> texts;
  for (const tcp::Path &path : paths.list) texts.push_back(path_text(path));
  return texts;
}

void ways() {
  using Texts = std::vector<std::string>;
  // A way for each interface, in its own subnet, then the crossed ones.
  CHECK(paths_of({"10.1.0.1", "10.2.0.1"}, {"10.1.0.2", "10.2.0.2"}, true, 2) ==
        (Texts{"10.1.0.1>10.1.0.2:7", "10.2.0.1>10.2.0.2:7", "10.1.0.1>10.2.0.2:7", "10.2.0.1>10.1.0.2:7"}));
  CHECK(paths_of({"10.2.0.1", "10.1.0.1"}, {"10.1.0.2", "10.2.0.2"}, true, 2) ==
        (Texts{"10.2.0.1>10.2.0.2:7", "10.1.0.1>10.1.0.2:7", "10.2.0.1>10.1.0.2:7", "10.1.0.1>10.2.0.2:7"}));
  // All in one subnet, or in none that is shared: spread over the peer's addresses all the same.
  CHECK(paths_of({"10.1.0.1", "10.1.0.3"}, {"10.1.0.2", "10.1.0.4"}, true, 2) ==
        (Texts{"10.1.0.1>10.1.0.2:7", "10.1.0.3>10.1.0.4:7", "10.1.0.1>10.1.0.4:7", "10.1.0.3>10.1.0.2:7"}));
  CHECK(paths_of({"10.1.0.1", "10.2.0.1"}, {"10.8.0.2", "10.9.0.2"}, true, 2) ==
        (Texts{"10.1.0.1>10.8.0.2:7", "10.2.0.1>10.9.0.2:7", "10.1.0.1>10.9.0.2:7", "10.2.0.1>10.8.0.2:7"}));
  // The peer has one address, or this rank has.
  CHECK(paths_of({"10.1.0.1", "10.2.0.1"}, {"10.1.0.2"}, true, 2) ==
        (Texts{"10.1.0.1>10.1.0.2:7", "10.2.0.1>10.1.0.2:7"}));
  CHECK(paths_of({"10.1.0.1"}, {"10.2.0.2", "10.1.0.2"}, true, 1) ==
        (Texts{"10.1.0.1>10.1.0.2:7", "10.1.0.1>10.2.0.2:7"}));
  // Nobody has named interfaces: the routing table says how to leave.
  CHECK(paths_of({"10.1.0.1", "10.2.0.1"}, {"10.1.0.2", "10.2.0.2"}, false, 1) ==
        (Texts{"any>10.1.0.2:7", "any>10.2.0.2:7"}));
  // No way at all: another machine's loopback.
  CHECK(paths_of({"10.1.0.1"}, {"127.0.0.1"}, true, 1).empty());
}

// ---- a namespace with addresses of our own -------------------------------------------------------------------------

bool enter_namespace() {
  const uid_t user = getuid();
  if (unshare(CLONE_NEWNET) == 0) return true;
  if (unshare(CLONE_NEWUSER | CLONE_NEWNET) != 0) return false;
  std::ofstream("/proc/self/setgroups") << "deny";
  std::ofstream("/proc/self/uid_map") << "0 " << user << " 1";
  return true;
}

// An alias of the loopback interface, there or gone. False: not to be had here.
bool address(const char *name, const char *text, bool there) {
  int fd = socket(AF_INET, SOCK_DGRAM, 0);
  ifreq request{};
  snprintf(request.ifr_name, sizeof request.ifr_name, "%s", name);
  auto set = [&](unsigned long what, const char *value) {
    auto *at = reinterpret_cast<sockaddr_in *>(&request.ifr_addr);
    *at = {};
    at->sin_family = AF_INET;
    CHECK_EQ(inet_pton(AF_INET, value, &at->sin_addr), 1);
    return ioctl(fd, what, &request) == 0;
  };
  request.ifr_flags = 0;  // an alias that is taken down is gone
  const bool done =
      there ? set(SIOCSIFADDR, text) && set(SIOCSIFNETMASK, "255.255.255.0") : ioctl(fd, SIOCSIFFLAGS, &request) == 0;
  close(fd);
  return done;
}

bool loopback_up() {
  int fd = socket(AF_INET, SOCK_DGRAM, 0);
  ifreq request{};
  snprintf(request.ifr_name, sizeof request.ifr_name, "lo");
  request.ifr_flags = IFF_UP | IFF_LOOPBACK | IFF_RUNNING;
  const bool done = ioctl(fd, SIOCSIFFLAGS, &request) == 0;
  close(fd);
  return done;
}

// Established connections from `text`, as the kernel lists them.
int connections_from(const char *text) {
  in_addr wanted{};
  CHECK_EQ(inet_pton(AF_INET, text, &wanted), 1);
  std::ifstream list("/proc/self/net/tcp");
  std::string line;
  std::getline(list, line);
  int found = 0;
  while (std::getline(list, line)) {
    unsigned local = 0, local_port = 0, remote = 0, remote_port = 0, state = 0;
    CHECK_EQ(sscanf(line.c_str(), "%*d: %x:%x %x:%x %x", &local, &local_port, &remote, &remote_port, &state), 5);
    found += state == 1 && local == wanted.s_addr;
  }
  return found;
}

void one_of_two_is_lost() {
  const plugin::Options options = {{"streams", "2"}, {"interface", "10.77.1.0/24,10.77.2.0/24"}};
  plugin::Identity identity;
  identity.dead_ns = 8'000'000'000;
  Node a(identity, options);
  identity.rank = 1;
  Node b(identity, options);
  std::vector<Node *> nodes = {&a, &b};
  tcp_ranks::meet(nodes);
  // Each stream has a way of its own; both ends of a connection are here.
  CHECK_EQ(connections_from("10.77.1.1"), 2);
  CHECK_EQ(connections_from("10.77.2.1"), 2);
  Window forth(a.rank, b.rank, 64 << 10), back(b.rank, a.rank, 64 << 10);
  for (uint8_t &byte : forth.source) byte = static_cast<uint8_t>(1 + (&byte - forth.source.data()) % 251);
  uint64_t posted = 0;
  auto post = [&](uint64_t count) {
    for (uint64_t i = 0; i < count; ++i) {
      ept_op op =
          Rank::write(1, forth.source_mem, forth.source.data() + 64 * posted, forth.region, 64 * posted, 64, 1, posted);
      op.rail = static_cast<uint32_t>(i % 2);
      CHECK_EQ(a.rank.post(op), EPT_OK);
      ++posted;
    }
  };
  auto until = [&](const std::function<bool()> &holds) {
    return tcp_ranks::until(
        nodes,
        [&] {
          tcp_ledger::tick();
          return holds();
        },
        60'000);
  };
  auto all_there = [&] { return b.count(EPT_EVENT_IMM) == posted && a.count(EPT_EVENT_LOCAL_DONE) == posted; };
  post(100);
  CHECK(until(all_there));
  CHECK_EQ(a.rank.count(1).reconnects, 0);

  CHECK(address("lo:2", "10.77.2.1", false));
  post(100);
  CHECK(until(all_there));
  CHECK_EQ(a.rank.count(1).reconnects, 1);
  CHECK(a.rank.count(1).replayed > 0);
  CHECK_EQ(a.rank.count(0).reconnects, 0);  // the other went on
  CHECK_EQ(connections_from("10.77.1.1"), 4);

  CHECK(address("lo:2", "10.77.2.1", true));
  CHECK(until([&] { return a.rank.count(1).reconnects == 2; }));
  post(100);
  CHECK(until(all_there));
  CHECK_EQ(connections_from("10.77.1.1"), 2);
  CHECK_EQ(connections_from("10.77.2.1"), 2);
  CHECK_EQ(a.count(EPT_EVENT_ERROR) + b.count(EPT_EVENT_ERROR), 0);
  CHECK(std::equal(forth.bytes.begin(), forth.bytes.begin() + static_cast<long>(64 * posted), forth.source.begin()));
  for (Node *node : nodes) CHECK(node->peer_ended() == nullptr);
}

}  // namespace

int main() {
  signal(SIGPIPE, SIG_IGN);
  tcp_ledger::clock_by_steps(100'000);
  plugin::log_level = EPT_LOG_WARNING;
  RUN(ways());
  if (!enter_namespace() || !loopback_up() || !address("lo:1", "10.77.1.1", true) ||
      !address("lo:2", "10.77.2.1", true)) {
    std::cout << "  skipped: this system gives no network namespace with addresses of one's own: " << strerror(errno)
              << std::endl;
    return kSkipped;
  }
  backend();
  RUN(one_of_two_is_lost());
}
