// SPDX-License-Identifier: Apache-2.0
#include "handshake.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

namespace tcp {
namespace {

constexpr char kDialerLabel[16] = "ept-tcp dialer ";
constexpr char kAcceptorLabel[16] = "ept-tcp acceptr";

template <typename Message>
void begin(Message *message) {
  message->head = MessageHead{kHandshakeMagic, kLayout, sizeof(Message)};
}
template <typename Message>
bool well_formed(const Message &message) {
  return message.head.magic == kHandshakeMagic && message.head.layout == kLayout &&
         message.head.bytes == sizeof(Message);
}

using Mac = std::array<uint8_t, 32>;

// What one connection's handshake has said so far.
struct Said {
  const Hello &hello;
  const Challenge &challenge;
  const ResumePoint &resume;  // of the Proof
};

// Over label, Hello, Challenge, the Proof's resume and, from an acceptor, the part of the Answer in front of its macs.
Mac mac_of(const Credentials &credentials, const void *key, size_t key_length, const char (&label)[16],
           const Said &before, const Answer *answer) {
  uint8_t said[sizeof label + sizeof(Hello) + sizeof(Challenge) + sizeof(ResumePoint) + sizeof(Answer)];
  size_t length = 0;
  auto add = [&](const void *bytes, size_t count) {
    memcpy(said + length, bytes, count);
    length += count;
  };
  add(label, sizeof label);
  add(&before.hello, sizeof before.hello);
  add(&before.challenge, sizeof before.challenge);
  add(&before.resume, sizeof before.resume);
  if (answer != nullptr) add(answer, offsetof(Answer, mac));
  Mac mac;
  credentials.host->hmac_sha256(credentials.host->context, key, key_length, said, length, mac.data());
  return mac;
}

Trust judge(const Credentials &credentials, const std::array<uint8_t, kNonceBytes> &nonce, const char (&label)[16],
            const Said &before, const Answer *answer, const uint8_t *mac, const uint8_t *witness) {
  Mac secret = mac_of(credentials, credentials.secret, credentials.secret_length, label, before, answer);
  Mac member = mac_of(credentials, nonce.data(), nonce.size(), label, before, answer);
  bool holds_secret = same_bytes(secret.data(), mac, secret.size());
  bool holds_blob = same_bytes(member.data(), witness, member.size());
  // The secret alone is not enough: the dialer of a stale address would be taken for one of this instance's peers.
  if (!holds_blob) return Trust::kStranger;
  return holds_secret ? Trust::kProven : Trust::kMember;
}

}  // namespace

Credentials make_credentials(const ept_host *host, const ept_open_params &params) {
  Credentials credentials;
  credentials.host = host;
  credentials.secret = params.secret;
  credentials.secret_length = params.secret_length;
  static const char key[] = "eptransport tcp job";
  host->hmac_sha256(host->context, key, sizeof key - 1, params.job, strlen(params.job), credentials.job.data());
  return credentials;
}

Dialer::Dialer(const Credentials &credentials, const std::array<uint8_t, kNonceBytes> &nonce, Hello hello)
    : credentials_(&credentials), nonce_(nonce), hello_(hello) {
  begin(&hello_);
  memcpy(hello_.job, credentials.job.data(), sizeof hello_.job);
  credentials.host->random(credentials.host->context, hello_.nonce, sizeof hello_.nonce);
}

bool Dialer::challenge(const Challenge &challenge, const ResumePoint &resume, Proof *proof) {
  if (!well_formed(challenge)) return false;
  challenge_ = challenge;
  resume_ = resume;
  *proof = {};
  begin(proof);
  proof->resume = resume;
  const Said said{hello_, challenge_, resume_};
  Mac mac = mac_of(*credentials_, credentials_->secret, credentials_->secret_length, kDialerLabel, said, nullptr);
  Mac witness = mac_of(*credentials_, nonce_.data(), nonce_.size(), kDialerLabel, said, nullptr);
  memcpy(proof->mac, mac.data(), mac.size());
  memcpy(proof->witness, witness.data(), witness.size());
  return true;
}

Trust Dialer::answer(const Answer &answer) {
  if (!well_formed(answer) || answer.sequence != answers_ || answer.rank != hello_.peer_rank) return Trust::kStranger;
  if (memchr(answer.text, 0, sizeof answer.text) == nullptr) return Trust::kStranger;
  ++answers_;
  return judge(*credentials_, nonce_, kAcceptorLabel, {hello_, challenge_, resume_}, &answer, answer.mac,
               answer.witness);
}

bool Acceptor::hello(const Hello &hello, Challenge *challenge) {
  if (!well_formed(hello)) return false;
  hello_ = hello;
  *challenge = {};
  begin(challenge);
  credentials_->host->random(credentials_->host->context, challenge->nonce, sizeof challenge->nonce);
  challenge_ = *challenge;
  return true;
}

Trust Acceptor::proof(const Proof &proof) {
  if (!well_formed(proof)) return Trust::kStranger;
  resume_ = proof.resume;
  return judge(*credentials_, nonce_, kDialerLabel, {hello_, challenge_, resume_}, nullptr, proof.mac, proof.witness);
}

void Acceptor::seal(Answer *answer) {
  begin(answer);
  answer->sequence = answers_++;
  const Said said{hello_, challenge_, resume_};
  Mac mac = mac_of(*credentials_, credentials_->secret, credentials_->secret_length, kAcceptorLabel, said, answer);
  Mac witness = mac_of(*credentials_, nonce_.data(), nonce_.size(), kAcceptorLabel, said, answer);
  memcpy(answer->mac, mac.data(), mac.size());
  memcpy(answer->witness, witness.data(), witness.size());
}

int32_t Acceptor::compatible(uint32_t world, std::string *why) const {
  if (!same_bytes(hello_.job, credentials_->job.data(), sizeof hello_.job)) {
    *why = format("rank %u belongs to another job than rank %u", hello_.rank, hello_.peer_rank);
    return EPT_E_MISMATCH;
  }
  if (common_version(hello_) == 0) {
    *why = format("rank %u speaks versions %u-%u, rank %u speaks %u-%u", hello_.rank, hello_.version_low,
                  hello_.version_high, hello_.peer_rank, kVersionLow, kVersionHigh);
    return EPT_E_VERSION;
  }
  if (hello_.world != world) {
    *why = format("world is %u at rank %u and %u at rank %u", hello_.world, hello_.rank, world, hello_.peer_rank);
    return EPT_E_MISMATCH;
  }
  return EPT_OK;
}

Limits smaller(const Limits &mine, const Limits &theirs) {
  Limits agreed = theirs;
  agreed.streams = std::min(mine.streams, theirs.streams);
  agreed.depth = std::min(theirs.depth, kMostDepth);
  agreed.max_message = std::min(mine.max_message, theirs.max_message);
  agreed.max_send = std::min(mine.max_send, theirs.max_send);
  return agreed;
}

uint16_t common_version(const Hello &hello) {
  uint16_t highest = std::min(hello.version_high, kVersionHigh);
  return highest >= std::max(hello.version_low, kVersionLow) ? highest : 0;
}

}  // namespace tcp
