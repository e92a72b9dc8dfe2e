// SPDX-License-Identifier: Apache-2.0
//
// driver.cc: runs a target without libFuzzer, so that any compiler and every CI run can: first each file of the corpus,
// then so many inputs made of them by a seeded generator. Bounded by number, never by time; the same seed gives the
// same inputs everywhere.
//
//     TARGET CORPUS [RUNS [SEED]]     the corpus is a folder of files, or one file
//
// EPT_FUZZ_SAVE=FILE writes each input there before it is run: after a crash it holds the one that did it.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "input.h"

namespace {

using Bytes = std::vector<uint8_t>;

constexpr size_t kLongest = 8192;  // of a made input: longer ones say nothing that two short ones don't

void run(const Bytes &bytes) {
  static const char *save = getenv("EPT_FUZZ_SAVE");
  if (save) {
    std::ofstream out(save, std::ios::binary | std::ios::trunc);
    out.write(reinterpret_cast<const char *>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
  }
  // At an allocation of its own size, so that a sanitizer sees a read past the end.
  const Bytes exact(bytes.begin(), bytes.end());
  LLVMFuzzerTestOneInput(exact.data(), exact.size());
}

std::vector<Bytes> read_corpus(const std::string &where) {
  std::vector<std::filesystem::path> files;
  if (std::filesystem::is_directory(where))
    for (const auto &entry : std::filesystem::directory_iterator(where)) files.push_back(entry.path());
  else
    files.emplace_back(where);
  std::sort(files.begin(), files.end());
  std::vector<Bytes> corpus;
  for (const auto &file : files) {
    std::ifstream in(file, std::ios::binary);
    corpus.emplace_back(std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>());
  }
  return corpus;
}

class Mutator {
 public:
  Mutator(const std::vector<Bytes> &corpus, uint64_t seed) : corpus_(corpus), random_(seed) {}

  Bytes next() {
    Bytes bytes = pick();
    for (size_t i = 0, changes = 1 + below(6); i < changes; ++i) change(bytes);
    if (bytes.size() > kLongest) bytes.resize(kLongest);
    return bytes;
  }

 private:
  // Not std::uniform_int_distribution, which is another one in every standard library.
  size_t below(size_t end) { return end ? random_() % end : 0; }
  const Bytes &pick() { return corpus_[below(corpus_.size())]; }

  void change(Bytes &bytes) {
    static const uint64_t edges[] = {0,          1,
                                     2,          63,
                                     64,         127,
                                     128,        255,
                                     256,        1023,
                                     1024,       65535,
                                     65536,      UINT32_MAX >> 1,
                                     UINT32_MAX, UINT64_MAX >> 1,
                                     UINT64_MAX, uint64_t{1} << 32};
    const size_t at = below(bytes.size());
    switch (below(6)) {
      case 0:  // a bit
        if (!bytes.empty()) bytes[at] = static_cast<uint8_t>(bytes[at] ^ 1u << below(8));
        break;
      case 1:  // a byte
        if (!bytes.empty()) bytes[at] = static_cast<uint8_t>(random_());
        break;
      case 2: {  // a number that is an edge of something
        const uint64_t edge = edges[below(std::size(edges))];
        const size_t width = size_t{1} << below(4);
        if (bytes.size() >= at + width) memcpy(bytes.data() + at, &edge, width);
        break;
      }
      case 3:  // shorter
        bytes.erase(bytes.begin() + static_cast<ptrdiff_t>(at),
                    bytes.begin() + static_cast<ptrdiff_t>(std::min(bytes.size(), at + below(80))));
        break;
      case 4: {  // a part of it again
        const size_t length = std::min(bytes.size() - at, below(160));
        const Bytes part(bytes.begin() + static_cast<ptrdiff_t>(at),
                         bytes.begin() + static_cast<ptrdiff_t>(at + length));
        bytes.insert(bytes.begin() + static_cast<ptrdiff_t>(below(bytes.size())), part.begin(), part.end());
        break;
      }
      default: {  // the end of another one
        const Bytes &other = pick();
        const size_t from = below(other.size());
        bytes.resize(at);
        bytes.insert(bytes.end(), other.begin() + static_cast<ptrdiff_t>(from), other.end());
        break;
      }
    }
  }

  const std::vector<Bytes> &corpus_;
  std::mt19937_64 random_;
};

}  // namespace

int main(int argc, char **argv) {
  if (argc < 2) {
    fprintf(stderr, "%s CORPUS [RUNS [SEED]]\n", argv[0]);
    return 2;
  }
  const size_t runs = argc > 2 ? strtoull(argv[2], nullptr, 10) : 0;
  const uint64_t seed = argc > 3 ? strtoull(argv[3], nullptr, 10) : 1;
  const std::vector<Bytes> corpus = read_corpus(argv[1]);
  if (corpus.empty()) {
    fprintf(stderr, "%s: nothing in %s\n", argv[0], argv[1]);
    return 1;
  }
  for (const Bytes &bytes : corpus) run(bytes);
  Mutator mutator(corpus, seed);
  for (size_t i = 0; i < runs; ++i) run(mutator.next());
  printf("%zu inputs of the corpus, %zu made with seed %llu\n", corpus.size(), runs,
         static_cast<unsigned long long>(seed));
  return 0;
}
