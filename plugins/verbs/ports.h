// SPDX-License-Identifier: Apache-2.0
// Which ports of which NICs are used, and by which of their addresses (GIDs). Reads files of sysfs alone, so that tests
// can lay out any machine.
//
// THE RULE for a RoCE port, best first, the lowest index among equals:
//   1. RoCE v2 (v1 does not pass routers), on an interface that EPT_VERBS_INTERFACE names, if it names any;
//   2. an IPv4-mapped address, then a global IPv6 one, then a link-local one (which reaches one segment only);
//   3. on the port's own interface rather than one stacked upon it (VLAN), whose tag few expect.
// A self-assigned 169.254.0.0/16 counts as link-local. On InfiniBand it is index 0. EPT_VERBS_GID_INDEX overrides all.
#pragma once

#include <string>
#include <vector>

#include "settings.h"

namespace verbs {

struct Gid {
  uint32_t index = 0;
  ibv_gid bytes{};
  std::string type;       // "RoCE v2", "IB/RoCE v1"
  std::string interface;  // "eth0"; empty: none
};

// The entries of a port's table that are in use.
std::vector<Gid> read_gids(const std::string &sysfs, const std::string &device, uint32_t port);

// The port's own network interfaces, those stacked upon it not among them.
std::vector<std::string> own_interfaces(const std::string &sysfs, const std::string &device);

// nullptr: none will do; `why` says what there was.
const Gid *choose_gid(const std::vector<Gid> &gids, bool ethernet, const std::vector<std::string> &own,
                      const Settings &settings, std::string *why);

// 1: a global IPv4 address, 2: global IPv6, 3: link-local, 0: no address.
int gid_rank(const ibv_gid &gid);
std::string gid_text(const ibv_gid &gid);

std::vector<std::string> split(const std::string &list);  // at commas

struct WantedPort {
  std::string device;
  uint8_t port = 1;
};
// "mlx5_0,mlx5_1:2"; false: `why` says what is wrong with it.
bool parse_devices(const std::string &list, std::vector<WantedPort> *ports, std::string *why);

// "0000:5a:00.0", or empty where the device is no card; and its NUMA node, -1: unknown.
std::string pci_of(const std::string &sysfs, const std::string &device);
int32_t numa_of(const std::string &sysfs, const std::string &device);

}  // namespace verbs
