// SPDX-License-Identifier: Apache-2.0
#include "engine/device_half.h"

#include "engine/engine.h"
#include "engine/error.h"

namespace ept {

// Instance calls: one at a time, and beside no worker's.
template <class Call>
int32_t DeviceHalf::call(const char *operation, ept_error *error, Call &&call) {
  Hold hold(engine_->lock);
  if (!engine_->instance) return fail(error, EPT_E_CLOSED, operation, -1, "the engine was closed");
  const int32_t code = call(*engine_->plugin, engine_->instance);
  return code < 0 ? engine_->plugin_error(code, operation, -1, error) : code;
}

int32_t DeviceHalf::open(ept_engine *engine, int32_t cuda_device, std::shared_ptr<DeviceHalf> *half, ept_error *error) {
  half->reset();
  const ept_backend &table = *engine->plugin;
  if (!engine->caps.gpu_initiated || !table.device_open || !table.device_image || !table.mem_alloc) return EPT_OK;
  std::shared_ptr<DeviceHalf> made(new DeviceHalf(engine));
  const int32_t code = made->call("device_open", error, [&](const ept_backend &its, ept_instance *instance) {
    return its.device_open(instance, cuda_device);
  });
  if (code == EPT_OK) *half = std::move(made);
  return code;
}

int32_t DeviceHalf::allocate(uint64_t bytes, void **memory, ept_error *error) {
  return call("mem_alloc", error, [&](const ept_backend &its, ept_instance *instance) {
    return its.mem_alloc(instance, bytes, EPT_MEMORY_CUDA, memory);
  });
}

void DeviceHalf::release(void *memory) {
  ept_error ignored{};
  ignored.size = sizeof ignored;
  (void)call("mem_free", &ignored,
             [&](const ept_backend &its, ept_instance *instance) { return its.mem_free(instance, memory); });
}

int32_t DeviceHalf::peer(uint32_t rank, ept_device_entry *entry, ept_error *error) {
  *entry = ept_device_entry{};
  entry->size = sizeof *entry;
  return call("device_peer", error,
              [&](const ept_backend &its, ept_instance *instance) { return its.device_peer(instance, rank, entry); });
}

int32_t DeviceHalf::image(const void **image, size_t *length, ept_error *error) {
  return call("device_image", error, [&](const ept_backend &its, ept_instance *instance) {
    return its.device_image(instance, image, length);
  });
}

int32_t DeviceHalf::module(void *cuda_module, ept_error *error) {
  return call("device_module", error,
              [&](const ept_backend &its, ept_instance *instance) { return its.device_module(instance, cuda_module); });
}

}  // namespace ept
