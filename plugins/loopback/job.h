// SPDX-License-Identifier: Apache-2.0
//
// job.h: what ranks share. Instances of one job find each other in a switch that the process has once; what others may
// touch of a rank is its port.
//
// LOCKS. There are two kinds, always taken in this order; nobody holds the locks of two ports but `sever` and `greet`.
//   the switch's  who is there, and who has opened whom. Set-up, fences and farewells only.
//   a port's      what others may touch of a rank: arrivals, exports, the bell. A link's state is written under the
//                 locks of both its ports and read under either.
// A post holds the target's lock from the check of the key until the arrival is queued. So whoever has held that lock
// after it revoked a key or severed a link knows that nothing lands any more. A long copy lets go of the lock and pins
// the export meanwhile; revoke and fence wait for its pins, a matter of one memcpy. All else belongs to one instance,
// whose calls the ABI keeps apart.
#pragma once

#include <eptransport/backend.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "queue.h"

namespace loopback {

struct Key {
  uint64_t words[2] = {0, 0};
  bool differs(const Key &other) const { return (words[0] ^ other.words[0]) | (words[1] ^ other.words[1]); }
};

// One region_export: who may write where. The slot's index stands in the blob, the key says whether it still holds.
struct Export {
  uint8_t *base = nullptr;
  uint64_t length = 0;
  Key key;
  uint32_t rank = 0, epoch = 0;  // whose key it is
  uint32_t generation = 0;       // how often the slot was used before
  uint32_t pins = 0;             // long copies under way
  bool valid = false;
};

struct Link;

// Bytes on their way whose sender was told LOCAL_DONE already, so that refusing them could be told to nobody any more.
// A revoke lands what is left of them before it returns.
struct Parcel {
  std::shared_ptr<Link> link;
  uint32_t slot;
  uint8_t *destination;
  std::unique_ptr<char[]> bytes;
  uint64_t length;
  bool landed;
};

// What others may touch of a rank. Lives until the last peer has dropped it.
struct Port {
  Port(uint64_t number, uint32_t own_rank, uint32_t own_epoch, std::string job_secret, uint32_t world,
       uint32_t own_rails)
      : id(number),
        rank(own_rank),
        epoch(own_epoch),
        rails(own_rails),
        secret(std::move(job_secret)),
        consumed(size_t{world} * own_rails) {}
  ~Port() {
    if (descriptor >= 0) ::close(descriptor);
  }

  const uint64_t id;
  const uint32_t rank, epoch, rails;
  const std::string secret;

  // Cache lines of their own: what the owner looks at in every poll, what each arrival changes, and what posters read.
  // From one core to another a line takes 0.2 us, longer than all else that a post or a poll does.
  alignas(64) std::atomic<uint32_t> waiting =
      0;  // the size of `arrived`, for a poll that finds nothing; a hint: relaxed
  alignas(64) std::mutex lock;
  Queue arrived;    // what poll has not taken yet
  size_t room = 0;  // IMM and RECV wait in `arrived` up to here
  alignas(64) std::condition_variable unpinned;
  std::vector<Export> exports;
  std::vector<uint32_t> unused;                // free slots of `exports`
  std::vector<uint32_t> consumed;              // [rank * rails + rail] immediates of its present epoch
  std::vector<std::shared_ptr<Port>> starved;  // told LATER for want of room here
  std::vector<std::shared_ptr<Parcel>> parcels;
  int descriptor = -1;    // made by the first arm
  bool armed = false;     // the owner sleeps on the descriptor
  bool rung = false;      // it is readable
  bool relieved = false;  // a port that had no room for us has some again

  // With the lock held. No system call unless the owner sleeps.
  void ring() {
    if (!armed) return;
    const uint64_t one = 1;
    armed = false;
    rung = ::write(descriptor, &one, sizeof one) == sizeof one;
  }
  Item &arrive() {
    Item &item = arrived.push();
    waiting.store(static_cast<uint32_t>(arrived.size()), std::memory_order_relaxed);
    return item;
  }
  bool full() const { return arrived.size() >= room; }
};

enum class LinkState { kConnecting, kUp, kDown };

// Between two lives of two ranks.
struct Link {
  LinkState state = LinkState::kConnecting;
  std::string why;  // kDown; written once, before the state
};

struct Job {
  using Life = std::pair<uint32_t, uint32_t>;  // rank, epoch
  struct Call {
    std::shared_ptr<Link> link;
    std::shared_ptr<Port> caller;
  };
  uint32_t world;
  std::map<Life, std::shared_ptr<Port>> ports;
  std::map<std::pair<Life, Life>, Call> calls;  // opened by `caller`, the first life, and not by the second yet
};

struct Switch {
  std::mutex lock;
  std::map<std::string, std::weak_ptr<Job>> jobs;
  uint64_t next_port = 1;
};

Switch &the_switch();

// A peer as one instance sees it.
struct Peer {
  std::shared_ptr<Port> port;
  std::shared_ptr<Link> link;
  uint32_t epoch = 0;
};

// With `port`'s lock held: a PEER event about `peer` for its owner.
void tell(Port &port, const Port &peer, int32_t code, const std::string &text);
// With the switch's lock held. Both have opened each other.
void greet(Port &one, Port &other, Link &link);
// With the switch's lock held. After it nothing lands through the link, in either direction; a long copy may be under
// way.
void sever(Job &job, Port &own, Peer &peer, bool tell_own, const std::string &why);

}  // namespace loopback
