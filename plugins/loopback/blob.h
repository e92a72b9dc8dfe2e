// SPDX-License-Identifier: Apache-2.0
//
// blob.h: bytes that one rank hands to another outside of us (an address, a key), with a version in front.
#pragma once

#include "common.h"

namespace loopback {

constexpr uint32_t kBlobVersion = 1;

template <class Blob>
int32_t write_blob(const Blob &blob, const char *operation, void *out, size_t *length) {
  if (*length < sizeof blob) {
    return fail(EPT_E_LIMIT, operation, -1, "loopback %s: %zu bytes of room, %zu are needed", operation, *length,
                sizeof blob);
  }
  memcpy(out, &blob, sizeof blob);
  *length = sizeof blob;
  return EPT_OK;
}

template <class Blob>
int32_t read_blob(const void *bytes, size_t length, const char *operation, Blob *blob) {
  uint32_t version = 0;
  if (length >= sizeof version) memcpy(&version, bytes, sizeof version);
  if (version != kBlobVersion) {
    return fail(EPT_E_VERSION, operation, -1, "loopback %s: a blob of version %u, this is version %u", operation,
                version, kBlobVersion);
  }
  if (length != sizeof *blob) {
    return fail(EPT_E_INVALID, operation, -1, "loopback %s: a blob of %zu bytes, not %zu", operation, length,
                sizeof *blob);
  }
  memcpy(blob, bytes, sizeof *blob);
  return EPT_OK;
}

}  // namespace loopback
