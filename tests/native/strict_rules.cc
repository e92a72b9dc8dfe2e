// SPDX-License-Identifier: Apache-2.0
//
// The strict shim, rule by rule: what EFA forbids is refused and has no effect, and what EFA does to those who keep its
// rules (stalls, lost answers, errors of the device, a full queue) happens as its options say.
#include <poll.h>

#include <set>

#include "../../plugins/libfabric/device_errors.h"
#include "../../plugins/libfabric/null.h"
#include "../../plugins/libfabric/strict.h"
#include "strict_net.h"

using libfabric::Deed;
using libfabric::StrictOptions;

namespace {

constexpr int kLong = 600;  // reads: more than anything is held back with the windows of these tests

// Nothing but what the test is about.
StrictOptions calm() {
  StrictOptions options;
  options.window = 2;
  options.eagain = 0;
  return options;
}

std::shared_ptr<libfabric::Library> strict_over_null(const StrictOptions &options) {
  return libfabric::make_strict(libfabric::make_null({.writes_land = true}), options);
}

void words_of_a_setting_are_understood() {
  StrictOptions options;
  CHECK_EQ(libfabric::parse_strict(
               "7:window=32,hold_ms=50,eagain=0.25,storm=9,rma=5000,msg=100,inject=8,tx=3,cq=77,rnr=4,"
               "plain=1,manual=0,error=rnr@100,error=13/7,send_error=abort/2,eq_error=@5,report_to=/tmp/x",
               &options),
           "");
  CHECK_EQ(options.seed, 7);
  CHECK_EQ(options.window, 32);
  CHECK_EQ(options.hold_ms, 50);
  CHECK_EQ(options.eagain, 0.25);
  CHECK_EQ(options.storm, 9);
  CHECK_EQ(options.rma, 5000);
  CHECK_EQ(options.msg, 100);
  CHECK_EQ(options.inject, 8);
  CHECK_EQ(options.tx, 3);
  CHECK_EQ(options.cq, 77);
  CHECK_EQ(options.rnr, 4);
  CHECK(options.plain && !options.manual);
  CHECK_EQ(options.errors.size(), 2);
  CHECK_EQ(options.errors[0].code, 10);
  CHECK(options.errors[0].when(100) && !options.errors[0].when(200));
  CHECK_EQ(options.errors[1].code, 13);
  CHECK(options.errors[1].when(14) && !options.errors[1].when(15));
  CHECK_EQ(options.send_errors[0].code, 8);
  CHECK_EQ(options.report_to, "/tmp/x");
  CHECK(options.event_errors[0](5) && !options.event_errors[0](10));
  for (const char *wrong :
       {"", "x", "-1", "7:window", "7:window=x", "7:eagain=1", "7:tx=0", "7:error=rnr", "7:nothing=1",
        "7:error=nonsense@1", "7:error=rnr@0", "7:eq_error=5", "99999999999999999999"}) {
    StrictOptions other;
    CHECK(!libfabric::parse_strict(wrong, &other).empty());
  }
}

void only_what_efa_has_is_offered() {
  const auto library = strict_over_null(calm());
  const auto offered = [&](auto change) {
    fi_info *hints = strict_hints(*library), *info = nullptr;
    change(hints);
    const int code = library->getinfo(libfabric::kApi, nullptr, nullptr, 0, hints, &info);
    library->freeinfo(hints);
    if (code == 0) library->freeinfo(info);
    return code == 0;
  };
  CHECK(offered([](fi_info *) {}));
  CHECK(!offered([](fi_info *hints) { hints->mode = FI_CONTEXT; }));
  CHECK(!offered([](fi_info *hints) { hints->caps |= FI_RMA_EVENT; }));
  CHECK(!offered([](fi_info *hints) { hints->caps |= FI_TAGGED; }));
  CHECK(!offered([](fi_info *hints) { hints->tx_attr->msg_order = FI_ORDER_SAS; }));
  CHECK(!offered([](fi_info *hints) { hints->domain_attr->mr_mode &= ~FI_MR_LOCAL; }));
  CHECK(!offered([](fi_info *hints) { hints->domain_attr->mr_mode &= ~FI_MR_PROV_KEY; }));
  CHECK(!offered([](fi_info *hints) { hints->domain_attr->cq_data_size = 8; }));
  CHECK(!offered([](fi_info *hints) { hints->domain_attr->data_progress = FI_PROGRESS_AUTO; }));
  StrictOptions shorter = calm();
  shorter.rma = 1000;  // what is told is what is held
  StrictPair held(strict_over_null(shorter));
  CHECK_EQ(held.a.info->ep_attr->max_msg_size, 1000);
  StrictPair pair(library);
  CHECK_EQ(pair.a.info->domain_attr->cq_data_size, 4);
  CHECK_EQ(pair.a.info->tx_attr->msg_order, 0);
  CHECK_EQ(pair.a.info->ep_attr->max_msg_size, 1 << 20);
  CHECK(pair.a.info->mode & FI_CONTEXT2);
  CHECK_EQ(pair.a.info->domain_attr->mr_mode & (FI_MR_LOCAL | FI_MR_PROV_KEY | FI_MR_VIRT_ADDR),
           FI_MR_LOCAL | FI_MR_PROV_KEY | FI_MR_VIRT_ADDR);
}

// `post` breaks a rule: it is refused and counted once with a sentence, and neither side hears of it.
template <class Call>
void refused(Deed deed, const char *sentence, Call post, StrictOptions options = calm()) {
  std::string said;
  options.say = [&](const std::string &text) { said += text; };
  StrictPair pair(strict_over_null(options));
  CHECK_EQ(pair.b.receive(0, 8, pair.b.context()), 0);
  CHECK_EQ(post(pair), -FI_EINVAL);
  CHECK_EQ((*options.report)[deed], 1);
  CHECK_HAS(said, sentence);
  pair.polls(kLong);
  CHECK(pair.a.completed.empty() && pair.a.failures.empty());
  CHECK(pair.b.completed.empty() && pair.b.arrived.empty() && pair.b.failures.empty());
  // And the endpoint goes on.
  CHECK_EQ(pair.a.write(pair.b, pair.to_b, 0, 8, 1, pair.a.context()), 0);
  pair.polls(kLong);
  CHECK_EQ(pair.b.arrived.size(), 1);
}

void rules_of_posts() {
  refused(Deed::kNoDescriptor, "without a descriptor", [](StrictPair &pair) {
    return fi_writedata(pair.a.ep, pair.a.source.data(), 8, nullptr, 1, pair.to_b, pair.b.at(0),
                        fi_mr_key(pair.b.memory_mr), pair.a.context());
  });
  refused(Deed::kNoDescriptor, "without a descriptor", [](StrictPair &pair) {  // of no bytes, too
    return fi_writedata(pair.a.ep, pair.a.source.data(), 0, nullptr, 1, pair.to_b, pair.b.at(0),
                        fi_mr_key(pair.b.memory_mr), pair.a.context());
  });
  refused(Deed::kNoDescriptor, "without a descriptor", [](StrictPair &pair) {
    return fi_send(pair.a.ep, pair.a.source.data(), 8, nullptr, pair.to_b, pair.a.context());
  });
  refused(Deed::kNoDescriptor, "a receive without a descriptor", [](StrictPair &pair) {
    return fi_recv(pair.a.ep, pair.a.source.data(), 8, nullptr, FI_ADDR_UNSPEC, pair.a.context());
  });
  refused(Deed::kWrongDescriptor, "of other memory", [](StrictPair &pair) {
    return fi_writedata(pair.a.ep, pair.a.source.data(), 8, fi_mr_desc(pair.a.memory_mr), 1, pair.to_b, pair.b.at(0),
                        fi_mr_key(pair.b.memory_mr), pair.a.context());
  });
  refused(Deed::kWrongDescriptor, "no registration here", [](StrictPair &pair) {
    return fi_writedata(pair.a.ep, pair.a.source.data(), 8, fi_mr_desc(pair.b.source_mr), 1, pair.to_b, pair.b.at(0),
                        fi_mr_key(pair.b.memory_mr), pair.a.context());
  });
  refused(Deed::kWrongDescriptor, "of other memory", [](StrictPair &pair) {  // one byte past its end
    return fi_send(pair.a.ep, pair.a.source.data() + StrictRank::kBytes - 7, 8, fi_mr_desc(pair.a.source_mr), pair.to_b,
                   pair.a.context());
  });
  refused(Deed::kNoContext, "without a context",
          [](StrictPair &pair) { return pair.a.write(pair.b, pair.to_b, 0, 8, 1, nullptr); });
  refused(Deed::kTooLong, "a message of 8193 bytes, the longest is 8192",
          [](StrictPair &pair) { return pair.a.send(pair.to_b, 0, 8193, pair.a.context()); });
  StrictOptions shorter = calm();
  shorter.rma = 1000;
  refused(
      Deed::kTooLong, "a write of 1001 bytes, the longest is 1000",
      [](StrictPair &pair) { return pair.a.write(pair.b, pair.to_b, 0, 1001, 1, pair.a.context()); }, shorter);
  refused(Deed::kTooLong, "33 bytes, the longest is 32", [](StrictPair &pair) {
    return fi_inject_writedata(pair.a.ep, pair.a.source.data(), 33, 1, pair.to_b, pair.b.at(0),
                               fi_mr_key(pair.b.memory_mr));
  });
  refused(Deed::kPlainWrite, "a write without data", [](StrictPair &pair) {
    return fi_write(pair.a.ep, pair.a.source.data(), 8, fi_mr_desc(pair.a.source_mr), pair.to_b, pair.b.at(0),
                    fi_mr_key(pair.b.memory_mr), pair.a.context());
  });
  for (const uint64_t flag : {FI_MORE, FI_RMA_EVENT, FI_FENCE}) {
    refused(Deed::kFlags, "flags that EFA has not", [flag](StrictPair &pair) {
      iovec iov = {pair.a.source.data(), 8};
      void *descriptor = fi_mr_desc(pair.a.source_mr);
      const fi_rma_iov target = {pair.b.at(0), 8, fi_mr_key(pair.b.memory_mr)};
      const fi_msg_rma message = {&iov, &descriptor, 1, pair.to_b, &target, 1, pair.a.context(), 1};
      return fi_writemsg(pair.a.ep, &message, FI_REMOTE_CQ_DATA | flag);
    });
  }
  refused(Deed::kUnknownHere, "outside the address vector",
          [](StrictPair &pair) { return pair.a.write(pair.b, pair.to_b + 1, 0, 8, 1, pair.a.context()); });
}

void a_context_is_one_operations() {
  const StrictOptions options = calm();
  StrictPair pair(strict_over_null(options));
  fi_context2 *context = pair.a.context();
  CHECK_EQ(pair.a.write(pair.b, pair.to_b, 0, 8, 1, context), 0);
  CHECK_EQ(pair.a.write(pair.b, pair.to_b, 0, 8, 2, context), -FI_EINVAL);
  CHECK_EQ((*options.report)[Deed::kContextInUse], 1);
  pair.polls(kLong);
  CHECK_EQ(pair.a.completed[context], 1);
  CHECK_EQ(pair.b.arrived.size(), 1);
  CHECK_EQ(pair.a.write(pair.b, pair.to_b, 0, 8, 3, context), 0);  // its own again
  CHECK_EQ((*options.report)[Deed::kContextWritten], 0);
  context->internal[7] = nullptr;  // under way
  pair.polls(kLong);
  CHECK_EQ((*options.report)[Deed::kContextWritten], 1);
}

void both_sides_know_each_other_before_a_write() {
  const StrictOptions options = calm();
  const auto library = strict_over_null(options);
  StrictRank a(library), b(library);
  const fi_addr_t to_b = a.learn(b);
  CHECK_EQ(a.write(b, to_b, 0, 8, 1, a.context()), -FI_EINVAL);
  CHECK_EQ((*options.report)[Deed::kUnknownThere], 1);
  // A message goes through or is refused by the device.
  for (int i = 0; i < 40; i++) CHECK_EQ(b.receive(StrictRank::kBytes / 2 + i * 8, 8, b.context()), 0);
  for (int i = 0; i < 40; i++) CHECK_EQ(a.send(to_b, 0, 8, a.context()), 0);
  for (int i = 0; i < kLong; i++) a.poll(), b.poll();
  CHECK_EQ(a.completed.size() + a.failures.size(), 40);
  CHECK_EQ(b.completed.size(), a.completed.size());
  CHECK(a.completed.size() > 5 && a.failures.size() > 5);
  for (const Failure &failure : a.failures) CHECK_EQ(failure.provider, 14);
  // Known: it lands. Taken out again: nobody's fault, the device refuses.
  fi_addr_t to_a = b.learn(a);
  CHECK_EQ(a.write(b, to_b, 0, 8, 1, a.context()), 0);
  for (int i = 0; i < kLong; i++) a.poll(), b.poll();
  CHECK_EQ(b.arrived.size(), 1);
  CHECK_EQ(fi_av_remove(b.av, &to_a, 1, 0), 0);
  a.failures.clear();
  CHECK_EQ(a.write(b, to_b, 0, 8, 1, a.context()), 0);
  for (int i = 0; i < kLong; i++) a.poll(), b.poll();
  CHECK_EQ(a.failures.size(), 1);
  CHECK_EQ(a.failures[0].provider, 14);
  CHECK_EQ(b.arrived.size(), 1);
  CHECK_EQ((*options.report)[Deed::kUnknownThere], 1);
}

void an_endpoint_has_an_event_queue() {
  const StrictOptions options = calm();
  StrictRank rank(strict_over_null(options), 64, FI_WAIT_NONE, false);
  CHECK_EQ(rank.enabled, -FI_EINVAL);
  CHECK_EQ((*options.report)[Deed::kNoEventQueue], 1);
}

void memory_is_there() {
  const StrictOptions options = calm();
  StrictPair pair(strict_over_null(options));
  fid_mr *mr = nullptr;
  CHECK_EQ(fi_mr_reg(pair.a.domain, reinterpret_cast<void *>(64), 4096, FI_WRITE, 0, 0, 0, &mr, nullptr), -FI_EINVAL);
  CHECK_EQ((*options.report)[Deed::kUnmapped], 1);
  // Deregistered under a write that has not left.
  memset(pair.a.source.data(), 9, 8);
  CHECK_EQ(pair.a.write(pair.b, pair.to_b, 0, 8, 1, pair.a.context()), 0);
  CHECK_EQ(fi_close(&pair.a.source_mr->fid), 0);
  pair.a.source_mr = nullptr;
  CHECK_EQ((*options.report)[Deed::kMemoryGone], 1);
  pair.polls(kLong);
  CHECK_EQ(pair.a.failures.size(), 1);
  CHECK_EQ(pair.a.failures[0].provider, 5);
  CHECK(pair.b.arrived.empty());
  CHECK_EQ(pair.b.memory[0], 0);
}

// A storm ends by reading alone, however often one posts; and a post alone moves nothing.
void only_reads_move_anything() {
  StrictOptions options = calm();
  options.eagain = 0.9;
  options.storm = 8;
  StrictPair pair(strict_over_null(options));
  int storms = 0;
  for (int i = 0; i < 20; i++) {
    const ssize_t code = pair.a.write(pair.b, pair.to_b, 0, 8, 1, pair.a.context());
    if (code == 0) continue;
    CHECK_EQ(code, -FI_EAGAIN);
    for (int again = 0; again < 50; again++)
      CHECK_EQ(pair.a.write(pair.b, pair.to_b, 0, 8, 1, pair.a.context()), -FI_EAGAIN);
    storms++;
    pair.a.polls(8);
  }
  CHECK(storms > 0);
  CHECK((*options.report)[Deed::kPostAgain] >= 50);

  StrictPair still(strict_over_null(calm()));
  CHECK_EQ(still.a.write(still.b, still.to_b, 0, 8, 1, still.a.context()), 0);
  still.b.polls(kLong);
  CHECK(still.b.arrived.empty());
  still.polls(kLong);
  CHECK_EQ(still.b.arrived.size(), 1);
}

// However few reads there are: what would wait for some thousand of them goes on by the clock.
void nothing_is_held_for_longer_than_asked() {
  StrictOptions options = calm();
  options.window = 4096;
  options.hold_ms = 5;
  StrictPair pair(strict_over_null(options));
  for (int i = 0; i < 16; i++) CHECK_EQ(pair.a.write(pair.b, pair.to_b, 0, 8, 1, pair.a.context()), 0);
  for (int i = 0; i < 4; i++) {  // window; completion and arrival; and two to spare
    usleep(6000);
    pair.polls(2);
  }
  CHECK_EQ(pair.b.arrived.size(), 16);
  CHECK_EQ(pair.a.completed.size(), 16);
}

void a_target_that_does_not_poll_gets_nothing() {
  const StrictOptions options = calm();
  StrictPair pair(strict_over_null(options), 64, FI_WAIT_FD);
  memset(pair.a.source.data(), 7, 8);
  CHECK_EQ(pair.a.write(pair.b, pair.to_b, 0, 8, 1, pair.a.context()), 0);
  pair.a.polls(kLong);
  CHECK_EQ((*options.report)[Deed::kUnpolled], 1);
  CHECK_EQ(pair.b.memory[0], 0);
  CHECK(pair.a.completed.empty());
  pair.polls(kLong);
  CHECK_EQ(pair.b.memory[0], 7);
  CHECK_EQ(pair.b.arrived.size(), 1);
  // Asleep on its descriptor, it is woken; and so is who sleeps there while another thread posts, for a post needs
  // reads.
  int descriptor = -1, own = -1;
  CHECK_EQ(fi_control(&pair.b.cq->fid, FI_GETWAIT, &descriptor), 0);
  CHECK_EQ(fi_control(&pair.a.cq->fid, FI_GETWAIT, &own), 0);
  pollfd writer = {own, POLLIN, 0};
  fid *queue = &pair.b.cq->fid;
  CHECK_EQ(fi_trywait(pair.b.fabric, &queue, 1), 0);
  pollfd waits = {descriptor, POLLIN, 0};
  CHECK_EQ(::poll(&waits, 1, 0), 0);
  CHECK_EQ(::poll(&writer, 1, 0), 0);
  CHECK_EQ(pair.a.write(pair.b, pair.to_b, 8, 8, 2, pair.a.context()), 0);
  CHECK_EQ(::poll(&writer, 1, 0), 1);
  fid *busy = &pair.a.cq->fid;
  CHECK_EQ(fi_trywait(pair.a.fabric, &busy, 1), -FI_EAGAIN);  // who has something in here may not sleep
  pair.a.polls(kLong);
  CHECK_EQ(::poll(&writer, 1, 0), 0);
  CHECK_EQ(::poll(&waits, 1, 0), 1);
  CHECK_EQ(fi_trywait(pair.b.fabric, &queue, 1), -FI_EAGAIN);
  pair.b.polls(kLong);
  CHECK_EQ(pair.b.arrived.size(), 2);
}

void a_message_without_a_receive_stalls() {
  const StrictOptions options = calm();
  StrictPair pair(strict_over_null(options));
  memset(pair.a.source.data(), 5, 8);
  CHECK_EQ(pair.a.send(pair.to_b, 0, 8, pair.a.context()), 0);
  pair.polls(kLong);
  CHECK(pair.a.completed.empty() && pair.a.failures.empty());
  CHECK_EQ((*options.report)[Deed::kStalled], 1);
  CHECK_EQ(pair.b.receive(64, 8, pair.b.context()), 0);
  pair.polls(kLong);
  CHECK_EQ(pair.a.completed.size(), 1);
  CHECK_EQ(pair.b.completed.size(), 1);
  CHECK_EQ(pair.b.source[64], 5);

  StrictOptions limited = calm();
  limited.rnr = 50;
  StrictPair other(strict_over_null(limited));
  CHECK_EQ(other.a.send(other.to_b, 0, 8, other.a.context()), 0);
  other.polls(kLong);
  CHECK_EQ(other.a.failures.size(), 1);
  CHECK_EQ(other.a.failures[0].provider, 10);
  CHECK_EQ(other.b.receive(64, 8, other.b.context()), 0);
  other.polls(kLong);
  CHECK(other.b.completed.empty());  // it never left
}

void a_queue_that_is_not_read_is_overrun() {
  StrictOptions options = calm(), small = calm();
  small.cq = 8;
  StrictRank a(strict_over_null(options)), b(strict_over_null(small));
  const fi_addr_t to_b = a.learn(b);
  b.learn(a);
  const auto write = [&](uint64_t data) {
    CHECK_EQ(a.write(b, to_b, 0, 8, data, a.context()), 0);
    for (int i = 0; i < 40; i++) a.poll(), b.poll(0);
  };
  for (uint64_t i = 0; i < 8; i++) write(i);  // as many as it holds
  b.polls(kLong);
  CHECK_EQ(b.arrived.size(), 8);
  for (uint64_t i = 0; i < 8; i++) write(i);
  CHECK(b.failures.empty());
  write(8);  // one more
  CHECK_EQ(b.failures.size(), 1);
  CHECK_EQ(b.failures[0].error, FI_EOVERRUN);
  CHECK_EQ((*small.report)[Deed::kOverrun], 1);
  CHECK_EQ(b.poll(), -FI_EOVERRUN);
}

void each_error_of_the_device() {
  for (const libfabric::DeviceError &error : libfabric::kDeviceErrors) {
    std::set<bool> outcomes;
    for (uint64_t seed = 0; seed < 16; seed++) {
      StrictOptions options = calm();
      options.seed = seed;
      options.errors = {{error.code, {.at = 2, .every = 0}}};
      options.send_errors = {{error.code, {.at = 1, .every = 0}}};
      StrictPair pair(strict_over_null(options));
      memset(pair.a.source.data(), 3, 64);
      fi_context2 *contexts[4];
      for (fi_context2 *&context : contexts) context = pair.a.context();
      CHECK_EQ(pair.b.receive(512, 8, pair.b.context()), 0);
      for (uint64_t i = 0; i < 3; i++) CHECK_EQ(pair.a.write(pair.b, pair.to_b, i * 8, 8, i, contexts[i]), 0);
      CHECK_EQ(pair.a.send(pair.to_b, 0, 8, contexts[3]), 0);
      pair.polls(kLong);
      CHECK_EQ(pair.a.failures.size(), 2);
      for (const Failure &failure : pair.a.failures) {
        CHECK(failure.context == contexts[1] || failure.context == contexts[3]);
        CHECK_EQ(failure.error, error.number);
        CHECK_EQ(failure.provider, error.code);
        CHECK_HAS(failure.words, error.words);
      }
      CHECK_EQ(pair.a.completed.size(), 2);
      CHECK_EQ((*options.report)[Deed::kDeviceError], 2);
      const bool seen = pair.b.arrived.size() == 3, landed = pair.b.memory[8] == 3;
      CHECK_EQ(seen, landed);
      CHECK(seen || pair.b.arrived.size() == 2);
      CHECK(!seen || error.may_have_landed);
      outcomes.insert(landed);
      CHECK(pair.b.memory[0] == 3 && pair.b.memory[16] == 3);
      CHECK(pair.b.completed.empty() || error.may_have_landed);
    }
    CHECK_EQ(outcomes.size(), error.may_have_landed ? 2 : 1);
  }
}

void an_error_that_names_no_operation() {
  StrictOptions options = calm();
  options.event_errors = {{.at = 2, .every = 0}};
  StrictPair pair(strict_over_null(options));
  uint32_t event = 0;
  char buffer[256];
  CHECK_EQ(pair.a.write(pair.b, pair.to_b, 0, 8, 1, pair.a.context()), 0);
  CHECK_EQ(fi_eq_read(pair.a.eq, &event, buffer, sizeof buffer, 0), -FI_EAGAIN);
  CHECK_EQ(pair.a.write(pair.b, pair.to_b, 0, 8, 2, pair.a.context()), 0);
  CHECK_EQ(fi_eq_read(pair.a.eq, &event, buffer, sizeof buffer, 0), -FI_EAVAIL);
  fi_eq_err_entry entry = {};
  CHECK(fi_eq_readerr(pair.a.eq, &entry, 0) > 0);
  CHECK_EQ(entry.err, FI_EIO);
  CHECK_HAS(fi_eq_strerror(pair.a.eq, entry.prov_errno, nullptr, nullptr, 0), "internal error");
  CHECK_EQ(fi_eq_read(pair.a.eq, &event, buffer, sizeof buffer, 0), -FI_EAGAIN);
  pair.polls(kLong);
  CHECK_EQ(pair.b.arrived.size(), 2);
  CHECK_EQ(pair.a.completed.size(), 2);
}

void data_has_32_bits() {
  const StrictOptions options = calm();
  StrictPair pair(strict_over_null(options));
  CHECK_EQ(pair.a.write(pair.b, pair.to_b, 0, 8, 0xfeed00000005ull, pair.a.context()), 0);
  pair.polls(kLong);
  CHECK_EQ(pair.b.arrived.size(), 1);
  CHECK_EQ(pair.b.arrived[0], 5);
  CHECK_EQ((*options.report)[Deed::kTruncated], 1);
}

void injections_are_copied() {
  StrictOptions options = calm();
  options.plain = true;
  StrictPair pair(strict_over_null(options));
  unsigned char bytes[8] = {8, 8, 8, 8, 8, 8, 8, 8};
  CHECK_EQ(fi_inject_writedata(pair.a.ep, bytes, 8, 6, pair.to_b, pair.b.at(0), fi_mr_key(pair.b.memory_mr)), 0);
  memset(bytes, 1, 8);
  CHECK_EQ(pair.b.receive(64, 8, pair.b.context()), 0);
  CHECK_EQ(fi_inject(pair.a.ep, bytes, 8, pair.to_b), 0);
  memset(bytes, 2, 8);
  // And a write without data, where it is allowed: nobody hears of it.
  CHECK_EQ(fi_inject_write(pair.a.ep, bytes, 8, pair.to_b, pair.b.at(32), fi_mr_key(pair.b.memory_mr)), 0);
  memset(bytes, 4, 8);
  pair.polls(kLong);
  CHECK_EQ(pair.b.memory[7], 8);
  CHECK_EQ(pair.b.source[71], 1);
  CHECK_EQ(pair.b.memory[39], 2);
  CHECK_EQ(pair.b.arrived.size(), 1);
  CHECK(pair.a.completed.empty() && pair.a.failures.empty());
}

void who_has_closed_is_gone() {
  const StrictOptions options = calm();
  const auto library = strict_over_null(options);
  StrictRank a(library);
  auto b = std::make_unique<StrictRank>(library);
  const fi_addr_t to_b = a.learn(*b);
  b->learn(a);
  CHECK_EQ(a.write(*b, to_b, 0, 8, 1, a.context()), 0);
  CHECK_EQ(a.write(*b, to_b, 0, 8, 2, a.context()), 0);
  b.reset();
  a.polls(kLong);
  CHECK_EQ(a.failures.size(), 2);
  CHECK_EQ(a.failures[0].provider, 9);
}

}  // namespace

int main() {
  RUN(words_of_a_setting_are_understood());
  RUN(only_what_efa_has_is_offered());
  RUN(rules_of_posts());
  RUN(a_context_is_one_operations());
  RUN(both_sides_know_each_other_before_a_write());
  RUN(an_endpoint_has_an_event_queue());
  RUN(memory_is_there());
  RUN(only_reads_move_anything());
  RUN(nothing_is_held_for_longer_than_asked());
  RUN(a_target_that_does_not_poll_gets_nothing());
  RUN(a_message_without_a_receive_stalls());
  RUN(a_queue_that_is_not_read_is_overrun());
  RUN(each_error_of_the_device());
  RUN(an_error_that_names_no_operation());
  RUN(data_has_32_bits());
  RUN(injections_are_copied());
  RUN(who_has_closed_is_gone());
  return 0;
}
