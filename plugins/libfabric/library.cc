// SPDX-License-Identifier: Apache-2.0
#include "library.h"

#include <dlfcn.h>

#include <cstring>

namespace libfabric {
namespace {

// Every release since 1.4 keeps FABRIC_1.3, the layout of headers up to 1.17. Later headers describe the default
// version of a library of their own release only.
constexpr bool kOldHeaders = kApi <= FI_VERSION(1, 17);
constexpr const char *kOldVersion = "FABRIC_1.3";

std::string release_of(uint32_t version) {
  return std::to_string(FI_MAJOR(version)) + "." + std::to_string(FI_MINOR(version));
}

class Opened final : public Library {
 public:
  // Empty: all symbols are there. Else which is not.
  std::string bind(void *handle) {
    handle_ = handle;
    bool all = take("fi_getinfo", &getinfo_, true) && take("fi_freeinfo", &freeinfo_, true) &&
               take("fi_dupinfo", &dupinfo_, true) && take("fi_fabric", &fabric_, false) &&
               take("fi_strerror", &strerror_, false) && take("fi_version", &version_, false);
    if (!all) return missing_;
    path_ = plugin::file_of(handle);
    if (!kOldHeaders && FI_VERSION(FI_MAJOR(version()), FI_MINOR(version())) != kApi)
      return "is release " + release_of(version()) + ", and this plugin was built with the headers of " +
             release_of(kApi) + ", which fit that release only (headers up to 1.17 fit all)";
    return "";
  }

  int getinfo(uint32_t api, const char *node, const char *service, uint64_t flags, const fi_info *hints,
              fi_info **infos) override {
    return getinfo_(api, node, service, flags, hints, infos);
  }
  void freeinfo(fi_info *infos) override { freeinfo_(infos); }
  fi_info *dupinfo(const fi_info *info) override { return dupinfo_(info); }
  int fabric(fi_fabric_attr *attributes, fid_fabric **fabric, void *context) override {
    return fabric_(attributes, fabric, context);
  }
  const char *strerror(int number) override { return strerror_(number); }
  uint32_t version() override { return version_(); }
  const std::string &path() override { return path_; }

 private:
  template <class Function>
  bool take(const char *name, Function **function, bool versioned) {
    void *symbol = versioned && kOldHeaders ? dlvsym(handle_, name, kOldVersion) : dlsym(handle_, name);
    if (symbol == nullptr) {
      missing_ = std::string("has no ") + name + (versioned && kOldHeaders ? "@FABRIC_1.3" : "");
      return false;
    }
    memcpy(function, &symbol, sizeof symbol);
    return true;
  }

  void *handle_ = nullptr;
  std::string missing_, path_;
  int (*getinfo_)(uint32_t, const char *, const char *, uint64_t, const fi_info *, fi_info **) = nullptr;
  void (*freeinfo_)(fi_info *) = nullptr;
  fi_info *(*dupinfo_)(const fi_info *) = nullptr;
  int (*fabric_)(fi_fabric_attr *, fid_fabric **, void *) = nullptr;
  const char *(*strerror_)(int) = nullptr;
  uint32_t (*version_)() = nullptr;
};

constexpr const char *kFile = "libfabric.so.1";

}  // namespace

std::shared_ptr<Library> open_library(const std::string &wanted, plugin::Refusal *refusal) {
  std::vector<std::string> places = {wanted};
  if (wanted.empty()) {
    places = plugin::mapped_files(kFile);
    for (const char *folder : {"/opt/amazon/efa/lib64/", "/opt/amazon/efa/lib/", ""})
      places.push_back(std::string(folder) + kFile);
  }
  auto opened = std::make_shared<Opened>();
  if (plugin::open_first(places, &refusal->why, [&](void *handle) { return opened->bind(handle); })) return opened;
  refusal->mend =
      "install libfabric (apt-get install libfabric1, AWS's EFA installer, or pip install mpich), or give "
      "EPT_LIBFABRIC_LIBRARY=/path/to/libfabric.so.1";
  return nullptr;
}

std::string mapped_libraries() {
  std::string list;
  for (const std::string &file : plugin::mapped_files(kFile)) list += (list.empty() ? "" : ", ") + file;
  return list;
}

}  // namespace libfabric
