// SPDX-License-Identifier: Apache-2.0
//
// check.h: all that a native test needs. A test is a program that returns 0; the first check that fails prints where,
// what and the values, and ends the process.
#pragma once

#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <sstream>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

namespace check {

template <class T>
std::string show(const T &value) {
  std::ostringstream out;
  if constexpr (std::is_enum_v<T>) {
    out << static_cast<long long>(value);
  } else if constexpr (requires { out << value; }) {
    out << value;
  } else {
    out << "(" << sizeof value << " bytes)";
  }
  return out.str();
}

[[noreturn]] inline void failed(const char *file, int line, const std::string &what) {
  std::cout.flush();
  std::cerr << file << ":" << line << ": " << what << std::endl;
  _exit(1);  // other threads may be running: no destructor is safe
}

// Compares by value, whatever the signs of the types.
template <class A, class B>
bool equal(const A &a, const B &b) {
  if constexpr (std::is_integral_v<A> && std::is_integral_v<B> && !std::is_same_v<A, bool> &&
                !std::is_same_v<B, bool>) {
    return std::cmp_equal(a, b);
  } else {
    return a == b;
  }
}

}  // namespace check

#define CHECK(condition)                                                          \
  do {                                                                            \
    if (!(condition)) check::failed(__FILE__, __LINE__, "CHECK(" #condition ")"); \
  } while (0)

#define CHECK_EQ(left, right)                                                                                  \
  do {                                                                                                         \
    const auto &check_left = (left);                                                                           \
    const auto &check_right = (right);                                                                         \
    if (!check::equal(check_left, check_right)) {                                                              \
      check::failed(                                                                                           \
          __FILE__, __LINE__,                                                                                  \
          "CHECK_EQ(" #left ", " #right "): " + check::show(check_left) + " and " + check::show(check_right)); \
    }                                                                                                          \
  } while (0)

// `text` holds `part`.
#define CHECK_HAS(text, part)                                                                       \
  do {                                                                                              \
    const std::string check_text = (text);                                                          \
    if (check_text.find(part) == std::string::npos) {                                               \
      check::failed(__FILE__, __LINE__, "CHECK_HAS(" #text ", " #part "): \"" + check_text + "\""); \
    }                                                                                               \
  } while (0)

// Says which part of the test runs, so that a hang has a name.
#define RUN(function)                         \
  do {                                        \
    std::cout << "  " #function << std::endl; \
    function;                                 \
  } while (0)
