// SPDX-License-Identifier: Apache-2.0
// Where this rank listens and how others find it: the interfaces of this machine, the choice among them, the address
// blob, and the order in which a dialer tries what a blob offers.
//
// CHOICE. `interface` empty: listen on all addresses and advertise those of interfaces that are up, in this order: the
// interface of the default route, other interfaces, loopback. Bridges and pairs that container runtimes make (docker0,
// veth..., virbr..., cni...) are left out: the same private address exists on every machine. `interface` given (names,
// addresses or CIDR ranges, with commas between): listen on those addresses and no others.
// DIALING. A peer on this host, in this network namespace, is dialled over loopback if it advertises that; any other is
// never dialled over loopback. Then come addresses in a subnet of ours, then the rest, each in the advertised order.
#pragma once

#include <sys/socket.h>

#include <array>
#include <string>
#include <vector>

#include "common.h"

namespace tcp {

constexpr uint32_t kAddressMagic = 0x41545045;  // "EPTA"
constexpr uint16_t kAddressVersion = 1;
constexpr size_t kMaxEndpoints = 32;
constexpr size_t kNonceBytes = 32;

struct Endpoint {
  uint8_t family = 0;  // 4 or 6
  uint8_t prefix = 0;  // bits of its subnet
  uint16_t port = 0;
  std::array<uint8_t, 16> bytes{};  // network order; 4 used by IPv4

  bool loopback() const;
  bool same_subnet(const Endpoint &other) const;
};
socklen_t to_sockaddr(const Endpoint &endpoint, sockaddr_storage *storage);
std::string to_text(const Endpoint &endpoint);  // "192.0.2.1:4000", "[::1]:4000"
std::string peer_text(const sockaddr_storage &storage);

struct Interface {
  std::string name;
  Endpoint address;
  bool loopback = false;
  bool default_route = false;
};
std::vector<Interface> list_interfaces();  // up, with an address, no IPv6 link-local ones

// The interfaces that `setting` names, in the order of CHOICE. CONFIG if it names nothing here.
int32_t choose_interfaces(const std::string &setting, std::vector<Interface> *chosen);

struct PortRange {
  uint16_t low = 0, high = 0;  // 0: the system chooses
};
int32_t parse_port_range(const std::string &setting, PortRange *range);

// Listening sockets; each advertises one or more endpoints.
struct Listening {
  std::vector<Fd> sockets;
  std::vector<Endpoint> endpoints;
};
int32_t listen_on(const std::vector<Interface> &chosen, bool wildcard, const PortRange &range, Listening *listening);

struct Address {
  uint32_t rank = 0, epoch = 0;
  uint16_t streams = 0;
  std::array<uint8_t, 16> host{};            // machine and network namespace
  std::array<uint8_t, kNonceBytes> nonce{};  // of the instance; never sent over a connection (handshake.h)
  std::vector<Endpoint> endpoints;
};
std::vector<uint8_t> encode(const Address &address);
int32_t decode(const void *blob, size_t length, Address *address);  // INVALID, VERSION

std::array<uint8_t, 16> this_host(const ept_host &host);

// What to try, best first; empty: nothing that can be reached from here.
std::vector<Endpoint> dial_order(const Address &peer, const Address &own);

// The ways to a peer. STRIPING: where the user has named interfaces, each of them is a way of its own, to the peer's
// address in its subnet if there is one, and stream n is at home on way n modulo `stripe`; when that is lost it takes
// the others in turn. Else the routing table chooses how to leave, and all streams take the best address.
struct Path {
  Endpoint to;
  Endpoint from;  // family 0: any
};
struct Paths {
  std::vector<Path> list;
  size_t stripe = 1;  // the first so many are homes
};
Paths find_paths(const Address &peer, const Address &own, bool interfaces_named);

// Of the interface's device, from sysfs; zeros and "" where it has none.
struct Device {
  std::string pci;
  int32_t numa = -1;
  uint64_t bits_per_s = 0;
};
Device device_of(const std::string &interface);

}  // namespace tcp
