// SPDX-License-Identifier: Apache-2.0
//
// check.h: all that a native test needs. A test is a program that returns 0; the first check that fails prints where,
// what and the values, and ends the process. A test has hundreds of checks, so a check holds no more than its condition
// and a call, and what happens when it fails stands in check.cc.
#pragma once

#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

namespace check {

[[noreturn, gnu::cold]] void failed(const char *file, int line, const std::string &what);
[[noreturn, gnu::cold]] void failed(const char *file, int line, const char *what);

// Says which part of the test runs, so that a hang has a name.
void running(const char *what);

// Fails unless `text` holds `part`; `what` is the check as it is written.
void has(const char *file, int line, const char *what, std::string_view text, std::string_view part);

// Values as words.
std::string show_integer(long long value);
std::string show_unsigned(unsigned long long value);
std::string show_real(double value);
std::string show_pointer(const void *value);

template <class T>
std::string show(const T &value) {
  if constexpr (std::is_floating_point_v<T>) {
    return show_real(static_cast<double>(value));
  } else if constexpr (std::is_unsigned_v<T>) {
    return show_unsigned(value);
  } else if constexpr (requires { static_cast<long long>(value); }) {
    return show_integer(static_cast<long long>(value));
  } else if constexpr (std::is_convertible_v<const T &, std::string_view> && !std::is_pointer_v<T>) {
    return std::string(std::string_view(value));
  } else if constexpr (std::is_convertible_v<const T &, const void *>) {
    return show_pointer(value);
  } else {
    return "(" + show_unsigned(sizeof value) + " bytes)";
  }
}

template <class A, class B>
[[noreturn, gnu::cold, gnu::noinline]] void differ(const char *file, int line, const char *what, const A &left,
                                                   const B &right) {
  failed(file, line, std::string(what) + ": " + show(left) + " and " + show(right));
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

#define CHECK_EQ(left, right)                                                                        \
  do {                                                                                               \
    const auto &check_left = (left);                                                                 \
    const auto &check_right = (right);                                                               \
    if (!check::equal(check_left, check_right))                                                      \
      check::differ(__FILE__, __LINE__, "CHECK_EQ(" #left ", " #right ")", check_left, check_right); \
  } while (0)

// `text` holds `part`.
#define CHECK_HAS(text, part) check::has(__FILE__, __LINE__, "CHECK_HAS(" #text ", " #part ")", text, part)

#define RUN(function)          \
  do {                         \
    check::running(#function); \
    function;                  \
  } while (0)
