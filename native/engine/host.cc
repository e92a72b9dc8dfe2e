/* SPDX-License-Identifier: Apache-2.0 */
#include "engine/host.h"

#include <sys/random.h>
#include <time.h>

#include <cstdlib>

#include "cuda/driver.h"
#include "engine/sha256.h"

namespace ept {

uint64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<uint64_t>(t.tv_sec) * 1'000'000'000 + static_cast<uint64_t>(t.tv_nsec);
}

void Log::say(int32_t level, std::string text) {
  std::lock_guard hold(mutex_);
  if (lines_.size() == kept) {
    lines_.pop_front();
    dropped_++;
  }
  lines_.emplace_back(level, std::move(text));
}

bool Log::next(int32_t &level, std::string &text) {
  std::lock_guard hold(mutex_);
  if (dropped_) {
    level = EPT_LOG_WARNING;
    text = std::to_string(dropped_) + " log lines were dropped: nobody read them";
    dropped_ = 0;
    return true;
  }
  if (lines_.empty()) return false;
  level = lines_.front().first;
  text = std::move(lines_.front().second);
  lines_.pop_front();
  return true;
}

namespace {

void host_log(void *context, int32_t level, const char *text) { static_cast<Host *>(context)->log.say(level, text); }

uint64_t host_clock(void *) { return now_ns(); }

void host_random(void *, void *bytes, size_t length) {
  auto *at = static_cast<uint8_t *>(bytes);
  while (length) {
    ssize_t got = getrandom(at, length, 0);
    /* Keys that can be guessed would be worse than no process. getrandom fails only on a kernel without it. */
    if (got <= 0) std::abort();
    at += got;
    length -= static_cast<size_t>(got);
  }
}

void host_hmac(void *, const void *key, size_t key_length, const void *data, size_t length, uint8_t mac[32]) {
  hmac_sha256(key, key_length, data, length, mac);
}

void *host_cuda(void *, const char *symbol) { return cuda::symbol(symbol); }

}  // namespace

Host::Host() {
  table_.size = sizeof table_;
  table_.context = this;
  table_.log = host_log;
  table_.clock_ns = host_clock;
  table_.random = host_random;
  table_.hmac_sha256 = host_hmac;
  table_.cuda = host_cuda;
}

}  // namespace ept
