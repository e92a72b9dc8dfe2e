// SPDX-License-Identifier: Apache-2.0
// What the loops over another library's C API offer to compiled.py, and the clock they share. Each source is built when
// it is asked for, as a shared object that leaves that library's functions open: compiled.py loads the library first.
//
// All calls but side_open return 0, or -1 with a sentence in side_error. Every wait ends at its timeout.
#pragma once

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef struct side side;

// A worker of the library, and `bytes` of landing and as many of source memory, registered. NULL on failure.
side *side_open(const char *library, uint64_t bytes);
// What the other rank needs to reach this one. `length` in: room; out: used.
int side_address(side *s, uint8_t *blob, uint64_t *length);
int side_connect(side *s, const uint8_t *blob, uint64_t length, uint32_t rank);
int side_pingpong(side *s, uint64_t bytes, uint32_t count, double *one_way_ns, uint64_t timeout_ns);
int side_stream(side *s, uint64_t bytes, uint32_t count, uint32_t depth, double *seconds, uint64_t timeout_ns);
void side_close(side *s);
// What it says of itself once it is open.
const char *side_detail(side *s);
const char *side_error(void);

static char last_error[512];
const char *side_error(void) { return last_error; }

static int __attribute__((format(printf, 1, 2))) fail(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(last_error, sizeof last_error, format, arguments);
  va_end(arguments);
  return -1;
}

static inline uint64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

// Looks at the clock once in 1,024 questions, so that a spinning loop may ask at every turn.
typedef struct deadline {
  uint64_t end;
  uint32_t asked;
} deadline;

static inline deadline deadline_in(uint64_t timeout_ns) { return (deadline){now_ns() + timeout_ns, 0}; }
static inline int passed(deadline *d) { return ++d->asked % 1024 == 0 && now_ns() > d->end; }

// Byte `offset` of every source buffer.
static inline uint8_t pattern(uint64_t offset) { return (uint8_t)(offset * 131 + 7); }

static inline void fill(uint8_t *landing, uint8_t *source, uint64_t bytes) {
  for (uint64_t i = 0; i < bytes; ++i) {
    landing[i] = 0xee;
    source[i] = pattern(i);
  }
}

// What a stream must have left at the target, looked at here and there.
static inline int check(uint8_t *landing, uint64_t from, uint64_t bytes) {
  for (uint64_t i = from; i < bytes; i += 61)
    if (landing[i] != pattern(i)) return fail("stream: byte %llu is wrong", (unsigned long long)i);
  return 0;
}
