// SPDX-License-Identifier: Apache-2.0
//
// context.h: a stack of its own for each of many functions of one thread, which hand the thread to one another.
// swapcontext(3) asks the kernel for the signal mask at each switch, which took half of the time of all tests whose
// kernels are fibers: so there is a switch without it where we know how (x86-64).
#pragma once

#include <stddef.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <memory>

namespace simt {

class Context {
 public:
  // `entry` begins when the context is first switched to, on a stack of `bytes`, and never returns.
  void prepare(void (*entry)(), size_t bytes);
  // Goes on there, and returns when somebody switches back here.
  void switch_to(Context &there);
  // The first thing that an entry calls. `from`: who switched to it.
  static void entered(Context &from);

 private:
  std::unique_ptr<char[]> stack_;  // NULL: the thread's own
  const void *bottom_ = nullptr;   // AddressSanitizer is told whose stack goes on
  size_t size_ = 0;
#if defined(__x86_64__)
  void *top_ = nullptr;  // what was pushed when it was left
#else
  ucontext_t context_{};
#endif
};

}  // namespace simt
