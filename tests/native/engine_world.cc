// SPDX-License-Identifier: Apache-2.0
#include "engine_world.h"

#include <chrono>
#include <cstdlib>
#include <utility>

namespace check {

void ok(const char *file, int line, const char *call, int32_t code, const ept_error &error) {
  if (code == EPT_OK) return;
  failed(file, line, std::string(call) + ": " + ept_code_name(code) + ": " + error.text);
}

}  // namespace check

namespace world {

ept_error error{sizeof(ept_error), 0, -1, 0, 0, 0, 0, {}, {}};

const ept_plugin *plugin_of(const std::string &backend) {
  std::string file = backend;
  if (file.find('/') == std::string::npos) {
    const char *folder = std::getenv("EPT_TEST_PLUGINS");
    CHECK(folder != nullptr);
    file = std::string(folder) + "/ept_" + backend + ".so";
  }
  const ept_plugin *plugin = nullptr;
  OK(ept_plugin_open(file.c_str(), &plugin, &error));
  return plugin;
}

World::World(uint32_t size, Options options) : options_(std::move(options)), ranks_(size) {
  static int made = 0;
  job_ = "world " + std::to_string(made++);
}

World::~World() {
  for (Rank &rank : ranks_) ept_engine_close(rank.engine, 0, nullptr);
}

void World::start(uint32_t rank, uint32_t epoch, const std::vector<std::pair<std::string, std::string>> &own,
                  int32_t progress) {
  std::vector<ept_value> values;
  for (const auto &[name, text] : options_.values) values.push_back({name.c_str(), text.c_str()});
  for (const auto &[name, text] : own) values.push_back({name.c_str(), text.c_str()});
  ept_engine_config config{};
  config.size = sizeof config;
  config.rank = rank, config.world = size(), config.epoch = epoch;
  config.job = job_.c_str();
  config.secret = reinterpret_cast<const uint8_t *>("secret"), config.secret_length = 6;
  config.plugin = plugin_of(options_.backend);
  config.values = values.data(), config.value_count = values.size();
  config.progress = progress < 0 ? options_.progress : progress;
  config.spin_ns = options_.spin_ns;
  config.timeout_ns = 60 * second;
  config.dead_ns = options_.dead_ns, config.heartbeat_ns = options_.heartbeat_ns;
  OK(ept_engine_create(&config, &ranks_[rank].engine, &error));
  ranks_[rank].epoch = epoch;
}

namespace {

std::vector<uint8_t> address_of(ept_engine *engine) {
  std::vector<uint8_t> blob(4200);
  size_t length = blob.size();
  OK(ept_engine_address(engine, blob.data(), &length, &error));
  blob.resize(length);
  return blob;
}

}  // namespace

void World::connect_all() {
  std::vector<std::vector<uint8_t>> blobs;
  std::vector<const void *> pointers;
  std::vector<size_t> lengths;
  for (uint32_t rank = 0; rank < size(); rank++) {
    if (!lives(rank)) start(rank, 0);
    blobs.push_back(address_of(ranks_[rank].engine));
    lengths.push_back(blobs.back().size());
  }
  for (const auto &blob : blobs) pointers.push_back(blob.data());
  for (Rank &rank : ranks_) OK(ept_engine_connect(rank.engine, pointers.data(), lengths.data(), &error));
  until("all are connected", [&] {
    bool all = true;
    for (Rank &rank : ranks_) all = ept_engine_wait_connected(rank.engine, 0, &error) == EPT_OK && all;
    return all;
  });
}

void World::stop(uint32_t rank, uint64_t patience) {
  ept_engine_close(ranks_[rank].engine, patience, nullptr);
  ranks_[rank].engine = nullptr;
}

void World::rejoin(uint32_t rank, uint32_t epoch) {
  OK(ept_engine_rejoin(ranks_[rank].engine, epoch, &error));
  ranks_[rank].epoch = epoch;
}

void World::mask(uint32_t by, uint32_t rank, uint32_t membership, const char *why) {
  OK(ept_engine_mask(ranks_[by].engine, rank, membership, why, &error));
}

int32_t World::readmit(uint32_t by, uint32_t rank) {
  const std::vector<uint8_t> address = address_of(ranks_[rank].engine);
  return ept_engine_readmit(ranks_[by].engine, rank, ranks_[rank].epoch, address.data(), address.size(), &error);
}

void World::link(uint32_t one, uint32_t other) {
  OK(readmit(one, other));
  OK(readmit(other, one));
  until("both are up",
        [&] { return info(one, other).status == EPT_PEER_UP && info(other, one).status == EPT_PEER_UP; });
}

ept_peer_info World::info(uint32_t of, uint32_t about) const {
  ept_peer_info info{};
  info.size = sizeof info;
  OK(ept_engine_peer(ranks_[of].engine, about, &info, &error));
  return info;
}

void World::turn() {
  for (Rank &rank : ranks_) {
    if (rank.engine && ept_engine_progress(rank.engine, &error) < 0) check::failed(__FILE__, __LINE__, error.text);
  }
}

void World::turns(int count) {
  for (int i = 0; i < count; i++) turn();
}

void World::until(const char *what, const std::function<bool()> &is_so) {
  const auto limit = std::chrono::steady_clock::now() + std::chrono::minutes(1);
  while (!is_so()) {
    if (std::chrono::steady_clock::now() > limit) check::failed(__FILE__, __LINE__, std::string("never: ") + what);
    turn();
  }
}

Route::Route(World &in, uint32_t from_rank, uint32_t to_rank, size_t bytes)
    : world(in), from(from_rank), to(to_rank), source(in.bytes(bytes)), target(in.bytes(bytes)) {
  for (size_t i = 0; i < bytes; i++) source[i] = static_cast<uint8_t>(1 + (i * 7 + i / 251 + from) % 255);  // never 0
  register_source();
  register_target();
  open();
}

namespace {

ept_memory_id register_in(ept_engine *engine, std::vector<uint8_t> &bytes) {
  ept_memory memory{};
  memory.size = sizeof memory;
  memory.kind = EPT_MEMORY_HOST;
  memory.address = bytes.data(), memory.length = bytes.size();
  memory.fd = -1;
  memory.role = EPT_ROLE_DATA;
  memory.access = EPT_ACCESS_LOCAL | EPT_ACCESS_REMOTE_WRITE;
  ept_memory_id id = 0;
  OK(ept_memory_register(engine, &memory, &id, &error));
  return id;
}

}  // namespace

void Route::register_source() { source_memory = register_in(world[from], source); }

void Route::register_target() {
  target_memory = register_in(world[to], target);
  OK(ept_signal_create(world[to], from, "route", nullptr, &signal, &error));
}

void Route::open() {
  uint8_t blob[4200];
  size_t length = sizeof blob;
  OK(ept_region_export(world[to], target_memory, from, 0, target.size(), blob, &length, &error));
  OK(ept_region_import(world[from], to, blob, length, &region, &error));
  length = sizeof blob;
  OK(ept_signal_export(world[to], signal, blob, &length, &error));
  OK(ept_signal_import(world[from], to, blob, length, &remote, &error));
}

ept_write Route::write(uint64_t offset, uint64_t length) const {
  return {sizeof(ept_write), to, source_memory, offset, region, offset, length, remote};
}

int32_t Route::post(uint64_t offset, uint64_t length, ept_transfer_id *transfer) const {
  return post(write(offset, length), transfer);
}

int32_t Route::post(const ept_write &what, ept_transfer_id *transfer) const {
  int32_t code;
  while ((code = ept_engine_write(world[from], &what, transfer, &error)) == EPT_LATER) world.turn();
  return code;
}

uint64_t Route::count() const {
  uint64_t value = 0;
  OK(ept_signal_value(world[to], signal, &value, &error));
  return value;
}

void Route::until_count(uint64_t wanted) const {
  world.until("the count is there", [&] { return count() >= wanted; });
  CHECK_EQ(count(), wanted);
}

}  // namespace world
