// SPDX-License-Identifier: Apache-2.0
// Messages of the handshake through a socket that never blocks.
#pragma once

#include <sys/socket.h>

#include <cerrno>

#include "common.h"

namespace tcp {

// Reads until `*have` is `want`. 1: there; 0: not yet; -1: ended, with the reason.
inline int read_message(int fd, uint8_t *bytes, size_t *have, size_t want, std::string *why) {
  while (*have < want) {
    ssize_t got = recv(fd, bytes + *have, want - *have, MSG_DONTWAIT);
    if (got > 0) {
      *have += static_cast<size_t>(got);
    } else if (got < 0 && errno == EINTR) {
      continue;
    } else if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
      return 0;
    } else {
      *why = got == 0 ? "it closed the connection during the handshake" : errno_text(errno);
      return -1;
    }
  }
  *have = 0;
  return 1;
}

// A handshake message always fits an empty socket buffer; one that doesn't is not worth waiting for.
template <typename Message>
bool say(int fd, const Message &message) {
  return send(fd, &message, sizeof message, MSG_NOSIGNAL | MSG_DONTWAIT) == static_cast<ssize_t>(sizeof message);
}

}  // namespace tcp
