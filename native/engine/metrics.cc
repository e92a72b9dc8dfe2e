/* SPDX-License-Identifier: Apache-2.0
 * The file of a page: made whole before it has a name, locked while its owner lives, swept when it is dead. */
#include "engine/metrics.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <new>

#include "engine/host.h"

namespace ept {

namespace {

/* A container's /dev/shm is often 64 MiB, which others (a data loader, NCCL) need more than we do. */
constexpr uint64_t share_of_free = 4;

std::string system_says(const char *what) { return std::string(what) + ": " + std::strerror(errno); }

uint64_t page_bytes(const PageTitle &title, size_t rails) {
  return sizeof(ept_metrics_page) + rails * sizeof(ept_metrics_rail) + title.world * sizeof(ept_metrics_peer);
}

}  // namespace

void Metrics::open(const PageTitle &title, const std::vector<ept_rail> &rails, const char *folder, Log &log) {
  sweep_pages(folder);
  bytes_ = page_bytes(title, rails.size());
  std::string why_not = share(bytes_, folder);
  if (!page_) {
    void *at = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) throw std::bad_alloc();
    page_ = static_cast<ept_metrics_page *>(at);
  }
  ept_metrics_page &page = *page_;
  page.version = EPT_METRICS_VERSION;
  page.head_bytes = sizeof page;
  page.bytes = bytes_;
  page.pid = static_cast<uint32_t>(getpid());
  page.uid = getuid();
  page.rank = title.rank, page.world = title.world, page.epoch = title.epoch;
  page.rails = static_cast<uint32_t>(rails.size());
  page.rail_offset = sizeof page, page.rail_bytes = sizeof(ept_metrics_rail);
  page.peer_offset = page.rail_offset + page.rails * page.rail_bytes;
  page.peer_bytes = sizeof(ept_metrics_peer);
  page.opened_ns = now_ns();
  std::snprintf(page.job, sizeof page.job, "%s", title.job.c_str());
  std::snprintf(page.backend, sizeof page.backend, "%s", title.backend.c_str());
  auto *base = reinterpret_cast<char *>(page_);
  rails_ = reinterpret_cast<ept_metrics_rail *>(base + page.rail_offset);
  peers_ = reinterpret_cast<ept_metrics_peer *>(base + page.peer_offset);
  for (size_t i = 0; i < rails.size(); i++) {
    std::snprintf(rails_[i].name, sizeof rails_[i].name, "%s", rails[i].name);
    rails_[i].bits_per_s = rails[i].bits_per_s;
  }
  std::atomic_ref(page.magic).store(EPT_METRICS_MAGIC, std::memory_order_release);
  if (why_not.empty()) why_not = publish(folder);
  if (!why_not.empty()) {
    log.say(EPT_LOG_INFO, "its metrics can't be seen from other processes (eptransport top): " + why_not);
  }
}

/* Memory of an unnamed file, filled by nobody yet; or why not. */
std::string Metrics::share(uint64_t bytes, const char *folder) {
  struct statvfs space{};
  if (statvfs(folder, &space)) return system_says(folder);
  const uint64_t free = uint64_t{space.f_bavail} * space.f_frsize;
  if (bytes > free / share_of_free) {
    return std::string(folder) + " has " + std::to_string(free) + " bytes left, of which a page of " +
           std::to_string(bytes) + " would take more than a quarter";
  }
  uint64_t random = 0;
  if (getrandom(&random, sizeof random, 0) != sizeof random) return system_says("getrandom");
  char name[96];
  std::snprintf(name, sizeof name, "%s%u-%d-%08x", EPT_METRICS_PREFIX, getuid(), getpid(),
                static_cast<uint32_t>(random));
  /* A sweep looks at names with the prefix alone, so nobody takes it away before it is locked. */
  path_ = std::string(folder) + "/." + name;
  const int fd = ::open(path_.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600);
  if (fd < 0) return system_says(path_.c_str());
  std::string why_not;
  /* Reserved now: a full file system is an error here and would be a SIGBUS at the first touch. */
  if (const int code = posix_fallocate(fd, 0, static_cast<off_t>(bytes))) {
    errno = code;
    why_not = system_says(path_.c_str());
  } else if (flock(fd, LOCK_EX | LOCK_NB)) {
    why_not = system_says(path_.c_str());
  } else {
    void *at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at != MAP_FAILED) {
      page_ = static_cast<ept_metrics_page *>(at);
      fd_ = fd;
      return {};
    }
    why_not = system_says("mmap");
  }
  unlink(path_.c_str());
  close(fd);
  path_.clear();
  return why_not;
}

/* Gives the file its name. */
std::string Metrics::publish(const char *folder) {
  const std::string name = std::string(folder) + "/" + path_.substr(std::strlen(folder) + 2);
  if (rename(path_.c_str(), name.c_str())) {
    std::string why_not = system_says(name.c_str());
    unlink(path_.c_str());
    path_.clear();
    return why_not;
  }
  path_ = name;
  return {};
}

Metrics::~Metrics() {
  if (!page_) return;
  const bool mine = page_->pid == static_cast<uint32_t>(getpid()); /* a forked child has a copy of this object */
  if (!path_.empty() && mine) unlink(path_.c_str());
  munmap(page_, bytes_);
  if (fd_ >= 0) close(fd_);
}

uint32_t sweep_pages(const char *folder) {
  DIR *all = opendir(folder);
  if (!all) return 0;
  char prefix[48];
  std::snprintf(prefix, sizeof prefix, "%s%u-", EPT_METRICS_PREFIX, getuid());
  uint32_t swept = 0;
  while (const dirent *entry = readdir(all)) {
    if (std::strncmp(entry->d_name, prefix, std::strlen(prefix)) != 0) continue;
    const int fd = openat(dirfd(all), entry->d_name, O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (fd < 0) continue;
    struct stat status{};
    if (!fstat(fd, &status) && S_ISREG(status.st_mode) && status.st_uid == getuid() && !flock(fd, LOCK_EX | LOCK_NB)) {
      swept += unlinkat(dirfd(all), entry->d_name, 0) == 0;
    }
    close(fd);
  }
  closedir(all);
  return swept;
}

}  // namespace ept
