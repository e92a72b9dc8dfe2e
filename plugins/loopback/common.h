// SPDX-License-Identifier: Apache-2.0
//
// common.h: what every file needs: the calling thread's last error, the edge that no exception crosses, and structs of
// the caller's filled.
#pragma once

#include <eptransport/backend.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <new>

namespace loopback {

// Leaves a sentence for `last_error` on the calling thread and returns `code`. `peer` -1: none.
[[gnu::format(printf, 4, 5)]] int32_t fail(int32_t code, const char *operation, int64_t peer, const char *format, ...);
ept_error &threads_error();

// No exception crosses the table.
template <class Body>
int32_t guard(const char *operation, Body &&body) noexcept {
  try {
    return body();
  } catch (const std::bad_alloc &) {
    return fail(EPT_E_NOMEM, operation, -1, "loopback %s: the machine refused memory", operation);
  } catch (const std::exception &error) {
    return fail(EPT_E_INTERNAL, operation, -1, "loopback %s: %s", operation, error.what());
  }
}

// Fills a struct of the caller's, which may be older and shorter than ours, or newer and longer.
template <class T>
void give(T *out, T value) {
  const uint32_t size = out->size;
  value.size = size;
  memset(out, 0, size);
  memcpy(out, &value, std::min<size_t>(size, sizeof value));
}

}  // namespace loopback
