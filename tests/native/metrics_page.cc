// SPDX-License-Identifier: Apache-2.0
// metrics_page.cc: the page by itself: buckets, a file that others can read, none where there can't be one, and what
// becomes of the pages of the dead.
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <thread>

#include "check.h"
#include "engine/host.h"
#include "engine/metrics.h"

namespace {

using namespace ept;
namespace fs = std::filesystem;

struct Folder {
  fs::path path;
  Folder() {
    char name[] = "/tmp/ept-metrics-XXXXXX";
    CHECK(mkdtemp(name));
    path = name;
  }
  ~Folder() { fs::remove_all(path); }
  size_t files() const {
    return static_cast<size_t>(std::distance(fs::directory_iterator(path), fs::directory_iterator()));
  }
};

std::vector<ept_rail> two_rails() {
  std::vector<ept_rail> rails(2);
  std::snprintf(rails[0].name, sizeof rails[0].name, "first");
  std::snprintf(rails[1].name, sizeof rails[1].name, "second");
  rails[1].bits_per_s = 400;
  return rails;
}

void open_in(Metrics &metrics, const fs::path &folder, Log &log) {
  metrics.open({1, 3, 7, "a job/0/1", "loopback"}, two_rails(), folder.c_str(), log);
}

/* 2^(b-1) < v <= 2^b: both sides of each edge. */
void buckets_have_their_edges() {
  CHECK_EQ(bucket_of(0), 0u);
  CHECK_EQ(bucket_of(1), 0u);
  for (uint32_t b = 1; b < EPT_METRICS_BUCKETS; b++) {
    const uint64_t edge = uint64_t{1} << b;
    CHECK_EQ(bucket_of(edge), b);
    CHECK_EQ(bucket_of(edge / 2 + 1), b);
    const uint32_t next = b + 1 < EPT_METRICS_BUCKETS ? b + 1 : b; /* the last one is open */
    CHECK_EQ(bucket_of(edge + 1), next);
  }
  CHECK_EQ(bucket_of(UINT64_MAX), EPT_METRICS_BUCKETS - 1);
  ept_metrics_histogram seen{};
  for (uint64_t ns : {1u, 2u, 3u, 4u, 1024u, 1025u}) record(seen, ns);
  ept_metrics_histogram alone{};
  for (uint64_t ns : {1u, 2u, 3u, 4u, 1024u, 1025u}) record_alone(alone, ns);
  CHECK(std::memcmp(&seen, &alone, sizeof seen) == 0);
  CHECK_EQ(seen.count, 6u);
  CHECK_EQ(seen.sum_ns, 2059u);
  CHECK_EQ(seen.max_ns, 1025u);
  CHECK_EQ(seen.buckets[0], 1u);
  CHECK_EQ(seen.buckets[1], 1u);
  CHECK_EQ(seen.buckets[2], 2u);
  CHECK_EQ(seen.buckets[10], 1u);
  CHECK_EQ(seen.buckets[11], 1u);
}

/* No record is lost between threads, whichever lane they are of. */
void threads_count_together() {
  ept_metrics_histogram seen{};
  std::vector<std::thread> threads;
  for (uint64_t t = 0; t < 4; t++) {
    threads.emplace_back([&seen, t] {
      for (uint64_t i = 0; i < 5000; i++) record(seen, i * 4 + t);
    });
  }
  for (std::thread &thread : threads) thread.join();
  uint64_t all = 0;
  for (uint64_t count : seen.buckets) all += count;
  CHECK_EQ(seen.count, 20'000u);
  CHECK_EQ(all, 20'000u);
  CHECK_EQ(seen.max_ns, 19'999u);
  CHECK_EQ(seen.sum_ns, 19'999u * 10'000u);
}

void a_page_is_read_from_its_file() {
  Folder folder;
  Log log;
  Metrics metrics;
  open_in(metrics, folder.path, log);
  CHECK(metrics.shared());
  CHECK_EQ(folder.files(), 1u);
  const fs::path file = *fs::directory_iterator(folder.path);
  CHECK_HAS(file.filename().string(), EPT_METRICS_PREFIX + std::to_string(getuid()) + "-" + std::to_string(getpid()));
  struct stat status{};
  CHECK(!stat(file.c_str(), &status));
  CHECK_EQ(status.st_mode & 07777, 0600u);
  const int fd = open(file.c_str(), O_RDONLY);
  CHECK(fd >= 0);
  const auto size = static_cast<size_t>(status.st_size);
  void *at = mmap(nullptr, size, PROT_READ, MAP_SHARED, fd, 0);
  CHECK(at != MAP_FAILED);
  const auto *page = static_cast<const ept_metrics_page *>(at);
  CHECK_EQ(page->magic, static_cast<uint64_t>(EPT_METRICS_MAGIC));
  CHECK_EQ(page->bytes, size);
  CHECK_EQ(page->pid, static_cast<uint32_t>(getpid()));
  CHECK_EQ(page->rank, 1u);
  CHECK_EQ(page->world, 3u);
  CHECK_EQ(page->epoch, 7u);
  CHECK_EQ(page->peer_offset + page->world * page->peer_bytes, size);
  CHECK_EQ(std::string(page->job), "a job/0/1");
  const auto *bytes = static_cast<const char *>(at);
  const auto *rail = reinterpret_cast<const ept_metrics_rail *>(bytes + page->rail_offset + page->rail_bytes);
  CHECK_EQ(std::string(rail->name), "second");
  CHECK_EQ(rail->bits_per_s, 400u);
  add(metrics.phase(2, EPT_METRICS_COMBINE).tx_bytes, 77);
  const auto *peer = reinterpret_cast<const ept_metrics_peer *>(bytes + page->peer_offset + 2 * page->peer_bytes);
  CHECK_EQ(peer->phases[EPT_METRICS_COMBINE].tx_bytes, 77u);
  munmap(at, size);
  close(fd);
}

void it_goes_with_its_owner() {
  Folder folder;
  Log log;
  {
    Metrics metrics;
    open_in(metrics, folder.path, log);
    CHECK_EQ(sweep_pages(folder.path.c_str()), 0u); /* its owner lives */
    CHECK_EQ(folder.files(), 1u);
  }
  CHECK_EQ(folder.files(), 0u);
}

/* Nothing of it may be missing but the view from outside. */
void without_a_folder_it_counts_for_itself() {
  Log log;
  Metrics metrics;
  open_in(metrics, "/nowhere/at/all", log);
  CHECK(!metrics.shared());
  add(metrics.peer(2).tx_bytes, 5);
  CHECK_EQ(metrics.peer(2).tx_bytes, 5u);
  CHECK_EQ(metrics.page()->magic, static_cast<uint64_t>(EPT_METRICS_MAGIC));
  int32_t level = 0;
  std::string text;
  CHECK(log.next(level, text));
  CHECK_HAS(text, "/nowhere/at/all");
  CHECK(!log.next(level, text)); /* said once */
}

void what_the_dead_left_is_swept() {
  Folder folder;
  int ready[2];
  CHECK(!pipe(ready));
  const pid_t child = fork();
  if (child == 0) {
    Log log;
    Metrics metrics;
    open_in(metrics, folder.path, log);
    char one = 1;
    if (write(ready[1], &one, 1) != 1) _exit(1);
    pause();
    _exit(0);
  }
  char got = 0;
  CHECK_EQ(read(ready[0], &got, 1), 1);
  CHECK_EQ(folder.files(), 1u);
  CHECK_EQ(sweep_pages(folder.path.c_str()), 0u);
  CHECK(!kill(child, SIGKILL));
  CHECK_EQ(waitpid(child, nullptr, 0), child);
  CHECK_EQ(folder.files(), 1u); /* it could not take it along */
  Log log;
  Metrics metrics;
  open_in(metrics, folder.path, log); /* which sweeps */
  CHECK_EQ(folder.files(), 1u);
  CHECK_HAS(metrics.path(), "-" + std::to_string(getpid()) + "-");
  close(ready[0]);
  close(ready[1]);
}

/* What isn't ours by name, or no file, stays. */
void a_sweep_takes_nothing_else() {
  Folder folder;
  const std::string ours = EPT_METRICS_PREFIX + std::to_string(getuid()) + "-";
  for (const char *name : {"other", "eptransport-bench-x"}) close(creat((folder.path / name).c_str(), 0600));
  CHECK(!symlink("/etc/hostname", (folder.path / (ours + "link")).c_str()));
  fs::create_directory(folder.path / (ours + "folder"));
  CHECK_EQ(sweep_pages(folder.path.c_str()), 0u);
  CHECK_EQ(folder.files(), 4u);
  close(creat((folder.path / (ours + "1-stale")).c_str(), 0600));
  CHECK_EQ(sweep_pages(folder.path.c_str()), 1u);
  CHECK_EQ(folder.files(), 4u);
}

}  // namespace

int main() {
  RUN(buckets_have_their_edges());
  RUN(threads_count_together());
  RUN(a_page_is_read_from_its_file());
  RUN(it_goes_with_its_owner());
  RUN(without_a_folder_it_counts_for_itself());
  RUN(what_the_dead_left_is_swept());
  RUN(a_sweep_takes_nothing_else());
  return 0;
}
