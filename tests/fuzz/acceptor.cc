// SPDX-License-Identifier: Apache-2.0
//
// The handshake as the acceptor meets it: whatever may come in at the port.
//
// An input: a byte that says how much of the handshake is done right, the Hello, and what is said after it. INVARIANTS:
// who has not shown the secret causes no event and changes no peer, and is gone when its connection is; a rank that
// waits for its peer is still there for it afterwards.
#include "tcp_rank.h"

namespace {

using namespace fuzz;
using plugin::Rank;

enum Right : uint8_t {
  kHead = 1,      // of the Hello: magic, layout, size
  kPlace = 2,     // world, ranks, epochs, versions, streams: what a true peer says
  kJob = 4,       //
  kProve = 8,     // with the secret
  kWitness = 16,  //   of the right address; without kProve: a member with another secret
  kNotOpen = 32,  // the rank has not opened its peer
  kByBytes = 64   // one byte after another
};

struct World {
  World() {
    plugin::Identity identity;
    identity.rank = 1;
    identity.world = 3;
    rank = std::make_unique<Rank>(backend(), identity,
                                  plugin::Options{{"streams", "1"}, {"half_open", "4"}, {"handshake_ms", "600000"}});
    address = tcp_by_hand::address_of(*rank);
  }
  const ept_backend &plugin = backend();  // first: it sets the HMAC
  tcp_by_hand::Membership right, wrong{"another"};
  std::unique_ptr<Rank> rank;
  tcp::Address address;
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

  const uint32_t epoch = ++world.epoch;
  const bool open = !(right & kNotOpen);
  if (open) HOLDS(rank.open_peer(0, epoch, tcp_by_hand::played(0, epoch)) == EPT_OK);

  tcp::Hello hello = in.take<tcp::Hello>();
  if (right & kPlace) {
    const tcp::Hello due = tcp_by_hand::hello_of(0, rank.id);
    const tcp::Limits limits = hello.limits;
    hello = due;
    hello.epoch = epoch;
    hello.limits = limits;
  }
  tcp::Address whom = world.address;
  if (!(right & kWitness)) whom.nonce[0] ^= 1;
  tcp_by_hand::Caller caller(right & kProve ? world.right : world.wrong, whom, hello);
  tcp::Hello said = caller.dialer.hello();
  if (!(right & kHead)) said.head = hello.head;
  if (!(right & kJob)) memcpy(said.job, hello.job, sizeof said.job);

  tcp_by_hand::Socket socket = tcp_by_hand::Socket::dial(world.address.endpoints.front().port);
  auto say = [&](const void *what, size_t size) {
    if (!(right & kByBytes)) {
      socket.say(what, size);
      turn();
      return;
    }
    for (size_t i = 0; i < size; ++i) {
      socket.say(static_cast<const char *>(what) + i, 1);
      turn();
    }
  };
  say(&said, sizeof said);
  settle(rank, &seen);
  tcp::Challenge challenge;
  tcp::Proof proof{};
  bool proven = false;
  if (socket.hear_message(&challenge, turn, 8) && caller.dialer.challenge(challenge, caller.resume, &proof)) {
    const bool as_said = memcmp(&said, &caller.dialer.hello(), sizeof said) == 0;
    if (right & (kProve | kWitness)) {
      say(&proof, sizeof proof);
      proven = as_said && (right & kProve) && (right & kWitness);
    }
  }
  const bool member = right & kWitness;
  settle(rank, &seen);
  const std::string more = in.rest();
  say(more.data(), std::min<size_t>(more.size(), 4096));
  settle(rank, &seen);
  if (!proven && !member) HOLDS(seen.up + seen.ended + seen.immediates + seen.messages == 0);
  if (!proven) HOLDS(seen.up == 0);
  if (open && !proven && !member) HOLDS(backend().peer_state(rank.instance, 0) == EPT_LATER);

  socket.reset();
  // The end of a connection may take a moment to come.
  int64_t half_open = -1;
  for (int turns = 0; half_open != 0 && turns < 60'000; ++turns) {
    settle(rank, &seen);
    HOLDS(backend().query(rank.instance, "half_open", &half_open) == EPT_OK);
    if (turns > 10) usleep(1000);
  }
  HOLDS(half_open == 0);
  if (open) HOLDS(backend().peer_close(rank.instance, 0) == EPT_OK);
  settle(rank, &seen);
  return 0;
}
