// SPDX-License-Identifier: Apache-2.0
// The loops of who writes with an immediate and spins on a completion queue. Included by a source behind its struct
// side, which has rank, source, landing, and three counts that only go up: posted, done (own writes that are complete)
// and come (the peer's). The source brings the two functions declared here.
#pragma once

#include "loops.h"

// Takes what the queue has, into done and come.
static int poll_cq(side *s);
// One write from source + offset to landing + offset over there; counts it in posted.
static int post(side *s, uint64_t offset, uint64_t bytes, deadline *end);

static int until(side *s, const uint64_t *counter, uint64_t target, deadline *end, const char *what) {
  while (*counter < target) {
    if (poll_cq(s)) return -1;
    if (passed(end))
      return fail("%s: %llu of %llu in time", what, (unsigned long long)*counter, (unsigned long long)target);
  }
  return 0;
}

// The source is free only here: what the peer has written since says that it has all of the turn before, and until then
// shm may still read it.
static int post_turn(side *s, uint64_t bytes, uint32_t turn, deadline *end) {
  s->source[0] = (uint8_t)(turn + 1);
  return post(s, 0, bytes, end);
}

int side_pingpong(side *s, uint64_t bytes, uint32_t count, double *one_way_ns, uint64_t timeout_ns) {
  deadline end = deadline_in(timeout_ns);
  const uint64_t come = s->come;
  for (uint32_t i = 0; i < count; ++i) {
    const uint64_t before = now_ns();
    if (s->rank == 0 && post_turn(s, bytes, i, &end)) return -1;
    if (until(s, &s->come, come + i + 1, &end, "the peer's write")) return -1;
    if (s->landing[0] != (uint8_t)(i + 1)) return fail("turn %u: the completion came before its bytes", i);
    if (s->rank == 1 && post_turn(s, bytes, i, &end)) return -1;
    one_way_ns[i] = (double)(now_ns() - before) / 2;
  }
  const int code = until(s, &s->done, s->posted, &end, "own write");
  s->source[0] = pattern(0);
  return code;
}

int side_stream(side *s, uint64_t bytes, uint32_t count, uint32_t depth, double *seconds, uint64_t timeout_ns) {
  deadline end = deadline_in(timeout_ns);
  const uint64_t come = s->come, before = now_ns();
  if (s->rank == 0) {
    for (uint32_t i = 0; i < count; ++i) {
      if (s->posted - s->done >= depth && until(s, &s->done, s->posted - depth + 1, &end, "own writes")) return -1;
      if (post(s, i % depth * bytes, bytes, &end)) return -1;
    }
    if (until(s, &s->done, s->posted, &end, "own writes") || until(s, &s->come, come + 1, &end, "answer")) return -1;
    *seconds = (double)(now_ns() - before) / 1e9;
    return 0;
  }
  if (until(s, &s->come, come + count, &end, "the peer's writes")) return -1;
  if (post(s, 0, 1, &end) || until(s, &s->done, s->posted, &end, "answer")) return -1;
  *seconds = (double)(now_ns() - before) / 1e9;
  return check(s->landing, 0, bytes * (count < depth ? count : depth));
}
