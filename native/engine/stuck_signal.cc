/* SPDX-License-Identifier: Apache-2.0
 * A signal that asks for a report: the handler does no more than to wake whoever reads a descriptor, so it works
 * wherever the signal finds the process, also in a native wait. The handler is taken only where nobody had it, and
 * given back unless somebody has taken it since. A forked child, whose reader does not exist, has the default again. */
#include <pthread.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <mutex>

#include "engine/error.h"

using namespace ept;

namespace {

std::mutex changing;
std::atomic<int> wake_fd{-1};
std::atomic<int> taken{0}; /* the signal; 0: none */

void on_signal(int) {
  const int before = errno;
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t wrote = write(wake_fd.load(std::memory_order_relaxed), &one, sizeof one);
  errno = before;
}

bool is_ours(int number) {
  struct sigaction now{};
  return sigaction(number, nullptr, &now) == 0 && !(now.sa_flags & SA_SIGINFO) && now.sa_handler == on_signal;
}

void back_to_default(int number) {
  if (number && is_ours(number)) signal(number, SIG_DFL);
}

void in_child() {
  back_to_default(taken.exchange(0));
  wake_fd.store(-1);
}

}  // namespace

extern "C" {

int32_t ept_stuck_signal(int32_t number, int32_t *fd, ept_error *error) {
  std::lock_guard hold(changing);
  if (taken && taken != number) {
    return fail(error, EPT_E_INVALID, "stuck_signal", -1, "signal %d asks for reports already", taken.load());
  }
  struct sigaction now{};
  if (sigaction(number, nullptr, &now)) {
    return fail(error, EPT_E_INVALID, "stuck_signal", -1, "%d is no signal: %s", number, std::strerror(errno));
  }
  if (!is_ours(number) && ((now.sa_flags & SA_SIGINFO) || now.sa_handler != SIG_DFL)) return EPT_LATER;
  if (wake_fd < 0) {
    const int made = eventfd(0, EFD_CLOEXEC);
    if (made < 0) {
      return fail(error, EPT_E_NOMEM, "stuck_signal", -1, "the system gives no more file descriptors (eventfd: %s)",
                  std::strerror(errno));
    }
    wake_fd = made;
    static const int registered = pthread_atfork(nullptr, nullptr, in_child);
    (void)registered;
  }
  struct sigaction ours{};
  ours.sa_handler = on_signal;
  ours.sa_flags = SA_RESTART;
  sigemptyset(&ours.sa_mask);
  sigaction(number, &ours, nullptr);
  taken = number;
  *fd = wake_fd;
  return EPT_OK;
}

int32_t ept_stuck_signal_off(void) {
  std::lock_guard hold(changing);
  back_to_default(taken.exchange(0));
  return EPT_OK;
}

}  // extern "C"
