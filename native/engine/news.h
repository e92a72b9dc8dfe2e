/* SPDX-License-Identifier: Apache-2.0
 *
 * news.h: a wait for one signal that also ends when something else has come that may make it vain. For code above the
 * engine in this library, whose waits stand for several peers at once. */
#pragma once

#include "eptransport/eptransport.h"

namespace ept {

/* As ept_signal_wait. LATER when there are news that `*seen` doesn't count yet: a link has ended, the membership has
 * moved, or a message with EPT_TAG_OURS has come; `*seen` is moved on. A first call begins with 0 and may end at once.
 */
int32_t wait_signal_or_news(ept_engine *engine, ept_signal_id id, uint64_t target, uint64_t timeout_ns, uint64_t *seen,
                            ept_error *error);

}  // namespace ept
