// SPDX-License-Identifier: Apache-2.0
//
// What comes through the bootstrap and from messages of peers: address blobs, region blobs; and the settings that are
// parsed by hand. INVARIANTS: what is taken says the same when it is written again; what is refused says why.
#include "tcp_rank.h"

namespace {

using namespace fuzz;
using plugin::Rank;

Rank &rank() {
  static Rank &only = *[] {
    backend();
    plugin::Identity identity;
    identity.world = 4;
    return new Rank(backend(), identity, plugin::Options{{"streams", "1"}});
  }();
  return only;
}

void address(const std::string &blob) {
  tcp::Address parsed;
  const int32_t code = tcp::decode(blob.data(), blob.size(), &parsed);
  HOLDS(code == EPT_OK || code == EPT_E_INVALID || code == EPT_E_VERSION);
  ept_reach reach{};
  reach.size = sizeof reach;
  const int32_t reached = backend().reach(rank().instance, blob.data(), blob.size(), &reach);
  if (code != EPT_OK) {
    HOLDS(reached != EPT_OK);
    HOLDS(!plugin::error_text(backend()).empty());
    HOLDS(backend().peer_open(rank().instance, 1, 0, blob.data(), blob.size()) != EPT_OK);
    return;
  }
  const std::vector<uint8_t> again = tcp::encode(parsed);
  tcp::Address twice;
  HOLDS(again.size() == blob.size());
  HOLDS(tcp::decode(again.data(), again.size(), &twice) == EPT_OK);
  HOLDS(tcp::encode(twice) == again);
  HOLDS(tcp::dial_order(parsed, tcp_by_hand::address_of(rank())).size() <= parsed.endpoints.size());
  for (const tcp::Endpoint &endpoint : parsed.endpoints) HOLDS(!tcp::to_text(endpoint).empty());
}

void region(const std::string &blob) {
  for (uint32_t from : {0u, 1u, 9u}) {
    ept_region *imported = nullptr;
    const int32_t code = backend().region_import(rank().instance, from, blob.data(), blob.size(), &imported);
    HOLDS((code == EPT_OK) == (imported != nullptr));
    if (code == EPT_OK)
      backend().region_drop(imported);
    else
      HOLDS(!plugin::error_text(backend()).empty());
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t length) {
  rank();
  Input in(bytes, length);
  const uint8_t kind = in.take<uint8_t>();
  const std::string rest = in.rest();
  tcp::PortRange range;
  std::vector<tcp::Interface> chosen;
  switch (kind % 4) {
    case 0:
      address(rest);
      break;
    case 1:
      region(rest);
      break;
    case 2:
      if (tcp::parse_port_range(rest, &range) == EPT_OK) HOLDS(range.low <= range.high);
      break;
    default:
      if (tcp::choose_interfaces(rest, &chosen) == EPT_OK) HOLDS(!chosen.empty());
  }
  return 0;
}
