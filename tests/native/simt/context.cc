// SPDX-License-Identifier: Apache-2.0
#include "context.h"

#include <stdint.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
// Saves what a function must keep for its caller, and the stack pointer in *left; takes the other's. The control words
// of the floating point unit are the same everywhere.
extern "C" void simt_switch(void **left, void *entered);
asm(R"(
  .text
  .p2align 4
  .globl simt_switch
  .hidden simt_switch
  .type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size simt_switch, .-simt_switch
)");
#endif

namespace simt {

void Context::prepare(void (*entry)(), size_t bytes) {
  if (!stack_ || size_ != bytes) stack_ = std::make_unique_for_overwrite<char[]>(bytes);
  bottom_ = stack_.get();
  size_ = bytes;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack_.get(), bytes);  // of functions that were left for good
#endif
#if defined(__x86_64__)
  // As if it had been left at its entry, whose caller's stack was aligned to 16 bytes: no return address, the entry,
  // six registers.
  auto *top = reinterpret_cast<uint64_t *>((reinterpret_cast<uintptr_t>(stack_.get()) + bytes) & ~uintptr_t{15});
  *--top = 0;
  *--top = reinterpret_cast<uintptr_t>(entry);
  for (int i = 0; i < 6; i++) *--top = 0;
  top_ = top;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_.get();
  context_.uc_stack.ss_size = bytes;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
#endif
}

void Context::switch_to(Context &there) {
#if defined(__SANITIZE_ADDRESS__)
  void *frames = nullptr;
  __sanitizer_start_switch_fiber(&frames, there.bottom_, there.size_);
#endif
#if defined(__x86_64__)
  simt_switch(&top_, there.top_);
#else
  swapcontext(&context_, &there.context_);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(frames, nullptr, nullptr);
#endif
}

void Context::entered([[maybe_unused]] Context &from) {
#if defined(__SANITIZE_ADDRESS__)
  if (from.stack_)
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
  else  // the thread's own stack is known from here on
    __sanitizer_finish_switch_fiber(nullptr, &from.bottom_, &from.size_);
#endif
}

}  // namespace simt
