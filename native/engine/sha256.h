/* SPDX-License-Identifier: Apache-2.0
 * SHA-256 (FIPS 180-4) and HMAC (RFC 2104), for the handshake. Not for bulk data: plain, short and without tables of
 * secrets. Here because the library installs where no crypto library is. */
#pragma once

#include <cstddef>
#include <cstdint>

namespace ept {

void sha256(const void *data, size_t length, uint8_t digest[32]);
void hmac_sha256(const void *key, size_t key_length, const void *data, size_t length, uint8_t mac[32]);

}  // namespace ept
