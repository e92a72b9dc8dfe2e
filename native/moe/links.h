// SPDX-License-Identifier: Apache-2.0
//
// links.h: what a lane's link to one peer is made of, and how its two ends tell each other: when an arena grows, and
// when a rank has come back (reset.cc).
#pragma once

#include "moe/control.h"
#include "moe/lane.h"

namespace ept::moe {

void make_signals(ept_engine *engine, Lane &lane, uint32_t source);

// What `to` needs to raise our signals of the link, and to write into [0, length) of a lane's memory.
void give_signals(ept_engine *engine, const Link &link, Bytes &bytes);
void give_region(ept_engine *engine, ept_memory_id memory, uint32_t to, uint64_t length, Bytes &bytes);
// The other end of it.
void take_signals(ept_engine *engine, uint32_t from, Link &link, Bytes &bytes);
ept_region_id take_region(ept_engine *engine, uint32_t from, Bytes &bytes);

// Gives back all that the link has; it is as new.
void release(ept_engine *engine, Link &link);

}  // namespace ept::moe
