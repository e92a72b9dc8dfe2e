// SPDX-License-Identifier: Apache-2.0
//
// tcp_rank.h: what the targets over the TCP plugin share: one rank of it that lives as long as the process, silent, and
// driven through its table as the engine drives it.
#pragma once

#include "../../native/engine/sha256.h"
#include "../native/plugin.h"
#include "../native/tcp_by_hand.h"
#include "input.h"

extern "C" const ept_backend ept_backend_v1;  // the plugin is linked in

namespace fuzz {

inline const ept_backend &backend() {
  plugin::hmac = [](void *, const void *key, size_t key_length, const void *data, size_t length, uint8_t *mac) {
    ept::hmac_sha256(key, key_length, data, length, mac);
  };
  plugin::log_level = INT32_MAX;
  return ept_backend_v1;
}

struct Seen {
  uint64_t immediates = 0, messages = 0, done = 0, errors = 0, up = 0, ended = 0, sum = 0;
};

// Polls until nothing comes any more; what came is counted. On loopback the kernel delivers within send, so a few polls
// are enough for whatever was said.
inline void settle(plugin::Rank &rank, Seen *seen, size_t capacity = 64, int quiet = 6) {
  ept_event events[64];
  for (int left = quiet; left > 0; --left) {
    const int32_t count = rank.backend.poll(rank.worker, events, capacity);
    HOLDS(count >= 0);
    if (count > 0) left = quiet;
    for (int32_t i = 0; i < count; ++i) {
      const ept_event &event = events[i];
      // All of it can be read.
      if (event.kind == EPT_EVENT_RECV)
        for (uint64_t b = 0; b < event.length; ++b) seen->sum += static_cast<const uint8_t *>(event.data)[b];
      if (event.text) HOLDS(strlen(event.text) < 4096);
      seen->immediates += event.kind == EPT_EVENT_IMM;
      seen->messages += event.kind == EPT_EVENT_RECV;
      seen->done += event.kind == EPT_EVENT_LOCAL_DONE;
      seen->errors += event.kind == EPT_EVENT_ERROR;
      seen->up += event.kind == EPT_EVENT_PEER && event.code == EPT_OK;
      seen->ended += event.kind == EPT_EVENT_PEER && event.code < 0;
    }
  }
}

}  // namespace fuzz
