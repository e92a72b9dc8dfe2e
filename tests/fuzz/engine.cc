// SPDX-License-Identifier: Apache-2.0
//
// What engines say to each other: HELLO, USER, DESCRIPTOR, QUIESCE, QUIESCED, GOODBYE, VOID and whatever a later
// version may say, and immediates, from two members that are played, while the application makes calls.
//
// An input is a row of steps. INVARIANTS, whatever is said:
//   - a signal of one peer is raised by what that peer said alone, and not more often than it spoke;
//   - an application that reads nothing is not made to keep more than the credits that it gave;
//   - every call returns a code that there is, and the engine closes.
#include "eptransport/wire.h"

#include <vector>

#include "wire.h"

namespace {

using namespace fuzz;
using namespace wire;

constexpr uint32_t kWorld = 3, kSteps = 512;
constexpr uint64_t kInbox = 64 * 2;  // send credits of both peers

enum Step : uint8_t { kMessage, kImmediate, kLink, kSignal, kWrite, kSend, kReceive, kQuiesce, kTurn, kDrop, kKinds };

template <class T>
std::string text_of(const T &value) {
  return {reinterpret_cast<const char *>(&value), sizeof value};
}

std::string hello(uint32_t rank) {
  const std::string anchor = region_of(rank, 64);
  ept_hello said{};
  said.rank = rank;
  said.rails = 1;
  said.credits = 256;
  said.send_credits = 64;
  said.credit_chan = 1, said.send_credit_chan = 2, said.plain_chan = 3;
  said.anchor_length = static_cast<uint32_t>(anchor.size());
  return text_of(said) + anchor;
}

void code_is_known(int32_t code) { HOLDS(code > 0 || code > -64); }

class Run {
 public:
  explicit Run(Input in) : in_(in), engine_(wire::open(0, kWorld, 1'000'000)) {
    std::string blobs[kWorld];
    const void *pointers[kWorld];
    size_t lengths[kWorld];
    for (uint32_t rank = 0; rank < kWorld; ++rank) {
      blobs[rank] = address_of(rank, 0);
      pointers[rank] = blobs[rank].data();
      lengths[rank] = blobs[rank].size();
    }
    HOLDS(ept_engine_connect(engine_, pointers, lengths, &error_) == EPT_OK);
    ept_memory desc{};
    desc.size = sizeof desc;
    desc.kind = EPT_MEMORY_HOST;
    desc.address = memory_;
    desc.length = sizeof memory_;
    desc.cuda_device = desc.fd = -1;
    desc.role = EPT_ROLE_DATA;
    desc.access = EPT_ACCESS_LOCAL | EPT_ACCESS_REMOTE_WRITE;
    HOLDS(ept_memory_register(engine_, &desc, &memory_id_, &error_) == EPT_OK);
    const uint8_t begin = in_.take<uint8_t>();
    for (uint32_t peer = 1; peer < kWorld; ++peer) {
      if (begin & peer) say_peer(0, peer, EPT_OK);
      if (begin & peer << 2) message(peer, EPT_MESSAGE_HELLO, 0, hello(peer));
    }
  }

  void run() {
    for (uint32_t i = 0; i < kSteps && !in_.empty(); ++i) step();
    while (ept_engine_progress(engine_, &error_) > 0) {}
    for (uint32_t peer = 1; peer < kWorld; ++peer)
      for (ept_signal_id id : signals_[peer]) {
        uint64_t value = 0;
        HOLDS(ept_signal_value(engine_, id, &value, &error_) == EPT_OK);
        HOLDS(value <= spoke_[peer] + spoke_[0]);
      }
    // What the application never read is bounded.
    uint64_t unread = 0;
    for (uint64_t tag = 0; tag < 8; ++tag)
      while (receive(UINT32_MAX, tag) == EPT_OK) HOLDS(++unread <= kInbox);
    code_is_known(ept_engine_close(engine_, 0, &error_));
  }

 private:
  void message(uint32_t from, uint16_t type, uint64_t tag, const std::string &body, uint16_t version = EPT_WIRE_VERSION,
               uint32_t epoch = 0) {
    const ept_message head{version, type, epoch, tag};
    spoke_[from]++;
    say_message(0, from, text_of(head) + body);
  }

  int32_t receive(uint32_t from, uint64_t tag) {
    char bytes[16384];
    size_t length = sizeof bytes;
    uint32_t who = 0;
    const int32_t code = ept_engine_recv(engine_, from, tag, bytes, &length, &who, 0, &error_);
    if (code == EPT_OK) HOLDS(who > 0 && who < kWorld && length <= sizeof bytes);
    return code;
  }

  void step() {
    const uint8_t what = in_.take<uint8_t>();
    const uint8_t with = in_.take<uint8_t>();
    const uint32_t peer = 1 + with % 2;
    switch (what % kKinds) {
      case kMessage: {
        const uint8_t type = in_.take<uint8_t>();
        const uint8_t length = in_.take<uint8_t>();
        if (with & 4) {  // raw, head and all
          spoke_[peer]++;
          say_message(0, peer, in_.text(length));
        } else {
          const uint32_t copies = with & 8 ? 40 : 1;
          const std::string body = in_.text(length);
          for (uint32_t i = 0; i < copies; ++i) message(peer, type, with >> 4 & 7, body);
        }
        if (with & 0x80) turn();
        break;
      }
      case kImmediate: {
        const uint32_t immediate = in_.take<uint32_t>();
        const uint32_t copies = with & 8 ? 200 : 1;
        const uint32_t from = with & 4 ? UINT32_MAX : peer;
        spoke_[from == UINT32_MAX ? 0 : from] += copies;
        for (uint32_t i = 0; i < copies; ++i) say_immediate(0, from, immediate + (with & 16 ? i << 18 : 0));
        if (with & 0x80) turn();
        break;
      }
      case kLink: {
        static const int32_t codes[] = {EPT_OK, EPT_LATER, EPT_E_PEER_LOST, EPT_E_CLOSED, EPT_E_AUTH, -99};
        say_peer(0, with & 4 ? 77 : peer, codes[(with >> 3) % 6]);
        break;
      }
      case kSignal: {
        ept_signal_id id = 0;
        if (signals_[peer].size() >= 32 || ept_signal_create(engine_, peer, "fuzzed", nullptr, &id, &error_)) break;
        signals_[peer].push_back(id);
        char blob[64];
        size_t length = sizeof blob;
        code_is_known(ept_signal_export(engine_, id, blob, &length, &error_));
        break;
      }
      case kWrite:
        write(peer, with);
        break;
      case kSend:
        code_is_known(ept_engine_send(engine_, peer, with, memory_, with, 0, &error_));
        break;
      case kReceive:
        code_is_known(receive(with & 4 ? UINT32_MAX : peer, with >> 4));
        break;
      case kQuiesce:
        code_is_known(ept_engine_quiesce(engine_, with & 4 ? memory_id_ : 0, with & 8 ? 1 : 2, 0, &error_));
        break;
      case kTurn:
        turn();
        break;
      default: {  // what a peer handed out
        const std::string blob = in_.text(with);
        ept_remote_signal_id remote = 0;
        if (ept_signal_import(engine_, peer, blob.data(), blob.size(), &remote, &error_) == EPT_OK)
          code_is_known(ept_signal_drop(engine_, remote, &error_));
        ept_region_id region = 0;
        if (ept_region_import(engine_, peer, blob.data(), blob.size(), &region, &error_) == EPT_OK)
          code_is_known(ept_region_drop(engine_, region, &error_));
      }
    }
  }

  void write(uint32_t peer, uint8_t with) {
    char blob[4200];
    size_t length = sizeof blob;
    code_is_known(ept_region_export(engine_, memory_id_, peer, 0, sizeof memory_, blob, &length, &error_));
    if (regions_[peer] == 0) {
      const std::string theirs = envelope(peer);
      if (ept_region_import(engine_, peer, theirs.data(), theirs.size(), &regions_[peer], &error_)) {
        regions_[peer] = 0;
        return;
      }
    }
    ept_write one{};
    one.size = sizeof one;
    one.peer = peer;
    one.source = memory_id_;
    one.destination = regions_[peer];
    one.length = with;
    ept_transfer_id transfer = 0;
    code_is_known(ept_engine_write(engine_, &one, &transfer, &error_));
  }

  // memory.cc: RegionBlob.
  static std::string envelope(uint32_t peer) {
    const std::string inner = region_of(peer, 1024);
    struct {
      uint32_t magic;
      uint16_t version, reader;
      uint32_t exporter, epoch;
      uint64_t memory, length;
      uint32_t plugin_length, reserved;
    } head{0x52545045, EPT_WIRE_VERSION, 0, peer, 0, 7, 1024, static_cast<uint32_t>(inner.size()), 0};
    return text_of(head) + inner;
  }

  void turn() { code_is_known(ept_engine_progress(engine_, &error_)); }

  Input in_;
  Error error_;
  ept_engine *engine_;
  char memory_[1024] = {};
  ept_memory_id memory_id_ = 0;
  ept_region_id regions_[kWorld] = {};
  std::vector<ept_signal_id> signals_[kWorld];
  uint64_t spoke_[kWorld] = {};  // what each said that may raise a signal; 0: what no one signed
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t length) {
  Run(Input(bytes, length)).run();
  return 0;
}
