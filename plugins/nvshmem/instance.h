// SPDX-License-Identifier: Apache-2.0
//
// instance.h: one rank over NVSHMEM: its settings, the instance of the network beneath (control.h), and its device
// half.
#pragma once

#include <eptransport/backend.h>

#include <memory>
#include <string>

#include "../plugin.h"
#include "control.h"
#include "library.h"
#include "session.h"

namespace nvshmem {

using plugin::fail;
using plugin::format;

struct Settings {
  std::string control, control_options, interface, devices, port_range, library;
  uint64_t heap_bytes = 0;
  int device = -1;
  bool ibgda = true;
};

// What ranks tell each other in the first round of a join. On the wire.
struct Hello {
  static constexpr uint32_t kMagic = 0x4d485345;
  uint32_t magic = kMagic, version = 1, rank = 0, reserved = 0;
  int32_t library[3] = {}, linked[3] = {};
  uint64_t heap_bytes = 0, token = 0;
  UniqueId id = {};  // rank 0's, where it has none yet
};

}  // namespace nvshmem

struct ept_instance {
  const ept_host *host = nullptr;
  uint32_t rank = 0, world = 0;
  nvshmem::Settings settings;
  std::shared_ptr<const nvshmem::Library> library;
  nvshmem::Cuda cuda{};
  nvshmem::ControlValues values;
  ept_instance *beneath = nullptr;
  bool joined = false, claimed = false;
  uint32_t round = 0;
  int device = -1;  // that device_open named

  int32_t join(ept_join *join);
  int32_t choose_device(int *device);
  int32_t mem_alloc(uint64_t length, int32_t kind, void **address);
  int32_t mem_free(void *address);
  int32_t device_open(int32_t cuda_device);
  int32_t device_peer(uint32_t peer, ept_device_entry *entry);
  int32_t device_image(const void **image, size_t *length);
  int32_t device_module(void *cuda_module);

 private:
  int32_t first_round(ept_join *join);
  int32_t second_round(ept_join *join);
};

namespace nvshmem {

// Memory of the heap that was registered, and a peer's as this rank sees it: the same place of the heap. The tables'
// own ept_mem and ept_region are those of the network beneath; these are told from them by their address.
struct Piece {
  ept_instance *instance;
  uint64_t offset, length;
  bool signal;
};
struct PieceBlob {
  static constexpr uint64_t kMagic = 0x6d656d68736d766eull;  // "nvshmhem"
  uint64_t magic = kMagic;
  uint32_t version = 1, rank = 0;
  uint64_t offset = 0, length = 0;
  uint64_t signal = 0;
};
bool is_piece(const void *object);
Piece *make_piece(const Piece &piece);
void drop_piece(const void *object);

}  // namespace nvshmem
