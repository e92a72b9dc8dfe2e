// SPDX-License-Identifier: Apache-2.0
//
// common.cc: where a thread's last error is kept.
#include "common.h"

#include <cstdarg>
#include <cstdio>

namespace loopback {

namespace {

thread_local ept_error t_error;

}  // namespace

int32_t fail(int32_t code, const char *operation, int64_t peer, const char *format, ...) {
  t_error = {};
  t_error.size = sizeof t_error;
  t_error.code = code;
  t_error.peer = static_cast<int32_t>(peer);
  snprintf(t_error.operation, sizeof t_error.operation, "%s", operation);
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(t_error.text, sizeof t_error.text, format, arguments);
  va_end(arguments);
  return code;
}

ept_error &threads_error() { return t_error; }

}  // namespace loopback
