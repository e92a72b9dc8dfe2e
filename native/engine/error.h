/* SPDX-License-Identifier: Apache-2.0
 * Errors as values: one way to fill an ept_error, one way to keep C++ exceptions on our side of the C boundary. */
#pragma once

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <new>
#include <stdexcept>

#include "eptransport/eptransport.h"

namespace ept {

inline void clear(ept_error *error) {
  if (!error) return;
  uint32_t size = error->size ? error->size : sizeof(ept_error);
  std::memset(error, 0, sizeof *error);
  error->size = size;
  error->peer = -1;
}

/* Returns `code`, so that `return fail(...)` reads well. */
__attribute__((format(printf, 5, 6))) inline int32_t fail(ept_error *error, int32_t code, const char *operation,
                                                          int32_t peer, const char *format, ...) {
  if (!error) return code;
  clear(error);
  error->code = code;
  error->peer = peer;
  std::snprintf(error->operation, sizeof error->operation, "%s", operation);
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(error->text, sizeof error->text, format, arguments);
  va_end(arguments);
  return code;
}

/* Runs a body of the C API: what C++ throws becomes a code and a sentence. */
template <class Body>
int32_t guarded(ept_error *error, const char *operation, Body &&body) {
  try {
    return body();
  } catch (const std::bad_alloc &) {
    return fail(error, EPT_E_NOMEM, operation, -1, "the machine has no memory left for this call");
  } catch (const std::exception &e) {
    return fail(error, EPT_E_INTERNAL, operation, -1, "a bug of eptransport's: %s", e.what());
  }
}

}  // namespace ept
