// SPDX-License-Identifier: Apache-2.0
#include "cuda/handover.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include <utility>
#include <vector>

#include "engine/error.h"

namespace ept::cuda {

namespace {

// As many may have connected and not asked yet; one more takes the place of the oldest. Members ask at once.
constexpr size_t kWaiting = 64;

class Owned {
 public:
  explicit Owned(int fd = -1) : fd_(fd) {}
  ~Owned() {
    if (fd_ >= 0) close(fd_);
  }
  Owned(Owned &&other) noexcept : fd_(other.release()) {}
  Owned &operator=(Owned &&other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  int get() const { return fd_; }
  int release() { return std::exchange(fd_, -1); }

 private:
  int fd_;
};

int32_t said_no(const char *what, ept_error *error) {
  const int number = errno;
  const int32_t code = number == EMFILE || number == ENFILE || number == ENOMEM ? EPT_E_NOMEM : EPT_E_IO;
  fail(error, code, "gpu_memory", -1, "%s: %s", what, strerror(number));
  if (error) error->provider_errno = number;
  return code;
}

sockaddr_un address_of(const HandoverTicket &ticket, socklen_t *length) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  char *to = address.sun_path + 1;  // from a 0: the abstract namespace
  to += snprintf(to, sizeof address.sun_path - 1, "eptransport-");
  for (uint8_t byte : ticket.where) to += snprintf(to, 3, "%02x", byte);
  *length = socklen_t(to - reinterpret_cast<char *>(&address));
  return address;
}

// In a time that doesn't tell how much of it is right.
bool same(const uint8_t (&a)[16], const uint8_t (&b)[16]) {
  uint8_t differs = 0;
  for (size_t i = 0; i < sizeof a; i++) differs |= uint8_t(a[i] ^ b[i]);
  return differs == 0;
}

uint64_t now() {
  timespec t{};
  clock_gettime(CLOCK_MONOTONIC, &t);
  return uint64_t(t.tv_sec) * 1'000'000'000 + uint64_t(t.tv_nsec);
}

void hand_out(int client, const HandoverTicket &ticket, int descriptor) {
  uint8_t asked[sizeof ticket.ask + 1] = {};
  const ssize_t length = recv(client, asked, sizeof asked, MSG_DONTWAIT);
  uint8_t begin[sizeof ticket.ask];
  memcpy(begin, asked, sizeof begin);
  if (length != sizeof ticket.ask || !same(begin, ticket.ask)) return;
  uint8_t answer[sizeof ticket.answer];
  memcpy(answer, ticket.answer, sizeof answer);
  iovec part = {answer, sizeof answer};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  cmsghdr *rights = CMSG_FIRSTHDR(&message);
  rights->cmsg_level = SOL_SOCKET;
  rights->cmsg_type = SCM_RIGHTS;
  rights->cmsg_len = CMSG_LEN(sizeof(int));
  memcpy(CMSG_DATA(rights), &descriptor, sizeof descriptor);
  (void)sendmsg(client, &message, MSG_DONTWAIT | MSG_NOSIGNAL);  // who has gone needs none
}

}  // namespace

int32_t Handover::open(int descriptor, std::unique_ptr<Handover> *handover, ept_error *error) {
  std::unique_ptr<Handover> made(new Handover);
  made->descriptor_ = descriptor;
  if (getrandom(&made->ticket_, sizeof made->ticket_, 0) != sizeof made->ticket_)
    return said_no("drawing a random number (getrandom)", error);
  made->closing_ = eventfd(0, EFD_CLOEXEC);
  made->listening_ = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (made->closing_ < 0 || made->listening_ < 0) return said_no("a socket to show GPU memory by", error);
  socklen_t length = 0;
  const sockaddr_un address = address_of(made->ticket_, &length);
  if (bind(made->listening_, reinterpret_cast<const sockaddr *>(&address), length) ||
      listen(made->listening_, kWaiting))
    return said_no("listening on a Unix socket to show GPU memory by", error);
  made->thread_ = std::thread([of = made.get()] { of->serve(); });
  *handover = std::move(made);
  return EPT_OK;
}

Handover::~Handover() {
  if (thread_.joinable()) {
    const uint64_t one = 1;
    while (write(closing_, &one, sizeof one) < 0 && errno == EINTR) {}
    thread_.join();
  }
  for (int fd : {descriptor_, listening_, closing_})
    if (fd >= 0) close(fd);
}

void Handover::serve() {
  std::vector<Owned> clients;
  for (;;) {
    std::vector<pollfd> on = {{closing_, POLLIN, 0}, {listening_, POLLIN, 0}};
    for (const Owned &client : clients) on.push_back({client.get(), POLLIN, 0});
    if (poll(on.data(), on.size(), -1) < 0) continue;  // EINTR
    if (on[0].revents) return;
    for (size_t i = clients.size(); i-- > 0;) {
      if (!on[i + 2].revents) continue;
      hand_out(clients[i].get(), ticket_, descriptor_);
      clients.erase(clients.begin() + ptrdiff_t(i));
    }
    if (!on[1].revents) continue;
    Owned client(accept4(listening_, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (client.get() < 0) {
      // Out of descriptors, it stays readable: it would be asked again and again.
      if (errno == EMFILE || errno == ENFILE || errno == ENOMEM || errno == ENOBUFS) {
        if (!clients.empty()) clients.erase(clients.begin());
        pollfd pause = {closing_, POLLIN, 0};
        poll(&pause, 1, 10);
      }
      continue;
    }
    if (clients.size() == kWaiting) clients.erase(clients.begin());
    clients.push_back(std::move(client));
  }
}

int32_t take_over(const HandoverTicket &ticket, uint64_t timeout_ns, int *descriptor, ept_error *error) {
  const uint64_t until = now() + timeout_ns;
  Owned client(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (client.get() < 0) return said_no("a socket to ask for GPU memory by", error);
  socklen_t length = 0;
  const sockaddr_un address = address_of(ticket, &length);
  while (connect(client.get(), reinterpret_cast<const sockaddr *>(&address), length)) {
    if (errno == EINTR) continue;
    if (errno != EAGAIN) {
      const int number = errno;
      fail(
          error, EPT_E_PEER_LOST, "gpu_memory", -1,
          "the process whose GPU memory is to be mapped doesn't answer on its Unix socket (%s): it has ended, or is in "
          "a container of another network namespace, for which EPT_GPU_SHARE=ipc may do",
          strerror(number));
      if (error) error->provider_errno = number;
      return EPT_E_PEER_LOST;
    }
    if (now() > until)
      return fail(error, EPT_E_TIMEOUT, "gpu_memory", -1, "nobody takes our call on a peer's Unix socket for %.1f s",
                  double(timeout_ns) * 1e-9);
    const timespec pause = {0, 1'000'000};
    nanosleep(&pause, nullptr);
  }
  if (send(client.get(), ticket.ask, sizeof ticket.ask, MSG_NOSIGNAL) != sizeof ticket.ask)
    return said_no("asking for a peer's GPU memory on its Unix socket", error);
  pollfd on = {client.get(), POLLIN, 0};
  for (;;) {
    const uint64_t at = now();
    if (at >= until)
      return fail(error, EPT_E_TIMEOUT, "gpu_memory", -1, "a peer's Unix socket is silent for %.1f s",
                  double(timeout_ns) * 1e-9);
    const int ready = poll(&on, 1, int((until - at) / 1'000'000 + 1));
    if (ready > 0) break;
    if (ready < 0 && errno != EINTR) return said_no("waiting for a peer's GPU memory on its Unix socket", error);
  }
  uint8_t said[sizeof ticket.answer + 1] = {};
  iovec part = {said, sizeof said};
  alignas(cmsghdr) char control[CMSG_SPACE(8 * sizeof(int))] = {};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  const ssize_t got = recvmsg(client.get(), &message, MSG_CMSG_CLOEXEC);
  std::vector<Owned> brought;  // closed, whatever they are, but for the one that is taken
  for (cmsghdr *c = got < 0 ? nullptr : CMSG_FIRSTHDR(&message); c; c = CMSG_NXTHDR(&message, c)) {
    if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
    for (size_t i = 0; i < (c->cmsg_len - CMSG_LEN(0)) / sizeof(int); i++) {
      int fd = -1;
      memcpy(&fd, CMSG_DATA(c) + i * sizeof fd, sizeof fd);
      brought.emplace_back(fd);
    }
  }
  uint8_t begin[sizeof ticket.answer];
  memcpy(begin, said, sizeof begin);
  if (got != sizeof ticket.answer || message.msg_flags & (MSG_TRUNC | MSG_CTRUNC) || brought.size() != 1 ||
      !same(begin, ticket.answer))
    return fail(error, EPT_E_AUTH, "gpu_memory", -1,
                "what answers on a peer's Unix socket is not that peer: it said %zd bytes with %zu descriptors", got,
                brought.size());
  *descriptor = brought[0].release();
  return EPT_OK;
}

}  // namespace ept::cuda
