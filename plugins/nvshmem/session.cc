// SPDX-License-Identifier: Apache-2.0
#include "session.h"

#include <cstring>
#include <thread>

#include "../plugin.h"

namespace nvshmem {

bool Cuda::find(const ept_host *host) {
  bool all = true;
  const auto take = [&](const char *name, auto *function) {
    void *symbol = host->cuda(host->context, name);
    memcpy(function, &symbol, sizeof symbol);
    all = all && symbol != nullptr;
  };
  take("cuInit", &init);
  take("cuDeviceGetCount", &device_count);
  take("cuCtxGetDevice", &context_device);
  take("cuDeviceGetAttribute", &attribute);
  take("cuDevicePrimaryCtxRetain", &retain);
  take("cuCtxPushCurrent_v2", &push);
  take("cuCtxPopCurrent_v2", &pop);
  return all;
}

Session &Session::of_process() {
  // Never destroyed: its thread, and NVSHMEM's own, may outlive main.
  static auto *session = new Session;
  return *session;
}

void Session::start(const Plan &plan) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (state_ != kNone) return;
  plan_ = plan;
  state_ = kStarting;
  uint64_t token = 14695981039346656037ull;  // FNV-1a of the id
  for (const char byte : plan.id.internal) token = (token ^ static_cast<unsigned char>(byte)) * 1099511628211ull;
  token_ = token | 1;
  std::thread([this] { run(); }).detach();
}

void Session::run() {
  std::string why;
  char *base = nullptr;
  void *context = nullptr;
  InitAttr attributes{};
  attributes.version = versioned<InitAttr>();
  attributes.args.version = versioned<decltype(attributes.args)>();
  attributes.args.uid.version = versioned<UniqueIdArgs>();
  const Library &library = *plan_.library;
  // Retained for the life of the process, as NVSHMEM is there.
  if (const int code = plan_.cuda.retain(&context, plan_.device); code != 0)
    why = plugin::format("CUDA device %d has no context (%d)", plan_.device, code);
  else if (const int pushed = plan_.cuda.push(context); pushed != 0)
    why = plugin::format("CUDA device %d can't be made current (%d)", plan_.device, pushed);
  else if (const int set = library.set_attr_uniqueid_args(static_cast<int>(plan_.rank), static_cast<int>(plan_.ranks),
                                                          &plan_.id, &attributes);
           set != 0)
    why = plugin::format("nvshmemx_set_attr_uniqueid_args answers %d", set);
  else if (const int started = library.hostlib_init_attr(kInitWithUniqueId, &attributes); started != 0)
    why = plugin::format("nvshmemx_hostlib_init_attr answers %d (NVSHMEM_DEBUG=INFO says more)", started);
  else if (library.my_pe() != static_cast<int>(plan_.rank) || library.n_pes() != static_cast<int>(plan_.ranks))
    why = plugin::format("NVSHMEM made rank %u of %u PE %d of %d", plan_.rank, plan_.ranks, library.my_pe(),
                         library.n_pes());
  else if (base = static_cast<char *>(library.malloc(plan_.heap_bytes)); base == nullptr)
    why = plugin::format("nvshmem_malloc gave no heap of %llu MiB: give EPT_NVSHMEM_HEAP_MIB less, or free GPU memory",
                         static_cast<unsigned long long>(plan_.heap_bytes >> 20));
  const std::lock_guard<std::mutex> lock(mutex_);
  base_ = base;
  why_ = why;
  if (why.empty()) heap_ = std::make_unique<Heap>(plan_.heap_bytes);
  state_ = why.empty() ? kUp : kFailed;
}

int32_t Session::poll(std::string *why) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (state_ == kUp) return EPT_OK;
  if (state_ != kFailed) return EPT_LATER;
  *why = why_;
  return EPT_E_UNAVAILABLE;
}

bool Session::claim(const void *instance) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (owner_ != nullptr && owner_ != instance) return false;
  owner_ = instance;
  return true;
}

void Session::let_go(const void *instance) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (owner_ != instance) return;
  owner_ = nullptr;
  if (heap_ != nullptr) heap_ = std::make_unique<Heap>(plan_.heap_bytes);  // what was not given back is nobody's
}

}  // namespace nvshmem
