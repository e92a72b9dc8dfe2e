// SPDX-License-Identifier: Apache-2.0
// The providers, what is known of each beyond what fi_getinfo says, and the choice of a rail's fi_info.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "library.h"
#include "settings.h"

namespace libfabric {

// What no fi_info tells. docs/backends/libfabric.md says how each was found out.
struct Traits {
  std::string setting;   // EPT_LIBFABRIC_PROVIDER
  std::string provider;  // as in a hint's prov_name
  const char *fabric;    // fabric_attr->name must be this, efa's may be an old name of it; nullptr: any
  bool nic;              // a domain is a card: a rail for each
  bool efa;              // EFA's options, error codes and rules
  // Completions at FI_TRANSMIT_COMPLETE come from the card over there (verbs, EFA): they tell of a refusal. Elsewhere
  // only FI_DELIVERY_COMPLETE does.
  bool card_acknowledges;
  // After fi_close(mr) nothing changes the memory, what is half received included; and a refused write costs that
  // write alone, not the connection that others use.
  bool revokes;
  // An address may be taken out of the vector while the peer may still send. shm of 1.17 reads on what it forgot.
  bool forgets_addresses;
  uint32_t latency_ns;
  uint64_t bytes_per_s;
  uint32_t operation_cost_ns;
  uint32_t max_peers;
  // A write of no bytes with FI_DELIVERY_COMPLETE never arrives and never completes: shm of 1.x waits for the bytes
  // that are still to come. Such a write is asked for FI_TRANSMIT_COMPLETE.
  bool loses_empty_delivery = false;
};

// Of a setting's value; what is in no table gets cautious traits.
Traits traits_of(const std::string &text);

// The clauses that can't be kept over a provider with these traits, as in ept_caps.
uint32_t waived_by(const Traits &traits, const char **why);

// fi_info, freed by the library it came from.
class Info {
 public:
  Info() = default;
  Info(std::shared_ptr<Library> library, fi_info *info) : library_(std::move(library)), info_(info) {}
  Info(Info &&other) noexcept : library_(std::move(other.library_)), info_(std::exchange(other.info_, nullptr)) {}
  Info &operator=(Info &&other) noexcept {
    std::swap(library_, other.library_);
    std::swap(info_, other.info_);
    return *this;
  }
  ~Info() {
    if (info_ != nullptr) library_->freeinfo(info_);
  }
  fi_info *get() const { return info_; }
  fi_info *operator->() const { return info_; }

 private:
  std::shared_ptr<Library> library_;
  fi_info *info_ = nullptr;
};

struct Choice {
  std::string setting;  // what `auto` became
  Traits traits{};
  std::vector<Info> rails;
  bool delivery = false;  // FI_DELIVERY_COMPLETE was asked for and given
  bool gpu = false;       // FI_HMEM was
  std::string mend;       // where it failed
};

// What decides among several cards.
struct Place {
  std::string gpu;             // its PCI address; empty: unknown, all cards are taken
  std::string sysfs = "/sys";  // or a test's
};

// The rails to open: of cards, those near the GPU, if the settings don't name others. CONFIG: the provider or an
// interface is unknown, with what there is; UNAVAILABLE: it is known and has nothing to offer here.
int32_t choose_rails(const std::shared_ptr<Library> &library, const Settings &settings, bool gpu, const Place &place,
                     Choice *choice);

}  // namespace libfabric
