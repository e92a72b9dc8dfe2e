// SPDX-License-Identifier: Apache-2.0
//
// no_threads.cc: a test that has this in it ends when anything in its process begins a thread: itself, the library or a
// plugin. Such a test isn't built under ThreadSanitizer, which has nothing to see where there is one thread.
#include <pthread.h>

#include <cstdio>
#include <cstdlib>

// Stands before the C library's, for every shared object of the process.
extern "C" int pthread_create(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *) noexcept {
  fprintf(stderr, "no_threads.cc: this test begins a thread, so it must not stand in one_thread of meson.build\n");
  abort();
}
