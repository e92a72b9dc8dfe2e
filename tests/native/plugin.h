// SPDX-License-Identifier: Apache-2.0
//
// plugin.h: drives a plugin through its table alone, as the engine does. Includes nothing of ours but backend.h, so
// that the out-of-tree plugins of tests/plugins can be driven by it too.
#pragma once

#include <eptransport/backend.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "check.h"

namespace plugin {

uint64_t now_ns();

// A plugin that authenticates its peers needs a real one: its test sets it.
extern decltype(ept_host::hmac_sha256) hmac;

// What time it is for a plugin; a test may have a clock of its own.
extern uint64_t (*clock)();
// Of what a plugin says, what is printed.
extern int32_t log_level;

// What the engine offers, without its log.
ept_host host();

const ept_backend &load(const std::string &path);
// A plugin that the build made: EPT_TEST_PLUGINS is its folder.
const ept_backend &built(const std::string &name);

using Options = std::map<std::string, std::string>;

// Every setting of the backend with its default, but for those in `options`.
struct Values {
  Values(const ept_backend &backend, const Options &options);
  Options texts;
  std::vector<ept_value> list;
};

struct Event : ept_event {
  std::string words, bytes;  // copies of what `text` and `data` pointed to
};

std::string error_text(const ept_backend &backend);

[[noreturn, gnu::cold]] void not_ok(const char *file, int line, const char *call, int32_t code,
                                    const ept_backend &backend);

#define CHECK_OK(backend, call)                                                               \
  do {                                                                                        \
    const int32_t check_code = (call);                                                        \
    if (check_code != EPT_OK) plugin::not_ok(__FILE__, __LINE__, #call, check_code, backend); \
  } while (0)

struct Identity {
  uint32_t rank = 0, world = 2, epoch = 0;
  std::string job = "test", secret = "secret";
  uint32_t credits = 1024, send_credits = 64;
  uint64_t dead_ns = 5'000'000'000;
};

// One rank: an instance and its worker.
class Rank {
 public:
  Rank(const ept_backend &backend, const Identity &identity, const Options &options = {});
  ~Rank() { leave(); }
  Rank(const Rank &) = delete;

  static int32_t open(const ept_backend &backend, const Identity &id, const Values &values, const ept_host &host,
                      ept_instance **instance);

  // Ends without a word to the peers, as a process that exits.
  void leave();

  std::string address();
  int32_t open_peer(uint32_t rank, uint32_t epoch, const std::string &address);

  ept_mem *enroll(void *bytes, size_t length, uint32_t access = EPT_ACCESS_LOCAL | EPT_ACCESS_REMOTE_WRITE,
                  int32_t role = EPT_ROLE_DATA);
  int32_t release(ept_mem *mem);
  // A key and the blob that carries it.
  std::pair<std::string, uint64_t> grant(ept_mem *mem, uint32_t rank, uint64_t offset, uint64_t length);
  ept_region *import(uint32_t rank, const std::string &blob);
  void drop(ept_region *region);

  static ept_op write(uint32_t peer, ept_mem *mem, const void *source, ept_region *region, uint64_t offset,
                      uint64_t length, uint32_t immediate, uint64_t cookie);
  static ept_op signal(uint32_t peer, ept_region *region, uint32_t immediate, uint64_t cookie);
  static ept_op message(uint32_t peer, const std::string &bytes, uint64_t cookie);
  int32_t post(const ept_op &op);

  // One poll; what it gave, its texts and bytes copied.
  std::vector<Event> poll(size_t capacity = 64);
  // Polls until it gave something of `kind`; everything else that came is an error.
  Event expect(int32_t kind, uint64_t polls = 100'000);
  // Nothing comes, however often it polls.
  void expect_nothing(int polls = 100);
  ept_rail_counters count(uint32_t rail = 0);

  const ept_backend &backend;
  const Identity id;
  ept_instance *instance = nullptr;
  ept_worker *worker = nullptr;

 private:
  Values values_;
  ept_host host_;
  std::vector<Event> pending_;
  std::vector<ept_mem *> mems_;
  std::vector<ept_region *> regions_;
};

// All open all, and every PEER event has come.
void connect(const std::vector<Rank *> &ranks);

// Ranks 0 to `world` - 1 of a job, connected.
class Group {
 public:
  Group(const ept_backend &backend, uint32_t world, const Options &options = {}, Identity identity = {});
  Rank &operator[](size_t rank) { return *ranks_[rank]; }
  size_t size() const { return ranks_.size(); }

 private:
  std::vector<std::unique_ptr<Rank>> ranks_;
};

// `from` may write into `bytes` of `to`.
struct Window {
  Window(Rank &from, Rank &to, size_t length, int32_t role = EPT_ROLE_DATA);
  std::vector<uint8_t> source, bytes;
  ept_mem *source_mem, *mem;
  std::string blob;
  uint64_t key;
  ept_region *region;
};

}  // namespace plugin
