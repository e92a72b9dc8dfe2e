// SPDX-License-Identifier: Apache-2.0
#include "greeting.h"

#include <cstddef>
#include <string>
#include <vector>

namespace plugin {
namespace {

using Mac = std::array<uint8_t, 32>;

Mac mac_of(const Credentials &credentials, const void *key, size_t key_length, const Nonce &sender,
           const Nonce &receiver, const void *bytes, size_t length) {
  char label[16] = {};
  snprintf(label, sizeof label, "ept %.9s 1", credentials.network);
  std::vector<uint8_t> said(sizeof label + 2 * kNonceBytes + length);
  uint8_t *at = said.data();
  auto add = [&](const void *part, size_t count) {
    memcpy(at, part, count);
    at += count;
  };
  add(label, sizeof label);
  add(sender.data(), sender.size());
  add(receiver.data(), receiver.size());
  add(bytes, length);
  Mac mac;
  credentials.host->hmac_sha256(credentials.host->context, key, key_length, said.data(), said.size(), mac.data());
  return mac;
}

// What of a greeting is proven: all but the token, which isn't agreed yet, and the proofs.
struct Said {
  static constexpr size_t kHead = offsetof(MessageHead, token), kBody = offsetof(Greeting, mac);
  Said(const MessageHead &head, const Greeting &greeting) {
    memcpy(bytes, &head, kHead);
    memcpy(bytes + kHead, &greeting, kBody);
  }
  uint8_t bytes[kHead + kBody];
};

}  // namespace

Credentials make_credentials(const char *network, const ept_host *host, const ept_open_params &params) {
  Credentials credentials;
  credentials.network = network;
  credentials.host = host;
  credentials.secret = params.secret;
  credentials.secret_length = params.secret_length;
  host->random(host->context, credentials.nonce.data(), credentials.nonce.size());
  const std::string key = format("eptransport %s job", network);
  host->hmac_sha256(host->context, key.data(), key.size(), params.job, strlen(params.job), credentials.job.data());
  return credentials;
}

void prove(const Credentials &credentials, const Nonce &receiver, const void *said, size_t length, uint8_t *mac,
           uint8_t *witness) {
  const Nonce &own = credentials.nonce;
  const Mac secret = mac_of(credentials, credentials.secret, credentials.secret_length, own, receiver, said, length);
  const Mac member = mac_of(credentials, receiver.data(), receiver.size(), own, receiver, said, length);
  memcpy(mac, secret.data(), secret.size());
  memcpy(witness, member.data(), member.size());
}

Trust judge(const Credentials &credentials, const Nonce &sender, const void *said, size_t length, const uint8_t *mac,
            const uint8_t *witness) {
  const Nonce &own = credentials.nonce;
  const Mac secret = mac_of(credentials, credentials.secret, credentials.secret_length, sender, own, said, length);
  const Mac member = mac_of(credentials, own.data(), own.size(), sender, own, said, length);
  // The secret alone is not enough: who holds a stale address would be taken for one of this instance's peers.
  if (!same_bytes(member.data(), witness, member.size())) return Trust::kStranger;
  return same_bytes(secret.data(), mac, secret.size()) ? Trust::kProven : Trust::kMember;
}

void seal(const Credentials &credentials, const Nonce &receiver, const MessageHead &head, Greeting *greeting) {
  memcpy(greeting->job, credentials.job.data(), sizeof greeting->job);
  const Said said(head, *greeting);
  prove(credentials, receiver, said.bytes, sizeof said.bytes, greeting->mac, greeting->witness);
}

Trust judge(const Credentials &credentials, const Nonce &sender, const MessageHead &head, const Greeting &greeting) {
  const Said said(head, greeting);
  return judge(credentials, sender, said.bytes, sizeof said.bytes, greeting.mac, greeting.witness);
}

Token make_token(const Credentials &credentials, uint32_t from, uint32_t to, uint64_t from_opening,
                 uint64_t to_opening) {
  struct {
    char label[16];
    uint32_t from, to;
    uint64_t from_opening, to_opening;
  } said{"ept token 1", from, to, from_opening, to_opening};
  Mac mac;
  credentials.host->hmac_sha256(credentials.host->context, credentials.secret, credentials.secret_length, &said,
                                sizeof said, mac.data());
  Token token;
  memcpy(token.data(), mac.data(), token.size());
  return token;
}

}  // namespace plugin
