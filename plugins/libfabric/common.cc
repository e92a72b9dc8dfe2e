// SPDX-License-Identifier: Apache-2.0
#include "common.h"

#include <cstdio>

namespace libfabric {
namespace {

thread_local ept_error last{sizeof(ept_error), EPT_OK, -1, 0, 0, 0, 0, {}, {}};

}  // namespace

int32_t fail(int32_t code, const char *operation, int64_t peer, int number, const char *pattern, ...) {
  last = ept_error{sizeof(ept_error), code, static_cast<int32_t>(peer), number, 0, 0, 0, {}, {}};
  snprintf(last.operation, sizeof last.operation, "%s", operation);
  va_list list;
  va_start(list, pattern);
  vsnprintf(last.text, sizeof last.text, pattern, list);
  va_end(list);
  return code;
}

const ept_error &last_error() { return last; }

std::string format(const char *pattern, ...) {
  char text[1024];
  va_list list;
  va_start(list, pattern);
  vsnprintf(text, sizeof text, pattern, list);
  va_end(list);
  return text;
}

}  // namespace libfabric
