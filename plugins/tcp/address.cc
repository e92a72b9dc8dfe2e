// SPDX-License-Identifier: Apache-2.0
#include "address.h"

#include <arpa/inet.h>
#include <ifaddrs.h>
#include <limits.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <strings.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>

namespace tcp {
namespace {

constexpr int kBacklog = 1024;

bool made_by_containers(const std::string &name) {
  for (const char *prefix : {"docker", "veth", "virbr", "br-", "cni", "flannel", "cali", "podman", "lxc"})
    if (name.rfind(prefix, 0) == 0) return true;
  return false;
}

uint8_t bits_of(const uint8_t *mask, size_t bytes) {
  unsigned bits = 0;
  for (size_t i = 0; i < bytes; ++i) bits += static_cast<unsigned>(__builtin_popcount(mask[i]));
  return static_cast<uint8_t>(bits);
}

bool same_prefix(const uint8_t *a, const uint8_t *b, unsigned bits) {
  unsigned whole = bits / 8, rest = bits % 8;
  if (memcmp(a, b, whole) != 0) return false;
  return rest == 0 || ((a[whole] ^ b[whole]) >> (8 - rest)) == 0;
}

std::vector<std::string> default_route_interfaces() {
  std::vector<std::string> names;
  std::string line;
  std::ifstream v4("/proc/net/route");
  while (std::getline(v4, line)) {
    char name[64];
    unsigned long destination, mask;
    if (sscanf(line.c_str(), "%63s %lx %*x %*x %*u %*u %*u %lx", name, &destination, &mask) == 3 && destination == 0 &&
        mask == 0)
      names.emplace_back(name);
  }
  std::ifstream v6("/proc/net/ipv6_route");
  while (std::getline(v6, line)) {
    char destination[33], name[64];
    unsigned bits;
    if (sscanf(line.c_str(), "%32s %x %*s %*s %*s %*s %*s %*s %*s %63s", destination, &bits, name) == 3 && bits == 0 &&
        strspn(destination, "0") == 32 && strcmp(name, "lo") != 0)
      names.emplace_back(name);
  }
  return names;
}

bool parse_literal(const std::string &text, Endpoint *endpoint) {
  Endpoint parsed;
  if (inet_pton(AF_INET, text.c_str(), parsed.bytes.data()) == 1) {
    parsed.family = 4;
    parsed.prefix = 32;
  } else if (inet_pton(AF_INET6, text.c_str(), parsed.bytes.data()) == 1) {
    parsed.family = 6;
    parsed.prefix = 128;
  } else {
    return false;
  }
  *endpoint = parsed;
  return true;
}

bool parse_range(const std::string &text, Endpoint *endpoint) {
  size_t slash = text.find('/');
  if (slash == std::string::npos) return parse_literal(text, endpoint);
  char *end = nullptr;
  unsigned long bits = strtoul(text.c_str() + slash + 1, &end, 10);
  if (end == text.c_str() + slash + 1 || *end != 0 || !parse_literal(text.substr(0, slash), endpoint)) return false;
  if (bits > endpoint->prefix) return false;
  endpoint->prefix = static_cast<uint8_t>(bits);
  return true;
}

std::vector<std::string> split(const std::string &text) {
  std::vector<std::string> parts;
  size_t begin = 0;
  while (begin <= text.size()) {
    size_t comma = std::min(text.find(',', begin), text.size());
    std::string part = text.substr(begin, comma - begin);
    part.erase(0, part.find_first_not_of(" \t"));
    part.erase(part.find_last_not_of(" \t") + 1);
    if (!part.empty()) parts.push_back(part);
    begin = comma + 1;
  }
  return parts;
}

bool named_by(const Interface &interface, const std::string &part) {
  if (interface.name == part) return true;
  Endpoint range;
  return parse_range(part, &range) && range.family == interface.address.family &&
         same_prefix(range.bytes.data(), interface.address.bytes.data(), range.prefix);
}

// A listening socket on exactly this address and port, or the errno that says why not.
int listen_at(const sockaddr_storage &storage, socklen_t length, bool both_families, Fd *socket) {
  Fd fd(::socket(storage.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!fd) return errno;
  int on = 1, off = 0;
  // Without it a port is refused for a minute after its last user; two listeners on one port are refused either way.
  setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  if (storage.ss_family == AF_INET6) {
    const int *only = both_families ? &off : &on;
    if (setsockopt(fd.get(), IPPROTO_IPV6, IPV6_V6ONLY, only, sizeof *only) != 0) return errno;
  }
  if (bind(fd.get(), reinterpret_cast<const sockaddr *>(&storage), length) != 0) return errno;
  if (listen(fd.get(), kBacklog) != 0) return errno;
  *socket = std::move(fd);
  return 0;
}

uint16_t bound_port(int fd) {
  sockaddr_storage storage{};
  socklen_t length = sizeof storage;
  if (getsockname(fd, reinterpret_cast<sockaddr *>(&storage), &length) != 0) return 0;
  return ntohs(storage.ss_family == AF_INET ? reinterpret_cast<sockaddr_in *>(&storage)->sin_port
                                            : reinterpret_cast<sockaddr_in6 *>(&storage)->sin6_port);
}

// Tries the ports of `range` in turn. EADDRINUSE: all are taken.
int listen_in_range(Endpoint at, bool both_families, const PortRange &range, Fd *socket) {
  for (uint32_t port = range.low; port <= range.high; ++port) {
    at.port = static_cast<uint16_t>(port);
    sockaddr_storage storage{};
    socklen_t length = to_sockaddr(at, &storage);
    int error = listen_at(storage, length, both_families, socket);
    if (error != EADDRINUSE) return error;
  }
  return EADDRINUSE;
}

int32_t cannot_listen(const std::string &where, const PortRange &range, int error) {
  if (error == EADDRINUSE && range.low != 0)
    return fail(EPT_E_UNAVAILABLE, "open", -1, error,
                "tcp: every port of %u-%u on %s is in use; widen EPT_TCP_PORT_RANGE, or end the group that holds them",
                range.low, range.high, where.c_str());
  if (error == EACCES)
    return fail(EPT_E_UNAVAILABLE, "open", -1, error,
                "tcp: this user may not listen on ports %u-%u of %s; choose a range above 1023 in EPT_TCP_PORT_RANGE",
                range.low, range.high, where.c_str());
  return fail(EPT_E_IO, "open", -1, error, "tcp: can't listen on %s: %s", where.c_str(), errno_text(error).c_str());
}

struct BlobHeader {
  uint32_t magic;
  uint16_t version;
  uint16_t endpoints;
  uint32_t rank, epoch;
  uint16_t streams;
  uint16_t reserved[3];
  uint8_t host[16];
  uint8_t nonce[kNonceBytes];
};
struct BlobEndpoint {
  uint8_t family, prefix;
  uint16_t port;
  uint8_t bytes[16];
};
static_assert(sizeof(BlobHeader) == 72 && sizeof(BlobEndpoint) == 20, "address blob layout");

}  // namespace

bool Endpoint::loopback() const {
  static const uint8_t v6[16] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1};
  return family == 4 ? bytes[0] == 127 : memcmp(bytes.data(), v6, 16) == 0;
}

bool Endpoint::same_subnet(const Endpoint &other) const {
  return family == other.family && prefix == other.prefix && same_prefix(bytes.data(), other.bytes.data(), prefix);
}

socklen_t to_sockaddr(const Endpoint &endpoint, sockaddr_storage *storage) {
  *storage = {};
  if (endpoint.family == 4) {
    auto *v4 = reinterpret_cast<sockaddr_in *>(storage);
    v4->sin_family = AF_INET;
    v4->sin_port = htons(endpoint.port);
    memcpy(&v4->sin_addr, endpoint.bytes.data(), 4);
    return sizeof *v4;
  }
  auto *v6 = reinterpret_cast<sockaddr_in6 *>(storage);
  v6->sin6_family = AF_INET6;
  v6->sin6_port = htons(endpoint.port);
  memcpy(&v6->sin6_addr, endpoint.bytes.data(), 16);
  return sizeof *v6;
}

std::string to_text(const Endpoint &endpoint) {
  char text[INET6_ADDRSTRLEN] = "?";
  inet_ntop(endpoint.family == 4 ? AF_INET : AF_INET6, endpoint.bytes.data(), text, sizeof text);
  return format(endpoint.family == 4 ? "%s:%u" : "[%s]:%u", text, endpoint.port);
}

std::string peer_text(const sockaddr_storage &storage) {
  Endpoint endpoint;
  if (storage.ss_family == AF_INET) {
    const auto *v4 = reinterpret_cast<const sockaddr_in *>(&storage);
    endpoint.family = 4;
    endpoint.port = ntohs(v4->sin_port);
    memcpy(endpoint.bytes.data(), &v4->sin_addr, 4);
  } else {
    const auto *v6 = reinterpret_cast<const sockaddr_in6 *>(&storage);
    endpoint.port = ntohs(v6->sin6_port);
    if (IN6_IS_ADDR_V4MAPPED(&v6->sin6_addr)) {
      endpoint.family = 4;
      memcpy(endpoint.bytes.data(), reinterpret_cast<const uint8_t *>(&v6->sin6_addr) + 12, 4);
    } else {
      endpoint.family = 6;
      memcpy(endpoint.bytes.data(), &v6->sin6_addr, 16);
    }
  }
  return to_text(endpoint);
}

std::vector<Interface> list_interfaces() {
  std::vector<Interface> found;
  ifaddrs *list = nullptr;
  if (getifaddrs(&list) != 0) return found;
  std::unique_ptr<ifaddrs, void (*)(ifaddrs *)> owner(list, freeifaddrs);
  std::vector<std::string> routed = default_route_interfaces();
  for (ifaddrs *entry = list; entry != nullptr; entry = entry->ifa_next) {
    if (entry->ifa_addr == nullptr || (entry->ifa_flags & IFF_UP) == 0) continue;
    Interface interface;
    interface.name = entry->ifa_name;
    interface.loopback = (entry->ifa_flags & IFF_LOOPBACK) != 0;
    interface.default_route = std::find(routed.begin(), routed.end(), interface.name) != routed.end();
    Endpoint &address = interface.address;
    if (entry->ifa_addr->sa_family == AF_INET) {
      address.family = 4;
      memcpy(address.bytes.data(), &reinterpret_cast<sockaddr_in *>(entry->ifa_addr)->sin_addr, 4);
      address.prefix =
          entry->ifa_netmask == nullptr
              ? 32
              : bits_of(reinterpret_cast<uint8_t *>(&reinterpret_cast<sockaddr_in *>(entry->ifa_netmask)->sin_addr), 4);
    } else if (entry->ifa_addr->sa_family == AF_INET6) {
      auto *v6 = reinterpret_cast<sockaddr_in6 *>(entry->ifa_addr);
      // A link-local address means nothing without the dialer's own interface number.
      if (IN6_IS_ADDR_LINKLOCAL(&v6->sin6_addr)) continue;
      address.family = 6;
      memcpy(address.bytes.data(), &v6->sin6_addr, 16);
      address.prefix =
          entry->ifa_netmask == nullptr
              ? 128
              : bits_of(reinterpret_cast<uint8_t *>(&reinterpret_cast<sockaddr_in6 *>(entry->ifa_netmask)->sin6_addr),
                        16);
    } else {
      continue;
    }
    found.push_back(interface);
  }
  auto order = [](const Interface &i) {
    return (i.loopback ? 4 : i.default_route ? 0 : 2) + (i.address.family == 6 ? 1 : 0);
  };
  std::stable_sort(found.begin(), found.end(),
                   [&](const Interface &a, const Interface &b) { return order(a) < order(b); });
  return found;
}

int32_t choose_interfaces(const std::string &setting, std::vector<Interface> *chosen) {
  std::vector<Interface> all = list_interfaces();
  std::vector<std::string> parts = split(setting);
  chosen->clear();
  if (parts.empty()) {
    for (const Interface &interface : all)
      if (interface.loopback || !made_by_containers(interface.name)) chosen->push_back(interface);
    if (chosen->empty())
      return fail(EPT_E_UNAVAILABLE, "open", -1, 0,
                  "tcp: no network interface is up, not even loopback; bring one up (`ip link set lo up`)");
  }
  for (const std::string &part : parts) {
    size_t before = chosen->size();
    for (const Interface &interface : all)
      if (named_by(interface, part)) chosen->push_back(interface);
    if (chosen->size() > before) continue;
    std::string here;
    for (const Interface &interface : all) {
      std::string text = to_text(interface.address);
      here += (here.empty() ? "" : ", ") + interface.name + " " + text.substr(0, text.rfind(':'));
    }
    return fail(
        EPT_E_CONFIG, "open", -1, 0,
        "tcp: EPT_TCP_INTERFACE names '%s', which is no interface, address or CIDR range that is up here; up are: %s",
        part.c_str(), here.empty() ? "none" : here.c_str());
  }
  if (chosen->size() > kMaxEndpoints) chosen->resize(kMaxEndpoints);
  return EPT_OK;
}

int32_t parse_port_range(const std::string &setting, PortRange *range) {
  *range = {};
  if (setting.empty()) return EPT_OK;
  unsigned low = 0, high = 0;
  char rest = 0;
  int fields = sscanf(setting.c_str(), "%u-%u%c", &low, &high, &rest);
  if (fields == 1 && setting.find_first_not_of("0123456789") == std::string::npos) high = low;
  if ((fields != 1 && fields != 2) || low == 0 || high < low || high > 65535 ||
      setting.find_first_not_of("0123456789-") != std::string::npos)
    return fail(EPT_E_CONFIG, "open", -1, 0,
                "tcp: EPT_TCP_PORT_RANGE is '%s'; it must be a port or a range of ports, such as 20000-20100",
                setting.c_str());
  range->low = static_cast<uint16_t>(low);
  range->high = static_cast<uint16_t>(high);
  return EPT_OK;
}

int32_t listen_on(const std::vector<Interface> &chosen, bool wildcard, const PortRange &range, Listening *listening) {
  if (wildcard) {
    Endpoint any;
    any.family = 6;
    Fd socket;
    bool v6 = true;
    int error = listen_in_range(any, true, range, &socket);
    if (error != 0 && error != EADDRINUSE && error != EACCES) {  // no IPv6 here
      v6 = false;
      any.family = 4;
      error = listen_in_range(any, false, range, &socket);
    }
    if (error != 0) return cannot_listen("all addresses", range, error);
    uint16_t port = bound_port(socket.get());
    for (const Interface &interface : chosen) {
      if (interface.address.family == 6 && !v6) continue;
      listening->endpoints.push_back(interface.address);
      listening->endpoints.back().port = port;
    }
    listening->sockets.push_back(std::move(socket));
    return EPT_OK;
  }
  for (const Interface &interface : chosen) {
    Fd socket;
    int error = listen_in_range(interface.address, false, range, &socket);
    if (error != 0) {
      std::string text = to_text(interface.address);
      return cannot_listen(text.substr(0, text.rfind(':')), range, error);
    }
    listening->endpoints.push_back(interface.address);
    listening->endpoints.back().port = bound_port(socket.get());
    listening->sockets.push_back(std::move(socket));
  }
  return EPT_OK;
}

std::vector<uint8_t> encode(const Address &address) {
  size_t count = std::min(address.endpoints.size(), kMaxEndpoints);
  BlobHeader header{};
  header.magic = kAddressMagic;
  header.version = kAddressVersion;
  header.endpoints = static_cast<uint16_t>(count);
  header.rank = address.rank;
  header.epoch = address.epoch;
  header.streams = address.streams;
  memcpy(header.host, address.host.data(), sizeof header.host);
  memcpy(header.nonce, address.nonce.data(), sizeof header.nonce);
  std::vector<uint8_t> blob(sizeof header + count * sizeof(BlobEndpoint));
  memcpy(blob.data(), &header, sizeof header);
  for (size_t i = 0; i < count; ++i) {
    const Endpoint &from = address.endpoints[i];
    BlobEndpoint to{};
    to.family = from.family;
    to.prefix = from.prefix;
    to.port = from.port;
    memcpy(to.bytes, from.bytes.data(), sizeof to.bytes);
    memcpy(blob.data() + sizeof header + i * sizeof to, &to, sizeof to);
  }
  return blob;
}

int32_t decode(const void *blob, size_t length, Address *address) {
  BlobHeader header{};
  if (length < sizeof header)
    return fail(EPT_E_INVALID, "address", -1, 0, "tcp: an address of %zu bytes is too short to be one of tcp", length);
  memcpy(&header, blob, sizeof header);
  if (header.magic != kAddressMagic)
    return fail(EPT_E_INVALID, "address", -1, 0, "tcp: the address is not one of tcp (it starts with %08x)",
                header.magic);
  if (header.version != kAddressVersion)
    return fail(EPT_E_VERSION, "address", header.rank, 0,
                "tcp: rank %u has an address of version %u, this plugin reads %u; run one version on all ranks",
                header.rank, header.version, kAddressVersion);
  if (header.endpoints == 0 || header.endpoints > kMaxEndpoints || header.streams == 0 ||
      length != sizeof header + header.endpoints * sizeof(BlobEndpoint))
    return fail(EPT_E_INVALID, "address", header.rank, 0,
                "tcp: the address of rank %u is damaged: %zu bytes, %u endpoints, %u streams", header.rank, length,
                header.endpoints, header.streams);
  Address parsed;
  parsed.rank = header.rank;
  parsed.epoch = header.epoch;
  parsed.streams = header.streams;
  memcpy(parsed.host.data(), header.host, sizeof header.host);
  memcpy(parsed.nonce.data(), header.nonce, sizeof header.nonce);
  for (size_t i = 0; i < header.endpoints; ++i) {
    BlobEndpoint from{};
    memcpy(&from, static_cast<const uint8_t *>(blob) + sizeof header + i * sizeof from, sizeof from);
    if ((from.family != 4 && from.family != 6) || from.prefix > (from.family == 4 ? 32 : 128) || from.port == 0)
      return fail(EPT_E_INVALID, "address", header.rank, 0,
                  "tcp: endpoint %zu of rank %u is damaged: family %u, prefix %u, port %u", i, header.rank, from.family,
                  from.prefix, from.port);
    Endpoint to;
    to.family = from.family;
    to.prefix = from.prefix;
    to.port = from.port;
    memcpy(to.bytes.data(), from.bytes, sizeof from.bytes);
    parsed.endpoints.push_back(to);
  }
  *address = std::move(parsed);
  return EPT_OK;
}

std::array<uint8_t, 16> this_host(const ept_host &host) {
  std::string text;
  std::ifstream boot("/proc/sys/kernel/random/boot_id");
  std::getline(boot, text);
  char space[PATH_MAX];
  ssize_t length = readlink("/proc/self/ns/net", space, sizeof space);
  if (length > 0) text.append(space, static_cast<size_t>(length));
  static const char key[] = "eptransport tcp host";
  uint8_t mac[32];
  host.hmac_sha256(host.context, key, sizeof key - 1, text.data(), text.size(), mac);
  std::array<uint8_t, 16> id{};
  memcpy(id.data(), mac, id.size());
  return id;
}

std::vector<Endpoint> dial_order(const Address &peer, const Address &own) {
  bool same_host = peer.host == own.host;
  std::vector<Endpoint> near, far;
  for (const Endpoint &endpoint : peer.endpoints) {
    if (endpoint.loopback()) {
      if (same_host) near.push_back(endpoint);
      continue;
    }
    bool ours = std::any_of(own.endpoints.begin(), own.endpoints.end(),
                            [&](const Endpoint &mine) { return mine.same_subnet(endpoint); });
    (ours ? near : far).push_back(endpoint);
  }
  std::stable_sort(near.begin(), near.end(),
                   [](const Endpoint &a, const Endpoint &b) { return a.loopback() && !b.loopback(); });
  near.insert(near.end(), far.begin(), far.end());
  return near;
}

Paths find_paths(const Address &peer, const Address &own, bool interfaces_named) {
  Paths paths;
  std::vector<Endpoint> order = dial_order(peer, own);
  std::vector<Path> others;
  if (interfaces_named) {
    std::vector<size_t> uses(order.size(), 0);
    for (const Endpoint &from : own.endpoints) {
      // The peer's address that fewest ways lead to: of the same subnet if there is one.
      size_t best = order.size();
      auto worth = [&](size_t i) { return std::pair(from.same_subnet(order[i]) ? 0 : 1, uses[i]); };
      for (size_t i = 0; i < order.size(); ++i)
        if (from.family == order[i].family && from.loopback() == order[i].loopback() &&
            (best == order.size() || worth(i) < worth(best)))
          best = i;
      if (best == order.size()) continue;
      ++uses[best];
      paths.list.push_back(Path{order[best], from});
      for (size_t i = 0; i < order.size(); ++i)
        if (i != best && from.family == order[i].family && from.loopback() == order[i].loopback())
          others.push_back(Path{order[i], from});
    }
  }
  paths.stripe = std::max<size_t>(1, paths.list.size());
  paths.list.insert(paths.list.end(), others.begin(), others.end());
  if (paths.list.empty())
    for (const Endpoint &to : order) paths.list.push_back(Path{to, {}});
  for (Path &path : paths.list) path.from.port = 0;
  return paths;
}

Device device_of(const std::string &interface) {
  Device device;
  std::string base = "/sys/class/net/" + interface;
  char path[PATH_MAX];
  ssize_t length = readlink((base + "/device").c_str(), path, sizeof path);
  if (length > 0) {
    std::string target(path, static_cast<size_t>(length));
    std::string last = target.substr(target.rfind('/') + 1);
    if (last.find(':') != std::string::npos) device.pci = last.substr(0, 15);  // "0000:3b:00.0", not "virtio0"
  }
  std::ifstream numa(base + "/device/numa_node");
  if (!(numa >> device.numa)) device.numa = -1;
  std::ifstream speed(base + "/speed");
  int64_t megabits = 0;
  if (speed >> megabits && megabits > 0) device.bits_per_s = static_cast<uint64_t>(megabits) * 1000000;
  return device;
}

}  // namespace tcp
