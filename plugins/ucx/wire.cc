// SPDX-License-Identifier: Apache-2.0
#include "wire.h"

#include <cstring>

#include "settings.h"

namespace ucx {

std::vector<uint8_t> encode(const Address &address) {
  AddressHead head{};
  head.magic = kAddressMagic;
  head.version = kVersion;
  head.rank = address.rank;
  head.epoch = address.epoch;
  memcpy(head.nonce, address.nonce.data(), sizeof head.nonce);
  std::vector<uint8_t> bytes(sizeof head + address.worker.size());
  memcpy(bytes.data(), &head, sizeof head);
  memcpy(bytes.data() + sizeof head, address.worker.data(), address.worker.size());
  return bytes;
}

int32_t decode(const void *blob, size_t length, Address *address) {
  AddressHead head{};
  if (length > sizeof head) memcpy(&head, blob, sizeof head);
  if (head.magic != kAddressMagic)
    return fail(EPT_E_INVALID, "address", -1, 0, "ucx: %zu bytes that are no address of this backend", length);
  if (head.version != kVersion)
    return fail(EPT_E_VERSION, "address", head.rank, 0, "ucx: the address is of version %u, this plugin reads %u",
                head.version, kVersion);
  const auto *bytes = static_cast<const uint8_t *>(blob);
  address->rank = head.rank;
  address->epoch = head.epoch;
  memcpy(address->nonce.data(), head.nonce, sizeof head.nonce);
  address->worker.assign(bytes + sizeof head, bytes + length);
  return EPT_OK;
}

}  // namespace ucx
