// SPDX-License-Identifier: Apache-2.0
//
// The handshake as the dialer meets it: whoever may listen at the address that it dials.
//
// An input: a byte that says how much is done right, a Challenge, an Answer, and what is said after them. INVARIANTS:
// without the secret no event comes, and the dialer goes on trying; with it, exactly one that says how it ended.
#include "tcp_rank.h"

namespace {

using namespace fuzz;
using plugin::Rank;

enum Right : uint8_t {
  kChallenge = 1,  // well formed
  kSeal = 2,       // the Answer, with the secret
  kFields = 4,     // of the Answer: code OK, rank, epoch, version
  kNothing = 8,    // no Challenge at all: the bytes are said as they are
  kTwice = 16,     // the Answer is first LATER
  kByBytes = 32
};

struct World {
  World() {
    plugin::Identity identity;
    identity.rank = 0;
    identity.world = 2;
    rank = std::make_unique<Rank>(backend(), identity, plugin::Options{{"streams", "1"}, {"handshake_ms", "600000"}});
    own = tcp_by_hand::address_of(*rank);
  }
  const ept_backend &plugin = backend();  // first: it sets the HMAC
  tcp_by_hand::Membership right;
  tcp_by_hand::Listener listener;
  std::unique_ptr<Rank> rank;
  tcp::Address own;
  uint32_t epoch = 0;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t length) {
  static World &world = *new World;
  Rank &rank = *world.rank;
  Input in(bytes, length);
  Seen seen;
  auto turn = [&] { settle(rank, &seen, 64, 1); };
  const uint8_t right = in.take<uint8_t>();

  // On this host, since another's loopback is never dialled.
  tcp::Address address;
  const std::string blob = tcp_by_hand::played(1, ++world.epoch, 1, world.listener.port());
  HOLDS(tcp::decode(blob.data(), blob.size(), &address) == EPT_OK);
  address.host = world.own.host;
  address.nonce[3] = 77;
  const std::vector<uint8_t> there = tcp::encode(address);
  HOLDS(backend().peer_open(rank.instance, 1, world.epoch, there.data(), there.size()) == EPT_OK);
  tcp_by_hand::Socket socket = world.listener.accept(turn);
  HOLDS(socket.fd() >= 0);
  auto say = [&](const void *what, size_t size) {
    const size_t step = right & kByBytes ? 1 : std::max<size_t>(size, 1);
    for (size_t at = 0; at < size; at += step) {
      socket.say(static_cast<const char *>(what) + at, std::min(step, size - at));
      turn();
    }
  };
  tcp::Hello hello;
  HOLDS(socket.hear_message(&hello, turn));
  bool sealed = false;
  if (!(right & kNothing)) {
    tcp::Acceptor acceptor(world.right.credentials, address.nonce);
    tcp::Challenge challenge;
    HOLDS(acceptor.hello(hello, &challenge));
    const auto said = in.take<tcp::Challenge>();
    const bool challenged = right & kChallenge;
    if (!challenged) challenge = said;
    say(&challenge, sizeof challenge);
    tcp::Proof proof;
    if (socket.hear_message(&proof, turn, 8)) {
      HOLDS(!challenged || acceptor.proof(proof) == tcp::Trust::kProven);
      tcp::Answer answer = in.take<tcp::Answer>();
      auto fill = [&](int32_t code) {
        answer.code = code;
        answer.rank = 1;
        answer.epoch = world.epoch;
        answer.version = tcp::kVersionHigh;
        answer.resume = {};
        answer.text[0] = 0;
      };
      if (challenged && (right & kSeal) && (right & kTwice)) {
        tcp::Answer later{};
        std::swap(later, answer);
        fill(EPT_LATER);
        acceptor.seal(&answer);
        say(&answer, sizeof answer);
        std::swap(later, answer);
        HOLDS(seen.up + seen.ended == 0);
      }
      if (right & kFields) fill(EPT_OK);
      if (right & kSeal) acceptor.seal(&answer);
      sealed = challenged && (right & kSeal);
      say(&answer, sizeof answer);
    }
  }
  settle(rank, &seen);
  if (!sealed) HOLDS(seen.up + seen.ended == 0);
  const std::string more = in.rest();
  say(more.data(), std::min<size_t>(more.size(), 4096));
  settle(rank, &seen);
  if (!sealed) {
    HOLDS(seen.up + seen.ended + seen.immediates + seen.messages == 0);
    HOLDS(backend().peer_state(rank.instance, 1) == EPT_LATER);
  }
  HOLDS(seen.up <= 1 && seen.ended <= 1);

  HOLDS(backend().peer_close(rank.instance, 1) == EPT_OK);
  socket.reset();
  settle(rank, &seen);
  return 0;
}
