// SPDX-License-Identifier: Apache-2.0
// Stream, the sending half: from `queue` to LOCAL_DONE.
#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "stream.h"

namespace tcp {
namespace {

constexpr size_t kShort = 1024;           // a frame up to this is put together and sent by the cheaper send()
constexpr size_t kBatchFrames = 64;       // frames of one sendmsg
constexpr size_t kBatchBytes = 2u << 20;  // bytes of one sendmsg, but for the last frame
constexpr size_t kFlushBytes = 4u << 20;  // of one flush: bounded work
static_assert(2 * kBatchFrames + 4 <= Job::kMostParts, "the parts of a batch");

const char *refusal_text(int32_t code) {
  if (code == EPT_E_ACCESS) return "the key is unknown, revoked or of another epoch, or the range leaves the region";
  return ept_code(code) == EPT_E_INVALID ? "the operation was not understood" : "it gave no reason";
}

}  // namespace

void Stream::queue(const ept_op &op) {
  Operation &entry = operation(queued_);
  FrameHeader &header = entry.header;
  header = FrameHeader{};
  header.magic = kFrameMagic;
  header.number = queued_;
  header.immediate = op.immediate;
  entry.payload = nullptr;
  entry.cookie = op.cookie;
  entry.mem = nullptr;
  entry.refused = EPT_OK;
  if (op.kind == EPT_OP_SEND) {
    header.type = FrameType::kSend;
    header.length = static_cast<uint32_t>(op.length);
    if (op.length > 0) {
      entry.copy.reset(new uint8_t[op.length]);
      memcpy(entry.copy.get(), op.source, op.length);
      entry.payload = entry.copy.get();
    }
    ++sends_in_flight_;
    ++counters_.tx_sends;
  } else {
    header.slot = op.region->slot;
    memcpy(header.key, op.region->key, sizeof header.key);
    if (op.kind == EPT_OP_WRITE) {
      header.type = FrameType::kWrite;
      header.offset = op.offset;
      header.length = static_cast<uint32_t>(op.length);
      if (op.length > 0) {
        entry.payload = static_cast<const uint8_t *>(op.source);
        entry.mem = op.source_mem;
        ++entry.mem->in_flight;
      }
      counters_.tx_bytes += op.length;
    } else {
      header.type = FrameType::kSignal;
    }
    ++counters_.tx_operations;
  }
  ++queued_;
}

void Stream::flush() {
  if (blocked_ || dead_ || down_ || sends_away()) return;
  if (send_short()) return;
  size_t budget = kFlushBytes;
  while (budget > 0 && (unsent() || control_waits())) {
    iovec parts[Job::kMostParts];
    size_t count = 0, bytes = 0;
    auto add = [&](const void *base, size_t length) {
      parts[count++] = iovec{const_cast<void *>(base), length};
      bytes += length;
    };
    auto add_frame = [&](const Operation &entry, size_t skip) {
      if (skip < sizeof(FrameHeader))
        add(reinterpret_cast<const uint8_t *>(&entry.header) + skip, sizeof(FrameHeader) - skip);
      size_t payload_skip = skip < sizeof(FrameHeader) ? 0 : skip - sizeof(FrameHeader);
      if (entry.header.length > payload_skip) add(entry.payload + payload_skip, entry.header.length - payload_skip);
    };

    uint64_t next = sent_;
    if (sent_offset_ > 0) add_frame(operation(next++), sent_offset_);
    fill_control();
    if (control_end_ > control_begin_)
      add(reinterpret_cast<const uint8_t *>(control_) + control_begin_, control_end_ - control_begin_);
    // An operation's `consumed` may not overtake a refusal that found no room in control_.
    size_t frames = 0;
    while (!finishing_ && !untold() && next != queued_ && frames < kBatchFrames && bytes < kBatchBytes) {
      Operation &entry = operation(next++);
      entry.header.consumed = consumed_;
      add_frame(entry, 0);
      ++frames;
    }
    if (frames > 0) {
      stamped_ = consumed_;
      owed_bytes_ = 0;
      ack_due_ = false;
    }

    if (send_job_ != nullptr && bytes >= kLong) {
      send_job_end_ = next;
      return give(send_job_.get(), parts, count, bytes);
    }
    msghdr message{};
    message.msg_iov = parts;
    message.msg_iovlen = count;
    ssize_t sent = sendmsg(fd_.get(), &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent < 0) {
      if (errno == EINTR) continue;
      if (errno == EAGAIN || errno == EWOULDBLOCK)
        blocked_ = true;
      else
        sending_failed(errno);
      return;
    }
    advance(static_cast<size_t>(sent), true);
    budget -= std::min(budget, static_cast<size_t>(sent));
  }
}

// The peer may have said goodbye before: what it sent is read first, and that decides how this ended.
void Stream::sending_failed(int number) {
  dead_ = true;
  dead_errno_ = number;
  readable_ = true;
}

// The common case of a small operation on an idle stream. False: not that case, or not done.
bool Stream::send_short() {
  if (finishing_ || queued_ - sent_ != 1 || sent_offset_ != 0) return false;
  if (control_begin_ != control_end_ || untold() || finish_due_) return false;
  Operation &entry = operation(sent_);
  if (entry.header.length > kShort) return false;
  entry.header.consumed = consumed_;
  uint8_t frame[sizeof(FrameHeader) + kShort];
  memcpy(frame, &entry.header, sizeof entry.header);
  if (entry.header.length > 0) memcpy(frame + sizeof entry.header, entry.payload, entry.header.length);
  ssize_t sent = send(fd_.get(), frame, sizeof entry.header + entry.header.length, MSG_NOSIGNAL | MSG_DONTWAIT);
  if (sent <= 0) return false;
  stamped_ = consumed_;
  owed_bytes_ = 0;
  ack_due_ = false;
  advance(static_cast<size_t>(sent), false);
  return !unsent();
}

void Stream::fill_control() {
  if (control_begin_ == control_end_) control_begin_ = control_end_ = 0;
  auto room = [&] { return control_end_ / sizeof(FrameHeader) < kControlFrames; };
  while (untold() && room()) {
    const Refusal &refusal = refusals_[told_++];
    put_control(FrameType::kRefused, refusal.number, refusal.code);
  }
  if (untold() || !room()) return;
  uint64_t unbegun = finishing_ ? 0 : queued_ - sent_ - (sent_offset_ > 0 ? 1 : 0);
  if (finish_due_ && unbegun == 0) {
    put_control(FrameType::kFinish, 0, EPT_OK);
    finish_due_ = false;
  } else if (ack_due_ && unbegun == 0) {
    put_control(FrameType::kAck, 0, EPT_OK);
  }
}

void Stream::put_control(FrameType type, uint64_t number, int32_t code) {
  FrameHeader &header = control_[control_end_ / sizeof(FrameHeader)];
  header = FrameHeader{};
  header.magic = kFrameMagic;
  header.type = type;
  header.number = number;
  header.immediate = static_cast<uint32_t>(-code);
  // A refusal that still waits keeps back what comes behind it.
  header.consumed = type == FrameType::kRefused ? std::max(stamped_, number + 1) : consumed_;
  stamped_ = header.consumed;
  if (stamped_ == consumed_) {
    owed_bytes_ = 0;
    ack_due_ = false;
  }
  control_end_ += sizeof(FrameHeader);
}

// The kernel took `bytes` of: the frame that was begun, control_, the frames behind it.
void Stream::advance(size_t bytes, bool control_follows) {
  auto take = [&](size_t *offset, size_t whole) {
    size_t step = std::min(bytes, whole - *offset);
    *offset += step;
    bytes -= step;
    return *offset == whole;
  };
  auto take_frame = [&] {
    Operation &entry = operation(sent_);
    if (!take(&sent_offset_, sizeof(FrameHeader) + entry.header.length)) return false;
    sent_offset_ = 0;
    ++sent_;
    return true;
  };
  if (sent_offset_ > 0 && !take_frame()) return;
  if (control_follows && !take(&control_begin_, control_end_)) return;
  while (bytes > 0 && take_frame()) {}
}

void Stream::acknowledge() {
  if (!owes()) return;
  ack_due_ = true;
  flush();
}

void Stream::finish() {
  take_back_sending();
  take_back_receiving();
  drop_sources();
  // Inside a frame nothing else can be said: the peer then sees the connection end there.
  if (sent_offset_ == 0 && !dead_) {
    finishing_ = finish_due_ = true;
    blocked_ = false;
    flush();
  }
  shutdown(fd_.get(), SHUT_WR);
}

void Stream::drop_sources() {
  for (uint64_t number = completed_; number != queued_; ++number) drop_source(operation(number));
}

void Stream::drop_source(Operation &entry) {
  if (entry.mem != nullptr) --entry.mem->in_flight;
  entry.mem = nullptr;
}

void Stream::complete(plugin::Events *events) {
  while (completing() && !events->full()) {
    Operation &done = operation(completed_);
    if (done.refused == EPT_OK) {
      complete_one(done, events->add(EPT_EVENT_LOCAL_DONE, link_->rank, link_->epoch));
      continue;
    }
    ept_event *event = events->add(
        EPT_EVENT_ERROR, link_->rank, link_->epoch,
        format("rank %u at %s refused an operation of %u bytes at offset %llu: %s", link_->rank, link_->where.c_str(),
               done.header.length, static_cast<unsigned long long>(done.header.offset), refusal_text(done.refused)));
    event->code = done.refused;
    complete_one(done, event);
  }
}

void Stream::abandon(plugin::Events *events, int32_t code, int number, const char *text) {
  while (completed_ != queued_ && !events->full()) {
    Operation &done = operation(completed_);
    ept_event *event = events->add(EPT_EVENT_ERROR, link_->rank, link_->epoch, text);
    event->code = code;
    event->provider_errno = number;
    complete_one(done, event);
  }
}

void Stream::complete_one(Operation &done, ept_event *event) {
  event->rail = rail_;
  event->cookie = done.cookie;
  event->length = done.header.length;
  drop_source(done);
  if (event->kind == EPT_EVENT_ERROR) ++counters_.errors;
  if (done.header.type == FrameType::kSend) {
    --sends_in_flight_;
    done.copy.reset();
  }
  ++completed_;
}

}  // namespace tcp
