// SPDX-License-Identifier: Apache-2.0
// The handshake of one stream: what is said, and who believes what. Bytes in, bytes out; no socket, no clock.
//
//     dialer                                              acceptor
//       | Hello      ranks, epochs, purpose, stream,         |
//       |            generation, versions, limits, job,      |
//       |            nonce  -------------------------------> |  any stranger gets this far: it costs a nonce
//       |                                                    |
//       | <--------------------------------------  Challenge |  nonce: its process is alive
//       |                                                    |
//       | Proof      resume, mac, witness  ----------------> |  the dialer shows the secret first
//       |                                                    |
//       | <-----------------------------------------  Answer |  code, version, limits, resume, text, mac, witness
//       |                                                    |  LATER: "you are known, this rank has not opened you
//       | <-------------------------------- Answer, in turn  |   yet"; the last answer is OK or an error
//
// `mac` is HMAC-SHA-256 under the job's secret over a label of the role, Hello, Challenge, the Proof's resume and (for
// an Answer) the Answer itself: so over both nonces, ranks, epochs, versions, limits and the job. A message of one
// stream, role or attempt proves nothing in another. `witness` is the same under the acceptor's nonce of its address
// blob, which came through the bootstrap and is never sent over a connection. It tells a member of this job that was
// given another secret from a stranger: only the first may end a peer (with AUTH), a stranger changes nothing but a
// counter. A wrong secret is therefore seen on both sides, and nobody without the blob can make a rank believe in one.
//
// The layout of these messages is frozen; `kLayout` names it. What comes after the handshake is negotiated: the highest
// version that both speak, and the smaller of each limit.
//
// `resume` is from where a stream goes on that had a connection before (resume.h). It comes no sooner than the Proof,
// so that a dialer may try a connection in doubt: its old one is given up only when a Challenge shows that the other
// process is alive and reached.
//
// A KNOCK is a handshake of the rank that does not dial (the higher one): "stream n is broken here, dial again". It
// gets an Answer and ends; no frames follow. A member whose side of a connection broke unseen by the other is heard
// this way.
#pragma once

#include <array>
#include <string>

#include "address.h"
#include "resume.h"

namespace tcp {

constexpr uint32_t kHandshakeMagic = 0x48545045;  // "EPTH"
constexpr uint16_t kLayout = 2;
constexpr uint16_t kVersionLow = 1, kVersionHigh = 1;  // of the frames (frame.h)

struct MessageHead {
  uint32_t magic;   // kHandshakeMagic
  uint16_t layout;  // kLayout
  uint16_t bytes;   // of this message
};

// Refusals that a peer does not read are kept here, one for each operation that it may have in flight.
constexpr uint32_t kMostDepth = 65536;

struct Limits {
  uint32_t streams;       // a peer
  uint32_t max_message;   // bytes of a WRITE
  uint32_t max_send;      // bytes of a SEND
  uint32_t depth;         // operations that the writer of this may have in flight on a stream, not negotiated
  uint32_t credits;       // immediates that the writer accepts in flight, not negotiated
  uint32_t send_credits;  // SENDs likewise
};

enum class Purpose : uint32_t { kStream = 0, kKnock = 1 };

struct Hello {
  MessageHead head;
  uint16_t version_low, version_high;
  uint32_t world;
  uint32_t rank, epoch;            // of the dialer
  uint32_t peer_rank, peer_epoch;  // whom it wants
  uint32_t stream, streams;        // number of this stream, and of how many
  Limits limits;
  Purpose purpose;
  uint32_t
      generation;  // of the connection: 1, 2, ... with every try of the dialer for this stream; knock: of the lost one
  uint8_t job[32];
  uint8_t nonce[32];
};

struct Challenge {
  MessageHead head;
  uint8_t nonce[32];
};

struct Proof {
  MessageHead head;
  ResumePoint resume;  // of the dialer, whose old connection is retired by now
  uint8_t mac[32];
  uint8_t witness[32];
};

struct Answer {
  MessageHead head;
  int32_t code;       // ept_code
  uint32_t sequence;  // 0, 1: of the answers on this connection
  uint32_t rank, epoch;
  uint16_t version;
  uint16_t reserved[3];
  Limits limits;
  ResumePoint resume;  // of the acceptor, whose old connection is retired by now
  char text[128];      // why not; terminated
  uint8_t mac[32];
  uint8_t witness[32];
};
static_assert(sizeof(Hello) == 136 && sizeof(Challenge) == 40 && sizeof(Proof) == 88 && sizeof(Answer) == 264,
              "handshake layout");
constexpr size_t kLargestMessage = sizeof(Answer);

// What this rank knows of the job; the same on every rank that it may talk to.
struct Credentials {
  const ept_host *host = nullptr;
  const uint8_t *secret = nullptr;
  size_t secret_length = 0;
  std::array<uint8_t, 32> job{};
};
Credentials make_credentials(const ept_host *host, const ept_open_params &params);

enum class Trust {
  kProven,    // holds the secret
  kMember,    // does not, but holds the address blob: a rank of this job with another secret
  kStranger,  // neither
};

// One connection, seen from the side that dialled. `nonce` is that of the peer's address blob.
class Dialer {
 public:
  Dialer(const Credentials &credentials, const std::array<uint8_t, kNonceBytes> &nonce, Hello hello);
  const Hello &hello() const { return hello_; }
  // The Proof that answers `challenge`. False: not our protocol.
  bool challenge(const Challenge &challenge, const ResumePoint &resume, Proof *proof);
  Trust answer(const Answer &answer);  // whom `answer` comes from; read it only if proven
 private:
  const Credentials *credentials_;
  std::array<uint8_t, kNonceBytes> nonce_;
  Hello hello_;
  Challenge challenge_{};
  ResumePoint resume_;
  uint32_t answers_ = 0;
};

// And from the side that accepted; `nonce` is its own.
class Acceptor {
 public:
  Acceptor(const Credentials &credentials, const std::array<uint8_t, kNonceBytes> &nonce)
      : credentials_(&credentials), nonce_(nonce) {}
  bool hello(const Hello &hello, Challenge *challenge);  // false: not our protocol
  Trust proof(const Proof &proof);
  // Seals `answer`, whose code, limits and text the caller has set.
  void seal(Answer *answer);
  const Hello &peer() const { return hello_; }
  const ResumePoint &resume() const { return resume_; }  // what the dialer said of the stream
  // What a proven dialer can't be given whoever it is: OK, or VERSION or MISMATCH with a sentence.
  int32_t compatible(uint32_t world, std::string *why) const;

 private:
  const Credentials *credentials_;
  std::array<uint8_t, kNonceBytes> nonce_;
  Hello hello_{};
  Challenge challenge_{};
  ResumePoint resume_;
  uint32_t answers_ = 0;
};

Limits smaller(const Limits &mine, const Limits &theirs);  // depth (bounded) and credits stay `theirs`
uint16_t common_version(const Hello &hello);               // 0: none

}  // namespace tcp
