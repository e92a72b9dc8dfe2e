// SPDX-License-Identifier: Apache-2.0
// Bare loops over TCP sockets: what a network call costs without eptransport. They are the floors of the tables, so
// each is written as well as we can: spinning for latency, blocking for bandwidth, poll for many peers.
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <vector>

#include "common.h"

namespace ept::bench {
namespace {

// Non-blocking for the life of this object; blocking again, as Python left it, after.
class NonBlocking {
 public:
  explicit NonBlocking(int fd) : fd_(fd) {
    const int one = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
  }
  ~NonBlocking() { fcntl(fd_, F_SETFL, fcntl(fd_, F_GETFL) & ~O_NONBLOCK); }
  NonBlocking(const NonBlocking &) = delete;
  NonBlocking &operator=(const NonBlocking &) = delete;

 private:
  int fd_;
};

bool not_now() { return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR; }

int32_t lost(const char *what, ssize_t result) {
  if (result == 0) return fail(EPT_E_PEER_LOST, "%s: the other side closed the connection", what);
  return fail(EPT_E_IO, "%s: %s", what, std::strerror(errno));
}

int32_t send_spinning(int fd, const uint8_t *data, uint64_t length, Deadline &deadline) {
  for (uint64_t done = 0; done < length;) {
    const ssize_t n = send(fd, data + done, length - done, MSG_NOSIGNAL);
    if (n > 0)
      done += static_cast<uint64_t>(n);
    else if (!not_now())
      return lost("send", n);
    else if (deadline.passed())
      return fail(EPT_E_TIMEOUT, "send: the other side takes no bytes");
  }
  return EPT_OK;
}

int32_t recv_spinning(int fd, uint8_t *data, uint64_t length, Deadline &deadline) {
  for (uint64_t done = 0; done < length;) {
    const ssize_t n = recv(fd, data + done, length - done, 0);
    if (n > 0)
      done += static_cast<uint64_t>(n);
    else if (n == 0 || !not_now())
      return lost("recv", n);
    else if (deadline.passed())
      return fail(EPT_E_TIMEOUT, "recv: the other side sends no bytes");
  }
  return EPT_OK;
}

// Blocking calls still end: the socket's own timeouts are set to the deadline.
void bound_blocking(int fd, uint64_t timeout_ns) {
  const timeval limit = {static_cast<time_t>(timeout_ns / 1'000'000'000u),
                         static_cast<suseconds_t>(timeout_ns % 1'000'000'000u / 1000)};
  setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
  setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
  const int one = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
}

int32_t send_blocking(int fd, const uint8_t *data, uint64_t length) {
  for (uint64_t done = 0; done < length;) {
    const ssize_t n = send(fd, data + done, length - done, MSG_NOSIGNAL);
    if (n > 0)
      done += static_cast<uint64_t>(n);
    else if (errno != EINTR)
      return lost("send", n);
  }
  return EPT_OK;
}

int32_t recv_blocking(int fd, uint8_t *data, uint64_t length) {
  for (uint64_t done = 0; done < length;) {
    const ssize_t n = recv(fd, data + done, length - done, 0);
    if (n > 0)
      done += static_cast<uint64_t>(n);
    else if (n == 0 || errno != EINTR)
      return lost("recv", n);
  }
  return EPT_OK;
}

struct Range {
  uint8_t *at;
  uint64_t left;
};

}  // namespace
}  // namespace ept::bench

using namespace ept::bench;

extern "C" {

int32_t eptb_tcp_pingpong(int32_t fd, uint32_t side, uint64_t bytes, uint32_t iterations, double *samples,
                          uint64_t timeout_ns) {
  NonBlocking socket(fd);
  Deadline deadline(timeout_ns);
  std::vector<uint8_t> out(bytes, 0x5a), in(bytes);
  for (uint32_t i = 0; i < iterations; ++i) {
    const uint64_t before = now_ns();
    out[0] = static_cast<uint8_t>(i + 1);
    if (side == 0)
      if (const int32_t code = send_spinning(fd, out.data(), bytes, deadline); code != EPT_OK) return code;
    if (const int32_t code = recv_spinning(fd, in.data(), bytes, deadline); code != EPT_OK) return code;
    if (in[0] != static_cast<uint8_t>(i + 1)) return fail(EPT_E_INTERNAL, "ping-pong: turn %u brought other bytes", i);
    if (side == 1)
      if (const int32_t code = send_spinning(fd, out.data(), bytes, deadline); code != EPT_OK) return code;
    if (side == 0) samples[i] = static_cast<double>(now_ns() - before) / 2;
  }
  return EPT_OK;
}

int32_t eptb_tcp_stream(int32_t fd, uint32_t side, uint8_t *buffers, uint64_t bytes, uint32_t count, uint32_t ring,
                        double *seconds, uint64_t timeout_ns) {
  bound_blocking(fd, timeout_ns);
  uint8_t answer = 0x5a;
  // The receiver's buffers are ready before the first byte: a start byte the other way.
  if (side == 1) {
    if (const int32_t code = send_blocking(fd, &answer, 1); code != EPT_OK) return code;
  } else if (const int32_t code = recv_blocking(fd, &answer, 1); code != EPT_OK) {
    return code;
  }
  const uint64_t before = now_ns();
  for (uint32_t i = 0; i < count; ++i) {
    uint8_t *buffer = buffers + i % ring * bytes;
    const int32_t code = side == 0 ? send_blocking(fd, buffer, bytes) : recv_blocking(fd, buffer, bytes);
    if (code != EPT_OK) return code;
  }
  const int32_t code = side == 0 ? recv_blocking(fd, &answer, 1) : send_blocking(fd, &answer, 1);
  *seconds = static_cast<double>(now_ns() - before) / 1e9;
  return code;
}

int32_t eptb_mesh_exchange(const int32_t *fds, uint32_t world, uint32_t rank, const uint64_t *send_bytes,
                           const uint64_t *recv_bytes, const uint8_t *send_from, uint8_t *recv_to,
                           uint64_t timeout_ns) {
  Deadline deadline(timeout_ns);
  std::vector<Range> out(world), in(world);
  uint64_t out_offset = 0, in_offset = 0, left = 0;
  for (uint32_t r = 0; r < world; ++r) {
    out[r] = {const_cast<uint8_t *>(send_from) + out_offset, r == rank ? 0 : send_bytes[r]};
    in[r] = {recv_to + in_offset, r == rank ? 0 : recv_bytes[r]};
    out_offset += (send_bytes[r] + 63) / 64 * 64;
    in_offset += (recv_bytes[r] + 63) / 64 * 64;
    left += out[r].left + in[r].left;
  }
  std::vector<pollfd> waits;
  while (left > 0) {
    uint64_t moved = 0;
    // Every rank starts with another peer, so that they do not all press on rank 0.
    for (uint32_t i = 1; i < world; ++i) {
      const uint32_t r = (rank + i) % world;
      if (out[r].left > 0) {
        const ssize_t n = send(fds[r], out[r].at, out[r].left, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n > 0) {
          out[r] = {out[r].at + n, out[r].left - static_cast<uint64_t>(n)};
          moved += static_cast<uint64_t>(n);
        } else if (!not_now()) {
          return lost("mesh send", n);
        }
      }
      if (in[r].left > 0) {
        const ssize_t n = recv(fds[r], in[r].at, in[r].left, MSG_DONTWAIT);
        if (n > 0) {
          in[r] = {in[r].at + n, in[r].left - static_cast<uint64_t>(n)};
          moved += static_cast<uint64_t>(n);
        } else if (n == 0 || !not_now()) {
          return lost("mesh recv", n);
        }
      }
    }
    left -= moved;
    if (moved > 0 || left == 0) continue;
    waits.clear();
    for (uint32_t r = 0; r < world; ++r) {
      const auto events = static_cast<short>((out[r].left > 0 ? POLLOUT : 0) | (in[r].left > 0 ? POLLIN : 0));
      if (events != 0) waits.push_back({fds[r], events, 0});
    }
    const uint64_t wait_ns = deadline.left_ns();
    if (wait_ns == 0)
      return fail(EPT_E_TIMEOUT, "mesh: rank %u still has %llu bytes to move", rank,
                  static_cast<unsigned long long>(left));
    if (poll(waits.data(), waits.size(), static_cast<int>(wait_ns / 1'000'000u + 1)) < 0 && errno != EINTR)
      return lost("mesh poll", -1);
  }
  return EPT_OK;
}

}  // extern "C"
