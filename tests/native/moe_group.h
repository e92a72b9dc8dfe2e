// SPDX-License-Identifier: Apache-2.0
//
// moe_group.h: ranks of one process for the tests of dispatch and combine: an engine, an arena and a thread each.
#pragma once

#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "eptransport/eptransport.h"
#include "eptransport/wire.h"

namespace moe_test {

constexpr uint64_t kSecond = 1'000'000'000;

struct Error : ept_error {
  Error() : ept_error{} {
    size = sizeof(ept_error);
    peer = -1;
  }
};

[[noreturn, gnu::cold]] void not_ok(const char *file, int line, const char *call, int32_t code, const Error &error);

#define OK(call, error)                                                                 \
  do {                                                                                  \
    const int32_t ok_code = (call);                                                     \
    if (ok_code != EPT_OK) moe_test::not_ok(__FILE__, __LINE__, #call, ok_code, error); \
  } while (0)

const ept_plugin *open_plugin(const std::string &name);

struct Options {
  std::string plugin = "loopback";     // a built one
  const ept_plugin *opened = nullptr;  // instead
  std::vector<std::pair<std::string, std::string>> values;
  std::vector<std::vector<std::pair<std::string, std::string>>> of_rank;  // beside these; empty: none
  int32_t progress = EPT_PROGRESS_AUTO;
  uint64_t timeout_ns = 60 * kSecond;
  uint64_t dead_ns = 0;  // 0: the engine's own
};

Options adversary(uint64_t seed);

// The engine of one rank of the job `name`, connected to nobody.
ept_engine *open_engine(const std::string &name, uint32_t rank, uint32_t world, const ept_plugin *plugin,
                        const Options &options, uint32_t life = 0);
std::vector<char> address_of(ept_engine *engine);
// Connects it to the addresses of all ranks, and waits until it is.
void connect_engine(ept_engine *engine, const std::vector<std::vector<char>> &addresses, const Options &options);

class Group {
 public:
  explicit Group(uint32_t world, const Options &options = {});
  ~Group();
  Group(const Group &) = delete;
  Group &operator=(const Group &) = delete;

  uint32_t world() const { return uint32_t(engines.size()); }
  void run(const std::function<void(uint32_t)> &body) const;
  // An AllToAll on every rank.
  std::vector<ept_moe *> create(const ept_moe_config &config) const;
  uint64_t registered(uint32_t rank) const;
  // The rank's process has ended, and another one has begun: an engine in that life, connected to nobody, and an arena.
  // What it had made is closed before.
  void start_again(uint32_t rank, uint32_t life);

  std::vector<ept_engine *> engines;
  std::vector<ept_arena *> arenas;

 private:
  const std::string name_;
  const Options options_;
};

ept_moe_config config_of(uint32_t world, uint32_t experts, uint32_t top_k, uint32_t hidden, uint32_t max_tokens);

void close_all(const std::vector<ept_moe *> &objects);

ept_tensor tensor(const void *data, int32_t dtype, const std::vector<int64_t> &shape);

}  // namespace moe_test
