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

}  // namespace libfabric
