// SPDX-License-Identifier: Apache-2.0
#include "moe/fail.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <exception>
#include <new>

namespace ept::moe {

Error::Error() {
  size = sizeof(ept_error);
  code = EPT_OK;
  peer = -1;
  provider_errno = 0;
  expected = seen = silent_ns = 0;
  operation[0] = text[0] = 0;
}

void fail(int32_t code, int32_t peer, const char *format, ...) {
  Failure failure{Error()};
  failure.error.code = code;
  failure.error.peer = peer;
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(failure.error.text, sizeof failure.error.text, format, arguments);
  va_end(arguments);
  throw failure;
}

void check(int32_t code, const ept_error &error) {
  if (code >= 0) return;
  Failure failure{error};
  failure.error.code = code;
  if (!failure.error.text[0])
    snprintf(failure.error.text, sizeof failure.error.text, "the engine answered %s", ept_code_name(code));
  throw failure;
}

Failure current() {
  Failure failure{Error()};
  try {
    throw;
  } catch (const Failure &thrown) {
    return thrown;
  } catch (const std::bad_alloc &) {
    failure.error.code = EPT_E_NOMEM;
    snprintf(failure.error.text, sizeof failure.error.text, "the machine has no memory left for this call");
  } catch (const std::exception &thrown) {
    failure.error.code = EPT_E_INTERNAL;
    snprintf(failure.error.text, sizeof failure.error.text, "a bug of eptransport's: %s", thrown.what());
  }
  return failure;
}

void hand_over(const Failure &failure, const char *operation, ept_error *to) {
  if (!to) return;
  const uint32_t size = to->size;
  *to = failure.error;
  to->size = size;
  snprintf(to->operation, sizeof to->operation, "%s", operation);
}

ept_peer_info info_of(ept_engine *engine, uint32_t rank) {
  ept_peer_info info{};
  info.size = sizeof info;
  Error error;
  check(ept_engine_peer(engine, rank, &info, &error), error);
  return info;
}

}  // namespace ept::moe
