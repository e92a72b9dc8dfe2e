// SPDX-License-Identifier: Apache-2.0
#include "wire.h"

#include <cstring>

namespace verbs {
namespace {

struct AddressHead {
  uint32_t magic;
  uint16_t version, nics;
  uint32_t rank, epoch, qps, reserved;
  uint8_t nonce[kNonceBytes];
};

// What of a message is proven: all but the proofs.
Message said_by(const Message &message) {
  Message said = message;
  memset(said.mac, 0, sizeof said.mac);
  memset(said.witness, 0, sizeof said.witness);
  return said;
}

}  // namespace

std::vector<uint8_t> encode(const Address &address) {
  AddressHead head{kAddressMagic,
                   kVersion,
                   static_cast<uint16_t>(address.nics.size()),
                   address.rank,
                   address.epoch,
                   address.qps,
                   0,
                   {}};
  memcpy(head.nonce, address.nonce.data(), kNonceBytes);
  std::vector<uint8_t> bytes(sizeof head + address.nics.size() * sizeof(NicAddress));
  memcpy(bytes.data(), &head, sizeof head);
  memcpy(bytes.data() + sizeof head, address.nics.data(), address.nics.size() * sizeof(NicAddress));
  return bytes;
}

int32_t decode(const void *blob, size_t length, Address *address) {
  AddressHead head{};
  if (length >= sizeof head) memcpy(&head, blob, sizeof head);
  if (head.magic != kAddressMagic)
    return fail(EPT_E_INVALID, "address", -1, 0, "verbs: %zu bytes that are no address of this backend", length);
  if (head.version != kVersion)
    return fail(EPT_E_VERSION, "address", head.rank, 0, "verbs: the address is of version %u, this plugin reads %u",
                head.version, kVersion);
  if (head.nics == 0 || head.nics > kMostNics || head.qps == 0 ||
      length != sizeof head + head.nics * sizeof(NicAddress))
    return fail(EPT_E_INVALID, "address", head.rank, 0, "verbs: the address of rank %u has %u NICs in %zu bytes",
                head.rank, head.nics, length);
  address->rank = head.rank;
  address->epoch = head.epoch;
  address->qps = head.qps;
  memcpy(address->nonce.data(), head.nonce, kNonceBytes);
  address->nics.resize(head.nics);
  memcpy(address->nics.data(), static_cast<const uint8_t *>(blob) + sizeof head, head.nics * sizeof(NicAddress));
  for (const NicAddress &nic : address->nics)
    if (nic.mtu < IBV_MTU_1024 || nic.mtu > IBV_MTU_4096 || nic.receives == 0)
      return fail(EPT_E_INVALID, "address", head.rank, 0,
                  "verbs: the address of rank %u has a NIC of MTU code %u and %u receives", head.rank, nic.mtu,
                  nic.receives);
  return EPT_OK;
}

void seal(const Credentials &credentials, const Nonce &receiver, Message *message) {
  memcpy(message->job, credentials.job.data(), sizeof message->job);
  const Message said = said_by(*message);
  prove(credentials, receiver, &said, said.size(), message->mac, message->witness);
}

bool parse(const void *bytes, size_t length, Message *message) {
  constexpr size_t kHead = offsetof(Message, entries);
  *message = Message{};
  if (length < kHead || length > sizeof *message) return false;
  memcpy(static_cast<void *>(message), bytes, length);
  const auto type = static_cast<MessageType>(message->type);
  return message->magic == kMessageMagic && message->version == kVersion && message->channels <= kMostChannels &&
         message->size() == length &&
         (type == MessageType::kHello || type == MessageType::kAck || type == MessageType::kBye ||
          type == MessageType::kGivenUp);
}

Trust judge(const Credentials &credentials, const Nonce &sender, const Message &message) {
  const Message said = said_by(message);
  return plugin::judge(credentials, sender, &said, said.size(), message.mac, message.witness);
}

}  // namespace verbs
