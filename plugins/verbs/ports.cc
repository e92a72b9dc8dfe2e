// SPDX-License-Identifier: Apache-2.0
#include "ports.h"

#include <arpa/inet.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>

namespace verbs {
namespace {

constexpr uint32_t kMostGids = 256;  // what gid_index can say; mlx5 has 256, rxe 1,024 of which few are in use

std::string line_of(const std::string &file) {
  std::ifstream stream(file);
  std::string line;
  std::getline(stream, line);
  return line;
}

std::string folder_of(const std::string &sysfs, const std::string &device) {
  return sysfs + "/class/infiniband/" + device;
}

bool named(const std::vector<std::string> &list, const std::string &name) {
  return std::find(list.begin(), list.end(), name) != list.end();
}

// What of the rule is not met, the weightier first.
int cost(const Gid &gid, const std::vector<std::string> &own) {
  return 2 * gid_rank(gid.bytes) + (own.empty() || named(own, gid.interface) ? 0 : 1);
}

}  // namespace

std::vector<Gid> read_gids(const std::string &sysfs, const std::string &device, uint32_t port) {
  std::vector<Gid> gids;
  const std::string folder = folder_of(sysfs, device) + "/ports/" + std::to_string(port);
  for (uint32_t i = 0; i < kMostGids; ++i) {
    const std::string number = std::to_string(i), text = line_of(folder + "/gids/" + number);
    if (text.empty()) break;
    Gid gid;
    gid.index = i;
    if (inet_pton(AF_INET6, text.c_str(), gid.bytes.raw) != 1 || gid_rank(gid.bytes) == 0) continue;
    gid.type = line_of(folder + "/gid_attrs/types/" + number);
    gid.interface = line_of(folder + "/gid_attrs/ndevs/" + number);
    gids.push_back(gid);
  }
  return gids;
}

std::vector<std::string> own_interfaces(const std::string &sysfs, const std::string &device) {
  std::vector<std::string> own;
  std::error_code error;
  for (const auto &entry : std::filesystem::directory_iterator(folder_of(sysfs, device) + "/device/net", error))
    own.push_back(entry.path().filename());
  // A software NIC has no device; it names what it stands on.
  const std::string parent = line_of(folder_of(sysfs, device) + "/parent");
  if (own.empty() && !parent.empty()) own.push_back(parent);
  return own;
}

int gid_rank(const ibv_gid &gid) {
  static const uint8_t none[16] = {}, mapped[12] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff};
  if (memcmp(gid.raw, none, 16) == 0) return 0;
  if (memcmp(gid.raw, mapped, 12) == 0) return gid.raw[12] == 169 && gid.raw[13] == 254 ? 3 : 1;
  if (gid.raw[0] == 0xfe && (gid.raw[1] & 0xc0) == 0x80) {
    // A prefix alone, as in an entry that is not filled yet, is no address.
    return std::all_of(gid.raw + 8, gid.raw + 16, [](uint8_t byte) { return byte == 0; }) ? 0 : 3;
  }
  return 2;
}

std::string gid_text(const ibv_gid &gid) {
  char text[INET6_ADDRSTRLEN] = "";
  inet_ntop(AF_INET6, gid.raw, text, sizeof text);
  return text;
}

const Gid *choose_gid(const std::vector<Gid> &gids, bool ethernet, const std::vector<std::string> &own,
                      const Settings &settings, std::string *why) {
  std::string seen;
  for (const Gid &gid : gids) {
    seen += format("%s%u: %s %s %s", seen.empty() ? "" : "; ", gid.index, gid_text(gid.bytes).c_str(), gid.type.c_str(),
                   gid.interface.c_str());
    if (seen.size() > 400) break;
  }
  if (seen.empty()) seen = "an empty table";
  const int32_t forced = settings.gid_index >= 0 ? settings.gid_index : ethernet ? -1 : 0;
  if (forced >= 0) {
    for (const Gid &gid : gids)
      if (gid.index == static_cast<uint32_t>(forced)) return &gid;
    *why = format("GID index %d is not in use; there are %s", forced, seen.c_str());
    return nullptr;
  }
  const std::vector<std::string> wanted = split(settings.interface);
  const Gid *best = nullptr;
  for (const Gid &gid : gids) {
    if (gid.type != "RoCE v2" || (!wanted.empty() && !named(wanted, gid.interface))) continue;
    if (best == nullptr || cost(gid, own) < cost(*best, own)) best = &gid;
  }
  if (best == nullptr)
    *why = format("it has no RoCE v2 address%s%s; there are %s", wanted.empty() ? "" : " on ",
                  settings.interface.c_str(), seen.c_str());
  return best;
}

std::vector<std::string> split(const std::string &list) {
  std::vector<std::string> parts;
  for (size_t at = 0; at < list.size();) {
    const size_t end = std::min(list.find(',', at), list.size());
    if (end > at) parts.push_back(list.substr(at, end - at));
    at = end + 1;
  }
  return parts;
}

bool parse_devices(const std::string &list, std::vector<WantedPort> *ports, std::string *why) {
  for (const std::string &part : split(list)) {
    const size_t colon = part.find(':');
    WantedPort wanted;
    wanted.device = part.substr(0, colon);
    if (colon != std::string::npos) {
      const std::string number = part.substr(colon + 1);
      char *end = nullptr;
      const long port = strtol(number.c_str(), &end, 10);
      if (number.empty() || *end != 0 || port < 1 || port > 255) {
        *why = format("'%s' in devices: a port is a number from 1 to 255", part.c_str());
        return false;
      }
      wanted.port = static_cast<uint8_t>(port);
    }
    ports->push_back(wanted);
  }
  return true;
}

std::string pci_of(const std::string &sysfs, const std::string &device) {
  std::error_code error;
  const auto path = std::filesystem::canonical(folder_of(sysfs, device) + "/device", error);
  const std::string name = error ? "" : path.filename().string();
  return name.size() == 12 && name[4] == ':' && name[10] == '.' ? name : "";
}

int32_t numa_of(const std::string &sysfs, const std::string &device) {
  const std::string text = line_of(folder_of(sysfs, device) + "/device/numa_node");
  return text.empty() ? -1 : static_cast<int32_t>(strtol(text.c_str(), nullptr, 10));
}

}  // namespace verbs
