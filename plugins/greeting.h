// SPDX-License-Identifier: Apache-2.0
// What two ranks say to each other by messages before the first write, and who believes what: for a network that
// carries datagrams between ranks that found each other's addresses in the bootstrap. Bytes in, bytes out.
//
//     rank A                                                 rank B
//       | Hello on each rail: ranks, epochs, world, job, limits,  |
//       |   A's opening, mac, witness -------------------------> |  B has A's address in its AV (peer_open)
//       | <------------------------- Hello likewise, B's opening |
//       | Ack on each rail: both openings, mac, witness -------> |
//       | <--------------------------------------- Ack likewise  |
//
// A peer is up once a Hello and an Ack of it came on every rail. So both sides hold the other in their address vectors
// before either writes, as SRD wants, and every rail has carried something both ways. Hellos are repeated until then,
// since a message to a rank that has not opened this one is lost, or is dropped there; all of them may come any number
// of times and in any order.
//
// Nothing is believed for where it came from: no provider must name the source of a message. `mac` is HMAC-SHA-256
// under the job's secret over the head, the body, and the nonces of both address blobs (the blobs came through the
// bootstrap, the nonces are never sent over this network). A nonce is made for one instance, so for one epoch: nothing
// that was said in a former life proves anything in this one. An opening is drawn by each peer_open, and an Ack repeats
// the other's: nothing that was said before a peer was closed and opened again does either. `witness` is the same under
// the receiver's nonce instead of the secret: it tells a rank of this job that was given another secret (AUTH) from a
// stranger, who changes nothing but a counter.
//
// After that a message carries a token that only these two can compute from the secret and both openings. It is no
// defence against who reads the wire (no network of this backend has that), but who does not can't guess it.
#pragma once

#include <array>
#include <cstring>

#include "plugin.h"

namespace plugin {

constexpr size_t kNonceBytes = 32;
using Nonce = std::array<uint8_t, kNonceBytes>;
using Token = std::array<uint8_t, 16>;

enum class MessageType : uint8_t { kHello = 1, kAck = 2, kSend = 3, kBye = 4 };

struct MessageHead {
  uint32_t magic;
  uint16_t version;
  uint8_t type;  // MessageType
  uint8_t rail;
  uint32_t from, from_epoch;
  uint32_t to, to_epoch;
  uint32_t length;    // of what follows
  uint32_t serial;    // kSend, where operations are numbered
  uint8_t token[16];  // kSend, kBye
};

struct Greeting {  // kHello, kAck
  uint32_t world, rails;
  uint32_t max_send, reserved;
  uint64_t opening;  // of the sender
  uint64_t heard;    // kAck: of the receiver
  uint8_t job[32];
  uint8_t mac[32];
  uint8_t witness[32];
};
static_assert(sizeof(MessageHead) == 48 && sizeof(Greeting) == 128, "layout of messages");

// What this rank knows of the job; the same on every rank that it may talk to.
struct Credentials {
  const char *network = nullptr;  // the plugin's name: a word for one network is none for another
  const ept_host *host = nullptr;
  const uint8_t *secret = nullptr;
  size_t secret_length = 0;
  Nonce nonce{};  // this instance's
  std::array<uint8_t, 32> job{};
};
Credentials make_credentials(const char *network, const ept_host *host, const ept_open_params &params);

enum class Trust {
  kProven,    // holds the secret
  kMember,    // does not, but holds this rank's address blob: a rank of this job with another secret
  kStranger,  // neither
};

// `mac` and `witness` of what is said, 32 bytes each; `receiver` and `sender` are the nonces of those ranks' address
// blobs.
void prove(const Credentials &credentials, const Nonce &receiver, const void *said, size_t length, uint8_t *mac,
           uint8_t *witness);
Trust judge(const Credentials &credentials, const Nonce &sender, const void *said, size_t length, const uint8_t *mac,
            const uint8_t *witness);

void seal(const Credentials &credentials, const Nonce &receiver, const MessageHead &head, Greeting *greeting);
Trust judge(const Credentials &credentials, const Nonce &sender, const MessageHead &head, const Greeting &greeting);

// What `from` puts into its messages to `to`.
Token make_token(const Credentials &credentials, uint32_t from, uint32_t to, uint64_t from_opening,
                 uint64_t to_opening);

}  // namespace plugin
