// SPDX-License-Identifier: Apache-2.0
#include "greeting.h"

#include <string>

namespace plugin {
namespace {

using Mac = std::array<uint8_t, 32>;

Mac mac_of(const Credentials &credentials, const void *key, size_t key_length, const Nonce &sender,
           const Nonce &receiver, const MessageHead &head, const Greeting &greeting) {
  char label[16] = {};
  snprintf(label, sizeof label, "ept %.9s 1", credentials.network);
  constexpr size_t kHead = offsetof(MessageHead, token), kBody = offsetof(Greeting, mac);
  uint8_t said[sizeof label + 2 * kNonceBytes + kHead + kBody];
  size_t length = 0;
  auto add = [&](const void *bytes, size_t count) {
    memcpy(said + length, bytes, count);
    length += count;
  };
  add(label, sizeof label);
  add(sender.data(), sender.size());
  add(receiver.data(), receiver.size());
  add(&head, kHead);
  add(&greeting, kBody);
  Mac mac;
  credentials.host->hmac_sha256(credentials.host->context, key, key_length, said, length, mac.data());
  return mac;
}

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

void seal(const Credentials &credentials, const Nonce &receiver, const MessageHead &head, Greeting *greeting) {
  memcpy(greeting->job, credentials.job.data(), sizeof greeting->job);
  Mac mac =
      mac_of(credentials, credentials.secret, credentials.secret_length, credentials.nonce, receiver, head, *greeting);
  Mac witness = mac_of(credentials, receiver.data(), receiver.size(), credentials.nonce, receiver, head, *greeting);
  memcpy(greeting->mac, mac.data(), mac.size());
  memcpy(greeting->witness, witness.data(), witness.size());
}

Trust judge(const Credentials &credentials, const Nonce &sender, const MessageHead &head, const Greeting &greeting) {
  const Nonce &own = credentials.nonce;
  Mac secret = mac_of(credentials, credentials.secret, credentials.secret_length, sender, own, head, greeting);
  Mac member = mac_of(credentials, own.data(), own.size(), sender, own, head, greeting);
  // The secret alone is not enough: who holds a stale address would be taken for one of this instance's peers.
  if (!same_bytes(member.data(), greeting.witness, member.size())) return Trust::kStranger;
  return same_bytes(secret.data(), greeting.mac, secret.size()) ? Trust::kProven : Trust::kMember;
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
