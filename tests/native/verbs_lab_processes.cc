// SPDX-License-Identifier: Apache-2.0
//
// Ranks of verbs_lab as processes of their own. Each is this program again, with a socket to its parent, over which the
// addresses go; then it makes its steps and ends, or, in the test of a killed rank, says when it is amid the fatal one.
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include <chrono>

#include "verbs_lab.h"

using namespace moe_test;

namespace {

constexpr uint32_t kSteps = 10;
constexpr int kLimitMs = 240'000;         // for what a process has to say: a wait of its own ends before
constexpr uint64_t kDead = 10 * kSecond;  // silent for so long, though the emulator may stand still for seconds

// ---- a socket between a parent and a rank: a length and as many bytes ----

void give(int fd, const std::vector<char> &bytes) {
  const uint64_t length = bytes.size();
  CHECK(write(fd, &length, sizeof length) == sizeof length);
  CHECK(write(fd, bytes.data(), length) == static_cast<ssize_t>(length));
}

std::vector<char> take(int fd, const char *what) {
  pollfd ready{fd, POLLIN, 0};
  if (poll(&ready, 1, kLimitMs) != 1) check::failed(__FILE__, __LINE__, std::string("a process did not say ") + what);
  uint64_t length = 0;
  if (recv(fd, &length, sizeof length, MSG_WAITALL) != sizeof length)
    check::failed(__FILE__, __LINE__, std::string("a process ended before it said ") + what);
  std::vector<char> bytes(length);
  if (length > 0) CHECK(recv(fd, bytes.data(), length, MSG_WAITALL) == static_cast<ssize_t>(length));
  return bytes;
}

// ---- the parent's side ----

struct Child {
  pid_t pid = -1;
  int fd = -1;
};

std::vector<Child> start(const Devices &devices, const char *part) {
  std::vector<Child> children(devices.size());
  const std::string world = std::to_string(devices.size()), parent = std::to_string(getpid());
  for (size_t rank = 0; rank < devices.size(); rank++) {
    int ends[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0);
    const std::string number = std::to_string(rank), fd = std::to_string(ends[1]);
    const pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
      close(ends[0]);
      for (const Child &other : children)
        if (other.fd >= 0) close(other.fd);
      execl("/proc/self/exe", "verbs_lab", "--rank", part, number.c_str(), world.c_str(), fd.c_str(),
            devices[rank].c_str(), parent.c_str(), nullptr);
      _exit(127);
    }
    close(ends[1]);
    children[rank] = {pid, ends[0]};
  }
  std::vector<std::vector<char>> addresses;
  for (const Child &child : children) addresses.push_back(take(child.fd, "its address"));
  for (const Child &child : children)
    for (const std::vector<char> &each : addresses) give(child.fd, each);
  return children;
}

void end_well(const Child &child) {
  take(child.fd, "that all went well");
  int status = 0;
  CHECK(waitpid(child.pid, &status, 0) == child.pid);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  close(child.fd);
}

// ---- a rank's side ----

struct Rank {
  uint32_t rank, world;
  int fd;
  ept_engine *engine = nullptr;
  ept_arena *arena = nullptr;
  ept_moe *moe = nullptr;
  ept_moe_config config{};

  Rank(uint32_t of_rank, uint32_t of_world, int to_parent, const char *devices, const char *job, uint64_t dead_ns)
      : rank(of_rank), world(of_world), fd(to_parent) {
    Options options = lab_options();
    options.dead_ns = dead_ns;
    options.values = {{"devices", devices}};
    engine = open_engine(std::string("verbs_lab ") + job, rank, world, open_plugin("verbs"), options);
    give(fd, address_of(engine));
    std::vector<std::vector<char>> addresses;
    for (uint32_t i = 0; i < world; i++) addresses.push_back(take(fd, "the addresses"));
    connect_engine(engine, addresses, options);
    Error error;
    OK(ept_arena_create(engine, &arena, &error), error);
    config = lab_config(world);
    config.rank = rank;
    OK(ept_moe_create(arena, &config, &moe, &error), error);
  }

  void end() {
    Error error;
    OK(ept_moe_close(moe, &error), error);
    OK(ept_arena_close(arena, 60 * kSecond, &error), error);
    ept_engine_close(engine, 2 * kSecond, nullptr);
    give(fd, {});
  }
};

// Amid a step, rank `victim` falls silent for ever. What the others get, and how they go on.
void survive(Rank &self, Runner &runner, uint32_t victim) {
  Step fatal = lab_step(kSteps, self.config);
  fatal.lane = 0;
  fatal.cached = false;
  runner.begin(fatal);
  runner.send(fatal, nullptr);
  give(self.fd, {});  // now
  std::vector<uint8_t> room(size_t{self.world} * self.config.max_tokens * self.config.hidden * 2 + 16);
  uint8_t *x = room.data() + (16 - reinterpret_cast<uintptr_t>(room.data()) % 16) % 16;
  ept_dispatch_outputs out{};
  out.size = sizeof out;
  out.layout = EPT_LAYOUT_ROWS;
  out.x = tensor(x, EPT_DTYPE_BF16, {int64_t{self.world} * self.config.max_tokens, self.config.hidden});
  ept_routing *routing = nullptr;
  Error error;
  const int32_t code = ept_moe_dispatch_recv(self.moe, 0, &out, &routing, &error);
  if (code != EPT_E_PEER_LOST || error.peer != static_cast<int32_t>(victim))
    check::failed(__FILE__, __LINE__,
                  std::string("a killed peer is told as ") + ept_code_name(code) + ": " + error.text);
  printf("rank %u: %s\n", self.rank, error.text);
  fflush(stdout);
  std::vector<uint8_t> active(self.world, 1);
  active[victim] = 0;
  OK(ept_engine_mask(self.engine, victim, 1, "its process was killed", &error), error);
  OK(ept_arena_members(self.arena, 1, active.data(), 0, &error), error);
  OK(ept_engine_tell_membership(self.engine, 1, &error), error);
  OK(ept_moe_reset(self.moe, 120 * kSecond, &error), error);
  Step without;
  without.masked.assign(self.world, 0);
  without.masked[victim] = 1;
  without.membership = 1;
  for (uint32_t i = 1; i <= kSteps; i++) {
    Step step = lab_step(kSteps + i, self.config);
    step.masked = without.masked;
    step.membership = 1;
    runner.run(step);
  }
  run_last(runner, self.config, without);
}

}  // namespace

void ranks_as_processes(const Devices &devices) {
  const auto begun = std::chrono::steady_clock::now();
  for (const Child &child : start(devices, "steps")) end_well(child);
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begun;
  printf("processes: %zu ranks, %u steps, %.1f s\n", devices.size(), kSteps, took.count());
  fflush(stdout);
}

void a_killed_process(const Devices &devices) {
  const auto begun = std::chrono::steady_clock::now();
  std::vector<Child> children = start(devices, "killed");
  for (const Child &child : children) take(child.fd, "that it is amid the step");
  const Child victim = children.back();
  children.pop_back();
  CHECK(kill(victim.pid, SIGKILL) == 0);
  int status = 0;
  CHECK(waitpid(victim.pid, &status, 0) == victim.pid);
  CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
  for (const Child &child : children) end_well(child);
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begun;
  printf("killed: %zu ranks of which one was, %u steps before and after, %.1f s\n", devices.size(), kSteps,
         took.count());
  fflush(stdout);
}

// --rank PART RANK WORLD FD DEVICES JOB
int run_rank(int argc, char **argv) {
  CHECK_EQ(argc, 8);
  const std::string part = argv[2];
  const auto number = static_cast<uint32_t>(atoi(argv[3])), world = static_cast<uint32_t>(atoi(argv[4]));
  const bool fatal = part == "killed";
  Rank self(number, world, atoi(argv[5]), argv[6], argv[7], fatal ? kDead : 120 * kSecond);
  Runner runner(self.moe, self.config, nullptr);
  for (uint32_t i = 0; i < kSteps; i++) runner.run(lab_step(i, self.config));
  run_last(runner, self.config);
  if (fatal && number == world - 1) {
    give(self.fd, {});
    for (;;) pause();  // its engine is well and says so, until it is killed
  }
  if (fatal) survive(self, runner, world - 1);
  self.end();
  return 0;
}
