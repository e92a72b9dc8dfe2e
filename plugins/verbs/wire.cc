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

using Mac = std::array<uint8_t, 32>;

Mac mac_of(const Credentials &credentials, const void *key, size_t key_length, const Nonce &sender,
           const Nonce &receiver, const Message &message) {
  static const char label[16] = "ept verbs 1";
  struct {
    char label[16];
    uint8_t nonces[2][kNonceBytes];
    Message message;
  } said{};
  memcpy(said.label, label, sizeof label);
  memcpy(said.nonces[0], sender.data(), kNonceBytes);
  memcpy(said.nonces[1], receiver.data(), kNonceBytes);
  memcpy(static_cast<void *>(&said.message), &message, message.size());
  memset(said.message.mac, 0, sizeof said.message.mac);
  memset(said.message.witness, 0, sizeof said.message.witness);
  Mac mac;
  credentials.host->hmac_sha256(credentials.host->context, key, key_length, &said,
                                offsetof(decltype(said), message) + message.size(), mac.data());
  return mac;
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

Credentials make_credentials(const ept_host *host, const ept_open_params &params) {
  Credentials credentials;
  credentials.host = host;
  credentials.secret = params.secret;
  credentials.secret_length = params.secret_length;
  host->random(host->context, credentials.nonce.data(), credentials.nonce.size());
  static const char key[] = "eptransport verbs job";
  host->hmac_sha256(host->context, key, sizeof key - 1, params.job, strlen(params.job), credentials.job.data());
  return credentials;
}

void seal(const Credentials &credentials, const Nonce &receiver, Message *message) {
  memcpy(message->job, credentials.job.data(), sizeof message->job);
  const Mac mac =
      mac_of(credentials, credentials.secret, credentials.secret_length, credentials.nonce, receiver, *message);
  const Mac witness = mac_of(credentials, receiver.data(), receiver.size(), credentials.nonce, receiver, *message);
  memcpy(message->mac, mac.data(), mac.size());
  memcpy(message->witness, witness.data(), witness.size());
}

bool parse(const void *bytes, size_t length, Message *message) {
  constexpr size_t kHead = offsetof(Message, entries);
  *message = Message{};
  if (length < kHead || length > sizeof *message) return false;
  memcpy(static_cast<void *>(message), bytes, length);
  const auto type = static_cast<MessageType>(message->type);
  return message->magic == kMessageMagic && message->version == kVersion && message->channels <= kMostChannels &&
         message->size() == length &&
         (type == MessageType::kHello || type == MessageType::kAck || type == MessageType::kBye);
}

Trust judge(const Credentials &credentials, const Nonce &sender, const Message &message) {
  const Nonce &own = credentials.nonce;
  const Mac secret = mac_of(credentials, credentials.secret, credentials.secret_length, sender, own, message);
  const Mac member = mac_of(credentials, own.data(), own.size(), sender, own, message);
  // The secret alone is not enough: who holds a stale address would be taken for one of this instance's peers.
  if (!same_bytes(member.data(), message.witness, member.size())) return Trust::kStranger;
  return same_bytes(secret.data(), message.mac, secret.size()) ? Trust::kProven : Trust::kMember;
}

}  // namespace verbs
