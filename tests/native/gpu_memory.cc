// SPDX-License-Identifier: Apache-2.0
//
// GPU memory for other processes, over a driver that stands in for CUDA's (stand_in_driver.cc): by IPC and by
// descriptors, from process to process; and strangers at the Unix socket that descriptors are handed out by.
#include "cuda/memory.h"

#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "moe_group.h"

using namespace ept::cuda;

namespace {

const char *program;
constexpr uint64_t kBytes = 3 << 20, kSecond = 1'000'000'000, kPatience = 60 * kSecond;

std::shared_ptr<Primary> primary() {
  std::shared_ptr<Primary> made;
  moe_test::Error error;
  OK(Primary::open(0, &made, &error), error);
  return made;
}

uint8_t byte_at(uint64_t i, uint32_t round) { return uint8_t(i * 2654435761u >> 13) ^ uint8_t(round); }
uint8_t *bytes_of(uint64_t address) { return reinterpret_cast<uint8_t *>(uintptr_t(address)); }

int64_t alive() { return reinterpret_cast<int64_t (*)()>(symbol("stand_in_alive"))(); }

size_t descriptors() {
  size_t n = 0;
  DIR *all = opendir("/proc/self/fd");
  while (all && readdir(all)) n++;
  closedir(all);
  return n;
}

// The child maps what its stdin tells it, looks at every byte, and writes others there.
int child() {
  std::string blob(4096, 0);
  const ssize_t length = read(0, blob.data(), blob.size());
  CHECK(length > 0);
  blob.resize(size_t(length));
  moe_test::Error error;
  std::unique_ptr<MappedMemory> memory;
  OK(MappedMemory::open(primary(), blob, &memory, &error), error);
  CHECK(!memory->same_process());
  CHECK(memory->bytes() >= kBytes);
  for (uint64_t i = 0; i < kBytes; i++) CHECK_EQ(bytes_of(memory->address())[i], byte_at(i, 1));
  for (uint64_t i = 0; i < kBytes; i++) bytes_of(memory->address())[i] = byte_at(i, 2);
  return 0;
}

int run_child(const std::string &blob) {
  int to_child[2];
  CHECK(pipe(to_child) == 0);
  const pid_t pid = fork();
  if (pid == 0) {
    dup2(to_child[0], 0);
    execl(program, program, "child", nullptr);
    _exit(126);
  }
  close(to_child[0]);
  CHECK_EQ(size_t(write(to_child[1], blob.data(), blob.size())), blob.size());
  close(to_child[1]);
  int status = -1;
  CHECK_EQ(waitpid(pid, &status, 0), pid);
  return status;
}

void across(const char *what, Sharing asked, Sharing got, const char *lacks) {
  check::running(what);
  setenv("STAND_IN_WITHOUT", lacks, 1);
  const int64_t before = alive();
  const size_t open_before = descriptors();
  {
    moe_test::Error error;
    std::unique_ptr<DeviceMemory> memory;
    OK(DeviceMemory::allocate(primary(), kBytes, &memory, &error, asked), error);
    CHECK(memory->sharing() == got);
    for (uint64_t i = 0; i < kBytes; i++) {
      CHECK_EQ(bytes_of(memory->address())[i], 0);
      bytes_of(memory->address())[i] = byte_at(i, 1);
    }
    std::string blob, again;
    OK(memory->blob(&blob, &error), error);
    OK(memory->blob(&again, &error), error);
    CHECK(blob == again);  // by it a peer knows that it has mapped this already
    CHECK_EQ(run_child(blob), 0);
    for (uint64_t i = 0; i < kBytes; i++) CHECK_EQ(bytes_of(memory->address())[i], byte_at(i, 2));
    std::unique_ptr<MappedMemory> own;
    OK(MappedMemory::open(primary(), blob, &own, &error), error);
    CHECK(own->same_process());
    CHECK_EQ(own->address(), memory->address());
  }
  CHECK_EQ(alive(), before);
  CHECK_EQ(descriptors(), open_before);
}

void refused() {
  check::running("ways that are not there, and blobs that are none");
  moe_test::Error error;
  std::unique_ptr<DeviceMemory> memory;
  std::string blob;
  setenv("STAND_IN_WITHOUT", "virtual", 1);
  CHECK_EQ(DeviceMemory::allocate(primary(), kBytes, &memory, &error, Sharing::descriptors), EPT_E_UNSUPPORTED);
  CHECK_HAS(error.text, "EPT_GPU_SHARE=ipc");
  setenv("STAND_IN_WITHOUT", "ipc", 1);
  OK(DeviceMemory::allocate(primary(), kBytes, &memory, &error, Sharing::ipc), error);
  CHECK(memory->blob(&blob, &error) != EPT_OK);
  CHECK_HAS(error.text, "EPT_GPU_SHARE=descriptors");
  setenv("STAND_IN_WITHOUT", "", 1);
  OK(DeviceMemory::allocate(primary(), kBytes, &memory, &error, Sharing::descriptors), error);
  OK(memory->blob(&blob, &error), error);
  std::unique_ptr<MappedMemory> mapped;
  CHECK_EQ(MappedMemory::open(primary(), blob.substr(1), &mapped, &error), EPT_E_INVALID);
  CHECK_EQ(MappedMemory::open(primary(), std::string(blob.size(), 'x'), &mapped, &error), EPT_E_INVALID);
  std::string old = blob;
  old[4]++;
  CHECK_EQ(MappedMemory::open(primary(), old, &mapped, &error), EPT_E_VERSION);
}

// What a network is given of it, by what the network takes.
void described() {
  check::running("memory for a network");
  moe_test::Error error;
  std::unique_ptr<DeviceMemory> memory;
  const size_t open_before = descriptors();
  OK(DeviceMemory::allocate(primary(), kBytes, &memory, &error), error);
  ept_caps caps{};
  {
    Described of;
    caps.memory_kinds = EPT_MEMORY_CUDA | EPT_MEMORY_DMABUF;
    OK(memory->describe(caps, &of, &error), error);
    CHECK_EQ(of.memory.kind, EPT_MEMORY_DMABUF);
    CHECK_EQ(uint64_t(lseek(of.memory.fd, 0, SEEK_END)), memory->bytes());
  }
  setenv("STAND_IN_WITHOUT", "dmabuf", 1);
  Described of;
  OK(memory->describe(caps, &of, &error), error);
  CHECK_EQ(of.memory.kind, EPT_MEMORY_CUDA);
  caps.memory_kinds = EPT_MEMORY_DMABUF;
  CHECK_EQ(memory->describe(caps, &of, &error), EPT_E_UNSUPPORTED);
  CHECK_HAS(error.text, "this driver gives none");
  setenv("STAND_IN_WITHOUT", "", 1);
  memory.reset();
  CHECK_EQ(descriptors(), open_before);
}

// ---- strangers ----

sockaddr_un address_of(const HandoverTicket &ticket, socklen_t *length) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::string name = "eptransport-";
  for (uint8_t byte : ticket.where) {
    char hex[3];
    snprintf(hex, sizeof hex, "%02x", byte);
    name += hex;
  }
  memcpy(address.sun_path + 1, name.data(), name.size());
  *length = socklen_t(offsetof(sockaddr_un, sun_path) + 1 + name.size());
  return address;
}

int call(const HandoverTicket &ticket) {
  socklen_t length = 0;
  const sockaddr_un address = address_of(ticket, &length);
  const int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
  CHECK_EQ(connect(fd, reinterpret_cast<const sockaddr *>(&address), length), 0);
  return fd;
}

// Nothing comes back but the end.
void hung_up(int fd) {
  pollfd on = {fd, POLLIN, 0};
  CHECK_EQ(poll(&on, 1, int(kPatience / 1'000'000)), 1);
  char answer[64];
  CHECK(recv(fd, answer, sizeof answer, 0) <= 0);
  close(fd);
}

void strangers_ask() {
  check::running("strangers who ask for a descriptor");
  moe_test::Error error;
  const size_t open_before = descriptors();
  {
    std::unique_ptr<Handover> handover;
    const int given = memfd_create("given", MFD_CLOEXEC);
    CHECK_EQ(write(given, "it", 2), 2);
    OK(Handover::open(given, &handover, &error), error);
    const HandoverTicket &ticket = handover->ticket();
    std::string right(reinterpret_cast<const char *>(ticket.ask), sizeof ticket.ask);
    std::vector<std::string> wrong = {"", right.substr(1), right + "x", std::string(65536, 'y'), right + right};
    for (size_t bit = 0; bit < 128; bit += 7) {
      wrong.push_back(right);
      wrong.back()[bit / 8] = char(wrong.back()[bit / 8] ^ 1 << bit % 8);
    }
    for (const std::string &said : wrong) {
      const int fd = call(ticket);
      (void)!send(fd, said.data(), said.size(), MSG_NOSIGNAL);
      if (said.empty()) shutdown(fd, SHUT_WR);
      hung_up(fd);
    }
    // More that say nothing than there is room for: a member is heard all the same.
    std::vector<int> silent;
    for (int i = 0; i < 100; i++) silent.push_back(call(ticket));
    for (int i = 0; i < 3; i++) {
      int taken = -1;
      OK(take_over(ticket, kPatience, &taken, &error), error);
      char what[3] = "";
      CHECK_EQ(pread(taken, what, 2, 0), 2);
      CHECK_HAS(what, "it");
      CHECK(fcntl(taken, F_GETFD) & FD_CLOEXEC);
      close(taken);
    }
    for (int fd : silent) close(fd);
  }
  CHECK_EQ(descriptors(), open_before);
}

// Somebody who sits at the address and doesn't know the answer.
void impostors() {
  check::running("an impostor who hands out descriptors");
  moe_test::Error error;
  const size_t open_before = descriptors();
  HandoverTicket ticket;
  memset(&ticket, 7, sizeof ticket);
  const pid_t self = getpid();
  memcpy(ticket.where, &self, sizeof self);  // two runs at a time don't meet
  int taken = -1;
  CHECK_EQ(take_over(ticket, kPatience, &taken, &error), EPT_E_PEER_LOST);
  CHECK_HAS(error.text, "it has ended");
  const std::string answer(16, 7);
  struct Says {
    std::string bytes;
    int descriptors;
  };
  for (const Says &says : {Says{answer, 0}, Says{std::string(16, 8), 1}, Says{answer + "x", 1}, Says{"x", 1},
                           Says{answer, 2}, Says{answer, 20}, Says{std::string(100000, 7), 1}}) {
    const int listening = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    socklen_t length = 0;
    const sockaddr_un address = address_of(ticket, &length);
    CHECK_EQ(bind(listening, reinterpret_cast<const sockaddr *>(&address), length), 0);
    CHECK_EQ(listen(listening, 4), 0);
    std::thread impostor([&] {
      const int client = accept(listening, nullptr, nullptr);
      char asked[64];
      CHECK_EQ(recv(client, asked, sizeof asked, 0), 16);
      std::string bytes = says.bytes;
      iovec part = {bytes.data(), bytes.size()};
      std::vector<char> control(CMSG_SPACE(size_t(says.descriptors) * sizeof(int)));
      msghdr message{};
      message.msg_iov = &part;
      message.msg_iovlen = 1;
      if (says.descriptors) {
        message.msg_control = control.data();
        message.msg_controllen = control.size();
        cmsghdr *rights = CMSG_FIRSTHDR(&message);
        rights->cmsg_level = SOL_SOCKET;
        rights->cmsg_type = SCM_RIGHTS;
        rights->cmsg_len = CMSG_LEN(size_t(says.descriptors) * sizeof(int));
        const std::vector<int> all(size_t(says.descriptors), listening);
        memcpy(CMSG_DATA(rights), all.data(), all.size() * sizeof(int));
      }
      CHECK_EQ(size_t(sendmsg(client, &message, MSG_NOSIGNAL)), bytes.size());
      close(client);
    });
    CHECK_EQ(take_over(ticket, kPatience, &taken, &error), EPT_E_AUTH);
    CHECK_HAS(error.text, "is not that peer");
    impostor.join();
    close(listening);
  }
  // One who says nothing at all.
  const int listening = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
  socklen_t length = 0;
  const sockaddr_un address = address_of(ticket, &length);
  CHECK_EQ(bind(listening, reinterpret_cast<const sockaddr *>(&address), length), 0);
  CHECK_EQ(listen(listening, 4), 0);
  CHECK_EQ(take_over(ticket, 20'000'000, &taken, &error), EPT_E_TIMEOUT);
  close(listening);
  CHECK_EQ(descriptors(), open_before);
}

}  // namespace

int main(int count, char **arguments) {
  program = arguments[0];
  if (!getenv("EPT_CUDA_LIBRARY")) {
    puts("skipped: EPT_CUDA_LIBRARY names no stand-in for the driver");
    return 77;
  }
  if (count > 1 && std::string(arguments[1]) == "child") return child();
  across("CUDA IPC", Sharing::ipc, Sharing::ipc, "");
  across("CUDA IPC, found by itself", Sharing::automatic, Sharing::ipc, "");
  across("descriptors", Sharing::descriptors, Sharing::descriptors, "");
  across("descriptors, where IPC gives no handle", Sharing::automatic, Sharing::descriptors, "ipc");
  refused();
  described();
  strangers_ask();
  impostors();
  return 0;
}
