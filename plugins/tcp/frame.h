// SPDX-License-Identifier: Apache-2.0
// What runs over a stream after its handshake: frames, each a header of 64 bytes and `length` bytes of payload.
//
//      0        4    5    6    8           12         16                 24
//     +--------+----+----+----+-----------+----------+------------------+
//     | magic  |type| 0  | 0  | immediate | length   | number           |
//     +--------+----+----+----+-----------+----------+------------------+
//      24               32               40       44       48              64
//     +-----------------+----------------+--------+--------+----------------+
//     | consumed        | offset         | slot   | 0      | key            |
//     +-----------------+----------------+--------+--------+----------------+
//
// Operations (WRITE, SIGNAL, SEND) are numbered 0, 1, ... on their stream, in the order in which they are sent. Every
// frame says in `consumed` how many operations of the other side its sender has consumed: written, signalled, delivered
// or refused. So whatever goes back acknowledges, and an ACK of its own is sent only where nothing does.
//
// A refused operation is consumed too. Its REFUSED frame is sent before any frame whose `consumed` is past it; so an
// operation below `consumed` that was not refused by then has succeeded.
//
// An operation is in flight from its post until `consumed` passes it: its source may not be reused before (it would be
// sent again if the stream broke and were resumed), and that is what LOCAL_DONE says.
#pragma once

#include <cstdint>

namespace tcp {

constexpr uint32_t kFrameMagic = 0x46545045;  // "EPTF"

enum class FrameType : uint8_t {
  kWrite = 1,    // payload goes to `offset` of the region that `slot` and `key` name, then `immediate` is raised
  kSignal = 2,   // the immediate alone; the key is checked as for a write
  kSend = 3,     // payload is a message
  kAck = 4,      // only `consumed`
  kRefused = 5,  // operation `number` of the other side was refused; `immediate` is an ept_code, negated
  kFinish = 6,   // the last frame: an orderly end
};

struct FrameHeader {
  uint32_t magic;
  FrameType type;
  uint8_t flags;      // 0
  uint16_t reserved;  // 0
  uint32_t immediate;
  uint32_t length;  // of the payload; at most the negotiated max_message or max_send
  uint64_t number;
  uint64_t consumed;
  uint64_t offset;
  uint32_t slot;
  uint32_t reserved2;  // 0
  uint8_t key[16];
};
static_assert(sizeof(FrameHeader) == 64, "frame layout");

}  // namespace tcp
