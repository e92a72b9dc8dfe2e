// SPDX-License-Identifier: Apache-2.0
//
// library.h: libucp.so.0, opened at run time, so that the plugin loads on any machine and says what is missing.
//
// UCX grows its structs behind field masks and keeps its symbols, so headers of one release serve libraries of others;
// we ask for API 1.13, the oldest that is looked after, and use nothing that came later.
#pragma once

#include <ucp/api/ucp.h>

#include <memory>
#include <string>

#include "../opening.h"

namespace ucx {

// Every function of UCX that this backend calls, by its own name.
#define EPT_UCX_FUNCTIONS(X)        \
  X(ucp_init_version)               \
  X(ucp_get_version)                \
  X(ucp_config_read)                \
  X(ucp_config_modify)              \
  X(ucp_config_release)             \
  X(ucp_context_query)              \
  X(ucp_context_print_info)         \
  X(ucp_cleanup)                    \
  X(ucp_worker_create)              \
  X(ucp_worker_destroy)             \
  X(ucp_worker_query)               \
  X(ucp_worker_get_address)         \
  X(ucp_worker_release_address)     \
  X(ucp_worker_get_efd)             \
  X(ucp_worker_arm)                 \
  X(ucp_worker_progress)            \
  X(ucp_worker_set_am_recv_handler) \
  X(ucp_ep_create)                  \
  X(ucp_ep_close_nbx)               \
  X(ucp_ep_flush_nbx)               \
  X(ucp_ep_rkey_unpack)             \
  X(ucp_rkey_pack)                  \
  X(ucp_rkey_buffer_release)        \
  X(ucp_rkey_destroy)               \
  X(ucp_mem_map)                    \
  X(ucp_mem_unmap)                  \
  X(ucp_put_nbx)                    \
  X(ucp_am_send_nbx)                \
  X(ucp_am_recv_data_nbx)           \
  X(ucp_request_check_status)       \
  X(ucp_request_free)               \
  X(ucs_status_string)

struct Library {
#define EPT_UCX_MEMBER(name) decltype(&::name) name = nullptr;
  EPT_UCX_FUNCTIONS(EPT_UCX_MEMBER)
#undef EPT_UCX_MEMBER
  unsigned major = 0, minor = 0, release = 0;
  std::string path;  // the file that the dynamic linker mapped

  std::string words(ucs_status_t status) const { return ucs_status_string(status); }
};

constexpr unsigned kApiMajor = 1, kApiMinor = 13;

// Opens `wanted` (a file), or where it is empty the first that loads of: one that this process has mapped, the one of a
// wheel libucx-cu12 or libucx-cu13 beside this package, the dynamic linker's own search. nullptr: `refusal` says why.
std::shared_ptr<const Library> open_library(const std::string &wanted, plugin::Refusal *refusal);

}  // namespace ucx
