// SPDX-License-Identifier: Apache-2.0
// One port of one NIC: its protection domain, its completion queue, and the datagram queue pair by which peers meet.
//
// INVARIANTS
//  - The completion queue has room for every request that can be posted at a time by all queue pairs on it (Plan), so
//    nobody can overrun it, whatever fails: in an error each posted request completes, signalled or not.
//  - Datagrams hold nothing that is not said again, so none is waited for: no free buffer means that it is not said
//  now.
//  - One that finds no way (the link is down, and the event is not read yet) may fail their queue pair. It is muted
//  then, until all that was posted to it has come back, so that no completion of before names a buffer that was posted
//  since; and made ready again under its number, which is what peers know.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "library.h"
#include "ports.h"
#include "shuffle.h"
#include "visible.h"
#include "wire.h"

namespace verbs {

// Closes what it holds.
template <typename Object, int (Library::*Close)(Object *)>
class Owned {
 public:
  Owned() = default;
  Owned(Library *library, Object *object) : library_(library), object_(object) {}
  Owned(Owned &&other) noexcept : library_(other.library_), object_(std::exchange(other.object_, nullptr)) {}
  Owned &operator=(Owned &&other) noexcept {
    if (this != &other) {
      reset();
      library_ = other.library_;
      object_ = std::exchange(other.object_, nullptr);
    }
    return *this;
  }
  ~Owned() { reset(); }

  Object *get() const { return object_; }
  Object *operator->() const { return object_; }
  explicit operator bool() const { return object_ != nullptr; }
  void reset() {
    Object *object = std::exchange(object_, nullptr);
    if (object != nullptr) (library_->*Close)(object);
  }

 private:
  Library *library_ = nullptr;
  Object *object_ = nullptr;
};
using Context = Owned<ibv_context, &Library::close_device>;
using Pd = Owned<ibv_pd, &Library::dealloc_pd>;
using Mr = Owned<ibv_mr, &Library::dereg_mr>;
using Notices = Owned<ibv_comp_channel, &Library::destroy_comp_channel>;
using Cq = Owned<ibv_cq, &Library::destroy_cq>;
using Qp = Owned<ibv_qp, &Library::destroy_qp>;
using Ah = Owned<ibv_ah, &Library::destroy_ah>;

// A port that will do, before anything is opened on it.
struct Port {
  std::string device;
  uint8_t number = 1;
  Gid gid;
  bool ethernet = false;
  uint16_t lid = 0;
  ibv_mtu mtu = IBV_MTU_1024;
  uint64_t bits_per_s = 0;
  std::string pci;
  int32_t numa = -1;
};

// What is posted at a time, at most.
struct Plan {
  uint32_t depth = 0;          // sends of a data queue pair
  uint32_t receives = 0;       // and its receives: what a peer's credits allow, and kReturn
  uint32_t message_depth = 0;  // the same of the queue pair for messages
  uint32_t message_receives = 0;
  uint32_t inline_bytes = 0;
  uint32_t entries = 0;  // of the completion queue
};

// Receives are given back so many at a time.
constexpr uint32_t kReturn = 64;
// Of one SEND. The engine's longest carries a blob of up to 4 KiB.
constexpr uint32_t kMaxSend = 4352;
constexpr uint32_t kSendBuffers = 256;
constexpr uint32_t kSaid = 64;  // datagrams that are being sent

// Memory that is registered on a NIC, for what we say ourselves.
struct Buffers {
  std::unique_ptr<uint8_t[]> bytes;
  Mr mr;
};

struct Nic {
  Nic() = default;
  Nic(const Nic &) = delete;
  Nic &operator=(const Nic &) = delete;

  Library *library = nullptr;
  uint32_t number = 0;
  Port port;
  Plan plan;
  bool up = true;      // the port; events tell
  std::string broken;  // why it is of no use any more; empty: it is

  // In the order of their making; closed in the other one.
  Context context;
  Pd pd;
  Notices notices;
  std::unique_ptr<Shuffle> shuffle;  // a setting asked for it
  Cq cq;
  Mr messages;  // of the instance's send buffers
  Buffers heard, said;
  Qp datagrams;
  Buffers seen;  // where reads of GPU memory end (visible.h)
  Qp reader;     // by which they go; made when the first is
  uint32_t qkey = 0;
  std::vector<uint32_t> free_said;
  bool muted = false;
  uint32_t hears = 0;                                    // receives of datagrams, when it is well
  std::vector<std::pair<uint32_t, uint64_t>> not_heard;  // while it is muted: those that have come back; buffer, wr_id

  bool armed = false;         // asked for a notice, and none was taken since
  std::vector<ibv_wc> stash;  // taken by arm, for the next poll

  NicAddress address() const;
  // How to reach a peer's NIC from this one.
  ibv_ah_attr way_to(const NicAddress &peer, const Settings &settings) const;
  // False: no buffer, or no room; it is said again later.
  bool say(ibv_ah *to, const NicAddress &peer, const Message &message, uint64_t wr_id);
  void listen(uint32_t buffer, uint64_t wr_id);
  // A request of datagrams failed: their queue pair gives back all that is posted. True: it was well until now.
  bool mute();
  // A request of datagrams has come back. Made ready, if it was the last that was missing. False: the NIC refused that.
  bool unmute();
  // The message of a datagram that came into `buffer`.
  const uint8_t *datagram(uint32_t buffer) const;
  // visible.cc: reads a byte of this process's own memory. False: it could not be posted.
  bool read(uint64_t address, uint32_t key, uint64_t wr_id, const ept_host &host, const Settings &settings);
  bool make_reader(const ept_host &host, const Settings &settings);
  // Takes what notices there are; true: there were.
  bool take_notices();
};

// All ports that will do here, the chosen ones; or the reason why there is none, with the mend. `gpu`: the PCI address
// of the GPU that this rank uses, or empty.
int32_t find_ports(Library &library, const Settings &settings, const std::string &gpu, std::vector<Port> *ports,
                   std::string *mend);
// A rank's share of the cards near its GPU (../near.h), then those of the NUMA node that this process runs on, then the
// others; among equals as they come. `sysfs` is /sys, or a test's.
void nearest_first(std::vector<Port> *ports, const std::string &gpu, const std::string &sysfs);

struct Room {
  uint32_t peers;         // ranks, 1 at least
  uint32_t credits;       // immediates of each in flight to us, all rails together
  uint32_t send_credits;  // messages likewise
};

// `ud_id`: the wr_id of the datagram that is received into buffer 0; those of the others follow.
int32_t open_nic(Library *library, const Settings &settings, const Room &room, const Port &port, uint32_t number,
                 uint8_t *send_buffers, const ept_host &host, uint64_t ud_id, Nic *nic);

uint32_t bytes_of(ibv_mtu mtu);

}  // namespace verbs
