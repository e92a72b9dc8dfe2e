// SPDX-License-Identifier: Apache-2.0
//
// Which NICs and which cores are near, on machines made of files: the PCI trees of a p5, a p5en, one whose GPUs share
// their switches, one without switches, and one that has none of it.
#include <set>

#include "../../native/engine/cores.h"
#include "pci_machine.h"

namespace {

using namespace pci;

// Every NIC is somebody's, and nobody's twice.
void deals_all(const Machine &machine, size_t each) {
  std::set<size_t> taken;
  for (const std::string &gpu : machine.gpus) {
    const std::vector<size_t> mine = machine.near(gpu);
    CHECK_EQ(mine.size(), each);
    for (size_t nic : mine) CHECK(taken.insert(nic).second);
  }
  CHECK_EQ(taken.size(), machine.nics.size());
}

void a_p5_has_four_nics_a_gpu() {
  check::running("p5");
  Machine machine;
  switches(&machine, 8, 4, 1);
  CHECK_EQ(machine.nics.size(), size_t{32});
  deals_all(machine, 4);
  const std::vector<size_t> third = machine.near(machine.gpus[2]);
  CHECK(third == (std::vector<size_t>{8, 9, 10, 11}));
}

void a_p5en_has_two() {
  check::running("p5en");
  Machine machine;
  switches(&machine, 8, 2, 1);
  deals_all(machine, 2);
}

void gpus_that_share_a_switch_deal_its_nics_out() {
  check::running("shared switch");
  Machine machine;
  switches(&machine, 4, 4, 2);
  deals_all(machine, 2);
  Machine one_each;
  switches(&one_each, 4, 2, 2);
  deals_all(one_each, 1);
  Machine few;  // more GPUs than NICs: shared, and evenly
  switches(&few, 1, 2, 4);
  std::multiset<size_t> taken;
  for (const std::string &gpu : few.gpus) {
    CHECK_EQ(few.near(gpu).size(), size_t{1});
    taken.insert(few.near(gpu)[0]);
  }
  CHECK_EQ(taken.count(0), size_t{2});
  CHECK_EQ(taken.count(1), size_t{2});
}

void without_switches_the_numa_node_decides() {
  check::running("NUMA");
  Machine machine;
  machine.card("pci0000:10", "0000:10:00.0", false, 0);
  machine.card("pci0000:20", "0000:20:00.0", false, 1);
  machine.card("pci0000:30", "0000:30:00.0", true, 1);
  CHECK(machine.near("0000:30:00.0") == (std::vector<size_t>{1}));
}

void what_is_not_known_leaves_all() {
  check::running("unknown");
  Machine machine;
  machine.card("pci0000:10", "0000:10:00.0", false, -1);
  machine.card("pci0000:20", "0000:20:00.0", false, -1);
  machine.card("pci0000:30", "0000:30:00.0", true, -1);
  CHECK_EQ(machine.near("0000:30:00.0").size(), size_t{2});
  CHECK_EQ(machine.near("").size(), size_t{2});
  CHECK_EQ(machine.near("0000:99:00.0").size(), size_t{2});
  Machine bare;
  CHECK(bare.near("0000:30:00.0").empty());
}

ept_rail rail_on(int32_t node) {
  ept_rail rail{};
  rail.size = sizeof rail;
  rail.numa = node;
  return rail;
}

void cores_are_those_of_the_rails_nodes() {
  check::running("cores");
  CHECK(ept::cores_of_list("0-3,8") == (std::vector<int32_t>{0, 1, 2, 3, 8}));
  CHECK(ept::cores_of_list("").empty());
  CHECK(ept::cores_of_list("rubbish").empty());
  Machine machine;
  machine.node(0, "0-3,8-11");
  machine.node(1, "4-7,12-15");
  std::vector<int32_t> all;
  for (int32_t core = 0; core < 16; ++core) all.push_back(core);
  CHECK(ept::cores_near({rail_on(1)}, all, machine.system()) == (std::vector<int32_t>{4, 5, 6, 7, 12, 13, 14, 15}));
  CHECK_EQ(ept::cores_near({rail_on(0), rail_on(1)}, all, machine.system()).size(), size_t{16});
  // Only of what the process may use; none of that near is no reason to run nowhere.
  CHECK(ept::cores_near({rail_on(1)}, {3, 4, 5}, machine.system()) == (std::vector<int32_t>{4, 5}));
  CHECK(ept::cores_near({rail_on(1)}, {0, 1}, machine.system()).empty());
  // One rail of unknown place (TCP, shm), or one node: anywhere.
  CHECK(ept::cores_near({rail_on(0), rail_on(-1)}, all, machine.system()).empty());
  Machine flat;
  flat.node(0, "0-15");
  CHECK(ept::cores_near({rail_on(0)}, all, flat.system()).empty());
  CHECK(!ept::cores_allowed().empty());
}

}  // namespace

int main() {
  a_p5_has_four_nics_a_gpu();
  a_p5en_has_two();
  gpus_that_share_a_switch_deal_its_nics_out();
  without_switches_the_numa_node_decides();
  what_is_not_known_leaves_all();
  cores_are_those_of_the_rails_nodes();
  return 0;
}
