// SPDX-License-Identifier: Apache-2.0
#include "handshake.h"

#include <cstring>

namespace libfabric {
namespace {

constexpr size_t kMostAddress = 512;  // bytes of one rail's; shm's are the longest, EFA's are 32

struct AddressHead {
  uint32_t magic;
  uint16_t version, rails;
  uint32_t rank, epoch;
  uint8_t nonce[kNonceBytes];
  uint8_t host[kNonceBytes];
  char provider[64];
};

using Mac = std::array<uint8_t, 32>;

Mac mac_of(const Credentials &credentials, const void *key, size_t key_length, const Nonce &sender,
           const Nonce &receiver, const MessageHead &head, const Greeting &greeting) {
  static const char label[16] = "ept libfabric 1";
  constexpr size_t kHead = offsetof(MessageHead, token), kBody = offsetof(Greeting, mac);
  uint8_t said[sizeof label + 2 * kNonceBytes + kHead + kBody];
  size_t length = 0;
  auto add = [&](const void *bytes, size_t count) {
    memcpy(said + length, bytes, count);
    length += count;
  };
  add(label, sizeof label);
  add(sender.data(), sender.size());
  add(receiver.data(), receiver.size());
  add(&head, kHead);
  add(&greeting, kBody);
  Mac mac;
  credentials.host->hmac_sha256(credentials.host->context, key, key_length, said, length, mac.data());
  return mac;
}

}  // namespace

std::vector<uint8_t> encode(const Address &address) {
  AddressHead head{};
  head.magic = kAddressMagic;
  head.version = kVersion;
  head.rails = static_cast<uint16_t>(address.rails.size());
  head.rank = address.rank;
  head.epoch = address.epoch;
  memcpy(head.nonce, address.nonce.data(), kNonceBytes);
  memcpy(head.host, address.host.data(), kNonceBytes);
  snprintf(head.provider, sizeof head.provider, "%s", address.provider.c_str());
  std::vector<uint8_t> bytes(sizeof head);
  memcpy(bytes.data(), &head, sizeof head);
  for (const auto &rail : address.rails) {
    bytes.push_back(static_cast<uint8_t>(rail.size()));
    bytes.push_back(static_cast<uint8_t>(rail.size() >> 8));
    bytes.insert(bytes.end(), rail.begin(), rail.end());
  }
  return bytes;
}

int32_t decode(const void *blob, size_t length, Address *address) {
  AddressHead head{};
  const auto *bytes = static_cast<const uint8_t *>(blob);
  if (length >= sizeof head) memcpy(&head, bytes, sizeof head);
  if (head.magic != kAddressMagic)
    return fail(EPT_E_INVALID, "address", -1, 0, "libfabric: %zu bytes that are no address of this backend", length);
  if (head.version != kVersion)
    return fail(EPT_E_VERSION, "address", head.rank, 0, "libfabric: the address is of version %u, this plugin reads %u",
                head.version, kVersion);
  address->rank = head.rank;
  address->epoch = head.epoch;
  memcpy(address->nonce.data(), head.nonce, kNonceBytes);
  memcpy(address->host.data(), head.host, kNonceBytes);
  address->provider.assign(head.provider, strnlen(head.provider, sizeof head.provider));
  address->rails.clear();
  size_t at = sizeof head;
  for (uint32_t i = 0; i < head.rails; ++i) {
    size_t size = length - at >= 2 ? bytes[at] | bytes[at + 1] << 8 : SIZE_MAX;
    if (size == 0 || size > kMostAddress || size > length - at - 2)
      return fail(EPT_E_INVALID, "address", head.rank, 0, "libfabric: the address of rank %u is cut at rail %u",
                  head.rank, i);
    address->rails.emplace_back(bytes + at + 2, bytes + at + 2 + size);
    at += 2 + size;
  }
  if (address->rails.empty() || at != length)
    return fail(EPT_E_INVALID, "address", head.rank, 0, "libfabric: the address of rank %u has %zu rails in %zu bytes",
                head.rank, address->rails.size(), length);
  return EPT_OK;
}

Credentials make_credentials(const ept_host *host, const ept_open_params &params) {
  Credentials credentials;
  credentials.host = host;
  credentials.secret = params.secret;
  credentials.secret_length = params.secret_length;
  host->random(host->context, credentials.nonce.data(), credentials.nonce.size());
  static const char key[] = "eptransport libfabric job";
  host->hmac_sha256(host->context, key, sizeof key - 1, params.job, strlen(params.job), credentials.job.data());
  return credentials;
}

void seal(const Credentials &credentials, const Nonce &receiver, const MessageHead &head, Greeting *greeting) {
  memcpy(greeting->job, credentials.job.data(), sizeof greeting->job);
  Mac mac =
      mac_of(credentials, credentials.secret, credentials.secret_length, credentials.nonce, receiver, head, *greeting);
  Mac witness = mac_of(credentials, receiver.data(), receiver.size(), credentials.nonce, receiver, head, *greeting);
  memcpy(greeting->mac, mac.data(), mac.size());
  memcpy(greeting->witness, witness.data(), witness.size());
}

Trust judge(const Credentials &credentials, const Nonce &sender, const MessageHead &head, const Greeting &greeting) {
  const Nonce &own = credentials.nonce;
  Mac secret = mac_of(credentials, credentials.secret, credentials.secret_length, sender, own, head, greeting);
  Mac member = mac_of(credentials, own.data(), own.size(), sender, own, head, greeting);
  // The secret alone is not enough: who holds a stale address would be taken for one of this instance's peers.
  if (!same_bytes(member.data(), greeting.witness, member.size())) return Trust::kStranger;
  return same_bytes(secret.data(), greeting.mac, secret.size()) ? Trust::kProven : Trust::kMember;
}

Token make_token(const Credentials &credentials, uint32_t from, uint32_t to, uint64_t from_opening,
                 uint64_t to_opening) {
  struct {
    char label[16];
    uint32_t from, to;
    uint64_t from_opening, to_opening;
  } said{"ept token 1", from, to, from_opening, to_opening};
  Mac mac;
  credentials.host->hmac_sha256(credentials.host->context, credentials.secret, credentials.secret_length, &said,
                                sizeof said, mac.data());
  Token token;
  memcpy(token.data(), mac.data(), token.size());
  return token;
}

}  // namespace libfabric
