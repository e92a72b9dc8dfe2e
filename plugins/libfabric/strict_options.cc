// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cerrno>
#include <cstdlib>

#include "device_errors.h"
#include "strict.h"

namespace libfabric {
namespace {

// Numbers of the names, in the order of Deed.
constexpr std::array<const char *, static_cast<size_t>(Deed::kCount)> kNames = {
    "posts put off",
    "posts that overtook",
    "entries shuffled",
    "posts told EAGAIN",
    "reads told EAGAIN",
    "posts refused for room",
    "data truncated",
    "messages stalled without a receive",
    "device errors",
    "event queue errors",
    "posts waiting for a target that doesn't poll",
    "completion queues overrun",
    "operations without a descriptor",
    "wrong descriptors",
    "operations without a context",
    "contexts in use",
    "contexts written to under way",
    "peers unknown here",
    "peers that don't know us",
    "operations too long",
    "flags that EFA has not",
    "writes without data",
    "endpoints without an event queue",
    "registrations of memory that isn't there",
    "operations whose memory was deregistered",
};

bool read_number(const std::string &text, uint64_t most, uint64_t *value) {
  if (text.empty() || text.find_first_not_of("0123456789") != std::string::npos) return false;
  errno = 0;
  const unsigned long long number = strtoull(text.c_str(), nullptr, 10);
  if (errno != 0 || number > most) return false;
  *value = number;
  return true;
}

template <class T>
bool read_into(const std::string &text, uint64_t most, T *value) {
  uint64_t number = 0;
  if (!read_number(text, most, &number)) return false;
  *value = static_cast<T>(number);
  return true;
}

// "@N" or "/N".
bool read_when(const std::string &text, When *when) {
  if (text.size() < 2) return false;
  uint64_t number = 0;
  if (!read_number(text.substr(1), UINT64_MAX, &number) || number == 0) return false;
  if (text[0] == '@') when->at = number;
  if (text[0] == '/') when->every = number;
  return text[0] == '@' || text[0] == '/';
}

bool read_injection(const std::string &text, std::vector<Injection> *list) {
  const size_t cut = text.find_first_of("@/");
  if (cut == std::string::npos) return false;
  const DeviceError *error = device_error(text.substr(0, cut));
  Injection injection;
  if (error == nullptr || !read_when(text.substr(cut), &injection.when)) return false;
  injection.code = error->code;
  list->push_back(injection);
  return true;
}

bool read_share(const std::string &text, double *share) {
  char *end = nullptr;
  *share = strtod(text.c_str(), &end);
  return !text.empty() && *end == '\0' && *share >= 0 && *share < 1;
}

bool read_option(const std::string &name, const std::string &text, StrictOptions *options) {
  // A step waits 16 windows at most; a queue entry is some 100 bytes; the rest are the limits of their types.
  if (name == "window") return read_into(text, 4096, &options->window);
  if (name == "hold_ms") return read_into(text, UINT32_MAX, &options->hold_ms);
  if (name == "eagain") return read_share(text, &options->eagain);
  if (name == "storm") return read_into(text, 4096, &options->storm) && options->storm > 0;
  if (name == "rma") return read_into(text, UINT64_MAX, &options->rma);
  if (name == "msg") return read_into(text, UINT64_MAX, &options->msg);
  if (name == "inject") return read_into(text, 65536, &options->inject);
  if (name == "tx") return read_into(text, 65536, &options->tx) && options->tx > 0;
  if (name == "cq") return read_into(text, 1 << 20, &options->cq);
  if (name == "rnr") return read_into(text, UINT64_MAX, &options->rnr);
  if (name == "plain") return read_into(text, 1, &options->plain);
  if (name == "manual") return read_into(text, 1, &options->manual);
  if (name == "error") return read_injection(text, &options->errors);
  if (name == "send_error") return read_injection(text, &options->send_errors);
  if (name == "report_to") {
    options->report_to = text;
    return !text.empty();
  }
  When when;
  if (name != "eq_error" || !read_when(text, &when)) return false;
  options->event_errors.push_back(when);
  return true;
}

}  // namespace

const char *deed_name(Deed deed) { return kNames[static_cast<size_t>(deed)]; }

std::string StrictReport::words() const {
  std::string text;
  for (size_t i = 0; i < counts.size(); i++) {
    const uint64_t count = (*this)[static_cast<Deed>(i)];
    if (count != 0) text += (text.empty() ? "" : ", ") + std::to_string(count) + " " + kNames[i];
  }
  return text.empty() ? "nothing" : text;
}

std::string parse_strict(const std::string &text, StrictOptions *options) {
  const size_t colon = text.find(':');
  if (!read_number(text.substr(0, colon), UINT64_MAX, &options->seed))
    return "strict starts with a seed, a whole number (\"7\", \"7:window=32,eagain=0.3,error=rnr@100\"); it is \"" +
           text + "\"";
  size_t at = colon == std::string::npos ? text.size() : colon + 1;
  while (at < text.size()) {
    const size_t end = std::min(text.find(',', at), text.size());
    const std::string part = text.substr(at, end - at);
    const size_t equals = part.find('=');
    if (equals == std::string::npos || !read_option(part.substr(0, equals), part.substr(equals + 1), options))
      return "strict does not understand \"" + part +
             "\"; it knows window, hold_ms, eagain (0 to 1), storm, rma, msg, inject, tx, cq, rnr, plain, manual, "
             "error=CODE@N, send_error=CODE/N, eq_error=@N and report_to=FILE";
    at = end + 1;
  }
  return "";
}

}  // namespace libfabric
