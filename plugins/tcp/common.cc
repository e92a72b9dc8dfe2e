// SPDX-License-Identifier: Apache-2.0
#include "common.h"

#include <cstring>

std::string tcp::errno_text(int number) {
  char buffer[128];
  return strerror_r(number, buffer, sizeof buffer);  // GNU's: returns the text
}
