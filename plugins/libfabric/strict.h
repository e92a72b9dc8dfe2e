// SPDX-License-Identifier: Apache-2.0
//
// strict.h: a network that is stricter than EFA, made of any that libfabric has.
//
// A decorator of `Library`: its objects have tables of their own and do their work through the real ones. What a
// plugin can do over it, it can do over EFA; what EFA forbids is refused here, and what EFA may do happens all the
// time.
//
// INVARIANT. Whatever the schedule: (1) an operation that a post took has exactly one completion or error, with the
// context it came with (a 64-byte fi_context2 that nobody else has meanwhile), and one that a post refused has none;
// (2) a target sees a write with data at most once, and only after all bytes of that write have landed; (3) an
// operation whose error says that it never left, or was refused there, changes nothing at the target and is never seen
// there; (4) nothing moves but inside a read of the queue that its endpoint is bound to; (5) what waits in here is
// dropped only with its endpoint, or when an overrun has ended its queue. So all mischief is in WHEN and in WHICH
// ORDER, and in errors, of which each is one that the device has.
//
//   order      a post waits in a window and goes out after later ones; a completion or an arrival waits again
//   refusals   no descriptor, a wrong one, no context or one in use, peers that are not in the address vector of either
//              side, too long, FI_MORE, FI_RMA_EVENT, FI_FENCE, writes without data, no event queue
//   EAGAIN     storms on posts, which end only when the queue is read, and on reads
//   receives   a message stalls until the target has a receive posted (RNR), for ever or until an error
//   overruns   a queue that is full loses entries and is dead
//   errors     each code of the device on chosen operations; errors on the event queue that name no operation
//
// What it sees of the other side it sees through a registry in this process. A peer in another process isn't looked up:
// its address vector and its receives go unchecked there, and a target that doesn't poll holds nobody up but as its
// provider does. All else holds across processes.
#pragma once

#include <array>
#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "library.h"

namespace libfabric {

// What was done to the plugin (counts that tests look at to know that it happened), then what it did wrong.
enum class Deed : size_t {
  kPutOff,       // a post waited in the window
  kOvertook,     // a post went out before an older one
  kShuffled,     // a completion or arrival was handed out before an older one
  kPostAgain,    // a post was told EAGAIN though there was room
  kReadAgain,    // a read was told EAGAIN though there were entries
  kFull,         // a post was told EAGAIN, its queue is full
  kTruncated,    // data lost its upper 32 bits
  kStalled,      // a message waited for a receive (each once)
  kDeviceError,  // a completion was made an error of the device
  kEventError,   // an error without an operation went to the event queue
  kUnpolled,     // a post waited because its target did not poll (each once)
  kOverrun,      // a queue had more entries than room, and died
  kNoDescriptor,
  kWrongDescriptor,
  kNoContext,
  kContextInUse,
  kContextWritten,  // the context of an operation under way was written to
  kUnknownHere,     // the peer isn't in our address vector
  kUnknownThere,    // a write to a peer that never had us in its
  kTooLong,
  kFlags,       // FI_MORE, FI_RMA_EVENT, FI_FENCE or another that EFA has not
  kPlainWrite,  // without data
  kNoEventQueue,
  kUnmapped,    // memory that isn't there was registered
  kMemoryGone,  // memory was deregistered under an operation that uses it
  kCount
};
const char *deed_name(Deed deed);
inline bool is_violation(Deed deed) { return deed >= Deed::kOverrun; }

struct StrictReport {
  std::array<std::atomic<uint64_t>, static_cast<size_t>(Deed::kCount)> counts{};
  uint64_t operator[](Deed deed) const { return counts[static_cast<size_t>(deed)].load(std::memory_order_relaxed); }
  void add(Deed deed) { counts[static_cast<size_t>(deed)].fetch_add(1, std::memory_order_relaxed); }
  std::string words() const;  // "4120 put off, 312 overtook, ..."
};

// On which operations of an endpoint, counted from 1, something happens.
struct When {
  uint64_t at = 0;     // once
  uint64_t every = 0;  // again and again
  bool operator()(uint64_t number) const { return number == at || (every != 0 && number % every == 0); }
};

struct Injection {
  int code = 0;  // the device's, device_errors.h
  When when;
};

struct StrictOptions {
  uint64_t seed = 1;
  uint64_t salt = 0;     // of this rank, so that ranks differ
  uint32_t window = 16;  // reads that a step waits at most; one in sixteen waits up to sixteen times as long
  // Milliseconds after which a step goes on however few reads there were: who shares its core with busy others reads a
  // few hundred times a second, and would be taken for dead. 0: reads alone count, and a seed is one schedule for sure.
  uint32_t hold_ms = 100;
  double eagain = 0.1;            // how likely a post or a read starts a storm
  uint32_t storm = 4;             // reads that a storm lasts at most
  uint64_t rma = 1 << 20;         // longest write. EFA: 1 GiB; smaller, so that cutting is seen
  uint64_t msg = 8192;            // longest message
  uint64_t inject = 32;           // longest that can be injected
  uint32_t tx = 256;              // operations in flight an endpoint
  uint32_t cq = 0;                // entries of a queue whatever was asked for; 0: as asked
  uint64_t rnr = 0;               // reads that a message without a receive waits before its error; 0: for ever, as EFA
  bool plain = false;             // writes without data are allowed
  bool manual = true;             // nothing lands at a target that neither polls nor sleeps on its descriptor
  std::vector<Injection> errors;  // on writes
  std::vector<Injection> send_errors;  // on messages
  std::vector<When> event_errors;      // on the event queue, beside a write that is not touched
  std::string report_to;               // a file that gets the report of each rank as a line when that closes
  std::shared_ptr<StrictReport> report = std::make_shared<StrictReport>();
  std::function<void(const std::string &)> say;  // a sentence for each violation; may be called from any thread
};

// "SEED" or "SEED:name=value,...", the names as above, and error=CODE@N or CODE/N (the Nth, every Nth write; CODE by
// name or number), send_error= likewise, eq_error=@N or /N, report_to=FILE. Empty: it is understood. Else the sentence
// for the user.
std::string parse_strict(const std::string &text, StrictOptions *options);

std::shared_ptr<Library> make_strict(std::shared_ptr<Library> inner, const StrictOptions &options);

}  // namespace libfabric
