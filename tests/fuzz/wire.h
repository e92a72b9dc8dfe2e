// SPDX-License-Identifier: Apache-2.0
//
// wire.h: a network inside one process that a target holds in its hand. Ranks that have an instance are real engines;
// any other is played: the target says what comes from it. Operations land inside post; what is written may be altered
// on its way. One lock, taken by every call, so ranks may be threads.
#pragma once

#include <functional>
#include <string>

#include "engine/plugin.h"
#include "eptransport/eptransport.h"
#include "input.h"

namespace wire {

const ept_plugin *plugin();

// As if `from` had done it, at rank `to`.
void say_immediate(uint32_t to, uint32_t from, uint32_t immediate);
void say_message(uint32_t to, uint32_t from, const std::string &bytes);
void say_peer(uint32_t to, uint32_t from, int32_t code);

// Called with each write and message before it lands; may change the bytes.
using Tamper = std::function<void(uint32_t from, uint32_t to, char *bytes, size_t length)>;
void tamper(Tamper how);

// What stands for the address, and a region, of a played rank.
std::string address_of(uint32_t rank, uint32_t epoch);
std::string region_of(uint32_t rank, uint64_t length);

struct Error : ept_error {
  Error() : ept_error{} {
    size = sizeof(ept_error);
    peer = -1;
  }
};
// An engine of `rank`, driven by its calls alone. Jobs don't meet; what is said to a played rank's peer is said in "".
ept_engine *open(uint32_t rank, uint32_t world, uint64_t timeout_ns, const std::string &job = "");

}  // namespace wire
