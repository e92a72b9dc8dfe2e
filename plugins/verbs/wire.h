// SPDX-License-Identifier: Apache-2.0
// What two ranks say to each other to connect their queue pairs, and who believes what. Bytes in, bytes out.
//
// An address blob, which the engine ships through the bootstrap, names a datagram (UD) queue pair on each NIC. All else
// goes from one of these to another, one datagram a message, so that nothing blocks and nothing needs another network:
// each says the WHOLE state of its sender's half of the link (ChannelState, channel.h), so messages may be lost, come
// twice, late or in any order, and by any NIC.
//
//     rank A                                            rank B
//       | Hello: openings, limits, all channels -------->  |  answers each Hello with
//       | <-------- Ack: the same, about B's half           |
//
// Hellos are repeated while a side's half of the link is not as it should be. A queue pair is connected to a number
// that a proven message named, and to no other.
//
// Nothing is believed for where it came from: each message proves itself as a greeting does (../greeting.h), over all
// of it, and names the openings of both sides.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "../greeting.h"
#include "common.h"

namespace verbs {

using plugin::Credentials;
using plugin::kNonceBytes;
using plugin::Nonce;
using plugin::Trust;

constexpr uint32_t kAddressMagic = 0x41565045;  // "EPVA"
constexpr uint32_t kMessageMagic = 0x4d565045;  // "EPVM"
constexpr uint16_t kVersion = 1;
constexpr uint32_t kMostNics = 8;
constexpr uint32_t kMostChannels = 32;  // of a peer, so that a message fits a datagram

// One NIC's part of an address.
struct NicAddress {
  uint8_t gid[16];
  uint32_t qpn, qkey;  // of the datagram queue pair
  uint16_t lid;
  uint8_t ethernet;
  uint8_t mtu;        // ibv_mtu
  uint32_t receives;  // of a data queue pair: more can't be in flight to it
};
static_assert(sizeof(NicAddress) == 32, "layout of the blob");

struct Address {
  uint32_t rank = 0, epoch = 0, qps = 0;
  Nonce nonce{};
  std::vector<NicAddress> nics;
};
std::vector<uint8_t> encode(const Address &address);
int32_t decode(const void *blob, size_t length, Address *address);

enum class MessageType : uint8_t {
  kHello = 1,
  kAck = 2,
  kBye = 3,      // it was closed there
  kGivenUp = 4,  // it was fenced or has failed there: whom this reaches lives, and is taken for dead or masked
};

// What a side says of its half of a channel; channel.h has the rules.
struct ChannelState {
  uint32_t generation;  // of its queue pair, from 1
  uint32_t qpn, psn;    // of that queue pair
  uint32_t heard;       // the other side's generation that it is connected to; 0: none
  uint64_t consumed;    // operations that came whole over earlier generations; final
};

struct Message {
  uint32_t magic;
  uint16_t version;
  uint8_t type;      // MessageType
  uint8_t channels;  // entries that follow
  uint32_t from, from_epoch;
  uint32_t to, to_epoch;
  uint32_t world, qps, max_send, reserved;
  uint64_t opening;  // of the sender
  uint64_t heard;    // of the receiver; 0: not known yet
  uint8_t job[32];
  uint8_t mac[32], witness[32];
  ChannelState entries[kMostChannels];

  size_t size() const { return offsetof(Message, entries) + channels * sizeof(ChannelState); }
};
// The smallest payload of a datagram where the MTU is 1,024, which every RoCE port allows.
static_assert(sizeof(ChannelState) == 24 && sizeof(Message) <= 1024, "a message is one datagram");

void seal(const Credentials &credentials, const Nonce &receiver, Message *message);

// False: not a whole message of this protocol.
bool parse(const void *bytes, size_t length, Message *message);

Trust judge(const Credentials &credentials, const Nonce &sender, const Message &message);

}  // namespace verbs
