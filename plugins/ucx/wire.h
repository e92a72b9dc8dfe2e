// SPDX-License-Identifier: Apache-2.0
// What two ranks send each other, all of it by active messages of UCX; and the blobs that go through the bootstrap.
//
//   kMessage  ../greeting.h: Hello, Ack, Bye, and the engine's SENDs
//   kWrite    a WRITE or SIGNAL: this head, and the payload behind it. The target checks the key, puts the payload into
//             its place, counts the immediate. A payload of some size comes by rendezvous: UCX asks where to, after
//             the check, and moves it there with what the network has (a copy by the kernel, an RDMA read)
//   kArrived  the same head without payload, which was put there by RDMA writes that have ended
//   kDone     how far this rank has got with what the other sent, and what it refused
//
// INVARIANT of endings. The operations that one side sends the other, SENDs too, are numbered by `serial` from 0, in
// one sequence for each opening. The target ends each exactly once: done (all its bytes are in place and its event is
// told) or refused. `done` says that all below it have ended. It rides on whatever goes the other way, and goes by
// itself when nothing does. A refusal is sent before a `done` that covers it, and both are small active messages of one
// endpoint, which UCX keeps in order: so an operation is never told complete that was refused.
#pragma once

#include <array>
#include <vector>

#include "../greeting.h"

namespace ucx {

using plugin::Nonce;
using plugin::Token;

constexpr uint32_t kMessageMagic = 0x55545045;  // "EPTU"
constexpr uint32_t kAddressMagic = 0x41555045;  // "EPUA"
constexpr uint32_t kRegionMagic = 0x52555045;   // "EPUR"
constexpr uint16_t kVersion = 1;
constexpr uint32_t kMaxSend = 4096;
using Key = std::array<uint8_t, 16>;

// Serials go round.
inline bool before(uint32_t a, uint32_t b) { return static_cast<int32_t>(a - b) < 0; }

enum class Am : unsigned { kMessage = 1, kWrite = 2, kArrived = 3, kDone = 4 };

// A kWrite has the first 48 bytes: with 8 bytes of payload still inside one element of UCX's shared-memory queue.
struct WriteHead {
  uint32_t from;
  uint32_t opening;  // its low half: messages of an opening before this one are dropped
  uint32_t serial;
  uint32_t done;
  uint32_t immediate;
  uint32_t region;  // the name that the target gave
  uint64_t offset;
  uint8_t key[16];
  uint64_t length;  // kArrived alone: what was put there
};
constexpr size_t kWriteBytes = offsetof(WriteHead, length);
static_assert(kWriteBytes == 48 && sizeof(WriteHead) == 56, "layout of a write");

struct DoneHead {
  uint32_t from;
  uint32_t opening;
  uint8_t token[16];
  uint32_t done;
  uint32_t refused;  // how many follow
};
struct Refused {
  uint32_t serial;
  int32_t code;
};

// How peers find this instance: the blob of local_address, and UCX's own address behind it.
struct AddressHead {
  uint32_t magic;
  uint16_t version, reserved;
  uint32_t rank, epoch;
  uint8_t nonce[plugin::kNonceBytes];
};
struct Address {
  uint32_t rank = 0, epoch = 0;
  Nonce nonce{};
  std::vector<uint8_t> worker;  // as UCX packs it
};
std::vector<uint8_t> encode(const Address &address);
int32_t decode(const void *blob, size_t length, Address *address);

struct RegionBlob {
  uint32_t magic;
  uint16_t version, rkey_length;
  uint32_t exporter, exporter_epoch;
  uint64_t length;
  uint64_t address;  // for RDMA writes
  uint32_t name;
  uint32_t kind;  // ept_memory_kind
  uint8_t key[16];
  // and UCX's rkey, where writes go by RDMA
};

}  // namespace ucx
