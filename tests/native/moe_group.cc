// SPDX-License-Identifier: Apache-2.0
#include "moe_group.h"

#include <atomic>
#include <thread>

namespace moe_test {

void not_ok(const char *file, int line, const char *call, int32_t code, const Error &error) {
  check::failed(file, line,
                std::string(call) + ": " + ept_code_name(code) + " in " + error.operation + ": " + error.text);
}

const ept_plugin *open_plugin(const std::string &name) {
  const char *folder = getenv("EPT_TEST_PLUGINS");
  const ept_plugin *plugin = nullptr;
  Error error;
  OK(ept_plugin_open((std::string(folder ? folder : "plugins") + "/ept_" + name + ".so").c_str(), &plugin, &error),
     error);
  return plugin;
}

Options adversary(uint64_t seed) {
  Options options;
  options.values = {{"adversary", std::to_string(seed)}};
  return options;
}

ept_engine *open_engine(const std::string &name, uint32_t rank, uint32_t world, const ept_plugin *plugin,
                        const Options &options, uint32_t life) {
  std::vector<ept_value> values;
  for (const auto &[key, text] : options.values) values.push_back({key.c_str(), text.c_str()});
  if (!options.of_rank.empty())
    for (const auto &[key, text] : options.of_rank[rank]) values.push_back({key.c_str(), text.c_str()});
  ept_engine_config config{};
  config.size = sizeof config;
  config.rank = rank;
  config.world = world;
  config.epoch = life;
  config.job = name.c_str();
  config.secret = reinterpret_cast<const uint8_t *>("moe");
  config.secret_length = 3;
  config.plugin = plugin;
  config.values = values.data();
  config.value_count = values.size();
  config.progress = options.progress;
  config.spin_ns = UINT64_MAX;
  config.timeout_ns = options.timeout_ns;
  config.dead_ns = options.dead_ns;
  ept_engine *engine = nullptr;
  Error error;
  OK(ept_engine_create(&config, &engine, &error), error);
  return engine;
}

std::vector<char> address_of(ept_engine *engine) {
  Error error;
  size_t length = 0;
  OK(ept_engine_address(engine, nullptr, &length, &error), error);
  std::vector<char> blob(length);
  OK(ept_engine_address(engine, blob.data(), &length, &error), error);
  blob.resize(length);
  return blob;
}

void connect_engine(ept_engine *engine, const std::vector<std::vector<char>> &addresses, const Options &options) {
  std::vector<const void *> pointers;
  std::vector<size_t> lengths;
  for (const std::vector<char> &each : addresses) {
    pointers.push_back(each.data());
    lengths.push_back(each.size());
  }
  Error error;
  OK(ept_engine_connect(engine, pointers.data(), lengths.data(), &error), error);
  OK(ept_engine_wait_connected(engine, options.timeout_ns, &error), error);
}

namespace {

std::string new_job() {
  static std::atomic<int> job{0};
  return "moe_test " + std::to_string(getpid()) + " " + std::to_string(job++);
}
const ept_plugin *plugin_of(const Options &options) {
  return options.opened ? options.opened : open_plugin(options.plugin);
}

}  // namespace

Group::Group(uint32_t world, const Options &options)
    : engines(world), arenas(world), name_(new_job()), options_(options) {
  const ept_plugin *plugin = plugin_of(options);
  std::vector<std::vector<char>> addresses;
  for (uint32_t rank = 0; rank < world; rank++) {
    engines[rank] = open_engine(name_, rank, world, plugin, options);
    addresses.push_back(address_of(engines[rank]));
  }
  run([&](uint32_t rank) {
    connect_engine(engines[rank], addresses, options);
    Error mine;
    OK(ept_arena_create(engines[rank], &arenas[rank], &mine), mine);
  });
}

Group::~Group() {
  run([&](uint32_t rank) {
    Error error;
    OK(ept_arena_close(arenas[rank], 10 * kSecond, &error), error);
  });
  run([&](uint32_t rank) { ept_engine_close(engines[rank], 2 * kSecond, nullptr); });
}

void Group::start_again(uint32_t rank, uint32_t life) {
  Error error;
  OK(ept_arena_close(arenas[rank], 10 * kSecond, &error), error);
  ept_engine_close(engines[rank], 0, nullptr);
  engines[rank] = open_engine(name_, rank, world(), plugin_of(options_), options_, life);
  OK(ept_arena_create(engines[rank], &arenas[rank], &error), error);
}

void Group::run(const std::function<void(uint32_t)> &body) const {
  std::vector<std::thread> threads;
  for (uint32_t rank = 0; rank < engines.size(); rank++) threads.emplace_back([&, rank] { body(rank); });
  for (auto &thread : threads) thread.join();
}

std::vector<ept_moe *> Group::create(const ept_moe_config &config) const {
  std::vector<ept_moe *> objects(world());
  run([&](uint32_t rank) {
    ept_moe_config mine = config;
    mine.rank = rank;
    Error error;
    OK(ept_moe_create(arenas[rank], &mine, &objects[rank], &error), error);
  });
  return objects;
}

uint64_t Group::registered(uint32_t rank) const {
  ept_engine_info info{};
  info.size = sizeof info;
  Error error;
  OK(ept_engine_info_get(engines[rank], &info, &error), error);
  return info.registered_bytes;
}

ept_moe_config config_of(uint32_t world, uint32_t experts, uint32_t top_k, uint32_t hidden, uint32_t max_tokens) {
  ept_moe_config config{};
  config.size = sizeof config;
  config.world = world;
  config.num_experts = experts;
  config.top_k = top_k;
  config.hidden = hidden;
  config.max_tokens = max_tokens;
  config.lanes = 2;
  config.dtype = config.dispatch_dtype = config.combine_dtype = EPT_DTYPE_BF16;
  config.scale_epsilon = 1e-4f;
  config.alignment = 1;
  config.threads = 1;
  return config;
}

void close_all(const std::vector<ept_moe *> &objects) {
  for (ept_moe *object : objects) {
    Error error;
    OK(ept_moe_close(object, &error), error);
  }
}

ept_tensor tensor(const void *data, int32_t dtype, const std::vector<int64_t> &shape) {
  ept_tensor t{};
  t.data = const_cast<void *>(data);
  t.dtype = dtype;
  t.ndim = int32_t(shape.size());
  t.device = -1;
  int64_t stride = 1;
  for (size_t d = shape.size(); d-- > 0;) {
    t.shape[d] = shape[d];
    t.strides[d] = stride;
    stride *= shape[d];
  }
  return t;
}

}  // namespace moe_test
