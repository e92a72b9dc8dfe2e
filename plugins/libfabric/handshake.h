// SPDX-License-Identifier: Apache-2.0
// How ranks find each other and begin to speak. Before the first write each says Hello and Ack (../greeting.h) on every
// rail, so that both sides hold the other in their address vectors, as SRD wants, and every rail has carried something
// both ways.
#pragma once

#include <string>
#include <vector>

#include "../greeting.h"
#include "common.h"

namespace libfabric {

using plugin::Credentials;
using plugin::Greeting;
using plugin::kNonceBytes;
using plugin::make_token;
using plugin::MessageHead;
using plugin::MessageType;
using plugin::Nonce;
using plugin::Token;
using plugin::Trust;

constexpr uint32_t kMessageMagic = 0x46545045;  // "EPTF"
constexpr uint32_t kAddressMagic = 0x41465045;  // "EPFA"
constexpr uint16_t kVersion = 1;

// How peers find this instance: the blob of local_address.
struct Address {
  uint32_t rank = 0, epoch = 0;
  Nonce nonce{};
  Nonce host{};          // the machine: two processes with the same one share it
  std::string provider;  // both sides must use the same
  std::vector<std::vector<uint8_t>> rails;
};
std::vector<uint8_t> encode(const Address &address);
int32_t decode(const void *blob, size_t length, Address *address);

}  // namespace libfabric
