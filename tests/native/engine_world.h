// SPDX-License-Identifier: Apache-2.0
//
// engine_world.h: ranks that live, die and come back, each an engine of this process, for tests of membership. One
// thread drives all of them unless they drive themselves.
#pragma once

#include <cstdint>
#include <functional>
#include <list>
#include <string>
#include <vector>

#include "check.h"
#include "eptransport/eptransport.h"

namespace world {

constexpr uint64_t second = 1'000'000'000;

// The error of the last call that was given it; OK checks that there was none.
extern ept_error error;
#define OK(call) check::ok(__FILE__, __LINE__, #call, (call), world::error)

struct Options {
  std::string backend = "loopback";  // a built one, or a file
  int32_t progress = EPT_PROGRESS_INLINE;
  uint64_t spin_ns = 0;
  std::vector<std::pair<std::string, std::string>> values;  // of all ranks
  uint64_t dead_ns = 0, heartbeat_ns = 0;
};

const ept_plugin *plugin_of(const std::string &backend);

class World {
 public:
  World(uint32_t size, Options options);
  ~World();
  World(const World &) = delete;
  World &operator=(const World &) = delete;

  uint32_t size() const { return static_cast<uint32_t>(ranks_.size()); }
  bool lives(uint32_t rank) const { return ranks_[rank].engine != nullptr; }
  ept_engine *operator[](uint32_t rank) const { return ranks_[rank].engine; }
  // Bytes that live until the last engine is closed: a network may read a source for as long as its engine lives.
  std::vector<uint8_t> &bytes(size_t length) { return memories_.emplace_back(length); }
  uint32_t epoch(uint32_t rank) const { return ranks_[rank].epoch; }

  // A process that is `rank`; `values` on top of those of all; `progress`, if given, instead. Connects
  // to nobody.
  void start(uint32_t rank, uint32_t epoch, const std::vector<std::pair<std::string, std::string>> &values = {},
             int32_t progress = -1);
  void connect_all();
  void stop(uint32_t rank, uint64_t patience = 0);  // its process ends; `patience` for it to take leave
  void rejoin(uint32_t rank, uint32_t epoch);
  void mask(uint32_t by, uint32_t rank, uint32_t membership = 1, const char *why = "the test says so");
  // `by` opens `rank`, in the life that it is in.
  int32_t readmit(uint32_t by, uint32_t rank);
  // Both open each other, until both are up.
  void link(uint32_t one, uint32_t other);
  ept_peer_info info(uint32_t of, uint32_t about) const;

  void turn();  // each rank moves on once
  void turns(int count);
  // Turns until it is so; a minute at most.
  void until(const char *what, const std::function<bool()> &is_so);

 private:
  struct Rank {
    ept_engine *engine = nullptr;
    uint32_t epoch = 0;
  };
  Options options_;
  std::string job_;
  std::list<std::vector<uint8_t>> memories_;
  std::vector<Rank> ranks_;
};

// Memory of rank `to` that rank `from` may write, with a signal, and a source of the same size. Made again by `open`
// when the link was.
struct Route {
  World &world;
  uint32_t from, to;
  std::vector<uint8_t> &source, &target;  // the world's
  ept_memory_id source_memory = 0, target_memory = 0;
  ept_region_id region = 0;
  ept_signal_id signal = 0;
  ept_remote_signal_id remote = 0;

  Route(World &in, uint32_t from_rank, uint32_t to_rank, size_t bytes);
  void register_source();
  void register_target();
  void open();  // exports to `from`, imports there
  ept_write write(uint64_t offset, uint64_t length) const;
  // Posts a write with the signal; LATER is waited out.
  int32_t post(uint64_t offset, uint64_t length, ept_transfer_id *transfer = nullptr) const;
  int32_t post(const ept_write &what, ept_transfer_id *transfer = nullptr) const;
  uint64_t count() const;
  void until_count(uint64_t count) const;
};

}  // namespace world

namespace check {
void ok(const char *file, int line, const char *call, int32_t code, const ept_error &error);
}  // namespace check
