/* SPDX-License-Identifier: Apache-2.0
 *
 * news.h: for code above the engine in this library: a wait for one signal that also ends when something else has come
 * that may make it vain, since its waits stand for several peers at once; and driving the engine for waits of a GPU. */
#pragma once

#include "eptransport/eptransport.h"

namespace ept {

/* As ept_signal_wait. LATER when there are news that `*seen` doesn't count yet: a link has ended, the membership has
 * moved, or a message with EPT_TAG_OURS has come; `*seen` is moved on. A first call begins with 0 and may end at once.
 */
int32_t wait_signal_or_news(ept_engine *engine, ept_signal_id id, uint64_t target, uint64_t timeout_ns, uint64_t *seen,
                            ept_error *error);

/* As ept_engine_progress, by who calls it all the time: the engine's own thread (AUTO) stands aside meanwhile, and for
 * up to 4.5 ms after the last call. `looks`: the clock is read too where nothing came; not every turn needs that. */
int32_t drive(ept_engine *engine, bool looks, ept_error *error);

/* When an immediate came last, whoever drove; 0: never. Takes no lock. */
uint64_t last_arrival(ept_engine *engine);

}  // namespace ept
