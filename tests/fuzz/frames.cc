// SPDX-License-Identifier: Apache-2.0
//
// The frames of a member connection: everything that a peer may say behind the door.
//
// An input is a row of steps, each a byte that says which parts of the frame are mended before it is sent (so that it
// gets past the checks in front of the ones it is to try), where the frame is cut in two, 64 bytes of header, and what
// stands for its payload. INVARIANTS, whatever is said:
//   - no byte changes but in the window that was exported to this peer, and none there after its key was revoked;
//   - no more immediates than frames with the right key, and none for a frame without;
//   - everything that was posted has ended once when the peer has been closed (contract 9).
#include "tcp_rank.h"

namespace {

using namespace fuzz;
using plugin::Rank;

enum Mend : uint8_t {
  kMagic = 1,       // magic, and zeros where zeros must be
  kKey = 2,         // the window's slot and key
  kNumber = 4,      // the next in turn
  kConsumed = 8,    // what was really heard
  kLength = 16,     // at most 4 KiB, and so much payload follows
  kInside = 32,     // the range lies in the window
  kRevoke = 64,     // between the halves of this frame the window is revoked
  kPostFirst = 128  // the rank writes and sends something itself before
};

constexpr size_t kGuard = 256, kWindow = 4096;
constexpr uint32_t kSteps = 64;

struct World {
  World() {
    plugin::Identity identity;
    identity.rank = 1;
    identity.world = 3;
    rank = std::make_unique<Rank>(backend(), identity, plugin::Options{{"streams", "1"}});
    memory.assign(2 * kGuard + kWindow, 0xA5);
    mem = rank->enroll(memory.data(), memory.size());
    other = rank->grant(mem, 2, 0, memory.size()).first;  // another rank may write all of it; this one may not
    source.assign(1024, 7);
    source_mem = rank->enroll(source.data(), source.size());
    address = tcp_by_hand::address_of(*rank);
  }
  const ept_backend &plugin = backend();  // first: it sets the HMAC
  tcp_by_hand::Membership membership;
  std::unique_ptr<Rank> rank;
  std::vector<uint8_t> memory, source;
  ept_mem *mem = nullptr, *source_mem = nullptr;
  std::string other;
  tcp::Address address;
  uint32_t epoch = 0;
};

// A region of the peer's that the rank can name; the peer is us, so nothing stands behind it.
std::string their_region(uint32_t epoch) {
  std::string blob(48, 0);
  uint32_t words[5] = {0x52545045, 1, 0, epoch, 0};
  memcpy(blob.data(), words, sizeof words);
  const uint64_t length = 1 << 20;
  memcpy(blob.data() + 24, &length, sizeof length);
  return blob;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t length) {
  static World &world = *new World;
  Rank &rank = *world.rank;
  Input in(bytes, length);
  Seen seen;
  auto turn = [&] { settle(rank, &seen, 64, 1); };

  const uint32_t epoch = ++world.epoch;
  HOLDS(rank.open_peer(0, epoch, tcp_by_hand::played(0, epoch)) == EPT_OK);
  auto [window, key] = rank.grant(world.mem, 0, kGuard, kWindow);
  bool revoked = false;
  std::fill(world.memory.begin(), world.memory.end(), uint8_t{0xA5});

  tcp_by_hand::Socket socket = tcp_by_hand::Socket::dial(world.address.endpoints.front().port);
  tcp::Hello hello = tcp_by_hand::hello_of(0, rank.id);
  hello.epoch = epoch;
  hello.limits.depth = 16;
  tcp_by_hand::Caller caller(world.membership, world.address, hello);
  tcp::Answer answer;
  HOLDS(caller.enter(socket, turn, &answer));
  HOLDS(answer.code == EPT_OK);
  settle(rank, &seen);
  HOLDS(seen.up == 1);

  uint64_t number = 0, may_land = 0, posted = 0, heard = 0;
  for (uint32_t step = 0; step < kSteps && !in.empty(); ++step) {
    const uint8_t mend = in.take<uint8_t>();
    const uint8_t cut = in.take<uint8_t>();
    if (mend & kPostFirst) {
      ept_region *region = rank.import(0, their_region(epoch));
      ept_op op = Rank::write(0, world.source_mem, world.source.data(), region, 0, 1 + cut, 9, 100 + step);
      posted += rank.post(op) == EPT_OK;
      posted += rank.post(Rank::message(0, "hello", 1000 + step)) == EPT_OK;
      heard = posted;
      rank.drop(region);
    }
    auto header = in.take<tcp::FrameHeader>();
    if (mend & kMagic) {
      header.magic = tcp::kFrameMagic;
      header.flags = 0;
      header.reserved = 0;
      header.reserved2 = 0;
    }
    if (mend & kKey) {
      const tcp::FrameHeader right = tcp_by_hand::write_frame(window, 0, 0, 0, 0);
      header.slot = right.slot;
      memcpy(header.key, right.key, sizeof header.key);
    }
    if (mend & kNumber) header.number = number;
    if (mend & kConsumed) header.consumed = heard;
    if (mend & kLength) header.length %= 4097;
    if (mend & kInside && header.length <= kWindow) header.offset %= kWindow - header.length + 1;
    const bool operation = header.type == tcp::FrameType::kWrite || header.type == tcp::FrameType::kSignal ||
                           header.type == tcp::FrameType::kSend;
    number += operation;
    may_land += operation && header.type != tcp::FrameType::kSend && (mend & kKey) && !revoked;

    std::string frame(reinterpret_cast<const char *>(&header), sizeof header);
    if (header.length <= 65536 && (mend & kLength)) {
      std::string payload = in.text(std::min<size_t>(header.length, 64));
      payload.resize(header.length, static_cast<char>(cut));
      frame += payload;
    }
    const size_t half = std::min<size_t>(cut, frame.size());
    socket.say(frame.data(), half);
    settle(rank, &seen, 1 + cut % 64, 2);
    if ((mend & kRevoke) && !revoked) {
      HOLDS(backend().region_revoke(world.mem, 0, key) == EPT_OK);
      revoked = true;
      const std::vector<uint8_t> now = world.memory;
      socket.say(frame.data() + half, frame.size() - half);
      settle(rank, &seen);
      HOLDS(now == world.memory);
    } else {
      socket.say(frame.data() + half, frame.size() - half);
      settle(rank, &seen, 1 + cut % 64, 2);
    }
    if (!socket.drain()) break;
  }

  // The window alone: not the guards, which another rank's export covers.
  for (size_t i = 0; i < kGuard; ++i) {
    HOLDS(world.memory[i] == 0xA5);
    HOLDS(world.memory[kGuard + kWindow + i] == 0xA5);
  }
  HOLDS(seen.immediates <= may_land);
  HOLDS(seen.messages <= number);
  HOLDS(seen.ended <= 1);

  if (!revoked) HOLDS(backend().region_revoke(world.mem, 0, key) == EPT_OK);
  HOLDS(backend().peer_close(rank.instance, 0) == EPT_OK);
  socket.reset();
  settle(rank, &seen);
  HOLDS(seen.done + seen.errors == posted);
  return 0;
}
