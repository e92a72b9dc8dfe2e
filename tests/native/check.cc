// SPDX-License-Identifier: Apache-2.0
#include "check.h"

namespace check {

namespace {

template <class T>
std::string print(const char *format, T value) {
  char words[64];
  snprintf(words, sizeof words, format, value);
  return words;
}

}  // namespace

void failed(const char *file, int line, const char *what) {
  fflush(stdout);
  fprintf(stderr, "%s:%d: %s\n", file, line, what);
  _exit(1);  // other threads may be running: no destructor is safe
}

void failed(const char *file, int line, const std::string &what) { failed(file, line, what.c_str()); }

void running(const char *what) {
  printf("  %s\n", what);
  fflush(stdout);
}

void has(const char *file, int line, const char *what, std::string_view text, std::string_view part) {
  if (text.find(part) == std::string_view::npos)
    failed(file, line, std::string(what) + ": \"" + std::string(text) + "\"");
}

std::string show_integer(long long value) { return print("%lld", value); }
std::string show_unsigned(unsigned long long value) { return print("%llu", value); }
std::string show_real(double value) { return print("%g", value); }
std::string show_pointer(const void *value) { return print("%p", value); }

}  // namespace check
